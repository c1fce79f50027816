//! Training on Candle that can be stopped anywhere and goes on with the same bits.
//!
//! The trainer takes any [`Model`], two or three sets of CIFAR's shape and a [`TrainingConfig`], and works in
//! a [`RunDirectory`]: [`Training::new`] continues from the newest checkpoint there or starts, and
//! [`Training::run`] makes the steps, evaluates, and writes metrics and checkpoints. It prints
//! nothing; an [`Observer`] hears of the progress.
//!
//! - [`Sgd`] has the semantics of `torch.optim.SGD`.
//! - All randomness is a pure function of seed and position, see [`random`].
//! - Weights are stored under PyTorch's names, see [`weights`].
//!
//! # A network of one's own
//!
//! Trained, stopped, and resumed by what could be another process, from the run's folder alone:
//!
//! ```
//! use std::collections::BTreeMap;
//! use std::ops::ControlFlow;
//! use std::sync::Arc;
//!
//! use candle_cnn::{
//!     Conv2dConfig, Mode, RunningStatistics, batch_norm_relu_eval, batch_norm_relu_train, conv2d,
//!     global_avg_pool2d, linear, update_running,
//! };
//! use candle_core::{DType, Device, Result, Tensor, Var};
//! use cifar_data::{Normalization, Split, shapes};
//! use trainer::random::rand::Rng;
//! use trainer::{
//!     DataSets, Environment, Model, NamedSet, Outcome, Program, RunDirectory, Silent, Training,
//!     TrainingConfig, evaluate, random, weights,
//! };
//!
//! /// A convolution with batch norm, the average of each map, and a classifier.
//! struct Network {
//!     parameters: BTreeMap<String, Var>,
//!     buffers: BTreeMap<String, Var>,
//! }
//!
//! impl Network {
//!     fn new(seed: u64, device: &Device) -> Result<Self> {
//!         let mut rng = random::stream(seed, random::INIT, 0);
//!         let mut uniform = |bound: f32, shape: &[usize]| {
//!             let values = (0..shape.iter().product()).map(|_| rng.random_range(-bound..bound));
//!             Var::from_vec(values.collect::<Vec<f32>>(), shape, device)
//!         };
//!         let parameters = [
//!             ("conv.weight", uniform(0.2, &[16, 3, 3, 3])?),
//!             ("bn.weight", Var::ones(16, DType::F32, device)?),
//!             ("bn.bias", Var::zeros(16, DType::F32, device)?),
//!             ("fc.weight", uniform(0.25, &[10, 16])?),
//!             ("fc.bias", Var::zeros(10, DType::F32, device)?),
//!         ];
//!         let buffers = [
//!             ("bn.running_mean", Var::zeros(16, DType::F32, device)?),
//!             ("bn.running_var", Var::ones(16, DType::F32, device)?),
//!         ];
//!         Ok(Self {
//!             parameters: parameters.map(|(name, var)| (name.into(), var)).into(),
//!             buffers: buffers.map(|(name, var)| (name.into(), var)).into(),
//!         })
//!     }
//! }
//!
//! impl Model for Network {
//!     fn forward(&self, images: &Tensor, mode: Mode) -> Result<Tensor> {
//!         // Nobody asks for a gradient in evaluation: detached, weights keep no map alive.
//!         let weight = |name: &str| match mode {
//!             Mode::Train { .. } => self.parameters[name].as_tensor().clone(),
//!             Mode::Eval => self.parameters[name].as_detached_tensor(),
//!         };
//!         let x = conv2d(images, &weight("conv.weight"), None, Conv2dConfig::padded(1))?;
//!         let (scale, shift) = (weight("bn.weight"), weight("bn.bias"));
//!         let [mean, var] = ["bn.running_mean", "bn.running_var"].map(|name| &self.buffers[name]);
//!         let x = match mode {
//!             Mode::Train { .. } => {
//!                 let (x, batch) = batch_norm_relu_train(&x, &scale, &shift, 1e-5)?;
//!                 mean.set(&update_running(mean, &batch.mean, 0.1)?)?;
//!                 var.set(&update_running(var, &batch.unbiased_variance, 0.1)?)?;
//!                 x
//!             }
//!             Mode::Eval => {
//!                 let running = RunningStatistics { mean, variance: var };
//!                 batch_norm_relu_eval(&x, &scale, &shift, running, 1e-5)?
//!             }
//!         };
//!         let features = global_avg_pool2d(&x)?.flatten_from(1)?;
//!         linear(&features, &weight("fc.weight"), Some(&weight("fc.bias")))
//!     }
//!
//!     fn named_parameters(&self) -> Vec<(String, Var)> {
//!         self.parameters.clone().into_iter().collect()
//!     }
//!
//!     fn named_buffers(&self) -> Vec<(String, Var)> {
//!         self.buffers.clone().into_iter().collect()
//!     }
//!
//!     fn metadata(&self) -> BTreeMap<String, String> {
//!         BTreeMap::from([("architecture".into(), "one convolution".into())])
//!     }
//! }
//!
//! # fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
//! let device = Device::Cpu;
//! let data = DataSets {
//!     train: Arc::new(shapes::generate(0, Split::Train, 64)),
//!     validation: None,
//!     test: Arc::new(shapes::generate(0, Split::Test, 32)),
//!     normalization: Normalization::HALF,
//! };
//! let mut config = TrainingConfig { epochs: 2, batch_size: 16, ..TrainingConfig::default() };
//! config.optimizer.lr = 0.1;
//! config.optimizer.momentum = 0.9;
//! let program = Program {
//!     name: env!("CARGO_PKG_NAME"),
//!     version: env!("CARGO_PKG_VERSION"),
//!     sources: env!("CARGO_MANIFEST_DIR"),
//! };
//! let environment = Environment::capture(program, "cpu", 2, config.seed);
//!
//! let out = tempfile::tempdir()?; // `runs`, say
//! let run = RunDirectory::create(out.path(), "my-network", &config, &data, &environment)?;
//! let folder = run.path().to_path_buf();
//! let network = Network::new(config.seed, &device)?;
//! let mut training = Training::new(&network, data.clone(), &device, config, run)?;
//! let asked = std::cell::Cell::new(0);
//! let stop = || asked.replace(asked.get() + 1) == 3; // a signal, say
//! let stopped = training.run(&mut Silent, &stop)?;
//! assert!(matches!(stopped, Outcome::Stopped { step: 3, .. }));
//! drop(training);
//!
//! let config: TrainingConfig = RunDirectory::config_of(&folder, "my-network")?;
//! let run = RunDirectory::open(&folder, "my-network")?;
//! let network = Network::new(config.seed, &device)?; // its weights become the checkpoint's
//! let mut training = Training::new(&network, data.clone(), &device, config, run)?;
//! let Outcome::Finished(summary) = training.run(&mut Silent, &|| false)? else {
//!     panic!("nobody stops it")
//! };
//! assert_eq!(summary.steps, 8);
//!
//! let other = Network::new(1, &device)?;
//! weights::load(&other, &folder.join("model.safetensors"))?;
//! let test = NamedSet { name: "test", images: data.test.clone() };
//! let on = &mut |_| ControlFlow::Continue(());
//! let evaluation = evaluate(&other, &test, 64, data.normalization, &device, on)?;
//! assert_eq!(evaluation.as_ref(), summary.evaluations.get("test"));
//! # Ok(())
//! # }
//! ```

mod checkpoint;
mod config;
mod data;
mod distributed;
mod durable;
mod environment;
mod error;
mod evaluate;
mod execution;
mod features;
mod metrics;
mod model;
mod observer;
mod profile;
pub mod random;
mod resident;
mod run_directory;
mod schedule;
mod sgd;
#[cfg(test)]
mod tiny_model;
mod training;
pub mod weights;

pub use config::{ConfigError, TrainingConfig};
pub use data::{DataFingerprints, DataSets, NamedSet, SetFingerprint};
pub use durable::{sha256_hex, write_atomically};
pub use environment::{Environment, Program};
pub use error::{Error, LastCheckpoint, Place, Result};
pub use evaluate::{Evaluation, evaluate, first_maximum};
pub use execution::Execution;
pub use metrics::Metric;
pub use model::{AuxiliaryOutput, FixedFeatures, Model, TrainOutput};
pub use observer::{EpochReport, Observer, Silent, StartReport, StepReport};
pub use profile::PROFILE_TARGET;
pub use run_directory::{Finished, RunDirectory, recorded_weights_sha256};
pub use schedule::{ResolvedSchedule, Schedule, Span};
pub use sgd::{Sgd, SgdConfig, SgdStateError};
pub use training::{Outcome, Summary, Training};
