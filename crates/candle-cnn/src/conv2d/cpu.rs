//! The fast path on the CPU.
//!
//! Candle's tensors hold one plane per channel (N, C, H, W); the register
//! tiles of [`crate::simd`] want the channels of a pixel side by side. So each
//! task takes a few images, lays them out as pixels of channels (with the
//! padding as real zeros, so that the tiles need no bounds checks), computes,
//! and writes planes back: two passes over data that is in the cache, against
//! hundreds of multiplications per element. Nothing is ever expanded to
//! columns (im2col).
//!
//! * forward: gather tiles over the padded input.
//! * input gradient: the same, over the padded output gradient, with the kernel
//!   turned by 180° and its channel roles exchanged. With a stride an input
//!   pixel meets only some of the taps; those that meet the same ones, a stride
//!   apart, are a [`Phase`] of their own.
//! * weight gradient: outer tiles, summed over the pixels of each thread's
//!   images in order, then over the threads in order: the same bits for the
//!   same number of threads.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ops::Range;

use rayon::prelude::*;

use super::{Conv2dGeometry, PackedWeight};
use crate::activation::{Activation, keep_positive};
use crate::element::Element;
use crate::simd::{Accumulate, Gather, Isa, Kernels, MAX_VECTORS, Outer, Tap, transpose};

/// Which gradients somebody needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needs {
    pub(super) input: bool,
    pub(super) weight: bool,
    pub(super) bias: bool,
}

/// The gradients that were needed.
pub(super) struct Gradients<T> {
    pub(super) input: Option<Vec<T>>,
    pub(super) weight: Option<Vec<T>>,
    pub(super) bias: Option<Vec<T>>,
}

/// Pixels that one task handles at a time: enough to use each loaded weight
/// panel many times, few enough that images and results stay in the L2 cache
/// (1,024 pixels × 192 channels × 4 bytes = 768 KiB).
pub(crate) const PIXELS_PER_TASK: usize = 1024;

/// Pixels per block of the weight gradient: 128 pixels × 48 channels × 4
/// bytes = 24 KiB of output gradient, half of an L1 cache, read again for every
/// input channel tile.
pub(crate) const PIXELS_PER_OUTER_BLOCK: usize = 128;

/// Adjacent output channels that one tile computes.
#[derive(Clone, Copy)]
pub(crate) struct Panel {
    pub(crate) start: usize,
    pub(crate) vectors: usize,
}

/// Cuts `channels` into panels of two and three vectors where it can.
pub(crate) fn panels(channels: usize, lanes: usize) -> Vec<Panel> {
    let mut left = channels.div_ceil(lanes);
    let mut start = 0;
    let mut panels = Vec::new();
    while left > 0 {
        let vectors = if left == 4 { 2 } else { left.min(MAX_VECTORS) };
        panels.push(Panel { start, vectors });
        start += vectors * lanes;
        left -= vectors;
    }
    panels
}

/// How an image lies in its padded buffer and where each output pixel starts.
#[derive(Clone, Copy)]
struct Window {
    channels: usize,
    /// Size of the source image.
    source: (usize, usize),
    /// Where the source's first pixel lies in the buffer.
    origin: (usize, usize),
    /// Size of the buffer.
    buffer: (usize, usize),
    stride: (usize, usize),
    output: (usize, usize),
}

impl Window {
    fn forward(g: &Conv2dGeometry) -> Self {
        let padded = |size: usize, padding: usize| size + 2 * padding;
        Self {
            channels: g.c_in,
            source: g.input,
            origin: g.config.padding,
            buffer: (
                padded(g.input.0, g.config.padding.0),
                padded(g.input.1, g.config.padding.1),
            ),
            stride: g.config.stride,
            output: g.output,
        }
    }

    fn buffer_len(&self) -> usize {
        self.buffer.0 * self.buffer.1 * self.channels
    }

    fn output_pixels(&self) -> usize {
        self.output.0 * self.output.1
    }

    /// Whether the buffer is the source's pixels, side by side.
    fn is_dense(&self) -> bool {
        self.source == self.buffer && self.origin == (0, 0)
    }

    /// Every tap of the forward pass, by its offset from an output pixel's first tap.
    fn taps(&self, g: &Conv2dGeometry) -> Vec<Tap> {
        let mut taps = Vec::with_capacity(g.kernel.0 * g.kernel.1);
        for r in 0..g.kernel.0 {
            for s in 0..g.kernel.1 {
                let (h, w) = (r * g.config.dilation.0, s * g.config.dilation.1);
                taps.push(Tap {
                    offset: (h * self.buffer.1 + w) * self.channels,
                    number: taps.len(),
                });
            }
        }
        taps
    }

    /// Lays one image's planes out as pixels of channels.
    fn fill<T: Element>(&self, kernels: &Kernels<T>, planes: &[T], buffer: &mut [T]) {
        let pixels = self.source_pixels();
        if self.is_dense() {
            let sizes = (self.channels, pixels);
            return transpose(kernels, planes, pixels, sizes, buffer, self.channels);
        }
        buffer.fill(T::ZERO);
        // Rows and columns of the source that fall inside the buffer.
        let inside =
            |buffer: usize, origin: usize, source: usize| source.min(buffer.saturating_sub(origin));
        let height = inside(self.buffer.0, self.origin.0, self.source.0);
        let width = inside(self.buffer.1, self.origin.1, self.source.1);
        if width == 0 {
            return;
        }
        for h in 0..height {
            let to = ((self.origin.0 + h) * self.buffer.1 + self.origin.1) * self.channels;
            transpose(
                kernels,
                &planes[h * self.source.1..],
                pixels,
                (self.channels, width),
                &mut buffer[to..],
                self.channels,
            );
        }
    }

    fn source_pixels(&self) -> usize {
        self.source.0 * self.source.1
    }

    /// Elements of one image's buffer up to the end of the last output pixel's last tap. Those of all other pixels
    /// lie before it: a pixel further right or down begins further on.
    fn end(&self, taps: &[Tap]) -> usize {
        let (h, w) = (
            self.output.0.saturating_sub(1),
            self.output.1.saturating_sub(1),
        );
        let last = (h * self.stride.0 * self.buffer.1 + w * self.stride.1) * self.channels;
        let reach = taps.iter().map(|tap| tap.offset).max().unwrap_or(0);
        last + reach + self.channels
    }

    /// Appends a pointer to the first tap of every output pixel of one image.
    fn push_rows<T>(&self, image: *const T, rows: &mut Vec<*const T>) {
        for h in 0..self.output.0 {
            let line = h * self.stride.0 * self.buffer.1;
            for w in 0..self.output.1 {
                rows.push(image.wrapping_add((line + w * self.stride.1) * self.channels));
            }
        }
    }
}

/// Output pixels that meet the same taps.
struct Phase {
    /// Its window; what it says of the source and the buffer is the same for all phases of a pass.
    window: Window,
    taps: Vec<Tap>,
    /// The first of its pixels in the result.
    start: (usize, usize),
}

/// The pixels of one axis of the input gradient that lie a stride apart.
#[derive(Default)]
struct AxisPhase {
    /// How many they are.
    count: usize,
    /// The turned kernel's taps that they meet: number, and the output that the first pixel sees by it, which may lie
    /// beyond the image.
    taps: Vec<(usize, isize)>,
}

/// An axis of the input gradient.
struct InputGradientAxis {
    /// By their first pixel. Pixels that meet no tap are in none.
    phases: BTreeMap<usize, AxisPhase>,
    /// Where the output gradient begins in the buffer.
    origin: usize,
    /// Size of the buffer.
    buffer: usize,
}

impl InputGradientAxis {
    fn new(kernel: usize, (stride, dilation, padding): (usize, usize, usize), size: usize) -> Self {
        let reach = dilation * (kernel - 1);
        // A step further than this is as good as none.
        let step = stride.min(size + padding + reach + 1) as isize;
        let mut phases = BTreeMap::<usize, AxisPhase>::new();
        let (mut first, mut last) = (0, 0);
        for turned in 0..kernel {
            // dx[start] += dy[o] · w[r], where o · stride = start + padding − r · dilation.
            let at = (padding + turned * dilation) as isize - reach as isize;
            let start = (-at).rem_euclid(step) as usize;
            if start >= size {
                continue;
            }
            let phase = phases.entry(start).or_default();
            phase.count = (size - start).div_ceil(step as usize);
            let output = (start as isize + at) / step;
            phase.taps.push((turned, output));
            first = first.min(output);
            last = last.max(output + phase.count as isize - 1);
        }
        Self {
            phases,
            origin: -first as usize,
            buffer: (last - first) as usize + 1,
        }
    }
}

/// Pixels of the buffer along an axis of the input gradient.
#[cfg(test)]
pub(super) fn padded_gradient(kernel: usize, steps: (usize, usize, usize), size: usize) -> usize {
    InputGradientAxis::new(kernel, steps, size).buffer
}

/// The phases of the input gradient: pixels that are in none have a gradient of zero.
fn input_gradient(g: &Conv2dGeometry) -> Vec<Phase> {
    let config = &g.config;
    let h = (config.stride.0, config.dilation.0, config.padding.0);
    let w = (config.stride.1, config.dilation.1, config.padding.1);
    let rows = InputGradientAxis::new(g.kernel.0, h, g.input.0);
    let columns = InputGradientAxis::new(g.kernel.1, w, g.input.1);
    let in_buffer =
        |axis: &InputGradientAxis, output: isize| (axis.origin as isize + output) as usize;
    let mut phases = Vec::with_capacity(rows.phases.len() * columns.phases.len());
    for (&top, h) in &rows.phases {
        for (&left, w) in &columns.phases {
            let mut taps = Vec::with_capacity(h.taps.len() * w.taps.len());
            for &(r, row) in &h.taps {
                for &(s, column) in &w.taps {
                    let line = in_buffer(&rows, row) * columns.buffer;
                    taps.push(Tap {
                        offset: (line + in_buffer(&columns, column)) * g.c_out,
                        number: r * g.kernel.1 + s,
                    });
                }
            }
            phases.push(Phase {
                window: Window {
                    channels: g.c_out,
                    source: g.output,
                    origin: (rows.origin, columns.origin),
                    buffer: (rows.buffer, columns.buffer),
                    stride: (1, 1),
                    output: (h.count, w.count),
                },
                taps,
                start: (top, left),
            });
        }
    }
    phases
}

/// Buffers that a task keeps from one group of images to the next.
struct Scratch<T> {
    image: Vec<T>,
    rows: Vec<*const T>,
    out: Vec<T>,
    /// Results of all phases, pixel by pixel. One pass alone writes here.
    pixels: Vec<T>,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self {
            image: Vec::new(),
            rows: Vec::new(),
            out: Vec::new(),
            pixels: Vec::new(),
        }
    }
}

impl<T: Element> Scratch<T> {
    /// Lays out the images.
    fn lay_out(&mut self, kernels: &Kernels<T>, window: &Window, planes: &[T]) {
        let buffer_len = window.buffer_len();
        let source_len = window.channels * window.source_pixels();
        self.image
            .resize(planes.len() / source_len * buffer_len, T::ZERO);
        for (planes, buffer) in planes
            .chunks_exact(source_len)
            .zip(self.image.chunks_exact_mut(buffer_len))
        {
            window.fill(kernels, planes, buffer);
        }
    }

    /// Lists the rows of all output pixels of the images that are laid out, repeating the last one up to a multiple of
    /// `height`. All `taps` of a row lie inside of its image.
    fn list_rows(&mut self, window: &Window, taps: &[Tap], height: usize) {
        let buffer_len = window.buffer_len();
        assert!(window.end(taps) <= buffer_len);
        self.rows.clear();
        for image in self.image.chunks_exact(buffer_len) {
            window.push_rows(image.as_ptr(), &mut self.rows);
        }
        while !self.rows.len().is_multiple_of(height) {
            self.rows.extend(self.rows.last().copied());
        }
    }
}

/// A convolution by gather tiles: the forward pass, or the input gradient.
struct GatherPass<T: 'static> {
    kernels: &'static Kernels<T>,
    /// One of all pixels in the forward pass, and in an input gradient without a stride.
    phases: Vec<Phase>,
    /// Height and width of the result.
    output: (usize, usize),
    /// How far apart the pixels of a phase are in it.
    step: (usize, usize),
    /// Taps of the kernel.
    taps: usize,
    weight: PackedWeight<T>,
    /// What the sums start from, `weight.width` values.
    init: Vec<T>,
    activation: Activation,
    /// Channels of the result.
    c_out: usize,
}

impl<T: Element> GatherPass<T> {
    /// Convolves the planes of some images and writes those of the result, which are zeros before.
    fn run(&self, from: &[T], to: &mut [T], scratch: &mut Scratch<T>) {
        let Self {
            kernels,
            phases,
            weight,
            c_out,
            ..
        } = self;
        let Some(first) = phases.first() else {
            return;
        };
        scratch.lay_out(kernels, &first.window, from);
        let pixels = self.output.0 * self.output.1;
        let is_all = first.window.output_pixels() == pixels;
        if !is_all {
            // Those that are in no phase stay zeros.
            let images = scratch.image.len() / first.window.buffer_len();
            scratch
                .pixels
                .resize(images * pixels * weight.width, T::ZERO);
        }
        for phase in phases {
            scratch.list_rows(&phase.window, &phase.taps, kernels.height);
            let Scratch { rows, out, .. } = scratch;
            out.resize(rows.len() * weight.width, T::ZERO);
            // SAFETY: `list_rows` has listed the rows in `scratch.image`, which is laid out by this window, and has
            // asserted that all taps of every row lie inside.
            unsafe { self.gather(phase, rows, out) };
            if !is_all {
                self.put_in_place(phase, scratch);
            }
        }
        let results = match is_all {
            true => &scratch.out,
            false => &scratch.pixels,
        };
        for (image, planes) in to.chunks_exact_mut(c_out * pixels).enumerate() {
            let results = &results[image * pixels * weight.width..];
            let sizes = (pixels, *c_out);
            transpose(kernels, results, weight.width, sizes, planes, pixels);
        }
    }

    /// Copies a phase's results from `scratch.out` to their pixels among those of all phases.
    fn put_in_place(&self, phase: &Phase, scratch: &mut Scratch<T>) {
        let (start, width) = (phase.start, self.weight.width);
        let image = self.output.0 * self.output.1 * width;
        let mut results = scratch.out.chunks_exact(width);
        for pixels in scratch.pixels.chunks_exact_mut(image) {
            for h in (start.0..self.output.0).step_by(self.step.0) {
                let line = &mut pixels[h * self.output.1 * width..][..self.output.1 * width];
                let places = line
                    .chunks_exact_mut(width)
                    .skip(start.1)
                    .step_by(self.step.1);
                for (to, result) in places.zip(results.by_ref()) {
                    to.copy_from_slice(result);
                }
            }
        }
    }

    /// Runs the gather tiles over the rows of a phase: `out[row][channel]`, `weight.width` wide.
    ///
    /// # Safety
    /// At the offset of every tap from each of `rows`, as many elements are readable as the window has channels.
    unsafe fn gather(&self, phase: &Phase, rows: &[*const T], out: &mut [T]) {
        let Self {
            kernels,
            weight,
            init,
            ..
        } = self;
        let Phase { window, taps, .. } = phase;
        let channels = window.channels;
        let height = kernels.height;
        let weight_rows = self.taps * channels;
        // What the tiles rely on besides the rows, once for all of them.
        assert!(rows.len().is_multiple_of(height));
        assert!(out.len() >= rows.len() * weight.width && init.len() >= weight.width);
        assert!(taps.iter().all(|tap| tap.number < self.taps));
        for (panel, &offset) in weight.panels.iter().zip(&weight.offsets) {
            let width = panel.vectors * kernels.lanes;
            assert!(panel.start + width <= weight.width);
            assert!(weight.data.len() >= offset + weight_rows * width);
        }
        let tiles = rows.len() / height;
        for (panel, &offset) in weight.panels.iter().zip(&weight.offsets) {
            let width = panel.vectors * kernels.lanes;
            let ahead_step = width.div_ceil(tiles.max(1));
            for (tile, rows) in rows.chunks_exact(height).enumerate() {
                let args = Gather {
                    rows: rows.as_ptr(),
                    next_rows: rows.as_ptr(),
                    taps: taps.as_ptr(),
                    tap_count: taps.len(),
                    channels,
                    panel: weight.data[offset..].as_ptr(),
                    // The next panel lies behind this one.
                    ahead: weight.data[offset..]
                        .as_ptr()
                        .wrapping_add(weight_rows * (width + tile * ahead_step)),
                    ahead_step,
                    init: init[panel.start..].as_ptr(),
                    init_stride: 0,
                    activation: self.activation,
                    out: out[tile * height * weight.width + panel.start..].as_mut_ptr(),
                    out_stride: weight.width,
                };
                // SAFETY: what lies at the taps of these `height` rows is readable, by the
                // caller's promise; the panel holds `width` weights for each of the taps and
                // channels, and ends inside of `weight.width`, of which `init` holds one and
                // `out` one for each row: asserted above. The processor has the instructions, as it
                // has for all `KernelTable::kernels`.
                unsafe { kernels.gather[panel.vectors - 1](&args) };
            }
        }
    }
}

/// Images of `image_pixels` that one task takes of a batch: about so many `pixels`, but work for every thread.
pub(crate) fn images_per_task(pixels: usize, batch: usize, image_pixels: usize) -> usize {
    let wanted = pixels.div_ceil(image_pixels.max(1));
    wanted.clamp(1, batch.div_ceil(rayon::current_num_threads()).max(1))
}

/// The convolution of all images, in the layout (N, K, H', W').
pub(super) fn forward<T: Element>(
    g: &Conv2dGeometry,
    isa: Isa,
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    activation: Activation,
) -> Vec<T> {
    let kernels = T::kernels(isa);
    let window = Window::forward(g);
    let pixels = window.output_pixels();
    let mut y = vec![T::ZERO; g.batch * g.c_out * pixels];
    if y.is_empty() {
        return y;
    }
    let taps = g.kernel.0 * g.kernel.1;
    let packed = PackedWeight::new(weight, (taps, g.c_out, g.c_in), kernels, Vec::new());
    let mut init = vec![T::ZERO; packed.width];
    if let Some(bias) = bias {
        init[..g.c_out].copy_from_slice(bias);
    }
    let pass = GatherPass {
        kernels,
        phases: vec![Phase {
            taps: window.taps(g),
            window,
            start: (0, 0),
        }],
        step: (1, 1),
        output: g.output,
        taps,
        weight: packed,
        init,
        activation,
        c_out: g.c_out,
    };
    let images = images_per_task(PIXELS_PER_TASK, g.batch, pixels);
    let x_len = g.c_in * g.input.0 * g.input.1;
    y.par_chunks_mut(images * g.c_out * pixels)
        .zip(x.par_chunks(images * x_len))
        .for_each_init(Scratch::default, |scratch, (y, x)| pass.run(x, y, scratch));
    y
}

/// The needed gradients for the upstream gradient `dy`; where `mask` (the
/// output of a relu) is given, `dy` counts only where the output is positive.
pub(super) fn backward<T: Element>(
    g: &Conv2dGeometry,
    isa: Isa,
    x: &[T],
    weight: &[T],
    mask: Option<&[T]>,
    dy: &[T],
    needs: Needs,
) -> Gradients<T> {
    let kernels = T::kernels(isa);
    let taps = g.kernel.0 * g.kernel.1;
    let pixels = g.output.0 * g.output.1;
    let x_len = g.c_in * g.input.0 * g.input.1;
    let mut dx = vec![T::ZERO; if needs.input { x.len() } else { 0 }];

    let backward = Backward {
        g,
        kernels,
        needs,
        x,
        mask,
        dy,
        input_pass: needs.input.then(|| GatherPass {
            kernels,
            phases: input_gradient(g),
            step: g.config.stride,
            output: g.input,
            taps,
            weight: PackedWeight::turned(weight, (taps, g.c_out, g.c_in), kernels, Vec::new()),
            init: vec![T::ZERO; g.c_in.div_ceil(kernels.lanes) * kernels.lanes],
            activation: Activation::Identity,
            c_out: g.c_in,
        }),
    };

    // One part per thread, each a run of whole images: the parts' weight
    // gradients are summed in this order.
    let threads = rayon::current_num_threads().clamp(1, g.batch.max(1));
    let images_per_part = g.batch.div_ceil(threads).max(1);
    let mut dx_parts: Vec<&mut [T]> = match needs.input {
        true => dx.chunks_mut(images_per_part * x_len).collect(),
        false => Vec::new(),
    };
    dx_parts.resize_with(g.batch.div_ceil(images_per_part), Default::default);

    let most_pixels = pixels.max(g.input.0 * g.input.1);
    let group = images_per_task(PIXELS_PER_TASK, g.batch, most_pixels);
    let parts: Vec<Part<T>> = dx_parts
        .into_par_iter()
        .enumerate()
        .map(|(part, dx)| {
            let first = part * images_per_part;
            let last = g.batch.min(first + images_per_part);
            let mut sums = Part::new(g, kernels, needs);
            let mut scratch = Scratch::default();
            let mut masked = Vec::new();
            for start in (first..last).step_by(group) {
                let end = last.min(start + group);
                let dx = match needs.input {
                    true => &mut dx[(start - first) * x_len..(end - first) * x_len],
                    false => &mut [],
                };
                sums.add_images(&backward, start..end, dx, &mut scratch, &mut masked);
            }
            sums
        })
        .collect();

    let total = Part::sum(parts);
    Gradients {
        input: needs.input.then_some(dx),
        weight: needs.weight.then(|| match &total {
            Some(total) => total.unpack_weight(g, kernels.lanes),
            None => vec![T::ZERO; weight.len()],
        }),
        bias: needs.bias.then(|| match total {
            Some(total) => total.bias,
            None => vec![T::ZERO; g.c_out],
        }),
    }
}

/// What the backward pass reads, of all images.
struct Backward<'a, T: 'static> {
    g: &'a Conv2dGeometry,
    kernels: &'static Kernels<T>,
    needs: Needs,
    x: &'a [T],
    mask: Option<&'a [T]>,
    dy: &'a [T],
    /// The convolution that makes the input gradient, where somebody needs it.
    input_pass: Option<GatherPass<T>>,
}

/// One thread's share of the weight and bias gradients.
struct Part<T> {
    /// `[tap][c_in][c_out rounded up to whole vectors]`.
    weight: Vec<T>,
    bias: Vec<T>,
    /// The output gradient in the order that the outer tiles read.
    packed_dy: Vec<T>,
}

impl<T: Element> Part<T> {
    fn new(g: &Conv2dGeometry, kernels: &Kernels<T>, needs: Needs) -> Self {
        let width = g.c_out.div_ceil(kernels.lanes) * kernels.lanes;
        let weight_len = g.kernel.0 * g.kernel.1 * g.c_in * width;
        Self {
            weight: vec![T::ZERO; if needs.weight { weight_len } else { 0 }],
            bias: vec![T::ZERO; if needs.bias { g.c_out } else { 0 }],
            packed_dy: Vec::new(),
        }
    }

    /// Writes the input gradient of some images to `dx` and adds to the others, whichever somebody needs. `masked` is
    /// memory for their output gradient.
    fn add_images(
        &mut self,
        backward: &Backward<'_, T>,
        images: Range<usize>,
        dx: &mut [T],
        scratch: &mut Scratch<T>,
        masked: &mut Vec<T>,
    ) {
        let g = backward.g;
        let pixels = g.output.0 * g.output.1;
        let x_len = g.c_in * g.input.0 * g.input.1;
        let of_output = images.start * g.c_out * pixels..images.end * g.c_out * pixels;
        let dy = &backward.dy[of_output.clone()];
        let dy = match backward.mask {
            None => dy,
            Some(y) => {
                let y = &y[of_output];
                masked.clear();
                masked.extend(dy.iter().zip(y).map(|(&dy, &y)| keep_positive(dy, y)));
                masked.as_slice()
            }
        };
        if backward.needs.bias {
            self.add_bias(dy, pixels);
        }
        if let Some(pass) = &backward.input_pass {
            pass.run(dy, dx, scratch);
        }
        if backward.needs.weight {
            let x = &backward.x[images.start * x_len..images.end * x_len];
            self.add_weight(g, backward.kernels, scratch, x, dy);
        }
    }

    fn add_bias(&mut self, dy: &[T], pixels: usize) {
        let c_out = self.bias.len();
        for (plane, dy) in dy.chunks_exact(pixels).enumerate() {
            // Eight partial sums: fast, and less rounding than one.
            let mut sums = [T::ZERO; 8];
            let mut chunks = dy.chunks_exact(8);
            for chunk in &mut chunks {
                for (sum, &dy) in sums.iter_mut().zip(chunk) {
                    *sum += dy;
                }
            }
            let rest: T = chunks.remainder().iter().copied().sum();
            self.bias[plane % c_out] += sums.into_iter().sum::<T>() + rest;
        }
    }

    fn add_weight(
        &mut self,
        g: &Conv2dGeometry,
        kernels: &Kernels<T>,
        scratch: &mut Scratch<T>,
        x: &[T],
        dy: &[T],
    ) {
        let window = Window::forward(g);
        let taps = window.taps(g);
        scratch.lay_out(kernels, &window, x);
        scratch.list_rows(&window, &taps, 1);
        let rows = &scratch.rows;
        let width = g.c_out.div_ceil(kernels.lanes) * kernels.lanes;
        let panels = panels(g.c_out, kernels.lanes);
        let pixels = rows.len();
        self.packed_dy.resize(pixels * width, T::ZERO);
        assert!(self.weight.len() >= taps.len() * g.c_in * width);
        for panel in &panels {
            pack_panel(
                g,
                kernels,
                *panel,
                dy,
                &mut self.packed_dy[panel.start * pixels..],
            );
        }
        for p0 in (0..pixels).step_by(PIXELS_PER_OUTER_BLOCK) {
            let block = PIXELS_PER_OUTER_BLOCK.min(pixels - p0);
            for panel in &panels {
                let panel_width = panel.vectors * kernels.lanes;
                let dy = &self.packed_dy[panel.start * pixels + p0 * panel_width..]
                    [..block * panel_width];
                for &Tap { offset, number } in &taps {
                    for (c, tile) in kernels.outer_strips(g.c_in, panel.vectors) {
                        let to = (number * g.c_in + c) * width + panel.start;
                        let args = Outer {
                            accumulate: Accumulate::Add,
                            rows: rows[p0..p0 + block].as_ptr(),
                            offset: offset + c,
                            pixels: block,
                            dy: dy.as_ptr(),
                            dy_stride: panel_width,
                            dw: self.weight[to..].as_mut_ptr(),
                            dw_stride: width,
                        };
                        // SAFETY: the rows point into a buffer laid out by
                        // `Window`, where every tap's `c_in` channels are
                        // inside, as `Scratch::list_rows` has asserted, and
                        // strips end at c_in; `dy` holds `block` rows of the
                        // panel; the strip's rows of this tap lie in
                        // `weight`, by the assertion above, and hold the
                        // panel's columns, since panels partition `width`. The
                        // processor has the instructions, as it has for all
                        // `KernelTable::kernels`.
                        unsafe { tile(&args) };
                    }
                }
            }
        }
    }

    /// Sums the parts in order.
    fn sum(parts: Vec<Self>) -> Option<Self> {
        let mut parts = parts.into_iter();
        let mut total = parts.next()?;
        for part in parts {
            let add = |to: &mut [T], from: &[T]| {
                to.par_chunks_mut(1 << 14)
                    .zip(from.par_chunks(1 << 14))
                    .for_each(|(to, from)| {
                        for (to, &from) in to.iter_mut().zip(from) {
                            *to += from;
                        }
                    });
            };
            add(&mut total.weight, &part.weight);
            add(&mut total.bias, &part.bias);
        }
        Some(total)
    }

    /// The weight gradient in the weight's own layout (K, C, R, S).
    fn unpack_weight(&self, g: &Conv2dGeometry, lanes: usize) -> Vec<T> {
        let taps = g.kernel.0 * g.kernel.1;
        let width = g.c_out.div_ceil(lanes) * lanes;
        let mut weight = vec![T::ZERO; g.c_out * g.c_in * taps];
        weight
            .par_chunks_mut(g.c_in * taps)
            .enumerate()
            .for_each(|(k, weight)| {
                for c in 0..g.c_in {
                    for tap in 0..taps {
                        weight[c * taps + tap] = self.weight[(tap * g.c_in + c) * width + k];
                    }
                }
            });
        weight
    }
}

/// One panel of the output gradient as `[pixel][lane]`, zero beyond the channels.
fn pack_panel<T: Element>(
    g: &Conv2dGeometry,
    kernels: &Kernels<T>,
    panel: Panel,
    dy: &[T],
    to: &mut [T],
) {
    let pixels = g.output.0 * g.output.1;
    let width = panel.vectors * kernels.lanes;
    let used = width.min(g.c_out - panel.start);
    for (image, dy) in dy.chunks_exact(g.c_out * pixels).enumerate() {
        let to = &mut to[image * pixels * width..][..pixels * width];
        let planes = &dy[panel.start * pixels..][..used * pixels];
        if used < width {
            to.fill(T::ZERO);
        }
        transpose(kernels, planes, pixels, (used, pixels), to, width);
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    /// How many rows and results the tiles are given.
    struct Given {
        rows: usize,
        out: usize,
    }

    /// Whether a convolution of 1 image of 3 channels by 20 kernels of 2 × 2 runs, as `spoil` leaves it and what the tiles get.
    fn gathered(spoil: impl FnOnce(&mut GatherPass<f32>, &mut Given)) -> bool {
        let kernels = <f32 as crate::simd::KernelTable>::kernels(Isa::detect());
        let g = super::super::tests::geometry(1, (3, 20), (5, 6), (2, 2), Default::default());
        let g = g.unwrap();
        let window = Window::forward(&g);
        let weight = vec![1.0; 20 * 3 * 4];
        let weight = PackedWeight::new(&weight, (4, 20, 3), kernels, Vec::new());
        let mut pass = GatherPass {
            kernels,
            phases: vec![Phase {
                window,
                taps: window.taps(&g),
                start: (0, 0),
            }],
            step: (1, 1),
            output: g.output,
            taps: 4,
            init: vec![0.0; weight.width],
            weight,
            activation: Activation::Relu,
            c_out: 20,
        };
        let mut scratch = Scratch::default();
        let planes = vec![1.0; 3 * 30];
        scratch.lay_out(kernels, &window, &planes);
        scratch.list_rows(&window, &pass.phases[0].taps, kernels.height);
        let rows = scratch.rows.len();
        let mut given = Given {
            rows,
            out: rows * pass.weight.width,
        };
        spoil(&mut pass, &mut given);
        // Longer than what the tiles get, so that nothing is harmed where they do not refuse it.
        let mut out = vec![0.0; 2 * given.out + 1024];
        let run = || {
            let phase = &pass.phases[0];
            scratch.lay_out(kernels, &phase.window, &planes);
            scratch.list_rows(&phase.window, &phase.taps, kernels.height);
            // SAFETY: as in `GatherPass::run`.
            unsafe { pass.gather(phase, &scratch.rows[..given.rows], &mut out[..given.out]) };
        };
        catch_unwind(AssertUnwindSafe(run)).is_ok()
    }

    #[test]
    fn what_the_tiles_rely_on_is_asserted_before_they_run() {
        assert!(gathered(|_, _| ()));
        assert!(!gathered(|_, given| given.out -= 1), "results");
        assert!(!gathered(|_, given| given.rows -= 1), "rows of a tile");
        assert!(
            !gathered(|pass, _| pass.init.truncate(pass.weight.width - 1)),
            "start values"
        );
        assert!(
            !gathered(|pass, _| pass.phases[0].taps[0].number = 4),
            "a tap's number"
        );
        assert!(
            !gathered(|pass, _| pass.phases[0].taps[3].offset += 3),
            "a tap's place"
        );
        assert!(
            !gathered(|pass, _| pass.phases[0].window.stride.1 = 2),
            "a pixel's place"
        );
        assert!(
            !gathered(|pass, _| *pass.weight.offsets.last_mut().unwrap() += 1),
            "weights"
        );
        assert!(
            !gathered(|pass, _| pass.weight.width -= 1),
            "a panel's place"
        );
    }
}
