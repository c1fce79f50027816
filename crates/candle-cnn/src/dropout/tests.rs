use candle_core::{DType, Device, Result, Tensor, Var};

use super::*;

const SEED: Mode = Mode::Train { dropout_seed: 3 };

#[test]
fn kept_elements_are_scaled_and_the_gradient_has_the_same_mask() -> Result<()> {
    let x = Var::ones((100, 100), DType::F32, &Device::Cpu)?;
    let y = dropout(&x, 0.25, 0, SEED)?;
    let values = y.flatten_all()?.to_vec1::<f32>()?;
    let kept = values.iter().filter(|&&v| v > 0.0).count();
    // Standard deviation of the count: √(10,000 · ¼ · ¾) = 43.
    assert!((7_500 - 220..7_500 + 220).contains(&kept), "{kept}");
    assert!(values.iter().all(|&v| v == 0.0 || v == 1.0 / 0.75));
    let gradients = y.backward()?;
    assert_eq!(
        gradients.get(&x).unwrap().flatten_all()?.to_vec1::<f32>()?,
        values
    );
    Ok(())
}

#[test]
fn mask_depends_on_seed_and_salt_alone() -> Result<()> {
    let x = Tensor::ones(64, DType::F32, &Device::Cpu)?;
    let mask = |salt, mode| dropout(&x, 0.5, salt, mode)?.to_vec1::<f32>();
    assert_eq!(mask(0, SEED)?, mask(0, SEED)?);
    assert_ne!(mask(0, SEED)?, mask(1, SEED)?);
    assert_ne!(mask(0, SEED)?, mask(0, Mode::Train { dropout_seed: 4 })?);
    Ok(())
}

#[test]
fn the_mask_is_one_run_of_random_words_however_it_is_cut_into_tasks() -> Result<()> {
    let count = 2 * CHUNK + 100;
    let y = dropout(
        &Tensor::ones(count, DType::F32, &Device::Cpu)?,
        0.25,
        5,
        SEED,
    )?;
    let mut generator = ChaCha8Rng::seed_from_u64(3);
    generator.set_stream(5);
    let kept = |_| generator.next_u32() >= 1 << 30;
    let expected: Vec<bool> = (0..count).map(kept).collect();
    let values = y.to_vec1::<f32>()?;
    assert_eq!(
        values.iter().map(|&y| y > 0.0).collect::<Vec<_>>(),
        expected
    );
    Ok(())
}

#[test]
fn probabilities_of_zero_and_one_keep_and_drop_everything() -> Result<()> {
    let x = Tensor::ones(64, DType::F64, &Device::Cpu)?;
    assert_eq!(dropout(&x, 0.0, 0, SEED)?.to_vec1::<f64>()?, vec![1.0; 64]);
    assert_eq!(dropout(&x, 1.0, 0, SEED)?.to_vec1::<f64>()?, vec![0.0; 64]);
    for p in [-0.1, 1.1, f64::NAN] {
        assert!(dropout(&x, p, 0, SEED).is_err());
    }
    Ok(())
}

#[test]
fn what_is_not_finite_stays_seen_where_it_is_dropped() -> Result<()> {
    for value in [f32::NAN, f32::INFINITY] {
        let y = dropout(&Tensor::full(value, 64, &Device::Cpu)?, 0.5, 0, SEED)?;
        let values = y.to_vec1::<f32>()?;
        assert!(values.iter().all(|v| !v.is_finite()), "{values:?}");
        assert!(values.iter().any(|v| v.is_nan()), "{values:?}");
    }
    Ok(())
}
