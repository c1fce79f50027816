//! cuDNN for the calling thread: its handle, and memory to work in.
//!
//! cudarc's safe wrappers know the older functions of cuDNN alone ([`super::graph_api`] says why not those), so that this
//! stands on its `result` and `sys`.

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::fmt::Display;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
                entry.insert(Cudnn::new(device, lane, op)?)
            }
        };
        // cuDNN works in the current context, which another device may have changed.
        cudnn.stream.context().bind_to_thread().w()?;
        f(cudnn)
    })
}

/// The workspace that a lane keeps, in bytes. An engine that wants more takes it while it runs, so that it shares memory with what
/// comes before and after: in a recorded step too.
const KEPT_WORKSPACE: usize = 1 << 20;

/// A handle, its stream and its workspace.
pub(crate) struct Cudnn {
    handle: Rc<Handle>,
    /// Memory of [`KEPT_WORKSPACE`] bytes, once it was needed. Engines have it one after the other: a stream runs one at a time.
    workspace: Option<CudaSlice<u8>>,
    stream: Arc<CudaStream>,
    device: CudaDevice,
}

impl Cudnn {
    fn new(device: &CudaDevice, lane: usize, op: &'static str) -> Result<Self> {
        let stream = lanes::stream(device, lane)?;
        stream.context().bind_to_thread().w()?;
        let _alone = alone();
        let raw =
            result::create_handle().map_err(|e| failed(op, "cudnnCreate", e.0, &"a handle"))?;
        let handle = Handle {
            raw,
            _stream: Arc::clone(&stream),
        };
        let new = Self {
            handle: Rc::new(handle),
            workspace: None,
            stream,
            device: device.clone(),
        };
        new.give_work_to(&new.stream, op)?;
        Ok(new)
    }

    pub(crate) fn handle(&self) -> &Rc<Handle> {
        &self.handle
    }

    pub(crate) fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// The stream of its lane, to which it gives its work.
    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Calls `f` with a stream that nobody else uses, to which cuDNN gives its work meanwhile. It begins when all that
    /// this thread has given to the device is done, and what comes later waits for it. `f` may capture the stream.
    pub(crate) fn apart<R>(
        &mut self,
        op: &'static str,
        f: impl FnOnce(&mut Self, &Arc<CudaStream>) -> Result<R>,
    ) -> Result<R> {
        let _alone = alone();
        lanes::synchronize(&self.device)?;
        let apart = self.stream.context().new_stream().w()?;
        apart.join(&self.stream).w()?;
        let outcome = self.give_work_to(&apart, op).and_then(|()| f(self, &apart));
        let restored = self.give_work_to(&self.stream, op);
        let joined = self.stream.join(&apart).w();
        let value = outcome?;
        restored.and(joined)?;
        Ok(value)
    }

    fn give_work_to(&self, stream: &CudaStream, op: &'static str) -> Result<()> {
        // SAFETY: the handle exists. Its own stream lives as long as it does, and another until it has its own again.
        unsafe { result::set_stream(self.handle.raw, stream.cu_stream() as sys::cudaStream_t) }
            .map_err(|e| failed(op, "cudnnSetStream", e.0, &"a stream").into())
    }

    /// Whether what is launched goes into a CUDA graph, so that waiting for the device is not allowed.
    pub(crate) fn is_capturing(&self) -> Result<bool> {
        let status = self.stream.capture_status().w()?;
        Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Makes the workspace that is kept, if it is not there yet.
    pub(crate) fn make_workspace(&mut self) -> Result<()> {
        if self.workspace.is_none() {
            // SAFETY: cuDNN expects nothing of a workspace's contents.
            self.workspace = Some(unsafe { self.stream.alloc::<u8>(KEPT_WORKSPACE) }.w()?);
        }
        Ok(())
    }

    /// Calls `f` with the address of at least `bytes` of device memory, or with 0 for none. What `f` launches may use it until
    /// the next launch; nothing in it lasts.
    pub(crate) fn with_workspace<R>(
        &mut self,
        bytes: usize,
        f: impl FnOnce(&Self, *mut c_void) -> Result<R>,
    ) -> Result<R> {
        if bytes == 0 {
            return f(self, std::ptr::null_mut());
        }
        let is_kept = bytes <= KEPT_WORKSPACE;
        // What is allocated while capturing belongs to the graph and has to be freed in it.
        if is_kept && self.workspace.is_none() && !self.is_capturing()? {
            self.make_workspace()?;
        }
        match self.workspace.take_if(|_| is_kept) {
            Some(mut workspace) => {
                let result = {
                    let (pointer, _recorded) = workspace.device_ptr_mut(&self.stream);
                    f(self, address(pointer))
                };
                self.workspace = Some(workspace);
                result
            }
            None => self.with_temporary(bytes, |cudnn, memory| f(cudnn, memory)),
        }
    }

    /// Calls `f` with the address of device memory that holds anything, and goes back right after, in the order of the stream.
    pub(crate) fn with_temporary<R>(
        &mut self,
        bytes: usize,
        f: impl FnOnce(&mut Self, *mut c_void) -> Result<R>,
    ) -> Result<R> {
        let stream = Arc::clone(&self.stream);
        // SAFETY: the caller expects nothing of its contents.
        let mut buffer = unsafe { stream.alloc::<u8>(bytes.max(1)) }.w()?;
        let (pointer, _recorded) = buffer.device_ptr_mut(&stream);
        f(self, address(pointer))
    }
}

/// Held by who captures a stream for a trial, and by who may wait for the whole device, which spoils captures of other
/// threads: cuDNN does where handles are made and destroyed.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
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

/// The type of the elements, if cuDNN is to take it.
pub(crate) fn data_type(op: &'static str, dtype: DType) -> Result<sys::cudnnDataType_t> {
    match dtype {
        DType::F32 => Ok(sys::cudnnDataType_t::CUDNN_DATA_FLOAT),
        DType::F64 => Ok(sys::cudnnDataType_t::CUDNN_DATA_DOUBLE),
        DType::BF16 => Ok(sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16),
        other => Err(OpError::dtype(op, other)),
    }
}

/// A handle of cuDNN: what its functions are called with.
pub(crate) struct Handle {
    raw: sys::cudnnHandle_t,
    /// The stream to which cuDNN gives its work.
    _stream: Arc<CudaStream>,
}

impl Handle {
    pub(crate) fn raw(&self) -> sys::cudnnHandle_t {
        self.raw
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let _alone = alone();
        // SAFETY: made by `create_handle`, and destroyed nowhere else. A failure has nobody to hear of it.
        let _ = unsafe { result::destroy_handle(self.raw) };
    }
}
