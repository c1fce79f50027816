//! Several processes on this machine that train one network.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use predicates::str::contains;
use safetensors::SafeTensors;
use sha2::{Digest, Sha256};
use test_support::free_port;

/// Two epochs of three steps, the last of each of one image: the second rank has none of it. Without
/// dropout, whose masks are a rank's own.
const SMALL_RUN: &str = "--dataset shapes --train-limit 7 --test-limit 3 --epochs 2 --batch-size 3 \
                         --lr 1e-7 --dropout 0 --checkpoint-every 2 --seed 5 --threads 1";

fn program(arguments: &str) -> Command {
    let mut command = test_support::program(env!("CARGO_BIN_EXE_scratch-train"), arguments);
    command.stdin(Stdio::null());
    command
}

fn small_run(arguments: &str, out: &Path) -> Command {
    let mut command = program(&format!("{SMALL_RUN} {arguments}"));
    command.arg("--out").arg(out);
    command
}

fn start(mut command: Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn text(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}

fn finished(command: Command) -> String {
    let output = start(command).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    text(&output)
}

fn run_directory(out: &Path) -> PathBuf {
    test_support::only_run(out, "scratch-train")
}

fn weights(run: &Path) -> Vec<f32> {
    let bytes = fs::read(run.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = file.names();
    names.sort();
    let data = names
        .iter()
        .flat_map(|name| file.tensor(name).unwrap().data());
    let data: Vec<u8> = data.copied().collect();
    let numbers = data.chunks_exact(4);
    numbers
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

/// What two equal runs have in common.
fn traces(run: &Path) -> (Vec<u8>, String) {
    let weights = fs::read(run.join("model.safetensors")).unwrap();
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    (Sha256::digest(weights).to_vec(), metrics)
}

/// A program as another launcher would start it.
fn as_rank(mut command: Command, (rank, world_size): (usize, usize), port: u16) -> Command {
    command
        .env("RANK", rank.to_string())
        .env("WORLD_SIZE", world_size.to_string())
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port.to_string());
    command
}

/// One rank of a small run.
fn rank(arguments: &str, out: &Path, place: (usize, usize), port: u16) -> Child {
    start(as_rank(small_run(arguments, out), place, port))
}

/// Returns once the only run below `out` has made a step.
fn wait_for_a_step(out: &Path) {
    let deadline = Instant::now() + Duration::from_secs(120);
    let begun = || {
        let run = test_support::run_begun(out, "scratch-train");
        let metrics = run.and_then(|run| fs::read_to_string(run.join("metrics.jsonl")).ok());
        metrics.is_some_and(|metrics| metrics.contains("\"step\":1"))
    };
    while !begun() {
        assert!(Instant::now() < deadline, "no step was made");
        sleep(Duration::from_millis(5));
    }
}

#[test]
fn two_processes_end_with_the_weights_of_one_and_only_the_first_writes() {
    let [alone, together] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    finished(small_run("", alone.path()));
    let said = finished(small_run("--processes 2", together.path()));
    assert_eq!(said.matches("Run: ").count(), 1, "{said}");
    assert_eq!(said.matches("Final test accuracy").count(), 1, "{said}");

    let [alone, together] = [alone, together].map(|out| {
        let run = run_directory(out.path());
        let steps = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let images: Vec<u64> = steps
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
            .map(|metric| metric["images"].as_u64().unwrap())
            .collect();
        (weights(&run), images)
    });
    assert_eq!(alone.1, together.1);
    let distance = |a: &[f32], b: &[f32]| {
        let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
        squares.sum::<f64>().sqrt()
    };
    let norm = distance(&alone.0, &vec![0.0; alone.0.len()]);
    let error = distance(&alone.0, &together.0) / norm;
    assert!(error < 1e-5, "{error}");
}

#[cfg(unix)]
#[test]
fn a_signal_to_the_launcher_saves_and_the_resumed_run_has_the_same_bits() {
    let of_epochs = |epochs: usize, out: &Path| {
        let line = SMALL_RUN.replace("--epochs 2", &format!("--epochs {epochs}"));
        let mut command = program(&format!("{line} --processes 2"));
        command.arg("--out").arg(out);
        command
    };
    let out = tempfile::tempdir().unwrap();
    // However late the signal comes, the run is not at its end.
    let child = start(of_epochs(100_000, out.path()));
    wait_for_a_step(out.path());
    let kill = Command::new("kill")
        .args(["-s", "INT", &child.id().to_string()])
        .status();
    assert!(kill.unwrap().success());
    let stopped = child.wait_with_output().unwrap();
    let said = text(&stopped);
    assert_eq!(stopped.status.code(), Some(130), "{said}");
    assert!(said.contains("Stopped by SIGINT"), "{said}");

    let run = run_directory(out.path());
    let epochs = test_support::step_losses(out.path(), "scratch-train").len() / 3 + 1;
    test_support::set_epochs(&run, epochs);
    let mut resume = program("");
    resume.arg("--resume").arg(&run);
    finished(resume);
    let whole = tempfile::tempdir().unwrap();
    finished(of_epochs(epochs, whole.path()));
    assert_eq!(traces(&run), traces(&run_directory(whole.path())));
}

#[test]
fn a_killed_rank_ends_the_others_with_an_error_that_names_it() {
    let out = tempfile::tempdir().unwrap();
    let port = free_port();
    let long = SMALL_RUN
        .replace("--epochs 2", "--epochs 100000 --eval-every 0")
        .replace("--checkpoint-every 2", "--checkpoint-every 0");
    let start = |number: usize| {
        let mut command = program(&long);
        command.arg("--out").arg(out.path());
        start(as_rank(command, (number, 2), port))
    };
    let (first, mut second) = (start(0), start(1));
    wait_for_a_step(out.path());
    second.kill().unwrap();
    let killed = Instant::now();
    second.wait().unwrap();
    let first = first.wait_with_output().unwrap();
    let said = text(&first);
    assert_eq!(first.status.code(), Some(1), "{said}");
    assert!(
        said.contains("[rank 0] error:") && said.contains("lost rank 1"),
        "{said}"
    );
    assert!(
        killed.elapsed() < Duration::from_secs(30),
        "{:?}",
        killed.elapsed()
    );
}

#[test]
fn a_rank_that_finds_no_other_gives_up_after_the_seconds_that_the_environment_says() {
    let out = tempfile::tempdir().unwrap();
    let port = free_port();
    let refused = |timeout: &str, expected: &str| {
        let mut rank = as_rank(small_run("", out.path()), (1, 2), port);
        rank.env("DATA_PARALLEL_TIMEOUT", timeout);
        // Without the variable it is minutes.
        let mut rank = assert_cmd::Command::from_std(rank);
        let refused = rank.timeout(Duration::from_secs(60)).assert().code(1);
        refused.stderr(contains(expected));
    };
    let unreachable = format!("could not reach rank 0 at 127.0.0.1:{port} within 1 s");
    refused("1", &unreachable);
    for timeout in ["0", "-1", "x", ""] {
        let reason = format!("DATA_PARALLEL_TIMEOUT is {timeout:?}; it must be a whole number of");
        refused(timeout, &reason);
    }
}

#[test]
fn ranks_with_other_settings_are_refused_by_name() {
    let out = tempfile::tempdir().unwrap();
    let port = free_port();
    let ranks = [
        rank("--momentum 0.5", out.path(), (0, 2), port),
        rank("", out.path(), (1, 2), port),
    ];
    let [first, second] = ranks.map(|rank| rank.wait_with_output().unwrap());
    for output in [&first, &second] {
        assert_eq!(output.status.code(), Some(1), "{}", text(output));
        let expected = "training.optimizer.momentum is 0.9 at rank 1, 0.5 at rank 0";
        assert!(text(output).contains(expected), "{}", text(output));
    }
    assert!(
        text(&second).contains("[rank 1] error:"),
        "{}",
        text(&second)
    );
}

#[test]
fn environments_and_flags_without_sense_are_refused() {
    let out = tempfile::tempdir().unwrap();
    let cases = [
        (
            "",
            (2, 2),
            "RANK is \"2\"; it must be below the number of processes",
        ),
        (
            "--processes 3",
            (0, 2),
            "--processes 3 does not fit the environment",
        ),
        // Nobody waits for them.
        ("", (0, 1_000_000_000_000), "cannot share out a batch of"),
    ];
    for (arguments, place, expected) in cases {
        let output = rank(arguments, out.path(), place, 1)
            .wait_with_output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output).contains(expected), "{}", text(&output));
    }
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let output = rank("", out.path(), (0, 2), port)
        .wait_with_output()
        .unwrap();
    assert!(
        text(&output).contains("rank 0 cannot listen on"),
        "{}",
        text(&output)
    );
    // Before any process is started; then by one of them, whose code is the launcher's.
    for (arguments, expected) in [
        (
            "--processes 4",
            "cannot share out a batch of 3 pictures among 4 processes",
        ),
        (
            "--processes 2 --init nowhere.safetensors",
            "nowhere.safetensors",
        ),
    ] {
        let output = start(small_run(arguments, out.path()))
            .wait_with_output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output).contains(expected), "{}", text(&output));
    }
}
