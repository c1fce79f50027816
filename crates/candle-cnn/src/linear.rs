//! The fully connected layer's product, on Candle's own matrix multiplication.

use candle_core::{Result, Tensor};

use crate::element::float_dtype;
use crate::error::OpError;

const OP: &str = "linear";

/// `x · weightᵀ + bias` for `x` (N, I), `weight` (O, I), `bias` (O); returns
/// (N, O), as `torch.nn.functional.linear`. f32 and f64.
///
/// # Errors
/// [`OpError`] for shapes and dtypes that do not fit.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[[1f32, 2.0]], &Device::Cpu)?;
/// let weight = Tensor::new(&[[3f32, 4.0]], &Device::Cpu)?;
/// let bias = Tensor::new(&[5f32], &Device::Cpu)?;
/// let y = candle_cnn::linear(&x, &weight, Some(&bias))?;
/// assert_eq!(y.to_vec2::<f32>()?, [[16.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    float_dtype(OP, &[x, weight])?;
    let Ok((_, inputs)) = x.dims2() else {
        return Err(OpError::rank(OP, "input", x, "(N, I)"));
    };
    let mismatch = |name, tensor: &Tensor, rule| {
        OpError::Shapes {
            op: OP,
            left_name: "input",
            left: x.dims().to_vec(),
            right_name: name,
            right: tensor.dims().to_vec(),
            rule,
        }
        .into()
    };
    let Ok((outputs, weight_inputs)) = weight.dims2() else {
        return Err(OpError::rank(OP, "weight", weight, "(O, I)"));
    };
    if inputs != weight_inputs {
        return Err(mismatch(
            "weight",
            weight,
            "dimension 1 of both is the number of inputs",
        ));
    }
    let y = x.matmul(&weight.t()?)?;
    match bias {
        None => Ok(y),
        Some(bias) if bias.dims() == [outputs] => {
            float_dtype(OP, &[x, bias])?;
            y.broadcast_add(bias)
        }
        Some(bias) => Err(mismatch("bias", bias, "the bias has one value per output")),
    }
}
