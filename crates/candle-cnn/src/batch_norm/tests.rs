use candle_core::{DType, Device, Result, Tensor};
use test_support::{check_gradients, seeded_values};

use super::*;

fn tensor(name: &str, dims: &[usize]) -> Result<Tensor> {
    let values = seeded_values(name, dims.iter().product(), 2.0);
    Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(DType::F64)
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
        batch_norm_eval(&inputs[0], &inputs[1], &inputs[2], &mean, &variance, 1e-3)
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
    assert!(batch_norm_eval(&x, &ones, &ones, &ones, &ones, 1e-5).is_ok());
    let three = Tensor::ones(3, DType::F32, &Device::Cpu)?;
    let text = batch_norm_eval(&x, &three, &ones, &ones, &ones, 1e-5)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("[3]") && text.contains("[1, 2, 1, 1]"),
        "{text}"
    );
    Ok(())
}
