//! A network with the names of its classes and what it wants of a picture.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_cnn::Mode;
use candle_core::{DType, Device, Tensor};
use experiment_common::Dataset;
use inception_model::{CifarConfig, CifarGoogLeNet, FEATURES, GoogLeNet};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use trainer::{Model, random, weights};
use transfer_common::{Network, NetworkSettings, Trained, Weights, WeightsSource};

use crate::preprocess::{Preprocessing, read};

/// What `--weights` takes where there is no network.
const WAYS_ON: &[&str] = &[
    "--weights FILE        a .pth or .safetensors file of torchvision's GoogLeNet",
    "--weights RUN         a finished run of scratch-train, finetune-full or finetune-frozen",
];

/// ImageNet's classes; lines with `#` say where they are from.
const IMAGENET_CLASSES: &str = include_str!("imagenet_classes.txt");

/// A class that a picture may belong to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Guess {
    pub(crate) index: usize,
    pub(crate) class: String,
    pub(crate) probability: f64,
}

/// A network ready to be asked.
pub(crate) struct Classifier {
    network: Kind,
    preprocessing: Preprocessing,
    class_names: Vec<String>,
    device: Device,
    from: String,
    /// What the weights do not say and is taken for granted.
    assumed: Vec<&'static str>,
}

enum Kind {
    Cifar(Box<CifarGoogLeNet>),
    Torchvision(Box<Network>),
}

impl Classifier {
    /// The network that the weights are of, by their metadata, or by their names where there is none.
    pub(crate) fn load(source: &WeightsSource, device: &Device) -> Result<Self> {
        let Some(found) = source.find(WAYS_ON)? else {
            bail!("--weights random knows nothing: give trained weights");
        };
        let weights = Weights::read(&found.file).context("cannot use --weights")?;
        let path = weights.path.display().to_string();
        let from = found.origin.unwrap_or(path);
        let classifier = match architecture(&weights)? {
            CifarGoogLeNet::ARCHITECTURE => Self::cifar(weights, from, device),
            _ => Self::torchvision(weights, from, device),
        };
        classifier.context("cannot use --weights")
    }

    fn cifar(weights: Weights, from: String, device: &Device) -> Result<Self> {
        let config = CifarConfig {
            num_classes: classes(&weights)?,
            ..CifarConfig::default()
        };
        let mut rng: ChaCha8Rng = random::stream(0, random::INIT, 0);
        let network = CifarGoogLeNet::new(&config, device, &mut rng)?;
        let said = |key: &str| weights.state.metadata.get(key);
        // The lesson's pictures have one size and normalization, which files that say what they are leave unsaid.
        let mut assumed = Vec::new();
        if said("architecture").is_none() {
            assumed.push(Preprocessing::Cifar.assumed());
        }
        let said = said("class_names");
        let class_names = class_names(said.map(String::as_str), config.num_classes);
        let as_f32 = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_dtype(DType::F32)?));
        let tensors = weights.state.tensors.into_iter().map(as_f32);
        let tensors = tensors.collect::<candle_core::Result<_>>()?;
        weights::assign(network.named_parameters(), tensors, &weights.path)?;
        Ok(Self {
            network: Kind::Cifar(Box::new(network)),
            preprocessing: Preprocessing::Cifar,
            class_names,
            device: device.clone(),
            from,
            assumed,
        })
    }

    fn torchvision(weights: Weights, from: String, device: &Device) -> Result<Self> {
        let classes = classes(&weights)?;
        let said = |key: &str| weights.state.metadata.get(key).map(String::as_str);
        let image_size = weights.image_size()?;
        // Ours say how large their pictures are. Of others, those with ten classes can only have
        // been fine-tuned, and all else is torchvision's.
        let preprocessing = match image_size.is_some() || classes == cifar_data::CLASSES {
            true => Preprocessing::Cifar,
            false => Preprocessing::ImageNet,
        };
        let mut assumed = Vec::new();
        let is_published = weights.are_torchvisions() && preprocessing == Preprocessing::ImageNet;
        if image_size.is_none() && !is_published {
            assumed.push(preprocessing.assumed());
        }
        let transform_input = weights.transform_input()?;
        if transform_input.is_none() {
            assumed.push(
                "The weights do not say whether the network converts its input: it does, from ImageNet's mean and standard \
                 deviation to −1…1, as torchvision's pretrained one (pretrained-import --no-transform-input turns \
                 it off)",
            );
        }
        let settings = NetworkSettings {
            classes,
            transform_input: transform_input.unwrap_or(true),
            image_size,
            dropout: 0.0,
            aux_heads: false,
            trained: Trained::Everything,
            class_names: String::new(),
        };
        let class_names = class_names(said("class_names"), classes);
        let network = Network::new(settings, 0, device)?;
        network.load_state(&weights)?;
        Ok(Self {
            network: Kind::Torchvision(Box::new(network)),
            preprocessing,
            class_names,
            device: device.clone(),
            from,
            assumed,
        })
    }

    /// A line for people.
    pub(crate) fn description(&self) -> String {
        let network = match &self.network {
            Kind::Cifar(_) => "the lesson's GoogLeNet",
            Kind::Torchvision(_) => "torchvision's GoogLeNet",
        };
        let classes = self.class_names.len();
        format!("{}: {network}, {classes} classes", self.from)
    }

    /// What the weights do not say and is taken for granted: lines for people.
    pub(crate) fn assumed(&self) -> &[&'static str] {
        &self.assumed
    }

    /// A picture as the network wants it.
    pub(crate) fn prepare(&self, path: &Path) -> Result<Vec<f32>> {
        Ok(self.preprocessing.apply(&read(path)?))
    }

    /// The `top` likeliest classes of each of `inputs`, which [`Self::prepare`] gave.
    pub(crate) fn classify(&self, inputs: &[&[f32]], top: usize) -> Result<Vec<Vec<Guess>>> {
        if inputs.is_empty() {
            return Ok(Vec::new());
        }
        let size = self.preprocessing.size();
        let images =
            Tensor::from_vec(inputs.concat(), (inputs.len(), 3, size, size), &self.device)?;
        let rows = self.logits(&images)?.to_vec2::<f32>()?;
        rows.iter().map(|row| self.best(row, top)).collect()
    }

    /// What the network says of prepared pictures `(N, 3, size, size)`: `(N, classes)`.
    pub(crate) fn logits(&self, images: &Tensor) -> candle_core::Result<Tensor> {
        match &self.network {
            Kind::Cifar(network) => network.infer(images),
            Kind::Torchvision(network) => network.forward(images, Mode::Eval),
        }
    }

    /// Refuses pictures whose classes are not those of the network.
    pub(crate) fn check_set(&self, set: Dataset) -> Result<()> {
        let classes = set.classes();
        ensure!(
            self.class_names == classes,
            "cannot use --evaluate {}: its classes are {}, …, and those of the weights {} are {}, …",
            set.name(),
            classes[0],
            self.from,
            self.class_names[0]
        );
        Ok(())
    }

    pub(crate) fn class_names(&self) -> &[String] {
        &self.class_names
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    fn best(&self, logits: &[f32], top: usize) -> Result<Vec<Guess>> {
        ensure!(
            logits.iter().all(|logit| logit.is_finite()),
            "the weights {} give answers that are not finite",
            self.from
        );
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exponentials = logits.iter().map(|&logit| f64::from(logit - largest).exp());
        let exponentials: Vec<f64> = exponentials.collect();
        let sum: f64 = exponentials.iter().sum();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let guess = |&index: &usize| Guess {
            index,
            class: self.class_names[index].clone(),
            probability: exponentials[index] / sum,
        };
        Ok(order.iter().take(top).map(guess).collect())
    }
}

/// Which network it is.
fn architecture(weights: &Weights) -> Result<&'static str> {
    const CIFAR: &str = CifarGoogLeNet::ARCHITECTURE;
    const TORCHVISION: &str = GoogLeNet::ARCHITECTURE;
    let said = weights
        .state
        .metadata
        .get("architecture")
        .map(String::as_str);
    let has = |name: &str| weights.state.tensors.contains_key(name);
    match said {
        Some(CIFAR) => Ok(CIFAR),
        Some(TORCHVISION) => Ok(TORCHVISION),
        Some(other) => bail!(
            "cannot use --weights {}: it is a {}; {CIFAR} and {TORCHVISION} are known",
            weights.path.display(),
            other.escape_debug()
        ),
        None if has("conv1.conv.weight") => Ok(TORCHVISION),
        None if has("pre_layers.0.weight") => Ok(CIFAR),
        None => bail!(
            "cannot use --weights {}: it is no state dict of the lesson's or torchvision's GoogLeNet",
            weights.path.display()
        ),
    }
}

/// Outputs of the head. Sizes are not believed beyond what it reads, since a tensor without elements may claim any.
fn classes(weights: &Weights) -> Result<usize> {
    let head = weights.state.tensors.get("fc.weight");
    let dims = head.map(Tensor::dims);
    match dims {
        Some(&[classes, FEATURES]) if classes > 0 => Ok(classes),
        found => bail!(
            "{}: fc.weight should have shape (classes, {FEATURES}), found {found:?}",
            weights.path.display()
        ),
    }
}

/// `said` is which names the weights say that their classes have.
fn class_names(said: Option<&str>, classes: usize) -> Vec<String> {
    let imagenet = IMAGENET_CLASSES
        .lines()
        .filter(|line| !line.starts_with('#'));
    let imagenet: Vec<&str> = imagenet.collect();
    let known: &[&str] = match said {
        Some(said) if said == Dataset::Shapes.name() => Dataset::Shapes.classes(),
        _ if classes == imagenet.len() => &imagenet,
        _ => Dataset::Cifar10.classes(),
    };
    match known.len() == classes {
        true => known.iter().map(ToString::to_string).collect(),
        false => (0..classes).map(|index| format!("class {index}")).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imagenet_has_a_thousand_names_in_the_order_of_their_index() {
        let names = class_names(None, 1000);
        assert_eq!(names.len(), 1000);
        for (index, name) in [(0, "tench"), (281, "tabby"), (999, "toilet tissue")] {
            assert_eq!(names[index], name);
        }
        assert_eq!(class_names(None, 10)[3], "cat");
        assert_eq!(class_names(None, 3), ["class 0", "class 1", "class 2"]);
    }
}
