//! Features that never change, computed once.
//!
//! They are computed over a set in its own order and in batches of one size, whatever the epoch's
//! order is: so a resumed run, which computes them again, has the same bits.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use candle_core::{Device, Tensor};

use crate::data::{Examples, NamedSet, labels_on};
use crate::error::{Error, Place, Result};
use crate::execution::LargestBatch;

/// As errors call it.
const COMPUTATION: &str = "the computation of features";

/// Features and labels of the sets that have been asked for, by the sets' names.
#[derive(Debug, Default)]
pub(crate) struct FeatureCache(BTreeMap<&'static str, SetFeatures>);

impl FeatureCache {
    pub(crate) fn get(&self, set: &str) -> Option<&SetFeatures> {
        self.0.get(set)
    }

    /// Keeps `features` of all pictures of `set`.
    pub(crate) fn insert(
        &mut self,
        set: &NamedSet,
        features: Tensor,
        device: &Device,
    ) -> Result<()> {
        let labels = labels_on(device, &set.images);
        let labels = labels.map_err(Error::tensor(COMPUTATION, Place::Set(set.name)))?;
        self.0.insert(set.name, SetFeatures { features, labels });
        Ok(())
    }
}

/// The features of `batches`, a tensor for each. `progress` hears how many images are done and may break off, which gives None.
pub(crate) fn compute(
    batches: impl Iterator<Item = Result<Examples>>,
    features: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<Option<Vec<Tensor>>> {
    let (mut parts, mut done, mut largest) = (Vec::new(), 0, LargestBatch::default());
    for (index, batch) in batches.enumerate() {
        let batch = batch?;
        let part = largest.run(batch.count, || features(&batch.inputs));
        let place = Place::Batch {
            batch: index as u64 + 1,
            images: batch.count,
        };
        let part = part.map_err(Error::tensor(COMPUTATION, place))?;
        parts.push(part.detach());
        done += batch.count;
        if progress(done).is_break() {
            return Ok(None);
        }
    }
    Ok(Some(parts))
}

/// The features of a set and its labels.
#[derive(Debug, Clone)]
pub(crate) struct SetFeatures {
    /// `(images, …)`
    pub(crate) features: Tensor,
    /// `u32`, `(images,)`
    pub(crate) labels: Tensor,
}

impl SetFeatures {
    /// Batches in `order`, beginning with batch number `first`.
    pub(crate) fn batches(
        &self,
        order: Vec<u32>,
        batch_size: usize,
        first: u64,
    ) -> impl Iterator<Item = Result<Examples>> + use<> {
        let set = self.clone();
        let count = order.len().div_ceil(batch_size);
        (first as usize..count).map(move |index| {
            let end = order.len().min((index + 1) * batch_size);
            let rows = &order[index * batch_size..end];
            let count = rows.len() as u64;
            let select = || {
                let rows = Tensor::new(rows, set.features.device())?;
                Ok(Examples {
                    inputs: set.features.index_select(&rows, 0)?,
                    labels: set.labels.index_select(&rows, 0)?,
                    count,
                })
            };
            let place = Place::Batch {
                batch: index as u64 + 1,
                images: count,
            };
            select().map_err(Error::tensor("the selection of features", place))
        })
    }
}
