//! How a run tells the outside how it goes. The library itself prints nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use crate::evaluate::Evaluation;

/// Hears of a run's progress. Every method may be left out.
pub trait Observer {
    /// The run begins, or continues.
    fn started(&mut self, _start: &StartReport) {}
    /// A training step is done.
    fn step_done(&mut self, _report: &StepReport) {}
    /// A batch of the features that are computed once is done, see
    /// [`Model::fixed_features`](crate::Model::fixed_features).
    fn features_progress(&mut self, _set: &str, _images_done: u64, _images: u64) {}
    /// A batch of an evaluation is done.
    fn evaluation_progress(&mut self, _set: &str, _images_done: u64, _images: u64) {}
    /// An epoch is done, evaluations included.
    fn epoch_done(&mut self, _report: &EpochReport) {}
    /// A checkpoint is complete.
    fn checkpoint_saved(&mut self, _path: &Path, _step: u64) {}
}

/// An observer that looks away.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Observer for Silent {}

/// What is about to be run.
#[derive(Debug, Clone, Copy)]
pub struct StartReport {
    /// Steps already made; 0 for a new run.
    pub steps_done: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Epochs of the run.
    pub epochs: u64,
}

/// A step that was made. Counts from 1.
#[derive(Debug, Clone, Copy)]
pub struct StepReport {
    /// Epoch of the step.
    pub epoch: u64,
    /// Steps made.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Loss of this batch.
    pub loss: f32,
    /// Learning rate of this step.
    pub lr: f64,
    /// Images of this batch.
    pub images: u64,
    /// Mean loss over the epoch so far.
    pub epoch_loss: f64,
    /// Training accuracy over the epoch so far, 0 to 1.
    pub epoch_accuracy: f64,
    /// Time of this step, waiting for its batch included.
    pub time: Duration,
}

/// An epoch that was completed. Counts from 1. Its `Display` is the lesson's line and, below it,
/// what the lesson leaves out.
#[derive(Debug, Clone)]
pub struct EpochReport {
    /// The epoch.
    pub epoch: u64,
    /// Epochs of the run.
    pub epochs: u64,
    /// Steps made so far.
    pub step: u64,
    /// Learning rate of its last step.
    pub lr: f64,
    /// Mean training loss over its images, each at the weights of its step.
    pub train_loss: f64,
    /// Training accuracy likewise, 0 to 1.
    pub train_accuracy: f64,
    /// Training images it saw.
    pub images: u64,
    /// `validation` and `test`; empty where this epoch was not evaluated.
    pub evaluations: BTreeMap<String, Evaluation>,
    /// Time of its training steps, those before a resumption included.
    pub train_time: Duration,
    /// Time of its evaluations.
    pub evaluation_time: Duration,
}

impl EpochReport {
    /// Training speed.
    pub fn images_per_second(&self) -> f64 {
        self.images as f64 / self.train_time.as_secs_f64().max(f64::MIN_POSITIVE)
    }
}

impl fmt::Display for EpochReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Epoch {}, Loss: {:.4}", self.epoch, self.train_loss)?;
        if let Some(test) = self.evaluations.get("test") {
            write!(f, ", Accuracy: {:.2}%", 100.0 * test.accuracy())?;
        }
        write!(
            f,
            "\n  train loss {:.4} accuracy {:.2}%",
            self.train_loss,
            100.0 * self.train_accuracy
        )?;
        for (set, evaluation) in &self.evaluations {
            write!(
                f,
                " · {set} loss {:.4} accuracy {:.2}%",
                evaluation.loss,
                100.0 * evaluation.accuracy()
            )?;
        }
        write!(
            f,
            " · {:.1} images/s · {:.1} s training, {:.1} s evaluation",
            self.images_per_second(),
            self.train_time.as_secs_f64(),
            self.evaluation_time.as_secs_f64()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_prints_the_lessons_line_and_then_what_it_leaves_out() {
        let test = Evaluation {
            loss: 2.0,
            correct: 469,
            images: 2000,
        };
        let report = EpochReport {
            epoch: 1,
            epochs: 7,
            step: 10,
            lr: 1e-4,
            train_loss: 2.10331,
            train_accuracy: 0.25,
            images: 320,
            evaluations: BTreeMap::from([("test".into(), test)]),
            train_time: Duration::from_secs(4),
            evaluation_time: Duration::from_millis(500),
        };
        assert_eq!(
            report.to_string(),
            "Epoch 1, Loss: 2.1033, Accuracy: 23.45%\n  \
             train loss 2.1033 accuracy 25.00% · test loss 2.0000 accuracy 23.45% · \
             80.0 images/s · 4.0 s training, 0.5 s evaluation"
        );
    }
}
