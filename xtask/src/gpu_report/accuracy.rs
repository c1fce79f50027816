//! Training the lesson's 7 epochs, ours and PyTorch's.

use std::fmt;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::gpu;
use super::runs::{Runs, words};
use crate::workspace::repository;

/// What came of training the lesson's 7 epochs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// On the test set, in percent.
    Accuracy(f64),
    /// At this step the loss was not finite any more.
    Diverged(u64),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accuracy(accuracy) => write!(f, "{accuracy:.2}"),
            Self::Diverged(step) => write!(f, "diverged at step {step}"),
        }
    }
}

impl Runs<'_> {
    pub(super) fn accuracy(&self, data: &Path, seed: u32) -> Result<Outcome> {
        let mut arguments = words(&format!("--device cuda --seed {seed}"));
        arguments.extend(["--data-dir".into(), data.into()]);
        let name = format!("accuracy-{seed}");
        let read = ("finished.json", test_accuracy);
        match self.train("scratch-train", &name, &arguments, read) {
            Ok(accuracy) => Ok(Outcome::Accuracy(accuracy)),
            Err(error) => {
                let step = step_of_divergence(&error.to_string()).ok_or(error)?;
                self.remove(&name);
                Ok(Outcome::Diverged(step))
            }
        }
    }
}

/// In percent, as `finished.json` has it.
fn test_accuracy(text: &str) -> Result<f64> {
    let summary: trainer::Summary = serde_json::from_str(text)?;
    let test = summary.evaluations.get("test");
    Ok(100.0 * test.context("no test evaluation")?.accuracy())
}

/// The step that a program names where it says that training has diverged.
fn step_of_divergence(log: &str) -> Option<u64> {
    let (before, _) = log.split_once(": training has diverged")?;
    let (before, _) = before.rsplit_once(" (epoch ")?;
    before.split_whitespace().next_back()?.parse().ok()
}

/// Calls `f` with what train_lesson.py says of each seed, as soon as it is known. By the fastest PyTorch, which computes the same:
/// eager it takes three minutes a seed and more.
pub(super) fn pytorch_lesson(
    python: &Path,
    data: &Path,
    seeds: u32,
    mut f: impl FnMut(Trained) -> Result<()>,
) -> Result<()> {
    let mut command = Command::new(python);
    gpu::in_order(&mut command)
        .arg(repository().join("tools/pytorch/train_lesson.py"))
        .args(["--device", "cuda", "--compile", "--data-dir"])
        .arg(data)
        .arg("--seed")
        .args((0..seeds).map(|seed| seed.to_string()))
        .stdout(Stdio::piped());
    let mut process = command
        .spawn()
        .with_context(|| format!("cannot start {}", python.display()))?;
    let answers = process.stdout.take().context("a piped stdout is there")?;
    let outcome = BufReader::new(answers).lines().try_for_each(|line| {
        let line = line?;
        let trained = serde_json::from_str(&line)
            .with_context(|| format!("train_lesson.py answered {line:?}"))?;
        f(trained)
    });
    if outcome.is_err() {
        let _ = process.kill();
    }
    let status = process.wait()?;
    outcome?;
    ensure!(status.success(), "train_lesson.py failed: see above");
    Ok(())
}

/// What train_lesson.py prints of a seed.
#[derive(Debug, Deserialize)]
pub(super) struct Trained {
    pub(super) seed: u32,
    /// In percent.
    accuracy: Option<f64>,
    /// The step.
    diverged: Option<u64>,
    pub(super) framework: String,
}

impl Trained {
    pub(super) fn outcome(&self) -> Result<Outcome> {
        let diverged = self.diverged.map(Outcome::Diverged);
        diverged
            .or(self.accuracy.map(Outcome::Accuracy))
            .with_context(|| format!("train_lesson.py says nothing of seed {}", self.seed))
    }
}

#[cfg(test)]
mod tests {
    #[cfg(unix)]
    use std::fs;
    #[cfg(unix)]
    use std::path::PathBuf;

    use super::*;
    #[cfg(unix)]
    use crate::gpu_report::runs::runs_in;

    /// A program of that name in `dir`.
    #[cfg(unix)]
    fn program(dir: &Path, name: &str, script: &str) -> PathBuf {
        let [text, program] = ["text", name].map(|name| dir.join(name));
        fs::write(&text, format!("#!/bin/sh\n{script}\n")).unwrap();
        // By another process: what this one has open for writing, a child that another test starts at the time may hold
        // open too, and then it cannot be started.
        let installed = Command::new("install")
            .args(["-m", "700"])
            .args([&text, &program])
            .status();
        assert!(installed.unwrap().success());
        program
    }

    #[test]
    #[cfg(unix)]
    fn a_run_is_removed_once_its_outcome_is_known_and_kept_if_it_fails() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        // --out DIR comes last.
        let run = r#"for out; do :; done; run=$out/scratch-train/run; mkdir -p "$run""#;
        let outcome_of = |seed: u32, end: &str| {
            program(dir, "scratch-train", &format!("{run}\n{end}"));
            runs_in(dir).accuracy(Path::new("data"), seed)
        };
        let is_kept = |seed: u32| {
            dir.join(format!("accuracy-{seed}/scratch-train/run"))
                .exists()
        };

        let test = r#"{"test": {"loss": 1.5, "correct": 5, "images": 8}}"#;
        let finished =
            format!(r#"{{"steps": 9, "epochs": 7, "evaluations": {test}, "weights_sha256": ""}}"#);
        let outcome = outcome_of(0, &format!("echo '{finished}' > \"$run/finished.json\""));
        assert_eq!(outcome.unwrap(), Outcome::Accuracy(62.5));
        assert!(!is_kept(0));

        let diverged = "echo 'error: step 23 (epoch 1): training has diverged' >&2; exit 1";
        assert_eq!(outcome_of(1, diverged).unwrap(), Outcome::Diverged(23));
        assert!(!is_kept(1));

        let error = outcome_of(2, "echo 'error: no memory' >&2; exit 1").unwrap_err();
        assert!(error.to_string().contains("no memory"), "{error}");
        assert!(is_kept(2));
        assert!(outcome_of(3, "echo '{}' > \"$run/finished.json\"").is_err());
        assert!(is_kept(3));
    }

    /// What is read of a program in the place of Python, and what comes of it.
    #[cfg(unix)]
    fn lesson_by(script: &str) -> (Vec<(u32, Outcome)>, Result<()>) {
        let dir = tempfile::tempdir().unwrap();
        let python = program(dir.path(), "python", script);
        let mut outcomes = Vec::new();
        let end = pytorch_lesson(&python, Path::new("data"), 2, |trained| {
            outcomes.push((trained.seed, trained.outcome()?));
            Ok(())
        });
        (outcomes, end)
    }

    #[test]
    #[cfg(unix)]
    fn every_seed_of_pytorch_counts_up_to_a_failure() {
        let first =
            r#"echo '{"seed": 0, "diverged": null, "accuracy": 55.5, "framework": "PyTorch"}'"#;
        let seeds = r#"echo "{\"seed\": 1, \"diverged\": $#, \"framework\": \"\"}""#;
        let known = (0, Outcome::Accuracy(55.5));
        // --device cuda --compile --data-dir data --seed 0 1, after the script.
        let (outcomes, end) = lesson_by(&format!("{first}\n{seeds}"));
        assert_eq!(outcomes, [known, (1, Outcome::Diverged(9))]);
        end.unwrap();

        let (outcomes, end) = lesson_by(&format!("{first}\nexit 3"));
        assert_eq!(outcomes, [known]);
        assert!(end.unwrap_err().to_string().contains("failed"));

        let (outcomes, end) = lesson_by(&format!("{first}\necho no JSON\nexec sleep 20"));
        assert_eq!(outcomes, [known]);
        assert!(end.unwrap_err().to_string().contains("no JSON"));
    }

    #[test]
    fn a_divergence_is_told_from_other_failures() {
        let diverged = trainer::Error::NonFiniteLoss {
            epoch: 1,
            step: 23,
            loss: f32::NAN,
            steps_made: 65,
            last_checkpoint: trainer::LastCheckpoint::None,
        };
        let log = format!("scratch-train failed: Run: x\nerror: {diverged}");
        assert_eq!(step_of_divergence(&log), Some(23));
        assert_eq!(step_of_divergence("error: no such file"), None);
    }

    #[test]
    fn an_answer_has_an_accuracy_or_a_step() {
        let outcome_of = |line: &str| serde_json::from_str::<Trained>(line).unwrap().outcome();
        let line = r#"{"seed": 2, "diverged": null, "accuracy": 55.5, "loss": 1.2, "images_per_second": 5, "framework": "PyTorch"}"#;
        assert_eq!(outcome_of(line).unwrap(), Outcome::Accuracy(55.5));
        let line = r#"{"seed": 4, "diverged": 19, "framework": "PyTorch"}"#;
        assert_eq!(outcome_of(line).unwrap(), Outcome::Diverged(19));
        assert!(outcome_of(r#"{"seed": 4, "framework": "PyTorch"}"#).is_err());
    }
}
