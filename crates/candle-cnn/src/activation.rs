//! The activation that an operation takes along, and what it makes of a number on the CPU.

use crate::element::Element;

/// What follows a sum or a normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    Identity,
    Relu,
}

/// PyTorch's forward: what is below zero is zero, and −0 stays as it is, as a NaN does.
#[inline(always)]
pub(crate) fn relu<T: Element>(value: T) -> T {
    if value < T::ZERO { T::ZERO } else { value }
}

/// PyTorch's threshold backward: zero where the output is not positive; a NaN
/// output lets the gradient pass.
#[inline(always)]
pub(crate) fn keep_positive<T: Element>(dy: T, y: T) -> T {
    if y <= T::ZERO { T::ZERO } else { dy }
}
