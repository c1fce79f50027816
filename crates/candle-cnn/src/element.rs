//! The element types that the operations take, and how their slices are reached.

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, WithDType};

use crate::error::OpError;
use crate::simd::KernelTable;

/// f32 or f64.
pub(crate) trait Element:
    WithDType + KernelTable + Real + bytemuck::NoUninit + Send + Sync
{
}

impl Element for f32 {}
impl Element for f64 {}

/// The few numeric operations that generic kernels need beyond [`WithDType`].
pub(crate) trait Real:
    Copy
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::AddAssign
    + std::ops::MulAssign
    + std::iter::Sum
{
    const ZERO: Self;
    const NEG_INFINITY: Self;
    /// Below this, gradients of [`crate::StaticGraph`]'s maps are taken as zeros.
    const NEGLIGIBLE: Self;
    fn real(value: f64) -> Self;
    fn as_f64(self) -> f64;
    fn is_nan(self) -> bool;
    fn is_negligible(self) -> bool;
}

macro_rules! real {
    ($t:ty, negligible $negligible:expr) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const NEG_INFINITY: Self = <$t>::NEG_INFINITY;
            const NEGLIGIBLE: Self = $negligible;
            #[inline(always)]
            fn real(value: f64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn as_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn is_nan(self) -> bool {
                self != self
            }
            #[inline(always)]
            fn is_negligible(self) -> bool {
                self.abs() < Self::NEGLIGIBLE
            }
        }
    };
}
// 2⁻¹⁰⁰ or 8e-31: no sum of f32 that holds a gradient of 1e-23 notices it.
real!(f32, negligible f32::from_bits((127 - 100) << 23));
real!(f64, negligible 0.0);

/// The elements of a contiguous CPU storage.
pub(crate) fn slice<'a, T: Element>(
    op: &'static str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<&'a [T]> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| OpError::not_contiguous(op, layout))?;
    let all = T::cpu_storage_as_slice(storage)?;
    // A view of nothing may begin anywhere.
    Ok(if start == end { &[] } else { &all[start..end] })
}

/// Calls `f` with the elements of contiguous CPU tensors.
pub(crate) fn with_slices<T: Element, const N: usize, R>(
    op: &'static str,
    tensors: [&Tensor; N],
    f: impl FnOnce([&[T]; N]) -> Result<R>,
) -> Result<R> {
    let held = tensors.map(Tensor::storage_and_layout);
    let mut slices: [&[T]; N] = [&[]; N];
    for ((to, (storage, layout)), tensor) in slices.iter_mut().zip(&held).zip(tensors) {
        let Storage::Cpu(storage) = &**storage else {
            return Err(OpError::device(op, tensor));
        };
        *to = slice(op, storage, layout)?;
    }
    f(slices)
}

/// Checks that every tensor has the dtype of the first, and that it is f32 or
/// f64, or on CUDA bf16.
pub(crate) fn float_dtype(op: &'static str, tensors: &[&Tensor]) -> Result<DType> {
    let dtype = tensors[0].dtype();
    match dtype {
        DType::F32 | DType::F64 => {}
        DType::BF16 if tensors[0].device().is_cuda() => {}
        other => return Err(OpError::dtype(op, other)),
    }
    for tensor in tensors {
        if tensor.dtype() != dtype {
            return Err(OpError::dtype_mismatch(op, dtype, tensor.dtype()));
        }
    }
    Ok(dtype)
}

/// Runs an expression with `$t` bound to the Rust type of `$dtype`, which is
/// f32 or f64 as [`float_dtype`] has checked.
macro_rules! dispatch {
    ($op:expr, $dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $t = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $t = f64;
                $body
            }
            other => Err($crate::error::OpError::dtype($op, other)),
        }
    };
}
pub(crate) use dispatch;
