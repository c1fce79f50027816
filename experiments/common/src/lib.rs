//! What the experiments share: arguments, data, device, logging, progress, signals.
//!
//! An experiment works in three stages: its raw arguments (every one optional, so that what was
//! given can be told from what was not) are resolved into a configuration that can be printed and
//! saved, and the configuration is run.

mod advice;
mod arguments;
mod command_line;
mod compute;
mod data;
mod experiment;
mod init_file;
mod launch;
mod logging;
mod memory;
mod parallel;
mod profile;
mod progress;
mod session;
mod signals;

pub use arguments::{
    DataArguments, DeviceArguments, TrainingDefaults, at_least_one, below_one, common_defaults,
    describe_defaults, device_defaults, flags_without_default, threads,
};
pub use command_line::{
    CommandLine, CommonArguments, Presets, command, own_flags_not_in, parse, parse_from,
};
pub use compute::{ComputeConfig, DeviceChoice, Precision, start_threads};
pub use data::{DataConfig, Dataset};
pub use experiment::{Action, Experiment, RunConfig, conclude, run_experiment};
pub use init_file::InitFile;
pub use logging::start_logging;
pub use memory::keep_freed_pages;
pub use profile::Profile;
pub use progress::{DownloadProgress, bar_of_pictures, print, say};
