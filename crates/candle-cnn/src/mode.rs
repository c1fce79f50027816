//! Training or evaluation, passed down through a network.

/// How a network is run: passed to every layer, never stored in one.
///
/// Randomness is a function of the seed given with each training step, so a
/// step can be repeated, and a resumed run continues with the same masks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Dropout passes everything, batch norm uses its running statistics.
    ///
    /// This is PyTorch's `eval()` and not its `no_grad()`: Candle builds its graph wherever a `Var` is an input, and with it keeps all
    /// maps until the output is dropped. A network that evaluates takes its weights detached, which share the variables' memory. With
    /// detached weights a ResNet-20 held 109 MB over 256 pictures, and with attached ones 575 MB.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor, Var};
    /// use candle_cnn::{Conv2dConfig, Mode, conv2d};
    ///
    /// let forward = |images: &Tensor, var: &Var, mode: Mode| {
    ///     let weight = if mode.is_train() { var.as_tensor().clone() } else { var.as_detached_tensor() };
    ///     conv2d(images, &weight, None, Conv2dConfig::padded(1))
    /// };
    /// let images = Tensor::ones((1, 3, 8, 8), DType::F32, &Device::Cpu)?;
    /// let var = Var::ones((4, 3, 3, 3), DType::F32, &Device::Cpu)?;
    /// // Whether Candle keeps the graph, and so the maps.
    /// assert!(forward(&images, &var, Mode::Train { dropout_seed: 0 })?.track_op());
    /// assert!(!forward(&images, &var, Mode::Eval)?.track_op());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    Eval,
    /// Dropout drops, batch norm uses and records the batch's statistics.
    Train {
        /// Seed of this step's dropout masks.
        dropout_seed: u64,
    },
}

impl Mode {
    /// Whether this is [`Mode::Train`].
    pub fn is_train(self) -> bool {
        matches!(self, Self::Train { .. })
    }
}
