//! Where the time of a pass goes, told to `tracing`.

use std::time::{Duration, Instant};

use tracing::Level;

use super::builder::{Convolution, Map, MaxPool, Operation};
use super::plan::Network;

/// Target of the events that tell where the time of a [`super::StaticGraph`] goes.
///
/// Each is of level TRACE, ends one pass through one operation, and has the fields `layer` (the
/// name given by [`super::StaticGraphBuilder::name`], or a description), `pass` (`forward`,
/// `input gradient`, `weight gradient` or `other gradient`: the ReLU's mask, batch norm, laying
/// out weights), `nanoseconds`, and what a direct computation takes: `flop`, and `bytes` to and
/// from memory. While nobody listens to the target, nothing is measured.
pub const PROFILE_TARGET: &str = "candle_cnn::profile";

/// Measures one operation if anybody listens.
pub(super) struct Watch(Option<Instant>);

impl Watch {
    pub(super) fn start() -> Self {
        let enabled = tracing::enabled!(target: PROFILE_TARGET, Level::TRACE);
        Self(enabled.then(Instant::now))
    }

    pub(super) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Time since the start, or none when it is off.
    pub(super) fn elapsed(&self) -> Duration {
        self.0.map_or(Duration::ZERO, |start| start.elapsed())
    }
}

/// What a direct computation takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cost {
    pub(super) flop: u64,
    pub(super) bytes: u64,
}

impl Cost {
    /// The cost of one pass through `operation`: each of a convolution's three passes reads two of
    /// its input, output and weight and writes the third.
    pub(super) fn of(graph: &Network, operation: &Operation, batch: usize, element: usize) -> Self {
        let values = |node: usize| {
            let map = &graph.nodes[node];
            batch * map.channels * map.size.0 * map.size.1
        };
        let (flop, weight) = match operation {
            Operation::Convolution(c) => {
                let weights = c.c_in * c.kernel * c.kernel;
                (2 * values(c.output) * weights, c.c_out * weights)
            }
            Operation::MaxPool(_) => (0, 0),
        };
        let maps = values(operation.input()) + values(operation.output());
        Self {
            flop: flop as u64,
            bytes: (element * (maps + weight)) as u64,
        }
    }

    const NONE: Self = Self { flop: 0, bytes: 0 };
}

/// Tells of a forward pass through operation `index`, if anybody listens.
pub(super) fn forward(
    graph: &Network,
    index: usize,
    (watch, time): (&Watch, Duration),
    cost: impl Fn() -> Cost,
) {
    if watch.is_on() {
        emit(graph, index, "forward", time, cost());
    }
}

/// What each gradient of an operation took; zero while nobody listens.
#[derive(Clone, Copy, Default)]
pub(super) struct Times {
    pub(super) input: Duration,
    pub(super) weight: Duration,
    pub(super) other: Duration,
}

impl Times {
    /// The mean of the times of threads that work side by side.
    pub(super) fn mean(parts: impl ExactSizeIterator<Item = Self>) -> Self {
        let count = parts.len().max(1) as u32;
        let sum = parts.fold(Self::default(), |sum, part| Self {
            input: sum.input + part.input,
            weight: sum.weight + part.weight,
            other: sum.other + part.other,
        });
        Self {
            input: sum.input / count,
            weight: sum.weight / count,
            other: sum.other / count,
        }
    }
}

/// Tells of the backward pass through operation `index`.
pub(super) fn backward(
    graph: &Network,
    index: usize,
    watch: &Watch,
    times: &Times,
    cost: impl Fn() -> Cost,
) {
    if !watch.is_on() {
        return;
    }
    let parts = [
        ("input gradient", times.input),
        ("weight gradient", times.weight),
    ];
    for (pass, time) in parts {
        if !time.is_zero() {
            emit(graph, index, pass, time, cost());
        }
    }
    if let Operation::Convolution(_) = &graph.operations[index] {
        emit(graph, index, "other gradient", times.other, Cost::NONE);
    }
}

fn emit(graph: &Network, index: usize, pass: &'static str, time: Duration, cost: Cost) {
    tracing::trace!(
        target: PROFILE_TARGET,
        layer = graph.layer(index),
        pass,
        nanoseconds = time.as_nanos() as u64,
        flop = cost.flop,
        bytes = cost.bytes,
    );
}

impl Network {
    /// The name of operation `index`, or what it is.
    fn layer(&self, index: usize) -> String {
        let operation = &self.operations[index];
        match self.names.get(&operation.output()) {
            Some(name) => name.clone(),
            None => operation.describe(index, &self.nodes),
        }
    }
}

impl Operation {
    /// What stands for the name of an operation that has none, `index` in the order of description.
    pub(super) fn describe(&self, index: usize, nodes: &[Map]) -> String {
        let (height, width) = nodes[self.output()].size;
        match self {
            Self::Convolution(Convolution { c_out, kernel, .. }) => {
                format!("{index}: convolution {kernel}×{kernel} to {c_out} × {height} × {width}")
            }
            Self::MaxPool(MaxPool { h, .. }) => {
                let kernel = h.kernel;
                format!("{index}: max pool {kernel}×{kernel} to {height} × {width}")
            }
        }
    }
}
