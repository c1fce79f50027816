//! What torchvision's GoogLeNet promises beyond its agreement with PyTorch.

use candle_cnn::{CrossEntropyConfig, Mode, cross_entropy};
use candle_core::{DType, Device, Result, Tensor, Var};
use inception_model::{
    FrozenBatchNorm, GoogLeNet, GoogLeNetConfig, LARGEST_OF_ONE_PIXEL, SMALLEST_IMAGE,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use test_support::seeded_values;

const TRAIN: Mode = Mode::Train { dropout_seed: 0 };

fn config(aux_heads: bool) -> GoogLeNetConfig {
    GoogLeNetConfig {
        num_classes: 10,
        aux_heads,
        transform_input: true,
        ..GoogLeNetConfig::default()
    }
}

fn net_of(config: &GoogLeNetConfig) -> Result<GoogLeNet> {
    GoogLeNet::new(config, &Device::Cpu, &mut ChaCha8Rng::seed_from_u64(1))
}

fn net(aux_heads: bool) -> Result<GoogLeNet> {
    net_of(&config(aux_heads))
}

fn images(count: usize, height: usize, width: usize) -> Result<Tensor> {
    let values = seeded_values("images", count * 3 * height * width, 2.0);
    Tensor::from_vec(values, (count, 3, height, width), &Device::Cpu)
}

fn values(vars: &[(String, Var)]) -> Result<Vec<Vec<f32>>> {
    let flat = vars.iter().map(|(_, var)| {
        let var = var.as_detached_tensor().to_dtype(DType::F32)?;
        var.flatten_all()?.to_vec1()
    });
    flat.collect()
}

#[test]
fn images_below_15x15_are_refused_with_their_size_and_15x15_pass() -> Result<()> {
    let net = net(true)?;
    for (height, width) in [(14, 15), (40, 14), (0, 0)] {
        let error = net.forward(&images(2, height, width)?, TRAIN).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&format!("{height}×{width} pixels")), "{text}");
        assert!(text.contains("from 15×15"), "{text}");
    }
    let outputs = net.forward(&images(2, 15, 15)?, TRAIN)?;
    assert_eq!(outputs.logits.dims(), [2, 10]);
    assert_eq!(outputs.aux1.map(|t| t.dims().to_vec()), Some(vec![2, 10]));
    Ok(())
}

#[test]
fn other_ranks_channels_and_a_single_small_image_in_training_are_errors() -> Result<()> {
    let net = net(false)?;
    for dims in [vec![3, 32, 32], vec![1, 4, 32, 32]] {
        let images = Tensor::zeros(dims.as_slice(), DType::F32, &Device::Cpu)?;
        assert!(net.forward(&images, Mode::Eval).is_err(), "{dims:?}");
    }
    let text = net
        .forward(&images(1, 32, 32)?, TRAIN)
        .unwrap_err()
        .to_string();
    assert!(text.contains("more than one value per channel"), "{text}");
    assert!(net.forward(&images(1, 32, 32)?, Mode::Eval).is_ok());
    Ok(())
}

#[test]
fn a_single_image_has_a_variance_to_the_end_from_the_first_size_beyond_one_pixel() -> Result<()> {
    let net = net(false)?;
    for size in [SMALLEST_IMAGE, 32, 33, LARGEST_OF_ONE_PIXEL] {
        let error = net.forward(&images(1, size, size)?, TRAIN).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("more than one value per channel"),
            "{size}: {text}"
        );
    }
    let size = LARGEST_OF_ONE_PIXEL + 1;
    assert_eq!(
        net.forward(&images(1, size, size)?, TRAIN)?.logits.dims(),
        [1, 10]
    );
    Ok(())
}

#[test]
fn frozen_backbone_is_not_tracked_and_gets_no_gradient() -> Result<()> {
    let mut net = net(true)?;
    net.freeze_backbone(FrozenBatchNorm::Moving);
    let images = images(4, 32, 32)?;
    assert!(!net.features(&images, TRAIN)?.track_op());
    let outputs = net.forward(&images, TRAIN)?;
    assert!(outputs.aux1.is_none() && outputs.aux2.is_none());
    let labels = Tensor::zeros(4, DType::U32, &Device::Cpu)?;
    let loss = cross_entropy(&outputs.logits, &labels, CrossEntropyConfig::default())?;
    let gradients = loss.backward()?;
    for (name, parameter) in net.named_parameters() {
        let has_gradient = gradients.get(&parameter).is_some();
        assert_eq!(has_gradient, net.is_trainable(&name), "{name}");
        assert_eq!(has_gradient, name.starts_with("fc."), "{name}");
    }
    Ok(())
}

#[test]
fn statistics_of_a_frozen_backbone_move_or_stay_as_asked() -> Result<()> {
    for (batch_norm, moves) in [
        (FrozenBatchNorm::Moving, true),
        (FrozenBatchNorm::Eval, false),
    ] {
        let mut net = net(false)?;
        net.freeze_backbone(batch_norm);
        let before = values(&net.named_buffers())?;
        let images = images(4, 32, 32)?;
        let trained = net.features(&images, TRAIN)?.to_vec2::<f32>()?;
        let after = values(&net.named_buffers())?;
        let moved = before.iter().zip(&after).filter(|(b, a)| b != a).count();
        assert_eq!(moved, if moves { before.len() } else { 0 });
        let evaluated = net.features(&images, Mode::Eval)?.to_vec2::<f32>()?;
        assert_eq!(trained == evaluated, !moves, "{batch_norm:?}");
        assert_eq!(
            values(&net.named_buffers())?,
            after,
            "evaluation moved them"
        );
    }
    Ok(())
}

#[test]
fn freezing_changes_neither_features_nor_statistics_of_training() -> Result<()> {
    let (free, mut frozen) = (net(false)?, net(false)?);
    frozen.freeze_backbone(FrozenBatchNorm::Moving);
    let images = images(4, 40, 33)?;
    let features = |net: &GoogLeNet| net.features(&images, TRAIN)?.to_vec2::<f32>();
    assert_eq!(features(&free)?, features(&frozen)?);
    let buffers = (
        values(&free.named_buffers())?,
        values(&frozen.named_buffers())?,
    );
    assert_eq!(buffers.0, buffers.1);
    Ok(())
}

#[test]
fn a_fresh_head_is_nn_linears_and_leaves_the_backbone_alone() -> Result<()> {
    let mut net = net(true)?;
    let before = net.named_parameters();
    net.reset_head(7, &mut ChaCha8Rng::seed_from_u64(2))?;
    for ((name, old), (_, new)) in before.iter().zip(net.named_parameters()) {
        let fresh = name.starts_with("fc.") || name.contains(".fc2.");
        assert_eq!(old.id() != new.id(), fresh, "{name}");
        if fresh {
            assert_eq!(new.dims()[0], 7, "{name}");
            // U(±1/√1024): the bound, and its standard deviation of bound/√3.
            let values = new.flatten_all()?.to_vec1::<f32>()?;
            assert!(values.iter().all(|v| v.abs() <= 1.0 / 32.0), "{name}");
            let square: f32 = values.iter().map(|v| v * v).sum();
            let std = (square / values.len() as f32).sqrt() * 32.0;
            let tolerance = if values.len() > 7 { 0.02 } else { 0.4 };
            assert!((std - 1.0 / 3f32.sqrt()).abs() < tolerance, "{name}: {std}");
        }
    }
    assert_eq!(net.config().num_classes, 7);
    let outputs = net.forward(&images(2, 32, 32)?, TRAIN)?;
    let classes = |t: Option<Tensor>| t.map(|t| t.dims()[1]);
    assert_eq!(outputs.logits.dims()[1], 7);
    assert_eq!(
        (classes(outputs.aux1), classes(outputs.aux2)),
        (Some(7), Some(7))
    );
    Ok(())
}

#[test]
fn initialisation_is_torchvisions() -> Result<()> {
    let net = net(true)?;
    for (name, parameter) in net.named_parameters() {
        let values = parameter.flatten_all()?.to_vec1::<f32>()?;
        let square: f64 = values.iter().map(|&v| f64::from(v).powi(2)).sum();
        let std = (square / values.len() as f64).sqrt();
        match name.rsplit_once('.') {
            Some((layer, "weight")) if layer.ends_with(".bn") => {
                assert!(values.iter().all(|&v| v == 1.0), "{name}");
            }
            Some((layer, "bias")) if layer.ends_with(".bn") => assert_eq!(std, 0.0, "{name}"),
            Some((_, "weight")) => assert!((std / 0.01 - 1.0).abs() < 0.06, "{name}: {std}"),
            // Of fc, fc1 and fc2: nn.Linear's bound.
            _ => {
                let bound = if name.contains("fc1") {
                    2048f64
                } else {
                    1024.0
                }
                .sqrt()
                .recip();
                assert!(std > 0.0 && values.iter().all(|&v| f64::from(v).abs() <= bound));
            }
        }
    }
    Ok(())
}

/// Logits of the head and of the auxiliary heads 1 and 2, in training.
fn train(net: &GoogLeNet, dropout_seed: u64) -> Result<[Vec<Vec<f32>>; 3]> {
    let outputs = net.forward(&images(4, 32, 32)?, Mode::Train { dropout_seed })?;
    let of = |logits: Option<Tensor>| logits.expect("an auxiliary head").to_vec2::<f32>();
    Ok([
        outputs.logits.to_vec2()?,
        of(outputs.aux1)?,
        of(outputs.aux2)?,
    ])
}

#[test]
fn each_dropout_has_a_mask_of_its_own_that_follows_the_seed() -> Result<()> {
    let net = net_of(&GoogLeNetConfig {
        dropout: 0.5,
        dropout_aux: 0.5,
        ..config(true)
    })?;
    // Every head sees 1024 ones, and has the same weights: masks alone tell them apart.
    let of_last_block = ["branch1", "branch2.1", "branch3.1", "branch4.1"];
    let of_last_block = of_last_block.map(|branch| format!("inception5b.{branch}.bn"));
    let head = Tensor::from_vec(
        seeded_values("head", 10 * 1024, 2.0),
        (10, 1024),
        &Device::Cpu,
    )?;
    for (name, parameter) in net.named_parameters() {
        let (layer, field) = name.rsplit_once('.').expect("a layer and its field");
        let is_before_a_head =
            layer.ends_with(".fc1") || of_last_block.iter().any(|bn| bn == layer);
        match (is_before_a_head, field) {
            (true, "weight") => parameter.set(&parameter.zeros_like()?)?,
            (true, _) => parameter.set(&parameter.ones_like()?)?,
            (false, "weight") if GoogLeNet::is_head(&name) => parameter.set(&head)?,
            (false, _) if GoogLeNet::is_head(&name) => parameter.set(&parameter.zeros_like()?)?,
            _ => (),
        }
    }
    let (first, again, other) = (train(&net, 1)?, train(&net, 1)?, train(&net, 2)?);
    assert_eq!(first, again);
    for (first, other) in first.iter().zip(&other) {
        assert_ne!(first, other);
    }
    let [main, aux1, aux2] = first;
    assert!(main != aux1 && main != aux2 && aux1 != aux2);
    Ok(())
}

#[test]
fn a_dropout_of_all_leaves_its_own_heads_their_biases_and_the_others_as_they_are() -> Result<()> {
    let with = |dropout, dropout_aux| {
        net_of(&GoogLeNetConfig {
            dropout,
            dropout_aux,
            ..config(true)
        })
    };
    let [main, aux1, aux2] = train(&with(0.0, 0.0)?, 1)?;
    let net = with(0.0, 1.0)?;
    let biases = ["fc.bias", "aux1.fc2.bias", "aux2.fc2.bias"].map(|name| {
        let mut parameters = net.named_parameters().into_iter();
        let (_, bias) = parameters.find(|(of, _)| of == name).expect("a head");
        let bias = bias.to_vec1::<f32>().expect("one value a class");
        vec![bias; 4]
    });
    let [of_main, of_aux1, of_aux2] = biases;
    assert!(main != of_main && aux1 != of_aux1 && aux2 != of_aux2);
    assert_eq!(train(&net, 1)?, [main, of_aux1, of_aux2]);
    assert_eq!(train(&with(1.0, 0.0)?, 1)?, [of_main, aux1, aux2]);
    Ok(())
}

#[test]
fn another_float_type_shares_no_parameter_and_no_buffer_with_the_first() -> Result<()> {
    let net = net(false)?;
    for dtype in [DType::F32, DType::F64] {
        let copy = net.to_dtype(dtype)?;
        let before = values(&net.named_buffers())?;
        copy.forward(&images(4, 32, 32)?.to_dtype(dtype)?, TRAIN)?;
        assert_eq!(values(&net.named_buffers())?, before);
        assert_ne!(values(&copy.named_buffers())?, before);
        let before = values(&net.named_parameters())?;
        for (_, copied) in copy.named_parameters() {
            copied.set(&copied.ones_like()?)?;
        }
        assert_eq!(values(&net.named_parameters())?, before);
    }
    Ok(())
}
