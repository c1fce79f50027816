//! The settings of a run, fully resolved: the contents of `config.json`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use experiment_common::{ComputeConfig, DataConfig, TrainingDefaults};
use inception_model::Init;
use serde::{Deserialize, Serialize};
use trainer::{Schedule, SgdConfig, Span, TrainingConfig, sha256_hex};

/// Everything that decides what a run computes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Config {
    pub(crate) model: ModelConfig,
    pub(crate) data: DataConfig,
    pub(crate) training: TrainingConfig,
    pub(crate) compute: ComputeConfig,
}

/// The network's own settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ModelConfig {
    /// Probability that a feature is dropped before the head.
    pub(crate) dropout: f64,
    /// How the weights begin.
    pub(crate) init: Initialization,
    /// Weights that replace them.
    pub(crate) init_file: Option<InitFile>,
}

/// The values of [`Init`], as they are written to `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Initialization {
    /// Kaiming normal over the outputs, as the lesson.
    Lesson,
    /// Kaiming normal over the inputs.
    FanIn,
    /// Normal filters of sum zero: [`Init::Centred`].
    Centred,
}

impl From<Initialization> for Init {
    fn from(init: Initialization) -> Self {
        match init {
            Initialization::Lesson => Self::Lesson,
            Initialization::FanIn => Self::FanIn,
            Initialization::Centred => Self::Centred,
        }
    }
}

/// A file of weights and the hash that tells whether it is still the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct InitFile {
    pub(crate) path: PathBuf,
    /// Empty until resolved.
    pub(crate) sha256: String,
}

impl Config {
    /// Makes the path of the weights absolute, so that a resumption from another folder finds them,
    /// and records their hash.
    pub(crate) fn resolve_init(mut self) -> Result<Self> {
        if let Some(file) = &mut self.model.init_file {
            let cannot_read = || format!("cannot read --init {}", file.path.display());
            let bytes = std::fs::read(&file.path).with_context(cannot_read)?;
            let path = file.path.canonicalize().with_context(cannot_read)?;
            file.sha256 = sha256_hex(&bytes);
            file.path = path;
        }
        Ok(self)
    }
}

/// What arguments that are not given become.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Preset {
    pub(crate) training: TrainingDefaults,
    pub(crate) dropout: f64,
    pub(crate) init: Initialization,
    /// Images of the built-in set, for presets that use it: (train, test).
    pub(crate) shapes: Option<(u64, u64)>,
}

/// The lesson, exactly: its code trains 7 epochs, whatever its recorded output shows.
pub(crate) const LESSON: Preset = Preset {
    training: TrainingDefaults {
        epochs: 7,
        batch_size: 32,
        optimizer: SgdConfig {
            lr: 1e-4,
            momentum: 0.9,
            dampening: 0.0,
            nesterov: false,
            weight_decay: 0.0,
        },
        schedule: Schedule::Constant,
        evaluate_every_epochs: 1,
        checkpoint_every_steps: 200,
    },
    dropout: 0.4,
    init: Initialization::Lesson,
    shapes: None,
};

/// `--quick`: the same network on drawn shapes, to see it learn within minutes. The lesson's
/// initialisation needs many thousands of steps to recover from its exploding forward pass, so this
/// one begins with activations of even scale, which also bears a larger learning rate.
pub(crate) const QUICK: Preset = Preset {
    training: TrainingDefaults {
        epochs: 1,
        batch_size: 4,
        optimizer: SgdConfig {
            lr: 0.002,
            momentum: 0.9,
            ..LESSON.training.optimizer
        },
        schedule: Schedule::Cosine {
            warmup: Span::Steps(10),
            end_factor: 0.05,
        },
        evaluate_every_epochs: 1,
        checkpoint_every_steps: 50,
    },
    dropout: 0.0,
    init: Initialization::Centred,
    shapes: Some((1_600, 200)),
};
