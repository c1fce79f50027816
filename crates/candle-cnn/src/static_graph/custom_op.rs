//! A pass through a graph, and its parameters, as operations of Candle's.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, WithDType};

use super::OP;
use super::backward::Backward;
use super::forward::{Forward, Keep};
use super::pass::{Maps, Trains, in_pool};
use super::plan::Network;
use crate::backward::aside;
use crate::batch_norm::Moments;
use crate::element::{dispatch, slice, with_slices};
use crate::error::OpError;
use crate::simd::Isa;

/// One pass through the graph as a node of Candle's.
pub(super) struct GraphOp {
    pub(super) graph: Arc<Network>,
    pub(super) dtype: DType,
    pub(super) needs_input: bool,
    /// Which of each convolution's parameters need their gradient.
    pub(super) trainable: Vec<Trains>,
    /// The tensors of each convolution; running statistics are a part of weight and bias.
    pub(super) parameters: Vec<Vec<Tensor>>,
    /// Where the backward pass leaves the gradients of the parameters for the tokens.
    pub(super) gradients: Gradients,
    /// Where the forward pass leaves the moments of each convolution, empty where it has none.
    pub(super) statistics: Arc<Mutex<Vec<Vec<Moments>>>>,
    /// The [`Maps`] of the forward pass, of the type of `dtype`.
    pub(super) kept: Mutex<Option<Box<dyn Any + Send>>>,
}

impl CustomOp2 for GraphOp {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        images: &CpuStorage,
        images_layout: &Layout,
        _token: &CpuStorage,
        _token_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let batch = images_layout.dims()[0];
        dispatch!(OP, self.dtype, T => {
            let pass = Forward::<T>::new(&self.graph, Isa::detect(), batch);
            let images = slice::<T>(OP, images, images_layout)?;
            let output = self
                .graph
                .with_values(&self.parameters, |values| {
                    Ok(in_pool(|| pass.run(images, values, Keep::ForBackward)))
                })?;
            *lock(&self.kept) = output.maps.map(|maps| Box::new(maps) as _);
            *lock(&self.statistics) = output.moments;
            let shape = Shape::from((batch, self.graph.nodes[self.graph.output].channels));
            Ok((T::to_cpu_storage_owned(output.features), shape))
        })
    }

    fn bwd(
        &self,
        images: &Tensor,
        token: &Tensor,
        _features: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.contiguous()?;
        let kept = lock(&self.kept).take();
        dispatch!(OP, self.dtype, T => {
            let Some(maps) = kept.and_then(|kept| kept.downcast::<Maps<T>>().ok()) else {
                let expected = "one backward pass for each forward pass";
                return Err(OpError::setting(OP, "backward", "a second one", expected));
            };
            let pass = Backward::<T>::new(
                &self.graph,
                Isa::detect(),
                images.dims()[0],
                self.needs_input,
                &self.trainable,
            );
            let (d_images, d_parameters) = self.graph.with_values(&self.parameters, |values| {
                with_slices::<T, _, _>(OP, [&gradient], |[gradient]| {
                    Ok(in_pool(|| pass.run(*maps, values, gradient)))
                })
            })?;
            let d_images = d_images.map(|d| Tensor::from_vec(d, images.shape(), images.device()));
            let d_parameters = self
                .parameters
                .iter()
                .flatten()
                .zip(d_parameters)
                .map(|(p, d)| {
                    let d = d.map(|d| Tensor::from_vec(d, p.shape(), p.device()));
                    d.transpose()
                })
                .collect::<Result<_>>()?;
            *lock(&self.gradients) = d_parameters;
            let d_token = token.track_op().then(|| token.zeros_like()).transpose()?;
            Ok((d_images.transpose()?, d_token))
        })
    }
}

/// Ties a parameter to the pass that reads it. As a value it is nothing; its
/// gradient is what [`GraphOp`] has left for it.
pub(super) struct Token {
    pub(super) gradients: Gradients,
    pub(super) index: usize,
}

impl CustomOp2 for Token {
    fn name(&self) -> &'static str {
        "static_graph_parameter"
    }

    fn cpu_fwd(
        &self,
        token: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((token.clone(), Shape::from(1)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        token: &candle_core::CudaStorage,
        layout: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        Ok((token.try_clone(layout)?, Shape::from(1)))
    }

    fn bwd(
        &self,
        token: &Tensor,
        parameter: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradient_of_parameter = lock(&self.gradients)
            .get_mut(self.index)
            .and_then(Option::take);
        let of_parameter = aside(parameter, gradient_of_parameter);
        let of_token = token.track_op().then(|| gradient.clone());
        Ok((of_token, of_parameter))
    }
}

/// Gradients of the parameters, in order.
pub(super) type Gradients = Arc<Mutex<Vec<Option<Tensor>>>>;

/// A value that is only ever replaced whole, so that a panic elsewhere cannot have spoiled it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}
