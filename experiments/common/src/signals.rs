//! Ctrl-C and termination: the step is finished and saved, a second signal ends at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Whether SIGINT or SIGTERM has arrived.
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
                .context("cannot listen for signals")?;
        }
        Ok(Self { received })
    }

    /// The signal that arrived, with its exit code.
    pub(crate) fn received(&self) -> Option<Signal> {
        match self.received.load(Ordering::Relaxed) as i32 {
            0 => None,
            number => Some(Signal {
                name: if number == SIGINT {
                    "SIGINT"
                } else {
                    "SIGTERM"
                },
                exit_code: exit_code(number) as u8,
            }),
        }
    }
}

/// A signal that asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Signal {
    /// `SIGINT` or `SIGTERM`.
    pub(crate) name: &'static str,
    /// 128 + its number, the shell's convention: 130 or 143.
    pub(crate) exit_code: u8,
}

fn exit_code(signal: i32) -> i32 {
    128 + signal
}
