//! CIFAR-10 as bytes in memory, and batches of it as tensors.
//!
//! - [`load`] reads a folder that holds CIFAR-10 in any of three layouts (see [`Layout`]).
//! - [`shapes`] draws ten classes of pictures from a seed: no file, no network.
//! - [`stratified_split`], [`shuffled_order`] and [`Batches`] lead from there to tensors.
//!
//! Pixels stay `u8`, channel by channel (C, H, W): the training set is 154 MB, not 614 MB as `f32`.
//! Every reader gives the same orientation: byte `c * 1024 + y * 32 + x` is channel `c` (red,
//! green, blue) of the pixel in row `y` from the top and column `x` from the left.
//!
//! ```
//! use std::sync::Arc;
//! use candle_core::Device;
//! use cifar_data::{Batches, Normalization, Split, shapes};
//!
//! let train = Arc::new(shapes::generate(0, Split::Train, 100));
//! let order: Vec<u32> = (0..train.len() as u32).collect();
//! let batches = Batches::new(train, order, 32, Normalization::HALF, &Device::Cpu)?;
//!
//! let mut sizes = Vec::new();
//! for batch in batches {
//!     let batch = batch?;
//!     assert_eq!(batch.images.dims(), [batch.len, 3, 32, 32]);
//!     assert_eq!(batch.labels.dims(), [batch.len]);
//!     sizes.push(batch.len);
//! }
//! assert_eq!(sizes, [32, 32, 32, 4]);
//! # Ok::<(), cifar_data::DataError>(())
//! ```
//!
//! # Beside `candle-datasets`
//!
//! **Do not use `candle_datasets::vision::cifar::load()`** (as of 0.11.1):
//! it transposes every image (rows become columns), skips rows that it cannot read and panics on a
//! picture that it cannot decode. `candle_datasets::vision::cifar::load_dir()` has the right
//! orientation, but checks no label and reads only files of exactly 10,000 records.

pub mod binary;
pub mod download;
pub mod hub_parquet;
pub mod jpeg;
pub mod shapes;

mod batches;
mod error;
mod guard;
mod image_set;
mod layout;
mod sampling;

pub use batches::{Batch, Batches, Normalization};
pub use error::DataError;
pub use image_set::{ImageSet, TrainTest};
pub use layout::{Candidate, Layout, find_layout, incomplete_layout, load, python_version};
pub use sampling::{shuffled_order, stratified_split};
pub use shapes::Split;

/// Pixels along one side of a picture.
pub const SIDE: usize = 32;

/// Bytes of one picture: 3 channels × 32 rows × 32 columns.
pub const IMAGE_BYTES: usize = 3 * SIDE * SIDE;

/// Number of classes.
pub const CLASSES: usize = 10;

/// CIFAR-10's classes; the label is the index.
pub const CLASS_NAMES: [&str; CLASSES] = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
];
