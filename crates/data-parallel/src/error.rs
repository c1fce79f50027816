//! What can go wrong between processes.

use std::io;
use std::time::Duration;

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong between processes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A variable of the environment is missing or makes no sense.
    #[error(
        "the environment variable {variable} is {}; it must be {expected}",
        found.as_deref().map_or_else(|| "not set".to_string(), |found| format!("{found:?}"))
    )]
    Environment {
        /// The variable's name.
        variable: &'static str,
        /// The variable's value; None where it is not set.
        found: Option<String>,
        /// What would be accepted.
        expected: String,
    },
    /// Rank 0 cannot wait for the others at the address given.
    #[error(
        "rank 0 cannot listen on {address}; MASTER_ADDR must be an address of its machine, and \
         MASTER_PORT a port that no other program uses"
    )]
    Listen {
        /// Host and port.
        address: String,
        /// Why not.
        source: io::Error,
    },
    /// The system refuses a thread.
    #[error("cannot start a thread to send with")]
    Thread {
        /// Why not.
        source: io::Error,
    },
    /// Rank 0 cannot be reached.
    #[error("rank {rank} could not reach rank 0 at {address} within {} s", timeout.as_secs_f64())]
    Unreachable {
        /// This rank.
        rank: usize,
        /// Host and port.
        address: String,
        /// How long it was tried.
        timeout: Duration,
        /// The last failure.
        source: io::Error,
    },
    /// Some ranks never came.
    #[error(
        "ranks {} of {world_size} did not connect within {} s",
        first_of(missing), timeout.as_secs_f64()
    )]
    Missing {
        /// Numbers of the ranks that did not come.
        missing: Vec<usize>,
        /// How many ranks there should be.
        world_size: usize,
        /// How long rank 0 waited.
        timeout: Duration,
    },
    /// What answered is no rank of this group, or of another version.
    #[error("{peer} does not belong to this group: {reason}")]
    Stranger {
        /// Rank or address of what answered.
        peer: String,
        /// What was wrong.
        reason: String,
    },
    /// Ranks run with different settings.
    #[error(
        "the ranks do not run the same: {what} is {} at rank {rank}, {} at rank 0",
        shown(found),
        shown(expected)
    )]
    Different {
        /// The setting that differs.
        what: String,
        /// The rank that differs.
        rank: usize,
        /// The setting's value at that rank; None: it has no such setting.
        found: Option<String>,
        /// The value of rank 0.
        expected: Option<String>,
    },
    /// A rank is gone.
    #[error("lost rank {rank} during {during}: it has ended, was killed, or cannot be reached")]
    Lost {
        /// Number of the rank that is gone.
        rank: usize,
        /// The call that noticed.
        during: &'static str,
        /// What the connection said.
        source: io::Error,
    },
    /// A rank is silent.
    #[error("rank {rank} did not answer for {} s during {during}", timeout.as_secs_f64())]
    Silent {
        /// Number of the rank that is silent.
        rank: usize,
        /// The call that waited.
        during: &'static str,
        /// How long the call waited.
        timeout: Duration,
    },
    /// The device does not get on, which waits for a rank.
    #[error("work of the device that all ranks take part in did not end within {} s: a rank is silent", timeout.as_secs_f64())]
    Stuck {
        /// How long it was waited for.
        timeout: Duration,
    },
    /// Another rank stopped with an error and said so.
    #[error("rank {rank} gave up: {reason}")]
    GaveUp {
        /// The rank that was first.
        rank: usize,
        /// The error of that rank.
        reason: String,
    },
    /// The ranks do not make the same calls.
    #[error("rank {rank} is at {found}, this rank at {expected}: they do not make the same steps")]
    OutOfStep {
        /// The rank that makes another call.
        rank: usize,
        /// What that rank sent.
        found: String,
        /// What was awaited.
        expected: String,
    },
    /// An earlier call failed.
    #[error("the group of processes has failed before: {0}")]
    Failed(String),
    /// Something that this group cannot do.
    #[error("{what}")]
    Unsupported {
        /// What was asked for and what is possible.
        what: String,
    },
    /// A tensor cannot be read or made.
    #[error("a tensor cannot be read or made during {during}")]
    Tensor {
        /// The call.
        during: &'static str,
        /// Candle's error.
        source: candle_core::Error,
    },
    /// NCCL failed.
    #[error("NCCL failed in {call}: {status}")]
    Nccl {
        /// NCCL's function.
        call: &'static str,
        /// The status that it returned.
        status: String,
    },
}

fn shown(value: &Option<String>) -> &str {
    value.as_deref().unwrap_or("not there")
}

/// An error and its causes in one line, as [`ProcessGroup::give_up`](crate::ProcessGroup::give_up) tells the other ranks.
pub fn with_sources(error: &(dyn std::error::Error + 'static)) -> String {
    let errors = std::iter::successors(Some(error), |error| error.source());
    let texts: Vec<String> = errors.map(ToString::to_string).collect();
    texts.join(": ")
}

/// Some ranks for people, who need not know each of thousands.
fn first_of(ranks: &[usize]) -> String {
    match ranks.get(..8) {
        Some(first) if ranks.len() > 8 => format!("{first:?} and {} more", ranks.len() - 8),
        _ => format!("{ranks:?}"),
    }
}
