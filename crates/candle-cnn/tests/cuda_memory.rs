//! Memory of a GPU that is kept and given back. In a process of its own: other tests would take and free meanwhile.

#![cfg(feature = "cuda")]

use candle_cnn::cuda::{memory, open_device, release_freed_memory};
use candle_core::{DType, Result, Tensor};

#[test]
fn freed_memory_is_kept_until_it_is_released() -> Result<()> {
    if !test_support::devices().iter().any(|one| one.is_cuda()) {
        return Ok(());
    }
    const BYTES: usize = 256 << 20;
    // What the driver rounds up, and what other processes may do.
    const OTHERS: usize = BYTES / 4;
    let device = open_device(0)?;
    let free = || Ok::<_, candle_core::Error>(memory(&device)?.0);
    release_freed_memory(&device)?;
    let before = free()?;
    let tensor = Tensor::zeros(BYTES, DType::U8, &device)?;
    assert!(before.abs_diff(free()?) > BYTES - OTHERS);
    drop(tensor);
    assert!(before.abs_diff(free()?) > BYTES - OTHERS);
    release_freed_memory(&device)?;
    assert!(before.abs_diff(free()?) < OTHERS);
    Ok(())
}
