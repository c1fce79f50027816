//! Average pooling on CUDA.

#![allow(unsafe_code)]

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Result, Shape, Tensor};

use super::{AvgPool2d, Rule};
use crate::cuda::kernels::Source;
use crate::cuda::launch::{Held, Launch, Operand, alloc, count, tensor};

const SOURCE: Source = Source {
    file: "avg_pool2d/kernels.cu",
    text: include_str!("kernels.cu"),
};

pub(super) fn forward(pool: &AvgPool2d, x: Operand, output: &Shape) -> Result<CudaStorage> {
    let (op, device, dtype) = (pool.op, x.0.device(), x.0.dtype());
    count(op, x.1.shape().elem_count())?;
    let elements = count(op, output.elem_count())?;
    let mut y = alloc(op, device, dtype, elements as usize)?;
    if elements > 0 {
        let stream = device.cuda_stream();
        let [h, w] = pool.rules;
        let launch = Launch::typed(op, device, &stream, &SOURCE, "avg_pool2d_forward", dtype)?
            .read(x)?
            .write(&mut y)?
            .structure(bins(op, h)?)
            .structure(bins(op, w)?)
            .number(elements);
        // SAFETY: the arguments of `forward`; x and y are planes of the bins' inputs and outputs.
        unsafe { launch.run(elements) }?;
    }
    Ok(y)
}

pub(super) fn backward(pool: &AvgPool2d, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let op = pool.op;
    let held = Held::new(dy);
    let dy = held.operand(op)?;
    let (device, dtype) = (dy.0.device(), x.dtype());
    let elements = count(op, x.elem_count())?;
    let mut dx = alloc(op, device, dtype, elements as usize)?;
    if elements > 0 {
        let stream = device.cuda_stream();
        let [h, w] = pool.rules;
        let launch = Launch::typed(op, device, &stream, &SOURCE, "avg_pool2d_backward", dtype)?
            .read(dy)?
            .write(&mut dx)?
            .structure(bins(op, h)?)
            .structure(bins(op, w)?)
            .number(elements);
        // SAFETY: the arguments of `backward`; dx and dy are planes of the bins' inputs and outputs.
        unsafe { launch.run(elements) }?;
    }
    Ok(tensor(dx, x.shape()))
}

/// `Bins` of kernels.cu.
fn bins(op: &'static str, rule: Rule) -> Result<[u32; 7]> {
    let numbers = match rule {
        Rule::Windows {
            axis,
            count_include_pad,
        } => {
            count(op, axis.output * axis.stride + axis.kernel)?;
            count(op, axis.input + 2 * axis.padding)?;
            let counted = usize::from(count_include_pad);
            [
                axis.input,
                axis.output,
                0,
                axis.kernel,
                axis.stride,
                axis.padding,
                counted,
            ]
        }
        Rule::Adaptive { input, output } => [input, output, 1, 0, 0, 0, 0],
    };
    Ok(numbers.map(|number| number as u32))
}
