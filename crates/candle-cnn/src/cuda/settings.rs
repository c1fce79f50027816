//! How exact, how repeatable and how large the computations on CUDA may be.

use std::cell::RefCell;
use std::sync::{PoisonError, RwLock};

use crate::thread_local::with_local;

/// How the factors of an f32 product are taken on CUDA; sums are f32 in either case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum F32Math {
    /// Factors rounded to TF32's 10 bits of mantissa, on the tensor cores.
    Tf32,
    /// Factors as they are, not rounded.
    Full,
}

/// How CUDA computes, for the whole process.
///
/// The defaults are PyTorch's (`torch.backends.cudnn`, `torch.backends.cuda.matmul`), but for `benchmark`, which is on:
/// the shapes of training do not change from step to step.
///
/// ```
/// use candle_cnn::cuda::{F32Math, Settings, set_settings, settings};
/// assert_eq!(settings().convolution, F32Math::Tf32);
/// set_settings(Settings { deterministic: true, ..Settings::default() });
/// assert!(settings().deterministic);
/// # set_settings(Settings::default());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Settings {
    /// f32 convolutions (`torch.backends.cudnn.allow_tf32`). Under [`F32Math::Full`] each engine of cuDNN is tried out before it is
    /// first used, for it may round although it does not say so.
    pub convolution: F32Math,
    /// f32 matrix products of Candle, [`crate::linear`] among them (`torch.backends.cuda.matmul.allow_tf32`).
    pub matmul: F32Math,
    /// Take only engines that give the same bits each time, and the same engines each time: none is chosen by its
    /// time (`torch.backends.cudnn.deterministic`, and `benchmark` off).
    pub deterministic: bool,
    /// Time cuDNN's engines for a convolution when its shape is first met, instead of going by cuDNN's rules of thumb
    /// (`torch.backends.cudnn.benchmark`).
    pub benchmark: bool,
    /// Let cuDNN add the bias and take the ReLU inside the convolution, where it has an engine that does.
    pub fused_epilogue: bool,
    /// Run a [`crate::StaticGraph`] on CUDA, whose maps lie channels last (`torch.channels_last`). Where this is off, networks that
    /// have one run operation by operation, over planes.
    pub channels_last: bool,
    /// How many streams a [`crate::StaticGraph`] on CUDA may use for convolutions that need not wait for each other, each with a
    /// workspace of its own; at least 1.
    pub streams: usize,
    /// Most bytes of device memory that an engine may ask for to work in; streams that run side by side share the limit. Where no
    /// engine stays below, the most modest one is taken. Each thread keeps 1 MiB per device and stream, and takes more while an engine
    /// runs that wants it.
    pub workspace_limit: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            convolution: F32Math::Tf32,
            matmul: F32Math::Full,
            deterministic: false,
            benchmark: true,
            fused_epilogue: true,
            channels_last: true,
            streams: 4,
            workspace_limit: 1 << 30,
        }
    }
}

static SETTINGS: RwLock<Option<Settings>> = RwLock::new(None);

thread_local! {
    static SELDOM: RefCell<bool> = const { RefCell::new(false) };
}

/// The settings in force.
pub fn settings() -> Settings {
    let mut settings = SETTINGS
        .read()
        .unwrap_or_else(PoisonError::into_inner)
        .unwrap_or_default();
    settings.benchmark &= !SELDOM.with_borrow(|seldom| *seldom);
    settings
}

/// Runs `f` with [`Settings::benchmark`] off on this thread: for shapes that are met too seldom to be worth it, as an epoch's
/// last batch, whose engines would take longer to time than its steps of a whole run. What [`settings`] gives meanwhile is not to be put
/// into force for the process.
///
/// ```
/// use candle_cnn::cuda::{settings, without_benchmark};
/// assert!(settings().benchmark);
/// assert!(!without_benchmark(|| settings().benchmark));
/// assert!(settings().benchmark);
/// ```
pub fn without_benchmark<R>(f: impl FnOnce() -> R) -> R {
    with_local(&SELDOM, true, f)
}

/// Puts settings into force, for all threads, from the next operation on.
///
/// A CUDA graph keeps those under which it was captured.
pub fn set_settings(settings: Settings) {
    #[cfg(feature = "cuda")]
    candle_core::cuda::set_gemm_reduced_precision_f32(settings.matmul == F32Math::Tf32);
    *SETTINGS.write().unwrap_or_else(PoisonError::into_inner) = Some(settings);
}
