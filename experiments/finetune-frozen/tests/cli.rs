//! The program as its users meet it: a few steps of a few drawn pictures.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use safetensors::SafeTensors;

const TINY: &str = "--dataset shapes --train-limit 8 --test-limit 4 --epochs 2 --batch-size 4";

fn program(arguments: &str) -> Command {
    let path = env!("CARGO_BIN_EXE_finetune-frozen");
    Command::from_std(test_support::program(path, arguments))
}

fn tiny(more: &str, out: &Path) -> Command {
    let mut command = program(&format!("{TINY} {more}"));
    command.arg("--out").arg(out);
    command
}

fn run_directory(out: &Path) -> PathBuf {
    test_support::only_run(out, "finetune-frozen")
}

fn tensors(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let bytes = fs::read(run.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    tensors
        .into_iter()
        .map(|(name, view)| (name, view.data().to_vec()))
        .collect()
}

/// A folder of runs in which a run of finetune-full has ended; its weights are those of a step of
/// the head on a random backbone.
fn after_finetune_full() -> (tempfile::TempDir, PathBuf) {
    let out = tempfile::tempdir().unwrap();
    tiny("--weights random --max-steps 1", out.path())
        .assert()
        .success();
    let run = out.path().join("finetune-full/2026-03-01T12-30-05Z");
    fs::create_dir(out.path().join("finetune-full")).unwrap();
    fs::rename(run_directory(out.path()), &run).unwrap();
    (out, run)
}

#[test]
fn it_begins_where_finetune_full_ended_and_trains_the_head_alone() {
    let (out, full) = after_finetune_full();
    let run = tiny("", out.path()).assert().success();
    let expected = format!(
        "{}, the newest finished run of finetune-full",
        full.display()
    );
    run.stdout(contains(expected));
    let (before, after) = (tensors(&full), tensors(&run_directory(out.path())));
    assert_eq!(before.len(), after.len());
    for (name, value) in &before {
        let statistics = ["running_mean", "running_var", "num_batches_tracked"];
        let moves = name.starts_with("fc.") || statistics.iter().any(|end| name.ends_with(end));
        assert_eq!(value != &after[name], moves, "{name}");
    }
    let config = fs::read(run_directory(out.path()).join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    let optimizer = &config["config"]["training"]["optimizer"];
    assert_eq!(
        (optimizer["lr"].as_f64(), optimizer["momentum"].as_f64()),
        (Some(0.01), Some(0.0))
    );
}

#[test]
fn bn_eval_leaves_the_statistics_too() {
    let (out, full) = after_finetune_full();
    tiny("--bn-eval", out.path()).assert().success();
    let (before, after) = (tensors(&full), tensors(&run_directory(out.path())));
    for (name, value) in &before {
        assert_eq!(value != &after[name], name.starts_with("fc."), "{name}");
    }
}

#[test]
fn bn_eval_over_weights_from_elsewhere_says_that_the_input_is_converted_twice() {
    let (out, full) = after_finetune_full();
    let model = full.join("model.safetensors");
    let bytes = fs::read(&model).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    let elsewhere = |name: &str, said: &[(&str, &str)]| {
        let said = said.iter().map(|(k, v)| (k.to_string(), v.to_string()));
        let file = out.path().join(name);
        safetensors::serialize_to_file(tensors.clone(), Some(said.collect()), &file).unwrap();
        file
    };
    let silent = elsewhere("silent.safetensors", &[]);
    let yes = elsewhere("yes.safetensors", &[("transform_input", "true")]);
    let no = elsewhere("no.safetensors", &[("transform_input", "false")]);
    for (weights, more, is_said) in [
        (&silent, "--bn-eval", true),
        (&silent, "", false),
        (&yes, "--bn-eval", true),
        (&no, "--bn-eval", false),
        (&model, "--bn-eval", false),
    ] {
        let line = format!("--max-steps 1 --weights {} {more}", weights.display());
        let run = tiny(&line, out.path()).assert().success();
        let said = String::from_utf8(run.get_output().stdout.clone()).unwrap();
        assert_eq!(
            said.contains("converted once more"),
            is_said,
            "{line}: {said}"
        );
    }
}

#[test]
fn a_run_killed_and_resumed_ends_with_the_bits_of_one_never_stopped() {
    for more in ["", "--bn-eval"] {
        let (out, full) = after_finetune_full();
        let line = format!("--checkpoint-every 1 --init {} {more}", full.display());
        tiny(&line, out.path()).assert().success();
        let run = run_directory(out.path());
        let files = ["model.safetensors", "metrics.jsonl"];
        let whole = files.map(|file| fs::read(run.join(file)).unwrap());
        // What a process leaves that is killed after its third step.
        for file in [
            "finished.json",
            "model.safetensors",
            "checkpoints/step-0000004",
        ] {
            let path = run.join(file);
            fs::remove_file(&path)
                .or_else(|_| fs::remove_dir_all(&path))
                .unwrap();
        }
        program("").arg("--resume").arg(&run).assert().success();
        let resumed = files.map(|file| fs::read(run.join(file)).unwrap());
        assert!(whole == resumed, "{more}");
    }
}

#[test]
fn without_a_run_to_begin_with_the_error_names_the_ways_on() {
    let out = tempfile::tempdir().unwrap();
    let refused = tiny("", out.path()).assert().failure();
    refused.stderr(
        contains("cargo run -p finetune-full")
            .and(contains("--init"))
            .and(contains("--weights")),
    );
}

#[test]
fn a_run_on_other_pictures_is_not_begun_with_unless_it_is_named() {
    let (out, full) = after_finetune_full();
    let on_photographs = |more: &str| {
        let mut command = program(&format!("--data-dir no-such-folder {more}"));
        command.arg("--out").arg(out.path());
        command.assert().failure()
    };
    on_photographs("").stderr(contains("no finished run of finetune-full on cifar10"));
    on_photographs(&format!("--init {}", full.display())).stdout(contains(
        "knows the classes of shapes, and now it is to learn those of cifar10",
    ));
}

#[test]
fn bad_input_is_refused_with_the_reason() {
    let cases = [
        ("--weights random --init x", "head included"),
        ("--aux", "--aux"),
        ("--summary --bn-eval", "trains nothing"),
        ("--init absent", "cannot read --init absent"),
    ];
    for (line, expected) in cases {
        let refused = program(line).assert().failure();
        refused.stderr(contains(expected).and(contains("panicked").not()));
    }
}
