use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use test_support::{check_gradients, devices, seeded_values};

use super::*;
use crate::relu;

fn tensor(name: &str, dims: &[usize]) -> Result<Tensor> {
    let values = seeded_values(name, dims.iter().product(), 2.0);
    Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(DType::F64)
}

fn by<'a>(mean: &'a Tensor, variance: &'a Tensor) -> RunningStatistics<'a> {
    RunningStatistics { mean, variance }
}

#[test]
fn gradients_agree_with_finite_differences() -> Result<()> {
    let (x, weight, bias) = (
        tensor("x", &[3, 4, 2, 3])?,
        tensor("w", &[4])?,
        tensor("b", &[4])?,
    );
    let worst = check_gradients(&[&x, &weight, &bias], 1e-5, |inputs| {
        Ok(batch_norm_train(&inputs[0], &inputs[1], &inputs[2], 1e-3)?.0)
    })?;
    assert!(worst < 1e-7, "training: {worst:.1e}");
    let (mean, variance) = (tensor("mean", &[4])?, tensor("var", &[4])?.abs()?);
    let worst = check_gradients(&[&x, &weight, &bias], 1e-5, |inputs| {
        batch_norm_eval(
            &inputs[0],
            &inputs[1],
            &inputs[2],
            by(&mean, &variance),
            1e-3,
        )
    })?;
    assert!(worst < 1e-7, "evaluation: {worst:.1e}");
    Ok(())
}

#[test]
fn a_large_mean_does_not_cancel_the_variance_away() -> Result<()> {
    let x = (Tensor::new(&[[0f32], [1.0], [2.0], [3.0]], &Device::Cpu)? + 1e6)?;
    let one = Tensor::ones(1, DType::F32, &Device::Cpu)?;
    let (_, statistics) = batch_norm_train(&x, &one, &one, 0.0)?;
    let variance = statistics.unbiased_variance.to_vec1::<f32>()?[0];
    assert!((variance - 5.0 / 3.0).abs() < 1e-5, "{variance}");
    Ok(())
}

#[test]
fn a_single_value_per_channel_is_refused_in_training_only() -> Result<()> {
    let x = Tensor::ones((1, 2, 1, 1), DType::F32, &Device::Cpu)?;
    let ones = Tensor::ones(2, DType::F32, &Device::Cpu)?;
    let text = batch_norm_train(&x, &ones, &ones, 1e-5)
        .unwrap_err()
        .to_string();
    assert!(text.contains("more than one value per channel"), "{text}");
    assert!(batch_norm_eval(&x, &ones, &ones, by(&ones, &ones), 1e-5).is_ok());
    let three = Tensor::ones(3, DType::F32, &Device::Cpu)?;
    let text = batch_norm_eval(&x, &three, &ones, by(&ones, &ones), 1e-5)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("[3]") && text.contains("[1, 2, 1, 1]"),
        "{text}"
    );
    Ok(())
}

#[test]
fn parameters_of_another_dtype_are_errors_that_say_which_goes_with_the_input() -> Result<()> {
    for (input, weight, bias, expected) in [
        (
            DType::F32,
            DType::BF16,
            DType::F32,
            "weight has dtype BF16, expected F32 for an input of F32",
        ),
        (
            DType::F64,
            DType::F32,
            DType::F32,
            "weight has dtype F32, expected F64 for an input of F64",
        ),
        (
            DType::F32,
            DType::F32,
            DType::F64,
            "bias has dtype F64, expected F32 for an input of F32",
        ),
    ] {
        let ones = |dtype| Tensor::ones(2, dtype, &Device::Cpu);
        let x = Tensor::ones((2, 2), input, &Device::Cpu)?;
        let (weight, bias, running) = (ones(weight)?, ones(bias)?, ones(input)?);
        for result in [
            batch_norm_train(&x, &weight, &bias, 1e-3).map(|(y, _)| y),
            batch_norm_eval(&x, &weight, &bias, by(&running, &running), 1e-3),
        ] {
            let text = result.unwrap_err().to_string();
            assert!(
                text.starts_with(&format!("batch_norm: {expected}")),
                "{text}"
            );
        }
    }
    // Activations in bf16 are CUDA's alone.
    let text = check_dtype(DType::BF16, "weight", DType::BF16)
        .unwrap_err()
        .to_string();
    let expected = "batch_norm: weight has dtype BF16, expected F32 for an input of BF16";
    assert!(text.starts_with(expected), "{text}");
    check_dtype(DType::BF16, "weight", DType::F32)
}

#[test]
fn statistics_that_are_missing_are_an_error_that_says_so() {
    let error = left_behind(&OnceLock::<Tensor>::new()).unwrap_err();
    let text = error.to_string();
    let expected = "batch_norm: the forward pass has left no statistics of the batch, a defect";
    assert!(text.starts_with(expected), "{text}");
}

/// Shapes on both sides of every border: single pixels, planes below and above
/// a vector and the switch at 64 pixels, many channels, remainders.
const SHAPES: [[usize; 4]; 9] = [
    [5, 3, 1, 1],
    [3, 700, 1, 1],
    [4, 130, 2, 2],
    [2, 9, 5, 7],
    [3, 17, 7, 9],
    [2, 5, 8, 8],
    [2, 3, 13, 11],
    [1, 2, 16, 16],
    [2, 1, 40, 33],
];

fn check_against_plain_loops<T: Element>(isa: Isa, shape: [usize; 4], tolerance: f64) {
    const EPS: f64 = 1e-3;
    let [batch, channels, h, w] = shape;
    let sizes = Sizes {
        batch,
        channels,
        pixels: h * w,
    };
    let values = |name: &str, count: usize| -> (Vec<T>, Vec<f64>) {
        let values = seeded_values(&format!("{name}{shape:?}"), count, 2.0);
        let exact: Vec<f64> = values.into_iter().map(f64::from).collect();
        (exact.iter().map(|&v| T::real(v)).collect(), exact)
    };
    let elements = batch * channels * h * w;
    let (x, exact_x) = values("x", elements);
    let (dy, exact_dy) = values("dy", elements);
    let (weight, exact_weight) = values("weight", channels);
    let (bias, exact_bias) = values("bias", channels);
    let close = |what: &str, ours: &[T], exact: &[f64]| {
        assert_eq!(ours.len(), exact.len());
        for (i, (ours, exact)) in ours.iter().zip(exact).enumerate() {
            let error = (ours.as_f64() - exact).abs() / exact.abs().max(1.0);
            assert!(
                error <= tolerance,
                "{isa:?} {shape:?} {what} {i}: {error:.1e}"
            );
        }
    };
    let moments = reference::moments(&sizes, &exact_x);
    for activation in [Activation::Identity, Activation::Relu] {
        let parameters = (exact_weight.as_slice(), exact_bias.as_slice());
        let exact_y = reference::forward(&sizes, &exact_x, parameters, &moments, EPS, activation);
        let op = BatchNorm {
            sizes,
            eps: EPS,
            source: Source::Batch(Default::default()),
            activation,
        };
        close("y", &op.forward(isa, &x, &weight, &bias), &exact_y);
        let mask = (activation == Activation::Relu).then_some(exact_y.as_slice());
        let pair = (exact_x.as_slice(), exact_dy.as_slice());
        let (dx, dweight, dbias) =
            reference::backward(&sizes, pair, &exact_weight, &moments, EPS, mask);
        let needs = Needs {
            x: true,
            parameters: true,
        };
        let ours = op.backward(isa, (&x, &dy), (&weight, &bias), needs);
        close("dx", &ours.x.unwrap(), &dx);
        let (ours_weight, ours_bias) = ours.parameters.unwrap();
        // Sums of many values: their rounding is that of the one stored result.
        close("dweight", &ours_weight, &dweight);
        close("dbias", &ours_bias, &dbias);
    }
}

#[test]
fn every_instruction_set_agrees_with_plain_loops() {
    for isa in Isa::available() {
        for shape in SHAPES {
            check_against_plain_loops::<f64>(isa, shape, 1e-11);
            check_against_plain_loops::<f32>(isa, shape, 5e-6);
        }
    }
}

#[test]
fn fused_relu_equals_the_two_operations_bit_for_bit() -> Result<()> {
    for dims in SHAPES {
        let x = candle_core::Var::from_tensor(&tensor("x", &dims)?.to_dtype(DType::F32)?)?;
        let dy = tensor("dy", &dims)?.to_dtype(DType::F32)?;
        let parameter = |name| tensor(name, &[dims[1]])?.to_dtype(DType::F32);
        let (weight, bias) = (parameter("w")?, parameter("b")?);
        let (mean, variance) = (parameter("m")?, parameter("v")?.abs()?);
        let weight = candle_core::Var::from_tensor(&weight)?;
        let bias = candle_core::Var::from_tensor(&bias)?;
        let bits = |y: Tensor| -> Result<Vec<u32>> {
            let gradients = (&y * &dy)?.sum_all()?.backward()?;
            let gradients = [&x, &weight, &bias].map(|var| gradients.get(var).unwrap());
            let mut all = Vec::new();
            for values in [&y].into_iter().chain(gradients) {
                let values = values.flatten_all()?.to_vec1::<f32>()?;
                all.extend(values.into_iter().map(f32::to_bits));
            }
            Ok(all)
        };
        let two = batch_norm_train(&x, &weight, &bias, 1e-3)?.0;
        let one = batch_norm_relu_train(&x, &weight, &bias, 1e-3)?.0;
        assert_eq!(bits(relu(&two)?)?, bits(one)?, "training {dims:?}");
        let two = batch_norm_eval(&x, &weight, &bias, by(&mean, &variance), 1e-3)?;
        let one = batch_norm_relu_eval(&x, &weight, &bias, by(&mean, &variance), 1e-3)?;
        assert_eq!(bits(relu(&two)?)?, bits(one)?, "evaluation {dims:?}");
    }
    Ok(())
}

#[test]
fn a_nan_reaches_the_output_through_the_fused_relu() -> Result<()> {
    let x = Tensor::new(&[[f32::NAN, 1.0], [0.0, -1.0]], &Device::Cpu)?;
    let (one, zero) = (x.ones_like()?.get(0)?, x.zeros_like()?.get(0)?);
    let y = batch_norm_relu_eval(&x, &one, &zero, by(&zero, &one), 0.0)?.to_vec2::<f32>()?;
    assert!(y[0][0].is_nan());
    assert_eq!((y[0][1], y[1][0], y[1][1]), (1.0, 0.0, 0.0));
    Ok(())
}

#[test]
fn an_empty_image_gives_an_empty_result() -> Result<()> {
    let x = Tensor::zeros((2, 3, 0, 4), DType::F32, &Device::Cpu)?;
    let ones = Tensor::ones(3, DType::F32, &Device::Cpu)?;
    let y = batch_norm_relu_eval(&x, &ones, &ones, by(&ones, &ones), 1e-3)?;
    assert_eq!(y.dims(), [2, 3, 0, 4]);
    Ok(())
}

#[test]
fn with_given_statistics_the_input_gradient_does_not_depend_on_the_input() -> Result<()> {
    let values = [
        [1f32, 2.0],
        [f32::INFINITY, 3.0],
        [0.5, -1.0],
        [f32::NAN, 4.0],
    ];
    let (ones, zeros) = (
        Tensor::ones(2, DType::F32, &Device::Cpu)?,
        Tensor::zeros(2, DType::F32, &Device::Cpu)?,
    );
    // As channels of one value each, and as pixels of planes.
    for shape in [vec![4, 2], vec![4, 2, 1, 1]] {
        let x =
            candle_core::Var::from_tensor(&Tensor::new(&values, &Device::Cpu)?.reshape(shape)?)?;
        let gradient = |y: Tensor| -> Result<Vec<f32>> {
            let gradients = y.backward()?;
            gradients.get(&x).unwrap().flatten_all()?.to_vec1()
        };
        let y = batch_norm_eval(&x, &ones, &zeros, by(&zeros, &ones), 0.0)?;
        assert_eq!(gradient(y)?, [1.0; 8]);
        let y = batch_norm_relu_eval(&x, &ones, &zeros, by(&zeros, &ones), 0.0)?;
        assert_eq!(gradient(y)?, [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]);
    }
    Ok(())
}

#[test]
fn frozen_parameters_and_running_statistics_take_no_sums_and_the_input_gradient_is_the_same() {
    for [batch, channels, h, w] in SHAPES {
        for activation in [Activation::Identity, Activation::Relu] {
            let sizes = Sizes {
                batch,
                channels,
                pixels: h * w,
            };
            let values = |name: &str, count: usize| seeded_values(name, count, 2.0);
            let elements = batch * channels * h * w;
            let (x, dy) = (values("x", elements), values("dy", elements));
            let (weight, bias) = (values("w", channels), values("b", channels));
            let exact: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            let moments = reference::moments(&sizes, &exact);
            let gradients = |source: Source, parameters: bool| {
                let op = BatchNorm {
                    sizes,
                    eps: 1e-3,
                    source,
                    activation,
                };
                let needs = Needs {
                    x: true,
                    parameters,
                };
                op.backward(Isa::detect(), (&x, &dy), (&weight, &bias), needs)
            };
            let running = || Source::Running(moments.clone());
            let (all, some) = (gradients(running(), true), gradients(running(), false));
            assert!(all.parameters.is_some() && some.parameters.is_none());
            assert_eq!(all.x, some.x);
            // The batch's own statistics have gradients, which are these sums.
            let batch = || Source::Batch(std::sync::Arc::new(moments.clone().into()));
            let (all, some) = (gradients(batch(), true), gradients(batch(), false));
            assert_eq!(all.x, some.x);
        }
    }
}

#[test]
fn frozen_parameters_get_no_gradient_and_leave_the_inputs_as_it_is() -> Result<()> {
    for device in devices() {
        let numbers = |name: &str, shape: &[usize]| {
            let values = seeded_values(name, shape.iter().product(), 2.0);
            Tensor::from_vec(values, shape, &device)
        };
        let x = Var::from_tensor(&numbers("x", &[4, 3, 5, 2])?)?;
        let weight = Var::from_tensor(&numbers("weight", &[3])?)?;
        let bias = Var::from_tensor(&numbers("bias", &[3])?)?;
        let (mean, variance) = (numbers("mean", &[3])?, numbers("variance", &[3])?.sqr()?);
        let frozen = (weight.as_detached_tensor(), bias.as_detached_tensor());
        let evaluated = |weight: &Tensor, bias: &Tensor| {
            batch_norm_relu_eval(&x, weight, bias, by(&mean, &variance), 1e-3)
        };
        let trained = |weight: &Tensor, bias: &Tensor| {
            batch_norm_relu_train(&x, weight, bias, 1e-3).map(|(y, _)| y)
        };
        type Normalise<'a> = &'a dyn Fn(&Tensor, &Tensor) -> Result<Tensor>;
        for normalise in [&evaluated as Normalise, &trained] {
            let all = normalise(&weight, &bias)?.sqr()?.backward()?;
            let some = normalise(&frozen.0, &frozen.1)?.sqr()?.backward()?;
            assert!(all.get(&weight).is_some() && all.get(&bias).is_some());
            assert!(some.get(&weight).is_none() && some.get(&bias).is_none());
            let of_x = |gradients: &GradStore| -> Result<Vec<f32>> {
                gradients.get(&x).unwrap().flatten_all()?.to_vec1()
            };
            assert_eq!(of_x(&all)?, of_x(&some)?);
            let one = normalise(&weight, &frozen.1)?.sqr()?.backward()?;
            assert!(one.get(&weight).is_some() && one.get(&bias).is_none());
        }
    }
    Ok(())
}

#[test]
fn fused_relu_keeps_the_sign_of_zero_over_small_and_large_planes() -> Result<()> {
    let row = [-0.0f32, 0.0, -1.0, 2.0];
    let (one, zero) = (
        Tensor::ones(1, DType::F32, &Device::Cpu)?,
        Tensor::zeros(1, DType::F32, &Device::Cpu)?,
    );
    let bias = Tensor::new(&[-0.0f32], &Device::Cpu)?;
    for pixels in [4, 400] {
        let values: Vec<f32> = row.into_iter().cycle().take(pixels).collect();
        let x = Tensor::from_vec(values, (1, 1, 1, pixels), &Device::Cpu)?;
        let y = batch_norm_relu_eval(&x, &one, &bias, by(&zero, &one), 0.0)?;
        let apart = relu(&batch_norm_eval(&x, &one, &bias, by(&zero, &one), 0.0)?)?;
        for y in [y, apart] {
            let values = y.flatten_all()?.to_vec1::<f32>()?;
            for (y, expected) in values.iter().zip([-0.0f32, 0.0, 0.0, 2.0].iter().cycle()) {
                assert_eq!(y.to_bits(), expected.to_bits(), "{pixels}");
            }
        }
    }
    Ok(())
}
