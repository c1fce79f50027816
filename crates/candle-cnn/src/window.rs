//! The sliding window that poolings share: sizes as PyTorch computes them.

use candle_core::{Result, Tensor};

use crate::error::OpError;

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
    /// those that [`Planes::new`] lets pass.
    pub(crate) fn new(
        input: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
        ceil_mode: bool,
    ) -> Option<Self> {
        // Rounding up also makes a window of an input that is smaller than
        // the kernel by less than the stride, as in PyTorch.
        let reach = if ceil_mode { stride - 1 } else { 0 };
        let steps = (input + 2 * padding + reach).checked_sub(kernel)? / stride;
        // With ceil_mode, a last window that would start in the right
        // padding is left out, as in PyTorch.
        let starts_outside = ceil_mode && steps * stride >= input + padding;
        let output = if starts_outside { steps } else { steps + 1 };
        Some(Self {
            input,
            output,
            kernel,
            stride,
            padding,
        })
    }

    /// Input positions of window `o` that lie inside the input.
    pub(crate) fn range(&self, o: usize) -> std::ops::Range<usize> {
        let start = o * self.stride;
        let end = (start + self.kernel)
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
    pub(crate) fn new(
        op: &'static str,
        x: &Tensor,
        kernel: (usize, usize),
        stride: (usize, usize),
        padding: (usize, usize),
        ceil_mode: bool,
    ) -> Result<Self> {
        let Ok((batch, channels, height, width)) = x.dims4() else {
            return Err(OpError::rank(op, "input", x, "(N, C, H, W)"));
        };
        if kernel.0 == 0 || kernel.1 == 0 {
            return Err(OpError::setting(op, "kernel_size", kernel, "at least 1"));
        }
        if stride.0 == 0 || stride.1 == 0 {
            return Err(OpError::setting(op, "stride", stride, "at least 1"));
        }
        if padding.0 > kernel.0 / 2 || padding.1 > kernel.1 / 2 {
            // Otherwise a window could lie in the padding alone.
            let expected = "at most half of the kernel size";
            return Err(OpError::setting(op, "padding", padding, expected));
        }
        let axis =
            |input, kernel, stride, padding| Axis::new(input, kernel, stride, padding, ceil_mode);
        match (
            axis(height, kernel.0, stride.0, padding.0),
            axis(width, kernel.1, stride.1, padding.1),
        ) {
            (Some(h), Some(w)) if height > 0 && width > 0 => Ok(Self {
                batch,
                channels,
                h,
                w,
            }),
            _ => Err(OpError::Window {
                op,
                window: kernel,
                input: (height, width),
                padding,
            }
            .into()),
        }
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
