//! Everything that can go wrong in a run.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::config::ConfigError;
use crate::sgd::SgdStateError;
use crate::weights::WeightsError;

/// Result with the trainer's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// The checkpoint that a run can go on from when it has failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LastCheckpoint {
    /// There is no checkpoint yet.
    None,
    /// The checkpoint is in this folder.
    At(PathBuf),
    /// Rank 0 says it, which has the run's folder.
    OfRank0,
}

impl fmt::Display for LastCheckpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("no checkpoint had been saved yet"),
            Self::At(path) => write!(f, "the last good checkpoint is {}", path.display()),
            Self::OfRank0 => f.write_str("rank 0 names the last good checkpoint"),
        }
    }
}

/// Where in a run something failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In a step of the training.
    Step {
        /// 1-based.
        step: u64,
        /// Images of a whole batch, of all processes together.
        batch_size: usize,
    },
    /// In a batch of what is gone through in order: an evaluation, the computation of features.
    Batch {
        /// 1-based.
        batch: u64,
        /// Images of this batch.
        images: u64,
    },
    /// With a whole set: `train`, `validation` or `test`.
    Set(&'static str),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Step { step, batch_size } => {
                write!(f, "at step {step}, with batches of {batch_size} images")
            }
            Self::Batch { batch, images } => write!(f, "at batch {batch}, of {images} images"),
            Self::Set(set) => write!(f, "for the {set} set"),
        }
    }
}

/// Everything that can go wrong in a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A setting is out of range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Of processes that train together rank 0 has no run directory, or another has one.
    #[error(
        "rank {rank} has {} run directory: rank 0 writes metrics, checkpoints and weights into one for all ranks, and no other does",
        match rank {
            0 => "no",
            _ => "a",
        }
    )]
    RunOfRank {
        /// Which rank.
        rank: usize,
    },
    /// A set has no images.
    #[error("the {set} set is empty; it must have at least one image")]
    EmptySet {
        /// `train`, `validation` or `test`.
        set: &'static str,
    },
    /// The loss became infinite or not a number.
    #[error(
        "the loss is {loss} at step {step} (epoch {epoch}): training has diverged and was stopped \
         {}; {}. A smaller learning rate or another seed may help",
        if steps_made < step {
            "before this step moved a weight".to_string()
        } else {
            format!("when the loss was read, after step {steps_made}; no checkpoint was written of it")
        },
        last_checkpoint
    )]
    NonFiniteLoss {
        /// 1-based.
        epoch: u64,
        /// 1-based.
        step: u64,
        /// The value.
        loss: f32,
        /// Steps that had moved the weights when the value was read: on a GPU it is read later.
        steps_made: u64,
        /// The newest checkpoint of the run.
        last_checkpoint: LastCheckpoint,
    },
    /// A weight is infinite or not a number although the loss was finite.
    #[error(
        "{name} has a value that is not finite after step {step} (epoch {epoch}): training has \
         diverged; no checkpoint was written over the previous ones"
    )]
    NonFiniteWeights {
        /// The parameter or buffer.
        name: String,
        /// 1-based.
        epoch: u64,
        /// 1-based.
        step: u64,
    },
    /// A model without a parameter to train.
    #[error(
        "the model has nothing to train: {}",
        match parameters {
            0 => "its named_parameters are none".to_string(),
            count => format!("is_trainable refuses each of its {count} named_parameters"),
        }
    )]
    NothingTrains {
        /// How many parameters it has.
        parameters: usize,
    },
    /// A step has no gradient of any parameter that trains.
    #[error(
        "no trainable parameter has a gradient at step {step}: the loss depends on none of them. Does the forward pass \
         detach its output, or compute with other variables than named_parameters lists?"
    )]
    NoGradient {
        /// 1-based.
        step: u64,
    },
    /// The folder to resume is no run.
    #[error(
        "{} is not a run directory: {reason}. A run directory holds config.json",
        dir.display()
    )]
    NotARun {
        /// The folder.
        dir: PathBuf,
        /// What is missing or wrong.
        reason: String,
    },
    /// The summary of a finished run makes no sense.
    #[error("{} is damaged", path.display())]
    DamagedSummary {
        /// `finished.json`.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// What a finished run left is damaged or gone, and so are its checkpoints.
    #[error("{problem}, and no checkpoint of the run is left from which it could be written again")]
    ResultLost {
        /// Which file, and what is wrong with it.
        problem: String,
    },
    /// The folder is a run of another experiment.
    #[error("{} is a run of {found}, not of {expected}", dir.display())]
    OtherExperiment {
        /// The folder.
        dir: PathBuf,
        /// Experiment recorded there.
        found: String,
        /// Experiment that was asked to resume.
        expected: String,
    },
    /// Another process works on the run.
    #[error("{} is in use by another process", dir.display())]
    InUse {
        /// The run.
        dir: PathBuf,
    },
    /// The data are not those the run began with.
    #[error(
        "the {set} data are not those the run began with (fingerprint {found}, recorded \
         {recorded}): the resumed run would not equal an uninterrupted one"
    )]
    DataChanged {
        /// `train`, `validation` or `test`.
        set: &'static str,
        /// Fingerprint of the data given now.
        found: String,
        /// Fingerprint in the run.
        recorded: String,
    },
    /// A checkpoint is incomplete or altered.
    #[error("the checkpoint {} cannot be used: {reason}", path.display())]
    DamagedCheckpoint {
        /// The checkpoint's folder.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A checkpoint does not belong to this configuration.
    #[error("the checkpoint {} does not fit the run: {reason}", path.display())]
    IncompatibleCheckpoint {
        /// The checkpoint's folder.
        path: PathBuf,
        /// What differs.
        reason: String,
    },
    /// There are checkpoints, but none is whole.
    #[error(
        "none of the {count} checkpoints in {} can be used; the newest: {newest}. Nothing was changed: \
         put a whole checkpoint back, or start a new run",
        dir.display()
    )]
    NoUsableCheckpoint {
        /// The folder of checkpoints.
        dir: PathBuf,
        /// How many there are.
        count: usize,
        /// What is wrong with the newest.
        newest: String,
    },
    /// A run that must have had checkpoints has none.
    #[error(
        "{} has no checkpoint, but the metrics of the run go on to epoch {epoch}, before which one was saved: \
         put the folder back, or start a new run",
        dir.display()
    )]
    CheckpointsLost {
        /// The folder of checkpoints.
        dir: PathBuf,
        /// The last that the metrics tell of.
        epoch: u64,
    },
    /// A metrics file is shorter than the checkpoint says.
    #[error(
        "{} has {found} bytes, but the checkpoint covers {recorded}: lines were lost",
        path.display()
    )]
    MetricsLost {
        /// The file.
        path: PathBuf,
        /// The file's length in bytes.
        found: u64,
        /// The length recorded by the checkpoint.
        recorded: u64,
    },
    /// Weights do not fit the model.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Optimiser state does not fit the model.
    #[error(transparent)]
    OptimizerState(#[from] SgdStateError),
    /// The data cannot be read.
    #[error("cannot prepare the {set} data")]
    Data {
        /// `train`, `validation` or `test`.
        set: &'static str,
        /// Why.
        source: Box<cifar_data::DataError>,
    },
    /// A tensor operation failed.
    #[error("{during} failed {place}")]
    Tensor {
        /// Which part of the work.
        during: &'static str,
        /// Where in the run.
        place: Place,
        /// Candle's error.
        source: Box<candle_core::Error>,
    },
    /// The processes that train together cannot go on together.
    #[error(transparent)]
    Group(#[from] data_parallel::Error),
    /// What rank 0 sent cannot be used.
    #[error("rank 0 sent {what} that cannot be read")]
    Received {
        /// The part of rank 0's state.
        what: &'static str,
        /// Why.
        source: serde_json::Error,
    },
    /// A device has too little memory.
    #[error("{during} ran out of memory {place}")]
    OutOfMemory {
        /// Which part of the work.
        during: &'static str,
        /// Where in the run.
        place: Place,
        /// Candle's error.
        source: Box<candle_core::Error>,
    },
    /// A value cannot be written as JSON.
    #[error("cannot encode {what}")]
    Encode {
        /// The file whose value it is.
        what: &'static str,
        /// Why.
        source: serde_json::Error,
    },
}

impl Error {
    /// The error and its causes in one line.
    pub(crate) fn with_sources(&self) -> String {
        data_parallel::with_sources(self)
    }

    /// An operation on tensors failed.
    pub(crate) fn tensor(
        during: &'static str,
        place: Place,
    ) -> impl Fn(candle_core::Error) -> Self {
        move |source| {
            let lacks_memory = is_out_of_memory(&source);
            let source = Box::new(source);
            match lacks_memory {
                true => Self::OutOfMemory {
                    during,
                    place,
                    source,
                },
                false => Self::Tensor {
                    during,
                    place,
                    source,
                },
            }
        }
    }

    /// Wraps what the data crate says about a set.
    pub(crate) fn data(set: &'static str) -> impl Fn(cifar_data::DataError) -> Self {
        move |source| Self::Data {
            set,
            source: Box::new(source),
        }
    }
}

/// Whether a device had too little memory. Candle boxes what the CUDA libraries say, each its own
/// type; what they share is the name of the status.
fn is_out_of_memory(error: &candle_core::Error) -> bool {
    let text = format!("{error:?}");
    let statuses = ["OUT_OF_MEMORY", "STATUS_ALLOC_FAILED"];
    statuses.iter().any(|status| text.contains(status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_of_memory_names_step_and_batch_size() {
        let cuda = |status: &str| candle_core::Error::Cuda(status.into());
        let place = Place::Step {
            step: 7,
            batch_size: 512,
        };
        let failed = Error::tensor("the forward pass", place);
        let error = failed(cuda(
            "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")",
        ));
        let text = error.to_string();
        for part in ["the forward pass", "memory", "step 7", "512 images"] {
            assert!(text.contains(part), "{text}");
        }
        let other = failed(cuda("CUDA_ERROR_ILLEGAL_ADDRESS"));
        assert!(matches!(other, Error::Tensor { .. }), "{other}");
    }
}
