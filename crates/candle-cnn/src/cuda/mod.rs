//! What is special to CUDA: the settings of its convolutions and matrix products.
//!
//! The operations of this crate take tensors of a CUDA device as they take those of the CPU, where it is built with the
//! feature `cuda`. Without the feature the settings can be set, and nothing reads them.
//!
//! Nothing waits for the device, except that the first pass of each shape may time the engines it has
//! ([`Settings::benchmark`], [`without_benchmark`]) and try them out ([`Settings::convolution`]). After that a step can be captured in a CUDA
//! graph. A shape first met while a stream is being captured gets its engine by rules of thumb.
//!
//! A [`crate::StaticGraph`] uses more than one stream ([`Settings::streams`]); to whoever works on the device's own it looks like one.
//!
//! What cuDNN needs (a handle and a workspace for each stream, the engines chosen) is kept for each thread and device, and freed at the
//! thread's end: a captured graph must not be launched after the thread that captured it has ended.

#[cfg(feature = "cuda")]
pub(crate) mod cudnn;
#[cfg(feature = "cuda")]
mod device;
#[cfg(feature = "cuda")]
pub(crate) mod graph_api;
#[cfg(feature = "cuda")]
pub(crate) mod kernels;
#[cfg(feature = "cuda")]
pub(crate) mod lanes;
#[cfg(feature = "cuda")]
pub(crate) mod launch;
#[cfg(any(feature = "cuda", test))]
pub(crate) mod parts;
mod settings;
#[cfg(feature = "cuda")]
mod training;

#[cfg(feature = "cuda")]
pub use device::{
    DeviceInfo, HeldMemory, Marker, Versions, device_info, held_memory, make_lasting_memory,
    memory, open_device, release_freed_memory, release_graph_memory, synchronize, try_out,
    versions,
};
pub use settings::{F32Math, Settings, set_settings, settings, without_benchmark};
#[cfg(feature = "cuda")]
pub use training::{
    SgdHyperparameters, SgdTensor, TrackedStatistics, count_correct, gather_normalized, sgd_step,
    take_up_statistics,
};

#[cfg(feature = "cuda")]
pub use crate::dropout::with_dropout_seed;
