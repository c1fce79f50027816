//! What both passes through a graph share: its parameters, and the two ways to compute a convolution.
//!
//! A convolution reads its input where it lies, halo included: its register
//! tiles ([`crate::simd`]) take a pointer per pixel. Forward and input gradient
//! are gather tiles, the weight gradient outer tiles, as in [`crate::conv2d`].

use super::builder::{Convolution, MaxPool};
use super::gather::{self, GatherPass};
use super::outer;
use super::plan::Network;
use super::winograd::{self, WinogradPass};
use crate::batch_norm::Moments;
use crate::element::Element;
use crate::maps::{ALIGNMENT, MapLayout, Part};
use crate::max_pool2d::channels_last::Pool;

/// What the backward pass needs of the forward pass.
pub(super) struct Maps<T> {
    /// The buffers of the nodes that have one.
    pub(super) nodes: Vec<Option<Vec<T>>>,
    /// What the batch norm of each convolution normalises, and its statistics.
    pub(super) normalised: Vec<Option<Normalised<T>>>,
}

pub(super) struct Normalised<T> {
    pub(super) x: Vec<T>,
    pub(super) moments: Vec<Moments>,
}

/// Which parameters of a convolution need their gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Trains {
    /// At least one of the convolution's parameters.
    pub(super) any: bool,
    /// The weight, whose gradient is the work; those of the others are sums that the backward pass takes anyway.
    pub(super) weight: bool,
}

/// The parameters of one convolution.
pub(super) struct ParameterValues<'a, T> {
    pub(super) weight: &'a [T],
    pub(super) after: After<'a, T>,
}

/// What stands between a convolution and its ReLU.
pub(super) enum After<'a, T> {
    Bias(&'a [T]),
    /// A batch norm by the batch's own statistics.
    BatchNorm {
        weight: &'a [T],
        bias: &'a [T],
        eps: f64,
    },
    /// Running statistics: the weight times `scale`, and `shift` as the bias.
    Affine {
        scale: Vec<T>,
        shift: Vec<T>,
    },
}

impl<'a, T: Element> ParameterValues<'a, T> {
    /// The values of a convolution from the slices of [`super::ConvParameters`], in its order.
    pub(super) fn new(c: &Convolution, slices: &[&'a [T]]) -> Self {
        let after = match (slices, c.eps) {
            (&[_, weight, bias], Some(eps)) => After::BatchNorm { weight, bias, eps },
            (&[_, weight, bias, mean, variance], Some(eps)) => {
                let values = weight.iter().zip(bias).zip(mean.iter().zip(variance));
                let (scale, shift) = values
                    .map(|((weight, bias), (mean, variance))| {
                        let scale = weight.as_f64() / (variance.as_f64() + eps).sqrt();
                        let shift = bias.as_f64() - mean.as_f64() * scale;
                        (T::real(scale), T::real(shift))
                    })
                    .unzip();
                After::Affine { scale, shift }
            }
            _ => After::Bias(slices[1]),
        };
        let weight = slices[0];
        Self { weight, after }
    }

    /// How many parameters there are beside the weight.
    pub(super) fn per_channel(&self) -> usize {
        match self.after {
            After::BatchNorm { .. } => 2,
            After::Bias(_) | After::Affine { .. } => 1,
        }
    }

    /// Zeros, to which a backward pass adds.
    pub(super) fn gradients(&self, c: &Convolution, trains: Trains) -> ParameterGradients<T> {
        let zeros = |len: usize| vec![T::ZERO; len];
        ParameterGradients {
            weight: trains.weight.then(|| zeros(self.weight.len())),
            after: match self.after {
                After::BatchNorm { .. } => AfterGradients::BatchNorm {
                    weight: zeros(c.c_out),
                    bias: zeros(c.c_out),
                },
                After::Bias(_) | After::Affine { .. } => AfterGradients::Bias(zeros(c.c_out)),
            },
        }
    }
}

/// The gradients of one convolution's parameters.
pub(super) struct ParameterGradients<T> {
    /// The gradient of the weight, unless it is frozen.
    pub(super) weight: Option<Vec<T>>,
    pub(super) after: AfterGradients<T>,
}

/// The gradients of what stands between a convolution and its ReLU.
pub(super) enum AfterGradients<T> {
    Bias(Vec<T>),
    BatchNorm { weight: Vec<T>, bias: Vec<T> },
}

impl<T> ParameterGradients<T> {
    /// The gradients, in the order of the parameters.
    pub(super) fn into_list(self) -> Vec<Option<Vec<T>>> {
        match self.after {
            AfterGradients::Bias(bias) => vec![self.weight, Some(bias)],
            AfterGradients::BatchNorm { weight, bias } => {
                vec![self.weight, Some(weight), Some(bias)]
            }
        }
    }
}

/// Runs a whole pass on a thread of the pool. From any other thread, each of its hundred parallel
/// loops would wake the pool and sleep until it is done.
pub(super) fn in_pool<R: Send>(pass: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| pass())
}

/// Whether Winograd's products pay for outputs of `size`.
pub(super) fn pays<T>(c: &Convolution, size: (usize, usize), batch: usize) -> bool {
    winograd::pays::<T>(c.kernel, size, batch, c.eps.is_some())
}

/// What the sums of a convolution start from: a multiple of 16 values.
pub(super) fn start_values<T: Element>(c: &Convolution, values: &ParameterValues<'_, T>) -> Vec<T> {
    let mut start = vec![T::ZERO; c.c_out.next_multiple_of(ALIGNMENT)];
    match &values.after {
        After::Bias(bias) => start[..c.c_out].copy_from_slice(bias),
        After::Affine { shift, .. } => start[..c.c_out].copy_from_slice(shift),
        After::BatchNorm { .. } => (),
    }
    start
}

/// One pass over a convolution: the direct sum, or Winograd's products.
pub(super) enum AnyPass<'a, T: 'static> {
    Direct(GatherPass<'a, T>),
    Winograd(WinogradPass<'a, T>),
}

impl<T: Element> AnyPass<'_, T> {
    pub(super) fn output(&self) -> MapLayout {
        match self {
            Self::Direct(pass) => pass.y,
            Self::Winograd(pass) => pass.y,
        }
    }

    /// The lines of a part are a multiple of this.
    pub(super) fn lines(&self) -> usize {
        match self {
            Self::Direct(_) => 1,
            Self::Winograd(_) => winograd::TILE,
        }
    }

    pub(super) fn run(&self, x: &[T], y: (&mut [T], &Part), scratch: &mut Scratch<T>) {
        match self {
            Self::Direct(pass) => pass.run(x, y, &mut scratch.gather),
            Self::Winograd(pass) => pass.run(x, y, &mut scratch.winograd),
        }
    }
}

/// What a task works with.
pub(super) struct Scratch<T> {
    pub(super) gather: gather::Rows<T>,
    pub(super) outer: outer::Rows<T>,
    pub(super) winograd: winograd::Scratch<T>,
    pub(super) pooled: Pooled<T>,
}

/// What lies between a pooling and the convolution that it is part of, of some images: nothing
/// outside of the task sees it.
pub(super) struct Pooled<T> {
    pub(super) y: Vec<T>,
    pub(super) dy: Vec<T>,
    pub(super) winners: Vec<u8>,
}

impl<T: Element> Pooled<T> {
    /// Makes room for the output of some images.
    pub(super) fn output(&mut self, pool: &Pool, images: usize) -> &mut [T] {
        grown(&mut self.y, images * pool.y.image(), T::ZERO)
    }

    /// Makes room for the output of some images, its gradient and the winners.
    pub(super) fn all(&mut self, pool: &Pool, images: usize) -> (&mut [T], &mut [T], &mut [u8]) {
        (
            grown(&mut self.y, images * pool.y.image(), T::ZERO),
            grown(&mut self.dy, images * pool.dy.image(), T::ZERO),
            grown(&mut self.winners, images * pool.winners(), 0),
        )
    }
}

/// The first `len` of `values`, which are arbitrary.
fn grown<V: Copy>(values: &mut Vec<V>, len: usize, fill: V) -> &mut [V] {
    if values.len() < len {
        values.resize(len, fill);
    }
    &mut values[..len]
}

impl<T> Default for Pooled<T> {
    fn default() -> Self {
        Self {
            y: Vec::new(),
            dy: Vec::new(),
            winners: Vec::new(),
        }
    }
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self {
            gather: gather::Rows::default(),
            outer: outer::Rows::default(),
            winograd: winograd::Scratch::default(),
            pooled: Pooled::default(),
        }
    }
}

pub(super) fn give_back<T: Element>(graph: &Network, buffer: usize, map: Option<Vec<T>>) {
    if let Some(map) = map {
        graph.arenas.of().give_back(graph.layout(buffer), map);
    }
}

pub(super) fn give_back_gradient<T: Element>(
    graph: &Network,
    buffer: usize,
    gradient: Option<Vec<T>>,
) {
    if let Some(gradient) = gradient {
        graph
            .arenas
            .of()
            .give_back(graph.gradient_layout(buffer), gradient);
    }
}

pub(super) fn max_pool_of(graph: &Network, p: &MaxPool) -> Pool {
    Pool {
        h: p.h,
        w: p.w,
        x: graph.layout(p.input),
        dx: graph.gradient_layout(p.input),
        y: graph.layout(p.output),
        dy: graph.gradient_layout(p.output),
    }
}
