//! The backward pass through a group of operations, which read the same map: a few images at a time.

use std::ops::Range;

use rayon::prelude::*;

use super::builder::{Convolution, Operation};
use super::forward::Forward;
use super::norm::{self, Affine, GradientSpans, GradientSums, InputGradient, Span};
use super::operation_backward::{
    Images, Mask, NormGradient, OperationBackward, PreparedConvolution, PreparedOperation, Sums,
    images_at_once,
};
use super::pass::{
    After, AfterGradients, Maps, ParameterGradients, ParameterValues, Trains, max_pool_of, pays,
};
use super::profile::{self, Times, Watch};
use super::winograd;
use crate::conv2d::PackedWeight;
use crate::element::Element;
use crate::maps::ALIGNMENT;
use crate::simd::Accumulate;

/// The backward pass through a group, and what it reads.
pub(super) struct GroupPass<'a, T: 'static> {
    pub(super) forward: &'a Forward<'a, T>,
    pub(super) maps: &'a Maps<T>,
    pub(super) values: &'a [ParameterValues<'a, T>],
}

/// Operations that read the same map, and the gradients that they read and write.
pub(super) struct Group<T> {
    /// The buffer that holds the map.
    pub(super) input: usize,
    /// The operations, in the order in which they add to `dx`.
    pub(super) branches: Vec<Branch>,
    pub(super) outputs: Vec<OutputGradient<T>>,
    /// The gradient of the map, if it is needed: what has been added up so far, or memory of anything.
    pub(super) dx: Option<Vec<T>>,
}

/// One of the operations of a group.
pub(super) struct Branch {
    pub(super) index: usize,
    /// Which of [`Group::outputs`] is the gradient of its output.
    pub(super) output: usize,
    /// The first of its channels there.
    pub(super) channel: usize,
    /// Which parameters train, if any of the operation's do.
    pub(super) trains: Option<Trains>,
    /// What it does about the gradient of its input, unless nobody needs that.
    pub(super) dx: Option<Accumulate>,
}

/// The gradient of a buffer that operations of a group write.
pub(super) struct OutputGradient<T> {
    pub(super) buffer: usize,
    pub(super) dy: Vec<T>,
}

impl<'a, T: Element> GroupPass<'a, T> {
    /// Takes operations that read the same map back to it, a few images at a
    /// time, which are then in the cache for all of them: each adds to `dx` and
    /// leaves the gradients of its parameters.
    pub(super) fn run(
        &self,
        group: &mut Group<T>,
        d_parameters: &mut [Option<ParameterGradients<T>>],
    ) {
        let outputs = &mut group.outputs;
        let prepared: Vec<PreparedOperation<'_, T>> = group
            .branches
            .iter()
            .map(|branch| self.prepare(branch, &mut outputs[branch.output], d_parameters))
            .collect();
        let operations: Vec<OperationBackward<'_, T>> = prepared
            .iter()
            .map(|operation| operation.backward(self.forward))
            .collect();
        let sums = self.run_operations(&operations, group);
        self.add_up(&operations, &group.branches, sums, d_parameters);
        drop(operations);
        for operation in prepared {
            operation.give_back(&self.forward.graph.arenas);
        }
    }

    /// Does what an operation's backward pass does for the whole batch at once.
    fn prepare(
        &self,
        branch: &Branch,
        output: &mut OutputGradient<T>,
        d_parameters: &mut [Option<ParameterGradients<T>>],
    ) -> PreparedOperation<'a, T> {
        let graph = self.forward.graph;
        match &graph.operations[branch.index] {
            Operation::Convolution(c) => {
                let d_parameters = &mut d_parameters[c.number];
                let prepared = self.prepare_convolution(c, branch, output, d_parameters);
                PreparedOperation::Convolution(Box::new(prepared))
            }
            Operation::MaxPool(p) => PreparedOperation::MaxPool {
                pool: Box::new(max_pool_of(graph, p)),
                dx: branch.dx,
            },
        }
    }

    fn prepare_convolution(
        &self,
        c: &Convolution,
        branch: &Branch,
        output: &mut OutputGradient<T>,
        d_parameters: &mut Option<ParameterGradients<T>>,
    ) -> PreparedConvolution<'a, T> {
        let watch = Watch::start();
        let &Forward {
            graph,
            isa,
            kernels,
            batch,
        } = self.forward;
        let buffer = output.buffer;
        let values = &self.values[c.number];
        *d_parameters = branch.trains.map(|trains| values.gradients(c, trains));
        let mask = Mask {
            y: graph.layout(buffer),
            dy: graph.gradient_layout(buffer),
            channel: branch.channel,
            channels: c.c_out,
        };
        let y = self.maps.nodes[buffer].as_deref().unwrap_or_default();
        let norm = self.batch_norm(c, y, &mask, &mut output.dy, d_parameters.as_mut());
        let taps = c.kernel * c.kernel;
        let len = c.c_in.next_multiple_of(kernels.lanes) * taps * c.c_out;
        let packed = branch.dx.map(|_| {
            let shape = (taps, c.c_out, c.c_in);
            let memory = graph.arenas.take_flat(len);
            PackedWeight::turned(values.weight, shape, kernels, memory)
        });
        let size = graph.gradient_layout(c.input).size;
        let transformed = packed.as_ref().filter(|_| pays::<T>(c, size, batch));
        let transformed = transformed.map(|packed| {
            let memory = graph.arenas.take_flat(4 * len);
            winograd::transform_weight(isa, packed, memory)
        });
        let pool = graph.pooled[branch.index].map(|index| &graph.operations[index]);
        PreparedConvolution {
            c: *c,
            pool: pool.and_then(|operation| match operation {
                Operation::MaxPool(p) => Some(max_pool_of(graph, p)),
                Operation::Convolution(_) => None,
            }),
            mask,
            y,
            norm,
            packed,
            transformed,
            zeros: vec![T::ZERO; c.c_in.next_multiple_of(ALIGNMENT)],
            dx: branch.dx,
            trains_weight: branch.trains.is_some_and(|trains| trains.weight),
            time: watch.elapsed(),
        }
    }

    /// The first half of the backward pass through a batch norm: masks `dy` by the
    /// ReLU, and sums it up over the whole batch.
    fn batch_norm(
        &self,
        c: &Convolution,
        y: &[T],
        mask: &Mask,
        dy: &mut [T],
        d_parameters: Option<&mut ParameterGradients<T>>,
    ) -> Option<NormGradient<'a, T>> {
        let After::BatchNorm { weight, bias, eps } = self.values[c.number].after else {
            return None;
        };
        let kept = self.maps.normalised[c.number].as_ref()?;
        let &Forward {
            graph, isa, batch, ..
        } = self.forward;
        let span = |layout| Span {
            layout,
            channel: mask.channel,
            channels: c.c_out,
        };
        let spans = GradientSpans {
            x: graph.normalised_span(c),
            y: span(mask.y),
            dy: span(mask.dy),
        };
        let affine = Affine::new(&kept.moments, weight, bias, eps);
        let (x_image, y_image) = (spans.x.layout.image(), mask.y.image());
        let share = self.images_per_share();
        let parts: Vec<GradientSums> = dy[..batch * mask.dy.image()]
            .par_chunks_mut(share * mask.dy.image())
            .zip(kept.x.par_chunks(share * x_image))
            .zip(y.par_chunks(share * y_image))
            .map(|((dy, x), y)| {
                let mut sums = GradientSums::new(c.c_out);
                for ((dy, x), y) in dy
                    .chunks_exact_mut(mask.dy.image())
                    .zip(x.chunks_exact(x_image))
                    .zip(y.chunks_exact(y_image))
                {
                    norm::add_gradient(isa, &spans, &affine.mean, x, y, dy, &mut sums);
                }
                sums
            })
            .collect();
        let sums = GradientSums::join(parts, c.c_out);
        if let Some(d_parameters) = d_parameters {
            let (weight, bias) = norm::parameter_gradients(&kept.moments, &sums, eps);
            d_parameters.after = AfterGradients::BatchNorm { weight, bias };
        }
        let (height, width) = graph.nodes[c.output].size;
        let count = batch * height * width;
        Some(NormGradient {
            gradient: InputGradient::new(affine, &kept.moments, &sums, eps, count),
            spans,
            x: &kept.x,
        })
    }

    /// Runs the operations over the whole batch, each thread over its share of the images. Returns the sums of
    /// each share, operation by operation.
    fn run_operations(
        &self,
        operations: &[OperationBackward<'_, T>],
        group: &mut Group<T>,
    ) -> Vec<Vec<Sums<T>>> {
        let &Forward {
            graph, isa, batch, ..
        } = self.forward;
        let images_at_once = images_at_once(batch, operations);
        let branches = &group.branches;
        self.shares(group.input, &mut group.outputs, group.dx.as_deref_mut())
            .into_par_iter()
            .map(|mut share| {
                let mut sums: Vec<Sums<T>> = operations
                    .iter()
                    .map(|operation| operation.sums(graph))
                    .collect();
                let mut lent = graph.arenas.lend();
                let Range { start, end } = share.range;
                for first in (start..end).step_by(images_at_once) {
                    let range = first..end.min(first + images_at_once);
                    for ((operation, branch), sums) in
                        operations.iter().zip(branches).zip(&mut sums)
                    {
                        let images = share.images(range.clone(), branch.output);
                        operation.run(isa, images, sums, &mut lent.scratch);
                    }
                }
                sums
            })
            .collect()
    }

    /// One share per thread, each a run of whole images; their sums are added up in this order.
    fn shares<'s>(
        &'s self,
        input: usize,
        outputs: &'s mut [OutputGradient<T>],
        dx: Option<&'s mut [T]>,
    ) -> Vec<Share<'s, T>> {
        let (graph, batch) = (self.forward.graph, self.forward.batch);
        let per_share = self.images_per_share();
        let cut = |buffer: usize, gradient: &'s mut [T]| {
            let image = graph.gradient_layout(buffer).image();
            gradient[..batch * image].chunks_mut(per_share * image)
        };
        let mut dx = dx.map(|dx| cut(input, dx));
        let outputs = outputs.iter_mut();
        let mut dys: Vec<_> = outputs.map(|o| cut(o.buffer, &mut o.dy)).collect();
        let x = self.maps.nodes[input].as_deref().unwrap_or_default();
        let x_image = graph.layout(input).image();
        (0..batch)
            .step_by(per_share)
            .map(|first| {
                let range = first..batch.min(first + per_share);
                let dys = dys.iter_mut();
                Share {
                    x: &x[range.start * x_image..range.end * x_image],
                    dys: dys.map(|dy| dy.next().unwrap_or_default()).collect(),
                    dx: dx.as_mut().and_then(Iterator::next),
                    range,
                }
            })
            .collect()
    }

    fn images_per_share(&self) -> usize {
        let threads = rayon::current_num_threads();
        self.forward.batch.div_ceil(threads).max(1)
    }

    /// Adds the shares' sums up into the gradients of the parameters, and tells what each operation took.
    fn add_up(
        &self,
        operations: &[OperationBackward<'_, T>],
        branches: &[Branch],
        sums: Vec<Vec<Sums<T>>>,
        d_parameters: &mut [Option<ParameterGradients<T>>],
    ) {
        let graph = self.forward.graph;
        let mut sums: Vec<_> = sums.into_iter().map(Vec::into_iter).collect();
        let watch = Watch::start();
        for (operation, branch) in operations.iter().zip(branches) {
            let parts: Vec<Sums<T>> = sums.iter_mut().filter_map(Iterator::next).collect();
            let times = operation.add_up(&parts, d_parameters);
            let pooling = Times::mean(parts.iter().map(|part| part.pooling));
            for part in parts {
                graph.arenas.of::<T>().give_back_flat(part.weight);
            }
            let tell = |index: usize, times: &Times| {
                let cost = || self.forward.cost(&graph.operations[index]);
                profile::backward(graph, index, &watch, times, cost);
            };
            tell(branch.index, &times);
            if let Some(pool) = graph.pooled[branch.index] {
                tell(pool, &pooling);
            }
        }
    }
}

/// The images that one thread takes back, one after the other.
struct Share<'a, T> {
    /// Their numbers in the batch.
    range: Range<usize>,
    x: &'a [T],
    /// Their part of each of [`Group::outputs`].
    dys: Vec<&'a mut [T]>,
    dx: Option<&'a mut [T]>,
}

impl<T> Share<'_, T> {
    /// The images of `range`, for an operation whose output is of this number.
    fn images(&mut self, range: Range<usize>, output: usize) -> Images<'_, T> {
        let count = self.range.len();
        let (first, end) = (range.start - self.range.start, range.end - self.range.start);
        let within = |all: &[T]| all.len() / count * first..all.len() / count * end;
        let dy = &mut *self.dys[output];
        let dy_range = within(dy);
        Images {
            range,
            x: &self.x[within(self.x)],
            dy: &mut dy[dy_range],
            dx: self.dx.as_deref_mut().map(|dx| {
                let dx_range = within(dx);
                &mut dx[dx_range]
            }),
        }
    }
}
