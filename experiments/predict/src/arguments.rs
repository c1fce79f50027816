//! The command line.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{CommandFactory, FromArgMatches, Parser};
use experiment_common::{
    DataArguments, DataConfig, Dataset, DeviceArguments, at_least_one, describe_defaults,
    device_defaults,
};
use transfer_common::WeightsSource;

/// Say what is in pictures
///
/// The weights decide what is known: ImageNet's 1000 classes with torchvision's; with those of a run
/// of scratch-train, finetune-full or finetune-frozen the ten classes that it was trained on. JPEG, PNG, WebP and BMP are
/// read. What cannot be read is reported, the rest go on, and the exit code is 1 at the end.
#[derive(Debug, Parser)]
#[command(name = "predict", version, max_term_width = 100)]
pub(crate) struct Arguments {
    /// Pictures, and folders, in which all pictures are taken, those in folders within too
    #[arg(
        required_unless_present = "evaluate",
        conflicts_with = "evaluate",
        value_name = "PICTURE or FOLDER"
    )]
    pub(crate) pictures: Vec<PathBuf>,
    /// torchvision (ImageNet, fetched and verified), a .pth or .safetensors FILE, a finished RUN, or
    /// a Hub repository as owner/name, owner/name@revision, owner/name:file or both
    #[arg(long, value_name = "WEIGHTS", default_value = "torchvision")]
    pub(crate) weights: WeightsSource,
    /// Classes to name for each picture
    #[arg(long, value_name = "N", default_value = "5", value_parser = at_least_one, conflicts_with = "evaluate", allow_negative_numbers = true)]
    top: u64,
    /// One line of JSON for each picture: {"file", "predictions": [{"index", "class",
    /// "probability"}, …]}, or {"file", "error"}
    #[arg(long)]
    pub(crate) json: bool,
    /// Instead of naming pictures, say how many of this set's test pictures the network gets right, of all and of each class. With
    /// --json one line: {"accuracy", "correct", "images", "loss", "classes": [{"class", "images", "taken_for": [count, …]}, …]} [default: none]
    #[arg(long, value_enum, value_name = "SET")]
    evaluate: Option<Dataset>,
    /// With --evaluate cifar10: the folder that holds it; where it does not, it is fetched into it [default: data]
    #[arg(
        long,
        value_name = "DIR",
        requires = "evaluate",
        conflicts_with = "pictures"
    )]
    data_dir: Option<PathBuf>,
    /// With --evaluate: the first N test pictures only [default: all; shapes: 2000]
    #[arg(long, value_name = "N", value_parser = at_least_one, requires = "evaluate", conflicts_with = "pictures", allow_negative_numbers = true)]
    test_limit: Option<u64>,
    #[command(flatten)]
    pub(crate) compute: DeviceArguments,
}

impl Arguments {
    /// Reads the command line. Help and malformed arguments end the process here, as clap does it.
    pub(crate) fn parse_with_defaults() -> Self {
        let matches = command().get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }

    /// What `--evaluate` asks for.
    ///
    /// # Errors
    /// As [`Self::data`].
    pub(crate) fn to_evaluate(&self) -> Result<Option<(Dataset, DataConfig)>> {
        let set = self.evaluate.map(|set| Ok((set, self.data(set)?)));
        set.transpose()
    }

    /// The set of `--evaluate`.
    ///
    /// # Errors
    /// A folder for pictures that are drawn, and more of them than are drawn at most.
    fn data(&self, set: Dataset) -> Result<DataConfig> {
        ensure!(
            set == Dataset::Cifar10 || self.data_dir.is_none(),
            "--data-dir is for --evaluate cifar10: shapes are drawn by the program and read from no folder"
        );
        let arguments = DataArguments {
            dataset: Some(set),
            data_dir: self.data_dir.clone(),
            // Shapes to train on are drawn for nothing.
            train_limit: (set == Dataset::Shapes).then_some(1),
            test_limit: self.test_limit,
            validation: None,
        };
        arguments.resolve()
    }

    pub(crate) fn top(&self) -> usize {
        usize::try_from(self.top).unwrap_or(usize::MAX)
    }
}

fn command() -> clap::Command {
    describe_defaults(Arguments::command(), &device_defaults("all cores"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_gives_a_default_for_each_flag_that_takes_a_value() {
        let expected: [&str; 0] = [];
        assert_eq!(
            experiment_common::flags_without_default(&command()),
            expected
        );
    }
}
