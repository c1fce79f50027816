//! The program on a GPU, or on the emulated one of `cargo xtask cuda-emulate`.
#![cfg(feature = "cuda")]

use assert_cmd::Command;
use test_support::{devices, program, skipped, step_losses};

/// Losses of a run's steps; warnings are failures.
fn losses(arguments: &str) -> Vec<f64> {
    let line =
        "--weights random --dataset shapes --train-limit 16 --test-limit 2 --batch-size 4 --seed 3";
    let out = tempfile::tempdir().unwrap();
    let path = env!("CARGO_BIN_EXE_finetune-full");
    let line = format!("{line} --epochs 1 {arguments}");
    let mut command = Command::from_std(program(path, &line));
    let assert = command.arg("--out").arg(out.path()).assert().success();
    let said = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    assert!(!said.contains("WARN"), "{said}");
    step_losses(out.path(), "finetune-full")
}

/// Batch norm and dropout included. Only the first step is compared with the CPU: random weights make rounding grow
/// by a thousand from one to the next.
#[test]
fn the_graph_of_a_step_repeats_it_to_the_bit_and_the_first_step_is_that_of_the_cpu() {
    if devices().len() == 1 {
        return;
    }
    let f32 = "--device cuda --precision f32 --deterministic";
    let recorded = losses(f32);
    assert_eq!(recorded.len(), 4);
    assert_eq!(recorded, losses(&format!("{f32} --no-cuda-graph")));
    let cpu = losses("--device cpu --max-steps 1");
    let difference = (recorded[0] - cpu[0]).abs() / cpu[0];
    assert!(difference < 1e-5, "{}, on the CPU {}", recorded[0], cpu[0]);
}

#[test]
fn auxiliary_heads_train_in_bf16() {
    if candle_cnn::cuda::device_info(0).is_ok_and(|gpu| !gpu.has_bf16()) {
        skipped("this GPU has no bf16 convolutions");
        return;
    }
    if devices().len() == 1 {
        return;
    }
    let more = "--max-steps 1 --aux --image-size 33";
    let bf16 = losses(&format!("--device cuda --precision bf16 {more}"));
    let cpu = losses(&format!("--device cpu {more}"));
    let difference = (bf16[0] - cpu[0]).abs() / cpu[0];
    assert!(difference < 0.05, "{}, on the CPU {}", bf16[0], cpu[0]);
    assert_ne!(bf16, cpu, "nothing was rounded");
}
