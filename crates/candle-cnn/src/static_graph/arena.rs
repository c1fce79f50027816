//! Buffers that are kept from step to step.

use std::any::Any;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use rayon::prelude::*;

use super::pass::Scratch;
use crate::element::Element;

/// What makes two buffers interchangeable: the zeros around their images lie in the same places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MapLayout {
    /// Height and width of the image.
    pub(super) size: (usize, usize),
    /// Zero pixels around it.
    pub(super) halo: usize,
    /// Elements per pixel.
    pub(super) pixel: usize,
}

impl MapLayout {
    /// Memory without images.
    fn flat(len: usize) -> Self {
        Self {
            size: (1, 1),
            halo: 0,
            pixel: len,
        }
    }

    /// Pixels of an image, without the halo.
    pub(super) fn pixels(&self) -> usize {
        self.size.0 * self.size.1
    }

    /// Elements per line.
    pub(super) fn line(&self) -> usize {
        (self.size.1 + 2 * self.halo) * self.pixel
    }

    /// Elements per image.
    pub(super) fn image(&self) -> usize {
        (self.size.0 + 2 * self.halo) * self.line()
    }

    /// Where the pixel `outside` pixels above and left of pixel (0, 0) begins.
    pub(super) fn first(&self, outside: usize) -> usize {
        (self.halo - outside) * (self.line() + self.pixel)
    }

    /// Where line `h` begins with its halo; the first and the last take what is above and below.
    pub(super) fn cut(&self, h: usize) -> usize {
        match h {
            0 => 0,
            _ if h == self.size.0 => self.image(),
            _ => (self.halo + h) * self.line(),
        }
    }

    /// Where pixel (h, w) begins.
    pub(super) fn at(&self, h: usize, w: usize) -> usize {
        self.first(0) + h * self.line() + w * self.pixel
    }
}

/// What of a buffer one task writes: whole images, or some lines of one.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Part {
    pub(super) images: usize,
    pub(super) lines: Range<usize>,
    /// Where the part begins in its image.
    pub(super) base: usize,
}

impl Part {
    /// All images that a buffer of `len` elements holds.
    pub(super) fn whole(layout: MapLayout, len: usize) -> Self {
        Self {
            images: len / layout.image().max(1),
            lines: 0..layout.size.0,
            base: 0,
        }
    }

    /// Cuts `image` into up to `count` runs of lines, of a multiple of `step` lines each.
    pub(super) fn cut<T>(
        layout: MapLayout,
        image: &mut [T],
        (count, step): (usize, usize),
    ) -> Vec<(Self, &mut [T])> {
        let height = layout.size.0;
        let lines = height.div_ceil(count.max(1)).next_multiple_of(step).max(1);
        let mut parts = Vec::with_capacity(count);
        let mut rest = &mut image[..layout.image()];
        for first in (0..height).step_by(lines) {
            let end = height.min(first + lines);
            let base = layout.cut(first);
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(layout.cut(end) - base);
            let lines = first..end;
            parts.push((
                Self {
                    images: 1,
                    lines,
                    base,
                },
                part,
            ));
            rest = tail;
        }
        parts
    }
}

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
    fn an_image_is_cut_between_its_lines_and_nothing_is_left_out() {
        let layout = MapLayout {
            size: (6, 2),
            halo: 1,
            pixel: 16,
        };
        let mut image: Vec<f32> = (0..layout.image()).map(|at| at as f32).collect();
        for (cut, expected) in [
            ((2, 1), vec![0..3, 3..6]),
            ((4, 1), vec![0..2, 2..4, 4..6]),
            ((2, 4), vec![0..4, 4..6]),
            ((1, 1), std::iter::once(0..6).collect()),
            ((100, 1), (0..6).map(|h| h..h + 1).collect()),
        ] {
            let parts = Part::cut(layout, &mut image, cut);
            let lines: Vec<_> = parts.iter().map(|(part, _)| part.lines.clone()).collect();
            assert_eq!(lines, expected);
            let mut next = 0;
            for (part, memory) in parts {
                assert_eq!((part.images, part.base), (1, next));
                let within = next..next + memory.len();
                for h in part.lines {
                    assert!(within.contains(&layout.at(h, 0)) && within.contains(&layout.at(h, 1)));
                }
                assert_eq!(memory[0], next as f32);
                next = within.end;
            }
            assert_eq!(next, layout.image());
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
