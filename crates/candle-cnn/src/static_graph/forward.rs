//! The forward pass, in three ways: operation by operation, a few images per task; image by image;
//! or, for a few images, level by level, all operations that wait for the same ones sharing a loop.

use std::sync::Arc;
use std::time::Duration;

use rayon::prelude::*;

use super::builder::{Convolution, MaxPool, Operation};
use super::gather::{GatherPass, Start};
use super::norm::{self, Affine, Between, MomentSums, Span};
use super::packed::{Packed, Wanted};
use super::pass::{
    After, AnyPass, Maps, Normalised, ParameterValues, Scratch, give_back, max_pool_of, pays,
    start_values,
};
use super::plan::Network;
use super::profile::{self, Cost, Watch};
use crate::activation::Activation;
use crate::batch_norm::Moments;
use crate::conv2d::{PIXELS_PER_TASK, images_per_task};
use crate::element::Element;
use crate::maps::{MapLayout, Part};
use crate::max_pool2d::channels_last::{self, Pool};
use crate::simd::{Isa, Kernels};

/// What is left of a forward pass besides its features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// The maps, and what else the backward pass needs.
    ForBackward,
    Nothing,
}

/// What a forward pass yields.
pub(super) struct Output<T> {
    /// (N, C).
    pub(super) features: Vec<T>,
    /// Moments of the batch, of each convolution; empty where the batch's statistics play no part.
    pub(super) moments: Vec<Vec<Moments>>,
    pub(super) maps: Option<Maps<T>>,
}

/// The forward pass.
pub(super) struct Forward<'a, T: 'static> {
    pub(super) graph: &'a Network,
    pub(super) isa: Isa,
    pub(super) kernels: &'static Kernels<T>,
    pub(super) batch: usize,
}

impl<'a, T: Element> Forward<'a, T> {
    pub(super) fn new(graph: &'a Network, isa: Isa, batch: usize) -> Self {
        Self {
            graph,
            isa,
            kernels: T::kernels(isa),
            batch,
        }
    }

    /// Runs the graph, and keeps what the backward pass needs if asked to.
    pub(super) fn run(
        &self,
        images: &[T],
        values: &[ParameterValues<'_, T>],
        keep: Keep,
    ) -> Output<T> {
        let normalises = |n: &ParameterValues<'_, T>| matches!(n.after, After::BatchNorm { .. });
        if keep == Keep::ForBackward {
            self.graph.packed.clear();
        }
        if values.iter().any(normalises) {
            self.run_one_by_one(images, values, keep)
        } else if keep == Keep::ForBackward && self.batch >= rayon::current_num_threads() {
            self.run_image_by_image(images, values)
        } else {
            self.run_by_levels(images, values, keep)
        }
    }

    /// Operation by operation, since the statistics of a batch norm are of the whole batch.
    fn run_one_by_one(
        &self,
        images: &[T],
        values: &[ParameterValues<'_, T>],
        keep: Keep,
    ) -> Output<T> {
        let graph = self.graph;
        let kept = (keep == Keep::Nothing).then(|| self.packed(values, keep));
        let mut nodes: Vec<Option<Vec<T>>> = vec![None; graph.nodes.len()];
        let mut normalised: Vec<_> = values.iter().map(|_| None).collect();
        let mut moments = vec![Vec::new(); values.len()];
        nodes[0] = Some(self.images(images));
        for (index, operation) in graph.operations.iter().enumerate() {
            let watch = Watch::start();
            let (buffer, channel) = graph.place(operation.output());
            let mut y = nodes[buffer].take().unwrap_or_else(|| self.take(buffer));
            let x = nodes[operation.input()].as_deref().unwrap_or_default();
            match operation {
                Operation::Convolution(c) => {
                    let values = &values[c.number];
                    let packed = match &kept {
                        Some(kept) => kept[c.number].clone(),
                        None => self.pack(&self.wanted(c, values)),
                    };
                    let norm = self.convolution(c, x, (values, &packed), (&mut y, channel), keep);
                    self.release_packed(packed);
                    if let Some((x, found)) = norm {
                        moments[c.number].clone_from(&found);
                        normalised[c.number] = x.map(|x| Normalised { x, moments: found });
                    }
                }
                Operation::MaxPool(p) => self.max_pool(p, x, &mut y),
            }
            nodes[buffer] = Some(y);
            let time = watch.elapsed();
            profile::forward(graph, index, (&watch, time), || self.cost(operation));
            if keep == Keep::Nothing || graph.pooled[index].is_some() {
                let later = index + 1..graph.operations.len();
                self.release_read(&[index], later, &mut nodes);
            }
        }
        self.output(nodes, normalised, moments, keep)
    }

    /// The features of the last map, and the others for the backward pass if they are to be kept.
    fn output(
        &self,
        nodes: Vec<Option<Vec<T>>>,
        normalised: Vec<Option<Normalised<T>>>,
        moments: Vec<Vec<Moments>>,
        keep: Keep,
    ) -> Output<T> {
        let features = self.global_average(nodes[self.graph.output].as_deref().unwrap_or_default());
        let maps = match keep {
            Keep::ForBackward => Some(Maps { nodes, normalised }),
            Keep::Nothing => {
                for (node, map) in nodes.into_iter().enumerate() {
                    give_back(self.graph, node, map);
                }
                None
            }
        };
        Output {
            features,
            moments,
            maps,
        }
    }

    /// The forward pass where no operation needs another's result of the whole batch: all operations that wait for the same
    /// earlier ones share out their work at once, those that read the same images one after the other.
    fn run_by_levels(
        &self,
        images: &[T],
        values: &[ParameterValues<'_, T>],
        keep: Keep,
    ) -> Output<T> {
        let graph = self.graph;
        let packed = self.packed(values, keep);
        let starts = self.starts(values);
        let steps: Vec<ForwardStep<'_, T>> = (0..graph.operations.len())
            .map(|index| self.step(index, (&packed, &starts), Pooling::Apart))
            .collect();
        let mut nodes: Vec<Option<Vec<T>>> = vec![None; graph.nodes.len()];
        nodes[0] = Some(self.images(images));
        for (position, level) in graph.levels.iter().enumerate() {
            let watch = Watch::start();
            let times = self.run_level(level, &steps, &mut nodes);
            for &index in level.iter().filter(|_| watch.is_on()) {
                let of_operation = times.iter().filter(|(of, _)| *of == index);
                let time: Duration = of_operation.map(|(_, time)| *time).sum();
                let time = time / rayon::current_num_threads() as u32;
                let cost = || self.cost(&graph.operations[index]);
                profile::forward(graph, index, (&watch, time), cost);
            }
            let is_done = |&index: &usize| keep == Keep::Nothing || graph.pooled[index].is_some();
            let read: Vec<usize> = level.iter().copied().filter(is_done).collect();
            let later = graph.levels[position + 1..].iter().flatten().copied();
            self.release_read(&read, later, &mut nodes);
        }
        drop(steps);
        for packed in packed {
            self.release_packed(packed);
        }
        let none = || values.iter().map(|_| None).collect();
        self.output(nodes, none(), vec![Vec::new(); values.len()], keep)
    }

    /// Operations that do not wait for each other. Returns what each took, task by task.
    fn run_level(
        &self,
        level: &[usize],
        steps: &[ForwardStep<'_, T>],
        nodes: &mut [Option<Vec<T>>],
    ) -> Vec<(usize, Duration)> {
        let graph = self.graph;
        let mut outputs: Vec<Written<'_, T>> = Vec::new();
        for &index in level {
            let buffer = graph.place(graph.operations[index].output()).0;
            match outputs.iter_mut().find(|output| output.buffer == buffer) {
                Some(output) => output.writers.push(&steps[index]),
                None => outputs.push(Written {
                    buffer,
                    y: nodes[buffer].take().unwrap_or_else(|| self.take(buffer)),
                    writers: vec![&steps[index]],
                }),
            }
        }
        let mut tasks = Vec::new();
        for Written { buffer, y, writers } in &mut outputs {
            let parts = self.tasks((y, graph.layout(*buffer)), writers);
            tasks.extend(parts.into_iter().map(|part| (part, &*writers)));
        }
        // Tasks that read the same images or lines then come one after the other.
        tasks.sort_by_key(|((image, part, _), _)| (*image, part.lines.start));
        let maps = &*nodes;
        let times = tasks
            .into_par_iter()
            .map_init(
                || graph.arenas.lend(),
                |lent, ((image, part, y), writers)| {
                    let run = |step: &&ForwardStep<'_, T>| {
                        let input = graph.operations[step.index].input();
                        let x = maps[input].as_deref().unwrap_or_default();
                        let x = &x[image * graph.layout(input).image()..];
                        let x = &x[..part.images * graph.layout(input).image()];
                        let [pooling, convolution] =
                            step.run(self.isa, x, (y, &part), &mut lent.scratch);
                        (step.index, pooling + convolution)
                    };
                    writers.iter().map(run).collect::<Vec<_>>()
                },
            )
            .flatten_iter()
            .collect();
        for output in outputs {
            nodes[output.buffer] = Some(output.y);
        }
        times
    }

    /// The forward pass where no operation needs another's result of the whole batch and all maps
    /// are kept: each thread takes its images through the network without waiting for the others.
    fn run_image_by_image(&self, images: &[T], values: &[ParameterValues<'_, T>]) -> Output<T> {
        let graph = self.graph;
        let mut nodes: Vec<Option<Vec<T>>> = vec![None; graph.nodes.len()];
        for &index in graph.groups.iter().flatten() {
            let buffer = graph.place(graph.operations[index].output()).0;
            nodes[buffer].get_or_insert_with(|| self.take(buffer));
        }
        nodes[0] = Some(self.images(images));
        let packed = self.packed(values, Keep::ForBackward);
        let starts = self.starts(values);
        let steps: Vec<ForwardStep<'_, T>> = (0..graph.operations.len())
            .filter(|&index| !graph.pooled.contains(&Some(index)))
            .map(|index| self.step(index, (&packed, &starts), Pooling::Within))
            .collect();

        let per_part = self.batch.div_ceil(rayon::current_num_threads()).max(1);
        let mut maps: Vec<_> = nodes
            .iter_mut()
            .enumerate()
            .map(|(node, map)| {
                let image = graph.layout(node).image();
                let map = map.as_deref_mut()?;
                Some((
                    image,
                    map[..self.batch * image].chunks_mut(per_part * image),
                ))
            })
            .collect();
        let parts: Vec<Vec<Option<ImageMaps<'_, T>>>> = (0..self.batch)
            .step_by(per_part)
            .map(|_| {
                let part = maps.iter_mut().map(|map| {
                    let (image, chunks) = map.as_mut()?;
                    Some((*image, chunks.next()?))
                });
                part.collect()
            })
            .collect();
        let times: Vec<Vec<Duration>> = parts
            .into_par_iter()
            .map(|mut maps| {
                let mut lent = graph.arenas.lend();
                let mut times = vec![Duration::ZERO; graph.operations.len()];
                for step in &steps {
                    let output = graph.operations[step.index].output();
                    let buffer = graph.place(output).0;
                    let y = maps[buffer].take();
                    let x = &maps[graph.source(step.index)];
                    if let (Some((x_image, x)), Some((y_image, y))) = (x, y) {
                        let size = graph.nodes[output].size;
                        let images = images_per_task(PIXELS_PER_TASK, self.batch, size.0 * size.1);
                        for (x, y) in x
                            .chunks(images * x_image)
                            .zip(y.chunks_mut(images * y_image))
                        {
                            let part = Part::whole(graph.layout(buffer), y.len());
                            let [pooling, convolution] =
                                step.run(self.isa, x, (y, &part), &mut lent.scratch);
                            times[graph.pooled[step.index].unwrap_or(step.index)] += pooling;
                            times[step.index] += convolution;
                        }
                        maps[buffer] = Some((y_image, y));
                    }
                }
                times
            })
            .collect();
        drop(steps);
        let watch = Watch::start();
        for (index, operation) in graph.operations.iter().enumerate() {
            let time: Duration = times.iter().map(|part| part[index]).sum();
            let time = time / times.len().max(1) as u32;
            profile::forward(graph, index, (&watch, time), || self.cost(operation));
        }
        for packed in packed {
            self.release_packed(packed);
        }
        let none = || values.iter().map(|_| None).collect();
        let moments = vec![Vec::new(); values.len()];
        self.output(nodes, none(), moments, Keep::ForBackward)
    }

    /// What runs operation `index` on some images: with the pooling that is part of it, or on what that has left.
    fn step<'p>(
        &self,
        index: usize,
        (packed, starts): (&'p [Arc<Packed<T>>], &'p [Vec<T>]),
        pooling: Pooling,
    ) -> ForwardStep<'p, T> {
        let graph = self.graph;
        let pool_of = |index: usize| match &graph.operations[index] {
            Operation::MaxPool(p) => Some(max_pool_of(graph, p)),
            Operation::Convolution(_) => None,
        };
        let (pool, convolution) = match &graph.operations[index] {
            Operation::Convolution(c) => {
                let (buffer, channel) = graph.place(c.output);
                let span = Span {
                    layout: graph.layout(buffer),
                    channel,
                    channels: c.c_out,
                };
                let pooling = graph.pooled[index].filter(|_| pooling == Pooling::Within);
                let values = (&*packed[c.number], starts[c.number].as_slice());
                (
                    pooling.and_then(pool_of),
                    Some(self.pass(c, values, span, Activation::Relu)),
                )
            }
            Operation::MaxPool(_) => (pool_of(index), None),
        };
        ForwardStep {
            index,
            pool,
            convolution,
        }
    }

    /// The weights of all convolutions as the tiles read them; kept for the next time unless a gradient is wanted.
    fn packed(&self, values: &[ParameterValues<'_, T>], keep: Keep) -> Vec<Arc<Packed<T>>> {
        let convolutions = self.graph.convolutions();
        let wanted = convolutions.iter().zip(values);
        let wanted: Vec<_> = wanted.map(|(c, n)| self.wanted(c, n)).collect();
        match keep {
            Keep::ForBackward => wanted.iter().map(|wanted| self.pack(wanted)).collect(),
            Keep::Nothing => self.graph.packed.all(&wanted),
        }
    }

    /// A weight as the tiles read it, for this time.
    fn pack(&self, wanted: &Wanted<'_, T>) -> Arc<Packed<T>> {
        let arenas = &self.graph.arenas;
        Arc::new(wanted.pack(|len| arenas.take_flat(len)))
    }

    /// What the sums of each convolution start from.
    fn starts(&self, values: &[ParameterValues<'_, T>]) -> Vec<Vec<T>> {
        let convolutions = self.graph.convolutions();
        let with = convolutions.iter().zip(values);
        with.map(|(c, values)| start_values(c, values)).collect()
    }

    pub(super) fn cost(&self, operation: &Operation) -> Cost {
        Cost::of(self.graph, operation, self.batch, size_of::<T>())
    }

    fn take(&self, buffer: usize) -> Vec<T> {
        let layout = self.graph.layout(buffer);
        self.graph.arenas.take(layout, self.batch)
    }

    /// Gives the memory of weights back that nobody keeps.
    fn release_packed(&self, packed: Arc<Packed<T>>) {
        if let Ok(packed) = Arc::try_unwrap(packed) {
            let mut arena = self.graph.arenas.of::<T>();
            arena.give_back_flat(packed.direct.data);
            if let Some(transformed) = packed.transformed {
                arena.give_back_flat(transformed.data);
            }
        }
    }

    /// Gives the inputs of `read` operations back that none of the `later` ones reads.
    fn release_read(
        &self,
        read: &[usize],
        later: impl Iterator<Item = usize> + Clone,
        maps: &mut [Option<Vec<T>>],
    ) {
        let input = |index: usize| self.graph.operations[index].input();
        for node in read.iter().map(|&index| input(index)) {
            if node != self.graph.output && later.clone().all(|index| input(index) != node) {
                give_back(self.graph, node, maps[node].take());
            }
        }
    }

    /// Planes to pixels of channels.
    fn images(&self, planes: &[T]) -> Vec<T> {
        let map = &self.graph.nodes[0];
        let layout = self.graph.layout(0);
        let (height, width) = map.size;
        let mut to = self.take(0);
        let planes_len = map.channels * height * width;
        if planes_len == 0 {
            return to;
        }
        to.par_chunks_mut(layout.image())
            .zip(planes.par_chunks(planes_len))
            .for_each(|(to, planes)| {
                for (c, plane) in planes.chunks_exact(height * width).enumerate() {
                    for (h, line) in plane.chunks_exact(width).enumerate() {
                        for (w, &value) in line.iter().enumerate() {
                            to[layout.at(h, w) + c] = value;
                        }
                    }
                }
            });
        to
    }

    fn wanted<'n>(&self, c: &Convolution, values: &'n ParameterValues<'_, T>) -> Wanted<'n, T> {
        let size = self.graph.nodes[c.output].size;
        Wanted {
            weight: values.weight,
            scale: match &values.after {
                After::Affine { scale, .. } => scale,
                _ => &[],
            },
            shape: (c.kernel * c.kernel, c.c_out, c.c_in),
            winograd: c.stride == 1 && pays::<T>(c, size, self.batch),
            isa: self.isa,
        }
    }

    /// Writes a convolution's channels of `y`. With batch norm: its input, if
    /// that is to be kept, and its statistics.
    fn convolution(
        &self,
        c: &Convolution,
        x: &[T],
        (values, packed): (&ParameterValues<'_, T>, &Packed<T>),
        (y, channel): (&mut [T], usize),
        keep: Keep,
    ) -> Option<(Option<Vec<T>>, Vec<Moments>)> {
        let y_layout = self.graph.layout(self.graph.place(c.output).0);
        let y_span = Span {
            layout: y_layout,
            channel,
            channels: c.c_out,
        };
        let &After::BatchNorm { weight, bias, eps } = &values.after else {
            let values = (values, packed);
            self.convolve(c, x, values, (y, y_span), Activation::Relu, |_| ());
            return None;
        };
        if keep == Keep::Nothing {
            let moments = self.convolve_and_measure(c, x, (values, packed), (y, y_span));
            let affine = Affine::new(&moments, weight, bias, eps);
            y[..self.batch * y_layout.image()]
                .par_chunks_mut(self.images_per_map_task(y_layout) * y_layout.image())
                .for_each(|images| {
                    for y in images.chunks_exact_mut(y_layout.image()) {
                        norm::normalise_in_place(self.isa, &y_span, &affine, y);
                    }
                });
            return Some((None, moments));
        }
        let z_span = self.graph.normalised_span(c);
        let z_layout = z_span.layout;
        let mut z = self.graph.arenas.take(z_layout, self.batch);
        let moments = self.convolve_and_measure(c, x, (values, packed), (&mut z, z_span));
        let affine = Affine::new(&moments, weight, bias, eps);
        let between = Between {
            x: z_span,
            y: y_span,
        };
        let images = self.images_per_map_task(y_layout);
        y[..self.batch * y_layout.image()]
            .par_chunks_mut(images * y_layout.image())
            .zip(z.par_chunks(images * z_layout.image()))
            .for_each(|(y, z)| {
                for (y, z) in y
                    .chunks_exact_mut(y_layout.image())
                    .zip(z.chunks_exact(z_layout.image()))
                {
                    norm::normalise(self.isa, &between, &affine, z, y);
                }
            });
        Some((Some(z), moments))
    }

    /// Images per task of a pass that does little with each value: one part per thread.
    fn images_per_map_task(&self, layout: MapLayout) -> usize {
        /// Elements that are worth a task.
        const LEAST: usize = 1 << 14;
        let least = LEAST.div_ceil(layout.image().max(1));
        let threads = rayon::current_num_threads();
        self.batch.div_ceil(threads).max(least).max(1)
    }

    /// The convolution alone, and the statistics of what it yields: sums of
    /// each task's images, joined in order.
    fn convolve_and_measure(
        &self,
        c: &Convolution,
        x: &[T],
        values: (&ParameterValues<'_, T>, &Packed<T>),
        (y, span): (&mut [T], Span),
    ) -> Vec<Moments> {
        let sums = self.convolve(c, x, values, (y, span), Activation::Identity, |images| {
            let mut sums = MomentSums::new(c.c_out);
            for image in images.chunks_exact(span.layout.image()) {
                norm::add_moments(self.isa, &span, image, &mut sums);
            }
            sums
        });
        MomentSums::join(&sums, c.c_out)
    }

    /// A convolution from the map that it reads to the channels of `span`.
    fn pass<'p>(
        &self,
        c: &Convolution,
        (packed, start): (&'p Packed<T>, &'p [T]),
        span: Span,
        activation: Activation,
    ) -> AnyPass<'p, T> {
        let pass = GatherPass {
            kernels: self.kernels,
            x: self.graph.layout(c.input),
            x_channel: 0,
            channels: c.c_in,
            kernel: c.kernel,
            stride: c.stride,
            padding: c.padding,
            weight: &packed.direct,
            start: Start::Values(start),
            activation,
            y: span.layout,
            y_channel: span.channel,
        };
        match &packed.transformed {
            Some(transformed) => AnyPass::Winograd(pass.into_winograd(self.isa, transformed)),
            None => AnyPass::Direct(pass),
        }
    }

    /// The convolution with what its parameters add by channel. `measure` sees
    /// the images of each task while they are in the cache.
    fn convolve<R: Send>(
        &self,
        c: &Convolution,
        x: &[T],
        (values, packed): (&ParameterValues<'_, T>, &Packed<T>),
        (y, span): (&mut [T], Span),
        activation: Activation,
        measure: impl Fn(&[T]) -> R + Sync,
    ) -> Vec<R> {
        let (x_layout, y_layout) = (self.graph.layout(c.input), span.layout);
        let start = start_values(c, values);
        let pass = self.pass(c, (packed, &start), span, activation);
        let threads = rayon::current_num_threads();
        if self.batch < threads {
            let parts = self.parts((y, y_layout), pass.lines());
            parts.into_par_iter().for_each(|(image, part, y)| {
                let x = &x[image * x_layout.image()..];
                pass.run(x, (y, &part), &mut self.graph.arenas.lend().scratch);
            });
            return vec![measure(&y[..self.batch * y_layout.image()])];
        }
        let images = images_per_task(PIXELS_PER_TASK, self.batch, y_layout.pixels());
        y[..self.batch * y_layout.image()]
            .par_chunks_mut(images * y_layout.image())
            .zip(x.par_chunks(images * x_layout.image()))
            .map_init(
                || self.graph.arenas.lend(),
                |lent, (y, x)| {
                    let part = Part::whole(y_layout, y.len());
                    pass.run(x, (y, &part), &mut lent.scratch);
                    measure(y)
                },
            )
            .collect()
    }

    /// The parts of a buffer that `writers` write together: first image, images or lines, memory.
    fn tasks<'y>(
        &self,
        (y, layout): (&'y mut [T], MapLayout),
        writers: &[&ForwardStep<'_, T>],
    ) -> Vec<(usize, Part, &'y mut [T])> {
        if self.batch < rayon::current_num_threads() {
            let step = writers.iter().map(|step| step.lines()).max();
            return self.parts((y, layout), step.unwrap_or(1));
        }
        let images = images_per_task(PIXELS_PER_TASK, self.batch, layout.pixels());
        y[..self.batch * layout.image()]
            .chunks_mut(images * layout.image())
            .enumerate()
            .map(|(chunk, y)| (chunk * images, Part::whole(layout, y.len()), y))
            .collect()
    }

    /// Fewer images than threads in parts for all of them: image, lines, memory.
    fn parts<'y>(
        &self,
        (y, layout): (&'y mut [T], MapLayout),
        step: usize,
    ) -> Vec<(usize, Part, &'y mut [T])> {
        let count = rayon::current_num_threads().div_ceil(self.batch.max(1));
        y[..self.batch * layout.image()]
            .chunks_mut(layout.image())
            .enumerate()
            .flat_map(|(image, y)| {
                let parts = Part::cut(layout, y, (count, step));
                parts.into_iter().map(move |(part, y)| (image, part, y))
            })
            .collect()
    }

    fn max_pool(&self, p: &MaxPool, x: &[T], y: &mut [T]) {
        let pool = max_pool_of(self.graph, p);
        if self.batch < rayon::current_num_threads() {
            let parts = self.parts((y, pool.y), 1);
            parts.into_par_iter().for_each(|(image, part, y)| {
                let x = &x[image * pool.x.image()..];
                channels_last::forward(self.isa, &pool, x, y, &part);
            });
            return;
        }
        let whole = Part::whole(pool.y, pool.y.image());
        y[..self.batch * pool.y.image()]
            .par_chunks_mut(pool.y.image())
            .zip(x.par_chunks(pool.x.image()))
            .for_each(|(y, x)| channels_last::forward(self.isa, &pool, x, y, &whole));
    }

    fn global_average(&self, x: &[T]) -> Vec<T> {
        let channels = self.graph.nodes[self.graph.output].channels;
        let layout = self.graph.layout(self.graph.output);
        let (height, width) = layout.size;
        let scale = T::real(1.0 / (height * width) as f64);
        let mut features = vec![T::ZERO; self.batch * channels];
        if features.is_empty() {
            return features;
        }
        features
            .par_chunks_mut(channels)
            .zip(x.par_chunks(layout.image()))
            .for_each(|(sums, x)| {
                for h in 0..height {
                    for w in 0..width {
                        let pixel = &x[layout.at(h, w)..][..channels];
                        for (sum, &value) in sums.iter_mut().zip(pixel) {
                            *sum += value;
                        }
                    }
                }
                for sum in sums {
                    *sum *= scale;
                }
            });
        features
    }
}

/// How many elements an image takes in a buffer, and the maps of some images in it, one after the other.
type ImageMaps<'a, T> = (usize, &'a mut [T]);

/// A buffer, and what writes it next.
struct Written<'a, T: 'static> {
    buffer: usize,
    y: Vec<T>,
    writers: Vec<&'a ForwardStep<'a, T>>,
}

/// When a pooling runs that is part of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pooling {
    /// In the convolution's step, for a few images at a time.
    Within,
    /// In a step of its own.
    Apart,
}

/// An operation on some images: a pooling, a convolution, or the one and then the other.
struct ForwardStep<'a, T: 'static> {
    index: usize,
    pool: Option<Pool>,
    convolution: Option<AnyPass<'a, T>>,
}

impl<T: Element> ForwardStep<'_, T> {
    /// The lines of a part must be a multiple of this.
    fn lines(&self) -> usize {
        self.convolution.as_ref().map_or(1, AnyPass::lines)
    }

    /// Computes `part` of the output, which is `y`, from the images that it is of. Returns what the pooling and the
    /// convolution took.
    fn run(
        &self,
        isa: Isa,
        x: &[T],
        (y, part): (&mut [T], &Part),
        scratch: &mut Scratch<T>,
    ) -> [Duration; 2] {
        let watch = Watch::start();
        let Some(pass) = &self.convolution else {
            if let Some(pool) = &self.pool {
                pool_images(isa, pool, x, (y, part));
            }
            return [watch.elapsed(), Duration::ZERO];
        };
        let mut pooled = std::mem::take(&mut scratch.pooled);
        let x = match &self.pool {
            Some(pool) => {
                let between = pooled.output(pool, part.images);
                let whole = Part::whole(pool.y, between.len());
                pool_images(isa, pool, x, (between, &whole));
                between
            }
            None => x,
        };
        let pooling = watch.elapsed();
        pass.run(x, (y, part), scratch);
        scratch.pooled = pooled;
        [pooling, watch.elapsed() - pooling]
    }
}

/// `part` of the outputs of some images.
fn pool_images<T: Element>(isa: Isa, pool: &Pool, x: &[T], (y, part): (&mut [T], &Part)) {
    if part.images == 1 {
        return channels_last::forward(isa, pool, x, y, part);
    }
    let whole = Part::whole(pool.y, pool.y.image());
    let images = x.chunks_exact(pool.x.image());
    for (x, y) in images.zip(y.chunks_exact_mut(pool.y.image())) {
        channels_last::forward(isa, pool, x, y, &whole);
    }
}
