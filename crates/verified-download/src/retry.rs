//! Whether a failed request is made again, and after which wait.

use std::thread::sleep;
use std::time::{Duration, Instant};

use rand::Rng;
use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RETRY_AFTER};

use crate::error::RemoteError;
use crate::transfer::header;
use crate::{Event, Hints, Interrupt, Network, Text};

/// The failures of one request so far.
pub(crate) struct Retry<'a> {
    network: &'a Network,
    /// Failures in a row without progress.
    failures: u32,
    /// Whether any byte of a file came.
    heard: bool,
}

/// What comes after a failure that may pass.
pub(crate) struct Again {
    problem: RemoteError,
    failures: u32,
    attempts: u32,
    /// The wait before the next attempt.
    pub(crate) delay: Duration,
}

impl<'a> Retry<'a> {
    pub(crate) fn new(network: &'a Network) -> Retry<'a> {
        Retry {
            network,
            failures: 0,
            heard: false,
        }
    }

    /// Bytes of the file came, new ones or not.
    pub(crate) fn heard(&mut self) {
        self.heard = true;
    }

    /// Bytes came that there had not been before: what failed until now no longer counts.
    pub(crate) fn made_progress(&mut self) {
        self.failures = 0;
    }

    /// Decides whether to try again after `error`, and after which wait. `kept` is how much of the file is on disk.
    ///
    /// # Errors
    /// What ends the run: `error` itself, or that it came too often or asks for too long a wait.
    pub(crate) fn after(&mut self, error: RemoteError, kept: u64) -> Result<Again, RemoteError> {
        if !error.is_transient() {
            return Err(error);
        }
        self.failures += 1;
        // Who cannot even connect is probably offline, and should hear so soon.
        let nothing_heard = !self.heard && matches!(error, RemoteError::NoAnswer { .. });
        let attempts = if nothing_heard {
            self.network.attempts_to_connect
        } else {
            self.network.attempts
        };
        if self.failures >= attempts {
            return Err(RemoteError::GaveUp {
                attempts: self.failures,
                kept,
                last: Box::new(error),
            });
        }
        let mut delay = self.network.backoff(self.failures);
        if let RemoteError::Status {
            url,
            status,
            retry_after: Some(wait),
            ..
        } = &error
        {
            if *wait > self.network.longest_retry_after {
                return Err(RemoteError::AsksToWait {
                    url: url.clone(),
                    status: *status,
                    wait: *wait,
                });
            }
            delay = delay.max(*wait);
        }
        Ok(Again {
            problem: error,
            failures: self.failures,
            attempts,
            delay,
        })
    }
}

impl Again {
    pub(crate) fn event(&self) -> Event<'_> {
        Event::Retrying {
            problem: &self.problem,
            failures: self.failures,
            attempts: self.attempts,
            delay: self.delay,
        }
    }
}

/// The error for an answer whose status is no success. `said` is what the server said of it, `url` its address as
/// users may see it.
pub(crate) fn status_error(
    url: String,
    status: StatusCode,
    headers: &HeaderMap,
    said: String,
    hints: &Hints,
) -> RemoteError {
    RemoteError::Status {
        url,
        status,
        excerpt: said,
        hint: match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => hints.refused.clone(),
            _ => Text::Borrowed(""),
        },
        retry_after: retry_after(headers),
    }
}

/// Seconds, or a date in the format of mail.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = header(headers, RETRY_AFTER)?.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::parse(value).ok()?;
    Some(
        Duration::try_from(date.timestamp().duration_since(jiff::Timestamp::now()))
            .unwrap_or_default(),
    )
}

impl Network {
    /// The wait after the n-th failure in a row: doubling up to the limit, and between half and all of that,
    /// so that many clients do not come back together.
    fn backoff(&self, failures: u32) -> Duration {
        let doubled = self
            .first_backoff
            .saturating_mul(1 << (failures - 1).min(16));
        doubled
            .min(self.longest_backoff)
            .mul_f64(rand::rng().random_range(0.5..=1.0))
    }
}

/// Waits, unless interrupted: then the answer is false.
pub(crate) fn wait(delay: Duration, interrupt: &Interrupt) -> bool {
    let end = Instant::now() + delay;
    while !interrupt.is_raised() {
        match end.saturating_duration_since(Instant::now()) {
            Duration::ZERO => return true,
            left => sleep(left.min(Duration::from_millis(50))),
        }
    }
    false
}
