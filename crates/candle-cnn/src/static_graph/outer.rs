//! The weight gradient of a convolution between two layouts, by outer tiles.
#![allow(unsafe_code)]

use rayon::prelude::*;

use super::gather::{MAX_WIDTH, fits, inside, skips_padding};
use crate::conv2d::{PIXELS_PER_OUTER_BLOCK, Panel, panels};
use crate::element::Element;
use crate::maps::{ALIGNMENT, MapLayout};
use crate::simd::{Accumulate, Kernels, Outer, transpose};

/// The weight gradient of a convolution.
pub(super) struct OuterPass<T: 'static> {
    pub(super) kernels: &'static Kernels<T>,
    pub(super) x: MapLayout,
    pub(super) c_in: usize,
    pub(super) kernel: usize,
    pub(super) stride: usize,
    pub(super) padding: usize,
    pub(super) dy: MapLayout,
    pub(super) dy_channel: usize,
    pub(super) c_out: usize,
}

/// Lists that a task keeps from one group of images to the next.
pub(super) struct Rows<T> {
    pointers: Vec<*const T>,
    /// Offsets of the output gradient's pixels.
    offsets: Vec<usize>,
    packed: Vec<T>,
}

// SAFETY: the pointers are read only by the `run` that has just written them.
unsafe impl<T: Send> Send for Rows<T> {}

impl<T> Default for Rows<T> {
    fn default() -> Self {
        Self {
            pointers: Vec::new(),
            offsets: Vec::new(),
            packed: Vec::new(),
        }
    }
}

impl<T: Element> OuterPass<T> {
    fn width(&self) -> usize {
        self.c_out.next_multiple_of(self.kernels.lanes)
    }

    /// Elements of the sums: `[tap][c_in][c_out rounded up]`.
    pub(super) fn sums_len(&self) -> usize {
        self.kernel * self.kernel * self.c_in * self.width()
    }

    /// Adds the products of some images to `sums`, or begins the sums with them.
    pub(super) fn run(
        &self,
        x: &[T],
        dy: &[T],
        (sums, accumulate): (&mut [T], Accumulate),
        rows: &mut Rows<T>,
    ) {
        let images = dy.len() / self.dy.image();
        // Everything that a tile reads is inside, as in `GatherPass::run`.
        assert!(self.x.halo >= self.padding && x.len() >= images * self.x.image());
        let window = (self.kernel, self.stride, self.padding);
        assert!(fits(self.x, self.dy, window));
        assert!(self.c_in <= self.x.pixel && self.dy_channel + self.width() <= self.dy.pixel);
        assert_eq!(sums.len(), self.sums_len());

        rows.packed
            .resize(PIXELS_PER_OUTER_BLOCK * MAX_WIDTH, T::ZERO);
        let taps = (0..self.kernel).flat_map(|r| (0..self.kernel).map(move |s| (r, s)));
        let panels = panels(self.c_out, self.kernels.lanes);
        if skips_padding(self.dy.size, self.padding, images, 1) {
            for (r, s) in taps {
                let inside = |tap: usize, size: usize, outputs: usize| {
                    (0..outputs).filter(move |&at| {
                        inside(at * self.stride, self.kernel, size, self.padding).contains(&tap)
                    })
                };
                let lines: Vec<usize> = inside(r, self.x.size.0, self.dy.size.0).collect();
                let columns: Vec<usize> = inside(s, self.x.size.1, self.dy.size.1).collect();
                self.list(x, images, (&lines, &columns), rows);
                self.blocks(&panels, &[(r, s)], dy, (sums, accumulate), rows);
            }
            return;
        }
        let lines: Vec<usize> = (0..self.dy.size.0).collect();
        let columns: Vec<usize> = (0..self.dy.size.1).collect();
        self.list(x, images, (&lines, &columns), rows);
        let taps: Vec<_> = taps.collect();
        self.blocks(&panels, &taps, dy, (sums, accumulate), rows);
    }

    /// The pixels of some lines and columns: the first tap's in `x`, and in `dy`.
    fn list(
        &self,
        x: &[T],
        images: usize,
        (lines, columns): (&[usize], &[usize]),
        rows: &mut Rows<T>,
    ) {
        rows.pointers.clear();
        rows.offsets.clear();
        for image in 0..images {
            let first = image * self.x.image() + self.x.first(self.padding);
            for &h in lines {
                for &w in columns {
                    let at = first + self.stride * (h * self.x.line() + w * self.x.pixel);
                    rows.pointers.push(x[at..].as_ptr());
                    rows.offsets
                        .push(image * self.dy.image() + self.dy.at(h, w) + self.dy_channel);
                }
            }
        }
    }

    /// Adds the products of all listed pixels for some taps, or begins the sums with them.
    fn blocks(
        &self,
        panels: &[Panel],
        taps: &[(usize, usize)],
        dy: &[T],
        (sums, accumulate): (&mut [T], Accumulate),
        rows: &mut Rows<T>,
    ) {
        let (lanes, width) = (self.kernels.lanes, self.width());
        if accumulate == Accumulate::Begin && rows.pointers.is_empty() {
            for &(r, s) in taps {
                let first = (r * self.kernel + s) * self.c_in * width;
                sums[first..][..self.c_in * width].fill(T::ZERO);
            }
        }
        for (block, (pointers, offsets)) in rows
            .pointers
            .chunks(PIXELS_PER_OUTER_BLOCK)
            .zip(rows.offsets.chunks(PIXELS_PER_OUTER_BLOCK))
            .enumerate()
        {
            let accumulate = if block == 0 {
                accumulate
            } else {
                Accumulate::Add
            };
            for panel in panels {
                let panel_width = panel.vectors * lanes;
                for (to, &from) in rows.packed.chunks_exact_mut(panel_width).zip(offsets) {
                    to.copy_from_slice(&dy[from + panel.start..][..panel_width]);
                }
                for &(r, s) in taps {
                    for (c, tile) in self.kernels.outer_strips(self.c_in, panel.vectors) {
                        let row = (r * self.kernel + s) * self.c_in + c;
                        let args = Outer {
                            rows: pointers.as_ptr(),
                            offset: r * self.x.line() + s * self.x.pixel + c,
                            pixels: pointers.len(),
                            dy: rows.packed.as_ptr(),
                            dy_stride: panel_width,
                            accumulate,
                            dw: sums[row * width + panel.start..].as_mut_ptr(),
                            dw_stride: width,
                        };
                        // SAFETY: the pointers are pixels inside of `x`, whose
                        // taps and `c_in` channels are as well, and strips end
                        // at c_in; `packed` holds a row of the panel for each;
                        // the strip's rows of this tap in `sums` hold the
                        // panel's columns, since panels partition `width`. The
                        // processor has the instructions, as it has for all
                        // `KernelTable::kernels`.
                        unsafe { tile(&args) };
                    }
                }
            }
        }
    }

    /// Adds the parts up, in order, in the weight's own layout (K, C, R, S).
    pub(super) fn unpack(&self, parts: &[&[T]], weight: &mut [T]) {
        let taps = self.kernel * self.kernel;
        let width = self.width();
        let fill = |first: usize, block: usize, rows: &mut [[T; ALIGNMENT]]| {
            let channels = ALIGNMENT.min(width - block);
            for (row, at) in rows.iter_mut().zip(first..) {
                let from = (at % taps * self.c_in + at / taps) * width + block;
                let row = &mut row[..channels];
                row.copy_from_slice(&parts[0][from..from + channels]);
                for part in &parts[1..] {
                    let sums = &part[from..from + channels];
                    row.iter_mut().zip(sums).for_each(|(to, &sum)| *to += sum);
                }
            }
        };
        if !parts.is_empty() {
            turn_sums::<T, 64>(self.kernels, self.c_in * taps, weight, fill);
        }
    }
}

/// Writes a weight (K, `len`) from rows of 16 output channels, `ROWS` at a time. `fill` is given
/// the first of the rows' indices into `len`, the first of their channels, and the rows.
pub(super) fn turn_sums<T: Element, const ROWS: usize>(
    kernels: &Kernels<T>,
    len: usize,
    weight: &mut [T],
    fill: impl Fn(usize, usize, &mut [[T; ALIGNMENT]]) + Sync,
) {
    if len == 0 {
        return;
    }
    weight
        .par_chunks_mut(ALIGNMENT * len)
        .enumerate()
        .for_each(|(block, weight)| {
            let channels = weight.len() / len;
            let mut rows = [[T::ZERO; ALIGNMENT]; ROWS];
            for first in (0..len).step_by(ROWS) {
                let rows = &mut rows[..ROWS.min(len - first)];
                fill(first, block * ALIGNMENT, rows);
                let (sizes, to) = ((rows.len(), channels), &mut weight[first..]);
                transpose(kernels, rows.as_flattened(), ALIGNMENT, sizes, to, len);
            }
        });
}
