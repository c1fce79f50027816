//! GoogLeNet (Szegedy et al., "Going Deeper with Convolutions", 2014) as data:
//! a table of widths in the paper's order, from which blocks and network follow.
//!
//! [`CifarGoogLeNet`] is the lesson's variant for 32×32 pictures, [`GoogLeNet`]
//! torchvision's, with batch norm. Parameters carry the names of PyTorch's
//! state dict everywhere.
//!
//! ```
//! use candle_cnn::Mode;
//! use candle_core::{DType, Device, Tensor};
//! use inception_model::{CifarConfig, CifarGoogLeNet};
//! use rand::SeedableRng;
//!
//! let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
//! let net = CifarGoogLeNet::new(&CifarConfig::default(), &Device::Cpu, &mut rng)?;
//! assert_eq!(net.parameter_count(), 5_864_762);
//! let images = Tensor::zeros((1, 3, 32, 32), DType::F32, &Device::Cpu)?;
//! assert_eq!(net.forward(&images, Mode::Eval)?.dims(), [1, 10]);
//! # Ok::<(), candle_core::Error>(())
//! ```

mod cifar;
mod error;
mod init;
mod layers;
mod summary;
mod table;
mod torchvision;

pub use cifar::{CifarConfig, CifarGoogLeNet};
pub use error::ModelError;
pub use init::Init;
pub use summary::{Summary, SummaryRow};
pub use table::{BLOCKS, BlockName, BlockWidths, Entry, FEATURES, STEM_WIDTH};
pub use torchvision::{
    FrozenBatchNorm, GoogLeNet, GoogLeNetConfig, GoogLeNetOutputs, LARGEST_OF_ONE_PIXEL,
    SMALLEST_IMAGE,
};
