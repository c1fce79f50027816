//! The fast path: a run of windows at a time, in registers.
//!
//! Each plane is copied into a border of −∞, so that every tap of every window
//! can be read. For `LANES` neighbouring windows the taps then pass by in
//! row-major order; a candidate replaces the best value where it is greater
//! (or NaN), and its tap is noted: compares and blends without branches, which
//! the compiler turns into vector instructions of the instruction set that
//! `multiversion` compiles for. The border never wins, since −∞ is greater
//! than nothing. Winners are found again in the backward pass: nine compares
//! cost less than keeping them in memory.
// Loops over registers by constant bounds: what the compiler vectorises surely.
#![allow(clippy::needless_range_loop)]

use rayon::prelude::*;

use crate::element::Element;
use crate::simd::{Isa, multiversion};
use crate::window::{Axis, Planes};

/// Planes that one task handles.
const PLANES_PER_TASK: usize = 16;

/// Windows of a run at most: they fill an AVX-512 register.
pub(super) const MOST_LANES: usize = 16;

pub(super) fn forward<T: Element>(planes: &Planes, isa: Isa, x: &[T]) -> Vec<T> {
    let mut y = vec![T::ZERO; planes.batch * planes.channels * planes.output_plane()];
    if y.is_empty() {
        return y;
    }
    y.par_chunks_mut(PLANES_PER_TASK * planes.output_plane())
        .zip(x.par_chunks(PLANES_PER_TASK * planes.input_plane()))
        .for_each(|(y, x)| forward_task(isa, planes, x, y));
    y
}

pub(super) fn backward<T: Element>(planes: &Planes, isa: Isa, x: &[T], dy: &[T]) -> Vec<T> {
    let mut dx = vec![T::ZERO; x.len()];
    if dy.is_empty() {
        return dx;
    }
    dx.par_chunks_mut(PLANES_PER_TASK * planes.input_plane())
        .zip(x.par_chunks(PLANES_PER_TASK * planes.input_plane()))
        .zip(dy.par_chunks(PLANES_PER_TASK * planes.output_plane()))
        .for_each(|((dx, x), dy)| backward_task(isa, planes, x, dy, dx));
    dx
}

multiversion! {
    fn forward_task<T: Element>(planes: &Planes, x: &[T], y: &mut [T]) = forward_planes
}

multiversion! {
    fn backward_task<T: Element>(planes: &Planes, x: &[T], dy: &[T], dx: &mut [T]) = backward_planes
}

#[inline(always)]
fn forward_planes<T: Element>(planes: &Planes, x: &[T], y: &mut [T]) {
    if every_window_sees_all(planes) {
        let outputs = y.chunks_exact_mut(planes.output_plane());
        for (x, y) in x.chunks_exact(planes.input_plane()).zip(outputs) {
            y.fill(x[winner(x)]);
        }
        return;
    }
    // Narrow images would waste half of the longest run.
    if planes.w.output > 8 {
        forward_runs::<T, MOST_LANES>(planes, x, y);
    } else {
        forward_runs::<T, 8>(planes, x, y);
    }
}

#[inline(always)]
fn backward_planes<T: Element>(planes: &Planes, x: &[T], dy: &[T], dx: &mut [T]) {
    if every_window_sees_all(planes) {
        let outputs = dy.chunks_exact(planes.output_plane());
        let inputs = x.chunks_exact(planes.input_plane());
        for ((x, dy), dx) in inputs
            .zip(outputs)
            .zip(dx.chunks_exact_mut(planes.input_plane()))
        {
            dx[winner(x)] = dy.iter().copied().sum();
        }
        return;
    }
    if planes.w.output > 8 {
        backward_runs::<T, MOST_LANES>(planes, x, dy, dx);
    } else {
        backward_runs::<T, 8>(planes, x, dy, dx);
    }
}

/// Deep in a network planes have a few pixels, and every window covers them
/// all: 1×1 and 2×2 under 3×3, or 2×2 under 2×2. One maximum serves them.
#[inline(always)]
fn every_window_sees_all(planes: &Planes) -> bool {
    let covers = |axis: &Axis| (0..axis.output).all(|o| axis.range(o) == (0..axis.input));
    planes.input_plane() <= 16 && covers(&planes.h) && covers(&planes.w)
}

/// Position of the first maximum of a plane, or of its last NaN.
#[inline(always)]
fn winner<T: Element>(plane: &[T]) -> usize {
    let mut winner = 0;
    for (i, &value) in plane.iter().enumerate() {
        if (value > plane[winner]) | value.is_nan() {
            winner = i;
        }
    }
    winner
}

#[inline(always)]
fn forward_runs<T: Element, const LANES: usize>(planes: &Planes, x: &[T], y: &mut [T]) {
    let mut border = Border::new::<LANES>(planes, T::NEG_INFINITY);
    for (x, y) in x
        .chunks_exact(planes.input_plane())
        .zip(y.chunks_exact_mut(planes.output_plane()))
    {
        border.fill(planes, x);
        for (oh, y) in y.chunks_exact_mut(planes.w.output).enumerate() {
            for (run, y) in y.chunks_mut(LANES).enumerate() {
                let (best, _) = border.winners::<LANES>(planes, oh, run * LANES);
                y.copy_from_slice(&best[..y.len()]);
            }
        }
    }
}

#[inline(always)]
fn backward_runs<T: Element, const LANES: usize>(planes: &Planes, x: &[T], dy: &[T], dx: &mut [T]) {
    let mut border = Border::new::<LANES>(planes, T::NEG_INFINITY);
    let mut gradient = Border::new::<LANES>(planes, T::ZERO);
    for ((x, dy), dx) in x
        .chunks_exact(planes.input_plane())
        .zip(dy.chunks_exact(planes.output_plane()))
        .zip(dx.chunks_exact_mut(planes.input_plane()))
    {
        border.fill(planes, x);
        gradient.values.fill(T::ZERO);
        for (oh, dy) in dy.chunks_exact(planes.w.output).enumerate() {
            for (run, dy) in dy.chunks(LANES).enumerate() {
                let (_, taps) = border.winners::<LANES>(planes, oh, run * LANES);
                let mut padded = [T::ZERO; LANES];
                padded[..dy.len()].copy_from_slice(dy);
                gradient.share(planes, oh, run * LANES, &taps, &padded);
            }
        }
        gradient.interior(planes, dx);
    }
}

/// A plane with room around it for every tap of every run of windows.
struct Border<T> {
    width: usize,
    values: Vec<T>,
}

impl<T: Element> Border<T> {
    fn new<const LANES: usize>(planes: &Planes, value: T) -> Self {
        let (h, w) = (&planes.h, &planes.w);
        let windows = w.output.div_ceil(LANES) * LANES;
        let width = ((windows - 1) * w.stride + w.kernel).max(w.input + w.padding);
        let height = ((h.output - 1) * h.stride + h.kernel).max(h.input + h.padding);
        Self {
            width,
            values: vec![value; width * height],
        }
    }

    /// Copies a plane to its place; the border stays.
    #[inline(always)]
    fn fill(&mut self, planes: &Planes, plane: &[T]) {
        let (h, w) = (&planes.h, &planes.w);
        for (ih, row) in plane.chunks_exact(w.input).enumerate() {
            let to = (ih + h.padding) * self.width + w.padding;
            self.values[to..to + w.input].copy_from_slice(row);
        }
    }

    /// Copies the plane out of the border.
    #[inline(always)]
    fn interior(&self, planes: &Planes, plane: &mut [T]) {
        let (h, w) = (&planes.h, &planes.w);
        for (ih, row) in plane.chunks_exact_mut(w.input).enumerate() {
            let from = (ih + h.padding) * self.width + w.padding;
            row.copy_from_slice(&self.values[from..from + w.input]);
        }
    }

    /// Best value and winning tap of the windows from `ow` on in output row `oh`.
    #[inline(always)]
    fn winners<const LANES: usize>(
        &self,
        planes: &Planes,
        oh: usize,
        ow: usize,
    ) -> ([T; LANES], [u32; LANES]) {
        let (h, w) = (&planes.h, &planes.w);
        let mut best = [T::NEG_INFINITY; LANES];
        // Until something greater than −∞ comes, the first pixel inside wins.
        let first_row = h.padding.saturating_sub(oh * h.stride) * w.kernel;
        let mut taps: [u32; LANES] = std::array::from_fn(|i| {
            (first_row + w.padding.saturating_sub((ow + i) * w.stride)) as u32
        });
        for r in 0..h.kernel {
            for s in 0..w.kernel {
                let tap = (r * w.kernel + s) as u32;
                let at = (oh * h.stride + r) * self.width + ow * w.stride + s;
                let values: [T; LANES] = if w.stride == 1 {
                    let run = &self.values[at..at + LANES];
                    std::array::from_fn(|i| run[i])
                } else {
                    let run = &self.values[at..=at + (LANES - 1) * w.stride];
                    std::array::from_fn(|i| run[i * w.stride])
                };
                for i in 0..LANES {
                    let wins = (values[i] > best[i]) | values[i].is_nan();
                    best[i] = if wins { values[i] } else { best[i] };
                    taps[i] = if wins { tap } else { taps[i] };
                }
            }
        }
        (best, taps)
    }

    /// Adds each window's gradient to its winner. From the right, so that a
    /// pixel adds up its windows in their order, like the plain loop.
    #[inline(always)]
    fn share<const LANES: usize>(
        &mut self,
        planes: &Planes,
        oh: usize,
        ow: usize,
        taps: &[u32; LANES],
        dy: &[T; LANES],
    ) {
        let (h, w) = (&planes.h, &planes.w);
        for r in 0..h.kernel {
            for s in (0..w.kernel).rev() {
                let tap = (r * w.kernel + s) as u32;
                let at = (oh * h.stride + r) * self.width + ow * w.stride + s;
                if w.stride == 1 {
                    let run = &mut self.values[at..at + LANES];
                    for i in 0..LANES {
                        run[i] += if taps[i] == tap { dy[i] } else { T::ZERO };
                    }
                } else {
                    let run = &mut self.values[at..=at + (LANES - 1) * w.stride];
                    for i in 0..LANES {
                        run[i * w.stride] += if taps[i] == tap { dy[i] } else { T::ZERO };
                    }
                }
            }
        }
    }
}
