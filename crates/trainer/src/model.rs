//! What the trainer asks of a network.

use std::collections::BTreeMap;

use candle_cnn::Mode;
use candle_core::{Result, Tensor, Var};

/// A network that can be trained, evaluated and saved.
///
/// The trainer knows nothing else about it: not its layers, not its input size. (What it trains on are
/// [`cifar_data::ImageSet`]s, though: 32×32 pictures of ten classes.) Names are PyTorch's state-dict keys, because they become the keys of every checkpoint.
pub trait Model {
    /// Logits `(N, classes)` of images `(N, channels, height, width)`. In [`Mode::Eval`] nobody
    /// asks for a gradient: compute with `var.as_detached_tensor()` there, or Candle keeps every map
    /// until the batch is done.
    fn forward(&self, images: &Tensor, mode: Mode) -> Result<Tensor>;

    /// The forward pass of a training step. Networks with auxiliary heads override it; for all
    /// others it is [`Model::forward`] in [`Mode::Train`]. A GPU records it, see
    /// [`Execution::cuda_graph`](crate::Execution::cuda_graph).
    fn forward_train(&self, images: &Tensor, dropout_seed: u64) -> Result<TrainOutput> {
        let logits = self.forward(images, Mode::Train { dropout_seed })?;
        Ok(TrainOutput {
            logits,
            auxiliary: Vec::new(),
        })
    }

    /// Every parameter, trainable or not: the variables that the forward pass computes with, of f32 or
    /// f64. The order, which nobody relies on, is best the state dict's.
    fn named_parameters(&self) -> Vec<(String, Var)>;

    /// State that is saved with the weights and has no gradient: batch-norm statistics. F32, F64 or I64, since other types are
    /// refused before the first step; finite as the weights are, or no checkpoint is written.
    fn named_buffers(&self) -> Vec<(String, Var)> {
        Vec::new()
    }

    /// Whether the optimiser may move this parameter. A model that freezes layers answers `false`
    /// for their names (and detaches them, so that no gradient is computed).
    fn is_trainable(&self, _parameter: &str) -> bool {
        true
    }

    /// The network in two parts, where the first never changes in training: frozen, and without
    /// dropout, augmentation or batch statistics. Its features of a picture are then computed once,
    /// and every later pass over the pictures runs the second part alone.
    fn fixed_features(&self) -> Option<&dyn FixedFeatures> {
        None
    }

    /// Written into the metadata of `model.safetensors`: `architecture`, `classes`, …
    fn metadata(&self) -> BTreeMap<String, String>;
}

/// A network whose first part gives a picture the same features whenever it is asked.
///
/// `classify(features(images), mode)` is `forward(images, mode)`.
pub trait FixedFeatures {
    /// Features `(N, …)` of images `(N, channels, height, width)`, each row of its image alone.
    fn features(&self, images: &Tensor) -> Result<Tensor>;

    /// Logits `(N, classes)` of features.
    fn classify(&self, features: &Tensor, mode: Mode) -> Result<Tensor>;
}

/// What a forward pass yields in training.
#[derive(Debug, Clone)]
pub struct TrainOutput {
    /// `(N, classes)`; the training accuracy is counted on these.
    pub logits: Tensor,
    /// Further classifiers; each adds `weight × cross entropy` to the loss that is minimised.
    pub auxiliary: Vec<AuxiliaryOutput>,
}

/// The answer of an auxiliary classifier.
#[derive(Debug, Clone)]
pub struct AuxiliaryOutput {
    /// `(N, classes)`
    pub logits: Tensor,
    /// Factor of this head's loss; 0.3 in the GoogLeNet paper.
    pub weight: f64,
}
