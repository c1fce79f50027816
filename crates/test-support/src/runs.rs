//! What a program under test has written.

use std::fs;
use std::path::Path;

use serde_json::Value;

/// Losses of the steps of the only run of `experiment` below `out`.
///
/// # Panics
/// Where there is none, or more than one, or its `metrics.jsonl` is not what the trainer writes.
pub fn step_losses(out: &Path, experiment: &str) -> Vec<f64> {
    let runs: Vec<_> = fs::read_dir(out.join(experiment))
        .expect("no run")
        .map(|entry| entry.expect("unreadable folder").path())
        .collect();
    let [run] = &runs[..] else {
        panic!("not one run: {runs:?}");
    };
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).expect("no metrics.jsonl");
    let events = metrics
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("no JSON"));
    events
        .filter(|event| event["event"] == "step")
        .map(|event| event["loss"].as_f64().expect("no loss"))
        .collect()
}
