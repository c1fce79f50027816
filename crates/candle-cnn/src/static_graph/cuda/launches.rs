//! The kernels of a graph, and the tables of pointers that they take.

#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DeviceRepr};
use candle_core::{CudaStorage, DType, Result};

use super::super::OP;
use crate::conv2d::parts_of;
use crate::cuda::kernels::Source;
use crate::cuda::launch::{
    Launch, MOST_IN_TABLE, Operand, THREADS, alloc, axis, count, start, suffix,
};
use crate::window::Axis;

const SOURCE: Source = Source {
    file: "static_graph/cuda/kernels.cu",
    text: include_str!("kernels.cu"),
};

/// What kernels.cu defines under these names.
const PACK: u32 = 4;
const LANES: u32 = 32;
const WEIGHTS: usize = 64;
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
}

impl Segment {
    pub(super) const EMPTY: Self = Self {
        raw: 0,
        map: 0,
        gradient: 0,
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
    };
}

#[repr(C)]
struct Segments {
    of: [Segment; SEGMENTS],
    end: [u32; SEGMENTS],
    rows: u32,
    channels: u32,
}

// SAFETY: plain numbers, laid out as kernels.cu has them, without padding.
unsafe impl DeviceRepr for Segments {}
const _: () = assert!(size_of::<Segments>() <= MOST_IN_TABLE);

/// One weight as Candle has it and as cuDNN takes it; for gradients the way is the other one.
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

/// Which way weights go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    ToPixels,
    ToPlanes,
}

/// `Weights` of kernels.cu.
#[repr(C)]
struct Weights {
    planes: [CUdeviceptr; WEIGHTS],
    pixels: [CUdeviceptr; WEIGHTS],
    c_in: [u32; WEIGHTS],
    width: [u32; WEIGHTS],
    taps: [u32; WEIGHTS],
    elements: [u32; WEIGHTS],
    end: [u32; WEIGHTS],
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
    pub(super) dtype: DType,
    stream: Arc<CudaStream>,
}

/// Sums over the rows of segments, cut into parts.
struct Parts {
    count: u32,
    rows: u32,
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
        let name = format!("static_graph_{name}_{}", suffix(OP, self.dtype)?);
        Launch::new(OP, &self.device, &self.stream, &SOURCE, &name)
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

    /// The way back.
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

    /// Lays weights, or their gradients, out anew.
    pub(super) fn weights(&self, weights: &[Weight], way: Way) -> Result<()> {
        for weights in weights.chunks(WEIGHTS) {
            let mut table = Weights {
                planes: [0; WEIGHTS],
                pixels: [0; WEIGHTS],
                c_in: [0; WEIGHTS],
                width: [0; WEIGHTS],
                taps: [0; WEIGHTS],
                elements: [0; WEIGHTS],
                end: [0; WEIGHTS],
            };
            let mut blocks = 0u32;
            for (i, weight) in weights.iter().enumerate() {
                let channels = match way {
                    Way::ToPixels => weight.width,
                    Way::ToPlanes => weight.c_in,
                };
                let elements = count(OP, weight.c_out * weight.taps * channels)?;
                // 64 weights of 2^31 elements have 2^29 blocks.
                blocks += elements.div_ceil(THREADS);
                table.planes[i] = weight.planes;
                table.pixels[i] = weight.pixels;
                table.c_in[i] = weight.c_in as u32;
                table.width[i] = weight.width as u32;
                table.taps[i] = weight.taps as u32;
                table.elements[i] = elements;
                table.end[i] = blocks;
            }
            let name = match way {
                Way::ToPixels => "lay_weights",
                Way::ToPlanes => "take_weights",
            };
            // SAFETY: the arguments of either kernel; each block belongs to a weight, whose sizes are those of its memory.
            unsafe { self.launch(name)?.run_blocks((blocks, 1), Some(&table)) }?;
        }
        Ok(())
    }

    /// `map = ReLU(what follows raw)`.
    pub(super) fn finish(&self, segments: &[Segment], rows: usize) -> Result<()> {
        let pack = pack(segments, self.dtype);
        let name = if pack == 1 { "finish" } else { "finish_packs" };
        let (table, blocks) = elementwise(segments, rows, pack)?;
        // SAFETY: the arguments of `finish`; segments hold `rows` rows of their widths, and the tensors of their kinds.
        unsafe { self.launch(name)?.run_blocks((blocks, 1), Some(&table)) }
    }

    /// Mean, 1/σ and unbiased variance of each channel, (3, channels).
    pub(super) fn moments(&self, segments: &[Segment], rows: usize) -> Result<CudaStorage> {
        let (table, blocks) = columns(segments, rows)?;
        let parts = parts(rows)?;
        let mut statistics = self.room_of(DType::F32, 3 * table.channels as usize)?;
        if parts.count == 1 {
            let launch = self.launch("moments")?.null().null();
            let launch = launch.write(&mut statistics)?.number(parts.rows);
            // SAFETY: the arguments of `moments`, which writes no means and squares of a single part.
            unsafe { launch.run_blocks((blocks, 1), Some(&table)) }?;
            return Ok(statistics);
        }
        let sums = table.channels as usize * parts.count as usize;
        let mut means = self.room_of(DType::F64, sums)?;
        let mut squares = self.room_of(DType::F32, sums)?;
        let launch = self
            .launch("moments")?
            .write(&mut means)?
            .write(&mut squares)?
            .null()
            .number(parts.rows);
        // SAFETY: the arguments of `moments`; means and squares are (parts, channels), and no part is empty.
        unsafe { launch.run_blocks((blocks, parts.count), Some(&table)) }?;
        let launch = self
            .launch("join_moments")?
            .read_all(&means)?
            .read_all(&squares)?
            .write(&mut statistics)?
            .number(parts.count)
            .number(parts.rows);
        let blocks = table.channels.div_ceil(THREADS);
        // SAFETY: the arguments of `join_moments`; statistics are (3, channels).
        unsafe { launch.run_blocks((blocks, 1), Some(&table)) }?;
        Ok(statistics)
    }

    /// The gradients of bias and weight of what follows, (2, channels); `raw` of a bias becomes its gradient.
    pub(super) fn gradient_sums(&self, segments: &[Segment], rows: usize) -> Result<CudaStorage> {
        let (table, blocks) = columns(segments, rows)?;
        let parts = parts(rows)?;
        let channels = table.channels;
        let mut sums = self.room_of(DType::F32, 2 * channels as usize * parts.count as usize)?;
        let launch = self
            .launch("gradient_sums")?
            .write(&mut sums)?
            .number(parts.rows);
        // SAFETY: the arguments of `gradient_sums`; sums are (2, parts, channels), and no part is empty.
        unsafe { launch.run_blocks((blocks, parts.count), Some(&table)) }?;
        if parts.count == 1 {
            return Ok(sums);
        }
        let mut joined = self.room_of(DType::F32, 2 * channels as usize)?;
        let name = "static_graph_join_sums_f32";
        let launch = Launch::new(OP, &self.device, &self.stream, &SOURCE, name)?
            .read_all(&sums)?
            .write(&mut joined)?
            .number(channels)
            .number(parts.count);
        // SAFETY: the arguments of `join_sums`; joined is (2, channels).
        unsafe { launch.run(channels) }?;
        Ok(joined)
    }

    /// `raw` of batch norms becomes its gradient.
    pub(super) fn input_gradient(
        &self,
        segments: &[Segment],
        rows: usize,
        joined: &CudaStorage,
    ) -> Result<()> {
        let pack = pack(segments, self.dtype);
        let name = match pack {
            1 => "input_gradient",
            _ => "input_gradient_packs",
        };
        let (table, blocks) = elementwise(segments, rows, pack)?;
        let launch = self
            .launch(name)?
            .read_all(joined)?
            .float(1.0 / rows as f32);
        // SAFETY: the arguments of `input_gradient`; joined is (2, channels).
        unsafe { launch.run_blocks((blocks, 1), Some(&table)) }
    }

    /// The maxima of the windows over a map of `channels`, and where they are if asked to.
    pub(super) fn max_pool(
        &self,
        x: &CudaStorage,
        (h, w): (&Axis, &Axis),
        (batch, channels): (usize, usize),
        keep: bool,
    ) -> Result<(CudaStorage, Option<CudaStorage>)> {
        let elements = count(OP, batch * h.output * w.output * channels)?;
        let mut y = self.room(elements as usize)?;
        let mut winners = match keep {
            true => Some(self.room_of(DType::U8, elements as usize)?),
            false => None,
        };
        let mut launch = self.launch("max_pool")?.read_all(x)?.write(&mut y)?;
        launch = match &mut winners {
            Some(winners) => launch.write(winners)?,
            None => launch.null(),
        };
        let launch = launch
            .structure(axis(OP, h)?)
            .structure(axis(OP, w)?)
            .number(channels as u32)
            .number(elements);
        // SAFETY: the arguments of `max_pool`; x and y are maps of the axes' inputs and outputs.
        unsafe { launch.run(elements) }?;
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
        let launch = self
            .launch("max_pool_gradient")?
            .read_all(winners)?
            .read_all(dy)?
            .write(dx)?
            .structure(axis(OP, h)?)
            .structure(axis(OP, w)?)
            .number(channels as u32)
            .number(add.into())
            .number(elements);
        // SAFETY: the arguments of `max_pool_gradient`; dx and dy are maps of the axes' inputs and outputs.
        unsafe { launch.run(elements) }
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

    /// The way back.
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

/// How many channels a thread can take at once, as all widths and addresses allow it.
fn pack(segments: &[Segment], dtype: DType) -> u32 {
    let bytes = u64::from(PACK) * dtype.size_in_bytes() as u64;
    let fits = |s: &Segment| {
        let widths = [s.channels, s.raw_width, s.map_width];
        let addresses = [s.raw, s.map, s.gradient];
        widths.iter().all(|width| width.is_multiple_of(PACK))
            && addresses
                .iter()
                .all(|address| address.is_multiple_of(bytes))
    };
    if segments.iter().all(fits) { PACK } else { 1 }
}

/// A table whose blocks take `THREADS` packs of channels each.
fn elementwise(segments: &[Segment], rows: usize, pack: u32) -> Result<(Segments, u32)> {
    table(segments, rows, |rows, s| {
        (rows * (s.channels / pack)).div_ceil(THREADS)
    })
}

/// A table whose blocks take `LANES` channels each.
fn columns(segments: &[Segment], rows: usize) -> Result<(Segments, u32)> {
    table(segments, rows, |_, s| s.channels.div_ceil(LANES))
}

fn table(
    segments: &[Segment],
    rows: usize,
    blocks: impl Fn(u32, &Segment) -> u32,
) -> Result<(Segments, u32)> {
    let mut table = Segments {
        of: [Segment::EMPTY; SEGMENTS],
        end: [0; SEGMENTS],
        rows: count(OP, rows)?,
        channels: 0,
    };
    let mut end = 0u32;
    for (i, segment) in segments.iter().enumerate() {
        for width in [segment.raw_width, segment.map_width] {
            count(OP, rows * width as usize)?;
        }
        end += blocks(table.rows, segment);
        table.of[i] = *segment;
        table.end[i] = end;
        table.channels = table.channels.max(segment.first + segment.channels);
    }
    Ok((table, end))
}

fn parts(rows: usize) -> Result<Parts> {
    // 32 channels share a block, which has 8 threads for each of them: as many values a thread as elsewhere. A few
    // more cost less than another launch that joins two parts.
    const ROWS_AT_ONCE: usize = 256;
    let per_part = match rows {
        ..=ROWS_AT_ONCE => rows.max(1),
        _ => parts_of(rows * LANES as usize).1.div_ceil(LANES as usize),
    };
    Ok(Parts {
        count: count(OP, rows.div_ceil(per_part))?,
        rows: count(OP, per_part)?,
    })
}
