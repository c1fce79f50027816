//! Trains the lesson's GoogLeNet on CIFAR-10 from scratch. The README tells what to expect.

mod arguments;
mod config;
mod network;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use candle_core::Device;
use experiment_common::{DataConfig, Experiment, InitFile, parse, run_experiment};

use crate::arguments::Arguments;
use crate::config::{Config, ModelConfig};
use crate::network::Network;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    run_experiment::<ScratchTrain>(parse::<Arguments>)
}

struct ScratchTrain;

impl Experiment for ScratchTrain {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    type Request = ModelConfig;
    type ModelConfig = ModelConfig;
    type Network = Network;

    fn resolve(mut model: ModelConfig, _: &DataConfig, _out: &Path) -> Result<ModelConfig> {
        let file = model.init_file.map(|file| file.resolve("--init"));
        model.init_file = file.transpose()?;
        Ok(model)
    }

    fn network(config: &Config, device: &Device) -> Result<Network> {
        Network::new(config, device)
    }

    fn load_initial_weights(network: &Network, config: &Config) -> Result<()> {
        let file: Option<&InitFile> = config.model.init_file.as_ref();
        file.map_or(Ok(()), |file| file.load_into(network))
    }

    fn summary(model: &ModelConfig) -> Result<String> {
        Network::summary(model.dropout)
    }
}
