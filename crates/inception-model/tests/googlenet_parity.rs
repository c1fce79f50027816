//! torchvision's GoogLeNet against PyTorch's, from the same seeded weights:
//! state dict, logits, gradients, training. The fixture and its rules are
//! `tools/pytorch/googlenet_parity.py`'s.

use candle_cnn::{CrossEntropyConfig, Mode, cross_entropy};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use inception_model::{FrozenBatchNorm, GoogLeNet, GoogLeNetConfig};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use test_support::{Fixture, assert_close, seeded_indices, seeded_values, seeded_weight};

/// In training mode; dropout is off in the networks of these tests.
const TRAIN: Mode = Mode::Train { dropout_seed: 0 };
const CLASSES: usize = 10;

fn fixture() -> Fixture {
    Fixture::load(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/googlenet.safetensors"
    ))
}

fn config(aux_heads: bool) -> GoogLeNetConfig {
    GoogLeNetConfig {
        num_classes: CLASSES,
        aux_heads,
        transform_input: true,
        dropout: 0.0,
        dropout_aux: 0.0,
    }
}

fn seeded_net(aux_heads: bool, dtype: DType) -> Result<GoogLeNet> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let net = GoogLeNet::new(&config(aux_heads), &Device::Cpu, &mut rng)?;
    for (name, var) in net
        .named_parameters()
        .into_iter()
        .chain(net.named_buffers())
    {
        let dims = var.dims();
        let seeded = |width| seeded_values(&name, var.elem_count(), width);
        let around = |centre: f32, width| seeded(width).into_iter().map(|v| centre + v).collect();
        let field = name.rsplit('.').next().filter(|_| name.contains(".bn."));
        let values = match field {
            Some("weight" | "running_var") => around(1.0, 0.5),
            Some("bias") => around(0.6, 0.4),
            Some("running_mean") => seeded(0.4),
            Some(_) => {
                var.set(&Tensor::new(3i64, &Device::Cpu)?)?;
                continue;
            }
            None => seeded_weight(&name, dims),
        };
        var.set(&Tensor::from_vec(values, dims, &Device::Cpu)?)?;
    }
    net.to_dtype(dtype)
}

fn images(name: &str, (n, h, w): (usize, usize, usize), dtype: DType) -> Result<Tensor> {
    let values = seeded_values(name, n * 3 * h * w, 2.0);
    Tensor::from_vec(values, (n, 3, h, w), &Device::Cpu)?.to_dtype(dtype)
}

fn labels(name: &str, count: usize) -> Result<Tensor> {
    Tensor::from_vec(
        seeded_indices(name, count, CLASSES as u64),
        count,
        &Device::Cpu,
    )
}

/// Asserts that tensors have the norms and projections of the fixture, in order.
/// The error is taken relative to the tensor, or to `scales` where given.
fn check_fingerprints<'a>(
    fixture: &Fixture,
    prefix: &str,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    scales: Option<&[f64]>,
    tolerance: f64,
) -> Result<()> {
    let norms = fixture
        .tensor(&format!("{prefix}.norms"))
        .to_vec1::<f64>()?;
    let projections = fixture.tensor(&format!("{prefix}.projections"));
    let projections = projections.to_vec2::<f64>()?;
    let mut count = 0;
    let mut worst: (f64, &str) = (0.0, "none");
    for (i, (name, tensor)) in tensors.into_iter().enumerate() {
        count += 1;
        let scale = scales.map_or(norms[i], |scales| scales[i]);
        let values = tensor
            .flatten_all()?
            .to_dtype(DType::F64)?
            .to_vec1::<f64>()?;
        let norm = values.iter().map(|v| v * v).sum::<f64>().sqrt();
        let mut squared = 0.0;
        for (k, expected) in projections[i].iter().enumerate() {
            let direction = seeded_values(&format!("projection.{k}.{name}"), values.len(), 2.0);
            let pairs = values.iter().zip(&direction);
            let projection: f64 = pairs.map(|(v, &d)| v * f64::from(d)).sum();
            squared += (projection - expected).powi(2);
        }
        // An unbiased estimate of the whole tensor's error.
        let error = (3.0 * squared / projections[i].len() as f64).sqrt() / scale;
        let norm_error = (norm - norms[i]).abs() / scale;
        assert!(
            error.is_finite() && norm_error.is_finite(),
            "{prefix}: {name}"
        );
        let error = error.max(norm_error);
        if error > worst.0 {
            worst = (error, name);
        }
    }
    assert_eq!(count, norms.len(), "{prefix}: another number of tensors");
    println!("{prefix}: largest error {:.1e} ({})", worst.0, worst.1);
    let (error, name) = worst;
    assert!(error <= tolerance, "{prefix}: {name} off by {error:.2e}");
    Ok(())
}

fn as_pairs(tensors: &[(String, Var)]) -> impl Iterator<Item = (&str, &Tensor)> {
    tensors
        .iter()
        .map(|(name, var)| (name.as_str(), var.as_tensor()))
}

/// Running means and variances, without the counters.
fn statistics(net: &GoogLeNet) -> Vec<(String, Var)> {
    let mut buffers = net.named_buffers();
    buffers.retain(|(_, buffer)| buffer.dtype() != DType::I64);
    buffers
}

#[test]
fn state_dict_is_that_of_torchvision_in_names_shapes_dtypes_and_order() -> Result<()> {
    let fixture = fixture();
    for (aux, key, count) in [(false, "state_dict", 344), (true, "state_dict_aux", 364)] {
        let theirs: Vec<(String, Vec<usize>, String)> =
            serde_json::from_value(fixture.json(key)).expect("a list of names, shapes, dtypes");
        assert_eq!(theirs.len(), count);
        let name_of = |dtype| match dtype {
            DType::I64 => "int64".to_string(),
            _ => "float32".to_string(),
        };
        let ours: Vec<_> = GoogLeNet::state_dict_shapes(&config(aux))
            .into_iter()
            .map(|(name, shape, dtype)| (name, shape, name_of(dtype)))
            .collect();
        assert_eq!(ours, theirs);

        // The network itself holds exactly these, each kind in their order.
        let net = seeded_net(aux, DType::F32)?;
        let of = |vars: Vec<(String, Var)>| -> Vec<_> {
            vars.into_iter()
                .map(|(name, var)| (name, var.dims().to_vec(), name_of(var.dtype())))
                .collect()
        };
        let (buffers, parameters): (Vec<_>, Vec<_>) = theirs.into_iter().partition(|(name, ..)| {
            name.contains(".running_") || name.ends_with("num_batches_tracked")
        });
        assert_eq!(of(net.named_parameters()), parameters);
        assert_eq!(of(net.named_buffers()), buffers);
    }
    Ok(())
}

#[test]
fn parameters_and_work_are_those_that_torchvision_publishes() -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut config = GoogLeNetConfig::default();
    let net = GoogLeNet::new(&config, &Device::Cpu, &mut rng)?;
    assert_eq!(net.parameter_count(), 6_624_904);
    let summary = net.summary(224, 224);
    assert_eq!(summary.parameters(), 6_624_904);
    assert_eq!(format!("{:.3}", summary.macs() as f64 / 1e9), "1.498");

    config.aux_heads = true;
    let net = GoogLeNet::new(&config, &Device::Cpu, &mut rng)?;
    assert_eq!(net.parameter_count(), 13_004_888);
    assert_eq!(net.summary(224, 224).parameters(), 13_004_888);
    Ok(())
}

#[test]
fn summary_has_the_shapes_that_the_network_makes() -> Result<()> {
    let net = seeded_net(false, DType::F32)?;
    for (h, w) in [(32, 32), (97, 65), (15, 15)] {
        let summary = net.summary(h, w);
        let mut stages = 0;
        net.forward_observed(
            &images("input", (1, h, w), DType::F32)?,
            Mode::Eval,
            |name, x| {
                let row = summary.rows.iter().find(|row| row.layer == name);
                let shape = row.map(|row| row.output.clone());
                assert_eq!(shape.as_deref(), Some(&x.dims()[1..]), "{name} of {h}×{w}");
                stages += 1;
                Ok(())
            },
        )?;
        assert_eq!(
            stages, 17,
            "three convolutions, four pools, nine blocks, avgpool"
        );
    }
    Ok(())
}

#[test]
fn logits_agree_with_pytorch_at_three_sizes_in_both_modes_with_and_without_heads() -> Result<()> {
    let fixture = fixture();
    let sizes = [
        ("224x224", (2, 224, 224)),
        ("32x32", (16, 32, 32)),
        ("97x65", (4, 97, 65)),
    ];
    for (size, shape) in sizes {
        let images = images(&format!("input.{size}"), shape, DType::F32)?;
        for (mode, mode_name) in [(TRAIN, "train"), (Mode::Eval, "eval")] {
            for aux in [false, true] {
                let net = seeded_net(aux, DType::F32)?;
                let outputs = net.forward(&images, mode)?;
                let what = format!("logits.{size}.{mode_name}");
                assert_close(&what, &outputs.logits, fixture.tensor(&what), 1e-5);
                if !mode.is_train() {
                    // The weights of what nobody tracks take another way into the kernels.
                    let inferred = net.infer(&images)?;
                    assert!(!inferred.track_op());
                    assert_close(&what, &inferred, fixture.tensor(&what), 1e-5);
                }
                for (name, output) in [("aux1", &outputs.aux1), ("aux2", &outputs.aux2)] {
                    assert_eq!(output.is_some(), aux && mode.is_train(), "{name} {what}");
                    if let Some(output) = output {
                        let what = format!("{name}.{size}");
                        assert_close(&what, output, fixture.tensor(&what), 1e-5);
                    }
                }
            }
        }
    }
    Ok(())
}

fn loss_of(net: &GoogLeNet, images: &Tensor, labels: &Tensor, mode: Mode) -> Result<Tensor> {
    let outputs = net.forward(images, mode)?;
    let entropy = |logits| cross_entropy(logits, labels, CrossEntropyConfig::default());
    let mut loss = entropy(&outputs.logits)?;
    for aux in [&outputs.aux1, &outputs.aux2].into_iter().flatten() {
        loss = (loss + (entropy(aux)? * 0.3)?)?;
    }
    Ok(loss)
}

/// Compares loss and gradients of one of the fixture's sets.
fn check_gradients(
    set: &str,
    net: &GoogLeNet,
    images: &Tensor,
    mode: Mode,
    (loss_tolerance, tolerance): (f64, f64),
) -> Result<()> {
    let fixture = fixture();
    let loss = loss_of(net, images, &labels("labels", images.dim(0)?)?, mode)?;
    assert_close(
        "loss",
        &loss,
        fixture.tensor(&format!("grad.{set}.loss")),
        loss_tolerance,
    );
    let gradients = loss.backward()?;
    let parameters = net.named_parameters();
    let pairs = parameters.iter().map(|(name, parameter)| {
        let gradient = gradients.get(parameter);
        let gradient = gradient.unwrap_or_else(|| panic!("{name} has no gradient"));
        (name.as_str(), gradient)
    });
    check_fingerprints(&fixture, &format!("grad.{set}"), pairs, None, tolerance)
}

#[test]
fn f64_gradients_with_auxiliary_heads_agree_with_pytorch_and_so_do_the_statistics() -> Result<()> {
    let net = seeded_net(true, DType::F64)?;
    let images = images("input.32x32", (16, 32, 32), DType::F64)?;
    check_gradients("train", &net, &images, TRAIN, (1e-10, 1e-7))?;
    let statistics = statistics(&net);
    check_fingerprints(&fixture(), "statistics", as_pairs(&statistics), None, 1e-10)?;
    for (name, counter) in net.named_buffers() {
        if name.ends_with("num_batches_tracked") {
            assert_eq!(counter.to_scalar::<i64>()?, 4, "{name}");
        }
    }
    Ok(())
}

#[test]
fn gradients_in_evaluation_mode_agree_with_pytorch_in_f64_and_f32() -> Result<()> {
    let name = fixture().text("eval_images").to_owned();
    for (dtype, tolerances) in [(DType::F64, (1e-10, 1e-7)), (DType::F32, (1e-5, 1e-4))] {
        let images = images(&name, (2, 32, 32), dtype)?;
        let net = seeded_net(false, dtype)?;
        check_gradients("eval", &net, &images, Mode::Eval, tolerances)?;
    }
    Ok(())
}

#[test]
fn gradients_in_training_mode_agree_with_pytorch_in_f64_and_f32_away_from_kinks() -> Result<()> {
    let name = fixture().text("small_images").to_owned();
    for (dtype, tolerances) in [(DType::F64, (1e-10, 1e-7)), (DType::F32, (1e-5, 1e-4))] {
        let images = images(&name, (16, 15, 15), dtype)?;
        let net = seeded_net(false, dtype)?;
        check_gradients("small", &net, &images, TRAIN, tolerances)?;
    }
    Ok(())
}

/// PyTorch's SGD, in the few lines that this test needs.
struct Sgd {
    parameters: Vec<(Var, Option<Tensor>)>,
    lr: f64,
    momentum: f64,
}

impl Sgd {
    fn step(&mut self, gradients: &GradStore) -> Result<()> {
        for (parameter, velocity) in &mut self.parameters {
            let gradient = gradients
                .get(parameter)
                .expect("every parameter has a gradient");
            let next = match velocity.take() {
                None => gradient.clone(),
                Some(velocity) => ((velocity * self.momentum)? + gradient)?,
            };
            parameter.set(&(parameter.as_detached_tensor() - (&next * self.lr)?)?)?;
            *velocity = Some(next.detach());
        }
        Ok(())
    }
}

/// The 20 steps of a run; returns the network and the losses.
fn train(run: &str, net: GoogLeNet, dtype: DType) -> Result<(GoogLeNet, Vec<f64>)> {
    let settings = fixture().json("training");
    let number = |value: &serde_json::Value| value.as_f64().expect("a number");
    let batch = number(&settings["batch"]) as usize;
    let mut parameters = net.named_parameters();
    parameters.retain(|(name, _)| net.is_trainable(name));
    let mut sgd = Sgd {
        parameters: parameters.into_iter().map(|(_, p)| (p, None)).collect(),
        lr: number(&settings[run]["lr"]),
        momentum: number(&settings[run]["momentum"]),
    };
    let mut losses = Vec::new();
    for step in 0..number(&settings["steps"]) as usize {
        let images = images(&format!("input.{step}"), (batch, 32, 32), dtype)?;
        let labels = labels(&format!("labels.{step}"), batch)?;
        let loss = loss_of(&net, &images, &labels, TRAIN)?;
        sgd.step(&loss.backward()?)?;
        losses.push(loss.to_dtype(DType::F64)?.to_scalar()?);
    }
    Ok((net, losses))
}

fn check_losses(ours: &[f64], expected: &[f64], tolerance: f64) {
    for (step, (ours, expected)) in ours.iter().zip(expected).enumerate() {
        let error = (ours / expected - 1.0).abs();
        assert!(error <= tolerance, "loss of step {step} off by {error:.2e}");
    }
}

/// Compares the losses, and how far every parameter and statistic has moved.
fn check_training(run: &str, frozen: bool, dtype: DType, tolerance: f64) -> Result<()> {
    let fixture = fixture();
    let mut net = seeded_net(false, dtype)?;
    if frozen {
        net.freeze_backbone(FrozenBatchNorm::Moving);
    }
    let (net, losses) = train(run, net, dtype)?;
    let expected = fixture.tensor(&format!("{run}.losses")).to_vec1::<f64>()?;
    assert_eq!(losses.len(), expected.len());
    check_losses(&losses, &expected, tolerance);
    let mut end = net.named_parameters();
    end.extend(statistics(&net));
    // Relative to the movement, where there was any.
    let moved = fixture.tensor(&format!("{run}.moved")).to_vec1::<f64>()?;
    let scales: Vec<f64> = moved
        .iter()
        .map(|&m| if m > 0.0 { m } else { 1.0 })
        .collect();
    check_fingerprints(&fixture, run, as_pairs(&end), Some(&scales), tolerance)
}

#[test]
fn twenty_steps_of_full_training_agree_with_pytorch_in_f64() -> Result<()> {
    check_training("full", false, DType::F64, 1e-4)
}

#[test]
fn twenty_steps_of_frozen_training_agree_with_pytorch_in_f64_and_f32() -> Result<()> {
    check_training("frozen", true, DType::F64, 1e-8)?;
    check_training("frozen", true, DType::F32, 1e-3)
}

#[test]
#[should_panic(expected = "off by")]
fn one_batch_norm_off_by_a_percent_is_noticed() {
    let name = fixture().text("eval_images").to_owned();
    let net = seeded_net(false, DType::F64).unwrap();
    let (_, scale) = &net.named_parameters()[40];
    scale
        .set(&(scale.as_detached_tensor() * 1.01).unwrap())
        .unwrap();
    let images = images(&name, (2, 32, 32), DType::F64).unwrap();
    check_gradients("eval", &net, &images, Mode::Eval, (1.0, 1e-4)).unwrap();
}
