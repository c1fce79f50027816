//! Bilinear resizing, as PIL and PyTorch do it with antialiasing.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result, Tensor};

/// How one row of pixels becomes one of another length: each output is a weighted mean of
/// neighbouring inputs.
///
/// The filter is the triangle of PIL's `BILINEAR`, whose width grows with the step where a row is
/// made shorter: `torch.nn.functional.interpolate(mode="bilinear", align_corners=False,
/// antialias=True)`. Where it is made longer, antialiasing changes nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Resampling {
    input: usize,
    /// For each output the first input it takes, and the weights from there on; they sum to 1.
    taps: Vec<(usize, Vec<f64>)>,
}

impl Resampling {
    /// From `input` to `output` pixels, both at least 1.
    pub fn new(input: usize, output: usize) -> Self {
        Self::part(input, output, 0..output)
    }

    /// Those of `outputs` alone, out of `output`; of a long row it holds no more than these.
    pub fn part(input: usize, output: usize, outputs: Range<usize>) -> Self {
        let step = input as f64 / output as f64;
        // The triangle reaches one input to either side, or one output where that is wider.
        let reach = step.max(1.0);
        let taps = outputs.map(|index| {
            let centre = (index as f64 + 0.5) * step;
            let first = (centre - reach + 0.5).max(0.0) as usize;
            let end = ((centre + reach + 0.5) as usize).min(input);
            let weights = (first..end).map(|tap| {
                // In PIL's order, since a byte can hang on the last bit.
                let distance = (tap as f64 - centre + 0.5) * (1.0 / reach);
                (1.0 - distance.abs()).max(0.0)
            });
            let weights: Vec<f64> = weights.collect();
            let sum: f64 = weights.iter().sum();
            (first, weights.into_iter().map(|w| w / sum).collect())
        });
        Self {
            input,
            taps: taps.collect(),
        }
    }

    /// Number of outputs.
    pub fn output(&self) -> usize {
        self.taps.len()
    }

    /// For each output the first input it takes, and the weights from there on.
    pub fn taps(&self) -> impl Iterator<Item = (usize, &[f64])> {
        self.taps
            .iter()
            .map(|(first, weights)| (*first, &weights[..]))
    }

    /// As a matrix `(input, output)`, f32.
    fn matrix(&self, device: &Device) -> Result<Tensor> {
        let mut matrix = vec![0f32; self.input * self.output()];
        for (column, (first, weights)) in self.taps().enumerate() {
            for (offset, &weight) in weights.iter().enumerate() {
                matrix[(first + offset) * self.output() + column] = weight as f32;
            }
        }
        Tensor::from_vec(matrix, (self.input, self.output()), device)
    }
}

/// Images `(N, C, H, W)` of another size, resized in f32. The same images where the size is theirs.
///
/// # Errors
/// A tensor of another rank or type.
pub fn resize_batch(images: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    Resizer::new(height, width).resize(images)
}

/// [`resize_batch`] to one size, again and again: what it takes is made, and uploaded, for the first batch. A CUDA graph
/// that holds a later one finds it on the device.
#[derive(Debug)]
pub struct Resizer {
    height: usize,
    width: usize,
    /// For the size that came last.
    matrices: Mutex<Option<Matrices>>,
}

#[derive(Clone, Debug)]
struct Matrices {
    /// (H, height).
    down: Tensor,
    /// (W, width).
    across: Tensor,
}

impl Resizer {
    /// To images of this size.
    pub fn new(height: usize, width: usize) -> Self {
        Self {
            height,
            width,
            matrices: Mutex::new(None),
        }
    }

    /// See [`resize_batch`].
    ///
    /// # Errors
    /// A tensor of another rank or type.
    pub fn resize(&self, images: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = images.dims4()?;
        if (h, w) == (self.height, self.width) {
            return Ok(images.clone());
        }
        resize_by(images, &self.matrices((h, w), images.device())?)
    }

    fn matrices(&self, (h, w): (usize, usize), device: &Device) -> Result<Matrices> {
        let mut kept = self.matrices.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |kept: &Matrices| {
            (kept.down.dims()[0], kept.across.dims()[0]) == (h, w)
                && kept.down.device().same_device(device)
        };
        if let Some(matrices) = kept.as_ref().filter(|kept| fits(kept)) {
            return Ok(matrices.clone());
        }
        let matrices = Matrices {
            down: Resampling::new(h, self.height).matrix(device)?,
            across: Resampling::new(w, self.width).matrix(device)?,
        };
        *kept = Some(matrices.clone());
        Ok(matrices)
    }
}

fn resize_by(images: &Tensor, Matrices { down, across }: &Matrices) -> Result<Tensor> {
    let (n, c, h, w) = images.dims4()?;
    let (height, width) = (down.dim(1)?, across.dim(1)?);
    let rows = images
        .to_dtype(DType::F32)?
        .contiguous()?
        .reshape((n * c * h, w))?
        .matmul(across)?;
    let columns = rows
        .reshape((n * c, h, width))?
        .transpose(1, 2)?
        .contiguous()?;
    let resized = columns.reshape((n * c * width, h))?.matmul(down)?;
    let resized = resized.reshape((n * c, width, height))?.transpose(1, 2)?;
    let resized = resized.contiguous()?.reshape((n, c, height, width))?;
    resized.to_dtype(images.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_of_every_output_sum_to_one_and_stay_within_the_row() {
        for (input, output) in [
            (1, 1),
            (1, 5),
            (32, 224),
            (32, 15),
            (500, 256),
            (7, 3),
            (3, 7),
        ] {
            let resampling = Resampling::new(input, output);
            assert_eq!(resampling.output(), output);
            let part = Resampling::part(input, output, output / 2..output);
            assert!(part.taps().eq(resampling.taps().skip(output / 2)));
            for (first, weights) in resampling.taps() {
                assert!(!weights.is_empty() && first + weights.len() <= input);
                let sum: f64 = weights.iter().sum();
                assert!((sum - 1.0).abs() < 1e-12, "{input} to {output}: {sum}");
            }
        }
    }

    #[test]
    fn doubling_interpolates_between_pixel_centres_and_repeats_the_border() -> Result<()> {
        let row = Tensor::new(&[[[[0f32, 4.0]]]], &Device::Cpu)?;
        let resized = resize_batch(&row, 1, 4)?.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!(resized, [0.0, 1.0, 3.0, 4.0]);
        Ok(())
    }

    #[test]
    fn a_resizer_takes_batches_of_any_size_one_after_the_other() -> Result<()> {
        let resizer = Resizer::new(4, 6);
        for (h, w) in [(2, 3), (5, 7), (2, 3), (4, 6), (2, 7)] {
            let images = Tensor::arange(0f32, (2 * h * w) as f32, &Device::Cpu)?;
            let images = images.reshape((2, 1, h, w))?;
            for _ in 0..2 {
                let found = resizer.resize(&images)?.flatten_all()?.to_vec1::<f32>()?;
                let expected = resize_batch(&images, 4, 6)?.flatten_all()?;
                assert_eq!(found, expected.to_vec1::<f32>()?, "{h}×{w}");
            }
        }
        Ok(())
    }

    #[test]
    fn halving_averages_all_pixels_with_a_triangle() -> Result<()> {
        let row = Tensor::new(&[[[[8f32, 0.0, 0.0, 0.0]]]], &Device::Cpu)?;
        let resized = resize_batch(&row, 1, 2)?.flatten_all()?.to_vec1::<f32>()?;
        // Weights 3, 3, 1 of 7 (the fourth would lie outside), and 1, 3, 3 of 7.
        let expected = [24.0 / 7.0, 0.0];
        for (found, expected) in resized.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{resized:?}");
        }
        Ok(())
    }

    #[test]
    fn height_and_width_are_not_confused() -> Result<()> {
        let images = Tensor::arange(0f32, 24.0, &Device::Cpu)?.reshape((2, 2, 2, 3))?;
        let resized = resize_batch(&images, 4, 3)?;
        assert_eq!(resized.dims(), [2, 2, 4, 3]);
        let first = resized.get(0)?.get(0)?.to_vec2::<f32>()?;
        assert_eq!(first[0], [0.0, 1.0, 2.0]);
        assert_eq!(first[1], [0.75, 1.75, 2.75]);
        assert_eq!(first[3], [3.0, 4.0, 5.0]);
        Ok(())
    }
}
