//! What a network refuses.

/// Why a network cannot be run.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum ModelError {
    /// A tensor that is no batch of images.
    #[error("expected images of shape (N, 3, H, W), found {found:?}")]
    NotImages {
        /// The tensor's shape.
        found: Vec<usize>,
    },
    /// An image from which some pool would make nothing.
    #[error(
        "images of {height}×{width} pixels are too small for {network}: it takes any size from {smallest}×{smallest}"
    )]
    ImageTooSmall {
        /// The network's name.
        network: &'static str,
        /// Height of the images, in pixels.
        height: usize,
        /// Width of the images, in pixels.
        width: usize,
        /// The least height and width.
        smallest: usize,
    },
}

impl From<ModelError> for candle_core::Error {
    fn from(error: ModelError) -> Self {
        Self::wrap(error)
    }
}
