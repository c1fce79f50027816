//! Describes a network: its maps and operations, and what does not fit.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Result;

use super::plan::Network;
use super::{OP, StaticGraph};
use crate::error::OpError;
use crate::maps::ALIGNMENT;
use crate::max_pool2d::MaxPool2dConfig;
use crate::window::Axis;

/// What a node of the graph yields: a map (N, C, H, W).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    number: usize,
    id: NodeId,
}

/// Describes a network, operation by operation; see [`StaticGraph`].
///
/// A clone knows the nodes that were there when it was made; of what either of the two is told after that, the other knows nothing.
#[derive(Clone, Debug)]
pub struct StaticGraphBuilder {
    nodes: Vec<Map>,
    /// The number of each node.
    ids: Vec<NodeId>,
    operations: Vec<Operation>,
    names: BTreeMap<usize, String>,
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

    /// Names the operation that makes `node`, for [`crate::PROFILE_TARGET`] and for errors. A node that the builder does not have gets no name.
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
        let (h, w) = config.window().axes(OP, map.size)?;
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

    /// The operation that makes a node, with its number; none makes the images and a concatenation.
    fn maker(&self, number: usize) -> Option<(usize, &Operation)> {
        let mut operations = self.operations.iter().enumerate();
        operations.find(|(_, operation)| operation.output() == number)
    }

    /// What errors call a node: its name, or what it is.
    fn describe(&self, number: usize) -> String {
        if let Some(name) = self.names.get(&number) {
            return name.clone();
        }
        match self.maker(number) {
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
        let maker = self.maker(part.number);
        if !matches!(maker, Some((_, Operation::Convolution(_)))) {
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
        let network = Network::new(self.nodes, self.operations, self.names, output.number);
        Ok(StaticGraph {
            network: Arc::new(network),
        })
    }
}

/// A number of each node's own, so that a node of another builder, or one that a clone has made since, is not mistaken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NodeId(u64);

impl NodeId {
    fn next() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        Self(COUNT.fetch_add(1, Ordering::Relaxed))
    }
}

/// The value of a node. A branch of a concatenation lies inside of the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Map {
    pub(super) channels: usize,
    /// Height and width.
    pub(super) size: (usize, usize),
    /// Where it lies, if not in a buffer of its own: the node and its first channel there.
    pub(super) within: Option<(usize, usize)>,
    /// Pixels around the image that a convolution reads as zeros.
    pub(super) halo: usize,
    /// Pixels of zeros around the gradient of the map.
    pub(super) gradient_halo: usize,
    is_read: bool,
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
    pub(super) fn check_elements(&self, images: usize) -> Result<()> {
        let border = self.halo.max(self.gradient_halo).saturating_mul(2);
        let side = |size: usize| size.saturating_add(border);
        let channels = self.channels.saturating_add(ALIGNMENT - 1);
        let shape = [images, channels, side(self.size.0), side(self.size.1)];
        OpError::check_elements(OP, "map, bordered and in whole vectors,", &shape)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Operation {
    Convolution(Convolution),
    MaxPool(MaxPool),
}

impl Operation {
    pub(super) fn input(&self) -> usize {
        match self {
            Self::Convolution(c) => c.input,
            Self::MaxPool(p) => p.input,
        }
    }

    pub(super) fn output(&self) -> usize {
        match self {
            Self::Convolution(c) => c.output,
            Self::MaxPool(p) => p.output,
        }
    }
}

/// A convolution, followed by a bias or a batch norm, and by ReLU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Convolution {
    /// How many convolutions were described before it: its parameters are at this place.
    pub(super) number: usize,
    pub(super) input: usize,
    pub(super) output: usize,
    pub(super) c_in: usize,
    pub(super) c_out: usize,
    pub(super) kernel: usize,
    pub(super) stride: usize,
    pub(super) padding: usize,
    /// The eps of the batch norm, if the convolution has one and not a bias.
    pub(super) eps: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MaxPool {
    pub(super) input: usize,
    pub(super) output: usize,
    pub(super) h: Axis,
    pub(super) w: Axis,
}
