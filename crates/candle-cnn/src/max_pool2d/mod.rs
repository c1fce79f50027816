//! Maximum pooling with PyTorch's gradient: all of it to the first maximum.

pub(crate) mod channels_last;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};

use crate::element::{dispatch, float_dtype, slice, with_slices};
use crate::error::OpError;
use crate::simd::Isa;
use crate::window::{Axis, Planes, PoolWindow};

const OP: &str = "max_pool2d";

/// Window of a maximum pooling, vertical then horizontal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MaxPool2dConfig {
    /// Height and width of the window, in pixels.
    pub kernel_size: (usize, usize),
    /// Step of the window, in pixels, at least 1.
    pub stride: (usize, usize),
    /// Border of −∞ on each side, in pixels, at most half of the kernel.
    pub padding: (usize, usize),
    /// Round the output size up instead of down, so that every pixel is seen.
    pub ceil_mode: bool,
}

impl MaxPool2dConfig {
    /// A square window.
    pub fn square(kernel_size: usize, stride: usize, padding: usize) -> Self {
        Self {
            kernel_size: (kernel_size, kernel_size),
            stride: (stride, stride),
            padding: (padding, padding),
            ceil_mode: false,
        }
    }

    /// This window with `ceil_mode` on.
    pub fn ceil(self) -> Self {
        Self {
            ceil_mode: true,
            ..self
        }
    }

    /// This window for what poolings share.
    pub(crate) fn window(self) -> PoolWindow {
        let Self {
            kernel_size,
            stride,
            padding,
            ceil_mode,
        } = self;
        PoolWindow {
            kernel_size,
            stride,
            padding,
            ceil_mode,
        }
    }
}

/// The maximum of each window of `x` (N, C, H, W), as
/// `torch.nn.functional.max_pool2d`: padding counts as −∞, a NaN wins, and the
/// whole gradient of a window goes to its first maximum in row-major order, or to its last NaN.
///
/// Returns (N, C, H', W') with `H' = ⌊(H + 2·padding − kernel) / stride⌋ + 1`
/// (`⌈…⌉` with `ceil_mode`, less a last window that would start in the
/// padding). f32 and f64, on CUDA bf16 too; any strides.
///
/// # Errors
/// [`OpError`] for shapes, settings, dtypes and devices that do not fit.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_cnn::{MaxPool2dConfig, max_pool2d};
/// let x = Var::new(&[[[[1f32, 5.0, 5.0], [0.0, 2.0, 3.0]]]], &Device::Cpu)?;
/// let y = max_pool2d(&x, MaxPool2dConfig::square(2, 1, 0))?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [5.0, 5.0]);
/// let dx = y.backward()?;
/// let dx = dx.get(&x).unwrap().flatten_all()?.to_vec1::<f32>()?;
/// assert_eq!(dx, [0.0, 2.0, 0.0, 0.0, 0.0, 0.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn max_pool2d(x: &Tensor, config: MaxPool2dConfig) -> Result<Tensor> {
    float_dtype(OP, &[x])?;
    let planes = Planes::new(OP, x, config.window())?;
    check_border(&planes)?;
    x.contiguous()?.apply_op1(MaxPool2d { planes })
}

/// Refuses a border whose pixels cannot be counted, and more pixels in a window than the winners' numbers tell apart.
fn check_border(planes: &Planes) -> Result<()> {
    let window = (planes.h.kernel, planes.w.kernel);
    let side = |axis: &Axis| axis.input + 2 * axis.padding;
    OpError::check_elements(OP, "padded input", &[side(&planes.h), side(&planes.w)])?;
    if u32::try_from(window.0 * window.1).is_err() {
        let expected = "below 2³² pixels";
        return Err(OpError::setting(OP, "kernel_size", window, expected));
    }
    Ok(())
}

struct MaxPool2d {
    planes: Planes,
}

impl CustomOp1 for MaxPool2d {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = Shape::from(self.planes.output_shape());
        dispatch!(OP, x.dtype(), T => {
            OpError::check_room::<T>(OP, "output", shape.dims())?;
            let y = cpu::forward(&self.planes, Isa::detect(), slice::<T>(OP, x, layout)?);
            Ok((T::to_cpu_storage_owned(y), shape))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let y = cuda::forward(&self.planes, (x, layout))?;
        Ok((y, Shape::from(self.planes.output_shape())))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return cuda::backward(&self.planes, x, &dy).map(Some);
        }
        dispatch!(OP, x.dtype(), T => {
            let dx = with_slices::<T, _, _>(OP, [x, &dy], |[x, dy]| {
                Ok(cpu::backward(&self.planes, Isa::detect(), x, dy))
            })?;
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}
