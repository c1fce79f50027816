//! Arguments that both ways of fine-tuning have.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use experiment_common::below_one;
use inception_model::SMALLEST_IMAGE;

use crate::config::{Begin, Request, Trained};
use crate::source::WeightsSource;

/// Weights and input of the network.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Network")]
pub struct TransferArguments {
    /// The backbone's weights, under a fresh head: torchvision (ImageNet, fetched and verified),
    /// random, a .pth or .safetensors FILE, a finished RUN, or a Hub repository as
    /// owner/name, owner/name@revision, owner/name:file or owner/name@revision:file
    #[arg(long, value_name = "WEIGHTS")]
    pub weights: Option<WeightsSource>,
    /// Begin with exactly this state, head included: a .pth or .safetensors file, or the folder of
    /// a finished run or of a checkpoint
    #[arg(long, value_name = "FILE or RUN")]
    pub init: Option<PathBuf>,
    /// Resize the pictures to N×N pixels, bilinearly with antialiasing; 15 to 1024
    #[arg(long, value_name = "N", value_parser = image_size, allow_negative_numbers = true)]
    pub image_size: Option<usize>,
    /// Probability that a feature is dropped before the last layer, in training
    #[arg(long, value_name = "PROBABILITY", value_parser = below_one, allow_negative_numbers = true)]
    pub dropout: Option<f64>,
}

/// torchvision's, before the head.
const DROPOUT: f64 = 0.2;

/// Flag and default of each, but `--weights` and `--init`, whose defaults are the experiment's.
pub fn transfer_defaults() -> Vec<(&'static str, String)> {
    vec![
        ("image_size", "32, or that of --init".into()),
        ("dropout", DROPOUT.to_string()),
    ]
}

impl TransferArguments {
    /// What is asked for, without auxiliary heads; `default` is what a run begins with unless told.
    ///
    /// # Errors
    /// `--weights` beside `--init`.
    pub fn request(self, default: Begin, trained: Trained) -> Result<Request> {
        let begin = match (self.weights, self.init) {
            (Some(weights), Some(init)) => bail!(
                "--weights {weights} cannot be combined with --init {}: --weights brings a backbone \
                 under a fresh head, --init the whole state, head included",
                init.display()
            ),
            (Some(weights), None) => Begin::Weights(weights),
            (None, Some(init)) => Begin::Init(init),
            (None, None) => default,
        };
        Ok(Request {
            begin,
            image_size: self.image_size,
            dropout: self.dropout.unwrap_or(DROPOUT),
            aux_heads: false,
            trained,
        })
    }
}

/// Above this a batch of a few pictures takes all memory, and nothing in a 32×32 picture asks for it.
const LARGEST_IMAGE: usize = 1024;

/// Of a flag, or of what weights say of themselves.
pub(crate) fn image_size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(size) if (SMALLEST_IMAGE..=LARGEST_IMAGE).contains(&size) => Ok(size),
        _ => Err(format!(
            "it must be a whole number from {SMALLEST_IMAGE}, the smallest that the network takes, to \
             {LARGEST_IMAGE}"
        )),
    }
}
