//! Processes that train one network together, each on its part of every batch.
//!
//! A [`ProcessGroup`] is this process' place among them: [`Ranks::from_environment`] reads it from
//! the variables that `torchrun` sets, [`ProcessGroup::connect`] finds the others, and then all of
//! them make the same calls in the same order:
//!
//! | call | does |
//! | --- | --- |
//! | [`ProcessGroup::all_reduce_mean`], [`ProcessGroup::all_reduce_weighted`] | average f32 tensors, in buckets |
//! | [`ProcessGroup::all_reduce_sum`], [`ProcessGroup::all_reduce_sum_f64`] | add up counters |
//! | [`ProcessGroup::broadcast`] | gives all what rank 0 has |
//! | [`ProcessGroup::verify_same`] | refuses to go on with different settings |
//! | [`ProcessGroup::barrier`] | waits for all |
//! | [`ProcessGroup::wait_until`] | waits for the own GPU, and looks meanwhile whether the others are there |
//!
//! Ranks listen where `MASTER_ADDR` says, alone. Where that is this machine's loopback and [`Ranks::local_world_size`] says that there are
//! other machines, they listen on all of its addresses.
//!
//! Tensors travel over TCP, which is all that a CPU needs, or with the feature `nccl` from GPU to
//! GPU. Sums are made in an order that depends on the number of ranks alone, never on timing, and
//! every rank receives the same bits.
//!
//! No call waits for ever: a rank that ends, is killed or gives up makes the pending and every later
//! call of all others an [`Error`] that names a rank, within a few seconds; one that is merely silent, or has
//! not come, does so after [`Options::timeout`]. (Over NCCL the GPUs wait for each other and the host for nothing: it asks by
//! [`ProcessGroup::wait_until`] before it waits for its GPU.)
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use data_parallel::{Backend, Options, ProcessGroup, Ranks};
//! // Two ranks as threads; commonly they are processes.
//! let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
//! let rank = move |rank: usize| {
//!     let ranks = Ranks::new(rank, 2, "127.0.0.1", port)?;
//!     let group = ProcessGroup::connect(&ranks, &Options::default(), Backend::Tcp)?;
//!     let gradient = Tensor::new(&[rank as f32, 1.0], &Device::Cpu).expect("a small tensor");
//!     group.all_reduce_mean(&[gradient])
//! };
//! let other = std::thread::spawn(move || rank(1));
//! assert_eq!(rank(0)?[0].to_vec1::<f32>()?, [0.5, 1.0]);
//! other.join().unwrap()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod environment;
mod error;
mod group;
#[cfg(feature = "nccl")]
mod nccl;
mod rendezvous;
mod ring;
mod shard;
mod wire;

pub use environment::Ranks;
pub use error::{Error, Result, with_sources};
pub use group::{Backend, Options, ProcessGroup};
pub use shard::shard;
