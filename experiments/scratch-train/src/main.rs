//! Trains the lesson's GoogLeNet on CIFAR-10 from scratch. The README tells what to expect.

mod arguments;
mod config;
mod network;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use experiment_common::{keep_freed_pages, print, print_finished, start_logging, train};
use trainer::{Environment, RunDirectory};

use crate::arguments::{Action, parse};
use crate::config::Config;
use crate::network::Network;

/// Every step allocates and frees some hundreds of megabytes; [`keep_freed_pages`] says why it
/// matters where they go.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Name of this experiment: of its package, of its folder under `runs/`, and in `config.json`.
const EXPERIMENT: &str = env!("CARGO_PKG_NAME");

fn main() -> ExitCode {
    keep_freed_pages();
    start_logging();
    run().unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode> {
    match parse()? {
        Action::Summary { dropout } => {
            print(&Network::summary(dropout)?);
            Ok(ExitCode::SUCCESS)
        }
        Action::Start { config, out } => start(config.resolve_init()?, &out),
        Action::Resume { dir, data_dir } => resume(&dir, data_dir),
    }
}

fn start(config: Config, out: &Path) -> Result<ExitCode> {
    let cannot_start = || format!("cannot start a run in --out {}", out.display());
    RunDirectory::prepare(out, EXPERIMENT).with_context(cannot_start)?;
    let device = config.compute.start()?;
    let data = config.data.load(config.training.seed)?;
    let network = Network::new(&config, &device)?;
    network.load_init(&config)?;
    let run = RunDirectory::create(out, EXPERIMENT, &config, &data, &environment(&config))
        .with_context(cannot_start)?;
    train(&network, data, &device, config.training, run)
}

/// Everything comes from the run's config.json, so that it ends as if it had never stopped.
fn resume(dir: &Path, data_dir: Option<PathBuf>) -> Result<ExitCode> {
    let run = RunDirectory::open(dir, EXPERIMENT).context("cannot resume")?;
    if let Some(summary) = run.finished()? {
        print(&format!("{} is finished already", dir.display()));
        print_finished(&dir.display().to_string(), &summary);
        return Ok(ExitCode::SUCCESS);
    }
    let mut config: Config = run.config()?;
    if data_dir.is_some() {
        ensure!(
            config.data.data_dir.is_some(),
            "--data-dir cannot be combined with --resume of a run on drawn shapes: it reads no folder"
        );
        config.data.data_dir = data_dir;
    }
    let device = config.compute.start()?;
    let data = config.data.load(config.training.seed)?;
    let network = Network::new(&config, &device)?;
    if !run.has_checkpoint() {
        network.load_init(&config)?;
    }
    run.record_resumption(&environment(&config))?;
    train(&network, data, &device, config.training, run)
}

fn environment(config: &Config) -> Environment {
    Environment::capture(
        (EXPERIMENT, env!("CARGO_PKG_VERSION")),
        &config.compute.device,
        config.compute.threads,
        config.training.seed,
    )
}
