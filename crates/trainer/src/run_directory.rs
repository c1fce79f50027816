//! The folder that holds everything about one run.
//!
//! ```text
//! runs/<experiment>/2026-03-01T12-30-05Z/
//!   config.json         what was run: settings and data, fully resolved, written before the first step
//!   environment.json    where: versions, commit, processor, threads (one more for each resumption)
//!   metrics.jsonl       every step and evaluation; the same bytes for the same seed
//!   metrics.csv         one line an epoch, times included
//!   checkpoints/        step-0000123/, the newest few
//!   model.safetensors   the final weights            } written when the run
//!   finished.json       final accuracy, their hash   } is complete
//!   run.lock            empty; locked while a process works on the run
//! ```

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::checkpoint;
use crate::data::{DataFingerprints, DataSets};
use crate::durable::{io_error, read, sha256_hex, sync_parent, write_atomically};
use crate::environment::Environment;
use crate::error::{Error, Result};
use crate::metrics::last_epoch;
use crate::training::Summary;

/// Version of the layout above; raised when a run of an older version cannot be resumed.
const FORMAT_VERSION: u32 = 1;

/// A run directory that this process, and no other, works on.
#[derive(Debug)]
pub struct RunDirectory {
    dir: PathBuf,
    experiment: String,
    data: DataFingerprints,
    /// To be recorded.
    resumed_in: Option<Environment>,
    /// Locked until dropped; a killed process loses its lock.
    _lock: File,
}

#[derive(Serialize, Deserialize)]
struct ConfigFile {
    format_version: u32,
    experiment: String,
    /// RFC 3339.
    started: String,
    data: DataFingerprints,
    config: serde_json::Value,
}

impl ConfigFile {
    fn read(dir: &Path, experiment: &str) -> Result<Self> {
        let not_a_run = |reason: String| Error::NotARun {
            dir: dir.to_path_buf(),
            reason,
        };
        if !dir.is_dir() {
            return Err(not_a_run("there is no such folder".into()));
        }
        let path = dir.join("config.json");
        if !path.is_file() {
            return Err(not_a_run("it has no config.json".into()));
        }
        let file: Self = serde_json::from_slice(&read(&path)?)
            .map_err(|error| not_a_run(format!("its config.json cannot be read ({error})")))?;
        if file.experiment != experiment {
            return Err(Error::OtherExperiment {
                dir: dir.to_path_buf(),
                found: file.experiment,
                expected: experiment.into(),
            });
        }
        if file.format_version != FORMAT_VERSION {
            return Err(not_a_run(format!(
                "its format is version {}, this program knows version {FORMAT_VERSION}",
                file.format_version
            )));
        }
        Ok(file)
    }
}

impl RunDirectory {
    /// Finds out whether files can be written in `<out>/<experiment>/`, or where it would be made: to
    /// be asked before work that takes time, such as a download. It leaves nothing behind.
    ///
    /// # Errors
    /// [`Error::Io`] when they cannot.
    pub fn prepare(out: &Path, experiment: &str) -> Result<()> {
        let parent = std::path::absolute(out.join(experiment)).map_err(io_error("find", out))?;
        let existing = parent.ancestors().find(|path| path.exists());
        let existing = existing.unwrap_or(&parent);
        let probe = existing.join(format!(".probe-{}", std::process::id()));
        fs::write(&probe, "").map_err(io_error("write", &probe))?;
        fs::remove_file(&probe).map_err(io_error("remove", &probe))
    }

    /// Makes `<out>/<experiment>/<time>/` and writes `config.json` and `environment.json`, or leaves no folder of the run.
    ///
    /// # Errors
    /// [`Error::Io`] when a folder or file cannot be made, [`Error::Encode`] for a configuration that JSON cannot hold.
    pub fn create(
        out: &Path,
        experiment: &str,
        config: &impl Serialize,
        data: &DataSets,
        environment: &Environment,
    ) -> Result<Self> {
        let parent = out.join(experiment);
        fs::create_dir_all(&parent).map_err(io_error("create", &parent))?;
        let started = Timestamp::now();
        let file = ConfigFile {
            format_version: FORMAT_VERSION,
            experiment: experiment.into(),
            started: started.to_string(),
            data: data.fingerprints(),
            config: to_value(config)?,
        };
        let dir = create_unused(&parent, &folder_name(started))?;
        let filled = lock(&dir).and_then(|lock| {
            write_json(&dir.join("environment.json"), environment)?;
            write_json(&dir.join("config.json"), &file)?;
            sync_parent(&dir)?;
            Ok(lock)
        });
        if filled.is_err() {
            // A full disk; that it cannot be removed either is told by nobody.
            let _ = fs::remove_dir_all(&dir);
        }
        Ok(Self {
            _lock: filled?,
            dir,
            experiment: file.experiment,
            data: file.data,
            resumed_in: None,
        })
    }

    /// Opens a run of `experiment` to resume it.
    ///
    /// # Errors
    /// [`Error::NotARun`], [`Error::OtherExperiment`], [`Error::InUse`], [`Error::Io`].
    pub fn open(dir: &Path, experiment: &str) -> Result<Self> {
        let file = ConfigFile::read(dir, experiment)?;
        Ok(Self {
            dir: dir.to_path_buf(),
            experiment: file.experiment,
            data: file.data,
            resumed_in: None,
            _lock: lock(dir)?,
        })
    }

    /// The configuration of a run that another process works on, or may.
    ///
    /// # Errors
    /// [`Error::NotARun`], [`Error::OtherExperiment`], [`Error::Io`].
    pub fn config_of<C: DeserializeOwned>(dir: &Path, experiment: &str) -> Result<C> {
        let file = ConfigFile::read(dir, experiment)?;
        C::deserialize(file.config).map_err(|error| Error::NotARun {
            dir: dir.to_path_buf(),
            reason: format!("its config.json does not fit this experiment ({error})"),
        })
    }

    /// The run of `experiment` under `out` that began last among those that are finished and `is_wanted`, by their configuration. One that
    /// cannot be read as a `C` is not.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be listed; that there is none is no error.
    pub fn newest_finished<C: DeserializeOwned>(
        out: &Path,
        experiment: &str,
        is_wanted: impl Fn(&C) -> bool,
    ) -> Result<Option<PathBuf>> {
        #[derive(Deserialize)]
        struct Only<C> {
            config: C,
        }
        let is_wanted = |dir: &Path| {
            let file = fs::read(dir.join("config.json")).ok();
            let only = file.and_then(|file| serde_json::from_slice::<Only<C>>(&file).ok());
            only.is_some_and(|only| is_wanted(&only.config))
        };
        let parent = out.join(experiment);
        if !parent.is_dir() {
            return Ok(None);
        }
        let mut newest = None;
        for entry in fs::read_dir(&parent).map_err(io_error("list", &parent))? {
            let dir = entry.map_err(io_error("list", &parent))?.path();
            if dir.join("finished.json").is_file() && is_wanted(&dir) {
                newest = newest.max(Some((start_order(&dir), dir)));
            }
        }
        Ok(newest.map(|(_, dir)| dir))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The experiment's name.
    pub fn experiment(&self) -> &str {
        &self.experiment
    }

    /// Where the run is resumed: recorded in `environment-<time>.json` once it has found what it goes on from.
    pub fn resumed_in(self, environment: Environment) -> Self {
        Self {
            resumed_in: Some(environment),
            ..self
        }
    }

    pub(crate) fn record_resumption(&self) -> Result<()> {
        let Some(environment) = &self.resumed_in else {
            return Ok(());
        };
        let name = format!("environment-{}.json", folder_name(Timestamp::now()));
        write_json(&self.dir.join(name), environment)
    }

    /// Whether the run is finished, and whether its weights are there as it left them.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read, [`Error::ResultLost`] where what is lost cannot be written again.
    pub fn finished(&self) -> Result<Finished> {
        let problem = match summary_of(&self.dir) {
            Ok(None) => return Ok(Finished::No),
            Ok(Some(summary)) => {
                let path = self.dir.join(checkpoint::WEIGHTS);
                match fs::read(&path) {
                    Ok(bytes) if sha256_hex(&bytes) == summary.weights_sha256 => {
                        return Ok(Finished::Yes(summary));
                    }
                    Ok(_) => format!("{} is not what the run ended with", path.display()),
                    Err(error) if error.kind() == ErrorKind::NotFound => {
                        format!("{} is missing", path.display())
                    }
                    Err(error) => return Err(io_error("read", &path)(error)),
                }
            }
            Err(error @ Error::DamagedSummary { .. }) => error.with_sources(),
            Err(error) => return Err(error),
        };
        if !checkpoint::was_saved(&self.checkpoints())? {
            return Err(Error::ResultLost { problem });
        }
        Ok(Finished::Lost(problem))
    }

    /// Whether a checkpoint was ever saved, be it damaged; without one a run begins again.
    ///
    /// # Errors
    /// [`Error::Io`] for a folder that is there and cannot be read, and [`Error::CheckpointsLost`] where the metrics tell of a second
    /// epoch, which begins with a checkpoint of the first.
    pub fn has_checkpoint(&self) -> Result<bool> {
        if checkpoint::was_saved(&self.checkpoints())? {
            return Ok(true);
        }
        match last_epoch(&self.dir)? {
            Some(epoch) if epoch > 1 => Err(Error::CheckpointsLost {
                dir: self.checkpoints(),
                epoch,
            }),
            _ => Ok(false),
        }
    }

    pub(crate) fn write_finished(&self, summary: &Summary) -> Result<()> {
        write_json(&self.dir.join("finished.json"), summary)
    }

    pub(crate) fn checkpoints(&self) -> PathBuf {
        self.dir.join("checkpoints")
    }

    pub(crate) fn check_data(&self, data: &DataSets) -> Result<()> {
        self.data.check(&data.fingerprints())
    }
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Finished {
    /// It can go on.
    No,
    /// It ended with this.
    Yes(Summary),
    /// It was finished, and a file of its result is missing or damaged, in words. To go on with the run writes it again from the last
    /// checkpoint.
    Lost(String),
}

/// The SHA-256 that a finished run or a checkpoint records of its `model.safetensors`; None for a folder that is neither.
///
/// # Errors
/// [`Error::Io`], [`Error::DamagedSummary`] and [`Error::DamagedCheckpoint`] for a record that cannot be read.
pub fn recorded_weights_sha256(dir: &Path) -> Result<Option<String>> {
    match summary_of(dir)? {
        Some(summary) => Ok(Some(summary.weights_sha256)),
        None => checkpoint::recorded_weights_sha256(dir),
    }
}

/// What `finished.json` says, if there is one.
fn summary_of(dir: &Path) -> Result<Option<Summary>> {
    let path = dir.join("finished.json");
    if !path.exists() {
        return Ok(None);
    }
    let summary = serde_json::from_slice(&read(&path)?);
    let damaged = |source| Error::DamagedSummary { path, source };
    summary.map(Some).map_err(damaged)
}

/// A time as a folder's name: to the second, in UTC, without the colons that Windows refuses.
fn folder_name(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H-%M-%SZ").to_string()
}

/// What runs are put in order by, from their folders' names: the time of the start, then the number behind it.
fn start_order(dir: &Path) -> (String, u64) {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    match name.rsplit_once("Z-").map(|(time, n)| (time, n.parse())) {
        Some((time, Ok(number))) => (format!("{time}Z"), number),
        _ => (name.into_owned(), 1),
    }
}

/// Makes `parent/name`, or `parent/name-2`, … when taken.
fn create_unused(parent: &Path, name: &str) -> Result<PathBuf> {
    let mut dir = parent.join(name);
    for suffix in 2.. {
        match fs::create_dir(&dir) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                dir = parent.join(format!("{name}-{suffix}"));
            }
            result => {
                result.map_err(io_error("create", &dir))?;
                break;
            }
        }
    }
    Ok(dir)
}

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("run.lock");
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(io_error("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::InUse {
            dir: dir.to_path_buf(),
        }),
        Err(TryLockError::Error(source)) => Err(io_error("lock", &path)(source)),
    }
}

fn to_value(config: &impl Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(config).map_err(|source| Error::Encode {
        what: "config.json",
        source,
    })
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|source| Error::Encode {
        what: "a file of the run directory",
        source,
    })?;
    bytes.push(b'\n');
    write_atomically(path, &bytes)
}
