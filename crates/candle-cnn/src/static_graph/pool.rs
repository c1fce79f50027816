//! Max-pooling over pixels of channels: the windows of 16 channels at a time.
//!
//! The rules are those of [`crate::max_pool2d`]: the first maximum in
//! row-major order wins and takes the whole gradient, NaN wins over all, and
//! padding never wins.
// Loops over registers by constant bounds: what the compiler vectorises surely.
#![allow(clippy::needless_range_loop)]

use super::ALIGNMENT;
use super::arena::{Layout, Part};
use crate::element::Element;
use crate::simd::multiversion;
use crate::window::Axis;

/// One pooling of one image.
#[derive(Clone, Copy)]
pub(super) struct Pool {
    pub(super) h: Axis,
    pub(super) w: Axis,
    pub(super) x: Layout,
    pub(super) dx: Layout,
    pub(super) y: Layout,
    pub(super) dy: Layout,
}

multiversion! {
    /// The `part` of one image's output that is `y`.
    pub(super) fn forward<T: Element>(pool: &Pool, x: &[T], y: &mut [T], part: &Part) = forward_image
}

multiversion! {
    /// Adds to `dx` of one image.
    pub(super) fn backward<T: Element>(pool: &Pool, x: &[T], dy: &[T], dx: &mut [T]) = backward_image
}

#[inline(always)]
fn channels<T: Element>(from: &[T], at: usize) -> [T; ALIGNMENT] {
    let run = &from[at..at + ALIGNMENT];
    std::array::from_fn(|i| run[i])
}

/// Largest value of a window and the position of the first such tap inside of the image.
#[inline(always)]
fn winners<T: Element>(
    pool: &Pool,
    x: &[T],
    (oh, ow): (usize, usize),
    c: usize,
) -> ([T; ALIGNMENT], [u32; ALIGNMENT]) {
    let mut best = [T::NEG_INFINITY; ALIGNMENT];
    let mut winner = [0; ALIGNMENT];
    let mut tap = 0;
    for h in pool.h.range(oh) {
        for w in pool.w.range(ow) {
            let values = channels(x, pool.x.at(h, w) + c);
            for i in 0..ALIGNMENT {
                let wins = (values[i] > best[i]) | values[i].is_nan();
                best[i] = if wins { values[i] } else { best[i] };
                winner[i] = if wins { tap } else { winner[i] };
            }
            tap += 1;
        }
    }
    (best, winner)
}

#[inline(always)]
fn forward_image<T: Element>(pool: &Pool, x: &[T], y: &mut [T], part: &Part) {
    for oh in part.lines.clone() {
        for ow in 0..pool.w.output {
            for c in (0..pool.x.width).step_by(ALIGNMENT) {
                let (best, _) = winners(pool, x, (oh, ow), c);
                let to = pool.y.at(oh, ow) + c - part.base;
                y[to..to + ALIGNMENT].copy_from_slice(&best);
            }
        }
    }
}

#[inline(always)]
fn backward_image<T: Element>(pool: &Pool, x: &[T], dy: &[T], dx: &mut [T]) {
    for oh in 0..pool.h.output {
        for ow in 0..pool.w.output {
            for c in (0..pool.x.width).step_by(ALIGNMENT) {
                let (_, winner) = winners(pool, x, (oh, ow), c);
                let gradient = channels(dy, pool.dy.at(oh, ow) + c);
                let mut tap = 0;
                for h in pool.h.range(oh) {
                    for w in pool.w.range(ow) {
                        let to = pool.dx.at(h, w) + c;
                        let dx = &mut dx[to..to + ALIGNMENT];
                        for i in 0..ALIGNMENT {
                            dx[i] += if winner[i] == tap {
                                gradient[i]
                            } else {
                                T::ZERO
                            };
                        }
                        tap += 1;
                    }
                }
            }
        }
    }
}
