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
use crate::simd::Isa;
use crate::window::Planes;

/// Planes that one task handles.
const PLANES_PER_TASK: usize = 16;

pub(super) fn forward<T: Element>(planes: &Planes, isa: Isa, x: &[T]) -> Vec<T> {
    let mut y = vec![T::ZERO; planes.batch * planes.channels * planes.output_plane()];
    if y.is_empty() {
        return y;
    }
    y.par_chunks_mut(PLANES_PER_TASK * planes.output_plane())
        .zip(x.par_chunks(PLANES_PER_TASK * planes.input_plane()))
        .for_each(|(y, x)| run(isa, || forward_planes(planes, x, y)));
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
        .for_each(|((dx, x), dy)| run(isa, || backward_planes(planes, x, dy, dx)));
    dx
}

/// Runs `f` compiled for the instruction set.
#[inline(always)]
fn run(isa: Isa, f: impl FnOnce()) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512(f: impl FnOnce()) {
            f()
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2(f: impl FnOnce()) {
            f()
        }
        match isa {
            // SAFETY: an `Isa` other than Portable exists only where the
            // processor has it; the wider AVX-512 subset is checked here.
            Isa::Avx512
                if is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl") =>
            unsafe { avx512(f) },
            // SAFETY: every processor with AVX-512 has AVX2 and FMA.
            Isa::Avx512 | Isa::Avx2 => unsafe { avx2(f) },
            Isa::Portable => f(),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = isa;
        f()
    }
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
            let kernel_width = planes.w.kernel as u32;
            for (ow, (&tap, &dy)) in taps.iter().zip(dy).enumerate() {
                // Taps are at most kernel height × width, and win inside the input only.
                let ih = oh * planes.h.stride + (tap / kernel_width) as usize - planes.h.padding;
                let iw = ow * planes.w.stride + (tap % kernel_width) as usize - planes.w.padding;
                dx[ih * planes.w.input + iw] += dy;
            }
        }
    }
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
            // The windows whose tap s lies inside the row.
            let start = w.padding.saturating_sub(s).div_ceil(w.stride).min(w.output);
            let end = (w.input + w.padding)
                .saturating_sub(s)
                .div_ceil(w.stride)
                .clamp(start, w.output);
            let tap_index = (r * w.kernel + s) as u32;
            let (best, taps) = (&mut best[start..end], &mut taps[start..end]);
            if start == end {
                continue;
            }
            let from = &row[start * w.stride + s - w.padding..];
            if w.stride == 1 {
                for ((best, tap), &value) in best.iter_mut().zip(taps).zip(from) {
                    let wins = value > *best || value.is_nan();
                    *best = if wins { value } else { *best };
                    *tap = if wins { tap_index } else { *tap };
                }
            } else {
                for ((best, tap), &value) in
                    best.iter_mut().zip(taps).zip(from.iter().step_by(w.stride))
                {
                    let wins = value > *best || value.is_nan();
                    *best = if wins { value } else { *best };
                    *tap = if wins { tap_index } else { *tap };
                }
            }
        }
    }
}
