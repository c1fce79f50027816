//! The libraries' log.

use std::io::{self, Write};

use tracing_subscriber::EnvFilter;

use crate::progress::BARS;

/// Warnings and worse. hf-hub logs as an error what it also returns as one.
const FILTER: &str = "warn,hf_hub=off";

/// Sends the log to standard error, warnings and worse unless `RUST_LOG` says otherwise.
pub fn start_logging() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(FILTER));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .without_time()
        .with_writer(|| AboveBars)
        .init();
}

/// Standard error, with the progress bar out of the way.
struct AboveBars;

impl Write for AboveBars {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        BARS.suspend(|| io::stderr().write_all(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
