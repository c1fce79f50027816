//! The lesson's net against PyTorch's, from the same seeded weights: logits,
//! every stage's output, every parameter's gradient. The fixture and its rules
//! are `tools/pytorch/lesson_parity.py`'s.

use candle_cnn::{CrossEntropyConfig, Mode, cross_entropy};
use candle_core::{DType, Device, Result, Tensor};
use inception_model::{CifarConfig, CifarGoogLeNet};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use test_support::{Fixture, assert_close, seeded_indices, seeded_values, seeded_weight};

/// In training mode, but without dropout.
const TRAIN: Mode = Mode::Train { dropout_seed: 0 };

fn fixture() -> Fixture {
    Fixture::load(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/lesson_net.safetensors"
    ))
}

fn seeded_net(dtype: DType) -> Result<CifarGoogLeNet> {
    let config = CifarConfig {
        dropout: 0.0,
        ..CifarConfig::default()
    };
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let net = CifarGoogLeNet::new(&config, &Device::Cpu, &mut rng)?;
    for (name, parameter) in net.named_parameters() {
        let values = seeded_weight(&name, parameter.dims());
        parameter.set(&Tensor::from_vec(values, parameter.shape(), &Device::Cpu)?)?;
    }
    net.to_dtype(dtype)
}

fn images(name: &str, count: usize, size: usize, dtype: DType) -> Result<Tensor> {
    let values = seeded_values(name, count * 3 * size * size, 2.0);
    Tensor::from_vec(values, (count, 3, size, size), &Device::Cpu)?.to_dtype(dtype)
}

fn labels(count: usize) -> Result<Tensor> {
    Tensor::from_vec(seeded_indices("labels", count, 10), count, &Device::Cpu)
}

/// Elements of a flattened tensor at the fixture's positions for `name`.
fn values_at(name: &str, tensor: &Tensor, count: usize) -> Result<Tensor> {
    let positions = seeded_indices(
        &format!("positions.{name}"),
        count,
        tensor.elem_count() as u64,
    );
    let positions = Tensor::from_vec(positions, count, &Device::Cpu)?;
    tensor.flatten_all()?.index_select(&positions, 0)
}

fn norm(tensor: &Tensor) -> Result<f64> {
    tensor
        .to_dtype(DType::F64)?
        .sqr()?
        .sum_all()?
        .sqrt()?
        .to_scalar()
}

/// Runs the net on the fixture's images under `prefix` and compares everything.
fn check(prefix: &str, images: &Tensor, tolerance: f64, gradient_tolerance: f64) -> Result<()> {
    let fixture = fixture();
    let expected = |name: &str| fixture.tensor(&format!("{prefix}{name}")).clone();
    let net = seeded_net(images.dtype())?;
    let mut stages = 0;
    let logits = net.forward_observed(images, TRAIN, |stage, output| {
        let expected_norm = expected(&format!("{stage}.norm")).to_scalar::<f64>()?;
        let error = (norm(output)? / expected_norm - 1.0).abs();
        assert!(error <= tolerance, "{stage}: norm off by {error:.2e}");
        let values = values_at(stage, output, 16)?;
        assert_close(
            stage,
            &values,
            &expected(&format!("{stage}.values")),
            tolerance,
        );
        stages += 1;
        Ok(())
    })?;
    assert_eq!(stages, 13, "pre_layers, nine blocks, two pools, avgpool");
    assert_close("logits", &logits, &expected("logits"), tolerance);

    let loss = cross_entropy(
        &logits,
        &labels(images.dim(0)?)?,
        CrossEntropyConfig::default(),
    )?;
    assert_close("loss", &loss, &expected("loss"), tolerance);
    let gradients = loss.backward()?;
    for (name, parameter) in net.named_parameters() {
        let Some(gradient) = gradients.get(&parameter) else {
            panic!("{name} has no gradient");
        };
        let key = format!("grad.{name}");
        if gradient.elem_count() <= 512 {
            assert_close(&name, gradient, &expected(&key), gradient_tolerance);
            continue;
        }
        let expected_norm = expected(&format!("{key}.norm")).to_scalar::<f64>()?;
        let projections = expected(&format!("{key}.projections")).to_vec1::<f64>()?;
        let flat = gradient
            .flatten_all()?
            .to_dtype(DType::F64)?
            .to_vec1::<f64>()?;
        let mut squared = 0.0;
        for (k, expected) in projections.iter().enumerate() {
            let direction = seeded_values(&format!("projection.{k}.{name}"), flat.len(), 2.0);
            let projection: f64 = flat
                .iter()
                .zip(&direction)
                .map(|(g, &d)| g * f64::from(d))
                .sum();
            squared += (projection - expected).powi(2);
        }
        // An unbiased estimate of the whole gradient's relative error.
        let error = (3.0 * squared / projections.len() as f64).sqrt() / expected_norm;
        assert!(
            error <= gradient_tolerance,
            "{name}: gradient off by {error:.2e}"
        );
        let norm_error = (norm(gradient)? / expected_norm - 1.0).abs();
        assert!(
            norm_error <= gradient_tolerance,
            "{name}: norm off by {norm_error:.2e}"
        );
    }
    Ok(())
}

#[test]
fn f64_agrees_with_pytorch_on_32x32_pictures() -> Result<()> {
    // The fixture keeps single values in f32.
    check("", &images("input", 2, 32, DType::F64)?, 1e-7, 1e-6)
}

#[test]
fn f32_logits_agree_with_pytorch_on_32x32_pictures() -> Result<()> {
    let net = seeded_net(DType::F32)?;
    let logits = net.forward(&images("input", 2, 32, DType::F32)?, TRAIN)?;
    assert_close("logits", &logits, fixture().tensor("logits"), 1e-5);
    Ok(())
}

#[test]
fn f32_gradients_agree_with_pytorch_away_from_kinks() -> Result<()> {
    let name = fixture().text("small_images").to_owned();
    check("small.", &images(&name, 2, 8, DType::F32)?, 1e-5, 1e-4)
}

#[test]
fn names_shapes_and_order_are_those_of_pytorchs_state_dict() -> Result<()> {
    let net = seeded_net(DType::F32)?;
    let ours: Vec<(String, Vec<usize>)> = net
        .named_parameters()
        .into_iter()
        .map(|(name, parameter)| (name, parameter.dims().to_vec()))
        .collect();
    let theirs: Vec<(String, Vec<usize>)> =
        serde_json::from_value(fixture().json("parameters")).expect("a list of names and shapes");
    assert_eq!(ours, theirs);
    assert_eq!(net.parameter_count(), 5_864_762);
    Ok(())
}

#[test]
fn summary_adds_up_to_the_network() -> Result<()> {
    let net = seeded_net(DType::F32)?;
    let summary = net.summary(32, 32);
    assert_eq!(summary.parameters(), 5_864_762);
    // Counted from the table independently: Σ pixels · C_in · C_out · kernel area.
    assert_eq!(summary.macs(), 1_447_241_728);
    let shape_of = |layer: &str| {
        let row = summary.rows.iter().find(|row| row.layer == layer);
        row.map(|row| row.output.clone()).unwrap_or_default()
    };
    let images = images("input", 1, 32, DType::F32)?;
    net.forward_observed(&images, Mode::Eval, |stage, output| {
        assert_eq!(shape_of(stage), output.dims()[1..], "{stage}");
        Ok(())
    })?;
    assert!(
        summary.to_string().contains("64+128+32+32 = 256"),
        "{summary}"
    );
    Ok(())
}
