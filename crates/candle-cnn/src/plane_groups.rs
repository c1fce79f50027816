//! Planes sixteen at a time, their pixels side by side: what poolings compute on.
//!
//! The planes of (N, C, H, W) lie one behind the other. A vector of neighbouring pixels would see windows that overlap, start in the
//! border, or lie a stride apart; a vector of one pixel of sixteen planes sees none of that.

use rayon::prelude::*;

use crate::element::Element;
use crate::maps::ALIGNMENT;
use crate::simd::{Isa, transpose};

/// Pixels of one plane, of all tensors together, that a group is made for: with more, a thread would hold more than 32 MiB of f32.
const MOST_PIXELS: usize = 1 << 19;

/// Planes that a group is made for: with fewer, most of its vectors would be idle.
const FEWEST_PLANES: usize = ALIGNMENT / 2;

/// Elements, of all tensors together, that are worth a task.
const MIN_ELEMENTS: usize = 1 << 13;

/// Planes that are computed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    /// [`ALIGNMENT`] of them, of which the last may be no planes. All results have to be written: before, those of another group are there.
    Sixteen,
    /// One, since planes are few or large. Its results are zeros before.
    One,
}

/// Planes one behind the other.
#[derive(Clone, Copy)]
pub(crate) struct PlanesOf<'a, T> {
    pub(crate) values: &'a [T],
    /// Of each plane, at least one.
    pub(crate) pixels: usize,
}

impl<'a, T> PlanesOf<'a, T> {
    fn plane(self, number: usize) -> &'a [T] {
        &self.values[number * self.pixels..][..self.pixels]
    }
}

/// As many planes as each of `inputs` has, of `pixels` each, made group by group.
///
/// `make` gets the kind of group, the group of each tensor, `[pixel][plane]`, and where its results belong.
pub(crate) fn by_groups<T: Element, const N: usize>(
    isa: Isa,
    inputs: [PlanesOf<'_, T>; N],
    pixels: usize,
    make: impl Fn(Group, [&[T]; N], &mut [T]) + Sync,
) -> Vec<T> {
    let planes = inputs[0].values.len() / inputs[0].pixels;
    let mut results = vec![T::ZERO; planes * pixels];
    if results.is_empty() {
        return results;
    }
    let plane = pixels + inputs.iter().map(|of| of.pixels).sum::<usize>();
    if planes < FEWEST_PLANES || plane > MOST_PIXELS {
        results
            .par_chunks_mut(pixels)
            .enumerate()
            .for_each(|(plane, result)| {
                make(Group::One, inputs.map(|of| of.plane(plane)), result);
            });
        return results;
    }
    let kernels = T::kernels(isa);
    let group = |pixels: usize| vec![T::ZERO; ALIGNMENT * pixels];
    results
        .par_chunks_mut(ALIGNMENT * pixels)
        .with_min_len(MIN_ELEMENTS.div_ceil(ALIGNMENT * plane))
        .enumerate()
        .for_each_init(
            || (inputs.map(|of| group(of.pixels)), group(pixels)),
            |(groups, made), (i, results)| {
                let planes = results.len() / pixels;
                for (to, of) in groups.iter_mut().zip(inputs) {
                    let from = &of.values[i * to.len()..];
                    transpose(kernels, from, of.pixels, (planes, of.pixels), to, ALIGNMENT);
                }
                make(Group::Sixteen, groups.each_ref().map(Vec::as_slice), made);
                transpose(kernels, made, ALIGNMENT, (pixels, planes), results, pixels);
            },
        );
    results
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The groups that planes of so many pixels come in.
    fn groups(planes: usize, pixels: usize) -> Vec<Group> {
        let values = vec![1f32; planes * pixels];
        let x = PlanesOf {
            values: &values,
            pixels,
        };
        let kinds = std::sync::Mutex::new(Vec::new());
        let sums = by_groups(Isa::detect(), [x], 1, |group, [x], to| {
            kinds.lock().unwrap().push(group);
            let lanes = to.len();
            for (lane, to) in to.iter_mut().enumerate() {
                *to = x.iter().skip(lane).step_by(lanes).sum();
            }
        });
        assert_eq!(sums, vec![pixels as f32; planes]);
        kinds.into_inner().unwrap()
    }

    #[test]
    fn planes_that_are_few_or_large_come_one_by_one() {
        assert_eq!(groups(40, 5), [Group::Sixteen; 3]);
        assert_eq!(groups(8, 1000), [Group::Sixteen]);
        assert_eq!(groups(7, 1000), [Group::One; 7]);
        assert_eq!(groups(8, MOST_PIXELS - 1), [Group::Sixteen]);
        assert_eq!(groups(8, MOST_PIXELS), [Group::One; 8]);
        assert!(groups(0, 5).is_empty());
    }
}
