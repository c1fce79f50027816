//! Dropout on CUDA, with the masks of the CPU.

#![allow(unsafe_code)]

use std::cell::RefCell;

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, DType, Result, Tensor};

use super::{Dropout, OP};
use crate::cuda::kernels::Source;
use crate::cuda::launch::{Held, Launch, Operand, alloc, count, tensor};
use crate::error::OpError;
use crate::thread_local::with_local;

const SOURCE: Source = Source {
    file: "dropout/kernels.cu",
    text: include_str!("kernels.cu"),
};

thread_local! {
    static DEVICE_SEED: RefCell<Option<Tensor>> = const { RefCell::new(None) };
}

/// Runs `f`; each [`crate::dropout`] of a CUDA tensor in it, and its backward pass whenever that comes, takes the step's
/// seed from `seed` in place of [`crate::Mode`]'s, at the time when the device computes it.
///
/// So a CUDA graph that is launched again draws new masks, once `seed` holds another number. `seed` is u32 of shape (2)
/// on the device, the lower half first. Same number, same mask as by `Mode`, on the CPU too.
pub fn with_dropout_seed<R>(seed: &Tensor, f: impl FnOnce() -> R) -> R {
    with_local(&DEVICE_SEED, Some(seed.clone()), f)
}

/// The tensor of the [`with_dropout_seed`] that runs.
pub(super) fn device_seed() -> Option<Tensor> {
    DEVICE_SEED.with_borrow(Option::clone)
}

pub(super) fn apply(dropout: &Dropout, x: Operand) -> Result<CudaStorage> {
    let (device, dtype) = (x.0.device(), x.0.dtype());
    let elements = count(OP, x.1.shape().elem_count())?;
    let mut y = alloc(OP, device, dtype, elements as usize)?;
    if elements == 0 {
        return Ok(y);
    }
    let seed = dropout.device_seed.as_ref();
    if let Some(seed) = seed
        && (seed.dims() != [2] || seed.dtype() != DType::U32)
    {
        let found = (seed.dtype(), seed.dims());
        return Err(OpError::setting(OP, "seed", found, "U32 of shape (2)"));
    }
    let held = seed.map(Held::new);
    let stream = device.cuda_stream();
    let launch = Launch::typed(OP, device, &stream, &SOURCE, "dropout", dtype)?
        .read(x)?
        .write(&mut y)?;
    let launch = match &held {
        Some(held) => launch.read(held.operand(OP)?)?,
        None => launch.null(),
    };
    let launch = launch
        .long(dropout.seed)
        .long(dropout.salt)
        .long(dropout.threshold())
        .double(1.0 / (1.0 - dropout.p))
        .number(elements);
    // SAFETY: the arguments of `dropout`; x and y have `elements` elements, the seed two. 16 elements a thread.
    unsafe { launch.run(elements.div_ceil(16)) }?;
    Ok(y)
}

pub(super) fn backward(dropout: &Dropout, dy: &Tensor) -> Result<Tensor> {
    let held = Held::new(dy);
    Ok(tensor(apply(dropout, held.operand(OP)?)?, dy.shape()))
}
