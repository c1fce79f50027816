//! How maps lie in memory whose pixels hold their channels side by side.

use std::ops::Range;

/// Channels of a pixel are stored in a multiple of this: the widest vector of
/// f32, so that a vector written for one branch ends where the next begins.
pub(crate) const ALIGNMENT: usize = 16;

/// What makes two buffers interchangeable: the zeros around their images lie in the same places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapLayout {
    /// Height and width of the image.
    pub(crate) size: (usize, usize),
    /// Zero pixels around it.
    pub(crate) halo: usize,
    /// Elements per pixel.
    pub(crate) pixel: usize,
}

impl MapLayout {
    /// Memory without images.
    pub(crate) fn flat(len: usize) -> Self {
        Self {
            size: (1, 1),
            halo: 0,
            pixel: len,
        }
    }

    /// Pixels of an image, without the halo.
    pub(crate) fn pixels(&self) -> usize {
        self.size.0 * self.size.1
    }

    /// Elements per line.
    pub(crate) fn line(&self) -> usize {
        (self.size.1 + 2 * self.halo) * self.pixel
    }

    /// Elements per image.
    pub(crate) fn image(&self) -> usize {
        (self.size.0 + 2 * self.halo) * self.line()
    }

    /// Where the pixel `outside` pixels above and left of pixel (0, 0) begins.
    pub(crate) fn first(&self, outside: usize) -> usize {
        (self.halo - outside) * (self.line() + self.pixel)
    }

    /// Where line `h` begins with its halo; the first and the last take what is above and below.
    pub(crate) fn cut(&self, h: usize) -> usize {
        match h {
            0 => 0,
            _ if h == self.size.0 => self.image(),
            _ => (self.halo + h) * self.line(),
        }
    }

    /// Where pixel (h, w) begins.
    pub(crate) fn at(&self, h: usize, w: usize) -> usize {
        self.first(0) + h * self.line() + w * self.pixel
    }
}

/// What of a buffer one task writes: whole images, or some lines of one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Part {
    pub(crate) images: usize,
    pub(crate) lines: Range<usize>,
    /// Where the part begins in its image.
    pub(crate) base: usize,
}

impl Part {
    /// All images that a buffer of `len` elements holds.
    pub(crate) fn whole(layout: MapLayout, len: usize) -> Self {
        Self {
            images: len / layout.image().max(1),
            lines: 0..layout.size.0,
            base: 0,
        }
    }

    /// Cuts `image` into up to `count` runs of lines, of a multiple of `step` lines each.
    pub(crate) fn cut<T>(
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
