//! The program on a GPU, or on the emulated one of `cargo xtask cuda-emulate`.
#![cfg(feature = "cuda")]

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use predicates::str::contains;
use test_support::devices;

fn program(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_scratch-train"));
    command.args(arguments.split_whitespace());
    command.env("HF_HUB_OFFLINE", "1");
    command.env_remove("RUST_LOG");
    command
}

/// Losses of a run's steps; warnings are failures.
fn losses(arguments: &str) -> Vec<f64> {
    // Two steps as usual, one recorded, a partial one at the end. So small a rate keeps rounding from growing.
    let line = "--dataset shapes --train-limit 9 --test-limit 2 --epochs 1 --batch-size 2 --lr 1e-8 --seed 3";
    let out = tempfile::tempdir().unwrap();
    let mut command = program(&format!("{line} {arguments}"));
    let assert = command.arg("--out").arg(out.path()).assert().success();
    let said = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    assert!(!said.contains("WARN"), "{said}");
    let run = fs::read_dir(out.path().join("scratch-train"))
        .unwrap()
        .next();
    step_losses(&run.unwrap().unwrap().path())
}

fn step_losses(run: &Path) -> Vec<f64> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let events = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    events
        .filter(|event| event["event"] == "step")
        .map(|event| event["loss"].as_f64().unwrap())
        .collect()
}

#[test]
fn the_graph_of_a_step_repeats_it_to_the_bit_and_the_cpu_agrees() {
    if devices().len() == 1 {
        return;
    }
    let f32 = "--device cuda --precision f32 --deterministic";
    let recorded = losses(f32);
    assert_eq!(recorded.len(), 5);
    assert_eq!(recorded, losses(&format!("{f32} --no-cuda-graph")));
    for (step, (gpu, cpu)) in recorded.iter().zip(losses("--device cpu")).enumerate() {
        let difference = (gpu - cpu).abs() / cpu;
        assert!(difference < 1e-4, "step {step}: {gpu}, on the CPU {cpu}");
    }
}

#[test]
fn a_lack_of_memory_names_the_step_and_what_to_lower() {
    if devices().len() == 1 {
        return;
    }
    if !is_emulated() {
        println!("skipped: a GPU's memory cannot be made small");
        return;
    }
    program("--dataset shapes --train-limit 8 --test-limit 2 --batch-size 8 --device cuda --out")
        .arg(tempfile::tempdir().unwrap().path())
        .env("CUDA_EMULATION_MEMORY", "100")
        .assert()
        .failure()
        .stderr(contains(
            "ran out of memory at step 1, with batches of 8 images",
        ));
}

fn is_emulated() -> bool {
    let info = candle_cnn::cuda::device_info(0).unwrap();
    info.name.contains("emulated")
}
