//! A bar with the time left in a terminal, a line now and then elsewhere.

use std::io::{self, IsTerminal, Write};
use std::sync::{LazyLock, OnceLock};
use std::time::{Duration, Instant};

use cifar_data::download;
use indicatif::{
    DecimalBytes, HumanDuration, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle,
};
use trainer::{EpochReport, Observer, StartReport, StepReport};
use verified_download::Event;

use crate::parallel::later_rank;

/// All bars of the process, so that other output can make them step aside.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Where there is no terminal, a line appears this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Why a result could not be printed, the first time.
static LOST: OnceLock<io::Error> = OnceLock::new();

/// Whether results go to a terminal, which can be asked only while it is there.
static TO_A_TERMINAL: LazyLock<bool> = LazyLock::new(|| io::stdout().is_terminal());

/// Prints a result: a line on standard output. A reader or a terminal that has gone away does not end a run, and
/// neither does a full disk, which [`conclude`](crate::conclude) tells of at the end. Of processes that train together only the
/// first prints.
pub fn print(line: &str) {
    if later_rank().is_none() {
        print_always(line);
    }
}

/// As [`print`], for every process.
pub(crate) fn print_always(line: &str) {
    let to_a_terminal = *TO_A_TERMINAL;
    beside_bars(|| {
        let mut out = io::stdout().lock();
        match writeln!(out, "{line}").and_then(|()| out.flush()) {
            Err(error) if !to_a_terminal && error.kind() != io::ErrorKind::BrokenPipe => {
                let _ = LOST.set(error);
            }
            _ => {}
        }
    });
}

/// Why a result could not be printed, unless its reader had gone away.
pub(crate) fn lost_result() -> Option<&'static io::Error> {
    LOST.get()
}

/// Tells what happens: a line on standard error, where a process that is not the first of several
/// says which one it is.
pub fn say(line: &str) {
    let who = later_rank().map(|rank| format!("[rank {rank}] "));
    // At once, so that lines of several processes do not run into each other.
    let line = format!("{}{line}\n", who.unwrap_or_default());
    beside_bars(|| {
        let _ = io::stderr().write_all(line.as_bytes());
    });
}

/// Calls `f` while no bar is in its way. On a terminal that has gone there are none any more.
pub(crate) fn beside_bars<R>(f: impl FnOnce() -> R) -> R {
    // `suspend` panics where they cannot be cleared.
    if BARS.clear().is_err() {
        BARS.set_draw_target(ProgressDrawTarget::hidden());
    }
    BARS.suspend(f)
}

/// Shows a training run: the epochs' results on standard output, the way there on standard error.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    epochs: u64,
    pace: Pace,
    last_line: Option<Instant>,
}

/// Steps made by this process and the time they took, for the time left.
#[derive(Debug, Default)]
struct Pace {
    steps: u64,
    images: u64,
    time: Duration,
}

impl Progress {
    /// A bar if standard error is a terminal that can show one, else lines.
    pub(crate) fn new() -> Self {
        Self {
            bar: shows_bars().then(|| bar(STEP_TEMPLATE)),
            epochs: 0,
            pace: Pace::default(),
            last_line: None,
        }
    }

    /// Removes the bar.
    pub(crate) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// Where the run has come to: in the bar, or now and then on a line.
    fn show(&mut self, text: String) {
        if let Some(bar) = &self.bar {
            bar.set_message(text);
        } else if self.line_is_due() {
            say(&text);
        }
    }

    fn line_is_due(&mut self) -> bool {
        let due = self
            .last_line
            .is_none_or(|last| last.elapsed() >= LINE_EVERY);
        if due {
            self.last_line = Some(Instant::now());
        }
        due
    }
}

impl Observer for Progress {
    fn started(&mut self, start: &StartReport) {
        self.epochs = start.epochs;
        if let Some(bar) = &self.bar {
            bar.set_length(start.total_steps);
            bar.set_position(start.steps_done);
            bar.reset_eta();
        }
        if start.steps_done > 0 {
            say(&format!(
                "continuing after step {} of {}",
                start.steps_done, start.total_steps
            ));
        }
    }

    fn step_done(&mut self, report: &StepReport) {
        self.pace.steps += 1;
        self.pace.images += report.images;
        self.pace.time += report.time;
        let seconds = self.pace.time.as_secs_f64().max(f64::MIN_POSITIVE);
        let text = format!(
            "epoch {}/{} · loss {:.4} · train accuracy {:.1}% · {:.1} images/s",
            report.epoch,
            self.epochs,
            report.loss,
            100.0 * report.epoch_accuracy,
            self.pace.images as f64 / seconds,
        );
        if let Some(bar) = &self.bar {
            bar.set_position(report.step);
            bar.set_message(text);
        } else if self.line_is_due() {
            let left = (report.total_steps - report.step) as f64 * seconds / self.pace.steps as f64;
            let left = HumanDuration(Duration::try_from_secs_f64(left).unwrap_or_default());
            say(&format!(
                "step {}/{} · {text} · {left} left",
                report.step, report.total_steps
            ));
        }
    }

    fn features_progress(&mut self, set: &str, images_done: u64, images: u64) {
        self.show(format!(
            "computing the features of the {set} set: {images_done} of {images}"
        ));
    }

    fn evaluation_progress(&mut self, set: &str, images_done: u64, images: u64) {
        self.show(format!(
            "evaluating on the {set} set: {images_done} of {images}"
        ));
    }

    fn epoch_done(&mut self, report: &EpochReport) {
        print(&report.to_string());
    }
}

/// Shows a download: what happens as lines, the bytes as a bar in a terminal and as lines elsewhere.
#[derive(Debug, Default)]
pub struct DownloadProgress {
    bar: Option<ProgressBar>,
    tenths: u64,
}

impl DownloadProgress {
    /// Before anything happened.
    pub fn new() -> Self {
        Self::default()
    }

    /// Shows what happens to a file.
    pub fn show(&mut self, event: &Event<'_>) {
        match event {
            // That all is as it should be is nothing to say at each start.
            Event::Checking { .. } | Event::AlreadyComplete { .. } => {}
            Event::Progress { done, bytes } => self.advance(*done, *bytes),
            event => event.message().iter().for_each(|line| say(line)),
        }
    }

    /// Shows what happens to CIFAR-10.
    pub(crate) fn show_data(&mut self, event: &download::Event<'_>) {
        match event {
            download::Event::File(event) => self.show(event),
            download::Event::UnpackingProgress { done, bytes } => self.advance(*done, *bytes),
            event => event.message().iter().for_each(|line| say(line)),
        }
    }

    /// `done` of `bytes` are here.
    fn advance(&mut self, done: u64, bytes: u64) {
        if shows_bars() {
            let bar = self.bar.get_or_insert_with(|| bar(BYTE_TEMPLATE));
            bar.set_length(bytes);
            bar.set_position(done);
            if done == bytes {
                bar.finish_and_clear();
                self.bar = None;
            }
            return;
        }
        if let Some(line) = self.line(done, bytes) {
            say(&line);
        }
    }

    /// What to say where there is no terminal: something at each tenth, and nothing as a file begins.
    fn line(&mut self, done: u64, bytes: u64) -> Option<String> {
        let tenths = done * 10 / bytes.max(1);
        let before = std::mem::replace(&mut self.tenths, tenths);
        let is_due = tenths != before && tenths > 0;
        is_due.then(|| format!("{} of {}", DecimalBytes(done), DecimalBytes(bytes)))
    }
}

impl Drop for DownloadProgress {
    /// A download that failed leaves no bar behind.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A bar over `pictures` pictures; hidden where standard error is no terminal. [`print()`] and [`say`] make
/// it step aside.
pub fn bar_of_pictures(pictures: u64) -> ProgressBar {
    let bar = bar(PICTURE_TEMPLATE);
    bar.set_length(pictures);
    bar
}

/// Whether standard error is a terminal, and not one that only shows lines (`TERM=dumb`).
fn shows_bars() -> bool {
    io::stderr().is_terminal() && !BARS.is_hidden()
}

const PICTURE_TEMPLATE: &str = "{bar:24} {pos}/{len} pictures · {eta} left · {msg}";
const STEP_TEMPLATE: &str = "{bar:24} {pos}/{len} steps · {eta} left · {msg}";
const BYTE_TEMPLATE: &str =
    "{bar:24} {decimal_bytes}/{decimal_total_bytes} · {decimal_bytes_per_sec} · {eta} left";

fn bar(template: &str) -> ProgressBar {
    let bar = match later_rank() {
        None => BARS.add(ProgressBar::new(0)),
        Some(_) => ProgressBar::hidden(),
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_terminal_a_download_says_each_tenth_and_nothing_as_a_further_file_begins() {
        let mut progress = DownloadProgress::new();
        let mut lines = |done: &[u64]| -> Vec<String> {
            let lines = done.iter().map(|&done| progress.line(done, 2_000));
            lines.flatten().collect()
        };
        assert_eq!(
            lines(&[0, 199, 200, 399, 2_000]),
            ["200 B of 2.00 kB", "2.00 kB of 2.00 kB"]
        );
        assert_eq!(lines(&[0, 1, 1_000]), ["1.00 kB of 2.00 kB"]);
    }
}
