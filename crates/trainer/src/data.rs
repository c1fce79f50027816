//! The sets a run works on.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use cifar_data::{Batch, Batches, ImageSet, Normalization};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The name of the set that is trained on.
pub(crate) const TRAIN: &str = "train";

/// The sets a run works on. The validation set, where there is one, was split from the training
/// set; decisions are made on it, never on the test set.
#[derive(Debug, Clone)]
pub struct DataSets {
    /// Trained on.
    pub train: Arc<ImageSet>,
    /// Evaluated, to decide on.
    pub validation: Option<Arc<ImageSet>>,
    /// Evaluated, to report.
    pub test: Arc<ImageSet>,
    /// How pixels become the network's inputs.
    pub normalization: Normalization,
}

impl DataSets {
    /// What identifies the sets' content.
    pub fn fingerprints(&self) -> DataFingerprints {
        let of = |set: &Arc<ImageSet>| SetFingerprint {
            images: set.len() as u64,
            sha256: set.fingerprint(),
        };
        DataFingerprints {
            train: of(&self.train),
            validation: self.validation.as_ref().map(of),
            test: of(&self.test),
        }
    }

    /// The set to train on.
    pub(crate) fn trained(&self) -> NamedSet {
        NamedSet {
            name: TRAIN,
            images: self.train.clone(),
        }
    }

    /// The sets to evaluate, validation first.
    pub(crate) fn evaluated(&self) -> Vec<NamedSet> {
        let validation = self.validation.as_ref().map(|set| ("validation", set));
        let sets = validation.into_iter().chain([("test", &self.test)]);
        sets.map(|(name, images)| NamedSet {
            name,
            images: images.clone(),
        })
        .collect()
    }

    pub(crate) fn check_not_empty(&self) -> Result<()> {
        for set in self.evaluated().into_iter().chain([self.trained()]) {
            if set.images.is_empty() {
                return Err(Error::EmptySet { set: set.name });
            }
        }
        Ok(())
    }
}

/// A set, and what errors and reports call it.
#[derive(Debug, Clone)]
pub struct NamedSet {
    /// Such as `test`.
    pub name: &'static str,
    /// Its pictures.
    pub images: Arc<ImageSet>,
}

impl NamedSet {
    /// Batches in `order`, beginning with batch number `first`, made by the host.
    pub(crate) fn batches(
        &self,
        order: Vec<u32>,
        batch_size: usize,
        normalization: Normalization,
        device: &Device,
        first: u64,
    ) -> Result<impl Iterator<Item = Result<Examples>> + use<>> {
        let name = self.name;
        let batches = Batches::new(
            self.images.clone(),
            order,
            batch_size,
            normalization,
            device,
        );
        let batches = batches.map_err(Error::data(name))?;
        let batches = batches.starting_at(first as usize);
        Ok(batches.map(move |batch| batch.map(Examples::from).map_err(Error::data(name))))
    }
}

/// The labels of a set, `u32`, (images,).
pub(crate) fn labels_on(device: &Device, set: &ImageSet) -> candle_core::Result<Tensor> {
    let labels: Vec<u32> = set.labels().iter().map(|&label| label.into()).collect();
    Tensor::new(labels, device)
}

/// What a step works on.
#[derive(Debug)]
pub(crate) struct Examples {
    /// Images `(n, channels, height, width)`, or their features `(n, …)`.
    pub(crate) inputs: Tensor,
    /// `u32`, `(n,)`.
    pub(crate) labels: Tensor,
    pub(crate) count: u64,
}

impl From<Batch> for Examples {
    fn from(batch: Batch) -> Self {
        Self {
            inputs: batch.images,
            labels: batch.labels,
            count: batch.len as u64,
        }
    }
}

/// Size and content hash of each set; recorded by a run and checked when it is resumed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFingerprints {
    /// The training set, after limits and the split.
    pub train: SetFingerprint,
    /// The validation set.
    pub validation: Option<SetFingerprint>,
    /// The test set.
    pub test: SetFingerprint,
}

/// Size and content hash of a set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetFingerprint {
    /// Number of images.
    pub images: u64,
    /// Hash of pixels and labels.
    pub sha256: String,
}

impl DataFingerprints {
    /// Compares what a run recorded with what is there now.
    pub(crate) fn check(&self, found: &Self) -> Result<()> {
        let pairs = [
            ("train", Some(&self.train), Some(&found.train)),
            (
                "validation",
                self.validation.as_ref(),
                found.validation.as_ref(),
            ),
            ("test", Some(&self.test), Some(&found.test)),
        ];
        for (set, recorded, found) in pairs {
            if recorded != found {
                let describe = |fingerprint: Option<&SetFingerprint>| match fingerprint {
                    None => "none".to_string(),
                    Some(f) => format!("{:.12}… of {} images", f.sha256, f.images),
                };
                return Err(Error::DataChanged {
                    set,
                    found: describe(found),
                    recorded: describe(recorded),
                });
            }
        }
        Ok(())
    }
}
