//! Batch normalisation over channels, training and inference.

#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use crate::element::{Element, dispatch, float_dtype, slice, with_slice};
use crate::error::OpError;

const OP: &str = "batch_norm";

/// What a training pass found out about its batch.
#[derive(Clone, Debug)]
pub struct BatchStatistics {
    /// Mean of each channel, (C).
    pub mean: Tensor,
    /// Unbiased variance of each channel, (C): what the running variance takes
    /// up (normalisation itself uses the biased one), as in PyTorch.
    pub unbiased_variance: Tensor,
}

/// Normalises each channel of `x` (N, C) or (N, C, …) by the statistics of
/// this batch, then scales by `weight` (C) and shifts by `bias` (C):
/// `(x − mean) / √(variance + eps) · weight + bias`.
///
/// As `torch.nn.functional.batch_norm(training=True)`: the variance is the
/// biased one. Gradients flow through the statistics. f32 and f64, sums in
/// f64. To keep running statistics, mix the returned ones in with
/// [`update_running`].
///
/// # Errors
/// [`OpError`] for shapes that do not fit, a channel with a single value (its
/// variance is 0 and PyTorch refuses it too), a negative `eps`, other dtypes.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[[1f32], [3.0]], &Device::Cpu)?;
/// let (weight, bias) = (Tensor::new(&[1f32], &Device::Cpu)?, Tensor::new(&[0f32], &Device::Cpu)?);
/// let (y, statistics) = candle_cnn::batch_norm_train(&x, &weight, &bias, 0.0)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[-1.0], [1.0]]);
/// assert_eq!(statistics.unbiased_variance.to_vec1::<f32>()?, [2.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn batch_norm_train(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<(Tensor, BatchStatistics)> {
    let sizes = Sizes::new(x, weight, bias, eps)?;
    if sizes.count() < 2 {
        return Err(OpError::rank(
            OP,
            "input",
            x,
            "more than one value per channel in training",
        ));
    }
    let statistics = std::sync::Arc::new(OnceLock::new());
    let op = BatchNorm {
        sizes,
        eps,
        source: Source::Batch(statistics.clone()),
    };
    let y = x
        .contiguous()?
        .apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)?;
    let moments = statistics.get().ok_or_else(|| OpError::device(OP, x))?;
    let tensor = |values: Vec<f64>| {
        Tensor::from_vec(values, sizes.channels, x.device())?.to_dtype(x.dtype())
    };
    let correction = sizes.count() as f64 / (sizes.count() - 1) as f64;
    let statistics = BatchStatistics {
        mean: tensor(moments.iter().map(|m| m.mean).collect())?,
        unbiased_variance: tensor(moments.iter().map(|m| m.variance * correction).collect())?,
    };
    Ok((y, statistics))
}

/// Normalises each channel of `x` by the given running statistics, as
/// `torch.nn.functional.batch_norm(training=False)`.
///
/// `running_mean` and `running_variance` have shape (C) and receive no gradient.
///
/// # Errors
/// As [`batch_norm_train`], but one value per channel is enough.
pub fn batch_norm_eval(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    running_mean: &Tensor,
    running_variance: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    let sizes = Sizes::new(x, weight, bias, eps)?;
    let values = |name, tensor: &Tensor| -> Result<Vec<f64>> {
        if tensor.dims() != [sizes.channels] {
            return Err(OpError::Shapes {
                op: OP,
                left_name: "input",
                left: x.dims().to_vec(),
                right_name: name,
                right: tensor.dims().to_vec(),
                rule: "one value per channel",
            }
            .into());
        }
        tensor.to_dtype(candle_core::DType::F64)?.to_vec1()
    };
    let means = values("running mean", running_mean)?;
    let variances = values("running variance", running_variance)?;
    let moments = means
        .into_iter()
        .zip(variances)
        .map(|(mean, variance)| Moments { mean, variance })
        .collect();
    let op = BatchNorm {
        sizes,
        eps,
        source: Source::Running(moments),
    };
    x.contiguous()?
        .apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)
}

/// `running ← (1 − momentum) · running + momentum · batch`, PyTorch's momentum.
///
/// # Errors
/// Shapes or dtypes that differ.
pub fn update_running(running: &Tensor, batch: &Tensor, momentum: f64) -> Result<Tensor> {
    running.detach().affine(1.0 - momentum, 0.0)? + batch.detach().affine(momentum, 0.0)?
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    channels: usize,
    /// Pixels per plane.
    pixels: usize,
}

impl Sizes {
    fn new(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Self> {
        float_dtype(OP, &[x, weight, bias])?;
        let [batch, channels, rest @ ..] = x.dims() else {
            return Err(OpError::rank(OP, "input", x, "(N, C) or (N, C, …)"));
        };
        for (name, tensor) in [("weight", weight), ("bias", bias)] {
            if tensor.dims() != [*channels] {
                return Err(OpError::Shapes {
                    op: OP,
                    left_name: "input",
                    left: x.dims().to_vec(),
                    right_name: name,
                    right: tensor.dims().to_vec(),
                    rule: "one value per channel",
                }
                .into());
            }
        }
        if eps.is_nan() || eps < 0.0 {
            return Err(OpError::setting(OP, "eps", eps, "at least 0"));
        }
        Ok(Self {
            batch: *batch,
            channels: *channels,
            pixels: rest.iter().product(),
        })
    }

    /// Values per channel.
    fn count(&self) -> usize {
        self.batch * self.pixels
    }

    /// One channel's values: a run of pixels per image.
    fn channel<'a, T>(&self, data: &'a [T], c: usize) -> impl Iterator<Item = &'a [T]> + Clone {
        let (channels, pixels) = (self.channels, self.pixels);
        (0..self.batch).map(move |n| &data[(n * channels + c) * pixels..][..pixels])
    }
}

/// Mean and biased variance of a channel.
#[derive(Clone, Copy, Debug)]
struct Moments {
    mean: f64,
    variance: f64,
}

/// Where the statistics come from.
enum Source {
    /// This batch; the forward pass leaves them here.
    Batch(std::sync::Arc<OnceLock<Vec<Moments>>>),
    /// Given ones.
    Running(Vec<Moments>),
}

struct BatchNorm {
    sizes: Sizes,
    eps: f64,
    source: Source,
}

/// The gradients of one pass.
struct Gradients<T> {
    x: Option<Vec<T>>,
    weight: Vec<T>,
    bias: Vec<T>,
}

impl BatchNorm {
    fn moments(&self) -> &[Moments] {
        match &self.source {
            Source::Batch(cell) => cell.get().map_or(&[], Vec::as_slice),
            Source::Running(moments) => moments,
        }
    }

    fn forward<T: Element>(&self, x: &[T], weight: &[T], bias: &[T]) -> Vec<T> {
        if let Source::Batch(cell) = &self.source {
            let channels = (0..self.sizes.channels).into_par_iter();
            cell.get_or_init(|| channels.map(|c| self.channel_moments(x, c)).collect());
        }
        let mut y = vec![T::ZERO; x.len()];
        if self.sizes.pixels == 0 {
            return y;
        }
        let moments = self.moments();
        y.par_chunks_mut(self.sizes.pixels)
            .zip(x.par_chunks(self.sizes.pixels))
            .enumerate()
            .with_min_len(16)
            .for_each(|(plane, (y, x))| {
                let c = plane % self.sizes.channels;
                let Moments { mean, variance } = moments[c];
                let scale = weight[c].as_f64() / (variance + self.eps).sqrt();
                let shift = T::real(bias[c].as_f64() - mean * scale);
                let scale = T::real(scale);
                for (y, &x) in y.iter_mut().zip(x) {
                    *y = x * scale + shift;
                }
            });
        y
    }

    /// Two passes, so that a large mean does not cancel the variance away.
    fn channel_moments<T: Element>(&self, x: &[T], c: usize) -> Moments {
        let count = self.sizes.count() as f64;
        let sum = |f: &dyn Fn(f64) -> f64| -> f64 {
            let planes = self.sizes.channel(x, c);
            planes
                .map(|plane| plane.iter().map(|v| f(v.as_f64())).sum::<f64>())
                .sum()
        };
        let mean = sum(&|v| v) / count;
        let variance = sum(&|v| (v - mean) * (v - mean)) / count;
        Moments { mean, variance }
    }

    /// With x̂ = (x − mean)/σ: dbias = Σ dy, dweight = Σ dy·x̂ and, through the
    /// batch's statistics, dx = weight/σ · (dy − dbias/m − x̂·dweight/m); with
    /// running statistics the two corrections fall away.
    fn backward<T: Element>(&self, x: &[T], weight: &[T], dy: &[T], need_x: bool) -> Gradients<T> {
        let moments = self.moments();
        let inverse_std = |c: usize| 1.0 / (moments[c].variance + self.eps).sqrt();
        let sums: Vec<(f64, f64)> = (0..self.sizes.channels)
            .into_par_iter()
            .map(|c| {
                let (mut bias, mut weight) = (0.0, 0.0);
                for (x, dy) in self.sizes.channel(x, c).zip(self.sizes.channel(dy, c)) {
                    for (x, dy) in x.iter().zip(dy) {
                        bias += dy.as_f64();
                        weight += dy.as_f64() * (x.as_f64() - moments[c].mean);
                    }
                }
                (bias, weight * inverse_std(c))
            })
            .collect();
        let through_batch = matches!(self.source, Source::Batch(_));
        let dx = (need_x && self.sizes.pixels > 0).then(|| {
            let count = self.sizes.count() as f64;
            let mut dx = vec![T::ZERO; x.len()];
            dx.par_chunks_mut(self.sizes.pixels)
                .zip(
                    x.par_chunks(self.sizes.pixels)
                        .zip(dy.par_chunks(self.sizes.pixels)),
                )
                .enumerate()
                .with_min_len(16)
                .for_each(|(plane, (dx, (x, dy)))| {
                    let c = plane % self.sizes.channels;
                    let inverse_std = inverse_std(c);
                    let scale = weight[c].as_f64() * inverse_std;
                    let (dbias, dweight) = if through_batch { sums[c] } else { (0.0, 0.0) };
                    let slope = dweight / count * inverse_std;
                    let mean = T::real(moments[c].mean);
                    let (scale, offset, slope) =
                        (T::real(scale), T::real(dbias / count), T::real(slope));
                    for (dx, (&x, &dy)) in dx.iter_mut().zip(x.iter().zip(dy)) {
                        *dx = scale * (dy - offset - (x - mean) * slope);
                    }
                });
            dx
        });
        Gradients {
            x: dx,
            weight: sums.iter().map(|s| T::real(s.1)).collect(),
            bias: sums.iter().map(|s| T::real(s.0)).collect(),
        }
    }
}

impl CustomOp3 for BatchNorm {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        dispatch!(OP, x.dtype(), T => {
            let y = self.forward(
                slice::<T>(OP, x, x_layout)?,
                slice::<T>(OP, weight, weight_layout)?,
                slice::<T>(OP, bias, bias_layout)?,
            );
            Ok((T::to_cpu_storage_owned(y), x_layout.shape().clone()))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        dispatch!(OP, x.dtype(), T => {
            let gradients = with_slice::<T, _>(OP, x, |x_data| {
                with_slice::<T, _>(OP, weight, |weight| {
                    with_slice::<T, _>(OP, &dy, |dy| {
                        Ok(self.backward(x_data, weight, dy, x.track_op()))
                    })
                })
            })?;
            let channels = |values, needed: bool| {
                needed
                    .then(|| Tensor::from_vec(values, self.sizes.channels, x.device()))
                    .transpose()
            };
            let dx = gradients.x.map(|dx| Tensor::from_vec(dx, x.shape(), x.device()));
            Ok((
                dx.transpose()?,
                channels(gradients.weight, weight.track_op())?,
                channels(gradients.bias, bias.track_op())?,
            ))
        })
    }
}
