//! The definition: which pixel of a window wins.

use crate::element::Element;
use crate::window::Planes;

/// Index in the plane of the first maximum of window (oh, ow), in row-major
/// order; the last NaN wins over everything, as in PyTorch's CPU kernel.
pub(crate) fn first_maximum<T: Element>(
    planes: &Planes,
    plane: &[T],
    oh: usize,
    ow: usize,
) -> usize {
    let (rows, columns) = (planes.h.range(oh), planes.w.range(ow));
    let mut winner = rows.start * planes.w.input + columns.start;
    let mut best = T::NEG_INFINITY;
    for ih in rows {
        for iw in columns.clone() {
            let at = ih * planes.w.input + iw;
            if plane[at] > best || plane[at].is_nan() {
                winner = at;
                best = plane[at];
            }
        }
    }
    winner
}
