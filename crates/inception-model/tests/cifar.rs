//! What the lesson's GoogLeNet promises beyond its agreement with PyTorch.

use std::f64::consts::PI;

use candle_cnn::{Mode, dropout, linear};
use candle_core::{DType, Device, Result, Tensor, Var};
use inception_model::{CifarConfig, CifarGoogLeNet, Init};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use test_support::{assert_close, seeded_values};

fn net(init: Init) -> Result<CifarGoogLeNet> {
    let config = CifarConfig {
        init,
        ..CifarConfig::default()
    };
    CifarGoogLeNet::new(&config, &Device::Cpu, &mut ChaCha8Rng::seed_from_u64(1))
}

fn images() -> Result<Tensor> {
    let values = seeded_values("images", 3 * 3 * 32 * 32, 2.0);
    Tensor::from_vec(values, (3, 3, 32, 32), &Device::Cpu)
}

fn parameter(net: &CifarGoogLeNet, name: &str) -> Var {
    let mut parameters = net.named_parameters().into_iter();
    let found = parameters.find(|(of, _)| of == name);
    found.expect("a parameter of that name").1
}

#[test]
fn infer_gives_the_bits_of_evaluation_and_tracks_nothing() -> Result<()> {
    let (net, images) = (net(Init::Lesson)?, images()?);
    let inferred = net.infer(&images)?;
    assert!(!inferred.track_op());
    let evaluated = net.forward(&images, Mode::Eval)?;
    assert_eq!(inferred.to_vec2::<f32>()?, evaluated.to_vec2::<f32>()?);
    Ok(())
}

#[test]
fn training_drops_two_fifths_of_the_features_by_the_seed_and_evaluation_none() -> Result<()> {
    let (net, images) = (net(Init::Lesson)?, images()?);
    let [weight, bias] = ["fc.weight", "fc.bias"].map(|name| parameter(&net, name));
    bias.set(&Tensor::from_vec(
        seeded_values("bias", 10, 1.0),
        10,
        &Device::Cpu,
    )?)?;
    let mut all = Vec::new();
    for mode in [1, 2]
        .map(|dropout_seed| Mode::Train { dropout_seed })
        .into_iter()
        .chain([Mode::Eval])
    {
        let mut features = None;
        let logits = net.forward_observed(&images, mode, |stage, x| {
            if stage == "avgpool" {
                features = Some(x.clone());
            }
            Ok(())
        })?;
        let features = dropout(&features.expect("a last stage"), 0.4, 0, mode)?;
        let expected = linear(&features, &weight, Some(&bias))?;
        let what = format!("{mode:?}");
        assert_close(&what, &logits, &expected, 0.0);
        assert_close(&what, &net.forward(&images, mode)?, &expected, 1e-5);
        all.push(expected.to_vec2::<f32>()?);
    }
    assert!(all[0] != all[1] && all[0] != all[2] && all[1] != all[2]);
    Ok(())
}

#[test]
fn each_initialisation_has_the_standard_deviations_it_says() -> Result<()> {
    for init in [Init::Lesson, Init::FanIn, Init::Centred] {
        let net = net(init)?;
        for (name, parameter) in net.named_parameters() {
            let what = format!("{init:?} {name}");
            let values = parameter.flatten_all()?.to_vec1::<f32>()?;
            let mean_square =
                values.iter().map(|v| f64::from(v * v)).sum::<f64>() / values.len() as f64;
            if name == "fc.bias" || (name == "fc.weight" && init == Init::Centred) {
                assert_eq!(mean_square, 0.0, "{what}");
            } else if let [fan_out, fan_in @ ..] = parameter.dims()
                && !fan_in.is_empty()
            {
                let fan_out = fan_out * fan_in[1..].iter().product::<usize>();
                let fan_in = fan_in.iter().product::<usize>();
                let variance = match init {
                    Init::Lesson => 2.0 / fan_out as f64,
                    Init::FanIn => 2.0 / fan_in as f64,
                    Init::Centred => 2.0 / (1.0 - 1.0 / PI) / fan_in as f64,
                };
                let ratio = (mean_square / variance).sqrt();
                assert!((ratio - 1.0).abs() < 0.06, "{what}: {ratio}");
            } else {
                let weight = self::parameter(&net, &name.replace("bias", "weight"));
                let fan_in: usize = weight.dims()[1..].iter().product();
                let bound = 1.0 / (fan_in as f64).sqrt();
                assert!(values.iter().all(|v| f64::from(v.abs()) <= bound), "{what}");
                assert!(mean_square.sqrt() > bound * 0.3, "{what}");
            }
        }
    }
    Ok(())
}

#[test]
fn each_filter_of_the_centred_initialisation_sums_to_zero() -> Result<()> {
    for (name, parameter) in net(Init::Centred)?.named_parameters() {
        if parameter.rank() < 4 {
            continue;
        }
        for filter in parameter.flatten_from(1)?.to_vec2::<f32>()? {
            let sum: f64 = filter.iter().map(|&w| f64::from(w)).sum();
            let magnitude: f64 = filter.iter().map(|&w| f64::from(w.abs())).sum();
            // What rounding to f32 leaves.
            assert!(
                sum.abs() <= magnitude * f64::from(f32::EPSILON),
                "{name}: {sum:e}"
            );
        }
    }
    Ok(())
}

#[test]
fn another_float_type_shares_no_variable_with_the_first() -> Result<()> {
    let net = net(Init::Lesson)?;
    for dtype in [DType::F32, DType::F64] {
        let copy = net.to_dtype(dtype)?;
        let pairs = net.named_parameters().into_iter();
        for ((name, original), (_, copied)) in pairs.zip(copy.named_parameters()) {
            assert_eq!(copied.dtype(), dtype);
            let before = original.flatten_all()?.to_vec1::<f32>()?;
            copied.set(&copied.ones_like()?)?;
            let after = original.flatten_all()?.to_vec1::<f32>()?;
            assert_eq!(before, after, "{name} moved with its copy");
        }
    }
    Ok(())
}
