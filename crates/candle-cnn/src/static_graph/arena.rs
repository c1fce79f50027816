//! Buffers that are kept from step to step.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use crate::element::Element;

/// What makes two buffers interchangeable: the zeros around their images lie in the same places.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Layout {
    /// Height and width of the image.
    pub(super) size: (usize, usize),
    /// Zero pixels around it.
    pub(super) halo: usize,
    /// Elements per pixel.
    pub(super) width: usize,
}

impl Layout {
    /// Elements per line.
    pub(super) fn line(&self) -> usize {
        (self.size.1 + 2 * self.halo) * self.width
    }

    /// Elements per image.
    pub(super) fn image(&self) -> usize {
        (self.size.0 + 2 * self.halo) * self.line()
    }

    /// Where the pixel `outside` pixels above and left of pixel (0, 0) begins.
    pub(super) fn first(&self, outside: usize) -> usize {
        (self.halo - outside) * (self.line() + self.width)
    }

    /// Where pixel (h, w) begins.
    pub(super) fn at(&self, h: usize, w: usize) -> usize {
        self.first(0) + h * self.line() + w * self.width
    }
}

/// Free buffers of each element type.
#[derive(Debug, Default)]
pub(super) struct Arenas {
    f32: Mutex<Arena<f32>>,
    f64: Mutex<Arena<f64>>,
}

impl Arenas {
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

/// Free buffers, whose halos are zero.
#[derive(Debug)]
pub(super) struct Arena<T>(HashMap<Layout, Vec<Vec<T>>>);

impl<T> Default for Arena<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: Element> Arena<T> {
    /// A buffer of at least `images` images. What lies inside of the halo is arbitrary.
    pub(super) fn take(&mut self, layout: Layout, images: usize) -> Vec<T> {
        let len = images * layout.image();
        let free = self.0.entry(layout).or_default();
        while let Some(buffer) = free.pop() {
            if buffer.len() >= len {
                return buffer;
            }
        }
        vec![T::ZERO; len]
    }

    pub(super) fn give_back(&mut self, layout: Layout, buffer: Vec<T>) {
        self.0.entry(layout).or_default().push(buffer);
    }
}
