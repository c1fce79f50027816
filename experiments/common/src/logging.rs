//! The libraries' log.

use std::env;
use std::io::{self, IsTerminal, Write};

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::profile::Profile;
use crate::progress::beside_bars;

/// Warnings and worse. hf-hub logs as an error what it also returns as one.
const FILTER: &str = "warn,hf_hub=off";

/// Sends the log to standard error, warnings and worse unless `RUST_LOG` says otherwise, and
/// times to `profile` where there is one. In colours on a terminal alone, and not with `NO_COLOR`.
pub fn start_logging(profile: Option<&Profile>) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(FILTER));
    let no_color = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let log = tracing_subscriber::fmt::layer()
        .with_target(false)
        .without_time()
        .with_ansi(io::stderr().is_terminal() && !no_color)
        .with_writer(|| AboveBars)
        .with_filter(filter);
    let profile = profile.cloned();
    tracing_subscriber::registry()
        .with(log)
        .with(profile.map(|profile| profile.with_filter(Profile::targets())))
        .init();
}

/// Standard error, with the progress bar out of the way.
struct AboveBars;

impl Write for AboveBars {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        beside_bars(|| io::stderr().write_all(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
