use candle_core::{DType, Device, Result, Tensor, Var};
use proptest::prelude::*;
use test_support::{check_gradients, devices, relative_error, seeded_values};

use super::*;
use crate::activation;
use crate::cuda::{F32Math, Settings, set_settings};
use crate::element::Real;

/// Runs `test` on each device, where CUDA computes exactly and the same each time.
fn on_each_device(test: impl Fn(&Device) -> Result<()>) -> Result<()> {
    set_settings(Settings {
        convolution: F32Math::Full,
        deterministic: true,
        ..Settings::default()
    });
    devices().iter().try_for_each(test)
}

/// A geometry from its sizes.
pub(super) fn geometry(
    batch: usize,
    (c_in, c_out): (usize, usize),
    input: (usize, usize),
    kernel: (usize, usize),
    config: Conv2dConfig,
) -> Result<Conv2dGeometry> {
    let x = Tensor::zeros((batch, c_in, input.0, input.1), DType::F32, &Device::Cpu)?;
    let weight = Tensor::zeros((c_out, c_in, kernel.0, kernel.1), DType::F32, &Device::Cpu)?;
    Conv2dGeometry::new(&x, &weight, config)
}

fn numbers<T: Real>(name: &str, count: usize) -> Vec<T> {
    seeded_values(name, count, 2.0)
        .into_iter()
        .map(|v| T::real(f64::from(v)))
        .collect()
}

/// ‖actual − expected‖ ÷ ‖scale‖.
fn error<T: Real>(actual: &[T], expected: &[f64], scale: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut actual.iter().zip(expected).map(|(a, e)| a.as_f64() - e));
    match norm(&mut scale.iter().copied()) {
        0.0 => difference,
        scale => difference / scale,
    }
}

/// What an error is measured against.
#[derive(Clone, Copy)]
enum Against {
    /// The result's own norm.
    Result,
    /// The norm of the sums of the terms' absolute values, which a sum that
    /// happens to cancel leaves as they are: rounding is relative to these.
    Terms,
}

/// Checks every instruction set of this machine against the reference.
fn check<T: Element>(g: &Conv2dGeometry, against: Against, tolerance: f64) {
    let widen = |v: &[T]| -> Vec<f64> { v.iter().map(|v| v.as_f64()).collect() };
    let x: Vec<T> = numbers("x", g.batch * g.c_in * g.input.0 * g.input.1);
    let weight: Vec<T> = numbers("weight", g.c_out * g.c_in * g.kernel.0 * g.kernel.1);
    let bias: Vec<T> = numbers("bias", g.c_out);
    let dy: Vec<T> = numbers("dy", g.batch * g.c_out * g.output.0 * g.output.1);
    let reference = |value: fn(f64) -> f64| {
        let values = |v: &[T]| -> Vec<f64> { widen(v).into_iter().map(value).collect() };
        let (x, weight, bias, dy) = (values(&x), values(&weight), values(&bias), values(&dy));
        let y = conv2d_reference(g, &x, &weight, Some(&bias));
        let (dx, dweight, dbias) = conv2d_backward_reference(g, &x, &weight, &dy);
        [y, dx, dweight, dbias]
    };
    let expected = reference(|v| v);
    let scale = match against {
        Against::Result => expected.clone(),
        Against::Terms => reference(f64::abs),
    };
    let all = cpu::Needs {
        input: true,
        weight: true,
        bias: true,
    };
    for isa in Isa::available() {
        let y = cpu::forward(g, isa, &x, &weight, Some(&bias), Activation::Identity);
        let gradients = cpu::backward(g, isa, &x, &weight, None, &dy, all);
        let actual = [
            ("y", Some(y)),
            ("dx", gradients.input),
            ("dweight", gradients.weight),
            ("dbias", gradients.bias),
        ];
        for (((name, actual), expected), scale) in actual.into_iter().zip(&expected).zip(&scale) {
            let error = error(&actual.unwrap(), expected, scale);
            assert!(error <= tolerance, "{isa:?} {g:?}: {name} {error:.1e}");
        }
    }
}

#[test]
fn every_instruction_set_agrees_with_the_reference_on_the_layers_of_googlenet() -> Result<()> {
    for (channels, size, kernel) in [
        ((3, 192), 12, 3),
        ((192, 16), 8, 1),
        ((16, 48), 8, 5),
        ((112, 208), 8, 3),
        ((48, 128), 4, 5),
    ] {
        let config = Conv2dConfig::padded(kernel / 2);
        let g = geometry(3, channels, (size, size), (kernel, kernel), config)?;
        check::<f32>(&g, Against::Result, 3e-6);
        check::<f64>(&g, Against::Result, 1e-13);
    }
    Ok(())
}

#[test]
fn outputs_that_see_padding_alone_give_no_gradient() -> Result<()> {
    // Of three rows of the output the first and the last.
    let config = Conv2dConfig {
        stride: (2, 1),
        padding: (2, 0),
        dilation: (1, 1),
    };
    let g = geometry(1, (3, 21), (1, 6), (1, 1), config)?;
    check::<f32>(&g, Against::Result, 3e-6);
    Ok(())
}

#[test]
fn the_padded_gradient_is_no_larger_than_what_is_checked_beforehand() -> Result<()> {
    for kernel in 1..5 {
        for (stride, dilation, padding, size) in (1..6).flat_map(|stride| {
            (1..4).flat_map(move |dilation| {
                (0..7).flat_map(move |p| (1..8).map(move |size| (stride, dilation, p, size)))
            })
        }) {
            let axis = ConvAxis {
                input: size,
                kernel,
                stride,
                padding,
                dilation,
            };
            if axis.output().is_none() {
                continue;
            }
            let needed = cpu::padded_gradient(kernel, (stride, dilation, padding), size);
            let bound = axis.padded_gradient();
            assert!(needed <= bound, "{bound}, {needed}");
            assert!(stride > 1 || bound <= needed + 1, "{bound}, {needed}");
        }
    }
    // 2⁴⁸ channels' pixels and more, of which the forward pass knows nothing.
    let wide = Conv2dConfig {
        dilation: (1, 1 << 45),
        padding: (0, 1 << 44),
        ..Default::default()
    };
    let g = geometry(1, (1, 64), (1, 3), (1, 2), wide)?;
    let text = g.check_backward_room::<f32>(true).unwrap_err().to_string();
    assert!(text.contains("padded gradient of an image"), "{text}");
    g.check_backward_room::<f32>(false)
}

#[test]
fn images_that_a_task_takes_in_turn_do_not_mix() -> Result<()> {
    // One thread, and more pixels than the backward pass takes at once: a group of three images and one of two.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    pool.unwrap().install(|| {
        for (kernel, stride) in [(1, 2), (3, 2), (2, 5), (3, 1)] {
            let config = Conv2dConfig::padded(1).strided(stride);
            let g = geometry(5, (3, 20), (20, 21), (kernel, kernel), config)?;
            check::<f32>(&g, Against::Terms, 5e-7);
        }
        Ok(())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_instruction_set_agrees_with_the_reference_on_any_geometry(
        batch in 1usize..4,
        channels in (1usize..36, 1usize..52),
        input in (1usize..9, 1usize..9),
        kernel in (1usize..6, 1usize..6),
        stride in (1usize..4, 1usize..4),
        padding in (0usize..5, 0usize..5),
        dilation in (1usize..3, 1usize..3),
    ) {
        let config = Conv2dConfig { stride, padding, dilation };
        // A kernel larger than the padded image is an error, tested below.
        if let Ok(g) = geometry(batch, channels, input, kernel, config) {
            check::<f32>(&g, Against::Terms, 5e-7);
            check::<f64>(&g, Against::Terms, 1e-15);
        }
    }
}

#[test]
fn gradients_agree_with_finite_differences() -> Result<()> {
    on_each_device(|device| {
        let tensor = |name: &str, dims: &[usize]| {
            let values = seeded_values(name, dims.iter().product(), 2.0);
            Tensor::from_vec(values, dims, device)?.to_dtype(DType::F64)
        };
        let x = tensor("x", &[2, 3, 5, 4])?;
        let weight = tensor("weight", &[4, 3, 3, 2])?;
        let bias = tensor("bias", &[4])?;
        let config = Conv2dConfig {
            stride: (2, 1),
            padding: (2, 1),
            dilation: (1, 2),
        };
        for op in [conv2d, conv2d_relu] {
            let worst = check_gradients(&[&x, &weight, &bias], 1e-5, |inputs| {
                op(&inputs[0], &inputs[1], Some(&inputs[2]), config)
            })?;
            assert!(worst < 1e-7, "{worst:.1e}");
        }
        Ok(())
    })
}

#[test]
fn fused_relu_has_the_bits_of_convolution_then_relu() -> Result<()> {
    on_each_device(|device| {
        // cuDNN may fuse bias and ReLU into an engine that rounds otherwise.
        let allowed = if device.is_cpu() { 0.0 } else { 1e-5 };
        let x = Var::randn(0f32, 1.0, (2, 5, 6, 6), device)?;
        let weight = Var::randn(0f32, 1.0, (7, 5, 3, 3), device)?;
        let bias = Var::randn(0f32, 1.0, 7, device)?;
        let config = Conv2dConfig::padded(1);
        let fused = conv2d_relu(&x, &weight, Some(&bias), config)?;
        let apart = crate::relu(&conv2d(&x, &weight, Some(&bias), config)?)?;
        assert!(relative_error(&fused, &apart)? <= allowed);
        let (fused, apart) = (fused.sqr()?.backward()?, apart.sqr()?.backward()?);
        for variable in [&x, &weight, &bias] {
            let (fused, apart) = (fused.get(variable).unwrap(), apart.get(variable).unwrap());
            assert!(relative_error(fused, apart)? <= allowed);
        }
        Ok(())
    })
}

#[test]
fn fused_relu_keeps_the_sign_of_zero_in_every_instruction_set() -> Result<()> {
    fn check<T: Element>() -> Result<()> {
        // A sum is −0 where the bias and all products are.
        let x = [-0.0, 0.0, -1.0, 2.0, f64::NAN, -0.0, -3.0].map(T::real);
        let expected = [-0.0, 0.0, 0.0, 2.0, f64::NAN, -0.0, 0.0];
        // In tiles of one, two and three vectors.
        for c_out in [1, 20, 40, 48] {
            let g = geometry(1, (1, c_out), (1, 7), (1, 1), Conv2dConfig::default())?;
            let (weight, bias) = (vec![T::real(1.0); c_out], vec![T::real(-0.0); c_out]);
            for isa in Isa::available() {
                let forward =
                    |activation| cpu::forward(&g, isa, &x, &weight, Some(&bias), activation);
                let y = forward(Activation::Relu);
                let apart = forward(Activation::Identity);
                for (at, (y, apart)) in y.iter().zip(apart).enumerate() {
                    let (y, expected) = (y.as_f64(), expected[at % 7]);
                    let relu = activation::relu(apart).as_f64();
                    assert!(y.is_nan() == expected.is_nan() && relu.is_nan() == y.is_nan());
                    if !y.is_nan() {
                        assert_eq!(y.to_bits(), expected.to_bits(), "{isa:?} {c_out} {at}");
                        assert_eq!(relu.to_bits(), y.to_bits(), "{isa:?} {c_out} {at}");
                    }
                }
            }
        }
        Ok(())
    }
    check::<f32>()?;
    check::<f64>()
}

#[test]
fn strided_and_dilated_settings_mean_what_pytorch_means_by_them() -> Result<()> {
    let x = Tensor::arange(0f32, 25.0, &Device::Cpu)?.reshape((1, 1, 5, 5))?;
    let weight = Tensor::ones((1, 1, 2, 2), DType::F32, &Device::Cpu)?;
    let values = |config| -> Result<Vec<Vec<f32>>> {
        conv2d(&x, &weight, None, config)?
            .squeeze(0)?
            .squeeze(0)?
            .to_vec2()
    };
    // torch.nn.functional.conv2d(x, weight, stride=2)
    let config = Conv2dConfig::default().strided(2);
    assert_eq!(values(config)?, [[12.0, 20.0], [52.0, 60.0]]);
    // torch.nn.functional.conv2d(x, weight, dilation=4)
    let config = Conv2dConfig::default().dilated(4);
    assert_eq!(values(config)?, [[48.0]]);
    // torch.nn.functional.conv2d(x, weight, stride=3, padding=1, dilation=2)
    let config = Conv2dConfig::padded(1).strided(3).dilated(2);
    assert_eq!(values(config)?, [[6.0, 16.0], [32.0, 72.0]]);
    Ok(())
}

#[test]
fn strided_inputs_give_the_result_of_contiguous_ones() -> Result<()> {
    on_each_device(|device| {
        let x = Tensor::randn(0f32, 1.0, (2, 6, 5, 3), device)?.permute((0, 3, 1, 2))?;
        let weight = Var::from_tensor(&Tensor::randn(0f32, 1.0, (3, 3, 4, 3), device)?)?;
        let turned = weight.permute((2, 0, 1, 3))?;
        let y = conv2d(&x, &turned, None, Conv2dConfig::default())?;
        let expected = conv2d(
            &x.contiguous()?,
            &turned.contiguous()?,
            None,
            Default::default(),
        )?;
        assert_eq!(relative_error(&y, &expected)?, 0.0);
        assert_eq!(y.backward()?.get(&weight).unwrap().dims(), [3, 3, 4, 3]);
        Ok(())
    })
}

#[test]
fn gradient_that_nobody_needs_is_not_computed() -> Result<()> {
    on_each_device(|device| {
        let x = Tensor::randn(0f32, 1.0, (1, 2, 4, 4), device)?;
        let weight = Var::randn(0f32, 1.0, (3, 2, 3, 3), device)?;
        let frozen = Tensor::zeros(3, DType::F32, device)?;
        let y = conv2d(&x, &weight, Some(&frozen), Conv2dConfig::default())?;
        let gradients = y.backward()?;
        assert!(gradients.get(&weight).is_some());
        assert!(gradients.get(&x).is_none());
        assert!(gradients.get(&frozen).is_none());
        Ok(())
    })
}

#[test]
fn same_inputs_give_the_same_bits() -> Result<()> {
    on_each_device(|device| {
        let x = Var::randn(0f32, 1.0, (5, 17, 9, 9), device)?;
        let weight = Var::randn(0f32, 1.0, (33, 17, 3, 3), device)?;
        let run = || -> Result<_> {
            let y = conv2d(&x, &weight, None, Conv2dConfig::padded(1))?;
            let gradients = y.sqr()?.backward()?;
            let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
            Ok((
                flat(&y)?,
                flat(gradients.get(&x).unwrap())?,
                flat(gradients.get(&weight).unwrap())?,
            ))
        };
        assert_eq!(run()?, run()?);
        Ok(())
    })
}

#[test]
fn bad_arguments_are_errors_that_name_both_shapes() -> Result<()> {
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu);
    let x = zeros(&[2, 3, 4, 4])?;
    let message = |x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, config| {
        conv2d(x, weight, bias, config).unwrap_err().to_string()
    };
    let default = Conv2dConfig::default();
    let text = message(&x, &zeros(&[5, 2, 1, 1])?, None, default);
    assert!(
        text.contains("conv2d") && text.contains("[2, 3, 4, 4]") && text.contains("[5, 2, 1, 1]"),
        "{text}"
    );
    let text = message(&x, &zeros(&[5, 3, 1, 1])?, Some(&zeros(&[4])?), default);
    assert!(
        text.contains("[4]") && text.contains("[5, 3, 1, 1]"),
        "{text}"
    );
    let text = message(&x, &zeros(&[5, 3, 7, 7])?, None, Conv2dConfig::padded(1));
    assert!(text.contains("(7, 7)") && text.contains("(4, 4)"), "{text}");
    let text = message(&zeros(&[3, 4, 4])?, &zeros(&[5, 3, 1, 1])?, None, default);
    assert!(text.contains("(N, C, H, W)"), "{text}");
    let stride = Conv2dConfig {
        stride: (0, 1),
        ..default
    };
    let text = message(&x, &zeros(&[5, 3, 1, 1])?, None, stride);
    assert!(text.contains("stride is (0, 1)"), "{text}");
    let double = zeros(&[5, 3, 1, 1])?.to_dtype(DType::F64)?;
    assert!(message(&x, &double, None, default).contains("F64"));
    Ok(())
}

#[test]
fn a_weight_for_groups_is_an_error_that_says_there_are_none() -> Result<()> {
    for (c_in, weight, grouped) in [
        (3, [3, 1, 3, 3], true),
        (8, [4, 4, 3, 3], true),
        (3, [4, 2, 3, 3], false),
        (3, [4, 1, 3, 3], false),
        (2, [4, 4, 3, 3], false),
    ] {
        let x = Tensor::zeros((1, c_in, 4, 4), DType::F32, &Device::Cpu)?;
        let weight = Tensor::zeros(&weight, DType::F32, &Device::Cpu)?;
        let result = conv2d(&x, &weight, None, Conv2dConfig::padded(1));
        let text = result.unwrap_err().to_string();
        assert!(text.contains("number of input channels"), "{text}");
        assert_eq!(
            text.contains("grouped convolutions are not there"),
            grouped,
            "{text}"
        );
    }
    Ok(())
}

#[test]
fn sizes_that_overflow_are_errors_and_not_read_beyond_their_end() -> Result<()> {
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu);
    let config = |stride: usize, padding: usize| Conv2dConfig::padded(padding).strided(stride);
    // Padded 2⁶³ + 1 by 2⁶³ + 3 pixels, whose product modulo 2⁶⁴ is 3, and 5 by 5 outputs.
    let (x, weight) = (zeros(&[1, 1, 1, 3])?, zeros(&[1, 1, 1, 1])?);
    let text = conv2d(&x, &weight, None, config(1 << 61, 1 << 62)).unwrap_err();
    let text = text.to_string();
    assert!(
        text.contains("padded input") && text.contains("9223372036854775809"),
        "{text}"
    );
    // The padded input would fit, the padded gradient of 64 channels would not: 2²⁹ by 2²⁹ pixels.
    let weight = zeros(&[64, 1, 2, 2])?;
    let wide = Conv2dConfig {
        dilation: (1 << 29, 1 << 29),
        ..Conv2dConfig::padded(1 << 28)
    };
    let text = conv2d(&x, &weight, None, wide).unwrap_err();
    let text = text.to_string();
    assert!(
        text.contains("gradient of the output") && text.contains("64"),
        "{text}"
    );
    // Nothing in memory, but 2⁶⁴ pixels in each of no images.
    let x = zeros(&[0, 1, 1 << 32, 1 << 32])?;
    let text = conv2d(&x, &weight, None, config(1, 0))
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("input") && text.contains("4294967296"),
        "{text}"
    );
    let text = conv2d(
        &zeros(&[1, 1, 1, 3])?,
        &zeros(&[1, 1, 2, 2])?,
        None,
        Conv2dConfig {
            dilation: (usize::MAX, 1),
            ..Default::default()
        },
    );
    assert!(text.unwrap_err().to_string().contains("does not fit"));
    Ok(())
}

#[test]
fn no_channels_or_pixels_are_errors_that_name_the_shape() -> Result<()> {
    let zeros = |dims: &[usize]| Var::zeros(dims, DType::F32, &Device::Cpu);
    for (x, weight, found) in [
        ([1, 3, 0, 4], [2, 3, 1, 1], "input has shape [1, 3, 0, 4]"),
        ([1, 3, 4, 0], [2, 3, 1, 1], "input has shape [1, 3, 4, 0]"),
        ([1, 0, 4, 4], [5, 0, 3, 3], "input has shape [1, 0, 4, 4]"),
        ([0, 0, 4, 4], [5, 0, 3, 3], "input has shape [0, 0, 4, 4]"),
        ([1, 3, 4, 4], [0, 3, 3, 3], "weight has shape [0, 3, 3, 3]"),
        ([1, 3, 4, 4], [5, 0, 3, 3], "weight has shape [5, 0, 3, 3]"),
        ([1, 3, 4, 4], [5, 3, 3, 0], "weight has shape [5, 3, 3, 0]"),
    ] {
        for op in [conv2d, conv2d_relu] {
            let (x, weight) = (zeros(&x)?, zeros(&weight)?);
            let result = op(&x, &weight, None, Conv2dConfig::padded(1));
            let text = result.and_then(|y| y.sum_all()?.backward()).err();
            let text = text.map(|error| error.to_string()).unwrap_or_default();
            assert!(text.contains(found) && text.contains("at least"), "{text}");
        }
    }
    Ok(())
}

#[test]
fn empty_batch_gives_an_empty_result_and_zero_gradients() -> Result<()> {
    let x = Var::zeros((0, 3, 4, 4), DType::F32, &Device::Cpu)?;
    let weight = Var::ones((5, 3, 3, 3), DType::F32, &Device::Cpu)?;
    let bias = Var::ones(5, DType::F32, &Device::Cpu)?;
    for op in [conv2d, conv2d_relu] {
        let y = op(&x, &weight, Some(&bias), Conv2dConfig::padded(1))?;
        assert_eq!(y.dims(), [0, 5, 4, 4]);
        let gradients = y.sum_all()?.backward()?;
        assert_eq!(gradients.get(&x).unwrap().dims(), [0, 3, 4, 4]);
        for parameter in [&weight, &bias] {
            let gradient = gradients.get(parameter).unwrap().abs()?.sum_all()?;
            assert_eq!(gradient.to_scalar::<f32>()?, 0.0);
        }
    }
    Ok(())
}

#[test]
fn a_single_pixel_meets_one_tap_and_the_others_get_no_gradient() -> Result<()> {
    on_each_device(|device| {
        let values = |name: &str, dims: &[usize]| {
            let values = seeded_values(name, dims.iter().product(), 2.0);
            Tensor::from_vec(values, dims, device)?.to_dtype(DType::F64)
        };
        let x = values("x", &[2, 3, 1, 1])?;
        for (kernel, config, tap) in [
            ((3, 3), Conv2dConfig::padded(1), (1, 1)),
            (
                (5, 3),
                Conv2dConfig {
                    padding: (4, 1),
                    dilation: (2, 1),
                    ..Default::default()
                },
                (2, 1),
            ),
        ] {
            let weight = Var::from_tensor(&values("weight", &[4, 3, kernel.0, kernel.1])?)?;
            let y = conv2d(&x, &weight, None, config)?;
            let geometry = Conv2dGeometry::new(&x, &weight, config)?;
            let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f64>();
            let exact = conv2d_reference(&geometry, &flat(&x)?, &flat(&weight)?, None);
            let exact = Tensor::from_vec(exact, y.shape(), device)?;
            test_support::assert_close("y", &y, &exact, 1e-14);
            let gradients = y.sqr()?.sum_all()?.backward()?;
            let gradient = gradients.get(&weight).unwrap();
            // Sums of whole numbers, which are exact in any order.
            let not_zero = |t: &Tensor| {
                let marks = t.contiguous()?.ne(0f64)?.to_dtype(DType::F64)?;
                marks.sum_all()?.to_scalar::<f64>()
            };
            let at_tap = gradient.narrow(2, tap.0, 1)?.narrow(3, tap.1, 1)?;
            let (total, at_tap) = (not_zero(gradient)?, not_zero(&at_tap)?);
            assert!(total > 0.0 && total == at_tap, "{total} {at_tap}");
        }
        Ok(())
    })
}

#[test]
fn pixels_between_the_steps_of_a_kernel_have_no_gradient() -> Result<()> {
    // Of 5 pixels a kernel of 1 that steps by 3 meets 2; one of 2 that steps further than there are pixels meets 2 once.
    for (kernel, stride, met) in [(1, 3, [0, 3]), (2, usize::MAX, [0, 1])] {
        let x = Var::ones((2, 1, 5, 1), DType::F64, &Device::Cpu)?;
        let weight = Tensor::ones((1, 1, kernel, 1), DType::F64, &Device::Cpu)?;
        let config = Conv2dConfig {
            stride: (stride, 1),
            ..Default::default()
        };
        let gradients = conv2d(&x, &weight, None, config)?.backward()?;
        let dx: Vec<f64> = gradients.get(&x).unwrap().flatten_all()?.to_vec1()?;
        let expected = (0..10).map(|i| if met.contains(&(i % 5)) { 1.0 } else { 0.0 });
        assert_eq!(dx, expected.collect::<Vec<f64>>());
    }
    // A kernel that meets padding alone moves nothing.
    let x = Var::ones((1, 1, 2, 2), DType::F32, &Device::Cpu)?;
    let weight = Tensor::ones((1, 1, 1, 1), DType::F32, &Device::Cpu)?;
    let y = conv2d(&x, &weight, None, Conv2dConfig::padded(1).strided(3))?;
    assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [0.0; 4]);
    let gradients = y.backward()?;
    let dx = gradients.get(&x).unwrap().flatten_all()?;
    assert_eq!(dx.to_vec1::<f32>()?, [0.0; 4]);
    Ok(())
}

#[test]
fn what_the_machine_has_no_room_for_is_an_error() -> Result<()> {
    let x = Tensor::zeros((1, 1, 5, 5), DType::F32, &Device::Cpu)?;
    let weight = Tensor::zeros((3, 1, 1, 1), DType::F32, &Device::Cpu)?;
    // 2⁵² pixels: three channels of as many outputs each, or of 9.
    for (stride, expected) in [
        (1, "output of shape [1, 3"),
        (1 << 25, "padded input of an image"),
    ] {
        let config = Conv2dConfig::padded(1 << 25).strided(stride);
        let text = conv2d(&x, &weight, None, config).unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }
    Ok(())
}
