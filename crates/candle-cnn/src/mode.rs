//! Training or evaluation, passed down through a network.

/// How a network is run: passed to every layer, never stored in one.
///
/// Randomness is a function of the seed given with each training step, so a
/// step can be repeated, and a resumed run continues with the same masks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Dropout passes everything, batch norm uses its running statistics.
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
