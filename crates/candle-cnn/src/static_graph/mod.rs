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
#[cfg(feature = "cuda")]
mod cuda;
mod forward;
mod gather;
mod norm;
mod outer;
mod packed;
mod pass;
mod pool;
mod profile;
#[cfg(any(feature = "cuda", test))]
mod stages;
#[cfg(test)]
mod tests;
mod way;
mod winograd;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{
    CpuStorage, CustomOp2, D, DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType,
};

use self::arena::Arenas;
use self::backward::Backward;
use self::forward::Forward;
use self::pass::{Maps, Numbers, Trains};
pub use self::profile::PROFILE_TARGET;
use crate::backward::aside;
use crate::batch_norm::{BatchStatistics, Moments};
use crate::element::{Element, dispatch, float_dtype, slice, with_slice};
use crate::error::OpError;
use crate::max_pool2d::MaxPool2dConfig;
use crate::simd::Isa;
use crate::window::Axis;

const OP: &str = "static_graph";

/// Channels of a pixel are stored in a multiple of this: the widest vector of
/// f32, so that a vector written for one branch ends where the next begins.
const ALIGNMENT: usize = 16;

/// What a node of the graph yields: a map (N, C, H, W).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    number: usize,
    id: NodeId,
}

/// Each node's own, so that none of another builder is taken for it, and none that a clone has made since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NodeId(u64);

impl NodeId {
    fn next() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        Self(COUNT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Describes a network, operation by operation; see [`StaticGraph`].
///
/// A clone knows the nodes that were there when it was made; of what either of the two is told after that, the other knows nothing.
#[derive(Clone, Debug)]
pub struct StaticGraphBuilder {
    nodes: Vec<Map>,
    /// Of each node.
    ids: Vec<NodeId>,
    operations: Vec<Operation>,
    names: BTreeMap<usize, String>,
}

/// The value of a node. A branch of a concatenation lies inside of the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Map {
    channels: usize,
    /// Height and width.
    size: (usize, usize),
    /// Where it lies, if not in a buffer of its own: the node and its first channel there.
    within: Option<(usize, usize)>,
    /// Pixels around the image that a convolution reads as zeros.
    halo: usize,
    /// The same of the gradient.
    gradient_halo: usize,
    is_read: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Operation {
    Convolution(Convolution),
    MaxPool(MaxPool),
}

/// A convolution, followed by a bias or a batch norm, and by ReLU.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Convolution {
    /// How many convolutions were described before it: its parameters are at this place.
    number: usize,
    input: usize,
    output: usize,
    c_in: usize,
    c_out: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
    /// Of its batch norm, if it has one and not a bias.
    eps: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MaxPool {
    input: usize,
    output: usize,
    h: Axis,
    w: Axis,
}

impl StaticGraphBuilder {
    /// A graph whose input are images of `channels` channels and `size` (height, width).
    pub fn new(channels: usize, size: (usize, usize)) -> Self {
        Self {
            nodes: vec![Map::new(channels, size)],
            ids: vec![NodeId::next()],
            operations: Vec::new(),
            names: BTreeMap::new(),
        }
    }

    /// The images.
    pub fn input(&self) -> Node {
        self.node(0)
    }

    /// Names the operation that makes `node`, for [`PROFILE_TARGET`] and for errors. A node that the builder does not have gets no name.
    pub fn name(&mut self, node: Node, name: impl Into<String>) {
        if self.has(node) {
            self.names.insert(node.number, name.into());
        }
    }

    /// A convolution of stride 1 with a square kernel and bias, followed by
    /// ReLU: [`crate::conv2d_relu`].
    ///
    /// # Errors
    /// No channels; a kernel that does not fit the padded input, or a padding that it cannot reach; what no memory holds.
    pub fn conv2d_relu(
        &mut self,
        input: Node,
        c_out: usize,
        kernel: usize,
        padding: usize,
    ) -> Result<Node> {
        self.convolution(input, c_out, kernel, (1, padding), None)
    }

    /// A convolution with a square kernel and without bias, then batch norm
    /// over its channels, then ReLU: [`crate::conv2d`] and
    /// [`crate::batch_norm_relu_train`] or [`crate::batch_norm_relu_eval`].
    ///
    /// # Errors
    /// As [`Self::conv2d_relu`]; a negative `eps`; a `stride` of 0, and one
    /// above 1 anywhere but on the images.
    pub fn conv2d_batch_norm_relu(
        &mut self,
        input: Node,
        c_out: usize,
        kernel: usize,
        (stride, padding): (usize, usize),
        eps: f64,
    ) -> Result<Node> {
        if eps.is_nan() || eps < 0.0 {
            return Err(OpError::setting(OP, "eps", eps, "at least 0"));
        }
        if stride == 0 || (stride > 1 && input.number != 0) {
            let expected = "1; above 1 only where the images are read";
            return Err(OpError::setting(OP, "stride", stride, expected));
        }
        self.convolution(input, c_out, kernel, (stride, padding), Some(eps))
    }

    fn convolution(
        &mut self,
        input: Node,
        c_out: usize,
        kernel: usize,
        (stride, padding): (usize, usize),
        eps: Option<f64>,
    ) -> Result<Node> {
        let map = self.readable(input)?;
        if c_out == 0 {
            return Err(OpError::setting(OP, "c_out", c_out, "at least 1"));
        }
        if kernel == 0 || padding >= kernel {
            let expected = "a kernel of at least 1 and a padding below it";
            return Err(OpError::setting(
                OP,
                "(kernel, padding)",
                (kernel, padding),
                expected,
            ));
        }
        let from = Map {
            halo: map.halo.max(padding),
            is_read: true,
            ..map
        };
        from.check_elements(1)?;
        OpError::check_elements(OP, "weight", &[c_out, map.channels, kernel, kernel])?;
        let fits = |size: usize| {
            (size + 2 * padding)
                .checked_sub(kernel)
                .map(|s| s / stride + 1)
        };
        let (Some(height), Some(width)) = (fits(map.size.0), fits(map.size.1)) else {
            return Err(OpError::Window {
                op: OP,
                window: (kernel, kernel),
                input: map.size,
                padding: (padding, padding),
            }
            .into());
        };
        let to = Map {
            gradient_halo: kernel - 1 - padding,
            ..Map::new(c_out, (height, width))
        };
        to.check_elements(1)?;
        let output = self.push(to);
        self.nodes[input.number] = from;
        let is_convolution = |o: &&Operation| matches!(o, Operation::Convolution(_));
        let number = self.operations.iter().filter(is_convolution).count();
        self.operations.push(Operation::Convolution(Convolution {
            number,
            input: input.number,
            output,
            c_in: map.channels,
            c_out,
            kernel,
            stride,
            padding,
            eps,
        }));
        Ok(self.node(output))
    }

    /// Max-pooling: [`crate::max_pool2d`].
    ///
    /// # Errors
    /// A window that does not fit the padded input; what no memory holds.
    pub fn max_pool2d(&mut self, input: Node, config: MaxPool2dConfig) -> Result<Node> {
        let map = self.readable(input)?;
        let (kernel, stride, padding) = (config.kernel_size, config.stride, config.padding);
        for (name, pair) in [("kernel_size", kernel), ("stride", stride)] {
            if pair.0 == 0 || pair.1 == 0 {
                return Err(OpError::setting(OP, name, pair, "at least 1"));
            }
        }
        if padding.0 > kernel.0 / 2 || padding.1 > kernel.1 / 2 {
            let expected = "at most half of the kernel size";
            return Err(OpError::setting(OP, "padding", padding, expected));
        }
        let axis = |size, kernel, stride, padding| {
            Axis::new(size, kernel, stride, padding, config.ceil_mode)
        };
        let (Some(h), Some(w)) = (
            axis(map.size.0, kernel.0, stride.0, padding.0),
            axis(map.size.1, kernel.1, stride.1, padding.1),
        ) else {
            return Err(OpError::Window {
                op: OP,
                window: kernel,
                input: map.size,
                padding,
            }
            .into());
        };
        let to = Map::new(map.channels, (h.output, w.output));
        map.check_elements(1)?;
        to.check_elements(1)?;
        let output = self.push(to);
        self.nodes[input.number].is_read = true;
        self.operations.push(Operation::MaxPool(MaxPool {
            input: input.number,
            output,
            h,
            w,
        }));
        Ok(self.node(output))
    }

    fn node(&self, number: usize) -> Node {
        Node {
            number,
            id: self.ids[number],
        }
    }

    /// Adds a node.
    fn push(&mut self, map: Map) -> usize {
        self.nodes.push(map);
        self.ids.push(NodeId::next());
        self.nodes.len() - 1
    }

    fn has(&self, node: Node) -> bool {
        self.ids.get(node.number) == Some(&node.id)
    }

    /// The map of a node that has a buffer of its own.
    fn readable(&self, node: Node) -> Result<Map> {
        let map = self.map(node)?;
        if map.within.is_some() {
            let expected = "not part of a concatenation: only the whole can be read";
            return Err(OpError::setting(
                OP,
                "node",
                self.describe(node.number),
                expected,
            ));
        }
        let shape = [map.channels, map.size.0, map.size.1];
        if shape.contains(&0) {
            let expected = "at least 1 each";
            return Err(OpError::setting(OP, "(C, H, W)", shape, expected));
        }
        Ok(map)
    }

    fn map(&self, node: Node) -> Result<Map> {
        if !self.has(node) {
            let found = format_args!("another builder's");
            let expected = "a node of this builder";
            return Err(OpError::setting(OP, "node", found, expected));
        }
        Ok(self.nodes[node.number])
    }

    /// What errors call a node: its name, or what it is.
    fn describe(&self, number: usize) -> String {
        if let Some(name) = self.names.get(&number) {
            return name.clone();
        }
        let mut operations = self.operations.iter().enumerate();
        match operations.find(|(_, operation)| operation.output() == number) {
            Some((index, operation)) => operation.describe(index, &self.nodes),
            None if number == 0 => "images".to_owned(),
            None => {
                let Map { channels, size, .. } = self.nodes[number];
                format!("concatenation to {channels} × {} × {}", size.0, size.1)
            }
        }
    }

    /// Joins convolutions' results by channel. They are written in place, so
    /// that nothing but the whole may be read.
    ///
    /// # Errors
    /// Parts of different sizes; a part that is read elsewhere, is part of
    /// another whole, is there twice, or was not made by a convolution; all but
    /// the last must have a multiple of 16 channels.
    pub fn concat(&mut self, parts: &[Node]) -> Result<Node> {
        let whole = self.nodes.len();
        let first = parts.first().map(|&part| self.map(part)).transpose()?;
        let size = first.map_or((0, 0), |map| map.size);
        let mut channels = 0usize;
        let mut gradient_halo = 0;
        let mut begins = Vec::with_capacity(parts.len());
        for at in 0..parts.len() {
            let map = self.part(parts, at)?;
            begins.push(channels);
            channels = channels.saturating_add(map.channels);
            gradient_halo = gradient_halo.max(map.gradient_halo);
        }
        let map = Map {
            gradient_halo,
            ..Map::new(channels, size)
        };
        map.check_elements(1)?;
        // Once nothing can be refused any more.
        for (part, begin) in parts.iter().zip(begins) {
            self.nodes[part.number].within = Some((whole, begin));
        }
        self.push(map);
        Ok(self.node(whole))
    }

    /// The map of `parts[at]`, if it can be written in place where they are joined.
    fn part(&self, parts: &[Node], at: usize) -> Result<Map> {
        let (first, part) = (parts[0], parts[at]);
        let map = self.map(part)?;
        let refuse = |found: String, expected| {
            let part = self.describe(part.number);
            let found = format_args!("{part:?}{found}");
            Err(OpError::setting(OP, "part", found, expected))
        };
        let mut operations = self.operations.iter();
        let maker = operations.find(|operation| operation.output() == part.number);
        if !matches!(maker, Some(Operation::Convolution(_))) {
            let maker = match maker {
                Some(_) => ", made by a pooling",
                None if part.number == 0 => ", the input of the graph",
                None => ", a concatenation itself",
            };
            let expected = "what a convolution made, which is written in place";
            return refuse(maker.to_owned(), expected);
        }
        let of_first = self.map(first)?;
        if map.size != of_first.size {
            let first = self.describe(first.number);
            let [(h, w), (first_h, first_w)] = [map.size, of_first.size];
            let found = format!(" of {h} × {w} beside {first:?} of {first_h} × {first_w}");
            return refuse(found, "parts of one height and width");
        }
        let mut operations = self.operations.iter();
        if let Some(reader) = operations.find(|operation| operation.input() == part.number) {
            let reader = self.describe(reader.output());
            let expected = "a part that nothing reads, since only the whole can be read";
            return refuse(format!(", which {reader:?} reads"), expected);
        }
        if let Some((whole, _)) = map.within {
            let whole = self.describe(whole);
            return refuse(format!(", a part of {whole:?}"), "a part of no other whole");
        }
        if parts[..at].contains(&part) {
            return refuse(" for the second time".to_owned(), "each part once");
        }
        if at + 1 < parts.len() && !map.channels.is_multiple_of(ALIGNMENT) {
            let found = format!(" of {} channels, and not the last", map.channels);
            return refuse(found, "a multiple of 16 channels of all parts but the last");
        }
        Ok(map)
    }

    /// Ends the graph with the mean of each channel of `output`:
    /// [`crate::global_avg_pool2d`].
    ///
    /// # Errors
    /// A node besides `output` that nobody reads.
    pub fn global_avg_pool2d(mut self, output: Node) -> Result<StaticGraph> {
        self.readable(output)?;
        self.nodes[output.number].is_read = true;
        for (number, map) in self.nodes.iter().enumerate() {
            if !map.is_read && map.within.is_none() {
                let expected = "a node that another reads";
                return Err(OpError::setting(
                    OP,
                    "node",
                    self.describe(number),
                    expected,
                ));
            }
        }
        let pooled = pooled(&self.operations);
        Ok(StaticGraph {
            inner: Arc::new(Inner {
                groups: groups(&self.operations, &pooled),
                pooled,
                levels: levels(&self.nodes, &self.operations),
                nodes: self.nodes,
                operations: self.operations,
                names: self.names,
                output: output.number,
                arenas: Arenas::default(),
                packed: packed::Kept::default(),
            }),
        })
    }
}

impl Map {
    fn new(channels: usize, size: (usize, usize)) -> Self {
        Self {
            channels,
            size,
            within: None,
            halo: 0,
            gradient_halo: 0,
            is_read: false,
        }
    }

    /// Refuses so many images of what no memory holds with a border of zeros, its own or that of its gradient.
    fn check_elements(&self, images: usize) -> Result<()> {
        let border = self.halo.max(self.gradient_halo).saturating_mul(2);
        let side = |size: usize| size.saturating_add(border);
        let channels = self.channels.saturating_add(ALIGNMENT - 1);
        let shape = [images, channels, side(self.size.0), side(self.size.1)];
        OpError::check_elements(OP, "map, bordered and in whole vectors,", &shape)
    }
}

/// The parameters of one convolution of a [`StaticGraph`]: its weight (C_out,
/// C_in, k, k), and one value per output channel (C_out) in all else.
#[derive(Clone, Copy, Debug)]
pub enum ConvParameters<'a> {
    /// Of [`StaticGraphBuilder::conv2d_relu`].
    Bias {
        /// (C_out, C_in, k, k).
        weight: &'a Tensor,
        /// (C_out).
        bias: &'a Tensor,
    },
    /// Of [`StaticGraphBuilder::conv2d_batch_norm_relu`] in training:
    /// normalised by this batch.
    BatchNorm {
        /// (C_out, C_in, k, k).
        weight: &'a Tensor,
        /// (C_out).
        norm_weight: &'a Tensor,
        /// (C_out).
        norm_bias: &'a Tensor,
    },
    /// Of the same in evaluation: normalised by running statistics, which get no gradient.
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

/// What [`StaticGraph::forward`] yields.
#[derive(Clone, Debug)]
pub struct GraphOutput {
    /// The mean of each channel of the last map, (N, C).
    pub features: Tensor,
    /// Of each [`ConvParameters::BatchNorm`], in order.
    pub statistics: Vec<BatchStatistics>,
}

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
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    nodes: Vec<Map>,
    operations: Vec<Operation>,
    /// In the order in which they can run: operations that read the same map go back together. A
    /// pooling that is part of a convolution is not among them.
    groups: Vec<Vec<usize>>,
    /// Of each convolution that alone reads the output of a pooling: that pooling. The two run
    /// together, a few images at a time, and nobody keeps what lies between them.
    pooled: Vec<Option<usize>>,
    /// The operations by how many must run one after the other before them.
    levels: Vec<Vec<usize>>,
    /// Of operations, by the node that they make.
    names: BTreeMap<usize, String>,
    output: usize,
    arenas: Arenas,
    packed: packed::Kept,
}

/// See [`Inner::pooled`]. The convolution has no padding, so that what lies between has no halo.
fn pooled(operations: &[Operation]) -> Vec<Option<usize>> {
    let pooling = |convolution: &Operation| {
        let Operation::Convolution(Convolution { padding: 0, .. }) = convolution else {
            return None;
        };
        let node = convolution.input();
        let readers = operations.iter().filter(|o| o.input() == node).count();
        operations.iter().position(|operation| match operation {
            Operation::MaxPool(MaxPool { output, h, w, .. }) => {
                let taps = h.kernel.saturating_mul(w.kernel);
                *output == node && readers == 1 && taps <= pool::MOST_TAPS
            }
            Operation::Convolution(_) => false,
        })
    };
    operations.iter().map(pooling).collect()
}

/// See [`Inner::groups`]. An operation joins the first of those that share its input: that is
/// complete there, and whoever reads its own output comes later than all of them.
fn groups(operations: &[Operation], pooled: &[Option<usize>]) -> Vec<Vec<usize>> {
    let source = |index: usize| operations[pooled[index].unwrap_or(index)].input();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for index in 0..operations.len() {
        if pooled.contains(&Some(index)) {
            continue;
        }
        let fits = |group: &&mut Vec<usize>| source(group[0]) == source(index);
        match groups.iter_mut().find(fits) {
            Some(group) => group.push(index),
            None => groups.push(vec![index]),
        }
    }
    groups
}

/// See [`Inner::levels`]. Whoever reads a concatenation waits for all its parts, which come before it in `operations`.
fn levels(nodes: &[Map], operations: &[Operation]) -> Vec<Vec<usize>> {
    let mut ready = vec![0; nodes.len()];
    let mut levels: Vec<Vec<usize>> = Vec::new();
    for (index, operation) in operations.iter().enumerate() {
        let level = ready[operation.input()];
        let output = operation.output();
        let buffer = nodes[output].within.map_or(output, |(whole, _)| whole);
        ready[buffer] = ready[buffer].max(level + 1);
        if levels.len() <= level {
            levels.resize(level + 1, Vec::new());
        }
        levels[level].push(index);
    }
    levels
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
        let inner = &self.inner;
        self.check_images(images)?;
        let convolutions = inner.convolutions();
        if convolutions.len() != parameters.len() {
            return Err(OpError::Shapes {
                op: OP,
                left_name: "number of parameters",
                left: vec![parameters.len()],
                right_name: "number of convolutions",
                right: vec![convolutions.len()],
                rule: "each convolution has its parameters",
            }
            .into());
        }
        let batch = images.dims()[0];
        for (c, parameters) in convolutions.iter().zip(parameters) {
            inner.check_parameters(c, parameters, batch)?;
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
        let mut tensors = parameters.iter().flat_map(ConvParameters::tensors);
        if !images.track_op() && !tensors.any(Tensor::track_op) {
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
        let op = Run {
            graph: Arc::clone(inner),
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
            statistics: inner.statistics(&moments, batch, &images)?,
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
        let inner = &self.inner;
        let batch = images.dims()[0];
        let contiguous: Vec<Vec<Tensor>> = parameters
            .iter()
            .map(|p| p.tensors().into_iter().map(Tensor::contiguous).collect())
            .collect::<Result<_>>()?;
        dispatch!(OP, dtype, T => {
            let output = inner.with_numbers::<T, _>(&contiguous, |numbers| {
                with_slice::<T, _>(OP, images, |images| {
                    let pass = Forward::<T>::new(inner, Isa::detect(), batch);
                    Ok(in_pool(|| pass.run(images, numbers, false)))
                })
            })?;
            let channels = inner.nodes[inner.output].channels;
            Ok(GraphOutput {
                features: Tensor::from_vec(output.features, (batch, channels), images.device())?,
                statistics: inner.statistics(&output.moments, batch, images)?,
            })
        })
    }

    fn check_images(&self, images: &Tensor) -> Result<()> {
        let input = &self.inner.nodes[0];
        let expected = [input.channels, input.size.0, input.size.1];
        if images.rank() != 4 || images.dims()[1..] != expected {
            return Err(OpError::Shapes {
                op: OP,
                left_name: "images",
                left: images.dims().to_vec(),
                right_name: "the graph's input",
                right: expected.to_vec(),
                rule: "(N, C, H, W) with the C, H and W that the graph was made for",
            }
            .into());
        }
        for map in &self.inner.nodes {
            map.check_elements(images.dims()[0])?;
        }
        let convolutions = self.inner.convolutions();
        if images.track_op() && convolutions.iter().any(|c| c.stride > 1) {
            let expected = "images without a gradient: a convolution reads them with a stride";
            return Err(OpError::setting(OP, "images", "a gradient", expected));
        }
        Ok(())
    }
}

impl<'a> ConvParameters<'a> {
    /// The weight first.
    fn tensors(&self) -> Vec<&'a Tensor> {
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

    /// Whether the batch's own statistics normalise.
    fn is_norm(&self) -> bool {
        matches!(self, Self::BatchNorm { .. })
    }

    /// The same with running statistics as a part of weight and bias:
    /// `w·x·s + (b − mean·s)` with `s = norm_weight/√(variance + eps)`.
    fn folded(&self, eps: f64) -> Result<Vec<Tensor>> {
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

impl Inner {
    /// Whether the gradient of each node's buffer is needed. `trainable` says of each convolution whether any of its
    /// parameters needs one.
    fn needed(&self, needs_input: bool, trainable: &[bool]) -> Vec<bool> {
        let mut needed = vec![false; self.nodes.len()];
        needed[0] = needs_input;
        for operation in &self.operations {
            let is_trainable = match operation {
                Operation::Convolution(c) => trainable[c.number],
                Operation::MaxPool(_) => false,
            };
            let output = self.place(operation.output()).0;
            needed[output] |= is_trainable || needed[operation.input()];
        }
        needed
    }

    /// The map that an operation reads, or the pooling that is part of it.
    fn source(&self, index: usize) -> usize {
        self.operations[self.pooled[index].unwrap_or(index)].input()
    }

    fn convolutions(&self) -> Vec<Convolution> {
        let convolution = |operation: &Operation| match operation {
            Operation::Convolution(c) => Some(*c),
            Operation::MaxPool(_) => None,
        };
        self.operations.iter().filter_map(convolution).collect()
    }

    /// Calls `pass` with the numbers of each convolution's tensors, which are contiguous.
    fn with_numbers<T: Element, R>(
        &self,
        parameters: &[Vec<Tensor>],
        pass: impl FnOnce(&[Numbers<'_, T>]) -> Result<R>,
    ) -> Result<R> {
        let guards: Vec<Vec<_>> = parameters
            .iter()
            .map(|tensors| tensors.iter().map(Tensor::storage_and_layout).collect())
            .collect();
        let mut numbers = Vec::with_capacity(guards.len());
        for ((c, guards), tensors) in self.convolutions().iter().zip(&guards).zip(parameters) {
            let mut slices = Vec::with_capacity(guards.len());
            for ((storage, layout), tensor) in guards.iter().zip(tensors) {
                let Storage::Cpu(storage) = &**storage else {
                    return Err(OpError::device(OP, tensor));
                };
                slices.push(slice::<T>(OP, storage, layout)?);
            }
            numbers.push(Numbers::new(c, &slices));
        }
        pass(&numbers)
    }

    fn check_parameters(
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
                return Err(OpError::Shapes {
                    op: OP,
                    left_name: name,
                    left: tensor.dims().to_vec(),
                    right_name: "the graph's",
                    right: shape.to_vec(),
                    rule: "a parameter has the shape that the graph was made for",
                }
                .into());
            }
        }
        Ok(())
    }

    /// As tensors like `images`, of the convolutions that have any.
    fn statistics(
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

/// One pass through the graph as a node of Candle's.
struct Run {
    graph: Arc<Inner>,
    dtype: DType,
    needs_input: bool,
    /// Which of each convolution's parameters need their gradient.
    trainable: Vec<Trains>,
    /// Of each convolution; running statistics are a part of weight and bias.
    parameters: Vec<Vec<Tensor>>,
    /// Where the backward pass leaves their gradients for the tokens.
    gradients: Gradients,
    /// Where the forward pass leaves them: of each convolution, empty where it has none.
    statistics: Arc<Mutex<Vec<Vec<Moments>>>>,
    /// The maps of the forward pass, where somebody needs a gradient.
    kept: Mutex<Option<Kept>>,
}

enum Kept {
    F32(Maps<f32>),
    F64(Maps<f64>),
}

/// Wraps and unwraps the maps of an element type.
trait Keep: Sized {
    fn keep(maps: Maps<Self>) -> Kept;
    fn take(kept: Kept) -> Option<Maps<Self>>;
}

macro_rules! keep {
    ($t:ty, $variant:ident) => {
        impl Keep for $t {
            fn keep(maps: Maps<Self>) -> Kept {
                Kept::$variant(maps)
            }
            fn take(kept: Kept) -> Option<Maps<Self>> {
                match kept {
                    Kept::$variant(maps) => Some(maps),
                    _ => None,
                }
            }
        }
    };
}
keep!(f32, F32);
keep!(f64, F64);

/// Runs a whole pass on a thread of the pool. From any other thread, each of its hundred parallel
/// loops would wake the pool and sleep until it is done.
fn in_pool<R: Send>(pass: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| pass())
}

/// A value that is only ever replaced whole, so that a panic elsewhere cannot have spoiled it.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Gradients of the parameters, in order.
type Gradients = Arc<Mutex<Vec<Option<Tensor>>>>;

/// Ties a parameter to the pass that reads it. As a value it is nothing; its
/// gradient is what [`Run`] has left for it.
struct Token {
    gradients: Gradients,
    index: usize,
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

impl CustomOp2 for Run {
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
                .with_numbers(&self.parameters, |numbers| {
                    Ok(in_pool(|| pass.run(images, numbers, true)))
                })?;
            *lock(&self.kept) = output.maps.map(Keep::keep);
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
            let Some(maps) = kept.and_then(<T as Keep>::take) else {
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
            let (d_images, d_parameters) = self.graph.with_numbers(&self.parameters, |numbers| {
                with_slice::<T, _>(OP, &gradient, |gradient| {
                    Ok(in_pool(|| pass.run(maps, numbers, gradient)))
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
