//! What `finetune-full`, `finetune-frozen` and `predict` share: torchvision's GoogLeNet as the
//! trainer sees it, the weights it begins with, and the resizing of pictures.

mod arguments;
mod config;
mod experiment;
mod network;
mod resize;
mod source;

pub use arguments::{TransferArguments, transfer_defaults};
pub use config::{Begin, BeginConfig, Request, Trained, TransferConfig};
pub use experiment::{FineTune, Stage};
pub use network::{Network, NetworkSettings};
pub use resize::{Resampling, Resizer, resize_batch};
pub use source::{FoundWeights, Weights, WeightsSource, weights_file};
