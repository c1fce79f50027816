//! Ctrl-C, termination and a terminal that closes: the step is finished and saved. A second Ctrl-C or
//! termination ends at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result};
#[cfg(unix)]
pub(crate) use signal_hook::consts::SIGHUP;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Its number where there is no such signal, and nobody listens for it.
#[cfg(not(unix))]
pub(crate) const SIGHUP: i32 = 1;

/// Whether SIGINT, SIGTERM or SIGHUP has arrived.
#[derive(Debug)]
pub(crate) struct StopSignals {
    /// The signal's number; 0: none.
    received: Arc<AtomicUsize>,
}

impl StopSignals {
    /// From here on the first signal is only noted. Install it when there is something to save.
    ///
    /// # Errors
    /// The system's refusal.
    pub(crate) fn install() -> Result<Self> {
        let received = Arc::new(AtomicUsize::new(0));
        let armed = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the second signal finds `armed` set and ends the process.
            flag::register_conditional_shutdown(signal, exit_code(signal), armed.clone())
                .and_then(|_| flag::register(signal, armed.clone()))
                .and_then(|_| flag::register_usize(signal, received.clone(), signal as usize))
                .context(CANNOT_LISTEN)?;
        }
        if hangup_ends() {
            // A shell and its terminal send one each, so that the second may not end what the first began.
            flag::register_usize(SIGHUP, received.clone(), SIGHUP as usize)
                .context(CANNOT_LISTEN)?;
        }
        Ok(Self { received })
    }

    /// The signal that arrived.
    pub(crate) fn received(&self) -> Option<Signal> {
        match self.received.load(Ordering::Relaxed) as i32 {
            0 => None,
            number => Some(Signal {
                name: match number {
                    SIGINT => "SIGINT",
                    SIGHUP => "SIGHUP",
                    _ => "SIGTERM",
                },
                number: number as u8,
            }),
        }
    }
}

/// A signal that asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Signal {
    /// `SIGINT`, `SIGTERM` or `SIGHUP`.
    pub(crate) name: &'static str,
    /// 2, 15 or 1.
    pub(crate) number: u8,
}

impl Signal {
    /// 128 + its number, the shell's convention: 130, 143 or 129.
    pub(crate) fn exit_code(self) -> u8 {
        exit_code(self.number.into()) as u8
    }
}

const CANNOT_LISTEN: &str = "cannot listen for signals";

/// Whether SIGHUP ends this process, so that it has to be caught to save anything. Under `nohup` it does not, and
/// a handler would undo that. Linux tells; elsewhere nobody listens for the signal.
fn hangup_ends() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & (1 << (SIGHUP - 1)) == 0)
}

fn exit_code(signal: i32) -> i32 {
    128 + signal
}
