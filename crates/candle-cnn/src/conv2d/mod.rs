//! Two-dimensional convolution (cross-correlation, as `torch.nn.functional.conv2d`).

#[cfg(any(feature = "cuda", test))]
mod candidates;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod engines;
#[cfg(feature = "cuda")]
mod exactness;
mod packed_weight;
#[cfg(any(feature = "cuda", test))]
mod plan;
mod reference;
#[cfg(test)]
mod tests;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, WithDType,
};

#[cfg(feature = "cuda")]
pub(crate) use cuda::{ChannelsLast, channels_last_pass};
#[cfg(feature = "cuda")]
pub(crate) use plan::{Notes, Pass};

use crate::activation::Activation;
use crate::backward::aside;
use crate::element::{Element, dispatch, float_dtype, slice, with_slices};
use crate::error::OpError;
use crate::maps::ALIGNMENT;
use crate::simd::Isa;

pub(crate) use cpu::{PIXELS_PER_OUTER_BLOCK, PIXELS_PER_TASK, Panel, images_per_task, panels};
pub(crate) use packed_weight::PackedWeight;
pub use reference::{conv2d_backward_reference, conv2d_reference};

const OP: &str = "conv2d";

/// Stride, padding and dilation of a convolution, vertical then horizontal.
///
/// ```
/// use candle_cnn::Conv2dConfig;
/// let same = Conv2dConfig::padded(1);
/// assert_eq!(same, Conv2dConfig { padding: (1, 1), ..Default::default() });
/// let halving = Conv2dConfig::padded(3).strided(2);
/// assert_eq!(halving, Conv2dConfig { stride: (2, 2), padding: (3, 3), ..Default::default() });
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Conv2dConfig {
    /// Step of the window, in pixels, at least 1.
    pub stride: (usize, usize),
    /// Zeros added on each side, in pixels.
    pub padding: (usize, usize),
    /// Distance between the taps of the kernel, in pixels, at least 1.
    pub dilation: (usize, usize),
}

impl Default for Conv2dConfig {
    fn default() -> Self {
        Self {
            stride: (1, 1),
            padding: (0, 0),
            dilation: (1, 1),
        }
    }
}

impl Conv2dConfig {
    /// Stride 1, no dilation, `padding` zeros on every side.
    pub fn padded(padding: usize) -> Self {
        Self {
            padding: (padding, padding),
            ..Self::default()
        }
    }

    /// These settings with a step of `stride` pixels, in both directions.
    pub fn strided(self, stride: usize) -> Self {
        Self {
            stride: (stride, stride),
            ..self
        }
    }

    /// These settings with taps `dilation` pixels apart, in both directions: 1 for those that lie side by side, as in
    /// PyTorch.
    pub fn dilated(self, dilation: usize) -> Self {
        Self {
            dilation: (dilation, dilation),
            ..self
        }
    }
}

/// All the sizes of one convolution, checked against each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Conv2dGeometry {
    /// Images in the batch.
    pub batch: usize,
    /// Input channels.
    pub c_in: usize,
    /// Input height and width, in pixels.
    pub input: (usize, usize),
    /// Output channels.
    pub c_out: usize,
    /// Kernel height and width.
    pub kernel: (usize, usize),
    /// Output height and width, in pixels.
    pub output: (usize, usize),
    /// Stride, padding, dilation.
    pub config: Conv2dConfig,
}

impl Conv2dGeometry {
    /// Derives the output size of `x` (N, C, H, W) under `weight` (K, C, R, S).
    ///
    /// # Errors
    /// Ranks other than 4, no channels or pixels (a batch may be empty), channel
    /// counts that differ, a zero stride, dilation or kernel, a dilated kernel
    /// that is larger than the padded input, and sizes, padded or not, that no
    /// memory holds.
    pub fn new(x: &Tensor, weight: &Tensor, config: Conv2dConfig) -> Result<Self> {
        let Ok((batch, c_in, height, width)) = x.dims4() else {
            return Err(OpError::shape(OP, "input", x, "(N, C, H, W)"));
        };
        let Ok((c_out, _, r, s)) = weight.dims4() else {
            return Err(OpError::shape(
                OP,
                "weight",
                weight,
                "(C_out, C_in, kernel height, kernel width)",
            ));
        };
        check_not_empty(x, weight)?;
        check_channels(x, weight)?;
        for (name, pair) in [("stride", config.stride), ("dilation", config.dilation)] {
            if pair.0 == 0 || pair.1 == 0 {
                return Err(OpError::setting(OP, name, pair, "at least 1"));
            }
        }
        let (input, kernel) = ((height, width), (r, s));
        let (h, w) = ConvAxis::both(input, kernel, &config);
        let (Some(h_out), Some(w_out)) = (h.output(), w.output()) else {
            return Err(OpError::Window {
                op: OP,
                window: (h.reach().saturating_add(1), w.reach().saturating_add(1)),
                input,
                padding: config.padding,
            }
            .into());
        };
        let geometry = Self {
            batch,
            c_in,
            input,
            c_out,
            kernel,
            output: (h_out, w_out),
            config,
        };
        geometry.check_elements()?;
        Ok(geometry)
    }

    /// Refuses what no memory holds: the tensors, and the buffers in which the passes lay out the padded input and the
    /// padded output gradient.
    fn check_elements(&self) -> Result<()> {
        let (input, output, kernel) = (self.input, self.output, self.kernel);
        let (h, w) = self.axes();
        let padded = (h.padded(), w.padded());
        let padded_gradient = (h.padded_gradient(), w.padded_gradient());
        for (what, channels, size) in [
            ("input", self.c_in, input),
            ("output", self.c_out, output),
            ("padded input", self.c_in, padded),
            ("padded gradient of the output", self.c_out, padded_gradient),
        ] {
            // What is counted of one image must not overflow where there is none, either.
            let shape = [self.batch.max(1), channels, size.0, size.1];
            OpError::check_elements(OP, what, &shape)?;
        }
        OpError::check_elements(OP, "weight", &[self.c_out, self.c_in, kernel.0, kernel.1])
    }

    /// Refuses an output of all images, and what the forward pass lays out of one image, that there is no room for on the
    /// CPU.
    fn check_forward_room<T>(&self) -> Result<()> {
        let (h, w) = self.axes();
        let padded = [self.c_in, h.padded(), w.padded()];
        OpError::check_room::<T>(OP, "output", self.output_shape().dims())?;
        OpError::check_room::<T>(OP, "padded input of an image", &padded)?;
        let results = [
            self.c_out.next_multiple_of(ALIGNMENT),
            self.output.0,
            self.output.1,
        ];
        OpError::check_room::<T>(OP, "output of an image, in whole vectors,", &results)
    }

    /// The same for what the backward pass lays out besides.
    fn check_backward_room<T>(&self, needs_input: bool) -> Result<()> {
        if !needs_input {
            return Ok(());
        }
        let (h, w) = self.axes();
        let padded = [self.c_out, h.padded_gradient(), w.padded_gradient()];
        OpError::check_room::<T>(OP, "padded gradient of an image's output", &padded)?;
        let results = [
            self.c_in.next_multiple_of(ALIGNMENT),
            self.input.0,
            self.input.1,
        ];
        OpError::check_room::<T>(OP, "gradient of an image, in whole vectors,", &results)
    }

    fn output_shape(&self) -> Shape {
        Shape::from((self.batch, self.c_out, self.output.0, self.output.1))
    }

    /// How many elements the tensor has that a pass writes.
    #[cfg(feature = "cuda")]
    fn written_by(&self, pass: Pass) -> usize {
        match pass {
            Pass::Forward => self.batch * self.c_out * self.output.0 * self.output.1,
            Pass::InputGradient => self.batch * self.c_in * self.input.0 * self.input.1,
            Pass::WeightGradient => self.c_out * self.c_in * self.kernel.0 * self.kernel.1,
        }
    }

    /// Row and column of the one tap of a larger kernel that ever meets the
    /// image, where that is a single pixel: the others see padding alone.
    fn only_tap(&self) -> Option<(usize, usize)> {
        if self.input != (1, 1) || self.output != (1, 1) || self.kernel == (1, 1) {
            return None;
        }
        let (h, w) = self.axes();
        Some((h.only_tap()?, w.only_tap()?))
    }

    /// The vertical axis and the horizontal one.
    fn axes(&self) -> (ConvAxis, ConvAxis) {
        ConvAxis::both(self.input, self.kernel, &self.config)
    }

    /// Multiply-accumulate operations of the forward pass.
    pub fn macs(&self) -> u64 {
        let per_pixel = self.c_in * self.kernel.0 * self.kernel.1 * self.c_out;
        let pixels = self.batch * self.output.0 * self.output.1;
        (pixels as u64).saturating_mul(per_pixel as u64)
    }
}

/// One axis of a convolution.
#[derive(Clone, Copy)]
struct ConvAxis {
    input: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
    dilation: usize,
}

impl ConvAxis {
    /// The vertical axis and the horizontal one.
    fn both(input: (usize, usize), kernel: (usize, usize), config: &Conv2dConfig) -> (Self, Self) {
        let vertical = Self {
            input: input.0,
            kernel: kernel.0,
            stride: config.stride.0,
            padding: config.padding.0,
            dilation: config.dilation.0,
        };
        let horizontal = Self {
            input: input.1,
            kernel: kernel.1,
            stride: config.stride.1,
            padding: config.padding.1,
            dilation: config.dilation.1,
        };
        (vertical, horizontal)
    }

    /// `dilation·(kernel − 1)`: pixels from the first tap of a kernel to the last.
    fn reach(&self) -> usize {
        self.dilation.saturating_mul(self.kernel.saturating_sub(1))
    }

    /// `⌊(input + 2·padding − dilation·(kernel − 1) − 1) / stride⌋ + 1`, if there is one.
    fn output(&self) -> Option<usize> {
        let reach = self.dilation.checked_mul(self.kernel.checked_sub(1)?)?;
        let window = reach.checked_add(1)?;
        let padded = self.input.checked_add(self.padding.checked_mul(2)?)?;
        Some(padded.checked_sub(window)?.checked_div(self.stride)? + 1)
    }

    /// Pixels of the input with its padding.
    fn padded(&self) -> usize {
        self.input.saturating_add(self.padding.saturating_mul(2))
    }

    /// Pixels of the padded output gradient from which the input gradient is gathered, at most.
    fn padded_gradient(&self) -> usize {
        let before = self.reach().saturating_sub(self.padding);
        let behind = self.input.saturating_add(self.padding);
        before
            .div_ceil(self.stride)
            .saturating_add(behind / self.stride)
            .saturating_add(1)
    }

    /// The tap that meets an input of a single pixel, of which there is one output.
    fn only_tap(&self) -> Option<usize> {
        let tap = self.padding / self.dilation;
        (self.padding.is_multiple_of(self.dilation) && tap < self.kernel).then_some(tap)
    }
}

/// Refuses padding alone, and a sum over no channels, which are no convolution.
fn check_not_empty(x: &Tensor, weight: &Tensor) -> Result<()> {
    for (name, tensor, sizes, expected) in [
        (
            "input",
            x,
            &x.dims()[1..],
            "(N, C, H, W) with at least one channel and pixel",
        ),
        (
            "weight",
            weight,
            weight.dims(),
            "(C_out, C_in, kernel height, kernel width), each at least 1",
        ),
    ] {
        if sizes.contains(&0) {
            return Err(OpError::shape(OP, name, tensor, expected));
        }
    }
    Ok(())
}

/// Refuses a weight for another number of input channels than `x` (N, C, H, W) has.
fn check_channels(x: &Tensor, weight: &Tensor) -> Result<()> {
    let (c_in, c_out, weight_c_in) = (x.dims()[1], weight.dims()[0], weight.dims()[1]);
    if c_in == weight_c_in {
        return Ok(());
    }
    // A weight for groups has the channels of one of them.
    let groups = c_in.checked_div(weight_c_in).unwrap_or(0);
    let is_grouped = c_in.is_multiple_of(weight_c_in) && c_out.is_multiple_of(groups);
    let rule = if is_grouped {
        "dimension 1 of both is the number of input channels; grouped convolutions are not there"
    } else {
        "dimension 1 of both is the number of input channels"
    };
    Err(OpError::shapes(
        OP,
        ("input", x.dims()),
        ("weight", weight.dims()),
        rule,
    ))
}

/// Convolves `x` (N, C_in, H, W) with `weight` (C_out, C_in, R, S) and adds
/// `bias` (C_out); returns (N, C_out, H', W') with
/// `H' = ⌊(H + 2·padding − dilation·(R − 1) − 1) / stride⌋ + 1`.
///
/// Same definition as `torch.nn.functional.conv2d` with one group. f32 and
/// f64, on CUDA also bf16 (with sums in f32); any strides. Gradients of `x`, `weight` and `bias` come through
/// `backward()`; one that nobody needs is not computed.
///
/// # Errors
/// [`OpError`] inside [`candle_core::Error`] for shapes, settings, dtypes and
/// devices that do not fit.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_cnn::{Conv2dConfig, conv2d};
/// let x = Tensor::ones((1, 2, 4, 4), candle_core::DType::F32, &Device::Cpu)?;
/// let weight = Tensor::ones((3, 2, 3, 3), candle_core::DType::F32, &Device::Cpu)?;
/// let y = conv2d(&x, &weight, None, Conv2dConfig::padded(1))?;
/// assert_eq!(y.dims(), [1, 3, 4, 4]);
/// assert_eq!(y.get(0)?.get(0)?.get(1)?.get(1)?.to_scalar::<f32>()?, 18.0);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    config: Conv2dConfig,
) -> Result<Tensor> {
    apply(x, weight, bias, config, Activation::Identity)
}

/// [`conv2d`] followed by [`crate::relu`], in one pass over the output.
///
/// Equal to the two operations one after the other, on the CPU bit for bit,
/// with the mask applied inside the convolution's backward.
///
/// # Errors
/// As [`conv2d`].
pub fn conv2d_relu(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    config: Conv2dConfig,
) -> Result<Tensor> {
    apply(x, weight, bias, config, Activation::Relu)
}

fn apply(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    config: Conv2dConfig,
    activation: Activation,
) -> Result<Tensor> {
    let geometry = Conv2dGeometry::new(x, weight, config)?;
    if let Some((r, s)) = geometry.only_tap() {
        let tap = weight.narrow(2, r, 1)?.narrow(3, s, 1)?;
        return apply(x, &tap, bias, Conv2dConfig::default(), activation);
    }
    let dtype = match bias {
        None => float_dtype(OP, &[x, weight])?,
        Some(bias) => {
            if bias.dims() != [geometry.c_out] {
                return Err(OpError::shapes(
                    OP,
                    ("bias", bias.dims()),
                    ("weight", weight.dims()),
                    "the bias has one value per output channel",
                ));
            }
            float_dtype(OP, &[x, weight, bias])?
        }
    };
    let op = Conv2d {
        geometry,
        dtype,
        activation,
    };
    let x = x.contiguous()?;
    let weight = weight.contiguous()?;
    match bias {
        None => x.apply_op2(&weight, op),
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, op),
    }
}

/// The operation as a node of Candle's graph.
struct Conv2d {
    geometry: Conv2dGeometry,
    dtype: DType,
    activation: Activation,
}

impl Conv2d {
    fn forward(
        &self,
        x: (&CpuStorage, &Layout),
        weight: (&CpuStorage, &Layout),
        bias: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let (isa, activation) = (Isa::detect(), self.activation);
        let shape = self.geometry.output_shape();
        dispatch!(OP, self.dtype, T => {
            let x = slice::<T>(OP, x.0, x.1)?;
            let weight = slice::<T>(OP, weight.0, weight.1)?;
            let bias = bias.map(|(s, l)| slice::<T>(OP, s, l)).transpose()?;
            self.geometry.check_forward_room::<T>()?;
            let y = cpu::forward(&self.geometry, isa, x, weight, bias, activation);
            Ok((T::to_cpu_storage_owned(y), shape))
        })
    }

    fn backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let needs = cpu::Needs {
            input: x.track_op(),
            weight: weight.track_op(),
            bias: bias.is_some_and(Tensor::track_op),
        };
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return cuda::backward(self, [x, weight, y, &dy], needs);
        }
        dispatch!(OP, self.dtype, T => self.backward_typed::<T>(x, weight, y, &dy, needs))
    }

    fn backward_typed<T: Element>(
        &self,
        x: &Tensor,
        weight: &Tensor,
        y: &Tensor,
        dy: &Tensor,
        needs: cpu::Needs,
    ) -> Result<[Option<Tensor>; 3]> {
        self.geometry.check_backward_room::<T>(needs.input)?;
        let tensors = [x, weight, y, dy];
        let gradients = with_slices::<T, _, _>(OP, tensors, |[x, weight, y, dy]| {
            let mask = (self.activation == Activation::Relu).then_some(y);
            let isa = Isa::detect();
            Ok(cpu::backward(
                &self.geometry,
                isa,
                x,
                weight,
                mask,
                dy,
                needs,
            ))
        })?;
        let tensor = |data: Option<Vec<T>>, shape: Shape| {
            data.map(|data| Tensor::from_vec(data, shape, x.device()))
                .transpose()
        };
        Ok([
            tensor(gradients.input, x.shape().clone())?,
            tensor(gradients.weight, weight.shape().clone())?,
            tensor(gradients.bias, Shape::from(self.geometry.c_out))?,
        ])
    }
}

impl CustomOp2 for Conv2d {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((x, x_layout), (weight, weight_layout), None)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::forward(self, (x, x_layout), (weight, weight_layout), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dweight, _] = self.backward(x, weight, None, y, dy)?;
        Ok((dx, aside(weight, dweight)))
    }
}

impl CustomOp3 for Conv2d {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward(
            (x, x_layout),
            (weight, weight_layout),
            Some((bias, bias_layout)),
        )
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::forward(
            self,
            (x, x_layout),
            (weight, weight_layout),
            Some((bias, bias_layout)),
        )
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dweight, dbias] = self.backward(x, weight, Some(bias), y, dy)?;
        Ok((dx, aside(weight, dweight), aside(bias, dbias)))
    }
}
