//! Pretrained weights: found, fetched and verified.

pub mod source;

pub use source::{FetchError, FetchOptions, FoundFile, Source};
