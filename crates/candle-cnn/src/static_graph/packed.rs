//! Weights as the tiles read them, kept while they stay the same.
//!
//! Training changes every weight in every step, and laying them out anew costs
//! a few percent of it. Where nobody needs a gradient (evaluation, a frozen
//! backbone) the same weights come again and again, and over small maps laying
//! them out is a good part of the work. Candle does not tell when a tensor was
//! written to, so what is kept is compared with what is given, value by value:
//! a pass over memory, as cheap as it gets.

use std::any::Any;
use std::sync::{Arc, Mutex};

use rayon::prelude::*;

use super::winograd;
use crate::conv2d::PackedWeight;
use crate::element::Element;
use crate::simd::{Isa, multiversion};

/// A convolution's weight, ready for the tiles.
pub(super) struct Packed<T> {
    /// What it was made from.
    weight: Vec<T>,
    scale: Vec<T>,
    isa: Isa,
    pub(super) direct: PackedWeight<T>,
    /// Winograd's, if that was asked for.
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

impl<T: Element> Wanted<'_, T> {
    /// Lays it out, in memory of about the asked length that `memory` gives.
    pub(super) fn pack(&self, keep: bool, memory: impl Fn(usize) -> Vec<T>) -> Packed<T> {
        let kernels = T::kernels(self.isa);
        let (taps, c_out, c_in) = self.shape;
        let len = c_out.next_multiple_of(kernels.lanes) * taps * c_in;
        let mut direct = PackedWeight::new(self.weight, self.shape, kernels, memory(len));
        if !self.scale.is_empty() {
            direct.scale(self.scale);
        }
        let copy = |values: &[T]| if keep { values.to_vec() } else { Vec::new() };
        Packed {
            weight: copy(self.weight),
            scale: copy(self.scale),
            isa: self.isa,
            transformed: self
                .winograd
                .then(|| winograd::transform_weight(self.isa, &direct, memory(4 * len))),
            direct,
        }
    }

    /// The pairs of equally long slices that must be equal for `packed` to be what is wanted; none
    /// if it cannot be.
    fn pairs<'a>(&'a self, packed: &'a Packed<T>) -> Option<[(&'a [T], &'a [T]); 2]> {
        let pairs = [
            (packed.scale.as_slice(), self.scale),
            (packed.weight.as_slice(), self.weight),
        ];
        let fits = packed.isa == self.isa
            && packed.transformed.is_some() == self.winograd
            && pairs.iter().all(|(a, b)| a.len() == b.len());
        fits.then_some(pairs)
    }
}

/// Whether each of what is `kept` is what is wanted. One parallel loop for all.
fn are_wanted<T: Element>(wanted: &[Wanted<'_, T>], kept: &[Option<Arc<Packed<T>>>]) -> Vec<bool> {
    /// Elements that are worth a task.
    const CHUNK: usize = 1 << 15;
    let mut equal = Vec::with_capacity(wanted.len());
    let mut chunks = Vec::new();
    for (index, (wanted, kept)) in wanted.iter().zip(kept).enumerate() {
        let pairs = kept.as_deref().and_then(|kept| wanted.pairs(kept));
        equal.push(pairs.is_some());
        for (a, b) in pairs.into_iter().flatten() {
            let parts = a.chunks(CHUNK).zip(b.chunks(CHUNK));
            chunks.extend(parts.map(|(a, b)| (index, wanted.isa, a, b)));
        }
    }
    let different: Vec<usize> = chunks
        .into_par_iter()
        .filter(|&(_, isa, a, b)| !same(isa, a, b))
        .map(|(index, ..)| index)
        .collect();
    for index in different {
        equal[index] = false;
    }
    equal
}

multiversion! {
    /// Without a way out at the first difference, so that the compiler takes many values at once.
    fn same<T: Element>(a: &[T], b: &[T]) -> bool = same_body
}

#[inline(always)]
fn same_body<T: Element>(a: &[T], b: &[T]) -> bool {
    a.iter()
        .zip(b)
        .fold(0u32, |differences, (a, b)| differences | u32::from(a != b))
        == 0
}

/// What is kept of each convolution.
#[derive(Default)]
pub(super) struct Kept(Mutex<Vec<Arc<dyn Any + Send + Sync>>>);

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kept")
    }
}

impl Kept {
    /// What is wanted of each convolution: what is kept of it, or a new one, which is kept then.
    pub(super) fn all<T: Element>(&self, wanted: &[Wanted<'_, T>]) -> Vec<Arc<Packed<T>>> {
        let lock = || {
            // Replaced whole.
            self.0
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner())
        };
        let all = lock().clone();
        let mut kept: Vec<Option<Arc<Packed<T>>>> = all
            .into_iter()
            .map(|packed| packed.downcast::<Packed<T>>().ok())
            .collect();
        kept.resize(wanted.len(), None);
        let is_wanted = are_wanted(wanted, &kept);
        if is_wanted.iter().all(|&is| is) {
            return kept.into_iter().flatten().collect();
        }
        let packed: Vec<Arc<Packed<T>>> = kept
            .into_par_iter()
            .zip(is_wanted)
            .zip(wanted)
            .map(|((kept, is_wanted), wanted)| {
                let kept = kept.filter(|_| is_wanted);
                kept.unwrap_or_else(|| Arc::new(wanted.pack(true, |_| Vec::new())))
            })
            .collect();
        *lock() = packed.iter().map(|packed| packed.clone() as _).collect();
        packed
    }

    /// Frees everything: weights that train never come again.
    pub(super) fn clear(&self) {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clear();
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
        // The second is compared in three parts.
        let (small, mut large) = (values(9 * 64), values(9 * 64 * 128));
        let mut scale = vec![1.0; 64];
        let kept = Kept::default();
        let mut last: Option<Vec<Arc<Packed<f32>>>> = None;
        let mut ask = |large: &[f32], scale: &[f32]| {
            let both = [wanted(&small, &[], isa), wanted(large, scale, isa)];
            let packed = kept.all(&both);
            for (packed, wanted) in packed.iter().zip(&both) {
                let fresh = wanted.pack(false, |_| Vec::new());
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
        let kept = Kept::default();
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
