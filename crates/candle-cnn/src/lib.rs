//! Trainable CNN operations for [Candle](https://github.com/huggingface/candle).
//!
//! Ordinary functions on ordinary tensors, whose gradients come through
//! Candle's own `backward()`, and whose definitions are PyTorch's to the
//! detail: where padding is −∞, which of two equal maxima gets the gradient,
//! which variance the running statistics take up.
//!
//! | function | PyTorch | what stock Candle 0.11 does |
//! | --- | --- | --- |
//! | [`conv2d`], [`conv2d_relu`] | `F.conv2d` | backward by plain loops, always for input and weight |
//! | [`max_pool2d`] | `F.max_pool2d` | no padding, no ceil mode; backward refuses overlapping windows, and scales a window's gradient by the share of its pixels that are maximal |
//! | [`avg_pool2d`], [`adaptive_avg_pool2d`], [`global_avg_pool2d`] | `F.avg_pool2d`, `F.adaptive_avg_pool2d` | no padding, no adaptive sizes |
//! | [`relu`] | `F.relu` | gradient 1 at 0 |
//! | [`batch_norm_train`], [`batch_norm_eval`] (and [`batch_norm_relu_train`], [`batch_norm_relu_eval`]) | `F.batch_norm` | composed of elementwise operations |
//! | [`cross_entropy`] | `F.cross_entropy` | no label smoothing |
//! | [`linear`] | `F.linear` | the same, by its `matmul`, and the gradient of an input that nobody needs |
//! | [`dropout`] | `F.dropout` | no seed on the CPU |
//! | [`StaticGraph`] | a whole network as one operation | – |
//! | [`backward`] | `loss.backward()` | adds each gradient of a graph to zeros |
//!
//! Tensors are (N, C, H, W), f32 or f64, of any strides. A gradient that
//! nobody needs is not computed: neither that of an input image nor that of a
//! frozen weight.
//!
//! A backward pass reads inputs and parameters as they are then, as Candle's own do: one that was written to
//! since the forward pass (`Var::set`) gives other gradients, where PyTorch refuses.
//!
//! There are no gradients of gradients. What a backward pass of these operations gives has no graph behind it: a second one
//! through it, as for a penalty on gradients, finds no gradient (`None`) and reports no error, where PyTorch has values.
//!
//! With the feature `cuda`, all take tensors on an NVIDIA
//! GPU, in bf16 too: see [`cuda`]. That side has run on an H200 and an H100.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use candle_cnn::{Conv2dConfig, MaxPool2dConfig, conv2d_relu, max_pool2d};
//!
//! let images = Tensor::randn(0f32, 1.0, (2, 3, 8, 8), &Device::Cpu)?;
//! let weight = Var::randn(0f32, 0.1, (4, 3, 3, 3), &Device::Cpu)?;
//! let features = conv2d_relu(&images, &weight, None, Conv2dConfig::padded(1))?;
//! let pooled = max_pool2d(&features, MaxPool2dConfig::square(3, 2, 1))?;
//! assert_eq!(pooled.dims(), [2, 4, 4, 4]);
//! let gradients = pooled.sum_all()?.backward()?;
//! assert_eq!(gradients.get(&weight).unwrap().dims(), [4, 3, 3, 3]);
//! # Ok::<(), candle_core::Error>(())
//! ```

mod activation;
mod avg_pool2d;
mod backward;
mod batch_norm;
mod conv2d;
mod cross_entropy;
pub mod cuda;
mod dropout;
mod element;
mod error;
mod linear;
mod maps;
mod max_pool2d;
mod mode;
mod plane_groups;
mod relu;
mod simd;
mod static_graph;
mod thread_local;
mod window;

pub use avg_pool2d::{AvgPool2dConfig, adaptive_avg_pool2d, avg_pool2d, global_avg_pool2d};
pub use backward::backward;
pub use batch_norm::{
    BatchStatistics, RunningStatistics, batch_norm_eval, batch_norm_relu_eval,
    batch_norm_relu_train, batch_norm_train, update_running,
};
pub use conv2d::{
    Conv2dConfig, Conv2dGeometry, conv2d, conv2d_backward_reference, conv2d_reference, conv2d_relu,
};
pub use cross_entropy::{CrossEntropyConfig, cross_entropy};
pub use dropout::dropout;
pub use error::OpError;
pub use linear::linear;
pub use max_pool2d::{MaxPool2dConfig, max_pool2d};
pub use mode::Mode;
pub use relu::relu;
pub use simd::Isa;
pub use static_graph::{
    ConvParameters, GraphOutput, Node, PROFILE_TARGET, StaticGraph, StaticGraphBuilder,
};
