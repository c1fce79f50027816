//! Networks whose answers depend on the picture, the program that is asked, and what it should say.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use assert_cmd::assert::Assert;
use candle_cnn::Mode;
use candle_core::{Device, Result, Tensor, Var};
use cifar_data::{CLASSES, ImageSet, SIDE, Split};
use inception_model::{CifarConfig, CifarGoogLeNet, Init};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::Value;
use trainer::Model;
use transfer_common::{Network, NetworkSettings, Trained};

/// The program, asked of these weights.
pub(crate) fn predict(weights: &Path) -> Command {
    let path = env!("CARGO_BIN_EXE_predict");
    let mut command = Command::from_std(test_support::program(path, ""));
    command.arg("--weights").arg(weights);
    command
}

/// What is on standard output, which must be JSON line by line.
pub(crate) fn json_lines(run: &Assert) -> Vec<Value> {
    let said = String::from_utf8(run.get_output().stdout.clone()).unwrap();
    let lines = said.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The first pictures of `--evaluate shapes`.
pub(crate) fn shapes(count: usize) -> ImageSet {
    cifar_data::shapes::generate(0, Split::Test, count)
}

/// What a network of ours is to see of them: values from −1 to 1.
fn tensor(set: &ImageSet) -> Tensor {
    let pixels = set.pixels().iter();
    let pixels: Vec<f32> = pixels
        .map(|&x| (f32::from(x) / 255.0 - 0.5) / 0.5)
        .collect();
    Tensor::from_vec(pixels, (set.len(), 3, SIDE, SIDE), &Device::Cpu).unwrap()
}

/// The lesson's network with random weights, whose head answers by what `images` differ in.
fn discerning(images: &Tensor) -> Result<CifarGoogLeNet> {
    let config = CifarConfig {
        init: Init::Centred,
        ..CifarConfig::default()
    };
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let network = CifarGoogLeNet::new(&config, &Device::Cpu, &mut rng)?;
    let parameters: HashMap<_, _> = network.named_parameters().into_iter().collect();
    let (weight, bias) = (&parameters["fc.weight"], &parameters["fc.bias"]);
    let seeded = test_support::seeded_weight("fc.weight", weight.dims());
    weight.set(&Tensor::from_vec(seeded, weight.dims(), &Device::Cpu)?)?;
    // Logits of mean 0 and variance 1.
    let logits = network.infer(images)?;
    let mean = logits.mean(0)?;
    let variance = logits.broadcast_sub(&mean)?.sqr()?.mean_all()?;
    let scale = f64::from(variance.to_scalar::<f32>()?).powf(-0.5);
    weight.set(&(weight.as_detached_tensor() * scale)?)?;
    bias.set(&(mean * -scale)?)?;
    Ok(network)
}

/// Weights in `dir` of [`discerning`], and the probabilities that it gives each picture of `set`.
pub(crate) fn discerned(dir: &Path, set: &ImageSet) -> (PathBuf, Vec<Vec<f64>>) {
    let images = tensor(set);
    let network = discerning(&images).unwrap();
    let metadata = [("class_names", "shapes")];
    let weights = save(dir, network.named_parameters(), &metadata);
    (weights, probabilities(&network.infer(&images).unwrap()))
}

/// Writes a state as safetensors into `dir`.
fn save(dir: &Path, state: Vec<(String, Var)>, metadata: &[(&str, &str)]) -> PathBuf {
    let path = dir.join("weights.safetensors");
    let tensors = state
        .into_iter()
        .map(|(name, var)| (name, var.as_detached_tensor()));
    let metadata = metadata.iter().map(|(k, v)| (k.to_string(), v.to_string()));
    safetensors::serialize_to_file(tensors, Some(metadata.collect()), &path).unwrap();
    path
}

/// The probabilities of the classes, from each row of logits.
fn probabilities(logits: &Tensor) -> Vec<Vec<f64>> {
    let softmax = |row: Vec<f32>| {
        let exponentials = row.into_iter().map(|logit| f64::from(logit).exp());
        let exponentials: Vec<f64> = exponentials.collect();
        let sum: f64 = exponentials.iter().sum();
        exponentials.into_iter().map(|e| e / sum).collect()
    };
    let rows = logits.to_vec2::<f32>().unwrap();
    rows.into_iter().map(softmax).collect()
}

/// The class of highest probability.
pub(crate) fn likeliest(probabilities: &[f64]) -> usize {
    let indices = 0..probabilities.len();
    indices
        .max_by(|&a, &b| probabilities[a].total_cmp(&probabilities[b]))
        .unwrap()
}

/// What a picture is, in full.
pub(crate) const ALL_CLASSES: [&str; 3] = ["--json", "--top", "10"];

/// Asserts that a line of JSON has these probabilities.
#[track_caller]
pub(crate) fn assert_predicts(line: &Value, expected: &[f64], tolerance: f64) {
    let guesses = line["predictions"].as_array().unwrap();
    assert_eq!(guesses.len(), expected.len());
    assert_eq!(guesses[0]["index"], likeliest(expected), "{line}");
    for guess in guesses {
        let index = guess["index"].as_u64().unwrap();
        let expected = expected[index as usize];
        let difference = guess["probability"].as_f64().unwrap() - expected;
        assert!(difference.abs() < tolerance, "{expected} in {line}");
    }
}

/// Writes a picture as a PNG.
pub(crate) fn draw(path: &Path, image: &[u8]) {
    let plane = SIDE * SIDE;
    let pixels: Vec<u8> = (0..plane)
        .flat_map(|pixel| [0, 1, 2].map(|channel| image[channel * plane + pixel]))
        .collect();
    let side = SIDE as u32;
    image::save_buffer(path, &pixels, side, side, image::ColorType::Rgb8).unwrap();
}

/// Weights in `dir` of torchvision's network, random and with batch norms as they begin, with what they say of pictures; and the
/// probabilities that it gives each picture of `set`.
pub(crate) fn seeded(
    dir: &Path,
    set: &ImageSet,
    (transform_input, image_size): (&str, &str),
) -> (PathBuf, Vec<Vec<f64>>) {
    let settings = NetworkSettings {
        classes: CLASSES,
        transform_input: transform_input == "true",
        image_size: Some(image_size.parse().unwrap()),
        dropout: 0.0,
        aux_heads: false,
        trained: Trained::Everything,
        class_names: "shapes".into(),
    };
    let network = Network::new(settings, 0, &Device::Cpu).unwrap();
    for (name, weight) in network.named_parameters() {
        if weight.rank() > 1 {
            let values = test_support::seeded_weight(&name, weight.dims());
            let values = Tensor::from_vec(values, weight.dims(), &Device::Cpu).unwrap();
            weight.set(&values).unwrap();
        }
    }
    let state = [network.named_parameters(), network.named_buffers()].concat();
    let metadata = [
        ("transform_input", transform_input),
        ("image_size", image_size),
    ];
    let weights = save(dir, state, &metadata);
    let logits = network.forward(&tensor(set), Mode::Eval).unwrap();
    (weights, probabilities(&logits))
}
