//! Loss and accuracy over a whole set.

use std::ops::ControlFlow;

use candle_cnn::{CrossEntropyConfig, Mode, cross_entropy};
use candle_core::{DType, Device, Tensor};
use cifar_data::Normalization;
use serde::{Deserialize, Serialize};

use crate::data::{Examples, NamedSet};
use crate::error::{Error, Place, Result};
use crate::execution::LargestBatch;
use crate::model::Model;
use crate::resident::correct_on_device;

/// What a network makes of a set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean cross entropy over the images, without label smoothing. What is not finite is `null` in
    /// files, and NaN when it is read.
    #[serde(deserialize_with = "crate::metrics::number")]
    pub loss: f64,
    /// Images whose largest logit was the right one.
    pub correct: u64,
    /// Images of the set.
    pub images: u64,
}

impl Evaluation {
    /// Fraction of images classified correctly, 0 to 1.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.images as f64
    }
}

/// Evaluates `model` on all images of `set`, in order and without dropout. After each batch
/// `progress` hears how many images are done and may break off, which gives None.
///
/// # Errors
/// [`Error::EmptySet`], [`Error::Data`], [`Error::Tensor`].
pub fn evaluate(
    model: &dyn Model,
    set: &NamedSet,
    batch_size: usize,
    normalization: Normalization,
    device: &Device,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<Option<Evaluation>> {
    let images = set.images.len();
    if images == 0 {
        return Err(Error::EmptySet { set: set.name });
    }
    let order = (0..images as u32).collect();
    let batches = set.batches(order, batch_size, normalization, device, 0)?;
    let sums = evaluate_examples(
        batches,
        |images| model.forward(images, Mode::Eval),
        progress,
    )?;
    Ok(sums.map(EvaluationSums::mean))
}

/// What an [`Evaluation`] is made of, over a part of a set or all of it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct EvaluationSums {
    /// Σ over the batches of mean loss × images.
    pub(crate) loss: f64,
    pub(crate) correct: u64,
    pub(crate) images: u64,
}

impl EvaluationSums {
    pub(crate) fn mean(self) -> Evaluation {
        Evaluation {
            loss: self.loss / self.images as f64,
            correct: self.correct,
            images: self.images,
        }
    }
}

/// [`evaluate`] on whatever `logits` are made of.
pub(crate) fn evaluate_examples(
    batches: impl Iterator<Item = Result<Examples>>,
    logits: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<Option<EvaluationSums>> {
    let (mut tally, mut done, mut largest) = (Tally::default(), 0, LargestBatch::default());
    // Of the last batch, whose result is waited for after it.
    let mut place = Place::Batch {
        batch: 0,
        images: 0,
    };
    for (index, batch) in batches.enumerate() {
        let Examples {
            inputs,
            labels,
            count,
        } = batch?;
        let mut evaluated = || {
            let logits = largest.run(count, || logits(&inputs))?;
            let loss = cross_entropy(&logits, &labels, CrossEntropyConfig::default())?;
            match inputs.device().is_cpu() {
                true => tally.add(scalar(&loss)?, count_correct(&logits, &labels)?, count),
                false => tally.defer(&loss, correct_on_device(&logits, &labels)?, count)?,
            }
            Ok(())
        };
        place = Place::Batch {
            batch: index as u64 + 1,
            images: count,
        };
        evaluated().map_err(Error::tensor("the evaluation", place))?;
        done += count;
        if progress(done).is_break() {
            return Ok(None);
        }
    }
    tally
        .read()
        .map_err(Error::tensor("the evaluation", place))?;
    Ok(Some(tally.sums))
}

/// Loss and right answers of the batches so far.
#[derive(Default)]
struct Tally {
    sums: EvaluationSums,
    /// Loss, right answers (each f32, (1,)) and images of batches that the host has not waited for.
    deferred: Vec<(Tensor, Tensor, u64)>,
}

impl Tally {
    fn add(&mut self, loss: f32, correct: u64, images: u64) {
        self.sums.loss += f64::from(loss) * images as f64;
        self.sums.correct += correct;
        self.sums.images += images;
    }

    fn defer(&mut self, loss: &Tensor, correct: Tensor, images: u64) -> candle_core::Result<()> {
        let loss = loss.detach().to_dtype(DType::F32)?.reshape(1)?;
        self.deferred.push((loss, correct, images));
        Ok(())
    }

    /// Adds what was deferred, in its order. The only wait for the device.
    fn read(&mut self) -> candle_core::Result<()> {
        let deferred = std::mem::take(&mut self.deferred);
        if deferred.is_empty() {
            return Ok(());
        }
        let losses: Vec<&Tensor> = deferred.iter().map(|(loss, _, _)| loss).collect();
        let corrects: Vec<&Tensor> = deferred.iter().map(|(_, correct, _)| correct).collect();
        let losses = Tensor::cat(&losses, 0)?.to_vec1::<f32>()?;
        let corrects = Tensor::cat(&corrects, 0)?.to_vec1::<f32>()?;
        for ((loss, correct), (_, _, images)) in losses.into_iter().zip(corrects).zip(&deferred) {
            self.add(loss, correct as u64, *images);
        }
        Ok(())
    }
}

/// The value of a scalar tensor. Waits for the device.
pub(crate) fn scalar(tensor: &Tensor) -> candle_core::Result<f32> {
    tensor.to_dtype(DType::F32)?.to_scalar()
}

/// Rows of `logits` `(N, C)` whose first maximum stands at the label. Waits for the device.
pub(crate) fn count_correct(logits: &Tensor, labels: &Tensor) -> candle_core::Result<u64> {
    let rows = logits.detach().to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let labels = labels.to_vec1::<u32>()?;
    let right = rows.iter().zip(&labels);
    let right = right.filter(|(row, label)| first_maximum(row) == **label as usize);
    Ok(right.count() as u64)
}

/// The class that logits answer: the first of the largest, where a NaN is neither larger nor smaller than another.
pub fn first_maximum(logits: &[f32]) -> usize {
    let mut best = 0;
    for (class, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = class;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cifar_data::{Split, shapes};

    use super::*;
    use crate::tiny_model::TinyModel;

    fn test_set(images: usize) -> NamedSet {
        NamedSet {
            name: "test",
            images: Arc::new(shapes::generate(1, Split::Test, images)),
        }
    }

    #[test]
    fn a_set_is_evaluated_whole_in_batches_until_progress_breaks_off() {
        let model = TinyModel::new(3);
        let set = test_set(11);
        let evaluated = |batch_size, progress: &mut dyn FnMut(u64) -> ControlFlow<()>| {
            let (half, cpu) = (Normalization::HALF, &Device::Cpu);
            evaluate(&model, &set, batch_size, half, cpu, progress).unwrap()
        };
        let mut heard = Vec::new();
        let in_batches = evaluated(4, &mut |done| {
            heard.push(done);
            ControlFlow::Continue(())
        });
        assert_eq!(heard, [4, 8, 11]);
        let at_once = evaluated(11, &mut |_| ControlFlow::Continue(()));
        let (in_batches, at_once) = (in_batches.unwrap(), at_once.unwrap());
        assert_eq!(in_batches.correct, at_once.correct);
        assert!((in_batches.loss - at_once.loss).abs() < 1e-6);
        assert_eq!(evaluated(4, &mut |_| ControlFlow::Break(())), None);
    }

    #[test]
    fn an_empty_set_has_no_accuracy() {
        let (half, cpu) = (Normalization::HALF, &Device::Cpu);
        let on = &mut |_| ControlFlow::Continue(());
        let error = evaluate(&TinyModel::new(3), &test_set(0), 4, half, cpu, on).unwrap_err();
        assert!(matches!(error, Error::EmptySet { set: "test" }), "{error}");
    }

    #[test]
    fn the_first_of_equal_logits_is_the_answer() {
        let logits =
            Tensor::new(&[[0f32, 2., 2.], [1., 0., 3.], [5., 5., 5.]], &Device::Cpu).unwrap();
        let labels = Tensor::new(&[1u32, 0, 0], &Device::Cpu).unwrap();
        assert_eq!(count_correct(&logits, &labels).unwrap(), 2);
    }

    #[test]
    fn batches_that_are_read_at_the_end_add_up_as_those_read_at_once() {
        let (mut at_once, mut deferred) = (Tally::default(), Tally::default());
        for (loss, correct, images) in [(2.25f32, 3u64, 5u64), (0.1, 1, 5), (1.7, 2, 2)] {
            at_once.add(loss, correct, images);
            let loss = Tensor::new(loss, &Device::Cpu).unwrap();
            let correct = Tensor::new(&[correct as f32], &Device::Cpu).unwrap();
            deferred.defer(&loss, correct, images).unwrap();
        }
        assert_eq!(deferred.sums.correct, 0);
        deferred.read().unwrap();
        let (deferred, at_once) = (deferred.sums, at_once.sums);
        assert_eq!(deferred.loss.to_bits(), at_once.loss.to_bits());
        assert_eq!(
            (deferred.correct, deferred.images),
            (at_once.correct, at_once.images)
        );
    }
}
