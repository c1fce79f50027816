//! The settings of a training run, fully resolved.

use std::collections::BTreeMap;

use cifar_data::Normalization;
use serde::{Deserialize, Serialize};

use crate::schedule::Schedule;
use crate::sgd::SgdConfig;

/// Everything that decides the numbers of a run, apart from the model and the data.
///
/// The default is a plain run: one epoch of batch 32 in shuffled order.
///
/// A run is resumed with the settings that it began with. Only `epochs`, `evaluate_every_epochs`, `checkpoint_every_steps` and
/// `keep_checkpoints` may be others, and `evaluation_batch_size` where no features are kept to train on
/// ([`Model::fixed_features`](crate::Model::fixed_features)): so it can be made longer, as long as its schedule does not depend on the
/// length, as [`Schedule::Cosine`] does, and `max_steps` is not what ended it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingConfig {
    /// Passes over the training set.
    pub epochs: u64,
    /// Ends the run after this many steps, even inside an epoch.
    pub max_steps: Option<u64>,
    /// Images a step; the last batch of an epoch may be smaller.
    pub batch_size: usize,
    /// Images a batch of evaluation, and of the computation of features that are kept. Decides speed and memory, and no more than
    /// the rounding of what comes out.
    pub evaluation_batch_size: usize,
    /// Source of all randomness, see [`crate::random`].
    pub seed: u64,
    /// A new order of images each epoch; otherwise the order of the set.
    pub shuffle: bool,
    /// The optimiser.
    pub optimizer: SgdConfig,
    /// How the learning rate changes.
    pub schedule: Schedule,
    /// ε of label smoothing in the training loss; evaluation never smooths.
    pub label_smoothing: f64,
    /// Evaluates after every so many epochs; the last epoch is always evaluated. 0: only the last.
    pub evaluate_every_epochs: u64,
    /// Saves a checkpoint after every so many steps, besides the one after each epoch. 0: none.
    pub checkpoint_every_steps: u64,
    /// Checkpoints to keep; older ones are removed once a newer one is complete.
    pub keep_checkpoints: usize,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        Self {
            epochs: 1,
            max_steps: None,
            batch_size: 32,
            evaluation_batch_size: 64,
            seed: 0,
            shuffle: true,
            optimizer: SgdConfig::default(),
            schedule: Schedule::Constant,
            label_smoothing: 0.0,
            evaluate_every_epochs: 1,
            checkpoint_every_steps: 200,
            keep_checkpoints: 2,
        }
    }
}

impl TrainingConfig {
    /// Refuses settings that cannot be run.
    ///
    /// # Errors
    /// [`ConfigError`] with the first setting that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let at_least_one = [
            ("epochs", self.epochs),
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("batch_size", self.batch_size as u64),
            ("evaluation_batch_size", self.evaluation_batch_size as u64),
            ("keep_checkpoints", self.keep_checkpoints as u64),
        ];
        for (setting, found) in at_least_one {
            if found == 0 {
                return Err(ConfigError {
                    setting,
                    found: "0".into(),
                    expected: "at least 1",
                });
            }
        }
        if !(0.0..1.0).contains(&self.label_smoothing) {
            return Err(ConfigError {
                setting: "label_smoothing",
                found: self.label_smoothing.to_string(),
                expected: "at least 0 and less than 1",
            });
        }
        self.optimizer.validate()
    }

    /// Batches in one epoch over `images` images, the last partial one included.
    pub fn steps_per_epoch(&self, images: usize) -> u64 {
        images.div_ceil(self.batch_size.max(1)) as u64
    }

    /// Steps of the whole run.
    pub fn total_steps(&self, images: usize) -> u64 {
        let all = self.epochs.saturating_mul(self.steps_per_epoch(images));
        self.max_steps.map_or(all, |limit| limit.min(all))
    }
}

/// Every setting by name, as ranks and checkpoints compare them.
pub(crate) fn described(
    config: &TrainingConfig,
    normalization: Normalization,
) -> BTreeMap<String, String> {
    let fields = match serde_json::to_value(config) {
        Ok(serde_json::Value::Object(fields)) => fields,
        // A struct of numbers is an object.
        _ => serde_json::Map::new(),
    };
    let Normalization { mean, std } = normalization;
    let normalization = (
        "normalization".to_string(),
        format!("mean {mean:?}, standard deviation {std:?}"),
    );
    let fields = fields
        .into_iter()
        .map(|(name, value)| (name, value.to_string()));
    fields.chain([normalization]).collect()
}

/// The first setting that decides what steps a run makes and is not what it was: its name, what it was, and what it is. A run may be
/// made longer, and evaluated and saved at other times.
pub(crate) fn first_change<'a>(
    recorded: &'a BTreeMap<String, String>,
    now: &'a BTreeMap<String, String>,
    trains_on: TrainsOn,
) -> Option<(&'a str, &'a str, &'a str)> {
    let is_free = |name: &str| match name {
        "epochs" | "evaluate_every_epochs" | "checkpoint_every_steps" | "keep_checkpoints" => true,
        "evaluation_batch_size" => trains_on == TrainsOn::Pictures,
        _ => false,
    };
    let mut pairs = recorded.iter().filter(|(name, _)| !is_free(name));
    pairs.find_map(|(name, was)| {
        let is = now.get(name).filter(|is| *is != was)?;
        Some((name.as_str(), was.as_str(), is.as_str()))
    })
}

/// What the steps of a run take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TrainsOn {
    Pictures,
    /// Computed once, in batches of the evaluation: of other ones a GPU may round them otherwise.
    Features,
}

/// A setting that cannot be run.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{setting} is {found}; it must be {expected}")]
pub struct ConfigError {
    /// Name of the setting.
    pub setting: &'static str,
    /// The setting's value.
    pub found: String,
    /// What would be accepted.
    pub expected: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_counts_are_refused_by_name() {
        type Change = fn(&mut TrainingConfig);
        let cases: [(&str, Change); 4] = [
            ("epochs", |c| c.epochs = 0),
            ("max_steps", |c| c.max_steps = Some(0)),
            ("batch_size", |c| c.batch_size = 0),
            ("keep_checkpoints", |c| c.keep_checkpoints = 0),
        ];
        assert_eq!(TrainingConfig::default().validate(), Ok(()));
        for (name, break_it) in cases {
            let mut config = TrainingConfig::default();
            break_it(&mut config);
            assert_eq!(config.validate().unwrap_err().setting, name);
        }
    }

    #[test]
    fn the_last_partial_batch_counts_as_a_step() {
        let config = TrainingConfig {
            epochs: 2,
            batch_size: 4,
            ..Default::default()
        };
        assert_eq!(config.steps_per_epoch(9), 3);
        assert_eq!(config.total_steps(9), 6);
    }
}
