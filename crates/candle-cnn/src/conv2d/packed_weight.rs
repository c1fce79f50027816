//! Weights in the order that the gather tiles read.

use rayon::prelude::*;

use super::cpu::{Panel, panels};
use crate::element::Element;
use crate::simd::{Kernels, transpose};

/// Weights in the order that the gather tiles read: `[panel][tap][channel][lane]`.
pub(crate) struct PackedWeight<T> {
    pub(crate) panels: Vec<Panel>,
    pub(crate) offsets: Vec<usize>,
    /// Longer than needed where it was longer before.
    pub(crate) data: Vec<T>,
    /// `Σ vectors × lanes`: output channels rounded up to whole vectors.
    pub(crate) width: usize,
    /// Taps × channels.
    rows: usize,
    outputs: usize,
    lanes: usize,
}

impl<T: Element> PackedWeight<T> {
    /// Packs a weight (K, C, R·S) for the convolution, with the taps first in `shape`: (R·S, K, C).
    /// `data` is memory to use again; what is in it does not matter.
    pub(crate) fn new(
        weight: &[T],
        (taps, c_out, c_in): (usize, usize, usize),
        kernels: &Kernels<T>,
        data: Vec<T>,
    ) -> Self {
        /// Columns that are turned at once, so that they stay in the L1 cache.
        const COLUMNS: usize = 64;
        let len = c_in * taps;
        let mut packed = Self::empty(c_out, len, kernels.lanes, data);
        packed.fill(|panel, used, width, to| {
            let from = &weight[panel.start * len..][..used * len];
            if taps == 1 {
                return transpose(kernels, from, len, (used, len), to, width);
            }
            let mut columns = vec![T::ZERO; COLUMNS * width];
            for first in (0..len).step_by(COLUMNS) {
                let count = COLUMNS.min(len - first);
                let from = &from[first..];
                transpose(kernels, from, len, (used, count), &mut columns, width);
                for (column, at) in columns.chunks_exact(width).zip(first..first + count) {
                    let row = at % taps * c_in + at / taps;
                    to[row * width..][..width].copy_from_slice(column);
                }
            }
        });
        packed
    }

    /// Packs a weight for the input gradient, a convolution from K to C channels whose taps come the
    /// other way round; shapes are those of [`Self::new`].
    pub(crate) fn turned(
        weight: &[T],
        (taps, c_out, c_in): (usize, usize, usize),
        kernels: &Kernels<T>,
        data: Vec<T>,
    ) -> Self {
        let len = c_in * taps;
        if len == 0 {
            return Self::empty(0, 0, kernels.lanes, data);
        }
        let mut packed = Self::empty(c_in, c_out * taps, kernels.lanes, data);
        packed.fill(|panel, used, width, to| {
            let mut columns = vec![T::ZERO; taps * width];
            for (k, from) in weight.chunks_exact(len).enumerate() {
                let from = &from[panel.start * taps..][..used * taps];
                if taps == 1 {
                    to[k * width..][..used].copy_from_slice(from);
                    continue;
                }
                transpose(kernels, from, taps, (used, taps), &mut columns, width);
                for (column, tap) in columns.chunks_exact(width).zip((0..taps).rev()) {
                    to[(tap * c_out + k) * width..][..width].copy_from_slice(column);
                }
            }
        });
        packed
    }

    /// Memory for `rows` of `outputs`.
    fn empty(outputs: usize, rows: usize, lanes: usize, mut data: Vec<T>) -> Self {
        let panels = panels(outputs, lanes);
        let width = outputs.div_ceil(lanes) * lanes;
        if data.len() < width * rows {
            data.resize(width * rows, T::ZERO);
        }
        Self {
            offsets: panels.iter().map(|panel| panel.start * rows).collect(),
            panels,
            data,
            width,
            rows,
            outputs,
            lanes,
        }
    }

    /// A packed weight of the same outputs with `to` rows for every `from` of this one's; `fill`
    /// writes a panel from a panel.
    pub(crate) fn expand(
        &self,
        (from, to): (usize, usize),
        data: Vec<T>,
        fill: impl Fn(&[T], &mut [T]) + Sync,
    ) -> Self {
        let rows = self.rows / from * to;
        let mut expanded = Self::empty(self.outputs, rows, self.lanes, data);
        expanded.fill(|panel, _, width, to| {
            let from = &self.data[panel.start * self.rows..][..width * self.rows];
            fill(from, to);
        });
        expanded
    }

    /// Calls `fill` with each panel, the outputs in it, its width and its memory, which is zero
    /// where the panel is wider than the outputs.
    fn fill(&mut self, fill: impl Fn(&Panel, usize, usize, &mut [T]) + Sync) {
        /// Elements that are worth waking another thread.
        const LEAST: usize = 1 << 14;
        let (lanes, rows, outputs) = (self.lanes, self.rows, self.outputs);
        let mut rest = self.data.as_mut_slice();
        let mut parts = Vec::with_capacity(self.panels.len());
        for panel in &self.panels {
            let len = panel.vectors * lanes * rows;
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(len);
            parts.push((panel, part));
            rest = tail;
        }
        let fill = |(panel, part): (&Panel, &mut [T])| {
            let width = panel.vectors * lanes;
            let used = width.min(outputs - panel.start);
            if used < width {
                part.fill(T::ZERO);
            }
            fill(panel, used, width, part);
        };
        if self.width * rows < LEAST {
            parts.into_iter().for_each(fill);
        } else {
            parts.into_par_iter().for_each(fill);
        }
    }

    /// Multiplies each output channel's weights by its factor.
    pub(crate) fn scale(&mut self, factors: &[T]) {
        for (panel, &offset) in self.panels.iter().zip(&self.offsets) {
            let width = panel.vectors * self.lanes;
            let factors = &factors[panel.start..factors.len().min(panel.start + width)];
            let data = &mut self.data[offset..][..width * self.rows];
            for row in data.chunks_exact_mut(width) {
                for (value, &factor) in row.iter_mut().zip(factors) {
                    *value *= factor;
                }
            }
        }
    }
}
