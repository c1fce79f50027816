//! Weights as the tiles read them, kept while they stay the same.
//!
//! Training changes every weight in every step, and laying them out anew costs
//! a few percent of it. Where nobody needs a gradient (evaluation, a frozen
//! backbone) the same weights come again and again, and over small maps laying
//! them out is a good part of the work. Candle does not tell when a tensor was
//! written to, so each time the weights' fingerprint is taken: one pass over
//! them, where comparing them with a copy reads twice as much. For one picture
//! that is a tenth of all time. Two different weights have the same
//! fingerprint with a probability of about 2⁻¹²⁸.

use std::any::Any;
use std::slice::Chunks;
use std::sync::{Arc, Mutex, MutexGuard};

use rayon::prelude::*;

use twox_hash::XxHash3_128;

use super::winograd;
use crate::conv2d::PackedWeight;
use crate::element::Element;
use crate::simd::Isa;

/// A convolution's weight, ready for the tiles.
pub(super) struct Packed<T> {
    isa: Isa,
    pub(super) direct: PackedWeight<T>,
    /// The weight for Winograd's products, if it was asked for.
    pub(super) transformed: Option<PackedWeight<T>>,
}

/// What decides how a weight is laid out.
pub(super) struct Wanted<'a, T> {
    /// (K, C, R, S).
    pub(super) weight: &'a [T],
    /// A factor for each output channel, or none.
    pub(super) scale: &'a [T],
    /// R·S, K, C.
    pub(super) shape: (usize, usize, usize),
    pub(super) winograd: bool,
    pub(super) isa: Isa,
}

impl<'a, T: Element> Wanted<'a, T> {
    /// Lays it out, in memory of about the asked length that `memory` gives.
    pub(super) fn pack(&self, memory: impl Fn(usize) -> Vec<T>) -> Packed<T> {
        let kernels = T::kernels(self.isa);
        let (taps, c_out, c_in) = self.shape;
        let len = c_out.next_multiple_of(kernels.lanes) * taps * c_in;
        let mut direct = PackedWeight::new(self.weight, self.shape, kernels, memory(len));
        if !self.scale.is_empty() {
            direct.scale(self.scale);
        }
        Packed {
            isa: self.isa,
            transformed: self
                .winograd
                .then(|| winograd::transform_weight(self.isa, &direct, memory(4 * len))),
            direct,
        }
    }

    /// The values that decide what comes out, in parts that are worth a task.
    fn parts(&self) -> [Chunks<'a, T>; 2] {
        const ELEMENTS: usize = 1 << 15;
        [self.weight, self.scale].map(|values| values.chunks(ELEMENTS))
    }

    /// Whether `packed` is laid out as is wanted, whatever its values.
    fn has_layout_of(&self, packed: &Packed<T>) -> bool {
        packed.isa == self.isa && packed.transformed.is_some() == self.winograd
    }
}

/// What a weight and its scale are known by, in parts of equal lengths.
#[derive(Clone, PartialEq)]
struct Fingerprint {
    elements: [usize; 2],
    parts: Vec<u128>,
}

/// The fingerprint of each weight; one parallel loop for all.
fn fingerprints<T: Element>(wanted: &[Wanted<'_, T>]) -> Vec<Fingerprint> {
    let hashes: Vec<u128> = wanted
        .iter()
        .flat_map(|wanted| wanted.parts().into_iter().flatten())
        .collect::<Vec<_>>()
        .into_par_iter()
        .map(|values| XxHash3_128::oneshot(bytemuck::cast_slice(values)))
        .collect();
    let mut hashes = hashes.into_iter();
    let fingerprint = |wanted: &Wanted<'_, T>| {
        let count = wanted.parts().iter().map(ExactSizeIterator::len).sum();
        Fingerprint {
            elements: [wanted.weight.len(), wanted.scale.len()],
            parts: hashes.by_ref().take(count).collect(),
        }
    };
    wanted.iter().map(fingerprint).collect()
}

/// What is kept of a convolution.
#[derive(Clone)]
struct Entry {
    of: Fingerprint,
    /// [`Packed`] of some type.
    packed: Arc<dyn Any + Send + Sync>,
}

/// What is kept of each convolution.
#[derive(Default)]
pub(super) struct WeightCache(Mutex<Vec<Entry>>);

impl std::fmt::Debug for WeightCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WeightCache")
    }
}

impl WeightCache {
    /// What is wanted of each convolution: what is kept of it, or a new one, which is kept then.
    pub(super) fn all<T: Element>(&self, wanted: &[Wanted<'_, T>]) -> Vec<Arc<Packed<T>>> {
        let fingerprints = fingerprints(wanted);
        let mut kept: Vec<Option<Entry>> = self.lock().iter().cloned().map(Some).collect();
        kept.resize(wanted.len(), None);
        let packed: Vec<Arc<Packed<T>>> = kept
            .into_par_iter()
            .zip(&fingerprints)
            .zip(wanted)
            .map(|((kept, fingerprint), wanted)| {
                kept.filter(|kept| kept.of == *fingerprint)
                    .and_then(|kept| kept.packed.downcast::<Packed<T>>().ok())
                    .filter(|packed| wanted.has_layout_of(packed))
                    .unwrap_or_else(|| Arc::new(wanted.pack(|_| Vec::new())))
            })
            .collect();
        let entries = fingerprints.into_iter().zip(&packed);
        *self.lock() = entries
            .map(|(of, packed)| Entry {
                of,
                packed: packed.clone(),
            })
            .collect();
        packed
    }

    /// Replaced whole, so that a poisoned lock has nothing half-written behind it.
    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Frees everything: weights that train never come again.
    pub(super) fn clear(&self) {
        self.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::Element;

    fn wanted<'a, T: Element>(weight: &'a [T], scale: &'a [T], isa: Isa) -> Wanted<'a, T> {
        Wanted {
            weight,
            scale,
            shape: (9, 64, weight.len() / (9 * 64)),
            winograd: false,
            isa,
        }
    }

    #[test]
    fn a_weight_is_laid_out_again_when_any_of_its_values_changes_and_only_then() {
        let isa = Isa::detect();
        let values = |len: usize| (0..len).map(|i| (i % 1009) as f32).collect::<Vec<_>>();
        // The second has three parts.
        let (small, mut large) = (values(9 * 64), values(9 * 64 * 128));
        let mut scale = vec![1.0; 64];
        let kept = WeightCache::default();
        let mut last: Option<Vec<Arc<Packed<f32>>>> = None;
        let mut ask = |large: &[f32], scale: &[f32]| {
            let both = [wanted(&small, &[], isa), wanted(large, scale, isa)];
            let packed = kept.all(&both);
            for (packed, wanted) in packed.iter().zip(&both) {
                let fresh = wanted.pack(|_| Vec::new());
                assert!(packed.direct.data == fresh.direct.data);
            }
            let same = last.replace(packed.clone()).map(|last| {
                let pairs = last.iter().zip(&packed);
                pairs.map(|(a, b)| Arc::ptr_eq(a, b)).collect::<Vec<_>>()
            });
            same.unwrap_or_default()
        };
        assert!(ask(&large, &scale).is_empty());
        assert_eq!(ask(&large, &scale), [true, true]);
        for at in [0, (1 << 15) - 1, 1 << 15, large.len() - 1] {
            large[at] += 1.0;
            assert_eq!(ask(&large, &scale), [true, false], "{at}");
            assert_eq!(ask(&large, &scale), [true, true], "{at}");
        }
        scale[63] = 2.0;
        assert_eq!(ask(&large, &scale), [true, false]);
        assert_eq!(ask(&large, &[]), [true, false]);
        assert_eq!(ask(&large, &[]), [true, true]);
    }

    #[test]
    fn what_is_kept_in_another_type_or_number_or_for_another_path_is_not_taken() {
        let isa = Isa::detect();
        let (f32s, f64s) = (vec![1f32; 9 * 64], vec![1f64; 9 * 64]);
        let kept = WeightCache::default();
        let first = kept.all(&[wanted(&f32s, &[], isa)]);
        assert_eq!(kept.all(&[wanted(&f64s, &[], isa)]).len(), 1);
        let second = kept.all(&[wanted(&f32s, &[], isa), wanted(&f32s, &[], isa)]);
        assert!(second.len() == 2 && !Arc::ptr_eq(&first[0], &second[0]));
        let winograd = Wanted {
            winograd: true,
            ..wanted(&f32s, &[], isa)
        };
        let third = kept.all(&[wanted(&f32s, &[], isa), winograd]);
        assert!(Arc::ptr_eq(&second[0], &third[0]) && third[1].transformed.is_some());
        kept.clear();
        let fourth = kept.all(&[wanted(&f32s, &[], isa)]);
        assert!(!Arc::ptr_eq(&fourth[0], &third[0]));
    }
}
