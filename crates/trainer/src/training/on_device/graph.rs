//! A training step recorded as a CUDA graph, and replayed.
//!
//! A recorded step and other work cannot use each other's freed memory, so each gives its own back to the driver before the other
//! runs. A run of two epochs at batch 32 with their evaluations (`--train-limit 144 --test-limit 600`) holds 531 MiB at most of
//! the lesson's net, 102 of torchvision's and 38 while its head trains, on the emulated device with `CUDA_EMULATION_LOG=1
//! CUDA_EMULATION_ZEROS=1`. With the workspaces that the real cuDNN 9.19 wants for the first of its engines it is 555, 94 and 37:
//! within a graph, workspaces of branches side by side share no memory. What lasts has to be there before the first step: the
//! driver gets memory back by pieces of 32 MiB and more (the emulated device gives back all that is free).

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaGraph;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use candle_core::{Device, Tensor};

use super::{OnDevice, Training};
use crate::distributed::Share;
use crate::error::{Error, Result};

/// Steps made as usual before one is recorded as a graph: the first begins the momentum and chooses cuDNN's
/// engines, the second runs as all that follow.
const WARM_UP_STEPS: usize = 2;

/// The step that is recorded, and what was agreed on for it.
#[derive(Default)]
pub(super) struct RecordedStep {
    graph: StepGraph,
    /// The parameters whose gradients it averages, as the ranks agreed in the steps before: a recorded step asks nobody.
    agreed: Vec<bool>,
}

/// How far the recording has come.
enum StepGraph {
    /// Steps made as usual.
    WarmingUp(usize),
    Recorded(Recorded),
    /// Recording failed; every step is made as usual.
    Unavailable,
}

struct Recorded {
    graph: CudaGraph,
    /// Whether it keeps the memory that it takes for a step.
    keeps_memory: bool,
}

impl Default for StepGraph {
    fn default() -> Self {
        Self::WarmingUp(0)
    }
}

impl RecordedStep {
    /// Whether it has memory that other work could use.
    fn keeps_memory(&self) -> bool {
        matches!(&self.graph, StepGraph::Recorded(recorded) if recorded.keeps_memory)
    }

    /// Lets other work have the memory of a recorded step, which would lie idle beside its own.
    pub(super) fn make_room(&mut self, device: &Device) -> candle_core::Result<()> {
        if let StepGraph::Recorded(recorded) = &mut self.graph
            && recorded.keeps_memory
        {
            candle_cnn::cuda::release_graph_memory(device)?;
            recorded.keeps_memory = false;
            log_memory(device, "without the recorded step's");
        }
        Ok(())
    }
}

impl Recorded {
    /// Makes the step. What other work has freed goes back first: a graph does not take it from there.
    fn replay(&mut self, device: &Device) -> candle_core::Result<()> {
        if !self.keeps_memory {
            candle_cnn::cuda::release_freed_memory(device)?;
        }
        self.graph.launch().w()?;
        if !std::mem::replace(&mut self.keeps_memory, true) {
            log_memory(device, "with the recorded step's again");
        }
        Ok(())
    }
}

impl Training<'_> {
    /// Makes a step if it is of those that a graph replays, and says whether: one of a whole batch, where nothing has to
    /// go through the host. For another one it makes room.
    pub(super) fn step_by_graph(
        &mut self,
        state: &mut OnDevice,
        batch: Share,
        seed: u64,
    ) -> Result<bool> {
        let is_whole = batch.images == self.config.batch_size as u64;
        if is_whole && self.execution.cuda_graph && self.processes.stays_on_device() {
            self.replay_or_record(state, batch, seed)?;
            return Ok(true);
        }
        if state.recorded.keeps_memory() {
            // To give that memory back waits for the device, and so for the other ranks.
            self.processes.wait_for(&self.device)?;
        }
        let step = self.position.step + state.unread.len() as u64;
        let failed = Error::tensor("the step", self.place(step + 1));
        state.make_room(&self.device).map_err(failed)?;
        Ok(false)
    }

    /// One step of a whole batch: replayed if it is recorded, recorded if it was made often enough, else made as usual.
    fn replay_or_record(&mut self, state: &mut OnDevice, batch: Share, seed: u64) -> Result<()> {
        if let StepGraph::WarmingUp(steps) = state.recorded.graph {
            if steps < WARM_UP_STEPS {
                state.recorded.agreed = self.warm_up(state, batch, seed)?;
                state.recorded.graph = StepGraph::WarmingUp(steps + 1);
                return Ok(());
            }
            state.recorded.graph = self.record_or_give_up(state, batch, seed)?;
        }
        let failed = self.failed("the replay of the step");
        match &mut state.recorded.graph {
            // Recording has computed nothing: the step that was recorded is replayed, too.
            StepGraph::Recorded(recorded) => recorded.replay(&self.device).map_err(failed),
            _ => {
                self.compute_step(state, batch, seed, Some(&state.recorded.agreed))?;
                Ok(())
            }
        }
    }

    /// A step made as usual, of which small uploads, such as the strides of a tensor, are kept: the recording finds them on the
    /// device. Returns whose gradients the ranks agreed on.
    fn warm_up(&mut self, state: &OnDevice, batch: Share, seed: u64) -> Result<Vec<bool>> {
        let device = self.device.clone();
        log_memory(&device, "before a step of the warm-up");
        let _cache = device
            .as_cuda_device()
            .map_err(self.failed("the step"))?
            .enable_cuda_graph_htod_cache();
        self.compute_step(state, batch, seed, None)
    }

    /// The step recorded, or a warning that all steps are made as usual.
    fn record_or_give_up(
        &mut self,
        state: &OnDevice,
        batch: Share,
        seed: u64,
    ) -> Result<StepGraph> {
        Ok(match self.record_together(state, batch, seed)? {
            Ok(graph) => StepGraph::Recorded(Recorded {
                graph,
                keeps_memory: true,
            }),
            Err(reason) => {
                tracing::warn!(
                    "the training step cannot be recorded as a CUDA graph, and is launched operation by operation: {reason}"
                );
                StepGraph::Unavailable
            }
        })
    }

    /// Records the step on all ranks, or says why not: NCCL wants all of them to replay what they have recorded together, or none.
    fn record_together(
        &mut self,
        state: &OnDevice,
        batch: Share,
        seed: u64,
    ) -> Result<std::result::Result<CudaGraph, String>> {
        // The recording waits for the device, and so for the other ranks' part in the steps before.
        self.processes.wait_for(&self.device)?;
        let recorded = self.record(state, batch, seed);
        let failed_somewhere = self.processes.any_rank(recorded.is_err())?;
        Ok(match recorded {
            Ok(graph) if failed_somewhere => {
                drop(graph);
                let failed = self.failed("the recording");
                candle_cnn::cuda::release_graph_memory(&self.device).map_err(failed)?;
                Err("another rank could not record it".to_string())
            }
            Ok(graph) => Ok(graph),
            Err(error) => Err(error.with_sources()),
        })
    }

    fn record(&mut self, state: &OnDevice, batch: Share, seed: u64) -> Result<CudaGraph> {
        let failed = self.failed("the recording");
        let device = self.device.clone();
        let cuda = device.as_cuda_device().map_err(&failed)?;
        let stream = cuda.cuda_stream();
        // The graph takes memory of its own for a step. What the steps before it took would lie idle beside it, and so would what
        // graphs of another run have left.
        log_memory(&device, "after the warm-up");
        candle_cnn::cuda::release_freed_memory(&device).map_err(&failed)?;
        candle_cnn::cuda::release_graph_memory(&device).map_err(&failed)?;
        log_memory(&device, "before the recording");
        let _cache = cuda.enable_cuda_graph_htod_cache();
        // What the step allocates becomes part of the graph, and what a library allocates aside may do so at once:
        // no other thread works on this device.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        stream.begin_capture(mode).w().map_err(&failed)?;
        let computed = self.compute_step(state, batch, seed, Some(&state.recorded.agreed));
        // Errors of memory freed in the capture wait in the context, and would keep it from being ended.
        let freed = stream.context().check_err();
        // Ends the capture also where the step failed: the stream could not be used any more.
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags);
        let recorded = computed.and_then(|_| {
            freed.w().map_err(&failed)?;
            let graph = graph.w().map_err(&failed)?;
            let nothing = || failed(candle_core::Error::msg("nothing was recorded"));
            let graph = graph.ok_or_else(nothing)?;
            graph.upload().w().map_err(&failed)?;
            log_memory(&device, "with the recorded step");
            Ok(graph)
        });
        if recorded.is_err() {
            // The next call is not to blame for what is left of this one, and has its memory.
            let _ = stream.context().check_err();
            let _ = candle_cnn::cuda::release_graph_memory(&device);
        }
        recorded
    }
}

/// Runs a forward pass with the seed of its dropout masks from the device it is on, where that is a GPU.
pub(super) fn with_dropout_seed<R>(seed: &Tensor, forward: impl FnOnce() -> R) -> R {
    match seed.device().is_cuda() {
        true => candle_cnn::cuda::with_dropout_seed(seed, forward),
        false => forward(),
    }
}

/// Makes the workspaces of convolutions on a GPU, which last.
pub(super) fn make_workspaces(device: &Device) {
    if device.is_cuda()
        && let Err(error) = candle_cnn::cuda::make_lasting_memory(device)
    {
        // It is made where it is needed, by a network that has convolutions.
        tracing::debug!("no workspaces for convolutions beforehand: {error}");
    }
}

/// What is in use of a GPU, by all processes, for who looks for what takes it.
fn log_memory(device: &Device, when: &str) {
    use candle_cnn::cuda::{HeldMemory, held_memory, memory};
    let (Ok((free, all)), Ok(held)) = (memory(device), held_memory(device)) else {
        return;
    };
    let HeldMemory {
        tensors,
        for_tensors,
        graphs,
        for_graphs,
    } = held;
    let [in_use, tensors, for_tensors, graphs, for_graphs] = [
        (all.saturating_sub(free)) as u64,
        tensors,
        for_tensors,
        graphs,
        for_graphs,
    ]
    .map(|bytes| bytes >> 20);
    tracing::debug!(
        "{in_use} MiB of the GPU are in use {when}: {for_tensors} held for tensors, which use {tensors}, and {for_graphs} \
         for graphs, which use {graphs}"
    );
}
