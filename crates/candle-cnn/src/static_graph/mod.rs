//! A fixed network of convolutions and poolings that runs as one operation.
//!
//! [`crate::conv2d_relu`] and its like are nodes of Candle's graph: each lays
//! its input out anew, allocates its result, and has its gradient added to
//! zeros. A [`StaticGraph`] knows the whole network beforehand. Its maps stay
//! in the layout of the register tiles (pixels of channels, with the padding
//! in place), branches write straight into their concatenation, gradients are
//! added up where they belong, and buffers are kept from step to step. To
//! Candle it is one operation on the images and the parameters, with gradients
//! through the ordinary `backward()`.
//!
//! On CUDA (`cuda/`) maps lie channels last without padding, cuDNN computes the
//! convolutions, and gradients of variables come through [`crate::backward`] alone.

mod arena;
mod backward;
mod builder;
#[cfg(feature = "cuda")]
mod cuda;
mod custom_op;
mod forward;
mod gather;
mod group;
mod norm;
mod operation_backward;
mod outer;
mod packed;
mod parameters;
mod pass;
mod plan;
mod profile;
#[cfg(any(feature = "cuda", test))]
mod stages;
#[cfg(test)]
mod tests;
mod winograd;

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result, Tensor};

pub use self::builder::{Node, StaticGraphBuilder};
use self::custom_op::{GraphOp, Token, lock};
use self::forward::{Forward, Keep};
pub use self::parameters::{ConvParameters, GraphOutput};
use self::pass::{Trains, in_pool};
use self::plan::Network;
pub use self::profile::PROFILE_TARGET;
use crate::element::{dispatch, float_dtype, with_slices};
use crate::error::OpError;
use crate::simd::Isa;

const OP: &str = "static_graph";

/// A network of convolutions with ReLU, max-poolings and concatenations that
/// ends in a global average pool, run as one operation, on the CPU or on CUDA.
///
/// A forward pass has one backward pass: its maps are given back on the way. In f32 on the CPU, gradients
/// below 2⁻¹⁰⁰ (8e-31) are zeros, and convolutions of 3×3 may go through Winograd's sums, in which values beyond about 1e37 overflow: losses
/// that are scaled down so far, or inputs that are so large, are for operations node by node.
///
/// ```
/// use candle_cnn::{ConvParameters, MaxPool2dConfig, StaticGraphBuilder};
/// use candle_core::{DType, Device, Tensor, Var};
///
/// let mut builder = StaticGraphBuilder::new(3, (8, 8));
/// let stem = builder.conv2d_relu(builder.input(), 16, 3, 1)?;
/// let pooled = builder.max_pool2d(stem, MaxPool2dConfig::square(2, 2, 0))?;
/// let graph = builder.global_avg_pool2d(pooled)?;
///
/// let images = Tensor::ones((2, 3, 8, 8), DType::F32, &Device::Cpu)?;
/// let weight = Var::randn(0f32, 0.1, (16, 3, 3, 3), &Device::Cpu)?;
/// let bias = Var::zeros(16, DType::F32, &Device::Cpu)?;
/// let parameters = ConvParameters::Bias { weight: &weight, bias: &bias };
/// let features = graph.forward(&images, &[parameters])?.features;
/// assert_eq!(features.dims(), [2, 16]);
/// let gradients = features.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&weight).unwrap().dims(), [16, 3, 3, 3]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct StaticGraph {
    network: Arc<Network>,
}

impl StaticGraph {
    /// (N, C, H, W) → (N, C'), with the `parameters` of each convolution in the
    /// order in which they were described.
    ///
    /// f32 and f64; on CUDA images of f32 or bf16, and parameters and features of f32 beside either. A gradient that nobody needs is not computed: neither those
    /// of the images and of frozen parameters nor any before the first
    /// trainable one. Where nobody needs any, no map outlives its last reader.
    ///
    /// # Errors
    /// Another number of parameters or other shapes than described, and what
    /// [`crate::conv2d`] and [`crate::batch_norm_train`] refuse. A second backward pass. A gradient of
    /// images that a convolution reads with a stride above 1. On CUDA no images at all, a pool whose window has more than
    /// 256 pixels, and a backward pass that is not [`crate::backward`] where variables need a gradient.
    pub fn forward(
        &self,
        images: &Tensor,
        parameters: &[ConvParameters<'_>],
    ) -> Result<GraphOutput> {
        let network = &self.network;
        self.check_images(images)?;
        let convolutions = network.convolutions();
        if convolutions.len() != parameters.len() {
            return Err(OpError::shapes(
                OP,
                ("number of parameters", &[parameters.len()]),
                ("number of convolutions", &[convolutions.len()]),
                "each convolution has its parameters",
            ));
        }
        let batch = images.dims()[0];
        for (c, parameters) in convolutions.iter().zip(parameters) {
            network.check_parameters(c, parameters, batch)?;
        }
        #[cfg(feature = "cuda")]
        if images.device().is_cuda() {
            return cuda::forward(self, images, parameters);
        }
        let all: Vec<&Tensor> = std::iter::once(images)
            .chain(parameters.iter().flat_map(ConvParameters::tensors))
            .collect();
        let dtype = float_dtype(OP, &all)?;
        let images = images.contiguous()?;
        if !images.track_op() && !parameters.iter().any(ConvParameters::need_gradient) {
            return self.infer(&images, parameters, dtype);
        }

        // Candle gives an operation three inputs at most. So the parameters
        // hang on a chain of tokens, of which the last is an input. Running
        // statistics are a part of weight and bias here, by operations that
        // pass the gradient on.
        let gradients = Arc::new(Mutex::new(Vec::new()));
        let mut token = Tensor::zeros(1, dtype, images.device())?;
        let mut values = Vec::with_capacity(parameters.len());
        let mut trainable = Vec::with_capacity(parameters.len());
        let mut count = 0;
        for (c, parameters) in convolutions.iter().zip(parameters) {
            let mut contiguous = Vec::with_capacity(3);
            let tensors = parameters.folded(c.eps.unwrap_or(0.0))?;
            trainable.push(Trains {
                any: tensors.iter().any(Tensor::track_op),
                weight: tensors[0].track_op(),
            });
            for tensor in tensors {
                if tensor.track_op() {
                    let gradients = Arc::clone(&gradients);
                    let index = count;
                    token = token.apply_op2(&tensor, Token { gradients, index })?;
                }
                contiguous.push(tensor.detach().contiguous()?);
                count += 1;
            }
            values.push(contiguous);
        }
        let statistics = Arc::new(Mutex::new(Vec::new()));
        let op = GraphOp {
            graph: Arc::clone(network),
            dtype,
            needs_input: images.track_op(),
            trainable,
            parameters: values,
            gradients,
            statistics: Arc::clone(&statistics),
            kept: Mutex::new(None),
        };
        let features = images.apply_op2(&token, op)?;
        let moments = std::mem::take(&mut *lock(&statistics));
        Ok(GraphOutput {
            features,
            statistics: network.statistics(&moments, batch, &images)?,
        })
    }

    /// Whether a graph takes images of this device and type. One on CUDA does so unless
    /// [`crate::cuda::Settings::channels_last`] is off.
    pub fn takes(images: &Tensor) -> bool {
        match images.device() {
            Device::Cpu => matches!(images.dtype(), DType::F32 | DType::F64),
            Device::Cuda(_) => {
                let is_taken = matches!(images.dtype(), DType::F32 | DType::BF16);
                is_taken && crate::cuda::settings().channels_last
            }
            Device::Metal(_) => false,
        }
    }

    /// The forward pass where nobody needs a gradient: parameters are read where they are.
    fn infer(
        &self,
        images: &Tensor,
        parameters: &[ConvParameters<'_>],
        dtype: DType,
    ) -> Result<GraphOutput> {
        let network = &self.network;
        let batch = images.dims()[0];
        let contiguous: Vec<Vec<Tensor>> = parameters
            .iter()
            .map(|p| p.tensors().into_iter().map(Tensor::contiguous).collect())
            .collect::<Result<_>>()?;
        dispatch!(OP, dtype, T => {
            let output = network.with_values::<T, _>(&contiguous, |values| {
                with_slices::<T, _, _>(OP, [images], |[images]| {
                    let pass = Forward::<T>::new(network, Isa::detect(), batch);
                    Ok(in_pool(|| pass.run(images, values, Keep::Nothing)))
                })
            })?;
            let channels = network.nodes[network.output].channels;
            Ok(GraphOutput {
                features: Tensor::from_vec(output.features, (batch, channels), images.device())?,
                statistics: network.statistics(&output.moments, batch, images)?,
            })
        })
    }

    fn check_images(&self, images: &Tensor) -> Result<()> {
        let input = &self.network.nodes[0];
        let expected = [input.channels, input.size.0, input.size.1];
        if images.rank() != 4 || images.dims()[1..] != expected {
            return Err(OpError::shapes(
                OP,
                ("images", images.dims()),
                ("the graph's input", &expected),
                "(N, C, H, W) with the C, H and W that the graph was made for",
            ));
        }
        for map in &self.network.nodes {
            map.check_elements(images.dims()[0])?;
        }
        let convolutions = self.network.convolutions();
        if images.track_op() && convolutions.iter().any(|c| c.stride > 1) {
            let expected = "images without a gradient: a convolution reads them with a stride";
            return Err(OpError::setting(OP, "images", "a gradient", expected));
        }
        Ok(())
    }
}
