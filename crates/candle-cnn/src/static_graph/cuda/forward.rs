//! The forward pass, stage by stage.

use candle_core::{CudaStorage, Result};

use super::launches::Kind;
use super::pass::{
    Chunk, GraphPass, Kept, KeptStage, Maps, Task, Uses, all_channels, map_of, none, row_of,
};
use crate::batch_norm::BatchStatistics;
use crate::conv2d::Pass;
use crate::cuda::lanes::side_by_side;
use crate::cuda::launch::{Operand, tensor};
use crate::static_graph::stages::Stage;

/// What a forward pass leaves.
pub(super) struct Output {
    /// (N, C).
    pub(super) features: CudaStorage,
    /// The batch's statistics of each convolution.
    pub(super) statistics: Vec<Option<BatchStatistics>>,
    /// What the backward pass needs, where there is one.
    pub(super) kept: Option<Kept>,
}

/// A forward pass under way.
pub(super) struct Forward<'a> {
    pass: &'a GraphPass<'a>,
    /// Whether a backward pass follows.
    keeps: bool,
    uses: Vec<Uses>,
    /// Whether the backward pass reads the map of each node.
    read_again: Vec<bool>,
    statistics: Vec<Option<BatchStatistics>>,
    kept: Kept,
}

impl<'a> Forward<'a> {
    pub(super) fn new(pass: &'a GraphPass<'a>) -> Self {
        Self {
            pass,
            keeps: pass.op.tracks,
            uses: pass.uses(),
            read_again: pass.read_by_weight_gradients(),
            statistics: vec![None; pass.op.parameters.len()],
            kept: Kept {
                nodes: none(pass.graph.nodes.len()),
                stages: Vec::new(),
                winners: none(pass.graph.operations.len()),
                weights: none(pass.parts.len()),
            },
        }
    }

    pub(super) fn run(mut self, images: Operand) -> Result<Output> {
        let pass = self.pass;
        let (planes, width) = (pass.planes(), pass.width(0));
        self.kept.nodes[0] = Some(pass.launches.pixels_of(images, planes, width)?);
        for (index, stage) in pass.stages.iter().enumerate() {
            self.lay_weights(stage)?;
            let raws = self.convolve_and_pool(stage)?;
            let kept = self.follow(stage, raws)?;
            if self.keeps {
                self.kept.stages.push(kept);
            }
            self.give_back(index);
        }
        let output = pass.graph.output;
        let features = pass
            .launches
            .average(map_of(&self.kept.nodes, output)?, pass.sizes(output))?;
        if !self.read_again[output] {
            self.kept.nodes[output] = None;
        }
        Ok(Output {
            features,
            statistics: self.statistics,
            kept: self.keeps.then_some(self.kept),
        })
    }

    /// Lays out the weights of a stage unless they are. A backward pass needs all of them; without it, each part is there
    /// for its stages alone.
    fn lay_weights(&mut self, stage: &Stage) -> Result<()> {
        let weights = &mut self.kept.weights;
        if stage.units.is_empty() || weights[stage.part].is_some() {
            return Ok(());
        }
        if self.keeps {
            return self.pass.lay_weights(weights, |_| true);
        }
        *weights = none(weights.len());
        self.pass.lay_weights(weights, |part| part == stage.part)
    }

    /// The poolings of a stage, and the sums of each unit's convolution.
    fn convolve_and_pool(&mut self, stage: &Stage) -> Result<Maps> {
        let pass = self.pass;
        let mut raws = Vec::with_capacity(stage.units.len());
        for unit in &stage.units {
            raws.push(Some(pass.room(pass.rows(unit) * unit.c_out)?));
            for member in &unit.members {
                let buffer = pass.graph.place(member.convolution.output).0;
                if self.kept.nodes[buffer].is_none() {
                    self.kept.nodes[buffer] = Some(pass.room(pass.elements(buffer))?);
                }
            }
        }
        let (nodes, weights) = (&self.kept.nodes, &self.kept.weights);
        let convolutions: Vec<Task> = (0..stage.units.len())
            .map(|unit| Task {
                pass: Pass::Forward,
                unit,
                adds: false,
            })
            .collect();
        let convolve = |lane, task: &Task| {
            let x = map_of(nodes, stage.units[task.unit].shape().input)?;
            let operands = [x, map_of(weights, stage.part)?, map_of(&raws, task.unit)?];
            pass.convolve(lane, stage, task, operands)
        };
        let mut pooled = Vec::with_capacity(stage.pools.len());
        let mut pool = || {
            for &operation in &stage.pools {
                let p = pass.pool(operation)?;
                let of = (pass.batch, pass.graph.nodes[p.input].channels);
                let x = map_of(nodes, p.input)?;
                pooled.push(pass.launches.max_pool(x, (&p.h, &p.w), of, self.keeps)?);
            }
            Ok(())
        };
        side_by_side(
            &pass.launches.device,
            &convolutions,
            convolve,
            (!stage.pools.is_empty()).then_some(&mut pool),
        )?;
        for (&operation, (y, won)) in stage.pools.iter().zip(pooled) {
            self.kept.nodes[pass.pool(operation)?.output] = Some(y);
            self.kept.winners[operation] = won;
        }
        Ok(raws)
    }

    /// What follows the convolutions of a stage, from their sums into the maps.
    fn follow(&mut self, stage: &Stage, raws: Maps) -> Result<KeptStage> {
        let mut kept = KeptStage {
            raws,
            ..KeptStage::default()
        };
        for chunk in self.pass.chunks(stage) {
            self.follow_chunk(stage, &chunk, &mut kept)?;
        }
        for (raw, unit) in kept.raws.iter_mut().zip(&stage.units) {
            // Only batch norms look back at what they normalised.
            let is_normalised = |m| self.pass.kind(m) == Kind::Batch;
            if !unit.members.iter().any(is_normalised) {
                *raw = None;
            }
        }
        Ok(kept)
    }

    fn follow_chunk(&mut self, stage: &Stage, chunk: &Chunk, kept: &mut KeptStage) -> Result<()> {
        let pass = self.pass;
        let mut segments = pass.segments(stage, chunk, &kept.raws, &self.kept.nodes)?;
        let mut is_normalised = false;
        let mut moments = None;
        if chunk.kind == Kind::Batch {
            let (joined, is_done) = pass.launches.moments(&segments, chunk.rows)?;
            let joined = tensor(joined, (3, all_channels(&segments)));
            pass.point_to(&joined, &mut segments)?;
            for (segment, member) in segments.iter().zip(chunk.members(stage)) {
                self.statistics[member.convolution.number] = Some(BatchStatistics {
                    mean: row_of(&joined, 0, segment)?,
                    unbiased_variance: row_of(&joined, 2, segment)?,
                });
            }
            (moments, is_normalised) = (Some(joined), is_done);
        }
        // Batch norms look at what they normalised instead.
        let keeps_mask = self.keeps && chunk.kind == Kind::Bias;
        let mask = match is_normalised {
            true => None,
            false => pass.launches.finish(&segments, chunk.rows, keeps_mask)?,
        };
        if keeps_mask && mask.is_none() {
            for member in chunk.members(stage) {
                let buffer = pass.graph.place(member.convolution.output).0;
                self.read_again[buffer] = true;
            }
        }
        kept.statistics.push(moments);
        kept.masks.push(mask);
        Ok(())
    }

    /// Gives back the maps that the stage of this index was the last to read.
    fn give_back(&mut self, index: usize) {
        for (node, map) in self.kept.nodes.iter_mut().enumerate() {
            let was_read =
                node != self.pass.graph.output && self.uses[node].last_read == Some(index);
            let is_kept = self.keeps && self.read_again[node];
            if was_read && !is_kept {
                *map = None;
            }
        }
    }
}
