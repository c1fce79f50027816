//! The backward pass, stage by stage from the last.

use std::collections::BTreeMap;

use candle_core::{CudaStorage, DType, Result, Tensor};

use super::launches::{Kind, PartialSums, Segment, Weight, WeightLayout};
use super::pass::{
    Chunk, GraphPass, Kept, KeptStage, Maps, Task, Uses, all_channels, map_of, missing, none,
    row_of,
};
use crate::conv2d::Pass;
use crate::cuda::lanes::side_by_side;
use crate::cuda::launch::{Operand, tensor};
use crate::static_graph::builder::MaxPool;
use crate::static_graph::stages::{Member, Stage, Unit};
use crate::window::Axis;

/// A backward pass under way.
pub(super) struct Backward<'a> {
    pass: &'a GraphPass<'a>,
    kept: Kept,
    /// Whether the gradient of each node's map is needed.
    needed: Vec<bool>,
    uses: Vec<Uses>,
    /// The gradient of each node's map, as far as it is added up.
    gradients: Maps,
    /// A pooling's part of the gradient of each node's map, which is added where the gradient is read.
    late: Vec<Option<Late>>,
    /// Gradients of the weights, by part.
    d_weights: Maps,
    /// Gradients of what follows each convolution: its bias, or weight and bias of its batch norm.
    d_follows: Vec<Vec<Tensor>>,
    /// The sums that are the gradients of biases, each with its convolutions' numbers and segments. Nobody waits for them, so that
    /// their parts are joined at the end.
    of_biases: Vec<(PartialSums, Vec<(usize, Segment)>)>,
}

/// A pooling's part of a map's gradient that was not added yet.
struct Late {
    operation: usize,
    winners: CudaStorage,
    dy: CudaStorage,
}

impl<'a> Backward<'a> {
    pub(super) fn new(pass: &'a GraphPass<'a>, kept: Kept) -> Self {
        let nodes = pass.graph.nodes.len();
        Self {
            pass,
            kept,
            needed: pass.graph.needed(pass.op.needs_input, &pass.op.trainable),
            uses: pass.uses(),
            gradients: none(nodes),
            late: none(nodes),
            d_weights: none(pass.parts.len()),
            d_follows: vec![Vec::new(); pass.op.parameters.len()],
            of_biases: Vec::new(),
        }
    }

    /// Gradients of the images, if they are needed, and of every parameter of the convolutions that train, in order.
    pub(super) fn run(
        mut self,
        d_features: Operand,
    ) -> Result<(Option<Tensor>, Vec<Option<Tensor>>)> {
        let pass = self.pass;
        let output = pass.graph.output;
        if self.needed[output] {
            let spread = pass.launches.spread(d_features, pass.sizes(output))?;
            self.gradients[output] = Some(spread);
        }
        for (index, stage) in pass.stages.iter().enumerate().rev() {
            let kept = std::mem::take(&mut self.kept.stages[index]);
            let raws = self.follow(stage, kept)?;
            self.convolve(stage, &raws)?;
            drop(raws);
            self.give_back_what_was_read(index);
            self.pool(stage)?;
            self.give_back_what_was_written(index);
        }
        self.join_biases()?;
        let d_images = match self.gradients[0].take() {
            Some(map) => {
                let planes = pass.planes();
                let planes = pass.launches.planes_of(&map, planes, pass.width(0))?;
                let input = &pass.graph.nodes[0];
                let (height, width) = input.size;
                let shape = (pass.batch, input.channels, height, width);
                Some(tensor(planes, shape))
            }
            None => None,
        };
        Ok((d_images, self.parameter_gradients()?))
    }

    fn takes_part(&self, unit: &Unit) -> bool {
        unit.trains || self.needed[unit.shape().input]
    }

    /// Back through what follows the convolutions of a stage: from the gradients of the maps to those of their sums, which
    /// take the place of the sums.
    fn follow(&mut self, stage: &Stage, mut kept: KeptStage) -> Result<Maps> {
        for (raw, unit) in kept.raws.iter_mut().zip(&stage.units) {
            if self.takes_part(unit) && raw.is_none() {
                *raw = Some(self.pass.room(self.pass.rows(unit) * unit.c_out)?);
            }
        }
        for (number, chunk) in self.pass.chunks(stage).iter().enumerate() {
            // Units that take part have all of their members' gradients; those of others may be missing.
            if chunk.units(stage).all(|unit| self.takes_part(unit)) {
                self.follow_chunk(stage, chunk, number, &kept)?;
            }
        }
        Ok(kept.raws)
    }

    fn follow_chunk(
        &mut self,
        stage: &Stage,
        chunk: &Chunk,
        number: usize,
        kept: &KeptStage,
    ) -> Result<()> {
        let launches = &self.pass.launches;
        let mut segments = (self.pass).segments(stage, chunk, &kept.raws, &self.kept.nodes)?;
        let pooling = self.point_to_gradients(stage, chunk, &mut segments)?;
        if let Some(mask) = &kept.masks[number] {
            launches.point_to_mask(mask, &mut segments, chunk.rows)?;
        } else if chunk.kind == Kind::Bias && segments.iter().any(|s| s.map == 0) {
            return Err(missing());
        }
        if let Some(moments) = &kept.statistics[number] {
            self.pass.point_to(moments, &mut segments)?;
        }
        let sums = launches.gradient_sums(&segments, chunk.rows, pooling)?;
        let numbers = chunk.members(stage).map(|m| m.convolution.number);
        if chunk.kind != Kind::Batch {
            self.of_biases.push((sums, numbers.zip(segments).collect()));
            return Ok(());
        }
        let joined = launches.input_gradient(&segments, chunk.rows, sums)?;
        let joined = tensor(joined, (2, all_channels(&segments)));
        for (number, segment) in numbers.zip(&segments) {
            self.d_follows[number] =
                vec![row_of(&joined, 1, segment)?, row_of(&joined, 0, segment)?];
        }
        Ok(())
    }

    /// Gives segments the gradients of their maps, and the poolings whose gradient waits for them; says what the windows of
    /// those are.
    fn point_to_gradients(
        &self,
        stage: &Stage,
        chunk: &Chunk,
        segments: &mut [Segment],
    ) -> Result<Option<(&'a Axis, &'a Axis)>> {
        let launches = &self.pass.launches;
        let mut windows = None;
        for (segment, member) in segments.iter_mut().zip(chunk.members(stage)) {
            let (buffer, channel) = self.pass.graph.place(member.convolution.output);
            let (gradient, late) = (&self.gradients[buffer], &self.late[buffer]);
            if gradient.is_none() && late.is_none() {
                return Err(missing());
            }
            if let Some(gradient) = gradient {
                segment.gradient = launches.at(gradient, channel)?;
            }
            if let Some(late) = late {
                segment.pooled = launches.at(&late.dy, channel)?;
                segment.winners = launches.at(&late.winners, channel)?;
                let p = self.pass.pool(late.operation)?;
                windows = Some((&p.h, &p.w));
            }
        }
        Ok(windows)
    }

    /// The gradients of a stage's weights, and of the maps that its convolutions read.
    fn convolve(&mut self, stage: &Stage, raws: &Maps) -> Result<()> {
        let pass = self.pass;
        // What adds up in one map takes turns.
        let mut of_maps: BTreeMap<usize, Vec<Task>> = BTreeMap::new();
        let mut turns: Vec<Vec<Task>> = Vec::new();
        for (u, unit) in stage.units.iter().enumerate() {
            if !self.takes_part(unit) {
                continue;
            }
            let task = |of, adds| Task {
                pass: of,
                unit: u,
                adds,
            };
            let input = unit.shape().input;
            if self.needed[input] {
                let adds = self.gradients[input].is_some();
                if !adds {
                    self.gradients[input] = Some(pass.room(pass.elements(input))?);
                }
                let of_map = of_maps.entry(input).or_default();
                of_map.push(task(Pass::InputGradient, adds));
            }
            if unit.trains {
                let part = &mut self.d_weights[stage.part];
                if part.is_none() {
                    *part = Some(pass.room(pass.parts[stage.part])?);
                }
                turns.push(vec![task(Pass::WeightGradient, false)]);
            }
        }
        turns.extend(of_maps.into_values());
        let (maps, weights) = (&self.kept.nodes, &self.kept.weights);
        let (d_maps, d_weights) = (&self.gradients, &self.d_weights);
        let run = |lane, tasks: &Vec<Task>| {
            tasks.iter().try_for_each(|task| {
                let input = stage.units[task.unit].shape().input;
                let (x, parts) = match task.pass {
                    Pass::InputGradient => (map_of(d_maps, input)?, weights),
                    _ => (map_of(maps, input)?, d_weights),
                };
                let operands = [x, map_of(parts, stage.part)?, map_of(raws, task.unit)?];
                pass.convolve(lane, stage, task, operands)
            })
        };
        side_by_side(&pass.launches.device, &turns, run, None)
    }

    /// Gives back the weights of the stage of this index, unless an earlier stage has some in the same part, and the poolings' parts of gradients
    /// that were read for the last time.
    fn give_back_what_was_read(&mut self, index: usize) {
        let part = self.pass.stages[index].part;
        if index == 0 || self.pass.stages[index - 1].part != part {
            self.kept.weights[part] = None;
        }
        for (late, uses) in self.late.iter_mut().zip(&self.uses) {
            if uses.first_write == Some(index) {
                *late = None;
            }
        }
    }

    /// Back through the poolings of a stage.
    fn pool(&mut self, stage: &Stage) -> Result<()> {
        let pass = self.pass;
        for &operation in &stage.pools {
            let p = pass.pool(operation)?;
            let winners = self.kept.winners[operation].take();
            let (Some(winners), Some(dy), true) = (
                winners,
                self.gradients[p.output].take(),
                self.needed[p.input],
            ) else {
                continue;
            };
            if self.late[p.input].is_none() && self.can_wait(p)? {
                self.late[p.input] = Some(Late {
                    operation,
                    winners,
                    dy,
                });
                continue;
            }
            let adds = self.gradients[p.input].is_some();
            let mut dx = match self.gradients[p.input].take() {
                Some(dx) => dx,
                None => pass.room(pass.elements(p.input))?,
            };
            let of = (pass.batch, pass.graph.nodes[p.input].channels);
            let maps = (&winners, &dy);
            (pass.launches).max_pool_gradient(maps, &mut dx, (&p.h, &p.w), of, adds)?;
            self.gradients[p.input] = Some(dx);
        }
        Ok(())
    }

    /// Whether a pooling's part of its input's gradient can wait until that is read: by biases alone, in launches that take whole
    /// packs and have no other windows.
    fn can_wait(&self, p: &MaxPool) -> Result<bool> {
        let pass = self.pass;
        for late in self.late.iter().flatten() {
            let other = pass.pool(late.operation)?;
            if (&other.h, &other.w) != (&p.h, &p.w) {
                return Ok(false);
            }
        }
        let buffer_of = |m: &Member| pass.graph.place(m.convolution.output).0;
        let writes = |m: &Member| buffer_of(m) == p.input;
        let in_whole_packs = |m: &Member| {
            let widths = [m.convolution.c_out, pass.width(buffer_of(m))];
            pass.launches.can_add((&p.h, &p.w), widths)
        };
        let mut poolings = pass.stages.iter().flat_map(|s| &s.pools);
        let is_pooled = poolings.any(|&o| pass.graph.operations[o].output() == p.input);
        let mut writers = pass.stages.iter().filter(|s| s.members().any(writes));
        let all_can = |stage: &Stage| {
            let mut members = stage.members();
            members.all(|m| in_whole_packs(m) && (!writes(m) || pass.kind(m) == Kind::Bias))
        };
        Ok(p.input != 0 && !is_pooled && writers.all(all_can))
    }

    /// Gives back the maps, with their gradients, that the stage of this index was the first to write: nobody before it has,
    /// and all their readers come after it.
    fn give_back_what_was_written(&mut self, index: usize) {
        for (node, uses) in self.uses.iter().enumerate() {
            if uses.first_write == Some(index) {
                (self.kept.nodes[node], self.gradients[node]) = (None, None);
            }
        }
    }

    fn join_biases(&mut self) -> Result<()> {
        let (sums, members): (Vec<_>, Vec<_>) = self.of_biases.drain(..).unzip();
        for (joined, members) in self.pass.launches.join(sums)?.into_iter().zip(members) {
            let channels: u32 = members.iter().map(|(_, segment)| segment.channels).sum();
            let joined = tensor(joined, (1, channels as usize));
            for (number, segment) in members {
                self.d_follows[number] = vec![row_of(&joined, 0, &segment)?];
            }
        }
        Ok(())
    }

    /// The gradients of weights under Candle's shapes, and of what follows each.
    fn parameter_gradients(self) -> Result<Vec<Option<Tensor>>> {
        let pass = self.pass;
        let parameters = &pass.op.parameters;
        let members = || pass.members().filter(|(_, unit, _)| unit.trains);
        let elements = |m: &Member| parameters[m.convolution.number][0].elem_count();
        let planes = members().map(|(_, _, m)| elements(m)).sum();
        let planes = pass.launches.room_of(DType::F32, planes)?;
        let mut weights = Vec::new();
        let mut first = 0;
        for (part, unit, member) in members() {
            weights.push(Weight {
                planes: pass.launches.at(&planes, first)?,
                ..pass.weight(unit, member, map_of(&self.d_weights, part)?)?
            });
            first += elements(member);
        }
        pass.launches.weights(&weights, WeightLayout::Planes)?;
        let planes = tensor(planes, first.max(1));
        let mut of_numbers: Vec<Option<Tensor>> = vec![None; parameters.len()];
        let mut first = 0;
        for (_, _, member) in members() {
            let number = member.convolution.number;
            let weight = &parameters[number][0];
            let gradient = planes.narrow(0, first, weight.elem_count())?;
            of_numbers[number] = Some(gradient.reshape(weight.shape())?);
            first += weight.elem_count();
        }
        let mut all = Vec::with_capacity(pass.op.receivers.len());
        let of_convolutions = of_numbers.into_iter().zip(self.d_follows);
        for ((weight, follows), parameters) in of_convolutions.zip(parameters) {
            let trains = weight.is_some();
            all.push(weight);
            let follows = follows.into_iter().map(|d| trains.then_some(d));
            let follows = follows.chain(std::iter::repeat(None));
            all.extend(follows.take(parameters.len() - 1));
        }
        Ok(all)
    }
}
