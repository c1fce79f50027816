//! Evaluations, and the features that are computed once.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use candle_cnn::Mode;
use candle_core::{DType, Tensor};
use cifar_data::ImageSet;

use super::Training;
use crate::data::{Examples, NamedSet};
use crate::error::{Error, Place, Result};
use crate::evaluate::{Evaluation, EvaluationSums, evaluate_examples};
use crate::features;
use crate::observer::Observer;
use crate::resident::ResidentSet;

impl Training<'_> {
    /// Evaluates on one set, by its features where those never change.
    pub(super) fn evaluate(
        &mut self,
        set: &NamedSet,
        observer: &mut dyn Observer,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<Evaluation>> {
        if let Some(on_device) = &mut self.on_device {
            let failed = Error::tensor("the evaluation", Place::Set(set.name));
            on_device.make_room(&self.device).map_err(failed)?;
        }
        if self.compute_features(set, observer, stop)?.is_break() {
            return Ok(None);
        }
        self.processes.broadcast_buffers(self.model)?;
        let share = self.share_of_set(&set.images);
        let images = share.len() as u64;
        let mut progress = |done| {
            observer.evaluation_progress(set.name, done, images);
            break_if(stop())
        };
        let part = match self.model.fixed_features().zip(self.features.get(set.name)) {
            Some((fixed, features)) => {
                let batch_size = self.config.evaluation_batch_size;
                let batches = features.batches(share.collect(), batch_size, 0);
                let logits = |features: &Tensor| fixed.classify(features, Mode::Eval);
                evaluate_examples(batches, logits, &mut progress)?
            }
            None => {
                let batches = self.batches_in_order(set)?;
                let logits = |images: &Tensor| self.model.forward(images, Mode::Eval);
                evaluate_examples(batches, logits, &mut progress)?
            }
        };
        let sums = self.processes.sum_evaluation(part)?;
        Ok(sums.map(EvaluationSums::mean))
    }

    /// Computes the features of a set, unless they are there or are none.
    pub(super) fn compute_features(
        &mut self,
        set: &NamedSet,
        observer: &mut dyn Observer,
        stop: &dyn Fn() -> bool,
    ) -> Result<ControlFlow<()>> {
        let Some(fixed) = self.model.fixed_features() else {
            return Ok(ControlFlow::Continue(()));
        };
        if self.features.get(set.name).is_some() {
            return Ok(ControlFlow::Continue(()));
        }
        let batches = self.batches_in_order(set)?;
        let share = self.share_of_set(&set.images);
        let images = share.len() as u64;
        let mut progress = |done| {
            observer.features_progress(set.name, done, images);
            break_if(stop())
        };
        let compute = |images: &Tensor| fixed.features(images);
        let parts = features::compute(batches, compute, &mut progress)?;
        if self.processes.any_rank(parts.is_none())? {
            return Ok(ControlFlow::Break(()));
        }
        let (parts, begin) = (parts.unwrap_or_default(), share.start as usize);
        let rows = set.images.len();
        let features = self
            .processes
            .gather_rows(&parts, begin, rows, &self.device)?;
        self.features.insert(set, features, &self.device)?;
        Ok(ControlFlow::Continue(()))
    }

    /// Whether it pays to keep the training set's features: a run that does not see all of it
    /// would compute more than it uses.
    pub(super) fn caches_training_features(&self) -> bool {
        self.model.fixed_features().is_some() && self.total_steps() >= self.steps_per_epoch()
    }

    /// The pictures of a set that are this rank's to evaluate.
    fn share_of_set(&self, set: &ImageSet) -> Range<u32> {
        let batch_size = self.config.evaluation_batch_size;
        let share = self.processes.share_of_set(set.len(), batch_size);
        share.start as u32..share.end as u32
    }

    /// This rank's pictures of a set, in batches of the evaluation: made on the device where the run
    /// is resident, else by the host.
    fn batches_in_order(
        &mut self,
        set: &NamedSet,
    ) -> Result<Box<dyn Iterator<Item = Result<Examples>>>> {
        if self.execution.resident {
            return self.resident_batches(set);
        }
        let order = self.share_of_set(&set.images).collect();
        let batch_size = self.config.evaluation_batch_size;
        let batches = set.batches(order, batch_size, self.data.normalization, &self.device, 0)?;
        Ok(Box::new(batches))
    }

    /// The set stays on the device for the next evaluation, unless its features are all that is needed of it.
    fn resident_batches(
        &mut self,
        set: &NamedSet,
    ) -> Result<Box<dyn Iterator<Item = Result<Examples>>>> {
        let failed = |place| Error::tensor("the upload of pictures", place);
        let upload = || {
            ResidentSet::upload(
                &set.images,
                self.data.normalization,
                DType::F32,
                &self.device,
            )
            .map(Arc::new)
            .map_err(failed(Place::Set(set.name)))
        };
        let resident = match self.evaluated.get(set.name) {
            Some(resident) => resident.clone(),
            None => upload()?,
        };
        if self.model.fixed_features().is_none() {
            self.evaluated.insert(set.name, resident.clone());
        }
        let share: Vec<u32> = self.share_of_set(&set.images).collect();
        let (images, size) = (share.len(), self.config.evaluation_batch_size);
        if images == 0 {
            return Ok(Box::new(std::iter::empty()));
        }
        let order = Tensor::new(share, &self.device).map_err(failed(Place::Set(set.name)))?;
        let examples = (0..images).step_by(size).map(move |first| {
            let count = size.min(images - first);
            let batch = || resident.batch(&order.narrow(0, first, count)?);
            let place = Place::Batch {
                batch: (first / size) as u64 + 1,
                images: count as u64,
            };
            batch().map_err(Error::tensor("the data of an evaluation", place))
        });
        Ok(Box::new(examples))
    }
}

fn break_if(stop: bool) -> ControlFlow<()> {
    match stop {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}
