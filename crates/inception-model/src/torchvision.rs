//! torchvision's GoogLeNet: batch norm, 3×3 in the "5×5" branch, two auxiliary heads.

use std::convert::Infallible;

use candle_cnn::{
    BatchStatistics, Conv2dConfig, ConvParameters, MaxPool2dConfig, Mode, Node, RunningStatistics,
    StaticGraph, StaticGraphBuilder, adaptive_avg_pool2d, batch_norm_relu_eval,
    batch_norm_relu_train, conv2d, dropout, global_avg_pool2d, max_pool2d, relu, update_running,
};
use candle_core::{DType, Device, Result, Tensor, Var};
use rand::Rng;

use crate::error::ModelError;
use crate::init::{truncated_normal, uniform};
use crate::layers::{GraphCache, Inception, Linear, Stage, at_use, convert, for_head};
use crate::summary::{Summary, summarise_torchvision};
use crate::table::{BLOCKS, Entry, STEM_WIDTH};

/// Settings of [`GoogLeNet`]; the defaults are torchvision's for
/// `googlenet(weights=None, aux_logits=False)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GoogLeNetConfig {
    /// Outputs of the head, and of each auxiliary head.
    pub num_classes: usize,
    /// Whether the two auxiliary heads are there.
    pub aux_heads: bool,
    /// Whether the network first converts its input from ImageNet's mean and
    /// standard deviation to 0.5 and 0.5, with which torchvision's pretrained
    /// weights were trained.
    pub transform_input: bool,
    /// Probability that a feature is dropped before the head in training.
    pub dropout: f64,
    /// Probability that a feature is dropped inside the auxiliary heads in training.
    pub dropout_aux: f64,
}

impl Default for GoogLeNetConfig {
    fn default() -> Self {
        Self {
            num_classes: 1000,
            aux_heads: false,
            transform_input: false,
            dropout: 0.2,
            dropout_aux: 0.7,
        }
    }
}

/// What [`GoogLeNet::forward`] yields.
#[derive(Clone, Debug)]
pub struct GoogLeNetOutputs {
    /// The head's logits, (N, classes).
    pub logits: Tensor,
    /// Logits of the head after inception4d, (N, classes); only in training, and
    /// only where the network has auxiliary heads.
    pub aux2: Option<Tensor>,
    /// Logits of the head after inception4a, (N, classes); there where `aux2` is.
    pub aux1: Option<Tensor>,
}

/// What the batch norms of a frozen backbone do in training mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrozenBatchNorm {
    /// Batch norms normalise by the batch, and their running statistics move, as in a
    /// PyTorch model whose parameters have `requires_grad = False` but which is
    /// in `train()` mode.
    Moving,
    /// Batch norms normalise by the running statistics, which stay.
    Eval,
}

/// torchvision's `googlenet`: stem of three convolutions, nine Inception blocks
/// with batch norm, global average pool, dropout, fully connected head.
///
/// 6,624,904 parameters with 1000 classes, 13,004,888 with auxiliary heads.
/// What is called 5×5 in the paper is 3×3 here ([pytorch/vision #906]), and all
/// pools that halve the image round up.
///
/// In training mode the forward pass moves the running statistics of the batch
/// norms, as in PyTorch: at once, whatever the loss turns out to be.
///
/// [pytorch/vision #906]: https://github.com/pytorch/vision/issues/906
#[derive(Clone, Debug)]
pub struct GoogLeNet {
    network: Network<ConvNorm, Linear>,
    config: GoogLeNetConfig,
    frozen: Option<FrozenBatchNorm>,
    /// The graph that [`Self::forward`] runs where it can.
    graph: GraphCache,
}

/// The least height and width: 15 → 8 → 4 → 2 → 1 by the four halvings, and
/// the last pool makes nothing of less.
pub const SMALLEST_IMAGE: usize = 15;

/// The largest height and width that end as one pixel: 46 → 23 → 11 → 5 → 2 → 1. Of a single image of such a size, training
/// leaves the last batch norms one value a channel, and no variance.
pub const LARGEST_OF_ONE_PIXEL: usize = 46;

/// The pools that halve the image: 3×3 in the stem and after 3b …
pub(crate) const POOL3: MaxPool2dConfig = halving_pool(3);
/// … and 2×2 after 4e.
const POOL2: MaxPool2dConfig = halving_pool(2);

const fn halving_pool(kernel: usize) -> MaxPool2dConfig {
    MaxPool2dConfig {
        kernel_size: (kernel, kernel),
        stride: (2, 2),
        padding: (0, 0),
        ceil_mode: true,
    }
}

impl GoogLeNet {
    /// What a file of the network's weights calls it, under `architecture` in the metadata.
    pub const ARCHITECTURE: &str = "googlenet-torchvision";

    /// A freshly initialised network, as torchvision's with `init_weights=True`:
    /// weights normal with a standard deviation of 0.01, cut off at ±2; batch
    /// norms 1 and 0; biases U(±1/√fan_in). Drawn in the state dict's order.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn new(config: &GoogLeNetConfig, device: &Device, rng: &mut impl Rng) -> Result<Self> {
        // Both draw from the same generator, one after the other.
        let rng = std::cell::RefCell::new(rng);
        let network = Network::plan(config).try_map(
            |shape| ConvNorm::new(shape, device, &mut *rng.borrow_mut()),
            |shape| {
                let rng = &mut *rng.borrow_mut();
                Ok(Linear {
                    name: shape.name.clone(),
                    weight: truncated_normal(&[shape.outputs, shape.inputs], device, rng)?,
                    bias: uniform(&[shape.outputs], shape.inputs, device, rng)?,
                })
            },
        )?;
        Ok(Self {
            network,
            config: *config,
            frozen: None,
            graph: GraphCache::default(),
        })
    }

    /// Replaces the head by a fresh one, initialised as `nn.Linear` is: weight
    /// and bias U(±1/√fan_in). The last layers of auxiliary heads likewise.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn reset_head(&mut self, num_classes: usize, rng: &mut impl Rng) -> Result<()> {
        self.config.num_classes = num_classes;
        let network = &mut self.network;
        let heads = network.aux.iter_mut().flatten().map(|aux| &mut aux.fc2);
        for head in heads.chain([&mut network.fc]) {
            let (inputs, device) = (head.weight.dims()[1], head.weight.device().clone());
            let dtype = head.weight.dtype();
            let weight = uniform(&[num_classes, inputs], inputs, &device, rng)?;
            let bias = uniform(&[num_classes], inputs, &device, rng)?;
            *head = Linear {
                name: head.name.clone(),
                weight: convert(&weight, dtype)?,
                bias: convert(&bias, dtype)?,
            };
        }
        Ok(())
    }

    /// Logits of images (N, 3, H, W) of any size from 15×15. The
    /// backbone runs as one [`StaticGraph`], unless auxiliary heads or the
    /// images need a gradient; on CUDA gradients then come through
    /// [`candle_cnn::backward`] alone.
    ///
    /// # Errors
    /// Smaller images ([`ModelError`]), another rank or number of channels, and
    /// in training a batch whose last maps have a single value per channel
    /// (one image of at most [`LARGEST_OF_ONE_PIXEL`] squared).
    pub fn forward(&self, images: &Tensor, mode: Mode) -> Result<GoogLeNetOutputs> {
        if mode.is_train() && self.frozen.is_none() && self.network.aux.is_some() {
            return self.forward_observed(images, mode, |_, _| Ok(()));
        }
        Ok(GoogLeNetOutputs {
            logits: self.classify(&self.features(images, mode)?, mode)?,
            aux2: None,
            aux1: None,
        })
    }

    /// Logits (N, classes) in evaluation mode where nobody needs a gradient of
    /// a parameter: each map is freed after its last reader.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn infer(&self, images: &Tensor) -> Result<Tensor> {
        let features = match self.runs_as_graph(images) {
            true => self.features_by_graph(images, Mode::Eval, Var::as_detached_tensor)?,
            false => self.features(images, Mode::Eval)?.detach(),
        };
        Ok(self.classify(&features, Mode::Eval)?.detach())
    }

    /// [`Self::forward`], operation by operation, that shows each stage's output to `observe`, under the
    /// names `conv1`, `maxpool1`, `conv2`, `conv3`, `maxpool2`, `inception3a` …
    /// `inception5b`, `maxpool3`, `maxpool4`, `avgpool`.
    ///
    /// # Errors
    /// As [`Self::forward`], and what `observe` returns.
    pub fn forward_observed(
        &self,
        images: &Tensor,
        mode: Mode,
        observe: impl FnMut(&str, &Tensor) -> Result<()>,
    ) -> Result<GoogLeNetOutputs> {
        // The heads exist to send a gradient into the backbone.
        let heads = match mode.is_train() && self.frozen.is_none() {
            true => self.network.aux.as_ref(),
            false => None,
        };
        let body = self.body(images, mode, heads, observe)?;
        Ok(GoogLeNetOutputs {
            logits: self.classify(&body.features, mode)?,
            aux2: body.aux2,
            aux1: body.aux1,
        })
    }

    /// What the head sees: (N, 1024) after the global average pool, before dropout.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn features(&self, images: &Tensor, mode: Mode) -> Result<Tensor> {
        if self.runs_as_graph(images) {
            return self.features_by_graph(images, mode, |var| match self.frozen {
                None => var.as_tensor().clone(),
                Some(_) => var.as_detached_tensor(),
            });
        }
        Ok(self.body(images, mode, None, |_, _| Ok(()))?.features)
    }

    /// Logits (N, classes) of [`Self::features`]: dropout and the head.
    ///
    /// # Errors
    /// Features of another shape than (N, 1024).
    pub fn classify(&self, features: &Tensor, mode: Mode) -> Result<Tensor> {
        let features = for_head(features)?;
        let features = dropout(&features, self.config.dropout, MAIN_DROPOUT, mode)?;
        self.network.fc.forward(&features)
    }

    /// Every parameter, frozen or not, under its state-dict name, in the state dict's order.
    pub fn named_parameters(&self) -> Vec<(String, Var)> {
        let mut parameters = Vec::new();
        self.network.visit(
            |conv, out: &mut Vec<_>| {
                let ConvNorm { name, norm, .. } = conv;
                out.push((format!("{name}.conv.weight"), conv.weight.clone()));
                out.push((format!("{name}.bn.weight"), norm.weight.clone()));
                out.push((format!("{name}.bn.bias"), norm.bias.clone()));
            },
            |linear, out| out.extend(linear.parameters()),
            &mut parameters,
        );
        parameters
    }

    /// The running statistics of every batch norm under their state-dict names,
    /// in the state dict's order: `running_mean` and `running_var` (C),
    /// `num_batches_tracked` (i64, no dimensions).
    pub fn named_buffers(&self) -> Vec<(String, Var)> {
        let mut buffers = Vec::new();
        self.network.visit(
            |conv, out: &mut Vec<_>| {
                let ConvNorm { name, norm, .. } = conv;
                for (field, var) in [
                    ("running_mean", &norm.running_mean),
                    ("running_var", &norm.running_var),
                    ("num_batches_tracked", &norm.num_batches_tracked),
                ] {
                    out.push((format!("{name}.bn.{field}"), var.clone()));
                }
            },
            |_, _| (),
            &mut buffers,
        );
        buffers
    }

    /// Stops the training of everything but `fc`. The backbone's weights take
    /// part without being tracked: no gradient is computed and each activation
    /// is freed as soon as the next is there. Auxiliary heads, which exist for
    /// the backbone's gradient, are no longer run.
    pub fn freeze_backbone(&mut self, batch_norm: FrozenBatchNorm) {
        self.frozen = Some(batch_norm);
    }

    /// Whether a parameter takes part in training: all, or after
    /// [`Self::freeze_backbone`] those of `fc`.
    pub fn is_trainable(&self, parameter: &str) -> bool {
        self.frozen.is_none() || parameter.starts_with("fc.")
    }

    /// Whether a state-dict key is of an auxiliary head.
    pub fn is_auxiliary(key: &str) -> bool {
        key.starts_with("aux1.") || key.starts_with("aux2.")
    }

    /// Whether a state-dict key is of a layer with an output for each class: `fc`, and the last of
    /// each auxiliary head, which [`Self::reset_head`] replaces.
    pub fn is_head(key: &str) -> bool {
        let heads = ["fc.", "aux1.fc2.", "aux2.fc2."];
        heads.iter().any(|head| key.starts_with(head))
    }

    /// Names, shapes and dtypes of torchvision's state dict, in its order.
    pub fn state_dict_shapes(config: &GoogLeNetConfig) -> Vec<(String, Vec<usize>, DType)> {
        let mut shapes = Vec::new();
        Network::plan(config).visit(
            |conv, out: &mut Vec<_>| {
                let ConvShape { name, outputs, .. } = conv;
                out.push((format!("{name}.conv.weight"), conv.dims(), DType::F32));
                for field in ["weight", "bias", "running_mean", "running_var"] {
                    out.push((format!("{name}.bn.{field}"), vec![*outputs], DType::F32));
                }
                let counter = format!("{name}.bn.num_batches_tracked");
                out.push((counter, vec![], DType::I64));
            },
            |linear, out| {
                let LinearShape {
                    name,
                    inputs,
                    outputs,
                } = linear;
                out.push((
                    format!("{name}.weight"),
                    vec![*outputs, *inputs],
                    DType::F32,
                ));
                out.push((format!("{name}.bias"), vec![*outputs], DType::F32));
            },
            &mut shapes,
        );
        shapes
    }

    /// The settings, with the head's present number of classes.
    pub fn config(&self) -> &GoogLeNetConfig {
        &self.config
    }

    /// Number of values in all parameters, frozen or not.
    pub fn parameter_count(&self) -> usize {
        let parameters = self.named_parameters();
        parameters.iter().map(|(_, p)| p.elem_count()).sum()
    }

    /// Layer by layer: output shape, parameters, multiply-accumulates, for one
    /// picture of `height` × `width` pixels. Auxiliary heads count with their
    /// parameters and work, although they run in training only.
    pub fn summary(&self, height: usize, width: usize) -> Summary {
        summarise_torchvision(&Network::plan(&self.config), height, width)
    }

    /// A copy with parameters and statistics of the given float type, for checks in f64. It shares no variable with this one.
    ///
    /// # Errors
    /// A type that Candle cannot convert to.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let network = self.network.try_map(
            |conv| {
                let norm = &conv.norm;
                Ok(ConvNorm {
                    name: conv.name.clone(),
                    weight: convert(&conv.weight, dtype)?,
                    norm: BatchNorm {
                        weight: convert(&norm.weight, dtype)?,
                        bias: convert(&norm.bias, dtype)?,
                        running_mean: convert(&norm.running_mean, dtype)?,
                        running_var: convert(&norm.running_var, dtype)?,
                        num_batches_tracked: convert(&norm.num_batches_tracked, DType::I64)?,
                    },
                    config: conv.config,
                })
            },
            |linear| {
                Ok(Linear {
                    name: linear.name.clone(),
                    weight: convert(&linear.weight, dtype)?,
                    bias: convert(&linear.bias, dtype)?,
                })
            },
        )?;
        Ok(Self {
            network,
            graph: GraphCache::default(),
            ..self.clone()
        })
    }

    fn runs_as_graph(&self, images: &Tensor) -> bool {
        StaticGraph::takes(images) && !images.track_op()
    }

    /// What a batch norm does: a frozen one may stay as in evaluation.
    fn norm_mode(&self, mode: Mode) -> Mode {
        match self.frozen {
            Some(FrozenBatchNorm::Eval) => Mode::Eval,
            _ => mode,
        }
    }

    /// [`Self::features`] as one operation, by weights that `tensor` makes of the parameters: those that it detaches get no
    /// gradient.
    fn features_by_graph(
        &self,
        images: &Tensor,
        mode: Mode,
        tensor: impl Fn(&Var) -> Tensor,
    ) -> Result<Tensor> {
        let (_, _, height, width) = check_images(images)?;
        let graph = self.graph((height, width))?;
        let norm = self.norm_mode(mode);
        let convs = self.network.backbone();
        let tensors: Vec<_> = convs.iter().map(|conv| conv.tensors(&tensor)).collect();
        let parameters: Vec<_> = tensors
            .iter()
            .map(
                |[weight, norm_weight, norm_bias, mean, variance]| match norm {
                    Mode::Train { .. } => ConvParameters::BatchNorm {
                        weight,
                        norm_weight,
                        norm_bias,
                    },
                    Mode::Eval => ConvParameters::Running {
                        weight,
                        norm_weight,
                        norm_bias,
                        mean,
                        variance,
                    },
                },
            )
            .collect();
        let images = if self.config.transform_input {
            transform_input(images)?
        } else {
            images.clone()
        };
        let output = graph.forward(&images, &parameters)?;
        let norms = convs.iter().map(|conv| &conv.norm);
        BatchNorm::take_up(norms.zip(&output.statistics))?;
        Ok(output.features)
    }

    fn graph(&self, size: (usize, usize)) -> Result<StaticGraph> {
        self.graph.get(size, || {
            let network = &self.network;
            let mut builder = StaticGraphBuilder::new(3, size);
            let images = builder.input();
            let mut x = network.conv1.describe(&mut builder, images)?;
            x = builder.max_pool2d(x, POOL3)?;
            builder.name(x, "maxpool1");
            x = network.conv2.describe(&mut builder, x)?;
            x = network.conv3.describe(&mut builder, x)?;
            x = builder.max_pool2d(x, POOL3)?;
            builder.name(x, "maxpool2");
            for stage in &network.body {
                x = match stage {
                    Stage::Block(block) => {
                        block.describe_with(&mut builder, x, ConvNorm::describe)?
                    }
                    Stage::MaxPool { name, window } => {
                        let pooled = builder.max_pool2d(x, *window)?;
                        builder.name(pooled, name);
                        pooled
                    }
                };
            }
            builder.global_avg_pool2d(x)
        })
    }

    /// Everything up to the global average pool, and the auxiliary `heads`.
    fn body(
        &self,
        images: &Tensor,
        mode: Mode,
        heads: Option<&[AuxHead<ConvNorm, Linear>; 2]>,
        mut observe: impl FnMut(&str, &Tensor) -> Result<()>,
    ) -> Result<Body> {
        check_images(images)?;
        let norm = self.norm_mode(mode);
        let conv = |conv: &ConvNorm, x: &Tensor| match self.frozen {
            None => conv.forward(x, norm),
            Some(_) => conv.forward_frozen(x, norm),
        };
        let network = &self.network;
        let mut step = |name: &str, x: Tensor| observe(name, &x).map(|()| x);
        let mut x = if self.config.transform_input {
            transform_input(images)?
        } else {
            images.clone()
        };
        x = step("conv1", conv(&network.conv1, &x)?)?;
        x = step("maxpool1", max_pool2d(&x, POOL3)?)?;
        x = step("conv2", conv(&network.conv2, &x)?)?;
        x = step("conv3", conv(&network.conv3, &x)?)?;
        x = step("maxpool2", max_pool2d(&x, POOL3)?)?;
        let (mut aux1, mut aux2) = (None, None);
        for stage in &network.body {
            x = match stage {
                Stage::Block(block) => step(block.name, block.forward_with(&x, conv)?)?,
                Stage::MaxPool { name, window } => step(name, max_pool2d(&x, *window)?)?,
            };
            let Some([head1, head2]) = heads else {
                continue;
            };
            let p = self.config.dropout_aux;
            match stage {
                Stage::Block(block) if block.name == AUX1_AFTER => {
                    aux1 = Some(head1.forward(&x, p, AUX1_DROPOUT, mode)?);
                }
                Stage::Block(block) if block.name == AUX2_AFTER => {
                    aux2 = Some(head2.forward(&x, p, AUX2_DROPOUT, mode)?);
                }
                _ => (),
            }
        }
        Ok(Body {
            features: step("avgpool", global_avg_pool2d(&x)?)?,
            aux2,
            aux1,
        })
    }
}

/// (N, 3, H, W) of images that are large enough.
fn check_images(images: &Tensor) -> Result<(usize, usize, usize, usize)> {
    let &[batch, 3, height, width] = images.dims() else {
        let found = images.dims().to_vec();
        return Err(ModelError::NotImages { found }.into());
    };
    if height.min(width) < SMALLEST_IMAGE {
        return Err(ModelError::ImageTooSmall {
            network: "torchvision's GoogLeNet",
            height,
            width,
            smallest: SMALLEST_IMAGE,
        }
        .into());
    }
    Ok((batch, 3, height, width))
}

/// The blocks behind which the auxiliary heads sit.
pub(crate) const AUX1_AFTER: &str = "inception4a";
pub(crate) const AUX2_AFTER: &str = "inception4d";

/// Salts that give each dropout a mask of its own.
const MAIN_DROPOUT: u64 = 0;
const AUX1_DROPOUT: u64 = 1;
const AUX2_DROPOUT: u64 = 2;

struct Body {
    features: Tensor,
    aux2: Option<Tensor>,
    aux1: Option<Tensor>,
}

/// From images normalised by ImageNet's statistics to mean and standard
/// deviation 0.5, which the network was trained with:
/// `x · std/0.5 + (mean − 0.5)/0.5`.
fn transform_input(images: &Tensor) -> Result<Tensor> {
    const MEAN: [f64; 3] = [0.485, 0.456, 0.406];
    const STD: [f64; 3] = [0.229, 0.224, 0.225];
    let per_channel = |values: [f64; 3]| {
        // Converted on the CPU, which spares a GPU the launch.
        let values = Tensor::new(&values, &Device::Cpu)?.to_dtype(images.dtype())?;
        values.to_device(images.device())?.reshape((1, 3, 1, 1))
    };
    let scale = per_channel(STD.map(|std| std / 0.5))?;
    let shift = per_channel(MEAN.map(|mean| (mean - 0.5) / 0.5))?;
    images.broadcast_mul(&scale)?.broadcast_add(&shift)
}

/// The network over any kind of convolution `C` and linear layer `L`: planned
/// as shapes, then made of weights, from the one list of layers.
#[derive(Clone, Debug)]
pub(crate) struct Network<C, L> {
    pub(crate) conv1: C,
    pub(crate) conv2: C,
    pub(crate) conv3: C,
    pub(crate) body: Vec<Stage<C>>,
    pub(crate) aux: Option<[AuxHead<C, L>; 2]>,
    pub(crate) fc: L,
}

/// An auxiliary head: average pool to 4×4, 1×1 convolution, two linear layers.
#[derive(Clone, Debug)]
pub(crate) struct AuxHead<C, L> {
    pub(crate) conv: C,
    pub(crate) fc1: L,
    pub(crate) fc2: L,
}

/// A convolution without its weights.
#[derive(Clone, Debug)]
pub(crate) struct ConvShape {
    pub(crate) name: String,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) kernel: usize,
    pub(crate) stride: usize,
}

/// A linear layer without its weights.
#[derive(Clone, Debug)]
pub(crate) struct LinearShape {
    pub(crate) name: String,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
}

impl ConvShape {
    /// Shape of the weight: (C_out, C_in, kernel, kernel).
    pub(crate) fn dims(&self) -> Vec<usize> {
        vec![self.outputs, self.inputs, self.kernel, self.kernel]
    }

    pub(crate) fn config(&self) -> Conv2dConfig {
        Conv2dConfig::padded(self.kernel / 2).strided(self.stride)
    }
}

/// Average-pooled height and width of an auxiliary head, its channels and
/// hidden units.
pub(crate) const AUX_POOL: usize = 4;
const AUX_CHANNELS: usize = 128;
const AUX_HIDDEN: usize = 1024;

impl Network<ConvShape, LinearShape> {
    /// torchvision's network, layer by layer in the state dict's order.
    fn plan(config: &GoogLeNetConfig) -> Self {
        let conv = |name: String, (inputs, outputs), kernel, stride| ConvShape {
            name,
            inputs,
            outputs,
            kernel,
            stride,
        };
        let linear = |name: String, inputs, outputs| LinearShape {
            name,
            inputs,
            outputs,
        };
        // Each branch is a sequence, but the first, and has its pool at 0.
        const PLACES: [&str; 6] = [
            "branch1",
            "branch2.0",
            "branch2.1",
            "branch3.0",
            "branch3.1",
            "branch4.1",
        ];
        let mut channels = STEM_WIDTH;
        let mut pools = [("maxpool3", POOL3), ("maxpool4", POOL2)].into_iter();
        let mut aux_inputs = [0; 2];
        let mut body = Vec::with_capacity(BLOCKS.len());
        for entry in &BLOCKS {
            match entry {
                Entry::MaxPool => body.extend(pools.next().map(|(name, window)| Stage::MaxPool {
                    name: name.to_string(),
                    window,
                })),
                Entry::Block(name, widths) => {
                    let name = name.torchvision;
                    // 3×3 where the paper has 5×5: pytorch/vision #906.
                    let Ok(block) = Inception::build(name, channels, widths, 3, |i, io, kernel| {
                        let name = format!("{name}.{}", PLACES[i]);
                        Ok::<_, Infallible>(conv(name, io, kernel, 1))
                    });
                    channels = widths.output();
                    for (inputs, after) in aux_inputs.iter_mut().zip([AUX1_AFTER, AUX2_AFTER]) {
                        if name == after {
                            *inputs = channels;
                        }
                    }
                    body.push(Stage::Block(Box::new(block)));
                }
            }
        }
        let classes = config.num_classes;
        let aux = |name: &str, inputs| AuxHead {
            conv: conv(format!("{name}.conv"), (inputs, AUX_CHANNELS), 1, 1),
            fc1: linear(
                format!("{name}.fc1"),
                AUX_CHANNELS * AUX_POOL * AUX_POOL,
                AUX_HIDDEN,
            ),
            fc2: linear(format!("{name}.fc2"), AUX_HIDDEN, classes),
        };
        Self {
            conv1: conv("conv1".into(), (3, 64), 7, 2),
            conv2: conv("conv2".into(), (64, 64), 1, 1),
            conv3: conv("conv3".into(), (64, STEM_WIDTH), 3, 1),
            body,
            aux: config
                .aux_heads
                .then(|| [aux("aux1", aux_inputs[0]), aux("aux2", aux_inputs[1])]),
            fc: linear("fc".into(), channels, classes),
        }
    }
}

impl<C, L> Network<C, L> {
    /// The convolutions of everything but the heads, in the state dict's order.
    fn backbone(&self) -> Vec<&C> {
        let mut convs = vec![&self.conv1, &self.conv2, &self.conv3];
        for stage in &self.body {
            if let Stage::Block(block) = stage {
                convs.extend(block.convs());
            }
        }
        convs
    }

    /// Shows every layer to one of the functions, in the state dict's order.
    fn visit<T>(&self, conv: impl Fn(&C, &mut T), linear: impl Fn(&L, &mut T), to: &mut T) {
        for layer in self.backbone() {
            conv(layer, to);
        }
        for head in self.aux.iter().flatten() {
            conv(&head.conv, to);
            linear(&head.fc1, to);
            linear(&head.fc2, to);
        }
        linear(&self.fc, to);
    }

    /// The network with every layer replaced, in the state dict's order.
    fn try_map<D, M>(
        &self,
        conv: impl Fn(&C) -> Result<D>,
        linear: impl Fn(&L) -> Result<M>,
    ) -> Result<Network<D, M>> {
        let stage = |stage: &Stage<C>| {
            Ok(match stage {
                Stage::Block(block) => Stage::Block(Box::new(block.try_map(&conv)?)),
                Stage::MaxPool { name, window } => Stage::MaxPool {
                    name: name.clone(),
                    window: *window,
                },
            })
        };
        let head = |head: &AuxHead<C, L>| -> Result<AuxHead<D, M>> {
            Ok(AuxHead {
                conv: conv(&head.conv)?,
                fc1: linear(&head.fc1)?,
                fc2: linear(&head.fc2)?,
            })
        };
        Ok(Network {
            conv1: conv(&self.conv1)?,
            conv2: conv(&self.conv2)?,
            conv3: conv(&self.conv3)?,
            body: self.body.iter().map(stage).collect::<Result<_>>()?,
            aux: match &self.aux {
                Some([aux1, aux2]) => Some([head(aux1)?, head(aux2)?]),
                None => None,
            },
            fc: linear(&self.fc)?,
        })
    }
}

impl AuxHead<ConvNorm, Linear> {
    fn forward(&self, x: &Tensor, p: f64, salt: u64, mode: Mode) -> Result<Tensor> {
        let x = adaptive_avg_pool2d(x, (AUX_POOL, AUX_POOL))?;
        let x = for_head(&self.conv.forward(&x, mode)?.flatten_from(1)?)?;
        let x = relu(&self.fc1.forward(&x)?)?;
        self.fc2.forward(&dropout(&x, p, salt, mode)?)
    }
}

/// torchvision's `BasicConv2d`: a convolution without bias, batch norm, ReLU.
#[derive(Clone, Debug)]
pub(crate) struct ConvNorm {
    /// State-dict prefix, such as `inception3a.branch2.1`.
    name: String,
    /// (C_out, C_in, kernel, kernel).
    weight: Var,
    /// The batch norm that follows the convolution.
    norm: BatchNorm,
    config: Conv2dConfig,
}

/// `nn.BatchNorm2d(eps=0.001)`.
#[derive(Clone, Debug)]
struct BatchNorm {
    /// The factor of each channel, (C).
    weight: Var,
    /// The term of each channel, (C).
    bias: Var,
    /// Running mean of each channel, (C).
    running_mean: Var,
    /// Running unbiased variance of each channel, (C).
    running_var: Var,
    /// Training passes so far, i64 without dimensions.
    num_batches_tracked: Var,
}

/// torchvision's, against PyTorch's default of 1e-5.
const EPS: f64 = 1e-3;
/// PyTorch's: the part of the new value.
const MOMENTUM: f64 = 0.1;

impl ConvNorm {
    fn new(shape: &ConvShape, device: &Device, rng: &mut impl Rng) -> Result<Self> {
        let channels = shape.outputs;
        Ok(Self {
            name: shape.name.clone(),
            weight: truncated_normal(&shape.dims(), device, rng)?,
            norm: BatchNorm {
                weight: Var::ones(channels, DType::F32, device)?,
                bias: Var::zeros(channels, DType::F32, device)?,
                running_mean: Var::zeros(channels, DType::F32, device)?,
                running_var: Var::ones(channels, DType::F32, device)?,
                num_batches_tracked: Var::zeros((), DType::I64, device)?,
            },
            config: shape.config(),
        })
    }

    /// (N, C_in, H, W) → (N, C_out, H', W'), the convolution's weights rounded to bf16
    /// where `x` is.
    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let x = conv2d(x, &at_use(&self.weight, x)?, None, self.config)?;
        self.norm
            .forward(&x, &self.norm.weight, &self.norm.bias, mode)
    }

    /// Adds convolution, batch norm and ReLU to a graph.
    fn describe(&self, graph: &mut StaticGraphBuilder, x: Node) -> Result<Node> {
        let (c_out, _, kernel, _) = self.weight.dims4()?;
        let window = (self.config.stride.0, self.config.padding.0);
        let y = graph.conv2d_batch_norm_relu(x, c_out, kernel, window, EPS)?;
        graph.name(y, &self.name);
        Ok(y)
    }

    /// Weight, norm weight and norm bias by `tensor`; running mean and variance.
    fn tensors(&self, tensor: impl Fn(&Var) -> Tensor) -> [Tensor; 5] {
        let norm = &self.norm;
        [
            tensor(&self.weight),
            tensor(&norm.weight),
            tensor(&norm.bias),
            norm.running_mean.as_detached_tensor(),
            norm.running_var.as_detached_tensor(),
        ]
    }

    /// The forward pass by weights that nobody tracks.
    fn forward_frozen(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let norm = &self.norm;
        let weight = at_use(&self.weight.as_detached_tensor(), x)?;
        let x = conv2d(x, &weight, None, self.config)?;
        let (weight, bias) = (
            norm.weight.as_detached_tensor(),
            norm.bias.as_detached_tensor(),
        );
        norm.forward(&x, &weight, &bias, mode)
    }
}

impl BatchNorm {
    /// Normalises and applies ReLU; in training the running statistics move.
    fn forward(&self, x: &Tensor, weight: &Tensor, bias: &Tensor, mode: Mode) -> Result<Tensor> {
        if !mode.is_train() {
            let running = RunningStatistics {
                mean: &self.running_mean.as_detached_tensor(),
                variance: &self.running_var.as_detached_tensor(),
            };
            return batch_norm_relu_eval(x, weight, bias, running, EPS);
        }
        let (y, batch) = batch_norm_relu_train(x, weight, bias, EPS)?;
        Self::take_up(std::iter::once((self, &batch)))?;
        Ok(y)
    }

    /// Moves the running statistics of batch norms, those on a GPU together.
    fn take_up<'a>(norms: impl Iterator<Item = (&'a Self, &'a BatchStatistics)>) -> Result<()> {
        #[cfg(feature = "cuda")]
        let norms = {
            let is_cuda = |(norm, _): &(&Self, _)| norm.running_mean.device().is_cuda();
            let (on_gpu, others): (Vec<_>, Vec<_>) = norms.partition(is_cuda);
            let detach = |(norm, _): &(&Self, _)| {
                [
                    &norm.running_mean,
                    &norm.running_var,
                    &norm.num_batches_tracked,
                ]
                .map(Var::as_detached_tensor)
            };
            let tensors: Vec<[Tensor; 3]> = on_gpu.iter().map(detach).collect();
            let all: Vec<_> = tensors
                .iter()
                .zip(&on_gpu)
                .map(|([mean, variance, batches], (_, batch))| {
                    let running = candle_cnn::cuda::TrackedStatistics {
                        mean,
                        variance,
                        batches,
                    };
                    (running, *batch)
                })
                .collect();
            candle_cnn::cuda::take_up_statistics(&all, MOMENTUM)?;
            others.into_iter()
        };
        for (norm, batch) in norms {
            let [mean, var] = [&norm.running_mean, &norm.running_var].map(Var::as_detached_tensor);
            let mean = update_running(&mean, &batch.mean, MOMENTUM)?;
            let var = update_running(&var, &batch.unbiased_variance, MOMENTUM)?;
            norm.running_mean.set(&mean)?;
            norm.running_var.set(&var)?;
            let counted = (norm.num_batches_tracked.as_detached_tensor() + 1.0)?;
            norm.num_batches_tracked.set(&counted)?;
        }
        Ok(())
    }
}
