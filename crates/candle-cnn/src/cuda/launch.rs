//! Operands, results and arguments of kernels, by element type.

#![allow(unsafe_code)]

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, PushKernelArg,
    SyncOnDrop,
};
use candle_core::cuda_backend::{CudaDevice, CudaStorageSlice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Layout, Result, Shape, Storage, StorageRef, Tensor};
use half::bf16;

use super::kernels::{self, Source};
use crate::error::OpError;
use crate::window::Axis;

/// Threads of every block, as in `prelude.cuh`.
pub(crate) const THREADS: u32 = 256;

/// CUDA takes 4 KiB of arguments; 64 bytes are for those beside a table.
pub(crate) const MOST_IN_TABLE: usize = 4096 - 64;

/// A contiguous operand and where it lies.
pub(crate) type Operand<'a> = (&'a CudaStorage, &'a Layout);

/// The ending of the kernels' names for a type.
fn suffix(op: &'static str, dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::F64 => Ok("f64"),
        DType::BF16 => Ok("bf16"),
        other => Err(OpError::dtype(op, other)),
    }
}

/// The type in which statistics, parameters and losses of a type's activations are kept.
pub(crate) fn compute_dtype(dtype: DType) -> DType {
    match dtype {
        DType::BF16 => DType::F32,
        other => other,
    }
}

/// A number that the kernels count in 32 bits, and to which a block's threads may be added.
pub(crate) fn count(op: &'static str, elements: usize) -> Result<u32> {
    match u32::try_from(elements) {
        Ok(count) if count <= i32::MAX as u32 => Ok(count),
        _ => Err(OpError::KernelSize { op, elements }.into()),
    }
}

/// `Axis` of prelude.cuh.
pub(crate) fn axis(op: &'static str, axis: &Axis) -> Result<[u32; 5]> {
    let reach = axis.output * axis.stride + axis.kernel;
    count(op, reach.max(axis.input + 2 * axis.padding))?;
    Ok([
        axis.input,
        axis.output,
        axis.kernel,
        axis.stride,
        axis.padding,
    ]
    .map(|number| number as u32))
}

/// The `end` of the entries of a table that are not used: their blocks come after all that are launched.
pub(crate) const UNUSED_ENTRY: u32 = u32::MAX;

/// `Divisor` of prelude.cuh.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Divisor([u32; 3]);

// SAFETY: plain numbers, laid out as the prelude has them, without padding.
unsafe impl DeviceRepr for Divisor {}

impl Divisor {
    /// The divisor `number`, which is below 2^31. A 0 becomes 1, for kernels that have nothing to divide.
    pub(crate) fn of(number: usize) -> Self {
        let number = number.clamp(1, i32::MAX as usize) as u64;
        let shift = u64::from(number.next_power_of_two().trailing_zeros());
        let multiplier = (((1 << shift) - number) << 32) / number + 1;
        Self([number, multiplier, shift].map(|number| number as u32))
    }
}

/// A tensor's memory, held against being written from elsewhere.
pub(crate) struct Held<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Held<'a> {
    pub(crate) fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    /// The tensor as an operand; an error where it is not on CUDA.
    pub(crate) fn operand(&self, op: &'static str) -> Result<Operand<'_>> {
        match &*self.storage {
            Storage::Cuda(storage) => Ok((storage, self.layout)),
            other => Err(OpError::Device {
                op,
                device: format!("{:?}", other.device().location()),
            }
            .into()),
        }
    }
}

/// Runs an expression with the typed slice of a storage, which is of `$dtype`.
macro_rules! typed {
    ($op:expr, $dtype:expr, $storage:expr, $slice:ident => $body:expr) => {
        match $storage {
            CudaStorageSlice::F32($slice) => $body,
            CudaStorageSlice::F64($slice) => $body,
            CudaStorageSlice::BF16($slice) => $body,
            CudaStorageSlice::U8($slice) => $body,
            CudaStorageSlice::U32($slice) => $body,
            CudaStorageSlice::I64($slice) => $body,
            _ => Err(OpError::dtype($op, $dtype)),
        }
    };
}

/// Memory for `elements` numbers that a kernel is about to write.
pub(crate) fn alloc(
    op: &'static str,
    device: &CudaDevice,
    dtype: DType,
    elements: usize,
) -> Result<CudaStorage> {
    // CUDA allocates nothing of size 0.
    let elements = elements.max(1);
    // SAFETY: the caller has a kernel write every element before anything reads them.
    let slice = unsafe {
        match dtype {
            DType::F32 => CudaStorageSlice::F32(device.alloc::<f32>(elements)?),
            DType::F64 => CudaStorageSlice::F64(device.alloc::<f64>(elements)?),
            DType::BF16 => CudaStorageSlice::BF16(device.alloc::<bf16>(elements)?),
            DType::U32 => CudaStorageSlice::U32(device.alloc::<u32>(elements)?),
            DType::U8 => CudaStorageSlice::U8(device.alloc::<u8>(elements)?),
            other => return Err(OpError::dtype(op, other)),
        }
    };
    let device = device.clone();
    Ok(CudaStorage { slice, device })
}

/// Memory for `elements` numbers, all zero.
pub(crate) fn zeros(device: &CudaDevice, dtype: DType, elements: usize) -> Result<CudaStorage> {
    // CUDA allocates nothing of size 0.
    device.zeros_impl(&Shape::from(elements.max(1)), dtype)
}

/// A result as a tensor, outside of any graph of gradients.
pub(crate) fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// An argument: CUDA takes as many of its bytes as the parameter has, from the lowest on.
#[repr(C)]
struct Argument([u64; 4]);

// SAFETY: plain numbers without padding.
unsafe impl DeviceRepr for Argument {}

/// A kernel and its arguments, in the order of its parameters.
pub(crate) struct Launch<'a> {
    op: &'static str,
    function: CudaFunction,
    stream: &'a CudaStream,
    arguments: Vec<Argument>,
    held: Vec<SyncOnDrop<'a>>,
}

impl<'a> Launch<'a> {
    /// The launch of the kernel `name` in `source`.
    pub(crate) fn new(
        op: &'static str,
        device: &CudaDevice,
        stream: &'a CudaStream,
        source: &Source,
        name: &str,
    ) -> Result<Self> {
        Ok(Self {
            op,
            function: kernels::function(device, source, name)?,
            stream,
            arguments: Vec::new(),
            held: Vec::new(),
        })
    }

    /// The launch of the kernel of that name in `source` for a type of activations: `<name>_<type>`.
    pub(crate) fn typed(
        op: &'static str,
        device: &CudaDevice,
        stream: &'a CudaStream,
        source: &Source,
        name: &str,
        dtype: DType,
    ) -> Result<Self> {
        let name = format!("{name}_{}", suffix(op, dtype)?);
        Self::new(op, device, stream, source, &name)
    }

    /// A pointer to what is read.
    pub(crate) fn read(mut self, operand: Operand<'a>) -> Result<Self> {
        let (pointer, held) = address(self.op, operand, self.stream)?;
        self.held.push(held);
        Ok(self.long(pointer))
    }

    /// A pointer to the whole of a storage that another kernel has written.
    pub(crate) fn read_all(mut self, storage: &'a CudaStorage) -> Result<Self> {
        let (pointer, held) = address_of_all(self.op, storage, self.stream)?;
        self.held.push(held);
        Ok(self.long(pointer))
    }

    /// A pointer to what is written.
    pub(crate) fn write(mut self, storage: &'a mut CudaStorage) -> Result<Self> {
        let (pointer, held) = address_mut(self.op, storage, self.stream)?;
        self.held.push(held);
        Ok(self.long(pointer))
    }

    /// A null pointer.
    pub(crate) fn null(self) -> Self {
        self.long(0)
    }

    /// An `unsigned int`.
    pub(crate) fn number(self, number: u32) -> Self {
        self.long(number.into())
    }

    /// An `unsigned long long`.
    pub(crate) fn long(mut self, number: u64) -> Self {
        self.arguments.push(Argument([number, 0, 0, 0]));
        self
    }

    /// A structure of `unsigned int`s, eight at most.
    pub(crate) fn structure<const N: usize>(mut self, numbers: [u32; N]) -> Self {
        const { assert!(N <= 8) };
        let mut words = [0; 4];
        for (i, number) in numbers.into_iter().enumerate() {
            words[i / 2] |= u64::from(number) << (32 * (i % 2));
        }
        self.arguments.push(Argument(words));
        self
    }

    /// A number to divide by.
    pub(crate) fn divisor(self, number: usize) -> Self {
        self.structure(Divisor::of(number).0)
    }

    /// A `float`.
    pub(crate) fn float(self, number: f32) -> Self {
        self.number(number.to_bits())
    }

    /// A `double`.
    pub(crate) fn double(self, number: f64) -> Self {
        self.long(number.to_bits())
    }

    /// Launches a thread for each of `threads`, of which there is at least one.
    ///
    /// # Safety
    /// The arguments must be those of the kernel, and the memory behind the pointers of the sizes that it goes by.
    pub(crate) unsafe fn run(self, threads: u32) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.run_blocks((threads.div_ceil(THREADS), 1)) }
    }

    /// Launches `grid` blocks.
    ///
    /// # Safety
    /// As [`Self::run`].
    pub(crate) unsafe fn run_blocks(self, grid: (u32, u32)) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch(grid, None::<&Argument>) }
    }

    /// Launches `grid` blocks of a kernel that has a structure before its other arguments.
    ///
    /// # Safety
    /// As [`Self::run`].
    pub(crate) unsafe fn run_with_table<S: DeviceRepr>(
        self,
        grid: (u32, u32),
        table: &S,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch(grid, Some(table)) }
    }

    /// # Safety
    /// As [`Self::run`].
    unsafe fn launch<S: DeviceRepr>(self, (x, y): (u32, u32), first: Option<&S>) -> Result<()> {
        let mut arguments = self.stream.launch_builder(&self.function);
        if let Some(first) = first {
            arguments.arg(first);
        }
        for argument in &self.arguments {
            arguments.arg(argument);
        }
        let grid = LaunchConfig {
            grid_dim: (x, y, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the caller's promise.
        unsafe { arguments.launch(grid) }.w()?;
        Ok(())
    }
}

/// The address of a contiguous operand's first element, and what holds it against being freed.
pub(crate) fn address<'a>(
    op: &'static str,
    (storage, layout): Operand<'a>,
    stream: &'a CudaStream,
) -> Result<(CUdeviceptr, SyncOnDrop<'a>)> {
    let (start, _) = layout
        .contiguous_offsets()
        .ok_or_else(|| OpError::not_contiguous(op, layout))?;
    let bytes = (start * storage.dtype().size_in_bytes()) as u64;
    let (pointer, held) = address_of_all(op, storage, stream)?;
    Ok((pointer + bytes, held))
}

/// The address of a storage's first element, and what holds it against being freed.
pub(crate) fn address_of_all<'a>(
    op: &'static str,
    storage: &'a CudaStorage,
    stream: &'a CudaStream,
) -> Result<(CUdeviceptr, SyncOnDrop<'a>)> {
    typed!(op, storage.dtype(), &storage.slice, slice => Ok(slice.device_ptr(stream)))
}

/// The address of the first element of a storage that is written, and what holds it against being freed.
pub(crate) fn address_mut<'a>(
    op: &'static str,
    storage: &'a mut CudaStorage,
    stream: &'a CudaStream,
) -> Result<(CUdeviceptr, SyncOnDrop<'a>)> {
    let dtype = storage.dtype();
    typed!(op, dtype, &mut storage.slice, slice => Ok(slice.device_ptr_mut(stream)))
}

/// The address of a storage's first element, for a table of pointers. What is launched with it must come before the storage is
/// freed, in the device's one stream.
pub(crate) fn start(
    op: &'static str,
    storage: &CudaStorage,
    stream: &CudaStream,
) -> Result<CUdeviceptr> {
    Ok(address_of_all(op, storage, stream)?.0)
}

#[cfg(test)]
mod tests {
    use test_support::devices;

    use super::*;

    #[test]
    fn a_type_that_no_kernel_takes_is_an_error_that_names_it() -> Result<()> {
        for device in devices().iter().filter(|device| device.is_cuda()) {
            let stream = device.as_cuda_device()?.cuda_stream();
            for dtype in [DType::I16, DType::I32, DType::F16] {
                let expected = format!("relu: dtype {dtype:?} is not supported");
                let numbers = Tensor::zeros(2, dtype, device)?;
                let held = Held::new(&numbers);
                let read = address("relu", held.operand("relu")?, &stream).unwrap_err();
                let mut numbers = zeros(device.as_cuda_device()?, dtype, 2)?;
                let written = address_mut("relu", &mut numbers, &stream).unwrap_err();
                for text in [read.to_string(), written.to_string()] {
                    assert!(text.starts_with(&expected), "{text}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn threads_divide_by_multiplying() {
        let powers = (0..31).flat_map(|shift| [1u64 << shift, (1 << shift) + 1, (2 << shift) - 1]);
        for number in (1..2000).chain(powers) {
            let [divisor, multiplier, shift] = Divisor::of(number as usize).0.map(u64::from);
            assert_eq!(divisor, number);
            let near = (1..40).flat_map(|k| [k * number - 1, k * number, k * number + 1]);
            let far = [
                0,
                12_345_678,
                (1 << 31) - 2,
                (1 << 31) - 1,
                ((1 << 31) - 1) / number * number,
            ];
            for n in near.chain(far).filter(|&n| n < 1 << 31) {
                let sum = ((n * multiplier) >> 32) + n;
                assert!(sum < 1 << 32, "{n} by {number}");
                assert_eq!(sum >> shift, n / number, "{n} by {number}");
            }
        }
    }
}
