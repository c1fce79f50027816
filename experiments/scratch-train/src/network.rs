//! The network as the trainer sees it.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_cnn::Mode;
use candle_core::{Device, Tensor, Var};
use inception_model::{CifarConfig, CifarGoogLeNet};
use rand_chacha::ChaCha8Rng;
use trainer::{Model, random};

use crate::config::Config;

/// Height and width of the pictures.
const SIDE: usize = 32;

pub(crate) struct Network {
    network: CifarGoogLeNet,
    class_names: &'static str,
}

impl Network {
    /// The network with the initial weights of the run's seed.
    pub(crate) fn new(config: &Config, device: &Device) -> Result<Self> {
        let settings = CifarConfig {
            num_classes: CLASSES,
            dropout: config.model.dropout,
            init: config.model.init.into(),
        };
        let mut rng: ChaCha8Rng = random::stream(config.training.seed, random::INIT, 0);
        let network = CifarGoogLeNet::new(&settings, device, &mut rng);
        Ok(Self {
            network: network.context("cannot make the network")?,
            class_names: config.data.dataset.name(),
        })
    }

    /// The table of layers.
    pub(crate) fn summary(dropout: f64) -> Result<String> {
        let settings = CifarConfig {
            dropout,
            ..Default::default()
        };
        let mut rng = random::stream(0, random::INIT, 0);
        let network = CifarGoogLeNet::new(&settings, &Device::Cpu, &mut rng)?;
        Ok(network.summary(SIDE, SIDE).to_string())
    }
}

/// Both sets have ten.
const CLASSES: usize = cifar_data::CLASSES;

impl Model for Network {
    fn forward(&self, images: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        match mode {
            Mode::Train { .. } => self.network.forward(images, mode),
            Mode::Eval => self.network.infer(images),
        }
    }

    fn named_parameters(&self) -> Vec<(String, Var)> {
        self.network.named_parameters()
    }

    fn metadata(&self) -> BTreeMap<String, String> {
        BTreeMap::from([
            ("architecture".into(), CifarGoogLeNet::ARCHITECTURE.into()),
            ("classes".into(), CLASSES.to_string()),
            ("class_names".into(), self.class_names.into()),
        ])
    }
}
