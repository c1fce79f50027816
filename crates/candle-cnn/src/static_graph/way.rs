//! How one operation of a group takes a few images back.

use std::ops::Range;

use super::arena::{Layout, Part};
use super::builder::Convolution;
use super::forward::Forward;
use super::gather::{GatherPass, Start};
use super::norm::{self, GradientSpans, InputGradient};
use super::outer::OuterPass;
use super::pass::{AnyPass, Pooled, Scratch, images_per_task, pays};
use super::plan::Inner;
use super::pool::{self, Pool};
use super::profile::{Times, Watch};
use super::winograd::WinogradOuterPass;
use crate::conv2d::{PIXELS_PER_TASK, PackedWeight, keep_positive};
use crate::element::Element;
use crate::simd::{Isa, multiversion};

pub(super) enum PreparedWay<'a, T> {
    Convolution(Box<Prepared<'a, T>>),
    MaxPool { pool: Box<Pool>, is_first: bool },
}

/// A convolution's way back, and what it works with.
pub(super) struct Prepared<'a, T> {
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
    /// Whether nothing has been added up yet in the gradient of the input.
    pub(super) is_first: bool,
    pub(super) trains_weight: bool,
}

impl<T: Element> Prepared<'_, T> {
    pub(super) fn input_pass(&self, forward: &Forward<'_, T>) -> Option<AnyPass<'_, T>> {
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
            start: match self.is_first || self.pool.is_some() {
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

    pub(super) fn weight_pass(&self, forward: &Forward<'_, T>) -> AnyOuterPass<T> {
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
pub(super) enum Way<'a, T: 'static> {
    Convolution(Box<ConvolutionWay<'a, T>>),
    MaxPool { pool: &'a Pool, is_first: bool },
}

pub(super) struct ConvolutionWay<'a, T: 'static> {
    pub(super) prepared: &'a Prepared<'a, T>,
    pub(super) input: Option<AnyPass<'a, T>>,
    pub(super) weight: Option<AnyOuterPass<T>>,
}

impl<T: Element> Way<'_, T> {
    fn output_size(&self) -> (usize, usize) {
        match self {
            Self::Convolution(way) => way.prepared.mask.y.size,
            Self::MaxPool { pool, .. } => pool.y.size,
        }
    }

    /// For what a thread adds up, with memory of arbitrary values.
    pub(super) fn sums(&self, graph: &Inner) -> Sums<T> {
        match self {
            Self::Convolution(way) => {
                let len = way.weight.as_ref().map(AnyOuterPass::sums_len);
                let memory = len.map(|len| graph.arenas.take_flat(len));
                Sums::new(memory.unwrap_or_default(), way.prepared.c.c_out)
            }
            Self::MaxPool { .. } => Sums::new(Vec::new(), 0),
        }
    }

    /// Adds to `dx` of some images and to `sums`, or begins them where they are fresh.
    pub(super) fn run(
        &self,
        isa: Isa,
        images: Images<'_, T>,
        sums: (&mut Sums<T>, bool),
        scratch: &mut Scratch<T>,
    ) {
        match self {
            Self::MaxPool { pool, is_first } => {
                let watch = Watch::start();
                let Images { x, dy, dx, .. } = images;
                let gradients = dx
                    .into_iter()
                    .flat_map(|dx| dx.chunks_exact_mut(pool.dx.image()));
                let dys = dy.chunks_exact(pool.dy.image());
                for ((dx, dy), x) in gradients.zip(dys).zip(x.chunks_exact(pool.x.image())) {
                    pool::backward(isa, pool, x, dy, dx, *is_first);
                }
                sums.0.times.input += watch.elapsed();
            }
            Self::Convolution(way) => {
                let mut between = std::mem::take(&mut scratch.pooled);
                way.run(isa, images, sums, (scratch, &mut between));
                scratch.pooled = between;
            }
        }
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

impl<T: Element> ConvolutionWay<'_, T> {
    /// Masks `dy`, takes it back through the batch norm, the convolution and
    /// the pooling that is part of it: as [`Way::run`].
    fn run(
        &self,
        isa: Isa,
        images: Images<'_, T>,
        (sums, fresh): (&mut Sums<T>, bool),
        (scratch, between): (&mut Scratch<T>, &mut Pooled<T>),
    ) {
        let Images { range, x, dy, dx } = images;
        let prepared = self.prepared;
        let count = range.len();
        // Nobody may need more than the sums over the gradient: those of a bias are taken here, a batch norm's before.
        let goes_on = self.input.is_some() || self.weight.is_some();
        if goes_on || prepared.norm.is_none() {
            let watch = Watch::start();
            self.mask(isa, range, dy, sums);
            sums.times.other += watch.elapsed();
        }
        if !goes_on {
            return;
        }
        let Some(pool) = &prepared.pool else {
            self.gradients(x, dy, dx, (sums, fresh), scratch);
            return;
        };

        let watch = Watch::start();
        let (y, d_between, winners) = between.all(pool, count);
        let outputs = y.chunks_exact_mut(pool.y.image());
        let kept = winners.chunks_exact_mut(pool.winners());
        for ((x, y), winners) in x.chunks_exact(pool.x.image()).zip(outputs).zip(kept) {
            pool::forward_with_winners(isa, pool, x, y, winners);
        }
        sums.pooling.input += watch.elapsed();
        let wanted = dx.is_some().then_some(&mut *d_between);
        self.gradients(y, dy, wanted, (sums, fresh), scratch);
        if let Some(dx) = dx {
            let watch = Watch::start();
            let gradients = dx.chunks_exact_mut(pool.dx.image());
            let dys = d_between.chunks_exact(pool.dy.image());
            let kept = winners.chunks_exact(pool.winners());
            for ((dx, dy), winners) in gradients.zip(dys).zip(kept) {
                pool::scatter(isa, pool, winners, dy, dx, prepared.is_first);
            }
            sums.pooling.input += watch.elapsed();
        }
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
        (sums, fresh): (&mut Sums<T>, bool),
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
            let weight = &mut sums.weight[..pass.sums_len()];
            pass.run(x, dy, (weight, fresh), scratch);
            sums.times.weight += watch.elapsed();
        }
    }
}

/// Images that operations with the same input take back one after the other.
pub(super) fn images_at_once<T: Element>(batch: usize, ways: &[Way<'_, T>]) -> usize {
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
    pub(super) fn sums_len(&self) -> usize {
        match self {
            Self::Direct(pass) => pass.sums_len(),
            Self::Winograd(pass) => pass.sums_len(),
        }
    }

    pub(super) fn run(&self, x: &[T], dy: &[T], sums: (&mut [T], bool), scratch: &mut Scratch<T>) {
        match self {
            Self::Direct(pass) => pass.run(x, dy, sums, &mut scratch.outer),
            Self::Winograd(pass) => pass.run(x, dy, sums, &mut scratch.winograd),
        }
    }

    pub(super) fn unpack(&self, parts: &[Sums<T>], weight: &mut [T]) {
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
    pub(super) bias: Vec<T>,
    pub(super) image_bias: Vec<T>,
    pub(super) times: Times,
    /// Times of the pooling that is part of the convolution.
    pub(super) pooling: Times,
}

impl<T: Element> Sums<T> {
    /// Sums of nothing, but for the weight's: their memory may hold anything.
    fn new(weight: Vec<T>, c_out: usize) -> Self {
        Self {
            weight,
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
    pub(super) y: Layout,
    pub(super) dy: Layout,
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
