//! What several processes that train together add to a run. For one that is alone all of it does
//! nothing.
//!
//! Each takes its part of every batch, of the evaluated sets and of the computation of features. A
//! batch's parts can differ in size, so that each rank's gradient, which is that of the mean loss
//! over its part, counts by the part's share of the batch: the sum is then the gradient of the mean
//! loss over the batch. Batch norm takes its statistics from a rank's own part, as under PyTorch's
//! `DistributedDataParallel`; the running statistics that are evaluated and saved are rank 0's.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use data_parallel::{ProcessGroup, shard};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::checkpoint::Checkpoint;
use crate::config::{ConfigError, TrainingConfig, described};
use crate::data::DataSets;
use crate::error::{Error, Result};
use crate::evaluate::EvaluationSums;
use crate::model::Model;
use crate::weights;

/// The processes that train together, this one included.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Processes<'a>(pub(crate) Option<&'a ProcessGroup>);

/// The numbers of a step over this rank's part of a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct BatchPart {
    /// Mean over the part.
    pub(crate) loss: f32,
    pub(crate) correct: u64,
    pub(crate) images: u64,
}

/// The numbers of a step over the whole batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct BatchSums {
    /// Mean over the batch.
    pub(crate) loss: f32,
    pub(crate) correct: u64,
    pub(crate) batch: Share,
}

/// This rank's part of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Share {
    /// Images of this rank.
    pub(crate) own: u64,
    /// Images of the batch.
    pub(crate) images: u64,
}

impl Share {
    fn weight(self) -> f64 {
        self.own as f64 / self.images as f64
    }
}

impl Processes<'_> {
    pub(crate) fn rank(self) -> usize {
        self.0.map_or(0, ProcessGroup::rank)
    }

    pub(crate) fn is_alone(self) -> bool {
        self.0.is_none()
    }

    pub(crate) fn world_size(self) -> usize {
        self.0.map_or(1, ProcessGroup::world_size)
    }

    /// Refuses to train other things than the other ranks, and batches with fewer images than ranks.
    pub(crate) fn check(self, config: &TrainingConfig, data: &DataSets) -> Result<()> {
        let Some(group) = self.0 else { return Ok(()) };
        if config.batch_size < group.world_size() {
            return Err(Error::Config(ConfigError {
                setting: "batch_size",
                found: config.batch_size.to_string(),
                expected: "at least the number of processes, so that each has an image of a batch",
            }));
        }
        let mut facts = described(config, data.normalization);
        let fingerprints = encode("the data", &data.fingerprints())?;
        let fingerprints = String::from_utf8_lossy(&fingerprints).into_owned();
        facts.insert("training data".into(), fingerprints);
        Ok(group.verify_same(&facts)?)
    }

    /// Whether any rank says yes.
    pub(crate) fn any_rank(self, yes: bool) -> Result<bool> {
        let Some(group) = self.0 else { return Ok(yes) };
        let mut count = [u64::from(yes)];
        group.all_reduce_sum(&mut count)?;
        Ok(count[0] > 0)
    }

    /// This rank's pictures of an epoch, and how many of them make a batch: of each batch its
    /// contiguous part. All but the last batch give a rank the same number; the last may give it none.
    pub(crate) fn share_of_batches(self, order: Vec<u32>, batch_size: usize) -> (Vec<u32>, usize) {
        if self.0.is_none() {
            return (order, batch_size);
        }
        let batches = order.chunks(batch_size);
        let order = batches.flat_map(|batch| &batch[self.share_of_batch(batch.len())]);
        (
            order.copied().collect(),
            self.share_of_batch(batch_size).len(),
        )
    }

    /// This rank's part of one batch of `images`, which begins at the first of the range.
    pub(crate) fn share_of_batch(self, images: usize) -> std::ops::Range<usize> {
        shard(images, self.rank(), self.world_size())
    }

    /// Whether gradients are averaged without the host, so that a CUDA graph can hold it.
    #[cfg(feature = "cuda")]
    pub(crate) fn stays_on_device(self) -> bool {
        self.0.is_none_or(ProcessGroup::reduces_on_gpu)
    }

    /// Waits for what the device was given, as far as other ranks take part in that: one that is gone is an error here, while the
    /// device would wait for it for ever.
    #[cfg(feature = "cuda")]
    pub(crate) fn wait_for(self, device: &Device) -> Result<()> {
        let Some(group) = self.0.filter(|group| group.reduces_on_gpu()) else {
            return Ok(());
        };
        let during = "the wait for the device";
        let failed = |source| Error::Group(data_parallel::Error::Tensor { during, source });
        let marker = candle_cnn::cuda::Marker::after_all(device).map_err(failed)?;
        group.wait_until(|| marker.is_reached().map_err(failed))
    }

    /// Without CUDA no rank waits for a device.
    #[cfg(not(feature = "cuda"))]
    pub(crate) fn wait_for(self, _: &Device) -> Result<()> {
        Ok(())
    }

    /// This rank's part of a set that is gone through in order: whole batches, so that each is the
    /// same as for a process that is alone.
    pub(crate) fn share_of_set(self, images: usize, batch_size: usize) -> std::ops::Range<usize> {
        let batches = shard(images.div_ceil(batch_size), self.rank(), self.world_size());
        let image = |batch: usize| (batch * batch_size).min(images);
        image(batches.start)..image(batches.end)
    }

    /// Loss and counts of the whole batch from this rank's part of it.
    pub(crate) fn sum_batch(self, part: BatchPart) -> Result<BatchSums> {
        Ok(self.sum_batches(&[part])?[0])
    }

    /// Loss and counts of several whole batches from this rank's part of each.
    pub(crate) fn sum_batches(self, parts: &[BatchPart]) -> Result<Vec<BatchSums>> {
        // Counts are far below 2^53, so that an f64 holds them exactly.
        let numbers = parts.iter().flat_map(|part| {
            let images = part.images as f64;
            let loss = match part.images {
                0 => 0.0,
                _ => f64::from(part.loss),
            };
            [loss * images, part.correct as f64, images]
        });
        let mut sums: Vec<f64> = numbers.collect();
        if let Some(group) = self.0 {
            group.all_reduce_sum_f64(&mut sums)?;
        }
        let sums = parts.iter().zip(sums.chunks_exact(3));
        Ok(sums
            .map(|(part, sum)| BatchSums {
                loss: match self.is_alone() {
                    true => part.loss,
                    false => (sum[0] / sum[2]) as f32,
                },
                correct: sum[1] as u64,
                batch: Share {
                    own: part.images,
                    images: sum[2] as u64,
                },
            })
            .collect())
    }

    /// Whether each parameter has a gradient on any rank. Ranks may differ by what a network leaves out at random, or where one has no
    /// images. Asks through the host, all ranks at the same step; one that is alone asks nobody.
    pub(crate) fn agree_on_gradients(
        self,
        gradients: &GradStore,
        parameters: &[Var],
    ) -> Result<Vec<bool>> {
        let is_there = |parameter| gradients.get(parameter).is_some();
        let Some(group) = self.0 else {
            return Ok(parameters.iter().map(|p| is_there(p)).collect());
        };
        let mut ranks: Vec<u64> = parameters.iter().map(|p| is_there(p).into()).collect();
        group.all_reduce_sum(&mut ranks)?;
        Ok(ranks.into_iter().map(|ranks| ranks > 0).collect())
    }

    /// The gradients of the whole batch from those of this rank's part of it, of the parameters that were `agreed` on.
    /// Without a gradient of its own a rank still gets them, and one that nobody agreed on is left out.
    pub(crate) fn average_gradients(
        self,
        mut gradients: GradStore,
        parameters: &[Var],
        agreed: &[bool],
        batch: Share,
    ) -> Result<GradStore> {
        let Some(group) = self.0 else {
            return Ok(gradients);
        };
        let mut averaged_ones = Vec::with_capacity(parameters.len());
        for (parameter, &agreed) in parameters.iter().zip(agreed) {
            match agreed {
                true => averaged_ones.push(parameter),
                false => drop(gradients.remove(parameter)),
            }
        }
        let parameters = averaged_ones;
        let given: candle_core::Result<Vec<Tensor>> = parameters
            .iter()
            .map(|parameter| match gradients.get(parameter) {
                Some(gradient) => Ok(gradient.clone()),
                None => parameter.zeros_like(),
            })
            .collect();
        let averaged = group.all_reduce_weighted(&given.map_err(unreadable)?, batch.weight())?;
        for (parameter, gradient) in parameters.into_iter().zip(averaged) {
            gradients.insert(parameter, gradient);
        }
        Ok(gradients)
    }

    /// The evaluation of a set from those of its parts; None where any rank broke off.
    pub(crate) fn sum_evaluation(
        self,
        part: Option<EvaluationSums>,
    ) -> Result<Option<EvaluationSums>> {
        let Some(group) = self.0 else { return Ok(part) };
        if self.any_rank(part.is_none())? {
            return Ok(None);
        }
        let part = part.unwrap_or_default();
        let (mut loss, mut counts) = ([part.loss], [part.correct, part.images]);
        group.all_reduce_sum_f64(&mut loss)?;
        group.all_reduce_sum(&mut counts)?;
        Ok(Some(EvaluationSums {
            loss: loss[0],
            correct: counts[0],
            images: counts[1],
        }))
    }

    /// All `rows` rows from the parts of the ranks, where this one's begins at `begin`; f32.
    pub(crate) fn gather_rows(
        self,
        parts: &[Tensor],
        begin: usize,
        rows: usize,
        device: &Device,
    ) -> Result<Tensor> {
        let Some(group) = self.0 else {
            return Tensor::cat(parts, 0).map_err(unreadable);
        };
        // Rank 0 has the first rows of any set; another may have none, and not know their shape.
        let shape = parts.first().map(|part| part.dims()[1..].to_vec());
        let shape = group.broadcast(encode("a shape", &shape.unwrap_or_default())?)?;
        let shape: Vec<usize> = decode("a shape", &shape)?;
        let zeros = |rows: usize| Tensor::zeros([&[rows], &shape[..]].concat(), DType::F32, device);
        let padded = || {
            let counts: candle_core::Result<Vec<usize>> =
                parts.iter().map(|part| part.dim(0)).collect();
            let end = begin + counts?.iter().sum::<usize>();
            let (before, after) = ([zeros(begin)?], [zeros(rows - end)?]);
            Tensor::cat(&[&before, parts, &after].concat(), 0)
        };
        // Each row is added to zeros only, which changes no value.
        let all = group.all_reduce_weighted(&[padded().map_err(unreadable)?], 1.0)?;
        Tensor::cat(&all, 0).map_err(unreadable)
    }

    /// Gives every rank the buffers of rank 0, with which it evaluates and which it saves.
    pub(crate) fn broadcast_buffers(self, model: &dyn Model) -> Result<()> {
        let buffers = model.named_buffers();
        let Some(group) = self.0.filter(|_| !buffers.is_empty()) else {
            return Ok(());
        };
        let mut bytes = Vec::new();
        if group.is_first() {
            bytes = weights::encode(&weights::detached(buffers.clone()), &BTreeMap::new())?;
        }
        let bytes = group.broadcast(bytes)?;
        if group.is_first() {
            return Ok(());
        }
        let from = Path::new("rank 0");
        Ok(weights::assign(
            buffers,
            weights::decode(&bytes, from)?,
            from,
        )?)
    }

    /// Gives every rank the checkpoint of rank 0, or the weights that rank 0 begins with.
    pub(crate) fn broadcast_start(
        self,
        checkpoint: Option<Checkpoint>,
        model: &dyn Model,
    ) -> Result<Option<Checkpoint>> {
        let Some(group) = self.0 else {
            return Ok(checkpoint);
        };
        let (path, state) = match &checkpoint {
            Some(checkpoint) => (checkpoint.path.clone(), Some(&checkpoint.state)),
            None => ("rank 0".into(), None),
        };
        let head = group.broadcast(encode("its checkpoint", &(path, state))?)?;
        let (path, state) = decode("its checkpoint", &head)?;
        let (mut weights, mut optimizer) = (Vec::new(), Vec::new());
        match checkpoint {
            Some(checkpoint) => (weights, optimizer) = (checkpoint.weights, checkpoint.optimizer),
            None if group.is_first() => {
                weights = weights::of_model(model)?;
            }
            None => (),
        }
        let weights = group.broadcast(weights)?;
        let optimizer = group.broadcast(optimizer)?;
        match state {
            Some(state) => Ok(Some(Checkpoint {
                path,
                state,
                weights,
                optimizer,
            })),
            None if group.is_first() => Ok(None),
            None => {
                weights::load_from_bytes(model, &weights, &path)?;
                Ok(None)
            }
        }
    }

    /// Has rank 0 do something, and tells the others what came of it.
    pub(crate) fn on_rank_0<T: Serialize + DeserializeOwned>(
        self,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        match self.0 {
            None => work(),
            Some(group) if group.is_first() => {
                let done = work()?;
                group.broadcast(encode("the outcome", &done)?)?;
                Ok(done)
            }
            Some(group) => decode("the outcome", &group.broadcast(Vec::new())?),
        }
    }

    /// Lets the others know why this rank stops, when it does by an error.
    pub(crate) fn report_error<T>(self, result: Result<T>) -> Result<T> {
        if let (Err(error), Some(group)) = (&result, self.0) {
            group.give_up(&error.with_sources());
        }
        result
    }
}

fn encode(what: &'static str, value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|source| Error::Encode { what, source })
}

fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|source| Error::Received { what, source })
}

fn unreadable(source: candle_core::Error) -> Error {
    Error::Group(data_parallel::Error::Tensor {
        during: "the exchange with the other ranks",
        source,
    })
}
