//! Both passes through a graph: operation by operation, a few images per task.
//!
//! A convolution reads its input where it lies, halo included: its register
//! tiles ([`crate::simd`]) take a pointer per pixel. Forward and input gradient
//! are gather tiles, the weight gradient outer tiles, as in [`crate::conv2d`].

use std::sync::Arc;
use std::time::Duration;

use rayon::prelude::*;

use super::arena::{Layout, Part};
use super::gather::{self, GatherPass, Start};
use super::norm::{
    self, Affine, Between, GradientSpans, GradientSums, InputGradient, MomentSums, Span,
};
use super::outer::{self, OuterPass};
use super::packed::{Packed, Wanted};
use super::pool::{self, Pool};
use super::profile::{self, Cost, Times, Watch};
use super::winograd::{self, WinogradOuterPass, WinogradPass};
use super::{ALIGNMENT, Convolution, Inner, MaxPool, Operation};
use crate::batch_norm::Moments;
use crate::conv2d::{PIXELS_PER_TASK, PackedWeight, keep_positive};
use crate::element::Element;
use crate::simd::{Isa, Kernels, multiversion};

/// What the backward pass needs of the forward pass.
pub(super) struct Maps<T> {
    /// The buffers of the nodes that have one.
    nodes: Vec<Option<Vec<T>>>,
    /// Of each convolution with batch norm: what it normalises, and its statistics.
    normalised: Vec<Option<Normalised<T>>>,
}

struct Normalised<T> {
    x: Vec<T>,
    moments: Vec<Moments>,
}

/// The parameters of one convolution.
pub(super) struct Numbers<'a, T> {
    pub(super) weight: &'a [T],
    pub(super) after: After<'a, T>,
}

/// What stands between a convolution and its ReLU.
pub(super) enum After<'a, T> {
    Bias(&'a [T]),
    /// By the batch's own statistics.
    BatchNorm {
        weight: &'a [T],
        bias: &'a [T],
        eps: f64,
    },
    /// Running statistics: the weight times `scale`, and `shift` as the bias.
    Affine {
        scale: Vec<T>,
        shift: Vec<T>,
    },
}

impl<'a, T: Element> Numbers<'a, T> {
    /// From the slices of [`super::ConvParameters`], in its order.
    pub(super) fn new(c: &Convolution, slices: &[&'a [T]]) -> Self {
        let after = match (slices, c.eps) {
            (&[_, weight, bias], Some(eps)) => After::BatchNorm { weight, bias, eps },
            (&[_, weight, bias, mean, variance], Some(eps)) => {
                let numbers = weight.iter().zip(bias).zip(mean.iter().zip(variance));
                let (scale, shift) = numbers
                    .map(|((weight, bias), (mean, variance))| {
                        let scale = weight.as_f64() / (variance.as_f64() + eps).sqrt();
                        let shift = bias.as_f64() - mean.as_f64() * scale;
                        (T::real(scale), T::real(shift))
                    })
                    .unzip();
                After::Affine { scale, shift }
            }
            _ => After::Bias(slices[1]),
        };
        let weight = slices[0];
        Self { weight, after }
    }

    /// How many parameters there are beside the weight.
    fn per_channel(&self) -> usize {
        match self.after {
            After::BatchNorm { .. } => 2,
            After::Bias(_) | After::Affine { .. } => 1,
        }
    }

    /// Zeros for the gradient of the weight and of what follows.
    fn gradients(&self, c: &Convolution) -> Vec<Vec<T>> {
        let channels = std::iter::repeat_n(c.c_out, self.per_channel());
        std::iter::once(self.weight.len())
            .chain(channels)
            .map(|len| vec![T::ZERO; len])
            .collect()
    }
}

impl Inner {
    /// The buffer that a node lies in, and its first channel there.
    fn place(&self, node: usize) -> (usize, usize) {
        self.nodes[node].within.unwrap_or((node, 0))
    }

    fn layout(&self, buffer: usize) -> Layout {
        let map = &self.nodes[buffer];
        Layout {
            size: map.size,
            halo: map.halo,
            width: map.channels.next_multiple_of(ALIGNMENT),
        }
    }

    /// Where a convolution's output lies until it is normalised.
    fn normalised_span(&self, c: &Convolution) -> Span {
        let layout = Layout {
            size: self.nodes[c.output].size,
            halo: 0,
            width: c.c_out.next_multiple_of(ALIGNMENT),
        };
        Span {
            layout,
            channel: 0,
            channels: c.c_out,
        }
    }

    fn gradient_layout(&self, buffer: usize) -> Layout {
        Layout {
            halo: self.nodes[buffer].gradient_halo,
            ..self.layout(buffer)
        }
    }
}

impl Operation {
    pub(super) fn input(&self) -> usize {
        match self {
            Self::Convolution(c) => c.input,
            Self::MaxPool(p) => p.input,
        }
    }

    pub(super) fn output(&self) -> usize {
        match self {
            Self::Convolution(c) => c.output,
            Self::MaxPool(p) => p.output,
        }
    }
}

/// Images per task: about so many `pixels`, but work for every thread.
fn images_per_task(pixels: usize, batch: usize, (height, width): (usize, usize)) -> usize {
    let wanted = pixels.div_ceil((height * width).max(1));
    wanted.clamp(1, batch.div_ceil(rayon::current_num_threads()).max(1))
}

/// Whether Winograd's products pay for outputs of `size`.
fn pays<T>(c: &Convolution, size: (usize, usize), batch: usize) -> bool {
    winograd::pays::<T>(c.kernel, size, batch, c.eps.is_some())
}

/// What the sums of a convolution start from: a multiple of 16 values.
fn start_values<T: Element>(c: &Convolution, numbers: &Numbers<'_, T>) -> Vec<T> {
    let mut start = vec![T::ZERO; c.c_out.next_multiple_of(ALIGNMENT)];
    match &numbers.after {
        After::Bias(bias) => start[..c.c_out].copy_from_slice(bias),
        After::Affine { shift, .. } => start[..c.c_out].copy_from_slice(shift),
        After::BatchNorm { .. } => (),
    }
    start
}

/// What a forward pass yields.
pub(super) struct Output<T> {
    /// (N, C).
    pub(super) features: Vec<T>,
    /// Of each convolution; empty where the batch's statistics play no part.
    pub(super) moments: Vec<Vec<Moments>>,
    pub(super) maps: Option<Maps<T>>,
}

/// The forward pass.
pub(super) struct Forward<'a, T: 'static> {
    graph: &'a Inner,
    isa: Isa,
    kernels: &'static Kernels<T>,
    batch: usize,
}

impl<'a, T: Element> Forward<'a, T> {
    pub(super) fn new(graph: &'a Inner, isa: Isa, batch: usize) -> Self {
        Self {
            graph,
            isa,
            kernels: T::kernels(isa),
            batch,
        }
    }

    /// Runs the graph, and keeps what the backward pass needs if asked to.
    pub(super) fn run(&self, images: &[T], numbers: &[Numbers<'_, T>], keep: bool) -> Output<T> {
        let graph = self.graph;
        let normalises = |n: &Numbers<'_, T>| matches!(n.after, After::BatchNorm { .. });
        if keep && self.batch >= rayon::current_num_threads() && !numbers.iter().any(normalises) {
            return self.run_image_by_image(images, numbers);
        }
        let mut numbers = numbers.iter();
        let mut nodes: Vec<Option<Vec<T>>> = vec![None; graph.nodes.len()];
        let mut normalised = Vec::new();
        let mut moments = Vec::new();
        nodes[0] = Some(self.images(images));
        if keep {
            graph.packed.clear();
        }
        for (index, operation) in graph.operations.iter().enumerate() {
            let watch = Watch::start();
            let (buffer, channel) = graph.place(operation.output());
            let mut y = nodes[buffer].take().unwrap_or_else(|| self.take(buffer));
            let x = nodes[operation.input()].as_deref().unwrap_or_default();
            match operation {
                Operation::Convolution(c) => {
                    let Some(numbers) = numbers.next() else {
                        break;
                    };
                    let packed = self.packed(c, numbers, (!keep).then_some(moments.len()));
                    let norm = self.convolution(c, x, (numbers, &packed), (&mut y, channel), keep);
                    self.release_packed(packed);
                    let (x, found) = norm.map_or((None, Vec::new()), |(x, found)| (x, found));
                    moments.push(found.clone());
                    normalised.push(x.map(|x| Normalised { x, moments: found }));
                }
                Operation::MaxPool(p) => self.max_pool(p, x, &mut y),
            }
            nodes[buffer] = Some(y);
            let time = watch.elapsed();
            profile::forward(graph, index, (&watch, time), || self.cost(operation));
            if !keep {
                self.release_read(index, &mut nodes);
            }
        }
        let features = self.global_average(nodes[graph.output].as_deref().unwrap_or_default());
        let maps = if keep {
            Some(Maps { nodes, normalised })
        } else {
            for (node, map) in nodes.into_iter().enumerate() {
                give_back(graph, node, map);
            }
            None
        };
        Output {
            features,
            moments,
            maps,
        }
    }

    /// The same where no operation needs another's result of the whole batch and all maps are
    /// kept: each thread takes its images through the network without waiting for the others.
    fn run_image_by_image(&self, images: &[T], numbers: &[Numbers<'_, T>]) -> Output<T> {
        let graph = self.graph;
        let mut nodes: Vec<Option<Vec<T>>> = vec![None; graph.nodes.len()];
        for operation in &graph.operations {
            let buffer = graph.place(operation.output()).0;
            nodes[buffer].get_or_insert_with(|| self.take(buffer));
        }
        nodes[0] = Some(self.images(images));
        graph.packed.clear();
        let convolutions = graph.convolutions();
        let packed: Vec<_> = convolutions
            .iter()
            .zip(numbers)
            .map(|(c, numbers)| (self.packed(c, numbers, None), start_values(c, numbers)))
            .collect();
        let steps: Vec<ForwardStep<'_, T>> = graph
            .operations
            .iter()
            .zip(&graph.numbers)
            .map(|(operation, &number)| match operation {
                Operation::Convolution(c) => {
                    let (buffer, channel) = graph.place(c.output);
                    let span = Span {
                        layout: graph.layout(buffer),
                        channel,
                        channels: c.c_out,
                    };
                    let (packed, start) = &packed[number.unwrap_or_default()];
                    ForwardStep::Convolution(self.pass(c, (packed, start), span, true))
                }
                Operation::MaxPool(p) => ForwardStep::MaxPool(max_pool_of(graph, p)),
            })
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
                let operations = graph.operations.iter().zip(&steps);
                let times = operations.map(|(operation, step)| {
                    let watch = Watch::start();
                    let buffer = graph.place(operation.output()).0;
                    let y = maps[buffer].take();
                    if let (Some((x_image, x)), Some((y_image, y))) = (&maps[operation.input()], y)
                    {
                        let size = graph.nodes[operation.output()].size;
                        let images = images_per_task(PIXELS_PER_TASK, self.batch, size);
                        for (x, y) in x
                            .chunks(images * x_image)
                            .zip(y.chunks_mut(images * y_image))
                        {
                            step.run(self.isa, x, y, &mut lent.scratch);
                        }
                        maps[buffer] = Some((y_image, y));
                    }
                    watch.elapsed()
                });
                times.collect()
            })
            .collect();
        drop(steps);
        let watch = Watch::start();
        for (index, operation) in graph.operations.iter().enumerate() {
            let time: Duration = times.iter().map(|part| part[index]).sum();
            let time = time / times.len().max(1) as u32;
            profile::forward(graph, index, (&watch, time), || self.cost(operation));
        }
        for (packed, _) in packed {
            self.release_packed(packed);
        }
        let features = self.global_average(nodes[graph.output].as_deref().unwrap_or_default());
        Output {
            features,
            moments: vec![Vec::new(); numbers.len()],
            maps: Some(Maps {
                nodes,
                normalised: numbers.iter().map(|_| None).collect(),
            }),
        }
    }

    fn cost(&self, operation: &Operation) -> Cost {
        Cost::of(self.graph, operation, self.batch, size_of::<T>())
    }

    fn take(&self, buffer: usize) -> Vec<T> {
        let layout = self.graph.layout(buffer);
        self.graph.arenas.of::<T>().take(layout, self.batch)
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

    /// Gives the input of operation `index` back if no later one reads it.
    fn release_read(&self, index: usize, maps: &mut [Option<Vec<T>>]) {
        let node = self.graph.operations[index].input();
        let later = &self.graph.operations[index + 1..];
        if node != self.graph.output && later.iter().all(|o| o.input() != node) {
            give_back(self.graph, node, maps[node].take());
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

    /// A convolution's weight as the tiles read it; kept for the next time as that of
    /// convolution `index`, if there is one.
    fn packed(
        &self,
        c: &Convolution,
        numbers: &Numbers<'_, T>,
        index: Option<usize>,
    ) -> Arc<Packed<T>> {
        let size = self.graph.nodes[c.output].size;
        let wanted = Wanted {
            weight: numbers.weight,
            scale: match &numbers.after {
                After::Affine { scale, .. } => scale,
                _ => &[],
            },
            shape: (c.kernel * c.kernel, c.c_out, c.c_in),
            winograd: c.stride == 1 && pays::<T>(c, size, self.batch),
            isa: self.isa,
        };
        match index {
            Some(index) => self.graph.packed.get(index, &wanted),
            None => {
                let arenas = &self.graph.arenas;
                Arc::new(wanted.pack(false, |len| arenas.of::<T>().take_flat(len)))
            }
        }
    }

    /// Writes a convolution's channels of `y`. With batch norm: its input, if
    /// that is to be kept, and its statistics.
    fn convolution(
        &self,
        c: &Convolution,
        x: &[T],
        (numbers, packed): (&Numbers<'_, T>, &Packed<T>),
        (y, channel): (&mut [T], usize),
        keep: bool,
    ) -> Option<(Option<Vec<T>>, Vec<Moments>)> {
        let y_layout = self.graph.layout(self.graph.place(c.output).0);
        let y_span = Span {
            layout: y_layout,
            channel,
            channels: c.c_out,
        };
        let &After::BatchNorm { weight, bias, eps } = &numbers.after else {
            self.convolve(c, x, (numbers, packed), (y, y_span), true, |_| ());
            return None;
        };
        if !keep {
            let moments = self.convolve_and_measure(c, x, (numbers, packed), (y, y_span));
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
        let mut z = self.graph.arenas.of::<T>().take(z_layout, self.batch);
        let moments = self.convolve_and_measure(c, x, (numbers, packed), (&mut z, z_span));
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
    fn images_per_map_task(&self, layout: Layout) -> usize {
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
        numbers: (&Numbers<'_, T>, &Packed<T>),
        (y, span): (&mut [T], Span),
    ) -> Vec<Moments> {
        let sums = self.convolve(c, x, numbers, (y, span), false, |images| {
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
        relu: bool,
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
            relu,
            y: span.layout,
            y_channel: span.channel,
        };
        match &packed.transformed {
            Some(transformed) => AnyPass::Winograd(pass.into_winograd(self.isa, transformed)),
            None => AnyPass::Direct(pass),
        }
    }

    /// The convolution with what its numbers add by channel. `measure` sees
    /// the images of each task while they are in the cache.
    fn convolve<R: Send>(
        &self,
        c: &Convolution,
        x: &[T],
        (numbers, packed): (&Numbers<'_, T>, &Packed<T>),
        (y, span): (&mut [T], Span),
        relu: bool,
        measure: impl Fn(&[T]) -> R + Sync,
    ) -> Vec<R> {
        let (x_layout, y_layout) = (self.graph.layout(c.input), span.layout);
        let start = start_values(c, numbers);
        let pass = self.pass(c, (packed, &start), span, relu);
        let threads = rayon::current_num_threads();
        if self.batch < threads {
            let step = match &pass {
                AnyPass::Direct(_) => 1,
                AnyPass::Winograd(_) => winograd::TILE,
            };
            let parts = self.parts((y, y_layout), step);
            parts.into_par_iter().for_each(|(image, part, y)| {
                let x = &x[image * x_layout.image()..];
                pass.run(x, (y, &part), &mut self.graph.arenas.lend().scratch);
            });
            return vec![measure(&y[..self.batch * y_layout.image()])];
        }
        let images = images_per_task(PIXELS_PER_TASK, self.batch, y_layout.size);
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

    /// Fewer images than threads in parts for all of them: image, lines, memory.
    fn parts<'y>(
        &self,
        (y, layout): (&'y mut [T], Layout),
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
                pool::forward(self.isa, &pool, x, y, &part);
            });
            return;
        }
        let whole = Part::whole(pool.y, pool.y.image());
        y[..self.batch * pool.y.image()]
            .par_chunks_mut(pool.y.image())
            .zip(x.par_chunks(pool.x.image()))
            .for_each(|(y, x)| pool::forward(self.isa, &pool, x, y, &whole));
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

/// The backward pass.
pub(super) struct Backward<'a, T: 'static> {
    forward: Forward<'a, T>,
    trainable: &'a [bool],
    /// Whether the gradient of each buffer is needed.
    needed: Vec<bool>,
}

impl<'a, T: Element> Backward<'a, T> {
    pub(super) fn new(
        graph: &'a Inner,
        isa: Isa,
        batch: usize,
        needs_input: bool,
        trainable: &'a [bool],
    ) -> Self {
        let mut needed = vec![false; graph.nodes.len()];
        needed[0] = needs_input;
        let mut parameters = trainable.iter();
        for operation in &graph.operations {
            let is_trainable = match operation {
                Operation::Convolution(_) => parameters.next().copied().unwrap_or(false),
                Operation::MaxPool(_) => false,
            };
            let output = graph.place(operation.output()).0;
            needed[output] |= is_trainable || needed[operation.input()];
        }
        Self {
            forward: Forward::new(graph, isa, batch),
            trainable,
            needed,
        }
    }

    /// Gradients of the images, if they are needed, and of every parameter of
    /// the convolutions that train, in order.
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
            let input = graph.operations[group[0]].input();
            let mut branches = Vec::with_capacity(group.len());
            for &index in group.iter().rev() {
                let (buffer, channel) = graph.place(graph.operations[index].output());
                let trains = graph.numbers[index].is_some_and(|n| self.trainable[n]);
                if (trains || self.needed[input])
                    && let Some(dy) = gradients[buffer].take()
                {
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
                gradients[input] = self.branches(&read, &mut branches, dx, &mut d_numbers);
                for branch in branches {
                    gradients[branch.buffer] = Some(branch.dy);
                }
            }
            let earlier = &graph.groups[..position];
            for &index in group {
                let operation = &graph.operations[index];
                if let (Operation::Convolution(c), Some(number)) = (operation, graph.numbers[index])
                    && let Some(kept) = normalised[number].take()
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
            Some(d) => d.into_iter().map(Some).collect(),
            None => vec![None; 1 + numbers.per_channel()],
        });
        (d_images, d_parameters.collect())
    }

    fn take(&self, buffer: usize) -> Vec<T> {
        let layout = self.forward.graph.gradient_layout(buffer);
        self.forward
            .graph
            .arenas
            .of::<T>()
            .take(layout, self.forward.batch)
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
    /// leaves the gradients of its parameters.
    fn branches(
        &self,
        read: &Read<'_, T>,
        branches: &mut [Branch<T>],
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
        for branch in branches.iter_mut() {
            let watch = Watch::start();
            let way = match &graph.operations[branch.index] {
                Operation::Convolution(c) => {
                    let (number, needs) = (graph.numbers[branch.index], dx.is_some());
                    let number = number.unwrap_or_default();
                    if branch.trains {
                        d_numbers[number] = Some(read.numbers[number].gradients(c));
                    }
                    let d_numbers = d_numbers[number].as_mut();
                    let way = self.prepare(c, number, read, branch, (needs, is_first), d_numbers);
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
                    weight: prepared.trains.then(|| prepared.weight_pass(&self.forward)),
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
        let input = graph.operations[branches[0].index].input();
        let (x_image, dx_image) = (
            graph.layout(input).image(),
            graph.gradient_layout(input).image(),
        );
        let mut dx_parts = dx
            .as_deref_mut()
            .map(|dx| dx[..batch * dx_image].chunks_mut(per_part * dx_image));
        let mut dy_parts: Vec<_> = branches
            .iter_mut()
            .map(|branch| {
                let image = graph.gradient_layout(branch.buffer).image();
                branch.dy[..batch * image].chunks_mut(per_part * image)
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
                    let images = first..last.min(first + images_at_once);
                    let x = &read.x[first * x_image..images.end * x_image];
                    let within = first - part..images.end - part;
                    let mut dx = dx
                        .as_deref_mut()
                        .map(|dx| &mut dx[within.start * dx_image..within.end * dx_image]);
                    for ((way, dy), sums) in ways.iter().zip(&mut dys).zip(&mut sums) {
                        let image = dy.len() / (last - part);
                        let dy = &mut dy[within.start * image..within.end * image];
                        let dx = dx.as_deref_mut();
                        let fresh = first == part;
                        way.run(
                            isa,
                            images.clone(),
                            x,
                            dy,
                            dx,
                            (sums, fresh),
                            &mut lent.scratch,
                        );
                    }
                }
                sums
            })
            .collect();

        let mut sums: Vec<_> = sums.into_iter().map(Vec::into_iter).collect();
        for ((branch, way), (_, preparation)) in branches.iter().zip(&ways).zip(&prepared) {
            let parts: Vec<Sums<T>> = sums.iter_mut().filter_map(Iterator::next).collect();
            let mut times = Times::mean(parts.iter().map(|part| part.times));
            times.other += *preparation;
            let watch = Watch::start();
            if let Way::Convolution(way) = way
                && let Some(pass) = &way.weight
                && let Some(d) = graph.numbers[branch.index].and_then(|n| d_numbers[n].as_mut())
            {
                pass.unpack(&parts, &mut d[0]);
                if way.prepared.norm.is_none() {
                    for part in &parts {
                        for (to, &from) in d[1].iter_mut().zip(&part.bias) {
                            *to += from;
                        }
                    }
                }
                times.weight += watch.elapsed();
            }
            for part in parts {
                arenas.of::<T>().give_back_flat(part.weight);
            }
            let operation = &graph.operations[branch.index];
            profile::backward(graph, branch.index, &watch, &times, || {
                self.forward.cost(operation)
            });
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
        number: usize,
        read: &Read<'b, T>,
        branch: &mut Branch<T>,
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
        let numbers = &read.numbers[number];
        let y = read.maps[branch.buffer].as_deref().unwrap_or_default();
        let kept = read.normalised[number].as_ref();
        let norm = self.batch_norm(c, (numbers, kept), y, &mask, &mut branch.dy, d_numbers);
        let taps = c.kernel * c.kernel;
        let arenas = &graph.arenas;
        let len = c.c_in.next_multiple_of(kernels.lanes) * taps * c.c_out;
        let packed = needs_input.then(|| {
            let shape = (taps, c.c_out, c.c_in);
            let memory = arenas.of::<T>().take_flat(len);
            PackedWeight::turned(numbers.weight, shape, kernels, memory)
        });
        let size = graph.gradient_layout(c.input).size;
        let transformed = packed
            .as_ref()
            .filter(|_| pays::<T>(c, size, batch))
            .map(|packed| {
                let memory = arenas.of::<T>().take_flat(4 * len);
                winograd::transform_weight(isa, packed, memory)
            });
        Prepared {
            c: *c,
            mask,
            y,
            norm,
            packed,
            transformed,
            zeros: vec![T::ZERO; c.c_in.next_multiple_of(ALIGNMENT)],
            is_first,
            trains: branch.trains,
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

/// One of these operations.
struct Branch<T> {
    index: usize,
    /// Where its output lies.
    buffer: usize,
    channel: usize,
    /// The gradient of the whole buffer.
    dy: Vec<T>,
    trains: bool,
}

enum PreparedWay<'a, T> {
    Convolution(Box<Prepared<'a, T>>),
    MaxPool { pool: Box<Pool>, is_first: bool },
}

/// A convolution's way back, and what it works with.
struct Prepared<'a, T> {
    c: Convolution,
    mask: Mask,
    y: &'a [T],
    norm: Option<NormGradient<'a, T>>,
    /// Turned, where the gradient of the input is needed.
    packed: Option<PackedWeight<T>>,
    /// The same for Winograd's products, where they pay.
    transformed: Option<PackedWeight<T>>,
    zeros: Vec<T>,
    /// Whether nothing has been added up yet in the gradient of the input.
    is_first: bool,
    trains: bool,
}

impl<T: Element> Prepared<'_, T> {
    fn input_pass(&self, forward: &Forward<'_, T>) -> Option<AnyPass<'_, T>> {
        let c = &self.c;
        let pass = GatherPass {
            kernels: forward.kernels,
            x: self.mask.dy,
            x_channel: self.mask.channel,
            channels: c.c_out,
            kernel: c.kernel,
            stride: 1,
            padding: c.kernel - 1 - c.padding,
            weight: self.packed.as_ref()?,
            start: match self.is_first {
                true => Start::Values(&self.zeros),
                false => Start::Present,
            },
            relu: false,
            y: forward.graph.gradient_layout(c.input),
            y_channel: 0,
        };
        Some(match &self.transformed {
            Some(transformed) => AnyPass::Winograd(pass.into_winograd(forward.isa, transformed)),
            None => AnyPass::Direct(pass),
        })
    }

    fn weight_pass(&self, forward: &Forward<'_, T>) -> AnyOuterPass<T> {
        let (c, kernels) = (&self.c, forward.kernels);
        let (x, dy) = (forward.graph.layout(c.input), self.mask.dy);
        if c.stride == 1 && pays::<T>(c, dy.size, forward.batch) {
            return AnyOuterPass::Winograd(WinogradOuterPass {
                kernels,
                isa: forward.isa,
                x,
                c_in: c.c_in,
                padding: c.padding,
                dy,
                dy_channel: self.mask.channel,
                c_out: c.c_out,
            });
        }
        AnyOuterPass::Direct(OuterPass {
            kernels,
            x,
            c_in: c.c_in,
            kernel: c.kernel,
            stride: c.stride,
            padding: c.padding,
            dy,
            dy_channel: self.mask.channel,
            c_out: c.c_out,
        })
    }
}

/// How one operation of some takes a few images back.
enum Way<'a, T: 'static> {
    Convolution(Box<ConvolutionWay<'a, T>>),
    MaxPool { pool: &'a Pool, is_first: bool },
}

struct ConvolutionWay<'a, T: 'static> {
    prepared: &'a Prepared<'a, T>,
    input: Option<AnyPass<'a, T>>,
    weight: Option<AnyOuterPass<T>>,
}

impl<T: Element> Way<'_, T> {
    fn output_size(&self) -> (usize, usize) {
        match self {
            Self::Convolution(way) => way.prepared.mask.y.size,
            Self::MaxPool { pool, .. } => pool.y.size,
        }
    }

    /// For what a thread adds up, with memory of arbitrary values.
    fn sums(&self, graph: &Inner) -> Sums<T> {
        match self {
            Self::Convolution(way) => {
                let len = way.weight.as_ref().map(AnyOuterPass::sums_len);
                let memory = len.map(|len| graph.arenas.of::<T>().take_flat(len));
                Sums::new(memory.unwrap_or_default(), way.prepared.c.c_out)
            }
            Self::MaxPool { .. } => Sums::new(Vec::new(), 0),
        }
    }

    /// Masks the gradient `dy` of some `images`, takes it back through the
    /// batch norm, adds to `dx` and to `sums`, or begins them where they are fresh.
    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        isa: Isa,
        images: std::ops::Range<usize>,
        x: &[T],
        dy: &mut [T],
        dx: Option<&mut [T]>,
        (sums, fresh): (&mut Sums<T>, bool),
        scratch: &mut Scratch<T>,
    ) {
        let watch = Watch::start();
        let ConvolutionWay {
            prepared,
            input,
            weight,
        } = match self {
            Self::MaxPool { pool, is_first } => {
                let gradients = dx
                    .into_iter()
                    .flat_map(|dx| dx.chunks_exact_mut(pool.dx.image()));
                let dys = dy.chunks_exact(pool.dy.image());
                for ((dx, dy), x) in gradients.zip(dys).zip(x.chunks_exact(pool.x.image())) {
                    if *is_first {
                        dx.fill(T::ZERO);
                    }
                    pool::backward(isa, pool, x, dy, dx);
                }
                sums.times.input += watch.elapsed();
                return;
            }
            Self::Convolution(way) => way.as_ref(),
        };
        let mask = &prepared.mask;
        for (image, dy) in images.zip(dy.chunks_exact_mut(mask.dy.image())) {
            if let Some(norm) = &prepared.norm {
                let x = &norm.x[image * norm.spans.x.layout.image()..];
                norm::input_gradient(isa, &norm.spans, &norm.gradient, x, dy);
                continue;
            }
            let y = &prepared.y[image * mask.y.image()..];
            mask_image(isa, mask, y, dy, &mut sums.image_bias);
            sums.add_image_bias();
        }
        sums.times.other += watch.elapsed();
        if let (Some(pass), Some(dx)) = (input, dx) {
            let watch = Watch::start();
            let whole = Part::whole(pass.output(), dx.len());
            pass.run(dy, (dx, &whole), scratch);
            sums.times.input += watch.elapsed();
        }
        if let Some(pass) = weight {
            let watch = Watch::start();
            let weight = &mut sums.weight[..pass.sums_len()];
            pass.run(x, dy, (weight, fresh), scratch);
            sums.times.weight += watch.elapsed();
        }
    }
}

/// Images that operations with the same input take back one after the other.
fn images_at_once<T: Element>(batch: usize, ways: &[Way<'_, T>]) -> usize {
    let pixels = match ways {
        [_] => PIXELS_PER_TASK,
        // Their input, its gradient and their own maps share the L2 cache.
        _ => PIXELS_PER_TASK / 2,
    };
    let images = ways
        .iter()
        .map(|way| images_per_task(pixels, batch, way.output_size()));
    images.min().unwrap_or(1)
}

/// What the second half of the way back through a batch norm needs.
struct NormGradient<'a, T> {
    spans: GradientSpans,
    gradient: InputGradient<T>,
    x: &'a [T],
}

/// The values of one image in a buffer, and the buffer's maps of some images.
type ImageMaps<'a, T> = (usize, &'a mut [T]);

/// An operation on some images.
enum ForwardStep<'a, T: 'static> {
    Convolution(AnyPass<'a, T>),
    MaxPool(Pool),
}

impl<T: Element> ForwardStep<'_, T> {
    fn run(&self, isa: Isa, x: &[T], y: &mut [T], scratch: &mut Scratch<T>) {
        match self {
            Self::Convolution(pass) => {
                let part = Part::whole(pass.output(), y.len());
                pass.run(x, (y, &part), scratch);
            }
            Self::MaxPool(pool) => {
                let whole = Part::whole(pool.y, pool.y.image());
                let images = x.chunks_exact(pool.x.image());
                for (x, y) in images.zip(y.chunks_exact_mut(pool.y.image())) {
                    pool::forward(isa, pool, x, y, &whole);
                }
            }
        }
    }
}

/// The direct sum or Winograd's.
enum AnyPass<'a, T: 'static> {
    Direct(GatherPass<'a, T>),
    Winograd(WinogradPass<'a, T>),
}

impl<T: Element> AnyPass<'_, T> {
    fn output(&self) -> Layout {
        match self {
            Self::Direct(pass) => pass.y,
            Self::Winograd(pass) => pass.y,
        }
    }

    fn run(&self, x: &[T], y: (&mut [T], &Part), scratch: &mut Scratch<T>) {
        match self {
            Self::Direct(pass) => pass.run(x, y, &mut scratch.gather),
            Self::Winograd(pass) => pass.run(x, y, &mut scratch.winograd),
        }
    }
}

/// The same of the weight gradient.
enum AnyOuterPass<T: 'static> {
    Direct(OuterPass<T>),
    Winograd(WinogradOuterPass<T>),
}

impl<T: Element> AnyOuterPass<T> {
    fn sums_len(&self) -> usize {
        match self {
            Self::Direct(pass) => pass.sums_len(),
            Self::Winograd(pass) => pass.sums_len(),
        }
    }

    fn run(&self, x: &[T], dy: &[T], sums: (&mut [T], bool), scratch: &mut Scratch<T>) {
        match self {
            Self::Direct(pass) => pass.run(x, dy, sums, &mut scratch.outer),
            Self::Winograd(pass) => pass.run(x, dy, sums, &mut scratch.winograd),
        }
    }

    fn unpack(&self, parts: &[Sums<T>], weight: &mut [T]) {
        let parts: Vec<&[T]> = parts.iter().map(|p| p.weight.as_slice()).collect();
        match self {
            Self::Direct(pass) => pass.unpack(&parts, weight),
            Self::Winograd(pass) => pass.unpack(&parts, weight),
        }
    }
}

/// What a task works with.
pub(super) struct Scratch<T> {
    gather: gather::Rows<T>,
    outer: outer::Rows<T>,
    winograd: winograd::Scratch<T>,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self {
            gather: gather::Rows::default(),
            outer: outer::Rows::default(),
            winograd: winograd::Scratch::default(),
        }
    }
}

fn give_back<T: Element>(graph: &Inner, buffer: usize, map: Option<Vec<T>>) {
    if let Some(map) = map {
        graph.arenas.of().give_back(graph.layout(buffer), map);
    }
}

fn give_back_gradient<T: Element>(graph: &Inner, buffer: usize, gradient: Option<Vec<T>>) {
    if let Some(gradient) = gradient {
        graph
            .arenas
            .of()
            .give_back(graph.gradient_layout(buffer), gradient);
    }
}

fn max_pool_of(graph: &Inner, p: &MaxPool) -> Pool {
    Pool {
        h: p.h,
        w: p.w,
        x: graph.layout(p.input),
        dx: graph.gradient_layout(p.input),
        y: graph.layout(p.output),
        dy: graph.gradient_layout(p.output),
    }
}

/// One thread's share of the parameters' gradients.
struct Sums<T> {
    /// As the pass lays them out.
    weight: Vec<T>,
    bias: Vec<T>,
    image_bias: Vec<T>,
    times: Times,
}

impl<T: Element> Sums<T> {
    /// With memory for the weight's, of arbitrary values.
    fn new(weight: Vec<T>, c_out: usize) -> Self {
        Self {
            weight,
            bias: vec![T::ZERO; c_out],
            image_bias: vec![T::ZERO; c_out],
            times: Times::default(),
        }
    }

    /// Image by image, so that long sums of small numbers round less.
    fn add_image_bias(&mut self) {
        for (sum, image) in self.bias.iter_mut().zip(&mut self.image_bias) {
            *sum += std::mem::replace(image, T::ZERO);
        }
    }
}

/// Where a ReLU's output and its gradient lie.
struct Mask {
    y: Layout,
    dy: Layout,
    channel: usize,
    channels: usize,
}

multiversion! {
    /// Sets the gradient to zero where the output is not positive or the gradient negligible, and
    /// adds it up by channel.
    ///
    /// The gradient of an image that the network has long got right is tiny, and the products with
    /// it are subnormal: those cost a processor 3 to 5 times as much as other products, and change
    /// no sum.
    fn mask_image<T: Element>(mask: &Mask, y: &[T], dy: &mut [T], sums: &mut [T]) = mask_pixels
}

#[inline(always)]
fn mask_pixels<T: Element>(mask: &Mask, y: &[T], dy: &mut [T], sums: &mut [T]) {
    let (height, width) = mask.y.size;
    for h in 0..height {
        for w in 0..width {
            let y = &y[mask.y.at(h, w) + mask.channel..][..mask.channels];
            let dy = &mut dy[mask.dy.at(h, w) + mask.channel..][..mask.channels];
            for ((dy, &y), sum) in dy.iter_mut().zip(y).zip(sums.iter_mut()) {
                *dy = match dy.is_negligible() {
                    true => T::ZERO,
                    false => keep_positive(*dy, y),
                };
                *sum += *dy;
            }
        }
    }
}
