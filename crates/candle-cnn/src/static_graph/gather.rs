//! A convolution from one layout into another, by gather tiles.
#![allow(unsafe_code)]

use super::winograd::WinogradPass;
use crate::activation::Activation;
use crate::conv2d::PackedWeight;
use crate::element::Element;
use crate::maps::{ALIGNMENT, MapLayout, Part};
use crate::simd::{Gather, Isa, Kernels, MAX_VECTORS, OUTER_HEIGHTS, Tap};

/// What a sum of products starts from.
#[derive(Clone, Copy)]
pub(super) enum Start<'a, T> {
    /// One value per channel.
    Values(&'a [T]),
    /// What is at its place already.
    Present,
}

/// A convolution from one layout into another.
pub(super) struct GatherPass<'a, T: 'static> {
    pub(super) kernels: &'static Kernels<T>,
    pub(super) x: MapLayout,
    pub(super) x_channel: usize,
    pub(super) channels: usize,
    pub(super) kernel: usize,
    pub(super) stride: usize,
    pub(super) padding: usize,
    pub(super) weight: &'a PackedWeight<T>,
    pub(super) start: Start<'a, T>,
    pub(super) activation: Activation,
    pub(super) y: MapLayout,
    pub(super) y_channel: usize,
}

/// Tiles' height is at most this.
const MAX_HEIGHT: usize = OUTER_HEIGHTS[0];
/// Elements in a row of a tile are at most this.
pub(super) const MAX_WIDTH: usize = MAX_VECTORS * ALIGNMENT;

/// Lists that a task keeps from one group of images to the next.
pub(super) struct Rows<T> {
    /// Pointers to the first tap's pixel, as many of each tile as its height.
    /// What is beyond the tile's outputs repeats the last.
    pointers: Vec<*const T>,
    /// Where the outputs of each tile lie, without repetition.
    outputs: Vec<usize>,
    tiles: Vec<Tile>,
    taps: Vec<Tap>,
}

impl<T> Default for Rows<T> {
    fn default() -> Self {
        Self {
            pointers: Vec::new(),
            outputs: Vec::new(),
            tiles: Vec::new(),
            taps: Vec::new(),
        }
    }
}

// SAFETY: the pointers are read only by the `run` that has just written them.
unsafe impl<T: Send> Send for Rows<T> {}

struct Tile {
    /// The tile's range in the list of taps.
    taps: std::ops::Range<usize>,
    /// Where the tile's outputs begin among all of them, and how many there are.
    first: usize,
    len: usize,
    /// Elements between them, where they are regular and fill the tile.
    stride: Option<usize>,
}

/// Whether all windows of a convolution's outputs `y` lie inside of `x` and its padding.
pub(super) fn fits(
    x: MapLayout,
    y: MapLayout,
    (kernel, stride, padding): (usize, usize, usize),
) -> bool {
    let along = |x: usize, y: usize| y == 0 || (y - 1) * stride + kernel <= x + 2 * padding;
    along(x.size.0, y.size.0) && along(x.size.1, y.size.1)
}

/// Whether a pass takes the outputs position by position, each over all
/// images, and so leaves out the taps that fall into the padding there: 8 of 9
/// for a 3×3 kernel over a single pixel, 5 of 9 over 2×2, 5 of 16 over 4×4.
/// `least` images must be at hand to fill a tile.
pub(super) fn skips_padding(
    (height, width): (usize, usize),
    padding: usize,
    images: usize,
    least: usize,
) -> bool {
    /// In larger maps few outputs have padding.
    const MOST_PIXELS: usize = 64;
    padding > 0 && images >= least && height * width <= MOST_PIXELS
}

/// The taps of a line of `kernel` whose input, from `first` on, is one of `size` pixels
/// behind `padding`.
pub(super) fn inside(
    first: usize,
    kernel: usize,
    size: usize,
    padding: usize,
) -> std::ops::Range<usize> {
    padding.saturating_sub(first)..kernel.min((size + padding).saturating_sub(first))
}

impl<'a, T: Element> GatherPass<'a, T> {
    /// This convolution by way of transformed weights (Winograd's).
    pub(super) fn into_winograd(
        self,
        isa: Isa,
        weight: &'a PackedWeight<T>,
    ) -> WinogradPass<'a, T> {
        WinogradPass {
            kernels: self.kernels,
            isa,
            x: self.x,
            x_channel: self.x_channel,
            channels: self.channels,
            padding: self.padding,
            weight,
            start: self.start,
            activation: self.activation,
            y: self.y,
            y_channel: self.y_channel,
        }
    }

    /// Computes `part` of the output, which is `y`.
    pub(super) fn run(&self, x: &[T], (y, part): (&mut [T], &Part), rows: &mut Rows<T>) {
        let height = self.kernels.height;
        let images = part.images;
        // Everything that a tile reads and writes is inside: the taps by the
        // first two assertions, the images and lines by the third, the channels
        // by the last two.
        assert!(self.x.halo >= self.padding && height <= MAX_HEIGHT);
        let window = (self.kernel, self.stride, self.padding);
        assert!(fits(self.x, self.y, window));
        assert!(x.len() >= images * self.x.image() && part.lines.end <= self.y.size.0);
        assert!(self.x_channel + self.channels <= self.x.pixel);
        assert!(self.y_channel + self.weight.width <= self.y.pixel);

        self.plan(x, part, rows);
        let weight_rows = self.kernel * self.kernel * self.channels;
        for (panel, &offset) in self.weight.panels.iter().zip(&self.weight.offsets) {
            let width = panel.vectors * self.kernels.lanes;
            let weight = &self.weight.data[offset..];
            let ahead_step = width.div_ceil(rows.tiles.len().max(1));
            assert!(weight.len() >= weight_rows * width);
            let run = self.kernels.gather[panel.vectors - 1];
            for (index, tile) in rows.tiles.iter().enumerate() {
                let pointers = &rows.pointers[index * height..][..height];
                let next = rows
                    .pointers
                    .get((index + 1) * height..(index + 2) * height);
                let next = next.unwrap_or(pointers);
                let outputs = &rows.outputs[tile.first..tile.first + tile.len];
                let taps = &rows.taps[tile.taps.clone()];
                let mut args = Gather {
                    rows: pointers.as_ptr(),
                    next_rows: next.as_ptr(),
                    taps: taps.as_ptr(),
                    tap_count: taps.len(),
                    channels: self.channels,
                    panel: weight.as_ptr(),
                    // The next panel lies behind this one.
                    ahead: weight
                        .as_ptr()
                        .wrapping_add(weight_rows * (width + index * ahead_step)),
                    ahead_step,
                    init: std::ptr::null(),
                    init_stride: 0,
                    activation: self.activation,
                    out: std::ptr::null_mut(),
                    out_stride: 0,
                };
                if let Start::Values(values) = self.start {
                    args.init = values[panel.start..panel.start + width].as_ptr();
                }
                if let Some(stride) = tile.stride {
                    let y = &mut y[outputs[0] + panel.start..];
                    assert!(y.len() >= (height - 1) * stride + width);
                    args.out = y.as_mut_ptr();
                    args.out_stride = stride;
                    if let Start::Present = self.start {
                        args.init = args.out;
                        args.init_stride = stride;
                    }
                    // SAFETY: `pointers` are `height` rows inside of `x`, whose
                    // taps and channels are as well; the panel holds taps ×
                    // channels × width weights; `height` rows of `width` start
                    // values and results lie inside of their slices: all of it
                    // asserted above. The processor has the instructions, as it
                    // has for all `KernelTable::kernels`.
                    unsafe { run(&args) };
                    continue;
                }
                // Outputs here and there: by way of a tile of its own.
                let mut own = [T::ZERO; MAX_HEIGHT * MAX_WIDTH];
                if let Start::Present = self.start {
                    for (own, &at) in own.chunks_exact_mut(width).zip(outputs) {
                        own.copy_from_slice(&y[at + panel.start..][..width]);
                    }
                }
                args.out = own.as_mut_ptr();
                args.out_stride = width;
                if let Start::Present = self.start {
                    args.init = args.out;
                    args.init_stride = width;
                }
                // SAFETY: as above, with `height` rows of `width` results in `own`.
                unsafe { run(&args) };
                for (own, &at) in own.chunks_exact(width).zip(outputs) {
                    y[at + panel.start..][..width].copy_from_slice(own);
                }
            }
        }
    }

    /// Which outputs make a tile, and which taps they need.
    fn plan(&self, x: &[T], part: &Part, rows: &mut Rows<T>) {
        let images = part.images;
        rows.pointers.clear();
        rows.outputs.clear();
        rows.tiles.clear();
        rows.taps.clear();
        let tap = |r: usize, s: usize| Tap {
            offset: r * self.x.line() + s * self.x.pixel,
            number: r * self.kernel + s,
        };
        let pixel = |image: usize, h: usize, w: usize| {
            let from = image * self.x.image()
                + self.x.first(self.padding)
                + self.x_channel
                + self.stride * (h * self.x.line() + w * self.x.pixel);
            let to = image * self.y.image() + self.y.at(h, w) + self.y_channel - part.base;
            (from, to)
        };
        let width = self.y.size.1;
        if !skips_padding(self.y.size, self.padding, images, self.kernels.height) {
            let taps = (0..self.kernel).flat_map(|r| (0..self.kernel).map(move |s| (r, s)));
            rows.taps.extend(taps.map(|(r, s)| tap(r, s)));
            let pixels = (0..images).flat_map(|image| {
                part.lines
                    .clone()
                    .flat_map(move |h| (0..width).map(move |w| (image, h, w)))
            });
            let pixels = pixels.map(|(image, h, w)| pixel(image, h, w));
            self.tiles(0..rows.taps.len(), pixels, x, rows);
            return;
        }
        for h in part.lines.clone() {
            for w in 0..width {
                let first = rows.taps.len();
                let inside =
                    |at: usize, size| inside(at * self.stride, self.kernel, size, self.padding);
                for r in inside(h, self.x.size.0) {
                    for s in inside(w, self.x.size.1) {
                        rows.taps.push(tap(r, s));
                    }
                }
                let pixels = (0..images).map(|image| pixel(image, h, w));
                self.tiles(first..rows.taps.len(), pixels, x, rows);
            }
        }
    }

    /// Tiles of (input, output) pixels that need the same taps.
    fn tiles(
        &self,
        taps: std::ops::Range<usize>,
        pixels: impl Iterator<Item = (usize, usize)>,
        x: &[T],
        rows: &mut Rows<T>,
    ) {
        let height = self.kernels.height;
        let mut pixels = pixels.peekable();
        while pixels.peek().is_some() {
            let first = rows.outputs.len();
            for (from, to) in pixels.by_ref().take(height) {
                rows.pointers.push(x[from..].as_ptr());
                rows.outputs.push(to);
            }
            let outputs = &rows.outputs[first..];
            let stride = match outputs {
                [one, two, ..] if outputs.len() == height => {
                    let stride = two - one;
                    let regular = outputs.windows(2).all(|pair| pair[1] - pair[0] == stride);
                    regular.then_some(stride)
                }
                _ => None,
            };
            let len = outputs.len();
            let last = rows.pointers[rows.pointers.len() - 1];
            rows.pointers
                .extend(std::iter::repeat_n(last, height - len));
            rows.tiles.push(Tile {
                taps: taps.clone(),
                first,
                len,
                stride,
            });
        }
    }
}
