//! The program on a GPU, or on the emulated one of `cargo xtask cuda-emulate`.
#![cfg(feature = "cuda")]

mod answers;

use std::path::Path;

use answers::{
    ALL_CLASSES, assert_predicts, discerned, draw, json_lines, likeliest, predict, seeded, shapes,
};
use serde_json::Value;
use test_support::devices;

const F32: [&str; 4] = ["--device", "cuda", "--precision", "f32"];
/// Of probabilities, between sums in another order. TF32 moves one by 2.5e-5.
const TOLERANCE: f64 = 1e-5;
/// Of a loss of 3. Instruction sets of the CPU differ by 2.4e-6, and engines of cuDNN that count as f32 may by more
/// than those; TF32 moves it by 2.0e-3.
const LOSS_TOLERANCE: f64 = 1e-4;

fn on_the_gpu(weights: &Path, arguments: &[&str], pictures: Option<&Path>) -> Vec<Value> {
    let mut command = predict(weights);
    command.args(F32).args(arguments).args(pictures);
    json_lines(&command.assert().success())
}

#[test]
fn torchvisions_network_answers_as_on_the_cpu() {
    if devices().len() == 1 {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let set = shapes(1);
    let picture = dir.path().join("picture.png");
    draw(&picture, set.image(0));
    let (weights, expected) = seeded(dir.path(), &set, ("true", "32"));
    let lines = on_the_gpu(&weights, &ALL_CLASSES, Some(&picture));
    assert_predicts(&lines[0], &expected[0], TOLERANCE);
}

#[test]
fn an_evaluation_of_the_lessons_network_counts_what_the_cpu_does() {
    if devices().len() == 1 {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let set = shapes(3);
    let (weights, rows) = discerned(dir.path(), &set);
    let labels = set.labels().iter().map(|&label| usize::from(label));
    let (mut correct, mut loss) = (0, 0.0);
    for (label, row) in labels.zip(&rows) {
        correct += usize::from(likeliest(row) == label);
        loss -= row[label].ln() / set.len() as f64;
    }
    let evaluate = ["--evaluate", "shapes", "--test-limit", "3", "--json"];
    let line = on_the_gpu(&weights, &evaluate, None).remove(0);
    assert_eq!(line["correct"], correct, "{line}");
    let difference = line["loss"].as_f64().unwrap() - loss;
    assert!(difference.abs() < LOSS_TOLERANCE, "{loss}: {line}");
}
