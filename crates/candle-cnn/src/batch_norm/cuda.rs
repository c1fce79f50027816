//! Batch normalisation on CUDA: statistics and sums in parts that are joined in a fixed order.

#![allow(unsafe_code)]

use std::sync::{Arc, OnceLock};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, DType, Error, Layout, Result, Shape, Tensor,
};

use super::{BatchStatistics, Needs, OP, Sizes, left_behind};
use crate::activation::Activation;
use crate::backward::aside;
use crate::cuda::kernels::Source;
use crate::cuda::launch::{Held, Launch, Operand, alloc, compute_dtype, count, tensor, zeros};
use crate::cuda::parts::parts_of;
use crate::error::OpError;

const SOURCE: Source = Source {
    file: "batch_norm/kernels.cu",
    text: include_str!("kernels.cu"),
};

/// Normalises by the statistics of this batch.
pub(super) fn train(
    [x, weight, bias]: [&Tensor; 3],
    sizes: Sizes,
    eps: f64,
    activation: Activation,
) -> Result<(Tensor, BatchStatistics)> {
    let statistics = Arc::new(OnceLock::new());
    let op = CudaBatchNorm {
        counts: Counts::new(&sizes, x)?,
        eps,
        statistics: statistics.clone(),
        of_batch: true,
        activation,
    };
    let y = x
        .contiguous()?
        .apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)?;
    let statistics = left_behind(&statistics)?;
    let statistics = BatchStatistics {
        mean: statistics.mean.clone(),
        unbiased_variance: statistics.unbiased_variance.clone(),
    };
    Ok((y, statistics))
}

/// Normalises by given statistics, of the shape and type of the weight.
pub(super) fn evaluate(
    [x, weight, bias]: [&Tensor; 3],
    sizes: Sizes,
    (mean, variance): (&Tensor, &Tensor),
    eps: f64,
    activation: Activation,
) -> Result<Tensor> {
    let (mean, variance) = (mean.detach().contiguous()?, variance.detach().contiguous()?);
    let held = Held::new(&variance);
    let operand = held.operand(OP)?;
    let (device, dtype) = (operand.0.device(), variance.dtype());
    let channels = count(OP, sizes.channels)?;
    let mut inverse_std = alloc(OP, device, dtype, sizes.channels)?;
    if channels > 0 {
        let stream = device.cuda_stream();
        let launch = kernel(device, &stream, "invert", dtype)?
            .read(operand)?
            .write(&mut inverse_std)?
            .number(channels)
            .double(eps);
        // SAFETY: the arguments of `invert`; both have `channels` values.
        unsafe { launch.run(channels) }?;
    }
    let op = CudaBatchNorm {
        counts: Counts::new(&sizes, x)?,
        eps,
        statistics: Arc::new(OnceLock::from(Statistics {
            mean,
            inverse_std: tensor(inverse_std, sizes.channels),
            unbiased_variance: variance.clone(),
        })),
        of_batch: false,
        activation,
    };
    x.contiguous()?
        .apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)
}

/// Statistics of each channel, (C) each, contiguous, of the parameters' type.
#[derive(Debug)]
struct Statistics {
    mean: Tensor,
    inverse_std: Tensor,
    unbiased_variance: Tensor,
}

/// What the kernels count by.
#[derive(Clone, Copy)]
struct Counts {
    images: u32,
    channels: u32,
    pixels: u32,
    elements: u32,
    /// Into how many parts a channel's values are cut, and values of a part.
    parts: u32,
    per_part: u32,
}

impl Counts {
    fn new(sizes: &Sizes, x: &Tensor) -> Result<Self> {
        let (parts, per_part) = parts_of(sizes.count());
        Ok(Self {
            images: count(OP, sizes.batch)?,
            channels: count(OP, sizes.channels)?,
            pixels: count(OP, sizes.pixels)?,
            elements: count(OP, x.elem_count())?,
            parts: count(OP, parts)?,
            per_part: count(OP, per_part)?,
        })
    }
}

struct CudaBatchNorm {
    counts: Counts,
    eps: f64,
    /// Left here by the forward pass where they are of the batch.
    statistics: Arc<OnceLock<Statistics>>,
    of_batch: bool,
    activation: Activation,
}

fn kernel<'a>(
    device: &CudaDevice,
    stream: &'a candle_core::cuda_backend::cudarc::driver::CudaStream,
    name: &str,
    dtype: DType,
) -> Result<Launch<'a>> {
    let name = format!("batch_norm_{name}");
    Launch::typed(OP, device, stream, &SOURCE, &name, dtype)
}

impl CudaBatchNorm {
    fn relu(&self) -> u32 {
        (self.activation == Activation::Relu).into()
    }

    /// Mean and variance of each channel of `x`, which is not empty.
    fn moments(&self, x: Operand) -> Result<Statistics> {
        let (device, dtype) = (x.0.device(), x.0.dtype());
        let stream = device.cuda_stream();
        let c = self.counts;
        let statistic = compute_dtype(dtype);
        let channels = c.channels as usize;
        let new = |elements: usize| alloc(OP, device, statistic, elements);
        let parts = channels * c.parts as usize;
        let mut means = alloc(OP, device, DType::F64, parts)?;
        let mut squares = new(parts)?;
        let launch = kernel(device, &stream, "moments", dtype)?
            .read(x)?
            .write(&mut means)?
            .write(&mut squares)?
            .number(c.images)
            .number(c.channels)
            .divisor(c.pixels as usize)
            .number(c.per_part);
        // SAFETY: the arguments of `moments`: x is (images, channels, pixels), the others (channels, parts), and the
        // parts cover a channel's values with none of them empty.
        unsafe { launch.run_blocks((c.channels, c.parts)) }?;
        let (mut mean, mut inverse_std, mut unbiased) =
            (new(channels)?, new(channels)?, new(channels)?);
        let launch = kernel(device, &stream, "join_moments", statistic)?
            .read_all(&means)?
            .read_all(&squares)?
            .write(&mut mean)?
            .write(&mut inverse_std)?
            .write(&mut unbiased)?
            .number(c.images * c.pixels)
            .number(c.channels)
            .number(c.parts)
            .number(c.per_part)
            .double(self.eps);
        // SAFETY: the arguments of `join_moments`: two of (channels, parts), three of (channels).
        unsafe { launch.run(c.channels) }?;
        Ok(Statistics {
            mean: tensor(mean, channels),
            inverse_std: tensor(inverse_std, channels),
            unbiased_variance: tensor(unbiased, channels),
        })
    }

    fn statistics(&self) -> Result<&Statistics> {
        left_behind(&self.statistics)
    }

    fn forward(&self, x: Operand, weight: Operand, bias: Operand) -> Result<CudaStorage> {
        let (device, dtype) = (x.0.device(), x.0.dtype());
        let c = self.counts;
        let mut y = alloc(OP, device, dtype, c.elements as usize)?;
        if c.elements == 0 {
            if self.of_batch {
                let (statistic, channels) = (compute_dtype(dtype), c.channels as usize);
                let empty =
                    || Ok::<_, Error>(tensor(zeros(device, statistic, channels)?, channels));
                let _ = self.statistics.set(Statistics {
                    mean: empty()?,
                    inverse_std: empty()?,
                    unbiased_variance: empty()?,
                });
            }
            return Ok(y);
        }
        if self.of_batch {
            let moments = self.moments(x)?;
            self.statistics.get_or_init(|| moments);
        }
        let statistics = self.statistics()?;
        let (mean, inverse_std) = (
            Held::new(&statistics.mean),
            Held::new(&statistics.inverse_std),
        );
        let stream = device.cuda_stream();
        let launch = kernel(device, &stream, "apply", dtype)?
            .read(x)?
            .write(&mut y)?
            .read(mean.operand(OP)?)?
            .read(inverse_std.operand(OP)?)?
            .read(weight)?
            .read(bias)?
            .divisor(c.channels as usize)
            .divisor(c.pixels as usize)
            .number(self.relu())
            .number(c.elements);
        // SAFETY: the arguments of `apply`: x and y are (images, channels, pixels), the others (channels).
        unsafe { launch.run(c.elements) }?;
        Ok(y)
    }

    fn backward(
        &self,
        maps: [Operand; 2],
        [weight, bias]: [Operand; 2],
        needs: Needs,
    ) -> Result<Gradients> {
        let statistics = self.statistics()?;
        let (mean, inverse_std) = (
            Held::new(&statistics.mean),
            Held::new(&statistics.inverse_std),
        );
        let numbers = [mean.operand(OP)?, inverse_std.operand(OP)?, weight, bias];
        let sums = (needs.parameters || self.of_batch)
            .then(|| self.gradient_sums(maps, numbers))
            .transpose()?;
        // Given statistics have no gradient, in which the input's would need the sums.
        let of_batch = sums.as_ref().filter(|_| self.of_batch);
        let x = needs
            .x
            .then(|| self.input_gradient(maps, numbers, of_batch))
            .transpose()?;
        Ok(Gradients { x, sums })
    }

    fn gradient_sums(&self, [x, dy]: [Operand; 2], numbers: [Operand; 4]) -> Result<GradientSums> {
        let (device, dtype) = (x.0.device(), x.0.dtype());
        let stream = device.cuda_stream();
        let c = self.counts;
        let statistic = compute_dtype(dtype);
        let channels = c.channels as usize;
        let mut sums = alloc(OP, device, statistic, 2 * channels * c.parts as usize)?;
        let mut launch = kernel(device, &stream, "gradient_sums", dtype)?
            .read(x)?
            .read(dy)?;
        for number in numbers {
            launch = launch.read(number)?;
        }
        let launch = launch
            .write(&mut sums)?
            .number(c.images)
            .number(c.channels)
            .divisor(c.pixels as usize)
            .number(c.per_part)
            .number(self.relu());
        // SAFETY: the arguments of `gradient_sums`: x and dy are (images, channels, pixels), the sums
        // (2, channels, parts), the others (channels), and the parts cover a channel's values with none of them empty.
        unsafe { launch.run_blocks((c.channels, c.parts)) }?;
        let mut dbias = alloc(OP, device, statistic, channels)?;
        let mut dweight = alloc(OP, device, statistic, channels)?;
        let launch = kernel(device, &stream, "join_sums", statistic)?
            .read_all(&sums)?
            .write(&mut dbias)?
            .write(&mut dweight)?
            .number(c.channels)
            .number(c.parts);
        // SAFETY: the arguments of `join_sums`: (2, channels, parts), and two of (channels).
        unsafe { launch.run(c.channels) }?;
        Ok(GradientSums { dweight, dbias })
    }

    /// `sums` are those of the batch whose own statistics normalise it.
    fn input_gradient(
        &self,
        [x, dy]: [Operand; 2],
        numbers: [Operand; 4],
        sums: Option<&GradientSums>,
    ) -> Result<CudaStorage> {
        let (device, dtype) = (x.0.device(), x.0.dtype());
        let stream = device.cuda_stream();
        let c = self.counts;
        let mut dx = alloc(OP, device, dtype, c.elements as usize)?;
        let mut launch = kernel(device, &stream, "input_gradient", dtype)?
            .read(x)?
            .read(dy)?
            .write(&mut dx)?;
        for number in numbers {
            launch = launch.read(number)?;
        }
        let launch = match sums {
            Some(sums) => launch
                .read_all(&sums.dbias)?
                .read_all(&sums.dweight)?
                .double(1.0 / f64::from(c.images * c.pixels)),
            None => launch.null().null().double(0.0),
        };
        let launch = launch
            .divisor(c.channels as usize)
            .divisor(c.pixels as usize)
            .number(self.relu())
            .number(c.elements);
        // SAFETY: the arguments of `input_gradient`: three of (images, channels, pixels), six of (channels), of which the last
        // two are not read where the share is 0.
        unsafe { launch.run(c.elements) }?;
        Ok(dx)
    }
}

/// The gradients of one pass, as far as they were needed.
struct Gradients {
    x: Option<CudaStorage>,
    sums: Option<GradientSums>,
}

/// The sums over each channel that are the gradients of weight and bias.
struct GradientSums {
    dweight: CudaStorage,
    dbias: CudaStorage,
}

impl CustomOp3 for CudaBatchNorm {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Err(OpError::on_cpu(OP))
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let y = self.forward((x, x_layout), (weight, weight_layout), (bias, bias_layout))?;
        Ok((y, x_layout.shape().clone()))
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
        if x.elem_count() == 0 {
            let zeros = |t: &Tensor| t.track_op().then(|| t.zeros_like()).transpose();
            return Ok((zeros(x)?, zeros(weight)?, zeros(bias)?));
        }
        let held = [x, &dy, weight, bias].map(Held::new);
        let needs = Needs {
            x: x.track_op(),
            parameters: weight.track_op() || bias.track_op(),
        };
        let gradients = self.backward(
            [held[0].operand(OP)?, held[1].operand(OP)?],
            [held[2].operand(OP)?, held[3].operand(OP)?],
            needs,
        )?;
        let (dweight, dbias) = gradients
            .sums
            .map(|sums| (sums.dweight, sums.dbias))
            .unzip();
        let of = |parameter: &Tensor, sums: Option<CudaStorage>| {
            let sums = sums.filter(|_| parameter.track_op());
            aside(parameter, sums.map(|sums| tensor(sums, parameter.shape())))
        };
        Ok((
            gradients.x.map(|dx| tensor(dx, x.shape())),
            of(weight, dweight),
            of(bias, dbias),
        ))
    }
}
