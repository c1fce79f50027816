//! 3×3 convolutions with a quarter of the multiplications: F(4×4, 3×3) of
//! Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (2015).
//!
//! A tile of 4×4 outputs Y depends on a patch d of 6×6 inputs. With the
//! matrices below, which interpolate at 0, ±1, ±2 and ∞,
//!
//! * output: `Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A`, where ⊙ sums over input
//!   channels: 36 matrix products over all tiles, instead of 16 · 9
//!   multiplications a tile and channel pair;
//! * weight gradient, by transposition: `dg = Gᵀ [ Σ_tiles (Bᵀ d B) ⊙ (A dY Aᵀ) ] G`;
//! * input gradient: the output formula, over `dY` with the kernel turned.
//!
//! Rounding: about 10 times that of the direct sum, since entries of up to 8
//! cancel; so this is for f32, where the tests hold it to 3e-5 in relative L2
//! norm, and f64 never takes it.
#![allow(unsafe_code)]
// Loops over registers by constant bounds: what the compiler vectorises surely.
#![allow(clippy::needless_range_loop)]

use super::gather::Start;
use super::outer::turn_sums;
use crate::activation::{Activation, relu};
use crate::conv2d::{PackedWeight, panels};
use crate::element::Element;
use crate::maps::{ALIGNMENT, MapLayout, Part};
use crate::simd::{Accumulate, Gather, Isa, Kernels, Outer, Tap, multiversion};

/// Height and width of an output tile.
pub(super) const TILE: usize = 4;
/// Height and width of the patch of inputs that an output tile depends on.
const PATCH: usize = 6;
/// Elements of a patch, and matrix products.
pub(super) const PRODUCTS: usize = PATCH * PATCH;

/// Whether a convolution takes this path: f32, 3×3, whole tiles, and so many of them per thread that transforming the
/// weights, or reading four times as many of them, pays. Where a batch norm follows, also that its statistics are of
/// many values: those of few magnify the rounding.
pub(super) fn pays<T>(
    kernel: usize,
    (height, width): (usize, usize),
    batch: usize,
    normalised: bool,
) -> bool {
    /// Tiles per thread.
    const LEAST_TILES: usize = 16;
    const LEAST_TILES_OF_STATISTICS: usize = 64;
    let least = match normalised {
        true => LEAST_TILES_OF_STATISTICS,
        false => LEAST_TILES,
    };
    let tiles = batch.div_ceil(rayon::current_num_threads()) * (height / TILE) * (width / TILE);
    size_of::<T>() == size_of::<f32>()
        && kernel == 3
        && height.is_multiple_of(TILE)
        && width.is_multiple_of(TILE)
        && tiles >= least
}

/// Sixteen channels.
type Channels<T> = [T; ALIGNMENT];

/// `Bᵀ · d` for a column of six.
#[inline(always)]
fn to_patch<T: Element>(d: [T; PATCH]) -> [T; PATCH] {
    let [two, four, five] = [T::real(2.0), T::real(4.0), T::real(5.0)];
    let even = d[4] - four * d[2];
    let odd = d[3] - four * d[1];
    let (minor_even, minor_odd) = (d[4] - d[2], two * (d[3] - d[1]));
    [
        four * d[0] - five * d[2] + d[4],
        even + odd,
        even - odd,
        minor_even + minor_odd,
        minor_even - minor_odd,
        four * d[1] - five * d[3] + d[5],
    ]
}

/// `Aᵀ · m` for a column of six.
#[inline(always)]
fn to_tile<T: Element>(m: [T; PATCH]) -> [T; TILE] {
    let [two, four, eight] = [T::real(2.0), T::real(4.0), T::real(8.0)];
    let (sum1, difference1) = (m[1] + m[2], m[1] - m[2]);
    let (sum2, difference2) = (m[3] + m[4], m[3] - m[4]);
    [
        m[0] + sum1 + sum2,
        difference1 + two * difference2,
        sum1 + four * sum2,
        difference1 + eight * difference2 + m[5],
    ]
}

/// `A · y` for a column of four.
#[inline(always)]
fn from_tile<T: Element>(y: [T; TILE]) -> [T; PATCH] {
    let [two, four, eight] = [T::real(2.0), T::real(4.0), T::real(8.0)];
    let (even1, odd1) = (y[0] + y[2], y[1] + y[3]);
    let (even2, odd2) = (y[0] + four * y[2], two * y[1] + eight * y[3]);
    [
        y[0],
        even1 + odd1,
        even1 - odd1,
        even2 + odd2,
        even2 - odd2,
        y[3],
    ]
}

/// `G · g` for a column of three.
#[inline(always)]
fn from_kernel<T: Element>(g: [T; 3]) -> [T; PATCH] {
    let quarter = T::real(0.25);
    let sixth = T::real(-1.0 / 6.0);
    let (even1, odd1) = (sixth * (g[0] + g[2]), sixth * g[1]);
    let even2 = T::real(1.0 / 24.0) * g[0] + T::real(1.0 / 6.0) * g[2];
    let odd2 = T::real(1.0 / 12.0) * g[1];
    [
        quarter * g[0],
        even1 + odd1,
        even1 - odd1,
        even2 + odd2,
        even2 - odd2,
        g[2],
    ]
}

/// `Gᵀ · u` for a column of six.
#[inline(always)]
fn to_kernel<T: Element>(u: [T; PATCH]) -> [T; 3] {
    let sixth = T::real(1.0 / 6.0);
    let (sum1, difference1) = (u[1] + u[2], u[1] - u[2]);
    let (sum2, difference2) = (u[3] + u[4], u[3] - u[4]);
    [
        T::real(0.25) * u[0] - sixth * sum1 + T::real(1.0 / 24.0) * sum2,
        T::real(1.0 / 12.0) * difference2 - sixth * difference1,
        sixth * (sum2 - sum1) + u[5],
    ]
}

/// Applies a transformation to the columns and then to the rows of a matrix
/// of channels, `FROM` × `FROM` to `TO` × `TO`.
#[inline(always)]
fn both_ways<T: Element, const FROM: usize, const TO: usize>(
    from: &[[Channels<T>; FROM]; FROM],
    to: &mut [[Channels<T>; TO]; TO],
    transform: impl Fn([T; FROM]) -> [T; TO],
) {
    let mut half = [[[T::ZERO; ALIGNMENT]; FROM]; TO];
    for column in 0..FROM {
        for i in 0..ALIGNMENT {
            let values = transform(std::array::from_fn(|row| from[row][column][i]));
            for row in 0..TO {
                half[row][column][i] = values[row];
            }
        }
    }
    for row in 0..TO {
        for i in 0..ALIGNMENT {
            let values = transform(std::array::from_fn(|column| half[row][column][i]));
            for column in 0..TO {
                to[row][column][i] = values[column];
            }
        }
    }
}

/// The tiles of some images of a layout.
#[derive(Clone, Copy)]
struct Tiles {
    layout: MapLayout,
    /// Where the first tile's first pixel lies in an image.
    first: usize,
    /// Tiles per column and per line of an image.
    count: (usize, usize),
    images: usize,
    /// Channels, a multiple of 16.
    channels: usize,
}

impl Tiles {
    fn new(
        layout: MapLayout,
        (outside, channel): (usize, usize),
        part: &Part,
        width: usize,
        channels: usize,
    ) -> Self {
        Self {
            layout,
            first: layout.first(outside) + channel + part.lines.start * layout.line(),
            count: (part.lines.len() / TILE, width / TILE),
            images: part.images,
            channels: channels.next_multiple_of(ALIGNMENT),
        }
    }

    fn len(&self) -> usize {
        self.images * self.count.0 * self.count.1
    }

    #[inline(always)]
    fn at(&self, tile: usize) -> usize {
        let (image, rest) = (
            tile / (self.count.0 * self.count.1),
            tile % (self.count.0 * self.count.1),
        );
        let (row, column) = (rest / self.count.1, rest % self.count.1);
        image * self.layout.image()
            + self.first
            + TILE * (row * self.layout.line() + column * self.layout.pixel)
    }
}

#[inline(always)]
fn load<T: Element>(from: &[T], at: usize) -> Channels<T> {
    let run = &from[at..at + ALIGNMENT];
    std::array::from_fn(|i| run[i])
}

/// Reads `SIZE` × `SIZE` pixels and writes the transformed patch as
/// `[product][tile][channel]`.
#[inline(always)]
fn transform_tiles<T: Element, const SIZE: usize>(
    tiles: &Tiles,
    x: &[T],
    to: &mut [T],
    transform: impl Fn([T; SIZE]) -> [T; PATCH] + Copy,
) {
    let product = tiles.len() * tiles.channels;
    let mut pixels = [[[T::ZERO; ALIGNMENT]; SIZE]; SIZE];
    let mut patch = [[[T::ZERO; ALIGNMENT]; PATCH]; PATCH];
    for tile in 0..tiles.len() {
        let at = tiles.at(tile);
        for c in (0..tiles.channels).step_by(ALIGNMENT) {
            for row in 0..SIZE {
                for column in 0..SIZE {
                    let pixel = at + row * tiles.layout.line() + column * tiles.layout.pixel;
                    pixels[row][column] = load(x, pixel + c);
                }
            }
            both_ways(&pixels, &mut patch, transform);
            for row in 0..PATCH {
                for column in 0..PATCH {
                    let to_at = (row * PATCH + column) * product + tile * tiles.channels + c;
                    to[to_at..to_at + ALIGNMENT].copy_from_slice(&patch[row][column]);
                }
            }
        }
    }
}

#[inline(always)]
fn input_body<T: Element>(tiles: &Tiles, x: &[T], to: &mut [T]) {
    transform_tiles::<T, PATCH>(tiles, x, to, to_patch);
}

#[inline(always)]
fn gradient_body<T: Element>(tiles: &Tiles, dy: &[T], to: &mut [T]) {
    transform_tiles::<T, TILE>(tiles, dy, to, from_tile);
}

multiversion! {
    /// `Bᵀ d B` of every patch, as `[product][tile][channel]`.
    fn transform_input<T: Element>(tiles: &Tiles, x: &[T], to: &mut [T]) = input_body
}

multiversion! {
    /// `A dY Aᵀ` of every tile, as `[product][tile][channel]`.
    fn transform_gradient<T: Element>(tiles: &Tiles, dy: &[T], to: &mut [T]) = gradient_body
}

/// How the products of a tile become its pixels.
struct Finish<'a, T> {
    tiles: Tiles,
    /// Elements from one product, and from one tile, to the next.
    strides: (usize, usize),
    start: Start<'a, T>,
    activation: Activation,
}

multiversion! {
    /// `Aᵀ m A` of every tile's products, onto its pixels.
    fn transform_output<T: Element>(finish: &Finish<'_, T>, from: &[T], y: &mut [T]) = output_body
}

#[inline(always)]
fn output_body<T: Element>(finish: &Finish<'_, T>, from: &[T], y: &mut [T]) {
    let tiles = &finish.tiles;
    let mut patch = [[[T::ZERO; ALIGNMENT]; PATCH]; PATCH];
    let mut pixels = [[[T::ZERO; ALIGNMENT]; TILE]; TILE];
    for tile in 0..tiles.len() {
        let at = tiles.at(tile);
        for c in (0..tiles.channels).step_by(ALIGNMENT) {
            for row in 0..PATCH {
                for column in 0..PATCH {
                    let product = (row * PATCH + column) * finish.strides.0;
                    patch[row][column] = load(from, product + tile * finish.strides.1 + c);
                }
            }
            both_ways(&patch, &mut pixels, to_tile);
            for row in 0..TILE {
                for column in 0..TILE {
                    let pixel = at + row * tiles.layout.line() + column * tiles.layout.pixel + c;
                    let to = &mut y[pixel..pixel + ALIGNMENT];
                    let start = match finish.start {
                        Start::Values(values) => load(values, c),
                        Start::Present => load(to, 0),
                    };
                    for i in 0..ALIGNMENT {
                        let value = pixels[row][column][i] + start[i];
                        to[i] = match finish.activation {
                            Activation::Identity => value,
                            Activation::Relu => relu(value),
                        };
                    }
                }
            }
        }
    }
}

/// `G g Gᵀ` of packed 3×3 weights. `data` is memory to use again.
pub(super) fn transform_weight<T: Element>(
    isa: Isa,
    weight: &PackedWeight<T>,
    data: Vec<T>,
) -> PackedWeight<T> {
    weight.expand((9, PRODUCTS), data, |from, to| expand_weight(isa, from, to))
}

multiversion! {
    /// `[9][n]` to `[36][n]`.
    fn expand_weight<T: Element>(from: &[T], to: &mut [T]) = expand_body
}

#[inline(always)]
fn expand_body<T: Element>(from: &[T], to: &mut [T]) {
    let n = from.len() / 9;
    let mut kernels = [[[T::ZERO; ALIGNMENT]; 3]; 3];
    let mut products = [[[T::ZERO; ALIGNMENT]; PATCH]; PATCH];
    for start in (0..n).step_by(ALIGNMENT) {
        let count = ALIGNMENT.min(n - start);
        for tap in 0..9 {
            let from = &from[tap * n + start..][..count];
            kernels[tap / 3][tap % 3][..count].copy_from_slice(from);
        }
        both_ways(&kernels, &mut products, from_kernel);
        for product in 0..PRODUCTS {
            let values = &products[product / PATCH][product % PATCH];
            to[product * n + start..][..count].copy_from_slice(&values[..count]);
        }
    }
}

/// Buffers of a task; what is in them is arbitrary.
pub(super) struct Scratch<T> {
    input: Vec<T>,
    output: Vec<T>,
    rows: Vec<*const T>,
}

// SAFETY: the pointers are read only by the `run` that has just written them.
unsafe impl<T: Send> Send for Scratch<T> {}

/// Makes `memory` at least `len` long.
fn grow<T: Element>(memory: &mut Vec<T>, len: usize) {
    if memory.len() < len {
        memory.resize(len, T::ZERO);
    }
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self {
            input: Vec::new(),
            output: Vec::new(),
            rows: Vec::new(),
        }
    }
}

/// A 3×3 convolution of stride 1 from one layout into another.
pub(super) struct WinogradPass<'a, T: 'static> {
    pub(super) kernels: &'static Kernels<T>,
    pub(super) isa: Isa,
    pub(super) x: MapLayout,
    pub(super) x_channel: usize,
    pub(super) channels: usize,
    pub(super) padding: usize,
    /// The weight as [`transform_weight`] makes it.
    pub(super) weight: &'a PackedWeight<T>,
    /// A multiple of 16 values.
    pub(super) start: Start<'a, T>,
    pub(super) activation: Activation,
    pub(super) y: MapLayout,
    pub(super) y_channel: usize,
}

impl<T: Element> WinogradPass<'_, T> {
    /// The weights of one product for the output channels of a panel.
    fn panel(&self, product: usize, panel: usize) -> &[T] {
        let len = self.channels * self.weight.panels[panel].vectors * self.kernels.lanes;
        &self.weight.data[self.weight.offsets[panel] + product * len..][..len]
    }

    /// Computes `part` of the output, which is `y`.
    pub(super) fn run(&self, x: &[T], (y, part): (&mut [T], &Part), scratch: &mut Scratch<T>) {
        let map_width = self.y.size.1;
        let patches = Tiles::new(
            self.x,
            (self.padding, self.x_channel),
            part,
            map_width,
            self.channels,
        );
        let (lanes, height) = (self.kernels.lanes, self.kernels.height);
        // Whole tiles of rows; the rows beyond the last repeat it.
        let padded = patches.len().next_multiple_of(height);
        let width = self.weight.width.next_multiple_of(ALIGNMENT);
        grow(
            &mut scratch.input,
            PRODUCTS * patches.len() * patches.channels,
        );
        grow(&mut scratch.output, PRODUCTS * padded * width);
        transform_input(self.isa, &patches, x, &mut scratch.input);

        let zeros = [T::ZERO; 3 * ALIGNMENT];
        let tap = Tap {
            offset: 0,
            number: 0,
        };
        for product in 0..PRODUCTS {
            let input = &scratch.input[product * patches.len() * patches.channels..];
            scratch.rows.clear();
            for tile in 0..padded {
                let tile = tile.min(patches.len() - 1);
                scratch
                    .rows
                    .push(input[tile * patches.channels..][..self.channels].as_ptr());
            }
            let output = &mut scratch.output[product * padded * width..][..padded * width];
            for (index, panel) in self.weight.panels.iter().enumerate() {
                let panel_width = panel.vectors * lanes;
                let weight = self.panel(product, index);
                let next = match index + 1 < self.weight.panels.len() {
                    true => self.panel(product, index + 1),
                    false => self.panel((product + 1) % PRODUCTS, 0),
                };
                let ahead_step = panel_width.div_ceil((padded / height).max(1));
                assert!(panel.start + panel_width <= width && panel_width <= zeros.len());
                for (block, rows) in scratch.rows.chunks_exact(height).enumerate() {
                    let args = Gather {
                        rows: rows.as_ptr(),
                        next_rows: rows.as_ptr(),
                        taps: &tap,
                        tap_count: 1,
                        channels: self.channels,
                        panel: weight.as_ptr(),
                        ahead: next
                            .as_ptr()
                            .wrapping_add(block * self.channels * ahead_step),
                        ahead_step,
                        init: zeros.as_ptr(),
                        init_stride: 0,
                        activation: Activation::Identity,
                        out: output[block * height * width + panel.start..].as_mut_ptr(),
                        out_stride: width,
                    };
                    // SAFETY: each of the `height` rows holds `channels`
                    // elements, by their slices; the panel channels × its
                    // width, by its; the results are `height` rows of `output`,
                    // which has `padded` of them, and the panel ends inside of
                    // `width`, as asserted. The processor has the instructions,
                    // as it has for all `KernelTable::kernels`.
                    unsafe { self.kernels.gather[panel.vectors - 1](&args) };
                }
            }
        }
        let finish = Finish {
            tiles: Tiles {
                first: self.y.at(part.lines.start, 0) + self.y_channel - part.base,
                ..Tiles::new(self.y, (0, 0), part, map_width, self.weight.width)
            },
            strides: (padded * width, width),
            start: self.start,
            activation: self.activation,
        };
        transform_output(self.isa, &finish, &scratch.output, y);
    }
}

/// The weight gradient of a 3×3 convolution of stride 1.
pub(super) struct WinogradOuterPass<T: 'static> {
    pub(super) kernels: &'static Kernels<T>,
    pub(super) isa: Isa,
    pub(super) x: MapLayout,
    pub(super) c_in: usize,
    pub(super) padding: usize,
    pub(super) dy: MapLayout,
    pub(super) dy_channel: usize,
    pub(super) c_out: usize,
}

impl<T: Element> WinogradOuterPass<T> {
    fn width(&self) -> usize {
        self.c_out.next_multiple_of(ALIGNMENT)
    }

    /// Elements of the sums `[product][c_in][c_out rounded up]`.
    pub(super) fn sums_len(&self) -> usize {
        PRODUCTS * self.c_in * self.width()
    }

    /// Adds the products of some images to `sums`, or begins the sums with them.
    pub(super) fn run(
        &self,
        x: &[T],
        dy: &[T],
        (sums, accumulate): (&mut [T], Accumulate),
        scratch: &mut Scratch<T>,
    ) {
        let width = self.width();
        let part = Part::whole(self.dy, dy.len());
        let map_width = self.dy.size.1;
        let patches = Tiles::new(self.x, (self.padding, 0), &part, map_width, self.c_in);
        let tiles = Tiles::new(self.dy, (0, self.dy_channel), &part, map_width, self.c_out);
        grow(
            &mut scratch.input,
            PRODUCTS * patches.len() * patches.channels,
        );
        grow(&mut scratch.output, PRODUCTS * tiles.len() * width);
        transform_input(self.isa, &patches, x, &mut scratch.input);
        transform_gradient(self.isa, &tiles, dy, &mut scratch.output);
        assert_eq!(sums.len(), self.sums_len());

        let panels = panels(self.c_out, self.kernels.lanes);
        for product in 0..PRODUCTS {
            let input = &scratch.input[product * patches.len() * patches.channels..];
            scratch.rows.clear();
            for tile in 0..patches.len() {
                scratch
                    .rows
                    .push(input[tile * patches.channels..][..self.c_in].as_ptr());
            }
            let gradient = &scratch.output[product * tiles.len() * width..][..tiles.len() * width];
            let sums = &mut sums[product * self.c_in * width..][..self.c_in * width];
            for panel in &panels {
                assert!(panel.start + panel.vectors * self.kernels.lanes <= width);
                for (c, tile) in self.kernels.outer_strips(self.c_in, panel.vectors) {
                    let args = Outer {
                        rows: scratch.rows.as_ptr(),
                        offset: c,
                        pixels: tiles.len(),
                        dy: gradient[panel.start..].as_ptr(),
                        dy_stride: width,
                        accumulate,
                        dw: sums[c * width + panel.start..].as_mut_ptr(),
                        dw_stride: width,
                    };
                    // SAFETY: each row holds `c_in` elements and strips end at
                    // c_in; `gradient` has a row of `width` for each tile and
                    // `sums` one for each input channel, and the panel ends
                    // inside of `width`, as asserted. The processor has the
                    // instructions, as it has for all `KernelTable::kernels`.
                    unsafe { tile(&args) };
                }
            }
        }
    }

    /// Adds the parts up, in order, and writes `Gᵀ M G` in the weight's own layout (K, C, 3, 3).
    pub(super) fn unpack(&self, parts: &[&[T]], weight: &mut [T]) {
        /// Rows of seven input channels.
        const ROWS: usize = 7 * 9;
        let sums = ThreadSums {
            parts,
            c_in: self.c_in,
            width: self.width(),
        };
        turn_sums::<T, ROWS>(self.kernels, self.c_in * 9, weight, |first, block, rows| {
            to_kernels(self.isa, &sums, first / 9, block, rows);
        });
    }
}

/// What the threads have added up.
struct ThreadSums<'a, T> {
    parts: &'a [&'a [T]],
    c_in: usize,
    width: usize,
}

multiversion! {
    /// `Gᵀ M G` for some input channels and sixteen output channels, nine rows each.
    fn to_kernels<T: Element>(
        sums: &ThreadSums<'_, T>,
        first: usize,
        block: usize,
        rows: &mut [[T; ALIGNMENT]],
    ) = to_kernels_body
}

#[inline(always)]
fn to_kernels_body<T: Element>(
    sums: &ThreadSums<'_, T>,
    first: usize,
    block: usize,
    rows: &mut [[T; ALIGNMENT]],
) {
    let mut kernels = [[[T::ZERO; ALIGNMENT]; 3]; 3];
    for (rows, c) in rows.chunks_exact_mut(9).zip(first..) {
        let mut products = [[[T::ZERO; ALIGNMENT]; PATCH]; PATCH];
        for part in sums.parts {
            for product in 0..PRODUCTS {
                let from = load(part, (product * sums.c_in + c) * sums.width + block);
                let to = &mut products[product / PATCH][product % PATCH];
                for i in 0..ALIGNMENT {
                    to[i] += from[i];
                }
            }
        }
        both_ways(&products, &mut kernels, to_kernel);
        rows.copy_from_slice(kernels.as_flattened());
    }
}
