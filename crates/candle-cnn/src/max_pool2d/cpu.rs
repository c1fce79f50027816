//! The fast path: one output row at a time, vectorised along the row.
//!
//! For each tap (r, s) in row-major order, the row of candidates replaces the
//! row of best values where it is greater (or NaN), and the tap's index is
//! noted: plain loops without branches that the compiler turns into compares
//! and blends, compiled once per instruction set. Winners are found again in
//! the backward pass: nine compares cost less than keeping them in memory.
#![allow(unsafe_code)]

use rayon::prelude::*;

use crate::element::Element;
use crate::simd::{Isa, multiversion};
use crate::window::{Axis, Planes};

/// Planes that one task handles.
const PLANES_PER_TASK: usize = 16;

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
    let mut taps = vec![0u32; planes.w.output];
    for (x, y) in x
        .chunks_exact(planes.input_plane())
        .zip(y.chunks_exact_mut(planes.output_plane()))
    {
        for (oh, best) in y.chunks_exact_mut(planes.w.output).enumerate() {
            best_of_row(planes, x, oh, best, &mut taps);
        }
    }
}

#[inline(always)]
fn backward_planes<T: Element>(planes: &Planes, x: &[T], dy: &[T], dx: &mut [T]) {
    let mut best = vec![T::ZERO; planes.w.output];
    let mut taps = vec![0u32; planes.w.output];
    for ((x, dy), dx) in x
        .chunks_exact(planes.input_plane())
        .zip(dy.chunks_exact(planes.output_plane()))
        .zip(dx.chunks_exact_mut(planes.input_plane()))
    {
        for (oh, dy) in dy.chunks_exact(planes.w.output).enumerate() {
            best_of_row(planes, x, oh, &mut best, &mut taps);
            share_row(planes, oh, dy, &taps, dx);
        }
    }
}

/// Adds each window's gradient in output row `oh` to its winner.
///
/// Tap by tap, so that it vectorises; from the right, so that each pixel adds
/// up its windows in the order of the windows, like the plain loop.
#[inline(always)]
fn share_row<T: Element>(planes: &Planes, oh: usize, dy: &[T], taps: &[u32], dx: &mut [T]) {
    let Planes { h, w, .. } = *planes;
    for ih in h.range(oh) {
        let r = ih + h.padding - oh * h.stride;
        let row = &mut dx[ih * w.input..][..w.input];
        for s in (0..w.kernel).rev() {
            let windows = windows_of_tap(&w, s);
            if windows.is_empty() {
                continue;
            }
            let tap_index = (r * w.kernel + s) as u32;
            let to = &mut row[windows.start * w.stride + s - w.padding..];
            let from = dy[windows.clone()].iter().zip(&taps[windows]);
            if w.stride == 1 {
                for (to, (&dy, &tap)) in to.iter_mut().zip(from) {
                    *to += if tap == tap_index { dy } else { T::ZERO };
                }
            } else {
                for (to, (&dy, &tap)) in to.iter_mut().step_by(w.stride).zip(from) {
                    *to += if tap == tap_index { dy } else { T::ZERO };
                }
            }
        }
    }
}

/// The windows of a row whose tap `s` lies inside the input.
#[inline(always)]
fn windows_of_tap(w: &Axis, s: usize) -> std::ops::Range<usize> {
    let start = w.padding.saturating_sub(s).div_ceil(w.stride).min(w.output);
    let end = (w.input + w.padding)
        .saturating_sub(s)
        .div_ceil(w.stride)
        .clamp(start, w.output);
    start..end
}

/// Best value and winning tap of each window in output row `oh`.
#[inline(always)]
fn best_of_row<T: Element>(
    planes: &Planes,
    plane: &[T],
    oh: usize,
    best: &mut [T],
    taps: &mut [u32],
) {
    let Planes { h, w, .. } = *planes;
    let rows = h.range(oh);
    // Until something greater than −∞ comes, the first pixel inside wins.
    let first_row = (rows.start + h.padding - oh * h.stride) * w.kernel;
    for (ow, (best, tap)) in best.iter_mut().zip(taps.iter_mut()).enumerate() {
        *best = T::NEG_INFINITY;
        *tap = (first_row + w.padding.saturating_sub(ow * w.stride)) as u32;
    }
    for ih in rows {
        let r = ih + h.padding - oh * h.stride;
        let row = &plane[ih * w.input..][..w.input];
        for s in 0..w.kernel {
            let windows = windows_of_tap(&w, s);
            let tap_index = (r * w.kernel + s) as u32;
            if windows.is_empty() {
                continue;
            }
            let from = &row[windows.start * w.stride + s - w.padding..];
            let (best, taps) = (&mut best[windows.clone()], &mut taps[windows]);
            if w.stride == 1 {
                for ((best, tap), &value) in best.iter_mut().zip(taps).zip(from) {
                    let wins = (value > *best) | value.is_nan();
                    *best = if wins { value } else { *best };
                    *tap = if wins { tap_index } else { *tap };
                }
            } else {
                for ((best, tap), &value) in
                    best.iter_mut().zip(taps).zip(from.iter().step_by(w.stride))
                {
                    let wins = (value > *best) | value.is_nan();
                    *best = if wins { value } else { *best };
                    *tap = if wins { tap_index } else { *tap };
                }
            }
        }
    }
}
