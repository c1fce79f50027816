//! What every experiment is: settings, a network, and a run that is started or resumed.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use trainer::{
    DataSets, Environment, Finished, Model, Program, RunDirectory, Summary, TrainingConfig,
};

use crate::advice::advised;
use crate::compute::ComputeConfig;
use crate::data::DataConfig;
use crate::launch::{launch, watch_launcher};
use crate::logging::start_logging;
use crate::memory::keep_freed_pages;
use crate::parallel::{Role, rank, speak_as_rank};
use crate::profile::Profile;
use crate::progress::{lost_result, print, print_always, say};
use crate::session::{Session, print_finished};

/// Everything that decides what a run computes: the contents of `config.json`. `M` holds the
/// network's own settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunConfig<M> {
    /// The network and its weights.
    pub model: M,
    /// The pictures.
    pub data: DataConfig,
    /// The steps.
    pub training: TrainingConfig,
    /// The machine.
    pub compute: ComputeConfig,
}

/// What a command line asks for; `R` is what it says of the network.
#[derive(Debug)]
pub enum Action<R> {
    /// A new run in `out`.
    Start {
        /// Its settings.
        config: Box<RunConfig<R>>,
        /// Folder for runs.
        out: PathBuf,
        /// Whether to measure where the time goes.
        profile: bool,
    },
    /// The rest of a run.
    Resume {
        /// Its folder.
        dir: PathBuf,
        /// Where the data are now, if they have moved.
        data_dir: Option<PathBuf>,
        /// Whether to measure where the time goes.
        profile: bool,
    },
    /// The table of layers.
    Summary(R),
}

/// One experiment: a program that trains one kind of network.
pub trait Experiment {
    /// Name of its package, of its folder under `runs/`, and in `config.json`.
    const NAME: &'static str;
    /// Version of its package.
    const VERSION: &'static str;
    /// What the command line says of the network.
    type Request;
    /// The network's own settings, resolved.
    type ModelConfig: Serialize + DeserializeOwned;
    /// What is trained.
    type Network: Model;

    /// Looks up what the command line names, such as files of weights, before anything else
    /// happens. `data` are the pictures that it is to learn, `out` is the folder of all runs.
    ///
    /// # Errors
    /// What cannot be found.
    fn resolve(request: Self::Request, data: &DataConfig, out: &Path) -> Result<Self::ModelConfig>;

    /// The network with the random weights of the run's seed.
    ///
    /// # Errors
    /// Settings that the network cannot have.
    fn network(config: &RunConfig<Self::ModelConfig>, device: &Device) -> Result<Self::Network>;

    /// Replaces the random weights by those that the run is to begin with, where there are any.
    ///
    /// # Errors
    /// Weights that cannot be read or do not fit.
    fn load_initial_weights(
        network: &Self::Network,
        config: &RunConfig<Self::ModelConfig>,
    ) -> Result<()>;

    /// Refuses data that the network cannot be trained on.
    ///
    /// # Errors
    /// The reason.
    fn check_data(_config: &RunConfig<Self::ModelConfig>, _data: &DataSets) -> Result<()> {
        Ok(())
    }

    /// The table of layers.
    ///
    /// # Errors
    /// Settings that the network cannot have.
    fn summary(request: &Self::Request) -> Result<String>;
}

/// The `main` of an experiment whose command line `parse` reads. The program must have mimalloc as
/// its `#[global_allocator]`: every step allocates and frees some hundreds of megabytes, and
/// [`keep_freed_pages`] says why it matters where they go.
pub fn run_experiment<E: Experiment>(
    parse: impl FnOnce() -> Result<Action<E::Request>>,
) -> ExitCode {
    keep_freed_pages();
    speak_as_rank();
    watch_launcher();
    let act = |action: Action<E::Request>| {
        let profile = action.is_profiled().then(Profile::default);
        start_logging(profile.as_ref());
        act::<E>(action, profile.as_ref())
    };
    conclude(parse().and_then(act))
}

/// The exit code of a program that ended so. Its error, or that results could not be printed, is its last word.
pub fn conclude(outcome: Result<ExitCode>) -> ExitCode {
    match (outcome, lost_result()) {
        (Err(error), _) => fail(&error),
        (Ok(_), Some(error)) => fail(&anyhow::anyhow!("cannot write to standard output: {error}")),
        (Ok(code), None) => code,
    }
}

/// Prints an error as the last word of a program.
fn fail(error: &anyhow::Error) -> ExitCode {
    match rank() {
        Some(0) => say(&format!("[rank 0] error: {error:#}")),
        _ => say(&format!("error: {error:#}")),
    }
    ExitCode::FAILURE
}

impl<R> Action<R> {
    fn is_profiled(&self) -> bool {
        match self {
            Self::Start { profile, .. } | Self::Resume { profile, .. } => *profile,
            Self::Summary(_) => false,
        }
    }
}

fn act<E: Experiment>(action: Action<E::Request>, profile: Option<&Profile>) -> Result<ExitCode> {
    match action {
        Action::Summary(request) => {
            // Every process that is asked for it shows it, whatever its rank.
            print_always(&E::summary(&request)?);
            Ok(ExitCode::SUCCESS)
        }
        Action::Start { config, out, .. } => start::<E>(*config, &out, profile),
        Action::Resume { dir, data_dir, .. } => resume::<E>(&dir, data_dir, profile),
    }
}

fn start<E: Experiment>(
    config: RunConfig<E::Request>,
    out: &Path,
    profile: Option<&Profile>,
) -> Result<ExitCode> {
    let role = Role::of(&config.compute)?;
    // Before the processes wait for each other.
    let (processes, batch_size) = (role.processes(), config.training.batch_size);
    ensure!(
        processes <= batch_size,
        "cannot share out a batch of {batch_size} pictures among {processes} processes: start at most \
         {batch_size}, or give a larger --batch-size"
    );
    if let Role::Launcher { processes } = role {
        return launch(processes);
    }
    // Only the record has the folder as it is found from anywhere.
    let located = role.is_first().then(|| config.data.clone().located());
    let located = located.transpose()?;
    let config = RunConfig {
        model: E::resolve(config.model, &config.data, out)?,
        data: config.data,
        training: config.training,
        compute: config.compute,
    };
    let cannot_start = || format!("cannot start a run in --out {}", out.display());
    if role.is_first() {
        RunDirectory::prepare(out, E::NAME).with_context(cannot_start)?;
    }
    let session = Session::open((E::NAME, E::VERSION), &config, &role, profile)?;
    session.work(|| {
        let data = config.data.load(config.training.seed)?;
        E::check_data(&config, &data)?;
        let network = E::network(&config, &session.device)?;
        let mut run = None;
        if let Some(located) = located {
            E::load_initial_weights(&network, &config)?;
            let environment = environment::<E>(&config);
            let recorded = RunConfig {
                model: &config.model,
                data: located,
                training: config.training.clone(),
                compute: config.compute.clone(),
            };
            let created = RunDirectory::create(out, E::NAME, &recorded, &data, &environment);
            run = Some(created.with_context(cannot_start)?);
        }
        session.train(&network, data, config.training.clone(), run)
    })
}

/// Everything comes from the run's config.json, so that it ends as if it had never stopped. All
/// processes that train together read it; only the first works in the run's folder.
fn resume<E: Experiment>(
    dir: &Path,
    data_dir: Option<PathBuf>,
    profile: Option<&Profile>,
) -> Result<ExitCode> {
    let config: RunConfig<E::ModelConfig> = RunDirectory::config_of(dir, E::NAME)
        .map_err(advised)
        .context("cannot resume")?;
    let config = moved(config, data_dir)?;
    let role = Role::of(&config.compute)?;
    let mut run = None;
    if role.is_first() {
        let opened = RunDirectory::open(dir, E::NAME).map_err(advised);
        run = Some(opened.context("cannot resume")?);
    }
    let finished = run.as_ref().map(RunDirectory::finished).transpose();
    let finished = finished.map_err(advised).context("cannot resume")?;
    let summary = match (finished, &role) {
        // The other processes wait for this one, and have to hear it.
        (Some(Finished::Yes(summary)), Role::Rank(_)) => Some(summary),
        (Some(Finished::Yes(summary)), _) => return Ok(finished_already(dir, &summary)),
        // The first of the processes tells it.
        (Some(Finished::Lost(_)), Role::Launcher { .. }) => None,
        (Some(Finished::Lost(problem)), _) => {
            say(&format!(
                "{problem}: it is written again from the last checkpoint"
            ));
            None
        }
        (Some(Finished::No) | None, _) => None,
    };
    if let Role::Launcher { processes } = role {
        // The first of the processes works in it.
        drop(run);
        return launch(processes);
    }
    let session = Session::open((E::NAME, E::VERSION), &config, &role, profile)?;
    session.work(|| {
        let is_over = session.any(summary.is_some())?;
        if let Some(summary) = &summary {
            return Ok(finished_already(dir, summary));
        }
        if is_over {
            return Ok(ExitCode::SUCCESS);
        }
        let data = config.data.load(config.training.seed)?;
        let network = E::network(&config, &session.device)?;
        let begins =
            |run: &RunDirectory| run.has_checkpoint().map(|has_checkpoint| !has_checkpoint);
        if run.as_ref().map(begins).transpose()? == Some(true) {
            say("no checkpoint had been saved: the run begins again");
            E::load_initial_weights(&network, &config)?;
        }
        let run = run.map(|run| run.resumed_in(environment::<E>(&config)));
        session.train(&network, data, config.training.clone(), run)
    })
}

fn finished_already(dir: &Path, summary: &Summary) -> ExitCode {
    print(&format!("{} is finished already", dir.display()));
    print_finished(&dir.display().to_string(), summary);
    ExitCode::SUCCESS
}

/// With the data where they are now.
fn moved<M>(mut config: RunConfig<M>, data_dir: Option<PathBuf>) -> Result<RunConfig<M>> {
    if data_dir.is_some() {
        ensure!(
            config.data.data_dir.is_some(),
            "--data-dir cannot be combined with --resume of a run on drawn shapes: it reads no folder"
        );
        config.data.data_dir = data_dir;
    }
    Ok(config)
}

fn environment<E: Experiment>(config: &RunConfig<E::ModelConfig>) -> Environment {
    // All experiments are in one repository.
    let program = Program {
        name: E::NAME,
        version: E::VERSION,
        sources: env!("CARGO_MANIFEST_DIR"),
    };
    Environment::capture(
        program,
        &config.compute.device.to_string(),
        config.compute.threads,
        config.training.seed,
    )
}
