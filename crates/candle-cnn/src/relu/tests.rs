use candle_core::{Device, Result, Tensor};

use super::*;

#[test]
fn gradient_at_exactly_zero_is_zero_and_nan_stays() -> Result<()> {
    let x = candle_core::Var::new(&[0.0f64, -0.0, -1.0, f64::NAN, 3.0], &Device::Cpu)?;
    let y = relu(&x)?;
    let values = y.to_vec1::<f64>()?;
    assert_eq!(values[..3], [0.0, 0.0, 0.0]);
    assert!(values[3].is_nan());
    let gradients = y.backward()?;
    assert_eq!(
        gradients.get(&x).unwrap().to_vec1::<f64>()?,
        [0.0, 0.0, 0.0, 1.0, 1.0]
    );
    Ok(())
}

#[test]
fn whole_numbers_are_refused() -> Result<()> {
    let text = relu(&Tensor::new(&[1u32], &Device::Cpu)?)
        .unwrap_err()
        .to_string();
    assert!(text.contains("U32"), "{text}");
    Ok(())
}

#[test]
fn a_view_of_nothing_may_begin_anywhere() -> Result<()> {
    let nothing = Tensor::zeros((5, 0, 7), candle_core::DType::F32, &Device::Cpu)?;
    assert_eq!(relu(&nothing.narrow(2, 2, 4)?)?.dims(), [5, 0, 4]);
    Ok(())
}

#[test]
fn a_zero_keeps_its_sign_and_what_is_below_becomes_plus_zero() -> Result<()> {
    let x = Tensor::new(&[-0.0f32, 0.0, -1.0, -f32::MIN_POSITIVE, 2.0], &Device::Cpu)?;
    let bits: Vec<u32> = relu(&x)?
        .to_vec1::<f32>()?
        .iter()
        .map(|y| y.to_bits())
        .collect();
    assert_eq!(bits, [-0.0f32, 0.0, 0.0, 0.0, 2.0].map(f32::to_bits));
    Ok(())
}
