//! Gradients by central finite differences.

use candle_core::{DType, Result, Tensor, Var};

/// Compares the gradients that `backward()` gives for `inputs` (f64) with
/// central differences of `f`, whose result is weighted by fixed pseudo-random
/// numbers to make a scalar, so that every output counts.
///
/// Returns the largest difference, relative to the largest gradient of its input.
///
/// # Errors
/// What `f` or `backward()` returns, inputs that are not f64, and an input
/// without a gradient.
pub fn check_gradients(
    inputs: &[&Tensor],
    step: f64,
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<f64> {
    let weighted = |inputs: &[Tensor]| -> Result<Tensor> {
        let y = f(inputs)?;
        let weights = super::seeded_values("upstream", y.elem_count(), 1.0);
        let weights = Tensor::from_vec(weights, y.shape(), y.device())?.to_dtype(DType::F64)?;
        (y * weights)?.sum_all()
    };
    let variables = inputs
        .iter()
        .map(|input| Var::from_tensor(&input.contiguous()?))
        .collect::<Result<Vec<_>>>()?;
    let tracked: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
    let gradients = weighted(&tracked)?.backward()?;
    let mut worst = 0f64;
    for (i, variable) in variables.iter().enumerate() {
        let Some(gradient) = gradients.get(variable) else {
            candle_core::bail!("input {i} has no gradient");
        };
        let gradient = gradient.flatten_all()?.to_vec1::<f64>()?;
        let scale = gradient.iter().fold(1e-3f64, |m, g| m.max(g.abs()));
        let values = inputs[i].flatten_all()?.to_vec1::<f64>()?;
        for (at, analytic) in gradient.iter().enumerate() {
            let shifted = |by: f64| -> Result<f64> {
                let mut values = values.clone();
                values[at] += by;
                let mut detached: Vec<Tensor> = tracked.iter().map(Tensor::detach).collect();
                detached[i] = Tensor::from_vec(values, inputs[i].shape(), inputs[i].device())?;
                weighted(&detached)?.to_scalar::<f64>()
            };
            let numeric = (shifted(step)? - shifted(-step)?) / (2.0 * step);
            worst = worst.max((numeric - analytic).abs() / scale);
        }
    }
    Ok(worst)
}
