use candle_core::{DType, Device, Result, Tensor};
use proptest::prelude::*;
use test_support::{check_gradients, seeded_values};

use super::*;

/// Small whole numbers, whose sums are the same in any order.
fn whole<T: Element>(name: &str, count: usize) -> Vec<T> {
    let values = seeded_values(name, count, 12.0);
    let whole = values.iter().map(|value| value.round());
    whole.map(|value| T::real(f64::from(value))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn every_instruction_set_gives_the_numbers_of_the_plain_loops(
        (planes, height, width) in (1usize..40, 1usize..12, 1usize..20),
        kernel in (1usize..6, 1usize..6),
        stride in (1usize..4, 1usize..4),
        padding in (0usize..3, 0usize..3),
        (ceil_mode, count_include_pad) in any::<(bool, bool)>(),
        adaptive in proptest::option::of((1usize..6, 1usize..6)),
    ) {
        let [h, w] = match adaptive {
            Some((h, w)) => [(height, h), (width, w)].map(|(input, output)| Rule::Adaptive { input, output }),
            None => {
                let window = PoolWindow { kernel_size: kernel, stride, padding, ceil_mode };
                let Ok((h, w)) = window.axes("avg_pool2d", (height, width)) else {
                    return Ok(());
                };
                [h, w].map(|axis| Rule::Windows { axis, count_include_pad })
            }
        };
        let pool = AvgPool2d::new("avg_pool2d", h, w).unwrap();
        check::<f32>(&pool, planes, (height, width));
        check::<f64>(&pool, planes, (height, width));
    }
}

/// Compares with the plain loops.
fn check<T: Element + std::fmt::Debug>(
    pool: &AvgPool2d,
    planes: usize,
    (height, width): (usize, usize),
) {
    let pixels = height * width;
    let x = whole::<T>("x", planes * pixels);
    let planes_of_x = x.chunks_exact(pixels);
    let y: Vec<T> = planes_of_x
        .flat_map(|x| reference::forward(pool, x, width))
        .collect();
    let dy = whole::<T>("dy", planes * pool.output_plane());
    let planes_of_dy = dy.chunks_exact(pool.output_plane());
    let dx: Vec<T> = planes_of_dy
        .flat_map(|dy| reference::backward(pool, dy, width, pixels))
        .collect();
    for isa in Isa::available() {
        assert_eq!(cpu::forward(pool, isa, &x, (height, width)), y);
        assert_eq!(cpu::backward(pool, isa, &dy, (height, width)), dx);
    }
}

#[test]
fn whole_planes_of_any_size_and_number_have_their_means() -> Result<()> {
    for (planes, height, width) in [
        (3, 1, 1),
        (2100, 5, 5),
        (40, 30, 31),
        (3, 200, 100),
        (0, 4, 4),
    ] {
        let rule = |input| Rule::Adaptive { input, output: 1 };
        let pool = AvgPool2d::new("adaptive_avg_pool2d", rule(height), rule(width))?;
        check::<f32>(&pool, planes, (height, width));
        check::<f64>(&pool, planes, (height, width));
    }
    Ok(())
}

#[test]
fn gradients_agree_with_finite_differences() -> Result<()> {
    let values = seeded_values("x", 2 * 2 * 7 * 5, 2.0);
    let x = Tensor::from_vec(values, (2, 2, 7, 5), &Device::Cpu)?.to_dtype(DType::F64)?;
    let config = AvgPool2dConfig::square(3, 2, 1).ceil();
    for worst in [
        check_gradients(&[&x], 1e-4, |inputs| avg_pool2d(&inputs[0], config))?,
        check_gradients(&[&x], 1e-4, |inputs| {
            adaptive_avg_pool2d(&inputs[0], (4, 3))
        })?,
        check_gradients(&[&x], 1e-4, |inputs| global_avg_pool2d(&inputs[0]))?,
    ] {
        assert!(worst < 1e-8, "{worst:.1e}");
    }
    Ok(())
}

#[test]
fn bad_sizes_are_errors() -> Result<()> {
    let x = Tensor::zeros((1, 1, 2, 2), DType::F32, &Device::Cpu)?;
    let text = adaptive_avg_pool2d(&x, (0, 1)).unwrap_err().to_string();
    assert!(text.contains("output_size is (0, 1)"), "{text}");
    let text = adaptive_avg_pool2d(&x.squeeze(0)?, (1, 1))
        .unwrap_err()
        .to_string();
    assert!(text.contains("[1, 2, 2]"), "{text}");
    Ok(())
}

#[test]
fn sizes_that_overflow_are_errors_and_a_border_of_2_to_the_80_pixels_counts() -> Result<()> {
    let x = Tensor::ones((1, 1, 4, 4), DType::F64, &Device::Cpu)?;
    let wide = AvgPool2dConfig::square(1 << 40, 4, 1 << 39);
    let y = avg_pool2d(&x, wide)?.flatten_all()?.to_vec1::<f64>()?;
    assert_eq!(y, [16.0 / (2f64).powi(80); 4]);
    // Nothing in memory, but 2⁶⁴ pixels in each of no planes.
    let nothing = Tensor::zeros((0, 1, 1 << 32, 1 << 32), DType::F32, &Device::Cpu)?;
    for result in [
        avg_pool2d(&nothing, AvgPool2dConfig::square(2, 2, 0)),
        adaptive_avg_pool2d(&nothing, (1, 1)),
        adaptive_avg_pool2d(&x, (1 << 32, 1 << 32)),
        adaptive_avg_pool2d(&x, (1 << 50, 1)),
    ] {
        let text = result.unwrap_err().to_string();
        assert!(text.contains("more elements"), "{text}");
    }
    Ok(())
}
