//! Training on Candle that can be stopped anywhere and goes on with the same bits.
//!
//! The trainer takes any [`Model`], two or three sets of CIFAR's shape and a [`TrainingConfig`], and works in
//! a [`RunDirectory`]: [`Training::new`] continues from the newest checkpoint there or starts, and
//! [`Training::run`] makes the steps, evaluates, and writes metrics and checkpoints. It prints
//! nothing; an [`Observer`] hears of the progress.
//!
//! - [`Sgd`] has the semantics of `torch.optim.SGD`.
//! - All randomness is a pure function of seed and position, see [`random`].
//! - Weights are stored under PyTorch's names, see [`weights`].

mod checkpoint;
mod config;
mod data;
mod distributed;
mod durable;
mod environment;
mod error;
mod evaluate;
mod execution;
mod features;
mod metrics;
mod model;
mod observer;
mod profile;
pub mod random;
mod resident;
mod run_directory;
mod schedule;
mod sgd;
#[cfg(test)]
mod tiny_model;
mod training;
pub mod weights;

pub use config::{ConfigError, TrainingConfig};
pub use data::{DataFingerprints, DataSets, SetFingerprint};
pub use durable::sha256_hex;
pub use environment::{Environment, Program};
pub use error::{Error, LastCheckpoint, Place, Result};
pub use evaluate::{Evaluation, evaluate, first_maximum};
pub use execution::Execution;
pub use metrics::Metric;
pub use model::{AuxiliaryOutput, FixedFeatures, Model, TrainOutput};
pub use observer::{EpochReport, Observer, Silent, StartReport, StepReport};
pub use profile::PROFILE_TARGET;
pub use run_directory::{Finished, RunDirectory, recorded_weights_sha256};
pub use schedule::{ResolvedSchedule, Schedule, Span};
pub use sgd::{Sgd, SgdConfig, SgdStateError};
pub use training::{Outcome, Summary, Training};
