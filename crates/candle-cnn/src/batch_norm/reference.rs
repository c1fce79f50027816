//! The definition as plain loops in f64.

use super::{Moments, Sizes};
use crate::activation::Activation;

impl Sizes {
    /// Positions of one channel's values.
    fn channel(&self, c: usize) -> impl Iterator<Item = usize> + use<> {
        let (channels, pixels) = (self.channels, self.pixels);
        (0..self.batch).flat_map(move |n| {
            let start = (n * channels + c) * pixels;
            start..start + pixels
        })
    }
}

/// Mean and biased variance of every channel.
pub(super) fn moments(sizes: &Sizes, x: &[f64]) -> Vec<Moments> {
    let mean_of = |c: usize, f: &dyn Fn(f64) -> f64| {
        sizes.channel(c).map(|i| f(x[i])).sum::<f64>() / sizes.count() as f64
    };
    (0..sizes.channels)
        .map(|c| {
            let mean = mean_of(c, &|x| x);
            let variance = mean_of(c, &|x| (x - mean).powi(2));
            Moments { mean, variance }
        })
        .collect()
}

/// `(x − mean)/σ · weight + bias`, then the activation.
pub(super) fn forward(
    sizes: &Sizes,
    x: &[f64],
    (weight, bias): (&[f64], &[f64]),
    moments: &[Moments],
    eps: f64,
    activation: Activation,
) -> Vec<f64> {
    let mut y = vec![0.0; x.len()];
    for c in 0..sizes.channels {
        for i in sizes.channel(c) {
            let normalised = (x[i] - moments[c].mean) / (moments[c].variance + eps).sqrt();
            y[i] = normalised * weight[c] + bias[c];
            if activation == Activation::Relu {
                y[i] = y[i].max(0.0);
            }
        }
    }
    y
}

/// Gradients of `x` (through the batch's statistics), weight and bias; `y` is
/// the forward pass's result where a ReLU made it.
pub(super) fn backward(
    sizes: &Sizes,
    (x, dy): (&[f64], &[f64]),
    weight: &[f64],
    moments: &[Moments],
    eps: f64,
    y: Option<&[f64]>,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut dx, mut dweight, mut dbias) = (vec![0.0; x.len()], vec![], vec![]);
    let masked = |i: usize| {
        if y.is_some_and(|y| y[i] <= 0.0) {
            0.0
        } else {
            dy[i]
        }
    };
    for c in 0..sizes.channels {
        let inverse_std = 1.0 / (moments[c].variance + eps).sqrt();
        let normalised = |i: usize| (x[i] - moments[c].mean) * inverse_std;
        let sum = sizes.channel(c).map(masked).sum::<f64>();
        let sum_x: f64 = sizes.channel(c).map(|i| masked(i) * normalised(i)).sum();
        let count = sizes.count() as f64;
        for i in sizes.channel(c) {
            let correction = sum / count + normalised(i) * sum_x / count;
            dx[i] = weight[c] * inverse_std * (masked(i) - correction);
        }
        dweight.push(sum_x);
        dbias.push(sum);
    }
    (dx, dweight, dbias)
}
