//! A set of pictures, or of their features, in the memory of the device.

use candle_core::{D, DType, Device, Result, Tensor};
use cifar_data::{ImageSet, Normalization, SIDE};

use crate::data::{Examples, labels_on};
use crate::features::SetFeatures;

/// A set on the device, of which batches are gathered there.
#[derive(Debug)]
pub(crate) struct ResidentSet {
    inputs: Inputs,
    /// `u32`, (images,)
    labels: Tensor,
}

#[derive(Debug)]
enum Inputs {
    /// Features, taken as they are.
    Features(Tensor),
    Pictures {
        /// `u8`, (images, 3, 32, 32)
        bytes: Tensor,
        /// `scale` as the kernel takes it.
        #[cfg(feature = "cuda")]
        normalization: Normalization,
        scale: Scale,
        dtype: DType,
    },
}

/// A [`Normalization`] on the device.
#[derive(Debug)]
struct Scale {
    /// 255
    full: Tensor,
    /// (1, 3, 1, 1)
    mean: Tensor,
    /// (1, 3, 1, 1)
    std: Tensor,
}

impl ResidentSet {
    /// Uploads a set. Batches of it are normalised, then rounded to `dtype`.
    pub(crate) fn upload(
        set: &ImageSet,
        normalization: Normalization,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let shape = (set.len(), 3, SIDE, SIDE);
        let per_channel = |values| Tensor::new(values, device)?.reshape((1, 3, 1, 1));
        Ok(Self {
            inputs: Inputs::Pictures {
                bytes: Tensor::from_slice(set.pixels(), shape, device)?,
                scale: Scale {
                    full: Tensor::new(&[255f32], device)?.reshape((1, 1, 1, 1))?,
                    mean: per_channel(&normalization.mean)?,
                    std: per_channel(&normalization.std)?,
                },
                #[cfg(feature = "cuda")]
                normalization,
                dtype,
            },
            labels: labels_on(device, set)?,
        })
    }

    /// A set of features that are on the device already.
    pub(crate) fn of_features(set: &SetFeatures) -> Self {
        Self {
            inputs: Inputs::Features(set.features.clone()),
            labels: set.labels.clone(),
        }
    }

    /// What lies at `indices` (`u32`, (n,), on the device), the values that [`cifar_data::Batches`] gives. The host does not wait
    /// for them.
    pub(crate) fn batch(&self, indices: &Tensor) -> Result<Examples> {
        let inputs = match &self.inputs {
            Inputs::Features(features) => features.index_select(indices, 0)?,
            #[cfg(feature = "cuda")]
            Inputs::Pictures {
                bytes,
                normalization: Normalization { mean, std },
                dtype,
                ..
            } if bytes.device().is_cuda() => {
                candle_cnn::cuda::gather_normalized(bytes, indices, *mean, *std, *dtype)?
            }
            Inputs::Pictures {
                bytes,
                scale,
                dtype,
                ..
            } => scale
                .normalized(&bytes.index_select(indices, 0)?)?
                .to_dtype(*dtype)?,
        };
        Ok(Examples {
            inputs,
            labels: self.labels.index_select(indices, 0)?,
            count: indices.elem_count() as u64,
        })
    }
}

impl Scale {
    /// `(x / 255 − mean) / std`, rounded after each operation as on the CPU.
    fn normalized(&self, bytes: &Tensor) -> Result<Tensor> {
        bytes
            .to_dtype(DType::F32)?
            .broadcast_div(&self.full)?
            .broadcast_sub(&self.mean)?
            .broadcast_div(&self.std)
    }
}

/// Rows of `logits` (n, classes) whose largest value stands at the label, as one f32 (1,). The host
/// does not wait for it.
pub(crate) fn correct_on_device(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda() {
        return candle_cnn::cuda::count_correct(&logits.detach(), labels);
    }
    let answers = logits.detach().to_dtype(DType::F32)?.argmax(D::Minus1)?;
    let right = answers.eq(labels)?.to_dtype(DType::F32)?;
    right.sum_all()?.reshape(1)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cifar_data::{Batches, Split, shapes};

    use super::*;

    #[test]
    fn batches_gathered_on_the_device_are_those_made_by_the_host_to_the_bit() {
        let set = Arc::new(shapes::generate(5, Split::Train, 11));
        let normalization = Normalization {
            mean: [0.4914, 0.4822, 0.4465],
            std: [0.2470, 0.2435, 0.2616],
        };
        let order = vec![9u32, 3, 3, 0, 7, 1, 10];
        let device = &Device::Cpu;
        let resident = ResidentSet::upload(&set, normalization, DType::F32, device).unwrap();
        let host = Batches::new(set, order.clone(), 3, normalization, device).unwrap();
        let bits = |images: &Tensor| -> Vec<u32> {
            let values = images.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values.into_iter().map(f32::to_bits).collect()
        };
        for (expected, rows) in host.zip(order.chunks(3)) {
            let expected = expected.unwrap();
            let batch = resident.batch(&Tensor::new(rows, device).unwrap()).unwrap();
            assert_eq!(batch.inputs.dims(), expected.images.dims());
            assert_eq!(bits(&batch.inputs), bits(&expected.images));
            assert_eq!(batch.count, expected.len as u64);
            let labels = batch.labels.to_vec1::<u32>().unwrap();
            assert_eq!(labels, expected.labels.to_vec1::<u32>().unwrap());
        }
    }

    #[test]
    fn answers_are_counted_as_the_host_counts_them() {
        let device = &Device::Cpu;
        let logits = [[0f32, 2., 2.], [1., 0., 3.], [5., 5., 5.], [0., 0., 1.]];
        let logits = Tensor::new(&logits, device).unwrap();
        let labels = Tensor::new(&[1u32, 0, 0, 2], device).unwrap();
        let counted = correct_on_device(&logits, &labels).unwrap();
        assert_eq!(counted.to_vec1::<f32>().unwrap(), [3.0]);
    }
}
