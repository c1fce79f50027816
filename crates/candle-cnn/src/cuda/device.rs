//! Finding a GPU, and opening it as training wants it.

#![allow(unsafe_code)]

use std::ffi::c_void;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphMem_attribute, CUmemPool_attribute, CUmemoryPool, CUresult,
    cuDeviceGetGraphMemAttribute, cuDeviceGraphMemTrim, cuMemPoolGetAttribute,
};
use candle_core::cuda_backend::cudarc::driver::{CudaContext, result};
use candle_core::{Device, Result};

use super::lanes;

/// What the driver says of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number, as in `cuda:0`.
    pub ordinal: usize,
    /// Its model, such as `NVIDIA H200`.
    pub name: String,
    /// All of its memory, in bytes.
    pub memory: usize,
    /// Major and minor compute capability; (9, 0) on Hopper.
    pub compute_capability: (i32, i32),
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
    /// In use by tensors, and by what works on them.
    pub tensors: u64,
    /// Held for tensors: what was freed is kept.
    pub for_tensors: u64,
    /// In use by graphs.
    pub graphs: u64,
    /// Held for graphs.
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

/// Tells the pool from which streams allocate never to give memory back.
fn keep_freed_memory(device: &Device) -> Result<()> {
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
