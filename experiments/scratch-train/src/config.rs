//! The settings of a run, fully resolved: the contents of `config.json`.

use experiment_common::{InitFile, RunConfig, TrainingDefaults};
use inception_model::Init;
use serde::{Deserialize, Serialize};
use trainer::{Schedule, SgdConfig, Span};

/// Everything that decides what a run computes.
pub(crate) type Config = RunConfig<ModelConfig>;

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
    /// Kaiming normal over the inputs: of runs of `--quick` from before it was centred.
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

/// What arguments that are not given become.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Preset {
    pub(crate) training: TrainingDefaults,
    pub(crate) dropout: f64,
    pub(crate) init: Initialization,
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
};

/// `--quick`: the same network on drawn shapes, to see it learn within minutes. The lesson's
/// initialisation begins with losses near 1,000 and learns slowly from there, so this one begins with activations of even scale, which also bears a larger learning rate.
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
};

/// Pictures of `--quick`: (train, test).
pub(crate) const QUICK_SHAPES: (u64, u64) = (1_600, 200);
