//! The fast path: [`channels_last`] on groups of planes; where there is none, a row of windows at a time.

use super::channels_last::{self, Pool};
use crate::element::Element;
use crate::maps::{ALIGNMENT, MapLayout, Part};
use crate::plane_groups::{Group, PlanesOf, by_groups};
use crate::simd::{Accumulate, Isa, multiversion};
use crate::window::Planes;

pub(super) fn forward<T: Element>(planes: &Planes, isa: Isa, x: &[T]) -> Vec<T> {
    let x = PlanesOf {
        values: x,
        pixels: planes.input_plane(),
    };
    let pool = group_pool(planes);
    by_groups(
        isa,
        [x],
        planes.output_plane(),
        |group, [x], y| match group {
            Group::One => forward_plane(isa, planes, x, y),
            Group::Sixteen => {
                let whole = Part::whole(pool.y, y.len());
                channels_last::forward(isa, &pool, x, y, &whole);
            }
        },
    )
}

pub(super) fn backward<T: Element>(planes: &Planes, isa: Isa, x: &[T], dy: &[T]) -> Vec<T> {
    let x = PlanesOf {
        values: x,
        pixels: planes.input_plane(),
    };
    let dy = PlanesOf {
        values: dy,
        pixels: planes.output_plane(),
    };
    let pool = group_pool(planes);
    by_groups(isa, [x, dy], x.pixels, |group, [x, dy], dx| match group {
        Group::One => backward_plane(isa, planes, x, dy, dx),
        Group::Sixteen => {
            channels_last::backward(isa, &pool, x, dy, dx, Accumulate::Begin);
        }
    })
}

/// The pooling of a group of planes.
fn group_pool(planes: &Planes) -> Pool {
    let map = |size| MapLayout {
        size,
        halo: 0,
        pixel: ALIGNMENT,
    };
    let (h, w) = (planes.h, planes.w);
    let (x, y) = (map((h.input, w.input)), map((h.output, w.output)));
    Pool {
        h,
        w,
        x,
        dx: x,
        y,
        dy: y,
    }
}

multiversion! {
    fn forward_plane<T: Element>(planes: &Planes, x: &[T], y: &mut [T]) = forward_plane_body
}

multiversion! {
    /// `dx` is zeros.
    fn backward_plane<T: Element>(planes: &Planes, x: &[T], dy: &[T], dx: &mut [T]) = backward_plane_body
}

#[inline(always)]
fn forward_plane_body<T: Element>(planes: &Planes, x: &[T], y: &mut [T]) {
    let mut winners = vec![0; planes.w.output];
    for (oh, y) in y.chunks_exact_mut(planes.w.output).enumerate() {
        row_winners(planes, x, oh, y, &mut winners);
    }
}

#[inline(always)]
fn backward_plane_body<T: Element>(planes: &Planes, x: &[T], dy: &[T], dx: &mut [T]) {
    let w = &planes.w;
    let mut winners = vec![0; w.output];
    let mut best = vec![T::ZERO; w.output];
    for (oh, dy) in dy.chunks_exact(w.output).enumerate() {
        row_winners(planes, x, oh, &mut best, &mut winners);
        let first = oh * planes.h.stride;
        for (ow, (&tap, &dy)) in winners.iter().zip(dy).enumerate() {
            let (r, s) = (tap as usize / w.kernel, tap as usize % w.kernel);
            let row = first + r - planes.h.padding;
            dx[row * w.input + ow * w.stride + s - w.padding] += dy;
        }
    }
}

/// Best value and winning tap of each window of output row `oh`.
#[inline(always)]
fn row_winners<T: Element>(
    planes: &Planes,
    x: &[T],
    oh: usize,
    best: &mut [T],
    winners: &mut [u32],
) {
    let (h, w) = (&planes.h, &planes.w);
    best.fill(T::NEG_INFINITY);
    let rows = h.range(oh);
    let tap = |row: usize, s: usize| ((row + h.padding - oh * h.stride) * w.kernel + s) as u32;
    // Until something greater than −∞ comes, the first pixel inside wins.
    for (ow, winner) in winners.iter_mut().enumerate() {
        *winner = tap(rows.start, w.padding.saturating_sub(ow * w.stride));
    }
    // Before and behind these, all windows see the border.
    let taps =
        w.padding.saturating_sub((w.output - 1) * w.stride)..w.kernel.min(w.input + w.padding);
    for row in rows {
        let x = &x[row * w.input..][..w.input];
        for s in taps.clone() {
            // The windows whose tap lies inside.
            let first = w.padding.saturating_sub(s).div_ceil(w.stride);
            let end = (w.input + w.padding).saturating_sub(s).div_ceil(w.stride);
            let windows = first..end.min(w.output);
            if windows.is_empty() {
                continue;
            }
            let x = &x[first * w.stride + s - w.padding..];
            let windows = (&mut best[windows.clone()], &mut winners[windows]);
            if w.stride == 1 {
                take_better(x.iter(), tap(row, s), windows);
            } else {
                take_better(x.iter().step_by(w.stride), tap(row, s), windows);
            }
        }
    }
}

#[inline(always)]
fn take_better<'a, T: Element>(
    x: impl Iterator<Item = &'a T>,
    tap: u32,
    (best, winners): (&mut [T], &mut [u32]),
) {
    for (&x, (best, winner)) in x.zip(best.iter_mut().zip(winners)) {
        let wins = (x > *best) | x.is_nan();
        *best = if wins { x } else { *best };
        *winner = if wins { tap } else { *winner };
    }
}
