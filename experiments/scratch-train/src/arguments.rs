//! The command line.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Parser};
use experiment_common::{
    Action, CommandLine, CommonArguments, InitFile, Presets, below_one, common_defaults,
};

use crate::config::{LESSON, ModelConfig, Preset, QUICK, QUICK_SHAPES};

/// Train GoogLeNet on CIFAR-10 from scratch, as the lesson does
///
/// Without arguments: the lesson, 7 epochs over the 50,000 training images. CIFAR-10 is fetched if it
/// is not there. A run can be stopped with Ctrl-C at any time and resumed with --resume.
#[derive(Debug, Parser)]
#[command(name = "scratch-train", version, max_term_width = 100)]
pub(crate) struct Arguments {
    /// The whole thing in minutes: the same network on drawn shapes, with settings that learn fast
    /// (the defaults below are those without it)
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    common: CommonArguments<ModelArguments>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Network")]
struct ModelArguments {
    /// Probability that a feature is dropped before the last layer, in training
    #[arg(long, value_name = "PROBABILITY", value_parser = below_one, allow_negative_numbers = true)]
    dropout: Option<f64>,
    /// Begin with these weights instead of random ones. The file must hold exactly the network's
    /// tensors, under PyTorch's names
    #[arg(long, value_name = "FILE.safetensors")]
    init: Option<PathBuf>,
}

impl CommandLine for Arguments {
    type Request = ModelConfig;

    fn defaults() -> Vec<(&'static str, String)> {
        let mut defaults = common_defaults(&LESSON.training);
        defaults.push(("dropout", LESSON.dropout.to_string()));
        defaults
    }

    fn resolve(self, given: &[String]) -> Result<Action<ModelConfig>> {
        let preset = match self.quick {
            true => QUICK,
            false => LESSON,
        };
        let presets = Presets {
            training: &preset.training,
            quick_shapes: self.quick.then_some(QUICK_SHAPES),
            summary_flags: &["--dropout"],
        };
        let request = |network| Ok(model(network, &preset));
        self.common.resolve(given, presets, request)
    }
}

fn model(arguments: ModelArguments, preset: &Preset) -> ModelConfig {
    ModelConfig {
        dropout: arguments.dropout.unwrap_or(preset.dropout),
        init: preset.init,
        init_file: arguments.init.map(InitFile::given),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use experiment_common::{
        Dataset, command, flags_without_default, own_flags_not_in, parse_from,
    };
    use trainer::Model;

    use super::*;
    use crate::config::{Config, Initialization};
    use crate::network::Network;

    fn action(line: &[&str]) -> Result<Action<ModelConfig>> {
        parse_from::<Arguments>(["scratch-train"].iter().chain(line))
    }

    fn config(line: &[&str]) -> Config {
        action(line).unwrap().started()
    }

    #[test]
    fn without_arguments_the_settings_are_the_lessons() {
        let config = config(&[]);
        assert_eq!(config.training.epochs, 7);
        assert_eq!(config.training.batch_size, 32);
        assert_eq!(config.training.optimizer.lr, 1e-4);
        assert_eq!(config.training.optimizer.momentum, 0.9);
        assert_eq!(config.training.optimizer.weight_decay, 0.0);
        assert!(config.training.shuffle);
        assert_eq!(config.model.dropout, 0.4);
        assert_eq!(config.model.init, Initialization::Lesson);
        assert_eq!(config.data.dataset, Dataset::Cifar10);
        assert_eq!((config.data.train_limit, config.data.validation), (None, 0));
    }

    #[test]
    fn every_flag_of_its_own_reaches_the_configuration() {
        let (own, quick) = ("--dropout 0 --init w.safetensors", "--quick");
        let model = config(&own.split(' ').collect::<Vec<_>>()).model;
        assert_eq!(model.dropout, 0.0);
        let file = InitFile::given("w.safetensors".into());
        assert_eq!(model.init_file, Some(file));
        assert_eq!(config(&[quick]).data.dataset, Dataset::Shapes);
        let none: [&str; 0] = [];
        assert_eq!(own_flags_not_in::<Arguments>(&[own, quick]), none);
    }

    #[test]
    fn quick_trains_on_shapes_and_takes_other_settings() {
        let config = config(&["--quick", "--epochs", "1"]);
        assert_eq!(config.data.dataset, Dataset::Shapes);
        assert_eq!(config.training.epochs, 1);
        assert_eq!(config.training.optimizer.lr, QUICK.training.optimizer.lr);
        assert_eq!(config.model.init, Initialization::Centred);
    }

    #[test]
    fn the_lessons_network_begins_with_the_lessons_weights_and_that_of_quick_with_centred_ones() {
        let filters = |line: &[&str]| {
            let network = Network::new(&config(line), &Device::Cpu).unwrap();
            let mut parameters = network.named_parameters().into_iter();
            let (_, stem) = parameters
                .find(|(name, _)| name == "pre_layers.0.weight")
                .unwrap();
            assert_eq!(stem.dims(), [192, 3, 3, 3]);
            stem.flatten_from(1).unwrap().to_vec2::<f32>().unwrap()
        };
        let largest_sum = |filters: &[Vec<f32>]| {
            let sum = |filter: &Vec<f32>| filter.iter().copied().map(f64::from).sum::<f64>();
            filters.iter().map(sum).map(f64::abs).fold(0.0, f64::max)
        };
        // Kaiming normal over the outputs; over the inputs the variance would be 64 times that.
        let lesson = filters(&[]);
        let squares = lesson.iter().flatten().map(|weight| weight.powi(2));
        let variance = squares.sum::<f32>() / (192 * 27) as f32;
        let expected = 2.0 / (192.0 * 9.0);
        // The standard error of so many is 2 %.
        assert!((variance / expected - 1.0).abs() < 0.1, "{variance}");
        assert!(largest_sum(&lesson) > f64::from(expected).sqrt());
        // 27 weights of less than 2 are rounded.
        let rounding = 27.0 * f64::from(f32::EPSILON) / 2.0;
        assert!(largest_sum(&filters(&["--quick"])) <= rounding);
    }

    #[test]
    fn the_help_gives_a_default_for_each_flag_that_takes_a_value() {
        let expected = ["init", "resume"];
        assert_eq!(flags_without_default(&command::<Arguments>()), expected);
    }

    #[test]
    fn combinations_without_sense_are_refused_with_the_reason() {
        let cases = [
            ("--resume r --lr 1", "--resume cannot be combined with --lr"),
            (
                "--resume r --quick",
                "takes every setting from its config.json",
            ),
            (
                "--summary --resume r",
                "--resume cannot be combined with --summary",
            ),
            (
                "--summary --epochs 2",
                "--summary cannot be combined with --epochs",
            ),
            ("--quick --data-dir d", "drawn by the program"),
            ("--quick --dataset cifar10", "--train-limit N --epochs N"),
            ("--dataset shapes --data-dir d", "read from no folder"),
            ("--train-limit 10 --validation 10", "nothing to train on"),
        ];
        for (line, expected) in cases {
            let error = action(&line.split(' ').collect::<Vec<_>>())
                .unwrap_err()
                .to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }

    #[test]
    fn values_out_of_range_are_refused_by_flag() {
        let cases = [
            "--batch-size 0",
            "--epochs 0",
            "--max-steps 0",
            "--train-limit 0",
            "--threads 0",
            "--lr -1",
            "--lr nan",
            "--momentum 1",
            "--weight-decay inf",
            "--dropout 1",
            "--device tpu",
            "--dataset mnist",
            "--validation -1",
        ];
        for line in cases {
            let (flag, value) = line.split_once(' ').unwrap();
            let error = action(&[&format!("{flag}={value}")])
                .unwrap_err()
                .to_string();
            assert!(error.contains(flag), "{line}: {error}");
        }
    }
}
