//! The sliding window that poolings share: sizes as PyTorch computes them.

use candle_core::{Result, Tensor};

use crate::error::OpError;

/// The window that a pooling is asked for; each pair is vertical, then horizontal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PoolWindow {
    pub(crate) kernel_size: (usize, usize),
    pub(crate) stride: (usize, usize),
    pub(crate) padding: (usize, usize),
    pub(crate) ceil_mode: bool,
}

impl PoolWindow {
    /// Both axes of the window over planes of `size`: the vertical one, then the horizontal one.
    ///
    /// # Errors
    /// No pixels, a kernel or stride of 0, more padding than half of the kernel, and a window that does not fit.
    pub(crate) fn axes(self, op: &'static str, size: (usize, usize)) -> Result<(Axis, Axis)> {
        let Self {
            kernel_size: kernel,
            stride,
            padding,
            ceil_mode,
        } = self;
        for (name, pair) in [("kernel_size", kernel), ("stride", stride)] {
            if pair.0 == 0 || pair.1 == 0 {
                return Err(OpError::setting(op, name, pair, "at least 1"));
            }
        }
        if padding.0 > kernel.0 / 2 || padding.1 > kernel.1 / 2 {
            // Otherwise a window could lie in the padding alone.
            let expected = "at most half of the kernel size";
            return Err(OpError::setting(op, "padding", padding, expected));
        }
        let vertical = Axis::new(size.0, kernel.0, stride.0, padding.0, ceil_mode);
        let horizontal = Axis::new(size.1, kernel.1, stride.1, padding.1, ceil_mode);
        match (vertical, horizontal) {
            (Some(h), Some(w)) if size.0 > 0 && size.1 > 0 => Ok((h, w)),
            _ => Err(OpError::Window {
                op,
                window: kernel,
                input: size,
                padding,
            }
            .into()),
        }
    }
}

/// One axis of a pooling window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Axis {
    pub(crate) input: usize,
    pub(crate) output: usize,
    pub(crate) kernel: usize,
    pub(crate) stride: usize,
    pub(crate) padding: usize,
}

impl Axis {
    /// Counts the windows; `None` where not even one fits. The settings are
    /// those that [`PoolWindow::axes`] lets pass.
    fn new(
        input: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
        ceil_mode: bool,
    ) -> Option<Self> {
        let padded = input.checked_add(padding.checked_mul(2)?)?;
        let steps = match padded.checked_sub(kernel) {
            Some(rest) if ceil_mode => rest.div_ceil(stride),
            Some(rest) => rest / stride,
            // Rounding up also makes a window of an input that is smaller than
            // the kernel by less than the stride, as in PyTorch.
            None if ceil_mode && kernel - padded < stride => 0,
            None => return None,
        };
        // With ceil_mode, a last window that would start in the right
        // padding is left out, as in PyTorch.
        let starts_outside = ceil_mode && steps.saturating_mul(stride) >= input + padding;
        let output = if starts_outside { steps } else { steps + 1 };
        Some(Self {
            input,
            output,
            // A window sees nothing beyond the padding, and a step beyond it is never taken: however large they are,
            // what is counted from them stays as small as the padded input.
            kernel: kernel.min(padded),
            stride: stride.min(padded.max(1)),
            padding,
        })
    }

    /// Input positions of window `o` that lie inside the input.
    pub(crate) fn range(&self, o: usize) -> std::ops::Range<usize> {
        let start = o * self.stride;
        let end = start
            .saturating_add(self.kernel)
            .saturating_sub(self.padding)
            .min(self.input);
        start.saturating_sub(self.padding).min(end)..end
    }
}

/// Both axes of a pooling over planes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Planes {
    pub(crate) batch: usize,
    pub(crate) channels: usize,
    pub(crate) h: Axis,
    pub(crate) w: Axis,
}

impl Planes {
    pub(crate) fn new(op: &'static str, x: &Tensor, window: PoolWindow) -> Result<Self> {
        let Ok((batch, channels, height, width)) = x.dims4() else {
            return Err(OpError::shape(op, "input", x, "(N, C, H, W)"));
        };
        let (h, w) = window.axes(op, (height, width))?;
        for (what, size) in [("input", (height, width)), ("output", (h.output, w.output))] {
            // What is counted of one plane must not overflow where there is none, either.
            let shape = [batch.max(1), channels.max(1), size.0, size.1];
            OpError::check_elements(op, what, &shape)?;
        }
        Ok(Self {
            batch,
            channels,
            h,
            w,
        })
    }

    pub(crate) fn input_plane(&self) -> usize {
        self.h.input * self.w.input
    }

    pub(crate) fn output_plane(&self) -> usize {
        self.h.output * self.w.output
    }

    pub(crate) fn output_shape(&self) -> (usize, usize, usize, usize) {
        (self.batch, self.channels, self.h.output, self.w.output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_and_strides_are_cut_to_the_padded_size_and_otherwise_as_they_were() {
        let strides = (1..12).chain([1 << 40, usize::MAX]);
        for (input, kernel, stride, ceil_mode) in (1..9).flat_map(|input| {
            let strides = strides.clone();
            strides.flat_map(move |stride| {
                (1..9).flat_map(move |kernel| {
                    [false, true].map(|ceil_mode| (input, kernel, stride, ceil_mode))
                })
            })
        }) {
            for padding in 0..=kernel / 2 {
                let Some(axis) = Axis::new(input, kernel, stride, padding, ceil_mode) else {
                    continue;
                };
                let padded = input + 2 * padding;
                assert_eq!(
                    (axis.kernel, axis.stride),
                    (kernel.min(padded), stride.min(padded))
                );
                for at in padding..padding + input {
                    // The first window that begins late enough to see the pixel, as the CUDA kernels find it.
                    let first = match at.checked_sub(axis.kernel) {
                        Some(before) => before / axis.stride + 1,
                        None => 0,
                    };
                    assert!(first <= axis.output, "{axis:?} {at}");
                }
            }
        }
    }
}
