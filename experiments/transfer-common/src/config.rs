//! The settings of a fine-tuning run.

use std::path::PathBuf;

use experiment_common::InitFile;
use inception_model::FrozenBatchNorm;
use serde::{Deserialize, Serialize};

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
