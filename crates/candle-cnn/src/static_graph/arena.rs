//! Buffers that are kept from step to step.

use std::any::Any;
use std::sync::{Mutex, MutexGuard};

use rayon::prelude::*;

use super::pass::Scratch;
use crate::element::Element;
use crate::maps::MapLayout;

/// Free buffers of each element type.
#[derive(Default)]
pub(super) struct Arenas {
    f32: Mutex<Arena<f32>>,
    f64: Mutex<Arena<f64>>,
}

impl std::fmt::Debug for Arenas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Arenas")
    }
}

impl Arenas {
    /// What a task works with, given back when it is dropped.
    pub(super) fn lend<T: Element>(&self) -> Lent<'_, T> {
        let scratch = self.of::<T>().scratches.pop().unwrap_or_default();
        Lent {
            arenas: self,
            scratch,
        }
    }

    /// A buffer of at least `images` images. What lies inside of the halo is arbitrary.
    pub(super) fn take<T: Element>(&self, layout: MapLayout, images: usize) -> Vec<T> {
        let (found, shorter) = {
            let mut arena = self.of();
            match arena.find(layout, images) {
                Some(found) => (Some(found), None),
                None => (None, arena.remove_longest(layout)),
            }
        };
        // Its place is taken by one that is long enough; otherwise batches of growing size would each leave theirs.
        drop(shorter);
        // Behind the lock: a worker that waits for others in a parallel loop may take up another pass through the
        // same graph, which would wait for a lock that its own thread holds.
        match found {
            None => vec![T::ZERO; images * layout.image()],
            Some((of, buffer)) if of == layout => buffer,
            Some((_, mut buffer)) => {
                clear_halos(layout, &mut buffer);
                buffer
            }
        }
    }

    /// Memory of at least `len` elements, with arbitrary values.
    pub(super) fn take_flat<T: Element>(&self, len: usize) -> Vec<T> {
        self.take(MapLayout::flat(len), 1)
    }

    /// Locked until the guard is dropped: nothing parallel may run so long.
    pub(super) fn of<T: Element>(&self) -> MutexGuard<'_, Arena<T>> {
        let f64: &dyn Any = &self.f64;
        let arena = match f64.downcast_ref::<Mutex<Arena<T>>>() {
            Some(arena) => arena,
            None => (&self.f32 as &dyn Any)
                .downcast_ref::<Mutex<Arena<T>>>()
                .expect("an element is f32 or f64"),
        };
        // A panic can only have lost buffers, which does no harm.
        arena
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// What is free.
pub(super) struct Arena<T> {
    /// Buffers, and the layout that each was last used with: the zeros of its halo are in place.
    buffers: Vec<(MapLayout, Vec<T>)>,
    scratches: Vec<Scratch<T>>,
}

impl<T> Default for Arena<T> {
    fn default() -> Self {
        Self {
            buffers: Vec::new(),
            scratches: Vec::new(),
        }
    }
}

/// What a task works with for the time being.
pub(super) struct Lent<'a, T: Element> {
    arenas: &'a Arenas,
    pub(super) scratch: Scratch<T>,
}

impl<T: Element> Drop for Lent<'_, T> {
    fn drop(&mut self) {
        let scratch = std::mem::take(&mut self.scratch);
        self.arenas.of::<T>().scratches.push(scratch);
    }
}

impl<T: Element> Arena<T> {
    /// What is free for at least `images` images, and the layout that it was last used with.
    fn find(&mut self, layout: MapLayout, images: usize) -> Option<(MapLayout, Vec<T>)> {
        let len = images * layout.image();
        // The same layout, or else the smallest that would not waste half of itself.
        let same = |(of, buffer): &(MapLayout, Vec<T>)| *of == layout && buffer.len() >= len;
        let fits = |buffer: &Vec<T>| (len..=2 * len).contains(&buffer.len());
        let found = self.buffers.iter().position(same).or_else(|| {
            let candidates = self.buffers.iter().enumerate();
            let candidates = candidates.filter(|(_, (_, buffer))| fits(buffer));
            let smallest = candidates.min_by_key(|(_, (_, buffer))| buffer.len());
            smallest.map(|(index, _)| index)
        })?;
        Some(self.buffers.swap_remove(found))
    }

    /// The longest free buffer of a layout.
    fn remove_longest(&mut self, layout: MapLayout) -> Option<Vec<T>> {
        let buffers = self.buffers.iter().enumerate();
        let buffers = buffers.filter(|(_, (of, _))| *of == layout);
        let (index, _) = buffers.max_by_key(|(_, (_, buffer))| buffer.len())?;
        Some(self.buffers.swap_remove(index).1)
    }

    /// Keeps a buffer for the next time; one without memory serves nobody, and would be looked at in each search.
    pub(super) fn give_back(&mut self, layout: MapLayout, buffer: Vec<T>) {
        if !buffer.is_empty() {
            self.buffers.push((layout, buffer));
        }
    }

    pub(super) fn give_back_flat(&mut self, memory: Vec<T>) {
        self.give_back(MapLayout::flat(memory.len()), memory);
    }

    /// How many elements are.
    #[cfg(test)]
    fn free_elements(&self) -> usize {
        self.buffers.iter().map(|(_, buffer)| buffer.len()).sum()
    }

    /// How many buffers are free.
    #[cfg(test)]
    pub(super) fn free(&self) -> usize {
        self.buffers.len()
    }
}

/// Sets what lies around the images to zero.
fn clear_halos<T: Element>(layout: MapLayout, buffer: &mut [T]) {
    let (height, width) = layout.size;
    if layout.halo == 0 || height * width * layout.pixel == 0 {
        return;
    }
    buffer.par_chunks_mut(layout.image()).for_each(|image| {
        // From the end of one line of pixels to the beginning of the next.
        let mut end = 0;
        for h in 0..height.min(image.len() / layout.line()) {
            let start = layout.at(h, 0).min(image.len());
            image[end.min(start)..start].fill(T::ZERO);
            end = start + width * layout.pixel;
        }
        let len = image.len();
        image[end.min(len)..].fill(T::ZERO);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_of_another_layout_comes_with_zeros_around_its_images() {
        let layout = |height, width, halo| MapLayout {
            size: (height, width),
            halo,
            pixel: 16,
        };
        let (from, to) = (layout(6, 5, 1), layout(4, 3, 2));
        let arenas = Arenas::default();
        let mut dirty = arenas.take::<f32>(from, 3);
        dirty.fill(1.0);
        let (address, len) = (dirty.as_ptr(), dirty.len());
        arenas.of().give_back(from, dirty);
        let buffer = arenas.take::<f32>(to, 3);
        assert_eq!(
            (buffer.as_ptr(), buffer.len()),
            (address, len),
            "it is used again"
        );
        for image in buffer.chunks_exact(to.image()).take(3) {
            for (at, &value) in image.iter().enumerate() {
                let (line, column) = (at / to.line(), at % to.line() / to.pixel);
                let is_inside = (2..6).contains(&line) && (2..5).contains(&column);
                assert_eq!(value, if is_inside { 1.0 } else { 0.0 }, "{line} {column}");
            }
        }
    }

    #[test]
    fn a_longer_buffer_takes_the_place_of_a_shorter_one_of_its_layout() {
        let layout = |side| MapLayout {
            size: (side, side),
            halo: 1,
            pixel: 16,
        };
        let arenas = Arenas::default();
        let (one, other) = (layout(4), layout(9));
        let kept = arenas.take::<f32>(other, 1);
        arenas.of().give_back(other, kept);
        for images in 1..=20 {
            // Two at a time, as two maps of a graph.
            let pair = [(); 2].map(|()| arenas.take::<f32>(one, images));
            for buffer in pair {
                assert!(buffer.len() >= images * one.image());
                arenas.of().give_back(one, buffer);
            }
        }
        // What was free for another layout may serve this one, once; the rest is the last two.
        let most = other.image() + 2 * 20 * one.image();
        let free = arenas.of::<f32>().free_elements();
        assert!((2 * 20 * one.image()..=most).contains(&free), "{free}");
        // Fewer images go into what is there.
        assert_eq!(arenas.take::<f32>(one, 3).len(), 20 * one.image());
    }

    #[test]
    fn a_buffer_that_would_waste_half_of_itself_stays_where_it_is() {
        let layout = |side| MapLayout {
            size: (side, side),
            halo: 0,
            pixel: 16,
        };
        let arenas = Arenas::default();
        let large = arenas.take::<f32>(layout(8), 4);
        arenas.of().give_back(layout(8), large);
        assert_eq!(arenas.take::<f32>(layout(4), 4).len(), 4 * 256);
        assert_eq!(arenas.of::<f32>().free(), 1);
    }
}
