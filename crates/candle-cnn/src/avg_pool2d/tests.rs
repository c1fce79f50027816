use candle_core::{DType, Device, Result, Tensor};
use test_support::{check_gradients, seeded_values};

use super::*;

#[test]
fn gradients_agree_with_finite_differences() -> Result<()> {
    let values = seeded_values("x", 2 * 2 * 7 * 5, 2.0);
    let x = Tensor::from_vec(values, (2, 2, 7, 5), &Device::Cpu)?.to_dtype(DType::F64)?;
    let config = AvgPool2dConfig::square(3, 2, 1).ceil();
    for worst in [
        check_gradients(&[&x], 1e-4, |inputs| avg_pool2d(&inputs[0], config))?,
        check_gradients(&[&x], 1e-4, |inputs| {
            adaptive_avg_pool2d(&inputs[0], (4, 3))
        })?,
        check_gradients(&[&x], 1e-4, |inputs| global_avg_pool2d(&inputs[0]))?,
    ] {
        assert!(worst < 1e-8, "{worst:.1e}");
    }
    Ok(())
}

#[test]
fn bad_sizes_are_errors() -> Result<()> {
    let x = Tensor::zeros((1, 1, 2, 2), DType::F32, &Device::Cpu)?;
    let text = adaptive_avg_pool2d(&x, (0, 1)).unwrap_err().to_string();
    assert!(text.contains("output_size is (0, 1)"), "{text}");
    let text = adaptive_avg_pool2d(&x.squeeze(0)?, (1, 1))
        .unwrap_err()
        .to_string();
    assert!(text.contains("[1, 2, 2]"), "{text}");
    Ok(())
}

#[test]
fn sizes_that_overflow_are_errors_and_a_border_of_2_to_the_80_pixels_counts() -> Result<()> {
    let x = Tensor::ones((1, 1, 4, 4), DType::F64, &Device::Cpu)?;
    let wide = AvgPool2dConfig::square(1 << 40, 4, 1 << 39);
    let y = avg_pool2d(&x, wide)?.flatten_all()?.to_vec1::<f64>()?;
    assert_eq!(y, [16.0 / (2f64).powi(80); 4]);
    // Nothing in memory, but 2⁶⁴ pixels in each of no planes.
    let nothing = Tensor::zeros((0, 1, 1 << 32, 1 << 32), DType::F32, &Device::Cpu)?;
    for result in [
        avg_pool2d(&nothing, AvgPool2dConfig::square(2, 2, 0)),
        adaptive_avg_pool2d(&nothing, (1, 1)),
        adaptive_avg_pool2d(&x, (1 << 32, 1 << 32)),
    ] {
        let text = result.unwrap_err().to_string();
        assert!(text.contains("more elements"), "{text}");
    }
    Ok(())
}
