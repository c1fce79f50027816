//! Finding a GPU, and opening it as training wants it.

#![allow(unsafe_code)]

use std::ffi::c_void;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cudnn::result::get_version;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUdevice_attribute, CUgraphMem_attribute, CUmemPool_attribute, CUmemoryPool, CUresult,
    cuDeviceGetGraphMemAttribute, cuDeviceGraphMemTrim, cuDriverGetVersion, cuMemPoolGetAttribute,
};
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaEvent, result};
use candle_core::cuda_backend::cudarc::nvrtc::sys::nvrtcVersion;
use candle_core::{Device, Result, Tensor};

use super::lanes;

/// What the driver says of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The GPU's number, as in `cuda:0`.
    pub ordinal: usize,
    /// The GPU's model, such as `NVIDIA H200`.
    pub name: String,
    /// All of its memory, in bytes.
    pub memory: usize,
    /// Major and minor compute capability; (9, 0) on Hopper.
    pub compute_capability: (i32, i32),
}

impl DeviceInfo {
    /// Whether cuDNN has convolutions in bf16 for it: from compute capability 8.0 on.
    pub fn has_bf16(&self) -> bool {
        self.compute_capability >= (8, 0)
    }
}

/// What the driver says of GPU number `ordinal`. Allocates nothing on it.
///
/// # Errors
/// No driver, no such GPU, or one that cannot be used.
pub fn device_info(ordinal: usize) -> Result<DeviceInfo> {
    let context = CudaContext::new(ordinal).w()?;
    Ok(DeviceInfo {
        ordinal,
        name: context.name().w()?,
        memory: context.total_mem().w()?,
        compute_capability: context.compute_capability().w()?,
    })
}

/// Versions of what computes on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// The newest CUDA that the driver knows, major and minor.
    pub driver: (i32, i32),
    /// NVRTC's, major and minor.
    pub nvrtc: (i32, i32),
    /// cuDNN's, such as (9, 19, 0).
    pub cudnn: (usize, usize, usize),
}

/// The versions of the driver and the libraries that this process has loaded.
///
/// # Errors
/// A driver or an NVRTC that does not tell.
pub fn versions() -> Result<Versions> {
    let (mut driver, mut major, mut minor) = (0, 0, 0);
    // SAFETY: each writes numbers to where it is told.
    unsafe { cuDriverGetVersion(&raw mut driver) }
        .result()
        .w()?;
    // SAFETY: as above.
    let said = unsafe { nvrtcVersion(&raw mut major, &raw mut minor) }.result();
    said.map_err(candle_core::Error::wrap)?;
    let cudnn = get_version();
    Ok(Versions {
        driver: (driver / 1000, driver % 1000 / 10),
        nvrtc: (major, minor),
        cudnn: (cudnn / 10_000, cudnn % 10_000 / 100, cudnn % 100),
    })
}

/// Runs a kernel of Candle's and one of this crate's, and asks cuDNN for a handle. A GPU that the program was not built for, or a
/// driver that is older than the CUDA that built it, refuses only then.
///
/// # Errors
/// What the driver, NVRTC or cuDNN says, and results that are wrong.
pub fn try_out(device: &Device) -> Result<()> {
    let doubled = (Tensor::new(&[-1f32, 2.0], device)? * 2.0)?;
    let found = crate::relu(&doubled)?.to_vec1::<f32>()?;
    if found != [0.0, 4.0] {
        candle_core::bail!("relu of [-2, 4] is {found:?} there");
    }
    super::cudnn::with_cudnn(device.as_cuda_device()?, 0, "conv2d", |_| Ok(()))
}

/// Memory of a device that is free now and all that it has, in bytes, other processes' included.
///
/// # Errors
/// A tensor device that is no GPU, or a driver that does not tell.
pub fn memory(device: &Device) -> Result<(usize, usize)> {
    let stream = device.as_cuda_device()?.cuda_stream();
    stream.context().bind_to_thread().w()?;
    stream.context().mem_get_info().w()
}

/// What this process holds of a device for tensors and for CUDA graphs, in bytes. Libraries and loaded kernels come on top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldMemory {
    /// Bytes in use by tensors, and by what works on them.
    pub tensors: u64,
    /// Bytes held for tensors, those that were freed and kept included.
    pub for_tensors: u64,
    /// Bytes in use by CUDA graphs.
    pub graphs: u64,
    /// Bytes held for CUDA graphs.
    pub for_graphs: u64,
}

/// What this process holds of a device's memory.
///
/// # Errors
/// A tensor device that is no GPU, or a driver that does not tell.
pub fn held_memory(device: &Device) -> Result<HeldMemory> {
    let pool = pool(device)?;
    let number = device.as_cuda_device()?.cuda_stream().context().cu_device();
    let told = |ask: &dyn Fn(*mut c_void) -> CUresult| -> Result<u64> {
        let mut bytes = 0u64;
        ask((&raw mut bytes).cast()).result().w()?;
        Ok(bytes)
    };
    // SAFETY: the pool is the device's own, and the attributes asked for are 64 bits wide.
    let of_pool = |of| told(&|bytes| unsafe { cuMemPoolGetAttribute(pool, of, bytes) });
    // SAFETY: the device is that of a context that exists, and the attributes asked for are 64 bits wide.
    let of_graphs = |of| told(&|bytes| unsafe { cuDeviceGetGraphMemAttribute(number, of, bytes) });
    Ok(HeldMemory {
        tensors: of_pool(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
        for_tensors: of_pool(CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?,
        graphs: of_graphs(CUgraphMem_attribute::CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT)?,
        for_graphs: of_graphs(CUgraphMem_attribute::CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT)?,
    })
}

/// Makes what convolutions keep on the device for the calling thread, which they would make when they first run: a workspace for each
/// stream that is used. Made before what does not last, it does not keep the driver from getting that back, which it gets by pieces of
/// 32 MiB and more.
///
/// # Errors
/// A tensor device that is no GPU, or too little memory.
pub fn make_lasting_memory(device: &Device) -> Result<()> {
    let device = device.as_cuda_device()?;
    let settings = super::settings();
    let lanes = match settings.channels_last {
        true => settings.streams.max(1),
        false => 1,
    };
    (0..lanes).try_for_each(|lane| {
        super::cudnn::with_cudnn(device, lane, "conv2d", |cudnn| cudnn.make_workspace())
    })
}

/// A point in the work given to a device.
#[derive(Debug)]
pub struct Marker(CudaEvent);

impl Marker {
    /// A marker behind all work that the device's stream was given until now.
    ///
    /// # Errors
    /// A tensor device that is no GPU, or what the driver says.
    pub fn after_all(device: &Device) -> Result<Self> {
        let event = device.as_cuda_device()?.cuda_stream().record_event(None);
        Ok(Self(event.w()?))
    }

    /// Whether the device has come so far. Does not wait.
    ///
    /// # Errors
    /// A kernel that failed since the last wait.
    pub fn is_reached(&self) -> Result<bool> {
        self.0.try_is_complete().w()
    }
}

/// Waits until all work given to the device is done.
///
/// # Errors
/// A kernel that failed since the last wait.
pub fn synchronize(device: &Device) -> Result<()> {
    device.as_cuda_device()?.cuda_stream().synchronize().w()
}

/// Opens GPU number `ordinal` with one stream for all threads, which a CUDA graph can capture, and
/// without the two events per allocation that would order several streams. Freed memory stays with the process, as in
/// PyTorch: the driver would give it back at every wait, and take time to get it again.
///
/// # Errors
/// As [`device_info`], and libraries (cuBLAS, cuRAND) that cannot be used.
pub fn open_device(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    // SAFETY: tensors are made and freed on the device's one stream. Work on other streams (super::lanes) waits for it
    // before and is waited for after, within one call, so that no event per allocation is needed.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    keep_freed_memory(&device)?;
    Ok(device)
}

/// Gives memory that is free back to the driver: a CUDA graph takes its own from there, and not what is kept for the
/// tensors of this process. Waits for the device.
///
/// # Errors
/// A tensor device that is no GPU, and as [`synchronize`].
pub fn release_freed_memory(device: &Device) -> Result<()> {
    // What is freed belongs to its stream until that has come to that point.
    lanes::synchronize(device.as_cuda_device()?)?;
    let pool = pool(device)?;
    // SAFETY: the pool is the device's own, which lives as long as the driver.
    unsafe { result::mem_pool::trim_to(pool, 0) }.w()
}

/// Gives the memory of CUDA graphs that do not run back to the driver: tensors take theirs from there, and not what graphs
/// keep from one launch to the next. The next launch takes it again. Waits for the device.
///
/// # Errors
/// A tensor device that is no GPU, and as [`synchronize`].
pub fn release_graph_memory(device: &Device) -> Result<()> {
    // What a graph takes is in use until it has run.
    lanes::synchronize(device.as_cuda_device()?)?;
    let stream = device.as_cuda_device()?.cuda_stream();
    // SAFETY: the device is that of a context that exists.
    unsafe { cuDeviceGraphMemTrim(stream.context().cu_device()) }
        .result()
        .w()
}

/// Tells the pool from which streams allocate never to give memory back. Some virtual GPUs have none.
fn keep_freed_memory(device: &Device) -> Result<()> {
    let stream = device.as_cuda_device()?.cuda_stream();
    let has_pools = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
    if stream.context().attribute(has_pools).w()? == 0 {
        tracing::debug!("the GPU has no memory pools: each tensor's memory is the driver's");
        return Ok(());
    }
    let pool = pool(device)?;
    let mut threshold = u64::MAX;
    let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: as above, and the attribute is 64 bits wide.
    unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast()) }.w()
}

/// The pool from which streams allocate.
fn pool(device: &Device) -> Result<CUmemoryPool> {
    let stream = device.as_cuda_device()?.cuda_stream();
    let context = stream.context();
    context.bind_to_thread().w()?;
    // SAFETY: the device is the context's.
    unsafe { result::device::get_default_mem_pool(context.cu_device()) }.w()
}
