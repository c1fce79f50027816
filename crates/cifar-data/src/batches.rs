//! Batches of normalised tensors, prepared ahead of the step that uses them.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use candle_core::{Device, Tensor};

use crate::{DataError, IMAGE_BYTES, ImageSet, SIDE};

/// Pictures and labels of one step.
#[derive(Clone, Debug)]
pub struct Batch {
    /// `f32`, (n, 3, 32, 32), normalised.
    pub images: Tensor,
    /// `u32`, (n,).
    pub labels: Tensor,
    /// n: the batch size, less in the last batch if the set is no multiple of it.
    pub len: usize,
}

/// Per channel (red, green, blue): a byte `x` becomes `(x / 255 − mean) / std`, computed in `f32`
/// in this order, as torchvision's `ToTensor` and `Normalize` do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalization {
    /// Subtracted from `x / 255`.
    pub mean: [f32; 3],
    /// Divides the difference.
    pub std: [f32; 3],
}

impl Normalization {
    /// Mean 0.5 and standard deviation 0.5: the range becomes −1 to 1. The lesson's choice.
    pub const HALF: Self = Self {
        mean: [0.5; 3],
        std: [0.5; 3],
    };

    /// The value of byte `x` in `channel` (0 red, 1 green, 2 blue).
    ///
    /// # Panics
    /// If `channel` exceeds 2.
    pub fn apply(&self, channel: usize, x: u8) -> f32 {
        (f32::from(x) / 255.0 - self.mean[channel]) / self.std[channel]
    }

    /// All values, so that a pixel costs one look-up: `table[channel][x]`.
    fn table(&self) -> Result<[[f32; 256]; 3], DataError> {
        for channel in 0..3 {
            let (mean, std) = (self.mean[channel], self.std[channel]);
            if !(mean.is_finite() && std.is_finite() && std > 0.0) {
                return Err(DataError::Normalization { channel, mean, std });
            }
        }
        Ok(std::array::from_fn(|channel| {
            std::array::from_fn(|x| self.apply(channel, x as u8))
        }))
    }
}

/// An iterator over batches of a set in a given order; the last, partial batch is included.
///
/// A thread prepares batches ahead of the one in use, at most [`AHEAD`](Self::AHEAD) of them. It
/// starts with the first call of `next` and ends with the last batch or when this is dropped.
/// Batches do not depend on timing: the same set, order and size give the same batches.
pub struct Batches {
    set: Arc<ImageSet>,
    order: Arc<[u32]>,
    batch_size: usize,
    table: Arc<[[f32; 256]; 3]>,
    device: Device,
    /// The next batch to give out.
    next: usize,
    worker: Option<Worker>,
}

impl Batches {
    /// Batches that wait, ready, while another is in use. One would do if every step took the same
    /// time; the second evens out the others.
    pub const AHEAD: usize = 2;

    /// Batches of `batch_size` pictures of `set`, in the order of the indices in `order` (which
    /// may be a part of the set, and may repeat), as tensors on `device`.
    ///
    /// # Errors
    /// [`DataError::BatchSize`] if `batch_size` is 0, [`DataError::Order`] for an index that is
    /// not in the set, [`DataError::Normalization`] unless `normalization` is finite with std > 0.
    pub fn new(
        set: Arc<ImageSet>,
        order: Vec<u32>,
        batch_size: usize,
        normalization: Normalization,
        device: &Device,
    ) -> Result<Self, DataError> {
        if batch_size == 0 {
            return Err(DataError::BatchSize);
        }
        let len = set.len();
        if let Some(position) = order.iter().position(|&index| index as usize >= len) {
            return Err(DataError::Order {
                position,
                found: order[position],
                len,
            });
        }
        Ok(Self {
            table: Arc::new(normalization.table()?),
            set,
            order: order.into(),
            batch_size,
            device: device.clone(),
            next: 0,
            worker: None,
        })
    }

    /// Continues at batch `first_batch` (counted from 0), as a run does that was stopped in the
    /// middle of an epoch. Beyond the last batch nothing is left.
    pub fn starting_at(mut self, first_batch: usize) -> Self {
        self.worker = None;
        self.next = first_batch;
        self
    }

    /// Number of batches from the first of the epoch, whatever was given out already.
    pub fn batches_per_epoch(&self) -> usize {
        self.order.len().div_ceil(self.batch_size)
    }

    fn start_worker(&self) -> Result<Worker, DataError> {
        let (sender, batches) = sync_channel(Self::AHEAD - 1);
        let (set, order, table) = (self.set.clone(), self.order.clone(), self.table.clone());
        let (batch_size, first) = (self.batch_size, self.next);
        let thread = std::thread::Builder::new()
            .name("cifar-batches".to_owned())
            .spawn(move || {
                for indices in order.chunks(batch_size).skip(first) {
                    // Nobody receives any more: the iterator was dropped.
                    if sender.send(prepare(&set, indices, &table)).is_err() {
                        break;
                    }
                }
            })
            .map_err(DataError::Thread)?;
        Ok(Worker {
            batches: Some(batches),
            thread: Some(thread),
        })
    }

    fn next_batch(&mut self) -> Result<Batch, DataError> {
        if self.worker.is_none() {
            self.worker = Some(self.start_worker()?);
        }
        let ended = DataError::ThreadEnded { batch: self.next };
        let batch = self
            .worker
            .as_ref()
            .and_then(|worker| worker.batches.as_ref()?.recv().ok())
            .ok_or(ended)??;
        // On the caller's thread: a device sees its copies in the order of the steps.
        Ok(Batch {
            images: batch.images.to_device(&self.device)?,
            labels: batch.labels.to_device(&self.device)?,
            len: batch.len,
        })
    }
}

impl Iterator for Batches {
    type Item = Result<Batch, DataError>;

    /// The next batch; after an error, nothing.
    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.batches_per_epoch() {
            return None;
        }
        let batch = self.next_batch();
        self.next = match batch {
            Ok(_) => self.next + 1,
            Err(_) => usize::MAX,
        };
        Some(batch)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.batches_per_epoch().saturating_sub(self.next);
        (left, Some(left))
    }
}

impl ExactSizeIterator for Batches {}
impl std::iter::FusedIterator for Batches {}

impl std::fmt::Debug for Batches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batches")
            .field("set", &self.set)
            .field("order_len", &self.order.len())
            .field("batch_size", &self.batch_size)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

/// The thread and its channel. Dropping it ends the thread.
struct Worker {
    batches: Option<Receiver<Result<Batch, DataError>>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        // First the receiver: a thread that waits for room in the channel wakes up with an error.
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was already reported as `ThreadEnded`.
            let _ = thread.join();
        }
    }
}

fn prepare(set: &ImageSet, indices: &[u32], table: &[[f32; 256]; 3]) -> Result<Batch, DataError> {
    let len = indices.len();
    let mut values = Vec::with_capacity(len * IMAGE_BYTES);
    for &index in indices {
        let channels = set.image(index as usize).chunks_exact(SIDE * SIDE);
        for (channel, table) in channels.zip(table) {
            values.extend(channel.iter().map(|&x| table[usize::from(x)]));
        }
    }
    let labels = indices
        .iter()
        .map(|&index| u32::from(set.label(index as usize)))
        .collect();
    Ok(Batch {
        images: Tensor::from_vec(values, (len, 3, SIDE, SIDE), &Device::Cpu)?,
        labels: Tensor::from_vec(labels, len, &Device::Cpu)?,
        len,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shapes::{self, Split};

    fn batches(n: usize, order: Vec<u32>, batch_size: usize) -> Batches {
        let set = Arc::new(shapes::generate(5, Split::Train, n));
        Batches::new(set, order, batch_size, Normalization::HALF, &Device::Cpu).unwrap()
    }

    /// The bits of each batch's images, and its labels.
    fn contents(batches: Batches) -> Vec<(Vec<u32>, Vec<u32>)> {
        batches
            .map(|batch| {
                let batch = batch.unwrap();
                let images = batch
                    .images
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<f32>()
                    .unwrap();
                let labels = batch.labels.to_vec1::<u32>().unwrap();
                (images.into_iter().map(f32::to_bits).collect(), labels)
            })
            .collect()
    }

    #[test]
    fn values_are_normalised_exactly() {
        let pixels = (0..IMAGE_BYTES).map(|i| (i % 256) as u8).collect();
        let set = Arc::new(ImageSet::new(pixels, vec![4]).unwrap());
        let per_channel = Normalization {
            mean: [0.4914, 0.4822, 0.4465],
            std: [0.2470, 0.2435, 0.2616],
        };
        for normalization in [Normalization::HALF, per_channel] {
            let mut batches =
                Batches::new(set.clone(), vec![0], 1, normalization, &Device::Cpu).unwrap();
            let images = batches.next().unwrap().unwrap().images;
            let values = images.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (i, value) in values.into_iter().enumerate() {
                let channel = i / 1024;
                let x = (i % 256) as f32;
                let expected =
                    (x / 255.0 - normalization.mean[channel]) / normalization.std[channel];
                assert_eq!(value.to_bits(), expected.to_bits(), "byte {i}");
            }
        }
        assert_eq!(Normalization::HALF.apply(0, 0), -1.0);
        assert_eq!(Normalization::HALF.apply(2, 255), 1.0);
    }

    #[test]
    fn batches_follow_the_order_and_include_the_last_partial_one() {
        let set = shapes::generate(5, Split::Train, 10);
        let order = vec![9, 3, 3, 0, 7, 1, 2];
        let all = contents(batches(10, order.clone(), 3));
        assert_eq!(all.iter().map(|b| b.1.len()).collect::<Vec<_>>(), [3, 3, 1]);
        let labels: Vec<u32> = all.iter().flat_map(|b| b.1.clone()).collect();
        let values: Vec<u32> = all.into_iter().flat_map(|b| b.0).collect();
        for (position, &index) in order.iter().enumerate() {
            assert_eq!(labels[position], u32::from(set.label(index as usize)));
            let image = &values[position * IMAGE_BYTES..][..IMAGE_BYTES];
            let expected = set.image(index as usize).iter().enumerate();
            for (i, &x) in expected {
                let value = Normalization::HALF.apply(i / 1024, x);
                assert_eq!(image[i], value.to_bits(), "picture {index}, byte {i}");
            }
        }
    }

    #[test]
    fn starting_at_a_batch_gives_what_skipping_to_it_gives() {
        let order: Vec<u32> = (0..10).rev().collect();
        let all = contents(batches(10, order.clone(), 4));
        assert_eq!(all.len(), 3);
        for first in 0..=4 {
            let batches = batches(10, order.clone(), 4).starting_at(first);
            assert_eq!(batches.len(), 3usize.saturating_sub(first));
            assert_eq!(contents(batches), all[first.min(3)..]);
        }
        // also when batches were already given out
        let mut begun = batches(10, order, 4);
        begun.next().unwrap().unwrap();
        assert_eq!(contents(begun.starting_at(2)), all[2..]);
    }

    #[test]
    fn a_dropped_iterator_ends_its_thread() {
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for taken in 0..4 {
                let mut batches = batches(100, (0..100).collect(), 1);
                let set = batches.set.clone();
                for _ in 0..taken {
                    batches.next().unwrap().unwrap();
                }
                drop(batches);
                // The thread holds the set as long as it runs.
                assert_eq!(Arc::strong_count(&set), 1);
            }
            done.send(()).unwrap();
        });
        ended
            .recv_timeout(std::time::Duration::from_secs(60))
            .expect("dropping must not hang");
    }

    #[test]
    fn an_empty_order_has_no_batch() {
        assert!(batches(3, Vec::new(), 2).next().is_none());
    }

    #[test]
    fn bad_arguments_are_errors() {
        let set = Arc::new(shapes::generate(5, Split::Train, 2));
        let make = |order, size, normalization| {
            Batches::new(set.clone(), order, size, normalization, &Device::Cpu)
                .unwrap_err()
                .to_string()
        };
        let half = Normalization::HALF;
        assert_eq!(
            make(vec![0], 0, half),
            "the batch size is 0, expected at least 1"
        );
        assert_eq!(
            make(vec![0, 2], 1, half),
            "position 1 of the order names picture 2, but there are only 2"
        );
        let flat = Normalization {
            std: [0.5, 0.0, 0.5],
            ..half
        };
        assert_eq!(
            make(vec![0], 1, flat),
            "normalisation of channel 1: mean 0.5, std 0; expected finite numbers and std > 0"
        );
    }
}
