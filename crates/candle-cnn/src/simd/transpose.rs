//! Transposition between planes of pixels and rows of channels.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::Kernels;

/// A matrix to be written the other way round: `to[c · to_stride + r] =
/// from[r · from_stride + c]` for r < rows, c < columns.
pub(super) struct Transpose<T> {
    pub(super) from: *const T,
    /// Elements between rows of the source.
    pub(super) from_stride: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) to: *mut T,
    /// Elements between rows of the result.
    pub(super) to_stride: usize,
}

/// `to[c · to_stride + r] = from[r · from_stride + c]` for r < rows, c < columns.
///
/// # Panics
/// A matrix that does not lie in its slice.
pub(crate) fn transpose<T>(
    kernels: &Kernels<T>,
    from: &[T],
    from_stride: usize,
    (rows, columns): (usize, usize),
    to: &mut [T],
    to_stride: usize,
) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(from.len() >= (rows - 1) * from_stride + columns);
    assert!(to.len() >= (columns - 1) * to_stride + rows);
    let args = Transpose {
        from: from.as_ptr(),
        from_stride,
        rows,
        columns,
        to: to.as_mut_ptr(),
        to_stride,
    };
    // SAFETY: the last element of each matrix lies inside its slice, as just
    // asserted, and the slices do not overlap; the processor has the
    // instructions, as it has for all `KernelTable::kernels`.
    unsafe { (kernels.transpose)(&args) }
}

/// Blocks of 8 × 8: planes of 32×32 floats lie 4,096 bytes apart and so fall
/// into one set of an L1 cache of 8 to 12 ways.
const BLOCK: usize = 8;

/// A line of a cache in floats: blocks of so many read and write whole lines, each of them once.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 16;

/// Plain blocked loops.
///
/// # Safety
/// Both matrices are valid and do not overlap.
#[inline(always)]
pub(super) unsafe fn plain<T: Copy>(args: &Transpose<T>) {
    // SAFETY: forwarded from the caller.
    unsafe { blocked::<BLOCK, T>(args, |block| corner(&block)) }
}

/// # Safety
/// As [`plain`], and AVX is available.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
pub(super) unsafe fn avx_f32(args: &Transpose<f32>) {
    // SAFETY: forwarded from the caller; `eight_by_eight` gets full blocks only.
    unsafe {
        blocked::<BLOCK, f32>(args, |block| {
            if block.rows == BLOCK && block.columns == BLOCK {
                eight_by_eight(&block);
            } else {
                corner(&block);
            }
        })
    }
}

/// # Safety
/// As [`plain`], and AVX-512 F is available.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx")]
pub(super) unsafe fn avx512_f32(args: &Transpose<f32>) {
    // SAFETY: forwarded from the caller; `sixteen_by_sixteen` gets full blocks only.
    unsafe {
        blocked::<LINE, f32>(args, |block| {
            if block.rows == LINE && block.columns == LINE {
                sixteen_by_sixteen(&block);
            } else {
                avx_f32(&block);
            }
        })
    }
}

/// Calls `f` with each block of `SIDE` × `SIDE`, and with what is left beside them.
#[inline(always)]
unsafe fn blocked<const SIDE: usize, T>(args: &Transpose<T>, f: impl Fn(Transpose<T>)) {
    for r in (0..args.rows).step_by(SIDE) {
        for c in (0..args.columns).step_by(SIDE) {
            f(Transpose {
                // SAFETY: (r, c) lies inside both matrices.
                from: unsafe { args.from.add(r * args.from_stride + c) },
                // SAFETY: as above.
                to: unsafe { args.to.add(c * args.to_stride + r) },
                rows: SIDE.min(args.rows - r),
                columns: SIDE.min(args.columns - c),
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

/// 16 loads, 64 shuffles, 16 stores: pairs, then quads, then the quads of four rows change places twice.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn sixteen_by_sixteen(block: &Transpose<f32>) {
    // SAFETY: the caller's block is 16 × 16 in both matrices.
    unsafe {
        let row = |r: usize| _mm512_loadu_ps(block.from.add(r * block.from_stride));
        let rows: [__m512; 16] = std::array::from_fn(row);
        let pairs: [__m512; 16] = std::array::from_fn(|i| {
            let (a, b) = (rows[i & !1], rows[i | 1]);
            if i.is_multiple_of(2) {
                _mm512_unpacklo_ps(a, b)
            } else {
                _mm512_unpackhi_ps(a, b)
            }
        });
        // Column 4k + c of rows 4g to 4g + 3 is lane k of quad 4g + c.
        let quads: [__m512; 16] = std::array::from_fn(|i| {
            let (group, c) = (i & !3, i & 3);
            let (a, b) = (pairs[group + c / 2], pairs[group + 2 + c / 2]);
            if c.is_multiple_of(2) {
                _mm512_shuffle_ps::<0b01_00_01_00>(a, b)
            } else {
                _mm512_shuffle_ps::<0b11_10_11_10>(a, b)
            }
        });
        for c in 0..4 {
            let [a, b, d, e] = [quads[c], quads[4 + c], quads[8 + c], quads[12 + c]];
            // Lanes 0 and 1, 2 and 3 of two groups of rows.
            let (upper_low, upper_high) = (
                _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b),
                _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b),
            );
            let (lower_low, lower_high) = (
                _mm512_shuffle_f32x4::<0b01_00_01_00>(d, e),
                _mm512_shuffle_f32x4::<0b11_10_11_10>(d, e),
            );
            let columns = [
                _mm512_shuffle_f32x4::<0b10_00_10_00>(upper_low, lower_low),
                _mm512_shuffle_f32x4::<0b11_01_11_01>(upper_low, lower_low),
                _mm512_shuffle_f32x4::<0b10_00_10_00>(upper_high, lower_high),
                _mm512_shuffle_f32x4::<0b11_01_11_01>(upper_high, lower_high),
            ];
            for (lane, &column) in columns.iter().enumerate() {
                _mm512_storeu_ps(block.to.add((4 * lane + c) * block.to_stride), column);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Isa, KernelTable};

    fn check<T: KernelTable + Copy + PartialEq + std::fmt::Debug>(of: impl Fn(usize) -> T) {
        for isa in Isa::available() {
            for (rows, columns) in (0..=35).flat_map(|r| [0, 1, 7, 16, 33, 40].map(|c| (r, c))) {
                let (from_stride, to_stride) = (columns + 3, rows + 2);
                let from: Vec<T> = (1..=(rows + 1) * from_stride).map(&of).collect();
                let mut to = vec![of(0); (columns + 1) * to_stride];
                transpose(
                    T::kernels(isa),
                    &from,
                    from_stride,
                    (rows, columns),
                    &mut to,
                    to_stride,
                );
                for (i, &value) in to.iter().enumerate() {
                    let (c, r) = (i / to_stride, i % to_stride);
                    let expected = match r < rows && c < columns {
                        true => from[r * from_stride + c],
                        false => of(0),
                    };
                    assert_eq!(
                        value, expected,
                        "{isa:?}, ({rows}, {columns}) at ({r}, {c})"
                    );
                }
            }
        }
    }

    #[test]
    fn every_element_changes_its_place_and_nothing_else_is_written() {
        check(|i| i as f32);
        check(|i| i as f64);
    }
}
