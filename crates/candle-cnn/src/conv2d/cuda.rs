//! The convolution on CUDA: cuDNN's three passes, and small kernels of our own around them.
//!
//! What a pass needs besides its tensors is its [`Plan`]: descriptors and algorithm, made when the
//! geometry is first met, and kept by thread like the handle. After that a pass neither waits for the device nor
//! allocates outside of the stream's order.

#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::rc::Rc;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cudnn::result::{self, CudnnError};
use candle_core::cuda_backend::cudarc::cudnn::sys;
use candle_core::cuda_backend::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig,
    PushKernelArg, ValidAsZeroBits,
};
use candle_core::cuda_backend::{CudaDType, CudaDevice, DeviceId, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Layout, Result, Shape, Storage, Tensor};
use half::bf16;

use super::cpu::Needs;
use super::plan::{
    Candidate, DescriptorNumbers, MemoryFormat, Pass, PlanKey, by_preference, parts_of,
};
use super::{Activation, Conv2d, Conv2dGeometry, OP};
use crate::cuda::cudnn::{
    ActivationDescriptor, ConvolutionDescriptor, Cudnn, FilterDescriptor, TensorDescriptor,
    address, data_type, failed, one_and_zero, with_cudnn,
};
use crate::cuda::kernels::{self, Source};
use crate::cuda::{F32Math, settings};
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
            let key = PlanKey::new(
                *g,
                MemoryFormat::Contiguous,
                op.dtype,
                Pass::Forward,
                &settings,
            );
            let operands = Operands::new(x, weight, y);
            let plan = Plan::of(cudnn, device.id(), key, operands)?;
            if let Some((bias, _)) = &bias
                && settings.fused_epilogue
                && plan.run_fused(cudnn, operands, address(*bias), op.activation)?
            {
                return Ok(true);
            }
            plan.run(cudnn, operands, false)?;
            Ok(bias.is_none() && !relu)
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
            let key = PlanKey::new(*g, MemoryFormat::Contiguous, op.dtype, pass, &settings());
            Plan::of(cudnn, device.id(), key, operands)?.run(cudnn, operands, false)
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
    // Each lane has a workspace.
    settings.workspace_limit /= settings.streams.max(1);
    let key = PlanKey::new(*g, MemoryFormat::ChannelsLast, on.dtype, pass, &settings);
    let operands = Operands::new(on.x, on.weight, on.y);
    with_cudnn(device, lane, OP, |cudnn| {
        let known = Plan::known(device.id(), key);
        if known.is_none() && key.timed && !cudnn.is_capturing()? {
            // What runs on other lanes would spoil the times.
            device.cuda_stream().context().synchronize().w()?;
        }
        let plan = match known {
            Some(plan) => plan,
            // To time algorithms overwrites what is there.
            None if add => {
                let elements = match pass {
                    Pass::Forward => g.batch * g.c_out * g.output.0 * g.output.1,
                    Pass::InputGradient => g.batch * g.c_in * g.input.0 * g.input.1,
                    Pass::WeightGradient => g.c_out * g.c_in * g.kernel.0 * g.kernel.1,
                };
                let bytes = elements * on.dtype.size_in_bytes();
                cudnn.with_temporary(bytes, |cudnn, spare, _| {
                    let trial = match pass {
                        Pass::Forward => Operands {
                            y: spare,
                            ..operands
                        },
                        Pass::InputGradient => Operands {
                            x: spare,
                            ..operands
                        },
                        Pass::WeightGradient => Operands {
                            weight: spare,
                            ..operands
                        },
                    };
                    Plan::of(cudnn, device.id(), key, trial)
                })?
            }
            None => Plan::of(cudnn, device.id(), key, operands)?,
        };
        plan.run(cudnn, operands, add)
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

/// The three tensors of a convolution. A pass writes the one that it is named after: the output, or the gradient in the
/// place of what it is the gradient of.
#[derive(Clone, Copy)]
struct Operands {
    x: *mut c_void,
    weight: *mut c_void,
    y: *mut c_void,
}

impl Operands {
    fn new(x: CUdeviceptr, weight: CUdeviceptr, y: CUdeviceptr) -> Self {
        Self {
            x: address(x),
            weight: address(weight),
            y: address(y),
        }
    }
}

/// cuDNN's name of an algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Forward(sys::cudnnConvolutionFwdAlgo_t),
    InputGradient(sys::cudnnConvolutionBwdDataAlgo_t),
    WeightGradient(sys::cudnnConvolutionBwdFilterAlgo_t),
}

/// An algorithm, and the arithmetic with which cuDNN offered it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Choice {
    algorithm: Algorithm,
    math: sys::cudnnMathType_t,
}

/// More than cuDNN has for any pass: eight algorithms, each with and without tensor cores.
const MOST_OFFERED: usize = 32;

/// What cuDNN found of `$perf` results, as candidates.
macro_rules! candidates {
    ($wrap:expr, $perf:ident, $math:expr, $call:expr) => {{
        // SAFETY: plain numbers and enums, all of which have a member 0.
        let mut found: [sys::$perf; MOST_OFFERED] = unsafe { std::mem::zeroed() };
        let mut count: c_int = 0;
        let call: &dyn Fn(*mut c_int, *mut sys::$perf) -> sys::cudnnStatus_t = &$call;
        call(&raw mut count, found.as_mut_ptr()).result()?;
        let count = usize::try_from(count).unwrap_or(0).min(MOST_OFFERED);
        found[..count]
            .iter()
            .map(|found| Candidate {
                algorithm: Choice {
                    algorithm: $wrap(found.algo),
                    math: $math.unwrap_or(found.mathType),
                },
                works: found.status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS,
                deterministic: found.determinism == sys::cudnnDeterminism_t::CUDNN_DETERMINISTIC,
                workspace: found.memory,
            })
            .collect()
    }};
}

/// How one pass over one geometry is computed.
struct Plan {
    key: PlanKey,
    x: TensorDescriptor,
    weight: FilterDescriptor,
    y: TensorDescriptor,
    convolution: ConvolutionDescriptor,
    /// One value per output channel.
    bias: TensorDescriptor,
    relu: ActivationDescriptor,
    identity: ActivationDescriptor,
    /// With their workspaces in bytes, the best last. cuDNN may refuse one in spite of having offered it.
    choices: RefCell<Vec<(Choice, usize)>>,
    refuses_fused: Cell<bool>,
}

thread_local! {
    static PLANS: RefCell<HashMap<(DeviceId, PlanKey), Rc<Plan>>> = RefCell::new(HashMap::new());
}

impl Plan {
    /// The plan that this thread has made before.
    fn known(device: DeviceId, key: PlanKey) -> Option<Rc<Self>> {
        PLANS.with_borrow(|plans| plans.get(&(device, key)).cloned())
    }

    /// The plan of this thread; made now if there is none.
    ///
    /// Making it may run algorithms on `operands`, for their times: the pass is to be run after that.
    fn of(
        cudnn: &mut Cudnn,
        device: DeviceId,
        key: PlanKey,
        operands: Operands,
    ) -> Result<Rc<Self>> {
        if let Some(plan) = Self::known(device, key) {
            return Ok(plan);
        }
        let plan = Rc::new(Self::new(cudnn, key, operands)?);
        PLANS.with_borrow_mut(|plans| plans.insert((device, key), plan.clone()));
        Ok(plan)
    }

    fn new(cudnn: &mut Cudnn, key: PlanKey, operands: Operands) -> Result<Self> {
        let numbers = DescriptorNumbers::new(&key.geometry)?;
        let kind = data_type(OP, key.dtype)?;
        let compute = match key.dtype {
            DType::F64 => sys::cudnnDataType_t::CUDNN_DATA_DOUBLE,
            _ => sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
        };
        let describe = |error: CudnnError| failed(OP, "a descriptor", error.0, &key);
        let format = match key.format {
            MemoryFormat::Contiguous => sys::cudnnTensorFormat_t::CUDNN_TENSOR_NCHW,
            MemoryFormat::ChannelsLast => sys::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC,
        };
        let plan = Self {
            key,
            x: TensorDescriptor::new(format, kind, numbers.x).map_err(describe)?,
            weight: FilterDescriptor::new(format, kind, numbers.weight).map_err(describe)?,
            y: TensorDescriptor::new(format, kind, numbers.y).map_err(describe)?,
            convolution: ConvolutionDescriptor::new(
                numbers.padding,
                numbers.stride,
                numbers.dilation,
                compute,
                math_type(&key),
            )
            .map_err(describe)?,
            bias: TensorDescriptor::new(format, kind, [1, numbers.y[1], 1, 1]).map_err(describe)?,
            relu: ActivationDescriptor::new(sys::cudnnActivationMode_t::CUDNN_ACTIVATION_RELU)
                .map_err(describe)?,
            identity: ActivationDescriptor::new(
                sys::cudnnActivationMode_t::CUDNN_ACTIVATION_IDENTITY,
            )
            .map_err(describe)?,
            choices: RefCell::default(),
            refuses_fused: Cell::new(false),
        };
        let mut choices = plan.find_choices(cudnn, operands)?;
        choices.reverse();
        let Some((best, bytes)) = choices.last() else {
            return Err(plan.no_algorithm().into());
        };
        tracing::debug!(?best, bytes, "conv2d: {key}");
        if *bytes > key.workspace_limit {
            tracing::warn!(
                "conv2d: no algorithm works in {} bytes, taking one that needs {bytes}, for {key}",
                key.workspace_limit
            );
        }
        plan.choices.replace(choices);
        Ok(plan)
    }

    /// What cuDNN offers and the settings allow, the best first.
    fn find_choices(&self, cudnn: &mut Cudnn, operands: Operands) -> Result<Vec<(Choice, usize)>> {
        // Timing waits for the device, which a capture forbids.
        let timed = match self.key.timed && !cudnn.is_capturing()? {
            true => match self.timed(cudnn, operands) {
                Ok(offered) => offered,
                Err(error) => {
                    tracing::warn!(
                        "{error}; taking the algorithm by cuDNN's rules of thumb instead"
                    );
                    Vec::new()
                }
            },
            false => Vec::new(),
        };
        let mut choices = self.fitting(cudnn, &timed);
        if choices.is_empty() {
            let offered = self
                .heuristics(cudnn)
                .map_err(|e| failed(OP, "cudnnGetConvolution*Algorithm_v7", e.0, &self.key))?;
            choices = self.fitting(cudnn, &offered);
        }
        Ok(choices)
    }

    /// The candidates that may be taken, with their workspaces.
    fn fitting(&self, cudnn: &Cudnn, offered: &[Candidate<Choice>]) -> Vec<(Choice, usize)> {
        by_preference(offered, &self.key)
            .into_iter()
            .filter_map(|candidate| {
                let choice = candidate.algorithm;
                let bytes = self.workspace(cudnn, choice).ok()?;
                Some((choice, bytes))
            })
            .collect()
    }

    /// The computation itself, of which the result takes the place of what was there, or is added to it.
    fn run(&self, cudnn: &mut Cudnn, operands: Operands, add: bool) -> Result<()> {
        let (one, zero) = one_and_zero(self.key.dtype);
        let old = if add { one } else { zero };
        let Operands { x, weight, y } = operands;
        loop {
            let Some(&(choice, bytes)) = self.choices.borrow().last() else {
                return Err(self.no_algorithm().into());
            };
            self.convolution
                .set_math(choice.math)
                .map_err(|e| self.failed("cudnnSetConvolutionMathType", e))?;
            let (call, outcome) = cudnn.with_workspace(bytes, |cudnn, memory, length| {
                let handle = cudnn.handle();
                // SAFETY: the descriptors are those of the operands, which are contiguous, of the descriptors'
                // sizes and types, and held by the caller until the call is in the stream; the workspace has the
                // size that cuDNN asked for.
                Ok(unsafe {
                    match choice.algorithm {
                        Algorithm::Forward(algorithm) => (
                            "cudnnConvolutionForward",
                            result::convolution_forward(
                                handle,
                                one,
                                self.x.raw(),
                                x,
                                self.weight.raw(),
                                weight,
                                self.convolution.raw(),
                                algorithm,
                                memory,
                                length,
                                old,
                                self.y.raw(),
                                y,
                            ),
                        ),
                        Algorithm::InputGradient(algorithm) => (
                            "cudnnConvolutionBackwardData",
                            result::convolution_backward_data(
                                handle,
                                one,
                                self.weight.raw(),
                                weight,
                                self.y.raw(),
                                y,
                                self.convolution.raw(),
                                algorithm,
                                memory,
                                length,
                                old,
                                self.x.raw(),
                                x,
                            ),
                        ),
                        Algorithm::WeightGradient(algorithm) => (
                            "cudnnConvolutionBackwardFilter",
                            result::convolution_backward_filter(
                                handle,
                                one,
                                self.x.raw(),
                                x,
                                self.y.raw(),
                                y,
                                self.convolution.raw(),
                                algorithm,
                                memory,
                                length,
                                old,
                                self.weight.raw(),
                                weight,
                            ),
                        ),
                    }
                })
            })?;
            let Err(status) = outcome else {
                return Ok(());
            };
            let error = self.failed(call, status);
            if !is_refusal(status) || self.choices.borrow().len() == 1 {
                return Err(error.into());
            }
            tracing::warn!("{error}; taking the next algorithm");
            self.choices.borrow_mut().pop();
        }
    }

    /// The forward pass with `bias` and `activation` in it; false where cuDNN has no such thing here, and nothing was
    /// done.
    fn run_fused(
        &self,
        cudnn: &mut Cudnn,
        operands: Operands,
        bias: *const c_void,
        activation: Activation,
    ) -> Result<bool> {
        let Some(&(choice, bytes)) = self.choices.borrow().last() else {
            return Ok(false);
        };
        let Algorithm::Forward(algorithm) = choice.algorithm else {
            return Ok(false);
        };
        let activation = match activation {
            Activation::Relu => &self.relu,
            // cuDNN takes no other algorithm where no ReLU follows.
            Activation::Identity if algorithm != sys::cudnnConvolutionFwdAlgo_t::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM => {
                return Ok(false);
            }
            Activation::Identity => &self.identity,
        };
        if self.refuses_fused.get() {
            return Ok(false);
        }
        self.convolution
            .set_math(choice.math)
            .map_err(|e| self.failed("cudnnSetConvolutionMathType", e))?;
        let (one, zero) = one_and_zero(self.key.dtype);
        let Operands { x, weight, y } = operands;
        let outcome = cudnn.with_workspace(bytes, |cudnn, memory, length| {
            // SAFETY: as in `run`; `bias` has one value per output channel. The tensor to add, here `y`, is not
            // read where its factor is 0.
            Ok(unsafe {
                result::convolution_bias_activation_forward(
                    cudnn.handle(),
                    one,
                    self.x.raw(),
                    x,
                    self.weight.raw(),
                    weight,
                    self.convolution.raw(),
                    algorithm,
                    memory,
                    length,
                    zero,
                    self.y.raw(),
                    y,
                    self.bias.raw(),
                    bias,
                    activation.raw(),
                    self.y.raw(),
                    y,
                )
            })
        })?;
        let Err(status) = outcome else {
            return Ok(true);
        };
        let error = self.failed("cudnnConvolutionBiasActivationForward", status);
        if !is_refusal(status) {
            return Err(error.into());
        }
        tracing::info!("{error}; bias and ReLU get a pass of their own");
        self.refuses_fused.set(true);
        Ok(false)
    }

    /// All algorithms that cuDNN has, timed on `operands`, of which it overwrites the one that the pass writes.
    fn timed(&self, cudnn: &mut Cudnn, operands: Operands) -> Result<Vec<Candidate<Choice>>> {
        let memory = algorithms(self.key.pass)
            .into_iter()
            .filter_map(|algorithm| {
                let math = math_type(&self.key);
                self.workspace(cudnn, Choice { algorithm, math }).ok()
            })
            .filter(|&bytes| bytes <= self.key.workspace_limit)
            .max()
            .unwrap_or(0);
        self.convolution
            .set_math(math_type(&self.key))
            .map_err(|e| self.failed("cudnnSetConvolutionMathType", e))?;
        cudnn.with_temporary(memory, |cudnn, memory, length| {
            self.find(cudnn, operands, memory, length)
                .map_err(|e| self.failed("cudnnFindConvolution*AlgorithmEx", e).into())
        })
    }

    fn find(
        &self,
        cudnn: &Cudnn,
        Operands { x, weight, y }: Operands,
        memory: *mut c_void,
        length: usize,
    ) -> std::result::Result<Vec<Candidate<Choice>>, CudnnError> {
        let math = forced_math(&self.key);
        let (handle, most) = (cudnn.handle(), MOST_OFFERED as c_int);
        let (x_desc, weight_desc, y_desc) = (self.x.raw(), self.weight.raw(), self.y.raw());
        let convolution = self.convolution.raw();
        Ok(match self.key.pass {
            Pass::Forward => candidates!(
                Algorithm::Forward,
                cudnnConvolutionFwdAlgoPerf_t,
                math,
                // SAFETY: as in `run`; there is room for `most` results.
                |count, found| unsafe {
                    sys::cudnnFindConvolutionForwardAlgorithmEx(
                        handle,
                        x_desc,
                        x,
                        weight_desc,
                        weight,
                        convolution,
                        y_desc,
                        y,
                        most,
                        count,
                        found,
                        memory,
                        length,
                    )
                }
            ),
            Pass::InputGradient => candidates!(
                Algorithm::InputGradient,
                cudnnConvolutionBwdDataAlgoPerf_t,
                math,
                // SAFETY: as in `run`; there is room for `most` results.
                |count, found| unsafe {
                    sys::cudnnFindConvolutionBackwardDataAlgorithmEx(
                        handle,
                        weight_desc,
                        weight,
                        y_desc,
                        y,
                        convolution,
                        x_desc,
                        x,
                        most,
                        count,
                        found,
                        memory,
                        length,
                    )
                }
            ),
            Pass::WeightGradient => candidates!(
                Algorithm::WeightGradient,
                cudnnConvolutionBwdFilterAlgoPerf_t,
                math,
                // SAFETY: as in `run`; there is room for `most` results.
                |count, found| unsafe {
                    sys::cudnnFindConvolutionBackwardFilterAlgorithmEx(
                        handle,
                        x_desc,
                        x,
                        y_desc,
                        y,
                        convolution,
                        weight_desc,
                        weight,
                        most,
                        count,
                        found,
                        memory,
                        length,
                    )
                }
            ),
        })
    }

    /// What cuDNN expects to be fast, without trying.
    fn heuristics(&self, cudnn: &Cudnn) -> std::result::Result<Vec<Candidate<Choice>>, CudnnError> {
        let math = forced_math(&self.key);
        self.convolution.set_math(math_type(&self.key))?;
        let (handle, most) = (cudnn.handle(), MOST_OFFERED as c_int);
        let (x, weight, y) = (self.x.raw(), self.weight.raw(), self.y.raw());
        let convolution = self.convolution.raw();
        Ok(match self.key.pass {
            Pass::Forward => candidates!(
                Algorithm::Forward,
                cudnnConvolutionFwdAlgoPerf_t,
                math,
                // SAFETY: handle and descriptors exist; there is room for `most` results.
                |count, found| unsafe {
                    sys::cudnnGetConvolutionForwardAlgorithm_v7(
                        handle,
                        x,
                        weight,
                        convolution,
                        y,
                        most,
                        count,
                        found,
                    )
                }
            ),
            Pass::InputGradient => candidates!(
                Algorithm::InputGradient,
                cudnnConvolutionBwdDataAlgoPerf_t,
                math,
                // SAFETY: handle and descriptors exist; there is room for `most` results.
                |count, found| unsafe {
                    sys::cudnnGetConvolutionBackwardDataAlgorithm_v7(
                        handle,
                        weight,
                        y,
                        convolution,
                        x,
                        most,
                        count,
                        found,
                    )
                }
            ),
            Pass::WeightGradient => candidates!(
                Algorithm::WeightGradient,
                cudnnConvolutionBwdFilterAlgoPerf_t,
                math,
                // SAFETY: handle and descriptors exist; there is room for `most` results.
                |count, found| unsafe {
                    sys::cudnnGetConvolutionBackwardFilterAlgorithm_v7(
                        handle,
                        x,
                        y,
                        convolution,
                        weight,
                        most,
                        count,
                        found,
                    )
                }
            ),
        })
    }

    /// Bytes that an algorithm works in.
    fn workspace(&self, cudnn: &Cudnn, choice: Choice) -> std::result::Result<usize, CudnnError> {
        self.convolution.set_math(choice.math)?;
        let handle = cudnn.handle();
        let (x, weight, y) = (self.x.raw(), self.weight.raw(), self.y.raw());
        let convolution = self.convolution.raw();
        // SAFETY: handle and descriptors exist.
        unsafe {
            match choice.algorithm {
                Algorithm::Forward(algorithm) => result::get_convolution_forward_workspace_size(
                    handle,
                    x,
                    weight,
                    convolution,
                    y,
                    algorithm,
                ),
                Algorithm::InputGradient(algorithm) => {
                    result::get_convolution_backward_data_workspace_size(
                        handle,
                        weight,
                        y,
                        convolution,
                        x,
                        algorithm,
                    )
                }
                Algorithm::WeightGradient(algorithm) => {
                    result::get_convolution_backward_filter_workspace_size(
                        handle,
                        x,
                        y,
                        convolution,
                        weight,
                        algorithm,
                    )
                }
            }
        }
    }

    fn failed(&self, call: &'static str, error: CudnnError) -> OpError {
        failed(OP, call, error.0, &self.key)
    }

    fn no_algorithm(&self) -> OpError {
        OpError::NoAlgorithm {
            op: OP,
            deterministic: if self.key.deterministic {
                "deterministic "
            } else {
                ""
            },
            problem: match self.key.format {
                MemoryFormat::Contiguous => self.key.to_string(),
                MemoryFormat::ChannelsLast => format!(
                    "{}; it may have one for planes: turn Settings::channels_last off \
                     (--no-channels-last)",
                    self.key
                ),
            },
        }
    }
}

/// The arithmetic to ask for. cuDNN's default takes TF32 for f32.
fn math_type(key: &PlanKey) -> sys::cudnnMathType_t {
    match (key.dtype, key.math) {
        (DType::F32, F32Math::Full) => sys::cudnnMathType_t::CUDNN_FMA_MATH,
        (DType::BF16, _) => sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
        _ => sys::cudnnMathType_t::CUDNN_DEFAULT_MATH,
    }
}

/// The arithmetic to insist on, whatever cuDNN offers beside an algorithm (as PyTorch does).
fn forced_math(key: &PlanKey) -> Option<sys::cudnnMathType_t> {
    (key.dtype == DType::F32 && key.math == F32Math::Full).then_some(math_type(key))
}

fn algorithms(pass: Pass) -> Vec<Algorithm> {
    use sys::cudnnConvolutionBwdDataAlgo_t::*;
    use sys::cudnnConvolutionBwdFilterAlgo_t::*;
    use sys::cudnnConvolutionFwdAlgo_t::*;
    match pass {
        Pass::Forward => [
            CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM,
            CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM,
            CUDNN_CONVOLUTION_FWD_ALGO_GEMM,
            CUDNN_CONVOLUTION_FWD_ALGO_DIRECT,
            CUDNN_CONVOLUTION_FWD_ALGO_FFT,
            CUDNN_CONVOLUTION_FWD_ALGO_FFT_TILING,
            CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD,
            CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD_NONFUSED,
        ]
        .map(Algorithm::Forward)
        .to_vec(),
        Pass::InputGradient => [
            CUDNN_CONVOLUTION_BWD_DATA_ALGO_0,
            CUDNN_CONVOLUTION_BWD_DATA_ALGO_1,
            CUDNN_CONVOLUTION_BWD_DATA_ALGO_FFT,
            CUDNN_CONVOLUTION_BWD_DATA_ALGO_FFT_TILING,
            CUDNN_CONVOLUTION_BWD_DATA_ALGO_WINOGRAD,
            CUDNN_CONVOLUTION_BWD_DATA_ALGO_WINOGRAD_NONFUSED,
        ]
        .map(Algorithm::InputGradient)
        .to_vec(),
        Pass::WeightGradient => [
            CUDNN_CONVOLUTION_BWD_FILTER_ALGO_0,
            CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1,
            CUDNN_CONVOLUTION_BWD_FILTER_ALGO_FFT,
            CUDNN_CONVOLUTION_BWD_FILTER_ALGO_3,
            CUDNN_CONVOLUTION_BWD_FILTER_ALGO_WINOGRAD_NONFUSED,
            CUDNN_CONVOLUTION_BWD_FILTER_ALGO_FFT_TILING,
        ]
        .map(Algorithm::WeightGradient)
        .to_vec(),
    }
}

/// Whether cuDNN declined before it launched anything: its families of `BAD_PARAM`, `NOT_SUPPORTED` and
/// `INTERNAL_ERROR`, but not `EXECUTION_FAILED`.
fn is_refusal(error: CudnnError) -> bool {
    (2000..5000).contains(&(error.0 as u32))
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
    let (channels, pixels) = (count(g.c_out)?, count(g.output.0 * g.output.1)?);
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
    let (pixels, parts, per_part) = (count(pixels)?, count(parts)?, count(per_part)?);
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
