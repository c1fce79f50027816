//! A whole run beside a training loop that is written out: order, masks, loss, learning rate, metrics and weights.

use std::fs;

use cifar_data::{Batches, Normalization};

use super::tests::{create, data};
use super::*;
use crate::observer::Silent;
use crate::schedule::{Schedule, Span};
use crate::sgd::SgdConfig;
use crate::tiny_model::TinyModel;

/// Of [`data`], to train on.
const IMAGES: usize = 14;
const BATCH_SIZE: usize = 5;
/// Batches of 5, 5 and 4.
const STEPS_PER_EPOCH: u64 = 3;
const EPOCHS: u64 = 3;
const BASE_LR: f64 = 0.05;

fn config(seed: u64) -> TrainingConfig {
    TrainingConfig {
        epochs: EPOCHS,
        batch_size: BATCH_SIZE,
        evaluation_batch_size: 4,
        seed,
        optimizer: SgdConfig {
            lr: BASE_LR,
            momentum: 0.9,
            nesterov: true,
            weight_decay: 1e-3,
            ..Default::default()
        },
        label_smoothing: 0.1,
        evaluate_every_epochs: 2,
        ..Default::default()
    }
}

fn model(seed: u64) -> TinyModel {
    let mut model = TinyModel::new(seed);
    model.auxiliary = vec![0.3, 0.5];
    model
}

/// All of `order` in one batch.
fn examples(set: &Arc<ImageSet>, order: &[u32]) -> (Tensor, Tensor) {
    let mut batches = Batches::new(
        set.clone(),
        order.to_vec(),
        order.len(),
        Normalization::HALF,
        &Device::Cpu,
    )
    .unwrap();
    let batch = batches.next().unwrap().unwrap();
    (batch.images, batch.labels)
}

fn correct(logits: &Tensor, labels: &Tensor) -> u64 {
    let answers = logits.argmax(1).unwrap().to_vec1::<u32>().unwrap();
    let labels = labels.to_vec1::<u32>().unwrap();
    answers.iter().zip(&labels).filter(|(a, b)| a == b).count() as u64
}

/// What [`Training`] should do, without its bookkeeping: the metrics of a run whose step `n`, from 0, has the rate `lr(n)`.
fn plain_loop(model: &TinyModel, config: &TrainingConfig, lr: &dyn Fn(u64) -> f64) -> Vec<Metric> {
    let (data, mut metrics) = (data(), Vec::new());
    let mut optimizer = Sgd::new(model.named_parameters(), config.optimizer).unwrap();
    let smoothed = CrossEntropyConfig {
        label_smoothing: config.label_smoothing,
    };
    let mut step = 0;
    for epoch in 0..EPOCHS {
        let mut rng = random::stream(config.seed, random::SHUFFLE, epoch);
        let (mut loss_of_images, mut right) = (0.0, 0);
        for batch in shuffled_order(IMAGES, &mut rng).chunks(BATCH_SIZE) {
            let (images, labels) = examples(&data.train, batch);
            let mask = random::dropout_seed(config.seed, step);
            let output = model.forward_train(&images, mask).unwrap();
            let of = |logits| cross_entropy(logits, &labels, smoothed).unwrap();
            let [first, second] = [0, 1].map(|head| of(&output.auxiliary[head].logits));
            let loss = (of(&output.logits) + (first * 0.3).unwrap()).unwrap();
            let loss = (loss + (second * 0.5).unwrap()).unwrap();
            optimizer.step(&backward(&loss).unwrap(), lr(step)).unwrap();
            let value = loss.to_scalar::<f32>().unwrap();
            let correct = correct(&output.logits, &labels);
            metrics.push(Metric::Step {
                step: step + 1,
                epoch: epoch + 1,
                loss: value,
                correct,
                images: batch.len() as u64,
                lr: lr(step),
            });
            loss_of_images += f64::from(value) * batch.len() as f64;
            right += correct;
            step += 1;
        }
        // After every second epoch, and the last.
        let evaluated = match epoch + 1 {
            2 | 3 => vec![
                ("test", &data.test),
                ("validation", data.validation.as_ref().unwrap()),
            ],
            _ => Vec::new(),
        };
        for (name, set) in evaluated {
            let (images, labels) = examples(set, &(0..set.len() as u32).collect::<Vec<_>>());
            let logits = model.forward(&images, Mode::Eval).unwrap();
            let loss = cross_entropy(&logits, &labels, CrossEntropyConfig::default()).unwrap();
            let correct = correct(&logits, &labels);
            metrics.push(Metric::Evaluation {
                step,
                epoch: epoch + 1,
                set: name.into(),
                loss: f64::from(loss.to_scalar::<f32>().unwrap()),
                accuracy: correct as f64 / set.len() as f64,
                correct,
                images: set.len() as u64,
            });
        }
        metrics.push(Metric::Epoch {
            step,
            epoch: epoch + 1,
            train_loss: loss_of_images / IMAGES as f64,
            train_accuracy: right as f64 / IMAGES as f64,
            images: IMAGES as u64,
        });
    }
    metrics
}

/// `metric` without its loss, where that may be rounded otherwise: an evaluation is a mean of means of batches.
fn split_loss(metric: &Metric) -> (Metric, f64) {
    let mut metric = metric.clone();
    let loss = match &mut metric {
        Metric::Evaluation { loss, .. } => std::mem::take(loss),
        _ => 0.0,
    };
    (metric, loss)
}

fn run(config: &TrainingConfig, resident: bool) -> (TinyModel, Vec<Metric>, String) {
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), config);
    let dir = run.path().to_path_buf();
    let model = model(config.seed);
    let execution = Execution {
        resident,
        ..Execution::on(&Device::Cpu)
    };
    let outcome = Training::new(&model, data(), &Device::Cpu, config.clone(), run)
        .map(|training| training.executed(execution))
        .and_then(|mut training| training.run(&mut Silent, &|| false));
    let Outcome::Finished(summary) = outcome.unwrap() else {
        panic!("stopped");
    };
    let jsonl = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let metrics: Vec<Metric> = jsonl
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    // The last of each set is what the run ends with.
    for (name, evaluation) in &summary.evaluations {
        let last = metrics.iter().rev().find_map(|metric| match metric {
            Metric::Evaluation {
                set,
                loss,
                correct,
                images,
                ..
            } if set == name => Some(Evaluation {
                loss: *loss,
                correct: *correct,
                images: *images,
            }),
            _ => None,
        });
        assert_eq!(Some(*evaluation), last, "{name}");
    }
    assert_eq!(summary.evaluations.len(), 2);
    let csv = fs::read_to_string(dir.join("metrics.csv")).unwrap();
    (model, metrics, csv)
}

/// Holds a run with `schedule` against the loop, with the data on the host and on the device.
fn check(schedule: Schedule, lr: &dyn Fn(u64) -> f64) {
    for (seed, resident) in [(11, false), (12, false), (11, true)] {
        let config = TrainingConfig {
            schedule,
            ..config(seed)
        };
        let expected_model = model(seed);
        let expected = plain_loop(&expected_model, &config, lr);
        let (model, found, csv) = run(&config, resident);
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            let ((found, loss), (expected, expected_loss)) =
                (split_loss(found), split_loss(expected));
            assert_eq!(found, expected);
            let difference = (loss - expected_loss).abs();
            assert!(
                difference <= 1e-6 * expected_loss,
                "{found:?}: {loss}, not {expected_loss}"
            );
        }
        assert_eq!(
            model.bits(),
            expected_model.bits(),
            "seed {seed}, resident {resident}"
        );
        check_csv(&csv, &found);
    }
}

/// Whether a line of `metrics.csv` has under each title what `metrics.jsonl` says of its epoch.
fn check_csv(csv: &str, metrics: &[Metric]) {
    let mut reader = csv::Reader::from_reader(csv.as_bytes());
    let titles = reader.headers().unwrap().clone();
    let rows: Vec<_> = reader.records().map(|row| row.unwrap()).collect();
    assert_eq!(rows.len() as u64, EPOCHS);
    for (row, epoch) in rows.iter().zip(1..) {
        let cell = |title: &str| {
            let column = titles.iter().position(|found| found == title);
            row[column.unwrap_or_else(|| panic!("no {title} in {titles:?}"))].to_string()
        };
        let (mut losses, mut accuracies) = (BTreeMap::new(), BTreeMap::new());
        let mut last_lr = 0.0;
        for metric in metrics {
            match metric {
                Metric::Step { epoch: of, lr, .. } if *of == epoch => last_lr = *lr,
                Metric::Epoch {
                    epoch: of,
                    step,
                    train_loss,
                    train_accuracy,
                    ..
                } if *of == epoch => {
                    losses.insert("train", *train_loss);
                    accuracies.insert("train", *train_accuracy);
                    assert_eq!(cell("step"), step.to_string());
                }
                Metric::Evaluation {
                    epoch: of,
                    set,
                    loss,
                    accuracy,
                    ..
                } if *of == epoch => {
                    let set = if set == "test" { "test" } else { "validation" };
                    losses.insert(set, *loss);
                    accuracies.insert(set, *accuracy);
                }
                _ => (),
            }
        }
        assert_eq!(cell("epoch"), epoch.to_string());
        assert_eq!(cell("lr").parse(), Ok(last_lr));
        for set in ["train", "validation", "test"] {
            let number = |title: String| cell(&title).parse::<f64>().ok();
            assert_eq!(
                number(format!("{set}_loss")),
                losses.get(set).copied(),
                "{set}"
            );
            assert_eq!(
                number(format!("{set}_accuracy")),
                accuracies.get(set).copied(),
                "{set}"
            );
        }
    }
}

#[test]
fn a_run_in_plateaus_makes_the_steps_of_a_plain_loop() {
    let plateaus = Schedule::Step {
        every: Span::Examples(10),
        factor: 0.5,
    };
    check(plateaus, &|step| {
        BASE_LR * [1.0, 0.5, 0.25, 0.125, 0.0625][step as usize / 2]
    });
}

#[test]
fn a_run_that_rises_and_falls_makes_the_steps_of_a_plain_loop() {
    let cosine = Schedule::Cosine {
        warmup: Span::Epochs(1.0),
        end_factor: 0.0,
    };
    let rises = STEPS_PER_EPOCH;
    let falls = EPOCHS * STEPS_PER_EPOCH - rises;
    check(cosine, &|step| {
        BASE_LR
            * match step < rises {
                true => (step + 1) as f64 / (rises + 1) as f64,
                false => {
                    let progress = (step - rises) as f64 / (falls - 1) as f64;
                    0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
                }
            }
    });
}
