//! Device, threads and precision.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use candle_cnn::Isa;
use candle_cnn::cuda::{F32Math, Settings, set_settings};
use candle_core::{DType, Device};
use clap::ValueEnum;
use serde::de::{Error as _, Unexpected};
use serde::{Deserialize, Deserializer, Serialize};
use trainer::Execution;

use crate::arguments::{
    ComputeArguments, DeviceArguments, MOST_PICTURES_A_BATCH, ParallelArguments,
};
use crate::parallel::Role;
use crate::progress::say;

/// The value of `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// A GPU where there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| "it must be auto, cpu, cuda or cuda:N".to_string()),
        }
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let named = |error| format!("the device {text:?}: {error}");
        text.parse().map_err(named)
    }
}

impl From<DeviceChoice> for String {
    fn from(device: DeviceChoice) -> Self {
        device.to_string()
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// The types a device computes in. Weights, batch-norm statistics, the loss and the optimiser are
/// f32 in all of them, and so are checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// f32, neither convolutions nor matrix products rounded to TF32
    #[default]
    F32,
    /// PyTorch's default: factors of convolutions rounded to TF32, matrix products not.
    #[value(skip)]
    Tf32Convolutions,
    /// f32 whose factors are rounded to TF32 in convolutions and matrix products
    Tf32,
    /// Activations and their gradients are bf16, and weights are rounded to it where they are used; the head is f32
    Bf16,
}

impl Precision {
    /// How CUDA computes in f32: convolutions, and matrix products.
    fn f32_math(self) -> (F32Math, F32Math) {
        match self {
            Self::F32 => (F32Math::Full, F32Math::Full),
            Self::Tf32Convolutions | Self::Bf16 => (F32Math::Tf32, F32Math::Full),
            Self::Tf32 => (F32Math::Tf32, F32Math::Tf32),
        }
    }

    /// Refuses what a GPU has no arithmetic for. TF32 is no such case: an older one computes in f32.
    #[cfg(feature = "cuda")]
    fn check(self, gpu: &candle_cnn::cuda::DeviceInfo) -> Result<()> {
        if self == Self::Bf16 && !gpu.has_bf16() {
            let (name, (major, minor)) = (&gpu.name, gpu.compute_capability);
            bail!(
                "--precision bf16 needs a GPU of compute capability 8.0 or more, and {name} has {major}.{minor}: leave \
                 --precision out, or name another GPU with --device"
            );
        }
        Ok(())
    }

    /// The type of activations.
    pub fn activations(self) -> DType {
        match self {
            Self::Bf16 => DType::BF16,
            _ => DType::F32,
        }
    }
}

/// Device, threads and precision of a run, resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComputeConfig {
    /// The CPU or a GPU; `auto` where a launcher leaves the choice to those it launches.
    pub device: DeviceChoice,
    /// Threads that compute, in each process.
    #[serde(deserialize_with = "up_to::<MOST_THREADS, _>")]
    pub threads: usize,
    /// The types to compute in; absent in runs from before there was a choice.
    #[serde(default)]
    pub precision: Precision,
    /// Whether the GPU may use only algorithms that repeat their bits.
    #[serde(default)]
    pub deterministic: bool,
    /// Whether the GPU's training step is replayed as a CUDA graph.
    #[serde(default)]
    pub cuda_graph: bool,
    /// Whether the GPU runs networks as a whole, channels last; in runs from before there was a choice it does not.
    #[serde(default)]
    pub channels_last: bool,
    /// Streams that the GPU computes on.
    #[serde(
        default = "one",
        skip_serializing_if = "is_one",
        deserialize_with = "up_to::<MOST_STREAMS, _>"
    )]
    pub streams: usize,
    /// Processes that train together. `device` is that of the first; the others on its machine take
    /// the GPUs that follow.
    #[serde(
        default = "one",
        skip_serializing_if = "is_one",
        deserialize_with = "up_to::<MOST_PROCESSES, _>"
    )]
    pub processes: usize,
}

/// More than any machine has; many more start slowly, or not at all.
pub(crate) const MOST_THREADS: usize = 1024;
/// Streams that a GPU may compute on.
pub(crate) const MOST_STREAMS: usize = 32;
/// As many as a batch can have pictures.
const MOST_PROCESSES: usize = MOST_PICTURES_A_BATCH;

/// Reads a number that is at least 1 and at most `MOST`: a run's file may have been written by anybody.
fn up_to<'de, const MOST: usize, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    let number = usize::deserialize(deserializer)?;
    match (1..=MOST).contains(&number) {
        true => Ok(number),
        false => {
            let expected = format!("a whole number from 1 to {MOST}");
            let found = Unexpected::Unsigned(number as u64);
            Err(D::Error::invalid_value(found, &expected.as_str()))
        }
    }
}

fn one() -> usize {
    1
}

fn is_one(processes: &usize) -> bool {
    *processes == 1
}

impl ComputeConfig {
    /// Whether the device is a GPU.
    pub fn is_gpu(&self) -> bool {
        matches!(self.device, DeviceChoice::Cuda(_))
    }
}

impl DeviceArguments {
    /// Decides device, threads and precision, and says which GPU was taken, or why none was.
    ///
    /// # Errors
    /// A GPU that was asked for and cannot be used, a precision that the device does not have.
    pub fn resolve(&self) -> Result<ComputeConfig> {
        let arguments = ComputeArguments {
            machine: self.clone(),
            ..ComputeArguments::default()
        };
        arguments.resolve_as(&Role::Alone, self.device.unwrap_or_default())
    }
}

impl ComputeArguments {
    /// As [`DeviceArguments::resolve`], for a process that may train together with others. One that only launches them asks
    /// for no device.
    ///
    /// # Errors
    /// As [`DeviceArguments::resolve`]; another number of processes than the environment says, and an environment
    /// that makes no sense.
    pub(crate) fn resolve_for(&self, parallel: &ParallelArguments) -> Result<ComputeConfig> {
        let choice = match parallel.gpus {
            Some(_) => DeviceChoice::Cuda(0),
            None => self.machine.device.unwrap_or_default(),
        };
        self.resolve_as(&Role::asked_for(parallel)?, choice)
    }

    fn resolve_as(&self, role: &Role, choice: DeviceChoice) -> Result<ComputeConfig> {
        let device = match (role, choice) {
            (Role::Launcher { .. }, choice) => choice,
            (_, DeviceChoice::Auto) => automatic_device(role.local_rank()),
            (_, DeviceChoice::Cuda(first)) => {
                let description = cuda_device(first + role.local_rank())?;
                say(&format!("Device: {description}"));
                choice
            }
            (_, DeviceChoice::Cpu) => choice,
        };
        let precision = match (self.machine.precision, device) {
            (Some(precision), DeviceChoice::Cuda(_)) => precision,
            (None, DeviceChoice::Cuda(_)) => Precision::Tf32Convolutions,
            // The launcher's, which leaves the question to those it launches.
            (precision, DeviceChoice::Auto) => precision.unwrap_or_default(),
            (None | Some(Precision::F32), DeviceChoice::Cpu) => Precision::F32,
            (Some(_), DeviceChoice::Cpu) => bail!(
                "--precision tf32 and bf16 need a GPU, and this run is on the CPU, which computes in f32: \
                 leave --precision out, or name a GPU with --device cuda"
            ),
        };
        let threads = || {
            let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
            (cores / role.processes_on_this_machine()).max(1)
        };
        Ok(ComputeConfig {
            device,
            threads: self
                .machine
                .threads
                .map_or_else(threads, |threads| threads as usize),
            precision,
            deterministic: self.deterministic,
            cuda_graph: matches!(device, DeviceChoice::Cuda(_)) && !self.no_cuda_graph,
            channels_last: matches!(device, DeviceChoice::Cuda(_)) && !self.no_channels_last,
            streams: match device {
                DeviceChoice::Cuda(_) if !self.no_channels_last => self
                    .streams
                    .map_or(Settings::default().streams, |streams| streams as usize),
                _ => 1,
            },
            processes: role.processes(),
        })
    }
}

impl ComputeConfig {
    /// Starts the threads, opens the device and sets its precision. Call it once, before any tensor is made.
    ///
    /// # Errors
    /// Threads that cannot be started, a device that cannot be used, an instruction set that the
    /// environment asks for and the processor lacks.
    pub fn start(&self) -> Result<Device> {
        start_threads(Some(self.threads))?;
        set_settings(self.settings());
        let local_rank = match self.processes {
            1 => 0,
            _ => Role::from_environment()?.local_rank(),
        };
        match self.device {
            DeviceChoice::Auto | DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Cuda(first) => open_cuda(first + local_rank, self.precision),
        }
    }

    /// How CUDA is to compute.
    fn settings(&self) -> Settings {
        let (convolution, matmul) = self.precision.f32_math();
        Settings {
            convolution,
            matmul,
            deterministic: self.deterministic,
            channels_last: self.channels_last,
            streams: self.streams,
            ..Settings::default()
        }
    }

    /// How the trainer is to run its steps.
    pub fn execution(&self, device: &Device) -> Execution {
        Execution {
            activations: self.precision.activations(),
            cuda_graph: self.cuda_graph,
            ..Execution::on(device)
        }
    }
}

/// Makes the pool of threads that operations take theirs from; all cores unless told.
///
/// # Errors
/// Threads that cannot be started, `CANDLE_CNN_ISA` naming no instruction set of this processor.
pub fn start_threads(threads: Option<usize>) -> Result<()> {
    Isa::requested()?;
    let Some(threads) = threads else {
        return Ok(());
    };
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .with_context(|| format!("cannot start {threads} threads"))
}

/// GPUs if the one of this number on its machine can be used. A program that was not built for CUDA has
/// nothing to say about it.
fn automatic_device(local_rank: usize) -> DeviceChoice {
    if !cfg!(feature = "cuda") {
        return DeviceChoice::Cpu;
    }
    match cuda_device(local_rank) {
        Ok(description) => {
            say(&format!("Device: {description}"));
            DeviceChoice::Cuda(0)
        }
        Err(error) => {
            say(&format!("Device: the CPU; no GPU can be used: {error:#}"));
            DeviceChoice::Cpu
        }
    }
}

/// A GPU that has been opened and computes, and what it is.
#[cfg(feature = "cuda")]
fn opened_cuda(number: usize) -> Result<(Device, candle_cnn::cuda::DeviceInfo)> {
    use std::collections::BTreeMap;
    use std::sync::{Mutex, PoisonError};

    use candle_cnn::cuda::{self, DeviceInfo};

    /// To open one takes a good part of a second, and what it keeps does not go away with it.
    static OPENED: Mutex<BTreeMap<usize, (Device, DeviceInfo)>> = Mutex::new(BTreeMap::new());
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = opened.get(&number) {
        return Ok(found.clone());
    }
    let cannot = || format!("cannot use --device cuda:{number}");
    let device = cuda::open_device(number).with_context(cannot)?;
    // Asked of a device that is open, it makes no context of its own.
    let info = cuda::device_info(number).with_context(cannot)?;
    let (major, minor) = info.compute_capability;
    if let Err(error) = cuda::try_out(&device) {
        let advice = match refuses_kernels(&error) {
            true => format!(
                ": it does not run this program's kernels; build it with CUDA_COMPUTE_CAP={major}{minor}, by a CUDA that its \
                 driver knows"
            ),
            false => String::new(),
        };
        let cannot = format!("{}, {}{advice}", cannot(), info.name);
        return Err(anyhow::Error::new(error).context(cannot));
    }
    Ok(opened.entry(number).or_insert((device, info)).clone())
}

/// Whether a driver says that a program was built for other GPUs, or by a newer CUDA.
#[cfg(feature = "cuda")]
fn refuses_kernels(error: &candle_core::Error) -> bool {
    let text = format!("{error:?}");
    let statuses = [
        "NO_BINARY_FOR_GPU",
        "UNSUPPORTED_PTX_VERSION",
        "INVALID_PTX",
        "INVALID_IMAGE",
    ];
    statuses.iter().any(|status| text.contains(status))
}

/// Describes a GPU that can be used.
#[cfg(feature = "cuda")]
fn cuda_device(number: usize) -> Result<String> {
    let (_, info) = opened_cuda(number)?;
    let (major, minor) = info.compute_capability;
    let versions = candle_cnn::cuda::versions()?;
    let ((nvrtc, nvrtc_minor), (driver, driver_minor)) = (versions.nvrtc, versions.driver);
    let (cudnn, cudnn_minor, cudnn_patch) = versions.cudnn;
    Ok(format!(
        "cuda:{number}, {} with {:.1} GiB, compute capability {major}.{minor}; CUDA {nvrtc}.{nvrtc_minor}, driver for \
         {driver}.{driver_minor}, cuDNN {cudnn}.{cudnn_minor}.{cudnn_patch}",
        info.name,
        info.memory as f64 / (1u64 << 30) as f64
    ))
}

#[cfg(feature = "cuda")]
fn open_cuda(number: usize, precision: Precision) -> Result<Device> {
    let (device, info) = opened_cuda(number)?;
    precision.check(&info)?;
    Ok(device)
}

#[cfg(not(feature = "cuda"))]
fn cuda_device(number: usize) -> Result<String> {
    bail!(
        "--device cuda:{number} needs a program built for CUDA: add --features cuda to cargo run \
         (before the --)"
    )
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(number: usize, _: Precision) -> Result<Device> {
    cuda_device(number).map(|_| Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for text in ["auto", "cpu", "cuda:0", "cuda:3"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1"] {
            assert!(text.parse::<DeviceChoice>().is_err(), "{text}");
        }
    }

    fn arguments(device: DeviceChoice) -> DeviceArguments {
        DeviceArguments {
            device: Some(device),
            ..DeviceArguments::default()
        }
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn cuda_without_cuda_says_how_to_build() {
        let error = arguments(DeviceChoice::Cuda(0)).resolve().unwrap_err();
        assert!(error.to_string().contains("--features cuda"), "{error}");
    }

    #[test]
    fn checkpoints_are_further_apart_on_a_gpu_unless_told() {
        use crate::arguments::{RunArguments, TrainingArguments, TrainingDefaults};
        let defaults = TrainingDefaults {
            epochs: 1,
            batch_size: 4,
            optimizer: trainer::SgdConfig::default(),
            schedule: trainer::Schedule::Constant,
            evaluate_every_epochs: 1,
            checkpoint_every_steps: 200,
        };
        let cpu = arguments(DeviceChoice::Cpu).resolve().unwrap();
        let gpu = ComputeConfig {
            device: DeviceChoice::Cuda(1),
            ..cpu.clone()
        };
        for (given, expected) in [(None, [200, 2000]), (Some(3), [3, 3])] {
            let run = RunArguments {
                checkpoint_every: given,
                ..RunArguments::default()
            };
            let found = [&cpu, &gpu].map(|compute| {
                let training = TrainingArguments::default();
                let config = training.resolve(&run, &defaults, compute).unwrap();
                config.checkpoint_every_steps
            });
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn the_cpu_computes_in_f32_and_says_so() {
        let on_cpu = |precision| {
            DeviceArguments {
                precision,
                ..arguments(DeviceChoice::Cpu)
            }
            .resolve()
        };
        for precision in [None, Some(Precision::F32)] {
            let config = on_cpu(precision).unwrap();
            assert_eq!(config.precision, Precision::F32);
            assert!(!config.cuda_graph);
        }
        for precision in [Precision::Tf32, Precision::Bf16] {
            let error = on_cpu(Some(precision)).unwrap_err().to_string();
            assert!(error.contains("--device cuda"), "{error}");
        }
    }

    #[test]
    fn precisions_mean_what_pytorch_means_by_them() {
        let on_cpu = arguments(DeviceChoice::Cpu).resolve().unwrap();
        let math = |precision| {
            let config = ComputeConfig {
                precision,
                ..on_cpu.clone()
            };
            let settings = config.settings();
            (settings.convolution, settings.matmul)
        };
        assert_eq!(math(Precision::F32), (F32Math::Full, F32Math::Full));
        let pytorch = (F32Math::Tf32, F32Math::Full);
        assert_eq!(math(Precision::Tf32Convolutions), pytorch);
        assert_eq!(math(Precision::Tf32), (F32Math::Tf32, F32Math::Tf32));
        assert_eq!(Precision::Bf16.activations(), DType::BF16);
        let deterministic = ComputeConfig {
            deterministic: true,
            ..on_cpu.clone()
        };
        assert!(deterministic.settings().deterministic && !on_cpu.settings().deterministic);
    }

    #[test]
    #[cfg(feature = "cuda")]
    fn a_gpu_that_refuses_kernels_is_told_from_one_that_lacks_memory() {
        let said = |status: &str| candle_core::Error::Cuda(status.into());
        assert!(refuses_kernels(&said(
            "DriverError(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, \"…\")"
        )));
        assert!(!refuses_kernels(&said(
            "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"…\")"
        )));
    }

    #[test]
    #[cfg(feature = "cuda")]
    fn bf16_is_refused_where_the_gpu_has_none() {
        let check = |precision: Precision, compute_capability| {
            let gpu = candle_cnn::cuda::DeviceInfo {
                ordinal: 0,
                name: "a GPU".into(),
                memory: 1 << 30,
                compute_capability,
            };
            precision.check(&gpu).map_err(|error| error.to_string())
        };
        let error = check(Precision::Bf16, (7, 5)).unwrap_err();
        assert!(
            error.contains("bf16") && error.contains("has 7.5"),
            "{error}"
        );
        assert_eq!(check(Precision::Bf16, (8, 0)), Ok(()));
        assert_eq!(check(Precision::Tf32, (7, 5)), Ok(()));
    }

    #[test]
    fn a_run_from_before_there_was_a_choice_can_still_be_read() {
        let config: ComputeConfig =
            serde_json::from_str(r#"{"device": "cpu", "threads": 2}"#).unwrap();
        assert_eq!(config.precision, Precision::F32);
        assert!(!config.deterministic && !config.cuda_graph && !config.channels_last);
        assert_eq!(config.streams, 1);
    }

    #[test]
    fn a_device_of_a_run_that_the_flag_refuses_is_named() {
        let read = |device: &str| {
            let text = format!(r#"{{"device": "{device}", "threads": 2}}"#);
            serde_json::from_str::<ComputeConfig>(&text)
        };
        let config = read("cuda:3").unwrap();
        assert_eq!(config.device, DeviceChoice::Cuda(3));
        let written = serde_json::to_value(&config).unwrap();
        assert_eq!(written["device"], "cuda:3");
        let error = read("gpu").unwrap_err().to_string();
        assert!(
            error.contains(r#"the device "gpu": it must be auto"#),
            "{error}"
        );
    }

    #[test]
    fn numbers_of_a_run_that_no_flag_takes_are_refused() {
        let read = |settings: &str| {
            let text = format!(r#"{{"device": "cpu", {settings}}}"#);
            serde_json::from_str::<ComputeConfig>(&text).map_err(|error| error.to_string())
        };
        assert!(read(r#""threads": 1024, "streams": 32, "processes": 8"#).is_ok());
        for settings in [
            r#""threads": 0"#,
            r#""threads": 100000000000"#,
            r#""threads": 1, "streams": 33"#,
            r#""threads": 1, "processes": 0"#,
            r#""threads": 1, "processes": 65537"#,
        ] {
            let error = read(settings).unwrap_err();
            assert!(
                error.contains("expected a whole number from 1 to"),
                "{error}"
            );
        }
    }
}
