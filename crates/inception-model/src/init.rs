//! How parameters begin.

use candle_core::{Device, Result, Tensor, Var};
use rand::Rng;
use rand_distr::{Distribution, StandardNormal, Uniform};

/// Initialisation of the convolution and head weights.
///
/// Biases are the lesson's in all cases: PyTorch's default U(±1/√fan_in) in
/// the convolutions, 0 in the head.
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
    /// Normal, then shifted so that each filter sums to zero, with a standard
    /// deviation of γ/√fan_in, γ = √2 / √(1 − 1/π) ≈ 1.71 (Brock et al., 2021,
    /// "Characterizing signal propagation…", who keep it throughout training;
    /// here it is the start alone).
    ///
    /// Behind a ReLU every activation has a positive mean, which ordinary
    /// filters pass on: after some layers without batch norm all pictures look
    /// alike. Filters of sum zero see only the differences between pictures,
    /// so that learning begins sooner. The fully connected layer begins with zeros: the first
    /// loss is ln 10 and no early step is spent on unlearning a guess.
    Centred,
}

impl Init {
    /// A weight of shape (C_out, C_in, …).
    pub(crate) fn weight(self, dims: &[usize], device: &Device, rng: &mut impl Rng) -> Result<Var> {
        if self == Self::Centred && dims.len() == 2 {
            return Var::zeros(dims, candle_core::DType::F32, device);
        }
        let area: usize = dims[2..].iter().product();
        let fan_in = dims[1] * area;
        let variance = match self {
            Self::Lesson => 2.0 / (dims[0] * area) as f64,
            Self::FanIn => 2.0 / fan_in as f64,
            Self::Centred => 2.0 / (1.0 - std::f64::consts::FRAC_1_PI) / fan_in as f64,
        };
        let std = variance.sqrt();
        let mut values = Vec::with_capacity(dims.iter().product());
        for _ in 0..dims[0] {
            let mut filter: Vec<f64> = (0..fan_in).map(|_| StandardNormal.sample(rng)).collect();
            if self == Self::Centred {
                let mean = filter.iter().sum::<f64>() / fan_in as f64;
                filter.iter_mut().for_each(|w| *w -= mean);
            }
            values.extend(filter.into_iter().map(|w| (w * std) as f32));
        }
        Var::from_tensor(&Tensor::from_vec(values, dims, device)?)
    }
}

/// PyTorch's default for biases, and for the weights of `nn.Linear`: U(±1/√fan_in).
pub(crate) fn uniform(
    dims: &[usize],
    fan_in: usize,
    device: &Device,
    rng: &mut impl Rng,
) -> Result<Var> {
    let bound = 1.0 / (fan_in as f64).sqrt();
    let uniform = Uniform::new_inclusive(-bound, bound).map_err(candle_core::Error::wrap)?;
    let count = dims.iter().product();
    let values: Vec<f32> = (0..count).map(|_| uniform.sample(rng) as f32).collect();
    Var::from_tensor(&Tensor::from_vec(values, dims, device)?)
}

/// torchvision's `trunc_normal_(std=0.01, a=-2, b=2)`. The bounds are absolute,
/// 200 standard deviations away: in effect a normal distribution.
pub(crate) fn truncated_normal(dims: &[usize], device: &Device, rng: &mut impl Rng) -> Result<Var> {
    const STD: f64 = 0.01;
    const BOUND: f64 = 2.0;
    let count: usize = dims.iter().product();
    let values: Vec<f32> = (0..count)
        .map(|_| {
            let z: f64 = StandardNormal.sample(rng);
            (z * STD).clamp(-BOUND, BOUND) as f32
        })
        .collect();
    Var::from_tensor(&Tensor::from_vec(values, dims, device)?)
}

/// A bias of zeros.
pub(crate) fn zero_bias(outputs: usize, device: &Device) -> Result<Var> {
    Var::zeros(outputs, candle_core::DType::F32, device)
}
