//! Where the time of a training step goes, told to `tracing`.

use std::time::Instant;

use tracing::Level;

/// Target of the events that tell where the time of training steps goes.
///
/// Each is of level TRACE, ends one part of one step, and has the fields `part` (`data`,
/// `forward`, `loss`, `backward` or `update`; where the data are [resident](crate::Execution::resident)
/// also `gather`, after `data`) and `nanoseconds`. No part comes twice in a step. While nobody
/// listens to the target, nothing is measured. What happens inside of forward and backward is told to
/// [`candle_cnn::PROFILE_TARGET`].
pub const PROFILE_TARGET: &str = "trainer::profile";

/// Measures one part after the other if anybody listens.
pub(crate) struct Parts(Option<Instant>);

impl Parts {
    pub(crate) fn start() -> Self {
        let enabled = tracing::enabled!(target: PROFILE_TARGET, Level::TRACE);
        Self(enabled.then(Instant::now))
    }

    /// Ends `part`; the next begins.
    pub(crate) fn end(&mut self, part: &'static str) {
        if let Some(begin) = &mut self.0 {
            let now = Instant::now();
            let nanoseconds = now.duration_since(*begin).as_nanos() as u64;
            tracing::trace!(target: PROFILE_TARGET, part, nanoseconds);
            *begin = now;
        }
    }
}
