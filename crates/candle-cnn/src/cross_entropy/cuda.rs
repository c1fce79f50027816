//! Cross entropy on CUDA. Labels stay on the device: one that is no class shows as a loss of NaN.

#![allow(unsafe_code)]

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

use super::OP;
use crate::cuda::kernels::Source;
use crate::cuda::launch::{Held, Launch, Operand, alloc, compute_dtype, count, tensor};
use crate::error::OpError;

const SOURCE: Source = Source {
    file: "cross_entropy/kernels.cu",
    text: include_str!("kernels.cu"),
};

/// The loss; `labels` (N) are u32 and contiguous. f32 for logits in bf16.
pub(super) fn loss(logits: &Tensor, labels: &Tensor, label_smoothing: f64) -> Result<Tensor> {
    let (examples, classes) = logits.dims2()?;
    count(OP, logits.elem_count())?;
    let op = CudaCrossEntropy {
        examples: count(OP, examples)?,
        classes: count(OP, classes)?,
        label_smoothing,
    };
    logits.contiguous()?.apply_op2(labels, op)
}

struct CudaCrossEntropy {
    examples: u32,
    classes: u32,
    label_smoothing: f64,
}

impl CudaCrossEntropy {
    fn forward(&self, logits: Operand, labels: Operand) -> Result<CudaStorage> {
        let (device, dtype) = (logits.0.device(), logits.0.dtype());
        let stream = device.cuda_stream();
        let mut losses = alloc(OP, device, DType::F64, self.examples as usize)?;
        let launch = Launch::typed(OP, device, &stream, &SOURCE, "cross_entropy_rows", dtype)?
            .read(logits)?
            .read(labels)?
            .write(&mut losses)?
            .number(self.classes)
            .double(self.label_smoothing);
        // SAFETY: the arguments of `row_loss`: (examples, classes), and two of (examples). A block an example.
        unsafe { launch.run_blocks((self.examples, 1)) }?;
        let mut loss = alloc(OP, device, compute_dtype(dtype), 1)?;
        let launch = Launch::typed(OP, device, &stream, &SOURCE, "cross_entropy_mean", dtype)?
            .read_all(&losses)?
            .write(&mut loss)?
            .number(self.examples);
        // SAFETY: the arguments of `mean`: (examples), and one number.
        unsafe { launch.run_blocks((1, 1)) }?;
        Ok(loss)
    }

    fn backward(&self, logits: Operand, labels: Operand, upstream: Operand) -> Result<CudaStorage> {
        let (device, dtype) = (logits.0.device(), logits.0.dtype());
        let stream = device.cuda_stream();
        let elements = self.examples as usize * self.classes as usize;
        let mut dlogits = alloc(OP, device, dtype, elements)?;
        let launch = Launch::typed(
            OP,
            device,
            &stream,
            &SOURCE,
            "cross_entropy_gradient",
            dtype,
        )?
        .read(logits)?
        .read(labels)?
        .read(upstream)?
        .write(&mut dlogits)?
        .number(self.examples)
        .number(self.classes)
        .double(self.label_smoothing);
        // SAFETY: the arguments of `gradient`: two of (examples, classes), (examples), one number. A block an example.
        unsafe { launch.run_blocks((self.examples, 1)) }?;
        Ok(dlogits)
    }
}

impl CustomOp2 for CudaCrossEntropy {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Err(OpError::on_cpu(OP))
    }

    fn cuda_fwd(
        &self,
        logits: &CudaStorage,
        logits_layout: &Layout,
        labels: &CudaStorage,
        labels_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let loss = self.forward((logits, logits_layout), (labels, labels_layout))?;
        Ok((loss, Shape::from(())))
    }

    fn bwd(
        &self,
        logits: &Tensor,
        labels: &Tensor,
        _loss: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        if !logits.track_op() {
            return Ok((None, None));
        }
        let upstream = upstream.contiguous()?;
        let held = [logits, labels, &upstream].map(Held::new);
        let dlogits = self.backward(
            held[0].operand(OP)?,
            held[1].operand(OP)?,
            held[2].operand(OP)?,
        )?;
        Ok((Some(tensor(dlogits, logits.shape())), None))
    }
}
