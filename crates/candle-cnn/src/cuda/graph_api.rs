//! cuDNN's graph API: a computation is described as operations on tensors, and cuDNN names the engines that compute it.
//!
//! The older functions, with an algorithm for each name, are deprecated in cuDNN 9, and PyTorch computes by this API too: who
//! times the same engines need not be slower. And it alone can be asked without a GPU what there is for one
//! (`cargo xtask cuda-emulate --cudnn`). A description is made of *descriptors*: objects with attributes, finalised once
//! all are set. NVIDIA's documentation of the backend API lists them.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ptr::null_mut;
use std::rc::Rc;

use candle_core::cuda_backend::cudarc::cudnn::result::CudnnError;
use candle_core::cuda_backend::cudarc::cudnn::sys::{
    self, cudnnBackendAttributeName_t as Name, cudnnBackendAttributeType_t as Type,
    cudnnBackendDescriptorType_t as Kind,
};

use super::cudnn::Handle;
use crate::conv2d::Notes;

pub(crate) type Described<T> = std::result::Result<T, CudnnError>;

/// An object of the graph API, freed when dropped.
pub(crate) struct Descriptor(sys::cudnnBackendDescriptor_t);

impl Descriptor {
    pub(crate) fn new(kind: Kind) -> Described<Self> {
        let mut raw = null_mut();
        // SAFETY: writes one pointer.
        unsafe { sys::cudnnBackendCreateDescriptor(kind, &raw mut raw) }.result()?;
        Ok(Self(raw))
    }

    /// Sets an attribute that is one value.
    pub(crate) fn with<T: Value>(self, name: Name, value: T) -> Described<Self> {
        self.with_all(name, &[value])
    }

    /// Sets an attribute that is a list.
    pub(crate) fn with_all<T: Value>(self, name: Name, values: &[T]) -> Described<Self> {
        // SAFETY: `T::TYPE` is the name of the C type that has `T`'s layout. cuDNN checks whether the attribute is of
        // it, and copies as many values as it is told of.
        unsafe {
            sys::cudnnBackendSetAttribute(
                self.0,
                name,
                T::TYPE,
                values.len() as i64,
                values.as_ptr().cast(),
            )
        }
        .result()?;
        Ok(self)
    }

    /// Sets an attribute that is one other descriptor. cuDNN copies finalised ones.
    pub(crate) fn with_descriptor(self, name: Name, other: &Self) -> Described<Self> {
        self.with(name, Reference(other.0))
    }

    /// Sets an attribute that is a list of other descriptors.
    pub(crate) fn with_descriptors(self, name: Name, others: &[Self]) -> Described<Self> {
        let others: Vec<_> = others.iter().map(|other| Reference(other.0)).collect();
        self.with_all(name, &others)
    }

    /// The descriptor, ready for use; or what cuDNN has against it.
    pub(crate) fn finalized(self) -> Described<Self> {
        // SAFETY: the descriptor exists.
        unsafe { sys::cudnnBackendFinalize(self.0) }.result()?;
        Ok(self)
    }

    /// The values of an attribute, `most` at the most.
    fn get<T: Value>(&self, name: Name, most: usize, blank: T) -> Described<Vec<T>> {
        let mut values = vec![blank; most];
        // SAFETY: there is room for `most` values.
        let count = unsafe { self.get_raw::<T>(name, most, values.as_mut_ptr()) }?;
        values.truncate(count);
        Ok(values)
    }

    /// How many descriptors an attribute has, at the most.
    fn count(&self, name: Name) -> Described<usize> {
        // cuDNN tells it only where there is no address, and an empty vector has one.
        // SAFETY: there is room for nothing.
        unsafe { self.get_raw::<Reference>(name, 0, null_mut()) }
    }

    /// Fills descriptors that were made for it with an attribute's values, and returns how many there are.
    fn get_into(&self, name: Name, descriptors: &[Self]) -> Described<usize> {
        let mut raw: Vec<_> = descriptors.iter().map(|d| Reference(d.0)).collect();
        // SAFETY: there are as many descriptors as is told, all of which exist.
        unsafe { self.get_raw(name, raw.len(), raw.as_mut_ptr()) }
    }

    /// # Safety
    /// `into` has room for so many values, which for descriptors exist.
    unsafe fn get_raw<T: Value>(&self, name: Name, room: usize, into: *mut T) -> Described<usize> {
        let mut count = 0;
        // SAFETY: as in `with_all`; the room is the caller's.
        unsafe {
            sys::cudnnBackendGetAttribute(
                self.0,
                name,
                T::TYPE,
                room as i64,
                &raw mut count,
                into.cast(),
            )
        }
        .result()?;
        Ok(usize::try_from(count).unwrap_or(0))
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and destroyed nowhere else. A failure has nobody to hear of it.
        let _ = unsafe { sys::cudnnBackendDestroyDescriptor(self.0) };
    }
}

/// What attributes consist of.
///
/// # Safety
/// `TYPE` is cuDNN's name of a C type with the layout of `Self`.
pub(crate) unsafe trait Value: Copy {
    const TYPE: Type;
}

/// Another descriptor.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Reference(sys::cudnnBackendDescriptor_t);

/// An address on the device.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Address(*mut c_void);

/// cuDNN's handle.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct RawHandle(sys::cudnnHandle_t);

/// A number that stands for a property of an engine's arithmetic. Not cudarc's enum, which a later cuDNN may add to.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct NumericalNote(i32);

macro_rules! values {
    ($($rust:ty: $type:ident),+ $(,)?) => {$(
        // SAFETY: so says cudnn_graph.h of the type, of which cudarc's are translations.
        unsafe impl Value for $rust {
            const TYPE: Type = Type::$type;
        }
    )+};
}

values! {
    i64: CUDNN_TYPE_INT64,
    f32: CUDNN_TYPE_FLOAT,
    f64: CUDNN_TYPE_DOUBLE,
    bool: CUDNN_TYPE_BOOLEAN,
    sys::cudnnDataType_t: CUDNN_TYPE_DATA_TYPE,
    sys::cudnnConvolutionMode_t: CUDNN_TYPE_CONVOLUTION_MODE,
    sys::cudnnPointwiseMode_t: CUDNN_TYPE_POINTWISE_MODE,
    sys::cudnnNanPropagation_t: CUDNN_TYPE_NAN_PROPOGATION,
    sys::cudnnBackendHeurMode_t: CUDNN_TYPE_HEUR_MODE,
    NumericalNote: CUDNN_TYPE_NUMERICAL_NOTE,
    Reference: CUDNN_TYPE_BACKEND_DESCRIPTOR,
    Address: CUDNN_TYPE_VOID_PTR,
    RawHandle: CUDNN_TYPE_HANDLE,
}

impl From<Vec<NumericalNote>> for Notes {
    fn from(notes: Vec<NumericalNote>) -> Self {
        use sys::cudnnBackendNumericalNote_t::*;
        let has = |note| notes.iter().any(|found| found.0 == note as i32);
        Self {
            tensor_cores: has(CUDNN_NUMERICAL_NOTE_TENSOR_CORE),
            rounds_factors: has(CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS),
            rounds_sums: has(CUDNN_NUMERICAL_NOTE_REDUCED_PRECISION_REDUCTION),
            transforms: has(CUDNN_NUMERICAL_NOTE_FFT) || has(CUDNN_NUMERICAL_NOTE_WINOGRAD),
            nondeterministic: has(CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC),
        }
    }
}

/// A computation: operations on tensors, each tensor with a number of its own.
pub(crate) struct OperationGraph {
    graph: Descriptor,
    handle: Rc<Handle>,
}

impl OperationGraph {
    pub(crate) fn new(handle: &Rc<Handle>, operations: &[Descriptor]) -> Described<Self> {
        let graph = Descriptor::new(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?
            .with(
                Name::CUDNN_ATTR_OPERATIONGRAPH_HANDLE,
                RawHandle(handle.raw()),
            )?
            .with_descriptors(Name::CUDNN_ATTR_OPERATIONGRAPH_OPS, operations)?
            .finalized()?;
        Ok(Self {
            graph,
            handle: Rc::clone(handle),
        })
    }

    /// Engines with all their settings, in the order in which cuDNN expects them to be fast; or, under `FALLBACK`, those
    /// that compute almost everything.
    pub(crate) fn engines(&self, mode: sys::cudnnBackendHeurMode_t) -> Described<Vec<Engine>> {
        use Kind::{
            CUDNN_BACKEND_ENGINE_DESCRIPTOR, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR,
            CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR,
        };
        const RESULTS: Name = Name::CUDNN_ATTR_ENGINEHEUR_RESULTS;
        const MOST_NOTES: usize = 64;
        let heuristics = Descriptor::new(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?
            .with_descriptor(Name::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, &self.graph)?
            .with(Name::CUDNN_ATTR_ENGINEHEUR_MODE, mode)?
            .finalized()?;
        let count = heuristics.count(RESULTS)?;
        let mut configurations = (0..count)
            .map(|_| Descriptor::new(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR))
            .collect::<Described<Vec<_>>>()?;
        let count = heuristics.get_into(RESULTS, &configurations)?;
        configurations.truncate(count);
        let described = configurations.into_iter().map(|configuration| {
            let engine = Descriptor::new(CUDNN_BACKEND_ENGINE_DESCRIPTOR)?;
            configuration.get_into(
                Name::CUDNN_ATTR_ENGINECFG_ENGINE,
                std::slice::from_ref(&engine),
            )?;
            let index = engine.get(Name::CUDNN_ATTR_ENGINE_GLOBAL_INDEX, 1, -1i64)?;
            let notes = engine.get(
                Name::CUDNN_ATTR_ENGINE_NUMERICAL_NOTE,
                MOST_NOTES,
                NumericalNote(-1),
            )?;
            Ok(Engine {
                configuration,
                handle: Rc::clone(&self.handle),
                index: index.first().copied().unwrap_or(-1),
                notes: notes.into(),
            })
        });
        described.collect()
    }
}

/// One way to compute a graph: an engine and its settings.
pub(crate) struct Engine {
    configuration: Descriptor,
    handle: Rc<Handle>,
    /// The engine's number. Several ways may have one engine with other settings.
    pub(crate) index: i64,
    pub(crate) notes: Notes,
}

impl Engine {
    /// Makes it ready to run; cuDNN may refuse one in spite of having named it.
    pub(crate) fn plan(&self) -> Described<ExecutionPlan> {
        let plan = Descriptor::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?
            .with(
                Name::CUDNN_ATTR_EXECUTION_PLAN_HANDLE,
                RawHandle(self.handle.raw()),
            )?
            .with_descriptor(
                Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG,
                &self.configuration,
            )?
            .finalized()?;
        let workspace = plan.get(Name::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, 1, 0i64)?;
        let workspace = workspace.first().copied().unwrap_or(0);
        Ok(ExecutionPlan {
            plan,
            _handle: Rc::clone(&self.handle),
            workspace: usize::try_from(workspace).unwrap_or(0),
        })
    }
}

/// A graph and the way in which it is computed.
pub(crate) struct ExecutionPlan {
    plan: Descriptor,
    /// The handle that the plan was made with, which need not be the one that it is run with.
    _handle: Rc<Handle>,
    /// Bytes to work in.
    pub(crate) workspace: usize,
}

impl ExecutionPlan {
    /// Gives the computation to the stream of a handle of the same device.
    ///
    /// # Safety
    /// The tensors are the graph's, by their numbers, and have the types, sizes and alignments described there.
    /// `workspace` has as many bytes as the plan asks for. All of it lives until the stream has come to this point.
    pub(crate) unsafe fn execute(
        &self,
        handle: &Handle,
        tensors: &[(i64, *mut c_void)],
        workspace: *mut c_void,
    ) -> Described<()> {
        let (numbers, addresses): (Vec<_>, Vec<_>) = tensors
            .iter()
            .map(|&(number, address)| (number, Address(address)))
            .unzip();
        let pack = Descriptor::new(Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?
            .with_all(Name::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, &numbers)?
            .with_all(Name::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, &addresses)?
            .with(Name::CUDNN_ATTR_VARIANT_PACK_WORKSPACE, Address(workspace))?
            .finalized()?;
        // SAFETY: handle, plan and pack exist; the rest is the caller's.
        unsafe { sys::cudnnBackendExecute(handle.raw(), self.plan.0, pack.0) }.result()
    }
}
