//! Groups of command-line arguments, to be flattened into an experiment's own.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args, Command, ValueEnum};
use trainer::{Schedule, SgdConfig, Span, TrainingConfig};

use crate::compute::{ComputeConfig, DeviceChoice, MOST_STREAMS, MOST_THREADS, Precision};
use crate::data::Dataset;
use crate::experiment::Action;

/// What to train on.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Data")]
pub struct DataArguments {
    /// What to train on
    #[arg(long, value_enum, value_name = "SET")]
    pub dataset: Option<Dataset>,
    /// Folder that holds CIFAR-10: cifar-10-batches-bin/ or the Hub's plain_text/ parquet files.
    /// Where it holds neither, CIFAR-10 is fetched into it
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Train on the first N images only
    #[arg(long, value_name = "N", value_parser = at_least_one, allow_negative_numbers = true)]
    pub train_limit: Option<u64>,
    /// Test on the first N images only
    #[arg(long, value_name = "N", value_parser = at_least_one, allow_negative_numbers = true)]
    pub test_limit: Option<u64>,
    /// Set N training images aside, evenly from all classes, and evaluate on them too
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub validation: Option<u64>,
}

/// How to train.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Training")]
pub(crate) struct TrainingArguments {
    /// Passes over the training images
    #[arg(long, value_name = "N", value_parser = at_least_one, allow_negative_numbers = true)]
    pub(crate) epochs: Option<u64>,
    /// End after N steps, even inside an epoch [default: none]
    #[arg(long, value_name = "N", value_parser = at_least_one, allow_negative_numbers = true)]
    pub(crate) max_steps: Option<u64>,
    /// Images a step
    #[arg(long, value_name = "IMAGES", value_parser = batch_size, allow_negative_numbers = true)]
    pub(crate) batch_size: Option<u64>,
    /// Learning rate
    #[arg(long, value_name = "RATE", value_parser = not_negative, allow_negative_numbers = true)]
    pub(crate) lr: Option<f64>,
    /// Share of the last step's velocity that is kept: at least 0, below 1
    #[arg(long, value_name = "SHARE", value_parser = below_one, allow_negative_numbers = true)]
    pub(crate) momentum: Option<f64>,
    /// L2 penalty on the weights
    #[arg(long, value_name = "FACTOR", value_parser = not_negative, allow_negative_numbers = true)]
    pub(crate) weight_decay: Option<f64>,
    /// Nesterov's momentum
    #[arg(long)]
    pub(crate) nesterov: bool,
    /// Share of the target that is spread evenly over all classes: at least 0, below 1
    #[arg(long, value_name = "SHARE", value_parser = below_one, allow_negative_numbers = true)]
    pub(crate) label_smoothing: Option<f64>,
    /// How the learning rate changes: step is PyTorch's StepLR, by the epoch; cosine falls to 0 at the last step
    #[arg(long, value_enum, value_name = "NAME")]
    pub(crate) lr_schedule: Option<LrSchedule>,
    /// With --lr-schedule step: epochs until the rate is multiplied by --lr-gamma, again and again [default: none, must be given]
    #[arg(long, value_name = "N", value_parser = at_least_one, requires = "lr_schedule", allow_negative_numbers = true)]
    pub(crate) lr_step_epochs: Option<u64>,
    /// With --lr-schedule step: the factor [default: 0.1]
    #[arg(long, value_name = "FACTOR", value_parser = not_negative, requires = "lr_schedule", allow_negative_numbers = true)]
    pub(crate) lr_gamma: Option<f64>,
    /// With --lr-schedule cosine: epochs, or a fraction of one, in which the rate first rises from 0 [default: 0]
    #[arg(long, value_name = "N", value_parser = not_negative, requires = "lr_schedule", allow_negative_numbers = true)]
    pub(crate) warmup_epochs: Option<f64>,
    /// Keep the order of the training images, the same in each epoch
    #[arg(long)]
    pub(crate) no_shuffle: bool,
    /// Source of all randomness: initial weights, order, dropout, validation split
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) seed: Option<u64>,
    /// Evaluate after every N epochs, and after the last; 0: after the last only
    #[arg(long, value_name = "EPOCHS", allow_negative_numbers = true)]
    pub(crate) eval_every: Option<u64>,
}

/// The value of `--lr-schedule`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LrSchedule {
    /// The same rate at every step
    Constant,
    /// Multiplied by --lr-gamma after each --lr-step-epochs
    Step,
    /// Half a cosine, after --warmup-epochs
    Cosine,
}

/// Where to put a run, and how to go on with one.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Run")]
pub(crate) struct RunArguments {
    /// Folder for runs; this one becomes DIR/EXPERIMENT/TIME
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Save a checkpoint every N steps, besides the one after each epoch; 0: none besides
    #[arg(long, value_name = "STEPS", allow_negative_numbers = true)]
    pub(crate) checkpoint_every: Option<u64>,
    /// Continue a run that was stopped: the folder it works in. Every setting comes from the run;
    /// only --data-dir, for data that have moved, and --profile may be given
    #[arg(long, value_name = "RUN")]
    pub(crate) resume: Option<PathBuf>,
    /// Print at the end where the time of the steps went, by layer and pass, and save it as
    /// profile.csv in the run's folder
    #[arg(long)]
    pub(crate) profile: bool,
}

/// What to compute on.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Machine")]
pub struct DeviceArguments {
    /// auto, cpu, or cuda with the number of the GPU; auto takes a GPU where there is one
    #[arg(long, value_name = "auto|cpu|cuda[:N]")]
    pub device: Option<DeviceChoice>,
    /// Threads that compute
    #[arg(long, value_name = "N", value_parser = threads, allow_negative_numbers = true)]
    pub threads: Option<u64>,
    /// How a GPU computes; bf16 is for training, and the CPU knows f32 alone
    #[arg(long, value_enum, value_name = "TYPE")]
    pub precision: Option<Precision>,
}

/// What to compute on, and how.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Machine")]
pub(crate) struct ComputeArguments {
    /// The device.
    #[command(flatten)]
    pub(crate) machine: DeviceArguments,
    /// Let a GPU use only algorithms that give the same bits in each run; the CPU always does
    #[arg(long)]
    pub(crate) deterministic: bool,
    /// Launch each operation of a GPU's training step anew, instead of replaying a CUDA graph of
    /// the whole step
    #[arg(long)]
    pub(crate) no_cuda_graph: bool,
    /// Keep a plane per channel on a GPU and run one operation after the other, instead of the network as a whole with the
    /// channels of each pixel side by side
    #[arg(long)]
    pub(crate) no_channels_last: bool,
    /// Convolutions that a GPU may run side by side, where none waits for another [default: 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MOST_STREAMS as u64), conflicts_with = "no_channels_last", allow_negative_numbers = true)]
    pub(crate) streams: Option<u64>,
}

/// How many processes train together. Neither is needed where the environment says so, as under
/// torchrun.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Machine")]
pub(crate) struct ParallelArguments {
    /// Train on the first N GPUs of this machine: one process each, which takes its part of every
    /// batch [default: 1]
    #[arg(long, value_name = "N", value_parser = at_least_one, conflicts_with = "device", allow_negative_numbers = true)]
    pub(crate) gpus: Option<u64>,
    /// Train with N processes on this machine; each takes its part of every batch [default: 1]
    #[arg(long, value_name = "N", value_parser = at_least_one, conflicts_with = "gpus", allow_negative_numbers = true)]
    pub(crate) processes: Option<u64>,
}

/// What arguments of the training that are not given become. An experiment has one set of them, or one
/// for each preset.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainingDefaults {
    /// Passes over the training images.
    pub epochs: u64,
    /// Images a step.
    pub batch_size: u64,
    /// The optimiser.
    pub optimizer: SgdConfig,
    /// How the learning rate changes.
    pub schedule: Schedule,
    /// Epochs from one evaluation to the next.
    pub evaluate_every_epochs: u64,
    /// Steps from one checkpoint to the next.
    pub checkpoint_every_steps: u64,
}

/// Images a batch of evaluation: those of a step, whose buffers then serve, so that the evaluation
/// adds nothing to the memory of a run. Fewer are slow, and more no faster on a CPU.
fn evaluation_batch_size(batch_size: usize) -> usize {
    batch_size.clamp(16, 64)
}

impl TrainingArguments {
    /// The trainer's configuration, on such a device.
    ///
    /// # Errors
    /// Flags of another schedule than the one that was chosen, and `step` without its length.
    pub(crate) fn resolve(
        &self,
        run: &RunArguments,
        defaults: &TrainingDefaults,
        compute: &ComputeConfig,
    ) -> Result<TrainingConfig> {
        let batch_size = self.batch_size.unwrap_or(defaults.batch_size) as usize;
        Ok(TrainingConfig {
            epochs: self.epochs.unwrap_or(defaults.epochs),
            max_steps: self.max_steps,
            batch_size,
            evaluation_batch_size: evaluation_batch_size(batch_size),
            seed: self.seed.unwrap_or(0),
            shuffle: !self.no_shuffle,
            optimizer: SgdConfig {
                lr: self.lr.unwrap_or(defaults.optimizer.lr),
                momentum: self.momentum.unwrap_or(defaults.optimizer.momentum),
                weight_decay: self.weight_decay.unwrap_or(defaults.optimizer.weight_decay),
                nesterov: self.nesterov || defaults.optimizer.nesterov,
                ..defaults.optimizer
            },
            schedule: self.schedule(defaults.schedule)?,
            label_smoothing: self.label_smoothing.unwrap_or(0.0),
            evaluate_every_epochs: self.eval_every.unwrap_or(defaults.evaluate_every_epochs),
            checkpoint_every_steps: run
                .checkpoint_every
                .unwrap_or_else(|| defaults.checkpoint_every_steps_on(compute)),
            keep_checkpoints: 2,
        })
    }

    fn schedule(&self, default: Schedule) -> Result<Schedule> {
        let refuse = |given: bool, flag: &str, schedule: &str| match given {
            true => bail!("{flag} is for --lr-schedule {schedule}"),
            false => Ok(()),
        };
        if self.lr_schedule != Some(LrSchedule::Step) {
            refuse(self.lr_step_epochs.is_some(), "--lr-step-epochs", "step")?;
            refuse(self.lr_gamma.is_some(), "--lr-gamma", "step")?;
        }
        if self.lr_schedule != Some(LrSchedule::Cosine) {
            refuse(self.warmup_epochs.is_some(), "--warmup-epochs", "cosine")?;
        }
        Ok(match self.lr_schedule {
            None => default,
            Some(LrSchedule::Constant) => Schedule::Constant,
            Some(LrSchedule::Step) => {
                let every = self.lr_step_epochs.context(
                    "--lr-schedule step needs --lr-step-epochs N, the epochs from one rate to the next",
                )?;
                Schedule::Step {
                    every: Span::Epochs(every as f64),
                    factor: self.lr_gamma.unwrap_or(0.1),
                }
            }
            Some(LrSchedule::Cosine) => Schedule::Cosine {
                warmup: Span::Epochs(self.warmup_epochs.unwrap_or(0.0)),
                end_factor: 0.0,
            },
        })
    }
}

impl RunArguments {
    /// What `--resume` asks for, if it is there.
    ///
    /// # Errors
    /// Any other flag but `--data-dir` and `--profile`.
    pub(crate) fn to_resume<M>(
        &self,
        given: &[String],
        data: &DataArguments,
    ) -> Result<Option<Action<M>>> {
        let Some(dir) = self.resume.clone() else {
            return Ok(None);
        };
        let reason = "a resumed run takes every setting from its config.json, so that it ends as if \
                      it had never stopped";
        refuse_all_but("--resume", &["--data-dir", "--profile"], given, reason)?;
        let data_dir = data.data_dir.clone();
        let profile = self.profile;
        Ok(Some(Action::Resume {
            dir,
            data_dir,
            profile,
        }))
    }

    /// Folder for runs.
    pub(crate) fn out(&self) -> PathBuf {
        self.out.clone().unwrap_or_else(|| "runs".into())
    }
}

impl DataArguments {
    /// The data of `--quick`, which is about drawn shapes; other pictures would make nonsense of
    /// its settings.
    ///
    /// # Errors
    /// Flags that ask for other pictures.
    pub fn quick(self, (train, test): (u64, u64)) -> Result<Self> {
        if self.data_dir.is_some() {
            bail!(
                "--quick cannot be combined with --data-dir: it trains on pictures drawn by the program"
            );
        }
        if self.dataset == Some(Dataset::Cifar10) {
            bail!(
                "--quick cannot be combined with --dataset cifar10: its settings suit the drawn shapes. \
                 For a short run on CIFAR-10 use --train-limit N --epochs N"
            );
        }
        Ok(Self {
            dataset: Some(Dataset::Shapes),
            train_limit: self.train_limit.or(Some(train)),
            test_limit: self.test_limit.or(Some(test)),
            ..self
        })
    }
}

/// Flag and default of all arguments in the groups above, for [`describe_defaults`].
pub fn common_defaults(training: &TrainingDefaults) -> Vec<(&'static str, String)> {
    let mut defaults = training.described();
    defaults.extend([
        ("dataset", "cifar10".to_string()),
        ("data_dir", "data".to_string()),
        ("train_limit", "all; shapes: 10000".to_string()),
        ("test_limit", "all; shapes: 2000".to_string()),
        ("validation", "0".to_string()),
        ("out", "runs".to_string()),
    ]);
    defaults.extend(device_defaults(
        "all cores; of several processes each takes its share",
    ));
    defaults
}

/// The same of [`DeviceArguments`] alone; which `threads` those are depends on the program.
pub fn device_defaults(threads: &str) -> [(&'static str, String); 3] {
    let precision = "as PyTorch: TF32 in convolutions, f32 in matrix products; on the CPU f32";
    [
        ("device", "auto".to_string()),
        ("threads", threads.to_string()),
        ("precision", precision.to_string()),
    ]
}

/// On a GPU checkpoints are this many times further apart: it makes 200 of the lesson's steps in under a second, and a checkpoint
/// takes about a tenth of one.
const GPU_INTERVAL: u64 = 10;

impl TrainingDefaults {
    fn checkpoint_every_steps_on(&self, compute: &ComputeConfig) -> u64 {
        match compute.is_gpu() {
            true => self.checkpoint_every_steps * GPU_INTERVAL,
            false => self.checkpoint_every_steps,
        }
    }

    fn schedule_described(&self) -> String {
        match self.schedule {
            Schedule::Constant => "constant".into(),
            Schedule::Step { .. } => "step".into(),
            Schedule::Cosine { .. } => "cosine".into(),
        }
    }

    /// Flag and value of each.
    fn described(&self) -> Vec<(&'static str, String)> {
        vec![
            ("epochs", self.epochs.to_string()),
            ("batch_size", self.batch_size.to_string()),
            ("lr", self.optimizer.lr.to_string()),
            ("momentum", self.optimizer.momentum.to_string()),
            ("weight_decay", self.optimizer.weight_decay.to_string()),
            ("label_smoothing", "0".into()),
            ("lr_schedule", self.schedule_described()),
            ("seed", "0".into()),
            ("eval_every", self.evaluate_every_epochs.to_string()),
            (
                "checkpoint_every",
                format!(
                    "{}; on a GPU {}",
                    self.checkpoint_every_steps,
                    self.checkpoint_every_steps * GPU_INTERVAL
                ),
            ),
        ]
    }
}

/// Adds `[default: …]` to the help of arguments that the parser knows no default of.
pub fn describe_defaults(command: Command, defaults: &[(&'static str, String)]) -> Command {
    defaults.iter().fold(command, |command, (id, value)| {
        command.mut_arg(id, |argument| {
            let help = argument.get_help().map(ToString::to_string);
            argument.help(format!("{} [default: {value}]", help.unwrap_or_default()))
        })
    })
}

/// The flags that take a value and tell no default in their help, for a program's tests.
pub fn flags_without_default(command: &Command) -> Vec<&str> {
    let tells = |argument: &Arg| {
        let help = argument.get_help().map(ToString::to_string);
        let described = help.is_some_and(|help| help.contains("[default: "));
        described || !argument.get_default_values().is_empty()
    };
    command
        .get_arguments()
        .filter(|argument| argument.get_action().takes_values() && !argument.is_positional())
        .filter(|argument| !tells(argument))
        .map(|argument| argument.get_id().as_str())
        .collect()
}

/// The flags on the command line, as `--lr`.
pub(crate) fn flags_given(command: &Command, matches: &ArgMatches) -> Vec<String> {
    command
        .get_arguments()
        .filter(|argument| {
            let id = argument.get_id().as_str();
            matches.try_contains_id(id).is_ok()
                && matches.value_source(id) == Some(ValueSource::CommandLine)
        })
        .filter_map(|argument| argument.get_long().map(|long| format!("--{long}")))
        .collect()
}

/// Refuses every given flag that is not `allowed` beside `--{flag}`.
///
/// # Errors
/// Names the flags and the reason.
pub(crate) fn refuse_all_but(
    flag: &str,
    allowed: &[&str],
    given: &[String],
    reason: &str,
) -> Result<()> {
    let refused: Vec<&str> = given
        .iter()
        .map(String::as_str)
        .filter(|given| *given != flag && !allowed.contains(given))
        .collect();
    if !refused.is_empty() {
        bail!(
            "{flag} cannot be combined with {}: {reason}",
            refused.join(", ")
        );
    }
    Ok(())
}

/// Reads a count; for `value_parser`.
///
/// # Errors
/// What it must be.
pub fn at_least_one(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(_) => Err("it must be a whole number of at least 1".into()),
    }
}

/// Reads the number of threads; for `value_parser`.
///
/// # Errors
/// What it must be.
pub fn threads(text: &str) -> Result<u64, String> {
    at_most(text, MOST_THREADS as u64)
}

/// All of CIFAR-10, and more than any machine has the memory for.
pub(crate) const MOST_PICTURES_A_BATCH: usize = 65_536;

fn batch_size(text: &str) -> Result<u64, String> {
    at_most(text, MOST_PICTURES_A_BATCH as u64)
}

fn at_most(text: &str, most: u64) -> Result<u64, String> {
    match text.parse() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        _ => Err(format!("it must be a whole number from 1 to {most}")),
    }
}

fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number),
        _ => Err("it must be a finite number of at least 0".into()),
    }
}

/// Reads a share, or the probability of being dropped; for `value_parser`.
///
/// # Errors
/// What it must be.
pub fn below_one(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (0.0..1.0).contains(&number) => Ok(number),
        _ => Err("it must be a number of at least 0 and below 1".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        training: TrainingArguments,
    }

    fn schedule(line: &str) -> Result<Schedule, String> {
        let words = std::iter::once("program").chain(line.split_whitespace());
        let program = Program::try_parse_from(words).map_err(|error| error.to_string())?;
        let preset = Schedule::Cosine {
            warmup: Span::Steps(7),
            end_factor: 0.5,
        };
        program
            .training
            .schedule(preset)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn schedules_are_those_of_the_flags_or_of_the_preset() {
        let cosine = |warmup| Schedule::Cosine {
            warmup,
            end_factor: 0.0,
        };
        let step = |every, factor| Schedule::Step {
            every: Span::Epochs(every),
            factor,
        };
        for (line, expected) in [
            ("--lr-schedule constant", Schedule::Constant),
            ("--lr-schedule cosine", cosine(Span::Epochs(0.0))),
            (
                "--lr-schedule cosine --warmup-epochs 0.5",
                cosine(Span::Epochs(0.5)),
            ),
            ("--lr-schedule step --lr-step-epochs 3", step(3.0, 0.1)),
            (
                "--lr-schedule step --lr-step-epochs 1 --lr-gamma 0.5",
                step(1.0, 0.5),
            ),
        ] {
            assert_eq!(schedule(line), Ok(expected), "{line}");
        }
        let preset = schedule("").unwrap();
        assert!(matches!(
            preset,
            Schedule::Cosine {
                warmup: Span::Steps(7),
                ..
            }
        ));
    }

    #[test]
    fn flags_of_another_schedule_are_refused_by_name() {
        for (line, expected) in [
            ("--lr-schedule step", "needs --lr-step-epochs"),
            (
                "--lr-schedule cosine --lr-gamma 1",
                "--lr-gamma is for --lr-schedule step",
            ),
            (
                "--lr-schedule constant --lr-step-epochs 1",
                "--lr-step-epochs is for",
            ),
            (
                "--lr-schedule step --lr-step-epochs 1 --warmup-epochs 1",
                "--lr-schedule cosine",
            ),
            ("--warmup-epochs 1", "--lr-schedule"),
            ("--lr-schedule step --lr-step-epochs 0", "at least 1"),
        ] {
            let error = schedule(line).unwrap_err();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
