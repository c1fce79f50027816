//! What the tests of several crates share: fixtures made by PyTorch,
//! comparisons with a tolerance, gradients by finite differences, an HTTP server
//! that misbehaves, `.pth` files, odd JPEGs, programs under test and what they write.

pub mod files;
pub mod http;

mod devices;
mod fixture;
mod gradient;
mod jpeg;
mod runs;
mod seeded;
mod skipped;
mod torch_file;

pub use devices::devices;
pub use fixture::{Case, Fixture};
pub use gradient::check_gradients;
pub use jpeg::odd_jpeg;
pub use runs::{TESTED_PROGRAMS, free_port, only_run, program, run_begun, set_epochs, step_losses};
pub use seeded::{seeded_indices, seeded_values, seeded_weight};
pub use skipped::skipped;
pub use torch_file::legacy_pth;

use candle_core::{DType, Result, Tensor};

/// `‖actual − expected‖₂ / ‖expected‖₂` in f64, or the numerator alone when
/// the expected tensor is all zero. Equal infinities and NaN at the same
/// place count as equal; anything else that is not finite is an infinite error.
///
/// # Errors
/// Tensors of different shapes.
pub fn relative_error(actual: &Tensor, expected: &Tensor) -> Result<f64> {
    if actual.dims() != expected.dims() {
        candle_core::bail!("shape {:?}, expected {:?}", actual.dims(), expected.dims());
    }
    let values = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (mut difference, mut norm) = (0.0, 0.0);
    for (a, e) in values(actual)?.into_iter().zip(values(expected)?) {
        if a == e || (a.is_nan() && e.is_nan()) {
            norm += if e.is_finite() { e * e } else { 0.0 };
            continue;
        }
        if !(a.is_finite() && e.is_finite()) {
            return Ok(f64::INFINITY);
        }
        difference += (a - e) * (a - e);
        norm += e * e;
    }
    Ok(if norm > 0.0 {
        (difference / norm).sqrt()
    } else {
        difference.sqrt()
    })
}

/// Asserts that [`relative_error`] is at most `tolerance`.
///
/// # Panics
/// When it is not, or when the shapes differ, naming `what`.
#[track_caller]
pub fn assert_close(what: &str, actual: &Tensor, expected: &Tensor, tolerance: f64) {
    match relative_error(actual, expected) {
        Ok(error) => assert!(
            error <= tolerance,
            "{what}: relative error {error:.3e} is above {tolerance:.0e}"
        ),
        Err(error) => panic!("{what}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn comparison_rejects_a_perturbed_tensor() -> Result<()> {
        let expected = Tensor::new(&[1f64, 2.0, 2.0], &Device::Cpu)?;
        let perturbed = Tensor::new(&[1f64, 2.0, 2.3], &Device::Cpu)?;
        assert_close("same", &expected, &expected, 0.0);
        assert!((relative_error(&perturbed, &expected)? - 0.1).abs() < 1e-12);
        Ok(())
    }

    #[test]
    fn comparison_rejects_nan_infinity_and_another_shape() -> Result<()> {
        let expected = Tensor::new(&[1f64, 2.0], &Device::Cpu)?;
        let nan = Tensor::new(&[1f64, f64::NAN], &Device::Cpu)?;
        assert_eq!(relative_error(&nan, &expected)?, f64::INFINITY);
        assert_eq!(relative_error(&nan, &nan)?, 0.0);
        assert!(relative_error(&expected.unsqueeze(0)?, &expected).is_err());
        Ok(())
    }
}
