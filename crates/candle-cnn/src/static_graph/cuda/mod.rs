//! A graph on CUDA.
//!
//! Maps lie channels last, (N, H, W, C), as tensor cores want them; Candle's tensors do not. cuDNN takes the sums of each
//! convolution into memory of their own, and small kernels of ours do what lies between for a whole [`Stage`] at once: bias or
//! batch norm and ReLU on the way into the maps, concatenations among them, and the same on the way back. A gradient is added to
//! another where it is made, or where it is read. Memory is taken and freed in the order of the device's stream, so that a step
//! can be captured.
//!
//! - *Sums without gaps.* cuDNN does not write into a concatenation: its engines (9.19) want workspace of the result's size for
//!   a result with gaps, to lay it out anew.
//! - *Up to 512 rows* a block has all rows of its channels, and normalises as soon as it knows their mean and deviation, on the
//!   way back likewise. Beyond, sums are taken in parts, which another launch joins. Nobody waits for the gradients of biases:
//!   the parts of all are joined at the end.
//! - *Masks.* Behind a bias, what is positive is kept as bits, a sixteenth of the bytes that the way back would read else. Then
//!   a map that only poolings read is not kept. Threads that take single channels keep the map instead.
//! - *Poolings* keep the place of each maximum in its window as a byte. The gradient of one with 3×3 windows over what biases
//!   made is added where it is read, and not before, so that it does not go through memory in between: for one pooling of a
//!   map, in whole packs, and while no pooling with other windows waits ([`GraphPass::can_wait`]).
//! - *Instructions.* A thread takes 16 bytes of a pixel's channels, divides by multiplying, and compares each line of a 3×3
//!   window once. Kernels that spend 300 instructions on a number take longer than the memory that they read
//!   (results/2026-11-26-cuda-kernels-sm90).
//! - *Weights* are laid out once more as cuDNN takes them, in f32 22 MiB of either network, in up to four parts. The way back
//!   frees these one by one while gradients take memory of theirs; without a way back one is there at a time.
//! - *Frozen weights* whose bias or batch norm trains get a gradient, which is dropped.
//!
//! A step at batch 32 in numbers, counted on the emulated device (`CUDA_EMULATION_LOG=1`; memory without what libraries and the
//! context take):
//!
//! | | launches, copies and convolutions | convolutions alone | memory |
//! | --- | ---: | ---: | ---: |
//! | lesson's net, operation by operation | 553 | 164 | 910 MiB, in bf16 499 |
//! | lesson's net, as a graph | 196 | 110 | 529 MiB, in bf16 310 |
//! | torchvision's net, operation by operation | 1,054 | 170 | 96 MiB |
//! | torchvision's net, as a graph | 233 | 116 | 96 MiB |
//! | torchvision's net, its head alone, as a graph | 128 | 39 | 38 MiB |

#![allow(unsafe_code)]

mod launches;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::sys::CUdeviceptr;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

use self::launches::{Kind, Launches, SEGMENTS, Segment, Sums, Way, Weight};
use super::builder::{MaxPool, Operation};
use super::custom_op::{Gradients, Token, lock};
use super::parameters::{ConvParameters, GraphOutput};
use super::plan::Inner;
use super::stages::{Member, Stage, Unit, stages};
use super::{OP, StaticGraph};
use crate::backward::aside;
use crate::batch_norm::BatchStatistics;
use crate::conv2d::{ChannelsLast, Conv2dConfig, Conv2dGeometry, Pass, channels_last_pass};
use crate::cuda::lanes::side_by_side;
use crate::cuda::launch::{Held, Operand, address, tensor};
use crate::error::OpError;
use crate::window::Axis;

/// Channels of the images' pixels are made a multiple of so many bytes, which tensor cores want; the network's own widths
/// are taken as they are.
const PIXEL: usize = 16;

/// [`StaticGraph::forward`] of images on CUDA, which fit the graph as the parameters do.
pub(super) fn forward(
    graph: &StaticGraph,
    images: &Tensor,
    parameters: &[ConvParameters<'_>],
) -> Result<GraphOutput> {
    let inner = &graph.inner;
    let dtype = images.dtype();
    if !matches!(dtype, DType::F32 | DType::BF16) {
        return Err(OpError::dtype(OP, dtype));
    }
    for tensor in parameters.iter().flat_map(ConvParameters::tensors) {
        if tensor.dtype() != DType::F32 {
            return Err(OpError::dtype_mismatch(OP, DType::F32, tensor.dtype()));
        }
        if !tensor.device().same_device(images.device()) {
            return Err(OpError::device(OP, tensor));
        }
    }
    for operation in &inner.operations {
        if let Operation::MaxPool(p) = operation
            && p.h.kernel * p.w.kernel > 256
        {
            let window = (p.h.kernel, p.w.kernel);
            let expected = "at most 256 pixels on CUDA";
            return Err(OpError::setting(OP, "kernel_size", window, expected));
        }
    }
    if images.dims()[0] == 0 {
        let expected = "at least 1 on CUDA";
        return Err(OpError::setting(OP, "images", 0, expected));
    }
    let images = images.contiguous()?;
    let trainable: Vec<bool> = parameters
        .iter()
        .map(|p| p.tensors().iter().any(|tensor| tensor.track_op()))
        .collect();
    let statistics = Arc::new(Mutex::new(Vec::new()));
    let mut op = Run {
        graph: Arc::clone(inner),
        dtype,
        tracks: images.track_op() || trainable.contains(&true),
        needs_input: images.track_op(),
        trainable,
        parameters: Vec::with_capacity(parameters.len()),
        receivers: Vec::new(),
        gradients: Arc::default(),
        statistics: Arc::clone(&statistics),
        kept: Mutex::new(None),
    };
    // An operation of Candle's has few inputs. So variables get their gradients past its graph, and one of them as the second
    // input is enough for the way back to be taken. What is not a variable hangs on a chain of tokens.
    let mut second = images.detach();
    let mut token: Option<Tensor> = None;
    for (c, parameters) in inner.convolutions().iter().zip(parameters) {
        let tensors = match op.tracks {
            true => parameters.folded(c.eps.unwrap_or(0.0))?,
            false => parameters.tensors().into_iter().cloned().collect(),
        };
        for tensor in &tensors {
            let receiver = if !tensor.track_op() {
                Receiver::Nobody
            } else if tensor.is_variable() {
                second = tensor.clone();
                Receiver::Variable(tensor.clone())
            } else {
                let before = match token.take() {
                    Some(token) => token,
                    None => Tensor::zeros(1, DType::F32, images.device())?,
                };
                let gradients = Arc::clone(&op.gradients);
                let index = op.receivers.len();
                token = Some(before.apply_op2(tensor, Token { gradients, index })?);
                Receiver::Token
            };
            op.receivers.push(receiver);
        }
        let contiguous = tensors.iter().map(|t| t.detach().contiguous());
        op.parameters.push(contiguous.collect::<Result<_>>()?);
    }
    let features = images.apply_op2(&token.unwrap_or(second), op)?;
    let statistics = std::mem::take(&mut *lock(&statistics));
    Ok(GraphOutput {
        features,
        statistics: statistics.into_iter().flatten().collect(),
    })
}

/// One pass through the graph as a node of Candle's.
struct Run {
    graph: Arc<Inner>,
    dtype: DType,
    /// Whether somebody needs a gradient.
    tracks: bool,
    needs_input: bool,
    /// Whether each convolution's parameters need their gradient.
    trainable: Vec<bool>,
    /// The tensors of each convolution, contiguous; running statistics are a part of weight and bias where somebody needs a
    /// gradient.
    parameters: Vec<Vec<Tensor>>,
    /// Who gets the gradient of each parameter, in order.
    receivers: Vec<Receiver>,
    /// Where the backward pass leaves gradients for the tokens.
    gradients: Gradients,
    /// Where the forward pass leaves each convolution's statistics of the batch.
    statistics: Arc<Mutex<Vec<Option<BatchStatistics>>>>,
    /// The maps of the forward pass, where somebody needs a gradient.
    kept: Mutex<Option<Kept>>,
}

/// Who gets the gradient of a parameter.
enum Receiver {
    Nobody,
    Variable(Tensor),
    Token,
}

impl CustomOp2 for Run {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Err(OpError::on_cpu(OP))
    }

    fn cuda_fwd(
        &self,
        images: &CudaStorage,
        layout: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let batch = layout.dims()[0];
        let channels = self.graph.nodes[self.graph.output].channels;
        let pass = GraphPass::new(self, images.device(), batch);
        let output = pass.forward((images, layout))?;
        *lock(&self.statistics) = output.statistics;
        *lock(&self.kept) = output.kept;
        Ok((output.features, Shape::from((batch, channels))))
    }

    fn bwd(
        &self,
        images: &Tensor,
        second: &Tensor,
        _features: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(kept) = lock(&self.kept).take() else {
            let expected = "one backward pass for each forward pass";
            return Err(OpError::setting(OP, "backward", "a second one", expected));
        };
        let gradient = gradient.contiguous()?;
        let held = Held::new(&gradient);
        let d_features = held.operand(OP)?;
        let pass = GraphPass::new(self, d_features.0.device(), images.dims()[0]);
        let (d_images, d_parameters) = pass.backward(kept, d_features)?;
        let mut for_tokens = Vec::with_capacity(d_parameters.len());
        for (receiver, gradient) in self.receivers.iter().zip(d_parameters) {
            for_tokens.push(match receiver {
                Receiver::Nobody => None,
                Receiver::Token => gradient,
                Receiver::Variable(variable) => {
                    if aside(variable, gradient).is_some() {
                        let expected = "candle_cnn::backward(&loss), through which a graph on CUDA hands \
                                        gradients of variables over";
                        return Err(OpError::setting(OP, "backward", "loss.backward()", expected));
                    }
                    None
                }
            });
        }
        *lock(&self.gradients) = for_tokens;
        // A variable has got its gradient; the end of a chain of tokens passes the word on.
        let d_second = (second.track_op() && !second.is_variable())
            .then(|| second.zeros_like())
            .transpose()?;
        Ok((d_images, d_second))
    }
}

/// What the backward pass needs of the forward pass.
struct Kept {
    /// The map of each node that has one of its own and is read again.
    nodes: Vec<Option<CudaStorage>>,
    /// The sums that a batch norm normalises, of each stage and unit.
    raws: Vec<Vec<Option<CudaStorage>>>,
    /// Mean, 1/σ and unbiased variance of each stage and chunk, (3, channels).
    statistics: Vec<Vec<Option<Tensor>>>,
    /// What of its maps passes a gradient, of each stage and chunk behind biases whose threads take packs.
    masks: Vec<Vec<Option<CudaStorage>>>,
    /// The winners of each pooling, by its operation.
    winners: Vec<Option<CudaStorage>>,
    /// The weights as cuDNN takes them, by part; `None` once freed.
    weights: Vec<Option<CudaStorage>>,
}

struct Output {
    features: CudaStorage,
    statistics: Vec<Option<BatchStatistics>>,
    kept: Option<Kept>,
}

/// A pooling's part of a map's gradient that was not added yet.
struct Late {
    operation: usize,
    winners: CudaStorage,
    dy: CudaStorage,
}

/// Members of a stage's units that one launch does the like work for, by their numbers there.
struct Chunk {
    members: Vec<(usize, usize)>,
    rows: usize,
    kind: Kind,
}

/// A pass through a graph.
struct GraphPass<'a> {
    run: &'a Run,
    graph: &'a Inner,
    launches: Launches,
    stages: Vec<Stage>,
    /// Elements that each part of all weights takes.
    parts: Vec<usize>,
    batch: usize,
}

impl<'a> GraphPass<'a> {
    fn new(run: &'a Run, device: &CudaDevice, batch: usize) -> Self {
        let graph = &*run.graph;
        let width = |node: usize| width(graph, run.dtype, node);
        let (stages, parts) = stages(graph, &run.trainable, width);
        Self {
            run,
            graph,
            launches: Launches::new(device, run.dtype),
            stages,
            parts,
            batch,
        }
    }

    fn forward(&self, images: Operand) -> Result<Output> {
        let graph = self.graph;
        let keep = self.run.tracks;
        let uses = self.uses();
        let mut weights = self.no_parts();
        let mut nodes: Vec<Option<CudaStorage>> = graph.nodes.iter().map(|_| None).collect();
        let mut winners: Vec<Option<CudaStorage>> = graph.operations.iter().map(|_| None).collect();
        let input = &graph.nodes[0];
        let planes = (self.batch, input.channels, input.size.0 * input.size.1);
        nodes[0] = Some(self.launches.pixels_of(images, planes, self.width(0))?);
        let mut all_raws = Vec::with_capacity(self.stages.len());
        let mut all_statistics = Vec::with_capacity(self.stages.len());
        let mut all_masks = Vec::with_capacity(self.stages.len());
        let mut read_again = self.read_by_weight_gradients();
        let mut of_convolutions = vec![None; self.run.parameters.len()];
        for (index, stage) in self.stages.iter().enumerate() {
            if weights[stage.part].is_none() && !stage.units.is_empty() {
                // On the way back all are needed; without it, each part for its stages alone.
                if !keep {
                    weights = self.no_parts();
                }
                self.lay_weights(&mut weights, |part| keep || part == stage.part)?;
            }
            let mut raws = Vec::with_capacity(stage.units.len());
            for unit in &stage.units {
                raws.push(Some(self.room(self.rows(unit) * unit.c_out)?));
                for member in &unit.members {
                    let buffer = graph.place(member.convolution.output).0;
                    if nodes[buffer].is_none() {
                        nodes[buffer] = Some(self.room(self.elements(buffer))?);
                    }
                }
            }
            let tasks: Vec<usize> = (0..stage.units.len()).collect();
            let mut pooled = Vec::with_capacity(stage.pools.len());
            let mut pool = || {
                for &operation in &stage.pools {
                    let p = self.pool(operation)?;
                    let of = (self.batch, graph.nodes[p.input].channels);
                    let x = map_of(&nodes, p.input)?;
                    pooled.push(self.launches.max_pool(x, (&p.h, &p.w), of, keep)?);
                }
                Ok(())
            };
            side_by_side(
                &self.launches.device,
                &tasks,
                |lane, &u| {
                    let unit = &stage.units[u];
                    let x = map_of(&nodes, unit.shape().input)?;
                    let operands = [x, map_of(&weights, stage.part)?, map_of(&raws, u)?];
                    self.convolve(lane, Pass::Forward, unit, operands, false)
                },
                (!stage.pools.is_empty()).then_some(&mut pool),
            )?;
            for (&operation, (y, won)) in stage.pools.iter().zip(pooled) {
                nodes[self.pool(operation)?.output] = Some(y);
                winners[operation] = won;
            }
            let (mut statistics, mut masks) = (Vec::new(), Vec::new());
            for chunk in self.chunks(stage) {
                let mut segments = self.segments(stage, &chunk, &raws, &nodes, None)?;
                let mut finished = false;
                let moments = match chunk.kind {
                    Kind::Batch => {
                        let (moments, is_done) = self.launches.moments(&segments, chunk.rows)?;
                        finished = is_done;
                        Some(tensor(moments, (3, all_channels(&segments))))
                    }
                    _ => None,
                };
                if let Some(moments) = &moments {
                    self.point_to(moments, &mut segments)?;
                    for (segment, &(u, m)) in segments.iter().zip(&chunk.members) {
                        let number = stage.units[u].members[m].convolution.number;
                        of_convolutions[number] = Some(statistics_of(moments, segment)?);
                    }
                }
                // Batch norms look at what they normalised instead.
                let keep_mask = keep && chunk.kind == Kind::Bias;
                masks.push(match finished {
                    true => None,
                    false => self.launches.finish(&segments, chunk.rows, keep_mask)?,
                });
                if keep_mask && masks.last().is_some_and(Option::is_none) {
                    for &(u, m) in &chunk.members {
                        let output = stage.units[u].members[m].convolution.output;
                        read_again[graph.place(output).0] = true;
                    }
                }
                statistics.push(moments);
            }
            if keep {
                for (raw, unit) in raws.iter_mut().zip(&stage.units) {
                    // Only batch norms look back at what they normalised.
                    if unit.members.iter().all(|m| self.kind(m) != Kind::Batch) {
                        *raw = None;
                    }
                }
                all_raws.push(raws);
                all_statistics.push(statistics);
                all_masks.push(masks);
            }
            for (node, map) in nodes.iter_mut().enumerate() {
                let was_read = node != graph.output && uses[node].last_read == Some(index);
                let is_kept = keep && read_again[node];
                if was_read && !is_kept {
                    *map = None;
                }
            }
        }
        let output = &graph.nodes[graph.output];
        let pixels = output.size.0 * output.size.1;
        let sizes = (self.batch, pixels, output.channels);
        let features = self
            .launches
            .average(map_of(&nodes, graph.output)?, sizes)?;
        if !read_again[graph.output] {
            nodes[graph.output] = None;
        }
        Ok(Output {
            features,
            statistics: of_convolutions,
            kept: keep.then_some(Kept {
                nodes,
                raws: all_raws,
                statistics: all_statistics,
                masks: all_masks,
                winners,
                weights,
            }),
        })
    }

    /// Gradients of the images, if they are needed, and of every parameter of the convolutions that train, in order.
    fn backward(
        &self,
        mut kept: Kept,
        d_features: Operand,
    ) -> Result<(Option<Tensor>, Vec<Option<Tensor>>)> {
        let graph = self.graph;
        let needed = graph.needed(self.run.needs_input, &self.run.trainable);
        let uses = self.uses();
        let mut d_weights = self.no_parts();
        let mut d_follows: Vec<Vec<Tensor>> = vec![Vec::new(); self.run.parameters.len()];
        // Of biases, whose gradients nobody waits for: joined at the end.
        let mut of_biases: Vec<(Sums, Vec<(usize, Segment)>)> = Vec::new();
        // Of maps: a pooling's part of their gradient, which is added where the gradient is read.
        let mut late: Vec<Option<Late>> = graph.nodes.iter().map(|_| None).collect();
        let mut gradients: Vec<Option<CudaStorage>> = graph.nodes.iter().map(|_| None).collect();
        if needed[graph.output] {
            let output = &graph.nodes[graph.output];
            let sizes = (self.batch, output.size.0 * output.size.1, output.channels);
            gradients[graph.output] = Some(self.launches.spread(d_features, sizes)?);
        }
        for (index, stage) in self.stages.iter().enumerate().rev() {
            let takes_part = |u: &Unit| u.trains || needed[u.shape().input];
            let mut raws = std::mem::take(&mut kept.raws[index]);
            for (raw, unit) in raws.iter_mut().zip(&stage.units) {
                if takes_part(unit) && raw.is_none() {
                    *raw = Some(self.room(self.rows(unit) * unit.c_out)?);
                }
            }
            for (number, chunk) in self.chunks(stage).iter().enumerate() {
                // Units that take part have all of their members' gradients; those of others may be missing.
                if !chunk
                    .members
                    .iter()
                    .all(|&(u, _)| takes_part(&stage.units[u]))
                {
                    continue;
                }
                let maps = Some(&gradients);
                let mut segments = self.segments(stage, chunk, &raws, &kept.nodes, maps)?;
                let pooling = self.point_to_late(stage, chunk, &late, &mut segments)?;
                if let Some(mask) = &kept.masks[index][number] {
                    self.launches
                        .point_to_mask(mask, &mut segments, chunk.rows)?;
                } else if chunk.kind == Kind::Bias && segments.iter().any(|s| s.map == 0) {
                    return Err(missing());
                }
                if let Some(moments) = &kept.statistics[index][number] {
                    self.point_to(moments, &mut segments)?;
                }
                let sums = self
                    .launches
                    .gradient_sums(&segments, chunk.rows, pooling)?;
                let of_member =
                    |&(u, m): &(usize, usize)| stage.units[u].members[m].convolution.number;
                let members = chunk.members.iter().map(of_member);
                if chunk.kind != Kind::Batch {
                    of_biases.push((sums, members.zip(segments).collect()));
                    continue;
                }
                let joined = self.launches.input_gradient(&segments, chunk.rows, sums)?;
                let joined = tensor(joined, (2, all_channels(&segments)));
                for (number, segment) in members.zip(&segments) {
                    d_follows[number] =
                        vec![row_of(&joined, 1, segment)?, row_of(&joined, 0, segment)?];
                }
            }
            // One task for each gradient of weights, and one for each of a map: what adds up there takes turns.
            let mut tasks: Vec<Vec<(Pass, usize, bool)>> = Vec::new();
            let mut of_maps: BTreeMap<usize, Vec<(Pass, usize, bool)>> = BTreeMap::new();
            for (u, unit) in stage
                .units
                .iter()
                .enumerate()
                .filter(|(_, u)| takes_part(u))
            {
                let input = unit.shape().input;
                if needed[input] {
                    let add = gradients[input].is_some();
                    if !add {
                        gradients[input] = Some(self.room(self.elements(input))?);
                    }
                    let of_map = of_maps.entry(input).or_default();
                    of_map.push((Pass::InputGradient, u, add));
                }
                if unit.trains {
                    let part = &mut d_weights[stage.part];
                    if part.is_none() {
                        *part = Some(self.room(self.parts[stage.part])?);
                    }
                    tasks.push(vec![(Pass::WeightGradient, u, false)]);
                }
            }
            tasks.extend(of_maps.into_values());
            let run = |lane: usize, task: &Vec<(Pass, usize, bool)>| {
                task.iter().try_for_each(|&(pass, u, add)| {
                    let unit = &stage.units[u];
                    let (input, dy) = (unit.shape().input, map_of(&raws, u)?);
                    let operands = match pass {
                        Pass::InputGradient => [
                            map_of(&gradients, input)?,
                            map_of(&kept.weights, stage.part)?,
                            dy,
                        ],
                        _ => [
                            map_of(&kept.nodes, input)?,
                            map_of(&d_weights, stage.part)?,
                            dy,
                        ],
                    };
                    self.convolve(lane, pass, unit, operands, add)
                })
            };
            side_by_side(&self.launches.device, &tasks, run, None)?;
            drop(raws);
            // The last stage on the way back that reads this part.
            if index == 0 || self.stages[index - 1].part != stage.part {
                kept.weights[stage.part] = None;
            }
            // Read for the last time, and in nobody's way any more.
            for (late, uses) in late.iter_mut().zip(&uses) {
                if uses.first_write == Some(index) {
                    *late = None;
                }
            }
            for &operation in &stage.pools {
                let p = self.pool(operation)?;
                let winners = kept.winners[operation].take();
                let (Some(winners), Some(dy), true) =
                    (winners, gradients[p.output].take(), needed[p.input])
                else {
                    continue;
                };
                if late[p.input].is_none() && self.can_wait(p, &late)? {
                    late[p.input] = Some(Late {
                        operation,
                        winners,
                        dy,
                    });
                    continue;
                }
                let add = gradients[p.input].is_some();
                let mut dx = match gradients[p.input].take() {
                    Some(dx) => dx,
                    None => self.room(self.elements(p.input))?,
                };
                let of = (self.batch, graph.nodes[p.input].channels);
                let maps = (&winners, &dy);
                self.launches
                    .max_pool_gradient(maps, &mut dx, (&p.h, &p.w), of, add)?;
                gradients[p.input] = Some(dx);
            }
            // Nobody before this stage has written them, and all their readers come after it.
            for node in 0..graph.nodes.len() {
                if uses[node].first_write == Some(index) {
                    (kept.nodes[node], gradients[node]) = (None, None);
                }
            }
        }
        let (sums, members): (Vec<_>, Vec<_>) = of_biases.into_iter().unzip();
        for (joined, members) in self.launches.join(sums)?.into_iter().zip(members) {
            let channels: u32 = members.iter().map(|(_, segment)| segment.channels).sum();
            let joined = tensor(joined, (1, channels as usize));
            for (number, segment) in members {
                d_follows[number] = vec![row_of(&joined, 0, &segment)?];
            }
        }
        let d_images = match gradients[0].take() {
            Some(map) => {
                let input = &graph.nodes[0];
                let planes = (self.batch, input.channels, input.size.0 * input.size.1);
                let planes = self.launches.planes_of(&map, planes, self.width(0))?;
                let shape = (self.batch, input.channels, input.size.0, input.size.1);
                Some(tensor(planes, shape))
            }
            None => None,
        };
        Ok((d_images, self.parameter_gradients(d_weights, d_follows)?))
    }

    /// The gradients of weights under Candle's shapes, and of what follows each.
    fn parameter_gradients(
        &self,
        d_weights: Vec<Option<CudaStorage>>,
        mut d_follows: Vec<Vec<Tensor>>,
    ) -> Result<Vec<Option<Tensor>>> {
        let members = || self.members().filter(|(_, unit, _)| unit.trains);
        let elements = |m: &Member| self.run.parameters[m.convolution.number][0].elem_count();
        let planes = members().map(|(_, _, m)| elements(m)).sum();
        let planes = self.launches.room_of(DType::F32, planes)?;
        let mut weights = Vec::new();
        let mut first = 0;
        for (part, unit, member) in members() {
            weights.push(Weight {
                planes: self.launches.at(&planes, first)?,
                ..self.weight(unit, member, map_of(&d_weights, part)?)?
            });
            first += elements(member);
        }
        self.launches.weights(&weights, Way::ToPlanes)?;
        let planes = tensor(planes, first.max(1));
        let mut of_numbers: Vec<Option<Tensor>> = vec![None; self.run.parameters.len()];
        let mut first = 0;
        for (_, _, member) in members() {
            let number = member.convolution.number;
            let weight = &self.run.parameters[number][0];
            let gradient = planes.narrow(0, first, weight.elem_count())?;
            of_numbers[number] = Some(gradient.reshape(weight.shape())?);
            first += weight.elem_count();
        }
        let mut all = Vec::with_capacity(self.run.receivers.len());
        for (number, parameters) in self.run.parameters.iter().enumerate() {
            let weight = of_numbers[number].take();
            let follows = std::mem::take(&mut d_follows[number]);
            let is_there = weight.is_some();
            all.push(weight);
            let follows = follows.into_iter().map(|d| is_there.then_some(d));
            all.extend(
                follows
                    .chain(std::iter::repeat(None))
                    .take(parameters.len() - 1),
            );
        }
        Ok(all)
    }

    /// Weights as cuDNN takes them: those of the parts that are chosen.
    fn lay_weights(
        &self,
        parts: &mut [Option<CudaStorage>],
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
        self.launches.weights(&weights, Way::ToPixels)
    }

    /// The parts of weights, or of their gradients, before they have memory.
    fn no_parts(&self) -> Vec<Option<CudaStorage>> {
        self.parts.iter().map(|_| None).collect()
    }

    /// Members of all units, with the part that holds their weights.
    fn members(&self) -> impl Iterator<Item = (usize, &Unit, &Member)> {
        self.stages.iter().flat_map(|stage| {
            stage.units.iter().flat_map(move |unit| {
                unit.members
                    .iter()
                    .map(move |member| (stage.part, unit, member))
            })
        })
    }

    /// A member's weight in its part.
    fn weight(&self, unit: &Unit, member: &Member, pixels: &CudaStorage) -> Result<Weight> {
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

    /// A pass of a unit over its input, its part of the weights, and its own sums, on a lane.
    fn convolve(
        &self,
        lane: usize,
        pass: Pass,
        unit: &Unit,
        [x, weights, raw]: [&CudaStorage; 3],
        add: bool,
    ) -> Result<()> {
        let c = unit.shape();
        let geometry = Conv2dGeometry {
            batch: self.batch,
            c_in: self.width(c.input),
            input: self.graph.nodes[c.input].size,
            c_out: unit.c_out,
            kernel: (c.kernel, c.kernel),
            output: self.graph.nodes[c.output].size,
            config: Conv2dConfig {
                stride: (c.stride, c.stride),
                ..Conv2dConfig::padded(c.padding)
            },
        };
        let on = ChannelsLast {
            geometry,
            dtype: self.run.dtype,
            x: self.launches.at(x, 0)?,
            weight: self.launches.at(weights, unit.weight)?,
            y: self.launches.at(raw, 0)?,
        };
        // SAFETY: memory of these sizes that was made for them by this pass, which frees it after all lanes were waited for.
        // What one lane writes, others leave alone: outputs, weights' gradients and maps' gradients are a task's own.
        unsafe { channels_last_pass((&self.launches.device, lane), pass, on, add) }
    }

    /// A stage's members, by the size of their outputs and what follows them.
    fn chunks(&self, stage: &Stage) -> Vec<Chunk> {
        let mut chunks: Vec<Chunk> = Vec::new();
        for (u, unit) in stage.units.iter().enumerate() {
            for (m, member) in unit.members.iter().enumerate() {
                let (rows, kind) = (self.rows(unit), self.kind(member));
                // Those that train are apart, so that a chunk goes the way back as a whole or not at all.
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

    /// The segments of a chunk, without statistics of the batch.
    fn segments(
        &self,
        stage: &Stage,
        chunk: &Chunk,
        raws: &[Option<CudaStorage>],
        nodes: &[Option<CudaStorage>],
        gradients: Option<&Vec<Option<CudaStorage>>>,
    ) -> Result<Vec<Segment>> {
        let mut segments = Vec::with_capacity(chunk.members.len());
        let mut first = 0;
        for &(u, m) in &chunk.members {
            let unit = &stage.units[u];
            let member = &unit.members[m];
            let c = &member.convolution;
            let (buffer, channel) = self.graph.place(c.output);
            let at = |map: &CudaStorage, channel: usize| self.launches.at(map, channel);
            let mut segment = Segment {
                raw: at(map_of(raws, u)?, member.channel)?,
                map: match nodes[buffer].as_ref() {
                    Some(map) => at(map, channel)?,
                    None => 0,
                },
                gradient: match gradients.and_then(|gradients| gradients[buffer].as_ref()) {
                    Some(gradient) => at(gradient, channel)?,
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

    /// Whether a pooling's part of its input's gradient can wait until that is read: by biases alone, in launches that take whole
    /// packs and have no other windows.
    fn can_wait(&self, p: &MaxPool, late: &[Option<Late>]) -> Result<bool> {
        let writes = |m: &Member| self.graph.place(m.convolution.output).0 == p.input;
        let stages = || {
            self.stages
                .iter()
                .filter(|stage| stage.members().any(writes))
        };
        let whole = |m: &Member| {
            let widths = [
                m.convolution.c_out,
                self.width(self.graph.place(m.convolution.output).0),
            ];
            self.launches.can_add((&p.h, &p.w), widths)
        };
        for late in late.iter().flatten() {
            let other = self.pool(late.operation)?;
            if (&other.h, &other.w) != (&p.h, &p.w) {
                return Ok(false);
            }
        }
        let poolings = self.stages.iter().flat_map(|s| &s.pools);
        let mut outputs = poolings.map(|&o| self.graph.operations[o].output());
        Ok(p.input != 0
            && outputs.all(|output| output != p.input)
            && stages().flat_map(Stage::members).all(whole)
            && stages()
                .flat_map(Stage::members)
                .filter(|m| writes(m))
                .all(|m| self.kind(m) == Kind::Bias))
    }

    /// Gives segments the poolings whose gradient waits for them, and says what their windows are.
    fn point_to_late(
        &self,
        stage: &Stage,
        chunk: &Chunk,
        late: &[Option<Late>],
        segments: &mut [Segment],
    ) -> Result<Option<(&Axis, &Axis)>> {
        let mut windows = None;
        for (segment, &(u, m)) in segments.iter_mut().zip(&chunk.members) {
            let output = stage.units[u].members[m].convolution.output;
            let (buffer, channel) = self.graph.place(output);
            if let Some(late) = &late[buffer] {
                segment.pooled = self.launches.at(&late.dy, channel)?;
                segment.winners = self.launches.at(&late.winners, channel)?;
                let p = self.pool(late.operation)?;
                windows = Some((&p.h, &p.w));
            } else if segment.gradient == 0 {
                return Err(missing());
            }
        }
        Ok(windows)
    }

    /// Gives segments their part of statistics (3, channels).
    fn point_to(&self, statistics: &Tensor, segments: &mut [Segment]) -> Result<()> {
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

    fn kind(&self, member: &Member) -> Kind {
        match self.run.parameters[member.convolution.number].len() {
            2 => Kind::Bias,
            3 => Kind::Batch,
            _ => Kind::Running,
        }
    }

    fn parameter(&self, member: &Member, at: usize) -> Result<CUdeviceptr> {
        let held = Held::new(&self.run.parameters[member.convolution.number][at]);
        let stream = self.launches.device.cuda_stream();
        // The run holds the tensor itself.
        let (pointer, _) = address(OP, held.operand(OP)?, &stream)?;
        Ok(pointer)
    }

    fn pool(&self, operation: usize) -> Result<&MaxPool> {
        match &self.graph.operations[operation] {
            Operation::MaxPool(p) => Ok(p),
            Operation::Convolution(_) => Err(missing()),
        }
    }

    fn room(&self, elements: usize) -> Result<CudaStorage> {
        self.launches.room(elements)
    }

    fn width(&self, node: usize) -> usize {
        width(self.graph, self.run.dtype, node)
    }

    /// Pixels of a unit's output.
    fn rows(&self, unit: &Unit) -> usize {
        let (height, width) = self.graph.nodes[unit.shape().output].size;
        self.batch * height * width
    }

    /// Elements of a node's map.
    fn elements(&self, node: usize) -> usize {
        let (height, width) = self.graph.nodes[node].size;
        self.batch * height * width * self.width(node)
    }

    /// Whether the gradient of a weight is taken from the map, of each node.
    fn read_by_weight_gradients(&self) -> Vec<bool> {
        let mut read = vec![false; self.graph.nodes.len()];
        for unit in self.stages.iter().flat_map(|stage| &stage.units) {
            read[unit.shape().input] |= unit.trains;
        }
        read
    }

    /// The first stage that writes a map and the last that reads it, of each node.
    fn uses(&self) -> Vec<Uses> {
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
struct Uses {
    first_write: Option<usize>,
    last_read: Option<usize>,
}

fn all_channels(segments: &[Segment]) -> usize {
    segments.iter().map(|s| s.channels as usize).sum()
}

/// A segment's part of a row of (rows, channels).
fn row_of(numbers: &Tensor, row: usize, segment: &Segment) -> Result<Tensor> {
    let row = numbers.get(row)?;
    row.narrow(0, segment.first as usize, segment.channels as usize)
}

/// A segment's part of statistics (3, channels).
fn statistics_of(moments: &Tensor, segment: &Segment) -> Result<BatchStatistics> {
    Ok(BatchStatistics {
        mean: row_of(moments, 0, segment)?,
        unbiased_variance: row_of(moments, 2, segment)?,
    })
}

/// Channels of a node's pixels in memory.
fn width(graph: &Inner, dtype: DType, node: usize) -> usize {
    let channels = graph.nodes[node].channels;
    match node {
        0 => channels.next_multiple_of(PIXEL / dtype.size_in_bytes()),
        _ => channels,
    }
}

fn map_of(maps: &[Option<CudaStorage>], node: usize) -> Result<&CudaStorage> {
    maps.get(node).and_then(Option::as_ref).ok_or_else(missing)
}

/// An error that only a mistake in this module can bring about.
fn missing() -> candle_core::Error {
    let expected = "maps that its operations have in the order in which they run";
    OpError::setting(OP, "graph", "a map that is not there", expected)
}
