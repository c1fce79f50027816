//! Transposition between planes of pixels and rows of channels.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// A matrix to be written the other way round: `to[c · to_stride + r] =
/// from[r · from_stride + c]` for r < rows, c < columns.
pub(crate) struct Transpose<T> {
    pub(crate) from: *const T,
    /// Elements between rows of the source.
    pub(crate) from_stride: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) to: *mut T,
    /// Elements between rows of the result.
    pub(crate) to_stride: usize,
}

/// Blocks of 8 × 8: planes of 32×32 floats lie 4,096 bytes apart and so fall
/// into one set of an L1 cache of 8 to 12 ways.
const BLOCK: usize = 8;

/// Plain blocked loops.
///
/// # Safety
/// Both matrices are valid and do not overlap.
#[inline(always)]
pub(super) unsafe fn plain<T: Copy>(args: &Transpose<T>) {
    // SAFETY: forwarded from the caller.
    unsafe { blocked(args, |block| corner(&block)) }
}

/// # Safety
/// As [`plain`], and AVX is available.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
pub(super) unsafe fn avx_f32(args: &Transpose<f32>) {
    // SAFETY: forwarded from the caller; `eight_by_eight` gets full blocks only.
    unsafe {
        blocked(args, |block| {
            if block.rows == BLOCK && block.columns == BLOCK {
                eight_by_eight(&block);
            } else {
                corner(&block);
            }
        })
    }
}

/// Calls `f` with each block.
#[inline(always)]
unsafe fn blocked<T>(args: &Transpose<T>, f: impl Fn(Transpose<T>)) {
    for r in (0..args.rows).step_by(BLOCK) {
        for c in (0..args.columns).step_by(BLOCK) {
            f(Transpose {
                // SAFETY: (r, c) lies inside both matrices.
                from: unsafe { args.from.add(r * args.from_stride + c) },
                // SAFETY: as above.
                to: unsafe { args.to.add(c * args.to_stride + r) },
                rows: BLOCK.min(args.rows - r),
                columns: BLOCK.min(args.columns - c),
                ..*args
            });
        }
    }
}

/// A block of any size, element by element.
#[inline(always)]
unsafe fn corner<T: Copy>(block: &Transpose<T>) {
    for c in 0..block.columns {
        for r in 0..block.rows {
            // SAFETY: (r, c) lies inside both matrices.
            unsafe {
                *block.to.add(c * block.to_stride + r) = *block.from.add(r * block.from_stride + c)
            };
        }
    }
}

/// 8 loads, 24 shuffles, 8 stores: pairs, then quads, then halves change places.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx")]
unsafe fn eight_by_eight(block: &Transpose<f32>) {
    // SAFETY: the caller's block is 8 × 8 in both matrices.
    unsafe {
        let row = |r: usize| _mm256_loadu_ps(block.from.add(r * block.from_stride));
        let rows: [__m256; 8] = std::array::from_fn(row);
        let pairs: [__m256; 8] = std::array::from_fn(|i| {
            let (a, b) = (rows[i & !1], rows[i | 1]);
            if i.is_multiple_of(2) {
                _mm256_unpacklo_ps(a, b)
            } else {
                _mm256_unpackhi_ps(a, b)
            }
        });
        // Quad q of rows 0-3 (first = 0) or 4-7 (first = 4).
        let quad = |first: usize, q: usize| {
            let (a, b) = (pairs[first + q / 2], pairs[first + 2 + q / 2]);
            if q.is_multiple_of(2) {
                _mm256_shuffle_ps::<0b01_00_01_00>(a, b)
            } else {
                _mm256_shuffle_ps::<0b11_10_11_10>(a, b)
            }
        };
        for q in 0..4 {
            let (upper, lower) = (quad(0, q), quad(4, q));
            let (low, high) = (
                _mm256_permute2f128_ps::<0x20>(upper, lower),
                _mm256_permute2f128_ps::<0x31>(upper, lower),
            );
            _mm256_storeu_ps(block.to.add(q * block.to_stride), low);
            _mm256_storeu_ps(block.to.add((q + 4) * block.to_stride), high);
        }
    }
}
