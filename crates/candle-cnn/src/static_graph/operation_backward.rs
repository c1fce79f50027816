//! The backward pass through one operation of a group, a few images at a time.

use std::ops::Range;
use std::time::Duration;

use super::arena::Arenas;
use super::builder::Convolution;
use super::forward::Forward;
use super::gather::{GatherPass, Start};
use super::norm::{self, GradientSpans, InputGradient};
use super::outer::OuterPass;
use super::pass::{AfterGradients, AnyPass, ParameterGradients, Scratch, pays};
use super::plan::Network;
use super::profile::{Times, Watch};
use super::winograd::WinogradOuterPass;
use crate::activation::{Activation, keep_positive};
use crate::conv2d::{PIXELS_PER_TASK, PackedWeight, images_per_task};
use crate::element::Element;
use crate::maps::{MapLayout, Part};
use crate::max_pool2d::channels_last::{self, Pool};
use crate::simd::{Accumulate, Isa, multiversion};

/// An operation whose backward pass has done what it does for the whole batch at once.
pub(super) enum PreparedOperation<'a, T> {
    Convolution(Box<PreparedConvolution<'a, T>>),
    MaxPool {
        pool: Box<Pool>,
        dx: Option<Accumulate>,
    },
}

impl<T: Element> PreparedOperation<'_, T> {
    /// The backward pass with what was prepared.
    pub(super) fn backward(&self, forward: &Forward<'_, T>) -> OperationBackward<'_, T> {
        match self {
            Self::Convolution(prepared) => {
                OperationBackward::Convolution(Box::new(ConvolutionBackward {
                    prepared,
                    input: prepared.input_pass(forward),
                    weight: prepared
                        .trains_weight
                        .then(|| prepared.weight_pass(forward)),
                }))
            }
            Self::MaxPool { pool, dx } => OperationBackward::MaxPool { pool, dx: *dx },
        }
    }

    /// Gives the memory of weights back.
    pub(super) fn give_back(self, arenas: &Arenas) {
        if let Self::Convolution(prepared) = self {
            let packed = [prepared.packed, prepared.transformed];
            for packed in packed.into_iter().flatten() {
                arenas.of::<T>().give_back_flat(packed.data);
            }
        }
    }
}

/// A convolution, and what its backward pass works with.
pub(super) struct PreparedConvolution<'a, T> {
    pub(super) c: Convolution,
    /// The pooling that is part of the convolution.
    pub(super) pool: Option<Pool>,
    pub(super) mask: Mask,
    pub(super) y: &'a [T],
    pub(super) norm: Option<NormGradient<'a, T>>,
    /// The weight, turned, where the gradient of the input is needed.
    pub(super) packed: Option<PackedWeight<T>>,
    /// The turned weight for Winograd's products, where they pay.
    pub(super) transformed: Option<PackedWeight<T>>,
    pub(super) zeros: Vec<T>,
    pub(super) dx: Option<Accumulate>,
    pub(super) trains_weight: bool,
    /// What preparing it took.
    pub(super) time: Duration,
}

impl<T: Element> PreparedConvolution<'_, T> {
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
            start: match (self.dx, &self.pool) {
                (Some(Accumulate::Add), None) => Start::Present,
                // What a pooling passes on has a place of its own.
                _ => Start::Values(&self.zeros),
            },
            activation: Activation::Identity,
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

/// The backward pass through one operation.
pub(super) enum OperationBackward<'a, T: 'static> {
    Convolution(Box<ConvolutionBackward<'a, T>>),
    MaxPool {
        pool: &'a Pool,
        dx: Option<Accumulate>,
    },
}

/// The backward pass through a convolution, the pooling that is part of it and what follows it.
pub(super) struct ConvolutionBackward<'a, T: 'static> {
    prepared: &'a PreparedConvolution<'a, T>,
    input: Option<AnyPass<'a, T>>,
    weight: Option<AnyOuterPass<T>>,
}

impl<T: Element> OperationBackward<'_, T> {
    fn output_pixels(&self) -> usize {
        match self {
            Self::Convolution(convolution) => convolution.prepared.mask.y.pixels(),
            Self::MaxPool { pool, .. } => pool.y.pixels(),
        }
    }

    /// Sums for one thread to add to, in memory that may hold anything.
    pub(super) fn sums(&self, graph: &Network) -> Sums<T> {
        match self {
            Self::Convolution(convolution) => {
                let len = convolution.weight.as_ref().map(AnyOuterPass::sums_len);
                let memory = len.map(|len| graph.arenas.take_flat(len));
                Sums::new(memory.unwrap_or_default(), convolution.prepared.c.c_out)
            }
            Self::MaxPool { .. } => Sums::new(Vec::new(), 0),
        }
    }

    /// Adds to `dx` of some images and to `sums`, or begins them where nothing has been added yet.
    pub(super) fn run(
        &self,
        isa: Isa,
        images: Images<'_, T>,
        sums: &mut Sums<T>,
        scratch: &mut Scratch<T>,
    ) {
        match self {
            Self::MaxPool { pool, dx } => {
                let watch = Watch::start();
                if let (Some(accumulate), Some(dx)) = (*dx, images.dx) {
                    let gradients = dx.chunks_exact_mut(pool.dx.image());
                    let dys = images.dy.chunks_exact(pool.dy.image());
                    let xs = images.x.chunks_exact(pool.x.image());
                    for ((dx, dy), x) in gradients.zip(dys).zip(xs) {
                        channels_last::backward(isa, pool, x, dy, dx, accumulate);
                    }
                }
                sums.times.input += watch.elapsed();
            }
            Self::Convolution(convolution) => convolution.run(isa, images, sums, scratch),
        }
    }

    /// Adds the threads' sums up into the gradients of all convolutions' parameters, in their order.
    /// Returns what the operation took.
    pub(super) fn add_up(
        &self,
        parts: &[Sums<T>],
        d_parameters: &mut [Option<ParameterGradients<T>>],
    ) -> Times {
        let mut times = Times::mean(parts.iter().map(|part| part.times));
        let Self::Convolution(convolution) = self else {
            return times;
        };
        times.other += convolution.prepared.time;
        if let Some(d) = &mut d_parameters[convolution.prepared.c.number] {
            let watch = Watch::start();
            // The gradients of a batch norm are there already.
            if let AfterGradients::Bias(bias) = &mut d.after {
                for part in parts {
                    for (to, &from) in bias.iter_mut().zip(&part.bias) {
                        *to += from;
                    }
                }
            }
            times.other += watch.elapsed();
            if let (Some(pass), Some(weight)) = (&convolution.weight, &mut d.weight) {
                let watch = Watch::start();
                pass.unpack(parts, weight);
                times.weight += watch.elapsed();
            }
        }
        times
    }
}

/// Some images, one after the other.
pub(super) struct Images<'a, T> {
    /// The images' numbers in the batch.
    pub(super) range: Range<usize>,
    /// What the group of operations reads of these images.
    pub(super) x: &'a [T],
    /// The gradient of what the operation writes.
    pub(super) dy: &'a mut [T],
    pub(super) dx: Option<&'a mut [T]>,
}

impl<T: Element> ConvolutionBackward<'_, T> {
    /// Masks `dy`, takes it back through the batch norm, the convolution and
    /// the pooling that is part of it: as [`OperationBackward::run`].
    fn run(&self, isa: Isa, images: Images<'_, T>, sums: &mut Sums<T>, scratch: &mut Scratch<T>) {
        let prepared = self.prepared;
        // Nobody may need more than the sums over the gradient: those of a bias are taken here, a batch norm's before.
        let goes_on = self.input.is_some() || self.weight.is_some();
        if goes_on || prepared.norm.is_none() {
            let watch = Watch::start();
            self.mask(isa, images.range.clone(), images.dy, sums);
            sums.times.other += watch.elapsed();
        }
        match &prepared.pool {
            _ if !goes_on => (),
            Some(pool) => self.gradients_and_pooling(pool, isa, images, sums, scratch),
            None => self.gradients(images.x, images.dy, images.dx, sums, scratch),
        }
    }

    /// The convolution's own gradients, and that of the input of the pooling that is part of it.
    fn gradients_and_pooling(
        &self,
        pool: &Pool,
        isa: Isa,
        images: Images<'_, T>,
        sums: &mut Sums<T>,
        scratch: &mut Scratch<T>,
    ) {
        let watch = Watch::start();
        let Images { range, x, dy, dx } = images;
        let mut between = std::mem::take(&mut scratch.pooled);
        let (y, d_between, winners) = between.all(pool, range.len());
        let outputs = y.chunks_exact_mut(pool.y.image());
        let kept = winners.chunks_exact_mut(pool.winners());
        for ((x, y), winners) in x.chunks_exact(pool.x.image()).zip(outputs).zip(kept) {
            channels_last::forward_with_winners(isa, pool, x, y, winners);
        }
        sums.pooling.input += watch.elapsed();
        let wanted = dx.is_some().then_some(&mut *d_between);
        self.gradients(y, dy, wanted, sums, scratch);
        if let (Some(accumulate), Some(dx)) = (self.prepared.dx, dx) {
            let watch = Watch::start();
            let gradients = dx.chunks_exact_mut(pool.dx.image());
            let dys = d_between.chunks_exact(pool.dy.image());
            let kept = winners.chunks_exact(pool.winners());
            for ((dx, dy), winners) in gradients.zip(dys).zip(kept) {
                channels_last::scatter(isa, pool, winners, dy, dx, accumulate);
            }
            sums.pooling.input += watch.elapsed();
        }
        scratch.pooled = between;
    }

    /// Takes `dy` of some images back to before the ReLU and the batch norm.
    fn mask(&self, isa: Isa, range: Range<usize>, dy: &mut [T], sums: &mut Sums<T>) {
        let prepared = self.prepared;
        let mask = &prepared.mask;
        for (image, dy) in range.zip(dy.chunks_exact_mut(mask.dy.image())) {
            if let Some(norm) = &prepared.norm {
                let x = &norm.x[image * norm.spans.x.layout.image()..];
                norm::input_gradient(isa, &norm.spans, &norm.gradient, x, dy);
                continue;
            }
            let y = &prepared.y[image * mask.y.image()..];
            mask_image(isa, mask, y, dy, &mut sums.image_bias);
            sums.add_image_bias();
        }
    }

    /// The convolution's own gradients, from what it reads and the gradient of what it yields.
    fn gradients(
        &self,
        x: &[T],
        dy: &[T],
        dx: Option<&mut [T]>,
        sums: &mut Sums<T>,
        scratch: &mut Scratch<T>,
    ) {
        if let (Some(pass), Some(dx)) = (&self.input, dx) {
            let watch = Watch::start();
            let whole = Part::whole(pass.output(), dx.len());
            pass.run(dy, (dx, &whole), scratch);
            sums.times.input += watch.elapsed();
        }
        if let Some(pass) = &self.weight {
            let watch = Watch::start();
            pass.run(x, dy, sums, scratch);
            sums.times.weight += watch.elapsed();
        }
    }
}

/// Images that operations with the same input take back one after the other.
pub(super) fn images_at_once<T: Element>(
    batch: usize,
    operations: &[OperationBackward<'_, T>],
) -> usize {
    let pixels = match operations {
        [_] => PIXELS_PER_TASK,
        // Their input, its gradient and their own maps share the L2 cache.
        _ => PIXELS_PER_TASK / 2,
    };
    let images = operations
        .iter()
        .map(|operation| images_per_task(pixels, batch, operation.output_pixels()));
    images.min().unwrap_or(1)
}

/// What the second half of the backward pass through a batch norm needs.
pub(super) struct NormGradient<'a, T> {
    pub(super) spans: GradientSpans,
    pub(super) gradient: InputGradient<T>,
    pub(super) x: &'a [T],
}

/// The weight gradient of a convolution: direct sums, or Winograd's products.
pub(super) enum AnyOuterPass<T: 'static> {
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

    fn run(&self, x: &[T], dy: &[T], sums: &mut Sums<T>, scratch: &mut Scratch<T>) {
        let accumulate = std::mem::replace(&mut sums.accumulate, Accumulate::Add);
        let weight = (&mut sums.weight[..self.sums_len()], accumulate);
        match self {
            Self::Direct(pass) => pass.run(x, dy, weight, &mut scratch.outer),
            Self::Winograd(pass) => pass.run(x, dy, weight, &mut scratch.winograd),
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

/// One thread's share of the parameters' gradients.
pub(super) struct Sums<T> {
    /// Sums of the weight's gradient, as the pass lays them out.
    pub(super) weight: Vec<T>,
    /// Whether the next products begin `weight`.
    accumulate: Accumulate,
    bias: Vec<T>,
    image_bias: Vec<T>,
    times: Times,
    /// Times of the pooling that is part of the convolution.
    pub(super) pooling: Times,
}

impl<T: Element> Sums<T> {
    /// Sums of nothing.
    fn new(weight: Vec<T>, c_out: usize) -> Self {
        Self {
            weight,
            accumulate: Accumulate::Begin,
            bias: vec![T::ZERO; c_out],
            image_bias: vec![T::ZERO; c_out],
            times: Times::default(),
            pooling: Times::default(),
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
pub(super) struct Mask {
    pub(super) y: MapLayout,
    pub(super) dy: MapLayout,
    pub(super) channel: usize,
    pub(super) channels: usize,
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
