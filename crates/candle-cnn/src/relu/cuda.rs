//! ReLU on CUDA, forward and backward by one kernel.

#![allow(unsafe_code)]

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Result, Tensor};

use super::OP;
use crate::cuda::kernels::Source;
use crate::cuda::launch::{Held, Launch, Operand, alloc, count, tensor};

const SOURCE: Source = Source {
    file: "relu/kernels.cu",
    text: include_str!("kernels.cu"),
};

/// The elements of `value` where those of `by` are not at most 0.
pub(super) fn keep_positive(value: Operand, by: Operand) -> Result<CudaStorage> {
    let (storage, layout) = value;
    let (device, dtype) = (storage.device(), storage.dtype());
    let elements = count(OP, layout.shape().elem_count())?;
    let mut out = alloc(OP, device, dtype, elements as usize)?;
    if elements > 0 {
        let stream = device.cuda_stream();
        let launch = Launch::typed(OP, device, &stream, &SOURCE, "relu", dtype)?
            .read(value)?
            .read(by)?
            .write(&mut out)?
            .number(elements);
        // SAFETY: the arguments of `relu`; all three have `elements` elements.
        unsafe { launch.run(elements) }?;
    }
    Ok(out)
}

/// The gradient of the input; `y` is the output, `dy` its gradient.
pub(super) fn backward(y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (held_y, held_dy) = (Held::new(y), Held::new(dy));
    let dx = keep_positive(held_dy.operand(OP)?, held_y.operand(OP)?)?;
    Ok(tensor(dx, y.shape()))
}
