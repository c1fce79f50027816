//! The command line.

use anyhow::Result;
use clap::{Args, Parser};
use experiment_common::{
    Action, CommandLine, CommonArguments, Presets, TrainingDefaults, common_defaults,
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
pub(crate) struct Arguments {
    /// The whole thing in seconds, without any file or network: drawn shapes, from random weights
    /// (the defaults below are those without it)
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    common: CommonArguments<NetworkArguments>,
}

#[derive(Debug, Args)]
struct NetworkArguments {
    #[command(flatten)]
    transfer: TransferArguments,
    /// Give the network its two auxiliary heads, which add 0.3 times their loss each in training. Those
    /// of torchvision's own file are not pretrained
    #[arg(long, help_heading = "Network")]
    aux: bool,
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

impl CommandLine for Arguments {
    type Request = Request;

    fn defaults() -> Vec<(&'static str, String)> {
        let mut defaults = common_defaults(&LESSON);
        defaults.extend(transfer_defaults());
        defaults.push(("weights", "torchvision; with --quick random".into()));
        defaults
    }

    fn resolve(self, given: &[String]) -> Result<Action<Request>> {
        let weights = match self.quick {
            true => WeightsSource::Random,
            false => WeightsSource::TORCHVISION,
        };
        let presets = Presets {
            training: &LESSON,
            quick_shapes: self.quick.then_some(QUICK_SHAPES),
            summary_flags: &["--dropout", "--image-size", "--aux"],
        };
        self.common.resolve(given, presets, |network| {
            let begin = Begin::Weights(weights);
            let NetworkArguments { transfer, aux } = network;
            Ok(Request {
                aux_heads: aux,
                ..transfer.request(begin, Trained::Everything)?
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use experiment_common::{
        Dataset, RunConfig, command, flags_without_default, own_flags_not_in, parse_from,
    };

    use super::*;

    fn action(line: &str) -> Result<Action<Request>> {
        parse_from::<Arguments>(["finetune-full"].into_iter().chain(line.split_whitespace()))
    }

    fn config(line: &str) -> RunConfig<Request> {
        action(line).unwrap().started()
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
    fn every_flag_of_its_own_reaches_the_configuration() {
        let own = "--weights random --aux --dropout 0.5 --image-size 224";
        let model = config(own).model;
        assert_eq!(model.begin, Begin::Weights(WeightsSource::Random));
        assert_eq!(model.trained, Trained::Everything);
        assert!(model.aux_heads);
        assert_eq!((model.dropout, model.image_size), (0.5, Some(224)));
        let none: [&str; 0] = [];
        // What --init and --quick do is in the tests below.
        let lines = [own, "--init f", "--quick"];
        assert_eq!(own_flags_not_in::<Arguments>(&lines), none);
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
        assert_eq!(flags_without_default(&command::<Arguments>()), expected);
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
