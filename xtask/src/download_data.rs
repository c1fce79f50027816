//! `cargo xtask download-data`: CIFAR-10 from one of its publishers, verified.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use cifar_data::download::{Event, FileEvent, Origin, Report, Request, Source, fetch};
use clap::{Args, ValueEnum};
use indicatif::{DecimalBytes, ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Fetch CIFAR-10 into a data folder and verify it (sizes and SHA-256)
///
/// Complete files are not fetched again, an interrupted download is continued, and a file gets its final name only
/// when it is right. A copy in the Hugging Face cache (HF_HUB_CACHE, HF_HOME) is used before the network; HF_ENDPOINT
/// names a mirror of the Hub, HF_TOKEN is sent to it if set (CIFAR-10 needs none), HF_HUB_OFFLINE=1 forbids requests.
#[derive(Args)]
pub(crate) struct DownloadData {
    /// Who to fetch from
    #[arg(long, value_enum, default_value_t = From::Hub)]
    source: From,
    /// The data folder; the experiments take the same flag with the same default
    #[arg(long, value_name = "DIR", default_value = "data")]
    data_dir: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum From {
    /// Hugging Face Hub: DIR/plain_text/*.parquet, 144 MB
    Hub,
    /// The authors' server, often slow: DIR/cifar-10-batches-bin/*.bin, 170 MB to fetch, 354 MB on disk
    Toronto,
}

/// Fetches, telling what happens on standard error; the files are listed on standard output.
pub(crate) fn run(arguments: DownloadData) -> Result<ExitCode> {
    let (source, other) = match arguments.source {
        From::Hub => (Source::Hub, "toronto"),
        From::Toronto => (Source::Toronto, "hub"),
    };
    let mut request = Request::from_env(source, &arguments.data_dir);
    request.hints.not_delivered = format!(
        "{source} did not deliver CIFAR-10 (the other source: `cargo xtask download-data --source {other}`)"
    )
    .into();
    request.hints.other_folder = "choose another folder with `--data-dir`".into();
    for signal in [SIGINT, SIGTERM] {
        // The first one stops at the next bytes, a second one at once.
        flag::register_conditional_shutdown(
            signal,
            128 + signal,
            Arc::clone(&request.interrupt.0),
        )?;
        flag::register(signal, Arc::clone(&request.interrupt.0))?;
    }

    let mut display = Display::new();
    let result = fetch(&request, &mut |event| display.show(&event));
    display.bar.finish_and_clear();
    let report = match result {
        Err(error) if error.is_interruption() => {
            eprintln!("{error}");
            return Ok(ExitCode::from(130));
        }
        other => other?,
    };
    print(&report, &arguments.data_dir, &mut io::stdout().lock())?;
    Ok(ExitCode::SUCCESS)
}

/// Lists the files; a reader that has seen enough may go away.
fn print(report: &Report, data_dir: &Path, out: &mut dyn Write) -> Result<()> {
    match list(report, data_dir, out) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        listed => listed.context("cannot print what there is"),
    }
}

fn list(report: &Report, data_dir: &Path, out: &mut dyn Write) -> io::Result<()> {
    for file in &report.files {
        let origin = match file.origin {
            Origin::AlreadyComplete => "was complete".to_owned(),
            Origin::HubCache => "copied from the Hugging Face cache".to_owned(),
            Origin::Network { received } => format!("{received} bytes fetched"),
            Origin::Archive => "unpacked".to_owned(),
        };
        writeln!(
            out,
            "{}: {} bytes, SHA-256 verified, {origin}",
            file.path.display(),
            file.bytes
        )?;
    }
    writeln!(out, "CIFAR-10 is complete in {}", data_dir.display())?;
    out.flush()
}

/// A bar in a terminal; elsewhere a line for each tenth.
struct Display {
    bar: ProgressBar,
    tenths: u64,
}

impl Display {
    fn new() -> Display {
        let bar = ProgressBar::new(0);
        let template = "{msg} [{wide_bar}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} ETA {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        Display { bar, tenths: 0 }
    }

    fn show(&mut self, event: &Event<'_>) {
        if let Some(line) = event.message() {
            self.say(&line);
        }
        match event {
            Event::File(FileEvent::CopyingFromCache { path, .. }) => self.begin(path, 0),
            Event::File(FileEvent::Transferring { path, from, .. }) => self.begin(path, *from),
            Event::Unpacking { archive } => self.begin(archive, 0),
            Event::File(FileEvent::Progress { done, bytes })
            | Event::UnpackingProgress { done, bytes } => self.advance(*done, *bytes),
            _ => {}
        }
    }

    /// Prints a line above the bar.
    fn say(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    fn begin(&mut self, path: &Path, from: u64) {
        self.bar.set_message(
            path.file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
        );
        // The rate counts what comes now, not what was there.
        self.bar.set_position(from);
        self.bar.reset_eta();
    }

    fn advance(&mut self, done: u64, bytes: u64) {
        self.bar.set_length(bytes);
        self.bar.set_position(done);
        let tenths = done * 10 / bytes.max(1);
        if self.bar.is_hidden() && tenths != self.tenths && tenths > 0 {
            eprintln!(
                "{}: {} of {} ({} %)",
                self.bar.message(),
                DecimalBytes(done),
                DecimalBytes(bytes),
                tenths * 10
            );
        }
        self.tenths = tenths;
    }
}

#[cfg(test)]
mod tests {
    use cifar_data::download::FileReport;

    use super::*;

    #[test]
    fn the_files_are_listed_with_their_origin() {
        let file = |path: &str, origin| FileReport {
            path: path.into(),
            bytes: 7,
            origin,
        };
        let files = vec![
            file("a", Origin::AlreadyComplete),
            file("b", Origin::Network { received: 5 }),
        ];
        let mut out = Vec::new();
        list(&Report { files }, Path::new("data"), &mut out).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "a: 7 bytes, SHA-256 verified, was complete\n\
             b: 7 bytes, SHA-256 verified, 5 bytes fetched\n\
             CIFAR-10 is complete in data\n"
        );
    }

    /// Whose reader has gone away, or that is full.
    struct Closed(io::ErrorKind);

    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_has_gone_away_is_no_error_and_a_full_disk_is() {
        let printed = |kind| {
            let report = Report { files: Vec::new() };
            print(&report, Path::new("data"), &mut Closed(kind))
        };
        assert!(printed(io::ErrorKind::BrokenPipe).is_ok());
        assert!(printed(io::ErrorKind::StorageFull).is_err());
    }
}
