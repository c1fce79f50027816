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

/// Runs `f`; a GPU times no engines for it if its shapes are `seldom` met, as those of a last, smaller batch are.
pub(crate) fn without_benchmark_if<R>(seldom: bool, f: impl FnOnce() -> R) -> R {
    match seldom {
        true => without_benchmark(f),
        false => f(),
    }
}

/// Batches in a row, of which the last may have fewer images.
#[derive(Debug, Default)]
pub(crate) struct InARow {
    whole: u64,
}

impl InARow {
    /// [`without_benchmark_if`] for the next batch, of so many images.
    pub(crate) fn run<R>(&mut self, images: u64, f: impl FnOnce() -> R) -> R {
        self.whole = images.max(self.whole);
        without_benchmark_if(images < self.whole, f)
    }
}
