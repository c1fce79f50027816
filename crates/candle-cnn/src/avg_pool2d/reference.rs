//! The definition as plain loops over one plane.

use super::{AvgPool2d, divisor};
use crate::element::Element;

pub(super) fn forward<T: Element>(pool: &AvgPool2d, x: &[T], width: usize) -> Vec<T> {
    let bins = pool.bins().map(|(h, w)| {
        let mut sum = T::ZERO;
        for row in h.range.clone() {
            for &x in &x[row * width..][w.range.clone()] {
                sum += x;
            }
        }
        sum / divisor(h, w)
    });
    bins.collect()
}

/// The gradient of a plane of `pixels`.
pub(super) fn backward<T: Element>(
    pool: &AvgPool2d,
    dy: &[T],
    width: usize,
    pixels: usize,
) -> Vec<T> {
    let mut dx = vec![T::ZERO; pixels];
    for (&dy, (h, w)) in dy.iter().zip(pool.bins()) {
        for row in h.range.clone() {
            for dx in &mut dx[row * width..][w.range.clone()] {
                *dx += dy / divisor(h, w);
            }
        }
    }
    dx
}
