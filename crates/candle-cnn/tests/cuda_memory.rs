//! Memory of a GPU that is kept and given back. In a process of its own: other tests would take and free meanwhile.

#![cfg(feature = "cuda")]

use std::sync::{Mutex, PoisonError};

use candle_cnn::cuda::{
    held_memory, memory, open_device, release_freed_memory, release_graph_memory, synchronize,
};
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use candle_core::{DType, Device, Result, Tensor};

const BYTES: usize = 1 << 30;
/// What the driver rounds up (a pool grows by 32 MiB or more), and what other processes may do.
const OTHERS: usize = BYTES / 4;

/// One test at a time.
static GPU: Mutex<()> = Mutex::new(());

/// Calls `test` with a GPU, if there is one.
fn with_gpu(test: impl FnOnce(&Device) -> Result<()>) -> Result<()> {
    let _alone = GPU.lock().unwrap_or_else(PoisonError::into_inner);
    if !test_support::devices().iter().any(|one| one.is_cuda()) {
        return Ok(());
    }
    test(&open_device(0)?)
}

/// Tells whether so many bytes more than now are taken of the device.
fn taken_from_now_on(device: &Device) -> Result<impl Fn() -> Result<bool>> {
    release_freed_memory(device)?;
    let before = memory(device)?.0;
    Ok(move || {
        let taken = before.abs_diff(memory(device)?.0);
        assert!(taken < OTHERS || taken.abs_diff(BYTES) < OTHERS, "{taken}");
        Ok(taken > OTHERS)
    })
}

#[test]
fn freed_memory_is_kept_until_it_is_released() -> Result<()> {
    with_gpu(|device| {
        let is_taken = taken_from_now_on(device)?;
        let tensor = Tensor::zeros(BYTES, DType::U8, device)?;
        assert!(is_taken()?);
        let in_use_and_held = || {
            let held = held_memory(device)?;
            let [used, held] = [held.tensors, held.for_tensors].map(|bytes| bytes >= BYTES as u64);
            Ok::<_, candle_core::Error>((used, held))
        };
        assert_eq!(in_use_and_held()?, (true, true));
        drop(tensor);
        assert!(is_taken()?);
        synchronize(device)?;
        assert_eq!(in_use_and_held()?, (false, true));
        release_freed_memory(device)?;
        assert!(!is_taken()?);
        assert_eq!(in_use_and_held()?, (false, false));
        Ok(())
    })
}

#[test]
fn a_graph_keeps_its_memory_until_it_is_released_and_takes_it_again() -> Result<()> {
    with_gpu(|device| {
        let result = Tensor::zeros(1, DType::F32, device)?;
        let step = |elements: usize| {
            let ones = Tensor::ones(elements, DType::F32, device)?;
            let sum = (&result + ones.narrow(0, elements - 1, 1)?)?;
            result.slice_set(&sum, 0, 0)
        };
        // Loads the kernels, which a capture forbids.
        step(1)?;
        let is_taken = taken_from_now_on(device)?;
        let stream = device.as_cuda_device()?.cuda_stream();
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).w()?;
        let captured = step(BYTES / 4);
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags);
        captured?;
        let graph = graph.w()?.expect("a graph");
        for launches in 1..=2 {
            graph.launch().w()?;
            if launches == 2 {
                synchronize(device)?;
                assert!(is_taken()?);
                assert!(held_memory(device)?.for_graphs >= BYTES as u64);
            }
            // The first time while it may still run.
            release_graph_memory(device)?;
            assert!(!is_taken()?);
            assert!(held_memory(device)?.for_graphs < BYTES as u64);
            assert_eq!(result.to_vec1::<f32>()?, [1.0 + launches as f32]);
        }
        Ok(())
    })
}
