//! Maximum pooling on CUDA. As on the CPU, the backward pass finds the winners again.

#![allow(unsafe_code)]

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, DType, Result, Tensor};

use super::OP;
use crate::cuda::kernels::Source;
use crate::cuda::launch::{Held, Launch, Operand, alloc, axis, count, tensor};
use crate::window::Planes;

const SOURCE: Source = Source {
    file: "max_pool2d/kernels.cu",
    text: include_str!("kernels.cu"),
};

pub(super) fn forward(planes: &Planes, x: Operand) -> Result<CudaStorage> {
    let (device, dtype) = (x.0.device(), x.0.dtype());
    let (inputs, outputs) = sizes(planes)?;
    let mut y = alloc(OP, device, dtype, outputs as usize)?;
    if inputs > 0 && outputs > 0 {
        let stream = device.cuda_stream();
        let launch = Launch::typed(OP, device, &stream, &SOURCE, "max_pool2d_forward", dtype)?
            .read(x)?
            .write(&mut y)?
            .structure(axis(OP, &planes.h)?)
            .structure(axis(OP, &planes.w)?)
            .divisor(planes.w.output)
            .divisor(planes.h.output * planes.w.output)
            .number(outputs);
        // SAFETY: the arguments of `forward`; x and y are planes of the axes' inputs and outputs.
        unsafe { launch.run(outputs) }?;
    }
    Ok(y)
}

pub(super) fn backward(planes: &Planes, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (held_x, held_dy) = (Held::new(x), Held::new(dy));
    let (x_operand, dy_operand) = (held_x.operand(OP)?, held_dy.operand(OP)?);
    let (device, dtype) = (x_operand.0.device(), x.dtype());
    let (inputs, outputs) = sizes(planes)?;
    let mut dx = alloc(OP, device, dtype, inputs as usize)?;
    if inputs > 0 {
        let mut winners = alloc(OP, device, DType::U32, outputs as usize)?;
        let stream = device.cuda_stream();
        let (h, w) = (axis(OP, &planes.h)?, axis(OP, &planes.w)?);
        let launch = Launch::typed(OP, device, &stream, &SOURCE, "max_pool2d_winners", dtype)?
            .read(x_operand)?
            .write(&mut winners)?
            .structure(h)
            .structure(w)
            .divisor(planes.w.output)
            .divisor(planes.h.output * planes.w.output)
            .number(outputs);
        // SAFETY: the arguments of `find_winners`; x and winners are planes of the axes' inputs and outputs.
        unsafe { launch.run(outputs) }?;
        let launch = Launch::typed(OP, device, &stream, &SOURCE, "max_pool2d_backward", dtype)?
            .read_all(&winners)?
            .read(dy_operand)?
            .write(&mut dx)?
            .structure(h)
            .structure(w)
            .divisor(planes.w.input)
            .divisor(planes.h.input * planes.w.input)
            .number(inputs);
        // SAFETY: the arguments of `backward`; dx and dy are planes of the axes' inputs and outputs.
        unsafe { launch.run(inputs) }?;
    }
    Ok(tensor(dx, x.shape()))
}

/// Elements of input and output.
fn sizes(planes: &Planes) -> Result<(u32, u32)> {
    let images = planes.batch * planes.channels;
    Ok((
        count(OP, images * planes.input_plane())?,
        count(OP, images * planes.output_plane())?,
    ))
}
