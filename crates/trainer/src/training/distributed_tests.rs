//! Several ranks, each a thread with a model and connections of its own, beside one process.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use cifar_data::{Normalization, Split, shapes};
use data_parallel::{Backend, Options, Ranks};
use tempfile::TempDir;
use test_support::free_port;

use super::*;
use crate::observer::Silent;
use crate::sgd::SgdConfig;
use crate::tiny_model::TinyModel;
use crate::training::tests::ENVIRONMENT;

/// Three epochs of three batches, of 5, 5 and 1 images: of three ranks the third never has more than
/// one image and of the last batch only the first has any.
fn config() -> TrainingConfig {
    TrainingConfig {
        epochs: 3,
        batch_size: 5,
        evaluation_batch_size: 2,
        seed: 11,
        optimizer: SgdConfig {
            lr: 0.05,
            momentum: 0.9,
            weight_decay: 1e-3,
            ..Default::default()
        },
        checkpoint_every_steps: 2,
        ..Default::default()
    }
}

fn data() -> DataSets {
    DataSets {
        train: Arc::new(shapes::generate(1, Split::Train, 11)),
        validation: Some(Arc::new(shapes::generate(2, Split::Train, 3))),
        test: Arc::new(shapes::generate(1, Split::Test, 9)),
        normalization: Normalization::HALF,
    }
}

fn plain() -> TinyModel {
    let mut model = TinyModel::new(11);
    model.plain = true;
    model
}

/// A model that also has dropout, and batch statistics with buffers.
fn whole() -> TinyModel {
    TinyModel::new(11)
}

/// What is left of a rank.
#[derive(Debug)]
struct Rank {
    outcome: Result<Outcome>,
    /// Parameters, then buffers.
    state: Vec<Vec<u32>>,
    images_seen: usize,
    dropout_seeds: Vec<u64>,
}

/// A run of `ranks` ranks, or of a single process without a group.
struct Run<'a> {
    ranks: usize,
    model: &'a (dyn Fn() -> TinyModel + Sync),
    config: &'a (dyn Fn(usize) -> TrainingConfig + Sync),
    data: &'a (dyn Fn(usize) -> DataSets + Sync),
    /// Asked with the rank and how often it has been asked.
    stop: &'a (dyn Fn(usize, u64) -> bool + Sync),
    resident: bool,
}

impl Run<'_> {
    fn new(ranks: usize) -> Self {
        Self {
            ranks,
            model: &plain,
            config: &|_| config(),
            data: &|_| data(),
            stop: &|_, _| false,
            resident: false,
        }
    }

    /// In a new folder.
    fn start(&self) -> (TempDir, PathBuf, Vec<Rank>) {
        let out = tempfile::tempdir().unwrap();
        let run = RunDirectory::create(out.path(), "tiny", &config(), &data(), &ENVIRONMENT);
        let run = run.unwrap();
        let dir = run.path().to_path_buf();
        let ranks = self.go_on(run);
        (out, dir, ranks)
    }

    /// From the folder's newest checkpoint.
    fn resume(&self, dir: &Path) -> Vec<Rank> {
        self.go_on(RunDirectory::open(dir, "tiny").unwrap())
    }

    fn go_on(&self, run: RunDirectory) -> Vec<Rank> {
        if self.ranks == 0 {
            return vec![self.rank(0, Some(run), None)];
        }
        let port = free_port();
        thread::scope(|scope| {
            let mut run = Some(run);
            let threads: Vec<_> = (0..self.ranks)
                .map(|rank| {
                    let run = run.take();
                    scope.spawn(move || {
                        let group = connect(rank, self.ranks, port);
                        self.rank(rank, run, Some(&group))
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        })
    }

    fn rank(&self, rank: usize, run: Option<RunDirectory>, group: Option<&ProcessGroup>) -> Rank {
        // What a test model begins with must come from rank 0.
        let mut model = match rank {
            0 => (self.model)(),
            _ => {
                let mut model = (self.model)();
                // As from a map without order.
                model.lists_backwards = rank % 2 == 1;
                for (_, var) in model.named_parameters() {
                    var.set(&var.zeros_like().unwrap()).unwrap();
                }
                model
            }
        };
        let (config, data, device) = ((self.config)(rank), (self.data)(rank), Device::Cpu);
        let training = match group {
            Some(group) => Training::distributed(&model, data, &device, config, run, group),
            None => Training::new(&model, data, &device, config, run.unwrap()),
        };
        let asked = Cell::new(0);
        let stop = || {
            asked.set(asked.get() + 1);
            (self.stop)(rank, asked.get())
        };
        let execution = Execution {
            resident: self.resident,
            ..Execution::on(&device)
        };
        let outcome =
            training.and_then(|training| training.executed(execution).run(&mut Silent, &stop));
        model.lists_backwards = false;
        Rank {
            outcome,
            state: model.bits(),
            images_seen: model.pictures_seen.get(),
            dropout_seeds: model.dropout_seeds.take(),
        }
    }
}

fn connect(rank: usize, ranks: usize, port: u16) -> ProcessGroup {
    let ranks = Ranks::new(rank, ranks, "127.0.0.1", port).unwrap();
    let options = Options {
        timeout: Duration::from_secs(30),
        ..Default::default()
    };
    ProcessGroup::connect(&ranks, &options, Backend::Tcp).unwrap()
}

#[test]
fn gradients_are_averaged_by_what_was_agreed_on_and_not_by_what_a_rank_has() {
    let port = free_port();
    let of_rank = |rank: usize| {
        let group = connect(rank, 2, port);
        let processes = Processes(Some(&group));
        let [a, b, c] = [1f32, 2.0, 3.0].map(|value| Var::new(value, &Device::Cpu).unwrap());
        // Rank 0 has gradients of a and b, rank 1 of a and c.
        let other = [&b, &c][rank].as_tensor();
        let gradients = (a.as_tensor() + other).unwrap().backward().unwrap();
        let parameters = [a, b, c];
        let asked = processes.agree_on_gradients(&gradients, &parameters);
        assert_eq!(asked.unwrap(), [true; 3]);
        let (own, images) = (1, 2);
        let averaged = processes.average_gradients(
            gradients,
            &parameters,
            &[true, true, false],
            Share { own, images },
        );
        let averaged = averaged.unwrap();
        parameters.map(|parameter| {
            let gradient = averaged.get(&parameter)?;
            Some(gradient.to_scalar::<f32>().unwrap())
        })
    };
    thread::scope(|scope| {
        let ranks = [0, 1].map(|rank| scope.spawn(move || of_rank(rank)));
        for rank in ranks {
            assert_eq!(rank.join().unwrap(), [Some(1.0), Some(0.5), None]);
        }
    });
}

#[test]
fn rank_0_has_a_run_directory_and_no_other_rank_has() {
    fn refused(rank: usize, ranks: usize, port: u16, run: Option<RunDirectory>) -> String {
        let (group, model) = (connect(rank, ranks, port), plain());
        let training = Training::distributed(&model, data(), &Device::Cpu, config(), run, &group);
        training.err().unwrap().to_string()
    }
    let without = "rank 0 has no run directory";
    let error = refused(0, 1, free_port(), None);
    assert!(error.starts_with(without), "{error}");

    let of_two = |runs: [Option<RunDirectory>; 2]| {
        let port = free_port();
        let mut rank = 0..;
        let runs = runs.map(|run| (rank.next().unwrap(), run));
        thread::scope(|scope| {
            let ranks = runs.map(|(rank, run)| scope.spawn(move || refused(rank, 2, port, run)));
            ranks.map(|rank| rank.join().unwrap())
        })
    };
    let errors = of_two([None, None]);
    assert!(errors[0].starts_with(without), "{errors:?}");
    assert!(
        errors[1].contains("rank 0 gave up: rank 0 has no"),
        "{errors:?}"
    );

    let out = tempfile::tempdir().unwrap();
    let runs = [0, 1].map(|_| {
        let run = RunDirectory::create(out.path(), "tiny", &config(), &data(), &ENVIRONMENT);
        Some(run.unwrap())
    });
    let errors = of_two(runs);
    assert!(
        errors[1].starts_with("rank 1 has a run directory"),
        "{errors:?}"
    );
    assert!(
        errors[0].contains("rank 1 gave up: rank 1 has a"),
        "{errors:?}"
    );
}

fn metrics(dir: &Path) -> Vec<Metric> {
    let lines = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Equal counts, and losses that differ by rounding only.
fn assert_close(found: &[Metric], expected: &[Metric]) {
    assert_eq!(found.len(), expected.len());
    let rounded = |metric: &Metric| {
        let mut metric = metric.clone();
        let value = match &mut metric {
            Metric::Step { loss, .. } => f64::from(std::mem::take(loss)),
            Metric::Evaluation { loss, .. } => std::mem::take(loss),
            Metric::Epoch { train_loss, .. } => std::mem::take(train_loss),
        };
        (metric, value)
    };
    for (found, expected) in found.iter().zip(expected) {
        let ((found, loss), (expected, expected_loss)) = (rounded(found), rounded(expected));
        assert_eq!(found, expected);
        let error = (loss / expected_loss - 1.0).abs();
        assert!(error < 1e-5, "{found:?}: {loss}, alone {expected_loss}");
    }
}

fn largest_difference(a: &[Vec<u32>], b: &[Vec<u32>]) -> f32 {
    let values = |state: &[Vec<u32>]| state.concat().into_iter().map(f32::from_bits);
    let differences = values(a).zip(values(b)).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

#[test]
fn several_ranks_make_the_steps_of_one_process() {
    let (_out, dir, alone) = Run::new(0).start();
    let expected = metrics(&dir);
    for count in 1..=4 {
        let (_out, dir, ranks) = Run::new(count).start();
        assert_close(&metrics(&dir), &expected);
        for (rank, found) in ranks.iter().enumerate() {
            assert!(
                matches!(found.outcome, Ok(Outcome::Finished(_))),
                "{:?}",
                found.outcome
            );
            assert_eq!(
                found.outcome.as_ref().unwrap(),
                ranks[0].outcome.as_ref().unwrap()
            );
            assert!(
                found.state == ranks[0].state,
                "rank {rank} of {count} has other weights"
            );
        }
        let difference = largest_difference(&ranks[0].state, &alone[0].state);
        assert!(difference < 1e-6, "{count} ranks: {difference}");
        // The work is shared, not repeated.
        let seen: Vec<usize> = ranks.iter().map(|rank| rank.images_seen).collect();
        assert_eq!(seen.iter().sum::<usize>(), alone[0].images_seen, "{seen:?}");
    }
}

#[test]
fn a_frozen_part_is_computed_once_for_all_ranks() {
    let frozen = || {
        let mut model = plain();
        model.frozen = true;
        model
    };
    let run = |ranks| {
        let run = Run {
            model: &frozen,
            ..Run::new(ranks)
        };
        run.start()
    };
    let (_out, dir, alone) = run(0);
    let expected = metrics(&dir);
    for count in [2, 3] {
        let (_out, dir, ranks) = run(count);
        assert_close(&metrics(&dir), &expected);
        assert!(largest_difference(&ranks[0].state, &alone[0].state) < 1e-6);
        let seen: usize = ranks.iter().map(|rank| rank.images_seen).sum();
        assert_eq!(seen, alone[0].images_seen);
    }
}

#[test]
fn a_run_stopped_on_one_rank_stops_on_all_and_resumes_to_the_same_bits() {
    let run = Run {
        model: &whole,
        ..Run::new(2)
    };
    let (_out, dir, ranks) = run.start();
    let (expected, weights) = (
        fs::read(dir.join("metrics.jsonl")).unwrap(),
        &ranks[0].state,
    );
    let mut stopped_at = Vec::new();
    for asked in 1.. {
        let stopping = Run {
            stop: &|rank, count| rank == 1 && count >= asked,
            ..Run {
                model: &whole,
                ..Run::new(2)
            }
        };
        let (_out, dir, ranks) = stopping.start();
        let outcomes = [0, 1].map(|rank| ranks[rank].outcome.as_ref().unwrap());
        assert_eq!(outcomes[0], outcomes[1]);
        let Outcome::Stopped { step, .. } = outcomes[0] else {
            break;
        };
        stopped_at.push(*step);
        let ranks = run.resume(&dir);
        assert!(
            matches!(ranks[1].outcome, Ok(Outcome::Finished(_))),
            "{ranks:?}"
        );
        assert_eq!(
            fs::read(dir.join("metrics.jsonl")).unwrap(),
            expected,
            "at ask {asked}"
        );
        assert!(
            ranks[0].state == *weights,
            "other weights after a stop at ask {asked}"
        );
    }
    stopped_at.dedup();
    assert_eq!(stopped_at, (0..=9).collect::<Vec<_>>());
}

#[test]
fn ranks_whose_data_stay_on_the_device_leave_the_same_bits() {
    let frozen = || {
        let mut model = plain();
        model.frozen = true;
        model
    };
    // Of four ranks three have no image of the last batch.
    for (ranks, model) in [
        (2, &whole as &(dyn Fn() -> TinyModel + Sync)),
        (4, &whole),
        (3, &frozen),
    ] {
        let run = Run {
            model,
            ..Run::new(ranks)
        };
        let (_out, dir, expected) = run.start();
        let resident = Run {
            resident: true,
            ..run
        };
        let (_out, resident_dir, mut found) = resident.start();
        let same = |found: &[Rank], found_dir: &Path| {
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(
                    found.outcome.as_ref().unwrap(),
                    expected.outcome.as_ref().unwrap()
                );
                assert!(found.state == expected.state, "{ranks} ranks");
            }
            assert_eq!(
                fs::read(found_dir.join("metrics.jsonl")).unwrap(),
                fs::read(dir.join("metrics.jsonl")).unwrap()
            );
        };
        same(&found, &resident_dir);
        // Stopped by the last rank, when it is asked for the third time.
        let stopping = Run {
            stop: &|rank, count| rank == ranks - 1 && count == 3,
            ..resident
        };
        let (_out, dir_of_stopped, stopped) = stopping.start();
        for rank in &stopped {
            assert!(
                matches!(rank.outcome, Ok(Outcome::Stopped { .. })),
                "{rank:?}"
            );
        }
        found = Run {
            model,
            resident: true,
            ..Run::new(ranks)
        }
        .resume(&dir_of_stopped);
        same(&found, &dir_of_stopped);
    }
}

#[test]
fn training_that_diverges_is_the_same_error_on_all_ranks() {
    let diverging = Run {
        config: &|_| TrainingConfig {
            optimizer: SgdConfig {
                lr: 1e30,
                ..config().optimizer
            },
            ..config()
        },
        ..Run::new(2)
    };
    let (_out, _, ranks) = diverging.start();
    for rank in &ranks {
        let error = rank.outcome.as_ref().unwrap_err().to_string();
        assert!(error.contains("training has diverged"), "{error}");
    }
}

#[test]
fn a_loss_that_is_not_finite_is_the_same_error_on_all_ranks() {
    let too_steep = || {
        let mut model = plain();
        model.gain = 1e30;
        model
    };
    for resident in [false, true] {
        let run = Run {
            model: &too_steep,
            resident,
            ..Run::new(2)
        };
        let (_out, _, ranks) = run.start();
        let errors = ranks.iter().map(|rank| rank.outcome.as_ref().unwrap_err());
        let errors: Vec<String> = errors.map(ToString::to_string).collect();
        assert!(errors[0].contains("training has diverged"), "{errors:?}");
        // Who has no folder does not know what is in it.
        let known = "no checkpoint had been saved yet";
        assert!(errors[0].contains(known), "{errors:?}");
        let told = errors[0].replace(known, "rank 0 names the last good checkpoint");
        assert_eq!(errors[1], told);
    }
}

#[test]
fn ranks_whose_losses_depend_on_different_parameters_keep_the_same_weights() {
    let leaves_out = || {
        let mut model = plain();
        model.leaves_out = true;
        model
    };
    let run = Run {
        model: &leaves_out,
        ..Run::new(2)
    };
    let (_out, _, ranks) = run.start();
    for rank in &ranks {
        assert!(matches!(rank.outcome, Ok(Outcome::Finished(_))), "{rank:?}");
        assert_eq!(rank.state, ranks[0].state);
    }
}

#[test]
fn different_settings_are_refused_on_all_ranks() {
    let run = Run {
        config: &|rank| TrainingConfig {
            epochs: 3 + rank as u64,
            ..config()
        },
        ..Run::new(2)
    };
    let (_out, _, ranks) = run.start();
    for rank in &ranks {
        let error = rank.outcome.as_ref().unwrap_err().to_string();
        assert!(error.contains("epochs") && error.contains('4'), "{error}");
    }
}

#[test]
fn different_data_are_refused_on_all_ranks() {
    type Change = fn(&mut DataSets);
    let otherwise: [(&str, Change); 3] = [
        ("training data", |data| {
            data.train = Arc::new(shapes::generate(7, Split::Train, 11));
        }),
        ("training data", |data| data.validation = None),
        ("normalization", |data| data.normalization.std = [0.25; 3]),
    ];
    for (named, change) in otherwise {
        let run = Run {
            data: &|rank| {
                let mut data = data();
                if rank == 1 {
                    change(&mut data);
                }
                data
            },
            ..Run::new(2)
        };
        let (_out, _, ranks) = run.start();
        for rank in &ranks {
            let error = rank.outcome.as_ref().unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}

#[test]
fn each_rank_has_dropout_masks_of_its_own_at_each_step() {
    for resident in [false, true] {
        let run = Run {
            model: &whole,
            resident,
            ..Run::new(2)
        };
        let (_out, _, ranks) = run.start();
        for (number, rank) in ranks.iter().enumerate() {
            rank.outcome.as_ref().unwrap();
            // Of each epoch's last batch, a single image, rank 1 has none.
            let steps = (0..9).filter(|step| number == 0 || step % 3 != 2);
            let of_step = |step| random::dropout_seed_of_rank(config().seed, step, number);
            let expected: Vec<u64> = steps.map(of_step).collect();
            assert_eq!(
                rank.dropout_seeds, expected,
                "rank {number}, resident {resident}"
            );
        }
    }
}

#[test]
fn a_batch_of_fewer_images_than_ranks_is_refused() {
    let run = Run {
        config: &|_| TrainingConfig {
            batch_size: 2,
            ..config()
        },
        ..Run::new(3)
    };
    let (_out, _, ranks) = run.start();
    let error = ranks[2].outcome.as_ref().unwrap_err().to_string();
    assert!(error.contains("batch_size is 2"), "{error}");
}

#[test]
fn what_rank_0_cannot_save_is_every_ranks_error() {
    let out = tempfile::tempdir().unwrap();
    let run = RunDirectory::create(out.path(), "tiny", &config(), &data(), &ENVIRONMENT).unwrap();
    // A file where the first checkpoint's folder should be made.
    let checkpoints = run.path().join("checkpoints");
    fs::create_dir(&checkpoints).unwrap();
    fs::write(checkpoints.join(".step-0000002.tmp"), "").unwrap();
    let ranks = Run::new(2).go_on(run);
    let errors: Vec<String> = ranks
        .iter()
        .map(|rank| rank.outcome.as_ref().unwrap_err().to_string())
        .collect();
    assert!(errors[0].contains("cannot remove"), "{errors:?}");
    assert!(
        errors[1].contains("rank 0 gave up: cannot remove"),
        "{errors:?}"
    );
}
