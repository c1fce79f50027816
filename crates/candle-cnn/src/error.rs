//! What can be wrong with the arguments of an operation.

use candle_core::{DType, Error, Layout, Tensor};

/// An argument that an operation cannot take.
///
/// The operations return it inside [`candle_core::Error::Wrapped`], which shows it but does not give it back
/// (Candle 0.11): there it is a text.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OpError {
    /// Two shapes do not fit together.
    #[error("{op}: {left_name} {left:?} does not fit {right_name} {right:?}: {rule}")]
    Shapes {
        /// The operation, as PyTorch names it.
        op: &'static str,
        /// What the left shape is of.
        left_name: &'static str,
        /// The left shape.
        left: Vec<usize>,
        /// What the right shape is of.
        right_name: &'static str,
        /// The right shape.
        right: Vec<usize>,
        /// What must hold between them.
        rule: &'static str,
    },
    /// A tensor has a shape that the operation does not take: the wrong number of dimensions, or one of a wrong size.
    #[error("{op}: {name} has shape {found:?}, expected {expected}")]
    WrongShape {
        /// The operation, as PyTorch names it.
        op: &'static str,
        /// The argument.
        name: &'static str,
        /// The argument's shape.
        found: Vec<usize>,
        /// What it may be, in words.
        expected: &'static str,
    },
    /// A setting is out of its range.
    #[error("{op}: {name} is {found}, expected {expected}")]
    Setting {
        /// The operation, as PyTorch names it.
        op: &'static str,
        /// The setting.
        name: &'static str,
        /// The setting's value.
        found: String,
        /// What the setting may be, in words.
        expected: &'static str,
    },
    /// An environment variable asks for what there is not.
    #[error(
        "{variable} is {found:?}, but this machine has only {}: take one of them, or unset the variable",
        available.join(", ")
    )]
    Unavailable {
        /// The environment variable.
        variable: &'static str,
        /// The variable's value.
        found: String,
        /// The values that the variable may have on this machine.
        available: Vec<&'static str>,
    },
    /// The window does not fit into the padded input.
    #[error(
        "{op}: a window of {window:?} does not fit the input of {input:?} pixels padded by {padding:?}"
    )]
    Window {
        /// The operation, as PyTorch names it.
        op: &'static str,
        /// Height and width of the (dilated) window.
        window: (usize, usize),
        /// Height and width of the input.
        input: (usize, usize),
        /// Padding on each side, vertical and horizontal.
        padding: (usize, usize),
    },
    /// More elements than memory can be addressed for, or than the machine has room for.
    #[error("{op}: {what} of shape {found:?} has more elements than memory can hold")]
    Elements {
        /// The operation, as PyTorch names it.
        op: &'static str,
        /// The tensor, or what is made of it on the way.
        what: &'static str,
        /// The shape with too many elements.
        found: Vec<usize>,
    },
    /// An element type without an implementation.
    #[error("{op}: dtype {found:?} is not supported, expected F32 or F64 (or on CUDA BF16)")]
    DType {
        /// The operation, as PyTorch names it.
        op: &'static str,
        /// The dtype found.
        found: DType,
    },
    /// Arguments of different element types.
    #[error("{op}: arguments of dtype {left:?} and {right:?}, expected one dtype")]
    DTypeMismatch {
        /// The operation, as PyTorch names it.
        op: &'static str,
        /// The first argument's dtype.
        left: DType,
        /// The other argument's dtype.
        right: DType,
    },
    /// A parameter of an element type that does not go with the input's.
    #[error("{op}: {name} has dtype {found:?}, expected {expected:?} for an input of {input:?}")]
    ParameterDType {
        /// The operation, as PyTorch names it.
        op: &'static str,
        /// The parameter.
        name: &'static str,
        /// The parameter's dtype.
        found: DType,
        /// The dtype that a parameter has with this input.
        expected: DType,
        /// The input's dtype.
        input: DType,
    },
    /// A label outside of the classes.
    #[error(
        "{op}: label {label} of example {example} is none of the {classes} classes, which count from 0; there is no ignore_index"
    )]
    Label {
        /// The operation, as PyTorch names it.
        op: &'static str,
        /// The example's position in the batch.
        example: usize,
        /// The example's label.
        label: i64,
        /// The number of classes.
        classes: usize,
    },
    /// A device without an implementation.
    #[error("{op}: no implementation for device {device}")]
    Device {
        /// The operation, as PyTorch names it.
        op: &'static str,
        /// The device.
        device: String,
    },
    /// A call of cuDNN that did not succeed.
    #[error("{op}: {call} failed with {status}{details}, for {problem}")]
    Cudnn {
        /// The operation, as PyTorch names it.
        op: &'static str,
        /// The function of cuDNN.
        call: &'static str,
        /// The status that it returned.
        status: String,
        /// What cuDNN says of its last error, in brackets, or nothing.
        details: String,
        /// Shapes, settings and dtype that it was called for.
        problem: String,
    },
    /// A CUDA kernel of this crate that NVRTC does not compile.
    #[error("{file} does not compile: {log}")]
    Kernel {
        /// The source, under `src`.
        file: &'static str,
        /// What NVRTC says.
        log: String,
    },
    /// A computation for which cuDNN has no engine.
    #[error("{op}: cuDNN has no {deterministic}engine for {problem}")]
    NoEngine {
        /// The operation, as PyTorch names it.
        op: &'static str,
        /// `"deterministic "` where only such were asked for, else empty.
        deterministic: &'static str,
        /// Shapes, settings and dtype.
        problem: String,
    },
    /// A size beyond what cuDNN can be told, which is a C `int`.
    #[error("{op}: {what} is {found}, cuDNN takes at most {limit}", limit = i32::MAX)]
    CudnnSize {
        /// The operation, as PyTorch names it.
        op: &'static str,
        /// What is too large.
        what: &'static str,
        /// The size found.
        found: usize,
    },
    /// A tensor with more elements than the CUDA kernels count.
    #[error("{op}: {elements} elements, the CUDA kernels count to {limit}", limit = i32::MAX)]
    KernelSize {
        /// The operation, as PyTorch names it.
        op: &'static str,
        /// The tensor's elements.
        elements: usize,
    },
    /// Statistics of a batch that its forward pass should have left: a defect of this crate.
    #[error("{op}: the forward pass has left no statistics of the batch, a defect of candle-cnn")]
    NoStatistics {
        /// The operation, as PyTorch names it.
        op: &'static str,
    },
    /// A layout that should have been made contiguous: a defect of this crate.
    #[error("{op}: layout {layout} is not contiguous")]
    NotContiguous {
        /// The operation, as PyTorch names it.
        op: &'static str,
        /// The layout.
        layout: String,
    },
}

impl From<OpError> for Error {
    fn from(error: OpError) -> Self {
        Error::wrap(error)
    }
}

impl OpError {
    pub(crate) fn dtype(op: &'static str, found: DType) -> Error {
        Self::DType { op, found }.into()
    }

    pub(crate) fn dtype_mismatch(op: &'static str, left: DType, right: DType) -> Error {
        Self::DTypeMismatch { op, left, right }.into()
    }

    pub(crate) fn device(op: &'static str, tensor: &Tensor) -> Error {
        let device = format!("{:?}", tensor.device().location());
        Self::Device { op, device }.into()
    }

    /// The error of an operation that runs on CUDA alone and was asked to run on the CPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_cpu(op: &'static str) -> Error {
        let device = "Cpu".to_owned();
        Self::Device { op, device }.into()
    }

    pub(crate) fn not_contiguous(op: &'static str, layout: &Layout) -> Error {
        let layout = format!("{layout:?}");
        Self::NotContiguous { op, layout }.into()
    }

    /// Two shapes that do not fit together: each with what it is of.
    pub(crate) fn shapes(
        op: &'static str,
        (left_name, left): (&'static str, &[usize]),
        (right_name, right): (&'static str, &[usize]),
        rule: &'static str,
    ) -> Error {
        let (left, right) = (left.to_vec(), right.to_vec());
        Self::Shapes {
            op,
            left_name,
            left,
            right_name,
            right,
            rule,
        }
        .into()
    }

    pub(crate) fn shape(
        op: &'static str,
        name: &'static str,
        tensor: &Tensor,
        expected: &'static str,
    ) -> Error {
        let found = tensor.dims().to_vec();
        Self::WrongShape {
            op,
            name,
            found,
            expected,
        }
        .into()
    }

    /// Refuses shapes whose elements no memory holds, so that nobody who counts them overflows.
    pub(crate) fn check_elements(
        op: &'static str,
        what: &'static str,
        shape: &[usize],
    ) -> Result<(), Error> {
        const MOST: usize = isize::MAX as usize / size_of::<f64>();
        let count = shape
            .iter()
            .try_fold(1usize, |count, &size| count.checked_mul(size));
        if count.is_some_and(|count| count <= MOST) {
            return Ok(());
        }
        let found = shape.to_vec();
        Err(Self::Elements { op, what, found }.into())
    }

    /// Refuses a shape whose elements the machine has no room for, where the allocator says so: asking it beforehand gives an
    /// error, asking it for the memory itself ends the program.
    pub(crate) fn check_room<T>(
        op: &'static str,
        what: &'static str,
        shape: &[usize],
    ) -> Result<(), Error> {
        /// Elements that are not asked for twice.
        const FEW: usize = 1 << 28;
        Self::check_elements(op, what, shape)?;
        let count: usize = shape.iter().product();
        if count <= FEW || Vec::<T>::new().try_reserve_exact(count).is_ok() {
            return Ok(());
        }
        let found = shape.to_vec();
        Err(Self::Elements { op, what, found }.into())
    }

    pub(crate) fn setting(
        op: &'static str,
        name: &'static str,
        found: impl std::fmt::Debug,
        expected: &'static str,
    ) -> Error {
        let found = format!("{found:?}");
        Self::Setting {
            op,
            name,
            found,
            expected,
        }
        .into()
    }
}
