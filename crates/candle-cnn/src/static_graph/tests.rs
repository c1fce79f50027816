use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use candle_core::{Device, Result, Shape, Tensor, Var};
use rayon::prelude::*;
use test_support::{assert_close, check_gradients, relative_error, seeded_values};

use super::backward::Backward;
use super::forward::{Forward, Keep};
use super::pass::{ParameterValues, Trains};
use super::*;
use crate::activation::Activation;
use crate::element::Element;
use crate::maps::{MapLayout, Part};
use crate::simd::Accumulate;
use crate::{
    Conv2dConfig, Conv2dGeometry, MaxPool2dConfig, RunningStatistics, batch_norm_relu_eval,
    batch_norm_relu_train, conv2d, conv2d_backward_reference, conv2d_reference, conv2d_relu,
    global_avg_pool2d, max_pool2d,
};

/// A graph with everything in it: two Inception blocks with a pool between,
/// kernels 1, 2, 3 and 5, unpadded and padded, widths that fill no vector.
pub(super) struct Example {
    pub(super) graph: StaticGraph,
    stem: Stem,
    pub(super) images: Tensor,
    /// Of each convolution: weight and bias, or weight, norm weight and norm bias.
    pub(super) parameters: Vec<Vec<Var>>,
}

/// The first convolution, and what all of them have behind them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Stem {
    /// 2×2, unpadded; biases.
    Bias,
    /// The same; batch norms.
    Norm,
    /// 4×4 with stride 2 and padding 1; batch norms.
    StridedNorm,
}

impl Stem {
    /// Kernel, stride, padding.
    fn geometry(self) -> (usize, usize, usize) {
        match self {
            Self::Bias | Self::Norm => (2, 1, 0),
            Self::StridedNorm => (4, 2, 1),
        }
    }
}

pub(super) const EPS: f64 = 1e-3;

pub(super) fn tensor<T: Element>(name: &str, shape: &[usize], scale: f64) -> Tensor {
    let values = seeded_values(name, shape.iter().product(), scale);
    let values: Vec<T> = values.into_iter().map(|v| T::real(f64::from(v))).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

const BLOCK_POOL: fn() -> MaxPool2dConfig = || MaxPool2dConfig::square(3, 1, 1);

pub(super) fn example<T: Element>(
    stem: Stem,
    batch: usize,
    size: (usize, usize),
    ceil_mode: bool,
) -> Example {
    example_of_widths::<T>(ODD, stem, batch, size, ceil_mode)
}

/// Output channels of the stem, and of a block's 1×1, 3×3 with its reduction, 5×5 likewise and pooling's projection.
pub(super) type Widths = [usize; 7];
pub(super) const ODD: Widths = [20, 16, 9, 32, 24, 64, 7];
/// All of them packs that a GPU's threads load at once.
#[cfg(feature = "cuda")]
pub(super) const WHOLE: Widths = [24, 16, 8, 32, 24, 64, 8];

/// The example with other widths.
pub(super) fn example_of_widths<T: Element>(
    [
        of_stem,
        of_one,
        to_three,
        of_three,
        to_five,
        of_five,
        of_four,
    ]: Widths,
    stem: Stem,
    batch: usize,
    size: (usize, usize),
    ceil_mode: bool,
) -> Example {
    let mut shapes = Vec::new();
    let mut builder = StaticGraphBuilder::new(3, size);
    let mut conv = |b: &mut StaticGraphBuilder, x: Node, c_in, c_out, kernel, padding| {
        shapes.push([c_out, c_in, kernel, kernel]);
        let stride = if x == b.input() { stem.geometry().1 } else { 1 };
        match stem {
            Stem::Bias => b.conv2d_relu(x, c_out, kernel, padding),
            _ => b.conv2d_batch_norm_relu(x, c_out, kernel, (stride, padding), EPS),
        }
        .unwrap()
    };
    let (kernel, _, padding) = stem.geometry();
    let images = builder.input();
    let mut x = conv(&mut builder, images, 3, of_stem, kernel, padding);
    let mut channels = of_stem;
    for block in 0..2 {
        let b = &mut builder;
        let one = conv(b, x, channels, of_one, 1, 0);
        let reduced = conv(b, x, channels, to_three, 1, 0);
        let three = conv(b, reduced, to_three, of_three, 3, 1);
        let reduced = conv(b, x, channels, to_five, 1, 0);
        let five = conv(b, reduced, to_five, of_five, 5, 2);
        let pooled = b.max_pool2d(x, BLOCK_POOL()).unwrap();
        let four = conv(b, pooled, channels, of_four, 1, 0);
        x = b.concat(&[one, three, five, four]).unwrap();
        channels = of_one + of_three + of_five + of_four;
        if block == 0 {
            x = b.max_pool2d(x, halving(ceil_mode)).unwrap();
        }
    }
    let graph = builder.global_avg_pool2d(x).unwrap();
    let variable = |name: String, shape: &[usize]| {
        let fan_in: usize = shape[1..].iter().product::<usize>().max(1);
        let scale = (6.0 / fan_in as f64).sqrt() * 2.0;
        Var::from_tensor(&tensor::<T>(&name, shape, scale)).unwrap()
    };
    let parameters = shapes.iter().enumerate().map(|(i, shape)| {
        let mut parameters = vec![variable(format!("w{i}"), shape)];
        if stem != Stem::Bias {
            // Around 1, so that none is switched off.
            let around_0 = tensor::<T>(&format!("n{i}"), &shape[..1], 1.0);
            parameters.push(Var::from_tensor(&(around_0 + 1.0).unwrap()).unwrap());
        }
        parameters.push(variable(format!("b{i}"), &shape[..1]));
        parameters
    });
    Example {
        graph,
        stem,
        images: tensor::<T>("images", &[batch, 3, size.0, size.1], 2.0),
        parameters: parameters.collect(),
    }
}

fn halving(ceil_mode: bool) -> MaxPool2dConfig {
    MaxPool2dConfig {
        ceil_mode,
        ..MaxPool2dConfig::square(3, 2, 1)
    }
}

/// The same network from ordinary operations.
pub(super) fn composed(
    stem: Stem,
    images: &Tensor,
    parameters: &[ConvParameters<'_>],
    ceil_mode: bool,
) -> Result<Tensor> {
    let mut parameters = parameters.iter();
    let (_, mut stride, padding) = stem.geometry();
    let mut conv = |x: &Tensor, padding| {
        let config = Conv2dConfig::padded(padding).strided(stride);
        stride = 1;
        match *parameters.next().unwrap() {
            ConvParameters::Bias { weight, bias } => conv2d_relu(x, weight, Some(bias), config),
            ConvParameters::BatchNorm {
                weight,
                norm_weight,
                norm_bias,
            } => {
                let x = conv2d(x, weight, None, config)?;
                Ok(batch_norm_relu_train(&x, norm_weight, norm_bias, EPS)?.0)
            }
            ConvParameters::Running {
                weight,
                norm_weight,
                norm_bias,
                mean,
                variance,
            } => {
                let x = conv2d(x, weight, None, config)?;
                let running = RunningStatistics { mean, variance };
                batch_norm_relu_eval(&x, norm_weight, norm_bias, running, EPS)
            }
        }
    };
    let mut x = conv(images, padding)?;
    for block in 0..2 {
        let one = conv(&x, 0)?;
        let three = conv(&x, 0)?;
        let three = conv(&three, 1)?;
        let five = conv(&x, 0)?;
        let five = conv(&five, 2)?;
        let four = conv(&max_pool2d(&x, BLOCK_POOL())?, 0)?;
        x = Tensor::cat(&[one, three, five, four], 1)?;
        if block == 0 {
            x = max_pool2d(&x, halving(ceil_mode))?;
        }
    }
    global_avg_pool2d(&x)
}

pub(super) fn parameters(of: &[Vec<Var>]) -> Vec<ConvParameters<'_>> {
    of.iter()
        .map(|parameters| match parameters.as_slice() {
            [weight, bias] => ConvParameters::Bias { weight, bias },
            [weight, norm_weight, norm_bias] => ConvParameters::BatchNorm {
                weight,
                norm_weight,
                norm_bias,
            },
            _ => panic!("two or three parameters"),
        })
        .collect()
}

impl Example {
    pub(super) fn parameters(&self) -> Vec<ConvParameters<'_>> {
        parameters(&self.parameters)
    }

    pub(super) fn has_image_gradient(&self) -> bool {
        self.stem != Stem::StridedNorm
    }

    /// Features and all gradients for an upstream gradient, by ordinary operations.
    fn expected(&self, upstream: &Tensor, ceil_mode: bool) -> Result<(Tensor, Tensor, Tensor)> {
        let images = Var::from_tensor(&self.images)?;
        let features = composed(self.stem, &images, &self.parameters(), ceil_mode)?;
        let gradients = (&features * upstream)?.sum_all()?.backward()?;
        let mut flat = Vec::new();
        for parameter in self.parameters.iter().flatten() {
            flat.push(gradients.get(parameter).unwrap().flatten_all()?);
        }
        let d_images = gradients.get(&images).unwrap().clone();
        Ok((features.detach(), d_images, Tensor::cat(&flat, 0)?))
    }
}

fn values<T: Element>(tensor: &Tensor) -> Vec<T> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Of each convolution's parameters.
fn parameter_values<'a, T: Element>(
    network: &Network,
    owned: &'a [Vec<Vec<T>>],
) -> Vec<ParameterValues<'a, T>> {
    let convolutions = network.convolutions().into_iter().zip(owned);
    convolutions
        .map(|(c, p)| ParameterValues::new(&c, &p.iter().map(Vec::as_slice).collect::<Vec<_>>()))
        .collect()
}

/// What both passes yield.
struct Passes {
    /// (N, C).
    features: Tensor,
    /// Like the images, where it was asked for.
    d_images: Option<Tensor>,
    /// Of all parameters, one after the other.
    d_parameters: Tensor,
}

/// Both passes of one instruction set; `upstream` is the gradient of the features.
fn both_passes<T: Element>(
    graph: &StaticGraph,
    isa: Isa,
    parameters: &[Vec<Var>],
    (images, upstream): (&Tensor, &Tensor),
    needs_input: bool,
) -> Passes {
    let network = &graph.network;
    let owned: Vec<Vec<Vec<T>>> = parameters
        .iter()
        .map(|p| p.iter().map(|p| values::<T>(p)).collect())
        .collect();
    let parameters = parameter_values(network, &owned);
    let all = Trains {
        any: true,
        weight: true,
    };
    let trainable = vec![all; parameters.len()];
    let batch = images.dims()[0];
    let like = |values: Vec<T>, shape| Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    let forward =
        |keep| Forward::new(network, isa, batch).run(&values::<T>(images), &parameters, keep);
    let (unkept, kept) = (forward(Keep::Nothing), forward(Keep::ForBackward));
    let features = like(kept.features, upstream.shape());
    let unkept = like(unkept.features, upstream.shape());
    assert!(
        relative_error(&unkept, &features).unwrap() == 0.0,
        "keeping the maps changes nothing"
    );
    let backward = Backward::new(network, isa, batch, needs_input, &trainable);
    let (d_images, d_parameters) =
        backward.run(kept.maps.unwrap(), &parameters, &values::<T>(upstream));
    let d_parameters: Vec<T> = d_parameters.into_iter().flatten().flatten().collect();
    let count = Shape::from(d_parameters.len());
    Passes {
        features,
        d_images: d_images.map(|d_images| like(d_images, images.shape())),
        d_parameters: like(d_parameters, &count),
    }
}

/// Every instruction set of this machine against ordinary operations; twice,
/// so that the second pass finds used buffers.
fn check<T: Element>(
    stem: Stem,
    batch: usize,
    size: (usize, usize),
    ceil_mode: bool,
    tolerance: f64,
) {
    let example = example::<T>(stem, batch, size, ceil_mode);
    let upstream = tensor::<T>("upstream", &[batch, 16 + 32 + 64 + 7], 2.0);
    let (features, d_images, d_parameters) = example.expected(&upstream, ceil_mode).unwrap();
    let needs_input = example.has_image_gradient();
    for isa in Isa::available() {
        for _ in 0..2 {
            let actual = both_passes::<T>(
                &example.graph,
                isa,
                &example.parameters,
                (&example.images, &upstream),
                needs_input,
            );
            assert_eq!(actual.d_images.is_some(), needs_input);
            for (name, actual, expected) in [
                ("features", Some(&actual.features), &features),
                ("images", actual.d_images.as_ref(), &d_images),
                ("parameters", Some(&actual.d_parameters), &d_parameters),
            ] {
                let error = actual.map_or(0.0, |actual| relative_error(actual, expected).unwrap());
                assert!(
                    error <= tolerance,
                    "{isa:?} {stem:?} {batch} {size:?}: {name} {error:.1e}"
                );
            }
        }
    }
}

#[test]
fn both_passes_equal_those_of_ordinary_operations() {
    for (batch, size) in [(1, (7, 7)), (2, (9, 17)), (3, (33, 6)), (5, (17, 17))] {
        for ceil_mode in [false, true] {
            check::<f64>(Stem::Bias, batch, size, ceil_mode, 1e-12);
            check::<f32>(Stem::Bias, batch, size, ceil_mode, 2e-5);
        }
    }
}

#[test]
fn both_passes_equal_those_of_ordinary_operations_with_batch_norm() {
    for stem in [Stem::Norm, Stem::StridedNorm] {
        for (batch, size) in [(2, (9, 17)), (3, (33, 6)), (5, (17, 17))] {
            for ceil_mode in [false, true] {
                check::<f64>(stem, batch, size, ceil_mode, 1e-11);
                check::<f32>(stem, batch, size, ceil_mode, 1e-4);
            }
        }
    }
}

#[test]
fn both_passes_equal_those_of_ordinary_operations_where_winograd_pays() {
    // Of these images no sum is so near to zero, and no two of a pool so near to each other, that rounding decides
    // which gradient is passed on. As many threads on every machine, so that they are the same images.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build();
    pool.unwrap().install(|| {
        // After the unpadded 2×2 stem 32×16 pixels, 32 tiles an image, and a
        // quarter of them after the pool.
        for normalised in [false, true] {
            for size in [(32, 16), (16, 8)] {
                assert!(winograd::pays::<f32>(3, size, 16, normalised));
            }
        }
        check::<f32>(Stem::Bias, 16, (33, 17), false, 2e-5);
        check::<f32>(Stem::Norm, 16, (33, 17), false, 1e-4);
    });
}

/// Statistics as after some training: means around 0, variances around 1. They are variables, which must make no difference.
pub(super) fn running<T: Element>(example: &Example) -> Vec<[Tensor; 2]> {
    let statistics = example.parameters.iter().enumerate().map(|(i, p)| {
        let shape = [p[0].dims()[0]];
        let variance = tensor::<T>(&format!("variance{i}"), &shape, 1.0);
        let mean = tensor::<T>(&format!("mean{i}"), &shape, 0.5);
        [mean, (variance + 1.0).unwrap()].map(|t| Var::from_tensor(&t).unwrap().into_inner())
    });
    statistics.collect()
}

/// Weight, norm weight and norm bias of each convolution with its running statistics.
fn with_running<'a>(
    tensors: &'a [Vec<Tensor>],
    running: &'a [[Tensor; 2]],
) -> Vec<ConvParameters<'a>> {
    let pairs = tensors.iter().zip(running);
    pairs
        .map(|(p, [mean, variance])| ConvParameters::Running {
            weight: &p[0],
            norm_weight: &p[1],
            norm_bias: &p[2],
            mean,
            variance,
        })
        .collect()
}

#[test]
fn running_statistics_give_what_ordinary_operations_give_where_winograd_pays() -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build();
    pool.unwrap().install(|| {
        // After the unpadded 2×2 stem 32×16 pixels, and half as high and wide after the pool.
        let batch = 16;
        for size in [(32, 16), (16, 8)] {
            assert!(winograd::pays::<f32>(3, size, batch, true));
        }
        let example = example::<f32>(Stem::Norm, batch, (33, 17), false);
        let running = running::<f32>(&example);
        let detached = example.parameters.iter().map(|p| {
            let tensors = p.iter().map(|var| var.as_detached_tensor());
            tensors.collect::<Vec<_>>()
        });
        let detached: Vec<Vec<Tensor>> = detached.collect();
        let expected = with_running(&detached, &running);
        let expected = composed(Stem::Norm, &example.images, &expected, false)?;
        let owned = detached.iter().zip(&running).map(|(p, statistics)| {
            let tensors = p.iter().chain(statistics);
            tensors.map(values::<f32>).collect::<Vec<_>>()
        });
        let owned: Vec<Vec<Vec<f32>>> = owned.collect();
        let network = &example.graph.network;
        let parameters = parameter_values(network, &owned);
        let images = values::<f32>(&example.images);
        for isa in Isa::available() {
            let actual = Forward::new(network, isa, batch).run(&images, &parameters, Keep::Nothing);
            let actual = Tensor::from_vec(actual.features, expected.shape(), &Device::Cpu)?;
            assert_close(&format!("{isa:?}"), &actual, &expected, 2e-5);
        }
        Ok(())
    })
}

#[test]
fn running_statistics_give_what_ordinary_operations_give_tracked_or_not() -> Result<()> {
    for stem in [Stem::Norm, Stem::StridedNorm] {
        let example = example::<f64>(stem, 3, (17, 18), true);
        let running = running::<f64>(&example);
        let of = |tracked: bool| {
            let detach = |var: &Var| match tracked {
                true => var.as_tensor().clone(),
                false => var.as_detached_tensor(),
            };
            let all = example.parameters.iter();
            all.map(|p| p.iter().map(detach).collect::<Vec<_>>())
                .collect::<Vec<_>>()
        };
        let (tracked, untracked) = (of(true), of(false));
        let tracked = with_running(&tracked, &running);
        let untracked = with_running(&untracked, &running);
        assert!(tracked.iter().all(ConvParameters::need_gradient));
        assert!(!untracked.iter().any(ConvParameters::need_gradient));
        let expected = composed(stem, &example.images, &tracked, true)?;
        let tracked_output = example.graph.forward(&example.images, &tracked)?;
        let untracked_output = example.graph.forward(&example.images, &untracked)?;
        for output in [&tracked_output, &untracked_output] {
            assert!(output.statistics.is_empty());
            let error = relative_error(&output.features.detach(), &expected.detach())?;
            assert!(error <= 1e-12, "{error:.1e}");
        }
        assert!(!untracked_output.features.track_op());
        let expected = expected.sqr()?.sum_all()?.backward()?;
        let actual = tracked_output.features.sqr()?.sum_all()?.backward()?;
        for (i, var) in example.parameters.iter().flatten().enumerate() {
            let (actual, expected) = (actual.get(var).unwrap(), expected.get(var).unwrap());
            let error = relative_error(actual, expected)?;
            assert!(error <= 1e-11, "{stem:?} parameter {i}: {error:.1e}");
        }
        assert!(running.iter().flatten().all(|t| actual.get(t).is_none()));
    }
    Ok(())
}

#[test]
fn statistics_are_those_of_ordinary_operations_whatever_the_mean() -> Result<()> {
    let mut builder = StaticGraphBuilder::new(3, (9, 10));
    let x = builder.conv2d_batch_norm_relu(builder.input(), 5, 1, (1, 0), EPS)?;
    let graph = builder.global_avg_pool2d(x)?;
    // A spread of 1 around a million: what a difference of squares would lose.
    let images = (tensor::<f64>("images", &[4, 3, 9, 10], 2.0) + 1e6)?;
    let weight = tensor::<f64>("w", &[5, 3, 1, 1], 1.0);
    let [norm_weight, norm_bias] = ["n", "b"].map(|name| tensor::<f64>(name, &[5], 1.0));
    let output = graph.forward(
        &images,
        &[ConvParameters::BatchNorm {
            weight: &weight,
            norm_weight: &norm_weight,
            norm_bias: &norm_bias,
        }],
    )?;
    let x = conv2d(&images, &weight, None, Conv2dConfig::padded(0))?;
    let (_, expected) = batch_norm_relu_train(&x, &norm_weight, &norm_bias, EPS)?;
    let [actual] = output.statistics.as_slice() else {
        panic!("one batch norm")
    };
    for (actual, expected) in [
        (&actual.mean, &expected.mean),
        (&actual.unbiased_variance, &expected.unbiased_variance),
    ] {
        let error = relative_error(actual, expected)?;
        assert!(error <= 1e-8, "{error:.1e}");
    }
    Ok(())
}

/// `[image][channel][pixel]` to a layout whose images begin at channel `first`.
fn lay_out(
    layout: MapLayout,
    planes: &[f32],
    (images, channels, first): (usize, usize, usize),
) -> Vec<f32> {
    let mut to = vec![0.0; images * layout.image()];
    for (at, &value) in planes.iter().enumerate() {
        let (height, width) = layout.size;
        let (plane, pixel) = (at / (height * width), at % (height * width));
        let (image, channel) = (plane / channels, plane % channels);
        let pixel = layout.at(pixel / width, pixel % width);
        to[image * layout.image() + pixel + first + channel] = value;
    }
    to
}

#[test]
fn winograds_rounding_is_below_3e_5_in_relative_l2_norm() -> Result<()> {
    let (batch, c_in, c_out, size) = (2, 160, 80, (16, 24));
    let numbers = |name: &str, count: usize| seeded_values(name, count, 2.0);
    let pixels = size.0 * size.1;
    let x = numbers("x", batch * c_in * pixels);
    let weight = numbers("weight", c_out * c_in * 9);
    let dy = numbers("dy", batch * c_out * pixels);
    let shape = |dims: [usize; 4]| Tensor::zeros(&dims, DType::F32, &Device::Cpu);
    let geometry = Conv2dGeometry::new(
        &shape([batch, c_in, size.0, size.1])?,
        &shape([c_out, c_in, 3, 3])?,
        Conv2dConfig::padded(1),
    )?;
    let widen = |v: &[f32]| -> Vec<f64> { v.iter().map(|&v| f64::from(v)).collect() };
    let expected_y = conv2d_reference(&geometry, &widen(&x), &widen(&weight), None);
    let (_, expected_weight, _) =
        conv2d_backward_reference(&geometry, &widen(&x), &widen(&weight), &widen(&dy));
    let layout = |halo, pixel| MapLayout { size, halo, pixel };
    // The output and its gradient lie in a wider map, from channel 32 on.
    let (x_layout, y_layout) = (layout(2, c_in), layout(1, c_out + 48));
    let x = lay_out(x_layout, &x, (batch, c_in, 0));
    let dy = lay_out(y_layout, &dy, (batch, c_out, 32));
    for isa in Isa::available() {
        let kernels = <f32 as crate::simd::KernelTable>::kernels(isa);
        let packed =
            crate::conv2d::PackedWeight::new(&weight, (9, c_out, c_in), kernels, Vec::new());
        let mut scratch = winograd::Scratch::default();
        let mut y = vec![0f32; batch * y_layout.image()];
        winograd::WinogradPass {
            kernels,
            isa,
            x: x_layout,
            x_channel: 0,
            channels: c_in,
            padding: 1,
            weight: &winograd::transform_weight(isa, &packed, Vec::new()),
            start: gather::Start::Values(&vec![0.0; c_out]),
            activation: Activation::Identity,
            y: y_layout,
            y_channel: 32,
        }
        .run(
            &x,
            (&mut y, &Part::whole(y_layout, batch * y_layout.image())),
            &mut scratch,
        );
        let expected: Vec<f32> = expected_y.iter().map(|&v| v as f32).collect();
        let expected = lay_out(y_layout, &expected, (batch, c_out, 32));
        let forward = l2_error(&y, &widen(&expected));

        let pass = winograd::WinogradOuterPass {
            kernels,
            isa,
            x: x_layout,
            c_in,
            padding: 1,
            dy: y_layout,
            dy_channel: 32,
            c_out,
        };
        let mut sums = vec![f32::NAN; pass.sums_len()];
        pass.run(&x, &dy, (&mut sums, Accumulate::Begin), &mut scratch);
        let mut d_weight = vec![0f32; weight.len()];
        pass.unpack(&[&sums], &mut d_weight);
        let backward = l2_error(&d_weight, &expected_weight);
        println!("{isa:?}: relative L2 error {forward:.1e}, weight gradient {backward:.1e}");
        assert!(
            forward <= 3e-5 && backward <= 3e-5,
            "{isa:?} {forward:.1e} {backward:.1e}"
        );
    }
    Ok(())
}

fn l2_error(actual: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let pairs = actual.iter().map(|&a| f64::from(a)).zip(expected);
    let (difference, norm) = pairs.fold((0.0, 0.0), |(difference, norm), (a, e)| {
        (difference + (a - e) * (a - e), norm + e * e)
    });
    (difference / norm).sqrt()
}

#[test]
fn gradients_agree_with_finite_differences() -> Result<()> {
    for stem in [Stem::Bias, Stem::Norm] {
        let example = example::<f64>(stem, 2, (7, 8), false);
        // A weight, another one's bias, and a batch norm's weight where there is one.
        let chosen = [(2, 0), (5, example.parameters[5].len() - 1), (3, 1)];
        let mut inputs = vec![&example.images];
        inputs.extend(chosen.map(|(i, j)| example.parameters[i][j].as_tensor()));
        let error = check_gradients(&inputs, 1e-6, |inputs| {
            let all = example.parameters.iter();
            let mut tensors: Vec<Vec<Tensor>> = all
                .map(|p| p.iter().map(|var| var.as_tensor().clone()).collect())
                .collect();
            for ((i, j), input) in chosen.into_iter().zip(&inputs[1..]) {
                tensors[i][j] = input.clone();
            }
            let parameters: Vec<_> = tensors.iter().map(|p| from_tensors(p)).collect();
            Ok(example.graph.forward(&inputs[0], &parameters)?.features)
        })?;
        assert!(error <= 1e-6, "{stem:?} {error:.1e}");
    }
    Ok(())
}

#[test]
fn a_gradient_below_2_to_the_minus_100_is_zero_in_f32_and_kept_in_f64() -> Result<()> {
    fn weight_gradient<T: Element>(scale: f64) -> Result<f64> {
        let example = example::<T>(Stem::Bias, 2, (9, 9), false);
        let features = example
            .graph
            .forward(&example.images, &example.parameters())?;
        // In two steps: 1e-40 itself is no normal number of f32.
        let scaled = ((features.features.sum_all()? * (scale * 1e20))? * 1e-20)?;
        let gradients = scaled.backward()?;
        let gradient = gradients.get(&example.parameters[2][0]).unwrap();
        Ok(values::<T>(&gradient.abs()?.max_all()?)[0].as_f64())
    }
    let (kept, negligible) = (
        weight_gradient::<f32>(1e-25)?,
        weight_gradient::<f32>(1e-36)?,
    );
    assert!(kept > 1e-28 && negligible == 0.0, "{kept:e} {negligible:e}");
    let exact = weight_gradient::<f64>(1e-25)?;
    assert!((kept / exact - 1.0).abs() < 1e-4, "{kept:e} {exact:e}");
    assert!(weight_gradient::<f64>(1e-36)? > 0.0);
    Ok(())
}

#[test]
fn operations_with_the_same_input_form_a_group() -> Result<()> {
    let mut builder = StaticGraphBuilder::new(3, (8, 8));
    let stem = builder.conv2d_relu(builder.input(), 16, 3, 1)?;
    let one = builder.conv2d_relu(stem, 16, 1, 0)?;
    let reduced = builder.conv2d_relu(stem, 16, 1, 0)?;
    let two = builder.conv2d_relu(reduced, 16, 3, 1)?;
    let pooled = builder.max_pool2d(stem, MaxPool2dConfig::square(3, 1, 1))?;
    let three = builder.conv2d_relu(pooled, 16, 1, 0)?;
    let four = builder.conv2d_relu(stem, 16, 3, 1)?;
    let whole = builder.concat(&[one, two, three, four])?;
    let graph = builder.global_avg_pool2d(whole)?;
    // The pooling, 4, is part of 5.
    let expected: [&[usize]; 3] = [&[0], &[1, 2, 5, 6], &[3]];
    assert_eq!(graph.network.groups, expected);
    Ok(())
}

#[test]
fn operations_that_wait_for_the_same_earlier_ones_form_a_level() -> Result<()> {
    let mut builder = StaticGraphBuilder::new(3, (8, 8));
    let stem = builder.conv2d_relu(builder.input(), 16, 3, 1)?;
    let one = builder.conv2d_relu(stem, 16, 1, 0)?;
    let reduced = builder.conv2d_relu(stem, 16, 1, 0)?;
    let two = builder.conv2d_relu(reduced, 16, 3, 1)?;
    let pooled = builder.max_pool2d(stem, MaxPool2dConfig::square(3, 1, 1))?;
    let three = builder.conv2d_relu(pooled, 16, 1, 0)?;
    let whole = builder.concat(&[one, two, three])?;
    let last = builder.conv2d_relu(whole, 16, 1, 0)?;
    let graph = builder.global_avg_pool2d(last)?;
    // The last one reads what 3 and 5 write, and what 1 has written before.
    let expected: [&[usize]; 4] = [&[0], &[1, 2, 4], &[3, 5], &[6]];
    assert_eq!(graph.network.levels, expected);
    Ok(())
}

#[test]
fn a_pooling_is_part_of_the_unpadded_convolution_that_alone_reads_it() -> Result<()> {
    /// For each operation after a stem and a pool with `taps` × `taps`: which pooling is part of it.
    fn pooled(
        taps: usize,
        readers: impl Fn(&mut StaticGraphBuilder, Node) -> Result<Node>,
    ) -> Result<Vec<Option<usize>>> {
        let mut builder = StaticGraphBuilder::new(3, (20, 20));
        let stem = builder.conv2d_relu(builder.input(), 16, 1, 0)?;
        let pool = builder.max_pool2d(stem, MaxPool2dConfig::square(taps, 1, 0))?;
        let last = readers(&mut builder, pool)?;
        Ok(builder.global_avg_pool2d(last)?.network.pooled[2..].to_vec())
    }
    for (taps, expected) in [(2, Some(1)), (16, Some(1)), (17, None)] {
        let one = pooled(taps, |builder, pool| builder.conv2d_relu(pool, 4, 3, 0))?;
        assert_eq!(one, [expected], "{taps}");
    }
    let padded = pooled(2, |builder, pool| builder.conv2d_relu(pool, 4, 3, 1))?;
    assert_eq!(padded, [None]);
    let two = pooled(2, |builder, pool| {
        let parts = [
            builder.conv2d_relu(pool, 16, 1, 0)?,
            builder.conv2d_relu(pool, 4, 1, 0)?,
        ];
        builder.concat(&parts)
    })?;
    assert_eq!(two, [None, None]);
    let again = pooled(2, |builder, pool| {
        builder.max_pool2d(pool, MaxPool2dConfig::square(2, 1, 0))
    })?;
    assert_eq!(again, [None]);
    Ok(())
}

#[test]
fn a_pooling_with_most_taps_sends_gradients_to_the_same_winners_as_part_of_a_convolution()
-> Result<()> {
    // 15 and 16: within a convolution. 17: too many taps. A ramp has its greatest value in the last
    // tap, turned around in the first.
    for (kernel, slope) in [(15, 1.0), (16, 1.0), (16, -1.0), (17, 1.0)] {
        let config = MaxPool2dConfig::square(kernel, 2, kernel / 2);
        let mut builder = StaticGraphBuilder::new(1, (21, 19));
        let pool = builder.max_pool2d(builder.input(), config)?;
        let last = builder.conv2d_relu(pool, 5, 1, 0)?;
        let graph = builder.global_avg_pool2d(last)?;
        let weight = Var::from_tensor(&tensor::<f64>("weight", &[5, 1, 1, 1], 1.0).abs()?)?;
        let bias = Var::from_tensor(&tensor::<f64>("bias", &[5], 1.0).abs()?)?;
        let ramp = (Tensor::arange(0f64, 2. * 21. * 19., &Device::Cpu)? * slope)?;
        let noise = tensor::<f64>("noise", &[2 * 21 * 19], 0.5);
        let images = Var::from_tensor(&((ramp + noise)? + 1000.)?.reshape((2, 1, 21, 19))?)?;
        let parameters = [ConvParameters::Bias {
            weight: &weight,
            bias: &bias,
        }];
        let actual = graph.forward(&images, &parameters)?.features;
        let pooled = max_pool2d(&images, config)?;
        let expected = conv2d_relu(&pooled, &weight, Some(&bias), Conv2dConfig::padded(0))?;
        let expected = global_avg_pool2d(&expected)?;
        assert!(relative_error(&actual, &expected)? < 1e-12);
        let (actual, expected) = (
            actual.sum_all()?.backward()?,
            expected.sum_all()?.backward()?,
        );
        for var in [&images, &weight, &bias] {
            let (actual, expected) = (actual.get(var).unwrap(), expected.get(var).unwrap());
            assert!(
                relative_error(actual, expected)? < 1e-12,
                "{kernel} {slope}"
            );
        }
    }
    Ok(())
}

/// A pooling of images in which values tie, read by one convolution of 1×1, which it is part of, or by two. All numbers
/// are whole and so many pixels a power of two that every sum is exact in any order.
fn check_winners<T: Element>(
    config: MaxPool2dConfig,
    readers: &[usize],
    nan_at: &[usize],
) -> Result<()> {
    let (channels, size) = (20, (8, 8));
    let whole = |name: &str, shape: &[usize]| tensor::<T>(name, shape, 6.0).round();
    let mut builder = StaticGraphBuilder::new(channels, size);
    let pool = builder.max_pool2d(builder.input(), config)?;
    let (mut convolutions, mut parameters) = (Vec::new(), Vec::new());
    for &c_out in readers {
        convolutions.push(builder.conv2d_relu(pool, c_out, 1, 0)?);
        let weight = whole(&format!("weight{c_out}"), &[c_out, channels, 1, 1])?;
        let bias = whole(&format!("bias{c_out}"), &[c_out])?;
        parameters.push(vec![Var::from_tensor(&weight)?, Var::from_tensor(&bias)?]);
    }
    let last = match convolutions.as_slice() {
        &[one] => one,
        several => builder.concat(several)?,
    };
    let graph = builder.global_avg_pool2d(last)?;
    assert_eq!(graph.network.pooled[1].is_some(), readers.len() == 1);
    // One image is cut into lines, three are shared out whole.
    for batch in [1, 3] {
        let shape = [batch, channels, size.0, size.1];
        let mut pixels = values::<T>(&whole("images", &shape)?);
        for &at in nan_at {
            pixels[at] = T::real(f64::NAN);
        }
        let images = Tensor::from_vec(pixels, &shape, &Device::Cpu)?;
        let images = Var::from_tensor(&images)?;
        let upstream = whole("upstream", &[batch, readers.iter().sum()])?;
        let pooled = max_pool2d(&images, config)?;
        let of_each = parameters.iter().map(|p| {
            let y = conv2d_relu(&pooled, &p[0], Some(&p[1]), Conv2dConfig::padded(0))?;
            global_avg_pool2d(&y)
        });
        let features = Tensor::cat(&of_each.collect::<Result<Vec<_>>>()?, 1)?;
        let gradients = (&features * &upstream)?.sum_all()?.backward()?;
        let d_images = gradients.get(&images).unwrap();
        for isa in Isa::available() {
            let what = format!("{isa:?} {config:?} {readers:?} {nan_at:?} {batch}");
            let actual = both_passes::<T>(&graph, isa, &parameters, (&images, &upstream), true);
            assert_close(&what, &actual.features, &features, 0.0);
            assert_close(&what, &actual.d_images.unwrap(), d_images, 0.0);
            let actual = values::<T>(&actual.features);
            let (of_first, of_others) = actual.split_at(actual.len() / batch);
            assert!(
                of_first.iter().all(|v| v.is_nan() != nan_at.is_empty()),
                "{what}"
            );
            assert!(!of_others.iter().any(|v| v.is_nan()), "{what}");
        }
    }
    Ok(())
}

#[test]
fn of_equal_maxima_the_first_wins_and_nan_over_all_within_a_convolution_or_before_two() -> Result<()>
{
    // As many threads on every machine.
    let threads = rayon::ThreadPoolBuilder::new().num_threads(2).build();
    threads.unwrap().install(|| {
        for config in [
            MaxPool2dConfig::square(3, 1, 1),
            MaxPool2dConfig::square(3, 2, 1),
            MaxPool2dConfig::square(2, 2, 0),
        ] {
            for readers in [&[21][..], &[16, 5]] {
                // None, and one in the fourth line of the first image's first plane.
                for nan_at in [&[][..], &[3 * 8 + 4]] {
                    check_winners::<f32>(config, readers, nan_at)?;
                    check_winners::<f64>(config, readers, nan_at)?;
                }
            }
        }
        Ok(())
    })
}

fn from_tensors(tensors: &[Tensor]) -> ConvParameters<'_> {
    match tensors {
        [weight, bias] => ConvParameters::Bias { weight, bias },
        [weight, norm_weight, norm_bias] => ConvParameters::BatchNorm {
            weight,
            norm_weight,
            norm_bias,
        },
        _ => panic!("two or three parameters"),
    }
}

#[test]
fn frozen_convolutions_get_no_gradient_and_the_others_the_same() -> Result<()> {
    for stem in [Stem::Bias, Stem::Norm, Stem::StridedNorm] {
        let example = example::<f64>(stem, 2, (9, 9), false);
        let forward = |parameters: &[ConvParameters<'_>]| {
            let features = example.graph.forward(&example.images, parameters)?.features;
            features.sqr()?.sum_all()?.backward()
        };
        let all = forward(&example.parameters())?;
        let tensors: Vec<Vec<Tensor>> = example
            .parameters
            .iter()
            .enumerate()
            .map(|(i, p)| {
                let tensors = p.iter().map(|var| match i {
                    0..=6 | 9 => var.as_detached_tensor(),
                    _ => var.as_tensor().clone(),
                });
                tensors.collect()
            })
            .collect();
        let some = forward(&tensors.iter().map(|p| from_tensors(p)).collect::<Vec<_>>())?;
        for (i, var) in example.parameters.iter().enumerate() {
            for var in var {
                match i {
                    0..=6 | 9 => assert!(some.get(var).is_none(), "{i}"),
                    _ => assert_eq!(
                        values::<f64>(some.get(var).unwrap()),
                        values::<f64>(all.get(var).unwrap()),
                        "{stem:?} {i}"
                    ),
                }
            }
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_an_error_that_names_both_shapes() {
    let plain = example::<f32>(Stem::Bias, 1, (9, 9), false);
    let parameters = plain.parameters();
    let wrong = tensor::<f32>("images", &[1, 3, 9, 10], 1.0);
    let message = |result: Result<GraphOutput>| result.unwrap_err().to_string();
    let found = message(plain.graph.forward(&wrong, &parameters));
    assert!(
        found.contains("[1, 3, 9, 10]") && found.contains("[3, 9, 9]"),
        "{found}"
    );
    let found = message(plain.graph.forward(&plain.images, &parameters[1..]));
    assert!(found.contains("[12]") && found.contains("[13]"), "{found}");
    let mut swapped = parameters.clone();
    swapped.swap(0, 1);
    let found = message(plain.graph.forward(&plain.images, &swapped));
    assert!(
        found.contains("[16, 20, 1, 1]") && found.contains("[20, 3, 2, 2]"),
        "{found}"
    );

    let strided = example::<f32>(Stem::StridedNorm, 1, (9, 9), false);
    let found = message(strided.graph.forward(&strided.images, &parameters));
    assert!(
        found.contains("a bias") && found.contains("batch norm"),
        "{found}"
    );
    let images = Var::from_tensor(&strided.images).unwrap();
    let found = message(strided.graph.forward(&images, &strided.parameters()));
    assert!(found.contains("stride"), "{found}");
    // 4×4 with stride 2 makes 2×2 of 4×4, the pool 1×1: a variance of nothing.
    let tiny = example::<f32>(Stem::StridedNorm, 1, (4, 4), false);
    let found = message(tiny.graph.forward(&tiny.images, &tiny.parameters()));
    assert!(found.contains("more than one"), "{found}");
    let mut builder = StaticGraphBuilder::new(3, (8, 8));
    let x = builder
        .conv2d_batch_norm_relu(builder.input(), 16, 3, (2, 1), EPS)
        .unwrap();
    assert!(
        builder
            .conv2d_batch_norm_relu(x, 16, 3, (2, 1), EPS)
            .is_err()
    );
    assert!(
        builder
            .conv2d_batch_norm_relu(x, 16, 3, (0, 1), EPS)
            .is_err()
    );
    assert!(
        builder
            .conv2d_batch_norm_relu(x, 16, 3, (1, 1), -1.0)
            .is_err()
    );
}

#[test]
fn only_what_can_be_written_in_place_is_joined() -> Result<()> {
    let mut builder = StaticGraphBuilder::new(3, (8, 8));
    let images = builder.input();
    let read = builder.conv2d_relu(images, 16, 3, 1)?;
    let narrow = builder.conv2d_relu(read, 8, 1, 0)?;
    let wide = builder.conv2d_relu(read, 16, 1, 0)?;
    let small = builder.conv2d_relu(read, 16, 3, 0)?;
    let pooled = builder.max_pool2d(read, MaxPool2dConfig::square(1, 1, 0))?;
    let taken = builder.conv2d_relu(read, 16, 1, 0)?;
    let whole = builder.concat(&[taken])?;
    let foreign = builder.clone().conv2d_relu(whole, 16, 1, 0)?;
    // The first convolution and the whole have no names.
    for (node, name) in [(narrow, "narrow"), (wide, "wide"), (small, "small")] {
        builder.name(node, name);
    }
    builder.name(pooled, "pooled");
    builder.name(taken, "taken");

    let of_convolutions = "expected what a convolution made, which is written in place";
    let refused: [(&[Node], &str, &str); 12] = [
        (
            &[wide, small],
            r#"part is "small" of 6 × 6 beside "wide" of 8 × 8"#,
            "expected parts of one height and width",
        ),
        (
            &[wide, read],
            r#"part is "0: convolution 3×3 to 16 × 8 × 8", which "narrow" reads"#,
            "expected a part that nothing reads, since only the whole can be read",
        ),
        (
            &[taken],
            r#"part is "taken", a part of "concatenation to 16 × 8 × 8""#,
            "expected a part of no other whole",
        ),
        (
            &[wide, taken],
            r#"part is "taken", a part of "concatenation to 16 × 8 × 8""#,
            "expected a part of no other whole",
        ),
        (
            &[wide, wide],
            r#"part is "wide" for the second time"#,
            "expected each part once",
        ),
        (
            &[pooled, wide],
            r#"part is "pooled", made by a pooling"#,
            of_convolutions,
        ),
        (
            &[wide, pooled],
            r#"part is "pooled", made by a pooling"#,
            of_convolutions,
        ),
        (
            &[wide, images],
            r#"part is "images", the input of the graph"#,
            of_convolutions,
        ),
        (
            &[whole],
            r#"part is "concatenation to 16 × 8 × 8", a concatenation itself"#,
            of_convolutions,
        ),
        (
            &[narrow, wide],
            r#"part is "narrow" of 8 channels, and not the last"#,
            "expected a multiple of 16 channels of all parts but the last",
        ),
        (
            &[foreign, wide],
            "node is another builder's",
            "expected a node of this builder",
        ),
        (
            &[wide, foreign],
            "node is another builder's",
            "expected a node of this builder",
        ),
    ];
    for (parts, found, expected) in refused {
        let text = builder.concat(parts).unwrap_err().to_string();
        // Candle may append a backtrace.
        let text = text.lines().next().unwrap();
        assert_eq!(text, format!("static_graph: {found}, {expected}"));
    }
    // What was refused has changed nothing: its parts may be joined after that.
    assert!(builder.concat(&[wide, narrow]).is_ok());
    Ok(())
}

#[test]
fn a_node_that_cannot_be_read_or_is_not_read_is_an_error_that_names_it() -> Result<()> {
    let text = |result: Result<Node>| result.unwrap_err().to_string();
    let mut builder = StaticGraphBuilder::new(3, (8, 8));
    let x = builder.conv2d_relu(builder.input(), 16, 3, 1)?;
    let wide = builder.conv2d_relu(x, 16, 1, 0)?;
    let narrow = builder.conv2d_relu(x, 8, 1, 0)?;
    let whole = builder.concat(&[wide, narrow])?;
    builder.name(wide, "wide");
    let found = text(builder.conv2d_relu(wide, 4, 1, 0));
    assert!(
        found.contains(r#"node is "wide""#) && found.contains("only the whole can be read"),
        "{found}"
    );
    let found = text(builder.max_pool2d(narrow, MaxPool2dConfig::square(2, 2, 0)));
    assert!(
        found.contains(r#""2: convolution 1×1 to 8 × 8 × 8""#)
            && found.contains("only the whole can be read"),
        "{found}"
    );
    let unread = |builder: &StaticGraphBuilder| {
        let graph = builder.clone().global_avg_pool2d(x);
        graph.unwrap_err().to_string()
    };
    let found = unread(&builder);
    assert!(
        found.contains(r#"node is "concatenation to 24 × 8 × 8", expected a node that another"#),
        "{found}"
    );
    builder.name(whole, "whole");
    let found = unread(&builder);
    assert!(found.contains(r#"node is "whole""#), "{found}");

    let other = StaticGraphBuilder::new(3, (8, 8));
    let found = text(builder.conv2d_relu(other.input(), 4, 1, 0));
    assert!(found.contains("a node of this builder"), "{found}");
    assert!(
        builder.clone().conv2d_relu(whole, 4, 1, 0).is_ok(),
        "a clone knows the nodes"
    );
    let mut empty = StaticGraphBuilder::new(0, (8, 8));
    let found = text(empty.conv2d_relu(empty.input(), 4, 1, 0));
    assert!(found.contains("(C, H, W) is [0, 8, 8]"), "{found}");
    let found = text(builder.clone().conv2d_relu(whole, 0, 1, 0));
    assert!(found.contains("c_out is 0"), "{found}");
    assert!(builder.global_avg_pool2d(whole).is_ok());
    Ok(())
}

#[test]
fn gradients_that_are_set_aside_equal_those_that_candle_adds_up() -> Result<()> {
    for stem in [Stem::Bias, Stem::Norm] {
        let example = example::<f32>(stem, 2, (7, 8), false);
        let parameters = || example.parameters.iter().flatten();
        // One parameter has a second gradient from elsewhere; another is no variable there.
        let shared = &example.parameters[2][0];
        let doubled = (example.parameters[4][0].as_tensor() * 2.0)?;
        let mut tensors: Vec<Vec<Tensor>> = example
            .parameters
            .iter()
            .map(|p| p.iter().map(|var| var.as_tensor().clone()).collect())
            .collect();
        tensors[4][0] = doubled;
        let given: Vec<_> = tensors.iter().map(|p| from_tensors(p)).collect();
        let loss = || -> Result<Tensor> {
            let features = example.graph.forward(&example.images, &given)?.features;
            features.sqr()?.sum_all()? + shared.sqr()?.sum_all()?
        };
        let (expected, actual) = (loss()?.backward()?, crate::backward(&loss()?)?);
        for parameter in parameters() {
            let values = |store: &candle_core::backprop::GradStore| {
                values::<f32>(store.get(parameter).unwrap())
            };
            assert_eq!(values(&actual), values(&expected));
        }
    }
    Ok(())
}

#[test]
fn fewer_images_than_threads_are_cut_into_lines_and_give_the_same_bits() -> Result<()> {
    // With so many pixels one image is enough for Winograd's tiles; 9 lines are odd to cut.
    for (stem, size) in [
        (Stem::Bias, (33, 33)),
        (Stem::Bias, (9, 8)),
        (Stem::Norm, (9, 8)),
    ] {
        for batch in [1, 2] {
            let example = example::<f32>(stem, batch, size, true);
            let features = |threads: usize| -> Result<Vec<f32>> {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                let tensors: Vec<Vec<Tensor>> = example
                    .parameters
                    .iter()
                    .map(|p| p.iter().map(|var| var.as_detached_tensor()).collect())
                    .collect();
                let given: Vec<_> = tensors.iter().map(|p| from_tensors(p)).collect();
                let images = example.images.detach();
                let output = pool
                    .build()
                    .unwrap()
                    .install(|| example.graph.forward(&images, &given));
                Ok(values(&output?.features))
            };
            let whole = features(1)?;
            for threads in [2, 3, 5] {
                assert_eq!(
                    features(threads)?,
                    whole,
                    "{stem:?} {size:?} {batch} {threads}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn as_many_buffers_are_free_after_twenty_steps_as_after_two() -> Result<()> {
    for (stem, trains) in [(Stem::Bias, true), (Stem::Norm, true), (Stem::Bias, false)] {
        let example = example::<f32>(stem, 3, (9, 9), false);
        // Every third convolution is frozen, or all are, and the image alone gets its gradient.
        let tensors: Vec<Vec<Tensor>> = example
            .parameters
            .iter()
            .enumerate()
            .map(|(i, p)| {
                let tensor = |var: &Var| match trains && i % 3 != 1 {
                    true => var.as_tensor().clone(),
                    false => var.as_detached_tensor(),
                };
                p.iter().map(tensor).collect()
            })
            .collect();
        let given: Vec<_> = tensors.iter().map(|p| from_tensors(p)).collect();
        let images = Var::from_tensor(&example.images)?;
        let mut free = Vec::new();
        for _ in 0..20 {
            let features = example.graph.forward(&images, &given)?.features;
            features.sum_all()?.backward()?;
            free.push(example.graph.network.arenas.of::<f32>().free());
        }
        assert_eq!(free[1], free[19], "{stem:?} {trains}: {free:?}");
    }
    Ok(())
}

/// Convolutions one after the other, each with an output of another size and with padding, so that buffers serve
/// layouts that they were not made for.
struct Chain {
    graph: StaticGraph,
    parameters: Vec<[Var; 2]>,
}

impl Chain {
    const SIZE: (usize, usize) = (26, 25);

    fn new() -> Result<Self> {
        let mut builder = StaticGraphBuilder::new(16, Self::SIZE);
        let mut x = builder.input();
        let mut parameters = Vec::new();
        for i in 0..8 {
            x = builder.conv2d_relu(x, 16, 4, 1)?;
            let weight = tensor::<f32>(&format!("w{i}"), &[16, 16, 4, 4], 0.3);
            let bias = tensor::<f32>(&format!("b{i}"), &[16], 1.0);
            parameters.push([Var::from_tensor(&weight)?, Var::from_tensor(&bias)?]);
        }
        let graph = builder.global_avg_pool2d(x)?;
        Ok(Self { graph, parameters })
    }

    /// The features of so many images, and where they are asked for all gradients.
    fn pass(&self, batch: usize, gradients: bool) -> Result<Vec<f32>> {
        let (height, width) = Self::SIZE;
        let images = tensor::<f32>("images", &[batch, 16, height, width], 2.0);
        let of = |var: &Var| match gradients {
            true => var.as_tensor().clone(),
            false => var.as_detached_tensor(),
        };
        let tensors: Vec<_> = self
            .parameters
            .iter()
            .map(|p| p.each_ref().map(of))
            .collect();
        let given: Vec<_> = tensors.iter().map(|p| from_tensors(p)).collect();
        let features = self.graph.clone().forward(&images, &given)?.features;
        let mut all = values::<f32>(&features);
        if gradients {
            let gradients = features.sqr()?.sum_all()?.backward()?;
            for var in self.parameters.iter().flatten() {
                all.extend(values::<f32>(gradients.get(var).unwrap()));
            }
        }
        Ok(all)
    }
}

#[test]
fn passes_through_clones_of_one_graph_at_once_give_the_bits_that_each_gives_alone() -> Result<()> {
    let chain = Chain::new()?;
    let (tell, heard) = std::sync::mpsc::channel();
    // Passes that wait for each other never end: so they have a thread that can be left behind.
    let thread = std::thread::spawn(move || {
        let pass = |i: usize| chain.pass(2 + i % 5, i.is_multiple_of(3)).unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build();
        pool.unwrap().install(|| {
            let alone: Vec<_> = (0..15).map(pass).collect();
            for _ in 0..30 {
                let at_once: Vec<_> = (0..15).into_par_iter().map(pass).collect();
                assert!(at_once == alone);
            }
        });
        tell.send(()).unwrap();
    });
    match heard.recv_timeout(Duration::from_secs(300)) {
        Err(RecvTimeoutError::Timeout) => panic!("passes wait for each other"),
        _ => thread.join().unwrap(),
    }
    Ok(())
}

#[test]
fn sizes_that_overflow_are_refused_when_they_are_described() -> Result<()> {
    let text = |node: Result<Node>| node.unwrap_err().to_string();
    let mut builder = StaticGraphBuilder::new(3, (8, 8));
    let images = builder.input();
    // 8 + 2·2⁶³ is 8 again, modulo 2⁶⁴; (2³³ + 8)² is below 2³⁸.
    for (kernel, padding) in [((1 << 63) + 1, 1 << 63), (1 << 33, 1 << 32), (1 << 32, 0)] {
        let found = text(builder.conv2d_relu(images, 16, kernel, padding));
        assert!(found.contains("more elements"), "{found}");
    }
    let found = text(builder.conv2d_relu(images, 1 << 62, 1, 0));
    assert!(found.contains("weight"), "{found}");
    // What was refused has left nothing behind.
    let x = builder.conv2d_relu(images, 16, 3, 1)?;
    let graph = builder.clone().global_avg_pool2d(x)?;
    let none = tensor::<f32>("images", &[0, 3, 8, 8], 1.0);
    let weight = tensor::<f32>("w", &[16, 3, 3, 3], 1.0);
    let bias = tensor::<f32>("b", &[16], 1.0);
    let parameters = [ConvParameters::Bias {
        weight: &weight,
        bias: &bias,
    }];
    assert_eq!(graph.forward(&none, &parameters)?.features.dims(), [0, 16]);

    // A window of 2⁶⁴ taps, which are too many for a convolution's winners.
    let pool = builder.max_pool2d(x, MaxPool2dConfig::square(1 << 32, 1, 1 << 31))?;
    let last = builder.conv2d_relu(pool, 4, 1, 0)?;
    assert_eq!(builder.global_avg_pool2d(last)?.network.pooled, [None; 3]);

    let mut builder = StaticGraphBuilder::new(1, (1 << 31, 1 << 31));
    let images = builder.input();
    let found = text(builder.max_pool2d(images, MaxPool2dConfig::square(2, 2, 0)));
    assert!(found.contains("more elements"), "{found}");
    Ok(())
}

#[test]
fn a_frozen_weight_gets_no_gradient_and_the_bias_or_batch_norm_behind_it_the_same() {
    for stem in [Stem::Bias, Stem::Norm] {
        for needs_input in [false, true] {
            let example = example::<f32>(stem, 3, (9, 9), false);
            let network = &example.graph.network;
            let owned = example.parameters.iter();
            let owned: Vec<Vec<Vec<f32>>> = owned
                .map(|p| p.iter().map(|p| values::<f32>(p)).collect())
                .collect();
            let parameters = parameter_values(network, &owned);
            let upstream = seeded_values("upstream", 3 * (16 + 32 + 64 + 7), 2.0);
            let gradients = |trains: &dyn Fn(usize) -> Trains| {
                let trainable: Vec<Trains> = (0..parameters.len()).map(trains).collect();
                let images = values::<f32>(&example.images);
                let isa = Isa::detect();
                let maps = Forward::new(network, isa, 3)
                    .run(&images, &parameters, Keep::ForBackward)
                    .maps;
                Backward::new(network, isa, 3, needs_input, &trainable).run(
                    maps.unwrap(),
                    &parameters,
                    &upstream,
                )
            };
            let all = gradients(&|_| Trains {
                any: true,
                weight: true,
            });
            // The first convolution's too, which nothing before it needs a gradient of, and the first block's fourth.
            let weight = |i: usize| !matches!(i, 0 | 4 | 6);
            let some = gradients(&|i| Trains {
                any: true,
                weight: weight(i),
            });
            assert!(some.0 == all.0 && some.0.is_some() == needs_input);
            let mut at = 0;
            for (i, of_one) in owned.iter().enumerate() {
                for j in 0..of_one.len() {
                    let (some, all) = (&some.1[at], &all.1[at]);
                    match j == 0 && !weight(i) {
                        true => assert!(some.is_none(), "{stem:?} {i}"),
                        false => assert!(some == all && some.is_some(), "{stem:?} {i} {j}"),
                    }
                    at += 1;
                }
            }
            assert_eq!((at, at), (some.1.len(), all.1.len()));
        }
    }
}

#[test]
fn a_frozen_weight_of_running_statistics_trains_while_the_norm_does_that_is_a_part_of_it()
-> Result<()> {
    let example = example::<f64>(Stem::Norm, 2, (9, 9), false);
    let running = running::<f64>(&example);
    // Of each parameter: the weights are frozen; where `norms` are as well, the biases alone train.
    let check = |norms: bool| -> Result<()> {
        let all = example.parameters.iter();
        let tensors: Vec<Vec<Tensor>> = all
            .map(|p| {
                let norm = match norms {
                    true => p[1].as_tensor().clone(),
                    false => p[1].as_detached_tensor(),
                };
                vec![p[0].as_detached_tensor(), norm, p[2].as_tensor().clone()]
            })
            .collect();
        let given = with_running(&tensors, &running);
        let expected = composed(Stem::Norm, &example.images, &given, false)?;
        let expected = expected.sqr()?.sum_all()?.backward()?;
        let features = example.graph.forward(&example.images, &given)?.features;
        let actual = features.sqr()?.sum_all()?.backward()?;
        for p in &example.parameters {
            assert!(actual.get(&p[0]).is_none());
            assert_eq!(actual.get(&p[1]).is_some(), norms);
            for var in &p[if norms { 1 } else { 2 }..] {
                let (actual, expected) = (actual.get(var).unwrap(), expected.get(var).unwrap());
                let error = relative_error(actual, expected)?;
                assert!(error <= 1e-11, "{norms} {error:.1e}");
            }
        }
        Ok(())
    };
    check(true)?;
    check(false)
}

#[test]
fn clones_of_a_builder_share_the_nodes_before_they_part_and_none_after() -> Result<()> {
    let mut one = StaticGraphBuilder::new(3, (8, 8));
    let before = one.conv2d_relu(one.input(), 16, 3, 1)?;
    let mut other = one.clone();
    // Both with the number 2, but of other channels.
    let (narrow, wide) = (
        one.conv2d_relu(before, 16, 1, 0)?,
        other.conv2d_relu(before, 32, 1, 0)?,
    );
    assert_ne!(narrow, wide);
    for (builder, own, foreign) in [(&mut one, narrow, wide), (&mut other, wide, narrow)] {
        assert!(builder.conv2d_relu(foreign, 4, 1, 0).is_err());
        assert!(
            builder
                .max_pool2d(foreign, MaxPool2dConfig::square(2, 2, 0))
                .is_err()
        );
        assert!(builder.concat(&[foreign]).is_err());
        builder.name(foreign, "foreign");
        builder.name(own, "own");
        assert!(builder.clone().global_avg_pool2d(foreign).is_err());
        let graph = builder.clone().global_avg_pool2d(own)?;
        let names: Vec<&str> = graph.network.names.values().map(String::as_str).collect();
        assert_eq!(names, ["own"]);
    }
    Ok(())
}

#[test]
fn the_relu_behind_a_batch_norm_keeps_the_sign_of_zero() {
    let layout = MapLayout {
        size: (1, 4),
        halo: 0,
        pixel: 16,
    };
    let span = norm::Span {
        layout,
        channel: 0,
        channels: 5,
    };
    let affine = norm::Affine {
        mean: vec![0f32; 5],
        scale: vec![1.0; 5],
        bias: vec![-0.0; 5],
    };
    let x: Vec<f32> = [-0.0, 0.0, -1.0, 2.0].map(|x| [x; 16]).concat();
    for isa in Isa::available() {
        let (mut in_place, mut y) = (x.clone(), vec![7f32; x.len()]);
        norm::normalise_in_place(isa, &span, &affine, &mut in_place);
        let between = norm::Between { x: span, y: span };
        norm::normalise(isa, &between, &affine, &x, &mut y);
        for (pixel, expected) in [-0.0f32, 0.0, 0.0, 2.0].into_iter().enumerate() {
            for at in pixel * 16..pixel * 16 + 5 {
                let both = (in_place[at].to_bits(), y[at].to_bits());
                assert_eq!(
                    both,
                    (expected.to_bits(), expected.to_bits()),
                    "{isa:?} {at}"
                );
            }
        }
    }
}
