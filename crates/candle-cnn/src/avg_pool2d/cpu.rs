//! The fast path: the bins of sixteen planes at a time.
// Loops over registers by constant bounds: what the compiler vectorises surely.
#![allow(clippy::needless_range_loop)]

use rayon::prelude::*;

use super::{AvgPool2d, divisor};
use crate::element::Element;
use crate::maps::ALIGNMENT;
use crate::plane_groups::{Group, PlanesOf, by_groups};
use crate::simd::{Isa, multiversion};

pub(super) fn forward<T: Element>(
    pool: &AvgPool2d,
    isa: Isa,
    x: &[T],
    (height, width): (usize, usize),
) -> Vec<T> {
    let x = PlanesOf {
        values: x,
        pixels: height * width,
    };
    if pool.is_global((height, width)) {
        return plane_means(isa, x);
    }
    by_groups(isa, [x], pool.output_plane(), |group, [x], y| {
        forward_group(isa, pool, group, width, x, y);
    })
}

pub(super) fn backward<T: Element>(
    pool: &AvgPool2d,
    isa: Isa,
    dy: &[T],
    (height, width): (usize, usize),
) -> Vec<T> {
    if pool.is_global((height, width)) {
        return spread(dy, height * width);
    }
    let dy = PlanesOf {
        values: dy,
        pixels: pool.output_plane(),
    };
    by_groups(isa, [dy], height * width, |group, [dy], dx| {
        backward_group(isa, pool, group, width, dy, dx);
    })
}

/// Elements of a task where planes are taken as they are.
const TASK_ELEMENTS: usize = 1 << 14;

/// The mean of each plane: nothing is gained by laying out planes that are read once.
fn plane_means<T: Element>(isa: Isa, x: PlanesOf<'_, T>) -> Vec<T> {
    let mut y = vec![T::ZERO; x.values.len() / x.pixels];
    let planes = TASK_ELEMENTS / x.pixels + 1;
    y.par_chunks_mut(planes)
        .zip(x.values.par_chunks(planes * x.pixels))
        .for_each(|(y, values)| plane_means_of(isa, x.pixels, values, y));
    y
}

multiversion! {
    fn plane_means_of<T: Element>(pixels: usize, x: &[T], y: &mut [T]) = plane_means_body
}

#[inline(always)]
fn plane_means_body<T: Element>(pixels: usize, x: &[T], y: &mut [T]) {
    for (y, x) in y.iter_mut().zip(x.chunks_exact(pixels)) {
        *y = sum_of(x) / T::real(pixels as f64);
    }
}

/// Sums of `LANES` values side by side, which are then added up with what is left.
#[inline(always)]
fn sum_of<T: Element>(values: &[T]) -> T {
    const LANES: usize = ALIGNMENT;
    let (runs, rest) = values.as_chunks::<LANES>();
    let mut sum = T::ZERO;
    if let [first, runs @ ..] = runs {
        let mut sums = *first;
        for run in runs {
            for i in 0..LANES {
                sums[i] += run[i];
            }
        }
        for lane in sums {
            sum += lane;
        }
    }
    for &value in rest {
        sum += value;
    }
    sum
}

/// The gradient of each plane's mean, to all of its pixels alike.
fn spread<T: Element>(dy: &[T], pixels: usize) -> Vec<T> {
    let mut dx = vec![T::ZERO; dy.len() * pixels];
    let planes = TASK_ELEMENTS / pixels + 1;
    dx.par_chunks_mut(planes * pixels)
        .zip(dy.par_chunks(planes))
        .for_each(|(dx, dy)| {
            for (dx, &dy) in dx.chunks_exact_mut(pixels).zip(dy) {
                dx.fill(dy / T::real(pixels as f64));
            }
        });
    dx
}

multiversion! {
    fn forward_group<T: Element>(
        pool: &AvgPool2d, group: Group, width: usize, x: &[T], y: &mut [T],
    ) = forward_group_body
}

multiversion! {
    fn backward_group<T: Element>(
        pool: &AvgPool2d, group: Group, width: usize, dy: &[T], dx: &mut [T],
    ) = backward_group_body
}

#[inline(always)]
fn forward_group_body<T: Element>(
    pool: &AvgPool2d,
    group: Group,
    width: usize,
    x: &[T],
    y: &mut [T],
) {
    match group {
        Group::One => forward_lanes::<T, 1>(pool, width, x, y),
        Group::Sixteen => forward_lanes::<T, ALIGNMENT>(pool, width, x, y),
    }
}

/// Sums in row-major order, as PyTorch's.
#[inline(always)]
fn forward_lanes<T: Element, const LANES: usize>(
    pool: &AvgPool2d,
    width: usize,
    x: &[T],
    y: &mut [T],
) {
    let (x, _) = x.as_chunks::<LANES>();
    let (y, _) = y.as_chunks_mut::<LANES>();
    for (y, (h, w)) in y.iter_mut().zip(pool.bins()) {
        let mut sums = [T::ZERO; LANES];
        for row in h.range.clone() {
            for x in &x[row * width..][w.range.clone()] {
                for i in 0..LANES {
                    sums[i] += x[i];
                }
            }
        }
        let divisor = divisor(h, w);
        for i in 0..LANES {
            y[i] = sums[i] / divisor;
        }
    }
}

#[inline(always)]
fn backward_group_body<T: Element>(
    pool: &AvgPool2d,
    group: Group,
    width: usize,
    dy: &[T],
    dx: &mut [T],
) {
    match group {
        Group::One => backward_lanes::<T, 1>(pool, width, dy, dx),
        Group::Sixteen => {
            dx.fill(T::ZERO);
            backward_lanes::<T, ALIGNMENT>(pool, width, dy, dx);
        }
    }
}

/// Adds to `dx`, which is zeros.
#[inline(always)]
fn backward_lanes<T: Element, const LANES: usize>(
    pool: &AvgPool2d,
    width: usize,
    dy: &[T],
    dx: &mut [T],
) {
    let (dy, _) = dy.as_chunks::<LANES>();
    let (dx, _) = dx.as_chunks_mut::<LANES>();
    for (dy, (h, w)) in dy.iter().zip(pool.bins()) {
        let divisor: T = divisor(h, w);
        let mut shares = [T::ZERO; LANES];
        for i in 0..LANES {
            shares[i] = dy[i] / divisor;
        }
        for row in h.range.clone() {
            for dx in &mut dx[row * width..][w.range.clone()] {
                for i in 0..LANES {
                    dx[i] += shares[i];
                }
            }
        }
    }
}
