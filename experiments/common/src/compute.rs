//! Device and threads.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use candle_core::Device;
use serde::{Deserialize, Serialize};

use crate::arguments::ComputeArguments;

/// The value of `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
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

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// Device and threads of a run, resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComputeConfig {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Threads that compute.
    pub threads: usize,
}

impl ComputeArguments {
    /// Decides the device and the number of threads.
    ///
    /// # Errors
    /// A GPU that was asked for and cannot be used.
    pub fn resolve(&self) -> Result<ComputeConfig> {
        let choice = match self.device.unwrap_or_default() {
            DeviceChoice::Auto if cfg!(feature = "cuda") && open(DeviceChoice::Cuda(0)).is_ok() => {
                DeviceChoice::Cuda(0)
            }
            DeviceChoice::Auto => DeviceChoice::Cpu,
            choice => choice,
        };
        open(choice)?;
        let cores = || std::thread::available_parallelism().map_or(1, |cores| cores.get());
        Ok(ComputeConfig {
            device: choice.to_string(),
            threads: self.threads.map_or_else(cores, |threads| threads as usize),
        })
    }
}

impl ComputeConfig {
    /// Starts the threads and opens the device. Call it once, before any tensor is made.
    ///
    /// # Errors
    /// Threads that cannot be started, a device that cannot be used.
    pub fn start(&self) -> Result<Device> {
        rayon::ThreadPoolBuilder::new()
            .num_threads(self.threads)
            .build_global()
            .with_context(|| format!("cannot start {} threads", self.threads))?;
        let choice = self.device.parse().map_err(anyhow::Error::msg)?;
        open(choice)
    }
}

fn open(choice: DeviceChoice) -> Result<Device> {
    match choice {
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Cuda(number) => open_cuda(number),
    }
}

#[cfg(feature = "cuda")]
fn open_cuda(number: usize) -> Result<Device> {
    Device::new_cuda(number).with_context(|| format!("cannot use --device cuda:{number}"))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(number: usize) -> Result<Device> {
    anyhow::bail!(
        "--device cuda:{number} needs a program built for CUDA: add --features cuda to cargo run \
         (before the --)"
    )
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

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn cuda_without_cuda_says_how_to_build() {
        let arguments = ComputeArguments {
            device: Some(DeviceChoice::Cuda(0)),
            threads: None,
        };
        let error = arguments.resolve().unwrap_err().to_string();
        assert!(error.contains("--features cuda"), "{error}");
    }
}
