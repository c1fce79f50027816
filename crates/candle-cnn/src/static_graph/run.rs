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
use super::profile::{self, Cost, Watch};
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

/// Images per task: about [`PIXELS_PER_TASK`] pixels, but work for every thread.
fn images_per_task(batch: usize, (height, width): (usize, usize)) -> usize {
    let wanted = PIXELS_PER_TASK.div_ceil((height * width).max(1));
    wanted.clamp(1, batch.div_ceil(rayon::current_num_threads()).max(1))
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
            profile::forward(graph, index, &watch, || self.cost(operation));
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
            winograd: c.stride == 1 && winograd::pays::<T>(c.kernel, size, self.batch),
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
        let mut start = vec![T::ZERO; c.c_out.next_multiple_of(ALIGNMENT)];
        match &numbers.after {
            After::Bias(bias) => start[..c.c_out].copy_from_slice(bias),
            After::Affine { shift, .. } => start[..c.c_out].copy_from_slice(shift),
            After::BatchNorm { .. } => (),
        }
        let (x_layout, y_layout) = (self.graph.layout(c.input), span.layout);
        let pass = GatherPass {
            kernels: self.kernels,
            x: x_layout,
            x_channel: 0,
            channels: c.c_in,
            kernel: c.kernel,
            stride: c.stride,
            padding: c.padding,
            weight: &packed.direct,
            start: Start::Values(&start),
            relu,
            y: y_layout,
            y_channel: span.channel,
        };
        let pass = match &packed.transformed {
            Some(transformed) => AnyPass::Winograd(pass.into_winograd(self.isa, transformed)),
            None => AnyPass::Direct(pass),
        };
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
        let images = images_per_task(self.batch, y_layout.size);
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
        let mut d_parameters = Vec::with_capacity(3 * numbers.len());
        if self.needed[graph.output] {
            gradients[graph.output] = Some(self.spread(d_features));
        }
        let mut convolution = numbers.len();
        for (index, operation) in graph.operations.iter().enumerate().rev() {
            let watch = Watch::start();
            let mut times = Times::default();
            let (buffer, channel) = graph.place(operation.output());
            let mut kept = None;
            let mut d_numbers = None;
            let is_trainable = match operation {
                Operation::Convolution(c) => {
                    convolution -= 1;
                    kept = normalised[convolution].take();
                    let is_trainable = self.trainable[convolution];
                    d_numbers = is_trainable.then(|| numbers[convolution].gradients(c));
                    is_trainable
                }
                Operation::MaxPool(_) => false,
            };
            if (is_trainable || self.needed[operation.input()])
                && let Some(mut dy) = gradients[buffer].take()
            {
                // What has been added up so far, or a buffer of anything.
                let dx = self.needed[operation.input()].then(|| {
                    let so_far = gradients[operation.input()].take();
                    let is_first = so_far.is_none();
                    (
                        so_far.unwrap_or_else(|| self.take(operation.input())),
                        is_first,
                    )
                });
                let x = maps[operation.input()].as_deref().unwrap_or_default();
                let dx = match operation {
                    Operation::Convolution(c) => {
                        let y = maps[buffer].as_deref().unwrap_or_default();
                        let read = Read {
                            x,
                            y,
                            channel,
                            numbers: &numbers[convolution],
                            normalised: kept.as_ref(),
                        };
                        let (dx, spent) =
                            self.convolution(c, &read, &mut dy, dx, d_numbers.as_mut());
                        times = spent;
                        dx
                    }
                    Operation::MaxPool(p) => {
                        let dx = dx.map(|dx| self.max_pool(p, x, &dy, dx));
                        times.input = watch.elapsed();
                        dx
                    }
                };
                gradients[operation.input()] = dx;
                gradients[buffer] = Some(dy);
                profile::backward(graph, index, &watch, (times.input, times.weight), || {
                    self.forward.cost(operation)
                });
            }
            if let Operation::Convolution(_) = operation {
                // From the last parameter to the first.
                match d_numbers {
                    Some(d) => d_parameters.extend(d.into_iter().rev().map(Some)),
                    None => d_parameters
                        .extend((0..1 + numbers[convolution].per_channel()).map(|_| None)),
                }
            }
            if let (Operation::Convolution(c), Some(kept)) = (operation, kept) {
                let layout = graph.normalised_span(c).layout;
                graph.arenas.of().give_back(layout, kept.x);
            }
            let earlier = &graph.operations[..index];
            if earlier.iter().all(|o| graph.place(o.output()).0 != buffer) {
                give_back(graph, buffer, maps[buffer].take());
                give_back_gradient(graph, buffer, gradients[buffer].take());
            }
        }
        give_back(graph, 0, maps[0].take());
        let d_images = gradients[0].take().map(|gradient| {
            let planes = self.planes(&gradient);
            give_back_gradient(graph, 0, Some(gradient));
            planes
        });
        d_parameters.reverse();
        (d_images, d_parameters)
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

    fn max_pool(&self, p: &MaxPool, x: &[T], dy: &[T], dx: (Vec<T>, bool)) -> Vec<T> {
        let pool = max_pool_of(self.forward.graph, p);
        let (mut dx, is_first) = dx;
        dx[..self.forward.batch * pool.dx.image()]
            .par_chunks_mut(pool.dx.image())
            .zip(x.par_chunks(pool.x.image()))
            .zip(dy.par_chunks(pool.dy.image()))
            .for_each(|((dx, x), dy)| {
                if is_first {
                    dx.fill(T::ZERO);
                }
                pool::backward(self.forward.isa, &pool, x, dy, dx);
            });
        dx
    }

    /// Masks `dy` by the ReLU, takes it back through the batch norm, adds to
    /// `dx` and writes the parameters' gradients.
    fn convolution(
        &self,
        c: &Convolution,
        read: &Read<'_, T>,
        dy: &mut [T],
        dx: Option<(Vec<T>, bool)>,
        mut d_parameters: Option<&mut Vec<Vec<T>>>,
    ) -> (Option<Vec<T>>, Times) {
        let Forward {
            graph,
            isa,
            kernels,
            batch,
        } = self.forward;
        let &Read { x, y, channel, .. } = read;
        let taps = c.kernel * c.kernel;
        let output = graph.place(c.output).0;
        let (x_layout, dx_layout) = (graph.layout(c.input), graph.gradient_layout(c.input));
        let dy_layout = graph.gradient_layout(output);
        let mask = Mask {
            y: graph.layout(output),
            dy: dy_layout,
            channel,
            channels: c.c_out,
        };
        let norm = self.batch_norm(c, read, &mask, dy, d_parameters.as_deref_mut());
        let (mut dx, is_first) = match dx {
            Some((dx, is_first)) => (Some(dx), is_first),
            None => (None, true),
        };
        let arenas = &graph.arenas;
        let len = c.c_in.next_multiple_of(kernels.lanes) * taps * c.c_out;
        let packed = dx.is_some().then(|| {
            let shape = (taps, c.c_out, c.c_in);
            let memory = arenas.of::<T>().take_flat(len);
            PackedWeight::turned(read.numbers.weight, shape, kernels, memory)
        });
        let zeros = vec![T::ZERO; c.c_in.next_multiple_of(ALIGNMENT)];
        let transformed = packed
            .as_ref()
            .filter(|_| winograd::pays::<T>(c.kernel, dx_layout.size, batch))
            .map(|packed| {
                let memory = arenas.of::<T>().take_flat(4 * len);
                winograd::transform_weight(isa, packed, memory)
            });
        let input_pass = packed.as_ref().map(|packed| GatherPass {
            kernels,
            x: dy_layout,
            x_channel: channel,
            channels: c.c_out,
            kernel: c.kernel,
            stride: 1,
            padding: c.kernel - 1 - c.padding,
            weight: packed,
            start: if is_first {
                Start::Values(&zeros)
            } else {
                Start::Present
            },
            relu: false,
            y: dx_layout,
            y_channel: 0,
        });
        let input_pass = input_pass.map(|pass| match &transformed {
            Some(transformed) => AnyPass::Winograd(pass.into_winograd(isa, transformed)),
            None => AnyPass::Direct(pass),
        });
        let outer_pass = d_parameters.is_some().then(|| {
            if c.stride == 1 && winograd::pays::<T>(c.kernel, dy_layout.size, batch) {
                return AnyOuterPass::Winograd(WinogradOuterPass {
                    kernels,
                    isa,
                    x: x_layout,
                    c_in: c.c_in,
                    padding: c.padding,
                    dy: dy_layout,
                    dy_channel: channel,
                    c_out: c.c_out,
                });
            }
            AnyOuterPass::Direct(OuterPass {
                kernels,
                x: x_layout,
                c_in: c.c_in,
                kernel: c.kernel,
                stride: c.stride,
                padding: c.padding,
                dy: dy_layout,
                dy_channel: channel,
                c_out: c.c_out,
            })
        });

        // One part per thread, each a run of whole images; their sums are
        // added up in this order.
        let threads = rayon::current_num_threads().clamp(1, batch.max(1));
        let per_part = batch.div_ceil(threads).max(1);
        let group = images_per_task(batch, mask.y.size);
        let count = batch.div_ceil(per_part);
        let mut dx_parts: Vec<Option<&mut [T]>> = match &mut dx {
            Some(dx) => dx[..batch * dx_layout.image()]
                .chunks_mut(per_part * dx_layout.image())
                .map(Some)
                .collect(),
            None => Vec::new(),
        };
        dx_parts.resize_with(count, || None);
        let sums: Vec<Sums<T>> = dy[..batch * dy_layout.image()]
            .par_chunks_mut(per_part * dy_layout.image())
            .zip(dx_parts)
            .enumerate()
            .map(|(part, (dy, mut dx))| {
                let len = outer_pass.as_ref().map(AnyOuterPass::sums_len);
                let weight = len.map(|len| arenas.of::<T>().take_flat(len));
                let mut sums = Sums::new(weight.unwrap_or_default(), c.c_out);
                let mut lent = arenas.lend();
                let scratch = &mut lent.scratch;
                for (index, dy) in dy.chunks_mut(group * dy_layout.image()).enumerate() {
                    let first = part * per_part + index * group;
                    let images = dy.len() / dy_layout.image();
                    let x = &x[first * x_layout.image()..][..images * x_layout.image()];
                    for (image, dy) in dy.chunks_exact_mut(dy_layout.image()).enumerate() {
                        if let Some(norm) = &norm {
                            let x = &norm.x[(first + image) * norm.spans.x.layout.image()..];
                            norm::input_gradient(isa, &norm.spans, &norm.gradient, x, dy);
                            continue;
                        }
                        let y = &y[(first + image) * mask.y.image()..];
                        mask_image(isa, &mask, y, dy, &mut sums.image_bias);
                        sums.add_image_bias();
                    }
                    let watch = Watch::start();
                    if let (Some(pass), Some(dx)) = (&input_pass, &mut dx) {
                        let dx = &mut dx[index * group * dx_layout.image()..];
                        let dx = &mut dx[..images * dx_layout.image()];
                        let whole = Part::whole(dx_layout, dx.len());
                        pass.run(dy, (dx, &whole), scratch);
                    }
                    let input = watch.elapsed();
                    if let Some(pass) = &outer_pass {
                        let fresh = index == 0;
                        let sums = &mut sums.weight[..pass.sums_len()];
                        pass.run(x, dy, (sums, fresh), scratch);
                    }
                    if input_pass.is_some() {
                        sums.times.input += input;
                    }
                    if outer_pass.is_some() {
                        sums.times.weight += watch.elapsed() - input;
                    }
                }
                sums
            })
            .collect();
        let mut times = Times::mean(sums.iter().map(|sums| sums.times));
        let watch = Watch::start();
        if let (Some(d_parameters), Some(pass)) = (d_parameters, &outer_pass) {
            pass.unpack(&sums, &mut d_parameters[0]);
            if norm.is_none() {
                for part in &sums {
                    for (to, &from) in d_parameters[1].iter_mut().zip(&part.bias) {
                        *to += from;
                    }
                }
            }
        }
        if outer_pass.is_some() {
            times.weight += watch.elapsed();
        }
        let mut arena = arenas.of::<T>();
        let packed = [packed, transformed].into_iter().flatten();
        let sums = sums.into_iter().map(|sums| sums.weight);
        for memory in packed.map(|packed| packed.data).chain(sums) {
            arena.give_back_flat(memory);
        }
        (dx, times)
    }

    /// The first half of the way back through a batch norm: masks `dy` by the
    /// ReLU, and sums it up over the whole batch.
    fn batch_norm<'b>(
        &self,
        c: &Convolution,
        read: &Read<'b, T>,
        mask: &Mask,
        dy: &mut [T],
        d_parameters: Option<&mut Vec<Vec<T>>>,
    ) -> Option<NormGradient<'b, T>> {
        let (&After::BatchNorm { weight, bias, eps }, Some(kept)) =
            (&read.numbers.after, read.normalised)
        else {
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
            .zip(read.y.par_chunks(part * y_image))
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

/// What the backward pass of a convolution reads.
struct Read<'a, T> {
    x: &'a [T],
    y: &'a [T],
    /// The first in the output's buffer.
    channel: usize,
    numbers: &'a Numbers<'a, T>,
    normalised: Option<&'a Normalised<T>>,
}

/// What the second half of the way back through a batch norm needs.
struct NormGradient<'a, T> {
    spans: GradientSpans,
    gradient: InputGradient<T>,
    x: &'a [T],
}

/// The direct sum or Winograd's.
enum AnyPass<'a, T: 'static> {
    Direct(GatherPass<'a, T>),
    Winograd(WinogradPass<'a, T>),
}

impl<T: Element> AnyPass<'_, T> {
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

/// What each gradient of a convolution took; zero while nobody listens.
#[derive(Clone, Copy, Default)]
struct Times {
    input: Duration,
    weight: Duration,
}

impl Times {
    /// Of threads that work side by side.
    fn mean(parts: impl ExactSizeIterator<Item = Self>) -> Self {
        let count = parts.len().max(1) as u32;
        let sum = parts.fold(Self::default(), |sum, part| Self {
            input: sum.input + part.input,
            weight: sum.weight + part.weight,
        });
        Self {
            input: sum.input / count,
            weight: sum.weight / count,
        }
    }
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
