//! What a pass through a graph takes besides the images, and what it yields.

use candle_core::{D, Result, Storage, Tensor};

use super::OP;
use super::builder::Convolution;
use super::pass::ParameterValues;
use super::plan::Network;
use crate::batch_norm::{BatchStatistics, Moments};
use crate::element::{Element, slice};
use crate::error::OpError;

/// The parameters of one convolution of a [`crate::StaticGraph`]: its weight (C_out,
/// C_in, k, k), and one value per output channel (C_out) in all else.
#[derive(Clone, Copy, Debug)]
pub enum ConvParameters<'a> {
    /// A convolution of [`crate::StaticGraphBuilder::conv2d_relu`].
    Bias {
        /// (C_out, C_in, k, k).
        weight: &'a Tensor,
        /// (C_out).
        bias: &'a Tensor,
    },
    /// A convolution of [`crate::StaticGraphBuilder::conv2d_batch_norm_relu`] in
    /// training: normalised by this batch.
    BatchNorm {
        /// (C_out, C_in, k, k).
        weight: &'a Tensor,
        /// (C_out).
        norm_weight: &'a Tensor,
        /// (C_out).
        norm_bias: &'a Tensor,
    },
    /// A convolution with batch norm in evaluation: normalised by running statistics, which get no gradient.
    Running {
        /// (C_out, C_in, k, k).
        weight: &'a Tensor,
        /// (C_out).
        norm_weight: &'a Tensor,
        /// (C_out).
        norm_bias: &'a Tensor,
        /// (C_out).
        mean: &'a Tensor,
        /// (C_out).
        variance: &'a Tensor,
    },
}

/// What [`crate::StaticGraph::forward`] yields.
#[derive(Clone, Debug)]
pub struct GraphOutput {
    /// The mean of each channel of the last map, (N, C).
    pub features: Tensor,
    /// Statistics of the batch, of each [`ConvParameters::BatchNorm`] in order.
    pub statistics: Vec<BatchStatistics>,
}

impl<'a> ConvParameters<'a> {
    /// The tensors of the parameters, the weight first.
    pub(super) fn tensors(&self) -> Vec<&'a Tensor> {
        match *self {
            Self::Bias { weight, bias } => vec![weight, bias],
            Self::BatchNorm {
                weight,
                norm_weight,
                norm_bias,
            } => vec![weight, norm_weight, norm_bias],
            Self::Running {
                weight,
                norm_weight,
                norm_bias,
                mean,
                variance,
            } => vec![weight, norm_weight, norm_bias, mean, variance],
        }
    }

    /// Whether somebody needs a gradient of them. Running statistics, which come last, have none.
    pub(super) fn need_gradient(&self) -> bool {
        self.tensors()
            .into_iter()
            .take(3)
            .any(|tensor| tensor.track_op())
    }

    /// Whether the batch's own statistics normalise.
    fn is_norm(&self) -> bool {
        matches!(self, Self::BatchNorm { .. })
    }

    /// The same with running statistics as a part of weight and bias:
    /// `w·x·s + (b − mean·s)` with `s = norm_weight/√(variance + eps)`.
    pub(super) fn folded(&self, eps: f64) -> Result<Vec<Tensor>> {
        let Self::Running {
            weight,
            norm_weight,
            norm_bias,
            mean,
            variance,
        } = *self
        else {
            return Ok(self.tensors().into_iter().cloned().collect());
        };
        let scale = (norm_weight / (variance.detach() + eps)?.sqrt()?)?;
        let columns = scale.reshape((scale.dim(D::Minus1)?, 1, 1, 1))?;
        let bias = (norm_bias - (mean.detach() * &scale)?)?;
        Ok(vec![weight.broadcast_mul(&columns)?, bias])
    }
}

impl Network {
    /// Calls `pass` with the values of each convolution's tensors, which are contiguous.
    pub(super) fn with_values<T: Element, R>(
        &self,
        parameters: &[Vec<Tensor>],
        pass: impl FnOnce(&[ParameterValues<'_, T>]) -> Result<R>,
    ) -> Result<R> {
        let guards: Vec<Vec<_>> = parameters
            .iter()
            .map(|tensors| tensors.iter().map(Tensor::storage_and_layout).collect())
            .collect();
        let mut values = Vec::with_capacity(guards.len());
        for ((c, guards), tensors) in self.convolutions().iter().zip(&guards).zip(parameters) {
            let mut slices = Vec::with_capacity(guards.len());
            for ((storage, layout), tensor) in guards.iter().zip(tensors) {
                let Storage::Cpu(storage) = &**storage else {
                    return Err(OpError::device(OP, tensor));
                };
                slices.push(slice::<T>(OP, storage, layout)?);
            }
            values.push(ParameterValues::new(c, &slices));
        }
        pass(&values)
    }

    pub(super) fn check_parameters(
        &self,
        c: &Convolution,
        parameters: &ConvParameters<'_>,
        batch: usize,
    ) -> Result<()> {
        let has_bias = matches!(parameters, ConvParameters::Bias { .. });
        if has_bias != c.eps.is_none() {
            let (found, expected) = match has_bias {
                true => ("a bias", "batch norm, as it was described"),
                false => ("batch norm", "a bias, as it was described"),
            };
            return Err(OpError::setting(OP, "parameters", found, expected));
        }
        let (height, width) = self.nodes[c.output].size;
        if parameters.is_norm() && batch * height * width < 2 {
            return Err(OpError::setting(
                OP,
                "values per channel",
                batch * height * width,
                "more than one value per channel in training",
            ));
        }
        let shape = [c.c_out, c.c_in, c.kernel, c.kernel];
        let names = match has_bias {
            true => &["weight", "bias"][..],
            false => &["weight", "norm weight", "norm bias", "mean", "variance"],
        };
        for (at, (name, tensor)) in names.iter().zip(parameters.tensors()).enumerate() {
            let shape = if at == 0 { &shape[..] } else { &shape[..1] };
            if tensor.dims() != shape {
                return Err(OpError::shapes(
                    OP,
                    (name, tensor.dims()),
                    ("the graph's", shape),
                    "a parameter has the shape that the graph was made for",
                ));
            }
        }
        Ok(())
    }

    /// The batch's statistics of the convolutions that have any, as tensors of the type and on the device of `images`.
    pub(super) fn statistics(
        &self,
        moments: &[Vec<Moments>],
        batch: usize,
        images: &Tensor,
    ) -> Result<Vec<BatchStatistics>> {
        let mut statistics = Vec::new();
        for (c, moments) in self.convolutions().iter().zip(moments) {
            if !moments.is_empty() {
                let (height, width) = self.nodes[c.output].size;
                let count = batch * height * width;
                statistics.push(BatchStatistics::new(moments, count, images)?);
            }
        }
        Ok(statistics)
    }
}
