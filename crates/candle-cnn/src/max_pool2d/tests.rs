use candle_core::{DType, Device, Result, Tensor, Var};
use proptest::prelude::*;
use test_support::{check_gradients, seeded_values};

use super::*;
use crate::element::Element;

/// Values on a coarse grid, so that ties are common.
fn tied(name: &str, dims: (usize, usize, usize, usize)) -> Result<Tensor> {
    let count = dims.0 * dims.1 * dims.2 * dims.3;
    let values: Vec<f32> = seeded_values(name, count, 6.0)
        .iter()
        .map(|v| v.round())
        .collect();
    Tensor::from_vec(values, dims, &Device::Cpu)
}

fn bits<T: Element>(values: &[T]) -> Vec<u64> {
    values
        .iter()
        .map(|value| value.as_f64().to_bits())
        .collect()
}

/// Compares with the plain loops, bit for bit.
fn check<T: Element>(planes: &Planes, x: &[f32]) {
    let of = |values: &[f32]| -> Vec<T> {
        let values = values.iter();
        values.map(|&value| T::real(f64::from(value))).collect()
    };
    let x = of(x);
    let count = planes.batch * planes.channels * planes.output_plane();
    let dy = of(&seeded_values("dy", count, 2.0));
    let (mut y, mut dx) = (Vec::new(), vec![T::ZERO; x.len()]);
    for (p, plane) in x.chunks_exact(planes.input_plane()).enumerate() {
        for oh in 0..planes.h.output {
            for ow in 0..planes.w.output {
                let winner = reference::first_maximum(planes, plane, oh, ow);
                dx[p * planes.input_plane() + winner] += dy[y.len()];
                y.push(plane[winner]);
            }
        }
    }
    for isa in Isa::available() {
        assert_eq!(bits(&cpu::forward(planes, isa, &x)), bits(&y));
        assert_eq!(bits(&cpu::backward(planes, isa, &x, &dy)), bits(&dx));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn every_instruction_set_sends_the_gradient_to_the_first_maximum(
        dims in (1usize..4, 1usize..12, 1usize..12, 1usize..20),
        kernel in (1usize..6, 1usize..6),
        stride in (1usize..4, 1usize..4),
        padding in (0usize..3, 0usize..3),
        ceil_mode: bool,
    ) {
        let x = tied("x", dims).unwrap();
        let window = PoolWindow { kernel_size: kernel, stride, padding, ceil_mode };
        let Ok(planes) = Planes::new(OP, &x, window) else {
            return Ok(());
        };
        let unusual = |x| match x {
            ..=-1.0 => f32::NEG_INFINITY,
            3.0 => f32::NAN,
            _ => x,
        };
        let x: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
        let x: Vec<f32> = x.into_iter().map(unusual).collect();
        check::<f32>(&planes, &x);
        check::<f64>(&planes, &x);
    }
}

#[test]
fn gradient_agrees_with_finite_differences() -> Result<()> {
    let values = seeded_values("x", 2 * 3 * 6 * 5, 2.0);
    let x = Tensor::from_vec(values, (2, 3, 6, 5), &Device::Cpu)?.to_dtype(DType::F64)?;
    for config in [
        MaxPool2dConfig::square(3, 1, 1),
        MaxPool2dConfig::square(3, 2, 0).ceil(),
    ] {
        let worst = check_gradients(&[&x], 1e-6, |inputs| max_pool2d(&inputs[0], config))?;
        assert!(worst < 1e-7, "{worst:.1e}");
    }
    Ok(())
}

#[test]
fn strided_input_gives_the_result_of_a_contiguous_one() -> Result<()> {
    let x = Var::randn(0f32, 1.0, (2, 6, 5, 3), &Device::Cpu)?;
    let turned = x.permute((0, 3, 1, 2))?;
    let config = MaxPool2dConfig::square(3, 2, 1);
    let y = max_pool2d(&turned, config)?;
    let expected = max_pool2d(&turned.contiguous()?.detach(), config)?;
    let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
    assert_eq!(flat(&y)?, flat(&expected)?);
    assert_eq!(y.backward()?.get(&x).unwrap().dims(), [2, 6, 5, 3]);
    Ok(())
}

#[test]
fn bad_windows_are_errors_that_name_the_setting() -> Result<()> {
    let x = Tensor::zeros((1, 1, 2, 2), DType::F32, &Device::Cpu)?;
    for (config, expected) in [
        (MaxPool2dConfig::square(3, 1, 2), "padding is (2, 2)"),
        (MaxPool2dConfig::square(0, 1, 0), "kernel_size is (0, 0)"),
        (MaxPool2dConfig::square(2, 0, 0), "stride is (0, 0)"),
        (
            MaxPool2dConfig::square(5, 1, 1),
            "a window of (5, 5) does not fit",
        ),
    ] {
        let text = max_pool2d(&x, config).unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }
    Ok(())
}

#[test]
fn rounding_up_makes_a_window_of_an_image_smaller_than_the_kernel() -> Result<()> {
    // As PyTorch: 2 pixels under a window of 3 and stride 2 give one output;
    // a single pixel gives none, and without ceil_mode neither do two.
    let window = MaxPool2dConfig::square(3, 2, 0);
    let x = Var::new(&[[[[1f64, 4.0], [3.0, 2.0]]]], &Device::Cpu)?;
    let y = max_pool2d(&x, window.ceil())?;
    assert_eq!(y.flatten_all()?.to_vec1::<f64>()?, [4.0]);
    let gradients = y.backward()?;
    let dx = gradients.get(&x).unwrap().flatten_all()?;
    assert_eq!(dx.to_vec1::<f64>()?, [0.0, 1.0, 0.0, 0.0]);
    assert!(max_pool2d(&x, window).is_err());
    assert!(max_pool2d(&x.narrow(2, 0, 1)?, window.ceil()).is_err());
    Ok(())
}

#[test]
fn windows_and_steps_beyond_the_image_are_as_good_as_ones_that_end_with_it() -> Result<()> {
    let x = tied("x", (2, 3, 6, 7))?;
    let flat = |y: &Tensor| y.flatten_all()?.to_vec1::<f32>();
    let config = |kernel: usize, stride: usize| MaxPool2dConfig::square(kernel, stride, 0);
    let one = flat(&max_pool2d(&x, config(5, 7))?)?;
    for stride in [1 << 62, usize::MAX] {
        assert_eq!(flat(&max_pool2d(&x, config(5, stride))?)?, one);
        assert_eq!(flat(&max_pool2d(&x, config(5, stride).ceil())?)?, one);
    }
    let all = flat(&x.max_keepdim(3)?.max_keepdim(2)?)?;
    let y = max_pool2d(&x, config(1 << 62, 1 << 63).ceil())?;
    assert_eq!((y.dims(), flat(&y)?), (&[2, 3, 1, 1][..], all));
    Ok(())
}

#[test]
fn sizes_that_overflow_are_errors() -> Result<()> {
    let x = Tensor::zeros((1, 1, 5, 5), DType::F32, &Device::Cpu)?;
    for (config, expected) in [
        (
            MaxPool2dConfig::square(1 << 40, 1 << 30, 1 << 39),
            "padded input",
        ),
        (
            MaxPool2dConfig::square(1 << 17, 1 << 10, 1 << 16),
            "kernel_size",
        ),
        (MaxPool2dConfig::square(1 << 40, 1, 1 << 39), "padded input"),
    ] {
        let text = max_pool2d(&x, config).unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }
    // Nothing in memory, but 2⁶⁴ pixels in each of no planes.
    let x = Tensor::zeros((1, 0, 1 << 32, 1 << 32), DType::F32, &Device::Cpu)?;
    let text = max_pool2d(&x, MaxPool2dConfig::square(2, 2, 0)).unwrap_err();
    assert!(text.to_string().contains("input of shape"), "{text}");
    Ok(())
}
