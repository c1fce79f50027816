//! A [`candle_cnn::StaticGraph`] on CUDA under each setting of its convolutions. Skipped without a GPU; what holds whatever the
//! setting is tested beside the graph.

use candle_cnn::cuda::{F32Math, Settings, set_settings};
use candle_cnn::{
    Conv2dConfig, ConvParameters, MaxPool2dConfig, StaticGraphBuilder, backward, conv2d_relu,
    global_avg_pool2d, max_pool2d,
};
use candle_core::{DType, Device, Result, Tensor, Var};
use test_support::{devices, relative_error, seeded_values};

/// Seeded numbers around 0.
fn tensor(name: &str, shape: &[usize], scale: f64) -> Result<Tensor> {
    let values = seeded_values(name, shape.iter().product(), scale);
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// Two convolutions of different kernels and a pool read one map: their gradients add up there.
#[test]
fn gradients_of_a_map_that_several_operations_read_add_up() -> Result<()> {
    let Some(gpu) = devices().into_iter().find(Device::is_cuda) else {
        return Ok(());
    };
    let mut b = StaticGraphBuilder::new(4, (9, 10));
    let x = b.conv2d_relu(b.input(), 16, 3, 1)?;
    let one = b.conv2d_relu(x, 16, 3, 1)?;
    let two = b.conv2d_relu(x, 32, 5, 2)?;
    let pooled = b.max_pool2d(x, MaxPool2dConfig::square(3, 1, 1))?;
    let three = b.conv2d_relu(pooled, 8, 1, 0)?;
    let whole = b.concat(&[one, two, three])?;
    let graph = b.global_avg_pool2d(whole)?;
    let shapes = [[16, 4, 3, 3], [16, 16, 3, 3], [32, 16, 5, 5], [8, 16, 1, 1]];
    let images = tensor("images", &[3, 4, 9, 10], 2.0)?;
    let vars = |dtype: DType, device: &Device| -> Result<Vec<[Var; 2]>> {
        let var = |name: String, shape: &[usize]| {
            Var::from_tensor(
                &tensor(&name, shape, 0.5)?
                    .to_dtype(dtype)?
                    .to_device(device)?,
            )
        };
        let of = |(i, s): (usize, &[usize; 4])| {
            Ok([var(format!("w{i}"), s)?, var(format!("b{i}"), &s[..1])?])
        };
        shapes.iter().enumerate().map(of).collect()
    };
    let exact = vars(DType::F64, &Device::Cpu)?;
    let conv = |x: &Tensor, i: usize, padding| {
        let [weight, bias] = &exact[i];
        conv2d_relu(x, weight, Some(bias), Conv2dConfig::padded(padding))
    };
    let x = conv(&images.to_dtype(DType::F64)?, 0, 1)?;
    let pooled = max_pool2d(&x, MaxPool2dConfig::square(3, 1, 1))?;
    let parts = [conv(&x, 1, 1)?, conv(&x, 2, 2)?, conv(&pooled, 3, 0)?];
    let expected = global_avg_pool2d(&Tensor::cat(&parts, 1)?)?;
    let expected = expected.sqr()?.sum_all()?.backward()?;

    let on_gpu = vars(DType::F32, &gpu)?;
    let settings = [F32Math::Full, F32Math::Tf32]
        .into_iter()
        .flat_map(|convolution| {
            let ways = [
                (true, false, 4),
                (true, false, 1),
                (false, false, 2),
                (false, true, 9),
            ];
            ways.map(|(benchmark, deterministic, streams)| Settings {
                convolution,
                benchmark,
                deterministic,
                streams,
                ..Settings::default()
            })
        });
    // Of all four, and with one of those frozen that the others' gradients pass by.
    for (settings, frozen) in settings.flat_map(|s| [(s, None), (s, Some(1))]) {
        set_settings(settings);
        let tolerance = match settings.convolution {
            F32Math::Full => 1e-5,
            F32Math::Tf32 => 5e-3,
        };
        let tensors = on_gpu
            .iter()
            .enumerate()
            .map(|(i, pair)| match frozen == Some(i) {
                true => pair.each_ref().map(Var::as_detached_tensor),
                false => pair.each_ref().map(|var| var.as_tensor().clone()),
            });
        let tensors: Vec<_> = tensors.collect();
        let of = |[weight, bias]: &'_ [Tensor; 2]| (weight.clone(), bias.clone());
        let pairs: Vec<_> = tensors.iter().map(of).collect();
        let parameters: Vec<_> = pairs
            .iter()
            .map(|(weight, bias)| ConvParameters::Bias { weight, bias })
            .collect();
        let features = graph
            .forward(&images.to_device(&gpu)?, &parameters)?
            .features;
        let gradients = backward(&features.sqr()?.sum_all()?)?;
        for (i, (vars, of)) in on_gpu.iter().zip(&exact).enumerate() {
            for (var, of) in vars.iter().zip(of) {
                let actual = gradients.get(var);
                assert_eq!(actual.is_none(), frozen == Some(i));
                if let Some(actual) = actual {
                    let error = relative_error(
                        &actual.to_device(&Device::Cpu)?,
                        expected.get(of).unwrap(),
                    )?;
                    assert!(
                        error <= tolerance,
                        "{settings:?} {frozen:?} {i}: {error:.1e}"
                    );
                }
            }
        }
    }
    Ok(())
}
