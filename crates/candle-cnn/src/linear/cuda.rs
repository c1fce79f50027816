//! A fully connected layer on CUDA.

#![allow(unsafe_code)]

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Result};

use super::{Linear, OP};
use crate::cuda::kernels::Source;
use crate::cuda::launch::{Launch, Operand, count, zeros};

const SOURCE: Source = Source {
    file: "linear/kernels.cu",
    text: include_str!("kernels.cu"),
};

/// `x · weightᵀ`
pub(super) fn product(op: &Linear, x: Operand, weight: Operand) -> Result<CudaStorage> {
    match op.is_empty() {
        true => zeros(x.0.device(), op.dtype, op.shape().elem_count()),
        false => op.product(x, weight),
    }
}

/// Adds `bias` to each row of `y`, which has `elements` in rows of as many values as `bias`.
pub(super) fn add_to_rows(y: &mut CudaStorage, bias: Operand, elements: usize) -> Result<()> {
    let (device, dtype) = (y.device().clone(), y.dtype());
    let stream = device.cuda_stream();
    let elements = count(OP, elements)?;
    if elements == 0 {
        return Ok(());
    }
    let outputs = bias.1.shape().elem_count();
    let launch = Launch::typed(OP, &device, &stream, &SOURCE, "linear_add_to_rows", dtype)?
        .write(y)?
        .read(bias)?
        .divisor(outputs)
        .number(elements);
    // SAFETY: the arguments are those of `add_to_rows` in kernels.cu; `y` has so many elements, and `bias` as many as a row.
    unsafe { launch.run(elements) }
}
