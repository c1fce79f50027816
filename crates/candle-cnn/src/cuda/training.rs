//! What a training step does besides its network: the batch, the right answers, the update.
//!
//! Nothing waits for the device or uploads to it, so that a CUDA graph can hold it.

#![allow(unsafe_code)]

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{DType, Result, Tensor};

use super::kernels::Source;
use super::launch::{
    Held, Launch, MOST_IN_TABLE, THREADS, UNUSED_ENTRY, address, alloc, count, tensor,
};
use crate::batch_norm::BatchStatistics;
use crate::error::OpError;

const SOURCE: Source = Source {
    file: "cuda/training.cu",
    text: include_str!("training.cu"),
};

/// A batch from images that stay on the device: `(image / 255 − mean) / std` by channel, rounded after each operation
/// as on the CPU, then to `dtype` (f32, f64 or bf16).
///
/// `images` is u8 (N, 3, H, W), `indices` u32 (n); returns (n, 3, H, W). An index that is not below N gives NaN.
///
/// # Errors
/// [`OpError`] for other shapes, types and devices.
pub fn gather_normalized(
    images: &Tensor,
    indices: &Tensor,
    mean: [f32; 3],
    std: [f32; 3],
    dtype: DType,
) -> Result<Tensor> {
    const OP: &str = "gather_normalized";
    let (total, height, width) = match images.dims() {
        &[total, 3, height, width] => (total, height, width),
        _ => return Err(OpError::shape(OP, "images", images, "(N, 3, H, W)")),
    };
    let Ok(n) = indices.dims1() else {
        return Err(OpError::shape(OP, "indices", indices, "(n)"));
    };
    of_type(OP, "dtype of images", images, DType::U8)?;
    of_type(OP, "dtype of indices", indices, DType::U32)?;
    let (images, indices) = (images.contiguous()?, indices.contiguous()?);
    let held = [&images, &indices].map(Held::new);
    let operand = held[0].operand(OP)?;
    let device = operand.0.device();
    let pixels = count(OP, height * width)?;
    let elements = count(OP, n * 3 * height * width)?;
    let mut out = alloc(OP, device, dtype, elements as usize)?;
    if elements > 0 {
        let stream = device.cuda_stream();
        let mut launch = Launch::typed(OP, device, &stream, &SOURCE, "gather_normalized", dtype)?
            .read(operand)?
            .read(held[1].operand(OP)?)?
            .write(&mut out)?
            .number(count(OP, total)?)
            .number(pixels);
        for number in mean.into_iter().chain(std) {
            launch = launch.float(number);
        }
        let launch = launch.number(elements);
        // SAFETY: the arguments of `gather`: `total` images of 3 × `pixels` bytes, one index for each of the images
        // that `out` has room for.
        unsafe { launch.run(elements) }?;
    }
    Ok(tensor(out, (n, 3, height, width)))
}

/// How many rows of `logits` (n, C) have their first largest value at the label, as f32 of shape (1).
///
/// `labels` is u32 (n). A label that is no class is not right.
///
/// # Errors
/// [`OpError`] for other shapes, types and devices.
pub fn count_correct(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    const OP: &str = "count_correct";
    let Ok((n, classes)) = logits.dims2() else {
        return Err(OpError::shape(OP, "logits", logits, "(n, C)"));
    };
    if labels.dims() != [n] || classes == 0 {
        return Err(OpError::shapes(
            OP,
            ("logits", logits.dims()),
            ("labels", labels.dims()),
            "logits are (n, C), labels (n), with C at least 1",
        ));
    }
    of_type(OP, "dtype of labels", labels, DType::U32)?;
    let (logits, labels) = (logits.contiguous()?, labels.contiguous()?);
    let held = [&logits, &labels].map(Held::new);
    let operand = held[0].operand(OP)?;
    let device = operand.0.device();
    count(OP, logits.elem_count())?;
    let mut correct = alloc(OP, device, DType::F32, 1)?;
    let stream = device.cuda_stream();
    let launch = Launch::typed(
        OP,
        device,
        &stream,
        &SOURCE,
        "count_correct",
        logits.dtype(),
    )?
    .read(operand)?
    .read(held[1].operand(OP)?)?
    .write(&mut correct)?
    .number(count(OP, n)?)
    .number(count(OP, classes)?);
    // SAFETY: the arguments of `count_correct`: (n, classes), (n), and one number. One block.
    unsafe { launch.run_blocks((1, 1)) }?;
    Ok(tensor(correct, 1))
}

/// A parameter with what its update needs: contiguous tensors of one shape and type, f32 or f64.
#[derive(Clone, Copy, Debug)]
pub struct SgdTensor<'a> {
    /// The parameter, moved in place.
    pub parameter: &'a Tensor,
    /// The parameter's gradient, without the weight decay's part.
    pub gradient: &'a Tensor,
    /// The velocity, changed in place; none without momentum.
    pub momentum_buffer: Option<&'a Tensor>,
    /// The velocity becomes the gradient undampened, whatever the buffer holds.
    pub first: bool,
}

/// The settings of `torch.optim.SGD`, but for the learning rate.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SgdHyperparameters {
    /// Share of the old velocity that is kept.
    pub momentum: f64,
    /// Share of the gradient that is withheld from the velocity, after the first step.
    pub dampening: f64,
    /// Looks one momentum step ahead.
    pub nesterov: bool,
    /// L2 penalty, added to the gradient.
    pub weight_decay: f64,
}

/// A step of `torch.optim.SGD` for all `tensors`, in a few launches, at the learning rate in `lr` (f32 of shape (1)).
///
/// Addresses go into the launches, so that a captured graph repeats the step on the same memory.
///
/// # Errors
/// [`OpError`] for tensors that do not fit one another; nothing is moved then.
pub fn sgd_step(
    tensors: &[SgdTensor<'_>],
    lr: &Tensor,
    hyperparameters: &SgdHyperparameters,
) -> Result<()> {
    let Some(one) = tensors.first() else {
        return Ok(());
    };
    of_type(SGD, "dtype of lr", lr, DType::F32)?;
    if lr.elem_count() != 1 {
        return Err(OpError::shape(SGD, "lr", lr, "(1)"));
    }
    let dtype = one.parameter.dtype();
    if !matches!(dtype, DType::F32 | DType::F64) {
        return Err(OpError::dtype(SGD, dtype));
    }
    for tensor in tensors {
        tensor.check(dtype)?;
    }
    for chunk in tensors.chunks(TENSORS) {
        step_chunk(chunk, lr, dtype, hyperparameters)?;
    }
    Ok(())
}

const SGD: &str = "sgd";

/// Parameters of one launch, as in `training.cu`.
const TENSORS: usize = 96;

/// Elements of a block.
const PER_BLOCK: u32 = 4 * THREADS;

/// `Chunk` of `training.cu`.
#[repr(C)]
struct Chunk {
    parameter: [u64; TENSORS],
    gradient: [u64; TENSORS],
    buffer: [u64; TENSORS],
    elements: [u32; TENSORS],
    end: [u32; TENSORS],
    first: [u8; TENSORS],
}

// SAFETY: plain numbers, in C's order; 96 is a multiple of 8, so that there is no padding.
unsafe impl DeviceRepr for Chunk {}
const _: () = assert!(size_of::<Chunk>() <= MOST_IN_TABLE);

impl SgdTensor<'_> {
    fn check(&self, dtype: DType) -> Result<()> {
        count(SGD, self.parameter.elem_count())?;
        for (name, other) in [
            ("parameter", Some(self.parameter)),
            ("gradient", Some(self.gradient)),
            ("momentum buffer", self.momentum_buffer),
        ] {
            let Some(other) = other else { continue };
            if other.dtype() != dtype {
                return Err(OpError::dtype_mismatch(SGD, dtype, other.dtype()));
            }
            if other.shape() != self.parameter.shape() {
                return Err(OpError::shapes(
                    SGD,
                    ("parameter", self.parameter.dims()),
                    (name, other.dims()),
                    "one shape",
                ));
            }
            if !other.is_contiguous() {
                return Err(OpError::not_contiguous(SGD, other.layout()));
            }
        }
        Ok(())
    }
}

fn step_chunk(
    tensors: &[SgdTensor<'_>],
    lr: &Tensor,
    dtype: DType,
    hyperparameters: &SgdHyperparameters,
) -> Result<()> {
    let held_lr = Held::new(lr);
    let lr = held_lr.operand(SGD)?;
    let device = lr.0.device();
    let stream = device.cuda_stream();
    let held: Vec<[Option<Held<'_>>; 3]> = tensors
        .iter()
        .map(|tensor| {
            [
                Some(tensor.parameter),
                Some(tensor.gradient),
                tensor.momentum_buffer,
            ]
            .map(|tensor| tensor.map(Held::new))
        })
        .collect();
    let mut chunk = Chunk {
        parameter: [0; TENSORS],
        gradient: [0; TENSORS],
        buffer: [0; TENSORS],
        elements: [0; TENSORS],
        end: [UNUSED_ENTRY; TENSORS],
        first: [0; TENSORS],
    };
    let mut guards = Vec::new();
    let mut blocks = 0u32;
    for (i, (tensor, held)) in tensors.iter().zip(&held).enumerate() {
        let pointers = [
            &mut chunk.parameter[i],
            &mut chunk.gradient[i],
            &mut chunk.buffer[i],
        ];
        for (pointer, held) in pointers.into_iter().zip(held) {
            if let Some(held) = held {
                let (at, guard) = address(SGD, held.operand(SGD)?, &stream)?;
                *pointer = at;
                guards.push(guard);
            }
        }
        let elements = count(SGD, tensor.parameter.elem_count())?;
        // 96 parameters of 2^31 elements have fewer than 2^28 blocks.
        blocks += elements.div_ceil(PER_BLOCK);
        chunk.elements[i] = elements;
        chunk.end[i] = blocks;
        chunk.first[i] = tensor.first.into();
    }
    if blocks == 0 {
        return Ok(());
    }
    let SgdHyperparameters {
        momentum,
        dampening,
        nesterov,
        weight_decay,
    } = *hyperparameters;
    let launch = Launch::typed(SGD, device, &stream, &SOURCE, "sgd", dtype)?
        .read(lr)?
        .double(momentum)
        .double(dampening)
        .double(weight_decay)
        .number(nesterov.into());
    // SAFETY: the arguments of `sgd`: the tensors of each parameter have its number of elements, and lr one. Parameters
    // and buffers are written although only read locks are held: device memory is ordered by the stream, and nobody but
    // the optimiser writes them.
    unsafe { launch.run_with_table((blocks, 1), &chunk) }
}

/// The running statistics of a batch norm, moved in place; (C) each, contiguous, f32 or f64.
#[derive(Clone, Copy, Debug)]
pub struct TrackedStatistics<'a> {
    /// `running_mean`.
    pub mean: &'a Tensor,
    /// `running_var`.
    pub variance: &'a Tensor,
    /// `num_batches_tracked`: i64, one element.
    pub batches: &'a Tensor,
}

/// `NORMS` of training.cu.
const NORMS: usize = 64;

/// `Norms` of training.cu.
#[repr(C)]
struct Norms {
    mean: [u64; NORMS],
    variance: [u64; NORMS],
    batches: [u64; NORMS],
    batch_mean: [u64; NORMS],
    batch_variance: [u64; NORMS],
    channels: [u32; NORMS],
    end: [u32; NORMS],
}

// SAFETY: plain numbers, laid out as training.cu has them, without padding.
unsafe impl DeviceRepr for Norms {}
const _: () = assert!(size_of::<Norms>() <= MOST_IN_TABLE);

/// [`crate::update_running`] of both statistics of each batch norm, and one more batch counted, in a launch for 64 of them.
///
/// # Errors
/// [`OpError`] for tensors that do not fit one another; nothing is moved then.
pub fn take_up_statistics(
    norms: &[(TrackedStatistics<'_>, &BatchStatistics)],
    momentum: f64,
) -> Result<()> {
    let Some((first, _)) = norms.first() else {
        return Ok(());
    };
    let dtype = first.mean.dtype();
    if !matches!(dtype, DType::F32 | DType::F64) {
        return Err(OpError::dtype(TAKE_UP, dtype));
    }
    for (running, batch) in norms {
        check_statistics(running, batch, dtype)?;
    }
    norms
        .chunks(NORMS)
        .try_for_each(|norms| take_up_chunk(norms, dtype, momentum))
}

const TAKE_UP: &str = "take_up_statistics";

fn check_statistics(
    running: &TrackedStatistics<'_>,
    batch: &BatchStatistics,
    dtype: DType,
) -> Result<()> {
    for (name, tensor) in [
        ("running mean", running.mean),
        ("running variance", running.variance),
        ("mean of the batch", &batch.mean),
        ("variance of the batch", &batch.unbiased_variance),
    ] {
        if tensor.dtype() != dtype {
            return Err(OpError::dtype_mismatch(TAKE_UP, dtype, tensor.dtype()));
        }
        if tensor.rank() != 1 || tensor.shape() != running.mean.shape() {
            return Err(OpError::shapes(
                TAKE_UP,
                ("running mean", running.mean.dims()),
                (name, tensor.dims()),
                "(C) each",
            ));
        }
        if !tensor.is_contiguous() {
            return Err(OpError::not_contiguous(TAKE_UP, tensor.layout()));
        }
    }
    of_type(TAKE_UP, "dtype of batches", running.batches, DType::I64)?;
    if running.batches.elem_count() != 1 {
        return Err(OpError::shape(
            TAKE_UP,
            "batches",
            running.batches,
            "one element",
        ));
    }
    Ok(())
}

fn take_up_chunk(
    norms: &[(TrackedStatistics<'_>, &BatchStatistics)],
    dtype: DType,
    momentum: f64,
) -> Result<()> {
    let held: Vec<[Held<'_>; 5]> = norms
        .iter()
        .map(|(running, batch)| {
            [
                running.mean,
                running.variance,
                running.batches,
                &batch.mean,
                &batch.unbiased_variance,
            ]
            .map(Held::new)
        })
        .collect();
    let device = held[0][0].operand(TAKE_UP)?.0.device();
    let stream = device.cuda_stream();
    let mut table = Norms {
        mean: [0; NORMS],
        variance: [0; NORMS],
        batches: [0; NORMS],
        batch_mean: [0; NORMS],
        batch_variance: [0; NORMS],
        channels: [0; NORMS],
        end: [UNUSED_ENTRY; NORMS],
    };
    let mut guards = Vec::new();
    let mut blocks = 0u32;
    for (i, ((running, _), held)) in norms.iter().zip(&held).enumerate() {
        let pointers = [
            &mut table.mean[i],
            &mut table.variance[i],
            &mut table.batches[i],
            &mut table.batch_mean[i],
            &mut table.batch_variance[i],
        ];
        for (pointer, held) in pointers.into_iter().zip(held) {
            let (at, guard) = address(TAKE_UP, held.operand(TAKE_UP)?, &stream)?;
            *pointer = at;
            guards.push(guard);
        }
        let channels = count(TAKE_UP, running.mean.elem_count())?;
        // One thread counts the batch even where there is no channel.
        blocks += channels.max(1).div_ceil(THREADS);
        table.channels[i] = channels;
        table.end[i] = blocks;
    }
    let launch =
        Launch::typed(TAKE_UP, device, &stream, &SOURCE, "take_up", dtype)?.double(momentum);
    // SAFETY: the arguments of `take_up`: four of (channels) and one number for each batch norm. As in `sgd_step`, the running
    // ones are written although only read locks are held: the stream orders it, and nobody but the network writes them.
    unsafe { launch.run_with_table((blocks, 1), &table) }
}

fn of_type(op: &'static str, name: &'static str, tensor: &Tensor, dtype: DType) -> Result<()> {
    if tensor.dtype() != dtype {
        let expected = match dtype {
            DType::U8 => "U8",
            DType::U32 => "U32",
            DType::I64 => "I64",
            _ => "F32",
        };
        return Err(OpError::setting(op, name, tensor.dtype(), expected));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_count_of_batches_that_is_none_is_an_error_that_names_what_is_wrong_with_it() -> Result<()>
    {
        let cpu = &Device::Cpu;
        let numbers = Tensor::ones(3, DType::F32, cpu)?;
        let batch = BatchStatistics {
            mean: numbers.clone(),
            unbiased_variance: numbers.clone(),
        };
        for (batches, expected) in [
            (
                Tensor::zeros(1, DType::F32, cpu)?,
                "take_up_statistics: dtype of batches is F32, expected I64",
            ),
            (
                Tensor::zeros(2, DType::I64, cpu)?,
                "take_up_statistics: batches has shape [2], expected one element",
            ),
        ] {
            let running = TrackedStatistics {
                mean: &numbers,
                variance: &numbers,
                batches: &batches,
            };
            let error = take_up_statistics(&[(running, &batch)], 0.1).unwrap_err();
            let text = error.to_string();
            assert!(text.starts_with(expected), "{text}");
        }
        Ok(())
    }
}
