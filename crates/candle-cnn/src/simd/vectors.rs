//! One vector type per instruction set and element type.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// A vector of `LANES` elements and the operations that the tiles need.
///
/// # Safety
/// Every method may only be called where the instruction set of the
/// implementing type is enabled (see [`super::Isa::available`]).
pub(crate) trait Simd: Copy {
    type Elem: Copy;
    type Vector: Copy;
    const LANES: usize;

    unsafe fn zero() -> Self::Vector;
    unsafe fn splat(value: Self::Elem) -> Self::Vector;
    /// Reads `LANES` elements; `from` need not be aligned.
    unsafe fn load(from: *const Self::Elem) -> Self::Vector;
    /// Writes `LANES` elements; `to` need not be aligned.
    unsafe fn store(to: *mut Self::Elem, value: Self::Vector);
    /// `a * b + c`.
    unsafe fn mul_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// `max(value, 0)` that keeps NaN and −0, as PyTorch's relu does.
    unsafe fn relu(value: Self::Vector) -> Self::Vector;
    /// Asks for the cache line of `at`, which need not be readable.
    unsafe fn prefetch(at: *const Self::Elem);
    /// Asks for the cache line of `at`, which need not be readable, no further than into the L2 cache.
    unsafe fn prefetch_l2(at: *const Self::Elem);
}

macro_rules! x86_vector {
    ($name:ident, $elem:ty, $vector:ty, $lanes:literal, $zero:ident, $splat:ident, $load:ident,
     $store:ident, $fma:ident, $max:ident) => {
        #[cfg(target_arch = "x86_64")]
        #[derive(Clone, Copy)]
        pub(crate) struct $name;

        // SAFETY (all blocks): the caller has the instruction set enabled, by
        // the trait's contract; pointers are valid for LANES elements, by the
        // contract of load and store, which need no alignment.
        #[cfg(target_arch = "x86_64")]
        impl Simd for $name {
            type Elem = $elem;
            type Vector = $vector;
            const LANES: usize = $lanes;

            #[inline(always)]
            unsafe fn zero() -> $vector {
                // SAFETY: see above.
                unsafe { $zero() }
            }
            #[inline(always)]
            unsafe fn splat(value: $elem) -> $vector {
                // SAFETY: see above.
                unsafe { $splat(value) }
            }
            #[inline(always)]
            unsafe fn load(from: *const $elem) -> $vector {
                // SAFETY: see above.
                unsafe { $load(from) }
            }
            #[inline(always)]
            unsafe fn store(to: *mut $elem, value: $vector) {
                // SAFETY: see above.
                unsafe { $store(to, value) }
            }
            #[inline(always)]
            unsafe fn mul_add(a: $vector, b: $vector, c: $vector) -> $vector {
                // SAFETY: see above.
                unsafe { $fma(a, b, c) }
            }
            #[inline(always)]
            unsafe fn relu(value: $vector) -> $vector {
                // The instruction returns its second operand when one is NaN or both are zeros.
                // SAFETY: see above.
                unsafe { $max($zero(), value) }
            }
            #[inline(always)]
            unsafe fn prefetch(at: *const $elem) {
                // SAFETY: a prefetch never faults.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
            }
            #[inline(always)]
            unsafe fn prefetch_l2(at: *const $elem) {
                // SAFETY: a prefetch never faults.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
            }
        }
    };
}

#[rustfmt::skip]
x86_vector!(Avx512F32, f32, __m512, 16, _mm512_setzero_ps, _mm512_set1_ps, _mm512_loadu_ps,
    _mm512_storeu_ps, _mm512_fmadd_ps, _mm512_max_ps);
#[rustfmt::skip]
x86_vector!(Avx512F64, f64, __m512d, 8, _mm512_setzero_pd, _mm512_set1_pd, _mm512_loadu_pd,
    _mm512_storeu_pd, _mm512_fmadd_pd, _mm512_max_pd);
#[rustfmt::skip]
x86_vector!(Avx2F32, f32, __m256, 8, _mm256_setzero_ps, _mm256_set1_ps, _mm256_loadu_ps,
    _mm256_storeu_ps, _mm256_fmadd_ps, _mm256_max_ps);
#[rustfmt::skip]
x86_vector!(Avx2F64, f64, __m256d, 4, _mm256_setzero_pd, _mm256_set1_pd, _mm256_loadu_pd,
    _mm256_storeu_pd, _mm256_fmadd_pd, _mm256_max_pd);

/// Four elements in a plain array.
#[derive(Clone, Copy)]
pub(crate) struct Portable<T>(std::marker::PhantomData<T>);

macro_rules! portable_vector {
    ($elem:ty) => {
        impl Simd for Portable<$elem> {
            type Elem = $elem;
            type Vector = [$elem; 4];
            const LANES: usize = 4;

            #[inline(always)]
            unsafe fn zero() -> [$elem; 4] {
                [0.0; 4]
            }
            #[inline(always)]
            unsafe fn splat(value: $elem) -> [$elem; 4] {
                [value; 4]
            }
            #[inline(always)]
            unsafe fn load(from: *const $elem) -> [$elem; 4] {
                // SAFETY: the caller's pointer is valid for four elements.
                unsafe { from.cast::<[$elem; 4]>().read_unaligned() }
            }
            #[inline(always)]
            unsafe fn store(to: *mut $elem, value: [$elem; 4]) {
                // SAFETY: the caller's pointer is valid for four elements.
                unsafe { to.cast::<[$elem; 4]>().write_unaligned(value) }
            }
            #[inline(always)]
            unsafe fn mul_add(a: [$elem; 4], b: [$elem; 4], c: [$elem; 4]) -> [$elem; 4] {
                // Not `f32::mul_add`: without FMA in hardware that is a slow call.
                std::array::from_fn(|i| a[i] * b[i] + c[i])
            }
            #[inline(always)]
            unsafe fn relu(value: [$elem; 4]) -> [$elem; 4] {
                value.map(|v| if v < 0.0 { 0.0 } else { v })
            }
            #[inline(always)]
            unsafe fn prefetch(_: *const $elem) {}
            #[inline(always)]
            unsafe fn prefetch_l2(_: *const $elem) {}
        }
    };
}

portable_vector!(f32);
portable_vector!(f64);
