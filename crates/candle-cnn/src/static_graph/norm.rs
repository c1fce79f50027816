//! Batch norm over pixels of channels, with the ReLU behind it.
//!
//! The formulas are those of [`crate::batch_norm_relu_train`]. A channel's
//! numbers lie side by side here, so that every loop runs along the channels
//! of a pixel. The statistics take one pass, while the convolution's output is
//! in the cache: sums of what is left of each value without its channel's
//! first one, in f64, so that a large mean does not cancel the variance away.
// Loops over lists of one length: what the compiler vectorises surely.
#![allow(clippy::needless_range_loop)]

use crate::activation::{keep_positive, relu};
use crate::batch_norm::Moments;
use crate::element::Element;
use crate::maps::MapLayout;
use crate::simd::multiversion;

/// Some channels of every pixel of a layout.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) layout: MapLayout,
    /// The first of these channels.
    pub(super) channel: usize,
    pub(super) channels: usize,
}

impl Span {
    #[inline(always)]
    fn at(&self, h: usize, w: usize) -> std::ops::Range<usize> {
        let first = self.layout.at(h, w) + self.channel;
        first..first + self.channels
    }
}

/// What a part of the batch adds to the statistics, by channel.
pub(super) struct MomentSums {
    count: usize,
    /// The first value.
    origin: Vec<f64>,
    /// `Σ (x − origin)` and its squares.
    sum: Vec<f64>,
    squares: Vec<f64>,
}

impl MomentSums {
    pub(super) fn new(channels: usize) -> Self {
        Self {
            count: 0,
            origin: vec![0.0; channels],
            sum: vec![0.0; channels],
            squares: vec![0.0; channels],
        }
    }

    /// The statistics of all parts, joined in their order (Chan, Golub &
    /// LeVeque, "Updating Formulae and a Pairwise Algorithm", 1979).
    pub(super) fn join(parts: &[Self], channels: usize) -> Vec<Moments> {
        let joined = (0..channels).map(|c| {
            let (mut count, mut mean, mut squares) = (0.0, 0.0, 0.0);
            for part in parts.iter().filter(|part| part.count > 0) {
                let n = part.count as f64;
                let part_mean = part.origin[c] + part.sum[c] / n;
                let difference = part_mean - mean;
                let total = count + n;
                squares += part.squares[c] - part.sum[c] * part.sum[c] / n
                    + difference * difference * count * n / total;
                mean += difference * n / total;
                count = total;
            }
            // Below 0 by rounding alone; a NaN stays.
            let variance = squares / count;
            Moments {
                mean,
                variance: if variance < 0.0 { 0.0 } else { variance },
            }
        });
        joined.collect()
    }
}

multiversion! {
    /// Adds the pixels of one image.
    pub(super) fn add_moments<T: Element>(span: &Span, x: &[T], sums: &mut MomentSums) = add_moments_body
}

#[inline(always)]
fn add_moments_body<T: Element>(span: &Span, x: &[T], sums: &mut MomentSums) {
    let (height, width) = span.layout.size;
    let channels = span.channels;
    if sums.count == 0 {
        for (origin, x) in sums.origin.iter_mut().zip(&x[span.at(0, 0)]) {
            *origin = x.as_f64();
        }
    }
    sums.count += height * width;
    let origin = &sums.origin[..channels];
    let (sum, squares) = (&mut sums.sum[..channels], &mut sums.squares[..channels]);
    for h in 0..height {
        for w in 0..width {
            let x = &x[span.at(h, w)][..channels];
            for c in 0..channels {
                let difference = x[c].as_f64() - origin[c];
                sum[c] += difference;
                squares[c] += difference * difference;
            }
        }
    }
}

/// `(x − mean) · scale + bias`, by channel.
pub(super) struct Affine<T> {
    pub(super) mean: Vec<T>,
    pub(super) scale: Vec<T>,
    pub(super) bias: Vec<T>,
}

impl<T: Element> Affine<T> {
    pub(super) fn new(moments: &[Moments], weight: &[T], bias: &[T], eps: f64) -> Self {
        let scale = moments.iter().zip(weight);
        let scale = scale.map(|(m, weight)| T::real(weight.as_f64() * m.inverse_std(eps)));
        Self {
            mean: moments.iter().map(|m| T::real(m.mean)).collect(),
            scale: scale.collect(),
            bias: bias[..moments.len()].to_vec(),
        }
    }
}

multiversion! {
    /// One image's values, where they are.
    pub(super) fn normalise_in_place<T: Element>(span: &Span, affine: &Affine<T>, x: &mut [T]) = in_place_body
}

#[inline(always)]
fn in_place_body<T: Element>(span: &Span, affine: &Affine<T>, x: &mut [T]) {
    let (height, width) = span.layout.size;
    let channels = span.channels;
    let (mean, scale) = (&affine.mean[..channels], &affine.scale[..channels]);
    let bias = &affine.bias[..channels];
    for h in 0..height {
        for w in 0..width {
            let x = &mut x[span.at(h, w)][..channels];
            for c in 0..channels {
                x[c] = relu((x[c] - mean[c]) * scale[c] + bias[c]);
            }
        }
    }
}

/// Where a normalisation reads (`x`) and where it writes (`y`).
pub(super) struct Between {
    pub(super) x: Span,
    pub(super) y: Span,
}

multiversion! {
    /// One image's values, into another layout.
    pub(super) fn normalise<T: Element>(between: &Between, affine: &Affine<T>, x: &[T], y: &mut [T]) = normalise_body
}

#[inline(always)]
fn normalise_body<T: Element>(between: &Between, affine: &Affine<T>, x: &[T], y: &mut [T]) {
    let (height, width) = between.x.layout.size;
    let channels = between.x.channels;
    let (mean, scale) = (&affine.mean[..channels], &affine.scale[..channels]);
    let bias = &affine.bias[..channels];
    for h in 0..height {
        for w in 0..width {
            let x = &x[between.x.at(h, w)][..channels];
            let y = &mut y[between.y.at(h, w)][..channels];
            for c in 0..channels {
                y[c] = relu((x[c] - mean[c]) * scale[c] + bias[c]);
            }
        }
    }
}

/// Where a batch norm's input, its output behind the ReLU, and that one's gradient lie.
pub(super) struct GradientSpans {
    pub(super) x: Span,
    pub(super) y: Span,
    pub(super) dy: Span,
}

/// What a part of the batch adds to the parameters' gradients, by channel.
pub(super) struct GradientSums {
    /// `Σ dy`.
    pub(super) dy: Vec<f64>,
    /// `Σ dy · (x − mean)`.
    pub(super) dy_x: Vec<f64>,
}

impl GradientSums {
    pub(super) fn new(channels: usize) -> Self {
        Self {
            dy: vec![0.0; channels],
            dy_x: vec![0.0; channels],
        }
    }

    /// All parts, added up in their order.
    pub(super) fn join(parts: Vec<Self>, channels: usize) -> Self {
        let mut sums = Self::new(channels);
        for part in parts {
            for (sums, part) in [(&mut sums.dy, part.dy), (&mut sums.dy_x, part.dy_x)] {
                sums.iter_mut()
                    .zip(part)
                    .for_each(|(sum, part)| *sum += part);
            }
        }
        sums
    }
}

multiversion! {
    /// Sets one image's gradient to zero where the output is not positive, and adds it up.
    pub(super) fn add_gradient<T: Element>(
        spans: &GradientSpans, mean: &[T], x: &[T], y: &[T], dy: &mut [T], sums: &mut GradientSums,
    ) = add_gradient_body
}

#[inline(always)]
fn add_gradient_body<T: Element>(
    spans: &GradientSpans,
    mean: &[T],
    x: &[T],
    y: &[T],
    dy: &mut [T],
    sums: &mut GradientSums,
) {
    let (height, width) = spans.x.layout.size;
    let channels = spans.x.channels;
    let mean = &mean[..channels];
    let (sum, sum_x) = (&mut sums.dy[..channels], &mut sums.dy_x[..channels]);
    for h in 0..height {
        for w in 0..width {
            let x = &x[spans.x.at(h, w)][..channels];
            let y = &y[spans.y.at(h, w)][..channels];
            let dy = &mut dy[spans.dy.at(h, w)][..channels];
            for c in 0..channels {
                let masked = keep_positive(dy[c], y[c]);
                dy[c] = masked;
                sum[c] += masked.as_f64();
                sum_x[c] += masked.as_f64() * (x[c] - mean[c]).as_f64();
            }
        }
    }
}

/// `(dy − offset − (x − mean) · slope) · scale`, by channel: the gradient of
/// the batch norm's input.
pub(super) struct InputGradient<T> {
    mean: Vec<T>,
    scale: Vec<T>,
    offset: Vec<T>,
    slope: Vec<T>,
}

impl<T: Element> InputGradient<T> {
    /// `count` are the values of a channel in the batch.
    pub(super) fn new(
        affine: Affine<T>,
        moments: &[Moments],
        sums: &GradientSums,
        eps: f64,
        count: usize,
    ) -> Self {
        let share = 1.0 / count as f64;
        let slope = sums.dy_x.iter().zip(moments);
        let slope = slope.map(|(dy_x, moments)| {
            let inverse_std = moments.inverse_std(eps);
            T::real(dy_x * inverse_std * inverse_std * share)
        });
        Self {
            mean: affine.mean,
            scale: affine.scale,
            offset: sums.dy.iter().map(|dy| T::real(dy * share)).collect(),
            slope: slope.collect(),
        }
    }
}

/// The gradients of a batch norm's weight and bias.
pub(super) fn parameter_gradients<T: Element>(
    moments: &[Moments],
    sums: &GradientSums,
    eps: f64,
) -> (Vec<T>, Vec<T>) {
    let weight = sums.dy_x.iter().zip(moments);
    (
        weight
            .map(|(dy_x, m)| T::real(dy_x * m.inverse_std(eps)))
            .collect(),
        sums.dy.iter().map(|&dy| T::real(dy)).collect(),
    )
}

multiversion! {
    /// One image's masked gradient of the output becomes that of the input.
    pub(super) fn input_gradient<T: Element>(
        spans: &GradientSpans, numbers: &InputGradient<T>, x: &[T], dy: &mut [T],
    ) = input_gradient_body
}

#[inline(always)]
fn input_gradient_body<T: Element>(
    spans: &GradientSpans,
    numbers: &InputGradient<T>,
    x: &[T],
    dy: &mut [T],
) {
    let (height, width) = spans.x.layout.size;
    let channels = spans.x.channels;
    let (mean, scale) = (&numbers.mean[..channels], &numbers.scale[..channels]);
    let (offset, slope) = (&numbers.offset[..channels], &numbers.slope[..channels]);
    for h in 0..height {
        for w in 0..width {
            let x = &x[spans.x.at(h, w)][..channels];
            let dy = &mut dy[spans.dy.at(h, w)][..channels];
            for c in 0..channels {
                dy[c] = (dy[c] - offset[c] - (x[c] - mean[c]) * slope[c]) * scale[c];
            }
        }
    }
}
