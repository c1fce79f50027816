//! Real training steps against PyTorch's, from the fixtures that
//! `tools/pytorch/lesson_parity.py` makes: network, loss, gradients and
//! optimiser together.

use candle_cnn::{CrossEntropyConfig, Mode, cross_entropy};
use candle_core::{Device, Result, Tensor};
use inception_model::{CifarConfig, CifarGoogLeNet};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use test_support::{Fixture, seeded_indices, seeded_values, seeded_weight};
use trainer::{Sgd, SgdConfig};

fn fixture(name: &str) -> Fixture {
    let folder = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../crates/inception-model/tests/fixtures"
    );
    Fixture::load(format!("{folder}/{name}.safetensors"))
}

/// The losses of `steps` SGD steps with momentum 0.9, each taken before the step.
fn train(
    net: &CifarGoogLeNet,
    lr: f64,
    steps: usize,
    batch: impl Fn(usize) -> Result<(Tensor, Tensor)>,
) -> Result<Vec<f64>> {
    let config = SgdConfig {
        lr,
        momentum: 0.9,
        ..SgdConfig::default()
    };
    let mut optimizer = Sgd::new(net.named_parameters(), config).expect("valid settings");
    let mut losses = Vec::with_capacity(steps);
    for step in 0..steps {
        let (images, labels) = batch(step)?;
        let dropout_seed = step as u64;
        let logits = net.forward(&images, Mode::Train { dropout_seed })?;
        let loss = cross_entropy(&logits, &labels, CrossEntropyConfig::default())?;
        optimizer.step(&loss.backward()?, lr)?;
        losses.push(f64::from(loss.to_scalar::<f32>()?));
    }
    Ok(losses)
}

fn labels(name: &str, count: usize) -> Result<Tensor> {
    Tensor::from_vec(seeded_indices(name, count, 10), count, &Device::Cpu)
}

#[test]
fn first_steps_from_seeded_weights_follow_pytorchs_losses() -> Result<()> {
    let config = CifarConfig {
        dropout: 0.0,
        ..CifarConfig::default()
    };
    let net = CifarGoogLeNet::new(&config, &Device::Cpu, &mut ChaCha8Rng::seed_from_u64(0))?;
    for (name, parameter) in net.named_parameters() {
        let values = seeded_weight(&name, parameter.dims());
        parameter.set(&Tensor::from_vec(values, parameter.shape(), &Device::Cpu)?)?;
    }
    let fixture = fixture("lesson_net");
    let lr = fixture.json("training")["lr"]
        .as_f64()
        .expect("a learning rate");
    let losses = train(&net, lr, 5, |step| {
        let images = seeded_values(&format!("input.{step}"), 8 * 3 * 32 * 32, 2.0);
        let images = Tensor::from_vec(images, (8, 3, 32, 32), &Device::Cpu)?;
        Ok((images, labels(&format!("labels.{step}"), 8)?))
    })?;
    let expected = fixture.tensor("training.losses").to_vec1::<f64>()?;
    assert_eq!(losses.len(), expected.len());
    for (step, (loss, expected)) in losses.iter().zip(&expected).enumerate() {
        let error = (loss / expected - 1.0).abs();
        let tolerance = if step == 0 { 1e-4 } else { 1e-3 };
        assert!(
            error <= tolerance,
            "step {step}: {loss}, PyTorch {expected}"
        );
    }
    Ok(())
}

#[test]
fn losses_from_the_lessons_initialisation_lie_within_the_spread_of_pytorchs() -> Result<()> {
    let fixture = fixture("lesson_initialisation");
    let expected = fixture.tensor("losses").to_vec2::<f32>()?;
    let net = CifarGoogLeNet::new(
        &CifarConfig::default(),
        &Device::Cpu,
        &mut ChaCha8Rng::seed_from_u64(0),
    )?;
    let losses = train(&net, 1e-4, expected[0].len(), |step| {
        // Flat squares of 4×4 pixels.
        let values = seeded_values(&format!("blocks.{step}"), 32 * 3 * 8 * 8, 2.0);
        let blocks = Tensor::from_vec(values, (32, 3, 8, 1, 8, 1), &Device::Cpu)?;
        let images = blocks.broadcast_as((32, 3, 8, 4, 8, 4))?;
        let images = images.contiguous()?.reshape((32, 3, 32, 32))?;
        Ok((images, labels(&format!("labels.blocks.{step}"), 32)?))
    })?;
    println!("losses: {losses:.4?}");
    // Four seeds are a thin sample of a wide distribution: a fifth run leaves
    // their range at some steps, as each of PyTorch's leaves that of the other
    // three. So a step may leave it by the range's own logarithmic width.
    for (step, loss) in losses.iter().enumerate() {
        let logs: Vec<f64> = expected
            .iter()
            .map(|run| f64::from(run[step]).ln())
            .collect();
        let low = logs.iter().copied().fold(f64::INFINITY, f64::min);
        let high = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (loss, width) = (loss.ln(), high - low);
        assert!(
            (low - width..=high + width).contains(&loss),
            "step {step}: {:.4}, PyTorch {:.4} to {:.4}",
            loss.exp(),
            low.exp(),
            high.exp()
        );
    }
    Ok(())
}
