//! The convolution on CUDA: cuDNN's three passes (`engines.rs`), and small kernels of our own around them.

#![allow(unsafe_code)]

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig,
    PushKernelArg, ValidAsZeroBits,
};
use candle_core::cuda_backend::{CudaDType, CudaDevice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Layout, Result, Shape, Storage, Tensor};
use half::bf16;

use super::cpu::Needs;
use super::engines::{Operands, Plan};
use super::plan::{DescriptorNumbers, Epilogue, MemoryFormat, Pass, PlanKey, parts_of};
use super::{Activation, Conv2d, Conv2dGeometry, OP};
use crate::cuda::cudnn::{address, with_cudnn};
use crate::cuda::kernels::{self, Source};
use crate::cuda::launch::Divisor;
use crate::cuda::settings;
use crate::error::OpError;

/// A contiguous operand and where it lies.
type Operand<'a> = (&'a CudaStorage, &'a Layout);

/// `activation(x ∗ weight + bias)`.
pub(super) fn forward(
    op: &Conv2d,
    x: Operand,
    weight: Operand,
    bias: Option<Operand>,
) -> Result<(CudaStorage, Shape)> {
    match op.dtype {
        DType::F32 => forward_typed::<f32>(op, x, weight, bias),
        DType::F64 => forward_typed::<f64>(op, x, weight, bias),
        DType::BF16 => forward_typed::<bf16>(op, x, weight, bias),
        other => Err(OpError::dtype(OP, other)),
    }
}

/// The gradients of input, weight and bias that somebody needs; `y` is the output and `dy` its gradient.
pub(super) fn backward(
    op: &Conv2d,
    [x, weight, y, dy]: [&Tensor; 4],
    needs: Needs,
) -> Result<[Option<Tensor>; 3]> {
    match op.dtype {
        DType::F32 => backward_typed::<f32>(op, [x, weight, y, dy], needs),
        DType::F64 => backward_typed::<f64>(op, [x, weight, y, dy], needs),
        DType::BF16 => backward_typed::<bf16>(op, [x, weight, y, dy], needs),
        other => Err(OpError::dtype(OP, other)),
    }
}

/// An element type on the device.
trait CudaElement: CudaDType + DeviceRepr + ValidAsZeroBits {
    /// What its sums are taken in.
    type Sum: DeviceRepr;
    /// The ending of its kernels' names.
    const NAME: &'static str;
}

impl CudaElement for f32 {
    type Sum = f32;
    const NAME: &'static str = "f32";
}

impl CudaElement for f64 {
    type Sum = f64;
    const NAME: &'static str = "f64";
}

impl CudaElement for bf16 {
    type Sum = f32;
    const NAME: &'static str = "bf16";
}

fn forward_typed<T: CudaElement>(
    op: &Conv2d,
    x: Operand,
    weight: Operand,
    bias: Option<Operand>,
) -> Result<(CudaStorage, Shape)> {
    let g = &op.geometry;
    // Also the limit of the kernels below, which count in 32 bits.
    DescriptorNumbers::new(g)?;
    let device = x.0.device().clone();
    let stream = device.cuda_stream();
    let (x, weight) = (view::<T>(x)?, view::<T>(weight)?);
    let bias = bias.map(view::<T>).transpose()?;
    let shape = g.output_shape();
    let elements = shape.elem_count();
    let relu = op.activation == Activation::Relu;
    if elements == 0 {
        let y = device.alloc_zeros::<T>(1)?;
        return Ok((T::wrap_cuda_slice(y, device), shape));
    }
    let (mut y, complete) = if g.macs() == 0 {
        // Without input channels every sum is empty; cuDNN knows no such tensors.
        (device.alloc_zeros::<T>(elements)?, bias.is_none())
    } else {
        // SAFETY: the convolution below writes every element.
        let mut y = unsafe { device.alloc::<T>(elements)? };
        let settings = settings();
        let complete = with_cudnn(&device, 0, OP, |cudnn| {
            let (x, _x) = x.device_ptr(&stream);
            let (weight, _weight) = weight.device_ptr(&stream);
            let (y, _y) = y.device_ptr_mut(&stream);
            let bias = bias.as_ref().map(|bias| bias.device_ptr(&stream));
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
                    operands.bias = address(*bias);
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
        (y, complete)
    };
    if !complete {
        bias_activation(&device, &mut y, bias.as_ref(), op)?;
    }
    Ok((T::wrap_cuda_slice(y, device), shape))
}

fn backward_typed<T: CudaElement>(
    op: &Conv2d,
    tensors: [&Tensor; 4],
    needs: Needs,
) -> Result<[Option<Tensor>; 3]> {
    let [x, weight, y, dy] = tensors;
    let g = &op.geometry;
    DescriptorNumbers::new(g)?;
    let storages = tensors.map(Tensor::storage_and_layout);
    let operand = |index: usize| -> Result<Operand> {
        match &*storages[index].0 {
            Storage::Cuda(storage) => Ok((storage, storages[index].1)),
            _ => Err(OpError::device(OP, tensors[index])),
        }
    };
    let device = operand(0)?.0.device().clone();
    let stream = device.cuda_stream();
    let relu = op.activation == Activation::Relu;
    let (x_view, weight_view) = (view::<T>(operand(0)?)?, view::<T>(operand(1)?)?);
    let (y_view, dy_view) = (view::<T>(operand(2)?)?, view::<T>(operand(3)?)?);

    let mut masked = None;
    let mut bias_gradient = None;
    if y.elem_count() == 0 {
        bias_gradient = Some(device.alloc_zeros::<T>(g.c_out.max(1))?);
    } else if relu || needs.bias {
        let y = relu.then_some(&y_view);
        (masked, bias_gradient) = mask_and_sum(&device, &dy_view, y, op, needs.bias)?;
    }

    let gradient = |pass: Pass, elements: usize| -> Result<CudaSlice<T>> {
        if g.macs() == 0 {
            return device.alloc_zeros::<T>(elements.max(1));
        }
        // SAFETY: the pass below writes every element.
        let mut written = unsafe { device.alloc::<T>(elements)? };
        with_cudnn(&device, 0, OP, |cudnn| {
            let (x, _x) = x_view.device_ptr(&stream);
            let (weight, _weight) = weight_view.device_ptr(&stream);
            let (dy, _dy) = match &masked {
                Some(masked) => masked.device_ptr(&stream),
                None => dy_view.device_ptr(&stream),
            };
            let (written, _written) = written.device_ptr_mut(&stream);
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
        Ok(written)
    };
    let input = match needs.input {
        true => Some(gradient(Pass::InputGradient, x.elem_count())?),
        false => None,
    };
    let weight_gradient = match needs.weight {
        true => Some(gradient(Pass::WeightGradient, weight.elem_count())?),
        false => None,
    };
    let tensor = |data: Option<CudaSlice<T>>, shape: Shape| {
        data.map(|data| {
            let storage = Storage::Cuda(T::wrap_cuda_slice(data, device.clone()));
            Tensor::from_storage(storage, shape, BackpropOp::none(), false)
        })
    };
    Ok([
        tensor(input, x.shape().clone()),
        tensor(weight_gradient, weight.shape().clone()),
        tensor(
            bias_gradient.filter(|_| needs.bias),
            Shape::from(dy.dim(1)?),
        ),
    ])
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
/// The addresses are those of memory on the device, of the sizes and the type that are told, aligned to 16 bytes. It lives until the
/// lane has come to this point, and no other lane writes what this reads, or touches what this writes.
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

fn view<'a, T: CudaElement>((storage, layout): Operand<'a>) -> Result<CudaView<'a, T>> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| OpError::not_contiguous(OP, layout))?;
    storage
        .as_cuda_slice::<T>()?
        .try_slice(start..end)
        .ok_or_else(|| OpError::not_contiguous(OP, layout))
}

/// Threads of a block, as in `kernels.cu`.
const THREADS: u32 = 256;

/// Adds the bias and takes the ReLU, in place.
fn bias_activation<T: CudaElement>(
    device: &CudaDevice,
    y: &mut CudaSlice<T>,
    bias: Option<&CudaView<T>>,
    op: &Conv2d,
) -> Result<()> {
    let g = &op.geometry;
    let elements = count(y.len())?;
    let (channels, pixels) = (Divisor::of(g.c_out), Divisor::of(g.output.0 * g.output.1));
    let relu = u32::from(op.activation == Activation::Relu);
    let null: CUdeviceptr = 0;
    let stream = device.cuda_stream();
    let function = kernel::<T>(device, "bias_activation")?;
    let mut arguments = stream.launch_builder(&function);
    arguments.arg(y);
    match bias {
        Some(bias) => arguments.arg(bias),
        None => arguments.arg(&null),
    };
    arguments
        .arg(&relu)
        .arg(&channels)
        .arg(&pixels)
        .arg(&elements);
    // SAFETY: the arguments are those of `bias_activation` in kernels.cu. `y` is (N, channels, pixels) of `elements`,
    // and `bias` has `channels` values or is null. Four elements a thread.
    unsafe { arguments.launch(grid(elements.div_ceil(4 * THREADS), 1)) }.w()?;
    Ok(())
}

/// The gradient before the ReLU whose output was `y` (without one, none: it is `dy`), and that of the bias if needed.
/// Neither tensor is empty.
#[allow(clippy::type_complexity)]
fn mask_and_sum<T: CudaElement>(
    device: &CudaDevice,
    dy: &CudaView<T>,
    y: Option<&CudaView<T>>,
    op: &Conv2d,
    needs_sum: bool,
) -> Result<(Option<CudaSlice<T>>, Option<CudaSlice<T>>)> {
    let g = &op.geometry;
    let pixels = g.output.0 * g.output.1;
    let (parts, per_part) = parts_of(g.batch * pixels);
    let (images, channels) = (count(g.batch)?, count(g.c_out)?);
    let (parts, per_part) = (count(parts)?, count(per_part)?);
    let pixels = Divisor::of(pixels);
    // SAFETY: the kernel writes every element of both.
    let mut masked = y
        .map(|y| unsafe { device.alloc::<T>(y.len()) })
        .transpose()?;
    let mut sums = match needs_sum {
        // SAFETY: each block of the kernel writes its element, and there are as many.
        true => Some(unsafe { device.alloc::<T::Sum>((channels * parts) as usize) }?),
        false => None,
    };
    let null: CUdeviceptr = 0;
    let stream = device.cuda_stream();
    let function = kernel::<T>(device, "mask_and_sum")?;
    let mut arguments = stream.launch_builder(&function);
    arguments.arg(dy);
    match (y, &mut masked) {
        (Some(y), Some(masked)) => arguments.arg(y).arg(masked),
        _ => arguments.arg(&null).arg(&null),
    };
    match &mut sums {
        Some(sums) => arguments.arg(sums),
        None => arguments.arg(&null),
    };
    arguments
        .arg(&images)
        .arg(&channels)
        .arg(&pixels)
        .arg(&per_part);
    // SAFETY: the arguments are those of `mask_and_sum` in kernels.cu. `dy`, `y` and `masked` are
    // (images, channels, pixels), `sums` is (channels, parts), and `per_part` values times `parts` cover each channel with
    // none of the parts empty.
    unsafe { arguments.launch(grid(channels, parts)) }.w()?;
    let Some(sums) = sums else {
        return Ok((masked, None));
    };
    // SAFETY: the kernel writes every element.
    let mut gradient = unsafe { device.alloc::<T>(g.c_out)? };
    let function = kernel::<T>(device, "add_parts")?;
    let mut arguments = stream.launch_builder(&function);
    arguments
        .arg(&sums)
        .arg(&mut gradient)
        .arg(&channels)
        .arg(&parts);
    // SAFETY: the arguments are those of `add_parts` in kernels.cu, of the sizes that it is told.
    unsafe { arguments.launch(grid(channels.div_ceil(THREADS), 1)) }.w()?;
    Ok((masked, Some(gradient)))
}

/// A number that the kernels count in 32 bits; [`DescriptorNumbers`] has refused larger ones.
fn count(number: usize) -> Result<u32> {
    u32::try_from(number).map_err(|_| {
        OpError::CudnnSize {
            op: OP,
            what: "elements of the output",
            found: number,
        }
        .into()
    })
}

fn grid(x: u32, y: u32) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (x, y, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// `conv2d_<name>_<type>` of kernels.cu.
fn kernel<T: CudaElement>(device: &CudaDevice, name: &str) -> Result<CudaFunction> {
    let source = Source {
        file: "conv2d/kernels.cu",
        text: include_str!("kernels.cu"),
    };
    kernels::function(device, &source, &format!("conv2d_{name}_{}", T::NAME))
}
