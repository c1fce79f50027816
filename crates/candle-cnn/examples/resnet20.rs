//! ResNet-20 (He et al., <https://arxiv.org/abs/1512.03385>, section 4.2) by the functions of this crate: how a network of your own is
//! built, trained and evaluated with them, on the CPU or, with `--features cuda`, on a GPU. Its pictures are patterns in noise, ten kinds of them, which it learns within a minute.
//!
//! ```sh
//! cargo run -p candle-cnn --example resnet20
//! ```
//!
//! "Speed on the CPU" in the crate's README says how to make a step take two thirds of the time.

use std::time::Instant;

use candle_cnn::{
    Conv2dConfig, CrossEntropyConfig, Mode, RunningStatistics, backward, batch_norm_eval,
    batch_norm_train, conv2d, cross_entropy, global_avg_pool2d, linear, relu, update_running,
};
use candle_core::{DType, Device, Result, Tensor, Var};

const CLASSES: usize = 10;
const BATCH: usize = 32;
const STEPS: usize = 60;
const LEARNING_RATE: f64 = 0.05;
const MOMENTUM: f64 = 0.9;

/// A convolution without bias and the batch norm behind it.
struct ConvNorm {
    config: Conv2dConfig,
    weight: Var,
    scale: Var,
    shift: Var,
    running_mean: Var,
    running_variance: Var,
}

impl ConvNorm {
    fn new(c_in: usize, c_out: usize, stride: usize, device: &Device) -> Result<Self> {
        // He's initialisation, `torch.nn.init.kaiming_normal_(mode="fan_out")`.
        let deviation = (2.0 / (c_out * 9) as f64).sqrt();
        let per_channel =
            |value: f64| Var::from_tensor(&Tensor::full(value as f32, c_out, device)?);
        Ok(Self {
            config: Conv2dConfig::padded(1).strided(stride),
            weight: Var::randn(0f32, deviation as f32, (c_out, c_in, 3, 3), device)?,
            scale: per_channel(1.0)?,
            shift: per_channel(0.0)?,
            running_mean: per_channel(0.0)?,
            running_variance: per_channel(1.0)?,
        })
    }

    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        if mode == Mode::Eval {
            // Detached, since Candle notes what it does with variables.
            let [weight, scale, shift] =
                [&self.weight, &self.scale, &self.shift].map(|var| var.as_detached_tensor());
            let running = RunningStatistics {
                mean: &self.running_mean,
                variance: &self.running_variance,
            };
            let x = conv2d(x, &weight, None, self.config)?;
            return batch_norm_eval(&x, &scale, &shift, running, 1e-5);
        }
        let x = conv2d(x, &self.weight, None, self.config)?;
        let (x, batch) = batch_norm_train(&x, &self.scale, &self.shift, 1e-5)?;
        for (running, of_batch) in [
            (&self.running_mean, &batch.mean),
            (&self.running_variance, &batch.unbiased_variance),
        ] {
            running.set(&update_running(running, of_batch, 0.1)?)?;
        }
        Ok(x)
    }
}

/// Two convolutions, and what goes past them.
struct Block {
    first: ConvNorm,
    second: ConvNorm,
}

impl Block {
    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let inner = relu(&self.first.forward(x, mode)?)?;
        let inner = self.second.forward(&inner, mode)?;
        // Where the block halves the picture and doubles the channels: every second pixel, and zeros (option A of the paper).
        let (_, channels, height, _) = x.dims4()?;
        let past = match inner.dim(1)? - channels {
            0 => x.clone(),
            more => {
                let every_second: Vec<u32> = (0..height as u32).step_by(2).collect();
                let every_second = Tensor::new(every_second, x.device())?;
                let x = x.index_select(&every_second, 2)?;
                let x = x.index_select(&every_second, 3)?;
                x.pad_with_zeros(1, more / 2, more - more / 2)?
            }
        };
        relu(&(inner + past)?)
    }
}

struct ResNet20 {
    stem: ConvNorm,
    blocks: Vec<Block>,
    fc_weight: Var,
    fc_bias: Var,
}

impl ResNet20 {
    fn new(device: &Device) -> Result<Self> {
        let mut blocks = Vec::new();
        let mut c_in = 16;
        for (c_out, stride) in [(16, 1), (32, 2), (64, 2)] {
            for stride in [stride, 1, 1] {
                blocks.push(Block {
                    first: ConvNorm::new(c_in, c_out, stride, device)?,
                    second: ConvNorm::new(c_out, c_out, 1, device)?,
                });
                c_in = c_out;
            }
        }
        Ok(Self {
            stem: ConvNorm::new(3, 16, 1, device)?,
            blocks,
            fc_weight: Var::randn(0f32, 0.1, (CLASSES, c_in), device)?,
            fc_bias: Var::zeros(CLASSES, DType::F32, device)?,
        })
    }

    /// What a step of training changes.
    fn parameters(&self) -> Vec<&Var> {
        let blocks = self.blocks.iter();
        let layers = std::iter::once(&self.stem).chain(blocks.flat_map(|b| [&b.first, &b.second]));
        layers
            .flat_map(|layer| [&layer.weight, &layer.scale, &layer.shift])
            .chain([&self.fc_weight, &self.fc_bias])
            .collect()
    }

    /// Logits, (N, 10), of pictures (N, 3, 32, 32).
    fn forward(&self, pictures: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut x = relu(&self.stem.forward(pictures, mode)?)?;
        for block in &self.blocks {
            x = block.forward(&x, mode)?;
        }
        linear(
            &global_avg_pool2d(&x)?,
            &self.fc_weight,
            Some(&self.fc_bias),
        )
    }
}

/// Pictures of ten patterns in as much noise, and their classes.
fn pictures(patterns: &Tensor, first: usize) -> Result<(Tensor, Tensor)> {
    let classes = (first..first + BATCH).map(|i| (i % CLASSES) as u32);
    let classes = Tensor::from_iter(classes, patterns.device())?;
    let pictures = patterns.index_select(&classes, 0)?;
    let noise = pictures.randn_like(0.0, 1.0)?;
    Ok(((pictures + noise)?, classes))
}

fn main() -> Result<()> {
    let device = Device::cuda_if_available(0)?;
    let patterns = Tensor::randn(0f32, 1.0, (CLASSES, 3, 32, 32), &device)?;
    let net = ResNet20::new(&device)?;
    let parameters = net.parameters();
    let count: usize = parameters.iter().map(|var| var.elem_count()).sum();
    println!("{count} parameters");

    let mut velocities: Vec<Option<Tensor>> = vec![None; parameters.len()];
    let start = Instant::now();
    for step in 1..=STEPS {
        let (x, classes) = pictures(&patterns, step)?;
        let dropout_seed = step as u64; // of no use here: there is no dropout
        let logits = net.forward(&x, Mode::Train { dropout_seed })?;
        let loss = cross_entropy(&logits, &classes, CrossEntropyConfig::default())?;
        let gradients = backward(&loss)?;
        // `torch.optim.SGD` with momentum.
        for (parameter, velocity) in parameters.iter().zip(&mut velocities) {
            let Some(gradient) = gradients.get(parameter) else {
                continue;
            };
            let next = match velocity.take() {
                None => gradient.clone(),
                Some(velocity) => ((velocity * MOMENTUM)? + gradient)?,
            };
            parameter.set(&parameter.sub(&(&next * LEARNING_RATE)?)?)?;
            *velocity = Some(next);
        }
        if step % 10 == 0 {
            let ms = start.elapsed().as_millis() / step as u128;
            println!(
                "step {step}: loss {:.3}, {ms} ms a step",
                loss.to_scalar::<f32>()?
            );
        }
    }

    let (x, classes) = pictures(&patterns, 0)?;
    let best = net.forward(&x, Mode::Eval)?.argmax(1)?;
    let right = best.eq(&classes)?.to_dtype(DType::U32)?.sum_all()?;
    println!("evaluation: {} of {BATCH} right", right.to_scalar::<u32>()?);
    Ok(())
}
