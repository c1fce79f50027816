//! The fast path: sums in f64 and maps, in loops that the compiler turns into
//! vector instructions.
//!
//! An image holds one plane per channel. Where planes are large, a loop runs
//! along a plane with the channel's numbers in registers. Where they are small
//! (deep in a network a plane is 2×2 or a single pixel), it runs along many
//! channels at once: their planes lie side by side, and the channels' numbers
//! are repeated for every pixel beforehand.
//!
//! The order of a sum depends on the shape alone: neither the instruction set
//! nor the number of threads changes a bit.

use rayon::prelude::*;

use super::{Moments, Sizes};
use crate::activation::{Activation, keep_positive, relu};
use crate::element::Element;
use crate::simd::{Isa, multiversion};

/// Planes of fewer pixels are handled many at a time. 64 floats fill four
/// vectors of AVX-512, enough for a loop along one plane to pay.
const SMALL_PLANE: usize = 64;

/// Columns (channels × pixels) of small planes that a task sums side by side:
/// two sums in f64 each, 8 KiB, stay in the L1 cache.
const COLUMNS: usize = 512;

/// Sums side by side along a large plane: two vectors of AVX-512 in f64.
const LANES: usize = 16;

/// Elements of the whole tensor per task of a map.
const MAP_CHUNK: usize = 1 << 14;

impl Sizes {
    fn has_small_planes(&self) -> bool {
        self.pixels < SMALL_PLANE
    }

    fn is_empty(&self) -> bool {
        self.batch * self.channels * self.pixels == 0
    }

    /// Channels that one task sums.
    fn channels_per_block(&self) -> usize {
        (COLUMNS / self.pixels.max(1)).max(1)
    }

    /// The planes of some channels from `first` on, image by image.
    fn rows<'a, T>(
        &self,
        data: &'a [T],
        first: usize,
        channels: usize,
    ) -> impl Iterator<Item = &'a [T]> + use<'a, T> {
        let image = self.channels * self.pixels;
        let (start, len) = (first * self.pixels, channels * self.pixels);
        data.chunks_exact(image)
            .map(move |image| &image[start..start + len])
    }
}

/// Mean and biased variance of every channel, in two passes, so that a large
/// mean does not cancel the variance away.
pub(super) fn moments<T: Element>(sizes: &Sizes, isa: Isa, x: &[T]) -> Vec<Moments> {
    let mut moments = vec![Moments::default(); sizes.channels];
    if sizes.is_empty() {
        return moments;
    }
    let block = sizes.channels_per_block();
    moments
        .par_chunks_mut(block)
        .enumerate()
        .for_each(|(i, moments)| block_moments(isa, sizes, x, i * block, moments));
    moments
}

multiversion! {
    fn block_moments<T: Element>(sizes: &Sizes, x: &[T], first: usize, moments: &mut [Moments]) = block_moments_body
}

#[inline(always)]
fn block_moments_body<T: Element>(sizes: &Sizes, x: &[T], first: usize, moments: &mut [Moments]) {
    let count = sizes.count() as f64;
    if sizes.has_small_planes() {
        let columns = moments.len() * sizes.pixels;
        let mut sums = vec![0.0; columns];
        for row in sizes.rows(x, first, moments.len()) {
            for (sum, &x) in sums.iter_mut().zip(row) {
                *sum += x.as_f64();
            }
        }
        for (moments, sums) in moments.iter_mut().zip(sums.chunks_exact_mut(sizes.pixels)) {
            moments.mean = sums.iter().sum::<f64>() / count;
            sums.fill(moments.mean);
        }
        let (means, mut sums) = (sums, vec![0.0; columns]);
        for row in sizes.rows(x, first, moments.len()) {
            for (sum, (&x, mean)) in sums.iter_mut().zip(row.iter().zip(&means)) {
                let d = x.as_f64() - mean;
                *sum += d * d;
            }
        }
        for (moments, sums) in moments.iter_mut().zip(sums.chunks_exact(sizes.pixels)) {
            moments.variance = sums.iter().sum::<f64>() / count;
        }
        return;
    }
    for (i, moments) in moments.iter_mut().enumerate() {
        let planes = || sizes.rows(x, first + i, 1);
        let mean = sum_of(planes(), |x| x) / count;
        let squares = sum_of(planes(), |x| {
            let d = x - mean;
            d * d
        });
        *moments = Moments {
            mean,
            variance: squares / count,
        };
    }
}

/// The sum over the planes of a channel, of what `of` makes of each value.
#[inline(always)]
fn sum_of<'a, T: Element>(planes: impl Iterator<Item = &'a [T]>, of: impl Fn(f64) -> f64) -> f64 {
    let mut sums = [0.0; LANES];
    for plane in planes {
        let (chunks, rest) = plane.as_chunks::<LANES>();
        for chunk in chunks {
            for lane in 0..LANES {
                sums[lane] += of(chunk[lane].as_f64());
            }
        }
        for (sum, x) in sums.iter_mut().zip(rest) {
            *sum += of(x.as_f64());
        }
    }
    sums.iter().sum()
}

/// `(x − mean) · scale + bias`. Taking the mean away first costs nothing beside
/// the memory traffic and keeps digits where the mean is large.
#[derive(Clone, Copy)]
pub(super) struct Affine<T> {
    pub(super) mean: T,
    pub(super) scale: T,
    pub(super) bias: T,
}

impl<T: Element> Affine<T> {
    #[inline(always)]
    fn apply(self, x: T) -> T {
        (x - self.mean) * self.scale + self.bias
    }
}

/// [`Affine`] by channel, then the activation.
pub(super) fn apply<T: Element>(
    sizes: &Sizes,
    isa: Isa,
    x: &[T],
    affine: &[Affine<T>],
    activation: Activation,
) -> Vec<T> {
    let mut y = vec![T::ZERO; x.len()];
    map(sizes, &mut y, affine, |range, affine, y| {
        apply_run(isa, &x[range], affine, activation, y);
    });
    y
}

multiversion! {
    fn apply_run<T: Element>(x: &[T], affine: Channels<Affine<T>>, activation: Activation, y: &mut [T]) = apply_run_body
}

#[inline(always)]
fn apply_run_body<T: Element>(
    x: &[T],
    affine: Channels<Affine<T>>,
    activation: Activation,
    y: &mut [T],
) {
    match (affine, activation) {
        (Channels::One(a), Activation::Identity) => {
            y.iter_mut().zip(x).for_each(|(y, &x)| *y = a.apply(x))
        }
        (Channels::One(a), Activation::Relu) => y
            .iter_mut()
            .zip(x)
            .for_each(|(y, &x)| *y = relu(a.apply(x))),
        (Channels::Each(a), Activation::Identity) => {
            for (y, (&x, a)) in y.iter_mut().zip(x.iter().zip(a)) {
                *y = a.apply(x);
            }
        }
        (Channels::Each(a), Activation::Relu) => {
            for (y, (&x, a)) in y.iter_mut().zip(x.iter().zip(a)) {
                *y = relu(a.apply(x));
            }
        }
    }
}

/// The numbers that belong to a run of values.
#[derive(Clone, Copy)]
enum Channels<'a, N> {
    /// The run lies inside one channel.
    One(N),
    /// One for each value.
    Each(&'a [N]),
}

/// Fills `out` run by run: `f` gets where a run lies, the numbers of its
/// channels and the part of `out`.
fn map<T: Element, N: Copy + Send + Sync>(
    sizes: &Sizes,
    out: &mut [T],
    numbers: &[N],
    f: impl Fn(std::ops::Range<usize>, Channels<N>, &mut [T]) + Sync,
) {
    if sizes.is_empty() {
        return;
    }
    if sizes.has_small_planes() {
        let columns: Vec<N> = numbers
            .iter()
            .flat_map(|&n| std::iter::repeat_n(n, sizes.pixels))
            .collect();
        out.par_chunks_mut(columns.len())
            .with_min_len(MAP_CHUNK.div_ceil(columns.len()))
            .enumerate()
            .for_each(|(image, out)| {
                let start = image * columns.len();
                f(start..start + columns.len(), Channels::Each(&columns), out);
            });
    } else {
        out.par_chunks_mut(sizes.pixels)
            .with_min_len(MAP_CHUNK.div_ceil(sizes.pixels))
            .enumerate()
            .for_each(|(plane, out)| {
                let start = plane * sizes.pixels;
                let number = numbers[plane % sizes.channels];
                f(start..start + sizes.pixels, Channels::One(number), out);
            });
    }
}

/// Σ dy and Σ dy · (x − mean) of a channel.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GradientSums {
    pub(super) dy: f64,
    pub(super) dy_x: f64,
}

/// The sums of every channel; `relu` holds the forward pass's numbers where a
/// ReLU followed, whose mask is found again from `x`.
pub(super) fn gradient_sums<T: Element>(
    sizes: &Sizes,
    isa: Isa,
    (x, dy): (&[T], &[T]),
    moments: &[Moments],
    relu: Option<&[Affine<T>]>,
) -> Vec<GradientSums> {
    let mut sums = vec![GradientSums::default(); sizes.channels];
    if sizes.is_empty() {
        return sums;
    }
    let block = sizes.channels_per_block();
    sums.par_chunks_mut(block)
        .enumerate()
        .for_each(|(i, sums)| {
            block_gradient_sums(isa, sizes, (x, dy), i * block, moments, relu, sums);
        });
    sums
}

multiversion! {
    fn block_gradient_sums<T: Element>(
        sizes: &Sizes,
        x_dy: (&[T], &[T]),
        first: usize,
        moments: &[Moments],
        relu: Option<&[Affine<T>]>,
        sums: &mut [GradientSums],
    ) = block_gradient_sums_body
}

#[inline(always)]
fn block_gradient_sums_body<T: Element>(
    sizes: &Sizes,
    (x, dy): (&[T], &[T]),
    first: usize,
    moments: &[Moments],
    relu: Option<&[Affine<T>]>,
    sums: &mut [GradientSums],
) {
    let channels = sums.len();
    if sizes.has_small_planes() {
        let columns = channels * sizes.pixels;
        let repeat = |c: usize| first + c / sizes.pixels;
        let means: Vec<f64> = (0..columns).map(|c| moments[repeat(c)].mean).collect();
        let affine: Option<Vec<Affine<T>>> =
            relu.map(|affine| (0..columns).map(|c| affine[repeat(c)]).collect());
        let (mut sum, mut sum_x) = (vec![0.0; columns], vec![0.0; columns]);
        let rows = sizes
            .rows(x, first, channels)
            .zip(sizes.rows(dy, first, channels));
        for (x, dy) in rows {
            // Lengths that the compiler knows to be equal need no checks.
            let (x, dy, means) = (&x[..columns], &dy[..columns], &means[..columns]);
            let (sum, sum_x) = (&mut sum[..columns], &mut sum_x[..columns]);
            match affine.as_deref() {
                None => {
                    for c in 0..columns {
                        let dy = dy[c].as_f64();
                        sum[c] += dy;
                        sum_x[c] += dy * (x[c].as_f64() - means[c]);
                    }
                }
                Some(affine) => {
                    let affine = &affine[..columns];
                    for c in 0..columns {
                        let dy = keep_positive(dy[c], affine[c].apply(x[c])).as_f64();
                        sum[c] += dy;
                        sum_x[c] += dy * (x[c].as_f64() - means[c]);
                    }
                }
            }
        }
        let planes = sum
            .chunks_exact(sizes.pixels)
            .zip(sum_x.chunks_exact(sizes.pixels));
        for (sums, (dy, dy_x)) in sums.iter_mut().zip(planes) {
            *sums = GradientSums {
                dy: dy.iter().sum(),
                dy_x: dy_x.iter().sum(),
            };
        }
        return;
    }
    for (i, sums) in sums.iter_mut().enumerate() {
        let c = first + i;
        let affine = relu.map(|affine| affine[c]);
        let planes = sizes.rows(x, c, 1).zip(sizes.rows(dy, c, 1));
        *sums = match affine {
            None => plane_sums(planes, moments[c].mean, |_, dy| dy),
            Some(a) => plane_sums(planes, moments[c].mean, |x, dy| {
                keep_positive(dy, a.apply(x))
            }),
        };
    }
}

#[inline(always)]
fn plane_sums<'a, T: Element>(
    planes: impl Iterator<Item = (&'a [T], &'a [T])>,
    mean: f64,
    masked: impl Fn(T, T) -> T,
) -> GradientSums {
    let (mut sum, mut sum_x) = ([0.0; LANES], [0.0; LANES]);
    for (x, dy) in planes {
        let ((x, x_rest), (dy, dy_rest)) = (x.as_chunks::<LANES>(), dy.as_chunks::<LANES>());
        for (x, dy) in x.iter().zip(dy) {
            for lane in 0..LANES {
                let dy = masked(x[lane], dy[lane]).as_f64();
                sum[lane] += dy;
                sum_x[lane] += dy * (x[lane].as_f64() - mean);
            }
        }
        for (lane, (&x, &dy)) in x_rest.iter().zip(dy_rest).enumerate() {
            let dy = masked(x, dy).as_f64();
            sum[lane] += dy;
            sum_x[lane] += dy * (x.as_f64() - mean);
        }
    }
    GradientSums {
        dy: sum.iter().sum(),
        dy_x: sum_x.iter().sum(),
    }
}

/// `dx = scale · (dy − offset − (x − mean) · slope)`, or with given statistics `dx = scale · dy`.
#[derive(Clone, Copy)]
pub(super) struct InputGradient<T> {
    pub(super) scale: T,
    pub(super) offset: T,
    pub(super) slope: T,
    /// The forward pass's numbers: mean, and the mask where a ReLU followed.
    pub(super) affine: Affine<T>,
}

impl<T: Element> InputGradient<T> {
    #[inline(always)]
    fn apply(self, x: T, dy: T, of_batch: bool) -> T {
        match of_batch {
            true => self.scale * (dy - self.offset - (x - self.affine.mean) * self.slope),
            // Where x is infinite or NaN, 0 · x would not be 0.
            false => self.scale * dy,
        }
    }

    #[inline(always)]
    fn apply_masked(self, x: T, dy: T, of_batch: bool) -> T {
        self.apply(x, keep_positive(dy, self.affine.apply(x)), of_batch)
    }
}

/// The input gradient, element by element.
pub(super) fn input_gradient<T: Element>(
    sizes: &Sizes,
    isa: Isa,
    (x, dy): (&[T], &[T]),
    numbers: &[InputGradient<T>],
    of_batch: bool,
    activation: Activation,
) -> Vec<T> {
    let mut dx = vec![T::ZERO; x.len()];
    map(sizes, &mut dx, numbers, |range, numbers, dx| {
        let of_run = (&x[range.clone()], &dy[range]);
        input_gradient_run(isa, of_run, numbers, of_batch, activation, dx);
    });
    dx
}

multiversion! {
    fn input_gradient_run<T: Element>(
        of_run: (&[T], &[T]),
        numbers: Channels<InputGradient<T>>,
        of_batch: bool,
        activation: Activation,
        dx: &mut [T],
    ) = input_gradient_run_body
}

#[inline(always)]
fn input_gradient_run_body<T: Element>(
    (x, dy): (&[T], &[T]),
    numbers: Channels<InputGradient<T>>,
    of_batch: bool,
    activation: Activation,
    dx: &mut [T],
) {
    let values = dx.iter_mut().zip(x.iter().zip(dy));
    match (numbers, activation) {
        (Channels::One(n), Activation::Identity) => {
            values.for_each(|(dx, (&x, &dy))| *dx = n.apply(x, dy, of_batch));
        }
        (Channels::One(n), Activation::Relu) => {
            values.for_each(|(dx, (&x, &dy))| *dx = n.apply_masked(x, dy, of_batch));
        }
        (Channels::Each(n), Activation::Identity) => {
            for ((dx, (&x, &dy)), n) in values.zip(n) {
                *dx = n.apply(x, dy, of_batch);
            }
        }
        (Channels::Each(n), Activation::Relu) => {
            for ((dx, (&x, &dy)), n) in values.zip(n) {
                *dx = n.apply_masked(x, dy, of_batch);
            }
        }
    }
}
