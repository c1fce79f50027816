use candle_core::{DType, Device, Result, Tensor};
use test_support::{check_gradients, seeded_values};

use super::*;

#[test]
fn gradient_agrees_with_finite_differences() -> Result<()> {
    let x = Tensor::from_vec(seeded_values("x", 30, 4.0), (5, 6), &Device::Cpu)?;
    let x = x.to_dtype(DType::F64)?;
    let labels = Tensor::new(&[0u32, 5, 2, 2, 1], &Device::Cpu)?;
    for label_smoothing in [0.0, 0.1, 1.0] {
        let worst = check_gradients(&[&x], 1e-5, |inputs| {
            cross_entropy(&inputs[0], &labels, CrossEntropyConfig { label_smoothing })
        })?;
        assert!(worst < 1e-7, "{worst:.1e}");
    }
    Ok(())
}

#[test]
fn impossible_labels_and_shapes_are_errors_that_name_them() -> Result<()> {
    let logits = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
    let message = |labels: &Tensor| {
        let config = CrossEntropyConfig::default();
        cross_entropy(&logits, labels, config)
            .unwrap_err()
            .to_string()
    };
    let text = message(&Tensor::new(&[0u32, 3], &Device::Cpu)?);
    assert!(text.contains("label 3 of example 1"), "{text}");
    let text = message(&Tensor::new(&[0i64, -1], &Device::Cpu)?);
    assert!(text.contains("label -1"), "{text}");
    let text = message(&Tensor::new(&[0u32], &Device::Cpu)?);
    assert!(text.contains("[2, 3]") && text.contains("[1]"), "{text}");
    assert!(message(&Tensor::new(&[0f32, 1.0], &Device::Cpu)?).contains("F32"));
    Ok(())
}

#[test]
fn an_infinite_logit_leaves_nothing_finite_and_minus_infinity_is_no_class() -> Result<()> {
    let labels = Tensor::new(&[0u32], &Device::Cpu)?;
    let loss_and_gradient = |logits: [f32; 3]| -> Result<(f32, Vec<f32>)> {
        let logits = candle_core::Var::new(&[logits], &Device::Cpu)?;
        let loss = cross_entropy(&logits, &labels, CrossEntropyConfig::default())?;
        let gradients = loss.backward()?;
        let gradient = gradients.get(&logits).unwrap().flatten_all()?;
        Ok((loss.to_scalar()?, gradient.to_vec1()?))
    };
    let (loss, gradient) = loss_and_gradient([0.0, f32::INFINITY, 1.0])?;
    assert!(loss.is_nan(), "{loss}");
    assert!(gradient.iter().all(|g| g.is_nan()), "{gradient:?}");
    let (loss, gradient) = loss_and_gradient([0.0, f32::NEG_INFINITY, 0.0])?;
    assert!((loss - std::f32::consts::LN_2).abs() < 1e-6, "{loss}");
    assert_eq!(gradient, [-0.5, 0.0, 0.5]);
    Ok(())
}
