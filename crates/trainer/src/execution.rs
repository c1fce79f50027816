//! How the steps of a run are carried out on its device.

use candle_cnn::cuda::without_benchmark;
use candle_core::{DType, Device};

/// How the steps of a run are carried out; [`Training::executed`](crate::Training::executed) takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Execution {
    /// Type of the images that the network gets in training, and so of its activations. Needs `resident`: a host makes
    /// images of f32. Features that are computed once keep their own.
    pub activations: DType,
    /// Pictures stay on the device as bytes and are made into batches there, and the host waits for
    /// the device only to read the losses of many steps at once.
    ///
    /// Each step computes what it computes without. But a loss that is not finite is noticed only when it is
    /// read: the weights have moved by then, and no checkpoint is written of them.
    pub resident: bool,
    /// Record a step as a CUDA graph and replay it: one launch instead of some hundreds. Needs
    /// `resident`; devices other than a GPU have none. What a model decides on the host is decided when it is recorded,
    /// once: one that leaves a layer out at random, or counts, is to do that on the device, or without this.
    pub cuda_graph: bool,
}

impl Execution {
    /// What suits a device: on a GPU everything stays there.
    pub fn on(device: &Device) -> Self {
        let on_gpu = device.is_cuda();
        Self {
            activations: DType::F32,
            resident: on_gpu,
            cuda_graph: on_gpu,
        }
    }
}

/// Runs `f` on a batch; where that `is_smaller` than others, as a last one may be, a GPU times no engines for its shapes.
pub(crate) fn without_benchmark_if<R>(is_smaller: bool, f: impl FnOnce() -> R) -> R {
    match is_smaller {
        true => without_benchmark(f),
        false => f(),
    }
}

/// Images of the largest batch of a row so far; the last of a row may have fewer.
#[derive(Debug, Default)]
pub(crate) struct LargestBatch(u64);

impl LargestBatch {
    /// [`without_benchmark_if`] for the next batch of the row, of so many images.
    pub(crate) fn run<R>(&mut self, images: u64, f: impl FnOnce() -> R) -> R {
        self.0 = images.max(self.0);
        without_benchmark_if(images < self.0, f)
    }
}
