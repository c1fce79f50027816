//! Every operation against PyTorch: outputs and gradients of the cases in
//! `fixtures/ops.safetensors`, which `tools/pytorch/make_fixtures.py` makes.
//! On the CPU, and on CUDA where there is one.

use candle_cnn::cuda::{F32Math, Settings, set_settings};
use candle_cnn::*;
use candle_core::{DType, Device, Result, Tensor, Var};
use test_support::{Case, Fixture, assert_close, devices};

/// Runs `check` on each case of `op`, on each device.
fn each_case(op: &str, check: impl Fn(&Case) -> Result<()>) -> Result<()> {
    // TF32 would round away most of what is compared here.
    set_settings(Settings {
        convolution: F32Math::Full,
        matmul: F32Math::Full,
        ..Settings::default()
    });
    let fixture = Fixture::load(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/ops.safetensors"
    ));
    devices().iter().try_for_each(|device| {
        fixture
            .to_device(device)?
            .cases(op)
            .iter()
            .try_for_each(&check)
    })
}

/// Rounding allowed: a few units in the last place of each type, for sums of
/// at most a few hundred terms in another order than PyTorch's. cuDNN is
/// allowed ten times as much in f32, where it may take Winograd's algorithm.
fn tolerance(tensor: &Tensor) -> f64 {
    match (tensor.dtype(), tensor.device()) {
        (DType::F64, _) => 1e-12,
        (_, Device::Cpu) => 2e-6,
        _ => 2e-5,
    }
}

fn var(case: &Case, name: &str) -> Result<Option<Var>> {
    case.get(name).map(Var::from_tensor).transpose()
}

fn tensor(var: &Option<Var>) -> Option<&Tensor> {
    var.as_ref().map(|v| v.as_tensor())
}

/// Checks the output, then each `d<name>` against the gradient of `<name>`.
#[track_caller]
fn check(case: &Case, y: &Tensor, inputs: &[(&str, &Option<Var>)]) -> Result<()> {
    let tolerance = tolerance(y);
    assert_close(
        &format!("{} y", case.name()),
        y,
        case.tensor("y"),
        tolerance,
    );
    // Flat: Candle allocates nothing for the sizes of a scalar on CUDA, which the driver refuses.
    let gradients = (y * case.tensor("dy"))?.flatten_all()?.sum_all()?;
    let gradients = gradients.backward()?;
    for (name, variable) in inputs {
        // Without affine parameters in the case, ours are ones and zeros that PyTorch has not.
        let (Some(variable), Some(_)) = (variable, case.get(name)) else {
            continue;
        };
        let Some(expected) = case.get(&format!("d{name}")) else {
            panic!("{}: the fixture has no gradient of {name}", case.name());
        };
        let gradient = match gradients.get(variable) {
            Some(gradient) => gradient,
            None => panic!("{}: {name} has no gradient", case.name()),
        };
        // Batch norm over two values: the terms of dx cancel almost to
        // nothing, and rounding is relative to the terms, of the size of dy.
        let cancels = *name == "x" && case.name().contains("two_values");
        let (gradient, expected) = match cancels {
            true => (
                (gradient + case.tensor("dy"))?,
                (expected + case.tensor("dy"))?,
            ),
            false => (gradient.clone(), expected.clone()),
        };
        assert_close(
            &format!("{} d{name}", case.name()),
            &gradient,
            &expected,
            tolerance,
        );
    }
    Ok(())
}

fn conv2d_case(case: &Case, relu: bool) -> Result<()> {
    let config = Conv2dConfig {
        stride: case.pair("stride"),
        padding: case.pair("padding"),
        dilation: case.pair("dilation"),
    };
    let (x, weight, bias) = (var(case, "x")?, var(case, "weight")?, var(case, "bias")?);
    let op = if relu { conv2d_relu } else { conv2d };
    let y = op(
        tensor(&x).unwrap(),
        tensor(&weight).unwrap(),
        tensor(&bias),
        config,
    )?;
    check(case, &y, &[("x", &x), ("weight", &weight), ("bias", &bias)])
}

#[test]
fn conv2d_agrees_with_pytorch() -> Result<()> {
    each_case("conv2d", |case| conv2d_case(case, false))
}

#[test]
fn conv2d_relu_agrees_with_pytorch() -> Result<()> {
    each_case("conv2d_relu", |case| conv2d_case(case, true))
}

#[test]
fn max_pool2d_agrees_with_pytorch() -> Result<()> {
    each_case("max_pool2d", |case| {
        let config = MaxPool2dConfig {
            kernel_size: case.pair("kernel"),
            stride: case.pair("stride"),
            padding: case.pair("padding"),
            ceil_mode: case.flag("ceil_mode"),
        };
        let x = var(case, "x")?;
        let y = max_pool2d(tensor(&x).unwrap(), config)?;
        assert_close(case.name(), &y, case.tensor("y"), 0.0);
        check(case, &y, &[("x", &x)])?;
        Ok(())
    })
}

#[test]
fn average_pools_agree_with_pytorch() -> Result<()> {
    each_case("avg_pool2d", |case| {
        let config = AvgPool2dConfig {
            kernel_size: case.pair("kernel"),
            stride: case.pair("stride"),
            padding: case.pair("padding"),
            ceil_mode: case.flag("ceil_mode"),
            count_include_pad: case.flag("count_include_pad"),
        };
        let x = var(case, "x")?;
        check(
            case,
            &avg_pool2d(tensor(&x).unwrap(), config)?,
            &[("x", &x)],
        )?;
        Ok(())
    })?;
    each_case("adaptive_avg_pool2d", |case| {
        let x = var(case, "x")?;
        let y = adaptive_avg_pool2d(tensor(&x).unwrap(), case.pair("output"))?;
        check(case, &y, &[("x", &x)])?;
        Ok(())
    })?;
    each_case("global_avg_pool2d", |case| {
        let x = var(case, "x")?;
        let y = global_avg_pool2d(tensor(&x).unwrap())?;
        check(case, &y.reshape(case.tensor("y").shape())?, &[("x", &x)])?;
        Ok(())
    })?;
    Ok(())
}

#[test]
fn relu_agrees_with_pytorch() -> Result<()> {
    each_case("relu", |case| {
        let x = var(case, "x")?;
        check(case, &relu(tensor(&x).unwrap())?, &[("x", &x)])?;
        Ok(())
    })
}

#[test]
fn linear_agrees_with_pytorch() -> Result<()> {
    each_case("linear", |case| {
        let (x, weight, bias) = (var(case, "x")?, var(case, "weight")?, var(case, "bias")?);
        let y = linear(tensor(&x).unwrap(), tensor(&weight).unwrap(), tensor(&bias))?;
        check(case, &y, &[("x", &x), ("weight", &weight), ("bias", &bias)])?;
        Ok(())
    })
}

#[test]
fn cross_entropy_agrees_with_pytorch() -> Result<()> {
    each_case("cross_entropy", |case| {
        let x = var(case, "x")?;
        let config = CrossEntropyConfig {
            label_smoothing: case.number("label_smoothing"),
        };
        let y = cross_entropy(tensor(&x).unwrap(), case.tensor("target"), config)?;
        check(case, &y, &[("x", &x)])?;
        Ok(())
    })
}

#[test]
fn batch_norm_agrees_with_pytorch() -> Result<()> {
    each_case("batch_norm", |case| {
        let x = var(case, "x")?;
        let channels = case.tensor("x").dim(1)?;
        let dtype = case.tensor("x").dtype();
        let affine = |name, fallback: f64| -> Result<Var> {
            match case.get(name) {
                Some(tensor) => Var::from_tensor(tensor),
                None => Var::from_tensor(
                    &Tensor::full(fallback, channels, case.tensor("x").device())?
                        .to_dtype(dtype)?,
                ),
            }
        };
        let (weight, bias) = (affine("weight", 1.0)?, affine("bias", 0.0)?);
        let eps = case.number("eps");
        let inputs = |y: &Tensor| {
            let (weight, bias) = (Some(weight.clone()), Some(bias.clone()));
            check(case, y, &[("x", &x), ("weight", &weight), ("bias", &bias)])
        };
        let input = tensor(&x).unwrap();
        if !case.flag("training") {
            let running = RunningStatistics {
                mean: case.tensor("running_mean"),
                variance: case.tensor("running_var"),
            };
            inputs(&batch_norm_eval(input, &weight, &bias, running, eps)?)?;
            return Ok(());
        }
        let (y, first) = batch_norm_train(input, &weight, &bias, eps)?;
        inputs(&y)?;
        let mut running = (
            case.tensor("running_mean0").clone(),
            case.tensor("running_var0").clone(),
        );
        let second = match case.get("x2") {
            Some(x2) => Some(batch_norm_train(x2, &weight, &bias, eps)?),
            None => None,
        };
        if let (Some((y2, _)), Some(expected)) = (&second, case.get("y2")) {
            assert_close(case.name(), y2, expected, tolerance(y2));
        }
        let steps = std::iter::once(first).chain(second.map(|(_, statistics)| statistics));
        for (step, statistics) in (1..).zip(steps) {
            // Without a momentum PyTorch keeps the cumulative average.
            let momentum = case.settings["momentum"]
                .as_f64()
                .unwrap_or(1.0 / step as f64);
            running.0 = update_running(&running.0, &statistics.mean, momentum)?;
            running.1 = update_running(&running.1, &statistics.unbiased_variance, momentum)?;
            for (name, value) in [("mean", &running.0), ("var", &running.1)] {
                let name = format!("running_{name}{step}");
                assert_close(&name, value, case.tensor(&name), tolerance(value));
            }
        }
        Ok(())
    })
}
