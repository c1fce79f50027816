//! The convolution on CUDA: cuDNN's three passes (`engines.rs`), and small kernels of our own around them.

#![allow(unsafe_code)]

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::cuda_backend::cudarc::driver::sys::CUdeviceptr;
use candle_core::{CudaStorage, DType, Result, Shape, Tensor};

use super::cpu::Needs;
use super::engines::{Operands, Plan};
use super::plan::{DescriptorNumbers, Epilogue, MemoryFormat, Pass, PlanKey};
use super::{Conv2d, Conv2dGeometry, OP};
use crate::activation::Activation;
use crate::cuda::cudnn::{self, with_cudnn};
use crate::cuda::kernels::Source;
use crate::cuda::launch::{
    Held, Launch, Operand, THREADS, address, address_mut, address_of_all, alloc, compute_dtype,
    count, tensor, zeros,
};
use crate::cuda::parts::parts_of;
use crate::cuda::settings;

const SOURCE: Source = Source {
    file: "conv2d/kernels.cu",
    text: include_str!("kernels.cu"),
};

/// `activation(x ∗ weight + bias)`.
pub(super) fn forward(
    op: &Conv2d,
    x: Operand,
    weight: Operand,
    bias: Option<Operand>,
) -> Result<(CudaStorage, Shape)> {
    let g = &op.geometry;
    // Also the limit of the kernels below, which count in 32 bits.
    DescriptorNumbers::new(g)?;
    let device = x.0.device();
    let stream = device.cuda_stream();
    let shape = g.output_shape();
    let elements = shape.elem_count();
    let relu = op.activation == Activation::Relu;
    if elements == 0 {
        return Ok((zeros(device, op.dtype, 0)?, shape));
    }
    // The convolution writes every element.
    let mut y = alloc(OP, device, op.dtype, elements)?;
    let settings = settings();
    let complete = with_cudnn(device, 0, OP, |cudnn| {
        let (x, _x) = address(OP, x, &stream)?;
        let (weight, _weight) = address(OP, weight, &stream)?;
        let (y, _y) = address_mut(OP, &mut y, &stream)?;
        let bias = bias.map(|bias| address(OP, bias, &stream)).transpose()?;
        let mut operands = Operands::new(x, weight, y);
        let epilogue = Epilogue {
            bias: bias.is_some(),
            relu,
        };
        let key = |operands: &Operands, epilogue| PlanKey {
            epilogue,
            alignment: operands.alignment(),
            ..PlanKey::new(
                *g,
                MemoryFormat::Contiguous,
                op.dtype,
                Pass::Forward,
                &settings,
            )
        };
        if !epilogue.is_nothing() && settings.fused_epilogue {
            if let Some((bias, _)) = &bias {
                operands.bias = cudnn::address(*bias);
            }
            let key = key(&operands, epilogue);
            let fused = Plan::of(cudnn, device.id(), key, operands)?;
            if fused.run_if_offered(cudnn, operands)? {
                return Ok(true);
            }
        }
        let operands = Operands::new(x, weight, y);
        let key = key(&operands, Epilogue::default());
        Plan::of(cudnn, device.id(), key, operands)?.run(cudnn, operands)?;
        Ok(epilogue.is_nothing())
    })?;
    if !complete {
        bias_activation(op, device, &mut y, bias)?;
    }
    Ok((y, shape))
}

/// The gradients of input, weight and bias that somebody needs; `y` is the output and `dy` its gradient.
pub(super) fn backward(
    op: &Conv2d,
    tensors: [&Tensor; 4],
    needs: Needs,
) -> Result<[Option<Tensor>; 3]> {
    let g = &op.geometry;
    DescriptorNumbers::new(g)?;
    let held = tensors.map(Held::new);
    let (x, weight) = (held[0].operand(OP)?, held[1].operand(OP)?);
    let (y, dy) = (held[2].operand(OP)?, held[3].operand(OP)?);
    let device = x.0.device();
    let stream = device.cuda_stream();
    let relu = op.activation == Activation::Relu;

    let (masked, bias_gradient) = if g.written_by(Pass::Forward) == 0 {
        let zeros = needs.bias.then(|| zeros(device, op.dtype, g.c_out));
        (None, zeros.transpose()?)
    } else if relu || needs.bias {
        mask_and_sum(op, dy, relu.then_some(y), needs.bias)?
    } else {
        (None, None)
    };

    let gradient = |pass: Pass, of: &Tensor| -> Result<Tensor> {
        let elements = of.elem_count();
        if g.macs() == 0 {
            return Ok(tensor(zeros(device, op.dtype, elements)?, of.shape()));
        }
        // The pass writes every element.
        let mut written = alloc(OP, device, op.dtype, elements)?;
        with_cudnn(device, 0, OP, |cudnn| {
            let (x, _x) = address(OP, x, &stream)?;
            let (weight, _weight) = address(OP, weight, &stream)?;
            let (dy, _dy) = match &masked {
                Some(masked) => address_of_all(OP, masked, &stream)?,
                None => address(OP, dy, &stream)?,
            };
            let (written, _written) = address_mut(OP, &mut written, &stream)?;
            let operands = match pass {
                Pass::InputGradient => Operands::new(written, weight, dy),
                _ => Operands::new(x, written, dy),
            };
            let key = PlanKey {
                alignment: operands.alignment(),
                ..PlanKey::new(*g, MemoryFormat::Contiguous, op.dtype, pass, &settings())
            };
            Plan::of(cudnn, device.id(), key, operands)?.run(cudnn, operands)
        })?;
        Ok(tensor(written, of.shape()))
    };
    let input = needs
        .input
        .then(|| gradient(Pass::InputGradient, tensors[0]));
    let input = input.transpose()?;
    let weight = needs
        .weight
        .then(|| gradient(Pass::WeightGradient, tensors[1]));
    let bias = bias_gradient.map(|gradient| tensor(gradient, g.c_out));
    Ok([input, weight.transpose()?, bias])
}

/// The addresses of a convolution's input, weight and output, channels last and without gaps, of the sizes of `geometry`.
/// A pass writes the one that it is named after, or the gradient in its place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChannelsLast {
    pub(crate) geometry: Conv2dGeometry,
    pub(crate) dtype: DType,
    pub(crate) x: CUdeviceptr,
    pub(crate) weight: CUdeviceptr,
    pub(crate) y: CUdeviceptr,
}

/// One pass of a convolution, on a lane of the device. With `add` the result is added to what is there.
///
/// # Safety
/// The addresses are those of memory on the device, of the sizes and the type that are told. It lives until the lane has come to
/// this point, and no other lane writes what this reads, or touches what this writes.
pub(crate) unsafe fn channels_last_pass(
    (device, lane): (&CudaDevice, usize),
    pass: Pass,
    on: ChannelsLast,
    add: bool,
) -> Result<()> {
    let g = &on.geometry;
    DescriptorNumbers::new(g)?;
    let mut settings = settings();
    // Each lane may need a workspace.
    settings.workspace_limit /= settings.streams.max(1);
    let operands = Operands::new(on.x, on.weight, on.y);
    let key = PlanKey {
        adds: add,
        alignment: operands.alignment(),
        ..PlanKey::new(*g, MemoryFormat::ChannelsLast, on.dtype, pass, &settings)
    };
    with_cudnn(device, lane, OP, |cudnn| {
        let plan = match Plan::known(device.id(), key) {
            Some(plan) => plan,
            // To time engines adds to what is there, over and over.
            None if add => {
                let bytes = g.written_by(pass) * on.dtype.size_in_bytes();
                cudnn.with_temporary(bytes, |cudnn, spare| {
                    let mut trial = operands;
                    *trial.written(pass) = spare;
                    Plan::of(cudnn, device.id(), key, trial)
                })?
            }
            None => Plan::of(cudnn, device.id(), key, operands)?,
        };
        plan.run(cudnn, operands)
    })
}

/// Adds the bias and takes the ReLU, in place.
fn bias_activation(
    op: &Conv2d,
    device: &CudaDevice,
    y: &mut CudaStorage,
    bias: Option<Operand>,
) -> Result<()> {
    let g = &op.geometry;
    let elements = count(OP, g.written_by(Pass::Forward))?;
    let stream = device.cuda_stream();
    let launch = kernel(device, &stream, "bias_activation", op.dtype)?.write(y)?;
    let launch = match bias {
        Some(bias) => launch.read(bias)?,
        None => launch.null(),
    };
    let launch = launch
        .number((op.activation == Activation::Relu).into())
        .divisor(g.c_out)
        .divisor(g.output.0 * g.output.1)
        .number(elements);
    // SAFETY: the arguments of `bias_activation`: y is (N, channels, pixels) of `elements`, and the bias has `channels`
    // values or is null. Four elements a thread.
    unsafe { launch.run_blocks((elements.div_ceil(4 * THREADS), 1)) }
}

/// The gradient before the ReLU whose output was `y` (without one, none: it is `dy`), and that of the bias if needed.
/// Neither tensor is empty.
fn mask_and_sum(
    op: &Conv2d,
    dy: Operand,
    y: Option<Operand>,
    needs_sum: bool,
) -> Result<(Option<CudaStorage>, Option<CudaStorage>)> {
    let g = &op.geometry;
    let device = dy.0.device();
    let stream = device.cuda_stream();
    let pixels = g.output.0 * g.output.1;
    let (parts, per_part) = parts_of(g.batch * pixels);
    let (channels, all_sums) = (count(OP, g.c_out)?, g.c_out * parts);
    let (parts, per_part) = (count(OP, parts)?, count(OP, per_part)?);
    let new = |dtype: DType, elements: usize| alloc(OP, device, dtype, elements);
    let masked = y.map(|_| new(op.dtype, g.written_by(Pass::Forward)));
    let mut masked = masked.transpose()?;
    let sums = needs_sum.then(|| new(compute_dtype(op.dtype), all_sums));
    let mut sums = sums.transpose()?;
    let launch = kernel(device, &stream, "mask_and_sum", op.dtype)?.read(dy)?;
    let launch = match (y, &mut masked) {
        (Some(y), Some(masked)) => launch.read(y)?.write(masked)?,
        _ => launch.null().null(),
    };
    let launch = match &mut sums {
        Some(sums) => launch.write(sums)?,
        None => launch.null(),
    };
    let launch = launch
        .number(count(OP, g.batch)?)
        .number(channels)
        .divisor(pixels)
        .number(per_part);
    // SAFETY: the arguments of `mask_and_sum`: `dy`, `y` and `masked` are (images, channels, pixels), `sums` is
    // (channels, parts), and the parts cover a channel's values with none of them empty.
    unsafe { launch.run_blocks((channels, parts)) }?;
    let Some(sums) = sums else {
        return Ok((masked, None));
    };
    let mut gradient = new(op.dtype, g.c_out)?;
    let launch = kernel(device, &stream, "add_parts", op.dtype)?
        .read_all(&sums)?
        .write(&mut gradient)?
        .number(channels)
        .number(parts);
    // SAFETY: the arguments of `add_parts`: (channels, parts) and (channels).
    unsafe { launch.run(channels) }?;
    Ok((masked, Some(gradient)))
}

/// `conv2d_<name>_<type>` of kernels.cu.
fn kernel<'a>(
    device: &CudaDevice,
    stream: &'a CudaStream,
    name: &str,
    dtype: DType,
) -> Result<Launch<'a>> {
    let name = format!("conv2d_{name}");
    Launch::typed(OP, device, stream, &SOURCE, &name, dtype)
}
