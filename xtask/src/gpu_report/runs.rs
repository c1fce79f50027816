//! Our programs: how they are run, and what is kept of them.

use std::cell::RefCell;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Report, gpu};

/// Our programs and where they may work.
pub(super) struct Runs<'a> {
    pub(super) programs: &'a Path,
    pub(super) work: &'a Path,
    /// Where the log of each run goes that has one.
    pub(super) logs: &'a Path,
    pub(super) rehearse: bool,
    pub(super) skip_other_ways: bool,
    /// What programs warned of.
    pub(super) warnings: RefCell<Vec<String>>,
    /// How a program described the GPU and what it is used through.
    pub(super) device: RefCell<Option<String>>,
    /// When all is to be done.
    pub(super) end: Option<Instant>,
}

impl Runs<'_> {
    /// Whether a part that takes about so long will end in time; else notes that it was left out.
    pub(super) fn has_time(&self, report: &mut Report, part: &str, needs: Duration) -> bool {
        let is_late = self.time_left().is_some_and(|left| needs > left);
        if is_late {
            report.leave_out_for_want_of_time(part);
        }
        !is_late
    }

    /// Up to the limit, where there is one.
    pub(super) fn time_left(&self) -> Option<Duration> {
        let end = self.end?;
        Some(end.saturating_duration_since(Instant::now()))
    }

    /// Keeps what a program wrote of itself, and what it warned of.
    fn keep_log(&self, name: &str, log: &str) -> Result<()> {
        if log.is_empty() {
            return Ok(());
        }
        let path = self.logs.join(format!("{name}.log"));
        fs::create_dir_all(self.logs)
            .and_then(|()| fs::write(&path, log))
            .with_context(|| format!("cannot write {}", path.display()))?;
        self.warnings.borrow_mut().extend(warnings(name, log));
        if let Some(device) = device_of(log) {
            self.device.replace(Some(device));
        }
        Ok(())
    }

    /// Runs a program to its end; what `read` takes from this file of its run. The run is removed then, since its checkpoints
    /// are large, and one that fails is kept, to be looked into.
    pub(super) fn train<T>(
        &self,
        program: &str,
        name: &str,
        arguments: &[OsString],
        (file, read): (&str, impl FnOnce(&str) -> Result<T>),
    ) -> Result<T> {
        let out = self.work.join(name);
        let output = gpu::in_order(&mut Command::new(self.programs.join(program)))
            .args(arguments)
            .arg("--out")
            .arg(&out)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .output()
            .with_context(|| format!("cannot start {program}"))?;
        let log = String::from_utf8_lossy(&output.stderr);
        self.keep_log(name, &log)?;
        ensure!(output.status.success(), "{program} failed: {}", log.trim());
        let runs = out.join(program);
        let mut entries =
            fs::read_dir(&runs).with_context(|| format!("cannot read {}", runs.display()))?;
        let run = entries.next().context("the program made no run")??;
        let path = run.path().join(file);
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let taken = read(&text)?;
        self.remove(name);
        Ok(taken)
    }

    /// Removes what a program wrote under this name; where that cannot be done, it takes room and does no other harm.
    pub(super) fn remove(&self, name: &str) {
        let _ = fs::remove_dir_all(self.work.join(name));
    }
}

/// The GPU that a program said it runs on.
fn device_of(log: &str) -> Option<String> {
    let device = log.lines().find_map(|line| line.strip_prefix("Device: "))?;
    device.starts_with("cuda").then(|| device.to_string())
}

/// The lines of a log that warn.
fn warnings(name: &str, log: &str) -> Vec<String> {
    let lines = log.lines().filter(|line| line.contains(" WARN "));
    lines
        .map(|line| format!("{name}: {}", line.trim()))
        .collect()
}

/// The arguments of a command line without spaces in them.
pub(super) fn words(text: &str) -> Vec<OsString> {
    text.split_whitespace().map(OsString::from).collect()
}

/// Everything in one folder, and no limit.
#[cfg(test)]
pub(super) fn runs_in(dir: &Path) -> Runs<'_> {
    Runs {
        programs: dir,
        work: dir,
        logs: dir,
        rehearse: false,
        skip_other_ways: false,
        warnings: RefCell::default(),
        device: RefCell::default(),
        end: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_end_too_late_is_left_out_by_name() {
        let ending = |end: Option<Duration>| Runs {
            end: end.map(|end| Instant::now() + end),
            ..runs_in(Path::new(""))
        };
        let (long, short) = (Duration::from_secs(1000), Duration::from_secs(1));
        let mut report = Report::default();
        assert!(ending(None).has_time(&mut report, "a", long));
        assert!(ending(Some(long)).has_time(&mut report, "b", short));
        assert!(!ending(Some(short)).has_time(&mut report, "c", long));
        assert_eq!(report.left_out, ["c (for want of time)"]);
    }

    #[test]
    fn warnings_and_the_device_are_read_from_a_log() {
        let log = "Run: x\n WARN it cannot be recorded\nDEBUG an engine\nstep 1\n";
        assert_eq!(
            warnings("lesson-32-0", log),
            ["lesson-32-0: WARN it cannot be recorded"]
        );

        let log = "x\nDevice: cuda:0, NVIDIA H200 with 139.8 GiB\nData: y\n";
        let device = device_of(log).unwrap();
        assert_eq!(device, "cuda:0, NVIDIA H200 with 139.8 GiB");
        assert_eq!(device_of("Device: the CPU; no GPU can be used\n"), None);
    }
}
