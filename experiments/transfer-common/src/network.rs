//! torchvision's GoogLeNet as the trainer sees it.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_cnn::Mode;
use candle_core::{Device, Tensor, Var};
use inception_model::{FrozenBatchNorm, GoogLeNet, GoogLeNetConfig};
use rand_chacha::ChaCha8Rng;
use trainer::{AuxiliaryOutput, FixedFeatures, Model, TrainOutput, random, weights};

use crate::config::Trained;
use crate::resize::Resizer;
use crate::source::Weights;

/// Factor of each auxiliary head's loss: 0.3, as the paper has it (section 5).
const AUX_WEIGHT: f64 = 0.3;

/// What a [`Network`] is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkSettings {
    /// Outputs of the head.
    pub classes: usize,
    /// Whether the input is converted from ImageNet's normalisation to that of 0.5.
    pub transform_input: bool,
    /// Height and width to which pictures are resized; None: taken as they are.
    pub image_size: Option<usize>,
    /// Probability that a feature is dropped before the head in training.
    pub dropout: f64,
    /// Whether the auxiliary heads are there.
    pub aux_heads: bool,
    /// What trains.
    pub trained: Trained,
    /// Which names the classes have: `cifar10`, `shapes`.
    pub class_names: String,
}

impl NetworkSettings {
    fn googlenet(&self) -> GoogLeNetConfig {
        GoogLeNetConfig {
            num_classes: self.classes,
            aux_heads: self.aux_heads,
            transform_input: self.transform_input,
            dropout: self.dropout,
            ..GoogLeNetConfig::default()
        }
    }
}

/// torchvision's GoogLeNet, with the resizing in front of it.
#[derive(Debug)]
pub struct Network {
    googlenet: GoogLeNet,
    settings: NetworkSettings,
    resizer: Option<Resizer>,
}

impl Network {
    /// The network with random weights: torchvision's initialisation, and a head like a fresh
    /// `nn.Linear`. The head's draws are a stream of their own, so that the same seed puts the same
    /// head on any backbone.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn new(settings: NetworkSettings, seed: u64, device: &Device) -> Result<Self> {
        let make = || {
            let config = settings.googlenet();
            let mut rng: ChaCha8Rng = random::stream(seed, random::INIT, 0);
            let mut googlenet = GoogLeNet::new(&config, device, &mut rng)?;
            let mut rng: ChaCha8Rng = random::stream(seed, random::INIT, 1);
            googlenet.reset_head(settings.classes, &mut rng)?;
            if let Some(batch_norm) = settings.trained.frozen() {
                googlenet.freeze_backbone(batch_norm);
            }
            candle_core::Result::Ok(googlenet)
        };
        Ok(Self {
            googlenet: make().context("cannot make the network")?,
            resizer: settings.image_size.map(|size| Resizer::new(size, size)),
            settings,
        })
    }

    /// Takes everything but the head from a file of the same network with any number of classes.
    /// Its auxiliary heads are dropped where the network has none.
    ///
    /// # Errors
    /// As [`Weights::backbone`]; nothing is changed then.
    pub fn load_backbone(&self, weights: &Weights) -> Result<()> {
        let tensors = weights.backbone(self.settings.aux_heads)?;
        let mut own = weights::state_dict(self);
        own.retain(|(name, _)| !GoogLeNet::is_head(name));
        Ok(weights::assign(own, tensors, &weights.path)?)
    }

    /// Takes everything from a file, head included; auxiliary heads as [`Self::load_backbone`].
    ///
    /// # Errors
    /// As [`Weights::whole`], and another number of classes; nothing is changed then.
    pub fn load_state(&self, weights: &Weights) -> Result<()> {
        let tensors = weights.whole(self.settings.aux_heads)?;
        let own = weights::state_dict(self);
        Ok(weights::assign(own, tensors, &weights.path)?)
    }

    fn resized(&self, images: &Tensor) -> candle_core::Result<Tensor> {
        match &self.resizer {
            Some(resizer) => resizer.resize(images),
            None => Ok(images.clone()),
        }
    }
}

impl Model for Network {
    fn forward(&self, images: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        let images = self.resized(images)?;
        match mode {
            Mode::Train { .. } => Ok(self.googlenet.forward(&images, mode)?.logits),
            Mode::Eval => self.googlenet.infer(&images),
        }
    }

    fn forward_train(
        &self,
        images: &Tensor,
        dropout_seed: u64,
    ) -> candle_core::Result<TrainOutput> {
        let images = self.resized(images)?;
        let outputs = self
            .googlenet
            .forward(&images, Mode::Train { dropout_seed })?;
        let auxiliary = [outputs.aux2, outputs.aux1].into_iter().flatten();
        Ok(TrainOutput {
            logits: outputs.logits,
            auxiliary: auxiliary
                .map(|logits| AuxiliaryOutput {
                    logits,
                    weight: AUX_WEIGHT,
                })
                .collect(),
        })
    }

    fn named_parameters(&self) -> Vec<(String, Var)> {
        self.googlenet.named_parameters()
    }

    fn named_buffers(&self) -> Vec<(String, Var)> {
        self.googlenet.named_buffers()
    }

    fn is_trainable(&self, parameter: &str) -> bool {
        self.googlenet.is_trainable(parameter)
    }

    fn fixed_features(&self) -> Option<&dyn FixedFeatures> {
        (self.settings.trained.frozen() == Some(FrozenBatchNorm::Eval)).then_some(self)
    }

    fn metadata(&self) -> BTreeMap<String, String> {
        let settings = &self.settings;
        let mut metadata = BTreeMap::from([
            ("architecture".into(), GoogLeNet::ARCHITECTURE.into()),
            ("classes".into(), settings.classes.to_string()),
            ("class_names".into(), settings.class_names.clone()),
            (
                "transform_input".into(),
                settings.transform_input.to_string(),
            ),
        ]);
        if let Some(size) = settings.image_size {
            metadata.insert("image_size".into(), size.to_string());
        }
        metadata
    }
}

impl FixedFeatures for Network {
    fn features(&self, images: &Tensor) -> candle_core::Result<Tensor> {
        self.googlenet.features(&self.resized(images)?, Mode::Eval)
    }

    fn classify(&self, features: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        self.googlenet.classify(features, mode)
    }
}

#[cfg(test)]
mod tests {
    use pretrained_import::{Format, Ignored, StateDict};

    use super::*;

    fn settings(trained: Trained) -> NetworkSettings {
        NetworkSettings {
            classes: 10,
            transform_input: true,
            image_size: Some(32),
            dropout: 0.2,
            aux_heads: false,
            trained,
            class_names: "cifar10".into(),
        }
    }

    fn network(settings: NetworkSettings) -> Network {
        Network::new(settings, 5, &Device::Cpu).unwrap()
    }

    fn images(n: usize) -> Tensor {
        let values = test_support::seeded_values("images", n * 3 * 32 * 32, 1.0);
        Tensor::from_vec(values, (n, 3, 32, 32), &Device::Cpu).unwrap()
    }

    const TRAIN: Mode = Mode::Train { dropout_seed: 3 };

    #[test]
    fn fixed_features_and_their_classification_are_the_forward_pass() -> candle_core::Result<()> {
        let frozen = network(settings(Trained::HeadWithFixedStatistics));
        let fixed = frozen.fixed_features().unwrap();
        let features = fixed.features(&images(4))?;
        assert_eq!(features.dims(), [4, inception_model::FEATURES]);
        for mode in [Mode::Eval, TRAIN] {
            let logits = fixed.classify(&features, mode)?;
            let expected = frozen.forward(&images(4), mode)?;
            assert_eq!(logits.to_vec2::<f32>()?, expected.to_vec2::<f32>()?);
        }
        for moving in [Trained::Everything, Trained::Head] {
            assert!(network(settings(moving)).fixed_features().is_none());
        }
        Ok(())
    }

    #[test]
    fn a_frozen_backbone_has_no_gradient_and_its_head_has() -> candle_core::Result<()> {
        let frozen = network(settings(Trained::Head));
        let output = frozen.forward_train(&images(4), 3)?;
        let gradients = output.logits.sqr()?.sum_all()?.backward()?;
        for (name, parameter) in frozen.named_parameters() {
            let has_gradient = gradients.get(&parameter).is_some();
            assert_eq!(has_gradient, name.starts_with("fc."), "{name}");
            assert_eq!(frozen.is_trainable(&name), has_gradient, "{name}");
        }
        Ok(())
    }

    #[test]
    fn each_auxiliary_head_adds_three_tenths_of_its_loss() -> candle_core::Result<()> {
        let with_aux = network(NetworkSettings {
            aux_heads: true,
            ..settings(Trained::Everything)
        });
        let output = with_aux.forward_train(&images(2), 3)?;
        let heads = output.auxiliary.iter();
        let heads: Vec<_> = heads
            .map(|head| (head.weight, head.logits.dims()))
            .collect();
        assert_eq!(heads, [(0.3, &[2, 10][..]), (0.3, &[2, 10])]);
        let without = network(settings(Trained::Everything));
        assert!(without.forward_train(&images(2), 3)?.auxiliary.is_empty());
        Ok(())
    }

    #[test]
    fn a_seed_puts_the_same_head_on_any_backbone() -> Result<()> {
        let head = |network: &Network| {
            let parameters: BTreeMap<_, _> = network.named_parameters().into_iter().collect();
            parameters["fc.weight"].to_vec2::<f32>().unwrap()
        };
        let fresh = network(settings(Trained::Everything));
        let other = Network::new(
            NetworkSettings {
                classes: 1000,
                aux_heads: true,
                ..settings(Trained::Everything)
            },
            6,
            &Device::Cpu,
        )?;
        let loaded = network(settings(Trained::Everything));
        let state = weights::state_dict(&other).into_iter();
        let state = state.map(|(name, var)| (name, var.as_detached_tensor()));
        loaded.load_backbone(&Weights {
            path: "other".into(),
            sha256: String::new(),
            state: StateDict {
                tensors: state.collect(),
                ignored: Ignored::default(),
                metadata: BTreeMap::new(),
                format: Format::Safetensors,
            },
        })?;
        assert_eq!(head(&loaded), head(&fresh));
        // U(±1/√1024), as nn.Linear.
        let bound = 1.0 / 32.0;
        let largest = head(&fresh)
            .into_iter()
            .flatten()
            .fold(0f32, |m, w| m.max(w.abs()));
        assert!(largest <= bound && largest > 0.99 * bound, "{largest}");
        Ok(())
    }
}
