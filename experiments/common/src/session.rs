//! One process' share of a run, from its device to its exit code.

use std::borrow::Cow;
use std::io::ErrorKind;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use candle_core::Device;
use data_parallel::ProcessGroup;
use serde::Serialize;
use trainer::{
    DataSets, Error, Execution, Model, Observer, Outcome, RunDirectory, Silent, Summary, Training,
    TrainingConfig,
};

use crate::advice::advised;
use crate::experiment::RunConfig;
use crate::parallel::{Role, connect, facts};
use crate::profile::Profile;
use crate::progress::{Progress, print};
use crate::signals::StopSignals;

/// What one process trains by.
pub(crate) struct Session<'a> {
    /// The processes that train together, where there are several. Left before the device goes.
    group: Option<ProcessGroup>,
    pub(crate) device: Device,
    execution: Execution,
    profile: Option<&'a Profile>,
}

impl<'a> Session<'a> {
    /// Starts the device and joins the other processes, who must be of the same `program` (name and version) with the same
    /// settings.
    ///
    /// # Errors
    /// As [`ComputeConfig::start`](crate::ComputeConfig::start) and [`connect`].
    pub(crate) fn open<M: Serialize>(
        program: (&str, &str),
        config: &RunConfig<M>,
        role: &Role,
        profile: Option<&'a Profile>,
    ) -> Result<Self> {
        let device = config.compute.start()?;
        Ok(Self {
            group: connect(role, &device, facts(program, config)?)?,
            execution: config.compute.execution(&device),
            device,
            profile,
        })
    }

    /// Does this process' work, and tells the others when it fails.
    ///
    /// # Errors
    /// Those of `work`.
    pub(crate) fn work<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let result = work();
        if let (Some(group), Err(error)) = (&self.group, &result) {
            group.give_up(&format!("{error:#}"));
        }
        result
    }

    /// Whether any of the processes says yes.
    ///
    /// # Errors
    /// Another process that is gone.
    pub(crate) fn any(&self, yes: bool) -> Result<bool> {
        let mut count = [u64::from(yes)];
        if let Some(group) = &self.group {
            group.all_reduce_sum(&mut count)?;
        }
        Ok(count[0] > 0)
    }

    /// Trains until the run is finished (exit code 0) or a signal stops it (128 and its number), and says what
    /// came of it. What the profile has collected is printed and saved in the run's folder. Of processes that
    /// train together only the first has a `run`, and only it prints; a signal to one stops all.
    ///
    /// # Errors
    /// The trainer's.
    pub(crate) fn train(
        &self,
        model: &dyn Model,
        data: DataSets,
        config: TrainingConfig,
        run: Option<RunDirectory>,
    ) -> Result<ExitCode> {
        let signals = StopSignals::install()?;
        let stop = || signals.received().is_some();
        let run_with = |training: trainer::Result<Training<'_>>, observer: &mut dyn Observer| {
            training.and_then(|training| training.executed(self.execution).run(observer, &stop))
        };
        let (run, group) = match (run, &self.group) {
            (Some(run), group) => (run, group),
            (None, Some(group)) => {
                let training =
                    Training::distributed(model, data, &self.device, config, None, group);
                return match run_with(training, &mut Silent).map_err(advised)? {
                    Outcome::Finished(_) => Ok(ExitCode::SUCCESS),
                    Outcome::Stopped { .. } => Ok(stopped(&signals).1),
                };
            }
            (None, None) => anyhow::bail!("a process that is alone needs a run directory"),
        };
        let (dir, experiment) = (run.path().to_path_buf(), run.experiment().to_string());
        print(&format!("Run: {}", dir.display()));
        let mut progress = Progress::new();
        let training = match group {
            Some(group) => {
                Training::distributed(model, data, &self.device, config, Some(run), group)
            }
            None => Training::new(model, data, &self.device, config, run),
        };
        let outcome = run_with(training, &mut progress);
        progress.end();
        let outcome = outcome.map_err(|error| match is_of_the_machine(&error) {
            true => anyhow!(
                "{:#}. Once that is mended, the run goes on with\n  {}",
                advised(error),
                resume_command(&experiment, &dir)
            ),
            false => advised(error),
        })?;
        if let Some(profile) = self.profile {
            profile.write(&dir)?;
            print(profile.table().trim_end());
        }
        match outcome {
            Outcome::Finished(summary) => {
                print_finished(&dir.display().to_string(), &summary);
                Ok(ExitCode::SUCCESS)
            }
            Outcome::Stopped { step, checkpoint } => {
                let (cause, exit_code) = stopped(&signals);
                print(&format!(
                    "Stopped by {cause} after step {step}; saved as {}. Continue with\n  {}",
                    checkpoint.display(),
                    resume_command(&experiment, &dir)
                ));
                Ok(exit_code)
            }
        }
    }
}

/// Whether a disk or a process is to blame, and not the run itself: it can be resumed once that is mended.
fn is_of_the_machine(error: &Error) -> bool {
    use data_parallel::Error::{Lost, Silent, Stuck};
    match error {
        // The same command would fail in the same way.
        Error::Io { source, .. } => source.kind() != ErrorKind::NotFound,
        Error::Group(error) => matches!(error, Lost { .. } | Silent { .. } | Stuck { .. }),
        _ => false,
    }
}

/// What to type in a shell to go on, with the features of this build.
fn resume_command(experiment: &str, dir: &Path) -> String {
    let features = match (cfg!(feature = "nccl"), cfg!(feature = "cuda")) {
        (true, _) => " --features nccl",
        (_, true) => " --features cuda",
        _ => "",
    };
    let dir = quoted(dir);
    format!("cargo run -p {experiment}{features} -- --resume {dir}")
}

/// A folder as a shell takes it for one word.
pub(crate) fn quoted(dir: &Path) -> String {
    let dir = dir.to_string_lossy();
    // Only a zero byte cannot be quoted, and no path has one.
    shlex::try_quote(&dir)
        .unwrap_or(Cow::Borrowed(&dir))
        .into_owned()
}

/// What stopped a run, and the exit code that says so. Without a signal here it was one to another of
/// the processes that train together.
fn stopped(signals: &StopSignals) -> (&'static str, ExitCode) {
    match signals.received() {
        Some(signal) => (signal.name, ExitCode::from(signal.exit_code())),
        None => ("a signal to another rank", ExitCode::from(INTERRUPTED)),
    }
}

/// The exit code of SIGINT by the shell's convention.
const INTERRUPTED: u8 = 130;

/// Prints the results of a finished run.
pub(crate) fn print_finished(dir: &str, summary: &Summary) {
    for (set, evaluation) in &summary.evaluations {
        print(&format!(
            "Final {set} accuracy: {:.2}% ({} of {}), loss {:.4}",
            100.0 * evaluation.accuracy(),
            evaluation.correct,
            evaluation.images,
            evaluation.loss
        ));
    }
    print(&format!(
        "Weights: {dir}/model.safetensors (SHA-256 {})",
        summary.weights_sha256
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_to_be_resumed_after_a_failure_of_the_machine_alone() {
        let disk = Error::Io {
            action: "write",
            path: "metrics.csv".into(),
            source: ErrorKind::StorageFull.into(),
        };
        assert!(is_of_the_machine(&disk));
        let gone = Error::Io {
            action: "open",
            path: "metrics.csv".into(),
            source: ErrorKind::NotFound.into(),
        };
        assert!(!is_of_the_machine(&gone));
        let gone = data_parallel::Error::Lost {
            rank: 1,
            during: "all_reduce_sum",
            source: std::io::ErrorKind::ConnectionReset.into(),
        };
        assert!(is_of_the_machine(&Error::Group(gone)));
        let unsupported = data_parallel::Error::Unsupported { what: "x".into() };
        assert!(!is_of_the_machine(&Error::Group(unsupported)));
        assert!(!is_of_the_machine(&Error::EmptySet { set: "train" }));
    }

    #[test]
    fn the_command_that_resumes_a_run_is_one_of_this_build_that_a_shell_understands() {
        let command = resume_command("scratch-train", Path::new("my runs/it's"));
        let words = shlex::split(&command).unwrap();
        assert_eq!(words.last().unwrap(), "my runs/it's");
        assert_eq!(command.contains("--features"), cfg!(feature = "cuda"));
        let plain = resume_command(
            "scratch-train",
            Path::new("runs/scratch-train/2026-11-26T22-46-08Z"),
        );
        assert!(plain.ends_with("--resume runs/scratch-train/2026-11-26T22-46-08Z"));
    }
}
