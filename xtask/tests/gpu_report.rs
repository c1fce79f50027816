//! What the GPU report times, in which order, and what it leaves out: with stand-ins for the GPU and for all programs.
#![cfg(unix)]

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Says what is held of the GPU's memory, and that it was asked at that amount.
const NVIDIA_SMI: &str = r#"
case "$*" in
  *memory.used*) cat "$DIR/memory" | tee -a "$DIR/asked" ;;
  *) echo "A GPU, 1.0, 1000 MiB, 7.5" ;;
esac"#;

/// Holds so many MiB until somebody has seen it.
const HOLD: &str = r#"
hold() {
  echo $1 > "$DIR/memory.new"; mv "$DIR/memory.new" "$DIR/memory"
  tries=0
  until grep -qx $1 "$DIR/asked" || [ $tries = 400 ]; do sleep 0.05; tries=$((tries + 1)); done
  echo 100 > "$DIR/memory.new"; mv "$DIR/memory.new" "$DIR/memory"
}"#;

/// One of our programs, whose `--out DIR` comes last. Only the first round's memory is looked at.
const OURS: &str = r#"
for out; do :; done
name=$(basename "$out"); echo "$name" >> "$DIR/log"
case "$name" in
  *streams*) echo "no lanes" >&2; exit 1 ;;
  *no-channels-last*) hold 500 ;;
  *-0) hold 700 ;;
esac
run="$out/$(basename "$0")/run"; mkdir -p "$run"
printf 'epoch,images_per_second\n1,10\n2,1000\n' > "$run/metrics.csv""#;

/// PyTorch's side. The compiled one fails at its end.
const PYTHON: &str = r#"
case "$*" in
  -c*) exit 0 ;;
  *--compile*) name=compiled; mib=900; end=3 ;;
  *channels_last*) name=channels_last; mib=800; end=0 ;;
  *) name=eager; mib=600; end=0 ;;
esac
held=""
while read word steps; do
  echo "$name: $word $steps" >> "$DIR/log"
  [ -n "$held" ] || hold $mib
  held=yes
  echo '{"seconds_per_step": 1, "images_per_second": 500, "peak_mib": null, "threads": 1, "framework": "PyTorch 2"}'
done
echo "$name: end" >> "$DIR/log"
exit $end"#;

/// What came of a report on these stand-ins.
struct Reported {
    output: Output,
    /// What ran, a line each.
    log: String,
    report: Value,
}

impl Reported {
    fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }
}

fn report(arguments: &str) -> Reported {
    let dir = TempDir::new().unwrap();
    let dir = dir.path();
    fs::write(dir.join("memory"), "100\n").unwrap();
    fs::write(dir.join("asked"), "").unwrap();
    fs::write(dir.join("log"), "").unwrap();
    program(dir, "nvidia-smi", NVIDIA_SMI);
    program(dir, "python", &format!("{HOLD}{PYTHON}"));
    for name in ["scratch-train", "finetune-full"] {
        program(dir, name, &format!("{HOLD}{OURS}"));
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(
        [dir.to_path_buf()]
            .into_iter()
            .chain(env::split_paths(&path)),
    );
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["gpu-report", "--skip-tests", "--skip-parity", "--rounds=2"])
        .args(arguments.split_whitespace())
        .arg("--pytorch")
        .arg(dir.join("python"))
        .arg("--binaries")
        .arg(dir)
        .arg("--out")
        .arg(dir.join("record"))
        .env("PATH", path.unwrap())
        .env("DIR", dir)
        .env_remove("CUDA_VISIBLE_DEVICES")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let report = fs::read_to_string(dir.join("record/report.json"));
    let report = report.unwrap_or_else(|error| panic!("no record ({error}): {said}"));
    Reported {
        log: fs::read_to_string(dir.join("log")).unwrap(),
        report: serde_json::from_str(&report).unwrap(),
        output,
    }
}

/// A program of that name in `dir`. What this process has open for writing, a child that another test starts at the time may hold
/// open too, and then it cannot be started: so it is written by another process.
fn program(dir: &Path, name: &str, script: &str) {
    let [text, program] = ["text", name].map(|name| dir.join(name));
    fs::write(&text, format!("#!/bin/sh\n{script}\n")).unwrap();
    let mut install = Command::new("install");
    install.args(["-m", "700"]).args([&text, &program]);
    assert!(install.status().unwrap().success());
}

fn timing(images_per_second: f64, gpu_mib: u64) -> Value {
    json!({"images_per_second": images_per_second, "gpu_mib": gpu_mib})
}

#[test]
fn all_sides_take_turns_and_what_fails_keeps_no_other_from_its_turn() {
    let reported = report("--row lesson-32");
    let expected = "\
        eager: run 10\nchannels_last: run 10\ncompiled: run 10\n\
        lesson-32-0\nlesson-32--no-channels-last-0\nlesson-32--streams1-0\n\
        eager: run 400\nchannels_last: run 400\ncompiled: run 400\n\
        lesson-32-1\n\
        eager: run 400\nchannels_last: run 400\ncompiled: run 400\n\
        eager: end\nchannels_last: end\ncompiled: end\n";
    assert_eq!(reported.log, expected);

    let every_round = json!({
        "ours": timing(1000.0, 600),
        "PyTorch, eager": timing(500.0, 500),
        "PyTorch, channels_last": timing(500.0, 700),
        "PyTorch, channels_last, compiled": timing(500.0, 800),
    });
    let mut first = every_round.clone();
    first["ours, --no-channels-last"] = timing(1000.0, 400);
    let rows = json!({"lesson-32": [first, every_round]});
    assert_eq!(reported.report["rows"], rows);
    assert_eq!(
        reported.report["failures"],
        json!([
            "lesson-32, ours, --streams 1: scratch-train failed: no lanes",
            "lesson-32, PyTorch, channels_last, compiled: PyTorch, channels_last, compiled ended with exit status: 3",
        ])
    );
    assert_eq!(reported.report["left_out"], json!([]));
    assert_eq!(reported.report["versions"]["pytorch"], "PyTorch 2");
    let said = reported.stderr();
    let rounds: Vec<&str> = said
        .lines()
        .filter(|line| line.starts_with("round"))
        .collect();
    let theirs = "PyTorch, channels_last 500 images/s, PyTorch, channels_last, compiled 500 images/s, \
                  PyTorch, eager 500 images/s, ours 1000 images/s";
    let first = format!("round 1/2: {theirs}, ours, --no-channels-last 1000 images/s");
    assert_eq!(rounds, [first, format!("round 2/2: {theirs}")]);
    assert_eq!(reported.output.status.code(), Some(1));
}

#[test]
fn within_a_limit_our_other_ways_and_more_rounds_go_first_and_then_the_last_rows() {
    let rows = "--row torchvision-full-32 --row lesson-32 --row lesson-512-bf16";
    let reported = report(&format!("--within 2 {rows}"));
    let expected = "eager: run 10\ntorchvision-full-32-0\neager: run 400\neager: end\n";
    assert_eq!(reported.log, expected);
    let round = json!({"ours": timing(1000.0, 600), "PyTorch, eager": timing(500.0, 500)});
    let rows = json!({"torchvision-full-32": [round]});
    assert_eq!(reported.report["rows"], rows);
    assert_eq!(
        reported.report["left_out"],
        json!([
            "torchvision-full-32, ours, --no-channels-last (for want of time)",
            "torchvision-full-32, ours, --streams 1 (for want of time)",
            "torchvision-full-32, round 2 (for want of time)",
            "lesson-32 (for want of time)",
            "lesson-512-bf16: compute capability 7.5 has no bf16",
        ])
    );
    assert_eq!(reported.report["failures"], json!([]));
    assert!(reported.output.status.success(), "{}", reported.stderr());
}

#[test]
fn other_ways_can_be_left_out_and_say_nothing_then() {
    let reported = report("--row torchvision-full-32 --skip-other-ways");
    let expected = "\
        eager: run 10\n\
        torchvision-full-32-0\neager: run 400\n\
        torchvision-full-32-1\neager: run 400\n\
        eager: end\n";
    assert_eq!(reported.log, expected);
    assert_eq!(reported.report["left_out"], json!([]));
}
