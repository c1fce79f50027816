//! What both passes through a graph on CUDA share: the memory between them, and how a stage's parts become operands of
//! launches.

#![allow(unsafe_code)]

use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::sys::CUdeviceptr;
use candle_core::{CudaStorage, DType, Result, Tensor};

use super::CudaGraphOp;
use super::launches::{Kind, Launches, SEGMENTS, Segment, Weight, WeightLayout};
use crate::conv2d::{ChannelsLast, Conv2dConfig, Conv2dGeometry, Pass, channels_last_pass};
use crate::cuda::launch::{Held, address};
use crate::error::OpError;
use crate::static_graph::OP;
use crate::static_graph::builder::{MaxPool, Operation};
use crate::static_graph::plan::Network;
use crate::static_graph::stages::{Member, Stage, Unit, stages};

/// Channels of the images' pixels are made a multiple of so many bytes, which tensor cores want; the network's own widths
/// are taken as they are.
const PIXEL: usize = 16;

/// Memory by number: of nodes, units, chunks, operations or parts of weights. Some may have none, or have given it back.
pub(super) type Maps = Vec<Option<CudaStorage>>;

/// What the backward pass needs of the forward pass.
pub(super) struct Kept {
    /// The map of each node that has one of its own and is read again.
    pub(super) nodes: Maps,
    pub(super) stages: Vec<KeptStage>,
    /// The winners of each pooling, by its operation.
    pub(super) winners: Maps,
    /// The weights as cuDNN takes them, by part.
    pub(super) weights: Maps,
}

/// What lies between the convolutions of a stage and the maps.
#[derive(Default)]
pub(super) struct KeptStage {
    /// The sums that a batch norm normalises, of each unit.
    pub(super) raws: Maps,
    /// Mean, 1/σ and unbiased variance of each chunk, (3, channels).
    pub(super) statistics: Vec<Option<Tensor>>,
    /// What of its maps passes a gradient, of each chunk behind biases whose threads take packs.
    pub(super) masks: Maps,
}

/// Members of a stage's units that one launch does the like work for.
pub(super) struct Chunk {
    /// Number of the unit, and of the member within.
    members: Vec<(usize, usize)>,
    pub(super) rows: usize,
    pub(super) kind: Kind,
}

impl Chunk {
    pub(super) fn units<'s>(&self, stage: &'s Stage) -> impl Iterator<Item = &'s Unit> {
        self.members.iter().map(|&(unit, _)| &stage.units[unit])
    }

    pub(super) fn members<'s>(&self, stage: &'s Stage) -> impl Iterator<Item = &'s Member> {
        let members = self.members.iter();
        members.map(|&(unit, member)| &stage.units[unit].members[member])
    }
}

/// One pass of a unit's convolution.
pub(super) struct Task {
    pub(super) pass: Pass,
    /// The unit's number in its stage.
    pub(super) unit: usize,
    /// Whether the result is added to what is there already; else it takes its place.
    pub(super) adds: bool,
}

/// A pass through a graph.
pub(super) struct GraphPass<'a> {
    pub(super) op: &'a CudaGraphOp,
    pub(super) graph: &'a Network,
    pub(super) launches: Launches,
    pub(super) stages: Vec<Stage>,
    /// Elements that each part of all weights takes.
    pub(super) parts: Vec<usize>,
    pub(super) batch: usize,
}

impl<'a> GraphPass<'a> {
    pub(super) fn new(op: &'a CudaGraphOp, device: &CudaDevice, batch: usize) -> Self {
        let graph = &*op.graph;
        let width = |node: usize| width(graph, op.dtype, node);
        let (stages, parts) = stages(graph, &op.trainable, width);
        Self {
            op,
            graph,
            launches: Launches::new(device, op.dtype),
            stages,
            parts,
            batch,
        }
    }

    /// Weights as cuDNN takes them: those of the parts that are chosen.
    pub(super) fn lay_weights(
        &self,
        parts: &mut Maps,
        is_chosen: impl Fn(usize) -> bool,
    ) -> Result<()> {
        for (number, part) in parts.iter_mut().enumerate() {
            if is_chosen(number) {
                *part = Some(self.room(self.parts[number])?);
            }
        }
        let mut weights = Vec::new();
        for (part, unit, member) in self.members().filter(|&(part, ..)| is_chosen(part)) {
            weights.push(Weight {
                planes: self.parameter(member, 0)?,
                ..self.weight(unit, member, map_of(parts, part)?)?
            });
        }
        self.launches.weights(&weights, WeightLayout::Pixels)
    }

    /// Members of all units, with the part that holds their weights.
    pub(super) fn members(&self) -> impl Iterator<Item = (usize, &Unit, &Member)> {
        self.stages.iter().flat_map(|stage| {
            stage.units.iter().flat_map(move |unit| {
                unit.members
                    .iter()
                    .map(move |member| (stage.part, unit, member))
            })
        })
    }

    /// A member's weight in its part.
    pub(super) fn weight(
        &self,
        unit: &Unit,
        member: &Member,
        pixels: &CudaStorage,
    ) -> Result<Weight> {
        let c = &member.convolution;
        let (taps, width) = (c.kernel * c.kernel, self.width(c.input));
        Ok(Weight {
            planes: 0,
            pixels: (self.launches).at(pixels, unit.weight + member.channel * taps * width)?,
            c_out: c.c_out,
            c_in: c.c_in,
            taps,
            width,
        })
    }

    /// A pass of a unit on a lane, over the map of its input, its stage's part of the weights, and its own sums, or over their gradients:
    /// each as a whole.
    pub(super) fn convolve(
        &self,
        lane: usize,
        stage: &Stage,
        task: &Task,
        [x, weights, raw]: [&CudaStorage; 3],
    ) -> Result<()> {
        let unit = &stage.units[task.unit];
        let c = unit.shape();
        let geometry = Conv2dGeometry {
            batch: self.batch,
            c_in: self.width(c.input),
            input: self.graph.nodes[c.input].size,
            c_out: unit.c_out,
            kernel: (c.kernel, c.kernel),
            output: self.graph.nodes[c.output].size,
            config: Conv2dConfig::padded(c.padding).strided(c.stride),
        };
        let on = ChannelsLast {
            geometry,
            dtype: self.op.dtype,
            x: self.launches.at(x, 0)?,
            weight: self.launches.at(weights, unit.weight)?,
            y: self.launches.at(raw, 0)?,
        };
        // SAFETY: memory of these sizes that was made for them by this pass or the forward pass before it, and is freed in the
        // order of the device's own stream after all lanes were waited for.
        // What one lane writes, others leave alone: outputs, weights' gradients and maps' gradients are a task's own.
        unsafe { channels_last_pass((&self.launches.device, lane), task.pass, on, task.adds) }
    }

    /// A stage's members, by the size of their outputs and what follows them.
    pub(super) fn chunks(&self, stage: &Stage) -> Vec<Chunk> {
        let mut chunks: Vec<Chunk> = Vec::new();
        for (u, unit) in stage.units.iter().enumerate() {
            for (m, member) in unit.members.iter().enumerate() {
                let (rows, kind) = (self.rows(unit), self.kind(member));
                // Units that train are kept apart, so that the backward pass takes a chunk as a whole or not at all.
                let fits = |chunk: &&mut Chunk| {
                    let first = &stage.units[chunk.members[0].0];
                    (chunk.rows, chunk.kind) == (rows, kind)
                        && chunk.members.len() < SEGMENTS
                        && first.trains == unit.trains
                        && (unit.trains || first.shape().input == unit.shape().input)
                };
                match chunks.iter_mut().find(fits) {
                    Some(chunk) => chunk.members.push((u, m)),
                    None => chunks.push(Chunk {
                        members: vec![(u, m)],
                        rows,
                        kind,
                    }),
                }
            }
        }
        chunks
    }

    /// The segments of a chunk, without statistics of the batch and without gradients.
    pub(super) fn segments(
        &self,
        stage: &Stage,
        chunk: &Chunk,
        raws: &Maps,
        nodes: &Maps,
    ) -> Result<Vec<Segment>> {
        let mut segments = Vec::with_capacity(chunk.members.len());
        let mut first = 0;
        for (&(u, _), member) in chunk.members.iter().zip(chunk.members(stage)) {
            let unit = &stage.units[u];
            let c = &member.convolution;
            let (buffer, channel) = self.graph.place(c.output);
            let at = |map: &CudaStorage, channel: usize| self.launches.at(map, channel);
            let mut segment = Segment {
                raw: at(map_of(raws, u)?, member.channel)?,
                map: match nodes[buffer].as_ref() {
                    Some(map) => at(map, channel)?,
                    None => 0,
                },
                channels: c.c_out as u32,
                raw_width: unit.c_out as u32,
                map_width: self.width(buffer) as u32,
                first,
                kind: chunk.kind,
                eps: c.eps.unwrap_or(0.0) as f32,
                ..Segment::EMPTY
            };
            match chunk.kind {
                Kind::Bias => segment.bias = self.parameter(member, 1)?,
                Kind::Batch | Kind::Running => {
                    segment.weight = self.parameter(member, 1)?;
                    segment.bias = self.parameter(member, 2)?;
                }
            }
            if chunk.kind == Kind::Running {
                segment.mean = self.parameter(member, 3)?;
                segment.deviation = self.parameter(member, 4)?;
            }
            first += segment.channels;
            segments.push(segment);
        }
        Ok(segments)
    }

    /// Gives segments their part of statistics (3, channels).
    pub(super) fn point_to(&self, statistics: &Tensor, segments: &mut [Segment]) -> Result<()> {
        let channels = all_channels(segments);
        let held = Held::new(statistics);
        let (storage, _) = held.operand(OP)?;
        for segment in segments {
            let first = segment.first as usize;
            segment.mean = self.launches.at(storage, first)?;
            segment.deviation = self.launches.at(storage, channels + first)?;
        }
        Ok(())
    }

    pub(super) fn kind(&self, member: &Member) -> Kind {
        match self.op.parameters[member.convolution.number].len() {
            2 => Kind::Bias,
            3 => Kind::Batch,
            _ => Kind::Running,
        }
    }

    fn parameter(&self, member: &Member, at: usize) -> Result<CUdeviceptr> {
        let held = Held::new(&self.op.parameters[member.convolution.number][at]);
        let stream = self.launches.device.cuda_stream();
        // The operation holds the tensor itself.
        let (pointer, _) = address(OP, held.operand(OP)?, &stream)?;
        Ok(pointer)
    }

    pub(super) fn pool(&self, operation: usize) -> Result<&MaxPool> {
        match &self.graph.operations[operation] {
            Operation::MaxPool(p) => Ok(p),
            Operation::Convolution(_) => Err(missing()),
        }
    }

    pub(super) fn room(&self, elements: usize) -> Result<CudaStorage> {
        self.launches.room(elements)
    }

    pub(super) fn width(&self, node: usize) -> usize {
        width(self.graph, self.op.dtype, node)
    }

    /// Images, channels and pixels of the graph's input.
    pub(super) fn planes(&self) -> (usize, usize, usize) {
        let input = &self.graph.nodes[0];
        (self.batch, input.channels, input.size.0 * input.size.1)
    }

    /// Images, pixels and channels of a node.
    pub(super) fn sizes(&self, node: usize) -> (usize, usize, usize) {
        let node = &self.graph.nodes[node];
        (self.batch, node.size.0 * node.size.1, node.channels)
    }

    /// Pixels of a unit's output.
    pub(super) fn rows(&self, unit: &Unit) -> usize {
        let (height, width) = self.graph.nodes[unit.shape().output].size;
        self.batch * height * width
    }

    /// Elements of a node's map.
    pub(super) fn elements(&self, node: usize) -> usize {
        let (height, width) = self.graph.nodes[node].size;
        self.batch * height * width * self.width(node)
    }

    /// Whether the gradient of a weight is taken from the map, of each node.
    pub(super) fn read_by_weight_gradients(&self) -> Vec<bool> {
        let mut read = vec![false; self.graph.nodes.len()];
        for unit in self.stages.iter().flat_map(|stage| &stage.units) {
            read[unit.shape().input] |= unit.trains;
        }
        read
    }

    /// The first stage that writes a map and the last that reads it, of each node.
    pub(super) fn uses(&self) -> Vec<Uses> {
        let mut uses = vec![Uses::default(); self.graph.nodes.len()];
        for (index, stage) in self.stages.iter().enumerate() {
            let of_members = stage
                .members()
                .map(|m| (m.convolution.input, m.convolution.output));
            let operations = stage.pools.iter().map(|&p| &self.graph.operations[p]);
            let of_pools = operations.map(|o| (o.input(), o.output()));
            for (input, output) in of_members.chain(of_pools) {
                uses[input].last_read = Some(index);
                let written = &mut uses[self.graph.place(output).0].first_write;
                *written = written.or(Some(index));
            }
        }
        uses
    }
}

/// Stages between which a map lives.
#[derive(Clone, Debug, Default)]
pub(super) struct Uses {
    pub(super) first_write: Option<usize>,
    pub(super) last_read: Option<usize>,
}

/// A list of `len` places with nothing in them.
pub(super) fn none<T>(len: usize) -> Vec<Option<T>> {
    (0..len).map(|_| None).collect()
}

pub(super) fn all_channels(segments: &[Segment]) -> usize {
    segments.iter().map(|s| s.channels as usize).sum()
}

/// A segment's part of a row of (rows, channels).
pub(super) fn row_of(numbers: &Tensor, row: usize, segment: &Segment) -> Result<Tensor> {
    let row = numbers.get(row)?;
    row.narrow(0, segment.first as usize, segment.channels as usize)
}

/// Channels of a node's pixels in memory.
fn width(graph: &Network, dtype: DType, node: usize) -> usize {
    let channels = graph.nodes[node].channels;
    match node {
        0 => channels.next_multiple_of(PIXEL / dtype.size_in_bytes()),
        _ => channels,
    }
}

pub(super) fn map_of(maps: &Maps, number: usize) -> Result<&CudaStorage> {
    maps.get(number)
        .and_then(Option::as_ref)
        .ok_or_else(missing)
}

/// An error that only a mistake in this module can bring about.
pub(super) fn missing() -> candle_core::Error {
    let expected = "maps that its operations have in the order in which they run";
    OpError::setting(OP, "graph", "a map that is not there", expected)
}
