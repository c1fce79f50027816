//! What a run leaves on disk to go on from, and at its end.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::PathBuf;

use candle_core::Tensor;

use super::{Summary, Training};
use crate::checkpoint::{self, Checkpoint, State};
use crate::config::{TrainsOn, first_change};
use crate::durable::{io_error, read, sha256_hex, write_atomically};
use crate::error::{Error, Result};
use crate::metrics::{MetricsFiles, MetricsPosition};
use crate::observer::Observer;
use crate::random::STREAM_SCHEME;
use crate::run_directory::RunDirectory;
use crate::weights;

/// Where a run is recorded.
pub(super) struct Recorder {
    pub(super) run: RunDirectory,
    pub(super) metrics: MetricsFiles,
}

impl Recorder {
    /// Opens the metrics of `run`, which a checkpoint covers up to a position.
    pub(super) fn open(run: RunDirectory, covered: MetricsPosition) -> Result<Self> {
        let metrics = MetricsFiles::open(run.path(), covered)?;
        Ok(Self { run, metrics })
    }
}

impl Training<'_> {
    /// Rank 0 saves for all; the others have no path to tell.
    pub(super) fn save_checkpoint(
        &mut self,
        observer: &mut dyn Observer,
    ) -> Result<Option<PathBuf>> {
        let Some(Recorder { run, metrics }) = &mut self.recorder else {
            return Ok(None);
        };
        let checkpoints = run.checkpoints();
        // What a checkpoint counts on is on disk before it.
        let covered = metrics.sync()?;
        let tensors = weights::detached(weights::state_dict(self.model));
        self.check_finite(&tensors)?;
        let mut metadata = self.model.metadata();
        metadata.insert("step".into(), self.position.step.to_string());
        let place = self.place(self.position.step);
        let during_save = Error::tensor("saving the optimiser", place);
        let optimizer = self.optimizer.state().map_err(during_save)?;
        let optimizer_metadata = BTreeMap::from([("optimizer".to_string(), "sgd".to_string())]);
        let state = State {
            format_version: checkpoint::FORMAT_VERSION,
            seed: self.config.seed,
            stream_scheme: STREAM_SCHEME.into(),
            position: self.position.clone(),
            schedule: self.schedule,
            settings: self.settings(),
            metrics: covered,
            data: self.data.fingerprints(),
            last_evaluation: self.last_evaluation.clone(),
        };
        let path = checkpoint::save(
            &checkpoints,
            &state,
            &weights::encode(&tensors, &metadata)?,
            &weights::encode(&optimizer, &optimizer_metadata)?,
            self.config.keep_checkpoints,
        )?;
        observer.checkpoint_saved(&path, self.position.step);
        Ok(Some(path))
    }

    pub(super) fn load_checkpoint(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let Checkpoint { path, state, .. } = checkpoint;
        let incompatible = |reason: String| Error::IncompatibleCheckpoint {
            path: path.clone(),
            reason,
        };
        if state.seed != self.config.seed {
            let reason = format!("its seed is {}, the run's {}", state.seed, self.config.seed);
            return Err(incompatible(reason));
        }
        if state.schedule != self.schedule {
            let reason = format!(
                "its schedule is {:?}, the run's {:?}",
                state.schedule, self.schedule
            );
            return Err(incompatible(reason));
        }
        let trains_on = match self.caches_training_features() {
            true => TrainsOn::Features,
            false => TrainsOn::Pictures,
        };
        let settings = self.settings();
        if let Some((name, was, is)) = first_change(&state.settings, &settings, trains_on) {
            return Err(incompatible(format!("its {name} is {was}, the run's {is}")));
        }
        state.data.check(&self.data.fingerprints())?;
        weights::load_from_bytes(self.model, &checkpoint.weights, &checkpoint.weights_path())?;
        let optimizer = weights::decode(&checkpoint.optimizer, &checkpoint.optimizer_path())?;
        self.optimizer.load_state(optimizer)?;
        self.position = state.position.clone();
        self.last_evaluation = state.last_evaluation.clone();
        Ok(())
    }

    /// A finite loss can still leave weights that are not; they must not replace good ones on disk.
    fn check_finite(&self, tensors: &[(String, Tensor)]) -> Result<()> {
        for (name, tensor) in tensors {
            let place = self.place(self.position.step);
            let finite = weights::is_finite(tensor);
            if !finite.map_err(Error::tensor("reading the weights", place))? {
                return Err(Error::NonFiniteWeights {
                    name: name.clone(),
                    epoch: self.position.epoch + 1,
                    step: self.position.step,
                });
            }
        }
        Ok(())
    }

    /// Puts the last checkpoint's weights at the root of the run and writes `finished.json`; for rank 0.
    pub(super) fn finish(&self) -> Result<Summary> {
        let Some(Recorder { run, .. }) = &self.recorder else {
            return Err(Error::RunOfRank { rank: 0 });
        };
        let checkpoints = run.checkpoints();
        let newest = checkpoint::newest_path(&checkpoints)?;
        let newest = newest.ok_or_else(|| ErrorKind::NotFound.into());
        let newest = newest.map_err(io_error("find a checkpoint in", &checkpoints))?;
        let weights = read(&newest.join(checkpoint::WEIGHTS))?;
        write_atomically(&run.path().join(checkpoint::WEIGHTS), &weights)?;
        let summary = Summary {
            steps: self.position.step,
            epochs: self.position.epoch,
            evaluations: self.last_evaluation.clone(),
            weights_sha256: sha256_hex(&weights),
        };
        run.write_finished(&summary)?;
        Ok(summary)
    }
}
