//! The command line.

use anyhow::Result;
use clap::{Args, Parser};
use experiment_common::{
    Action, CommandLine, CommonArguments, Presets, TrainingDefaults, common_defaults,
};
use trainer::{Schedule, SgdConfig};
use transfer_common::{Begin, Request, Trained, TransferArguments, transfer_defaults};

/// Train the head alone of torchvision's GoogLeNet on CIFAR-10
///
/// Without arguments: the lesson's third experiment, 2 more epochs from where the newest finished
/// run of finetune-full ended, with everything but the last layer frozen. CIFAR-10 is fetched if it
/// is not there. A run can be stopped with Ctrl-C at any time and resumed with --resume.
#[derive(Debug, Parser)]
#[command(name = "finetune-frozen", version, max_term_width = 100)]
pub(crate) struct Arguments {
    /// In seconds, on drawn shapes: begins with the newest finished run of finetune-full under --out,
    /// as `finetune-full --quick` makes one
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    common: CommonArguments<NetworkArguments>,
}

#[derive(Debug, Args)]
struct NetworkArguments {
    #[command(flatten)]
    transfer: TransferArguments,
    /// Let batch norm use its running statistics and leave them as they are. The backbone's features
    /// are then computed once, and epochs after the first take next to no time
    #[arg(long, help_heading = "Network")]
    bn_eval: bool,
}

/// The lesson's: batch 32, SGD without momentum, 2 epochs.
const LESSON: TrainingDefaults = TrainingDefaults {
    epochs: 2,
    batch_size: 32,
    optimizer: SgdConfig {
        lr: 0.01,
        momentum: 0.0,
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
        let init = "the newest finished run of finetune-full under --out";
        defaults.push(("init", init.into()));
        defaults
    }

    fn resolve(self, given: &[String]) -> Result<Action<Request>> {
        let presets = Presets {
            training: &LESSON,
            quick_shapes: self.quick.then_some(QUICK_SHAPES),
            summary_flags: &["--dropout", "--image-size"],
        };
        self.common.resolve(given, presets, |network| {
            let trained = match network.bn_eval {
                true => Trained::HeadWithFixedStatistics,
                false => Trained::Head,
            };
            let begin = Begin::NewestRunOf("finetune-full");
            network.transfer.request(begin, trained)
        })
    }
}

#[cfg(test)]
mod tests {
    use experiment_common::{
        Dataset, RunConfig, command, flags_without_default, own_flags_not_in, parse_from,
    };
    use transfer_common::WeightsSource;

    use super::*;

    fn action(line: &str) -> Result<Action<Request>> {
        parse_from::<Arguments>(
            ["finetune-frozen"]
                .into_iter()
                .chain(line.split_whitespace()),
        )
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
        assert_eq!((optimizer.lr, optimizer.momentum), (0.01, 0.0));
        assert!(training.shuffle);
        assert_eq!(data.dataset, Dataset::Cifar10);
        assert_eq!((model.dropout, model.image_size), (0.2, None));
        assert!(!model.aux_heads);
        assert_eq!(model.begin, Begin::NewestRunOf("finetune-full"));
        assert_eq!(model.trained, Trained::Head);
    }

    #[test]
    fn every_flag_of_its_own_reaches_the_configuration() {
        let own = "--weights random --bn-eval --dropout 0.5 --image-size 224";
        let model = config(own).model;
        assert_eq!(model.begin, Begin::Weights(WeightsSource::Random));
        assert_eq!(model.trained, Trained::HeadWithFixedStatistics);
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
        let expected = ["weights", "resume"];
        assert_eq!(flags_without_default(&command::<Arguments>()), expected);
    }

    #[test]
    fn quick_needs_no_file_and_takes_other_settings() {
        let config = config("--quick --epochs 1");
        assert_eq!(
            (config.data.dataset, config.training.epochs),
            (Dataset::Shapes, 1)
        );
        assert_eq!(config.model.begin, Begin::NewestRunOf("finetune-full"));
        assert!(action("--quick --data-dir d").is_err());
    }
}
