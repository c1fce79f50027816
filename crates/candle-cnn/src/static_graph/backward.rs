//! The backward pass: group by group, from the last to the first.

use rayon::prelude::*;

use super::builder::Operation;
use super::forward::Forward;
use super::group::{Branch, Group, GroupPass, OutputGradient};
use super::pass::{
    Maps, ParameterGradients, ParameterValues, Trains, give_back, give_back_gradient,
};
use super::plan::Network;
use crate::element::Element;
use crate::simd::{Accumulate, Isa};

/// The backward pass.
pub(super) struct Backward<'a, T: 'static> {
    forward: Forward<'a, T>,
    trainable: &'a [Trains],
    /// Whether the gradient of each buffer is needed.
    needed: Vec<bool>,
}

impl<'a, T: Element> Backward<'a, T> {
    pub(super) fn new(
        graph: &'a Network,
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
        mut maps: Maps<T>,
        values: &[ParameterValues<'_, T>],
        d_features: &[T],
    ) -> (Option<Vec<T>>, Vec<Option<Vec<T>>>) {
        let graph = self.forward.graph;
        let mut gradients: Vec<Option<Vec<T>>> = vec![None; graph.nodes.len()];
        let mut d_parameters: Vec<_> = values.iter().map(|_| None).collect();
        if self.needed[graph.output] {
            gradients[graph.output] = Some(self.spread(d_features));
        }
        for (position, operations) in graph.groups.iter().enumerate().rev() {
            if let Some(mut group) = self.group(operations, &mut gradients) {
                let pass = GroupPass {
                    forward: &self.forward,
                    maps: &maps,
                    values,
                };
                pass.run(&mut group, &mut d_parameters);
                gradients[group.input] = group.dx;
                for OutputGradient { buffer, dy } in group.outputs {
                    gradients[buffer] = Some(dy);
                }
            }
            self.release(position, &mut maps, &mut gradients);
        }
        give_back(graph, 0, maps.nodes[0].take());
        let d_images = gradients[0].as_deref().map(|d| self.planes(d));
        give_back_gradient(graph, 0, gradients[0].take());
        let d_parameters = d_parameters.into_iter().zip(values);
        let d_parameters = d_parameters.flat_map(|(d, values)| match d {
            Some(d) => ParameterGradients::into_list(d),
            None => vec![None; 1 + values.per_channel()],
        });
        (d_images, d_parameters.collect())
    }

    /// The operations of a group that have a gradient to take back, if any has, with the gradients that
    /// they work on: these are taken out of `gradients`.
    fn group(&self, operations: &[usize], gradients: &mut [Option<Vec<T>>]) -> Option<Group<T>> {
        let graph = self.forward.graph;
        let input = graph.source(operations[0]);
        let mut branches = Vec::with_capacity(operations.len());
        let mut outputs: Vec<OutputGradient<T>> = Vec::new();
        for &index in operations.iter().rev() {
            let operation = &graph.operations[index];
            let (buffer, channel) = graph.place(operation.output());
            let trains = match operation {
                Operation::Convolution(c) => Some(self.trainable[c.number]).filter(|t| t.any),
                Operation::MaxPool(_) => None,
            };
            if trains.is_none() && !self.needed[input] {
                continue;
            }
            if let Some(dy) = gradients[buffer].take() {
                outputs.push(OutputGradient { buffer, dy });
            }
            if let Some(output) = outputs.iter().position(|output| output.buffer == buffer) {
                branches.push(Branch {
                    index,
                    output,
                    channel,
                    trains,
                    dx: match gradients[input] {
                        _ if !self.needed[input] => None,
                        None if branches.is_empty() => Some(Accumulate::Begin),
                        _ => Some(Accumulate::Add),
                    },
                });
            }
        }
        if branches.is_empty() {
            return None;
        }
        let dx = self.needed[input].then(|| {
            let so_far = gradients[input].take();
            so_far.unwrap_or_else(|| self.take(input))
        });
        Some(Group {
            input,
            branches,
            outputs,
            dx,
        })
    }

    /// Gives back the buffers that nobody needs once the group at `position` is done.
    fn release(&self, position: usize, maps: &mut Maps<T>, gradients: &mut [Option<Vec<T>>]) {
        let graph = self.forward.graph;
        let earlier = &graph.groups[..position];
        for &index in &graph.groups[position] {
            let operation = &graph.operations[index];
            if let Operation::Convolution(c) = operation
                && let Some(kept) = maps.normalised[c.number].take()
            {
                let layout = graph.normalised_span(c).layout;
                graph.arenas.of().give_back(layout, kept.x);
            }
            let buffer = graph.place(operation.output()).0;
            let writes = |&o: &usize| graph.place(graph.operations[o].output()).0 == buffer;
            if !earlier.iter().flatten().any(writes) {
                give_back(graph, buffer, maps.nodes[buffer].take());
                give_back_gradient(graph, buffer, gradients[buffer].take());
            }
        }
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
}
