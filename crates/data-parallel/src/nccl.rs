//! Gradients from GPU to GPU with NVIDIA's library.
//!
//! Nothing here waits for the GPU: the sum is one more piece of work on the device's stream. A rank that dies while
//! the others' GPUs wait for it leaves them waiting, which [`ProcessGroup::wait_until`] notices.

use candle_core::cuda_backend::cudarc::nccl::result::NcclError;
use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, ReduceOp};
use candle_core::cuda_backend::{CudaStorage, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{Device, Storage, Tensor};

use crate::error::{Error, Result};
use crate::group::ProcessGroup;

/// Whether NCCL registers the memory that recorded work uses.
const GRAPH_REGISTER: &str = "NCCL_GRAPH_REGISTER";
/// Bytes of NCCL's identification of a group.
const ID_BYTES: usize = 128;

/// This rank's end of NCCL's connections.
pub(crate) struct Communicator {
    comm: Comm,
}

impl Communicator {
    /// Connects all ranks; rank 0's identification reaches the others over the group's TCP.
    pub(crate) fn new(group: &ProcessGroup, device: &Device) -> Result<Self> {
        let Device::Cuda(cuda) = device else {
            return Err(Error::Unsupported {
                what: format!("NCCL on {:?}; it needs a GPU", device.location()),
            });
        };
        let mut id = Vec::new();
        if group.is_first() {
            let unique = Id::new().map_err(nccl("ncclGetUniqueId"));
            let unique = unique.inspect_err(|error| group.give_up(&error.to_string()))?;
            id = unique
                .internal()
                .iter()
                .map(|&byte| byte.cast_unsigned())
                .collect();
        }
        let id = group.broadcast(id)?;
        if id.len() != ID_BYTES {
            return Err(Error::Stranger {
                peer: "rank 0".into(),
                reason: format!("its NCCL identification has {} bytes", id.len()),
            });
        }
        let id = Id::uninit(std::array::from_fn(|i| id[i].cast_signed()));
        let stream = cuda.cuda_stream();
        // NCCL takes the GPU of the thread's context.
        let bound = stream.context().bind_to_thread().w();
        bound.map_err(|source| Error::Tensor {
            during: "the choice of the GPU",
            source,
        })?;
        // Recorded steps reduce memory of the graph's own, which NCCL cannot register.
        if std::env::var_os(GRAPH_REGISTER).is_none_or(|value| value != "0") {
            tracing::warn!(
                "{GRAPH_REGISTER} is not 0: NCCL may refuse the all-reduce of a step that is recorded as a CUDA graph; set it to 0 \
                 for all processes"
            );
        }
        let comm = Comm::from_rank(stream, group.rank(), group.world_size(), id)
            .map_err(nccl("ncclCommInitRank"))
            .inspect_err(|error| group.give_up(&error.to_string()))?;
        Ok(Self { comm })
    }

    /// The sum over all ranks of each tensor times `weight`; all are f32 and on this GPU.
    pub(crate) fn all_reduce_weighted(
        &self,
        tensors: &[Tensor],
        weight: f64,
    ) -> Result<Vec<Tensor>> {
        let failed = |source| Error::Tensor {
            during: "the all-reduce of tensors",
            source,
        };
        let flat: candle_core::Result<Vec<Tensor>> =
            tensors.iter().map(Tensor::flatten_all).collect();
        let flat = flat.and_then(|parts| Tensor::cat(&parts, 0)? * weight);
        let sums = self.all_reduce_flat(&flat.map_err(failed)?)?;
        let mut begin = 0;
        let back = tensors.iter().map(|tensor| {
            let part = sums.narrow(0, begin, tensor.elem_count())?;
            begin += tensor.elem_count();
            part.reshape(tensor.shape())
        });
        back.collect::<candle_core::Result<_>>().map_err(failed)
    }

    /// `values` is contiguous, `(n,)`.
    fn all_reduce_flat(&self, values: &Tensor) -> Result<Tensor> {
        let during = "the all-reduce of tensors";
        let failed = |source| Error::Tensor { during, source };
        let (storage, layout) = values.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            return Err(Error::Unsupported {
                what: "NCCL cannot reduce a tensor that is not on a GPU".into(),
            });
        };
        let Some((begin, end)) = layout.contiguous_offsets() else {
            return Err(Error::Unsupported {
                what: "NCCL needs contiguous tensors".into(),
            });
        };
        let source = storage.as_cuda_slice::<f32>().map_err(failed)?;
        let source = source.slice(begin..end);
        let cuda = storage.device.clone();
        let mut sums = cuda.alloc_zeros::<f32>(end - begin).map_err(failed)?;
        self.comm
            .all_reduce(&source, &mut sums, &ReduceOp::Sum)
            .map_err(nccl("ncclAllReduce"))?;
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(sums, cuda));
        Ok(Tensor::from_storage(
            storage,
            values.shape().clone(),
            BackpropOp::none(),
            false,
        ))
    }
}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Communicator")
    }
}

fn nccl(call: &'static str) -> impl Fn(NcclError) -> Error {
    move |error| Error::Nccl {
        call,
        status: format!("{:?}", error.0),
    }
}
