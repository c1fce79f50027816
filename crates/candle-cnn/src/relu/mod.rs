//! Rectified linear unit, with PyTorch's gradient at zero.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use crate::activation::{keep_positive, relu as relu_of};
use crate::element::{Element, dispatch, float_dtype, slice, with_slices};

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

const OP: &str = "relu";
const CHUNK: usize = 1 << 15;

/// `max(x, 0)` element by element, any shape; NaN stays NaN, and on the CPU −0 is −0, as in PyTorch.
///
/// The gradient at exactly 0 is 0, as in `torch.nn.functional.relu`
/// (Candle's own `relu` lets it pass).
///
/// # Errors
/// [`crate::OpError`] for a dtype other than f32 and f64 (on CUDA bf16 too), or a device
/// without an implementation.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// let x = Var::new(&[-1f32, 0.0, 2.0], &Device::Cpu)?;
/// let y = candle_cnn::relu(&x)?;
/// assert_eq!(y.to_vec1::<f32>()?, [0.0, 0.0, 2.0]);
/// let gradients = y.backward()?;
/// assert_eq!(gradients.get(&x).unwrap().to_vec1::<f32>()?, [0.0, 0.0, 1.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn relu(x: &Tensor) -> Result<Tensor> {
    float_dtype(OP, &[x])?;
    x.contiguous()?.apply_op1(Relu)
}

struct Relu;

impl CustomOp1 for Relu {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        dispatch!(OP, x.dtype(), T => {
            let x = slice::<T>(OP, x, layout)?;
            let y = map2(x, x, |x, _| relu_of(x));
            Ok((T::to_cpu_storage_owned(y), layout.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let y = cuda::keep_positive((x, layout), (x, layout))?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if y.device().is_cuda() {
            return cuda::backward(y, &dy).map(Some);
        }
        dispatch!(OP, y.dtype(), T => {
            let dx = with_slices::<T, _, _>(OP, [y, &dy], |[y, dy]| Ok(map2(dy, y, keep_positive)))?;
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}

fn map2<T: Element>(a: &[T], b: &[T], f: impl Fn(T, T) -> T + Sync) -> Vec<T> {
    let mut out = vec![T::ZERO; a.len()];
    out.par_chunks_mut(CHUNK)
        .zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)))
        .for_each(|(out, (a, b))| {
            for (out, (&a, &b)) in out.iter_mut().zip(a.iter().zip(b)) {
                *out = f(a, b);
            }
        });
    out
}
