//! A graph on CUDA.
//!
//! Maps lie channels last, (N, H, W, C), as tensor cores want them; Candle's tensors do not. cuDNN takes the sums of each
//! convolution into memory of their own, and small kernels of ours do what lies between for a whole [`Stage`](super::stages::Stage) at once: bias or
//! batch norm and ReLU on the way into the maps, concatenations among them, and the same in the backward pass. A gradient is added to
//! another where it is made, or where it is read. Memory is taken and freed in the order of the device's stream, so that a step
//! can be captured.
//!
//! - *Sums without gaps.* cuDNN does not write into a concatenation: its engines (9.19) want workspace of the result's size for
//!   a result with gaps, to lay it out anew.
//! - *Up to 512 rows* a block has all rows of its channels, and normalises as soon as it knows their mean and deviation, in the
//!   backward pass likewise. Beyond, sums are taken in parts, which another launch joins. Nobody waits for the gradients of biases:
//!   the parts of all are joined at the end.
//! - *Masks.* Behind a bias, what is positive is kept as bits, a sixteenth of the bytes that the backward pass would read else. Then
//!   a map that only poolings read is not kept. Threads that take single channels keep the map instead.
//! - *Poolings* keep the place of each maximum in its window as a byte. The gradient of one with 3×3 windows over what biases
//!   made is added where it is read, and not before, so that it does not go through memory in between: for one pooling of a
//!   map, in whole packs, and while no pooling with other windows waits ([`Backward::can_wait`]).
//! - *Instructions.* A thread takes 16 bytes of a pixel's channels, divides by multiplying, and compares each line of a 3×3
//!   window once. Kernels that spend 300 instructions on a number take longer than the memory that they read
//!   (results/2026-11-26-cuda-kernels-sm90).
//! - *Weights* are laid out once more as cuDNN takes them, in f32 22 MiB of either network, in up to four parts. The backward pass
//!   frees these one by one while gradients take memory of theirs; without a backward pass one is there at a time.
//! - *Frozen weights* whose bias or batch norm trains get a gradient, which is dropped.
//!
//! A step at batch 32 in numbers, counted on the emulated device (`CUDA_EMULATION_LOG=1`; memory without what libraries and the
//! context take):
//!
//! | | launches, copies and convolutions | convolutions alone | memory |
//! | --- | ---: | ---: | ---: |
//! | lesson's net, operation by operation | 553 | 164 | 910 MiB, in bf16 499 |
//! | lesson's net, as a graph | 196 | 110 | 526 MiB, in bf16 310 |
//! | torchvision's net, operation by operation | 1,054 | 170 | 96 MiB |
//! | torchvision's net, as a graph | 233 | 116 | 94 MiB |
//! | torchvision's net, its head alone, as a graph | 128 | 39 | 36 MiB |

mod backward;
mod forward;
mod launches;
mod pass;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

use self::backward::Backward;
use self::forward::Forward;
use self::pass::{GraphPass, Kept};
use super::builder::Operation;
use super::custom_op::{Gradients, Token, lock};
use super::parameters::{ConvParameters, GraphOutput};
use super::plan::Network;
use super::{OP, StaticGraph};
use crate::backward::aside;
use crate::batch_norm::BatchStatistics;
use crate::cuda::launch::Held;
use crate::error::OpError;
use crate::max_pool2d::channels_last;

/// [`StaticGraph::forward`] of images on CUDA, which fit the graph as the parameters do.
pub(super) fn forward(
    graph: &StaticGraph,
    images: &Tensor,
    parameters: &[ConvParameters<'_>],
) -> Result<GraphOutput> {
    let network = &graph.network;
    let dtype = images.dtype();
    if !matches!(dtype, DType::F32 | DType::BF16) {
        return Err(OpError::dtype(OP, dtype));
    }
    for tensor in parameters.iter().flat_map(ConvParameters::tensors) {
        if tensor.dtype() != DType::F32 {
            return Err(OpError::ParameterDType {
                op: OP,
                name: "a parameter",
                found: tensor.dtype(),
                expected: DType::F32,
                input: dtype,
            }
            .into());
        }
        if !tensor.device().same_device(images.device()) {
            return Err(OpError::device(OP, tensor));
        }
    }
    for operation in &network.operations {
        if let Operation::MaxPool(p) = operation
            && p.h.kernel * p.w.kernel > channels_last::MOST_TAPS
        {
            let window = (p.h.kernel, p.w.kernel);
            let expected = "at most 256 pixels on CUDA";
            return Err(OpError::setting(OP, "kernel_size", window, expected));
        }
    }
    if images.dims()[0] == 0 {
        let expected = "at least 1 on CUDA";
        return Err(OpError::setting(OP, "images", 0, expected));
    }
    let images = images.contiguous()?;
    let trainable: Vec<bool> = parameters
        .iter()
        .map(ConvParameters::need_gradient)
        .collect();
    let statistics = Arc::new(Mutex::new(Vec::new()));
    let mut op = CudaGraphOp {
        graph: Arc::clone(network),
        dtype,
        tracks: images.track_op() || trainable.contains(&true),
        needs_input: images.track_op(),
        trainable,
        parameters: Vec::with_capacity(parameters.len()),
        receivers: Vec::new(),
        gradients: Arc::default(),
        statistics: Arc::clone(&statistics),
        kept: Mutex::new(None),
    };
    // An operation of Candle's has few inputs. So variables get their gradients past its graph, and one of them as the second
    // input is enough for the backward pass to be made. What is not a variable hangs on a chain of tokens.
    let mut second = images.detach();
    let mut token: Option<Tensor> = None;
    for (c, parameters) in network.convolutions().iter().zip(parameters) {
        let tensors = match op.tracks {
            true => parameters.folded(c.eps.unwrap_or(0.0))?,
            false => parameters
                .tensors()
                .into_iter()
                .map(Tensor::detach)
                .collect(),
        };
        for tensor in &tensors {
            let receiver = if !tensor.track_op() {
                Receiver::Nobody
            } else if tensor.is_variable() {
                second = tensor.clone();
                Receiver::Variable(tensor.clone())
            } else {
                let before = match token.take() {
                    Some(token) => token,
                    None => Tensor::zeros(1, DType::F32, images.device())?,
                };
                let gradients = Arc::clone(&op.gradients);
                let index = op.receivers.len();
                token = Some(before.apply_op2(tensor, Token { gradients, index })?);
                Receiver::Token
            };
            op.receivers.push(receiver);
        }
        let contiguous = tensors.iter().map(|t| t.detach().contiguous());
        op.parameters.push(contiguous.collect::<Result<_>>()?);
    }
    let features = images.apply_op2(&token.unwrap_or(second), op)?;
    let statistics = std::mem::take(&mut *lock(&statistics));
    Ok(GraphOutput {
        features,
        statistics: statistics.into_iter().flatten().collect(),
    })
}

/// One pass through the graph as a node of Candle's.
struct CudaGraphOp {
    graph: Arc<Network>,
    dtype: DType,
    /// Whether somebody needs a gradient.
    tracks: bool,
    needs_input: bool,
    /// Whether each convolution's parameters need their gradient.
    trainable: Vec<bool>,
    /// The tensors of each convolution, contiguous; running statistics are a part of weight and bias where somebody needs a
    /// gradient.
    parameters: Vec<Vec<Tensor>>,
    /// Who gets the gradient of each parameter, in order.
    receivers: Vec<Receiver>,
    /// Where the backward pass leaves gradients for the tokens.
    gradients: Gradients,
    /// Where the forward pass leaves each convolution's statistics of the batch.
    statistics: Arc<Mutex<Vec<Option<BatchStatistics>>>>,
    /// The maps of the forward pass, where somebody needs a gradient.
    kept: Mutex<Option<Kept>>,
}

/// Who gets the gradient of a parameter.
enum Receiver {
    Nobody,
    Variable(Tensor),
    Token,
}

impl CustomOp2 for CudaGraphOp {
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
        images: &CudaStorage,
        layout: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let batch = layout.dims()[0];
        let channels = self.graph.nodes[self.graph.output].channels;
        let pass = GraphPass::new(self, images.device(), batch);
        let output = Forward::new(&pass).run((images, layout))?;
        *lock(&self.statistics) = output.statistics;
        *lock(&self.kept) = output.kept;
        Ok((output.features, Shape::from((batch, channels))))
    }

    fn bwd(
        &self,
        images: &Tensor,
        second: &Tensor,
        _features: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(kept) = lock(&self.kept).take() else {
            let expected = "one backward pass for each forward pass";
            return Err(OpError::setting(OP, "backward", "a second one", expected));
        };
        let gradient = gradient.contiguous()?;
        let held = Held::new(&gradient);
        let d_features = held.operand(OP)?;
        let pass = GraphPass::new(self, d_features.0.device(), images.dims()[0]);
        let (d_images, d_parameters) = Backward::new(&pass, kept).run(d_features)?;
        let mut for_tokens = Vec::with_capacity(d_parameters.len());
        for (receiver, gradient) in self.receivers.iter().zip(d_parameters) {
            for_tokens.push(match receiver {
                Receiver::Nobody => None,
                Receiver::Token => gradient,
                Receiver::Variable(variable) => {
                    if aside(variable, gradient).is_some() {
                        let expected = "candle_cnn::backward(&loss), through which a graph on CUDA hands \
                                        gradients of variables over";
                        return Err(OpError::setting(OP, "backward", "loss.backward()", expected));
                    }
                    None
                }
            });
        }
        *lock(&self.gradients) = for_tokens;
        // A variable has got its gradient; the end of a chain of tokens passes the word on.
        let d_second = (second.track_op() && !second.is_variable())
            .then(|| second.zeros_like())
            .transpose()?;
        Ok((d_images, d_second))
    }
}
