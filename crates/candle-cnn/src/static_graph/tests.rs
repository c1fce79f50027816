use candle_core::{Device, Result, Tensor, Var};
use test_support::{check_gradients, relative_error, seeded_values};

use super::arena::Layout;
use super::run::{Backward, Forward};
use super::*;
use crate::element::Element;
use crate::{
    Conv2dConfig, Conv2dGeometry, conv2d_backward_reference, conv2d_reference, conv2d_relu,
    global_avg_pool2d, max_pool2d,
};

/// A graph with everything in it: two Inception blocks with a pool between,
/// kernels 1, 2, 3 and 5, unpadded and padded, widths that fill no vector.
struct Example {
    graph: StaticGraph,
    images: Tensor,
    parameters: Vec<(Var, Var)>,
}

fn tensor<T: Element>(name: &str, shape: &[usize], scale: f64) -> Tensor {
    let values = seeded_values(name, shape.iter().product(), scale);
    let values: Vec<T> = values.into_iter().map(|v| T::real(f64::from(v))).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

const BLOCK_POOL: fn() -> MaxPool2dConfig = || MaxPool2dConfig::square(3, 1, 1);

fn example<T: Element>(batch: usize, size: (usize, usize), ceil_mode: bool) -> Example {
    let mut shapes = Vec::new();
    let mut builder = StaticGraphBuilder::new(3, size);
    let mut conv = |b: &mut StaticGraphBuilder, x: Node, c_in, c_out, kernel, padding| {
        shapes.push([c_out, c_in, kernel, kernel]);
        b.conv2d_relu(x, c_out, kernel, padding).unwrap()
    };
    let mut x = conv(&mut builder, Node(0), 3, 20, 2, 0);
    let mut channels = 20;
    for block in 0..2 {
        let b = &mut builder;
        let one = conv(b, x, channels, 16, 1, 0);
        let reduced = conv(b, x, channels, 9, 1, 0);
        let three = conv(b, reduced, 9, 32, 3, 1);
        let reduced = conv(b, x, channels, 24, 1, 0);
        let five = conv(b, reduced, 24, 64, 5, 2);
        let pooled = b.max_pool2d(x, BLOCK_POOL()).unwrap();
        let four = conv(b, pooled, channels, 7, 1, 0);
        x = b.concat(&[one, three, five, four]).unwrap();
        channels = 16 + 32 + 64 + 7;
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
    let parameters = shapes
        .iter()
        .enumerate()
        .map(|(i, shape)| {
            (
                variable(format!("w{i}"), shape),
                variable(format!("b{i}"), &shape[..1]),
            )
        })
        .collect();
    Example {
        graph,
        images: tensor::<T>("images", &[batch, 3, size.0, size.1], 2.0),
        parameters,
    }
}

fn halving(ceil_mode: bool) -> MaxPool2dConfig {
    MaxPool2dConfig {
        ceil_mode,
        ..MaxPool2dConfig::square(3, 2, 1)
    }
}

/// The same network from ordinary operations.
fn composed(images: &Tensor, parameters: &[(&Tensor, &Tensor)], ceil_mode: bool) -> Result<Tensor> {
    let mut parameters = parameters.iter();
    let mut conv = |x: &Tensor, padding| {
        let (weight, bias) = parameters.next().unwrap();
        conv2d_relu(x, weight, Some(*bias), Conv2dConfig::padded(padding))
    };
    let mut x = conv(images, 0)?;
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

impl Example {
    fn tensors(&self) -> Vec<(&Tensor, &Tensor)> {
        let pairs = self.parameters.iter();
        pairs.map(|(w, b)| (w.as_tensor(), b.as_tensor())).collect()
    }

    /// Features and all gradients for an upstream gradient, by ordinary operations.
    fn expected(&self, upstream: &Tensor, ceil_mode: bool) -> Result<(Tensor, Tensor, Tensor)> {
        let images = Var::from_tensor(&self.images)?;
        let features = composed(&images, &self.tensors(), ceil_mode)?;
        let gradients = (&features * upstream)?.sum_all()?.backward()?;
        let mut flat = Vec::new();
        for (weight, bias) in &self.parameters {
            flat.push(gradients.get(weight).unwrap().flatten_all()?);
            flat.push(gradients.get(bias).unwrap().clone());
        }
        let d_images = gradients.get(&images).unwrap().clone();
        Ok((features.detach(), d_images, Tensor::cat(&flat, 0)?))
    }
}

fn values<T: Element>(tensor: &Tensor) -> Vec<T> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Every instruction set of this machine against ordinary operations; twice,
/// so that the second pass finds used buffers.
fn check<T: Element>(batch: usize, size: (usize, usize), ceil_mode: bool, tolerance: f64) {
    let example = example::<T>(batch, size, ceil_mode);
    let upstream = tensor::<T>("upstream", &[batch, 16 + 32 + 64 + 7], 2.0);
    let (features, d_images, d_parameters) = example.expected(&upstream, ceil_mode).unwrap();
    let inner = &example.graph.inner;
    let flat: Vec<T> = example
        .tensors()
        .iter()
        .flat_map(|(w, b)| [values::<T>(w), values::<T>(b)].concat())
        .collect();
    let trainable = vec![true; example.parameters.len()];
    for isa in Isa::available() {
        for _ in 0..2 {
            let images = values::<T>(&example.images);
            let (actual, _) = Forward::new(inner, isa, batch).run(&images, &flat, false);
            let (again, maps) = Forward::new(inner, isa, batch).run(&images, &flat, true);
            assert!(actual == again, "keeping the maps changes nothing");
            let (d_x, d_p) = Backward::new(inner, isa, batch, true, &trainable).run(
                maps.unwrap(),
                &flat,
                &values::<T>(&upstream),
            );
            for (name, actual, expected) in [
                ("features", actual, &features),
                ("images", d_x.unwrap(), &d_images),
                ("parameters", d_p, &d_parameters),
            ] {
                let actual = Tensor::from_vec(actual, expected.shape(), &Device::Cpu).unwrap();
                let error = relative_error(&actual, expected).unwrap();
                assert!(
                    error <= tolerance,
                    "{isa:?} {batch} {size:?}: {name} {error:.1e}"
                );
            }
        }
    }
}

#[test]
fn both_passes_equal_those_of_ordinary_operations() {
    for (batch, size) in [(1, (7, 7)), (2, (9, 17)), (3, (33, 6)), (5, (17, 17))] {
        for ceil_mode in [false, true] {
            check::<f64>(batch, size, ceil_mode, 1e-12);
            check::<f32>(batch, size, ceil_mode, 2e-5);
        }
    }
}

#[test]
fn both_passes_equal_those_of_ordinary_operations_where_winograd_pays() {
    // After the unpadded 2×2 stem 32×16 pixels, 32 tiles an image, and a
    // quarter of them after the pool.
    let batch = 8 * rayon::current_num_threads();
    assert!(winograd::pays::<f32>(3, (32, 16), batch) && winograd::pays::<f32>(3, (16, 8), batch));
    check::<f32>(batch, (33, 17), false, 2e-5);
}

/// `[image][channel][pixel]` to a layout whose images begin at channel `first`.
fn lay_out(
    layout: Layout,
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
    let layout = |halo, width| Layout { size, halo, width };
    // The output and its gradient lie in a wider map, from channel 32 on.
    let (x_layout, y_layout) = (layout(2, c_in), layout(1, c_out + 48));
    let x = lay_out(x_layout, &x, (batch, c_in, 0));
    let dy = lay_out(y_layout, &dy, (batch, c_out, 32));
    for isa in Isa::available() {
        let kernels = <f32 as crate::simd::KernelTable>::kernels(isa);
        let packed = crate::conv2d::PackedWeight::new(
            &weight,
            (c_out, 9, c_in),
            kernels.lanes,
            |k, tap, c| (k * c_in + c) * 9 + tap,
        );
        let mut scratch = winograd::Scratch::default();
        let mut y = vec![0f32; batch * y_layout.image()];
        winograd::WinogradPass {
            kernels,
            isa,
            x: x_layout,
            x_channel: 0,
            channels: c_in,
            padding: 1,
            weight: &winograd::transform_weight(isa, &packed),
            start: run::Start::Values(&vec![0.0; c_out]),
            relu: false,
            y: y_layout,
            y_channel: 32,
        }
        .run(&x, &mut y, &mut scratch);
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
        let mut sums = vec![0f32; pass.sums_len()];
        pass.run(&x, &dy, &mut sums, &mut scratch);
        let mut d_weight = vec![0f32; weight.len()];
        pass.unpack(|part| (part == 0).then_some(sums.as_slice()), &mut d_weight);
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
    let example = example::<f64>(2, (7, 8), false);
    let (weight, bias) = (&example.parameters[2].0, &example.parameters[5].1);
    let inputs = [&example.images, weight.as_tensor(), bias.as_tensor()];
    let error = check_gradients(&inputs, 1e-6, |inputs| {
        let mut tensors = example.tensors();
        tensors[2].0 = &inputs[1];
        tensors[5].1 = &inputs[2];
        example.graph.forward(&inputs[0], &tensors)
    })?;
    assert!(error <= 1e-6, "{error:.1e}");
    Ok(())
}

#[test]
fn frozen_convolutions_get_no_gradient_and_the_others_the_same() -> Result<()> {
    let example = example::<f64>(2, (9, 9), false);
    let all = example.graph.forward(&example.images, &example.tensors())?;
    let all = all.sqr()?.sum_all()?.backward()?;
    let frozen: Vec<(Tensor, Tensor)> = example
        .parameters
        .iter()
        .enumerate()
        .map(|(i, (w, b))| match i {
            0..=6 | 9 => (w.as_detached_tensor(), b.as_detached_tensor()),
            _ => (w.as_tensor().clone(), b.as_tensor().clone()),
        })
        .collect();
    let pairs: Vec<_> = frozen.iter().map(|(w, b)| (w, b)).collect();
    let some = example.graph.forward(&example.images, &pairs)?;
    let some = some.sqr()?.sum_all()?.backward()?;
    for (i, (weight, _)) in example.parameters.iter().enumerate() {
        match i {
            0..=6 | 9 => assert!(some.get(weight).is_none(), "{i}"),
            _ => assert_eq!(
                values::<f64>(some.get(weight).unwrap()),
                values::<f64>(all.get(weight).unwrap()),
                "{i}"
            ),
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_an_error_that_names_both_shapes() {
    let example = example::<f32>(1, (9, 9), false);
    let tensors = example.tensors();
    let wrong = tensor::<f32>("images", &[1, 3, 9, 10], 1.0);
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    let found = message(example.graph.forward(&wrong, &tensors));
    assert!(
        found.contains("[1, 3, 9, 10]") && found.contains("[3, 9, 9]"),
        "{found}"
    );
    let found = message(example.graph.forward(&example.images, &tensors[1..]));
    assert!(found.contains("[12]") && found.contains("[13]"), "{found}");
    let mut swapped = tensors.clone();
    swapped.swap(0, 1);
    let found = message(example.graph.forward(&example.images, &swapped));
    assert!(
        found.contains("[16, 20, 1, 1]") && found.contains("[20, 3, 2, 2]"),
        "{found}"
    );
}

#[test]
fn only_what_can_be_written_in_place_is_joined() {
    let mut builder = StaticGraphBuilder::new(3, (8, 8));
    let x = builder.conv2d_relu(Node(0), 16, 3, 1).unwrap();
    let narrow = builder.conv2d_relu(x, 8, 1, 0).unwrap();
    let wide = builder.conv2d_relu(x, 16, 1, 0).unwrap();
    assert!(
        builder.clone().concat(&[narrow, wide]).is_err(),
        "8 channels end inside of a vector"
    );
    assert!(builder.clone().concat(&[x, wide]).is_err(), "x is read");
    let whole = builder.concat(&[wide, narrow]).unwrap();
    assert!(
        builder.conv2d_relu(wide, 4, 1, 0).is_err(),
        "only the whole can be read"
    );
    assert!(
        builder.clone().global_avg_pool2d(x).is_err(),
        "nobody reads the whole"
    );
    assert!(
        builder.conv2d_relu(Node(99), 4, 1, 0).is_err(),
        "of another builder"
    );
    let mut empty = StaticGraphBuilder::new(0, (8, 8));
    assert!(empty.conv2d_relu(Node(0), 4, 1, 0).is_err(), "no channels");
    assert!(builder.global_avg_pool2d(whole).is_ok());
}
