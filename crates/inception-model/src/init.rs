//! How parameters begin.

use candle_core::{Device, Result, Tensor, Var};
use rand::Rng;
use rand_distr::{Distribution, StandardNormal, Uniform};

/// Initialisation of the convolution and head weights.
///
/// Biases are PyTorch's defaults in both cases: U(±1/√fan_in) in the
/// convolutions, 0 in the head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// The lesson's: `kaiming_normal_(mode="fan_out", nonlinearity="relu")`,
    /// a standard deviation of √(2 / (C_out · kernel area)).
    ///
    /// It keeps the scale of *gradients*. Without batch norm the forward pass
    /// then grows wherever a layer has fewer outputs than inputs, by
    /// √(C_in / C_out) in standard deviation: 192 → 16 in the first 5×5
    /// reduction is a factor of 3.5, and nine blocks multiply. The logits begin
    /// with a standard deviation of several hundred and the loss near 1,000.
    /// The lesson trains through this, slowly.
    #[default]
    Lesson,
    /// `kaiming_normal_(mode="fan_in")`, √(2 / (C_in · kernel area)): keeps the
    /// scale of *activations*, so that the loss begins near ln 10 and larger
    /// learning rates are stable.
    FanIn,
}

impl Init {
    /// A weight of shape (C_out, C_in, …).
    pub(crate) fn weight(self, dims: &[usize], device: &Device, rng: &mut impl Rng) -> Result<Var> {
        let area: usize = dims[2..].iter().product();
        let fan = match self {
            Self::Lesson => dims[0] * area,
            Self::FanIn => dims[1] * area,
        };
        let std = (2.0 / fan as f64).sqrt();
        let values: Vec<f32> = (0..dims.iter().product())
            .map(|_| {
                let normal: f64 = StandardNormal.sample(rng);
                (normal * std) as f32
            })
            .collect();
        Var::from_tensor(&Tensor::from_vec(values, dims, device)?)
    }
}

/// PyTorch's default bias: U(±1/√fan_in).
pub(crate) fn uniform_bias(
    outputs: usize,
    fan_in: usize,
    device: &Device,
    rng: &mut impl Rng,
) -> Result<Var> {
    let bound = 1.0 / (fan_in as f64).sqrt();
    let uniform = Uniform::new_inclusive(-bound, bound).map_err(candle_core::Error::wrap)?;
    let values: Vec<f32> = (0..outputs).map(|_| uniform.sample(rng) as f32).collect();
    Var::from_tensor(&Tensor::from_vec(values, outputs, device)?)
}

/// A bias of zeros.
pub(crate) fn zero_bias(outputs: usize, device: &Device) -> Result<Var> {
    Var::zeros(outputs, candle_core::DType::F32, device)
}
