//! The kernels of a graph, and the tables of pointers that they take.

#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DeviceRepr};
use candle_core::{CudaStorage, DType, Result};

use super::super::OP;
use crate::cuda::kernels::Source;
use crate::cuda::launch::{
    Divisor, Launch, MOST_IN_TABLE, Operand, UNUSED_ENTRY, alloc, axis, count, start,
};
use crate::window::Axis;

const SOURCE: Source = Source {
    file: "static_graph/cuda/kernels.cu",
    text: include_str!("kernels.cu"),
};

// Defined under these names in kernels.cu too.
/// Weights of a launch that lays them out, at the most.
const WEIGHTS_PER_LAUNCH: usize = 64;
/// Numbers of a weight that a block lays out, at the most, unless a single pair of channels has more.
const NUMBERS_PER_LAYOUT_BLOCK: usize = 2304;
/// Channels of a block that joins the parts of sums.
const CHANNELS_PER_JOIN_BLOCK: u32 = 32;
/// Sums of a launch that joins their parts, at the most.
const SUMS_PER_LAUNCH: usize = 64;
/// The binary logarithm of how many packs of channels a block takes side by side, at the most.
const MOST_LOG2_PACKS: u32 = 5;
/// Segments of a launch, at the most.
pub(super) const SEGMENTS: usize = 8;

/// How the tensors of a member follow its convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    Bias = 0,
    Batch = 1,
    Running = 2,
}

/// `Segment` of kernels.cu, which says what is what. An address may be 0 where its kernel or kind has no use for it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Segment {
    pub(super) raw: CUdeviceptr,
    pub(super) map: CUdeviceptr,
    pub(super) gradient: CUdeviceptr,
    pub(super) pooled: CUdeviceptr,
    pub(super) winners: CUdeviceptr,
    pub(super) mask: CUdeviceptr,
    pub(super) weight: CUdeviceptr,
    pub(super) bias: CUdeviceptr,
    pub(super) mean: CUdeviceptr,
    pub(super) deviation: CUdeviceptr,
    pub(super) channels: u32,
    pub(super) raw_width: u32,
    pub(super) map_width: u32,
    pub(super) first: u32,
    pub(super) kind: Kind,
    pub(super) eps: f32,
    /// The binary logarithm of how many packs a block takes side by side; set where the blocks are shared out.
    pub(super) log2_packs: u32,
}

impl Segment {
    pub(super) const EMPTY: Self = Self {
        raw: 0,
        map: 0,
        gradient: 0,
        pooled: 0,
        winners: 0,
        mask: 0,
        weight: 0,
        bias: 0,
        mean: 0,
        deviation: 0,
        channels: 0,
        raw_width: 0,
        map_width: 0,
        first: 0,
        kind: Kind::Bias,
        eps: 0.0,
        log2_packs: 0,
    };
}

#[repr(C)]
struct Segments {
    of: [Segment; SEGMENTS],
    end: [u32; SEGMENTS],
    rows: u32,
    channels: u32,
    h: [u32; 5],
    w: [u32; 5],
    width: Divisor,
    height: Divisor,
}

// SAFETY: plain numbers, laid out as kernels.cu has them.
unsafe impl DeviceRepr for Segments {}
const _: () = assert!(size_of::<Segments>() <= MOST_IN_TABLE);

/// One weight as Candle has it and as cuDNN takes it, or its gradient as Candle takes it and as cuDNN has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weight {
    /// (C_out, C_in, taps) of f32.
    pub(super) planes: CUdeviceptr,
    /// (C_out, taps, width).
    pub(super) pixels: CUdeviceptr,
    pub(super) c_out: usize,
    pub(super) c_in: usize,
    pub(super) taps: usize,
    pub(super) width: usize,
}

/// What weights are laid out as: the pixels of cuDNN or the planes of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WeightLayout {
    Pixels,
    Planes,
}

/// `Weights` of kernels.cu.
#[repr(C)]
struct Weights {
    planes: [CUdeviceptr; WEIGHTS_PER_LAUNCH],
    pixels: [CUdeviceptr; WEIGHTS_PER_LAUNCH],
    c_out: [u32; WEIGHTS_PER_LAUNCH],
    c_in: [u32; WEIGHTS_PER_LAUNCH],
    width: [u32; WEIGHTS_PER_LAUNCH],
    taps: [u32; WEIGHTS_PER_LAUNCH],
    pairs: [u32; WEIGHTS_PER_LAUNCH],
    end: [u32; WEIGHTS_PER_LAUNCH],
}

// SAFETY: plain numbers, laid out as kernels.cu has them, without padding.
unsafe impl DeviceRepr for Weights {}
const _: () = assert!(size_of::<Weights>() <= MOST_IN_TABLE);

/// Launches on one device, of kernels for maps of one type.
///
/// Kernels take addresses, and whoever calls keeps what lies there alive until the call returns: what is freed after that is
/// freed in the order of the device's one stream.
pub(super) struct Launches {
    pub(super) device: CudaDevice,
    dtype: DType,
    stream: Arc<CudaStream>,
}

/// `Joins` of kernels.cu.
#[repr(C)]
struct Joins {
    sums: [CUdeviceptr; SUMS_PER_LAUNCH],
    joined: [CUdeviceptr; SUMS_PER_LAUNCH],
    channels: [u32; SUMS_PER_LAUNCH],
    parts: [u32; SUMS_PER_LAUNCH],
    end: [u32; SUMS_PER_LAUNCH],
}

// SAFETY: plain numbers, laid out as kernels.cu has them, without padding.
unsafe impl DeviceRepr for Joins {}
const _: () = assert!(size_of::<Joins>() <= MOST_IN_TABLE);

/// Sums of each channel over the parts of a map's rows: (kinds of sums, parts, channels) of f32.
pub(super) struct PartialSums {
    storage: CudaStorage,
    kinds: usize,
    parts: usize,
    channels: usize,
}

/// The rows of segments, cut into parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parts {
    count: u32,
    rows: u32,
}

/// Segments whose blocks are shared out.
struct Columns {
    table: Segments,
    /// Blocks beside each other.
    blocks: u32,
    /// Channels that a thread takes, in the kernels' names.
    pack: u32,
}

impl Launches {
    pub(super) fn new(device: &CudaDevice, dtype: DType) -> Self {
        Self {
            device: device.clone(),
            dtype,
            stream: device.cuda_stream(),
        }
    }

    /// Room for `elements` numbers of the maps' type.
    pub(super) fn room(&self, elements: usize) -> Result<CudaStorage> {
        alloc(OP, &self.device, self.dtype, elements)
    }

    /// Room for `elements` numbers of another type.
    pub(super) fn room_of(&self, dtype: DType, elements: usize) -> Result<CudaStorage> {
        alloc(OP, &self.device, dtype, elements)
    }

    /// The address of an element.
    pub(super) fn at(&self, storage: &CudaStorage, element: usize) -> Result<CUdeviceptr> {
        use candle_core::backend::BackendStorage;
        let bytes = element * storage.dtype().size_in_bytes();
        Ok(start(OP, storage, &self.stream)? + bytes as u64)
    }

    fn launch(&self, name: &str) -> Result<Launch<'_>> {
        let name = format!("static_graph_{name}");
        Launch::typed(OP, &self.device, &self.stream, &SOURCE, &name, self.dtype)
    }

    /// Images (N, C, pixels) as pixels of `width` channels.
    pub(super) fn pixels_of(
        &self,
        images: Operand,
        (batch, channels, pixels): (usize, usize, usize),
        width: usize,
    ) -> Result<CudaStorage> {
        let elements = count(OP, batch * pixels * width)?;
        let mut map = self.room(elements as usize)?;
        let launch = self
            .launch("from_planes")?
            .read(images)?
            .write(&mut map)?
            .number(channels as u32)
            .number(pixels as u32)
            .number(width as u32)
            .number(elements);
        // SAFETY: the arguments of `from_planes`: (batch, channels, pixels), and room for (batch, pixels, width).
        unsafe { launch.run(elements) }?;
        Ok(map)
    }

    /// Pixels of `width` channels, as [`Self::pixels_of`] makes them, as planes (N, C, pixels) again.
    pub(super) fn planes_of(
        &self,
        map: &CudaStorage,
        (batch, channels, pixels): (usize, usize, usize),
        width: usize,
    ) -> Result<CudaStorage> {
        let elements = count(OP, batch * channels * pixels)?;
        let mut planes = self.room(elements as usize)?;
        let launch = self
            .launch("to_planes")?
            .read_all(map)?
            .write(&mut planes)?
            .number(channels as u32)
            .number(pixels as u32)
            .number(width as u32)
            .number(elements);
        // SAFETY: the arguments of `to_planes`: (batch, pixels, width), and room for (batch, channels, pixels).
        unsafe { launch.run(elements) }?;
        Ok(planes)
    }

    /// Lays weights, or their gradients, out anew. Channels of pixels beyond those of the weight are zero.
    pub(super) fn weights(&self, weights: &[Weight], to: WeightLayout) -> Result<()> {
        for weights in weights.chunks(WEIGHTS_PER_LAUNCH) {
            let mut table = Weights {
                planes: [0; WEIGHTS_PER_LAUNCH],
                pixels: [0; WEIGHTS_PER_LAUNCH],
                c_out: [0; WEIGHTS_PER_LAUNCH],
                c_in: [0; WEIGHTS_PER_LAUNCH],
                width: [0; WEIGHTS_PER_LAUNCH],
                taps: [0; WEIGHTS_PER_LAUNCH],
                pairs: [0; WEIGHTS_PER_LAUNCH],
                end: [UNUSED_ENTRY; WEIGHTS_PER_LAUNCH],
            };
            let mut blocks = 0u32;
            for (i, weight) in weights.iter().enumerate() {
                count(OP, weight.c_out * weight.taps * weight.width)?;
                let per_block = (NUMBERS_PER_LAYOUT_BLOCK / weight.taps).max(1);
                // A block has more than half of what it could take, so that 64 weights of 2^31 elements have fewer than 2^28.
                blocks += (weight.c_out * weight.c_in).div_ceil(per_block) as u32;
                table.planes[i] = weight.planes;
                table.pixels[i] = weight.pixels;
                table.c_out[i] = weight.c_out as u32;
                table.c_in[i] = weight.c_in as u32;
                table.width[i] = weight.width as u32;
                table.taps[i] = weight.taps as u32;
                table.pairs[i] = per_block as u32;
                table.end[i] = blocks;
            }
            let name = match to {
                WeightLayout::Pixels => "lay_weights",
                WeightLayout::Planes => "take_weights",
            };
            // SAFETY: the arguments of either kernel; each block belongs to a weight, whose sizes are those of its memory.
            unsafe { self.launch(name)?.run_with_table((blocks, 1), &table) }?;
        }
        Ok(())
    }

    /// `map = ReLU(what follows raw)`. With `keep`, what of it is not at most 0 as a mask of bits, where threads take packs.
    pub(super) fn finish(
        &self,
        segments: &[Segment],
        rows: usize,
        keep: bool,
    ) -> Result<Option<CudaStorage>> {
        let mut columns = columns(segments, rows, self.dtype)?;
        let parts = small_parts(rows)?;
        let mut mask = None;
        if keep && columns.pack > 1 {
            let bits = rows * (columns.table.channels / columns.pack) as usize;
            let storage = self.room_of(DType::U8, bits)?;
            self.point_to_mask(&storage, &mut columns.table.of[..segments.len()], rows)?;
            mask = Some(storage);
        }
        let name = format!("finish_{}", columns.pack);
        let launch = self.launch(&name)?.number(parts.rows);
        // SAFETY: the arguments of `finish`; segments hold `rows` rows of their widths, and the tensors of their kinds.
        unsafe { launch.run_with_table((columns.blocks, parts.count), &columns.table) }?;
        Ok(mask)
    }

    /// Gives segments their part of the mask of their map.
    pub(super) fn point_to_mask(
        &self,
        mask: &CudaStorage,
        segments: &mut [Segment],
        rows: usize,
    ) -> Result<()> {
        let pack = whole_pack(self.dtype);
        for segment in segments {
            segment.mask = self.at(mask, rows * segment.first as usize / pack)?;
        }
        Ok(())
    }

    /// Mean, 1/σ and unbiased variance of each channel, (3, channels), and whether that has finished the maps as well.
    pub(super) fn moments(&self, segments: &[Segment], rows: usize) -> Result<(CudaStorage, bool)> {
        let columns = columns(segments, rows, self.dtype)?;
        let parts = parts(rows, columns.blocks)?;
        let channels = columns.table.channels;
        let grid = (columns.blocks, parts.count);
        let mut statistics = self.room_of(DType::F32, 3 * channels as usize)?;
        let name = format!("moments_{}", columns.pack);
        if parts.count == 1 {
            let launch = self.launch(&name)?.null().null();
            let launch = launch.write(&mut statistics)?.number(parts.rows);
            // SAFETY: the arguments of `moments`, which writes no means and squares of a single part.
            unsafe { launch.run_with_table(grid, &columns.table) }?;
            return Ok((statistics, true));
        }
        let sums = channels as usize * parts.count as usize;
        let mut means = self.room_of(DType::F64, sums)?;
        let mut squares = self.room_of(DType::F32, sums)?;
        let launch = self
            .launch(&name)?
            .write(&mut means)?
            .write(&mut squares)?
            .null()
            .number(parts.rows);
        // SAFETY: the arguments of `moments`; means and squares are (parts, channels), and no part is empty.
        unsafe { launch.run_with_table(grid, &columns.table) }?;
        let launch = self
            .launch("join_moments")?
            .read_all(&means)?
            .read_all(&squares)?
            .write(&mut statistics)?
            .number(parts.count)
            .number(parts.rows);
        let blocks = channels.div_ceil(CHANNELS_PER_JOIN_BLOCK);
        // SAFETY: the arguments of `join_moments`; statistics are (3, channels).
        unsafe { launch.run_with_table((blocks, 1), &columns.table) }?;
        Ok((statistics, false))
    }

    /// Sums up the gradients of the biases behind the convolutions and, where those are of batch norms, of the weights, in parts.
    /// `raw` of a bias becomes its gradient, and so does that of a batch norm where there is one part. With the windows of a
    /// `pooling`, which [`Self::can_add`] has to allow, a segment with a `pooled` gradient adds that to its own first.
    pub(super) fn gradient_sums(
        &self,
        segments: &[Segment],
        rows: usize,
        pooling: Option<(&Axis, &Axis)>,
    ) -> Result<PartialSums> {
        let mut columns = columns(segments, rows, self.dtype)?;
        let mut name = format!("gradient_sums_{}", columns.pack);
        if let Some((h, w)) = pooling {
            let table = &mut columns.table;
            (table.h, table.w) = (axis(OP, h)?, axis(OP, w)?);
            (table.height, table.width) = (Divisor::of(h.input), Divisor::of(w.input));
            name = format!("gradient_sums_3_{}_{}", h.stride, columns.pack);
        }
        let parts = parts(rows, columns.blocks)?;
        let plain = segments.iter().all(|s| s.kind == Kind::Bias);
        let kinds = if plain { 1 } else { 2 };
        let (count, channels) = (parts.count as usize, columns.table.channels as usize);
        let mut storage = self.room_of(DType::F32, kinds * count * channels)?;
        let launch = self.launch(&name)?.write(&mut storage)?.number(parts.rows);
        // SAFETY: the arguments of `gradient_sums`; sums are (kinds, parts, channels), and no part is empty.
        unsafe { launch.run_with_table((columns.blocks, parts.count), &columns.table) }?;
        Ok(PartialSums {
            storage,
            kinds,
            parts: count,
            channels,
        })
    }

    /// Whether [`Self::gradient_sums`] can add the gradient of this pooling where segments have these widths.
    pub(super) fn can_add(&self, (h, w): (&Axis, &Axis), widths: [usize; 2]) -> bool {
        let pack = whole_pack(self.dtype);
        known_stride(h, w).is_some() && widths.iter().all(|width| width.is_multiple_of(pack))
    }

    /// `raw` of batch norms becomes its gradient, where it is not yet; the sums over all parts.
    pub(super) fn input_gradient(
        &self,
        segments: &[Segment],
        rows: usize,
        sums: PartialSums,
    ) -> Result<CudaStorage> {
        if sums.parts == 1 {
            return Ok(sums.storage);
        }
        let joined = self.join(vec![sums])?.remove(0);
        let columns = columns(segments, rows, self.dtype)?;
        let parts = small_parts(rows)?;
        let launch = self
            .launch(&format!("input_gradient_{}", columns.pack))?
            .read_all(&joined)?
            .float(1.0 / rows as f32)
            .number(parts.rows);
        // SAFETY: the arguments of `input_gradient`; joined is (2, channels).
        unsafe { launch.run_with_table((columns.blocks, parts.count), &columns.table) }?;
        Ok(joined)
    }

    /// The sums over all parts, (kinds of sums, channels) each.
    pub(super) fn join(&self, all: Vec<PartialSums>) -> Result<Vec<CudaStorage>> {
        let mut joined = Vec::with_capacity(all.len());
        let mut entries = Vec::new();
        for sums in &all {
            joined.push(match sums.parts {
                1 => None,
                _ => {
                    let storage = self.room_of(DType::F32, sums.kinds * sums.channels)?;
                    for kind in 0..sums.kinds {
                        let from = self.at(&sums.storage, kind * sums.parts * sums.channels)?;
                        let to = self.at(&storage, kind * sums.channels)?;
                        entries.push((sums, from, to));
                    }
                    Some(storage)
                }
            });
        }
        for entries in entries.chunks(SUMS_PER_LAUNCH) {
            let mut table = Joins {
                sums: [0; SUMS_PER_LAUNCH],
                joined: [0; SUMS_PER_LAUNCH],
                channels: [0; SUMS_PER_LAUNCH],
                parts: [0; SUMS_PER_LAUNCH],
                end: [UNUSED_ENTRY; SUMS_PER_LAUNCH],
            };
            let mut blocks = 0u32;
            for (i, &(sums, from, to)) in entries.iter().enumerate() {
                table.sums[i] = from;
                table.joined[i] = to;
                table.channels[i] = sums.channels as u32;
                table.parts[i] = sums.parts as u32;
                blocks += table.channels[i].div_ceil(CHANNELS_PER_JOIN_BLOCK);
                table.end[i] = blocks;
            }
            let name = "static_graph_join_sums_f32";
            let launch = Launch::new(OP, &self.device, &self.stream, &SOURCE, name)?;
            // SAFETY: the arguments of `join_sums`; each entry is (parts, channels), and has room for (channels).
            unsafe { launch.run_with_table((blocks, 1), &table) }?;
        }
        let of_one_part = all.into_iter().map(|sums| sums.storage);
        Ok(joined
            .into_iter()
            .zip(of_one_part)
            .map(|(joined, only)| joined.unwrap_or(only))
            .collect())
    }

    /// The maxima of the windows over a map of `channels`, and where they are if asked to.
    pub(super) fn max_pool(
        &self,
        x: &CudaStorage,
        (h, w): (&Axis, &Axis),
        (batch, channels): (usize, usize),
        keep: bool,
    ) -> Result<(CudaStorage, Option<CudaStorage>)> {
        let elements = count(OP, batch * h.output * w.output * channels)? as usize;
        count(OP, batch * h.input * w.input * channels)?;
        let mut y = self.room(elements)?;
        let mut winners = match keep {
            true => Some(self.room_of(DType::U8, elements)?),
            false => None,
        };
        let windows = Windows::of(h, w, channels, self.dtype);
        let lines = h.output.div_ceil(windows.lines());
        let packs = channels / windows.pack;
        let name = format!("max_pool_{}", windows.name());
        let mut launch = self.launch(&name)?.read_all(x)?.write(&mut y)?;
        launch = match &mut winners {
            Some(winners) => launch.write(winners)?,
            None => launch.null(),
        };
        let threads = (batch * lines * w.output * packs) as u32;
        let launch = launch
            .structure(axis(OP, h)?)
            .structure(axis(OP, w)?)
            .divisor(packs)
            .divisor(w.output)
            .divisor(lines)
            .number(threads);
        // SAFETY: the arguments of `max_pool`; x and y are maps of the axes' inputs and outputs.
        unsafe { launch.run(threads) }?;
        Ok((y, winners))
    }

    /// Writes the gradient of a pooling's input, or adds it to what is there.
    pub(super) fn max_pool_gradient(
        &self,
        (winners, dy): (&CudaStorage, &CudaStorage),
        dx: &mut CudaStorage,
        (h, w): (&Axis, &Axis),
        (batch, channels): (usize, usize),
        add: bool,
    ) -> Result<()> {
        let elements = count(OP, batch * h.input * w.input * channels)?;
        let windows = Windows::of(h, w, channels, self.dtype);
        let threads = elements / windows.pack as u32;
        let launch = self
            .launch(&format!("max_pool_gradient_{}", windows.name()))?
            .read_all(winners)?
            .read_all(dy)?
            .write(dx)?
            .structure(axis(OP, h)?)
            .structure(axis(OP, w)?)
            .divisor(channels / windows.pack)
            .divisor(w.input)
            .divisor(h.input)
            .number(add.into())
            .number(threads);
        // SAFETY: the arguments of `max_pool_gradient`; dx and dy are maps of the axes' inputs and outputs.
        unsafe { launch.run(threads) }
    }

    /// The mean of each image's pixels, (N, channels) of f32.
    pub(super) fn average(
        &self,
        map: &CudaStorage,
        (batch, pixels, channels): (usize, usize, usize),
    ) -> Result<CudaStorage> {
        let elements = count(OP, batch * channels)?;
        count(OP, batch * channels * pixels)?;
        let mut features = self.room_of(DType::F32, elements as usize)?;
        let launch = self
            .launch("average")?
            .read_all(map)?
            .write(&mut features)?
            .number(pixels as u32)
            .number(channels as u32)
            .number(elements);
        // SAFETY: the arguments of `average`; the map is (batch, pixels, channels).
        unsafe { launch.run(elements) }?;
        Ok(features)
    }

    /// The gradient of [`Self::average`]: each pixel's share of `d_features` (N, channels), as a map.
    pub(super) fn spread(
        &self,
        d_features: Operand,
        (batch, pixels, channels): (usize, usize, usize),
    ) -> Result<CudaStorage> {
        let elements = count(OP, batch * pixels * channels)?;
        let mut map = self.room(elements as usize)?;
        let launch = self
            .launch("spread")?
            .read(d_features)?
            .write(&mut map)?
            .number(pixels as u32)
            .number(channels as u32)
            .number(elements);
        // SAFETY: the arguments of `spread`; the map is (batch, pixels, channels).
        unsafe { launch.run(elements) }?;
        Ok(map)
    }
}

/// Which kernels pool a map.
struct Windows {
    /// Channels that a thread takes.
    pack: usize,
    /// The stride of 3×3 windows, where kernels know both.
    known: Option<usize>,
}

impl Windows {
    fn of(h: &Axis, w: &Axis, channels: usize, dtype: DType) -> Self {
        let full = whole_pack(dtype);
        // Maps have memory of their own, which begins where a pack does.
        let packs = channels.is_multiple_of(full);
        Self {
            pack: if packs { full } else { 1 },
            known: known_stride(h, w).filter(|_| packs),
        }
    }

    /// Lines of windows that a thread of the forward pass takes below each other.
    fn lines(&self) -> usize {
        if self.known == Some(1) { 2 } else { 1 }
    }

    /// The windows as the kernels' names have them: `3_1_4`, or the pack alone.
    fn name(&self) -> String {
        match self.known {
            Some(stride) => format!("3_{stride}_{}", self.pack),
            None => self.pack.to_string(),
        }
    }
}

/// The stride of windows that kernels know.
fn known_stride(h: &Axis, w: &Axis) -> Option<usize> {
    [1, 2].into_iter().find(|&stride| {
        let is = |axis: &Axis| (axis.kernel, axis.stride) == (3, stride);
        is(h) && is(w)
    })
}

/// Numbers of 16 bytes, which a thread loads and stores at once.
fn whole_pack(dtype: DType) -> usize {
    16 / dtype.size_in_bytes()
}

/// How many channels a thread can take at once, as all widths and addresses allow it.
fn pack(segments: &[Segment], dtype: DType) -> u32 {
    let pack = whole_pack(dtype) as u32;
    let fits = |s: &Segment| {
        let widths = [s.channels, s.raw_width, s.map_width];
        let addresses = [s.raw, s.map, s.gradient, s.pooled];
        widths.iter().all(|width| width.is_multiple_of(pack))
            && addresses.iter().all(|address| address.is_multiple_of(16))
    };
    if segments.iter().all(fits) { pack } else { 1 }
}

/// The binary logarithm of how many packs a block takes side by side: as many as lie in 128 bytes, and so that few threads are idle.
fn log2_packs_per_block(channels: u32, pack: u32) -> u32 {
    let packs = channels / pack;
    if pack == 1 {
        return packs
            .next_power_of_two()
            .trailing_zeros()
            .min(MOST_LOG2_PACKS);
    }
    match packs.trailing_zeros() {
        0 => packs.next_power_of_two().trailing_zeros().min(3),
        even => even.min(3),
    }
}

/// Segments with their blocks.
fn columns(segments: &[Segment], rows: usize, dtype: DType) -> Result<Columns> {
    let pack = pack(segments, dtype);
    let mut table = Segments {
        of: [Segment::EMPTY; SEGMENTS],
        end: [UNUSED_ENTRY; SEGMENTS],
        rows: count(OP, rows)?,
        channels: 0,
        h: [0; 5],
        w: [0; 5],
        width: Divisor::of(1),
        height: Divisor::of(1),
    };
    let mut blocks = 0u32;
    for (i, segment) in segments.iter().enumerate() {
        for width in [segment.raw_width, segment.map_width] {
            count(OP, rows * width as usize)?;
        }
        let log2_packs = log2_packs_per_block(segment.channels, pack);
        blocks += segment.channels.div_ceil(pack << log2_packs);
        table.of[i] = Segment {
            log2_packs,
            ..*segment
        };
        table.end[i] = blocks;
        table.channels = table.channels.max(segment.first + segment.channels);
    }
    Ok(Columns {
        table,
        blocks,
        pack,
    })
}

/// CUDA takes no more blocks below each other.
const MOST_PARTS: usize = 65_535;

/// Parts of rows without a sum: a few for each thread, and more where there are blocks enough, so that what a thread does before
/// its first row counts less.
fn small_parts(rows: usize) -> Result<Parts> {
    cut(rows, (rows / 128).clamp(128, 512))
}

/// Parts of a sum over rows, with `blocks` beside each other; the number of both decides the bits of the sum.
fn parts(rows: usize, blocks: u32) -> Result<Parts> {
    // Up to here the sums of one part cost less than another launch that joins two.
    const ROWS_AT_ONCE: usize = 512;
    // Blocks that keep all processors of a large GPU busy, and parts that are soon joined.
    const BLOCKS: usize = 512;
    const PARTS: usize = 128;
    if rows <= ROWS_AT_ONCE {
        return cut(rows, ROWS_AT_ONCE);
    }
    let wanted = (BLOCKS / blocks.max(1) as usize).clamp(1, PARTS);
    cut(rows, rows.div_ceil(wanted).max(128))
}

/// Parts of `rows_each`, or of more where there would be too many.
fn cut(rows: usize, rows_each: usize) -> Result<Parts> {
    let rows_each = rows_each
        .max(rows.div_ceil(MOST_PARTS))
        .clamp(1, rows.max(1));
    Ok(Parts {
        count: count(OP, rows.div_ceil(rows_each).max(1))?,
        rows: count(OP, rows_each)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_rows_and_none_is_empty() -> Result<()> {
        for rows in (1..2000).chain([32_768, 524_288, 524_289, 8_388_608, 100_000_000]) {
            for parts in [
                small_parts(rows)?,
                parts(rows, 1)?,
                parts(rows, 33)?,
                parts(rows, 9999)?,
            ] {
                let (count, each) = (parts.count as usize, parts.rows as usize);
                assert!(
                    count <= MOST_PARTS && count * each >= rows,
                    "{rows}: {parts:?}"
                );
                assert!((count - 1) * each < rows, "{rows}: {parts:?}");
            }
        }
        assert_eq!(parts(512, 4)?.count, 1);
        assert_eq!(
            parts(32_768, 8)?,
            Parts {
                count: 64,
                rows: 512
            }
        );
        assert_eq!(
            parts(524_288, 4)?,
            Parts {
                count: 128,
                rows: 4096
            }
        );
        Ok(())
    }

    #[test]
    fn blocks_take_packs_that_divide_their_channels() {
        assert_eq!(
            [16, 24, 64, 96, 192].map(|channels| log2_packs_per_block(channels, 8)),
            [1, 2, 3, 2, 3]
        );
        assert_eq!(
            [4, 12, 33, 1].map(|channels| log2_packs_per_block(channels, 1)),
            [2, 4, 5, 0]
        );
        assert_eq!(
            [4, 16, 24, 32, 192].map(|channels| log2_packs_per_block(channels, 4)),
            [0, 2, 1, 3, 3]
        );
    }
}
