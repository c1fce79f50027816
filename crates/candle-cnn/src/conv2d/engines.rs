//! The engines of cuDNN that compute a convolution: described, chosen and run.
//!
//! What a pass needs besides its tensors is its [`Plan`], made when the geometry is first met, and kept by thread like
//! the handle. After that a pass neither waits for the device nor allocates outside of the stream's order.
//!
//! A plan is chosen so:
//!
//! 1. cuDNN names engines with their settings, in the order in which it expects them to be fast. Left out is what rounds where
//!    it must not ([`super::plan::Notes`]), what cuDNN cannot plan, and what wants more workspace than there may be.
//! 2. The first 8, at most 4 of one engine, are timed as they will run, in a CUDA graph on a stream apart, there and back: a GPU
//!    that was idle is slow at first. `deterministic`, shapes that are met seldom, and a capture leave them in cuDNN's order.
//! 3. Where f32 is asked for in full, the next to be taken is tried out first (`exactness.rs`), and the least inexact is taken,
//!    with a warning, where all round.
//! 4. One that refuses to run is replaced by the next: at last those that compute almost everything, and where there is nothing
//!    else, or all others may be left out, those that want more workspace.
//!
//! All but the running can be had of the real cuDNN without a GPU (`cargo xtask cuda-emulate --cudnn LIBRARY`). What it offers for
//! both networks on an H200 can all be planned (results/2026-11-26-cudnn-engines-h200).

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::cudnn::result::CudnnError;
use candle_core::cuda_backend::cudarc::cudnn::sys::{
    self, cudnnBackendAttributeName_t as Name, cudnnBackendDescriptorType_t as Kind,
    cudnnBackendHeurMode_t as Heuristics, cudnnPointwiseMode_t as Pointwise,
};
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUdeviceptr, CUevent_flags, CUgraphInstantiate_flags_enum, CUstreamCaptureMode_enum,
};
use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{DType, Result};

use super::candidates::{Candidates, Timing, Trial, best_in_graph, by_time, in_graphs_if_any};
use super::plan::{
    DescriptorNumbers, EngineQuota, Epilogue, MemoryFormat, Pass, PlanKey, common_alignment,
    strides,
};
use super::{OP, exactness};
use crate::cuda::cudnn::{Cudnn, address, data_type, failed};
use crate::cuda::graph_api::{Described, Descriptor, Engine, ExecutionPlan, OperationGraph};
use crate::error::OpError;

/// The tensors of a convolution. A pass writes the one that it is named after: the output, or the gradient in the
/// place of what it is the gradient of.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    pub(super) x: *mut c_void,
    pub(super) weight: *mut c_void,
    pub(super) y: *mut c_void,
    /// One value per output channel, or null where nothing is added.
    pub(super) bias: *mut c_void,
}

impl Operands {
    pub(super) fn new(x: CUdeviceptr, weight: CUdeviceptr, y: CUdeviceptr) -> Self {
        Self {
            x: address(x),
            weight: address(weight),
            y: address(y),
            bias: std::ptr::null_mut(),
        }
    }

    /// Bytes of which all addresses are multiples.
    pub(super) fn alignment(&self) -> usize {
        let Self { x, weight, y, bias } = *self;
        common_alignment([x, weight, y, bias].map(|pointer| pointer as usize))
    }

    /// The tensor that a pass writes.
    pub(super) fn written(&mut self, pass: Pass) -> &mut *mut c_void {
        match pass {
            Pass::Forward => &mut self.y,
            Pass::InputGradient => &mut self.x,
            Pass::WeightGradient => &mut self.weight,
        }
    }

    /// The tensors that there are, by their numbers in a graph.
    pub(super) fn numbered(&self) -> Vec<(i64, *mut c_void)> {
        let Self { x, weight, y, bias } = *self;
        let mut numbered = vec![(X, x), (WEIGHT, weight), (Y, y)];
        if !bias.is_null() {
            numbered.push((BIAS, bias));
        }
        numbered
    }
}

// The numbers of the tensors in a graph. `Y` is the output, whatever precedes it.
const X: i64 = 1;
const WEIGHT: i64 = 2;
const Y: i64 = 3;
const BIAS: i64 = 4;
const SUM: i64 = 5;
const WITH_BIAS: i64 = 6;

/// An engine with its settings, ready to run.
struct Candidate {
    plan: ExecutionPlan,
    /// cuDNN's number of the engine, which it offers under several settings.
    engine: i64,
}

impl Candidate {
    /// Gives the computation to cuDNN's stream, or says what cuDNN has against it.
    ///
    /// # Safety
    /// The operands are contiguous, of the sizes, type and alignment of the plan's key. `memory` has as many bytes as the plan asks for.
    /// All of it lives until the stream has come to this point.
    unsafe fn execute(
        &self,
        cudnn: &Cudnn,
        operands: Operands,
        memory: *mut c_void,
    ) -> Described<()> {
        // SAFETY: the caller's promise.
        unsafe {
            self.plan
                .execute(cudnn.handle(), &operands.numbered(), memory)
        }
    }
}

/// How one pass over one geometry is computed.
pub(super) struct Plan {
    key: PlanKey,
    candidates: RefCell<Candidates<Candidate>>,
}

thread_local! {
    static PLANS: RefCell<HashMap<(DeviceId, PlanKey), Rc<Plan>>> = RefCell::new(HashMap::new());
}

/// How many candidates are timed or tried out, and of those how many with the same engine.
const MOST_TIMED: usize = 8;
const MOST_TIMED_OF_ONE_ENGINE: usize = 4;
/// How many are kept of those that cuDNN expects to be fast, should it refuse one.
const MOST_KEPT: usize = 4;

impl Plan {
    /// The plan that this thread has made before.
    pub(super) fn known(device: DeviceId, key: PlanKey) -> Option<Rc<Self>> {
        PLANS.with_borrow(|plans| plans.get(&(device, key)).cloned())
    }

    /// The plan of this thread; made now if there is none.
    ///
    /// Making it may run the pass on `operands`, for its times: it is to be run after that.
    pub(super) fn of(
        cudnn: &mut Cudnn,
        device: DeviceId,
        key: PlanKey,
        operands: Operands,
    ) -> Result<Rc<Self>> {
        if let Some(plan) = Self::known(device, key) {
            return Ok(plan);
        }
        let plan = Rc::new(Self::new(cudnn, key, operands)?);
        PLANS.with_borrow_mut(|plans| plans.insert((device, key), plan.clone()));
        Ok(plan)
    }

    fn new(cudnn: &mut Cudnn, key: PlanKey, operands: Operands) -> Result<Self> {
        let numbers = DescriptorNumbers::new(&key.geometry)?;
        let kind = data_type(OP, key.dtype)?;
        // Timing waits for the device, which a capture forbids.
        let timed = key.timed && !cudnn.is_capturing()?;
        let offered = match offers(cudnn, &key, &numbers, kind, timed) {
            // cuDNN may know no such thing at all; without what follows the pass can be computed.
            Err(status) if is_refusal(status) && !key.epilogue.is_nothing() => Offers::default(),
            offered => offered.map_err(|e| failed(OP, "a descriptor", e.0, &key))?,
        };
        let Offers {
            mut fast,
            general,
            mut beyond,
        } = offered;
        if timed && fast.len() > 1 {
            match times(cudnn, &key, operands, &fast) {
                Ok(times) => fast = by_time(fast, &times),
                Err(error) => {
                    tracing::warn!("conv2d: {error}; taking the engine by cuDNN's rules of thumb");
                }
            }
        }
        // Candidates on trial stay as many as they are, since several may be left out.
        if !key.is_full_f32() {
            fast.truncate(MOST_KEPT);
        }
        let mut candidates = fast;
        candidates.extend(general);
        beyond.sort_by_key(|c| c.plan.workspace);
        if candidates.is_empty()
            && let Some(least) = beyond.first()
        {
            tracing::warn!(
                "conv2d: nothing works in {} bytes, taking what needs {}, for {key}",
                key.workspace_limit,
                least.plan.workspace,
            );
        }
        // Where candidates are on trial all may be left out: these come after them.
        if candidates.is_empty() || key.is_full_f32() {
            candidates.extend(beyond);
        }
        if let Some(Candidate { engine, plan }) = candidates.first() {
            tracing::debug!(engine, workspace = plan.workspace, "conv2d: {key}");
        }
        Ok(Self {
            key,
            candidates: RefCell::new(Candidates::new(candidates, key.is_full_f32())),
        })
    }

    /// The computation itself.
    pub(super) fn run(&self, cudnn: &mut Cudnn, operands: Operands) -> Result<()> {
        match self.run_if_offered(cudnn, operands)? {
            true => Ok(()),
            false => Err(self.no_engine().into()),
        }
    }

    /// The computation itself; false where cuDNN has nothing for it, and nothing was done.
    pub(super) fn run_if_offered(&self, cudnn: &mut Cudnn, operands: Operands) -> Result<bool> {
        loop {
            self.admit(cudnn)?;
            let candidates = self.candidates.borrow();
            let Some(candidate) = candidates.next() else {
                return Ok(false);
            };
            let outcome = cudnn.with_workspace(candidate.plan.workspace, |cudnn, memory| {
                // SAFETY: the operands are of the key, and held by the caller until the call is in the stream; the workspace
                // has the size that was asked for.
                Ok(unsafe { candidate.execute(cudnn, operands, memory) })
            })?;
            let Err(status) = outcome else {
                return Ok(true);
            };
            let error = failed(OP, "cudnnBackendExecute", status.0, &self.key);
            if !is_refusal(status) {
                return Err(error.into());
            }
            tracing::warn!("{error}, by engine {}; taking the next", candidate.engine);
            drop(candidates);
            self.candidates.borrow_mut().refused();
        }
    }

    /// Where f32 is asked for in full, sees to it that the next candidate does not round it. Where every candidate rounds, the next
    /// is the one that rounds least.
    fn admit(&self, cudnn: &mut Cudnn) -> Result<()> {
        let key = &self.key;
        let mut candidates = self.candidates.borrow_mut();
        if !candidates.needs_trial() {
            return Ok(());
        }
        // A trial waits for the device.
        if cudnn.is_capturing()? {
            tracing::warn!(
                "conv2d: captured without having been run before, so that it is cuDNN's word that f32 is not rounded, for {key}"
            );
            return Ok(());
        }
        let last_resort = match key.epilogue.is_nothing() {
            true => exactness::MAX_LAST_RESORT_DEVIATION,
            // The pass without what follows is the better last resort.
            false => exactness::MAX_DEVIATION,
        };
        let least = candidates.admit(exactness::MAX_DEVIATION, last_resort, |candidate| {
            try_out(cudnn, key, candidate)
        });
        if let Some((deviation, candidate)) = least.zip(candidates.next()) {
            tracing::warn!(
                "conv2d: no engine leaves f32 as it is; taking {}, which deviates by {deviation:.1e}, for {key}",
                candidate.engine,
            );
        }
        Ok(())
    }

    /// cuDNN's number of the engine to take.
    #[cfg(test)]
    pub(super) fn engine(&self) -> Option<i64> {
        Some(self.candidates.borrow().next()?.engine)
    }

    fn no_engine(&self) -> OpError {
        OpError::NoEngine {
            op: OP,
            deterministic: if self.key.deterministic {
                "deterministic "
            } else {
                ""
            },
            problem: match self.key.format {
                MemoryFormat::Contiguous => self.key.to_string(),
                MemoryFormat::ChannelsLast => format!(
                    "{}; it may have one for planes: turn Settings::channels_last off",
                    self.key
                ),
            },
        }
    }
}

/// What cuDNN has for a pass and its key allows.
#[derive(Default)]
struct Offers {
    /// Candidates in the order in which cuDNN expects them to be fast.
    fast: Vec<Candidate>,
    /// Candidates that compute almost everything.
    general: Vec<Candidate>,
    /// Candidates that want more workspace than there may be.
    beyond: Vec<Candidate>,
}

fn offers(
    cudnn: &Cudnn,
    key: &PlanKey,
    numbers: &DescriptorNumbers,
    kind: sys::cudnnDataType_t,
    timed: bool,
) -> Described<Offers> {
    let graph = operation_graph(cudnn, key, numbers, kind)?;
    let (most, most_of_one) = match timed || key.is_full_f32() {
        true => (MOST_TIMED, MOST_TIMED_OF_ONE_ENGINE),
        false => (MOST_KEPT, MOST_KEPT),
    };
    let mode = Heuristics::CUDNN_HEUR_MODE_A;
    let (fast, mut beyond) = planned(&graph, mode, key, most, most_of_one)?;
    if !key.epilogue.is_nothing() {
        // The pass without what follows is the better last resort.
        return Ok(Offers {
            fast,
            ..Offers::default()
        });
    }
    let mode = Heuristics::CUDNN_HEUR_MODE_FALLBACK;
    let (general, more) = planned(&graph, mode, key, MOST_KEPT, MOST_KEPT)?;
    beyond.extend(more);
    Ok(Offers {
        fast,
        general,
        beyond,
    })
}

/// Candidates under a mode of cuDNN's heuristics, of which at most `most_of_one` have the same engine: those whose workspace is
/// within the limit, `most` at the most, and the others that come before the last of these.
fn planned(
    graph: &OperationGraph,
    mode: Heuristics,
    key: &PlanKey,
    most: usize,
    most_of_one: usize,
) -> Described<(Vec<Candidate>, Vec<Candidate>)> {
    let engines = engines(graph, mode)?;
    let mut quota = EngineQuota::new(most_of_one);
    let (mut within, mut beyond) = (Vec::new(), Vec::new());
    for engine in engines.iter().filter(|engine| engine.notes.suit(key)) {
        if within.len() == most {
            break;
        }
        // cuDNN may refuse one in spite of having named it.
        if quota.take(engine.index)
            && let Ok(plan) = engine.plan()
        {
            let fits = plan.workspace <= key.workspace_limit;
            let candidates = if fits { &mut within } else { &mut beyond };
            candidates.push(Candidate {
                engine: engine.index,
                plan,
            });
        }
    }
    Ok((within, beyond))
}

/// The engines for a graph under a mode of cuDNN's heuristics; none where it knows no such graph.
fn engines(graph: &OperationGraph, mode: Heuristics) -> Described<Vec<Engine>> {
    match graph.engines(mode) {
        Err(status) if is_refusal(status) => Ok(Vec::new()),
        engines => engines,
    }
}

/// All engines that cuDNN expects to be fast, and those that compute almost everything, whatever they round.
#[cfg(test)]
pub(super) fn named(cudnn: &Cudnn, key: &PlanKey) -> Result<Vec<Engine>> {
    use Heuristics::{CUDNN_HEUR_MODE_A, CUDNN_HEUR_MODE_FALLBACK};
    let numbers = DescriptorNumbers::new(&key.geometry)?;
    let kind = data_type(OP, key.dtype)?;
    let in_modes = || -> Described<Vec<_>> {
        let graph = operation_graph(cudnn, key, &numbers, kind)?;
        let mut named = engines(&graph, CUDNN_HEUR_MODE_A)?;
        named.extend(engines(&graph, CUDNN_HEUR_MODE_FALLBACK)?);
        Ok(named)
    };
    Ok(in_modes().map_err(|e| failed(OP, "a descriptor", e.0, key))?)
}

/// The pass as cuDNN's graph of operations.
fn operation_graph(
    cudnn: &Cudnn,
    key: &PlanKey,
    numbers: &DescriptorNumbers,
    kind: sys::cudnnDataType_t,
) -> Described<OperationGraph> {
    let sums = match key.dtype {
        DType::F64 => sys::cudnnDataType_t::CUDNN_DATA_DOUBLE,
        _ => sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
    };
    let tensor = |number: i64, sizes: [i64; 4], kind, lives: Lives| {
        Descriptor::new(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_TENSOR_UNIQUE_ID, number)?
            .with(Name::CUDNN_ATTR_TENSOR_DATA_TYPE, kind)?
            .with_all(Name::CUDNN_ATTR_TENSOR_DIMENSIONS, &sizes)?
            .with_all(Name::CUDNN_ATTR_TENSOR_STRIDES, &strides(sizes, key.format))?
            .with(Name::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, key.alignment as i64)?
            .with(
                Name::CUDNN_ATTR_TENSOR_IS_VIRTUAL,
                lives == Lives::InTheGraph,
            )?
            .finalized()
    };
    // The result of each operation is the output, if nothing follows.
    let result = |number, is_followed| match is_followed {
        true => tensor(number, numbers.y, sums, Lives::InTheGraph),
        false => tensor(Y, numbers.y, kind, Lives::InMemory),
    };
    let Epilogue { bias, relu } = key.epilogue;
    let x = tensor(X, numbers.x, kind, Lives::InMemory)?;
    let weight = tensor(WEIGHT, numbers.weight, kind, Lives::InMemory)?;
    let mut last = result(SUM, bias || relu)?;
    let mut operations = vec![convolution(key, numbers, sums, [&x, &weight, &last])?];
    if bias {
        let bias = tensor(BIAS, [1, numbers.y[1], 1, 1], kind, Lives::InMemory)?;
        let with_bias = result(WITH_BIAS, relu)?;
        let mode = Pointwise::CUDNN_POINTWISE_ADD;
        operations.push(pointwise(sums, mode, &last, Some(&bias), &with_bias)?);
        last = with_bias;
    }
    if relu {
        let mode = Pointwise::CUDNN_POINTWISE_RELU_FWD;
        operations.push(pointwise(sums, mode, &last, None, &result(Y, false)?)?);
    }
    OperationGraph::new(cudnn.handle(), &operations)
}

/// Where a tensor of a graph is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lives {
    InMemory,
    /// Between two operations, and written nowhere.
    InTheGraph,
}

/// The pass itself, as a cross-correlation that adds up in `sums`.
fn convolution(
    key: &PlanKey,
    numbers: &DescriptorNumbers,
    sums: sys::cudnnDataType_t,
    [x, weight, y]: [&Descriptor; 3],
) -> Described<Descriptor> {
    let convolution = Descriptor::new(Kind::CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR)?
        .with(Name::CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, 2i64)?
        .with(Name::CUDNN_ATTR_CONVOLUTION_COMP_TYPE, sums)?
        .with(
            Name::CUDNN_ATTR_CONVOLUTION_CONV_MODE,
            sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION,
        )?
        .with_all(Name::CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, &numbers.padding)?
        .with_all(Name::CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, &numbers.padding)?
        .with_all(Name::CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, &numbers.stride)?
        .with_all(Name::CUDNN_ATTR_CONVOLUTION_DILATIONS, &numbers.dilation)?
        .finalized()?;
    // The operation and its attributes: factors of the result and of what is there, description, tensors.
    let (kind, [new, old, description, w_name, x_name, y_name]) = match key.pass {
        Pass::Forward => (
            Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR,
            [
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y,
            ],
        ),
        Pass::InputGradient => (
            Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR,
            [
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY,
            ],
        ),
        Pass::WeightGradient => (
            Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR,
            [
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY,
            ],
        ),
    };
    let factor = f32::from(u8::from(key.adds));
    let operation = Descriptor::new(kind)?;
    let operation = match key.dtype {
        DType::F64 => operation.with(new, 1f64)?.with(old, f64::from(factor))?,
        _ => operation.with(new, 1f32)?.with(old, factor)?,
    };
    operation
        .with_descriptor(description, &convolution)?
        .with_descriptor(w_name, weight)?
        .with_descriptor(x_name, x)?
        .with_descriptor(y_name, y)?
        .finalized()
}

/// `y = mode(x)`, or `mode(x, other)`, where `other` is repeated over images and pixels.
fn pointwise(
    sums: sys::cudnnDataType_t,
    mode: Pointwise,
    x: &Descriptor,
    other: Option<&Descriptor>,
    y: &Descriptor,
) -> Described<Descriptor> {
    let mut description = Descriptor::new(Kind::CUDNN_BACKEND_POINTWISE_DESCRIPTOR)?
        .with(Name::CUDNN_ATTR_POINTWISE_MODE, mode)?
        .with(Name::CUDNN_ATTR_POINTWISE_MATH_PREC, sums)?;
    if mode == Pointwise::CUDNN_POINTWISE_RELU_FWD {
        // A NaN stays NaN in a ReLU, as on the CPU; else a network that diverges could go on with zeros.
        description = description.with(
            Name::CUDNN_ATTR_POINTWISE_NAN_PROPAGATION,
            sys::cudnnNanPropagation_t::CUDNN_PROPAGATE_NAN,
        )?;
    }
    let mut operation = Descriptor::new(Kind::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR)?
        .with_descriptor(
            Name::CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR,
            &description.finalized()?,
        )?
        .with_descriptor(Name::CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x)?;
    if let Some(other) = other {
        operation = operation.with_descriptor(Name::CUDNN_ATTR_OPERATION_POINTWISE_BDESC, other)?;
    }
    operation
        .with_descriptor(Name::CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y)?
        .finalized()
}

/// Whether a candidate rounds f32, seen on numbers of its own.
fn try_out(cudnn: &mut Cudnn, key: &PlanKey, candidate: &Candidate) -> Trial {
    let engine = candidate.engine;
    let mut refused = false;
    let deviation = exactness::deviation(cudnn, key, |cudnn, operands| {
        // Not the workspace that is kept: this candidate may be the only one that wants so much.
        cudnn.with_temporary(candidate.plan.workspace, |cudnn, memory| {
            // SAFETY: the operands are of the key, and live until the device is done; the memory has the size that was asked for.
            unsafe { candidate.execute(cudnn, operands, memory) }.map_err(|status| {
                refused = is_refusal(status);
                failed(OP, "cudnnBackendExecute", status.0, key).into()
            })
        })
    });
    match deviation {
        Ok(deviation) => {
            tracing::debug!(engine, deviation, "conv2d: {key}");
            if deviation > exactness::MAX_DEVIATION {
                tracing::info!(
                    "conv2d: engine {engine} is left out: it deviates by {deviation:.1e}, although cuDNN does not say \
                     that it rounds f32, for {key}"
                );
            }
            Trial::Deviates(deviation)
        }
        Err(error) if refused => {
            tracing::warn!("{error}, by engine {engine}; taking the next");
            Trial::Refused
        }
        Err(error) => {
            tracing::warn!(
                "conv2d: {error}; so it is cuDNN's word that engine {engine} does not round f32, for {key}"
            );
            Trial::Unknown
        }
    }
}

/// The times of `candidates` on `operands` in milliseconds, infinite of those that do not run.
///
/// All of them are timed twice, the second time the other way round, and the lesser time counts: a GPU that was idle is slow at first,
/// which would be to the harm of the first. What is far from the fastest is not timed again, but for the first.
fn times(
    cudnn: &mut Cudnn,
    key: &PlanKey,
    operands: Operands,
    candidates: &[Candidate],
) -> Result<Vec<f32>> {
    /// Times of the fastest, more than an idle GPU can explain once a candidate has run.
    const HOPELESS: f32 = 1.5;
    let bytes = candidates.iter().map(|c| c.plan.workspace).max();
    cudnn.with_temporary(bytes.unwrap_or(0), |cudnn, memory| {
        cudnn.apart(OP, |cudnn, stream| {
            let mut timings = vec![Timing::default(); candidates.len()];
            let there_and_back = (0..candidates.len()).chain((0..candidates.len()).rev());
            for (turn, i) in there_and_back.enumerate() {
                let (candidate, earlier) = (&candidates[i], timings[i]);
                let best = best_in_graph(&timings);
                let is_hopeless =
                    i > 0 && earlier.milliseconds > HOPELESS * best + HOST_MILLISECONDS;
                if turn >= candidates.len() && (is_hopeless || !earlier.milliseconds.is_finite()) {
                    continue;
                }
                let engine = candidate.engine;
                // SAFETY: as in `Plan::run_if_offered`; the workspace is that of the hungriest candidate, which have turns.
                let run = || unsafe {
                    candidate
                        .execute(cudnn, operands, memory)
                        .map_err(|e| failed(OP, "cudnnBackendExecute", e.0, key).into())
                };
                timings[i] = match time(stream, run, best) {
                    Ok(timing) => Timing {
                        milliseconds: timing.milliseconds.min(earlier.milliseconds),
                        outside_graph: timing.outside_graph || earlier.outside_graph,
                    },
                    Err(error) => {
                        tracing::warn!("{error}, by engine {engine}, which is left out");
                        Timing::default()
                    }
                };
            }
            Ok(in_graphs_if_any(&timings))
        })
    })
}

/// What the host may take to give a single run.
const HOST_MILLISECONDS: f32 = 0.05;

/// One run, as it will be within a recorded step: in a CUDA graph, where the host's part does not count.
///
/// What is obviously slower than `best` milliseconds is not timed as exactly.
fn time(stream: &Arc<CudaStream>, run: impl Fn() -> Result<()>, best: f32) -> Result<Timing> {
    // Kernels are loaded when they are first run, which takes its time and is forbidden in a capture.
    run()?;
    let single = least_time(stream, 2, &run)?;
    if single > 2.0 * best + HOST_MILLISECONDS {
        return Ok(Timing {
            milliseconds: single,
            outside_graph: false,
        });
    }
    let in_graph = time_in_graph(stream, &run, single);
    Ok(Timing {
        outside_graph: in_graph.is_err(),
        milliseconds: in_graph.unwrap_or_else(|error| {
            tracing::warn!("conv2d: an engine cannot be timed in a CUDA graph: {error}");
            single
        }),
    })
}

/// Milliseconds of one run in a CUDA graph of several, each of which takes `single` at the most.
fn time_in_graph(
    stream: &Arc<CudaStream>,
    run: &dyn Fn() -> Result<()>,
    single: f32,
) -> Result<f32> {
    /// Between two events, so that what a launch takes does not count.
    const LEAST_MILLISECONDS: f32 = 0.2;
    const MOST_RUNS: f32 = 32.0;
    let runs = (LEAST_MILLISECONDS / single).clamp(1.0, MOST_RUNS).round();
    stream
        .begin_capture(CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        .w()?;
    let given = (0..runs as usize).try_for_each(|_| run());
    let graph = stream.end_capture(
        CUgraphInstantiate_flags_enum::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH,
    );
    given?;
    let graph = graph.w()?;
    let graph = graph.ok_or_else(|| candle_core::Error::msg("its capture stayed empty"))?;
    Ok(least_time(stream, 3, &|| graph.launch().w())? / runs)
}

/// The least time in milliseconds of so many rounds of `work`.
fn least_time(stream: &CudaStream, rounds: usize, work: &dyn Fn() -> Result<()>) -> Result<f32> {
    let now = || {
        stream
            .record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
            .w()
    };
    let mut least = f32::INFINITY;
    for _ in 0..rounds {
        let start = now()?;
        work()?;
        least = least.min(start.elapsed_ms(&now()?).w()?);
    }
    Ok(least)
}

/// Whether cuDNN declined before it launched anything: its families of `BAD_PARAM`, `NOT_SUPPORTED` and
/// `INTERNAL_ERROR`, but not `EXECUTION_FAILED`.
fn is_refusal(error: CudnnError) -> bool {
    (2000..5000).contains(&(error.0 as u32))
}
