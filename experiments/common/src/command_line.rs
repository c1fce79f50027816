//! The command line of a program that trains, from its words to what it asks for.

use std::ffi::OsString;

use anyhow::Result;
use clap::{Arg, ArgMatches, Args, Command, CommandFactory, FromArgMatches};

use crate::arguments::{
    ComputeArguments, DataArguments, ParallelArguments, RunArguments, TrainingArguments,
    TrainingDefaults, describe_defaults, flags_given, refuse_all_but,
};
use crate::experiment::{Action, RunConfig};

/// The arguments of a program that trains.
pub trait CommandLine: CommandFactory + FromArgMatches {
    /// What they say of the network.
    type Request;

    /// Flag and default of each that takes a value, for its help.
    fn defaults() -> Vec<(&'static str, String)>;

    /// What they ask for; `given` are the flags on the command line, as `--lr`.
    ///
    /// # Errors
    /// Flags that make no sense, or not together.
    fn resolve(self, given: &[String]) -> Result<Action<Self::Request>>;
}

/// Reads the command line. Help and malformed arguments end the process here, as clap does it.
///
/// # Errors
/// As [`CommandLine::resolve`].
pub fn parse<A: CommandLine>() -> Result<Action<A::Request>> {
    let matches = command::<A>().get_matches();
    let arguments = A::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    arguments.resolve(&given::<A>(&matches))
}

/// The same of other words, the program's name first; nothing ends the process. For a program's tests.
///
/// # Errors
/// Malformed arguments; as [`CommandLine::resolve`].
pub fn parse_from<A: CommandLine>(
    words: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> Result<Action<A::Request>> {
    let matches = command::<A>().try_get_matches_from(words)?;
    A::from_arg_matches(&matches)?.resolve(&given::<A>(&matches))
}

/// clap's command, with the defaults in its help.
pub fn command<A: CommandLine>() -> Command {
    describe_defaults(A::command(), &A::defaults())
}

fn given<A: CommandLine>(matches: &ArgMatches) -> Vec<String> {
    flags_given(&A::command(), matches)
}

/// The flags of a program's own, besides those of [`CommonArguments`], that are in none of `lines`; for a program's tests.
pub fn own_flags_not_in<A: CommandLine>(lines: &[&str]) -> Vec<String> {
    let common = CommonArguments::<()>::augment_args(Command::new("common"));
    let common = flags_not_in(&common, &[]);
    let mut flags = flags_not_in(&A::command(), lines);
    flags.retain(|flag| !common.contains(flag));
    flags
}

fn flags_not_in(command: &Command, lines: &[&str]) -> Vec<String> {
    let words: Vec<&str> = lines.iter().flat_map(|line| line.split(' ')).collect();
    let flags = command.get_arguments().filter_map(Arg::get_long);
    let flags = flags.map(|flag| format!("--{flag}"));
    flags
        .filter(|flag| !words.contains(&flag.as_str()))
        .collect()
}

/// What all programs that train take, with the arguments `N` of their network between.
#[derive(Debug, Args)]
pub struct CommonArguments<N: Args> {
    /// Print the network layer by layer and exit
    #[arg(long)]
    summary: bool,
    /// The pictures.
    #[command(flatten)]
    data: DataArguments,
    /// The steps.
    #[command(flatten)]
    training: TrainingArguments,
    /// The network.
    #[command(flatten)]
    network: N,
    /// The run's folder.
    #[command(flatten)]
    run: RunArguments,
    /// The machine.
    #[command(flatten)]
    compute: ComputeArguments,
    /// The processes.
    #[command(flatten)]
    parallel: ParallelArguments,
}

/// What else an experiment makes of [`CommonArguments`].
#[derive(Debug, Clone, Copy)]
pub struct Presets<'a> {
    /// What settings that are not given become.
    pub training: &'a TrainingDefaults,
    /// Pictures of `--quick`, (train, test), where it was given.
    pub quick_shapes: Option<(u64, u64)>,
    /// Flags that have a meaning beside `--summary`.
    pub summary_flags: &'a [&'a str],
}

impl<N: Args> CommonArguments<N> {
    /// What they ask for. `given` are the flags on the command line; `request` says what those of the network mean.
    ///
    /// # Errors
    /// Flags that make no sense, or not together.
    pub fn resolve<R>(
        self,
        given: &[String],
        presets: Presets<'_>,
        request: impl FnOnce(N) -> Result<R>,
    ) -> Result<Action<R>> {
        if let Some(action) = self.run.to_resume(given, &self.data)? {
            return Ok(action);
        }
        let request = request(self.network)?;
        if self.summary {
            let reason = "it prints the network and trains nothing";
            refuse_all_but("--summary", presets.summary_flags, given, reason)?;
            return Ok(Action::Summary(request));
        }
        let data = match presets.quick_shapes {
            Some(shapes) => self.data.quick(shapes)?,
            None => self.data,
        };
        let data = data.resolve()?;
        let compute = self.compute.resolve_for(&self.parallel)?;
        let training = self
            .training
            .resolve(&self.run, presets.training, &compute)?;
        training.validate()?;
        Ok(Action::Start {
            config: Box::new(RunConfig {
                model: request,
                data,
                training,
                compute,
            }),
            out: self.run.out(),
            profile: self.run.profile,
        })
    }
}

impl<R: std::fmt::Debug> Action<R> {
    /// The settings of a run to start, for a program's tests.
    ///
    /// # Panics
    /// Where it asks for something else.
    #[track_caller]
    pub fn started(self) -> RunConfig<R> {
        match self {
            Self::Start { config, .. } => *config,
            other => panic!("{other:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use clap::Parser;
    use trainer::{Schedule, SgdConfig, Span, TrainingConfig};

    use crate::arguments::common_defaults;
    use crate::compute::{ComputeConfig, DeviceChoice, Precision};
    use crate::data::{DataConfig, Dataset};

    use super::*;

    /// A program whose network has no settings.
    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        common: CommonArguments<()>,
    }

    const DEFAULTS: TrainingDefaults = TrainingDefaults {
        epochs: 2,
        batch_size: 32,
        optimizer: SgdConfig {
            lr: 0.01,
            momentum: 0.9,
            dampening: 0.0,
            nesterov: false,
            weight_decay: 0.0,
        },
        schedule: Schedule::Constant,
        evaluate_every_epochs: 1,
        checkpoint_every_steps: 200,
    };

    impl CommandLine for Program {
        type Request = ();

        fn defaults() -> Vec<(&'static str, String)> {
            common_defaults(&DEFAULTS)
        }

        fn resolve(self, given: &[String]) -> Result<Action<()>> {
            let presets = Presets {
                training: &DEFAULTS,
                quick_shapes: None,
                summary_flags: &[],
            };
            self.common.resolve(given, presets, |()| Ok(()))
        }
    }

    fn action(line: &str) -> Action<()> {
        parse_from::<Program>(["program"].into_iter().chain(line.split(' '))).unwrap()
    }

    /// On the CPU, with as many settings as go together.
    const ON_SHAPES: &str = "--dataset shapes --train-limit 50 --test-limit 20 --validation 5 --epochs 3 --max-steps 9 \
        --batch-size 4 --lr 0.5 --momentum 0.1 --weight-decay 0.2 --nesterov --label-smoothing 0.3 \
        --lr-schedule cosine --warmup-epochs 0.5 --no-shuffle --seed 8 --eval-every 5 --checkpoint-every 6 \
        --device cpu --threads 1";
    /// Several processes on GPUs: who launches them needs none.
    const ON_GPUS: &str = "--data-dir d --lr-schedule step --lr-step-epochs 3 --lr-gamma 0.5 --processes 2 --threads 3 \
        --device cuda:1 --precision bf16 --deterministic --no-cuda-graph --streams 7 --out o --profile";
    const ON_GPUS_BY_NUMBER: &str = "--gpus 4 --threads 3 --no-channels-last";
    const RESUMED: &str = "--resume r --data-dir d --profile";
    const SUMMARY: &str = "--summary";

    #[test]
    fn every_flag_is_in_the_tests_below() {
        let lines = [ON_SHAPES, ON_GPUS, ON_GPUS_BY_NUMBER, RESUMED, SUMMARY];
        let none: [&str; 0] = [];
        assert_eq!(flags_not_in(&command::<Program>(), &lines), none);
        let summary = flags_not_in(&command::<Program>(), &lines[..4]);
        assert_eq!(summary, ["--summary"]);
    }

    #[test]
    fn every_flag_reaches_the_configuration() {
        let expected = RunConfig {
            model: (),
            data: DataConfig {
                dataset: Dataset::Shapes,
                data_dir: None,
                train_limit: Some(50),
                test_limit: Some(20),
                validation: 5,
            },
            training: TrainingConfig {
                epochs: 3,
                max_steps: Some(9),
                batch_size: 4,
                evaluation_batch_size: 16, // the smallest
                seed: 8,
                shuffle: false,
                optimizer: SgdConfig {
                    lr: 0.5,
                    momentum: 0.1,
                    dampening: 0.0,
                    nesterov: true,
                    weight_decay: 0.2,
                },
                schedule: Schedule::Cosine {
                    warmup: Span::Epochs(0.5),
                    end_factor: 0.0,
                },
                label_smoothing: 0.3,
                evaluate_every_epochs: 5,
                checkpoint_every_steps: 6,
                keep_checkpoints: 2,
            },
            compute: ComputeConfig {
                device: DeviceChoice::Cpu,
                threads: 1,
                precision: Precision::F32,
                deterministic: false,
                cuda_graph: false,
                channels_last: false,
                streams: 1,
                processes: 1,
            },
        };
        assert_eq!(action(ON_SHAPES).started(), expected);
    }

    #[test]
    fn every_flag_of_gpus_and_of_processes_reaches_the_configuration() {
        let Action::Start {
            config,
            out,
            profile,
        } = action(ON_GPUS)
        else {
            panic!("nothing is started");
        };
        assert_eq!((out, profile), (PathBuf::from("o"), true));
        assert_eq!(config.data.dataset, Dataset::Cifar10);
        assert_eq!(config.data.data_dir, Some("d".into()));
        let every_three_epochs = Schedule::Step {
            every: Span::Epochs(3.0),
            factor: 0.5,
        };
        assert_eq!(config.training.schedule, every_three_epochs);
        let by_device = ComputeConfig {
            device: DeviceChoice::Cuda(1),
            threads: 3,
            precision: Precision::Bf16,
            deterministic: true,
            cuda_graph: false,
            channels_last: true,
            streams: 7,
            processes: 2,
        };
        assert_eq!(config.compute, by_device);
        let by_number = ComputeConfig {
            device: DeviceChoice::Cuda(0),
            precision: Precision::Tf32Convolutions,
            deterministic: false,
            cuda_graph: true,
            channels_last: false,
            streams: 1,
            processes: 4,
            ..by_device
        };
        assert_eq!(action(ON_GPUS_BY_NUMBER).started().compute, by_number);
    }

    #[test]
    fn a_run_is_resumed_with_the_folder_of_its_data_and_a_summary_asks_for_none() {
        let resumed = action(RESUMED);
        assert!(
            matches!(
                &resumed,
                Action::Resume { dir, data_dir: Some(data_dir), profile: true }
                    if dir.as_os_str() == "r" && data_dir.as_os_str() == "d"
            ),
            "{resumed:?}"
        );
        assert!(matches!(action(SUMMARY), Action::Summary(())));
    }
}
