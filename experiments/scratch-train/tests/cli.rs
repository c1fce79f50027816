//! The program as its users meet it. The network is the real one, so the runs are a few steps of two
//! or three pictures.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// A run of two epochs of four steps, the last of each partial, with a checkpoint every three steps.
/// The learning rate is small because the lesson's initialisation diverges on so small batches.
const SMALL_RUN: &str = "--dataset shapes --train-limit 7 --test-limit 3 --validation 0 --epochs 2 \
                         --batch-size 2 --lr 1e-7 --checkpoint-every 3 --seed 5 --threads 2";

fn program(arguments: &str) -> Command {
    test_support::program(env!("CARGO_BIN_EXE_scratch-train"), arguments)
}

/// The program in place of a shell that has done `first`.
#[cfg(unix)]
fn program_after(first: &str, arguments: &str) -> Command {
    let mut command = test_support::program("sh", "-c");
    command.arg(format!(r#"{first}; exec "$0" "$@""#));
    command.arg(env!("CARGO_BIN_EXE_scratch-train"));
    command.args(arguments.split_whitespace());
    command
}

fn small_run(out: &Path) -> Command {
    let mut command = program(SMALL_RUN);
    command.arg("--out").arg(out);
    command
}

fn resume(run: &Path) -> Command {
    let mut command = program("");
    command.arg("--resume").arg(run);
    command
}

fn output(mut command: Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

fn text(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}

fn run_directory(out: &Path) -> PathBuf {
    test_support::only_run(out, "scratch-train")
}

/// What the seed decides: hash of the final weights, and metrics.
fn traces(run: &Path) -> (String, String) {
    let weights = fs::read(run.join("model.safetensors")).unwrap();
    let hash: String = Sha256::digest(weights)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    (hash, metrics)
}

/// A small run that is finished, and the folder that holds it.
fn finished() -> (TempDir, PathBuf) {
    let out = tempfile::tempdir().unwrap();
    let finished = output(small_run(out.path()));
    assert!(finished.status.success(), "{}", text(&finished));
    let run = run_directory(out.path());
    (out, run)
}

fn remove(run: &Path, files: &[&str]) {
    for file in files {
        fs::remove_file(run.join(file)).unwrap();
    }
}

fn uninterrupted() -> (TempDir, (String, String)) {
    let (out, run) = finished();
    (out, traces(&run))
}

fn steps_made(out: &Path) -> usize {
    let run = test_support::run_begun(out, "scratch-train");
    let metrics = run.map(|run| run.join("metrics.jsonl"));
    let metrics = metrics.and_then(|path| fs::read_to_string(path).ok());
    metrics.map_or(0, |text| text.matches("\"event\":\"step\"").count())
}

/// Waits until the run has made `steps` steps; false if the program ended before.
fn wait_for_steps(child: &mut Child, out: &Path, steps: usize) -> bool {
    let deadline = Instant::now() + Duration::from_secs(300);
    while Instant::now() < deadline {
        if steps_made(out) >= steps {
            return true;
        }
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        sleep(Duration::from_millis(5));
    }
    panic!("the run made no {steps} steps within five minutes");
}

fn start(mut command: Command) -> Child {
    let quiet = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    quiet.spawn().unwrap()
}

#[test]
fn a_run_killed_again_and_again_ends_with_the_weights_and_metrics_of_one_never_stopped() {
    let (_out, expected) = uninterrupted();
    let out = tempfile::tempdir().unwrap();
    // Where kills fall differs from one run of this test to the next; the outcome may not.
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let kills =
        std::env::var("KILLS").map_or(clock.subsec_micros(), |kills| kills.parse().unwrap());
    println!("KILLS={kills} in the environment lets the kills fall as they do now");
    let mut child = start(small_run(out.path()));
    for (kill, steps) in [1, 4, 7].into_iter().enumerate() {
        let running = wait_for_steps(&mut child, out.path(), steps);
        assert!(running, "{}", text(&child.wait_with_output().unwrap()));
        let jitter = u64::from(kills) * (kill as u64 + 1) % 400;
        sleep(Duration::from_millis(jitter));
        child.kill().unwrap();
        child.wait().unwrap();
        child = start(resume(&run_directory(out.path())));
    }
    let finished = child.wait_with_output().unwrap();
    assert!(finished.status.success(), "{}", text(&finished));
    assert_eq!(traces(&run_directory(out.path())), expected);
}

#[cfg(unix)]
fn send(signal: &str, child: &Child) {
    let process = child.id().to_string();
    let kill = Command::new("kill").args(["-s", signal, &process]).status();
    assert!(kill.unwrap().success());
}

#[cfg(unix)]
#[test]
fn signals_save_say_how_to_resume_and_exit_with_128_plus_their_number() {
    let of_epochs = |epochs: usize, out: &Path| {
        let mut command = program(&SMALL_RUN.replace("--epochs 2", &format!("--epochs {epochs}")));
        command.arg("--out").arg(out);
        command
    };
    let out = tempfile::tempdir().unwrap();
    // However late the signals come, the run is not at its end.
    let mut command = of_epochs(100_000, out.path());
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        // A process that has made a step listens for signals.
        let steps = steps_made(out.path()) + 2;
        let mut child = start(command);
        assert!(wait_for_steps(&mut child, out.path(), steps));
        send(signal, &child);
        let stopped = child.wait_with_output().unwrap();
        let said = text(&stopped);
        assert_eq!(stopped.status.code(), Some(code), "{said}");
        let run = run_directory(out.path());
        let hint = format!("cargo run -p scratch-train -- --resume {}", run.display());
        assert!(said.contains(&hint), "{said}");
        assert!(said.contains(&format!("Stopped by SIG{signal}")), "{said}");
        command = resume(&run);
    }
    let run = run_directory(out.path());
    let epochs = steps_made(out.path()) / 4 + 1;
    test_support::set_epochs(&run, epochs);
    let finished = output(command);
    assert!(finished.status.success(), "{}", text(&finished));
    let whole = tempfile::tempdir().unwrap();
    let finished = output(of_epochs(epochs, whole.path()));
    assert!(finished.status.success(), "{}", text(&finished));
    assert_eq!(traces(&run), traces(&run_directory(whole.path())));

    let again = output(resume(&run));
    assert!(again.status.success());
    assert!(
        text(&again).contains("finished already"),
        "{}",
        text(&again)
    );

    let mut other = program("--lr 1");
    other.arg("--resume").arg(&run);
    assert_refused(other, "takes every setting from its config.json");
}

#[cfg(target_os = "linux")]
#[test]
fn a_path_that_config_json_cannot_hold_is_refused_by_its_flag() {
    use std::os::unix::ffi::OsStrExt;

    let out = tempfile::tempdir().unwrap();
    let odd = out.path().join(std::ffi::OsStr::from_bytes(b"d\xff"));
    fs::create_dir(&odd).unwrap();
    let init = odd.join("w.safetensors");
    fs::write(&init, "").unwrap();
    for (flag, path) in [("--data-dir", &odd), ("--init", &init)] {
        let mut command = program("--max-steps 1");
        command.arg("--out").arg(out.path().join("runs"));
        command.arg(flag).arg(path);
        let said = assert_refused(command, "the path is not UTF-8");
        assert!(said.contains(&format!("error: {flag} ")), "{said}");
    }
    assert!(!out.path().join("runs").exists());
}

#[cfg(unix)]
#[test]
fn a_run_that_a_full_disk_lets_nobody_begin_leaves_nothing() {
    let out = tempfile::tempdir().unwrap();
    // No file may have a byte, and who writes one learns it as of a full disk.
    let mut command = program_after(r#"trap "" XFSZ; ulimit -f 0"#, SMALL_RUN);
    command.arg("--out").arg(out.path());
    assert_refused(command, "environment.json");
    let runs = fs::read_dir(out.path().join("scratch-train")).unwrap();
    assert_eq!(runs.count(), 0);
}

#[cfg(target_os = "linux")]
#[test]
fn a_hangup_stops_a_run_but_under_nohup() {
    let out = tempfile::tempdir().unwrap();
    let line = SMALL_RUN.replace("--epochs 2", "--epochs 100000");
    let begun = |mut child: Child, steps: usize| {
        assert!(wait_for_steps(&mut child, out.path(), steps));
        child
    };

    let mut command = program_after(r#"trap "" HUP"#, &line);
    command.arg("--out").arg(out.path());
    let child = begun(start(command), 2);
    send("HUP", &child);
    let child = begun(child, steps_made(out.path()) + 2);
    send("TERM", &child);
    let stopped = text(&child.wait_with_output().unwrap());
    assert!(stopped.contains("Stopped by SIGTERM"), "{stopped}");

    if ignores_hangups() {
        test_support::skipped(UNDER_NOHUP);
        return;
    }
    let child = start(resume(&run_directory(out.path())));
    let child = begun(child, steps_made(out.path()) + 2);
    send("HUP", &child);
    send("HUP", &child);
    let stopped = child.wait_with_output().unwrap();
    assert_eq!(stopped.status.code(), Some(129), "{}", text(&stopped));
    let said = text(&stopped);
    assert!(said.contains("Stopped by SIGHUP"), "{said}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_run_whose_terminal_closes_is_saved() {
    if ignores_hangups() {
        test_support::skipped(UNDER_NOHUP);
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name).display().to_string();
    // Without a checkpoint before the last of many steps.
    let line = SMALL_RUN.replace("--train-limit 7", "--train-limit 2000");
    let line = line.replace("--checkpoint-every 3", "--checkpoint-every 0");
    let program = env!("CARGO_BIN_EXE_scratch-train");
    // This shell goes on, to tell what the program ended with. That of the terminal dies.
    let line = format!(
        "trap : HUP; {program} {line} --out {} ; echo $? > {}",
        path(""),
        path("code")
    );
    fs::write(path("run.sh"), line).unwrap();
    let mut terminal = test_support::program("script", "-q -e -c");
    terminal.arg(format!("sh {}; true", path("run.sh")));
    terminal.arg("/dev/null");
    terminal.env("SHELL", "/bin/sh").env("TERM", "xterm");
    let started = terminal.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    let Ok(mut terminal) = started else {
        test_support::skipped("there is no program script, which makes a terminal");
        return;
    };
    assert!(wait_for_steps(&mut terminal, out.path(), 2));
    terminal.kill().unwrap();
    terminal.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(300);
    let code = || fs::read_to_string(path("code")).unwrap_or_default();
    while !code().ends_with('\n') && Instant::now() < deadline {
        sleep(Duration::from_millis(5));
    }
    assert_eq!(code(), "129\n");
    let checkpoints = run_directory(out.path()).join("checkpoints");
    assert_eq!(fs::read_dir(checkpoints).unwrap().count(), 1);
}

#[cfg(target_os = "linux")]
const UNDER_NOHUP: &str = "these tests run under nohup, and so does what they start";

#[cfg(target_os = "linux")]
fn ignores_hangups() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    u64::from_str_radix(ignored.unwrap().trim(), 16).unwrap() & 1 == 1
}

#[test]
fn a_finished_run_reports_epochs_and_leaves_weights_under_pytorchs_names() {
    let (out, (hash, metrics)) = uninterrupted();
    let run = run_directory(out.path());
    let bytes = fs::read(run.join("model.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap();
    assert_eq!(metadata["architecture"], "googlenet-cifar");
    assert_eq!(metadata["step"], "8");
    let weights = SafeTensors::deserialize(&bytes).unwrap();
    for (name, shape) in [
        ("pre_layers.0.weight", &[192, 3, 3, 3][..]),
        ("a3.branch2.2.bias", &[128]),
        ("fc.weight", &[10, 1024]),
    ] {
        assert_eq!(weights.tensor(name).unwrap().shape(), shape);
    }
    assert_eq!(metrics.matches("\"event\":\"evaluation\"").count(), 2);
    let finished = fs::read_to_string(run.join("finished.json")).unwrap();
    assert!(finished.contains(&hash), "{finished}");
}

/// A step each epoch.
const STEP_AN_EPOCH: &str =
    "--dataset shapes --train-limit 2 --test-limit 1 --batch-size 2 --lr 1e-7 --threads 2";

#[test]
fn evaluations_come_after_every_so_many_epochs_and_after_the_last() {
    for (every, expected) in [(0, &[3][..]), (2, &[2, 3])] {
        let out = tempfile::tempdir().unwrap();
        let line = format!("{STEP_AN_EPOCH} --epochs 3 --eval-every {every}");
        let mut run = program(&line);
        run.arg("--out").arg(out.path());
        let finished = output(run);
        assert!(finished.status.success(), "{}", text(&finished));
        let run = run_directory(out.path());
        let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let events = metrics.lines().map(|line| line.parse::<Value>().unwrap());
        let evaluations: Vec<Value> = events
            .filter(|event| event["event"] == "evaluation")
            .collect();
        let epochs: Vec<&Value> = evaluations.iter().map(|event| &event["epoch"]).collect();
        assert_eq!(epochs, expected, "{metrics}");

        let finished = fs::read_to_string(run.join("finished.json")).unwrap();
        let finished: Value = finished.parse().unwrap();
        let (last, summary) = (
            evaluations.last().unwrap(),
            &finished["evaluations"]["test"],
        );
        for field in ["loss", "correct", "images"] {
            assert!(summary[field].is_number(), "{finished}");
            assert_eq!(summary[field], last[field], "{field}");
        }
    }
}

#[test]
fn a_profile_counts_each_part_and_each_layer_once_a_step_and_no_evaluation() {
    let out = tempfile::tempdir().unwrap();
    let line = format!("{STEP_AN_EPOCH} --epochs 2 --profile --device cpu");
    let mut run = program(&line);
    run.arg("--out").arg(out.path());
    let finished = output(run);
    let said = text(&finished);
    assert!(finished.status.success(), "{said}");
    assert!(said.contains("2 steps of "), "{said}");
    let run = run_directory(out.path());
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    assert_eq!(metrics.matches("\"event\":\"evaluation\"").count(), 2);

    let profile = fs::read_to_string(run.join("profile.csv")).unwrap();
    let mut lines = profile.lines();
    assert_eq!(
        lines.next(),
        Some("layer,pass,calls,nanoseconds,flop,bytes")
    );
    let rows: Vec<Vec<&str>> = lines.map(|line| line.split(',').collect()).collect();
    for row in &rows {
        assert_eq!(row[2], "2", "{row:?}");
    }
    let parts = rows.iter().filter(|row| row[0].is_empty());
    let parts: Vec<&str> = parts.map(|row| row[1]).collect();
    assert_eq!(parts, ["data", "forward", "loss", "backward", "update"]);
    for pass in ["forward", "input gradient", "weight gradient"] {
        let of_a_layer = |row: &Vec<&str>| row[..2] == ["a3.branch2.2", pass];
        assert!(rows.iter().any(of_a_layer), "{pass} in\n{profile}");
    }
}

#[test]
fn a_run_begins_with_the_weights_of_init_and_refuses_others_listing_every_difference() {
    let (out, _) = uninterrupted();
    let weights = run_directory(out.path()).join("model.safetensors");
    // No learning: what comes out is what went in.
    let line = "--dataset shapes --train-limit 2 --test-limit 1 --max-steps 1 --batch-size 2 --lr 0 \
                --eval-every 0";
    let with_init = |file: &Path, out: &Path| {
        let mut command = program(line);
        command.arg("--init").arg(file).arg("--out").arg(out);
        command
    };
    let second = tempfile::tempdir().unwrap();
    let finished = output(with_init(&weights, second.path()));
    assert!(finished.status.success(), "{}", text(&finished));
    let copied = run_directory(second.path()).join("model.safetensors");
    let tensors = |path: &Path| -> BTreeMap<String, Vec<u8>> {
        let bytes = fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.tensors().into_iter();
        tensors
            .map(|(name, view)| (name, view.data().to_vec()))
            .collect()
    };
    assert_eq!(tensors(&weights), tensors(&copied));

    let bytes = fs::read(&weights).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut changed: BTreeMap<String, TensorView<'_>> = file.tensors().into_iter().collect();
    let bias = changed.remove("fc.bias").unwrap();
    changed.insert("head.bias".into(), bias);
    let flat = changed["fc.weight"].clone();
    let flat = TensorView::new(flat.dtype(), vec![10_240], flat.data()).unwrap();
    changed.insert("fc.weight".into(), flat);
    let other = second.path().join("other.safetensors");
    safetensors::serialize_to_file(changed, None, &other).unwrap();
    let refused = with_init(&other, second.path());
    let said = assert_refused(refused, "missing: fc.bias");
    assert!(said.contains("unexpected: head.bias"), "{said}");
    assert!(said.contains("misshapen: fc.weight is f32 [10240], the model has f32 [10, 1024]"));

    fs::write(&other, &bytes[..1000]).unwrap();
    assert_refused(with_init(&other, second.path()), "other.safetensors");
    assert_refused(
        with_init(Path::new("absent"), second.path()),
        "cannot read --init absent",
    );
}

#[test]
fn the_summary_shows_the_network_and_trains_nothing() {
    let shown = output(program("--summary"));
    assert!(shown.status.success());
    assert!(text(&shown).contains("5,864,762"), "{}", text(&shown));
    // A rank that is not the first shows it, too.
    let mut rank = program("--summary");
    rank.envs([("RANK", "1"), ("WORLD_SIZE", "2")]);
    rank.envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")]);
    assert_eq!(output(rank).stdout, shown.stdout);
}

#[cfg(unix)]
#[test]
fn a_run_may_lie_in_a_folder_whose_name_is_no_text() {
    use std::os::unix::ffi::OsStrExt;
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join(std::ffi::OsStr::from_bytes(b"runs-\xff"));
    let mut first = small_run(&out);
    first.args(["--max-steps", "1"]);
    let first = output(first);
    assert!(first.status.success(), "{}", text(&first));
    let run = run_directory(&out);
    remove(&run, &["finished.json", "model.safetensors"]);
    let resumed = output(resume(&run));
    assert!(resumed.status.success(), "{}", text(&resumed));
}

#[test]
fn bad_input_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a-file");
    fs::write(&file, "").unwrap();
    let part = dir.path().join("part");
    let [empty, part, file] =
        [dir.path().join("empty"), part, file].map(|path| path.display().to_string());
    fs::create_dir(&empty).unwrap();
    fs::create_dir(&part).unwrap();
    for batch in 1..=5 {
        fs::write(format!("{part}/data_batch_{batch}.bin"), "").unwrap();
    }
    let cases = [
        ("--batch-size 0".to_string(), "from 1 to 65536"),
        ("--batch-size 99999999999".into(), "from 1 to 65536"),
        (
            "--dataset shapes --test-limit 18446744073709551615".into(),
            "1000000 shapes",
        ),
        ("--lr -1".into(), "a finite number of at least 0"),
        ("--weight-decay -1".into(), "a finite number of at least 0"),
        ("--epochs 0".into(), "at least 1"),
        ("--epochs -1".into(), "invalid value '-1' for '--epochs"),
        ("--seed -1".into(), "invalid value '-1' for '--seed"),
        (
            "--eval-every -1".into(),
            "invalid value '-1' for '--eval-every",
        ),
        ("--momentum 1.5".into(), "--momentum"),
        ("--threads 100000".into(), "from 1 to 1024"),
        ("--nonsense".into(), "--nonsense"),
        ("--quick --data-dir data".into(), "drawn by the program"),
        (
            "--dataset shapes --train-limit 9 --validation 9".into(),
            "nothing to train on",
        ),
        (format!("--data-dir {empty}"), "cargo xtask download-data"),
        (format!("--data-dir {empty}"), "--dataset shapes"),
        (format!("--data-dir {part}"), "test_batch.bin` is missing"),
        (format!("--resume {empty}"), "no config.json"),
        (format!("--resume {file}"), "not a run directory"),
        (
            format!("--dataset shapes --train-limit 2 --test-limit 1 --out {file}"),
            "a-file",
        ),
    ];
    for (line, expected) in cases {
        assert_refused(program(&line), expected);
    }
    if cfg!(not(feature = "cuda")) {
        assert_refused(program("--device cuda"), "--features cuda");
    }
    let mut unknown = program("--dataset shapes --train-limit 2 --test-limit 1");
    unknown.env("CANDLE_CNN_ISA", "AVX2");
    assert_refused(unknown, "CANDLE_CNN_ISA is \"AVX2\"");
}

/// The binary files of CIFAR-10 with one picture each.
fn write_part_of_cifar10(dir: &Path) {
    // A label and 32×32 pixels, all grey.
    let mut picture = vec![128; 1 + 3 * 32 * 32];
    for name in [
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
    ] {
        picture[0] += 1;
        picture[0] %= 10;
        fs::write(dir.join(name).with_extension("bin"), &picture).unwrap();
    }
}

#[test]
fn a_part_of_cifar10_is_trained_on_with_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    write_part_of_cifar10(dir.path());
    let mut run = program("--max-steps 1 --batch-size 2 --lr 1e-7 --threads 2");
    run.arg("--data-dir").arg(dir.path());
    run.arg("--out").arg(dir.path().join("runs"));
    let finished = output(run);
    let said = text(&finished);
    assert!(finished.status.success(), "{said}");
    for warning in [
        "holds 5 training images; CIFAR-10 has 50000",
        "holds 1 test images; CIFAR-10 has 10000",
    ] {
        assert!(said.contains(warning), "{said}");
    }
}

#[test]
fn a_run_whose_data_have_moved_is_resumed_with_their_new_folder_and_ends_with_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let [data, moved, out] = ["data", "moved", "runs"].map(|name| dir.path().join(name));
    fs::create_dir(&data).unwrap();
    write_part_of_cifar10(&data);
    // Three steps.
    let mut start = program("--epochs 1 --batch-size 2 --lr 1e-7 --checkpoint-every 1 --threads 2");
    // Given as it is called from where the run begins; it is resumed from elsewhere.
    start.current_dir(dir.path()).args(["--data-dir", "data"]);
    start.arg("--out").arg(&out);
    let finished = output(start);
    assert!(finished.status.success(), "{}", text(&finished));
    let run = run_directory(&out);
    let expected = traces(&run);
    // What a process leaves that is killed after its second.
    remove(&run, &["finished.json", "model.safetensors"]);
    fs::remove_dir_all(run.join("checkpoints/step-0000003")).unwrap();

    fs::rename(&data, &moved).unwrap();
    let missing = format!("there is no CIFAR-10 in {}", data.display());
    assert_refused(resume(&run), &missing);
    let mut elsewhere = resume(&run);
    elsewhere.arg("--data-dir").arg(&moved);
    let resumed = output(elsewhere);
    let said = text(&resumed);
    assert!(resumed.status.success(), "{said}");
    assert!(said.contains("continuing after step 2 of 3"), "{said}");
    assert_eq!(traces(&run), expected);
}

#[test]
fn a_refused_run_leaves_no_folder() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("runs");
    let line = format!(
        "--data-dir {} --out {}",
        dir.path().display(),
        out.display()
    );
    assert_refused(program(&line), "cargo xtask download-data");
    assert!(!out.exists());
}

#[test]
fn a_run_whose_checkpoints_are_all_damaged_is_refused_again_and_again_and_keeps_its_metrics() {
    let (_out, run) = finished();
    remove(&run, &["finished.json"]);
    for checkpoint in fs::read_dir(run.join("checkpoints")).unwrap() {
        fs::write(checkpoint.unwrap().path().join("state.json"), "{}").unwrap();
    }
    let before = files(&run);
    for _ in 0..2 {
        assert_refused(resume(&run), "can be used");
        assert_eq!(files(&run), before);
    }
}

#[test]
fn a_run_that_cannot_write_says_how_it_goes_on() {
    let (_out, run) = finished();
    remove(&run, &["finished.json", "metrics.csv"]);
    fs::create_dir(run.join("metrics.csv")).unwrap();
    let said = assert_refused(resume(&run), "metrics.csv");
    let command = format!("--resume {}", run.display());
    assert!(said.contains(&command), "{said}");
}

#[test]
fn a_run_whose_metrics_are_gone_is_refused_and_none_are_made() {
    let (_out, run) = finished();
    remove(&run, &["finished.json", "metrics.jsonl"]);
    let before = files(&run);
    let said = assert_refused(resume(&run), "metrics.jsonl");
    // The command that was just given does not help.
    assert!(!said.contains("--resume"), "{said}");
    assert_eq!(files(&run), before);
}

/// All files of a run and what is in them.
fn files(run: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![run.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    let contents = fs::read(&path).unwrap();
                    files.insert(path, contents);
                }
            }
        }
    }
    files
}

#[test]
fn a_run_names_its_classes_and_the_commit_of_the_program_wherever_it_is_started() {
    let git = |folder: &Path, arguments: &[&str]| {
        let mut command = Command::new("git");
        let output = command.arg("-C").arg(folder).args(arguments).output();
        let output = output.ok().filter(|output| output.status.success())?;
        Some(String::from_utf8(output.stdout).unwrap().trim().to_string())
    };
    let out = tempfile::tempdir().unwrap();
    // In a repository of its own, whose commit is not the program's.
    let identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"];
    let commit = ["commit", "--quiet", "--allow-empty", "--message", "a"];
    let made = git(out.path(), &["init", "--quiet"])
        .and_then(|_| git(out.path(), &[&identity[..], &commit[..]].concat()));
    if made.is_none() {
        println!("without git: the commit is not looked at");
    }
    let mut run = small_run(out.path());
    run.arg("--max-steps=1").current_dir(out.path());
    let finished = output(run);
    assert!(finished.status.success(), "{}", text(&finished));
    let run = run_directory(out.path());
    let environment = fs::read_to_string(run.join("environment.json")).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let expected = git(source, &["ls-files", "--error-unmatch", "Cargo.toml"])
        .and_then(|_| git(source, &["rev-parse", "HEAD"]));
    let expected = match expected {
        Some(commit) => format!("\"git_commit\": \"{commit}\""),
        None => "\"git_commit\": null".into(),
    };
    assert!(environment.contains(&expected), "{environment}");
    let weights = fs::read(run.join("model.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&weights).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["class_names"], "shapes");
}

#[test]
fn a_damaged_checkpoint_is_warned_of_without_colours_and_the_one_before_is_taken() {
    let (_out, run) = finished();
    let weights = fs::read(run.join("model.safetensors")).unwrap();
    remove(&run, &["finished.json", "model.safetensors"]);
    let checkpoints = fs::read_dir(run.join("checkpoints")).unwrap();
    let newest = checkpoints.map(|one| one.unwrap().path()).max().unwrap();
    fs::write(newest.join("state.json"), "{}").unwrap();
    let mut resume = resume(&run);
    resume.env_remove("NO_COLOR");
    let resumed = output(resume);
    let said = text(&resumed);
    assert!(resumed.status.success(), "{said}");
    let name = newest.file_name().unwrap().to_str().unwrap();
    let warning = said.lines().find(|line| line.contains("WARN"));
    assert!(warning.is_some_and(|line| line.contains(name)), "{said}");
    // Nobody reads it on a terminal.
    assert!(!said.contains('\x1b'), "{said}");
    assert_eq!(fs::read(run.join("model.safetensors")).unwrap(), weights);
}

#[test]
fn a_run_on_other_data_is_not_resumed() {
    let out = tempfile::tempdir().unwrap();
    let mut child = start(small_run(out.path()));
    assert!(wait_for_steps(&mut child, out.path(), 1));
    child.kill().unwrap();
    child.wait().unwrap();
    let run = run_directory(out.path());
    let config = fs::read_to_string(run.join("config.json")).unwrap();
    let changed = config.replace("\"test_limit\": 3", "\"test_limit\": 4");
    assert_ne!(config, changed);
    fs::write(run.join("config.json"), changed).unwrap();
    assert_refused(
        resume(&run),
        "the test data are not those the run began with",
    );
    let mut from_a_folder = resume(&run);
    from_a_folder.args(["--data-dir", "data"]);
    assert_refused(from_a_folder, "drawn shapes: it reads no folder");
    let elsewhere = config.replace("\"scratch-train\"", "\"finetune-full\"");
    fs::write(run.join("config.json"), elsewhere).unwrap();
    assert_refused(resume(&run), "a run of finetune-full, not of scratch-train");
}

fn assert_refused(command: Command, expected: &str) -> String {
    let shown = format!("{command:?}");
    let output = output(command);
    let said = text(&output);
    assert!(!output.status.success(), "{shown}: {said}");
    assert!(
        said.contains(expected),
        "{shown} does not say {expected:?}: {said}"
    );
    assert!(!said.contains("panicked"), "{shown}: {said}");
    said
}
