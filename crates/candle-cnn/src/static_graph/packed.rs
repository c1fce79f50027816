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

    fn is(&self, packed: &Packed<T>) -> bool {
        packed.isa == self.isa
            && packed.transformed.is_some() == self.winograd
            && equal(self.isa, &packed.scale, self.scale)
            && equal(self.isa, &packed.weight, self.weight)
    }
}

fn equal<T: Element>(isa: Isa, a: &[T], b: &[T]) -> bool {
    /// Elements that are worth a task.
    const CHUNK: usize = 1 << 15;
    if a.len() <= CHUNK {
        return a.len() == b.len() && same(isa, a, b);
    }
    let chunks = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK));
    a.len() == b.len() && chunks.all(|(a, b)| same(isa, a, b))
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
pub(super) struct Kept(Mutex<Vec<Option<Arc<dyn Any + Send + Sync>>>>);

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kept")
    }
}

impl Kept {
    /// The kept one of convolution `index`, or a new one, which is kept then.
    pub(super) fn get<T: Element>(&self, index: usize, wanted: &Wanted<'_, T>) -> Arc<Packed<T>> {
        let lock = || {
            // Entries are replaced whole.
            self.0
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner())
        };
        let kept = lock().get(index).cloned().flatten();
        let kept = kept.and_then(|kept| kept.downcast::<Packed<T>>().ok());
        if let Some(kept) = kept.filter(|kept| wanted.is(kept)) {
            return kept;
        }
        let packed = Arc::new(wanted.pack(true, |_| Vec::new()));
        let mut all = lock();
        if all.len() <= index {
            all.resize(index + 1, None);
        }
        all[index] = Some(packed.clone());
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
