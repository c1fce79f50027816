//! The settings of a fine-tuning run.

use std::path::PathBuf;

use experiment_common::InitFile;
use inception_model::FrozenBatchNorm;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::arguments::image_size;
use crate::source::WeightsSource;

/// What the command line says of the network.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The weights to begin with.
    pub begin: Begin,
    /// Height and width to which pictures are resized, in pixels; None: as the weights were
    /// trained.
    pub image_size: Option<usize>,
    /// Probability that a feature is dropped before the head.
    pub dropout: f64,
    /// Whether the auxiliary heads are there and train.
    pub aux_heads: bool,
    /// What trains.
    pub trained: Trained,
}

/// The weights that were asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Begin {
    /// A backbone, under a fresh head.
    Weights(WeightsSource),
    /// Exactly the state in this file or run.
    Init(PathBuf),
    /// Exactly the state that the newest finished run of this experiment ended with.
    NewestRunOf(&'static str),
}

/// The same, resolved: part of `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransferConfig {
    /// The weights to begin with.
    pub begin: BeginConfig,
    /// Whether the network converts its input from ImageNet's normalisation to that of 0.5, as
    /// torchvision's does with pretrained weights.
    pub transform_input: bool,
    /// Height and width to which pictures are resized, in pixels.
    #[serde(deserialize_with = "image_size_of_file")]
    pub image_size: usize,
    /// Probability that a feature is dropped before the head.
    pub dropout: f64,
    /// Whether the auxiliary heads are there and train.
    pub aux_heads: bool,
    /// What trains.
    pub trained: Trained,
}

/// The weights a run begins with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "kebab-case")]
pub enum BeginConfig {
    /// Drawn from the run's seed.
    Random,
    /// The backbone of a file, under a fresh head.
    Backbone {
        /// What `--weights` said.
        source: String,
        /// Where it was fetched from, with the commit of a Hub repository.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        origin: Option<String>,
        /// Where it is.
        file: InitFile,
    },
    /// Exactly the state in a file, head included.
    State {
        /// The file.
        file: InitFile,
    },
}

/// Which weights the optimiser moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trained {
    /// All.
    Everything,
    /// Those of the head. The backbone's batch norms normalise by the batch, and their statistics
    /// move: PyTorch's train mode.
    Head,
    /// Those of the head. The backbone's batch norms normalise by their statistics, which stay.
    HeadWithFixedStatistics,
}

impl Trained {
    /// What the batch norms of a frozen backbone do; None where it is not frozen.
    pub fn frozen(self) -> Option<FrozenBatchNorm> {
        match self {
            Self::Everything => None,
            Self::Head => Some(FrozenBatchNorm::Moving),
            Self::HeadWithFixedStatistics => Some(FrozenBatchNorm::Eval),
        }
    }
}

/// Within the bounds of the flag: a run's file may have been written by anybody.
fn image_size_of_file<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    let size = usize::deserialize(deserializer)?;
    image_size(&size.to_string())
        .map_err(|problem| D::Error::custom(format!("image_size is {size}: {problem}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_may_ask_for_no_size_that_the_flag_refuses() {
        let read = |size: &str| {
            let text = format!(
                r#"{{"begin": {{"from": "random"}}, "transform_input": true, "image_size": {size}, "dropout": 0.2,
                    "aux_heads": false, "trained": "head"}}"#
            );
            serde_json::from_str::<TransferConfig>(&text)
        };
        assert_eq!(read("224").unwrap().image_size, 224);
        for size in ["0", "14", "1025", "1e19", "18446744073709551615"] {
            assert!(read(size).is_err(), "{size}");
        }
        let error = read("100000").unwrap_err().to_string();
        assert!(
            error.contains("image_size is 100000: it must be a whole number from 15"),
            "{error}"
        );
    }
}
