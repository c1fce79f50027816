//! Max-pooling over pixels of channels: the windows of 16 channels at a time.
//!
//! The rules are those of [`crate::max_pool2d`]: the first maximum in
//! row-major order wins and takes the whole gradient, NaN wins over all, and
//! padding never wins.
// Loops over registers by constant bounds: what the compiler vectorises surely.
#![allow(clippy::needless_range_loop)]

use crate::element::Element;
use crate::maps::{ALIGNMENT, MapLayout, Part};
use crate::simd::{Accumulate, multiversion};
use crate::window::Axis;

/// One pooling of one image.
#[derive(Clone, Copy)]
pub(crate) struct Pool {
    pub(crate) h: Axis,
    pub(crate) w: Axis,
    pub(crate) x: MapLayout,
    pub(crate) dx: MapLayout,
    pub(crate) y: MapLayout,
    pub(crate) dy: MapLayout,
}

multiversion! {
    /// The `part` of one image's output that is `y`.
    pub(crate) fn forward<T: Element>(pool: &Pool, x: &[T], y: &mut [T], part: &Part) = forward_image
}

multiversion! {
    /// The whole output of one image, and the tap that won each of its values: pixels of
    /// [`Pool::x`]'s channels, for [`scatter`].
    pub(crate) fn forward_with_winners<T: Element>(
        pool: &Pool, x: &[T], y: &mut [T], winners: &mut [u8],
    ) = forward_image_with_winners
}

multiversion! {
    /// Adds the gradient of one image's input to `dx`, or begins `dx` with it, by comparing again.
    pub(crate) fn backward<T: Element>(
        pool: &Pool, x: &[T], dy: &[T], dx: &mut [T], accumulate: Accumulate,
    ) = backward_image
}

multiversion! {
    /// Adds the gradient of one image's input to `dx`, or begins `dx` with it, from the
    /// winners of [`forward_with_winners`].
    pub(crate) fn scatter<T: Element>(
        pool: &Pool, winners: &[u8], dy: &[T], dx: &mut [T], accumulate: Accumulate,
    ) = scatter_image
}

/// Taps of a window that [`forward_with_winners`] can tell apart, and the kernel on CUDA: a winner is a byte.
pub(crate) const MOST_TAPS: usize = 1 << u8::BITS;

impl Pool {
    /// Winners of one image.
    pub(crate) fn winners(&self) -> usize {
        self.h.output * self.w.output * self.x.pixel
    }
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
            for c in (0..pool.x.pixel).step_by(ALIGNMENT) {
                let (best, _) = winners(pool, x, (oh, ow), c);
                let to = pool.y.at(oh, ow) + c - part.base;
                y[to..to + ALIGNMENT].copy_from_slice(&best);
            }
        }
    }
}

#[inline(always)]
fn forward_image_with_winners<T: Element>(
    pool: &Pool,
    x: &[T],
    y: &mut [T],
    winners_of: &mut [u8],
) {
    let mut at = 0;
    for oh in 0..pool.h.output {
        for ow in 0..pool.w.output {
            for c in (0..pool.x.pixel).step_by(ALIGNMENT) {
                let (best, winner) = winners(pool, x, (oh, ow), c);
                let to = pool.y.at(oh, ow) + c;
                y[to..to + ALIGNMENT].copy_from_slice(&best);
                let kept = &mut winners_of[at..at + ALIGNMENT];
                for i in 0..ALIGNMENT {
                    kept[i] = winner[i] as u8;
                }
                at += ALIGNMENT;
            }
        }
    }
}

#[inline(always)]
fn backward_image<T: Element>(
    pool: &Pool,
    x: &[T],
    dy: &[T],
    dx: &mut [T],
    accumulate: Accumulate,
) {
    let mut begun = lines_begun(pool, accumulate);
    for oh in 0..pool.h.output {
        begun = begin_lines(pool, dx, begun..pool.h.range(oh).end);
        for ow in 0..pool.w.output {
            for c in (0..pool.x.pixel).step_by(ALIGNMENT) {
                let (_, winner) = winners(pool, x, (oh, ow), c);
                add_to_winners(pool, (oh, ow), c, &winner, dy, dx);
            }
        }
    }
    begin_lines(pool, dx, begun..pool.h.input);
}

#[inline(always)]
fn scatter_image<T: Element>(
    pool: &Pool,
    winners: &[u8],
    dy: &[T],
    dx: &mut [T],
    accumulate: Accumulate,
) {
    let mut begun = lines_begun(pool, accumulate);
    let mut at = 0;
    for oh in 0..pool.h.output {
        begun = begin_lines(pool, dx, begun..pool.h.range(oh).end);
        for ow in 0..pool.w.output {
            for c in (0..pool.x.pixel).step_by(ALIGNMENT) {
                let kept = &winners[at..at + ALIGNMENT];
                let winner = std::array::from_fn(|i| u32::from(kept[i]));
                add_to_winners(pool, (oh, ow), c, &winner, dy, dx);
                at += ALIGNMENT;
            }
        }
    }
    begin_lines(pool, dx, begun..pool.h.input);
}

/// Lines of `dx` that need no zeros before a window adds to them.
#[inline(always)]
fn lines_begun(pool: &Pool, accumulate: Accumulate) -> usize {
    match accumulate {
        Accumulate::Begin => 0,
        Accumulate::Add => pool.h.input,
    }
}

/// Zeros in lines of `dx`, just before a window first adds to them. Returns how many have begun.
#[inline(always)]
fn begin_lines<T: Element>(pool: &Pool, dx: &mut [T], lines: std::ops::Range<usize>) -> usize {
    for h in lines.clone() {
        dx[pool.dx.at(h, 0)..][..pool.w.input * pool.dx.pixel].fill(T::ZERO);
    }
    lines.end.max(lines.start)
}

/// Adds the gradient of one window's output to the taps that won it.
#[inline(always)]
fn add_to_winners<T: Element>(
    pool: &Pool,
    (oh, ow): (usize, usize),
    c: usize,
    winner: &[u32; ALIGNMENT],
    dy: &[T],
    dx: &mut [T],
) {
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
