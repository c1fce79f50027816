//! `candle_cnn::backward` against Candle's own, over operations that set gradients aside.

use candle_cnn::{
    Conv2dConfig, backward, batch_norm_relu_train, batch_norm_train, conv2d, conv2d_relu, linear,
};
use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, Var};
use test_support::{devices, seeded_values};

fn tensor(name: &str, dims: &[usize], device: &Device) -> Result<Tensor> {
    Tensor::from_vec(
        seeded_values(name, dims.iter().product(), 1.0),
        dims,
        device,
    )
}

#[test]
fn the_gradients_are_candles_wherever_a_variable_is_used() -> Result<()> {
    for device in devices() {
        let var = |name: &str, dims: &[usize]| Var::from_tensor(&tensor(name, dims, &device)?);
        let images = tensor("images", &[2, 3, 5, 4], &device)?;
        let (weight, bias) = (var("weight", &[3, 3, 3, 3])?, var("bias", &[3])?);
        let (scale, shift) = (var("scale", &[3])?, var("shift", &[3])?);
        let last = var("last", &[2, 3, 1, 1])?;
        let (square, offset) = (var("square", &[4, 4])?, var("offset", &[4])?);
        let loss = || -> Result<Tensor> {
            let padded = Conv2dConfig::padded(1);
            // The weight twice, its bias twice, the scale also outside of these operations.
            let x = conv2d_relu(&images, &weight, Some(&bias), padded)?;
            let (x, _) = batch_norm_relu_train(&x, &scale, &shift, 1e-5)?;
            let x = conv2d(&x, &weight, Some(&bias), padded)?;
            let doubled = (shift.as_tensor() * 2.0)?;
            let (x, _) = batch_norm_train(&x, &scale, &doubled, 1e-5)?;
            let x = conv2d(&x, &last, None, Conv2dConfig::default())?;
            // A layer twice, its bias also outside.
            let x = linear(&x.flatten_to(2)?, &square, Some(&offset))?;
            let x = linear(&x, &square, Some(&offset))?;
            (x.sqr()?.sum_all()? + scale.sqr()?.sum_all()?)? + offset.sqr()?.sum_all()?
        };
        let (expected, found) = (loss()?.backward()?, backward(&loss()?)?);
        for (name, variable) in [
            ("weight", &weight),
            ("bias", &bias),
            ("scale", &scale),
            ("shift", &shift),
            ("last", &last),
            ("square", &square),
            ("offset", &offset),
        ] {
            let values = |store: &GradStore| -> Result<Vec<f32>> {
                let gradient = store.get(variable).unwrap_or_else(|| panic!("of {name}"));
                gradient.flatten_all()?.to_vec1()
            };
            let (expected, found) = (values(&expected)?, values(&found)?);
            assert!(expected.iter().any(|value| *value != 0.0), "{name}");
            for (expected, found) in expected.iter().zip(&found) {
                // Sums of several gradients may be taken in another order.
                let bound = 1e-5 * expected.abs().max(1.0);
                assert!(
                    (expected - found).abs() <= bound,
                    "{name}: {found}, Candle's {expected}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn a_gradient_that_nobody_asked_for_stays_away() -> Result<()> {
    for device in devices() {
        let images = tensor("images", &[1, 2, 4, 4], &device)?;
        let weight = Var::from_tensor(&tensor("weight", &[2, 2, 1, 1], &device)?)?;
        let frozen = tensor("frozen", &[2, 2, 1, 1], &device)?;
        let x = conv2d(&images, &weight, None, Conv2dConfig::default())?;
        let x = conv2d(&x, &frozen, None, Conv2dConfig::default())?;
        let gradients = backward(&x.sum_all()?)?;
        assert!(gradients.get(&weight).is_some());
        assert!(gradients.get(&frozen).is_none() && gradients.get(&images).is_none());
    }
    Ok(())
}

#[cfg(feature = "cuda")]
#[test]
fn running_statistics_move_as_on_the_cpu_to_the_bit() -> Result<()> {
    use candle_cnn::cuda::{TrackedStatistics, take_up_statistics};
    use candle_cnn::{BatchStatistics, update_running};

    for device in devices().iter().filter(|device| device.is_cuda()) {
        let channels = 300;
        let (cpu, names) = (&Device::Cpu, ["mean", "variance", "mean of", "variance of"]);
        let [mean, variance, batch_mean, unbiased] = names.map(|n| tensor(n, &[channels], cpu));
        let (mean, variance, batch_mean, unbiased) = (mean?, variance?, batch_mean?, unbiased?);
        let on_gpu = |tensor: &Tensor| tensor.to_device(device);
        let (moved_mean, moved_variance) = (on_gpu(&mean)?, on_gpu(&variance)?);
        let batches = Tensor::new(&[41i64], device)?;
        let batch = BatchStatistics {
            mean: on_gpu(&batch_mean)?,
            unbiased_variance: on_gpu(&unbiased)?,
        };
        let running = TrackedStatistics {
            mean: &moved_mean,
            variance: &moved_variance,
            batches: &batches,
        };
        // As the last of more than a launch takes, of which the others count.
        let small = |value: f32| Tensor::new(&[value], device);
        let batch_of_others = BatchStatistics {
            mean: small(3.0)?,
            unbiased_variance: small(0.0)?,
        };
        let others: Vec<[Tensor; 3]> = (0..70)
            .map(|i| Ok([small(1.0)?, small(2.0)?, Tensor::new(&[i as i64], device)?]))
            .collect::<Result<_>>()?;
        let mut all: Vec<_> = others
            .iter()
            .map(|[mean, variance, batches]| {
                let running = TrackedStatistics {
                    mean,
                    variance,
                    batches,
                };
                (running, &batch_of_others)
            })
            .collect();
        all.push((running, &batch));
        take_up_statistics(&all, 0.1)?;
        for (i, [_, _, batches]) in others.iter().enumerate() {
            assert_eq!(batches.to_vec1::<i64>()?, [i as i64 + 1]);
        }
        let bits = |tensor: &Tensor| -> Result<Vec<u32>> {
            let values: Vec<f32> = tensor.to_device(cpu)?.to_vec1()?;
            Ok(values.into_iter().map(f32::to_bits).collect())
        };
        let expected = update_running(&mean, &batch_mean, 0.1)?;
        assert_eq!(bits(&moved_mean)?, bits(&expected)?);
        let expected = update_running(&variance, &unbiased, 0.1)?;
        assert_eq!(bits(&moved_variance)?, bits(&expected)?);
        assert_eq!(batches.to_vec1::<i64>()?, [42]);
        let wrong = TrackedStatistics {
            batches: &moved_mean,
            ..running
        };
        let error = take_up_statistics(&[(wrong, &batch)], 0.1).unwrap_err();
        let expected = "dtype of batches is F32, expected I64";
        assert!(error.to_string().contains(expected), "{error}");
    }
    Ok(())
}
