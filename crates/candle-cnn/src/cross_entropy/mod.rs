//! Cross entropy of logits against class labels.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, WithDType};

use crate::element::{Element, dispatch, float_dtype, slice, with_slices};
use crate::error::OpError;

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

const OP: &str = "cross_entropy";

/// Settings of [`cross_entropy`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CrossEntropyConfig {
    /// Share of the target that is spread evenly over all classes, from 0 to 1.
    pub label_smoothing: f64,
}

/// Mean over the batch of `−Σ_c target[c] · log softmax(logits)[c]`, a scalar.
///
/// `logits` has shape (N, C) in f32 or f64; `labels` has shape (N) in u8, u32
/// or i64, each below C. The target is 1 at the label, smoothed as
/// `torch.nn.functional.cross_entropy` does: `(1 − ε)` at the label plus
/// `ε / C` everywhere. Computed in f64 inside. Where a logit is NaN or +∞, so are the loss and the example's gradient NaN.
///
/// PyTorch's `weight`, `ignore_index` and `reduction` are not there, and neither are probabilities as targets and further dimensions.
///
/// On CUDA the host does not look at the labels: one that is not below C makes the loss NaN. The loss of logits in bf16
/// is f32.
///
/// # Errors
/// Shapes that do not fit, an empty batch, a label that is not below C, a
/// smoothing outside of 0 to 1, other dtypes.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_cnn::{CrossEntropyConfig, cross_entropy};
/// let logits = Tensor::zeros((2, 10), candle_core::DType::F32, &Device::Cpu)?;
/// let labels = Tensor::new(&[3u32, 9], &Device::Cpu)?;
/// let loss = cross_entropy(&logits, &labels, CrossEntropyConfig::default())?;
/// assert!((loss.to_scalar::<f32>()? - 10f32.ln()).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn cross_entropy(
    logits: &Tensor,
    labels: &Tensor,
    config: CrossEntropyConfig,
) -> Result<Tensor> {
    float_dtype(OP, &[logits])?;
    let Ok((examples, classes)) = logits.dims2() else {
        return Err(OpError::shape(OP, "logits", logits, "(N, C)"));
    };
    if labels.dims() != [examples] || examples == 0 || classes == 0 {
        return Err(OpError::shapes(
            OP,
            ("logits", logits.dims()),
            ("labels", labels.dims()),
            "logits are (N, C), labels (N), with N and C at least 1",
        ));
    }
    if !(0.0..=1.0).contains(&config.label_smoothing) {
        let found = config.label_smoothing;
        return Err(OpError::setting(
            OP,
            "label_smoothing",
            found,
            "from 0 to 1",
        ));
    }
    if !matches!(labels.dtype(), DType::U8 | DType::U32 | DType::I64) {
        return Err(OpError::setting(
            OP,
            "dtype of labels",
            labels.dtype(),
            "U8, U32 or I64",
        ));
    }
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda() {
        let labels = labels.to_dtype(DType::U32)?.contiguous()?;
        return cuda::loss(logits, &labels, config.label_smoothing);
    }
    let labels = labels.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    for (example, &label) in labels.iter().enumerate() {
        if label < 0 || label >= classes as i64 {
            return Err(OpError::Label {
                op: OP,
                example,
                label,
                classes,
            }
            .into());
        }
    }
    let labels = labels.into_iter().map(|label| label as usize).collect();
    logits.contiguous()?.apply_op1(CrossEntropy {
        labels,
        classes,
        config,
    })
}

struct CrossEntropy {
    labels: Vec<usize>,
    classes: usize,
    config: CrossEntropyConfig,
}

impl CrossEntropy {
    fn target(&self, class: usize, label: usize) -> f64 {
        let smoothing = self.config.label_smoothing;
        let at_label = if class == label { 1.0 - smoothing } else { 0.0 };
        at_label + smoothing / self.classes as f64
    }

    fn loss<T: Element>(&self, logits: &[T]) -> T {
        let mut total = 0.0;
        for (row, &label) in logits.chunks_exact(self.classes).zip(&self.labels) {
            let log_sum = log_sum_exp(row);
            for (class, &logit) in row.iter().enumerate() {
                let target = self.target(class, label);
                // 0 · ∞ would make a NaN of a class that has no share.
                if target != 0.0 {
                    total += target * (log_sum - logit.as_f64());
                }
            }
        }
        T::real(total / self.labels.len() as f64)
    }

    fn gradient<T: Element>(&self, logits: &[T], upstream: f64) -> Vec<T> {
        let scale = upstream / self.labels.len() as f64;
        let mut gradient = Vec::with_capacity(logits.len());
        for (row, &label) in logits.chunks_exact(self.classes).zip(&self.labels) {
            let log_sum = log_sum_exp(row);
            for (class, &logit) in row.iter().enumerate() {
                let probability = (logit.as_f64() - log_sum).exp();
                gradient.push(T::real(scale * (probability - self.target(class, label))));
            }
        }
        gradient
    }
}

/// `log Σ exp(row)`, shifted by the maximum so that nothing overflows.
fn log_sum_exp<T: Element>(row: &[T]) -> f64 {
    let max = row
        .iter()
        .fold(f64::NEG_INFINITY, |max, v| max.max(v.as_f64()));
    if max.is_infinite() {
        // The shift would be ∞ − ∞. With a +∞ in the row nothing is left to compute with; otherwise all are −∞.
        let is_nan = max > 0.0 || row.iter().any(|v| v.is_nan());
        return if is_nan { f64::NAN } else { max };
    }
    max + row
        .iter()
        .map(|v| (v.as_f64() - max).exp())
        .sum::<f64>()
        .ln()
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        dispatch!(OP, logits.dtype(), T => {
            let loss = self.loss(slice::<T>(OP, logits, layout)?);
            Ok((T::to_cpu_storage_owned(vec![loss]), Shape::from(())))
        })
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        if !logits.track_op() {
            return Ok(None);
        }
        let upstream = upstream.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        dispatch!(OP, logits.dtype(), T => {
            let gradient =
                with_slices::<T, _, _>(OP, [logits], |[logits]| Ok(self.gradient(logits, upstream)))?;
            Ok(Some(Tensor::from_vec(gradient, logits.shape(), logits.device())?))
        })
    }
}
