//! The lesson's GoogLeNet for 32×32 pictures: no batch norm, true 5×5, one head.

use candle_cnn::{
    ConvParameters, MaxPool2dConfig, Mode, StaticGraph, StaticGraphBuilder, dropout,
    global_avg_pool2d, max_pool2d,
};
use candle_core::{DType, Device, Result, Tensor, Var};
use rand::Rng;

use crate::init::Init;
use crate::layers::{Conv, GraphCache, Inception, Linear, Stage, convert, for_head};
use crate::summary::{Summary, summarise};
use crate::table::{BLOCKS, Entry, STEM_WIDTH};

/// Settings of [`CifarGoogLeNet`]; the default is the lesson's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CifarConfig {
    /// Outputs of the head.
    pub num_classes: usize,
    /// Probability that a feature is dropped before the head in training.
    pub dropout: f64,
    /// Initialisation of the weights.
    pub init: Init,
}

impl Default for CifarConfig {
    fn default() -> Self {
        Self {
            num_classes: 10,
            dropout: 0.4,
            init: Init::Lesson,
        }
    }
}

/// Stem, nine Inception blocks with two max-pools between, global average
/// pool, dropout, fully connected head: 5,864,762 parameters with 10 classes.
#[derive(Clone, Debug)]
pub struct CifarGoogLeNet {
    pub(crate) stem: Conv,
    pub(crate) body: Vec<Stage>,
    pub(crate) fc: Linear,
    dropout: f64,
    /// The graph that [`Self::forward`] runs.
    graph: GraphCache,
}

/// The pool after b3 and e4: halves height and width.
const HALVING_POOL: MaxPool2dConfig = MaxPool2dConfig {
    kernel_size: (3, 3),
    stride: (2, 2),
    padding: (1, 1),
    ceil_mode: false,
};

impl CifarGoogLeNet {
    /// What a file of the network's weights calls it, under `architecture` in the metadata.
    pub const ARCHITECTURE: &str = "googlenet-cifar";

    /// A freshly initialised network; parameters are drawn in the state dict's order.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn new(config: &CifarConfig, device: &Device, rng: &mut impl Rng) -> Result<Self> {
        let init = config.init;
        let stem = Conv::new("pre_layers.0", (3, STEM_WIDTH), 3, init, device, rng)?;
        let mut channels = STEM_WIDTH;
        let mut body = Vec::with_capacity(BLOCKS.len());
        let mut last_block = "";
        for entry in &BLOCKS {
            body.push(match entry {
                Entry::MaxPool => Stage::MaxPool {
                    name: format!("{last_block}.maxpool"),
                    window: HALVING_POOL,
                },
                Entry::Block(name, widths) => {
                    let block = Inception::new(name.lesson, channels, widths, init, device, rng)?;
                    channels = widths.output();
                    last_block = name.lesson;
                    Stage::Block(Box::new(block))
                }
            });
        }
        let fc = Linear::new("fc", (channels, config.num_classes), init, device, rng)?;
        Ok(Self {
            stem,
            body,
            fc,
            dropout: config.dropout,
            graph: GraphCache::default(),
        })
    }

    /// Logits (N, classes) of images (N, 3, H, W); the lesson's are 32×32,
    /// normalised to −1 … 1. All but the head runs as one
    /// [`StaticGraph`], whose gradients come through [`candle_cnn::backward`]
    /// alone on CUDA.
    ///
    /// # Errors
    /// Images of another rank or number of channels, or too small for the pools.
    pub fn forward(&self, images: &Tensor, mode: Mode) -> Result<Tensor> {
        if !StaticGraph::takes(images) {
            return self.forward_observed(images, mode, |_, _| Ok(()));
        }
        let features = self.features_by_graph(images, |var| var.as_tensor().clone())?;
        self.head(&features, mode)
    }

    /// Logits in evaluation mode where nobody needs a gradient of a parameter:
    /// each map is freed after its last reader.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn infer(&self, images: &Tensor) -> Result<Tensor> {
        if !StaticGraph::takes(images) {
            return Ok(self.forward(images, Mode::Eval)?.detach());
        }
        let features = self.features_by_graph(images, Var::as_detached_tensor)?;
        Ok(self.head(&features, Mode::Eval)?.detach())
    }

    fn features_by_graph(
        &self,
        images: &Tensor,
        tensor: impl Fn(&Var) -> Tensor,
    ) -> Result<Tensor> {
        let (_, _, height, width) = images.dims4()?;
        let graph = self.graph((height, width))?;
        let tensors: Vec<_> = self
            .convs()
            .map(|conv| (tensor(&conv.weight), tensor(&conv.bias)))
            .collect();
        let parameters: Vec<_> = tensors
            .iter()
            .map(|(weight, bias)| ConvParameters::Bias { weight, bias })
            .collect();
        Ok(graph.forward(images, &parameters)?.features)
    }

    /// [`Self::forward`], operation by operation: shows each stage's output to `observe`, under
    /// the names `pre_layers`, `a3` … `b5`, `b3.maxpool`, `e4.maxpool`, `avgpool`.
    ///
    /// # Errors
    /// As [`Self::forward`], and what `observe` returns.
    pub fn forward_observed(
        &self,
        images: &Tensor,
        mode: Mode,
        mut observe: impl FnMut(&str, &Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let mut x = self.stem.forward(images)?;
        observe("pre_layers", &x)?;
        for stage in &self.body {
            match stage {
                Stage::Block(block) => {
                    x = block.forward(&x)?;
                    observe(block.name, &x)?;
                }
                Stage::MaxPool { name, window } => {
                    x = max_pool2d(&x, *window)?;
                    observe(name, &x)?;
                }
            }
        }
        let features = global_avg_pool2d(&x)?;
        observe("avgpool", &features)?;
        self.head(&features, mode)
    }

    fn head(&self, features: &Tensor, mode: Mode) -> Result<Tensor> {
        let features = for_head(features)?;
        self.fc.forward(&dropout(&features, self.dropout, 0, mode)?)
    }

    fn graph(&self, size: (usize, usize)) -> Result<StaticGraph> {
        self.graph.get(size, || {
            let mut builder = StaticGraphBuilder::new(3, size);
            let images = builder.input();
            let mut x = self.stem.describe(&mut builder, images)?;
            for stage in &self.body {
                x = match stage {
                    Stage::Block(block) => block.describe_with(&mut builder, x, Conv::describe)?,
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

    /// All convolutions in the state dict's order.
    fn convs(&self) -> impl Iterator<Item = &Conv> {
        let blocks = self.body.iter().filter_map(|stage| match stage {
            Stage::Block(block) => Some(block.convs()),
            Stage::MaxPool { .. } => None,
        });
        std::iter::once(&self.stem).chain(blocks.flatten())
    }

    /// Every parameter under its state-dict name, in the state dict's order.
    pub fn named_parameters(&self) -> Vec<(String, Var)> {
        let convs = self.convs().flat_map(Conv::parameters);
        convs.chain(self.fc.parameters()).collect()
    }

    /// Number of trainable values.
    pub fn parameter_count(&self) -> usize {
        let parameters = self.named_parameters();
        parameters.iter().map(|(_, p)| p.elem_count()).sum()
    }

    /// Layer by layer: output shape, parameters, multiply-accumulates, for one
    /// picture of `height` × `width` pixels.
    pub fn summary(&self, height: usize, width: usize) -> Summary {
        summarise(self, height, width)
    }

    /// A copy with parameters of the given float type, for checks in f64. It shares no variable with this one.
    ///
    /// # Errors
    /// A type that Candle cannot convert to.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let conv = |c: &Conv| -> Result<Conv> {
            Ok(Conv {
                weight: convert(&c.weight, dtype)?,
                bias: convert(&c.bias, dtype)?,
                ..c.clone()
            })
        };
        let stage = |stage: &Stage| -> Result<Stage> {
            Ok(match stage {
                Stage::MaxPool { .. } => stage.clone(),
                Stage::Block(block) => Stage::Block(Box::new(block.try_map(conv)?)),
            })
        };
        Ok(Self {
            stem: conv(&self.stem)?,
            body: self.body.iter().map(stage).collect::<Result<_>>()?,
            fc: Linear {
                weight: convert(&self.fc.weight, dtype)?,
                bias: convert(&self.fc.bias, dtype)?,
                ..self.fc.clone()
            },
            dropout: self.dropout,
            graph: GraphCache::default(),
        })
    }
}
