//! The loop: steps, epochs, evaluations, checkpoints.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_cnn::{CrossEntropyConfig, Mode, backward, cross_entropy};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use cifar_data::{ImageSet, shuffled_order};
use data_parallel::ProcessGroup;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, Position};
use crate::config::{TrainingConfig, described};
use crate::data::{DataSets, Examples, TRAIN};
use crate::distributed::{BatchPart, Processes, Share};
use crate::error::{Error, LastCheckpoint, Place, Result};
use crate::evaluate::{Evaluation, count_correct, scalar};
use crate::execution::{Execution, without_benchmark_if};
use crate::features::FeatureCache;
use crate::metrics::{CsvRow, Metric};
use crate::model::{Model, TrainOutput};
use crate::observer::{EpochReport, Observer, StartReport, StepReport};
use crate::profile::Parts;
use crate::random;
use crate::resident::ResidentSet;
use crate::run_directory::RunDirectory;
use crate::schedule::ResolvedSchedule;
use crate::sgd::Sgd;
use crate::weights;
use on_device::OnDevice;
use saving::Recorder;

/// A run in progress.
///
/// Its whole state between two steps is the model's weights, the optimiser's buffers and a
/// position; a checkpoint holds these three, so that going on from one gives the same bits as
/// never having stopped.
pub struct Training<'a> {
    model: &'a dyn Model,
    data: DataSets,
    device: Device,
    config: TrainingConfig,
    optimizer: Sgd,
    schedule: ResolvedSchedule,
    /// That of rank 0; no other has one.
    recorder: Option<Recorder>,
    processes: Processes<'a>,
    /// The parameters that the optimiser moves, in an order that all ranks have.
    trainable: Vec<Var>,
    position: Position,
    last_evaluation: BTreeMap<String, Evaluation>,
    /// Features of networks with [`Model::fixed_features`]. Computed by each process anew.
    features: FeatureCache,
    execution: Execution,
    /// What a [resident](Execution::resident) run keeps on its device.
    on_device: Option<OnDevice>,
    /// The sets that such a run has been evaluated on, in f32.
    evaluated: BTreeMap<&'static str, Arc<ResidentSet>>,
}

/// How [`Training::run`] ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// All steps are made.
    Finished(Summary),
    /// `stop` asked for it.
    Stopped {
        /// Steps made.
        step: u64,
        /// Where to go on from.
        checkpoint: PathBuf,
    },
}

/// What a finished run ended with; the contents of `finished.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Steps made.
    pub steps: u64,
    /// Epochs completed, a last partial one included.
    pub epochs: u64,
    /// The last evaluation of each set.
    pub evaluations: BTreeMap<String, Evaluation>,
    /// Hash of `model.safetensors`.
    pub weights_sha256: String,
}

impl<'a> Training<'a> {
    /// Prepares to train `model` in `run`: from the newest checkpoint there, which then overwrites
    /// the model's weights, or from the beginning when there is none.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::EmptySet`], [`Error::Weights`] for a name that comes twice or cannot be saved, or a
    /// tensor of a type that is not saved, [`Error::NothingTrains`], [`Error::DataChanged`],
    /// [`Error::IncompatibleCheckpoint`] where a setting is not what the run began with
    /// ([`TrainingConfig`] says which may change), and what else loading a checkpoint can say.
    pub fn new(
        model: &'a dyn Model,
        data: DataSets,
        device: &Device,
        config: TrainingConfig,
        run: RunDirectory,
    ) -> Result<Self> {
        Self::with(model, data, device, config, Some(run), Processes(None))
    }

    /// Prepares to train `model` together with the other processes of `group`. All of them call this,
    /// with the same data and settings; rank 0 has a `run`, no other has one, and only it writes. Without
    /// a checkpoint all begin with rank 0's weights.
    ///
    /// The batch size is that of all ranks together: each takes its contiguous part of every batch,
    /// so that the steps are those of one process with the same settings, up to rounding. Three
    /// things are not: batch norm takes its statistics from a rank's own part (the running ones that
    /// are evaluated and saved are rank 0's), dropout has masks of its own on each rank
    /// ([`random::dropout_seed_of_rank`]), and sums are made in another order.
    ///
    /// # Errors
    /// As [`Training::new`]; [`Error::Group`], [`Error::RunOfRank`] where rank 0 has no `run` or another
    /// has one, and [`Error::Config`] for batches with fewer images than there are ranks.
    pub fn distributed(
        model: &'a dyn Model,
        data: DataSets,
        device: &Device,
        config: TrainingConfig,
        run: Option<RunDirectory>,
        group: &'a ProcessGroup,
    ) -> Result<Self> {
        let processes = Processes((group.world_size() > 1).then_some(group));
        processes.report_error(Self::with(model, data, device, config, run, processes))
    }

    fn with(
        model: &'a dyn Model,
        data: DataSets,
        device: &Device,
        config: TrainingConfig,
        run: Option<RunDirectory>,
        processes: Processes<'a>,
    ) -> Result<Self> {
        config.validate()?;
        data.check_not_empty()?;
        let rank = processes.rank();
        if run.is_some() != (rank == 0) {
            return Err(Error::RunOfRank { rank });
        }
        processes.check(&config, &data)?;
        weights::check_savable(&weights::state_dict(model))?;
        let trainable = trainable(model)?;
        let images = data.train.len();
        let schedule = config.schedule.resolve(
            config.total_steps(images),
            config.steps_per_epoch(images),
            config.batch_size,
        )?;
        let mut checkpoint = None;
        if let Some(run) = &run {
            run.check_data(&data)?;
            if run.has_checkpoint()? {
                checkpoint = checkpoint::load_newest(&run.checkpoints())?;
            }
        }
        let covered = checkpoint.as_ref().map(|c| c.state.metrics);
        let recorder = run
            .map(|run| Recorder::open(run, covered.unwrap_or_default()))
            .transpose()?;
        let checkpoint = processes.broadcast_start(checkpoint, model)?;
        let optimizer = Sgd::new(trainable, config.optimizer)?;
        let mut training = Self {
            model,
            device: device.clone(),
            trainable: optimizer.parameters(),
            optimizer,
            schedule,
            recorder,
            processes,
            position: Position::default(),
            last_evaluation: BTreeMap::new(),
            features: FeatureCache::default(),
            execution: Execution::on(device),
            on_device: None,
            evaluated: BTreeMap::new(),
            data,
            config,
        };
        if let Some(checkpoint) = checkpoint {
            training.load_checkpoint(&checkpoint)?;
        }
        // Only now it is certain that the run goes on.
        if let Some(Recorder { run, metrics }) = &mut training.recorder {
            metrics.cut()?;
            run.record_resumption()?;
        }
        Ok(training)
    }

    /// Carries the steps out in this way instead of the device's own, [`Execution::on`].
    pub fn executed(mut self, execution: Execution) -> Self {
        self.execution = execution;
        self
    }

    /// Trains until all steps are made or `stop`, asked before each step and within evaluations,
    /// answers true, on any rank. Either way a checkpoint is saved at the end.
    ///
    /// # Errors
    /// [`Error::NonFiniteLoss`] and [`Error::NonFiniteWeights`] when training diverges;
    /// [`Error::NoGradient`] when the loss depends on no trainable parameter;
    /// [`Error::OutOfMemory`]; [`Error::Io`], [`Error::Weights`], [`Error::Data`], [`Error::Tensor`]
    /// and [`Error::Group`] when something else fails. Checkpoints saved before stay
    /// usable.
    pub fn run(&mut self, observer: &mut dyn Observer, stop: &dyn Fn() -> bool) -> Result<Outcome> {
        let outcome = self.run_to_end(observer, stop);
        self.processes.report_error(outcome)
    }

    fn run_to_end(
        &mut self,
        observer: &mut dyn Observer,
        stop: &dyn Fn() -> bool,
    ) -> Result<Outcome> {
        observer.started(&StartReport {
            steps_done: self.position.step,
            total_steps: self.total_steps(),
            epochs: self.config.epochs,
        });
        self.make_lasting_memory()?;
        while !self.is_finished() {
            let flow = match self.train_epoch(observer, stop)? {
                ControlFlow::Continue(()) => self.end_epoch(observer, stop)?,
                stopped => stopped,
            };
            let checkpoint = self.save_checkpoint(observer)?;
            if flow.is_break() {
                let step = self.position.step;
                let saved = || checkpoint.ok_or(Error::RunOfRank { rank: 0 });
                let checkpoint = self.processes.on_rank_0(saved)?;
                return Ok(Outcome::Stopped { step, checkpoint });
            }
        }
        let summary = self.processes.on_rank_0(|| self.finish())?;
        Ok(Outcome::Finished(summary))
    }

    /// The steps of the current epoch that are still to be made.
    fn train_epoch(
        &mut self,
        observer: &mut dyn Observer,
        stop: &dyn Fn() -> bool,
    ) -> Result<ControlFlow<()>> {
        if self.epoch_is_over() {
            return Ok(ControlFlow::Continue(()));
        }
        if self.caches_training_features() {
            let begin = Instant::now();
            let train = self.data.trained();
            if self.compute_features(&train, observer, stop)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            self.position.epoch_seconds += begin.elapsed().as_secs_f64();
        }
        if self.execution.resident {
            return self.train_epoch_on_device(observer, stop);
        }
        let mut batches = self.remaining_batches()?;
        while !self.epoch_is_over() {
            if self.processes.any_rank(stop())? {
                return Ok(ControlFlow::Break(()));
            }
            let begin = Instant::now();
            let mut parts = Parts::start();
            // Without one of its own this rank still takes part in the step.
            let batch = batches.next().transpose()?;
            if batch.is_none() && self.processes.is_alone() {
                break;
            }
            parts.end("data");
            let is_smaller = self.is_smaller(self.position.batch_in_epoch);
            let step =
                without_benchmark_if(is_smaller, || self.train_step(batch.as_ref(), &mut parts))?;
            self.record_step(&step, begin.elapsed(), observer)?;
            if self.checkpoint_is_due() {
                self.save_checkpoint(observer)?;
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Whether a batch of the epoch has fewer images than the others, which none but the last does.
    fn is_smaller(&self, batch_in_epoch: u64) -> bool {
        let whole = self.config.batch_size.min(self.data.train.len());
        (batch_in_epoch as usize + 1) * whole > self.data.train.len()
    }

    /// The error of the step that comes next, whose loss was read when `steps_made` had moved the weights.
    fn non_finite_loss(&self, loss: f32, steps_made: u64) -> Error {
        let last_checkpoint = match &self.recorder {
            None => LastCheckpoint::OfRank0,
            Some(recorder) => match checkpoint::newest_path(&recorder.run.checkpoints()) {
                Ok(newest) => newest.map_or(LastCheckpoint::None, LastCheckpoint::At),
                // That they cannot be listed is not what ended the run.
                Err(_) => LastCheckpoint::At(recorder.run.checkpoints()),
            },
        };
        Error::NonFiniteLoss {
            epoch: self.position.epoch + 1,
            step: self.position.step + 1,
            loss,
            steps_made,
            last_checkpoint,
        }
    }

    /// One step: forward, loss, backward, average over the ranks, update. `batch` is this rank's part
    /// of it, None where it is so small that this rank has none.
    fn train_step(&mut self, batch: Option<&Examples>, parts: &mut Parts) -> Result<Step> {
        let step = self.position.step;
        let place = self.place(step + 1);
        let failed = |during| Error::tensor(during, place);
        let seed = self.dropout_seed(step);
        let output = batch
            .map(|batch| self.forward_train(&batch.inputs, seed))
            .transpose()
            .map_err(failed("the forward pass"))?;
        parts.end("forward");

        // The value of the loss and the count of right answers are the step's only waits for the
        // device. They come before the update, so that a loss that is not finite never reaches a
        // weight, on any rank.
        let read = |(batch, output): (&Examples, &TrainOutput)| {
            let loss = self.loss(output, &batch.labels)?;
            let part = BatchPart {
                loss: scalar(&loss)?,
                correct: count_correct(&output.logits, &batch.labels)?,
                images: batch.count,
            };
            Ok((loss, part))
        };
        let nothing = || {
            let loss = Tensor::zeros((), DType::F32, &self.device)?;
            Ok((loss, BatchPart::default()))
        };
        let own = batch.zip(output.as_ref()).map_or_else(nothing, read);
        let (loss, own) = own.map_err(failed("the loss"))?;
        let sums = self.processes.sum_batch(own)?;
        if !sums.loss.is_finite() {
            return Err(self.non_finite_loss(sums.loss, step));
        }

        parts.end("loss");
        let (gradients, _) = self.gradients(&loss, step, sums.batch, None, parts)?;
        let lr = self.learning_rate(step);
        self.optimizer
            .step(&gradients, lr)
            .map_err(failed("the update"))?;
        // What nobody needs any more is freed here, and counted.
        drop((gradients, output, loss));
        parts.end("update");
        Ok(Step {
            loss: sums.loss,
            correct: sums.correct,
            images: sums.batch.images,
            lr,
        })
    }

    /// The gradients of the whole batch, averaged over the ranks, from this rank's `loss` in `step` (0-based), and which of the
    /// parameters have one: those that were `agreed` on, or that the ranks agree on now. A step that would move nothing is refused.
    fn gradients(
        &self,
        loss: &Tensor,
        step: u64,
        batch: Share,
        agreed: Option<&[bool]>,
        parts: &mut Parts,
    ) -> Result<(GradStore, Vec<bool>)> {
        let failed = Error::tensor("the backward pass", self.place(step + 1));
        let gradients = backward(loss).map_err(failed)?;
        parts.end("backward");
        let agreed = match agreed {
            Some(agreed) => agreed.to_vec(),
            None => self
                .processes
                .agree_on_gradients(&gradients, &self.trainable)?,
        };
        if !agreed.contains(&true) {
            return Err(Error::NoGradient { step: step + 1 });
        }
        let averaged =
            self.processes
                .average_gradients(gradients, &self.trainable, &agreed, batch)?;
        Ok((averaged, agreed))
    }

    /// The forward pass of images, or of their features where those are kept.
    fn forward_train(
        &self,
        inputs: &Tensor,
        dropout_seed: u64,
    ) -> candle_core::Result<TrainOutput> {
        match self.model.fixed_features() {
            Some(fixed) if self.features.get(TRAIN).is_some() => Ok(TrainOutput {
                logits: fixed.classify(inputs, Mode::Train { dropout_seed })?,
                auxiliary: Vec::new(),
            }),
            _ => self.model.forward_train(inputs, dropout_seed),
        }
    }

    /// Cross entropy of the logits, plus that of each auxiliary head times its weight.
    fn loss(&self, output: &TrainOutput, labels: &Tensor) -> candle_core::Result<Tensor> {
        let config = CrossEntropyConfig {
            label_smoothing: self.config.label_smoothing,
        };
        let mut loss = cross_entropy(&output.logits, labels, config)?;
        for head in &output.auxiliary {
            let auxiliary = cross_entropy(&head.logits, labels, config)?;
            loss = (loss + (auxiliary * head.weight)?)?;
        }
        Ok(loss)
    }

    fn record_step(
        &mut self,
        step: &Step,
        time: Duration,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let total_steps = self.total_steps();
        let position = &mut self.position;
        position.step += 1;
        position.batch_in_epoch += 1;
        position.epoch_loss_sum += f64::from(step.loss) * step.images as f64;
        position.epoch_correct += step.correct;
        position.epoch_images += step.images;
        position.epoch_seconds += time.as_secs_f64();
        let report = StepReport {
            epoch: position.epoch + 1,
            step: position.step,
            total_steps,
            loss: step.loss,
            lr: step.lr,
            images: step.images,
            epoch_loss: position.epoch_loss_sum / position.epoch_images as f64,
            epoch_accuracy: position.epoch_correct as f64 / position.epoch_images as f64,
            time,
        };
        self.write(&Metric::Step {
            step: report.step,
            epoch: report.epoch,
            loss: step.loss,
            correct: step.correct,
            images: step.images,
            lr: step.lr,
        })?;
        observer.step_done(&report);
        Ok(())
    }

    /// Evaluates, writes the epoch's metrics and moves on to the next epoch. Broken off, it leaves
    /// everything as it was, and is done again when the run is resumed.
    fn end_epoch(
        &mut self,
        observer: &mut dyn Observer,
        stop: &dyn Fn() -> bool,
    ) -> Result<ControlFlow<()>> {
        let begin = Instant::now();
        let mut evaluations = BTreeMap::new();
        if self.evaluation_is_due() {
            for set in self.data.evaluated() {
                match self.evaluate(&set, observer, stop)? {
                    Some(evaluation) => evaluations.insert(set.name.to_string(), evaluation),
                    None => return Ok(ControlFlow::Break(())),
                };
            }
        }
        let position = &self.position;
        let report = EpochReport {
            epoch: position.epoch + 1,
            epochs: self.config.epochs,
            step: position.step,
            lr: self.learning_rate(position.step.saturating_sub(1)),
            train_loss: position.epoch_loss_sum / position.epoch_images as f64,
            train_accuracy: position.epoch_correct as f64 / position.epoch_images as f64,
            images: position.epoch_images,
            evaluations,
            train_time: Duration::try_from_secs_f64(position.epoch_seconds).unwrap_or_default(),
            evaluation_time: begin.elapsed(),
        };
        self.record_epoch(&report)?;
        observer.epoch_done(&report);
        if !report.evaluations.is_empty() {
            self.last_evaluation = report.evaluations;
        }
        self.position = Position {
            step: self.position.step,
            epoch: self.position.epoch + 1,
            ..Position::default()
        };
        Ok(ControlFlow::Continue(()))
    }

    fn record_epoch(&mut self, report: &EpochReport) -> Result<()> {
        for (set, evaluation) in &report.evaluations {
            self.write(&Metric::Evaluation {
                step: report.step,
                epoch: report.epoch,
                set: set.clone(),
                loss: evaluation.loss,
                accuracy: evaluation.accuracy(),
                correct: evaluation.correct,
                images: evaluation.images,
            })?;
        }
        self.write(&Metric::Epoch {
            step: report.step,
            epoch: report.epoch,
            train_loss: report.train_loss,
            train_accuracy: report.train_accuracy,
            images: report.images,
        })?;
        let Some(recorder) = &mut self.recorder else {
            return Ok(());
        };
        recorder.metrics.write_row(&CsvRow::of(report))
    }

    fn write(&mut self, metric: &Metric) -> Result<()> {
        self.recorder
            .as_mut()
            .map_or(Ok(()), |recorder| recorder.metrics.write(metric))
    }

    /// The batches of the current epoch that are still to come, in the epoch's own order.
    fn remaining_batches(&self) -> Result<Box<dyn Iterator<Item = Result<Examples>>>> {
        let batch_in_epoch = self.position.batch_in_epoch;
        let (order, batch_size) = self
            .processes
            .share_of_batches(self.epoch_order(), self.config.batch_size);
        if let Some(features) = self.features.get(TRAIN) {
            return Ok(Box::new(features.batches(
                order,
                batch_size,
                batch_in_epoch,
            )));
        }
        let (normalization, device) = (self.data.normalization, &self.device);
        let batches = self.data.trained().batches(
            order,
            batch_size,
            normalization,
            device,
            batch_in_epoch,
        )?;
        Ok(Box::new(batches))
    }

    /// The images of the current epoch in its own order.
    fn epoch_order(&self) -> Vec<u32> {
        let images = self.data.train.len();
        match self.config.shuffle {
            true => {
                let epoch = self.position.epoch;
                let mut rng = random::stream(self.config.seed, random::SHUFFLE, epoch);
                shuffled_order(images, &mut rng)
            }
            false => (0..images as u32).collect(),
        }
    }

    /// The seed of this rank's dropout masks in `step` (0-based).
    fn dropout_seed(&self, step: u64) -> u64 {
        random::dropout_seed_of_rank(self.config.seed, step, self.processes.rank())
    }

    fn upload_set(&self, set: &ImageSet) -> candle_core::Result<ResidentSet> {
        let activations = self.execution.activations;
        ResidentSet::upload(set, self.data.normalization, activations, &self.device)
    }

    /// A step of this run, 1-based, as errors tell where they come from.
    fn place(&self, step: u64) -> Place {
        Place::Step {
            step,
            batch_size: self.config.batch_size,
        }
    }

    fn settings(&self) -> BTreeMap<String, String> {
        described(&self.config, self.data.normalization)
    }

    fn learning_rate(&self, step: u64) -> f64 {
        self.config.optimizer.lr * self.schedule.factor(step)
    }

    fn steps_per_epoch(&self) -> u64 {
        self.config.steps_per_epoch(self.data.train.len())
    }

    fn total_steps(&self) -> u64 {
        self.config.total_steps(self.data.train.len())
    }

    /// All steps are made and the last epoch is reported.
    fn is_finished(&self) -> bool {
        self.position.step >= self.total_steps() && self.position.batch_in_epoch == 0
    }

    /// No step of this epoch is left; its evaluation may be.
    fn epoch_is_over(&self) -> bool {
        self.position.batch_in_epoch >= self.steps_per_epoch()
            || self.position.step >= self.total_steps()
    }

    fn evaluation_is_due(&self) -> bool {
        let every = self.config.evaluate_every_epochs;
        let last = self.position.step >= self.total_steps();
        last || (every > 0 && (self.position.epoch + 1).is_multiple_of(every))
    }

    /// The end of an epoch saves its own checkpoint, after the evaluation.
    fn checkpoint_is_due(&self) -> bool {
        let every = self.config.checkpoint_every_steps;
        every > 0 && self.position.step.is_multiple_of(every) && !self.epoch_is_over()
    }
}

/// The parameters that train, by name, so that all ranks have them in one order. One with several names goes by the first.
fn trainable(model: &dyn Model) -> Result<Vec<(String, Var)>> {
    let all = model.named_parameters();
    let parameters = all.len();
    let trainable = all.into_iter().filter(|(name, _)| model.is_trainable(name));
    let mut trainable: Vec<(String, Var)> = trainable.collect();
    if trainable.is_empty() {
        return Err(Error::NothingTrains { parameters });
    }
    trainable.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(trainable)
}

/// The numbers of one step.
struct Step {
    loss: f32,
    correct: u64,
    images: u64,
    lr: f64,
}

mod evaluation;
mod on_device;
mod saving;

#[cfg(test)]
mod distributed_tests;
#[cfg(test)]
mod plain_loop_tests;
#[cfg(test)]
mod tests;
