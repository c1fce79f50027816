//! A graph on CUDA against ordinary operations in f64 on the CPU. Skipped without a GPU.

use candle_core::{DType, Device, Result, Tensor, Var};
use test_support::{devices, relative_error, skipped};

use super::super::tests::{
    EPS, Example, ODD, Stem, WHOLE, composed, example, example_of_widths, parameters, running,
    tensor,
};
use crate::cuda::{F32Math, Settings, set_settings};
use crate::{ConvParameters, MaxPool2dConfig, StaticGraphBuilder};

/// The GPU, where it computes exactly and the same each time, as in all tests of this library.
fn gpu() -> Option<Device> {
    set_settings(Settings {
        convolution: F32Math::Full,
        deterministic: true,
        ..Settings::default()
    });
    devices().into_iter().find(Device::is_cuda)
}

const SIZES: [(usize, (usize, usize)); 4] =
    [(1, (7, 7)), (2, (9, 17)), (3, (33, 6)), (5, (17, 17))];

/// The example's parameters on the device.
fn moved(example: &Example, device: &Device) -> Result<Vec<Vec<Var>>> {
    let of = |vars: &Vec<Var>| {
        vars.iter()
            .map(|v| Var::from_tensor(&v.to_device(device)?))
            .collect()
    };
    example.parameters.iter().map(of).collect()
}

fn close(actual: &Tensor, expected: &Tensor, tolerance: f64, what: &str) -> Result<()> {
    let actual = actual.to_device(&Device::Cpu)?;
    let error = relative_error(&actual, expected)?;
    assert!(error <= tolerance, "{what}: {error:.1e}");
    Ok(())
}

#[test]
fn both_passes_equal_those_of_ordinary_operations() -> Result<()> {
    let Some(gpu) = gpu() else {
        return Ok(());
    };
    for (widths, stem) in [ODD, WHOLE]
        .into_iter()
        .flat_map(|widths| [Stem::Bias, Stem::Norm, Stem::StridedNorm].map(|stem| (widths, stem)))
    {
        for (batch, size) in SIZES {
            if stem != Stem::Bias && batch == 1 {
                continue;
            }
            for ceil_mode in [false, true] {
                let what =
                    |of: &str| format!("{widths:?} {stem:?} {batch} {size:?} {ceil_mode}: {of}");
                let exact = example_of_widths::<f64>(widths, stem, batch, size, ceil_mode);
                let images = Var::from_tensor(&exact.images)?;
                let expected = composed(stem, &images, &exact.parameters(), ceil_mode)?;
                let upstream = tensor::<f64>("upstream", expected.dims(), 2.0);
                let expected_gradients = (&expected * &upstream)?.sum_all()?.backward()?;

                let example = example_of_widths::<f32>(widths, stem, batch, size, ceil_mode);
                let vars = moved(&example, &gpu)?;
                let on_gpu = example.images.to_device(&gpu)?;
                let tracked = Var::from_tensor(&on_gpu)?;
                let images_on_gpu = match example.has_image_gradient() {
                    true => tracked.as_tensor(),
                    false => &on_gpu,
                };
                let upstream = upstream.to_dtype(DType::F32)?.to_device(&gpu)?;
                // Twice, so that the second pass finds used memory and plans.
                for _ in 0..2 {
                    let output = example.graph.forward(images_on_gpu, &parameters(&vars))?;
                    let features = &output.features;
                    close(features, &expected.detach(), 1e-4, &what("features"))?;
                    let loss = (features * &upstream)?.sum_all()?;
                    let gradients = crate::backward(&loss)?;
                    if example.has_image_gradient() {
                        let expected = expected_gradients.get(&images).unwrap();
                        let actual = gradients.get(&tracked).unwrap();
                        close(actual, expected, 1e-4, &what("images"))?;
                    }
                    let vars = vars.iter().flatten();
                    for (i, (var, of)) in vars.zip(exact.parameters.iter().flatten()).enumerate() {
                        let expected = expected_gradients.get(of).unwrap();
                        let actual = gradients.get(var).unwrap();
                        close(actual, expected, 1e-4, &what(&format!("parameter {i}")))?;
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn statistics_are_those_of_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else {
        return Ok(());
    };
    // Many rows, so that their sums are cut into parts; a channel more than a block takes.
    let mut builder = StaticGraphBuilder::new(3, (40, 40));
    let x = builder.conv2d_batch_norm_relu(builder.input(), 33, 1, (1, 0), EPS)?;
    let graph = builder.global_avg_pool2d(x)?;
    // A mean that is large beside the spread.
    let images = (tensor::<f32>("images", &[3, 3, 40, 40], 2.0) + 100.0)?;
    let weight = tensor::<f32>("w", &[33, 3, 1, 1], 1.0);
    let [norm_weight, norm_bias] = ["n", "b"].map(|name| tensor::<f32>(name, &[33], 1.0));
    let statistics = |device: &Device, dtype: DType| -> Result<_> {
        let moved = |t: &Tensor| t.to_dtype(dtype)?.to_device(device);
        let (weight, norm_weight) = (moved(&weight)?, moved(&norm_weight)?);
        let norm_bias = moved(&norm_bias)?;
        let parameters = ConvParameters::BatchNorm {
            weight: &weight,
            norm_weight: &norm_weight,
            norm_bias: &norm_bias,
        };
        let mut output = graph.forward(&moved(&images)?, &[parameters])?;
        Ok(output.statistics.remove(0))
    };
    let expected = statistics(&Device::Cpu, DType::F64)?;
    let actual = statistics(&gpu, DType::F32)?;
    close(&actual.mean, &expected.mean, 1e-6, "mean")?;
    let variance = &expected.unbiased_variance;
    // What f32 leaves of a spread of 1 around 100.
    close(&actual.unbiased_variance, variance, 2e-5, "variance")
}

#[test]
fn running_statistics_normalise_whether_parameters_train_or_not() -> Result<()> {
    let Some(gpu) = gpu() else {
        return Ok(());
    };
    for stem in [Stem::Norm, Stem::StridedNorm] {
        let exact = example::<f64>(stem, 3, (17, 18), true);
        let running = running::<f64>(&exact);
        let with_running = |of: &[Vec<Tensor>]| -> Result<Tensor> {
            let all = of.iter().map(|p| ConvParameters::Running {
                weight: &p[0],
                norm_weight: &p[1],
                norm_bias: &p[2],
                mean: &p[3],
                variance: &p[4],
            });
            let all: Vec<_> = all.collect();
            match of[0][0].device().is_cpu() {
                true => composed(stem, &exact.images, &all, true),
                false => {
                    let images = exact.images.to_dtype(DType::F32)?.to_device(&gpu)?;
                    Ok(exact.graph.forward(&images, &all)?.features)
                }
            }
        };
        let tensors = |vars: &[Vec<Var>], tracked: bool| -> Result<Vec<Vec<Tensor>>> {
            let of = |(vars, running): (&Vec<Var>, &[Tensor; 2])| -> Result<Vec<Tensor>> {
                let (dtype, device) = (vars[0].dtype(), vars[0].device());
                let vars = vars.iter().map(|v| match tracked {
                    true => Ok(v.as_tensor().clone()),
                    false => Ok(v.as_detached_tensor()),
                });
                let running = running.iter().map(|t| t.to_dtype(dtype)?.to_device(device));
                vars.chain(running).collect()
            };
            vars.iter().zip(&running).map(of).collect()
        };
        let expected = with_running(&tensors(&exact.parameters, true)?)?;
        let vars = moved(&example::<f32>(stem, 3, (17, 18), true), &gpu)?;
        let tracked = with_running(&tensors(&vars, true)?)?;
        let untracked = with_running(&tensors(&vars, false)?)?;
        assert!(tracked.track_op() && !untracked.track_op());
        for actual in [&tracked, &untracked] {
            close(actual, &expected.detach(), 1e-5, "features")?;
        }
        // The statistics are a part of weights that are no variables, so that any backward pass will do.
        let gradients = tracked.sqr()?.sum_all()?.backward()?;
        let expected = expected.sqr()?.sum_all()?.backward()?;
        for (var, of) in vars.iter().flatten().zip(exact.parameters.iter().flatten()) {
            let actual = gradients.get(var).unwrap();
            close(actual, expected.get(of).unwrap(), 1e-4, "parameter")?;
        }
    }
    Ok(())
}

/// Rounding to bf16 carries far where a batch norm cancels most of a gradient. So the measure is what ordinary operations
/// make of it, which round in the same places.
#[test]
fn bf16_is_as_near_as_ordinary_operations_come() -> Result<()> {
    if crate::cuda::device_info(0).is_ok_and(|gpu| !gpu.has_bf16()) {
        skipped("this GPU has no bf16 convolutions");
        return Ok(());
    }
    let Some(gpu) = gpu() else {
        return Ok(());
    };
    for (widths, stem) in [
        (ODD, Stem::Bias),
        (ODD, Stem::Norm),
        (WHOLE, Stem::Bias),
        (WHOLE, Stem::Norm),
    ] {
        let exact = example_of_widths::<f64>(widths, stem, 4, (17, 17), false);
        let expected = composed(stem, &exact.images, &exact.parameters(), false)?;
        let expected_gradients = expected.sqr()?.sum_all()?.backward()?;
        let example = example_of_widths::<f32>(widths, stem, 4, (17, 17), false);
        let vars = moved(&example, &gpu)?;
        let images = example.images.to_dtype(DType::BF16)?.to_device(&gpu)?;
        // The parameters of batch norms stay f32, as ordinary operations have it.
        let rounded = vars.iter().map(|vars| match vars.as_slice() {
            [weight, norm @ .., _] if !norm.is_empty() => {
                let mut all = vec![Var::from_tensor(&weight.to_dtype(DType::BF16)?)?];
                all.extend(vars[1..].iter().cloned());
                Ok(all)
            }
            both => both
                .iter()
                .map(|var| Var::from_tensor(&var.to_dtype(DType::BF16)?))
                .collect(),
        });
        let rounded = rounded.collect::<Result<Vec<Vec<Var>>>>()?;
        let features = example.graph.forward(&images, &parameters(&vars))?.features;
        assert_eq!(features.dtype(), DType::F32);
        let ordinary = composed(stem, &images, &parameters(&rounded), false)?;
        let gradients = crate::backward(&features.sqr()?.sum_all()?)?;
        let of_ordinary = ordinary.to_dtype(DType::F32)?.sqr()?.sum_all()?;
        let of_ordinary = crate::backward(&of_ordinary)?;
        let mut rows = vec![("features".to_owned(), features, ordinary, expected.detach())];
        let both = vars.iter().flatten().zip(rounded.iter().flatten());
        for (i, ((var, rounded), of)) in both.zip(exact.parameters.iter().flatten()).enumerate() {
            let actual = gradients.get(var).unwrap().clone();
            assert_eq!(actual.dtype(), DType::F32);
            let ordinary = of_ordinary.get(rounded).unwrap().clone();
            let expected = expected_gradients.get(of).unwrap().clone();
            rows.push((format!("parameter {i}"), actual, ordinary, expected));
        }
        let error = |tensor: &Tensor, expected: &Tensor| {
            let on_cpu = tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
            relative_error(&on_cpu, expected)
        };
        for (what, actual, ordinary, expected) in rows {
            let actual = error(&actual, &expected)?;
            let ordinary = error(&ordinary, &expected)?;
            assert!(
                actual <= 1.5 * ordinary && ordinary < 0.5,
                "{stem:?} {what}: {actual:.1e}, ordinary operations {ordinary:.1e}"
            );
        }
    }
    Ok(())
}

/// Poolings whose gradient waits until their map's is read: with other windows beside them, of one map twice, and of a map
/// that is read besides.
#[test]
fn gradients_of_poolings_add_up_where_they_are_read() -> Result<()> {
    let Some(gpu) = gpu() else {
        return Ok(());
    };
    let mut b = StaticGraphBuilder::new(3, (9, 10));
    let by_one = MaxPool2dConfig::square(3, 1, 1);
    let by_two = MaxPool2dConfig::square(3, 2, 1);
    let stem = b.conv2d_relu(b.input(), 16, 3, 1)?;
    let [one, other, third] = [32, 16, 8].map(|c_out| b.conv2d_relu(stem, c_out, 1, 0));
    let (one, other, third) = (one?, other?, third?);
    let both = b.concat(&[one, other])?;
    // In this order, so that the first of each map have different windows.
    let half = b.max_pool2d(both, by_two)?;
    let whole = b.max_pool2d(third, by_one)?;
    let (halves, wholes) = (
        [half, b.max_pool2d(third, by_two)?],
        [b.max_pool2d(both, by_one)?, whole],
    );
    let mut branches = Vec::new();
    for half in halves {
        branches.push(b.conv2d_relu(half, 16, 1, 0)?);
    }
    for whole in wholes.into_iter().chain([both]) {
        let x = b.conv2d_relu(whole, 8, 1, 0)?;
        let x = b.max_pool2d(x, by_two)?;
        branches.push(b.conv2d_relu(x, 16, 3, 1)?);
    }
    let x = b.concat(&branches)?;
    let graph = b.global_avg_pool2d(x)?;
    let shapes: [[usize; 4]; 12] = [
        [16, 3, 3, 3],
        [32, 16, 1, 1],
        [16, 16, 1, 1],
        [8, 16, 1, 1],
        [16, 48, 1, 1],
        [16, 8, 1, 1],
        [8, 48, 1, 1],
        [16, 8, 3, 3],
        [8, 8, 1, 1],
        [16, 8, 3, 3],
        [8, 48, 1, 1],
        [16, 8, 3, 3],
    ];
    let gradients = |device: &Device, dtype: DType| -> Result<Vec<Tensor>> {
        let var = |name: String, shape: &[usize], scale: f64| {
            let values = tensor::<f32>(&name, shape, scale);
            Var::from_tensor(&values.to_dtype(dtype)?.to_device(device)?)
        };
        let of = shapes.iter().enumerate().map(|(i, shape)| {
            let scale = 2.0 / (shape[1..].iter().product::<usize>() as f64).sqrt();
            let bias = var(format!("b{i}"), &shape[..1], 1.0)?;
            Ok(vec![var(format!("w{i}"), shape, 2.0 * scale)?, bias])
        });
        let vars = of.collect::<Result<Vec<_>>>()?;
        let images = tensor::<f32>("images", &[2, 3, 9, 10], 2.0).to_dtype(dtype)?;
        let output = graph.forward(&images.to_device(device)?, &parameters(&vars))?;
        let gradients = crate::backward(&output.features.sqr()?.sum_all()?)?;
        let all = vars.iter().flatten();
        Ok(all.map(|v| gradients.get(v).unwrap().clone()).collect())
    };
    let expected = gradients(&Device::Cpu, DType::F64)?;
    for (i, (actual, expected)) in gradients(&gpu, DType::F32)?
        .iter()
        .zip(&expected)
        .enumerate()
    {
        close(actual, expected, 1e-5, &format!("parameter {i}"))?;
    }
    Ok(())
}

#[test]
fn what_a_graph_cannot_do_is_said() -> Result<()> {
    let Some(gpu) = gpu() else {
        return Ok(());
    };
    let example = example::<f32>(Stem::Bias, 1, (7, 7), false);
    let vars = moved(&example, &gpu)?;
    let images = example.images.to_device(&gpu)?;
    let features = example.graph.forward(&images, &parameters(&vars))?.features;
    let message = |error: candle_core::Error| error.to_string();
    let error = features.sum_all()?.backward().map(|_| ()).map_err(message);
    assert!(error.unwrap_err().contains("candle_cnn::backward(&loss)"));
    let forward = |images: &Tensor, parameters: &[ConvParameters<'_>]| {
        let output = example.graph.forward(images, parameters);
        output.map(|_| ()).map_err(message).unwrap_err()
    };
    let of_f64 = images.to_dtype(DType::F64)?;
    assert!(forward(&of_f64, &parameters(&vars)).contains("F64"));
    let on_cpu = example.parameters();
    assert!(forward(&images, &on_cpu).contains("no implementation for device"));
    let none = images.narrow(0, 0, 0)?;
    assert!(forward(&none, &parameters(&vars)).contains("at least 1 on CUDA"));
    Ok(())
}
