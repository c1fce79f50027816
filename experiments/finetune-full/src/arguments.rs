//! The command line.

use anyhow::Result;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser};
use experiment_common::{
    Action, ComputeArguments, DataArguments, Dataset, ParallelArguments, RunArguments, RunConfig,
    TrainingArguments, TrainingDefaults, common_defaults, describe_defaults, flags_given,
    refuse_all_but,
};
use trainer::{Schedule, SgdConfig};
use transfer_common::{
    Begin, Request, Trained, TransferArguments, WeightsSource, transfer_defaults,
};

/// Fine-tune torchvision's GoogLeNet on CIFAR-10: a fresh head, and every layer trains
///
/// Without arguments: the lesson's second experiment, 2 epochs from ImageNet weights. Weights and
/// CIFAR-10 are fetched if they are not there. A run can be stopped with Ctrl-C at any time and
/// resumed with --resume.
#[derive(Debug, Parser)]
#[command(name = "finetune-full", version, max_term_width = 100)]
struct Arguments {
    /// The whole thing in seconds, without any file or network: drawn shapes, from random weights
    /// (the defaults below are those without it)
    #[arg(long)]
    quick: bool,
    /// Print the network layer by layer and exit
    #[arg(long)]
    summary: bool,
    #[command(flatten)]
    data: DataArguments,
    #[command(flatten)]
    training: TrainingArguments,
    #[command(flatten)]
    network: TransferArguments,
    /// Give the network its two auxiliary heads, which add 0.3 times their loss each in training
    #[arg(long, help_heading = "Network")]
    aux: bool,
    #[command(flatten)]
    run: RunArguments,
    #[command(flatten)]
    compute: ComputeArguments,
    #[command(flatten)]
    parallel: ParallelArguments,
}

/// The lesson's: batch 32, SGD with momentum, 2 epochs.
const LESSON: TrainingDefaults = TrainingDefaults {
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

/// Pictures of `--quick`: (train, test).
const QUICK_SHAPES: (u64, u64) = (1_600, 400);

/// Reads the command line. Help and malformed arguments end the process here, as clap does it.
pub(crate) fn parse() -> Result<Action<Request>> {
    let matches = command().get_matches();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    resolve(arguments, &matches)
}

fn command() -> clap::Command {
    let mut defaults = common_defaults(&LESSON);
    defaults.extend(transfer_defaults());
    defaults.push(("weights", "torchvision; with --quick random".into()));
    describe_defaults(Arguments::command(), &defaults)
}

fn resolve(arguments: Arguments, matches: &ArgMatches) -> Result<Action<Request>> {
    let given = flags_given(&command(), matches);
    if let Some(action) = arguments.run.to_resume(&given, &arguments.data)? {
        return Ok(action);
    }
    let weights = match arguments.quick {
        true => WeightsSource::Random,
        false => WeightsSource::TORCHVISION,
    };
    let request =
        arguments
            .network
            .request(Begin::Weights(weights), arguments.aux, Trained::Everything)?;
    if arguments.summary {
        let reason = "it prints the network and trains nothing";
        let allowed = ["--dropout", "--image-size", "--aux"];
        refuse_all_but("--summary", &allowed, &given, reason)?;
        return Ok(Action::Summary(request));
    }
    let data = match arguments.quick {
        true => arguments.data.quick(QUICK_SHAPES)?,
        false => arguments.data,
    };
    let data = data.resolve(Dataset::Cifar10)?;
    let compute = arguments.compute.resolve_for(&arguments.parallel)?;
    let config = RunConfig {
        model: request,
        data,
        training: arguments
            .training
            .resolve(&arguments.run, &LESSON, &compute)?,
        compute,
    };
    config.training.validate()?;
    Ok(Action::Start {
        config: Box::new(config),
        out: arguments.run.out(),
        profile: arguments.run.profile,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn action(line: &str) -> Result<Action<Request>> {
        let line = ["finetune-full"].into_iter().chain(line.split_whitespace());
        let matches = command().try_get_matches_from(line)?;
        resolve(Arguments::from_arg_matches(&matches)?, &matches)
    }

    fn config(line: &str) -> RunConfig<Request> {
        match action(line).unwrap() {
            Action::Start { config, .. } => *config,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn without_arguments_the_settings_are_the_lessons() {
        let RunConfig {
            model,
            data,
            training,
            ..
        } = config("");
        assert_eq!((training.epochs, training.batch_size), (2, 32));
        let optimizer = &training.optimizer;
        assert_eq!((optimizer.lr, optimizer.momentum), (0.01, 0.9));
        assert!(training.shuffle);
        assert_eq!(data.dataset, Dataset::Cifar10);
        assert_eq!((model.dropout, model.image_size), (0.2, None));
        assert!(!model.aux_heads);
        assert_eq!(model.begin, Begin::Weights(WeightsSource::TORCHVISION));
        assert_eq!(model.trained, Trained::Everything);
    }

    #[test]
    fn every_flag_reaches_the_configuration() {
        let config =
            config("--weights random --aux --dropout 0.5 --image-size 224 --epochs 3 --seed 8");
        assert_eq!(config.model.begin, Begin::Weights(WeightsSource::Random));
        assert!(config.model.aux_heads);
        assert_eq!(
            (config.model.dropout, config.model.image_size),
            (0.5, Some(224))
        );
        assert_eq!((config.training.epochs, config.training.seed), (3, 8));
    }

    #[test]
    fn init_takes_the_place_of_weights() {
        let begin = config("--init some.safetensors").model.begin;
        assert_eq!(begin, Begin::Init("some.safetensors".into()));
        assert!(action("--init some.safetensors --weights random").is_err());
    }

    #[test]
    fn the_help_gives_a_default_for_each_flag_that_takes_a_value() {
        let expected = ["init", "resume"];
        assert_eq!(
            experiment_common::flags_without_default(&command()),
            expected
        );
    }

    #[test]
    fn quick_needs_no_file_and_takes_other_settings() {
        let config = config("--quick --epochs 1");
        assert_eq!(
            (config.data.dataset, config.training.epochs),
            (Dataset::Shapes, 1)
        );
        assert_eq!(config.model.begin, Begin::Weights(WeightsSource::Random));
        assert!(action("--quick --dataset cifar10").is_err());
    }
}
