//! The program on a GPU, or on the emulated one of `cargo xtask cuda-emulate`.
#![cfg(feature = "cuda")]

use assert_cmd::Command;
use predicates::str::contains;
use test_support::{devices, skipped, step_losses};

fn program(arguments: &str) -> Command {
    let path = env!("CARGO_BIN_EXE_scratch-train");
    let mut command = Command::from_std(test_support::program(path, arguments));
    command.env("CUDA_EMULATION_DEVICES", "2");
    command
}

/// Losses of a run's steps; warnings are failures.
fn losses(arguments: &str) -> Vec<f64> {
    // Two steps as usual, one recorded, a partial one, an evaluation; then three replayed and again a partial one.
    let line = "--dataset shapes --train-limit 7 --test-limit 2 --epochs 2 --batch-size 2 --seed 3";
    let out = tempfile::tempdir().unwrap();
    let mut command = program(&format!("{line} {arguments}"));
    let assert = command.arg("--out").arg(out.path()).assert().success();
    let said = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    assert!(!said.contains("WARN"), "{said}");
    step_losses(out.path(), "scratch-train")
}

#[test]
fn the_graph_of_a_step_repeats_it_to_the_bit_and_the_cpu_agrees() {
    if devices().len() == 1 {
        return;
    }
    // So small a rate keeps rounding from growing.
    let f32 = "--device cuda --precision f32 --deterministic --lr 1e-8";
    let recorded = losses(f32);
    assert_eq!(recorded.len(), 8);
    assert_eq!(recorded, losses(&format!("{f32} --no-cuda-graph")));
    assert_close(&recorded, &losses("--device cpu --lr 1e-8"));
}

/// The last batch has one image, so that the second GPU has none of it.
#[cfg(feature = "nccl")]
#[test]
fn two_gpus_make_the_steps_of_one_over_nccl() {
    if devices().len() == 1 {
        return;
    }
    if !is_emulated() && candle_cnn::cuda::device_info(1).is_err() {
        skipped("there is one GPU only");
        return;
    }
    // Masks of dropout are each rank's own. At this rate twice the gradient shows in the second loss by three percent.
    let both = "--precision f32 --deterministic --dropout 0 --lr 1e-7";
    let recorded = losses(&format!("--gpus 2 {both}"));
    assert_eq!(recorded.len(), 8);
    assert_eq!(
        recorded,
        losses(&format!("--gpus 2 --no-cuda-graph {both}"))
    );
    assert_close(&recorded, &losses(&format!("--device cuda {both}")));
}

/// NCCL wants all ranks to replay a step that they have recorded together, or none.
#[cfg(feature = "nccl")]
#[test]
fn where_one_rank_cannot_record_the_step_none_replays_it() {
    if devices().len() == 1 {
        return;
    }
    if !is_emulated() {
        skipped("a GPU's driver cannot be made to refuse a graph");
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let line = "--gpus 2 --precision f32 --lr 1e-7 --dataset shapes --train-limit 8 --test-limit 2 --epochs 1 --batch-size 2 --out";
    let mut command = program(line);
    command
        .arg(out.path())
        .env("CUDA_EMULATION_REFUSES_GRAPHS", "1");
    let assert = command.assert().success();
    let said = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    assert!(said.contains("another rank could not record it"), "{said}");
    assert_eq!(step_losses(out.path(), "scratch-train").len(), 4);
}

fn assert_close(some: &[f64], others: &[f64]) {
    assert_eq!(some.len(), others.len());
    for (step, (one, other)) in some.iter().zip(others).enumerate() {
        let difference = (one - other).abs() / other;
        assert!(difference < 1e-4, "step {step}: {one} and {other}");
    }
}

#[test]
fn a_lack_of_memory_names_the_step_and_what_to_lower() {
    if devices().len() == 1 {
        return;
    }
    if !is_emulated() {
        skipped("a GPU's memory cannot be made small");
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

#[test]
fn other_work_has_the_memory_of_a_recorded_step() {
    if devices().len() == 1 {
        return;
    }
    if !is_emulated() {
        skipped("others may use a GPU's memory meanwhile");
        return;
    }
    // With a smaller batch before the evaluation, and without one.
    for images in [7, 8] {
        let out = tempfile::tempdir().unwrap();
        let line = format!(
            "--dataset shapes --train-limit {images} --test-limit 2 --epochs 2 --batch-size 2 --device cuda --out"
        );
        let mut command = program(&line);
        command.arg(out.path()).env("RUST_LOG", "trainer=debug");
        command.env("CUDA_EMULATION_ZEROS", "1");
        let assert = command.assert().success();
        let said = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
        let mib = |when: &str| -> Vec<u64> {
            let line = format!(" MiB of the GPU are in use {when}");
            let before = said.lines().filter_map(|text| text.split_once(&line));
            let last_word = before.map(|(before, _)| before.rsplit(' ').next().unwrap());
            last_word.map(|number| number.parse().unwrap()).collect()
        };
        let before = mib("before the recording");
        let with = mib("with the recorded step");
        let without = mib("without the recorded step's");
        // The second is the first replay of the second epoch.
        let ([before], [first, again], [_, _]) = (&before[..], &with[..], &without[..]) else {
            panic!("{said}");
        };
        assert!(without.iter().all(|mib| mib == before), "{said}");
        assert!(*first > before + 10 && again == first, "{said}");
    }
}

fn is_emulated() -> bool {
    let info = candle_cnn::cuda::device_info(0).unwrap();
    info.name.contains("emulated")
}
