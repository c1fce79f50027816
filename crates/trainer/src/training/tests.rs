use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use cifar_data::{Batches, Normalization, Split, shapes};
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::durable::sha256_hex;
use crate::environment::{Environment, Program};
use crate::observer::Silent;
use crate::run_directory::Finished;
use crate::sgd::SgdConfig;
use crate::tiny_model::TinyModel;

const EXPERIMENT: &str = "tiny";

const PROGRAM: Program<'_> = Program {
    name: EXPERIMENT,
    version: "0",
    sources: ".",
};

/// 2 epochs of 4 steps (the last batch partial), a validation set, checkpoints every 3 steps.
fn config() -> TrainingConfig {
    TrainingConfig {
        epochs: 2,
        batch_size: 4,
        evaluation_batch_size: 5,
        seed: 11,
        optimizer: SgdConfig {
            lr: 0.05,
            momentum: 0.9,
            weight_decay: 1e-3,
            ..Default::default()
        },
        checkpoint_every_steps: 3,
        ..Default::default()
    }
}

const TOTAL_STEPS: u64 = 8;

pub(super) fn data() -> DataSets {
    DataSets {
        train: Arc::new(shapes::generate(1, Split::Train, 14)),
        validation: Some(Arc::new(shapes::generate(2, Split::Train, 7))),
        test: Arc::new(shapes::generate(1, Split::Test, 11)),
        normalization: Normalization::HALF,
    }
}

/// Looked up once: it starts git, and a child that another test's thread has just forked would hold
/// this one's lock for an instant.
pub(super) static ENVIRONMENT: LazyLock<Environment> =
    LazyLock::new(|| Environment::capture(PROGRAM, "cpu", 1, 0));

pub(super) fn create(out: &Path, config: &TrainingConfig) -> RunDirectory {
    let environment = &*ENVIRONMENT;
    RunDirectory::create(out, EXPERIMENT, config, &data(), environment).unwrap()
}

fn config_in(run: &RunDirectory) -> TrainingConfig {
    RunDirectory::config_of(run.path(), EXPERIMENT).unwrap()
}

/// Runs a new process' worth of training: a fresh model, all state from the folder.
fn go_on(run: RunDirectory, stop: &dyn Fn() -> bool) -> (TinyModel, Result<Outcome>) {
    let model = TinyModel::new(config().seed);
    let config = config_in(&run);
    let outcome = Training::new(&model, data(), &Device::Cpu, config, run)
        .and_then(|mut training| training.run(&mut Silent, stop));
    (model, outcome)
}

/// [`go_on`] with the data resident on the device, and nothing read before it must be.
fn go_on_resident(run: RunDirectory, stop: &dyn Fn() -> bool) -> (TinyModel, Result<Outcome>) {
    let model = TinyModel::new(config().seed);
    let config = config_in(&run);
    let resident = Execution {
        resident: true,
        ..Execution::on(&Device::Cpu)
    };
    let outcome = Training::new(&model, data(), &Device::Cpu, config, run)
        .map(|training| training.executed(resident))
        .and_then(|mut training| training.run(&mut Silent, stop));
    (model, outcome)
}

fn resume(dir: &Path, stop: &dyn Fn() -> bool) -> (TinyModel, Result<Outcome>) {
    go_on(RunDirectory::open(dir, EXPERIMENT).unwrap(), stop)
}

#[test]
fn a_last_batch_with_fewer_images_is_not_worth_timing_engines_for() {
    let out = TempDir::new().unwrap();
    let (model, outcome) = go_on_resident(create(out.path(), &config()), &|| false);
    outcome.unwrap();
    let seen = model.batches_seen.take().into_iter().collect::<Vec<_>>();
    // 14 images in batches of 4; 7 and 11 in batches of 5.
    assert_eq!(seen, [(1, false), (2, false), (4, true), (5, true)]);
}

/// What two equal runs must have in common: every byte that the seed decides.
#[derive(Debug, PartialEq)]
struct Traces {
    weights: String,
    model_file: String,
    metrics: String,
    summary: Summary,
}

fn traces(dir: &Path, model: &TinyModel, outcome: Result<Outcome>) -> Traces {
    let Ok(Outcome::Finished(summary)) = outcome else {
        panic!("not finished: {outcome:?}");
    };
    let model_file = fs::read(dir.join("model.safetensors")).unwrap();
    let model_file = sha256_hex(&model_file);
    assert_eq!(summary.weights_sha256, model_file);
    Traces {
        weights: sha256_hex(format!("{:?}", model.bits()).as_bytes()),
        model_file,
        metrics: fs::read_to_string(dir.join("metrics.jsonl")).unwrap(),
        summary,
    }
}

fn uninterrupted(config: &TrainingConfig) -> (TempDir, Traces) {
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), config);
    let dir = run.path().to_path_buf();
    let (model, outcome) = go_on(run, &|| false);
    let traces = traces(&dir, &model, outcome);
    (out, traces)
}

/// True from the `n`-th time on that it is asked.
fn after(n: u64) -> impl Fn() -> bool {
    let asked = Cell::new(0);
    move || {
        asked.set(asked.get() + 1);
        asked.get() > n
    }
}

#[test]
fn a_run_stopped_anywhere_and_resumed_ends_with_the_same_bits() {
    let (_out, expected) = uninterrupted(&config());
    let mut stops = Vec::new();
    // `stop` is asked before each step and after each batch of an evaluation, so this walks through
    // every place where a run can stop, evaluations included.
    for n in 0.. {
        let out = tempfile::tempdir().unwrap();
        let run = create(out.path(), &config());
        let dir = run.path().to_path_buf();
        let (_, outcome) = go_on(run, &after(n));
        match outcome.unwrap() {
            Outcome::Stopped { step, .. } => stops.push(step),
            Outcome::Finished(_) => break,
        }
        let (model, outcome) = resume(&dir, &|| false);
        assert_eq!(
            traces(&dir, &model, outcome),
            expected,
            "stopped at ask {n}"
        );
    }
    let mut steps = stops.clone();
    steps.dedup();
    assert_eq!(steps, (0..=TOTAL_STEPS).collect::<Vec<_>>());
    assert!(stops.len() > steps.len(), "no stop fell into an evaluation");
}

#[test]
fn a_run_stopped_after_every_single_step_ends_with_the_same_bits() {
    let (_out, expected) = uninterrupted(&config());
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let dir = run.path().to_path_buf();
    // One step, or one whole evaluation, a session.
    let (mut model, mut outcome) = go_on(run, &after(1));
    let mut sessions = 1;
    while matches!(outcome, Ok(Outcome::Stopped { .. })) {
        // An evaluation is one piece of work: its five batches and one step more.
        let evaluates = sessions % 4 == 0;
        (model, outcome) = resume(&dir, &after(if evaluates { 6 } else { 1 }));
        sessions += 1;
        assert!(sessions < 30, "no progress");
    }
    assert!(sessions >= 8);
    assert_eq!(traces(&dir, &model, outcome), expected);
}

/// A killed process leaves metric lines after its last checkpoint; a machine that dies can leave
/// the file cut anywhere after it.
#[test]
fn a_killed_run_resumes_from_its_last_checkpoint_without_duplicate_lines() {
    let (_out, expected) = uninterrupted(&config());
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let dir = run.path().to_path_buf();
    let killed = std::panic::catch_unwind(|| go_on(run, &panics_after(12)));
    assert!(killed.is_err());
    let lines = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    assert!(lines.contains("\"step\":7"), "{lines}");
    let mut cut = lines.into_bytes();
    cut.truncate(cut.len() - 7);
    fs::write(dir.join("metrics.jsonl"), cut).unwrap();
    let (model, outcome) = resume(&dir, &|| false);
    assert_eq!(traces(&dir, &model, outcome), expected);
}

fn panics_after(n: u64) -> impl Fn() -> bool + std::panic::UnwindSafe {
    let asked = std::panic::AssertUnwindSafe(after(n));
    move || match (*asked)() {
        true => panic!("killed"),
        false => false,
    }
}

#[test]
fn a_run_killed_before_its_first_checkpoint_starts_again() {
    let (_out, expected) = uninterrupted(&config());
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let dir = run.path().to_path_buf();
    assert!(std::panic::catch_unwind(|| go_on(run, &panics_after(2))).is_err());
    assert!(!dir.join("checkpoints").exists());
    let (model, outcome) = resume(&dir, &|| false);
    assert_eq!(traces(&dir, &model, outcome), expected);
}

#[test]
fn a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before() {
    let (_out, expected) = uninterrupted(&config());
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let dir = run.path().to_path_buf();
    let (_, outcome) = go_on(run, &after(4));
    let Ok(Outcome::Stopped { checkpoint, .. }) = outcome else {
        panic!("{outcome:?}");
    };
    fs::write(checkpoint.join("optimizer.safetensors"), b"cut").unwrap();
    let (model, outcome) = resume(&dir, &|| false);
    assert_eq!(traces(&dir, &model, outcome), expected);
}

#[test]
fn a_run_killed_between_its_last_checkpoint_and_finished_json_finishes() {
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let dir = run.path().to_path_buf();
    let (model, outcome) = go_on(run, &|| false);
    let expected = traces(&dir, &model, outcome);
    fs::remove_file(dir.join("finished.json")).unwrap();
    fs::remove_file(dir.join("model.safetensors")).unwrap();
    let (model, outcome) = resume(&dir, &|| false);
    assert_eq!(traces(&dir, &model, outcome), expected);
    let run = RunDirectory::open(&dir, EXPERIMENT).unwrap();
    assert_eq!(run.finished().unwrap(), Finished::Yes(expected.summary));
}

#[test]
fn what_a_finished_run_has_lost_is_written_again_from_its_last_checkpoint() {
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let dir = run.path().to_path_buf();
    let (model, outcome) = go_on(run, &|| false);
    let expected = traces(&dir, &model, outcome);
    let weights = fs::read(dir.join("model.safetensors")).unwrap();
    let finished = || RunDirectory::open(&dir, EXPERIMENT).unwrap().finished();
    let model_file = dir.join("model.safetensors");
    let summary_file = dir.join("finished.json");
    let damages: [(&dyn Fn(), &str); 3] = [
        (
            &|| fs::remove_file(&model_file).unwrap(),
            "model.safetensors is missing",
        ),
        (
            &|| fs::write(&model_file, [&weights[..], b"x"].concat()).unwrap(),
            "model.safetensors is not what the run ended with",
        ),
        (
            &|| fs::write(&summary_file, "{").unwrap(),
            "finished.json is damaged: EOF",
        ),
    ];
    for (damage, expected_problem) in damages {
        damage();
        let Finished::Lost(problem) = finished().unwrap() else {
            panic!("not lost: {expected_problem}");
        };
        assert!(problem.contains(expected_problem), "{problem}");
        let (model, outcome) = resume(&dir, &|| false);
        assert_eq!(traces(&dir, &model, outcome), expected);
        assert_eq!(fs::read(dir.join("model.safetensors")).unwrap(), weights);
        let again = Finished::Yes(expected.summary.clone());
        assert_eq!(finished().unwrap(), again);
        let recorded = crate::recorded_weights_sha256(&dir).unwrap();
        assert_eq!(recorded, Some(sha256_hex(&weights)));
    }
    // Beginning again would not be writing it again.
    fs::remove_file(dir.join("model.safetensors")).unwrap();
    fs::remove_dir_all(dir.join("checkpoints")).unwrap();
    let error = finished().unwrap_err().to_string();
    assert!(
        error.contains("model.safetensors is missing, and no checkpoint"),
        "{error}"
    );
}

#[test]
fn max_steps_ends_inside_an_epoch_with_an_evaluation() {
    let config = TrainingConfig {
        max_steps: Some(6),
        ..config()
    };
    let (_out, traces) = uninterrupted(&config);
    assert_eq!((traces.summary.steps, traces.summary.epochs), (6, 2));
    let events: Vec<Metric> = traces
        .metrics
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let Some(Metric::Epoch { step, images, .. }) = events.last() else {
        panic!("{events:?}");
    };
    assert_eq!((*step, *images), (6, 8));
    let test = traces.summary.evaluations["test"];
    assert_eq!(test.images, 11);
}

#[test]
fn the_seed_changes_the_run_and_the_same_seed_repeats_it() {
    let (_a, first) = uninterrupted(&config());
    let (_b, again) = uninterrupted(&config());
    let (_c, other) = uninterrupted(&TrainingConfig {
        seed: 12,
        ..config()
    });
    assert_eq!(first, again);
    // The model of both has the same initial weights; order and dropout differ.
    assert_ne!(first.metrics, other.metrics);
}

#[test]
fn without_shuffling_every_epoch_has_the_order_of_the_set() {
    let in_order = TrainingConfig {
        shuffle: false,
        ..config()
    };
    let (_a, ordered) = uninterrupted(&in_order);
    let (_b, shuffled) = uninterrupted(&config());
    assert_ne!(ordered.metrics, shuffled.metrics);
    // Dropout and weights at step 1 are those of the shuffled run, so only the images differ.
    let model = TinyModel::new(config().seed);
    let first: Vec<u32> = (0..4).collect();
    let mut batches =
        Batches::new(data().train, first, 4, Normalization::HALF, &Device::Cpu).unwrap();
    let batch = batches.next().unwrap().unwrap();
    let output = model
        .forward_train(&batch.images, random::dropout_seed(config().seed, 0))
        .unwrap();
    let loss = cross_entropy(&output.logits, &batch.labels, Default::default()).unwrap();
    let expected = serde_json::to_string(&loss.to_scalar::<f32>().unwrap()).unwrap();
    let line = ordered.metrics.lines().next().unwrap();
    assert!(line.contains(&format!("\"loss\":{expected},")), "{line}");
}

#[test]
fn training_lowers_the_loss() {
    let long = TrainingConfig {
        epochs: 30,
        ..config()
    };
    let (_out, traces) = uninterrupted(&long);
    let losses: Vec<f64> = traces
        .metrics
        .lines()
        .filter_map(|line| match serde_json::from_str(line).unwrap() {
            Metric::Epoch { train_loss, .. } => Some(train_loss),
            _ => None,
        })
        .collect();
    assert_eq!(losses.len(), 30);
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..5]), mean(&losses[25..]));
    assert!(last < 0.7 * first, "from {first} to {last}");
}

#[test]
fn a_loss_that_is_not_finite_names_its_step_and_spoils_no_checkpoint() {
    let wild = TrainingConfig {
        checkpoint_every_steps: 1,
        optimizer: SgdConfig {
            lr: 1e30,
            ..config().optimizer
        },
        ..config()
    };
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &wild);
    let dir = run.path().to_path_buf();
    let (_, outcome) = go_on(run, &|| false);
    let (step, kind) = match outcome.unwrap_err() {
        Error::NonFiniteLoss { step, epoch: 1, .. } => (step, "loss"),
        Error::NonFiniteWeights { step, epoch: 1, .. } => (step, "weights"),
        other => panic!("{other}"),
    };
    assert!(step > 1, "{kind} at step {step}");
    let kept = checkpoint::load_newest(&dir.join("checkpoints"))
        .unwrap()
        .unwrap();
    assert_eq!(kept.state.position.step, step - 1);
    let model = TinyModel::new(1);
    weights::load_from_bytes(&model, &kept.weights, Path::new("kept")).unwrap();
    let finite = |bits: &u32| f32::from_bits(*bits).is_finite();
    assert!(model.bits().iter().flatten().all(finite));
}

#[test]
fn an_infinite_loss_stops_before_the_update() {
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let mut model = TinyModel::new(1);
    model.gain = f64::INFINITY;
    let before: Vec<_> = model.bits()[..4].to_vec();
    let mut training = Training::new(&model, data(), &Device::Cpu, config(), run).unwrap();
    let error = training
        .run(&mut Silent, &|| false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("at step 1 (epoch 1)"), "{error}");
    assert!(
        error.contains("no checkpoint had been saved yet"),
        "{error}"
    );
    assert_eq!(model.bits()[..4], before);
}

#[test]
fn an_observer_hears_of_each_checkpoint_once_it_is_there() {
    #[derive(Default)]
    struct Saved(Vec<u64>);
    impl Observer for Saved {
        fn checkpoint_saved(&mut self, path: &Path, step: u64) {
            assert!(path.join("model.safetensors").is_file());
            self.0.push(step);
        }
    }
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let model = TinyModel::new(config().seed);
    let mut training = Training::new(&model, data(), &Device::Cpu, config(), run).unwrap();
    let mut saved = Saved::default();
    training.run(&mut saved, &|| false).unwrap();
    assert_eq!(saved.0, [3, 4, 6, 8]);
}

#[test]
fn an_evaluation_that_is_not_finite_leaves_a_run_that_can_go_on() {
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let dir = run.path().to_path_buf();
    let mut model = TinyModel::new(config().seed);
    model.evaluation_gain = f64::INFINITY;
    // In the second epoch: 4 steps, and 2 and 3 batches of evaluations, ask before it.
    let mut training = Training::new(&model, data(), &Device::Cpu, config(), run).unwrap();
    let stopped = training.run(&mut Silent, &after(11)).unwrap();
    assert!(matches!(stopped, Outcome::Stopped { .. }), "{stopped:?}");
    assert!(training.position.epoch == 1, "{:?}", training.position);
    drop(training);
    let run = RunDirectory::open(&dir, EXPERIMENT).unwrap();
    let resumed = Training::new(&model, data(), &Device::Cpu, config(), run).unwrap();
    assert!(resumed.last_evaluation["test"].loss.is_nan());
    drop(resumed);
    let (_, outcome) = resume(&dir, &|| false);
    assert!(matches!(outcome, Ok(Outcome::Finished(_))), "{outcome:?}");
    let metrics = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let read = metrics
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    let read: Vec<Metric> = read.collect();
    let is_nan =
        |metric: &&Metric| matches!(metric, Metric::Evaluation { loss, .. } if loss.is_nan());
    assert_eq!(read.iter().filter(is_nan).count(), 2);
}

#[test]
fn a_model_with_a_name_twice_is_refused_before_the_first_step() {
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let mut model = TinyModel::new(1);
    model.repeats_a_name = true;
    let training = Training::new(&model, data(), &Device::Cpu, config(), run);
    let error = training.err().unwrap().to_string();
    assert!(error.contains("are named fc1.weight"), "{error}");
}

#[test]
fn state_that_cannot_be_saved_is_refused_before_the_first_step() {
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let mut model = TinyModel::new(1);
    let counter = Var::zeros(1, DType::U32, &Device::Cpu).unwrap();
    model.more_state = Some(counter);
    let training = Training::new(&model, data(), &Device::Cpu, config(), run);
    let error = training.err().unwrap().to_string();
    assert!(error.contains("more.state is u32"), "{error}");
}

#[test]
fn large_values_of_an_f64_are_no_divergence() {
    let out = tempfile::tempdir().unwrap();
    let mut model = TinyModel::new(1);
    model.more_state = Some(Var::new(&[1e300f64], &Device::Cpu).unwrap());
    let train = || {
        let run = create(out.path(), &config());
        let mut training = Training::new(&model, data(), &Device::Cpu, config(), run)?;
        training.run(&mut Silent, &|| false)
    };
    assert!(matches!(train(), Ok(Outcome::Finished(_))));
    let infinite = Tensor::new(&[f64::INFINITY], &Device::Cpu).unwrap();
    model.more_state.as_ref().unwrap().set(&infinite).unwrap();
    let error = train().unwrap_err().to_string();
    assert!(error.contains("more.state has a value"), "{error}");
}

#[test]
fn a_model_that_nothing_can_move_is_refused() {
    let out = tempfile::tempdir().unwrap();
    let mut model = TinyModel::new(1);
    model.is_fixed = true;
    let run = create(out.path(), &config());
    let training = Training::new(&model, data(), &Device::Cpu, config(), run);
    let error = training.err().unwrap().to_string();
    assert!(error.contains("each of its 4 named_parameters"), "{error}");

    model.is_fixed = false;
    model.detaches = true;
    for resident in [false, true] {
        let run = create(out.path(), &config());
        let execution = Execution {
            resident,
            ..Execution::on(&Device::Cpu)
        };
        let training = Training::new(&model, data(), &Device::Cpu, config(), run);
        let mut training = training.unwrap().executed(execution);
        let error = training.run(&mut Silent, &|| false).unwrap_err();
        assert!(
            matches!(error, Error::NoGradient { step: 1 }),
            "resident {resident}: {error}"
        );
    }
}

#[test]
fn a_run_goes_on_with_the_settings_that_it_began_with() {
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let dir = run.path().to_path_buf();
    go_on(run, &after(3)).1.unwrap();
    let model = TinyModel::new(config().seed);
    let with = |config: TrainingConfig, data: DataSets| {
        let run = RunDirectory::open(&dir, EXPERIMENT).unwrap();
        Training::new(&model, data, &Device::Cpu, config, run).err()
    };
    let refused = |config: TrainingConfig, data: DataSets, expected: &str| {
        let error = with(config, data).unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let batches_of_2 = TrainingConfig {
        batch_size: 2,
        ..config()
    };
    refused(batches_of_2, data(), "its batch_size is 4, the run's 2");
    let mut faster = config();
    faster.optimizer.lr = 7.0;
    refused(faster, data(), "its optimizer is");
    let shorter = TrainingConfig {
        max_steps: Some(3),
        ..config()
    };
    refused(shorter, data(), "its max_steps is null, the run's 3");
    let otherwise = DataSets {
        normalization: Normalization {
            std: [0.25; 3],
            ..Normalization::HALF
        },
        ..data()
    };
    refused(config(), otherwise, "its normalization is mean [0.5");
    let longer = TrainingConfig {
        epochs: 3,
        evaluation_batch_size: 1,
        keep_checkpoints: 1,
        ..config()
    };
    assert!(with(longer, data()).is_none());
}

#[test]
fn a_run_that_is_refused_keeps_every_line_of_its_metrics() {
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let dir = run.path().to_path_buf();
    assert!(std::panic::catch_unwind(|| go_on(run, &panics_after(12))).is_err());
    let lines = || ["metrics.jsonl", "metrics.csv"].map(|file| fs::read(dir.join(file)).unwrap());
    let model = TinyModel::new(config().seed);
    let new = |config: TrainingConfig| {
        let run = RunDirectory::open(&dir, EXPERIMENT).unwrap();
        let training = Training::new(&model, data(), &Device::Cpu, config, run);
        training.err().unwrap().to_string()
    };
    // What a machine that dies may leave after the lines.
    let jsonl = dir.join("metrics.jsonl");
    let with_rest = [fs::read(&jsonl).unwrap(), vec![0xff; 9]].concat();
    fs::write(&jsonl, &with_rest).unwrap();
    let before = lines();
    let mut faster = config();
    faster.optimizer.lr = 7.0;
    assert!(new(faster).contains("its optimizer is"));
    assert_eq!(lines(), before);

    // Its checkpoints are gone, though it was in its second epoch.
    let (checkpoints, aside) = (dir.join("checkpoints"), dir.join("aside"));
    fs::rename(&checkpoints, &aside).unwrap();
    let error = new(config());
    assert!(
        error.contains("has no checkpoint, but") && error.contains("epoch 2"),
        "{error}"
    );
    assert_eq!(lines(), before);
    fs::rename(&aside, &checkpoints).unwrap();
    let csv = dir.join("metrics.csv");
    fs::write(&csv, &before[1][..5]).unwrap();
    assert!(new(config()).contains("lines were lost"));
    assert_eq!(lines()[0], before[0]);
    fs::write(&csv, &before[1]).unwrap();

    let (_out, expected) = uninterrupted(&config());
    let (model, outcome) = resume(&dir, &|| false);
    assert_eq!(traces(&dir, &model, outcome), expected);
}

#[test]
fn other_data_are_refused_with_the_set_that_changed() {
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let model = TinyModel::new(1);
    let changed = DataSets {
        test: Arc::new(shapes::generate(9, Split::Test, 11)),
        ..data()
    };
    let error = Training::new(&model, changed, &Device::Cpu, config(), run)
        .err()
        .unwrap();
    assert!(
        matches!(error, Error::DataChanged { set: "test", .. }),
        "{error}"
    );
}

#[test]
fn what_is_no_run_of_this_experiment_is_refused_with_the_reason() {
    let out = tempfile::tempdir().unwrap();
    let open = |dir: &Path| RunDirectory::open(dir, EXPERIMENT).unwrap_err().to_string();
    assert!(open(&out.path().join("absent")).contains("no such folder"));
    assert!(open(out.path()).contains("no config.json"));
    fs::write(out.path().join("config.json"), "{").unwrap();
    assert!(open(out.path()).contains("cannot be read"));
    fs::remove_file(out.path().join("config.json")).unwrap();

    let run = create(out.path(), &config());
    let dir = run.path().to_path_buf();
    assert!(open(&dir).contains("in use by another process"));
    drop(run);
    let error = RunDirectory::open(&dir, "other").unwrap_err().to_string();
    assert!(error.contains("a run of tiny, not of other"), "{error}");
}

#[test]
fn the_configuration_is_on_disk_before_the_first_step() {
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let text = fs::read_to_string(run.path().join("config.json")).unwrap();
    let file: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(file["experiment"], json!("tiny"));
    assert_eq!(file["config"]["optimizer"]["lr"], json!(0.05));
    assert_eq!(file["data"]["train"]["images"], json!(14));
    assert!(run.path().join("environment.json").is_file());
    assert_eq!(config_in(&run), config());
}

#[test]
fn two_runs_of_the_same_second_have_two_folders() {
    let out = tempfile::tempdir().unwrap();
    let runs: Vec<RunDirectory> = (0..3).map(|_| create(out.path(), &config())).collect();
    let mut paths: Vec<_> = runs.iter().map(|run| run.path().to_path_buf()).collect();
    paths.dedup();
    assert_eq!(paths.len(), 3);
}

#[test]
fn the_newest_finished_run_that_is_wanted_is_found_by_its_time_and_number() {
    let out = tempfile::tempdir().unwrap();
    let newest = |wanted: Option<&str>| {
        let is_wanted = |config: &String| wanted.is_none_or(|wanted| wanted == config);
        RunDirectory::newest_finished(out.path(), EXPERIMENT, is_wanted).unwrap()
    };
    assert_eq!(newest(None), None);
    let make = |name: &str, config: &str, is_finished: bool| {
        let dir = out.path().join(EXPERIMENT).join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("config.json"), config).unwrap();
        if is_finished {
            fs::write(dir.join("finished.json"), "{}").unwrap();
        }
        dir
    };
    let config = r#"{"config": "a"}"#;
    make("2026-03-01T12-30-05Z-9", config, true);
    let expected = make("2026-03-01T12-30-05Z-10", config, true);
    let other = make("2026-02-28T23-59-59Z", r#"{"config": "b"}"#, true);
    make("2026-04-01T00-00-00Z", config, false);
    make("2026-04-01T00-00-01Z", r#"{"config": 3}"#, true);
    make("2026-04-01T00-00-02Z", "no JSON", true);
    assert_eq!(newest(None), Some(expected.clone()));
    assert_eq!(newest(Some("a")), Some(expected));
    assert_eq!(newest(Some("b")), Some(other));
    assert_eq!(newest(Some("c")), None);
}

/// Runs a frozen model, from the folder's state, as [`go_on`] does.
fn go_on_frozen(run: RunDirectory, stop: &dyn Fn() -> bool) -> (TinyModel, Result<Outcome>) {
    let mut model = TinyModel::new(config().seed);
    model.frozen = true;
    let config = config_in(&run);
    let outcome = Training::new(&model, data(), &Device::Cpu, config, run)
        .and_then(|mut training| training.run(&mut Silent, stop));
    (model, outcome)
}

#[test]
fn features_that_never_change_are_computed_once_a_picture() {
    let out = tempfile::tempdir().unwrap();
    let (model, outcome) = go_on_frozen(create(out.path(), &config()), &|| false);
    outcome.unwrap();
    let data = data();
    let pictures = data.train.len() + data.validation.unwrap().len() + data.test.len();
    assert_eq!(model.pictures_seen.get(), pictures);

    // Fewer steps than an epoch has: only what the steps need, besides the evaluation.
    let short = TrainingConfig {
        max_steps: Some(2),
        ..config()
    };
    let (model, outcome) = go_on_frozen(create(out.path(), &short), &|| false);
    outcome.unwrap();
    let trained = 2 * short.batch_size;
    assert_eq!(
        model.pictures_seen.get(),
        pictures - data.train.len() + trained
    );
}

#[test]
fn features_of_a_picture_stay_with_its_label_whatever_the_order() {
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let mut model = TinyModel::new(config().seed);
    model.frozen = true;
    let mut training = Training::new(&model, data(), &Device::Cpu, config(), run).unwrap();
    let train = data().trained();
    let flow = training.compute_features(&train, &mut Silent, &|| false);
    assert!(flow.unwrap().is_continue());
    let order: Vec<u32> = vec![13, 2, 7, 0, 5];
    let cached = training.features.get(TRAIN).unwrap();
    let cached = cached.batches(order.clone(), 2, 1);
    let images = train.batches(order, 2, Normalization::HALF, &Device::Cpu, 1);
    let mut compared = 0;
    for (cached, images) in cached.zip(images.unwrap()) {
        let (cached, images) = (cached.unwrap(), images.unwrap());
        let expected = model.forward(&images.inputs, Mode::Eval).unwrap();
        let found = model.fixed_features().unwrap();
        let found = found.classify(&cached.inputs, Mode::Eval).unwrap();
        test_support::assert_close("logits", &found, &expected, 1e-6);
        assert_eq!(
            cached.labels.to_vec1::<u32>().unwrap(),
            images.labels.to_vec1::<u32>().unwrap()
        );
        assert_eq!(cached.count, images.count);
        compared += images.count;
    }
    assert_eq!(compared, 3);
}

#[test]
fn a_run_on_features_stopped_anywhere_and_resumed_ends_with_the_same_bits() {
    let whole = tempfile::tempdir().unwrap();
    let run = create(whole.path(), &config());
    let dir = run.path().to_path_buf();
    let (model, outcome) = go_on_frozen(run, &|| false);
    let expected = traces(&dir, &model, outcome);
    let mut stops = 0;
    for n in 0.. {
        let out = tempfile::tempdir().unwrap();
        let run = create(out.path(), &config());
        let dir = run.path().to_path_buf();
        if let Outcome::Finished(_) = go_on_frozen(run, &after(n)).1.unwrap() {
            break;
        }
        stops += 1;
        let run = RunDirectory::open(&dir, EXPERIMENT).unwrap();
        let (model, outcome) = go_on_frozen(run, &|| false);
        assert_eq!(
            traces(&dir, &model, outcome),
            expected,
            "stopped at ask {n}"
        );
    }
    // 8 steps, 3 batches of features to train, and two evaluations of 5 batches, the first of which
    // computes features.
    assert_eq!(stops, 8 + 3 + 3 * 5);
}

#[test]
fn a_run_on_features_goes_on_with_the_batches_in_which_they_were_computed() {
    let out = tempfile::tempdir().unwrap();
    let resumed = |began: TrainingConfig| {
        let run = create(out.path(), &began);
        let dir = run.path().to_path_buf();
        let stopped = go_on_frozen(run, &after(4)).1.unwrap();
        assert!(matches!(stopped, Outcome::Stopped { .. }), "{stopped:?}");
        let mut model = TinyModel::new(config().seed);
        model.frozen = true;
        let others = TrainingConfig {
            evaluation_batch_size: 1,
            keep_checkpoints: 1,
            ..began
        };
        let run = RunDirectory::open(&dir, EXPERIMENT).unwrap();
        let training = Training::new(&model, data(), &Device::Cpu, others, run);
        training.err().map(|error| error.to_string())
    };
    let error = resumed(config()).unwrap();
    assert!(
        error.contains("its evaluation_batch_size is 5, the run's 1"),
        "{error}"
    );
    // A run of less than an epoch keeps no features of what it trains on.
    let short = TrainingConfig {
        max_steps: Some(3),
        ..config()
    };
    assert_eq!(resumed(short), None);
}

#[test]
fn frozen_parameters_have_no_optimiser_state_and_their_buffers_stay() {
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let dir = run.path().to_path_buf();
    let before = TinyModel::new(config().seed).bits();
    let (model, outcome) = go_on_frozen(run, &|| false);
    outcome.unwrap();
    let after = model.bits();
    assert_eq!(before[..2], after[..2]);
    assert_eq!(before[4..], after[4..]);
    assert_ne!(before[2], after[2]);
    let newest = checkpoint::load_newest(&dir.join("checkpoints"));
    let optimizer = newest.unwrap().unwrap().optimizer;
    let state = weights::decode(&optimizer, Path::new("optimizer")).unwrap();
    let names: Vec<&str> = state.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        ["fc2.bias.momentum_buffer", "fc2.weight.momentum_buffer"]
    );
}

#[test]
fn buffers_that_move_in_training_are_in_every_checkpoint_with_their_type() {
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let dir = run.path().to_path_buf();
    let (model, outcome) = go_on(run, &after(5));
    assert!(matches!(outcome, Ok(Outcome::Stopped { .. })));
    let kept = checkpoint::load_newest(&dir.join("checkpoints"));
    let kept = kept.unwrap().unwrap();
    let steps = kept.state.position.step as i64;
    let tensors = weights::decode(&kept.weights, Path::new("kept")).unwrap();
    let counted = &tensors["norm.num_batches_tracked"];
    assert_eq!(counted.to_scalar::<i64>().unwrap(), steps);
    let restored = TinyModel::new(99);
    weights::load_from_bytes(&restored, &kept.weights, Path::new("kept")).unwrap();
    assert_eq!(restored.bits(), model.bits());
    assert!(steps > 0);
}

#[test]
fn frozen_parameters_stay_as_they_are() {
    struct Frozen(TinyModel);
    impl Model for Frozen {
        fn forward(&self, images: &Tensor, mode: candle_cnn::Mode) -> candle_core::Result<Tensor> {
            self.0.forward(images, mode)
        }
        fn named_parameters(&self) -> Vec<(String, candle_core::Var)> {
            self.0.named_parameters()
        }
        fn is_trainable(&self, parameter: &str) -> bool {
            parameter.starts_with("fc2.")
        }
        fn metadata(&self) -> BTreeMap<String, String> {
            self.0.metadata()
        }
    }
    let model = Frozen(TinyModel::new(3));
    let before = model.0.bits();
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let mut training = Training::new(&model, data(), &Device::Cpu, config(), run).unwrap();
    training.run(&mut Silent, &|| false).unwrap();
    let after = model.0.bits();
    assert_eq!(before[..2], after[..2]);
    assert_ne!(before[2], after[2]);
    assert_ne!(before[3], after[3]);
}

#[test]
fn metrics_csv_has_one_line_an_epoch_under_one_header() {
    let out = tempfile::tempdir().unwrap();
    let run = create(out.path(), &config());
    let dir = run.path().to_path_buf();
    go_on(run, &after(6)).1.unwrap();
    resume(&dir, &|| false).1.unwrap();
    let text = fs::read_to_string(dir.join("metrics.csv")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert!(lines[0].starts_with("epoch,step,lr,train_loss,"), "{text}");
    assert!(lines[2].starts_with("2,8,0.05,"), "{text}");
}

#[test]
fn steps_that_stay_on_the_device_end_with_the_same_bits_wherever_they_are_stopped() {
    let settings = [
        config(),
        TrainingConfig {
            // No checkpoint makes it read in the middle of an epoch.
            checkpoint_every_steps: 0,
            optimizer: SgdConfig {
                nesterov: true,
                ..config().optimizer
            },
            ..config()
        },
    ];
    for config in settings {
        let (_out, expected) = uninterrupted(&config);
        for n in 0.. {
            let out = tempfile::tempdir().unwrap();
            let run = create(out.path(), &config);
            let dir = run.path().to_path_buf();
            let (model, outcome) = go_on_resident(run, &after(n));
            let finished = matches!(outcome, Ok(Outcome::Finished(_)));
            let (model, outcome) = match finished {
                true => (model, outcome),
                false => {
                    outcome.unwrap();
                    go_on_resident(RunDirectory::open(&dir, EXPERIMENT).unwrap(), &|| false)
                }
            };
            let found = traces(&dir, &model, outcome);
            assert_eq!(found, expected, "stopped at ask {n}");
            if finished {
                break;
            }
        }
    }
}

#[test]
fn a_loss_that_is_read_late_ends_the_run_at_its_own_step_and_leaves_no_checkpoint_after_it() {
    let out = tempfile::tempdir().unwrap();
    let config = TrainingConfig {
        checkpoint_every_steps: 0,
        ..config()
    };
    let run = create(out.path(), &config);
    let dir = run.path().to_path_buf();
    let mut model = TinyModel::new(config.seed);
    model.gain = 1e30;
    let resident = Execution {
        resident: true,
        ..Execution::on(&Device::Cpu)
    };
    let outcome = Training::new(&model, data(), &Device::Cpu, config, run)
        .map(|training| training.executed(resident))
        .and_then(|mut training| training.run(&mut Silent, &|| false));
    let Err(Error::NonFiniteLoss {
        step,
        steps_made,
        last_checkpoint: LastCheckpoint::None,
        ..
    }) = &outcome
    else {
        panic!("{outcome:?}");
    };
    assert!(step <= steps_made && *steps_made == 4, "{outcome:?}");
    let text = outcome.unwrap_err().to_string();
    assert!(
        text.contains("when the loss was read, after step 4"),
        "{text}"
    );
    let newest = checkpoint::newest_path(&dir.join("checkpoints"));
    assert_eq!(newest.unwrap(), None);
}
