//! Our side of `cargo xtask bench`: one long-lived process, one line in, one line out.
//!
//! A line `run <steps>` on standard input runs that many steps on seeded random data and is
//! answered by one line of JSON; the end of the input ends the process. The other side,
//! `tools/pytorch/bench_train_step.py`, speaks the same.

use std::io::{BufRead, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_cnn::{CrossEntropyConfig, Mode, backward, cross_entropy};
use candle_core::{Device, Tensor, Var};
use clap::{Parser, ValueEnum};
use experiment_common::{Profile, start_logging, start_threads, threads};
use inception_model::{
    CifarConfig, CifarGoogLeNet, FrozenBatchNorm, GoogLeNet, GoogLeNetConfig, LARGEST_OF_ONE_PIXEL,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use trainer::{Sgd, SgdConfig};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Times steps on request: write `run <steps>` to its standard input, read one line of JSON
#[derive(Debug, Parser)]
struct Arguments {
    /// The network
    #[arg(long, value_enum, default_value_t = Model::Lesson)]
    model: Model,
    /// Train the head alone, in training mode (torchvision's network)
    #[arg(long)]
    frozen: bool,
    /// The whole training step, or only the forward pass without gradients
    #[arg(long, value_enum, default_value_t = Work::Train)]
    mode: Work,
    /// Images in a step
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Height and width of the pictures
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(15..))]
    image_size: u32,
    /// Threads that compute [default: all cores]
    #[arg(long, value_parser = threads)]
    threads: Option<u64>,
    /// Print at the end, on standard error, where the time went, by layer and pass
    #[arg(long)]
    profile: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Model {
    Lesson,
    /// With ten classes and transform_input, as in fine-tuning
    Torchvision,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Work {
    Train,
    Inference,
}

#[derive(Debug, Serialize)]
struct Answer {
    seconds_per_step: f64,
    images_per_second: f64,
    peak_mib: Option<f64>,
    threads: usize,
    framework: String,
}

fn main() {
    experiment_common::keep_freed_pages();
    if let Err(error) = run(&Arguments::parse()) {
        eprintln!("step-bench: {error:#}");
        std::process::exit(1);
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    start_threads(arguments.threads.map(|threads| threads as usize))?;
    let profile = arguments.profile.then(Profile::default);
    start_logging(profile.as_ref());
    let mut bench = Bench::new(arguments)?;
    let mut output = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let steps = parse_order(&line?)?;
        let start = Instant::now();
        for _ in 0..steps {
            bench.step()?;
        }
        let seconds = start.elapsed().as_secs_f64() / f64::from(steps);
        let answer = Answer {
            seconds_per_step: seconds,
            images_per_second: f64::from(arguments.batch) / seconds,
            peak_mib: peak_mib(),
            threads: rayon::current_num_threads(),
            framework: format!("candle-cnn {}", env!("CARGO_PKG_VERSION")),
        };
        writeln!(output, "{}", serde_json::to_string(&answer)?)?;
        output.flush()?;
    }
    if let Some(profile) = profile {
        eprintln!("{}", profile.table().trim_end());
    }
    Ok(())
}

fn parse_order(line: &str) -> Result<u32> {
    let steps = line
        .strip_prefix("run ")
        .and_then(|steps| steps.trim().parse().ok())
        .filter(|steps| *steps > 0);
    steps.with_context(|| format!("expected `run <steps>`, got {line:?}"))
}

/// A network of either kind.
enum Network {
    Lesson(Box<CifarGoogLeNet>),
    Torchvision(Box<GoogLeNet>),
}

impl Network {
    fn new(arguments: &Arguments, random: &mut ChaCha8Rng) -> Result<Self> {
        let device = &Device::Cpu;
        Ok(match arguments.model {
            Model::Lesson if arguments.frozen => bail!("--frozen needs --model torchvision"),
            Model::Lesson => {
                let network = CifarGoogLeNet::new(&CifarConfig::default(), device, random)?;
                Self::Lesson(Box::new(network))
            }
            Model::Torchvision => {
                let trains = matches!(arguments.mode, Work::Train);
                ensure!(
                    !trains
                        || arguments.batch > 1
                        || arguments.image_size as usize > LARGEST_OF_ONE_PIXEL,
                    "--batch 1: of one picture of {0}×{0} pixels the last batch norms have one value a channel, and no variance",
                    arguments.image_size
                );
                let config = GoogLeNetConfig {
                    num_classes: 10,
                    transform_input: true,
                    ..GoogLeNetConfig::default()
                };
                let mut network = GoogLeNet::new(&config, device, random)?;
                if arguments.frozen {
                    network.freeze_backbone(FrozenBatchNorm::Moving);
                }
                Self::Torchvision(Box::new(network))
            }
        })
    }

    fn forward(&self, images: &Tensor, mode: Mode) -> Result<Tensor> {
        Ok(match self {
            Self::Lesson(network) => network.forward(images, mode)?,
            Self::Torchvision(network) => network.forward(images, mode)?.logits,
        })
    }

    fn infer(&self, images: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Lesson(network) => network.infer(images)?,
            Self::Torchvision(network) => network.infer(images)?,
        })
    }

    fn trainable_parameters(&self) -> Vec<(String, Var)> {
        match self {
            Self::Lesson(network) => network.named_parameters(),
            Self::Torchvision(network) => {
                let mut parameters = network.named_parameters();
                parameters.retain(|(name, _)| network.is_trainable(name));
                parameters
            }
        }
    }
}

/// The network, its optimiser and one batch of noise.
struct Bench {
    work: Work,
    model: Network,
    optimizer: Sgd,
    images: Tensor,
    labels: Tensor,
    steps_done: u64,
}

impl Bench {
    fn new(arguments: &Arguments) -> Result<Self> {
        let mut random = ChaCha8Rng::seed_from_u64(0);
        let model = Network::new(arguments, &mut random)?;
        // A small step: the data are noise, and the weights must stay finite however long the
        // benchmark runs.
        let config = SgdConfig {
            lr: 1e-5,
            // The lesson's third step, the head alone, has none.
            momentum: if arguments.frozen { 0.0 } else { 0.9 },
            ..SgdConfig::default()
        };
        let optimizer = Sgd::new(model.trainable_parameters(), config)?;
        let batch = arguments.batch as usize;
        let size = arguments.image_size as usize;
        let pixels: Vec<f32> = (0..batch * 3 * size * size)
            .map(|_| random.random_range(-1.0..1.0))
            .collect();
        let labels: Vec<u32> = (0..batch).map(|_| random.random_range(0..10)).collect();
        Ok(Self {
            work: arguments.mode,
            model,
            optimizer,
            images: Tensor::from_vec(pixels, (batch, 3, size, size), &Device::Cpu)?,
            labels: Tensor::from_vec(labels, batch, &Device::Cpu)?,
            steps_done: 0,
        })
    }

    fn step(&mut self) -> Result<()> {
        match self.work {
            Work::Train => self.training_step(),
            Work::Inference => {
                timed("forward", || self.model.infer(&self.images))?;
                Ok(())
            }
        }
    }

    fn training_step(&mut self) -> Result<()> {
        let dropout_seed = self.steps_done;
        self.steps_done += 1;
        let logits = timed("forward", || {
            self.model
                .forward(&self.images, Mode::Train { dropout_seed })
        })?;
        let loss = timed("loss", || {
            Ok(cross_entropy(
                &logits,
                &self.labels,
                CrossEntropyConfig::default(),
            )?)
        })?;
        let gradients = timed("backward", || Ok(backward(&loss)?))?;
        let lr = self.optimizer.config().lr;
        timed("update", || Ok(self.optimizer.step(&gradients, lr)?))?;
        if !loss.to_scalar::<f32>()?.is_finite() {
            bail!("the loss of step {} is not finite", self.steps_done);
        }
        Ok(())
    }
}

/// A part of a step, as the trainer tells of it.
fn timed<T>(part: &'static str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    let result = work()?;
    let nanoseconds = begin.elapsed().as_nanos() as u64;
    tracing::trace!(target: trainer::PROFILE_TARGET, part, nanoseconds);
    Ok(result)
}

/// The most memory this process has held; None where the system does not tell.
fn peak_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_run_and_a_positive_number() {
        assert_eq!(parse_order("run 3").unwrap(), 3);
        for bad in ["", "run", "run 0", "run -1", "run x", "walk 3"] {
            let error = parse_order(bad).unwrap_err().to_string();
            assert!(error.contains(&format!("{bad:?}")), "{error}");
        }
    }

    fn arguments(model: Model, mode: Work, frozen: bool) -> Arguments {
        Arguments {
            model,
            frozen,
            mode,
            batch: 2,
            image_size: 32,
            threads: None,
            profile: false,
        }
    }

    #[test]
    fn a_training_step_moves_the_weights_and_an_inference_step_does_not() {
        let moves = |model, mode| {
            let mut bench = Bench::new(&arguments(model, mode, false)).unwrap();
            let parameters = bench.model.trainable_parameters();
            let weights = || -> Vec<Vec<f32>> {
                let flat = parameters.iter().map(|(_, p)| p.flatten_all().unwrap());
                flat.map(|p| p.to_vec1().unwrap()).collect()
            };
            let before = weights();
            bench.step().unwrap();
            before != weights()
        };
        for model in [Model::Lesson, Model::Torchvision] {
            assert!(moves(model, Work::Train));
            assert!(!moves(model, Work::Inference));
        }
    }

    #[test]
    fn a_batch_of_one_small_picture_is_refused_before_anything_is_computed() {
        let network = |mode, image_size| {
            let single = Arguments {
                batch: 1,
                image_size,
                ..arguments(Model::Torchvision, mode, false)
            };
            Bench::new(&single).map(|_| ()).map_err(|e| e.to_string())
        };
        let largest = LARGEST_OF_ONE_PIXEL as u32;
        let refused = network(Work::Train, largest).unwrap_err();
        assert!(refused.contains("--batch 1"), "{refused}");
        network(Work::Train, largest + 1).unwrap();
        network(Work::Inference, 32).unwrap();
    }

    #[test]
    fn a_frozen_step_trains_the_head_alone_and_is_refused_for_the_lessons_net() {
        let bench = Bench::new(&arguments(Model::Torchvision, Work::Train, true)).unwrap();
        let names: Vec<String> = bench
            .model
            .trainable_parameters()
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(names, ["fc.weight", "fc.bias"]);
        assert!(Bench::new(&arguments(Model::Lesson, Work::Train, true)).is_err());
    }
}
