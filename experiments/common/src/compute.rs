//! Device and threads.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use candle_core::Device;
use serde::{Deserialize, Serialize};

use crate::arguments::{ComputeArguments, ParallelArguments};
use crate::parallel::Role;

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
    /// Threads that compute, in each process.
    pub threads: usize,
    /// Processes that train together. `device` is that of the first; the others on its machine take
    /// the GPUs that follow.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub processes: usize,
}

fn one() -> usize {
    1
}

fn is_one(processes: &usize) -> bool {
    *processes == 1
}

impl ComputeArguments {
    /// Decides the device and the number of threads.
    ///
    /// # Errors
    /// A GPU that was asked for and cannot be used.
    pub fn resolve(&self) -> Result<ComputeConfig> {
        self.resolve_as(Role::Alone, self.device.unwrap_or_default())
    }

    /// The same for a process that may train together with others. One that only launches them opens
    /// no device.
    ///
    /// # Errors
    /// As [`Self::resolve`]; another number of processes than the environment says, and an environment
    /// that makes no sense.
    pub fn resolve_for(&self, parallel: &ParallelArguments) -> Result<ComputeConfig> {
        let choice = match parallel.gpus {
            Some(_) => DeviceChoice::Cuda(0),
            None => self.device.unwrap_or_default(),
        };
        self.resolve_as(Role::asked_for(parallel)?, choice)
    }

    fn resolve_as(&self, role: Role, choice: DeviceChoice) -> Result<ComputeConfig> {
        let on_this_machine = role.processes_on_this_machine();
        let threads = || {
            let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
            (cores / on_this_machine).max(1)
        };
        let usable = |choice| open(nth(choice, role.local_rank()));
        let choice = match (choice, &role) {
            (choice, Role::Launcher { .. }) => choice,
            (DeviceChoice::Auto, _) => {
                let first = DeviceChoice::Cuda(0);
                let gpu = cfg!(feature = "cuda") && usable(first).is_ok();
                if gpu { first } else { DeviceChoice::Cpu }
            }
            (choice, _) => {
                usable(choice)?;
                choice
            }
        };
        Ok(ComputeConfig {
            device: choice.to_string(),
            threads: self
                .threads
                .map_or_else(threads, |threads| threads as usize),
            processes: role.processes(),
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
        let local_rank = match self.processes {
            1 => 0,
            _ => Role::from_environment()?.local_rank(),
        };
        open(nth(choice, local_rank))
    }
}

/// The device of a process, by its number on its machine.
fn nth(choice: DeviceChoice, local_rank: usize) -> DeviceChoice {
    match choice {
        DeviceChoice::Cuda(first) => DeviceChoice::Cuda(first + local_rank),
        choice => choice,
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
