//! A small network for the tests: linear, tanh, dropout, linear, and a running mean like batch
//! norm's. Everything that a run has to restore is in it: two layers, a buffer that moves in
//! training, dropout.

use std::collections::BTreeMap;

use candle_cnn::Mode;
use candle_core::{D, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::model::Model;
use crate::random;

const INPUT: usize = 3 * 32 * 32;
const HIDDEN: usize = 12;

pub(crate) struct TinyModel {
    parameters: Vec<(String, Var)>,
    running_mean: Var,
    /// Multiplies the logits; a large one makes training diverge.
    pub(crate) gain: f64,
}

impl TinyModel {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = random::stream(seed, random::INIT, 0);
        let mut var = |name: &str, shape: &[usize], scale: f32| {
            let values: Vec<f32> = (0..shape.iter().product())
                .map(|_| rng.random_range(-scale..scale))
                .collect();
            let var = Var::from_vec(values, shape, &Device::Cpu).unwrap();
            (name.to_string(), var)
        };
        Self {
            parameters: vec![
                var("fc1.weight", &[HIDDEN, INPUT], 0.02),
                var("fc1.bias", &[HIDDEN], 0.02),
                var("fc2.weight", &[10, HIDDEN], 0.3),
                var("fc2.bias", &[10], 0.3),
            ],
            running_mean: Var::zeros(HIDDEN, candle_core::DType::F32, &Device::Cpu).unwrap(),
            gain: 1.0,
        }
    }

    /// All parameters and buffers, bit for bit.
    pub(crate) fn bits(&self) -> Vec<Vec<u32>> {
        crate::weights::state_dict(self)
            .iter()
            .map(|(_, var)| {
                let values = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                values.into_iter().map(f32::to_bits).collect()
            })
            .collect()
    }
}

impl Model for TinyModel {
    fn forward(&self, images: &Tensor, mode: Mode) -> Result<Tensor> {
        let [w1, b1, w2, b2] = [0, 1, 2, 3].map(|i| self.parameters[i].1.as_tensor());
        let hidden = images.flatten_from(1)?.matmul(&w1.t()?)?;
        let hidden = hidden.broadcast_add(b1)?.tanh()?;
        let mean = match mode {
            Mode::Eval => self.running_mean.as_detached_tensor(),
            Mode::Train { .. } => {
                let mean = hidden.mean(0)?;
                let moved = ((&*self.running_mean * 0.9)? + (mean.detach() * 0.1)?)?;
                self.running_mean.set(&moved)?;
                mean
            }
        };
        let mut hidden = hidden.broadcast_sub(&mean)?;
        if let Mode::Train { dropout_seed } = mode {
            let mut rng = ChaCha8Rng::seed_from_u64(dropout_seed);
            let mask: Vec<f32> = (0..hidden.elem_count())
                .map(|_| if rng.random_bool(0.5) { 2.0 } else { 0.0 })
                .collect();
            hidden = (&hidden * Tensor::from_vec(mask, hidden.shape(), &Device::Cpu)?)?;
        }
        let logits = hidden.matmul(&w2.t()?)?.broadcast_add(b2)?;
        assert_eq!(logits.dim(D::Minus1)?, 10);
        logits * self.gain
    }

    fn named_parameters(&self) -> Vec<(String, Var)> {
        self.parameters.clone()
    }

    fn named_buffers(&self) -> Vec<(String, Var)> {
        vec![("norm.running_mean".into(), self.running_mean.clone())]
    }

    fn metadata(&self) -> BTreeMap<String, String> {
        BTreeMap::from([("architecture".into(), "tiny".into())])
    }
}
