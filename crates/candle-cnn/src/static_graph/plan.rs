//! What of a network is known once it is described: in which order its operations run, which of them together, and where
//! their maps lie.

use std::collections::BTreeMap;

use super::arena::Arenas;
use super::builder::{Convolution, Map, MaxPool, Operation};
use super::norm::Span;
use super::packed::WeightCache;
use crate::maps::{ALIGNMENT, MapLayout};
use crate::max_pool2d::channels_last;

/// A network as it was described, what follows from that, and what its passes keep for the next.
#[derive(Debug)]
pub(super) struct Network {
    pub(super) nodes: Vec<Map>,
    pub(super) operations: Vec<Operation>,
    /// The operations in an order in which they can run. Those that read the same map are a group, and go
    /// back together. A pooling that is part of a convolution is in none.
    pub(super) groups: Vec<Vec<usize>>,
    /// For each operation the pooling that is part of it. A convolution has one where it alone reads the
    /// pooling's output: the two run together, a few images at a time, and nobody keeps what lies between them.
    pub(super) pooled: Vec<Option<usize>>,
    /// The operations by how many must run one after the other before them.
    pub(super) levels: Vec<Vec<usize>>,
    /// The names that were given to operations, by the node that each makes.
    pub(super) names: BTreeMap<usize, String>,
    pub(super) output: usize,
    pub(super) arenas: Arenas,
    pub(super) packed: WeightCache,
}

impl Network {
    pub(super) fn new(
        nodes: Vec<Map>,
        operations: Vec<Operation>,
        names: BTreeMap<usize, String>,
        output: usize,
    ) -> Self {
        let pooled = pooled(&operations);
        Self {
            groups: groups(&operations, &pooled),
            pooled,
            levels: levels(&nodes, &operations),
            nodes,
            operations,
            names,
            output,
            arenas: Arenas::default(),
            packed: WeightCache::default(),
        }
    }

    /// Whether the gradient of each node's buffer is needed. `trainable` says of each convolution whether any of its
    /// parameters needs one.
    pub(super) fn needed(&self, needs_input: bool, trainable: &[bool]) -> Vec<bool> {
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
    pub(super) fn source(&self, index: usize) -> usize {
        self.operations[self.pooled[index].unwrap_or(index)].input()
    }

    pub(super) fn convolutions(&self) -> Vec<Convolution> {
        let convolution = |operation: &Operation| match operation {
            Operation::Convolution(c) => Some(*c),
            Operation::MaxPool(_) => None,
        };
        self.operations.iter().filter_map(convolution).collect()
    }

    /// The buffer that a node lies in, and its first channel there.
    pub(super) fn place(&self, node: usize) -> (usize, usize) {
        self.nodes[node].within.unwrap_or((node, 0))
    }

    pub(super) fn layout(&self, buffer: usize) -> MapLayout {
        let map = &self.nodes[buffer];
        MapLayout {
            size: map.size,
            halo: map.halo,
            pixel: map.channels.next_multiple_of(ALIGNMENT),
        }
    }

    /// Where a convolution's output lies until it is normalised.
    pub(super) fn normalised_span(&self, c: &Convolution) -> Span {
        let layout = MapLayout {
            size: self.nodes[c.output].size,
            halo: 0,
            pixel: c.c_out.next_multiple_of(ALIGNMENT),
        };
        Span {
            layout,
            channel: 0,
            channels: c.c_out,
        }
    }

    pub(super) fn gradient_layout(&self, buffer: usize) -> MapLayout {
        MapLayout {
            halo: self.nodes[buffer].gradient_halo,
            ..self.layout(buffer)
        }
    }
}

/// See [`Network::pooled`]. The convolution has no padding, so that what lies between has no halo.
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
                *output == node && readers == 1 && taps <= channels_last::MOST_TAPS
            }
            Operation::Convolution(_) => false,
        })
    };
    operations.iter().map(pooling).collect()
}

/// See [`Network::groups`]. An operation joins the first of those that share its input: that is
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

/// See [`Network::levels`]. Whoever reads a concatenation waits for all its parts, which come before it in `operations`.
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
