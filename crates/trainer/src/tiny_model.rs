//! A small network for the tests: linear, tanh, dropout, linear, and a running mean and a count of
//! batches like batch norm's. Everything that a run has to restore is in it: two layers, buffers of
//! two types that move in training, dropout. Frozen, its first layer and buffers stay.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use candle_cnn::Mode;
use candle_core::{D, DType, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::model::{AuxiliaryOutput, FixedFeatures, Model, TrainOutput};
use crate::random;

const INPUT: usize = 3 * 32 * 32;
const HIDDEN: usize = 12;

pub(crate) struct TinyModel {
    parameters: Vec<(String, Var)>,
    running_mean: Var,
    batches_tracked: Var,
    /// How often the first layer was run on how many pictures.
    pub(crate) pictures_seen: Cell<usize>,
    /// The batches that it has seen, by their images, and whether a GPU would have timed its engines for them.
    pub(crate) batches_seen: RefCell<BTreeSet<(usize, bool)>>,
    /// Seeds of the steps' dropout masks, in their order.
    pub(crate) dropout_seeds: RefCell<Vec<u64>>,
    /// Trains the last layer only, by the running mean.
    pub(crate) frozen: bool,
    /// Without dropout and batch statistics, so that an image's gradient depends on that image alone.
    pub(crate) plain: bool,
    /// Multiplies the logits; a large one makes training diverge.
    pub(crate) gain: f64,
    /// Multiplies the logits in evaluation alone.
    pub(crate) evaluation_gain: f64,
    /// Leaves one bias or the other out of a step's loss, by the step's dropout seed.
    pub(crate) leaves_out: bool,
    /// Lists its last layer's weight under the name of the first's too.
    pub(crate) repeats_a_name: bool,
    /// Lists its parameters from the last to the first.
    pub(crate) lists_backwards: bool,
    /// Answers with logits that have no gradient.
    pub(crate) detaches: bool,
    /// A buffer besides its own.
    pub(crate) more_state: Option<Var>,
    /// Says of no parameter that it trains.
    pub(crate) is_fixed: bool,
    /// Weights of auxiliary heads, each of which answers with another multiple of the logits.
    pub(crate) auxiliary: Vec<f64>,
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
            running_mean: Var::zeros(HIDDEN, DType::F32, &Device::Cpu).unwrap(),
            batches_tracked: Var::zeros((), DType::I64, &Device::Cpu).unwrap(),
            pictures_seen: Cell::new(0),
            batches_seen: RefCell::default(),
            dropout_seeds: RefCell::default(),
            frozen: false,
            plain: false,
            gain: 1.0,
            evaluation_gain: 1.0,
            leaves_out: false,
            repeats_a_name: false,
            lists_backwards: false,
            detaches: false,
            more_state: None,
            is_fixed: false,
            auxiliary: Vec::new(),
        }
    }

    /// All parameters and buffers, bit for bit.
    pub(crate) fn bits(&self) -> Vec<Vec<u32>> {
        crate::weights::state_dict(self)
            .iter()
            .map(|(_, var)| {
                if var.dtype() == DType::I64 {
                    return vec![var.to_scalar::<i64>().unwrap() as u32];
                }
                let values = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                values.into_iter().map(f32::to_bits).collect()
            })
            .collect()
    }

    /// Mean-free activations of the first layer; in training the buffers move.
    fn hidden(&self, images: &Tensor, mode: Mode) -> Result<Tensor> {
        let seen = self.pictures_seen.get() + images.dim(0)?;
        self.pictures_seen.set(seen);
        let timed = candle_cnn::cuda::settings().benchmark;
        self.batches_seen
            .borrow_mut()
            .insert((images.dim(0)?, timed));
        let [w1, b1] = [0, 1].map(|i| &self.parameters[i].1);
        let left_out = |of: u64| match mode {
            Mode::Train { dropout_seed } => self.leaves_out && dropout_seed % 2 == of,
            Mode::Eval => false,
        };
        let (w1, b1) = match self.frozen {
            true => (w1.as_detached_tensor(), b1.as_detached_tensor()),
            false if left_out(0) => (w1.as_tensor().clone(), b1.as_detached_tensor()),
            false => (w1.as_tensor().clone(), b1.as_tensor().clone()),
        };
        let hidden = images.flatten_from(1)?.matmul(&w1.t()?)?;
        let hidden = hidden.broadcast_add(&b1)?.tanh()?;
        if self.plain {
            return Ok(hidden);
        }
        let mean = match mode {
            Mode::Train { .. } if !self.frozen => {
                let mean = hidden.mean(0)?;
                let moved = ((&*self.running_mean * 0.9)? + (mean.detach() * 0.1)?)?;
                self.running_mean.set(&moved)?;
                let counted = (self.batches_tracked.as_detached_tensor() + 1.0)?;
                self.batches_tracked.set(&counted)?;
                mean
            }
            _ => self.running_mean.as_detached_tensor(),
        };
        hidden.broadcast_sub(&mean)
    }
}

impl Model for TinyModel {
    fn forward(&self, images: &Tensor, mode: Mode) -> Result<Tensor> {
        let logits = self.classify(&self.hidden(images, mode)?, mode)?;
        Ok(match self.detaches {
            true => logits.detach(),
            false => logits,
        })
    }

    fn forward_train(&self, images: &Tensor, dropout_seed: u64) -> Result<TrainOutput> {
        self.dropout_seeds.borrow_mut().push(dropout_seed);
        let logits = self.forward(images, Mode::Train { dropout_seed })?;
        let auxiliary = self.auxiliary.iter().enumerate().map(|(head, &weight)| {
            let logits = (&logits * (-0.5 * (head + 1) as f64))?;
            Ok(AuxiliaryOutput { logits, weight })
        });
        let auxiliary = auxiliary.collect::<Result<_>>()?;
        Ok(TrainOutput { logits, auxiliary })
    }

    fn named_parameters(&self) -> Vec<(String, Var)> {
        let mut parameters = self.parameters.clone();
        if self.repeats_a_name {
            parameters.push(("fc1.weight".into(), self.parameters[2].1.clone()));
        }
        if self.lists_backwards {
            parameters.reverse();
        }
        parameters
    }

    fn named_buffers(&self) -> Vec<(String, Var)> {
        let mut buffers = vec![
            ("norm.running_mean".into(), self.running_mean.clone()),
            (
                "norm.num_batches_tracked".into(),
                self.batches_tracked.clone(),
            ),
        ];
        let more = self.more_state.iter();
        buffers.extend(more.map(|var| ("more.state".into(), var.clone())));
        buffers
    }

    fn is_trainable(&self, parameter: &str) -> bool {
        !self.is_fixed && (!self.frozen || parameter.starts_with("fc2."))
    }

    fn fixed_features(&self) -> Option<&dyn FixedFeatures> {
        self.frozen.then_some(self)
    }

    fn metadata(&self) -> BTreeMap<String, String> {
        BTreeMap::from([("architecture".into(), "tiny".into())])
    }
}

impl FixedFeatures for TinyModel {
    fn features(&self, images: &Tensor) -> Result<Tensor> {
        self.hidden(images, Mode::Eval)
    }

    fn classify(&self, hidden: &Tensor, mode: Mode) -> Result<Tensor> {
        let [w2, mut b2] = [2, 3].map(|i| self.parameters[i].1.as_tensor().clone());
        if let Mode::Train { dropout_seed } = mode
            && self.leaves_out
            && dropout_seed % 2 == 1
        {
            b2 = b2.detach();
        }
        let mut hidden = hidden.clone();
        if let (Mode::Train { dropout_seed }, false) = (mode, self.plain) {
            let mut rng = ChaCha8Rng::seed_from_u64(dropout_seed);
            let mask: Vec<f32> = (0..hidden.elem_count())
                .map(|_| if rng.random_bool(0.5) { 2.0 } else { 0.0 })
                .collect();
            hidden = (&hidden * Tensor::from_vec(mask, hidden.shape(), &Device::Cpu)?)?;
        }
        let logits = hidden.matmul(&w2.t()?)?.broadcast_add(&b2)?;
        assert_eq!(logits.dim(D::Minus1)?, 10);
        logits
            * match mode {
                Mode::Train { .. } => self.gain,
                Mode::Eval => self.gain * self.evaluation_gain,
            }
    }
}
