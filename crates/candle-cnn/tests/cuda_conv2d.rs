//! The convolution on CUDA under each of its settings, and in a CUDA graph. Everything is skipped without a GPU;
//! what holds on both devices is tested elsewhere.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_cnn::cuda::{F32Math, Settings, set_settings};
use candle_cnn::{Conv2dConfig, conv2d, conv2d_relu};
use candle_core::{DType, Device, Result, Tensor, Var};
use test_support::{assert_close, devices, relative_error, seeded_values, skipped};

/// The settings are the process's: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn gpu() -> Option<Device> {
    devices().into_iter().find(Device::is_cuda)
}

fn values(name: &str, dims: &[usize], device: &Device) -> Result<Tensor> {
    let values = seeded_values(name, dims.iter().product(), 2.0);
    Tensor::from_vec(values, dims, device)
}

/// Sizes of a convolution: input, weight, settings.
type Shape = ([usize; 4], [usize; 4], Conv2dConfig);

/// Layers of GoogLeNet, and one with everything odd.
fn shapes() -> [Shape; 5] {
    let strided = Conv2dConfig::padded(3).strided(2);
    let odd = Conv2dConfig {
        stride: (2, 1),
        padding: (0, 3),
        dilation: (1, 2),
    };
    [
        ([4, 3, 64, 64], [64, 3, 7, 7], strided),
        ([8, 192, 16, 16], [96, 192, 1, 1], Conv2dConfig::default()),
        ([8, 96, 16, 16], [128, 96, 3, 3], Conv2dConfig::padded(1)),
        ([8, 16, 8, 8], [48, 16, 5, 5], Conv2dConfig::padded(2)),
        ([3, 5, 9, 7], [7, 5, 3, 2], odd),
    ]
}

/// Output and gradients of input, weight and bias, on the CPU and in f64.
fn results(
    (x, weight, config): Shape,
    bias: bool,
    relu: bool,
    dtype: DType,
    device: &Device,
) -> Result<Vec<Tensor>> {
    let variable = |name, dims: &[usize]| -> Result<Var> {
        // Values that bf16 has as well, so that only the computation rounds.
        let exact = values(name, dims, &Device::Cpu)?.to_dtype(DType::BF16)?;
        Var::from_tensor(
            &exact
                .to_dtype(DType::F32)?
                .to_dtype(dtype)?
                .to_device(device)?,
        )
    };
    let (x, w) = (variable("x", &x)?, variable("weight", &weight)?);
    let b = variable("bias", &[weight[0]])?;
    let op = if relu { conv2d_relu } else { conv2d };
    let y = op(&x, &w, bias.then_some(b.as_tensor()), config)?;
    let dy = variable("dy", y.dims())?;
    let gradients = (&y * dy.as_tensor())?.sum_all()?.backward()?;
    let mut results = vec![y];
    for variable in [&x, &w, &b] {
        results.extend(gradients.get(variable).cloned());
    }
    assert_eq!(results.len(), if bias { 4 } else { 3 });
    results
        .iter()
        .map(|t| t.to_device(&Device::Cpu)?.to_dtype(DType::F64))
        .collect()
}

fn has_bf16() -> bool {
    #[cfg(feature = "cuda")]
    return candle_cnn::cuda::device_info(0).unwrap().has_bf16();
    #[cfg(not(feature = "cuda"))]
    return false;
}

#[test]
fn every_setting_gives_the_result_of_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else {
        return Ok(());
    };
    let _alone = alone();
    let mut dtypes = vec![DType::F32, DType::F64];
    match has_bf16() {
        true => dtypes.push(DType::BF16),
        false => skipped("this GPU has no bf16 convolutions"),
    }
    for (relu, bias) in [(false, false), (false, true), (true, false), (true, true)] {
        for shape in shapes() {
            let expected = results(shape, bias, relu, DType::F64, &Device::Cpu)?;
            for convolution in [F32Math::Full, F32Math::Tf32] {
                for (benchmark, deterministic) in [(true, false), (false, false), (false, true)] {
                    for fused_epilogue in [true, false] {
                        let settings = Settings {
                            convolution,
                            benchmark,
                            deterministic,
                            fused_epilogue,
                            ..Settings::default()
                        };
                        set_settings(settings);
                        for &dtype in &dtypes {
                            // Rounding of the factors: 2^-24, 2^-11, 2^-9, with room for sums.
                            let rounding: f64 = match (dtype, convolution) {
                                (DType::F64, _) => 1e-12,
                                (DType::F32, F32Math::Full) => 2e-5,
                                (DType::F32, F32Math::Tf32) => 2e-3,
                                _ => 1e-2,
                            };
                            let actual = results(shape, bias, relu, dtype, &gpu)?;
                            for (i, (actual, expected)) in actual.iter().zip(&expected).enumerate()
                            {
                                let what = format!("{shape:?} {dtype:?} {settings:?}: result {i}");
                                // Rounding carries about that share of a ReLU's inputs across zero, and with each
                                // goes a whole gradient: in the norm, the root of the share.
                                let masked = relu && i > 0;
                                let tolerance = if masked { rounding.sqrt() } else { rounding };
                                assert_close(&what, actual, expected, tolerance);
                            }
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn tf32_rounds_where_it_is_allowed_and_only_there() -> Result<()> {
    let Some(gpu) = gpu() else {
        return Ok(());
    };
    let _alone = alone();
    let shape = ([8, 256, 16, 16], [256, 256, 3, 3], Conv2dConfig::padded(1));
    let mut errors = Vec::new();
    let x = values("x", &shape.0, &Device::Cpu)?;
    let weight = values("weight", &shape.1, &Device::Cpu)?;
    let exact = conv2d(&x, &weight, None, shape.2)?;
    for convolution in [F32Math::Full, F32Math::Tf32] {
        // Rules of thumb take the tensor cores for this shape; a clock may not.
        set_settings(Settings {
            convolution,
            benchmark: false,
            ..Settings::default()
        });
        let y = conv2d(&x.to_device(&gpu)?, &weight.to_device(&gpu)?, None, shape.2)?;
        errors.push(relative_error(&y.to_device(&Device::Cpu)?, &exact)?);
    }
    assert!(errors[0] < 3e-5, "without TF32 {:.1e}", errors[0]);
    assert!(errors[1] > 5e-5, "with TF32 {:.1e}", errors[1]);
    Ok(())
}

#[test]
fn deterministic_convolutions_repeat_their_bits_on_another_thread() -> Result<()> {
    let Some(gpu) = gpu() else {
        return Ok(());
    };
    let _alone = alone();
    set_settings(Settings {
        deterministic: true,
        ..Settings::default()
    });
    for shape in shapes() {
        let here = results(shape, true, true, DType::F32, &gpu)?;
        let there = std::thread::scope(|scope| {
            let other = scope.spawn(|| results(shape, true, true, DType::F32, &gpu));
            other.join().expect("the other thread panicked")
        })?;
        for (here, there) in here.iter().zip(&there) {
            assert_eq!(relative_error(there, here)?, 0.0, "{shape:?}");
        }
    }
    Ok(())
}

#[test]
fn a_view_that_begins_between_the_words_of_an_engine_gives_the_result_of_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else {
        return Ok(());
    };
    let _alone = alone();
    set_settings(Settings {
        convolution: F32Math::Full,
        ..Settings::default()
    });
    // The second image begins after 245 numbers, the second kernel after 45.
    let x = values("x", &[3, 5, 7, 7], &Device::Cpu)?;
    let weight = values("weight", &[4, 5, 3, 3], &Device::Cpu)?;
    let on = |device: &Device| -> Result<Tensor> {
        let x = x.to_device(device)?.narrow(0, 1, 2)?;
        let weight = weight.to_device(device)?.narrow(0, 1, 3)?;
        conv2d(&x, &weight, None, Conv2dConfig::padded(1))?.to_device(&Device::Cpu)
    };
    assert_close("the view's result", &on(&gpu)?, &on(&Device::Cpu)?, 1e-5);
    Ok(())
}

#[test]
fn no_memory_to_work_in_still_gives_the_result() -> Result<()> {
    let Some(gpu) = gpu() else {
        return Ok(());
    };
    let _alone = alone();
    set_settings(Settings {
        convolution: F32Math::Full,
        workspace_limit: 0,
        ..Settings::default()
    });
    for shape in shapes() {
        let expected = results(shape, true, false, DType::F64, &Device::Cpu)?;
        let actual = results(shape, true, false, DType::F32, &gpu)?;
        for (actual, expected) in actual.iter().zip(&expected) {
            assert_close(&format!("{shape:?}"), actual, expected, 1e-4);
        }
    }
    Ok(())
}

#[cfg(feature = "cuda")]
#[test]
fn a_step_captured_in_a_cuda_graph_follows_its_inputs() -> Result<()> {
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::sys::{
        CUgraphInstantiate_flags_enum, CUstreamCaptureMode_enum,
    };
    if gpu().is_none() {
        return Ok(());
    }
    let _alone = alone();
    set_settings(Settings::default());
    // A device of its own: no tensor of another test is freed while its stream is captured.
    let gpu = candle_cnn::cuda::open_device(0)?;
    let stream = gpu.as_cuda_device()?.cuda_stream();
    // Candle uploads the strides of some operations: once, and not while capturing.
    let _uploads = gpu.as_cuda_device()?.enable_cuda_graph_htod_cache();
    let config = Conv2dConfig::padded(1);
    let x = Var::from_tensor(&values("x", &[4, 8, 12, 12], &gpu)?)?;
    let weight = Var::from_tensor(&values("weight", &[16, 8, 3, 3], &gpu)?)?;
    let bias = Var::from_tensor(&values("bias", &[16], &gpu)?)?;
    let kept = Var::zeros((16, 8, 3, 3), DType::F32, &gpu)?;
    let step = || -> Result<()> {
        let y = conv2d_relu(&x, &weight, Some(&bias), config)?;
        let gradients = y.sum_all()?.backward()?;
        let gradient = gradients.get(&weight).expect("the weight has a gradient");
        kept.set(gradient)
    };
    step()?;
    stream
        .begin_capture(CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        .w()?;
    let captured = step();
    // What an operation that failed has left would be taken for the end's.
    let left = stream.context().check_err();
    let graph = stream.end_capture(
        CUgraphInstantiate_flags_enum::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH,
    );
    captured?;
    left.w()?;
    let graph = graph.w()?.expect("something was captured");
    x.set(&values("another x", &[4, 8, 12, 12], &gpu)?)?;
    graph.launch().w()?;
    let replayed = kept.as_tensor().copy()?;
    step()?;
    assert_close("the weight's gradient", &replayed, kept.as_tensor(), 1e-5);
    Ok(())
}
