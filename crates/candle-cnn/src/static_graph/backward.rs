//! The backward pass: group by group, a few images at a time.

use rayon::prelude::*;

use super::builder::{Convolution, Operation};
use super::forward::Forward;
use super::norm::{self, Affine, GradientSpans, GradientSums, InputGradient, Span};
use super::pass::{
    After, Maps, Normalised, Numbers, Trains, give_back, give_back_gradient, max_pool_of, pays,
};
use super::plan::Inner;
use super::profile::{self, Times, Watch};
use super::way::{
    ConvolutionWay, Images, Mask, NormGradient, Prepared, PreparedWay, Sums, Way, images_at_once,
};
use super::{ALIGNMENT, winograd};
use crate::conv2d::PackedWeight;
use crate::element::Element;
use crate::simd::Isa;

/// The backward pass.
pub(super) struct Backward<'a, T: 'static> {
    forward: Forward<'a, T>,
    trainable: &'a [Trains],
    /// Whether the gradient of each buffer is needed.
    needed: Vec<bool>,
}

impl<'a, T: Element> Backward<'a, T> {
    pub(super) fn new(
        graph: &'a Inner,
        isa: Isa,
        batch: usize,
        needs_input: bool,
        trainable: &'a [Trains],
    ) -> Self {
        let any: Vec<bool> = trainable.iter().map(|trains| trains.any).collect();
        Self {
            forward: Forward::new(graph, isa, batch),
            trainable,
            needed: graph.needed(needs_input, &any),
        }
    }

    /// Gradients of the images, if they are needed, and of every parameter of
    /// the convolutions that train, in order, but for frozen weights.
    pub(super) fn run(
        &self,
        maps: Maps<T>,
        numbers: &[Numbers<'_, T>],
        d_features: &[T],
    ) -> (Option<Vec<T>>, Vec<Option<Vec<T>>>) {
        let graph = self.forward.graph;
        let Maps {
            nodes: mut maps,
            mut normalised,
        } = maps;
        let mut gradients: Vec<Option<Vec<T>>> = vec![None; graph.nodes.len()];
        let mut d_numbers: Vec<Option<Vec<Vec<T>>>> = vec![None; numbers.len()];
        if self.needed[graph.output] {
            gradients[graph.output] = Some(self.spread(d_features));
        }
        for (position, group) in graph.groups.iter().enumerate().rev() {
            let input = graph.source(group[0]);
            let mut branches = Vec::with_capacity(group.len());
            let mut outputs: Vec<(usize, Vec<T>)> = Vec::new();
            for &index in group.iter().rev() {
                let operation = &graph.operations[index];
                let (buffer, channel) = graph.place(operation.output());
                let trains = match operation {
                    Operation::Convolution(c) => Some(self.trainable[c.number]),
                    Operation::MaxPool(_) => None,
                };
                let trains = trains.filter(|trains| trains.any);
                if trains.is_none() && !self.needed[input] {
                    continue;
                }
                outputs.extend(gradients[buffer].take().map(|dy| (buffer, dy)));
                if let Some(dy) = outputs.iter().position(|(of, _)| *of == buffer) {
                    branches.push(Branch {
                        index,
                        buffer,
                        channel,
                        dy,
                        trains,
                    });
                }
            }
            if !branches.is_empty() {
                // What has been added up so far, or a buffer of anything.
                let dx = self.needed[input].then(|| {
                    let so_far = gradients[input].take();
                    let is_first = so_far.is_none();
                    (so_far.unwrap_or_else(|| self.take(input)), is_first)
                });
                let read = Read {
                    x: maps[input].as_deref().unwrap_or_default(),
                    maps: &maps,
                    normalised: &normalised,
                    numbers,
                };
                gradients[input] =
                    self.branches(&read, (&branches, &mut outputs), dx, &mut d_numbers);
                for (buffer, dy) in outputs {
                    gradients[buffer] = Some(dy);
                }
            }
            let earlier = &graph.groups[..position];
            for &index in group {
                let operation = &graph.operations[index];
                if let Operation::Convolution(c) = operation
                    && let Some(kept) = normalised[c.number].take()
                {
                    let layout = graph.normalised_span(c).layout;
                    graph.arenas.of().give_back(layout, kept.x);
                }
                let buffer = graph.place(operation.output()).0;
                let writes = |&o: &usize| graph.place(graph.operations[o].output()).0 == buffer;
                if !earlier.iter().flatten().any(writes) {
                    give_back(graph, buffer, maps[buffer].take());
                    give_back_gradient(graph, buffer, gradients[buffer].take());
                }
            }
        }
        give_back(graph, 0, maps[0].take());
        let d_images = gradients[0].take().map(|gradient| {
            let planes = self.planes(&gradient);
            give_back_gradient(graph, 0, Some(gradient));
            planes
        });
        let d_parameters = d_numbers.into_iter().zip(numbers);
        let d_parameters = d_parameters.flat_map(|(d, numbers)| match d {
            Some(d) => d
                .into_iter()
                .map(|d| (!d.is_empty()).then_some(d))
                .collect(),
            None => vec![None; 1 + numbers.per_channel()],
        });
        (d_images, d_parameters.collect())
    }

    fn take(&self, buffer: usize) -> Vec<T> {
        let layout = self.forward.graph.gradient_layout(buffer);
        self.forward.graph.arenas.take(layout, self.forward.batch)
    }

    /// The gradient of the global average: to every pixel its share.
    fn spread(&self, d_features: &[T]) -> Vec<T> {
        let graph = self.forward.graph;
        let channels = graph.nodes[graph.output].channels;
        let layout = graph.gradient_layout(graph.output);
        let (height, width) = layout.size;
        let scale = T::real(1.0 / (height * width) as f64);
        let mut gradient = self.take(graph.output);
        if channels > 0 {
            gradient
                .par_chunks_mut(layout.image())
                .zip(d_features.par_chunks(channels))
                .for_each(|(gradient, d_features)| {
                    for h in 0..height {
                        for w in 0..width {
                            let pixel = &mut gradient[layout.at(h, w)..][..channels];
                            for (g, &d) in pixel.iter_mut().zip(d_features) {
                                *g = d * scale;
                            }
                        }
                    }
                });
        }
        gradient
    }

    /// Pixels of channels to planes.
    fn planes(&self, gradient: &[T]) -> Vec<T> {
        let map = &self.forward.graph.nodes[0];
        let layout = self.forward.graph.gradient_layout(0);
        let (height, width) = map.size;
        let plane = height * width;
        let mut planes = vec![T::ZERO; self.forward.batch * map.channels * plane];
        if planes.is_empty() {
            return planes;
        }
        planes
            .par_chunks_mut(map.channels * plane)
            .zip(gradient.par_chunks(layout.image()))
            .for_each(|(planes, gradient)| {
                for (at, value) in planes.iter_mut().enumerate() {
                    let (c, pixel) = (at / plane, at % plane);
                    *value = gradient[layout.at(pixel / width, pixel % width) + c];
                }
            });
        planes
    }

    /// Takes operations that read the same map back to it, a few images at a
    /// time, which are then in the cache for all of them: each adds to `dx` and
    /// leaves the gradients of its parameters. `outputs` are the gradients of the buffers that
    /// they write, and which.
    fn branches(
        &self,
        read: &Read<'_, T>,
        (branches, outputs): (&[Branch], &mut [(usize, Vec<T>)]),
        dx: Option<(Vec<T>, bool)>,
        d_numbers: &mut [Option<Vec<Vec<T>>>],
    ) -> Option<Vec<T>> {
        let Forward {
            graph, isa, batch, ..
        } = self.forward;
        let arenas = &graph.arenas;
        let (mut dx, mut is_first) = match dx {
            Some((dx, is_first)) => (Some(dx), is_first),
            None => (None, true),
        };
        let mut prepared = Vec::with_capacity(branches.len());
        for branch in branches {
            let watch = Watch::start();
            let way = match &graph.operations[branch.index] {
                Operation::Convolution(c) => {
                    if let Some(trains) = branch.trains {
                        d_numbers[c.number] = Some(read.numbers[c.number].gradients(c, trains));
                    }
                    let way = self.prepare(
                        c,
                        read,
                        (branch, &mut outputs[branch.dy].1),
                        (dx.is_some(), is_first),
                        d_numbers[c.number].as_mut(),
                    );
                    PreparedWay::Convolution(Box::new(way))
                }
                Operation::MaxPool(p) => PreparedWay::MaxPool {
                    pool: Box::new(max_pool_of(graph, p)),
                    is_first,
                },
            };
            is_first = false;
            prepared.push((way, watch.elapsed()));
        }
        let ways: Vec<Way<'_, T>> = prepared
            .iter()
            .map(|(way, _)| match way {
                PreparedWay::Convolution(prepared) => Way::Convolution(Box::new(ConvolutionWay {
                    prepared,
                    input: prepared.input_pass(&self.forward),
                    weight: prepared
                        .trains_weight
                        .then(|| prepared.weight_pass(&self.forward)),
                })),
                PreparedWay::MaxPool { pool, is_first } => Way::MaxPool {
                    pool,
                    is_first: *is_first,
                },
            })
            .collect();

        // One part per thread, each a run of whole images; their sums are
        // added up in this order.
        let threads = rayon::current_num_threads().clamp(1, batch.max(1));
        let per_part = batch.div_ceil(threads).max(1);
        let images_at_once = images_at_once(batch, &ways);
        let input = graph.source(branches[0].index);
        let (x_image, dx_image) = (
            graph.layout(input).image(),
            graph.gradient_layout(input).image(),
        );
        let mut dx_parts = dx
            .as_deref_mut()
            .map(|dx| dx[..batch * dx_image].chunks_mut(per_part * dx_image));
        let mut dy_parts: Vec<_> = outputs
            .iter_mut()
            .map(|(buffer, dy)| {
                let image = graph.gradient_layout(*buffer).image();
                dy[..batch * image].chunks_mut(per_part * image)
            })
            .collect();
        let parts: Vec<_> = (0..batch)
            .step_by(per_part)
            .map(|first| {
                let dys = dy_parts.iter_mut();
                let dys: Vec<&mut [T]> = dys.map(|part| part.next().unwrap_or_default()).collect();
                let dx = dx_parts.as_mut().and_then(Iterator::next);
                (first, dys, dx)
            })
            .collect();
        let sums: Vec<Vec<Sums<T>>> = parts
            .into_par_iter()
            .map(|(part, mut dys, mut dx)| {
                let mut sums: Vec<Sums<T>> = ways.iter().map(|way| way.sums(graph)).collect();
                let mut lent = arenas.lend();
                let last = batch.min(part + per_part);
                for first in (part..last).step_by(images_at_once) {
                    let range = first..last.min(first + images_at_once);
                    let x = &read.x[first * x_image..range.end * x_image];
                    let within = first - part..range.end - part;
                    for ((way, branch), sums) in ways.iter().zip(branches).zip(&mut sums) {
                        let dy = &mut *dys[branch.dy];
                        let image = dy.len() / (last - part);
                        let dx = dx.as_deref_mut();
                        let images = Images {
                            range: range.clone(),
                            x,
                            dy: &mut dy[within.start * image..within.end * image],
                            dx: dx
                                .map(|dx| &mut dx[within.start * dx_image..within.end * dx_image]),
                        };
                        way.run(isa, images, (sums, first == part), &mut lent.scratch);
                    }
                }
                sums
            })
            .collect();

        let mut sums: Vec<_> = sums.into_iter().map(Vec::into_iter).collect();
        for ((branch, way), (_, preparation)) in branches.iter().zip(&ways).zip(&prepared) {
            let parts: Vec<Sums<T>> = sums.iter_mut().filter_map(Iterator::next).collect();
            let mut times = Times::mean(parts.iter().map(|part| part.times));
            let pooling = Times::mean(parts.iter().map(|part| part.pooling));
            times.other += *preparation;
            let watch = Watch::start();
            if let Way::Convolution(way) = way
                && branch.trains.is_some()
                && let Some(d) = &mut d_numbers[way.prepared.c.number]
            {
                if way.prepared.norm.is_none() {
                    for part in &parts {
                        for (to, &from) in d[1].iter_mut().zip(&part.bias) {
                            *to += from;
                        }
                    }
                }
                times.other += watch.elapsed();
                if let Some(pass) = &way.weight {
                    let watch = Watch::start();
                    pass.unpack(&parts, &mut d[0]);
                    times.weight += watch.elapsed();
                }
            }
            for part in parts {
                arenas.of::<T>().give_back_flat(part.weight);
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
        drop(ways);
        for (way, _) in prepared {
            if let PreparedWay::Convolution(prepared) = way {
                let packed = [prepared.packed, prepared.transformed];
                for packed in packed.into_iter().flatten() {
                    arenas.of::<T>().give_back_flat(packed.data);
                }
            }
        }
        dx
    }

    /// What of a convolution's way back is done for the whole batch at once.
    fn prepare<'b>(
        &self,
        c: &Convolution,
        read: &Read<'b, T>,
        (branch, dy): (&Branch, &mut [T]),
        (needs_input, is_first): (bool, bool),
        d_numbers: Option<&mut Vec<Vec<T>>>,
    ) -> Prepared<'b, T> {
        let Forward {
            graph,
            isa,
            kernels,
            batch,
        } = self.forward;
        let mask = Mask {
            y: graph.layout(branch.buffer),
            dy: graph.gradient_layout(branch.buffer),
            channel: branch.channel,
            channels: c.c_out,
        };
        let numbers = &read.numbers[c.number];
        let y = read.maps[branch.buffer].as_deref().unwrap_or_default();
        let kept = read.normalised[c.number].as_ref();
        let norm = self.batch_norm(c, (numbers, kept), y, &mask, dy, d_numbers);
        let taps = c.kernel * c.kernel;
        let arenas = &graph.arenas;
        let len = c.c_in.next_multiple_of(kernels.lanes) * taps * c.c_out;
        let packed = needs_input.then(|| {
            let shape = (taps, c.c_out, c.c_in);
            let memory = arenas.take_flat(len);
            PackedWeight::turned(numbers.weight, shape, kernels, memory)
        });
        let size = graph.gradient_layout(c.input).size;
        let transformed = packed
            .as_ref()
            .filter(|_| pays::<T>(c, size, batch))
            .map(|packed| {
                let memory = arenas.take_flat(4 * len);
                winograd::transform_weight(isa, packed, memory)
            });
        let pool = graph.pooled[branch.index].map(|index| &graph.operations[index]);
        Prepared {
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
            is_first,
            trains_weight: branch.trains.is_some_and(|trains| trains.weight),
        }
    }

    /// The first half of the way back through a batch norm: masks `dy` by the
    /// ReLU, and sums it up over the whole batch.
    fn batch_norm<'b>(
        &self,
        c: &Convolution,
        (numbers, kept): (&Numbers<'_, T>, Option<&'b Normalised<T>>),
        y: &[T],
        mask: &Mask,
        dy: &mut [T],
        d_parameters: Option<&mut Vec<Vec<T>>>,
    ) -> Option<NormGradient<'b, T>> {
        let (&After::BatchNorm { weight, bias, eps }, Some(kept)) = (&numbers.after, kept) else {
            return None;
        };
        let Forward {
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
        let threads = rayon::current_num_threads().clamp(1, batch.max(1));
        let part = batch.div_ceil(threads).max(1);
        let parts: Vec<GradientSums> = dy[..batch * mask.dy.image()]
            .par_chunks_mut(part * mask.dy.image())
            .zip(kept.x.par_chunks(part * x_image))
            .zip(y.par_chunks(part * y_image))
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
            let (d_weight, d_bias) = norm::parameter_gradients(&kept.moments, &sums, eps);
            d_parameters[1] = d_weight;
            d_parameters[2] = d_bias;
        }
        let (height, width) = graph.nodes[c.output].size;
        let count = batch * height * width;
        Some(NormGradient {
            gradient: InputGradient::new(affine, &kept.moments, &sums, eps, count),
            spans,
            x: &kept.x,
        })
    }
}

/// What the way back through some operations with the same input reads.
struct Read<'a, T> {
    x: &'a [T],
    maps: &'a [Option<Vec<T>>],
    normalised: &'a [Option<Normalised<T>>],
    numbers: &'a [Numbers<'a, T>],
}

/// One of several operations that read the same input.
struct Branch {
    index: usize,
    /// The buffer that holds the operation's output.
    buffer: usize,
    channel: usize,
    /// The number of the buffer's gradient among those of the group.
    dy: usize,
    /// Which parameters train, if any of the operation's do.
    trains: Option<Trains>,
}
