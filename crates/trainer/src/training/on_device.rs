//! Steps that the host does not wait for: data, loss and learning rate stay on the device.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};

use super::{Step, Training};
use crate::data::TRAIN;
use crate::distributed::{BatchPart, Share};
use crate::error::{Error, Result};
use crate::execution::without_benchmark_if;
use crate::observer::Observer;
use crate::profile::Parts;
use crate::resident::{ResidentSet, correct_on_device};

#[cfg(feature = "cuda")]
mod graph;
#[cfg(not(feature = "cuda"))]
#[path = "on_device/no_graph.rs"]
mod graph;

/// Most steps between two readings of their losses.
const READ_EVERY_STEPS: usize = 64;
/// Most time between two readings of losses, so that slow steps are seen to advance, and a stop is heard. Several processes have to
/// read at the same steps: after as many as rank 0 made in this time when losses were read last.
const READ_EVERY: Duration = Duration::from_millis(200);

/// What a run keeps on its device from step to step.
pub(super) struct OnDevice {
    set: ResidentSet,
    inputs: StepInputs,
    outputs: StepOutputs,
    /// Losses of the steps that have not been read, (READ_EVERY_STEPS,).
    losses: Tensor,
    /// Right answers of the steps that have not been read, (READ_EVERY_STEPS,).
    corrects: Tensor,
    unread: Vec<Unread>,
    /// How many steps are left unread at most.
    read_after: usize,
    recorded: graph::RecordedStep,
}

/// What changes from step to step, at addresses that stay: a recorded step reads it there.
pub(super) struct StepInputs {
    /// Places of this rank's part of a whole batch in the set, `u32`.
    indices: Tensor,
    /// f32, (1,)
    lr: Tensor,
    /// The step's dropout seed in two halves, the lower first: `u32`, (2,).
    seed: Tensor,
}

/// What a step leaves behind, at addresses that stay; f32, (1,).
struct StepOutputs {
    loss: Tensor,
    correct: Tensor,
}

/// A step that was given to the device.
struct Unread {
    lr: f64,
    /// Images of this rank.
    images: u64,
}

/// What an epoch's steps take, uploaded at its beginning.
struct EpochInputs {
    /// All images in the epoch's order, `u32`.
    order: Tensor,
    /// The learning rate of each step of the epoch from batch `first` on, f32, (steps,).
    lr: Tensor,
    /// The dropout seed of each of these steps in two halves, the lower first: `u32`, (steps, 2).
    seeds: Tensor,
    /// Batch of the epoch at which the others begin.
    first: u64,
}

impl OnDevice {
    pub(super) fn new(
        set: ResidentSet,
        images: usize,
        device: &Device,
    ) -> candle_core::Result<Self> {
        let f32s = |n: usize| Tensor::zeros(n, DType::F32, device);
        Ok(Self {
            set,
            inputs: StepInputs {
                indices: Tensor::zeros(images, DType::U32, device)?,
                lr: f32s(1)?,
                seed: Tensor::zeros(2, DType::U32, device)?,
            },
            outputs: StepOutputs {
                loss: f32s(1)?,
                correct: f32s(1)?,
            },
            losses: f32s(READ_EVERY_STEPS)?,
            corrects: f32s(READ_EVERY_STEPS)?,
            unread: Vec::with_capacity(READ_EVERY_STEPS),
            read_after: READ_EVERY_STEPS,
            recorded: Default::default(),
        })
    }

    /// Gives back what a recorded step keeps, before other work takes memory of its own.
    pub(super) fn make_room(&mut self, device: &Device) -> candle_core::Result<()> {
        self.recorded.make_room(device)
    }
}

impl Training<'_> {
    /// The steps of the current epoch that are still to be made, without waiting for each.
    pub(super) fn train_epoch_on_device(
        &mut self,
        observer: &mut dyn Observer,
        stop: &dyn Fn() -> bool,
    ) -> Result<ControlFlow<()>> {
        let mut state = match self.on_device.take() {
            Some(state) => state,
            None => self
                .upload()
                .map_err(self.failed("the upload of the data"))?,
        };
        let flow = self.steps_on_device(&mut state, observer, stop);
        self.on_device = Some(state);
        flow
    }

    fn steps_on_device(
        &mut self,
        state: &mut OnDevice,
        observer: &mut dyn Observer,
        stop: &dyn Fn() -> bool,
    ) -> Result<ControlFlow<()>> {
        let epoch = self
            .upload_epoch()
            .map_err(self.failed("the upload of the order"))?;
        let mut read = Instant::now();
        while !self.epoch_will_be_over(state) {
            // Several processes ask each other where none of them has a step to read.
            let asks = self.processes.is_alone() || state.unread.is_empty();
            if asks && self.processes.any_rank(stop())? {
                self.read_steps(state, &mut read, observer)?;
                return Ok(ControlFlow::Break(()));
            }
            let unread = self.step_on_device(state, &epoch)?;
            state.unread.push(unread);
            let full = state.unread.len() >= state.read_after;
            let late = self.processes.is_alone() && read.elapsed() >= READ_EVERY;
            if full || late || self.checkpoint_will_be_due(state) {
                self.read_steps(state, &mut read, observer)?;
                if self.checkpoint_is_due() {
                    self.save_checkpoint(observer)?;
                    read = Instant::now();
                }
            }
        }
        self.read_steps(state, &mut read, observer)?;
        Ok(ControlFlow::Continue(()))
    }

    /// Gives one step to the device.
    fn step_on_device(&mut self, state: &mut OnDevice, epoch: &EpochInputs) -> Result<Unread> {
        let ahead = state.unread.len() as u64;
        let (step, batch) = (
            self.position.step + ahead,
            self.position.batch_in_epoch + ahead,
        );
        let batch_size = self.config.batch_size;
        let begin = batch as usize * batch_size;
        let images = batch_size.min(self.data.train.len() - begin);
        let part = self.processes.share_of_batch(images);
        let share = Share {
            own: part.len() as u64,
            images: images as u64,
        };
        let lr = self.learning_rate(step);
        let place = self.place(step + 1);
        let failed = |during| Error::tensor(during, place);
        let mut parts = Parts::start();
        let row = (batch - epoch.first) as usize;
        let set_inputs = || {
            let inputs = &state.inputs;
            if !part.is_empty() {
                let order = epoch.order.narrow(0, begin + part.start, part.len())?;
                inputs.indices.slice_set(&order, 0, 0)?;
            }
            inputs.lr.slice_set(&epoch.lr.narrow(0, row, 1)?, 0, 0)?;
            inputs.seed.slice_set(&epoch.seeds.get(row)?, 0, 0)
        };
        set_inputs().map_err(failed("the data"))?;
        parts.end("data");
        let seed = self.dropout_seed(step);
        if !self.step_by_graph(state, share, seed)? {
            let is_smaller = self.is_smaller(batch);
            without_benchmark_if(is_smaller, || self.compute_step(state, share, seed, None))?;
        }
        let slot = state.unread.len();
        let keep = || {
            state.losses.slice_set(&state.outputs.loss, 0, slot)?;
            state.corrects.slice_set(&state.outputs.correct, 0, slot)
        };
        keep().map_err(failed("the loss"))?;
        Ok(Unread {
            lr,
            images: share.own,
        })
    }

    /// Everything of a step that runs on the device, from gathering this rank's images to the update.
    /// On a GPU the seed of the dropout masks is that of the step's inputs, which equals `seed`.
    ///
    /// Averages the gradients that were `agreed` on, or asks the ranks; returns the agreement.
    fn compute_step(
        &mut self,
        state: &OnDevice,
        batch: Share,
        seed: u64,
        agreed: Option<&[bool]>,
    ) -> Result<Vec<bool>> {
        let step = self.position.step + state.unread.len() as u64;
        let place = self.place(step + 1);
        let failed = |during| Error::tensor(during, place);
        let loss = match batch.own {
            // Of a last batch with fewer images than there are ranks: nothing has a gradient here.
            0 => Tensor::zeros((), DType::F32, &self.device).map_err(failed("the loss"))?,
            images => self.compute_loss(state, images as usize, seed, failed)?,
        };
        let mut parts = Parts::start();
        let (gradients, agreed) = self.gradients(&loss, step, batch, agreed, &mut parts)?;
        self.optimizer
            .step_on_device(&gradients, &state.inputs.lr)
            .map_err(failed("the update"))?;
        drop((gradients, loss));
        parts.end("update");
        Ok(agreed)
    }

    /// The loss of the first `images` of the step's indices; its value and the right answers are left in the outputs.
    fn compute_loss<F: FnOnce(candle_core::Error) -> Error>(
        &self,
        state: &OnDevice,
        images: usize,
        seed: u64,
        failed: impl Fn(&'static str) -> F,
    ) -> Result<Tensor> {
        let mut parts = Parts::start();
        let batch = || state.set.batch(&state.inputs.indices.narrow(0, 0, images)?);
        let batch = batch().map_err(failed("the data"))?;
        parts.end("gather");
        let forward = || self.forward_train(&batch.inputs, seed);
        // A recorded step must find its seed on the device: the host's would be part of the recording.
        let output = graph::with_dropout_seed(&state.inputs.seed, forward);
        let output = output.map_err(failed("the forward pass"))?;
        parts.end("forward");
        let loss = self
            .loss(&output, &batch.labels)
            .map_err(failed("the loss"))?;
        let keep = || {
            let value = loss.detach().to_dtype(DType::F32)?.reshape(1)?;
            state.outputs.loss.slice_set(&value, 0, 0)?;
            let correct = correct_on_device(&output.logits, &batch.labels)?;
            state.outputs.correct.slice_set(&correct, 0, 0)
        };
        keep().map_err(failed("the loss"))?;
        parts.end("loss");
        Ok(loss)
    }

    /// Reads the losses of all steps that the device was given since the last time, and records them. This is the
    /// only wait for the device within an epoch.
    fn read_steps(
        &mut self,
        state: &mut OnDevice,
        last: &mut Instant,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let unread = std::mem::take(&mut state.unread);
        if unread.is_empty() {
            return Ok(());
        }
        self.processes.wait_for(&self.device)?;
        let read = || {
            Ok((
                state.losses.to_vec1::<f32>()?,
                state.corrects.to_vec1::<f32>()?,
            ))
        };
        let (losses, corrects) = read().map_err(self.failed("a step"))?;
        let time = last.elapsed() / unread.len() as u32;
        *last = Instant::now();
        if !self.processes.is_alone() {
            let steps = || Ok(steps_within(READ_EVERY, time));
            state.read_after = self.processes.on_rank_0(steps)?;
        }
        let steps_made = self.position.step + unread.len() as u64;
        let steps = unread.iter().zip(losses).zip(corrects);
        let own: Vec<BatchPart> = steps
            .map(|((step, loss), correct)| match step.images {
                // It left nothing behind.
                0 => BatchPart::default(),
                images => BatchPart {
                    loss,
                    correct: correct as u64,
                    images,
                },
            })
            .collect();
        for (step, sums) in unread.iter().zip(self.processes.sum_batches(&own)?) {
            let loss = sums.loss;
            if !loss.is_finite() {
                return Err(self.non_finite_loss(loss, steps_made));
            }
            let step = Step {
                loss,
                correct: sums.correct,
                images: sums.batch.images,
                lr: step.lr,
            };
            self.record_step(&step, time, observer)?;
        }
        Ok(())
    }

    /// Makes what lasts on a GPU before what does not: between what steps take and free, it would keep the driver from getting that
    /// back.
    pub(super) fn make_lasting_memory(&mut self) -> Result<()> {
        if !self.execution.resident {
            return Ok(());
        }
        let failed = self.failed("the beginning");
        self.optimizer.reserve_on_gpu().map_err(failed)?;
        graph::make_workspaces(&self.device);
        Ok(())
    }

    fn upload(&self) -> candle_core::Result<OnDevice> {
        let set = match self.features.get(TRAIN) {
            Some(features) => ResidentSet::of_features(features),
            None => self.upload_set(&self.data.train)?,
        };
        let part = self.processes.share_of_batch(self.config.batch_size);
        let mut state = OnDevice::new(set, part.len(), &self.device)?;
        if !self.processes.is_alone() {
            // How long a step takes nobody knows yet.
            state.read_after = 1;
        }
        Ok(state)
    }

    /// Order, learning rates and seeds of the rest of the epoch.
    fn upload_epoch(&self) -> candle_core::Result<EpochInputs> {
        let first = self.position.batch_in_epoch;
        let left = self.steps_per_epoch().saturating_sub(first).max(1);
        let steps = self.position.step..self.position.step + left;
        let lr: Vec<f32> = steps
            .clone()
            .map(|step| self.learning_rate(step) as f32)
            .collect();
        let seeds: Vec<u32> = steps
            .flat_map(|step| {
                let seed = self.dropout_seed(step);
                [seed as u32, (seed >> 32) as u32]
            })
            .collect();
        Ok(EpochInputs {
            order: Tensor::new(self.epoch_order(), &self.device)?,
            lr: Tensor::new(lr, &self.device)?,
            seeds: Tensor::from_vec(seeds, (left as usize, 2), &self.device)?,
            first,
        })
    }

    fn failed(&self, during: &'static str) -> impl Fn(candle_core::Error) -> Error + use<> {
        Error::tensor(during, self.place(self.position.step + 1))
    }

    /// No step of this epoch is left to be given to the device.
    fn epoch_will_be_over(&self, state: &OnDevice) -> bool {
        let ahead = state.unread.len() as u64;
        self.position.batch_in_epoch + ahead >= self.steps_per_epoch()
            || self.position.step + ahead >= self.total_steps()
    }

    /// A checkpoint is due once the steps given to the device are recorded.
    fn checkpoint_will_be_due(&self, state: &OnDevice) -> bool {
        let every = self.config.checkpoint_every_steps;
        let step = self.position.step + state.unread.len() as u64;
        every > 0 && step.is_multiple_of(every)
    }
}

/// How many steps that take `each` are made within `time`, from 1 to [`READ_EVERY_STEPS`].
fn steps_within(time: Duration, each: Duration) -> usize {
    let steps = time.as_nanos() / each.as_nanos().max(1);
    steps.clamp(1, READ_EVERY_STEPS as u128) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_steps_are_read_one_by_one_and_fast_ones_many_at_once() {
        let steps = |each: u64| steps_within(READ_EVERY, Duration::from_micros(each));
        assert_eq!(
            [0, 1, 5_000, 50_000, 199_000, 900_000].map(steps),
            [64, 64, 40, 4, 1, 1]
        );
    }
}
