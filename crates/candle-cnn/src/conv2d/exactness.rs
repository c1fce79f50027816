//! Whether an engine of cuDNN computes f32 in full.
//!
//! cuDNN says of an engine whether it rounds its factors, but that is its word. So where f32 is asked for in full, an engine is tried
//! out before it is used: on drawn numbers, some of its results are compared with sums in f64. Engine 17 of cuDNN 9.19 on an H200 needs
//! it: it deviates as TF32 does, or more, for gradients of 5×5 weights (results/2026-11-27-gpu-nvidia-h200).

#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::Result;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr};

use super::engines::Operands;
use super::plan::{MemoryFormat, Pass, PlanKey};
use super::{Conv2dGeometry, OP};
use crate::cuda::cudnn::{Cudnn, address};
use crate::cuda::kernels::Source;
use crate::cuda::lanes;
use crate::cuda::launch::{Launch, count};

const SOURCE: Source = Source {
    file: "conv2d/exactness.cu",
    text: include_str!("exactness.cu"),
};

/// The most that an engine may deviate. Factors rounded to TF32 deviate by 2.9e-4 (by more where they are cut off), sums in f32 of N products, one
/// after the other, by 2e-8·√N: 1.5e-5 for half a million of them, and this for 30 million.
pub(super) const MAX_DEVIATION: f64 = 1.0 / 8192.0;

/// The most that an engine may deviate where every other deviates more. Beyond this a result is wrong, and not rounded: bf16
/// deviates by 3e-3.
pub(super) const MAX_LAST_RESORT_DEVIATION: f64 = 0.01;

/// How many elements of a result are looked at.
const ELEMENTS: u32 = 32;

/// How far the results are off that `run` computes for a key of f32: the root of the mean square of the errors, in units of the root of
/// the mean sum of the squares of the products. Rounding each factor to a relative precision gives the same number, however many
/// products there are.
///
/// Waits for all that this thread has given to the device, and for the end of what it gives itself.
///
/// # Errors
/// Those of `run`, and of CUDA.
pub(super) fn deviation(
    cudnn: &mut Cudnn,
    key: &PlanKey,
    run: impl FnOnce(&mut Cudnn, Operands) -> Result<()>,
) -> Result<f64> {
    lanes::synchronize(cudnn.device())?;
    let deviation = deviation_alone(cudnn, key, run);
    cudnn.stream().synchronize().w()?;
    deviation
}

fn deviation_alone(
    cudnn: &mut Cudnn,
    key: &PlanKey,
    run: impl FnOnce(&mut Cudnn, Operands) -> Result<()>,
) -> Result<f64> {
    let g = &key.geometry;
    let (device, stream) = (cudnn.device().clone(), Arc::clone(cudnn.stream()));
    let launch = |name| Launch::new(OP, &device, &stream, &SOURCE, name);
    let drawn = |elements: usize, seed: u32| -> Result<CudaSlice<f32>> {
        // SAFETY: the kernel writes every element.
        let mut numbers = unsafe { stream.alloc::<f32>(elements) }.w()?;
        let (pointer, held) = numbers.device_ptr_mut(&stream);
        let elements = count(OP, elements)?;
        let draw = launch("conv2d_draw_f32")?;
        let draw = draw.long(pointer).number(elements).number(seed);
        // SAFETY: the arguments are those of `conv2d_draw_f32` in exactness.cu, and there are as many elements.
        unsafe { draw.run(elements) }?;
        drop(held);
        Ok(numbers)
    };
    let operand = |seed: u32, of: Pass| match key.adds && of == key.pass {
        // What the result is added to.
        true => stream.alloc_zeros::<f32>(g.written_by(of)).w(),
        // The result's place as well: what an engine does not write is wrong.
        false => drawn(g.written_by(of), seed),
    };
    let x = operand(1, Pass::InputGradient)?;
    let weight = operand(2, Pass::WeightGradient)?;
    let y = operand(3, Pass::Forward)?;
    let bias = match key.epilogue.bias {
        true => Some(drawn(g.c_out, 4)?),
        false => None,
    };
    let [x, weight, y] = [&x, &weight, &y].map(|numbers| numbers.device_ptr(&stream));
    let bias = bias.as_ref().map(|bias| bias.device_ptr(&stream));
    let bias = bias.as_ref().map_or(0, |(pointer, _)| *pointer);
    let mut operands = Operands::new(x.0, weight.0, y.0);
    operands.bias = address(bias);
    run(cudnn, operands)?;

    // SAFETY: the kernel writes every element.
    let mut found = unsafe { stream.alloc::<f64>(2 * ELEMENTS as usize) }.w()?;
    {
        let (pointer, _held) = found.device_ptr_mut(&stream);
        let pointers: [CUdeviceptr; 4] = [x.0, weight.0, y.0, bias];
        // As exactness.cu names them.
        let pass = match key.pass {
            Pass::Forward => 0,
            Pass::InputGradient => 1,
            Pass::WeightGradient => 2,
        };
        let compare = pointers
            .into_iter()
            .fold(launch("conv2d_deviations_f32")?, Launch::long)
            .number(pass)
            .number(key.epilogue.relu.into())
            .long(pointer);
        let geometry = Geometry::new(g, key.format);
        // SAFETY: the arguments are those of `conv2d_deviations_f32` in exactness.cu, tensors of the geometry's sizes, and two numbers
        // for each block.
        unsafe { compare.run_with_table((ELEMENTS, 1), &geometry) }?;
    }
    let found = stream.clone_dtoh(&found).w()?;
    let (errors, squares) = found
        .chunks_exact(2)
        .fold((0.0, 0.0), |(e, s), of| (e + of[0], s + of[1]));
    let deviation = (errors / squares).sqrt();
    Ok(match errors == 0.0 {
        // Also where there is nothing to round.
        true => 0.0,
        false if deviation.is_nan() => f64::INFINITY,
        false => deviation,
    })
}

/// `Geometry` of exactness.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Geometry([u32; 16]);

// SAFETY: plain numbers, laid out as exactness.cu has them, without padding.
unsafe impl DeviceRepr for Geometry {}

impl Geometry {
    fn new(g: &Conv2dGeometry, format: MemoryFormat) -> Self {
        let c = &g.config;
        let numbers = [
            [g.batch, g.c_in, g.input.0, g.input.1],
            [g.c_out, g.kernel.0, g.kernel.1, g.output.0],
            [g.output.1, c.stride.0, c.stride.1, c.padding.0],
            [
                c.padding.1,
                c.dilation.0,
                c.dilation.1,
                usize::from(format == MemoryFormat::ChannelsLast),
            ],
        ];
        let numbers = numbers.as_flattened();
        Self(std::array::from_fn(|i| numbers[i] as u32))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::cuda_backend::CudaDevice;
    use candle_core::{DType, Device};
    use test_support::devices;

    use super::*;
    use crate::Conv2dConfig;
    use crate::conv2d::engines::{Plan, named};
    use crate::conv2d::plan::Epilogue;
    use crate::conv2d::tests::geometry;
    use crate::cuda::cudnn::{failed, with_cudnn};
    use crate::cuda::{F32Math, Settings};

    fn gpu() -> Result<Option<CudaDevice>> {
        let device = devices().into_iter().find(Device::is_cuda);
        device.map(|d| d.as_cuda_device().cloned()).transpose()
    }

    /// A 5×5 convolution as in both networks first; then such as differ in every way.
    fn geometries() -> Result<[Conv2dGeometry; 4]> {
        let uneven = Conv2dConfig {
            stride: (2, 3),
            padding: (1, 2),
            dilation: (1, 2),
        };
        let same = Conv2dConfig::padded(2);
        let strided = Conv2dConfig::padded(1).strided(2);
        // Of sixteen pixels one has a gradient.
        let sparse = Conv2dConfig::default().strided(4);
        Ok([
            geometry(5, (24, 64), (8, 8), (5, 5), same)?,
            geometry(3, (8, 12), (9, 14), (3, 3), strided)?,
            geometry(2, (16, 24), (28, 28), (1, 1), sparse)?,
            geometry(2, (3, 5), (8, 9), (3, 2), uneven)?,
        ])
    }

    /// Keys of all passes of the geometries, with what may follow a forward one.
    fn keys(settings: &Settings) -> Result<Vec<PlanKey>> {
        let mut keys = Vec::new();
        for geometry in geometries()? {
            for format in [MemoryFormat::Contiguous, MemoryFormat::ChannelsLast] {
                for pass in [Pass::Forward, Pass::InputGradient, Pass::WeightGradient] {
                    let key = PlanKey::new(geometry, format, DType::F32, pass, settings);
                    keys.push(key);
                    let mut another = key;
                    match pass {
                        Pass::Forward => {
                            another.epilogue = Epilogue {
                                bias: true,
                                relu: true,
                            }
                        }
                        _ => another.adds = true,
                    }
                    keys.push(another);
                }
            }
        }
        Ok(keys)
    }

    /// Prints what deviates although cuDNN does not say so.
    #[test]
    fn engines_that_round_are_told_from_those_that_do_not() -> Result<()> {
        let Some(device) = &gpu()? else {
            return Ok(());
        };
        let (mut rounding, mut exact) = (0, 0);
        for key in keys(&Settings::default())? {
            with_cudnn(device, 0, OP, |cudnn| {
                let mut on_tensor_cores = 0;
                for engine in named(cudnn, &key)? {
                    // There are dozens, and some are enough.
                    on_tensor_cores += usize::from(engine.notes.tensor_cores);
                    if engine.notes.tensor_cores && on_tensor_cores > 2 {
                        continue;
                    }
                    // cuDNN may refuse one in spite of having named it.
                    let Ok(plan) = engine.plan() else { continue };
                    let found = deviation(cudnn, &key, |cudnn, operands| {
                        cudnn.with_workspace(plan.workspace, |cudnn, memory| {
                            // SAFETY: `deviation` has operands of the key, and the workspace is of the size asked for.
                            unsafe { plan.execute(cudnn.handle(), &operands.numbered(), memory) }
                                .map_err(|e| failed(OP, "cudnnBackendExecute", e.0, &key).into())
                        })
                    });
                    let Ok(found) = found else { continue };
                    let (index, notes) = (engine.index, engine.notes);
                    if notes.tensor_cores && (1e-4..1e-3).contains(&found) {
                        rounding += 1;
                    } else if !(notes.tensor_cores || notes.rounds_factors || notes.transforms) {
                        exact += u32::from(found < 1e-5);
                        if found >= 1e-5 {
                            println!("engine {index} deviates by {found:.1e}: {key}");
                        }
                    }
                }
                Ok(())
            })?;
        }
        println!("{rounding} round to TF32, as cuDNN says, and {exact} round nothing");
        assert!(rounding > 0 && exact > 0, "{rounding}, {exact}");
        Ok(())
    }

    #[test]
    fn where_f32_is_asked_for_in_full_no_engine_rounds() -> Result<()> {
        let Some(device) = &gpu()? else {
            return Ok(());
        };
        // The real cuDNN, which the emulated device may ask, has engines of its own.
        let is_emulated = crate::cuda::device_info(0)?.name.contains("emulated")
            && std::env::var_os("CUDA_EMULATION_CUDNN").is_none();
        for deterministic in [false, true] {
            for key in keys(&Settings {
                convolution: F32Math::Full,
                deterministic,
                ..Settings::default()
            })? {
                with_cudnn(device, 0, OP, |cudnn| {
                    let mut ran = true;
                    let mut run = |cudnn: &mut Cudnn, operands| {
                        let plan = Plan::of(cudnn, device.id(), key, operands)?;
                        ran = plan.run_if_offered(cudnn, operands)?;
                        Ok(())
                    };
                    // At first engines are timed, which adds to what is there over and over.
                    deviation(cudnn, &key, &mut run)?;
                    let found = deviation(cudnn, &key, run)?;
                    // There four settings of an engine that rounds come first, and an exact one after them.
                    if is_emulated && key.pass == Pass::Forward {
                        let plan = Plan::known(device.id(), key).unwrap();
                        assert_eq!(plan.engine(), Some(5), "{key}");
                    }
                    assert!(ran || !key.epilogue.is_nothing(), "{key}");
                    assert!(!ran || found < 1e-5, "{found:.1e}: {key}");
                    Ok(())
                })?;
            }
        }
        Ok(())
    }

    #[test]
    fn what_is_not_computed_deviates() -> Result<()> {
        let Some(device) = &gpu()? else {
            return Ok(());
        };
        for key in keys(&Settings::default())? {
            let found = with_cudnn(device, 0, OP, |cudnn| deviation(cudnn, &key, |_, _| Ok(())))?;
            assert!(found > 0.01, "{found:.1e}: {key}");
        }
        Ok(())
    }
}
