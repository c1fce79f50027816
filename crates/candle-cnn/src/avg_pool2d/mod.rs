//! Average pooling: fixed windows, adaptive windows, and the whole image.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::ops::Range;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};

use crate::element::{Element, dispatch, float_dtype, slice, with_slices};
use crate::error::OpError;
use crate::simd::Isa;
use crate::window::{Axis, Planes, PoolWindow};

/// Window of an average pooling, vertical then horizontal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AvgPool2dConfig {
    /// Height and width of the window, in pixels.
    pub kernel_size: (usize, usize),
    /// Step of the window, in pixels, at least 1.
    pub stride: (usize, usize),
    /// Border of zeros on each side, in pixels, at most half of the kernel.
    pub padding: (usize, usize),
    /// Round the output size up instead of down.
    pub ceil_mode: bool,
    /// Whether the border's zeros count in the average (PyTorch's default: yes).
    pub count_include_pad: bool,
}

impl AvgPool2dConfig {
    /// A square window with PyTorch's defaults.
    pub fn square(kernel_size: usize, stride: usize, padding: usize) -> Self {
        Self {
            kernel_size: (kernel_size, kernel_size),
            stride: (stride, stride),
            padding: (padding, padding),
            ceil_mode: false,
            count_include_pad: true,
        }
    }

    /// This window with `ceil_mode` on.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_cnn::{AvgPool2dConfig, avg_pool2d};
    /// let x = Tensor::new(&[[[[1f32, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]]], &Device::Cpu)?;
    /// let y = avg_pool2d(&x, AvgPool2dConfig::square(2, 2, 0).ceil())?;
    /// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [3.0, 4.5, 7.5, 9.0]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn ceil(self) -> Self {
        Self {
            ceil_mode: true,
            ..self
        }
    }

    /// This window for what poolings share.
    fn window(self) -> PoolWindow {
        let Self {
            kernel_size,
            stride,
            padding,
            ceil_mode,
            count_include_pad: _,
        } = self;
        PoolWindow {
            kernel_size,
            stride,
            padding,
            ceil_mode,
        }
    }
}

/// The mean of each window of `x` (N, C, H, W), as
/// `torch.nn.functional.avg_pool2d`. f32 and f64, on CUDA bf16 too; any
/// strides.
///
/// # Errors
/// [`OpError`] for shapes, settings, dtypes and devices that do not fit.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_cnn::{AvgPool2dConfig, avg_pool2d};
/// let x = Tensor::new(&[[[[1f32, 3.0], [5.0, 7.0]]]], &Device::Cpu)?;
/// let y = avg_pool2d(&x, AvgPool2dConfig::square(2, 2, 0))?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [4.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn avg_pool2d(x: &Tensor, config: AvgPool2dConfig) -> Result<Tensor> {
    const OP: &str = "avg_pool2d";
    float_dtype(OP, &[x])?;
    let planes = Planes::new(OP, x, config.window())?;
    let rule = |axis: Axis| Rule::Windows {
        axis,
        count_include_pad: config.count_include_pad,
    };
    let pool = AvgPool2d::new(OP, rule(planes.h), rule(planes.w))?;
    x.contiguous()?.apply_op1(pool)
}

/// Means over `output` (height, width) bins that cover `x` (N, C, H, W), as
/// `torch.nn.functional.adaptive_avg_pool2d`: bin `i` of `n` over `size`
/// pixels reaches from `⌊i·size/n⌋` to `⌈(i+1)·size/n⌉`. f32 and f64, on CUDA
/// bf16 too.
///
/// # Errors
/// [`OpError`] for an empty image, an output size of 0, other ranks and dtypes.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// let x = Tensor::ones((2, 3, 7, 5), DType::F32, &Device::Cpu)?;
/// assert_eq!(candle_cnn::adaptive_avg_pool2d(&x, (4, 4))?.dims(), [2, 3, 4, 4]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn adaptive_avg_pool2d(x: &Tensor, output: (usize, usize)) -> Result<Tensor> {
    const OP: &str = "adaptive_avg_pool2d";
    float_dtype(OP, &[x])?;
    let Ok((batch, channels, height, width)) = x.dims4() else {
        return Err(OpError::shape(OP, "input", x, "(N, C, H, W)"));
    };
    if output.0 == 0 || output.1 == 0 {
        return Err(OpError::setting(OP, "output_size", output, "at least 1"));
    }
    if height == 0 || width == 0 {
        return Err(OpError::shape(OP, "input", x, "at least one pixel"));
    }
    for (what, size) in [("input", (height, width)), ("output", output)] {
        let shape = [batch.max(1), channels.max(1), size.0, size.1];
        OpError::check_elements(OP, what, &shape)?;
    }
    for (input, output) in [(height, output.0), (width, output.1)] {
        // Where a bin begins and ends is a part of this.
        OpError::check_elements(OP, "pixels by bins", &[input, output.saturating_add(1)])?;
    }
    let rule = |input: usize, output: usize| Rule::Adaptive { input, output };
    let pool = AvgPool2d::new(OP, rule(height, output.0), rule(width, output.1))?;
    x.contiguous()?.apply_op1(pool)
}

/// The mean of each plane of `x` (N, C, H, W), as (N, C): adaptive average
/// pooling to 1×1, flattened.
///
/// # Errors
/// As [`adaptive_avg_pool2d`].
pub fn global_avg_pool2d(x: &Tensor) -> Result<Tensor> {
    adaptive_avg_pool2d(x, (1, 1))?.flatten_from(1)
}

/// Input positions of one output position, and its share of the divisor.
#[derive(Clone, Debug)]
struct Bin {
    range: Range<usize>,
    count: usize,
}

/// Pixels of a bin, as a real number: the border alone may have more than can be counted.
fn divisor<T: Element>(h: &Bin, w: &Bin) -> T {
    T::real(h.count as f64 * w.count as f64)
}

/// How an axis is cut into bins.
#[derive(Clone, Copy, Debug)]
enum Rule {
    Windows { axis: Axis, count_include_pad: bool },
    Adaptive { input: usize, output: usize },
}

impl Rule {
    /// How many bins there are.
    fn output(self) -> usize {
        match self {
            Self::Windows { axis, .. } => axis.output,
            Self::Adaptive { output, .. } => output,
        }
    }

    fn bins(self) -> Vec<Bin> {
        match self {
            Self::Windows {
                axis,
                count_include_pad,
            } => (0..axis.output)
                .map(|o| {
                    let range = axis.range(o);
                    // The padded window ends at the padded border at the latest.
                    let start = o * axis.stride;
                    let end = start
                        .saturating_add(axis.kernel)
                        .min(axis.input + 2 * axis.padding);
                    let padded = end - start;
                    Bin {
                        count: if count_include_pad {
                            padded
                        } else {
                            range.len()
                        },
                        range,
                    }
                })
                .collect(),
            Self::Adaptive { input, output } => (0..output)
                .map(|i| {
                    let range = i * input / output..((i + 1) * input).div_ceil(output);
                    Bin {
                        count: range.len(),
                        range,
                    }
                })
                .collect(),
        }
    }
}

/// Means over a grid of bins, which may overlap.
struct AvgPool2d {
    op: &'static str,
    h: Vec<Bin>,
    w: Vec<Bin>,
    /// The rules of the two axes: the CUDA kernels make the bins themselves.
    #[cfg(feature = "cuda")]
    rules: [Rule; 2],
}

impl AvgPool2d {
    fn new(op: &'static str, h: Rule, w: Rule) -> Result<Self> {
        let bins = h.output().saturating_add(w.output());
        OpError::check_room::<Bin>(op, "bins of both axes, a list", &[bins])?;
        Ok(Self {
            op,
            h: h.bins(),
            w: w.bins(),
            #[cfg(feature = "cuda")]
            rules: [h, w],
        })
    }

    /// Whether one bin holds a whole plane of `size`, and nothing else.
    fn is_global(&self, size: (usize, usize)) -> bool {
        let [h, w] = [(&self.h, size.0), (&self.w, size.1)].map(|(bins, size)| {
            matches!(bins.as_slice(), [bin] if bin.range == (0..size) && bin.count == size)
        });
        h && w
    }

    fn output_plane(&self) -> usize {
        self.h.len() * self.w.len()
    }

    fn bins(&self) -> impl Iterator<Item = (&Bin, &Bin)> {
        self.h
            .iter()
            .flat_map(|h| self.w.iter().map(move |w| (h, w)))
    }
}

impl CustomOp1 for AvgPool2d {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, channels, height, width) = layout.shape().dims4()?;
        let shape = Shape::from((batch, channels, self.h.len(), self.w.len()));
        dispatch!(self.op, x.dtype(), T => {
            OpError::check_room::<T>(self.op, "output", shape.dims())?;
            let x = slice::<T>(self.op, x, layout)?;
            let y = cpu::forward(self, Isa::detect(), x, (height, width));
            Ok((T::to_cpu_storage_owned(y), shape))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let (batch, channels, _, _) = layout.shape().dims4()?;
        let shape = Shape::from((batch, channels, self.h.len(), self.w.len()));
        Ok((cuda::forward(self, (x, layout), &shape)?, shape))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let (_, _, height, width) = x.dims4()?;
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return cuda::backward(self, x, &dy).map(Some);
        }
        dispatch!(self.op, x.dtype(), T => {
            let dx = with_slices::<T, _, _>(self.op, [&dy], |[dy]| {
                Ok(cpu::backward(self, Isa::detect(), dy, (height, width)))
            })?;
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}
