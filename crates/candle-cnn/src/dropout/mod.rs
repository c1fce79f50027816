//! Dropout whose mask is a function of a seed.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::element::{Element, dispatch, float_dtype, slice, with_slices};
use crate::error::OpError;
use crate::mode::Mode;

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

#[cfg(feature = "cuda")]
pub use cuda::with_dropout_seed;

const OP: &str = "dropout";

/// Elements of a task.
const CHUNK: usize = 1 << 14;

/// Random words that are drawn at once.
const WORDS: usize = 64;

/// In training sets each element to 0 with probability `p` and scales the
/// others by `1 / (1 − p)`; in evaluation returns `x` itself.
///
/// Any shape. The mask follows from `Mode::Train`'s seed, from `salt` (so that
/// two dropouts of one network draw different masks) and from the element's
/// position: the same call gives the same mask on every machine, and backward
/// draws it again instead of keeping it. PyTorch draws other numbers
/// (`torch.nn.functional.dropout`), so masks agree in distribution only.
///
/// # Errors
/// A `p` outside of 0 ≤ p ≤ 1, or a dtype other than f32 and f64 (on CUDA bf16 too).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cnn::{Mode, dropout};
/// let x = Tensor::ones(1000, DType::F32, &Device::Cpu)?;
/// let y = dropout(&x, 0.4, 0, Mode::Train { dropout_seed: 7 })?;
/// let kept = y.to_vec1::<f32>()?.iter().filter(|&&v| v > 0.0).count();
/// assert!((550..650).contains(&kept));
/// assert_eq!(dropout(&x, 0.4, 0, Mode::Eval)?.to_vec1::<f32>()?, vec![1.0; 1000]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn dropout(x: &Tensor, p: f64, salt: u64, mode: Mode) -> Result<Tensor> {
    float_dtype(OP, &[x])?;
    if !(0.0..=1.0).contains(&p) {
        return Err(OpError::setting(OP, "p", p, "a probability from 0 to 1"));
    }
    match mode {
        Mode::Train { dropout_seed } if p > 0.0 => x.contiguous()?.apply_op1(Dropout {
            p,
            seed: dropout_seed,
            salt,
            #[cfg(feature = "cuda")]
            device_seed: cuda::device_seed(),
        }),
        _ => Ok(x.clone()),
    }
}

struct Dropout {
    p: f64,
    seed: u64,
    salt: u64,
    /// The seed of CUDA tensors, where it is not `seed`.
    #[cfg(feature = "cuda")]
    device_seed: Option<Tensor>,
}

impl Dropout {
    /// An element is dropped when 32 random bits lie below it: p · 2³².
    fn threshold(&self) -> u64 {
        (self.p * 4_294_967_296.0) as u64
    }

    fn apply<T: Element>(&self, x: &[T]) -> Vec<T> {
        // What is kept is multiplied by the first, what is dropped by the second, so that what is not finite stays seen as
        // NaN; p = 1 drops everything. From memory, since a branch would be foreseen half of the time.
        let factors = [T::real(1.0 / (1.0 - self.p)), T::ZERO];
        let threshold = self.threshold();
        let mut generator = ChaCha8Rng::seed_from_u64(self.seed);
        generator.set_stream(self.salt);
        let mut y = vec![T::ZERO; x.len()];
        y.par_chunks_mut(CHUNK)
            .zip(x.par_chunks(CHUNK))
            .enumerate()
            .for_each(|(chunk, (y, x))| {
                let mut generator = generator.clone();
                generator.set_word_pos((chunk * CHUNK) as u128);
                for (y, x) in y.chunks_mut(WORDS).zip(x.chunks(WORDS)) {
                    let mut words = [0; WORDS];
                    words.fill_with(|| generator.next_u32());
                    for ((y, &x), word) in y.iter_mut().zip(x).zip(words) {
                        let dropped = u64::from(word) < threshold;
                        *y = x * factors[usize::from(dropped)];
                    }
                }
            });
        y
    }
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        dispatch!(OP, x.dtype(), T => {
            let y = self.apply(slice::<T>(OP, x, layout)?);
            Ok((T::to_cpu_storage_owned(y), layout.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        Ok((cuda::apply(self, (x, layout))?, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return cuda::backward(self, &dy).map(Some);
        }
        dispatch!(OP, x.dtype(), T => {
            let dx = with_slices::<T, _, _>(OP, [&dy], |[dy]| Ok(self.apply(dy)))?;
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}
