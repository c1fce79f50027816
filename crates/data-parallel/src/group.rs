//! The group of processes and what they do together.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};

use crate::environment::Ranks;
use crate::error::{Error, Result, with_sources};
use crate::rendezvous::{self, Connections, compare};
use crate::wire::{Call, Kind, Link, MAX_TEXT};

/// Values that are reduced at once, 25 MiB as in PyTorch's `DistributedDataParallel`: long enough for
/// the network, short enough that the copy of the gradients stays small.
const BUCKET: usize = (25 << 20) / size_of::<f32>();

/// How long a rank that gives up waits for the others to hear it.
const LINGER: Duration = Duration::from_secs(1);

/// How long a rank that has lost another listens whether somebody says why.
const HEARSAY: Duration = Duration::from_millis(300);

/// How often a rank that waits for its device asks it, and how often it looks whether the others are still there.
const ASK_EVERY: Duration = Duration::from_micros(50);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How processes connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// How long to wait for the others to appear, and later for a rank that says nothing. A rank
    /// that is killed is noticed at once; this is for machines that vanish and programs that hang.
    /// It must be longer than whatever a rank may do alone: load data, save a checkpoint.
    pub timeout: Duration,
    /// Names and values that must be equal on all ranks: the program's version, its settings.
    pub facts: BTreeMap<String, String>,
}

impl Default for Options {
    /// Ten minutes, no facts.
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(600),
            facts: BTreeMap::new(),
        }
    }
}

/// What the gradients travel over. Everything else goes over TCP.
#[derive(Debug, Clone)]
pub enum Backend {
    /// TCP, through the host's memory; for any device.
    Tcp,
    /// NCCL, from GPU to GPU.
    #[cfg(feature = "nccl")]
    Nccl(Device),
}

impl Backend {
    /// The fastest that this build has for tensors on `device`.
    pub fn of(device: &Device) -> Self {
        match device {
            #[cfg(feature = "nccl")]
            Device::Cuda(_) => Self::Nccl(device.clone()),
            _ => Self::Tcp,
        }
    }

    /// `tcp` or `nccl`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            #[cfg(feature = "nccl")]
            Self::Nccl(_) => "nccl",
        }
    }
}

/// This process among those that train together.
///
/// All ranks must make the same calls in the same order. A call that fails ends the group: all
/// later calls fail too, here and on the other ranks.
#[derive(Debug)]
pub struct ProcessGroup {
    rank: usize,
    world_size: usize,
    /// None where this process is alone.
    connections: Option<Connections>,
    #[cfg(feature = "nccl")]
    nccl: Option<crate::nccl::Communicator>,
    timeout: Duration,
    calls: Cell<u64>,
    failed: RefCell<Option<String>>,
}

impl ProcessGroup {
    /// Finds the other ranks and checks that all run the same.
    ///
    /// # Errors
    /// [`Error::Listen`], [`Error::Unreachable`], [`Error::Missing`], [`Error::Different`],
    /// [`Error::Stranger`], and [`Error::GaveUp`] on those ranks to which rank 0 reports one of them.
    pub fn connect(ranks: &Ranks, options: &Options, backend: Backend) -> Result<Self> {
        let mut options = options.clone();
        let name = backend.name().to_string();
        options.facts.insert("backend".into(), name);
        let connections = match ranks.world_size {
            1 => None,
            _ => Some(rendezvous::meet(ranks, &options)?),
        };
        #[allow(unused_mut)] // only NCCL comes later
        let mut group = Self {
            rank: ranks.rank,
            world_size: ranks.world_size,
            connections,
            #[cfg(feature = "nccl")]
            nccl: None,
            timeout: options.timeout,
            calls: Cell::new(0),
            failed: RefCell::new(None),
        };
        #[cfg(feature = "nccl")]
        if let Backend::Nccl(device) = &backend {
            group.nccl = Some(crate::nccl::Communicator::new(&group, device)?);
        }
        Ok(group)
    }

    /// This process' number, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many processes there are.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Whether this process is the one that writes and prints.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// Whether tensors are reduced from GPU to GPU, as work on the device's stream that the host does not wait for.
    pub fn reduces_on_gpu(&self) -> bool {
        #[cfg(feature = "nccl")]
        return self.nccl.is_some();
        #[cfg(not(feature = "nccl"))]
        return false;
    }

    /// The mean over all ranks of each tensor, all f32, in new tensors on the same devices.
    ///
    /// # Errors
    /// As [`Self::all_reduce_weighted`].
    pub fn all_reduce_mean(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
        self.all_reduce_weighted(tensors, 1.0 / self.world_size as f64)
    }

    /// The sum over all ranks of each tensor times the rank's `weight`. With weights that add up to
    /// 1 it is a weighted mean: of gradients, each weighted by its rank's share of the batch, it is
    /// the gradient of the whole batch.
    ///
    /// All ranks give tensors of the same shapes in the same order, all f32. The results are the
    /// same bits on all ranks.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other types than f32, [`Error::Tensor`], [`Error::OutOfStep`] where
    /// the sizes differ between ranks, [`Error::Nccl`], and those of every call: [`Error::Lost`],
    /// [`Error::Silent`], [`Error::GaveUp`], [`Error::Failed`].
    pub fn all_reduce_weighted(&self, tensors: &[Tensor], weight: f64) -> Result<Vec<Tensor>> {
        // The others wait for this rank's part, also where it fails before a connection is used.
        self.all_reduce_buckets(tensors, weight)
            .inspect_err(|error| self.give_up(&with_sources(error)))
    }

    fn all_reduce_buckets(&self, tensors: &[Tensor], weight: f64) -> Result<Vec<Tensor>> {
        if let Some(tensor) = tensors.iter().find(|tensor| tensor.dtype() != DType::F32) {
            return Err(Error::Unsupported {
                what: format!("a tensor of {:?}; only F32 can be reduced", tensor.dtype()),
            });
        }
        let mut reduced = Vec::with_capacity(tensors.len());
        for bucket in buckets(tensors) {
            reduced.extend(self.all_reduce_bucket(bucket, weight)?);
        }
        Ok(reduced)
    }

    /// Replaces each number by its sum over all ranks.
    ///
    /// # Errors
    /// Those of every call; [`Error::OutOfStep`] where the ranks have different lengths.
    pub fn all_reduce_sum(&self, counters: &mut [u64]) -> Result<()> {
        self.sum(
            counters,
            u64::to_le_bytes,
            u64::from_le_bytes,
            u64::wrapping_add,
        )
    }

    /// Replaces each number by its sum over all ranks, in the order of the ranks.
    ///
    /// # Errors
    /// As [`Self::all_reduce_sum`].
    pub fn all_reduce_sum_f64(&self, values: &mut [f64]) -> Result<()> {
        self.sum(values, f64::to_le_bytes, f64::from_le_bytes, |a, b| a + b)
    }

    /// Waits until all ranks are here.
    ///
    /// # Errors
    /// Those of every call.
    pub fn barrier(&self) -> Result<()> {
        self.all_reduce_sum(&mut [])
    }

    /// Waits until `is_done` for work of the device that other ranks take part in, as an all-reduce over NCCL. Where one of them is
    /// gone that work never ends, and a plain wait for the device would not either.
    ///
    /// # Errors
    /// That of `is_done`; [`Error::Lost`], [`Error::GaveUp`], [`Error::Failed`], and [`Error::Stuck`] when the timeout of the group's
    /// [`Options`] is over.
    pub fn wait_until<E: From<Error>>(
        &self,
        mut is_done: impl FnMut() -> std::result::Result<bool, E>,
    ) -> std::result::Result<(), E> {
        self.check_usable()?;
        let begin = Instant::now();
        let mut looked = begin;
        while !is_done()? {
            if looked.elapsed() < LOOK_EVERY {
                std::thread::sleep(ASK_EVERY);
                continue;
            }
            looked = Instant::now();
            self.look(begin).inspect_err(|error| self.fail(error))?;
        }
        Ok(())
    }

    /// Whether the other ranks are still there, and the device has not been waited for too long.
    fn look(&self, begin: Instant) -> Result<()> {
        let call = Call {
            kind: Kind::AllReduce,
            number: self.calls.get(),
        };
        self.links().try_for_each(|link| link.look(call))?;
        match begin.elapsed() > self.timeout {
            true => Err(Error::Stuck {
                timeout: self.timeout,
            }),
            false => Ok(()),
        }
    }

    /// Gives all ranks the `bytes` of rank 0; what others pass is ignored.
    ///
    /// # Errors
    /// Those of every call.
    pub fn broadcast(&self, bytes: Vec<u8>) -> Result<Vec<u8>> {
        self.call(Kind::Broadcast, |connections, call| {
            if self.rank == 0 {
                for link in &connections.star {
                    link.send(call, &bytes)?;
                }
                return Ok(None);
            }
            // Memory is taken as the bytes come, however many the header says.
            let received = connections.star[0].receive_up_to(call, usize::MAX)?;
            Ok(Some(received))
        })
        .map(|received| received.flatten().unwrap_or(bytes))
    }

    /// Refuses to go on unless these names have the same values on all ranks.
    ///
    /// # Errors
    /// [`Error::Different`] on rank 0, [`Error::GaveUp`] with the same text on the others.
    pub fn verify_same(&self, facts: &BTreeMap<String, String>) -> Result<()> {
        let text = serde_json::to_vec(facts).map_err(|error| Error::Unsupported {
            what: format!("settings cannot be written: {error}"),
        })?;
        self.call(Kind::Facts, |connections, call| {
            if self.rank > 0 {
                let link = &connections.star[0];
                link.send(call, &text)?;
                return link.receive(call, &mut []);
            }
            for link in &connections.star {
                let text = link.receive_up_to(call, MAX_TEXT)?;
                let found = serde_json::from_slice(&text).map_err(|error| Error::Stranger {
                    peer: format!("rank {}", link.peer),
                    reason: format!("its settings cannot be read ({error})"),
                })?;
                compare(link.peer, &found, facts)?;
            }
            connections
                .star
                .iter()
                .try_for_each(|link| link.send(call, &[]))
        })?;
        Ok(())
    }

    /// Tells the other ranks that this one stops with an error, whose text they then report. Nothing
    /// happens where the group has failed already: then they know.
    pub fn give_up(&self, reason: &str) {
        if self.failed.borrow().is_none() {
            self.end(self.rank, reason.to_string());
        }
    }

    /// One part of the tensors, as one list of numbers.
    fn all_reduce_bucket(&self, tensors: &[Tensor], weight: f64) -> Result<Vec<Tensor>> {
        #[cfg(feature = "nccl")]
        if let Some(nccl) = &self.nccl {
            self.check_usable()?;
            return nccl.all_reduce_weighted(tensors, weight);
        }
        let during = Kind::AllReduce.name();
        let failed = |source| Error::Tensor { during, source };
        let mut values = Vec::with_capacity(tensors.iter().map(Tensor::elem_count).sum());
        for tensor in tensors {
            // A GPU is waited for here.
            let part = tensor.flatten_all().and_then(|flat| flat.to_vec1::<f32>());
            values.extend(
                part.map_err(failed)?
                    .into_iter()
                    .map(|value| value * weight as f32),
            );
        }
        self.call(Kind::AllReduce, |connections, call| {
            let Connections { ring, .. } = connections;
            ring.all_reduce_sum(&mut values, call, self.rank, self.world_size)
        })?;
        let mut rest = values.as_slice();
        let back = tensors.iter().map(|tensor| {
            let (part, others) = rest.split_at(tensor.elem_count());
            rest = others;
            Tensor::from_slice(part, tensor.shape(), tensor.device()).map_err(failed)
        });
        back.collect()
    }

    /// Over the star: rank 0 adds up in the order of the ranks and tells the result.
    fn sum<T: Copy>(
        &self,
        values: &mut [T],
        encode: impl Fn(T) -> [u8; 8],
        decode: impl Fn([u8; 8]) -> T,
        add: impl Fn(T, T) -> T,
    ) -> Result<()> {
        self.call(Kind::Counters, |connections, call| {
            let mut bytes = vec![0; 8 * values.len()];
            let write = |bytes: &mut [u8], values: &[T]| {
                for (place, &value) in bytes.chunks_exact_mut(8).zip(values) {
                    place.copy_from_slice(&encode(value));
                }
            };
            let read = |bytes: &[u8], values: &mut [T], combine: &dyn Fn(T, T) -> T| {
                for (value, place) in values.iter_mut().zip(bytes.chunks_exact(8)) {
                    let mut number = [0; 8];
                    number.copy_from_slice(place);
                    *value = combine(*value, decode(number));
                }
            };
            if self.rank > 0 {
                let link = &connections.star[0];
                write(&mut bytes, values);
                link.send(call, &bytes)?;
                link.receive(call, &mut bytes)?;
                read(&bytes, values, &|_, sum| sum);
                return Ok(());
            }
            for link in &connections.star {
                link.receive(call, &mut bytes)?;
                read(&bytes, values, &add);
            }
            write(&mut bytes, values);
            connections
                .star
                .iter()
                .try_for_each(|link| link.send(call, &bytes))
        })?;
        Ok(())
    }

    /// Makes a call together with the others; None where there are no others. A failure ends the
    /// group.
    fn call<T>(
        &self,
        kind: Kind,
        work: impl FnOnce(&Connections, Call) -> Result<T>,
    ) -> Result<Option<T>> {
        self.check_usable()?;
        let Some(connections) = &self.connections else {
            return Ok(None);
        };
        let number = self.calls.get() + 1;
        self.calls.set(number);
        let call = Call { kind, number };
        let result = work(connections, call).map_err(|error| self.first_cause(error, call));
        result.map(Some).inspect_err(|error| self.fail(error))
    }

    /// What another rank has said of its end, where a connection is lost: the peer may have ended for that reason, and not have been
    /// the first.
    fn first_cause(&self, error: Error, call: Call) -> Error {
        if !matches!(error, Error::Lost { .. }) {
            return error;
        }
        let end = Instant::now() + HEARSAY;
        loop {
            let told = self.links().find_map(|link| match link.look(call) {
                Err(told @ Error::GaveUp { .. }) => Some(told),
                _ => None,
            });
            match told {
                Some(told) => return told,
                None if Instant::now() >= end => return error,
                None => std::thread::sleep(LOOK_EVERY),
            }
        }
    }

    /// Ends the group for a reason that others have given or this rank has.
    fn fail(&self, error: &Error) {
        let (first, reason) = match error {
            Error::GaveUp { rank, reason } => (*rank, reason.clone()),
            error => (self.rank, error.to_string()),
        };
        self.end(first, reason);
    }

    /// All connections of this rank.
    fn links(&self) -> impl Iterator<Item = &Link> {
        self.connections.iter().flat_map(|connections| {
            let ring = [&connections.ring.next, &connections.ring.previous];
            ring.into_iter().chain(&connections.star)
        })
    }

    fn check_usable(&self) -> Result<()> {
        match &*self.failed.borrow() {
            Some(reason) => Err(Error::Failed(reason.clone())),
            None => Ok(()),
        }
    }

    /// Passes the reason on to all neighbours, who pass it on to theirs.
    fn end(&self, first: usize, reason: String) {
        let links: Vec<&Link> = self.links().collect();
        links.iter().for_each(|link| link.give_up(first, &reason));
        let deadline = Instant::now() + LINGER;
        links.iter().for_each(|link| link.linger(deadline));
        *self.failed.borrow_mut() = Some(reason);
    }
}

/// Cuts the list where [`BUCKET`] values are reached; a longer tensor is a bucket of its own.
fn buckets(tensors: &[Tensor]) -> impl Iterator<Item = &[Tensor]> {
    let mut rest = tensors;
    std::iter::from_fn(move || {
        let mut values = 0;
        let fits = rest.iter().take_while(|tensor| {
            values += tensor.elem_count();
            values <= BUCKET
        });
        let count = fits.count().max(1).min(rest.len());
        let (bucket, others) = rest.split_at(count);
        rest = others;
        (!bucket.is_empty()).then_some(bucket)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_whole_tensors_in_their_order() {
        let sizes = [3, BUCKET - 3, 1, BUCKET + 5, 2, 2];
        let tensors: Vec<Tensor> = sizes
            .iter()
            .map(|&size| {
                let one = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
                one.broadcast_as(size).unwrap()
            })
            .collect();
        let lengths: Vec<Vec<usize>> = buckets(&tensors)
            .map(|bucket| bucket.iter().map(Tensor::elem_count).collect())
            .collect();
        assert_eq!(
            lengths,
            [vec![3, BUCKET - 3], vec![1], vec![BUCKET + 5], vec![2, 2]]
        );
    }
}
