use candle_core::{DType, Device, Result, Tensor};
use test_support::{check_gradients, seeded_values};

use super::*;

#[test]
fn gradients_agree_with_finite_differences() -> Result<()> {
    let values = seeded_values("x", 2 * 2 * 7 * 5, 2.0);
    let x = Tensor::from_vec(values, (2, 2, 7, 5), &Device::Cpu)?.to_dtype(DType::F64)?;
    let config = AvgPool2dConfig {
        ceil_mode: true,
        ..AvgPool2dConfig::square(3, 2, 1)
    };
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
