//! Stochastic gradient descent with PyTorch's semantics (`torch.optim.SGD`).

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Tensor, Var, WithDType};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::config::ConfigError;

/// The hyperparameters of [`Sgd`], named and defaulted as in PyTorch; only `lr` differs by use.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SgdConfig {
    /// Learning rate.
    pub lr: f64,
    /// Share of the old velocity that is kept.
    pub momentum: f64,
    /// Share of the gradient that is withheld from the velocity, after the first step.
    pub dampening: f64,
    /// Looks one momentum step ahead.
    pub nesterov: bool,
    /// L2 penalty, added to the gradient.
    pub weight_decay: f64,
}

impl Default for SgdConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            momentum: 0.0,
            dampening: 0.0,
            nesterov: false,
            weight_decay: 0.0,
        }
    }
}

impl SgdConfig {
    /// Refuses what PyTorch refuses, and values that are not finite.
    ///
    /// # Errors
    /// [`ConfigError`] with the setting, its value and its range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let settings = [
            ("lr", self.lr),
            ("momentum", self.momentum),
            ("weight_decay", self.weight_decay),
        ];
        for (setting, value) in settings {
            if !(value.is_finite() && value >= 0.0) {
                return Err(ConfigError {
                    setting,
                    found: value.to_string(),
                    expected: "a finite number of at least 0",
                });
            }
        }
        if !self.dampening.is_finite() {
            return Err(ConfigError {
                setting: "dampening",
                found: self.dampening.to_string(),
                expected: "a finite number",
            });
        }
        if self.nesterov && (self.momentum <= 0.0 || self.dampening != 0.0) {
            return Err(ConfigError {
                setting: "nesterov",
                found: format!(
                    "on with momentum {} and dampening {}",
                    self.momentum, self.dampening
                ),
                expected: "used with a momentum above 0 and no dampening",
            });
        }
        Ok(())
    }
}

/// The optimiser: a set of named parameters and their momentum buffers.
///
/// A step computes, element by element and in one pass over memory on the CPU,
/// ```text
/// d = gradient + weight_decay · parameter
/// b = d at the first step, else momentum · b + (1 − dampening) · d      (only with momentum)
/// d = d + momentum · b with Nesterov, else b
/// parameter = parameter − lr · d
/// ```
#[derive(Debug)]
pub struct Sgd {
    config: SgdConfig,
    slots: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    name: String,
    parameter: Var,
    /// None until the parameter's first step with a gradient.
    buffer: Option<Buffer>,
    /// Memory that the buffer will take then, on a GPU.
    reserved: Option<Var>,
}

/// A momentum buffer where the update needs it: plain memory for the fused pass on the CPU, a tensor for
/// all other updates.
#[derive(Debug)]
enum Buffer {
    F32(Vec<f32>),
    F64(Vec<f64>),
    /// At an address that stays.
    Tensor(Var),
}

impl Sgd {
    /// An optimiser over these parameters. One that has several names (tied weights) is moved once,
    /// under the first of them.
    ///
    /// # Errors
    /// [`ConfigError`] as [`SgdConfig::validate`], and for two parameters of one name.
    pub fn new(parameters: Vec<(String, Var)>, config: SgdConfig) -> Result<Self, ConfigError> {
        config.validate()?;
        let mut seen = HashSet::new();
        let slots: Vec<Slot> = parameters
            .into_iter()
            .filter(|(_, parameter)| seen.insert(parameter.id()))
            .map(|(name, parameter)| Slot {
                name,
                parameter,
                buffer: None,
                reserved: None,
            })
            .collect();
        let mut names = HashSet::new();
        if let Some(slot) = slots.iter().find(|slot| !names.insert(&slot.name)) {
            return Err(ConfigError {
                setting: "a parameter's name",
                found: format!("{}, as another's", slot.name),
                expected: "its own, under which its state is saved",
            });
        }
        Ok(Self { config, slots })
    }

    /// The hyperparameters.
    pub fn config(&self) -> &SgdConfig {
        &self.config
    }

    /// The parameters that the optimiser moves, each once.
    pub(crate) fn parameters(&self) -> Vec<Var> {
        let parameters = self.slots.iter().map(|slot| slot.parameter.clone());
        parameters.collect()
    }

    /// Moves every parameter that has a gradient in `grads`, at learning rate `lr` (the
    /// configuration's, times the schedule's factor). A parameter without one is left as it is,
    /// momentum included, as in PyTorch.
    ///
    /// # Errors
    /// Candle's, when a gradient does not fit its parameter. (Other types than f32 and f64 are moved by Candle's
    /// operations, and rounded in each of them; for bf16 keep f32 parameters and cast them in the forward pass.)
    pub fn step(&mut self, grads: &GradStore, lr: f64) -> candle_core::Result<()> {
        for slot in &mut self.slots {
            if let Some(grad) = grads.get(&slot.parameter) {
                slot.step(grad, &self.config, lr)?;
            }
        }
        Ok(())
    }

    /// [`Self::step`] at a learning rate that is on the parameters' device, f32 (1,), and without
    /// waiting for the device. Parameters and momentum buffers stay where they are in memory, so that
    /// a CUDA graph can repeat the step.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub(crate) fn step_on_device(
        &mut self,
        grads: &GradStore,
        lr: &Tensor,
    ) -> candle_core::Result<()> {
        #[cfg(feature = "cuda")]
        if lr.device().is_cuda() {
            return self.step_by_kernel(grads, lr);
        }
        for slot in &mut self.slots {
            if let Some(grad) = grads.get(&slot.parameter) {
                slot.step_with_tensor_ops(grad, &self.config, lr)?;
            }
        }
        Ok(())
    }

    /// All parameters in a few launches.
    #[cfg(feature = "cuda")]
    fn step_by_kernel(&mut self, grads: &GradStore, lr: &Tensor) -> candle_core::Result<()> {
        use candle_cnn::cuda::{SgdHyperparameters, SgdTensor, sgd_step};

        let mut moved = Vec::with_capacity(self.slots.len());
        for slot in &mut self.slots {
            let Some(grad) = grads.get(&slot.parameter) else {
                continue;
            };
            let mut buffer = slot.buffer_as_tensor()?;
            let first = buffer.is_none();
            if first && self.config.momentum != 0.0 {
                let new = match slot.reserved.take() {
                    Some(reserved) => reserved,
                    None => on_its_own(&slot.parameter.as_tensor().zeros_like()?)?,
                };
                slot.buffer = Some(Buffer::Tensor(new.clone()));
                buffer = Some(new);
            }
            let parameter = slot.parameter.as_detached_tensor();
            let buffer = buffer.map(|buffer| buffer.as_detached_tensor());
            moved.push((parameter, grad.contiguous()?, buffer, first));
        }
        let tensors: Vec<SgdTensor<'_>> = moved
            .iter()
            .map(|(parameter, gradient, buffer, first)| SgdTensor {
                parameter,
                gradient,
                momentum_buffer: buffer.as_ref(),
                first: *first,
            })
            .collect();
        let hyper = SgdHyperparameters {
            momentum: self.config.momentum,
            dampening: self.config.dampening,
            nesterov: self.config.nesterov,
            weight_decay: self.config.weight_decay,
        };
        sgd_step(&tensors, lr, &hyper)
    }

    /// Takes memory for momentum buffers on a GPU before a step does, which would take it from among what does not last.
    ///
    /// # Errors
    /// Candle's, when memory runs out.
    pub(crate) fn reserve_on_gpu(&mut self) -> candle_core::Result<()> {
        let has_buffers = self.config.momentum != 0.0;
        for slot in &mut self.slots {
            let parameter = slot.parameter.as_tensor();
            let has_memory = slot.buffer.is_some() || slot.reserved.is_some();
            if has_buffers && !has_memory && parameter.device().is_cuda() {
                let zeros = Var::zeros(parameter.shape(), parameter.dtype(), parameter.device())?;
                slot.reserved = Some(zeros);
            }
        }
        Ok(())
    }

    /// The momentum buffers as tensors named `<parameter>.momentum_buffer`; parameters that have
    /// made no step have none.
    ///
    /// # Errors
    /// Candle's, when memory runs out.
    pub fn state(&self) -> candle_core::Result<Vec<(String, Tensor)>> {
        let mut state = Vec::new();
        for slot in &self.slots {
            let shape = slot.parameter.shape();
            let device = slot.parameter.device();
            let tensor = match &slot.buffer {
                None => continue,
                Some(Buffer::F32(b)) => Tensor::from_slice(b, shape, device)?,
                Some(Buffer::F64(b)) => Tensor::from_slice(b, shape, device)?,
                Some(Buffer::Tensor(b)) => b.as_detached_tensor(),
            };
            state.push((format!("{}{SUFFIX}", slot.name), tensor));
        }
        Ok(state)
    }

    /// Restores what [`Sgd::state`] gave.
    ///
    /// # Errors
    /// [`SgdStateError`] when a tensor belongs to no parameter or has another shape or type.
    pub fn load_state(&mut self, mut state: BTreeMap<String, Tensor>) -> Result<(), SgdStateError> {
        for slot in &mut self.slots {
            let key = format!("{}{SUFFIX}", slot.name);
            let Some(tensor) = state.remove(&key) else {
                slot.buffer = None;
                continue;
            };
            let parameter = slot.parameter.as_tensor();
            if tensor.shape() != parameter.shape() || tensor.dtype() != parameter.dtype() {
                return Err(SgdStateError::Misshapen {
                    name: key,
                    found: format!("{:?} {:?}", tensor.dtype(), tensor.dims()),
                    expected: format!("{:?} {:?}", parameter.dtype(), parameter.dims()),
                });
            }
            slot.buffer = Some(match (parameter.device().is_cpu(), tensor.dtype()) {
                (true, DType::F32) => Buffer::F32(tensor.flatten_all()?.to_vec1()?),
                (true, DType::F64) => Buffer::F64(tensor.flatten_all()?.to_vec1()?),
                _ => Buffer::Tensor(on_its_own(&tensor.to_device(parameter.device())?)?),
            });
        }
        match state.into_keys().next() {
            Some(name) => Err(SgdStateError::Unexpected { name }),
            None => Ok(()),
        }
    }
}

/// Optimiser state that does not belong to these parameters.
#[derive(Debug, thiserror::Error)]
pub enum SgdStateError {
    /// A tensor of a parameter that is not there.
    #[error("the optimiser state has a tensor {name:?} that belongs to no parameter")]
    Unexpected {
        /// Key of the tensor.
        name: String,
    },
    /// A tensor of another shape or type than its parameter.
    #[error("the optimiser state {name:?} is {found}, expected {expected}")]
    Misshapen {
        /// Key of the tensor.
        name: String,
        /// Type and shape in the file.
        found: String,
        /// Type and shape of the parameter.
        expected: String,
    },
    /// Candle failed.
    #[error("cannot restore the optimiser state")]
    Candle(#[from] candle_core::Error),
}

const SUFFIX: &str = ".momentum_buffer";

impl Slot {
    fn step(&mut self, grad: &Tensor, config: &SgdConfig, lr: f64) -> candle_core::Result<()> {
        let parameter = self.parameter.as_tensor();
        let fused_on_cpu =
            parameter.device().is_cpu() && matches!(parameter.dtype(), DType::F32 | DType::F64);
        if !fused_on_cpu {
            let lr = Tensor::new(&[lr], parameter.device())?;
            return self.step_with_tensor_ops(grad, config, &lr);
        }
        let first = self.buffer.is_none();
        if first && config.momentum != 0.0 {
            self.buffer = Some(match parameter.dtype() {
                DType::F32 => Buffer::F32(vec![0.0; parameter.elem_count()]),
                _ => Buffer::F64(vec![0.0; parameter.elem_count()]),
            });
        }
        let update = FusedUpdate {
            config,
            lr,
            first,
            buffer: RefCell::new(self.buffer.as_mut()),
        };
        parameter.inplace_op2(&grad.contiguous()?, &update)
    }

    /// The update of one Candle operation after the other, at the learning rate `lr` (1,) on the parameter's device: of types and
    /// devices for which there is no fused one, and where the learning rate is a tensor and no kernel takes it.
    fn step_with_tensor_ops(
        &mut self,
        grad: &Tensor,
        config: &SgdConfig,
        lr: &Tensor,
    ) -> candle_core::Result<()> {
        let parameter = self.parameter.as_detached_tensor();
        let mut direction = grad.detach();
        if config.weight_decay != 0.0 {
            direction = (direction + (&parameter * config.weight_decay)?)?;
        }
        if config.momentum != 0.0 {
            let velocity = match self.buffer_as_tensor()? {
                Some(buffer) => {
                    let old = buffer.as_detached_tensor();
                    let velocity =
                        ((old * config.momentum)? + (&direction * (1.0 - config.dampening))?)?;
                    buffer.set(&velocity)?;
                    velocity
                }
                None => {
                    self.buffer = Some(Buffer::Tensor(on_its_own(&direction)?));
                    direction.clone()
                }
            };
            direction = match config.nesterov {
                true => (direction + (velocity * config.momentum)?)?,
                false => velocity,
            };
        }
        let lr = lr.to_dtype(direction.dtype())?;
        let scaled = direction.flatten_all()?.broadcast_mul(&lr)?;
        let moved = (&parameter - scaled.reshape(parameter.shape())?)?;
        self.parameter.set(&moved)
    }

    /// The momentum buffer as a tensor, which it becomes if it was plain memory.
    fn buffer_as_tensor(&mut self) -> candle_core::Result<Option<Var>> {
        let (shape, device) = (self.parameter.shape(), self.parameter.device());
        let tensor = match &self.buffer {
            None => return Ok(None),
            Some(Buffer::Tensor(tensor)) => return Ok(Some(tensor.clone())),
            Some(Buffer::F32(values)) => Var::from_slice(values, shape, device)?,
            Some(Buffer::F64(values)) => Var::from_slice(values, shape, device)?,
        };
        self.buffer = Some(Buffer::Tensor(tensor.clone()));
        Ok(Some(tensor))
    }
}

/// A copy with memory of its own.
fn on_its_own(tensor: &Tensor) -> candle_core::Result<Var> {
    Var::from_tensor(&tensor.copy()?)
}

struct FusedUpdate<'a> {
    config: &'a SgdConfig,
    lr: f64,
    /// The first step's velocity is the gradient itself, without dampening.
    first: bool,
    buffer: RefCell<Option<&'a mut Buffer>>,
}

impl InplaceOp2 for FusedUpdate<'_> {
    fn name(&self) -> &'static str {
        "sgd-update"
    }

    fn cpu_fwd(
        &self,
        parameter: &mut CpuStorage,
        parameter_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> candle_core::Result<()> {
        let (Some((p0, p1)), Some((g0, g1))) = (
            parameter_layout.contiguous_offsets(),
            grad_layout.contiguous_offsets(),
        ) else {
            candle_core::bail!("sgd: parameter and gradient must be contiguous")
        };
        if parameter_layout.shape() != grad_layout.shape() {
            candle_core::bail!(
                "sgd: gradient {:?} of a parameter {:?}",
                grad_layout.dims(),
                parameter_layout.dims()
            )
        }
        let mut buffer = self.buffer.borrow_mut();
        match (parameter, grad, buffer.as_deref_mut()) {
            (CpuStorage::F32(p), CpuStorage::F32(g), None) => {
                self.update::<f32>(&mut p[p0..p1], &g[g0..g1], None)
            }
            (CpuStorage::F32(p), CpuStorage::F32(g), Some(Buffer::F32(b))) => {
                self.update(&mut p[p0..p1], &g[g0..g1], Some(b))
            }
            (CpuStorage::F64(p), CpuStorage::F64(g), None) => {
                self.update::<f64>(&mut p[p0..p1], &g[g0..g1], None)
            }
            (CpuStorage::F64(p), CpuStorage::F64(g), Some(Buffer::F64(b))) => {
                self.update(&mut p[p0..p1], &g[g0..g1], Some(b))
            }
            _ => candle_core::bail!("sgd: parameter, gradient and momentum differ in type"),
        }
        Ok(())
    }
}

/// Elements a task: large enough to hide the cost of a task (a few µs), small enough to spread a
/// 3×3 convolution's weights over the cores. Elements are independent, so it cannot change a bit.
const CHUNK: usize = 16 * 1024;

impl FusedUpdate<'_> {
    fn update<T: WithDType>(&self, parameter: &mut [T], grad: &[T], buffer: Option<&mut Vec<T>>) {
        let c = self.config;
        let [lr, momentum, weight_decay] = [self.lr, c.momentum, c.weight_decay].map(T::from_f64);
        // At the first step the buffer holds zeros, so that keeping none of it and all of the
        // gradient makes it the gradient.
        let gain = T::from_f64(if self.first { 1.0 } else { 1.0 - c.dampening });
        let nesterov = c.nesterov;
        let chunks = parameter.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK));
        match buffer {
            None => chunks.for_each(|(p, g)| {
                for (p, &g) in p.iter_mut().zip(g) {
                    *p -= lr * (g + weight_decay * *p);
                }
            }),
            Some(buffer) => chunks
                .zip(buffer.par_chunks_mut(CHUNK))
                .for_each(|((p, g), b)| {
                    for ((p, &g), b) in p.iter_mut().zip(g).zip(b) {
                        let d = g + weight_decay * *p;
                        *b = momentum * *b + gain * d;
                        let d = if nesterov { d + momentum * *b } else { *b };
                        *p -= lr * d;
                    }
                }),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// A parameter (2, −1) whose gradient at step k is fixed by the loss Σ p · g_k.
    fn run(config: SgdConfig, grads: &[[f64; 2]]) -> Vec<f64> {
        let p = Var::new(&[2f64, -1.], &Device::Cpu).unwrap();
        let mut sgd = Sgd::new(vec![("p".into(), p.clone())], config).unwrap();
        for grad in grads {
            step(&mut sgd, &p, grad);
        }
        p.to_vec1().unwrap()
    }

    fn step(sgd: &mut Sgd, p: &Var, grad: &[f64; 2]) {
        let grad = Tensor::new(grad, &Device::Cpu).unwrap();
        let loss = (p.as_tensor() * grad).unwrap().sum_all().unwrap();
        let lr = sgd.config().lr;
        sgd.step(&loss.backward().unwrap(), lr).unwrap();
    }

    fn assert_close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 1e-12, "{found:?} is not {expected:?}");
        }
    }

    const GRADS: [[f64; 2]; 3] = [[1., -2.], [0.5, 4.], [-3., 1.]];

    #[test]
    fn two_parameters_of_one_name_are_refused() {
        let parameters = [1, 2].map(|len| {
            let var = Var::zeros(len, DType::F32, &Device::Cpu).unwrap();
            ("w".to_string(), var)
        });
        let error = Sgd::new(parameters.into(), SgdConfig::default()).unwrap_err();
        assert!(
            error.to_string().contains("name is w, as another's"),
            "{error}"
        );
    }

    #[test]
    fn a_parameter_with_two_names_moves_once() {
        let var = Var::new(&[1f32, 2.0], &Device::Cpu).unwrap();
        let names = ["encoder.weight", "decoder.weight"];
        let parameters = names.map(|name| (name.to_string(), var.clone()));
        let config = SgdConfig {
            lr: 0.5,
            ..SgdConfig::default()
        };
        let mut sgd = Sgd::new(parameters.into(), config).unwrap();
        let grads = var.sum_all().unwrap().backward().unwrap();
        sgd.step(&grads, 0.5).unwrap();
        assert_eq!(var.to_vec1::<f32>().unwrap(), [0.5, 1.5]);
    }

    #[test]
    fn without_momentum_a_step_subtracts_lr_times_gradient() {
        let config = SgdConfig {
            lr: 0.1,
            ..Default::default()
        };
        assert_close(&run(config, &GRADS), &[2. + 0.15, -1. - 0.3]);
    }

    #[test]
    fn momentum_starts_at_the_first_gradient_undampened() {
        let config = SgdConfig {
            lr: 0.1,
            momentum: 0.9,
            dampening: 0.5,
            ..Default::default()
        };
        // b: 1, 0.9 + 0.25 = 1.15, 1.035 − 1.5 = −0.465; their sum 1.685
        //    −2, −1.8 + 2 = 0.2, 0.18 + 0.5 = 0.68;     their sum −1.12
        assert_close(&run(config, &GRADS), &[2. - 0.1685, -1. + 0.112]);
    }

    #[test]
    fn weight_decay_enters_the_velocity() {
        let config = SgdConfig {
            lr: 0.1,
            momentum: 0.5,
            weight_decay: 0.1,
            ..Default::default()
        };
        // p0 = 2:      d = 1 + 0.2 = 1.2,            b = 1.2,                 p = 1.88
        //              d = 0.5 + 0.188 = 0.688,      b = 0.6 + 0.688 = 1.288, p = 1.7512
        // p1 = −1:     d = −2 − 0.1 = −2.1,          b = −2.1,                p = −0.79
        //              d = 4 − 0.079 = 3.921,        b = −1.05 + 3.921 = 2.871, p = −1.0771
        assert_close(&run(config, &GRADS[..2]), &[1.7512, -1.0771]);
    }

    #[test]
    fn nesterov_looks_one_momentum_step_ahead() {
        let config = SgdConfig {
            lr: 0.1,
            momentum: 0.5,
            nesterov: true,
            ..Default::default()
        };
        // b: 1, 1;   d: 1.5, 0.5 + 0.5 = 1        p = 2 − 0.25
        // b: −2, 3;  d: −3, 4 + 1.5 = 5.5         p = −1 − 0.25
        assert_close(&run(config, &GRADS[..2]), &[1.75, -1.25]);
    }

    #[test]
    fn f32_in_many_chunks_agrees_with_tensor_ops() {
        let n = 3 * CHUNK + 17;
        let values: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
        let config = SgdConfig {
            lr: 0.05,
            momentum: 0.9,
            dampening: 0.1,
            weight_decay: 0.01,
            nesterov: false,
        };
        let grad = Tensor::new(&values[..], &Device::Cpu)
            .unwrap()
            .sin()
            .unwrap();
        let slot = || Slot {
            name: "p".into(),
            parameter: Var::new(&values[..], &Device::Cpu).unwrap(),
            buffer: None,
            reserved: None,
        };
        let (mut fused, mut plain) = (slot(), slot());
        let lr = Tensor::new(&[config.lr], &Device::Cpu).unwrap();
        for _ in 0..3 {
            fused.step(&grad, &config, config.lr).unwrap();
            plain.step_with_tensor_ops(&grad, &config, &lr).unwrap();
        }
        let [fused, plain] = [fused, plain].map(|s| s.parameter.to_vec1::<f32>().unwrap());
        assert_ne!(fused, values);
        for (f, p) in fused.iter().zip(&plain) {
            assert!((f - p).abs() <= 1e-6, "{f} is not {p}");
        }
    }

    #[test]
    fn a_parameter_without_gradient_keeps_value_and_momentum() {
        let used = Var::new(&[1f64, 1.], &Device::Cpu).unwrap();
        let unused = Var::new(&[5f64], &Device::Cpu).unwrap();
        let config = SgdConfig {
            lr: 0.1,
            momentum: 0.9,
            weight_decay: 0.1,
            ..Default::default()
        };
        let parameters = vec![
            ("used".into(), used.clone()),
            ("unused".into(), unused.clone()),
        ];
        let mut sgd = Sgd::new(parameters, config).unwrap();
        step(&mut sgd, &used, &GRADS[0]);
        assert_eq!(unused.to_vec1::<f64>().unwrap(), [5.]);
        let names: Vec<String> = sgd.state().unwrap().into_iter().map(|(n, _)| n).collect();
        assert_eq!(names, ["used.momentum_buffer"]);
    }

    #[test]
    fn restored_state_continues_with_the_same_bits() {
        let config = SgdConfig {
            lr: 0.1,
            momentum: 0.9,
            dampening: 0.3,
            weight_decay: 0.1,
            ..Default::default()
        };
        let p = Var::new(&[2f64, -1.], &Device::Cpu).unwrap();
        let mut sgd = Sgd::new(vec![("p".into(), p.clone())], config).unwrap();
        step(&mut sgd, &p, &GRADS[0]);
        let state = sgd.state().unwrap().into_iter().collect();
        let mut restored = Sgd::new(vec![("p".into(), p.clone())], config).unwrap();
        restored.load_state(state).unwrap();
        for grad in &GRADS[1..] {
            step(&mut restored, &p, grad);
        }
        assert_eq!(p.to_vec1::<f64>().unwrap(), run(config, &GRADS));
    }

    #[test]
    fn state_of_an_unknown_parameter_or_another_shape_is_refused() {
        let p = Var::new(&[2f64, -1.], &Device::Cpu).unwrap();
        let mut sgd = Sgd::new(vec![("p".into(), p)], SgdConfig::default()).unwrap();
        let tensor = |n: usize| Tensor::zeros(n, DType::F64, &Device::Cpu).unwrap();
        let one = |name: &str, n| BTreeMap::from([(name.to_string(), tensor(n))]);
        let error = sgd.load_state(one("q.momentum_buffer", 2)).unwrap_err();
        assert!(error.to_string().contains("q.momentum_buffer"), "{error}");
        let error = sgd.load_state(one("p.momentum_buffer", 3)).unwrap_err();
        assert!(
            error.to_string().contains("[3], expected F64 [2]"),
            "{error}"
        );
    }

    #[test]
    fn what_pytorch_refuses_is_refused() {
        let base = SgdConfig {
            lr: 0.1,
            momentum: 0.9,
            nesterov: true,
            ..Default::default()
        };
        assert_eq!(base.validate(), Ok(()));
        let bad = [
            SgdConfig {
                momentum: 0.0,
                ..base
            },
            SgdConfig {
                dampening: 0.1,
                ..base
            },
            SgdConfig { lr: -1.0, ..base },
            SgdConfig {
                lr: f64::NAN,
                ..base
            },
            SgdConfig {
                weight_decay: -0.1,
                ..base
            },
        ];
        for config in bad {
            assert!(config.validate().is_err(), "{config:?}");
        }
    }
}
