//! One process' share of a run, from its folder to its exit code.

use std::process::ExitCode;

use anyhow::Result;
use candle_core::Device;
use trainer::{
    DataSets, Execution, Model, Outcome, RunDirectory, Summary, Training, TrainingConfig,
};

use crate::profile::Profile;
use crate::progress::{Progress, print};
use crate::signals::StopSignals;

/// Trains until the run is finished (exit code 0) or a signal stops it (130 or 143), and says what
/// came of it. What `profile` has collected is printed and saved in the run's folder.
///
/// # Errors
/// The trainer's.
pub fn train(
    model: &dyn Model,
    data: DataSets,
    (device, execution): (&Device, Execution),
    config: TrainingConfig,
    run: RunDirectory,
    profile: Option<&Profile>,
) -> Result<ExitCode> {
    let (dir, experiment) = (run.path().to_path_buf(), run.experiment().to_string());
    print(&format!("Run: {}", dir.display()));
    let signals = StopSignals::install()?;
    let mut progress = Progress::new();
    let outcome = Training::new(model, data, device, config, run)
        .map(|training| training.executed(execution))
        .and_then(|mut training| training.run(&mut progress, &|| signals.received().is_some()));
    progress.end();
    let outcome = outcome?;
    if let Some(profile) = profile {
        print(profile.table().trim_end());
        profile.write(&dir)?;
    }
    match outcome {
        Outcome::Finished(summary) => {
            print_finished(&dir.display().to_string(), &summary);
            Ok(ExitCode::SUCCESS)
        }
        Outcome::Stopped { step, checkpoint } => {
            let signal = signals.received();
            print(&format!(
                "Stopped by {} after step {step}; saved as {}. Continue with\n  \
                 cargo run -p {experiment} -- --resume {}",
                signal.map_or("request", |signal| signal.name),
                checkpoint.display(),
                dir.display()
            ));
            Ok(ExitCode::from(signal.map_or(1, |signal| signal.exit_code)))
        }
    }
}

/// Prints the results of a finished run.
pub fn print_finished(dir: &str, summary: &Summary) {
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
