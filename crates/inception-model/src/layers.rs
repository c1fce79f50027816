//! The layers that the network is made of.

use std::sync::{Arc, Mutex, PoisonError};

use candle_cnn::{
    Conv2dConfig, MaxPool2dConfig, Node, StaticGraph, StaticGraphBuilder, conv2d_relu, linear,
    max_pool2d,
};
use candle_core::{DType, Device, Result, Tensor, Var};
use rand::Rng;

use crate::init::{Init, uniform, zero_bias};
use crate::table::BlockWidths;

/// A convolution with bias, stride 1 and "same" padding, followed by ReLU.
#[derive(Clone, Debug)]
pub(crate) struct Conv {
    /// State-dict prefix, such as `a3.branch2.2`.
    pub(crate) name: String,
    /// (C_out, C_in, kernel, kernel).
    pub(crate) weight: Var,
    /// (C_out).
    pub(crate) bias: Var,
    pub(crate) config: Conv2dConfig,
}

impl Conv {
    pub(crate) fn new(
        name: impl Into<String>,
        (inputs, outputs): (usize, usize),
        kernel: usize,
        init: Init,
        device: &Device,
        rng: &mut impl Rng,
    ) -> Result<Self> {
        let fan_in = inputs * kernel * kernel;
        Ok(Self {
            name: name.into(),
            weight: init.weight(&[outputs, inputs, kernel, kernel], device, rng)?,
            bias: uniform(&[outputs], fan_in, device, rng)?,
            config: Conv2dConfig::padded(kernel / 2),
        })
    }

    /// (N, C_in, H, W) → (N, C_out, H, W), weights rounded to bf16 where `x` is.
    ///
    /// # Errors
    /// Another number of channels than the weight's.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (at_use(&self.weight, x)?, at_use(&self.bias, x)?);
        conv2d_relu(x, &weight, Some(&bias), self.config)
    }

    /// [`Self::forward`] as part of a graph.
    pub(crate) fn describe(&self, graph: &mut StaticGraphBuilder, x: Node) -> Result<Node> {
        let (c_out, _, kernel, _) = self.weight.dims4()?;
        let y = graph.conv2d_relu(x, c_out, kernel, self.config.padding.0)?;
        graph.name(y, &self.name);
        Ok(y)
    }

    pub(crate) fn parameters(&self) -> [(String, Var); 2] {
        [
            (format!("{}.weight", self.name), self.weight.clone()),
            (format!("{}.bias", self.name), self.bias.clone()),
        ]
    }
}

/// The values of `var` as `dtype` in a variable of its own, also where the type stays: what trains one network must not move
/// another.
pub(crate) fn convert(var: &Var, dtype: DType) -> Result<Var> {
    Var::from_tensor(&var.as_detached_tensor().to_dtype(dtype)?.copy()?)
}

/// A weight beside activations: rounded to bf16 where they are, so that the weight itself, its
/// gradient and its updates keep f32.
pub(crate) fn at_use(weight: &Tensor, activations: &Tensor) -> Result<Tensor> {
    match activations.dtype() {
        DType::BF16 => weight.to_dtype(DType::BF16),
        _ => Ok(weight.clone()),
    }
}

/// Features as a head takes them: in f32 where the activations are bf16.
pub(crate) fn for_head(features: &Tensor) -> Result<Tensor> {
    match features.dtype() {
        DType::BF16 => features.to_dtype(DType::F32),
        _ => Ok(features.clone()),
    }
}

/// The body of a network as one operation, for images of the size that came last.
#[derive(Clone, Debug, Default)]
pub(crate) struct GraphCache(Arc<Mutex<Option<SizedGraph>>>);

type SizedGraph = ((usize, usize), StaticGraph);

impl GraphCache {
    /// The graph for images of `size`, made when the size changes.
    pub(crate) fn get(
        &self,
        size: (usize, usize),
        make: impl FnOnce() -> Result<StaticGraph>,
    ) -> Result<StaticGraph> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some((kept_size, graph)) if *kept_size == size => Ok(graph.clone()),
            _ => {
                let graph = make()?;
                *kept = Some((size, graph.clone()));
                Ok(graph)
            }
        }
    }
}

/// The pool before branch 4: keeps height and width.
fn branch4_pool() -> MaxPool2dConfig {
    MaxPool2dConfig::square(3, 1, 1)
}

/// One stage of a network's body, in order.
#[derive(Clone, Debug)]
pub(crate) enum Stage<C = Conv> {
    Block(Box<Inception<C>>),
    MaxPool {
        name: String,
        window: MaxPool2dConfig,
    },
}

/// Four branches side by side over the same input, concatenated by channel.
///
/// `C` is the network's convolution with what belongs to it: [`Conv`] in the
/// lesson's net, [`crate::torchvision::ConvNorm`] in torchvision's.
#[derive(Clone, Debug)]
pub(crate) struct Inception<C = Conv> {
    /// The block's name in the table, such as `a3` or `inception3a`.
    pub(crate) name: &'static str,
    /// 1×1.
    pub(crate) branch1: C,
    /// 1×1 reduction, 3×3.
    pub(crate) branch2: [C; 2],
    /// 1×1 reduction, 5×5 (torchvision: 3×3).
    pub(crate) branch3: [C; 2],
    /// 1×1 after a 3×3 max-pool.
    pub(crate) branch4: C,
}

impl<C> Inception<C> {
    /// Makes the six convolutions, in the state dict's order, from their place
    /// in [`Inception::convs`], their input and output channels and their kernel.
    pub(crate) fn build<E>(
        name: &'static str,
        inputs: usize,
        widths: &BlockWidths,
        branch3_kernel: usize,
        mut conv: impl FnMut(usize, (usize, usize), usize) -> std::result::Result<C, E>,
    ) -> std::result::Result<Self, E> {
        let w = widths;
        Ok(Self {
            name,
            branch1: conv(0, (inputs, w.conv1x1), 1)?,
            branch2: [
                conv(1, (inputs, w.reduce3x3), 1)?,
                conv(2, (w.reduce3x3, w.conv3x3), 3)?,
            ],
            branch3: [
                conv(3, (inputs, w.reduce5x5), 1)?,
                conv(4, (w.reduce5x5, w.conv5x5), branch3_kernel)?,
            ],
            branch4: conv(5, (inputs, w.pool_proj), 1)?,
        })
    }

    /// (N, C, H, W) → (N, C1 + C2 + C3 + C4, H, W), where `conv` runs one of
    /// the convolutions.
    pub(crate) fn forward_with(
        &self,
        x: &Tensor,
        conv: impl Fn(&C, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let branch1 = conv(&self.branch1, x)?;
        let branch2 = conv(&self.branch2[1], &conv(&self.branch2[0], x)?)?;
        let branch3 = conv(&self.branch3[1], &conv(&self.branch3[0], x)?)?;
        let pooled = max_pool2d(x, branch4_pool())?;
        let branch4 = conv(&self.branch4, &pooled)?;
        Tensor::cat(&[branch1, branch2, branch3, branch4], 1)
    }

    /// [`Self::forward_with`] as part of a graph, where `conv` describes one of
    /// the convolutions: in the order of [`Self::convs`].
    pub(crate) fn describe_with(
        &self,
        graph: &mut StaticGraphBuilder,
        x: Node,
        conv: impl Fn(&C, &mut StaticGraphBuilder, Node) -> Result<Node>,
    ) -> Result<Node> {
        let branch1 = conv(&self.branch1, graph, x)?;
        let reduced = conv(&self.branch2[0], graph, x)?;
        let branch2 = conv(&self.branch2[1], graph, reduced)?;
        let reduced = conv(&self.branch3[0], graph, x)?;
        let branch3 = conv(&self.branch3[1], graph, reduced)?;
        let pooled = graph.max_pool2d(x, branch4_pool())?;
        graph.name(pooled, format!("{}.branch4.pool", self.name));
        let branch4 = conv(&self.branch4, graph, pooled)?;
        graph.concat(&[branch1, branch2, branch3, branch4])
    }

    /// All convolutions in the state dict's order.
    pub(crate) fn convs(&self) -> [&C; 6] {
        let [reduce3x3, conv3x3] = &self.branch2;
        let [reduce5x5, conv5x5] = &self.branch3;
        [
            &self.branch1,
            reduce3x3,
            conv3x3,
            reduce5x5,
            conv5x5,
            &self.branch4,
        ]
    }

    /// The block with each convolution replaced, in the state dict's order.
    pub(crate) fn try_map<D>(&self, mut f: impl FnMut(&C) -> Result<D>) -> Result<Inception<D>> {
        let [reduce3x3, conv3x3] = &self.branch2;
        let [reduce5x5, conv5x5] = &self.branch3;
        Ok(Inception {
            name: self.name,
            branch1: f(&self.branch1)?,
            branch2: [f(reduce3x3)?, f(conv3x3)?],
            branch3: [f(reduce5x5)?, f(conv5x5)?],
            branch4: f(&self.branch4)?,
        })
    }
}

impl Inception {
    pub(crate) fn new(
        name: &'static str,
        inputs: usize,
        widths: &BlockWidths,
        init: Init,
        device: &Device,
        rng: &mut impl Rng,
    ) -> Result<Self> {
        // ReLUs and the pool have places of their own in the lesson's branches.
        const PLACES: [&str; 6] = [
            "branch1.0",
            "branch2.0",
            "branch2.2",
            "branch3.0",
            "branch3.2",
            "branch4.1",
        ];
        Self::build(name, inputs, widths, 5, |place, channels, kernel| {
            let name = format!("{name}.{}", PLACES[place]);
            Conv::new(name, channels, kernel, init, device, rng)
        })
    }

    /// (N, C, H, W) → (N, C1 + C2 + C3 + C4, H, W).
    ///
    /// # Errors
    /// Another number of channels than the block's.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_with(x, Conv::forward)
    }
}

/// The classifier's fully connected layer.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    /// State-dict prefix, such as `fc`.
    pub(crate) name: String,
    /// (classes, features).
    pub(crate) weight: Var,
    /// (classes).
    pub(crate) bias: Var,
}

impl Linear {
    pub(crate) fn new(
        name: impl Into<String>,
        (inputs, outputs): (usize, usize),
        init: Init,
        device: &Device,
        rng: &mut impl Rng,
    ) -> Result<Self> {
        Ok(Self {
            name: name.into(),
            weight: init.weight(&[outputs, inputs], device, rng)?,
            bias: zero_bias(outputs, device)?,
        })
    }

    /// (N, features) → (N, classes).
    ///
    /// # Errors
    /// Another number of features than the weight's.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight, Some(&self.bias))
    }

    pub(crate) fn parameters(&self) -> [(String, Var); 2] {
        [
            (format!("{}.weight", self.name), self.weight.clone()),
            (format!("{}.bias", self.name), self.bias.clone()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beside_bf16_activations_a_weight_is_rounded_and_its_gradient_is_f32() -> Result<()> {
        let weight = Var::new(&[1.001f32, -2.003], &Device::Cpu)?;
        let activations = Tensor::ones(2, DType::BF16, &Device::Cpu)?;
        let used = at_use(&weight, &activations)?;
        assert_eq!(used.dtype(), DType::BF16);
        let loss = for_head(&(used * activations)?)?.sum_all()?;
        let gradients = loss.backward()?;
        let gradient = gradients.get(&weight).map(Tensor::dtype);
        assert_eq!(gradient, Some(DType::F32));
        let f32s = Tensor::ones(2, DType::F32, &Device::Cpu)?;
        let unchanged = at_use(&weight, &f32s)?.to_vec1::<f32>()?;
        assert_eq!(unchanged, [1.001, -2.003]);
        Ok(())
    }
}
