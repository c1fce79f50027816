//! The fast path: [`channels_last`] on groups of planes; where there is none, a row of windows at a time.

use std::ops::Range;

use super::channels_last::{self, Pool};
use crate::element::Element;
use crate::maps::{ALIGNMENT, MapLayout, Part};
use crate::plane_groups::{Group, PlanesOf, by_groups};
use crate::simd::{Accumulate, Isa, multiversion};
use crate::window::{Axis, Planes};

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
    let taps = met_taps(&planes.w);
    let mut winners = vec![0; planes.w.output];
    for (oh, y) in y.chunks_exact_mut(planes.w.output).enumerate() {
        row_winners(planes, &taps, x, oh, (y, &mut winners));
    }
}

#[inline(always)]
fn backward_plane_body<T: Element>(planes: &Planes, x: &[T], dy: &[T], dx: &mut [T]) {
    let w = &planes.w;
    let taps = met_taps(w);
    let mut winners = vec![0; w.output];
    let mut best = vec![T::ZERO; w.output];
    for (oh, dy) in dy.chunks_exact(w.output).enumerate() {
        row_winners(planes, &taps, x, oh, (&mut best, &mut winners));
        let first = oh * planes.h.stride;
        for (ow, (&tap, &dy)) in winners.iter().zip(dy).enumerate() {
            let (r, s) = (tap as usize / w.kernel, tap as usize % w.kernel);
            let row = first + r - planes.h.padding;
            dx[row * w.input + ow * w.stride + s - w.padding] += dy;
        }
    }
}

/// The taps of a row of windows that meet a pixel, and the windows of which they do.
fn met_taps(w: &Axis) -> Vec<(usize, Range<usize>)> {
    let mut met = Vec::new();
    let mut tap = 0;
    while tap < w.kernel.min(w.input + w.padding) {
        let first = w.padding.saturating_sub(tap).div_ceil(w.stride);
        let end = (w.input + w.padding - tap).div_ceil(w.stride);
        let windows = first..end.min(w.output);
        if !windows.is_empty() {
            met.push((tap, windows));
            tap += 1;
            continue;
        }
        // On to the tap by which the window before sees the first pixel.
        match first.min(w.output) {
            0 => break,
            window => tap = w.padding - (window - 1) * w.stride,
        }
    }
    met
}

/// Best value and winning tap of each window of output row `oh`.
#[inline(always)]
fn row_winners<T: Element>(
    planes: &Planes,
    taps: &[(usize, Range<usize>)],
    x: &[T],
    oh: usize,
    (best, winners): (&mut [T], &mut [u32]),
) {
    let (h, w) = (&planes.h, &planes.w);
    best.fill(T::NEG_INFINITY);
    let rows = h.range(oh);
    let number = |row: usize, s: usize| ((row + h.padding - oh * h.stride) * w.kernel + s) as u32;
    // Until something greater than −∞ comes, the first pixel inside wins.
    for (ow, winner) in winners.iter_mut().enumerate() {
        *winner = number(rows.start, w.padding.saturating_sub(ow * w.stride));
    }
    for row in rows {
        let x = &x[row * w.input..][..w.input];
        for (s, windows) in taps {
            let x = &x[windows.start * w.stride + s - w.padding..];
            let best = &mut best[windows.clone()];
            let winners = &mut winners[windows.clone()];
            let tap = number(row, *s);
            match w.stride {
                1 => take_better(x.iter(), tap, (best, winners)),
                2 => {
                    // Pairs of pixels, and the last one where it has no other.
                    let (pairs, last) = x.as_chunks::<2>();
                    let (best, last_best) = best.split_at_mut(pairs.len().min(best.len()));
                    let (winners, last_winner) = winners.split_at_mut(best.len());
                    take_better(pairs.iter().map(|[x, _]| x), tap, (best, winners));
                    take_better(last.iter(), tap, (last_best, last_winner));
                }
                stride => take_better(x.iter().step_by(stride), tap, (best, winners)),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_taps_that_are_met_are_those_of_the_windows_ranges() {
        let sizes = || 1usize..8;
        for (input, output, kernel, stride) in sizes()
            .flat_map(|i| sizes().flat_map(move |o| sizes().map(move |k| (i, o, k))))
            .flat_map(|(i, o, k)| sizes().map(move |s| (i, o, k, s)))
        {
            for padding in 0..=kernel / 2 {
                let axis = Axis {
                    input,
                    output,
                    kernel,
                    stride,
                    padding,
                };
                let mut expected: Vec<(usize, usize)> = (0..output)
                    .flat_map(|o| axis.range(o).map(move |i| (i + padding - o * stride, o)))
                    .collect();
                expected.sort_unstable();
                let met = met_taps(&axis).into_iter();
                let met: Vec<_> = met.flat_map(|(tap, o)| o.map(move |o| (tap, o))).collect();
                assert_eq!(met, expected, "{axis:?}");
            }
        }
    }

    #[test]
    fn a_border_of_any_width_is_passed_over() {
        let axis = |output, stride| Axis {
            input: 8,
            output,
            kernel: 1 << 31,
            stride,
            padding: 1 << 30,
        };
        assert_eq!(met_taps(&axis(9, 1)).len(), 16);
        assert_eq!(met_taps(&axis(2, 1 << 30)).len(), 16);
    }
}
