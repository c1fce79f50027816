//! Features that never change, computed once.
//!
//! They are computed over a set in its own order and in batches of one size, whatever the epoch's
//! order is: so a resumed run, which computes them again, has the same bits.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use cifar_data::ImageSet;

use crate::data::Examples;
use crate::distributed::Together;
use crate::error::{Error, Place, Result};
use crate::execution::InARow;

/// As errors call it.
const COMPUTATION: &str = "the computation of features";

/// Features and labels of the sets that have been asked for.
#[derive(Debug, Default)]
pub(crate) struct FeatureCache(BTreeMap<&'static str, SetFeatures>);

#[derive(Debug)]
struct SetFeatures {
    /// `(images, …)`
    features: Tensor,
    /// `u32`, `(images,)`
    labels: Tensor,
}

impl FeatureCache {
    pub(crate) fn contains(&self, set: &str) -> bool {
        self.0.contains_key(set)
    }

    /// Computes the features of a set from its batches in order; of several processes each computes
    /// a part, which begins at picture `begin`, and gets the others'. `progress` may break off, which
    /// keeps nothing.
    pub(crate) fn fill(
        &mut self,
        (name, set): (&'static str, &Arc<ImageSet>),
        (group, begin): (Together<'_>, usize),
        batches: impl Iterator<Item = Result<Examples>>,
        features: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
        device: &Device,
        progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        let (mut parts, mut done, mut stopped) = (Vec::new(), 0, false);
        let mut in_a_row = InARow::default();
        for (index, batch) in batches.enumerate() {
            let batch = batch?;
            let part = in_a_row.run(batch.count, || features(&batch.inputs));
            let place = Place::Batch {
                batch: index as u64 + 1,
                images: batch.count,
            };
            let part = part.map_err(Error::tensor(COMPUTATION, place))?;
            parts.push(part.detach());
            done += batch.count;
            if progress(done).is_break() {
                stopped = true;
                break;
            }
        }
        if group.any(stopped)? {
            return Ok(ControlFlow::Break(()));
        }
        let features = group.gather_rows(&parts, begin, set.len(), device)?;
        let labels: Vec<u32> = set.labels().iter().map(|&label| label.into()).collect();
        let labels = Tensor::new(labels, device);
        let labels = labels.map_err(Error::tensor(COMPUTATION, Place::Set(name)))?;
        self.0.insert(name, SetFeatures { features, labels });
        Ok(ControlFlow::Continue(()))
    }

    /// Features and labels of a set, where they are there.
    pub(crate) fn set(&self, name: &str) -> Option<(Tensor, Tensor)> {
        let set = self.0.get(name)?;
        Some((set.features.clone(), set.labels.clone()))
    }

    /// Batches of a set in `order`, beginning with batch number `first`; none where its features
    /// are not there.
    pub(crate) fn batches(
        &self,
        set: &str,
        order: Vec<u32>,
        batch_size: usize,
        first: u64,
    ) -> impl Iterator<Item = Result<Examples>> + use<> {
        let cached = self.set(set);
        let count = order.len().div_ceil(batch_size);
        let first = (first as usize).min(count);
        cached.into_iter().flat_map(move |(features, labels)| {
            let order = order.clone();
            (first..count).map(move |index| {
                let end = order.len().min((index + 1) * batch_size);
                let rows = &order[index * batch_size..end];
                let select = || {
                    let rows = Tensor::new(rows, features.device())?;
                    Ok(Examples {
                        inputs: features.index_select(&rows, 0)?,
                        labels: labels.index_select(&rows, 0)?,
                        count: (end - index * batch_size) as u64,
                    })
                };
                let place = Place::Batch {
                    batch: index as u64 + 1,
                    images: (end - index * batch_size) as u64,
                };
                select().map_err(Error::tensor("the selection of features", place))
            })
        })
    }
}
