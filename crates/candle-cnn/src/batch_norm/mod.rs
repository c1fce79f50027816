//! Batch normalisation over channels, training and inference.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, WithDType};

use crate::activation::Activation;
use crate::backward::aside;
use crate::element::{Element, dispatch, float_dtype, slice, with_slices};
use crate::error::OpError;
use crate::simd::Isa;
use cpu::{Affine, InputGradient};

const OP: &str = "batch_norm";

/// What a training pass found out about its batch.
///
/// Numbers for the running statistics, which carry no gradient, as PyTorch's running statistics carry none: a loss of
/// them moves nothing. Where a loss needs the mean or variance of a batch, compute it from the input.
#[derive(Clone, Debug)]
pub struct BatchStatistics {
    /// Mean of each channel, (C).
    pub mean: Tensor,
    /// Unbiased variance of each channel, (C): what the running variance takes
    /// up (normalisation itself uses the biased one), as in PyTorch.
    pub unbiased_variance: Tensor,
}

/// What evaluation normalises by, of each channel: (C), and no gradient comes to it.
#[derive(Clone, Copy, Debug)]
pub struct RunningStatistics<'a> {
    /// The running mean.
    pub mean: &'a Tensor,
    /// The running variance, PyTorch's `running_var`.
    pub variance: &'a Tensor,
}

/// Normalises each channel of `x` (N, C) or (N, C, …) by the statistics of
/// this batch, then scales by `weight` (C) and shifts by `bias` (C):
/// `(x − mean) / √(variance + eps) · weight + bias`.
///
/// As `torch.nn.functional.batch_norm(training=True)`: the variance is the
/// biased one. Gradients flow through the statistics that normalise; those that
/// are returned carry none. f32 and f64, weight and bias likewise; on CUDA bf16
/// too, whose weight and bias are f32. Sums in f64 (on CUDA by parts, which are
/// joined in f64). To keep running statistics, mix the returned ones in with
/// [`update_running`].
///
/// # Errors
/// [`OpError`] for shapes that do not fit, a channel with a single value (its
/// variance is 0 and PyTorch refuses it too) or with none (an empty batch has
/// no statistics), a negative `eps` (0, which PyTorch refuses, divides by 0 where a channel has one value throughout), other
/// dtypes.
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
    train(x, weight, bias, eps, Activation::Identity)
}

/// [`batch_norm_train`] followed by [`crate::relu`], in one pass over the output.
///
/// Equal to the two operations one after the other, bit for bit, in the
/// gradients too. The statistics are those of the batch norm's input.
///
/// # Errors
/// As [`batch_norm_train`].
pub fn batch_norm_relu_train(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<(Tensor, BatchStatistics)> {
    train(x, weight, bias, eps, Activation::Relu)
}

/// Normalises each channel of `x` by the given running statistics, as
/// `torch.nn.functional.batch_norm(training=False)`.
///
/// # Errors
/// As [`batch_norm_train`], but one value per channel is enough, and none gives an empty result.
pub fn batch_norm_eval(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    running: RunningStatistics<'_>,
    eps: f64,
) -> Result<Tensor> {
    evaluate(x, weight, bias, running, eps, Activation::Identity)
}

/// [`batch_norm_eval`] followed by [`crate::relu`], in one pass over the output.
///
/// # Errors
/// As [`batch_norm_eval`].
pub fn batch_norm_relu_eval(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    running: RunningStatistics<'_>,
    eps: f64,
) -> Result<Tensor> {
    evaluate(x, weight, bias, running, eps, Activation::Relu)
}

/// `running ← (1 − momentum) · running + momentum · batch`, PyTorch's momentum. The result is for the caller to keep;
/// PyTorch's `momentum=None` is 1 / n at the n-th batch.
///
/// # Errors
/// Shapes or dtypes that differ.
pub fn update_running(running: &Tensor, batch: &Tensor, momentum: f64) -> Result<Tensor> {
    running.detach().affine(1.0 - momentum, 0.0)? + batch.detach().affine(momentum, 0.0)?
}

fn train(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    activation: Activation,
) -> Result<(Tensor, BatchStatistics)> {
    let sizes = Sizes::new(x, weight, bias, eps)?;
    if sizes.count() < 2 {
        return Err(OpError::shape(
            OP,
            "input",
            x,
            "more than one value per channel in training",
        ));
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::train([x, weight, bias], sizes, eps, activation);
    }
    let statistics = std::sync::Arc::new(OnceLock::new());
    let op = BatchNorm {
        sizes,
        eps,
        source: Source::Batch(statistics.clone()),
        activation,
    };
    let y = x
        .contiguous()?
        .apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)?;
    let moments = left_behind(&statistics)?;
    Ok((y, BatchStatistics::new(moments, sizes.count(), x)?))
}

/// The statistics that the forward pass has left.
fn left_behind<T>(statistics: &OnceLock<T>) -> Result<&T> {
    let none = || OpError::NoStatistics { op: OP }.into();
    statistics.get().ok_or_else(none)
}

impl BatchStatistics {
    /// The statistics of `count` values per channel, as tensors of the type and on the device of `like`.
    pub(crate) fn new(moments: &[Moments], count: usize, like: &Tensor) -> Result<Self> {
        let tensor = |values: Vec<f64>| {
            Tensor::from_vec(values, moments.len(), like.device())?.to_dtype(like.dtype())
        };
        let correction = count as f64 / (count - 1) as f64;
        let variances = moments.iter().map(|m| m.variance * correction);
        Ok(Self {
            mean: tensor(moments.iter().map(|m| m.mean).collect())?,
            unbiased_variance: tensor(variances.collect())?,
        })
    }
}

fn evaluate(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    running: RunningStatistics<'_>,
    eps: f64,
    activation: Activation,
) -> Result<Tensor> {
    let sizes = Sizes::new(x, weight, bias, eps)?;
    let check = |name, tensor: &Tensor| -> Result<()> {
        if tensor.dims() != [sizes.channels] {
            return Err(OpError::shapes(
                OP,
                ("input", x.dims()),
                (name, tensor.dims()),
                "one value per channel",
            ));
        }
        Ok(())
    };
    check("running mean", running.mean)?;
    check("running variance", running.variance)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let dtype = weight.dtype();
        let running = (
            &running.mean.to_dtype(dtype)?,
            &running.variance.to_dtype(dtype)?,
        );
        return cuda::evaluate([x, weight, bias], sizes, running, eps, activation);
    }
    let values = |tensor: &Tensor| tensor.to_dtype(DType::F64)?.to_vec1::<f64>();
    let (means, variances) = (values(running.mean)?, values(running.variance)?);
    let moments = means
        .into_iter()
        .zip(variances)
        .map(|(mean, variance)| Moments { mean, variance })
        .collect();
    let op = BatchNorm {
        sizes,
        eps,
        source: Source::Running(moments),
        activation,
    };
    x.contiguous()?
        .apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)
}

/// Refuses a parameter of another dtype than the one that goes with an input of dtype `input`.
fn check_dtype(input: DType, name: &'static str, found: DType) -> Result<()> {
    // Parameters of activations in bf16, which only CUDA has, are f32.
    let expected = match input {
        DType::BF16 => DType::F32,
        same => same,
    };
    if found != expected {
        return Err(OpError::ParameterDType {
            op: OP,
            name,
            found,
            expected,
            input,
        }
        .into());
    }
    Ok(())
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
        let dtype = float_dtype(OP, &[x])?;
        for (name, tensor) in [("weight", weight), ("bias", bias)] {
            check_dtype(dtype, name, tensor.dtype())?;
        }
        let [batch, channels, rest @ ..] = x.dims() else {
            return Err(OpError::shape(OP, "input", x, "(N, C) or (N, C, …)"));
        };
        for (name, tensor) in [("weight", weight), ("bias", bias)] {
            if tensor.dims() != [*channels] {
                return Err(OpError::shapes(
                    OP,
                    ("input", x.dims()),
                    (name, tensor.dims()),
                    "one value per channel",
                ));
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
}

/// Mean and biased variance of a channel.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moments {
    pub(crate) mean: f64,
    pub(crate) variance: f64,
}

impl Moments {
    /// `1/σ`, where `eps` keeps σ from 0.
    pub(crate) fn inverse_std(&self, eps: f64) -> f64 {
        1.0 / (self.variance + eps).sqrt()
    }
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
    activation: Activation,
}

/// Which gradients somebody needs.
#[derive(Clone, Copy)]
struct Needs {
    x: bool,
    /// The gradient of the weight, of the bias, or of both.
    parameters: bool,
}

/// The gradients of one pass, as far as they were needed.
struct Gradients<T> {
    x: Option<Vec<T>>,
    /// The gradients of weight and bias. Where the batch's own statistics normalise, the input's gradient takes their sums as
    /// well.
    parameters: Option<(Vec<T>, Vec<T>)>,
}

impl BatchNorm {
    fn moments(&self) -> &[Moments] {
        match &self.source {
            Source::Batch(cell) => cell.get().map_or(&[], Vec::as_slice),
            Source::Running(moments) => moments,
        }
    }

    /// `(x − mean)/σ · weight + bias`, as each channel's numbers.
    fn affine<T: Element>(&self, weight: &[T], bias: &[T]) -> Vec<Affine<T>> {
        let parameters = weight.iter().zip(bias);
        let channels = self.moments().iter().zip(parameters);
        channels
            .map(|(&moments, (weight, &bias))| Affine {
                mean: T::real(moments.mean),
                scale: T::real(weight.as_f64() * moments.inverse_std(self.eps)),
                bias,
            })
            .collect()
    }

    fn forward<T: Element>(&self, isa: Isa, x: &[T], weight: &[T], bias: &[T]) -> Vec<T> {
        if let Source::Batch(cell) = &self.source {
            cell.get_or_init(|| cpu::moments(&self.sizes, isa, x));
        }
        let affine = self.affine(weight, bias);
        cpu::apply(&self.sizes, isa, x, &affine, self.activation)
    }

    /// With x̂ = (x − mean)/σ: dbias = Σ dy, dweight = Σ dy·x̂ and, through the
    /// batch's statistics, dx = weight/σ · (dy − dbias/m − x̂·dweight/m); with
    /// running statistics the two corrections fall away. Behind a ReLU, dy
    /// counts where its input is positive.
    fn backward<T: Element>(
        &self,
        isa: Isa,
        (x, dy): (&[T], &[T]),
        (weight, bias): (&[T], &[T]),
        needs: Needs,
    ) -> Gradients<T> {
        let moments = self.moments();
        let affine = self.affine(weight, bias);
        let masks = (self.activation == Activation::Relu).then_some(affine.as_slice());
        // With running statistics there are no corrections, and so no need for the sums.
        let of_batch = matches!(self.source, Source::Batch(_));
        let sums = (needs.parameters || of_batch).then(|| {
            let sums = cpu::gradient_sums(&self.sizes, isa, (x, dy), moments, masks);
            let both = sums.iter().zip(moments);
            both.map(|(sums, &moments)| (sums.dy_x * moments.inverse_std(self.eps), sums.dy))
                .unzip()
        });
        let sums: Option<(Vec<f64>, Vec<f64>)> = sums;
        let dx = needs.x.then(|| {
            let share = 1.0 / self.sizes.count() as f64;
            let numbers: Vec<InputGradient<T>> = (0..self.sizes.channels)
                .map(|c| {
                    let inverse_std = moments[c].inverse_std(self.eps);
                    let sums = sums.as_ref();
                    let (dweight, dbias) = sums.map_or((0.0, 0.0), |(w, b)| (w[c], b[c]));
                    InputGradient {
                        scale: affine[c].scale,
                        offset: T::real(dbias * share),
                        slope: T::real(dweight * share * inverse_std),
                        affine: affine[c],
                    }
                })
                .collect();
            let activation = self.activation;
            cpu::input_gradient(&self.sizes, isa, (x, dy), &numbers, of_batch, activation)
        });
        let narrow = |values: Vec<f64>| values.into_iter().map(T::real).collect();
        Gradients {
            x: dx,
            parameters: sums.map(|(dweight, dbias)| (narrow(dweight), narrow(dbias))),
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
                Isa::detect(),
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
            let needs = Needs {
                x: x.track_op(),
                parameters: weight.track_op() || bias.track_op(),
            };
            let tensors = [x, &dy, weight, bias];
            let gradients = with_slices::<T, _, _>(OP, tensors, |[x, dy, weight, bias]| {
                Ok(self.backward(Isa::detect(), (x, dy), (weight, bias), needs))
            })?;
            let channels = |values: Option<Vec<T>>, needed: bool| {
                let values = values.filter(|_| needed);
                let tensor = values.map(|v| Tensor::from_vec(v, self.sizes.channels, x.device()));
                tensor.transpose()
            };
            let (dweight, dbias) = gradients.parameters.unzip();
            let dx = gradients.x.map(|dx| Tensor::from_vec(dx, x.shape(), x.device()));
            Ok((
                dx.transpose()?,
                aside(weight, channels(dweight, weight.track_op())?),
                aside(bias, channels(dbias, bias.track_op())?),
            ))
        })
    }
}
