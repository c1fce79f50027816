//! cuDNN for the calling thread: its handle, descriptors that free themselves, and memory to work in.
//!
//! cudarc's safe wrappers cannot do what training needs (they keep handle and descriptors to themselves, and have
//! neither timed algorithms nor the backward pass of a bias), so that this stands on its `result` and `sys`.

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt::Display;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::cudnn::{result, sys};
use candle_core::cuda_backend::cudarc::driver::sys::{CUdeviceptr, CUstreamCaptureStatus};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut};
use candle_core::cuda_backend::{CudaDevice, DeviceId, WrapErr};
use candle_core::{DType, Result};

use super::lanes;
use crate::error::OpError;

/// Runs `f` with the calling thread's cuDNN on the stream of a lane of `device`; see [`super::lanes`].
///
/// `f` must not call this again.
pub(crate) fn with_cudnn<R>(
    device: &CudaDevice,
    lane: usize,
    op: &'static str,
    f: impl FnOnce(&mut Cudnn) -> Result<R>,
) -> Result<R> {
    thread_local! {
        // A handle serves one thread at a time. One that stays in its thread needs no lock.
        static CUDNN: RefCell<HashMap<(DeviceId, usize), Cudnn>> = RefCell::new(HashMap::new());
    }
    CUDNN.with_borrow_mut(|cudnn| {
        let cudnn = match cudnn.entry((device.id(), lane)) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(Cudnn::new(lanes::stream(device, lane)?, op)?)
            }
        };
        // cuDNN works in the current context, which another device may have changed.
        cudnn.stream.context().bind_to_thread().w()?;
        f(cudnn)
    })
}

/// A handle, its stream and its workspace.
pub(crate) struct Cudnn {
    handle: Handle,
    workspace: Workspace,
    stream: Arc<CudaStream>,
}

impl Cudnn {
    fn new(stream: Arc<CudaStream>, op: &'static str) -> Result<Self> {
        stream.context().bind_to_thread().w()?;
        let problem = &"a handle";
        let handle =
            Handle(result::create_handle().map_err(|e| failed(op, "cudnnCreate", e.0, problem))?);
        // SAFETY: the handle was just made, and the stream lives as long as it does: it is kept in the same struct.
        unsafe { result::set_stream(handle.0, stream.cu_stream() as sys::cudaStream_t) }
            .map_err(|e| failed(op, "cudnnSetStream", e.0, problem))?;
        Ok(Self {
            handle,
            workspace: Workspace::default(),
            stream,
        })
    }

    pub(crate) fn handle(&self) -> sys::cudnnHandle_t {
        self.handle.0
    }

    /// Whether what is launched goes into a CUDA graph, so that waiting for the device is not allowed.
    pub(crate) fn is_capturing(&self) -> Result<bool> {
        let status = self.stream.capture_status().w()?;
        Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Calls `f` with the address and size of at least `bytes` of device memory, or with 0, 0 for none. What `f`
    /// launches may use it until the next launch; nothing in it lasts.
    pub(crate) fn with_workspace<R>(
        &mut self,
        bytes: usize,
        f: impl FnOnce(&Self, *mut c_void, usize) -> Result<R>,
    ) -> Result<R> {
        if bytes == 0 {
            return f(self, std::ptr::null_mut(), 0);
        }
        let capturing = self.is_capturing()?;
        let kept = self.workspace.buffer.as_ref().map_or(0, CudaSlice::len);
        if kept < bytes {
            if capturing {
                // What is allocated while capturing belongs to the graph and has to be freed in it.
                return self.with_temporary(bytes, |cudnn, memory, bytes| f(cudnn, memory, bytes));
            }
            self.workspace.grow(&self.stream, bytes)?;
        }
        self.workspace.captured |= capturing;
        let Some(mut buffer) = self.workspace.buffer.take() else {
            return self.with_temporary(bytes, |cudnn, memory, bytes| f(cudnn, memory, bytes));
        };
        let length = buffer.len();
        let result = {
            let (pointer, _recorded) = buffer.device_ptr_mut(&self.stream);
            f(self, address(pointer), length)
        };
        self.workspace.buffer = Some(buffer);
        result
    }

    /// Calls `f` with the address and size of device memory that holds anything, and goes back right after, in the order of
    /// the stream.
    pub(crate) fn with_temporary<R>(
        &mut self,
        bytes: usize,
        f: impl FnOnce(&mut Self, *mut c_void, usize) -> Result<R>,
    ) -> Result<R> {
        let stream = Arc::clone(&self.stream);
        // SAFETY: the caller expects nothing of its contents.
        let mut buffer = unsafe { stream.alloc::<u8>(bytes.max(1)) }.w()?;
        let (pointer, _recorded) = buffer.device_ptr_mut(&stream);
        f(self, address(pointer), bytes)
    }
}

/// The error of a call that returned `status`.
pub(crate) fn failed(
    op: &'static str,
    call: &'static str,
    status: sys::cudnnStatus_t,
    problem: &dyn Display,
) -> OpError {
    let mut message = [0 as c_char; 512];
    // SAFETY: cuDNN writes at most the given number of bytes, and ends the text within them.
    unsafe { sys::cudnnGetLastErrorString(message.as_mut_ptr(), message.len()) };
    message[511] = 0;
    // SAFETY: the last byte is 0, and the array outlives the text.
    let text = unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy();
    let details = match text.trim() {
        "" => String::new(),
        text => format!(" ({text})"),
    };
    OpError::Cudnn {
        op,
        call,
        status: format!("{status:?}"),
        details,
        problem: problem.to_string(),
    }
}

/// A device address as cuDNN takes it.
pub(crate) fn address(pointer: CUdeviceptr) -> *mut c_void {
    pointer as usize as *mut c_void
}

/// 1 and 0, of the type that cuDNN expects beside tensors of `dtype`.
pub(crate) fn one_and_zero(dtype: DType) -> (*const c_void, *const c_void) {
    static F32: [f32; 2] = [1.0, 0.0];
    static F64: [f64; 2] = [1.0, 0.0];
    match dtype {
        DType::F64 => ((&raw const F64[0]).cast(), (&raw const F64[1]).cast()),
        _ => ((&raw const F32[0]).cast(), (&raw const F32[1]).cast()),
    }
}

/// The type of the elements, if cuDNN is to take it.
pub(crate) fn data_type(op: &'static str, dtype: DType) -> Result<sys::cudnnDataType_t> {
    match dtype {
        DType::F32 => Ok(sys::cudnnDataType_t::CUDNN_DATA_FLOAT),
        DType::F64 => Ok(sys::cudnnDataType_t::CUDNN_DATA_DOUBLE),
        DType::BF16 => Ok(sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16),
        other => Err(OpError::dtype(op, other)),
    }
}

/// A descriptor that is destroyed when dropped.
macro_rules! descriptor {
    ($(#[$doc:meta])* $name:ident: $raw:ident, $create:ident, $destroy:ident) => {
        $(#[$doc])*
        pub(crate) struct $name(sys::$raw);

        impl $name {
            fn create() -> std::result::Result<Self, result::CudnnError> {
                let mut raw = std::ptr::null_mut();
                // SAFETY: writes one pointer.
                unsafe { sys::$create(&raw mut raw) }.result()?;
                Ok(Self(raw))
            }

            pub(crate) fn raw(&self) -> sys::$raw {
                self.0
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: made by `create`, and destroyed nowhere else. A failure has nobody to hear of it.
                let _ = unsafe { sys::$destroy(self.0) };
            }
        }
    };
}

descriptor!(
    /// Shape, type and memory format of (N, C, H, W), without gaps.
    TensorDescriptor: cudnnTensorDescriptor_t, cudnnCreateTensorDescriptor, cudnnDestroyTensorDescriptor
);
descriptor!(
    /// Shape, type and memory format of weights (C_out, C_in, R, S), without gaps.
    FilterDescriptor: cudnnFilterDescriptor_t, cudnnCreateFilterDescriptor, cudnnDestroyFilterDescriptor
);
descriptor!(
    /// Padding, stride, dilation and arithmetic of a convolution.
    ConvolutionDescriptor: cudnnConvolutionDescriptor_t, cudnnCreateConvolutionDescriptor, cudnnDestroyConvolutionDescriptor
);
descriptor!(
    /// What follows a convolution.
    ActivationDescriptor: cudnnActivationDescriptor_t, cudnnCreateActivationDescriptor, cudnnDestroyActivationDescriptor
);

type Described<T> = std::result::Result<T, result::CudnnError>;

impl TensorDescriptor {
    pub(crate) fn new(
        format: sys::cudnnTensorFormat_t,
        kind: sys::cudnnDataType_t,
        sizes: [c_int; 4],
    ) -> Described<Self> {
        let new = Self::create()?;
        // SAFETY: the descriptor exists.
        unsafe { result::set_tensor4d_descriptor(new.0, format, kind, sizes) }?;
        Ok(new)
    }
}

impl FilterDescriptor {
    pub(crate) fn new(
        format: sys::cudnnTensorFormat_t,
        kind: sys::cudnnDataType_t,
        sizes: [c_int; 4],
    ) -> Described<Self> {
        let new = Self::create()?;
        // SAFETY: the descriptor exists.
        unsafe { result::set_filter4d_descriptor(new.0, kind, format, sizes) }?;
        Ok(new)
    }
}

impl ConvolutionDescriptor {
    /// A cross-correlation that adds up in `compute`; pairs are vertical, horizontal.
    pub(crate) fn new(
        padding: [c_int; 2],
        stride: [c_int; 2],
        dilation: [c_int; 2],
        compute: sys::cudnnDataType_t,
        math: sys::cudnnMathType_t,
    ) -> Described<Self> {
        let new = Self::create()?;
        // SAFETY: the descriptor exists.
        unsafe {
            result::set_convolution2d_descriptor(
                new.0,
                padding[0],
                padding[1],
                stride[0],
                stride[1],
                dilation[0],
                dilation[1],
                sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION,
                compute,
            )
        }?;
        new.set_math(math)?;
        Ok(new)
    }

    pub(crate) fn set_math(&self, math: sys::cudnnMathType_t) -> Described<()> {
        // SAFETY: the descriptor exists.
        unsafe { result::set_convolution_math_type(self.0, math) }
    }
}

impl ActivationDescriptor {
    /// A NaN stays NaN in a ReLU, as on the CPU, or the convolution has to refuse it; else one that diverges could go
    /// on with zeros. The identity passes it on anyway.
    pub(crate) fn new(mode: sys::cudnnActivationMode_t) -> Described<Self> {
        let new = Self::create()?;
        let nan = match mode {
            sys::cudnnActivationMode_t::CUDNN_ACTIVATION_RELU => {
                sys::cudnnNanPropagation_t::CUDNN_PROPAGATE_NAN
            }
            _ => sys::cudnnNanPropagation_t::CUDNN_NOT_PROPAGATE_NAN,
        };
        // The largest value that a ReLU lets pass; PyTorch sets no limit either.
        let limit = f64::MAX;
        // SAFETY: the descriptor exists.
        unsafe { result::set_activation_descriptor(new.0, mode, nan, limit) }?;
        Ok(new)
    }
}

struct Handle(sys::cudnnHandle_t);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `create_handle`, and destroyed nowhere else. A failure has nobody to hear of it.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

/// Device memory for the algorithms, one after the other: a stream runs one at a time.
#[derive(Default)]
struct Workspace {
    buffer: Option<CudaSlice<u8>>,
    /// Whether a CUDA graph has `buffer`'s address.
    captured: bool,
    /// Smaller ones that a CUDA graph may still use.
    outgrown: Vec<CudaSlice<u8>>,
}

impl Workspace {
    fn grow(&mut self, stream: &Arc<CudaStream>, bytes: usize) -> Result<()> {
        if let Some(old) = self.buffer.take()
            && std::mem::take(&mut self.captured)
        {
            self.outgrown.push(old);
        }
        // SAFETY: cuDNN expects nothing of a workspace's contents.
        self.buffer = Some(unsafe { stream.alloc::<u8>(bytes) }.w()?);
        Ok(())
    }
}
