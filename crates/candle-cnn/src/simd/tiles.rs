//! The two register tiles that every convolution pass is made of.
//!
//! Legend: a *row* is one pixel's channels, contiguous in memory; a *panel* is
//! `vectors × LANES` adjacent output channels; a *tap* is one kernel position.
//!
//! * [`Kernels::gather`] (forward, input gradient):
//!   `out[i][j] = init[i][j] + Σ_tap Σ_c rows[i][tap.offset + c] · panel[tap.number][c][j]`
//! * [`Kernels::outer`] (weight gradient):
//!   `dw[i][j] += Σ_p x[rows[p] + i] · dy[p][j]`
//!
//! Tile height: with 32 registers (AVX-512) 8 rows × 3 vectors are 24
//! accumulators + 3 panel vectors + 1 broadcast = 28, and 8 row pointers stay in
//! general registers; per channel that is 24 multiply-adds on 11 loads. With
//! 16 registers (AVX2) 4 rows × 3 vectors are 12 + 3 + 1 = 16.
#![allow(unsafe_code)]
// Loops over registers by constant bounds: what the compiler unrolls surely.
#![allow(clippy::needless_range_loop)]

use super::Isa;
use super::transpose::{self, Transpose};
use super::vectors::*;
use crate::activation::Activation;

/// Widest panel, in vectors.
pub(crate) const MAX_VECTORS: usize = 3;

/// Heights of the outer tile, so that any channel count is a sum of them; an
/// instruction set uses those up to its [`Kernels::height`].
pub(crate) const OUTER_HEIGHTS: [usize; 4] = [8, 4, 2, 1];

/// A kernel position that a gather tile takes part in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tap {
    /// Elements from the row pointer to its input pixel.
    pub(crate) offset: usize,
    /// The tap's place among the kernel's taps, and so in a panel.
    pub(crate) number: usize,
}

/// Whether sums begin or go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accumulate {
    /// They begin with what is added: their memory may hold anything before.
    Begin,
    /// What is added goes to what is there already.
    Add,
}

/// What a gather tile reads and writes.
pub(crate) struct Gather<T> {
    /// `tile height` pointers to the tap at offset 0.
    pub(crate) rows: *const *const T,
    /// The rows of the tile that comes next, to be asked for in advance; those of this one where
    /// none does, or where they are in the cache already.
    pub(crate) next_rows: *const *const T,
    pub(crate) taps: *const Tap,
    pub(crate) tap_count: usize,
    pub(crate) channels: usize,
    /// `[tap number][channels][vectors × LANES]`.
    pub(crate) panel: *const T,
    /// Where to ask for weights that are read after this panel, and how many elements further
    /// with each channel of each tap. The tiles of a panel share out the next one.
    pub(crate) ahead: *const T,
    pub(crate) ahead_step: usize,
    /// `vectors × LANES` start values of each row: the bias, or what is there already.
    pub(crate) init: *const T,
    /// Elements between the start values of two rows: 0 where all have the same.
    pub(crate) init_stride: usize,
    pub(crate) activation: Activation,
    /// First row of the output tile.
    pub(crate) out: *mut T,
    /// Elements between output rows.
    pub(crate) out_stride: usize,
}

/// What an outer tile reads and writes.
pub(crate) struct Outer<T> {
    /// One pointer per pixel, to the first of the tile's input channels at tap offset 0.
    pub(crate) rows: *const *const T,
    /// Element offset of the tap and channel from the row pointers.
    pub(crate) offset: usize,
    pub(crate) pixels: usize,
    /// `vectors × LANES` elements per pixel.
    pub(crate) dy: *const T,
    /// Elements from one pixel to the next.
    pub(crate) dy_stride: usize,
    pub(crate) accumulate: Accumulate,
    /// First row of the gradient tile; one row per input channel.
    pub(crate) dw: *mut T,
    pub(crate) dw_stride: usize,
}

pub(crate) type GatherFn<T> = unsafe fn(&Gather<T>);
pub(crate) type OuterFn<T> = unsafe fn(&Outer<T>);
pub(super) type TransposeFn<T> = unsafe fn(&Transpose<T>);

/// The tiles of one instruction set and element type.
pub(crate) struct Kernels<T: 'static> {
    pub(crate) lanes: usize,
    /// Rows of a gather tile.
    pub(crate) height: usize,
    /// Indexed by vectors − 1.
    pub(crate) gather: [GatherFn<T>; MAX_VECTORS],
    /// Indexed as [`OUTER_HEIGHTS`], then by vectors − 1.
    pub(crate) outer: [[OuterFn<T>; MAX_VECTORS]; OUTER_HEIGHTS.len()],
    pub(super) transpose: TransposeFn<T>,
}

impl<T> Kernels<T> {
    /// Strips that input channels are cut into, the highest first: the first channel of each, and the outer tile that takes it
    /// over a panel of so many vectors.
    pub(crate) fn outer_strips(
        &self,
        channels: usize,
        vectors: usize,
    ) -> impl Iterator<Item = (usize, OuterFn<T>)> {
        let mut first = 0;
        std::iter::from_fn(move || {
            let mut heights = OUTER_HEIGHTS.into_iter().enumerate();
            let left = channels - first;
            let (index, height) = heights.find(|&(_, h)| h <= self.height && h <= left)?;
            let strip = (first, self.outer[index][vectors - 1]);
            first += height;
            Some(strip)
        })
    }
}

/// The element types that have tiles.
pub(crate) trait KernelTable: Sized + 'static {
    /// The tiles of an instruction set. Where they run the processor must have it, and does: no public function takes an
    /// `Isa` to compute with, and this crate computes with those of [`Isa::available`] alone.
    fn kernels(isa: Isa) -> &'static Kernels<Self>;
}

/// # Safety
/// The instruction set of `S` is enabled; every pointer in `args` is valid for
/// what the module documentation says is read and written there.
#[inline(always)]
unsafe fn gather_tile<S: Simd, const ROWS: usize, const VECTORS: usize>(args: &Gather<S::Elem>) {
    // SAFETY: forwarded from the caller.
    unsafe {
        let width = VECTORS * S::LANES;
        let mut sums: [[S::Vector; VECTORS]; ROWS] = std::array::from_fn(|i| {
            std::array::from_fn(|j| S::load(args.init.add(i * args.init_stride + j * S::LANES)))
        });
        for i in 0..ROWS {
            for j in 0..VECTORS {
                S::prefetch(
                    args.out
                        .wrapping_add((ROWS + i) * args.out_stride + j * S::LANES),
                );
            }
        }
        // Where a tile reads each row once, the next one's are asked for while this one computes.
        let prefetches = args.tap_count == 1;
        let mut ahead = args.ahead;
        for tap in 0..args.tap_count {
            let tap = *args.taps.add(tap);
            let rows: [*const S::Elem; ROWS] =
                std::array::from_fn(|i| (*args.rows.add(i)).add(tap.offset));
            let next_rows: [*const S::Elem; ROWS] =
                std::array::from_fn(|i| (*args.next_rows.add(i)).wrapping_add(tap.offset));
            let mut panel = args.panel.add(tap.number * args.channels * width);
            for c in 0..args.channels {
                if prefetches && c % 16 == 0 {
                    for row in next_rows {
                        S::prefetch(row.wrapping_add(c));
                    }
                }
                // Two lines: up to three are needed, and the processor fetches some on its own.
                S::prefetch_l2(ahead);
                S::prefetch_l2(ahead.wrapping_add(16));
                ahead = ahead.wrapping_add(args.ahead_step);
                let weights: [S::Vector; VECTORS] =
                    std::array::from_fn(|j| S::load(panel.add(j * S::LANES)));
                for i in 0..ROWS {
                    let x = S::splat(*rows[i].add(c));
                    for j in 0..VECTORS {
                        sums[i][j] = S::mul_add(x, weights[j], sums[i][j]);
                    }
                }
                panel = panel.add(width);
            }
        }
        for (i, row) in sums.iter().enumerate() {
            for (j, &sum) in row.iter().enumerate() {
                let value = match args.activation {
                    Activation::Identity => sum,
                    Activation::Relu => S::relu(sum),
                };
                S::store(args.out.add(i * args.out_stride + j * S::LANES), value);
            }
        }
    }
}

/// # Safety
/// As [`gather_tile`].
#[inline(always)]
unsafe fn outer_tile<S: Simd, const ROWS: usize, const VECTORS: usize>(args: &Outer<S::Elem>) {
    // SAFETY: forwarded from the caller.
    unsafe {
        let mut sums: [[S::Vector; VECTORS]; ROWS] = std::array::from_fn(|i| {
            std::array::from_fn(|j| match args.accumulate {
                Accumulate::Begin => S::zero(),
                Accumulate::Add => S::load(args.dw.add(i * args.dw_stride + j * S::LANES)),
            })
        });
        let mut dy = args.dy;
        for p in 0..args.pixels {
            let x = (*args.rows.add(p)).add(args.offset);
            let gradients: [S::Vector; VECTORS] =
                std::array::from_fn(|j| S::load(dy.add(j * S::LANES)));
            // The line that the tile after the next begins with.
            S::prefetch(x.wrapping_add(16));
            for i in 0..ROWS {
                let x = S::splat(*x.add(i));
                for j in 0..VECTORS {
                    sums[i][j] = S::mul_add(x, gradients[j], sums[i][j]);
                }
            }
            dy = dy.add(args.dy_stride);
        }
        for (i, row) in sums.iter().enumerate() {
            for (j, &sum) in row.iter().enumerate() {
                S::store(args.dw.add(i * args.dw_stride + j * S::LANES), sum);
            }
        }
    }
}

macro_rules! kernels {
    ($module:ident, $simd:ty, $elem:ty, $height:literal, $transpose:path $(, $feature:literal)?) => {
        mod $module {
            use super::*;

            $(#[target_feature(enable = $feature)])?
            unsafe fn gather<const VECTORS: usize>(args: &Gather<$elem>) {
                // SAFETY: forwarded from the caller.
                unsafe { gather_tile::<$simd, $height, VECTORS>(args) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn outer<const ROWS: usize, const VECTORS: usize>(args: &Outer<$elem>) {
                // SAFETY: forwarded from the caller.
                unsafe { outer_tile::<$simd, ROWS, VECTORS>(args) }
            }

            pub(super) static KERNELS: Kernels<$elem> = Kernels {
                lanes: <$simd as Simd>::LANES,
                height: $height,
                gather: [gather::<1>, gather::<2>, gather::<3>],
                outer: [
                    [outer::<8, 1>, outer::<8, 2>, outer::<8, 3>],
                    [outer::<4, 1>, outer::<4, 2>, outer::<4, 3>],
                    [outer::<2, 1>, outer::<2, 2>, outer::<2, 3>],
                    [outer::<1, 1>, outer::<1, 2>, outer::<1, 3>],
                ],
                transpose: $transpose,
            };
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernels!(
    avx512_f32,
    Avx512F32,
    f32,
    8,
    transpose::avx512_f32,
    "avx512f"
);
#[cfg(target_arch = "x86_64")]
kernels!(avx512_f64, Avx512F64, f64, 8, transpose::plain, "avx512f");
#[cfg(target_arch = "x86_64")]
kernels!(avx2_f32, Avx2F32, f32, 4, transpose::avx_f32, "avx2,fma");
#[cfg(target_arch = "x86_64")]
kernels!(avx2_f64, Avx2F64, f64, 4, transpose::plain, "avx2,fma");
kernels!(portable_f32, Portable<f32>, f32, 4, transpose::plain);
kernels!(portable_f64, Portable<f64>, f64, 4, transpose::plain);

impl KernelTable for f32 {
    fn kernels(isa: Isa) -> &'static Kernels<f32> {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &avx512_f32::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &avx2_f32::KERNELS,
            Isa::Portable => &portable_f32::KERNELS,
        }
    }
}

impl KernelTable for f64 {
    fn kernels(isa: Isa) -> &'static Kernels<f64> {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &avx512_f64::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &avx2_f64::KERNELS,
            Isa::Portable => &portable_f64::KERNELS,
        }
    }
}
