//! Pretrained weights: found, fetched and verified, read from the formats they are published in,
//! held against torchvision's GoogLeNet, and written as safetensors with their provenance.
//!
//! ```no_run
//! use std::path::Path;
//! use pretrained_import::{MatchOptions, StateDict, match_googlenet};
//!
//! let state = StateDict::read(Path::new("googlenet-1378be20.pth"))?;
//! let matched = match_googlenet(&state, MatchOptions::default())?;
//! assert_eq!(matched.report.loaded.len(), 364);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A `.pth` file is a program for Python's pickle machine. [`StateDict::read`] runs none of it: it
//! understands dictionaries of tensors and refuses everything else by name.

mod error;
mod export;
mod googlenet;
mod names;
mod pickle;
pub mod source;
mod state_dict;
mod torch;

pub use error::ImportError;
pub use export::{ExportError, can_be_written, write_safetensors};
pub use googlenet::{
    AuxHeads, MatchError, MatchOptions, Matched, Misshapen, Report, match_backbone, match_googlenet,
};
pub use names::first_of;
pub use source::{FetchError, FetchOptions, FoundFile, Source};
pub use state_dict::{Format, Ignored, StateDict};
