//! Loss and accuracy over a whole set.

use std::ops::ControlFlow;
use std::sync::Arc;

use candle_cnn::{CrossEntropyConfig, Mode, cross_entropy};
use candle_core::{DType, Device, Tensor};
use cifar_data::{ImageSet, Normalization};
use serde::{Deserialize, Serialize};

use crate::data::{Examples, batches};
use crate::error::{Error, Result};
use crate::model::Model;

/// What a network makes of a set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean cross entropy over the images, without label smoothing.
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
/// [`Error::Data`], [`Error::Tensor`].
pub fn evaluate(
    model: &dyn Model,
    set: (&'static str, &Arc<ImageSet>),
    batch_size: usize,
    normalization: Normalization,
    device: &Device,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<Option<Evaluation>> {
    let (name, images) = set;
    let order = (0..images.len() as u32).collect();
    let batches = batches(name, images, order, batch_size, normalization, device, 0)?;
    let batches = batches.map(|batch| batch.map(Examples::from).map_err(Error::data(name)));
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
    let mut sums = EvaluationSums::default();
    for (index, batch) in batches.enumerate() {
        let Examples {
            inputs,
            labels,
            count,
        } = batch?;
        let evaluated = || {
            let logits = logits(&inputs)?;
            let loss = cross_entropy(&logits, &labels, CrossEntropyConfig::default())?;
            Ok((scalar(&loss)?, count_correct(&logits, &labels)?))
        };
        let (loss, batch_correct) = evaluated().map_err(|source| Error::Tensor {
            during: "the evaluation",
            step: index as u64 + 1,
            source,
        })?;
        sums.loss += f64::from(loss) * count as f64;
        sums.correct += batch_correct;
        sums.images += count;
        if progress(sums.images).is_break() {
            return Ok(None);
        }
    }
    Ok(Some(sums))
}

/// The value of a scalar tensor. Waits for the device.
pub(crate) fn scalar(tensor: &Tensor) -> candle_core::Result<f32> {
    tensor.to_dtype(DType::F32)?.to_scalar()
}

/// Rows of `logits` `(N, C)` whose first maximum stands at the label. Waits for the device.
pub(crate) fn count_correct(logits: &Tensor, labels: &Tensor) -> candle_core::Result<u64> {
    let rows = logits.detach().to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let labels = labels.to_vec1::<u32>()?;
    let right = rows.iter().zip(&labels).filter(|(row, label)| {
        let mut best = 0;
        for (class, &logit) in row.iter().enumerate() {
            if logit > row[best] {
                best = class;
            }
        }
        best == **label as usize
    });
    Ok(right.count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_equal_logits_is_the_answer() {
        let logits =
            Tensor::new(&[[0f32, 2., 2.], [1., 0., 3.], [5., 5., 5.]], &Device::Cpu).unwrap();
        let labels = Tensor::new(&[1u32, 0, 0], &Device::Cpu).unwrap();
        assert_eq!(count_correct(&logits, &labels).unwrap(), 2);
    }
}
