//! Checkpoints: a run's state between two steps, on disk whole or not at all.
//!
//! ```text
//! checkpoints/step-0000123/
//!   model.safetensors       weights and buffers under PyTorch's names
//!   optimizer.safetensors   momentum buffers
//!   state.json              position in the epoch and its sums, seed, schedule, settings, hashes of the data,
//!                           last evaluation, and how much of the metrics files it covers
//!   SHA256SUMS              of the three, as `sha256sum --check` reads it; written last
//! ```
//! The folder is written under a temporary name, every file and the folder are synced, and only then
//! is it renamed. A process or machine that dies midway leaves the previous checkpoint untouched.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::data::DataFingerprints;
use crate::durable::{
    TEMPORARY, io_error, read, sha256_hex, sync_dir, sync_parent, temporary_sibling, write_synced,
};
use crate::error::{Error, Result};
use crate::evaluate::Evaluation;
use crate::metrics::MetricsPosition;
use crate::random::STREAM_SCHEME;
use crate::schedule::ResolvedSchedule;

/// Version of `state.json`.
pub(crate) const FORMAT_VERSION: u32 = 1;

pub(crate) const WEIGHTS: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const SUMS: &str = "SHA256SUMS";

/// Where a run stands.
///
/// With the seed it is all that randomness depends on. The sums are exact: JSON holds an f64 as the
/// shortest decimal that reads back to the same bits.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Position {
    /// Steps made.
    pub(crate) step: u64,
    /// Epochs completed, their evaluation included.
    pub(crate) epoch: u64,
    /// Batches made of the epoch under way.
    pub(crate) batch_in_epoch: u64,
    /// Σ loss × images over those batches.
    pub(crate) epoch_loss_sum: f64,
    /// Images classified correctly in those batches.
    pub(crate) epoch_correct: u64,
    /// Images in those batches.
    pub(crate) epoch_images: u64,
    /// Time they took; the only field that differs between equal runs.
    pub(crate) epoch_seconds: f64,
}

/// Contents of `state.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) format_version: u32,
    pub(crate) seed: u64,
    pub(crate) stream_scheme: String,
    pub(crate) position: Position,
    pub(crate) schedule: ResolvedSchedule,
    /// The settings as [`crate::config::described`] gives them; empty in checkpoints of former versions.
    #[serde(default)]
    pub(crate) settings: BTreeMap<String, String>,
    pub(crate) metrics: MetricsPosition,
    pub(crate) data: DataFingerprints,
    pub(crate) last_evaluation: BTreeMap<String, Evaluation>,
}

/// A checkpoint read from disk, its checksums verified.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(crate) path: PathBuf,
    pub(crate) state: State,
    pub(crate) weights: Vec<u8>,
    pub(crate) optimizer: Vec<u8>,
}

impl Checkpoint {
    pub(crate) fn weights_path(&self) -> PathBuf {
        self.path.join(WEIGHTS)
    }

    pub(crate) fn optimizer_path(&self) -> PathBuf {
        self.path.join(OPTIMIZER)
    }
}

/// Writes the checkpoint of `state.position.step` into `dir` and removes all but the newest `keep`.
/// Returns its folder.
pub(crate) fn save(
    dir: &Path,
    state: &State,
    weights: &[u8],
    optimizer: &[u8],
    keep: usize,
) -> Result<PathBuf> {
    // Not the run's folder, whose metrics lie where that has gone.
    match fs::create_dir(dir) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        created => created.map_err(io_error("create", dir))?,
    }
    // With it the run's metrics files, whose lines this checkpoint counts on.
    sync_parent(dir)?;
    remove_half_written(dir)?;
    let path = dir.join(format!("step-{:07}", state.position.step));
    let temporary = temporary_sibling(&path);
    fs::create_dir(&temporary).map_err(io_error("create", &temporary))?;
    if let Err(error) = write_files(&temporary, state, weights, optimizer) {
        // A full disk has use for the room. What cannot be removed now is removed before the next checkpoint.
        let _ = remove_if_present(&temporary);
        return Err(error);
    }

    // The same step again: the run was stopped where it had just been saved, or between the last
    // step of an epoch and its evaluation. The older one gives way only now.
    let replaced = replaced_by(&path);
    remove_if_present(&replaced)?;
    if path.exists() {
        fs::rename(&path, &replaced).map_err(io_error("move aside", &path))?;
    }
    fs::rename(&temporary, &path).map_err(io_error("rename to", &path))?;
    sync_dir(dir)?;
    remove_if_present(&replaced)?;

    for (_, old) in list(dir, "step-")?.into_iter().skip(keep) {
        remove_if_present(&old)?;
    }
    Ok(path)
}

fn write_files(dir: &Path, state: &State, weights: &[u8], optimizer: &[u8]) -> Result<()> {
    let state = serde_json::to_vec_pretty(state).map_err(|source| Error::Encode {
        what: STATE,
        source,
    })?;
    let mut sums = String::new();
    for (name, bytes) in [(WEIGHTS, weights), (OPTIMIZER, optimizer), (STATE, &state)] {
        write_synced(&dir.join(name), bytes)?;
        sums += &format!("{}  {name}\n", sha256_hex(bytes));
    }
    write_synced(&dir.join(SUMS), sums.as_bytes())?;
    sync_dir(dir)
}

/// The newest checkpoint in `dir` that is whole. Damaged ones are renamed to `damaged-…`, with a
/// warning, and the one before is taken; where no whole one is left, all stay as they are and the
/// run cannot go on. None when there never was one.
pub(crate) fn load_newest(dir: &Path) -> Result<Option<Checkpoint>> {
    if !was_saved(dir)? {
        return Ok(None);
    }
    restore_replaced(dir)?;
    let mut problems = Vec::new();
    for (_, path) in list(dir, "step-")? {
        match load(&path) {
            Ok(checkpoint) => {
                for (path, error) in problems {
                    set_aside(path, &error)?;
                }
                return Ok(Some(checkpoint));
            }
            Err(error @ (Error::IncompatibleCheckpoint { .. } | Error::Io { .. })) => {
                return Err(error);
            }
            Err(error) => problems.push((path, error)),
        }
    }
    let set_aside_before = list(dir, "damaged-step-")?;
    let newest = match (problems.first(), set_aside_before.first()) {
        (None, None) => return Ok(None),
        (Some((_, error)), _) => error.to_string(),
        (None, Some((_, path))) => format!("{} was found damaged before", path.display()),
    };
    Err(Error::NoUsableCheckpoint {
        dir: dir.to_path_buf(),
        count: problems.len() + set_aside_before.len(),
        newest,
    })
}

/// Renames a damaged checkpoint, so that no later look at the folder takes it for the newest.
fn set_aside(path: PathBuf, error: &Error) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!("damaged-{name}"));
    tracing::warn!("{error}; moved to {}", aside.display());
    remove_if_present(&aside)?;
    fs::rename(&path, &aside).map_err(io_error("move aside", &path))
}

/// Whether there is a checkpoint in `dir`, whole or damaged. A folder that was never made has none; one that is there and cannot be
/// listed, such as a link to a disk that is not mounted, is an error.
pub(crate) fn was_saved(dir: &Path) -> Result<bool> {
    match fs::symlink_metadata(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        found => found.map_err(io_error("look at", dir))?,
    };
    let any = |prefix| list(dir, prefix).map(|found| !found.is_empty());
    Ok(any("step-")? || any("damaged-step-")? || !replaced(dir)?.is_empty())
}

/// The newest checkpoint's folder, unverified; None where there is no checkpoint.
pub(crate) fn newest_path(dir: &Path) -> Result<Option<PathBuf>> {
    if !was_saved(dir)? {
        return Ok(None);
    }
    let newest = list(dir, "step-")?.into_iter().next();
    Ok(newest.map(|(_, path)| path))
}

/// The hash that the checkpoint in `dir` records of its weights; None where there is no checkpoint.
pub(crate) fn recorded_weights_sha256(dir: &Path) -> Result<Option<String>> {
    let path = dir.join(SUMS);
    if !path.exists() {
        return Ok(None);
    }
    let sums = read(&path)?;
    let sums = String::from_utf8_lossy(&sums);
    Ok(Some(recorded(dir, &sums, WEIGHTS)?.to_string()))
}

/// The hash of a file of the checkpoint in `dir`, from the lines of its [`SUMS`].
fn recorded<'a>(dir: &Path, sums: &'a str, name: &str) -> Result<&'a str> {
    let mut entries = sums.lines().filter_map(|line| line.split_once("  "));
    let found = entries.find_map(|(sum, file)| (file == name).then_some(sum));
    found.ok_or_else(|| Error::DamagedCheckpoint {
        path: dir.to_path_buf(),
        reason: format!("{SUMS} has no entry for {name}"),
    })
}

/// Reads a checkpoint and verifies every byte. A file that is missing is damage; one that the system does not let be read, for want of
/// permission or of descriptors, is not.
fn load(path: &Path) -> Result<Checkpoint> {
    let damaged = |reason: String| Error::DamagedCheckpoint {
        path: path.to_path_buf(),
        reason,
    };
    let bytes_of = |name: &str| {
        let file = path.join(name);
        fs::read(&file).map_err(|error| match is_damage(&error) {
            true => damaged(format!("{name} cannot be read ({error})")),
            false => io_error("read", &file)(error),
        })
    };
    let sums = bytes_of(SUMS)?;
    let sums = String::from_utf8_lossy(&sums);
    let verified = |name: &str| {
        let expected = recorded(path, &sums, name)?;
        let bytes = bytes_of(name)?;
        match sha256_hex(&bytes) {
            found if found == expected => Ok(bytes),
            found => Err(damaged(format!(
                "{name} has SHA-256 {found:.12}…, recorded {expected:.12}…"
            ))),
        }
    };
    let state: State = serde_json::from_slice(&verified(STATE)?)
        .map_err(|error| damaged(format!("{STATE} cannot be read ({error})")))?;
    if state.format_version != FORMAT_VERSION || state.stream_scheme != STREAM_SCHEME {
        return Err(Error::IncompatibleCheckpoint {
            path: path.to_path_buf(),
            reason: format!(
                "it has format {} with random streams {:?}, this program {FORMAT_VERSION} with \
                 {STREAM_SCHEME:?}",
                state.format_version, state.stream_scheme
            ),
        });
    }
    Ok(Checkpoint {
        path: path.to_path_buf(),
        weights: verified(WEIGHTS)?,
        optimizer: verified(OPTIMIZER)?,
        state,
    })
}

/// Whether a file that cannot be read is gone, or lies on a bad place of the disk.
fn is_damage(error: &io::Error) -> bool {
    /// Of all Unix systems.
    const EIO: i32 = 5;
    let is_gone = matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::IsADirectory
    );
    is_gone || (cfg!(unix) && error.raw_os_error() == Some(EIO))
}

/// Folders whose name is `prefix` and a step, newest first.
fn list(dir: &Path, prefix: &str) -> Result<Vec<(u64, PathBuf)>> {
    let step = |name: &str| name.strip_prefix(prefix)?.parse().ok();
    let named = names(dir)?.into_iter();
    let mut found: Vec<(u64, PathBuf)> = named
        .filter_map(|name| Some((step(&name)?, dir.join(name))))
        .collect();
    found.sort_by(|a, b| b.cmp(a));
    Ok(found)
}

/// What `dir` holds, as far as it has names of ours.
fn names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(io_error("list", dir))? {
        let name = entry.map_err(io_error("list", dir))?.file_name();
        names.extend(name.into_string().ok());
    }
    Ok(names)
}

/// Where a checkpoint lies while another of the same step takes its place.
fn replaced_by(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}{REPLACED}"))
}

const REPLACED: &str = ".replaced";

/// Checkpoints that lie aside, with their places.
fn replaced(dir: &Path) -> Result<Vec<(PathBuf, PathBuf)>> {
    let place = |name: &str| {
        let name = name.strip_prefix('.')?.strip_suffix(REPLACED)?;
        name.starts_with("step-").then(|| dir.join(name))
    };
    let found = names(dir)?.into_iter();
    let found = found.filter_map(|name| Some((place(&name)?, dir.join(name))));
    Ok(found.collect())
}

/// Undoes a replacement that was killed between its two renames: the older checkpoint of that step
/// is whole and lies aside.
fn restore_replaced(dir: &Path) -> Result<()> {
    for (path, aside) in replaced(dir)? {
        match path.exists() {
            true => remove_if_present(&aside)?,
            false => fs::rename(&aside, &path).map_err(io_error("restore", &path))?,
        }
    }
    Ok(())
}

/// What killed processes have left, of any step: one process at a time works in a run.
fn remove_half_written(dir: &Path) -> Result<()> {
    for name in names(dir)? {
        if name.starts_with(".step-") && name.ends_with(TEMPORARY) {
            remove_if_present(&dir.join(name))?;
        }
    }
    Ok(())
}

fn remove_if_present(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result.map_err(io_error("remove", dir)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::SetFingerprint;

    fn state(step: u64) -> State {
        let set = SetFingerprint {
            images: 4,
            sha256: "ab".into(),
        };
        State {
            format_version: FORMAT_VERSION,
            seed: 1,
            stream_scheme: STREAM_SCHEME.into(),
            position: Position {
                step,
                epoch_loss_sum: 0.1 + 0.2,
                ..Default::default()
            },
            schedule: ResolvedSchedule::Constant,
            settings: BTreeMap::new(),
            metrics: MetricsPosition::default(),
            data: DataFingerprints {
                train: set.clone(),
                validation: None,
                test: set,
            },
            last_evaluation: BTreeMap::new(),
        }
    }

    fn sorted_names(dir: &Path) -> Vec<String> {
        let mut names = names(dir).unwrap();
        names.sort();
        names
    }

    #[test]
    fn the_newest_checkpoint_is_loaded_with_exact_state_and_older_ones_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        for step in [5, 10, 20] {
            save(dir.path(), &state(step), &[step as u8], b"momentum", 2).unwrap();
        }
        assert_eq!(sorted_names(dir.path()), ["step-0000010", "step-0000020"]);
        let newest = load_newest(dir.path()).unwrap().unwrap();
        assert_eq!(newest.state, state(20));
        assert_eq!(
            (&newest.weights[..], &newest.optimizer[..]),
            (&[20][..], &b"momentum"[..])
        );
    }

    #[test]
    fn any_altered_truncated_or_missing_file_falls_back_to_the_checkpoint_before() {
        for file in [WEIGHTS, OPTIMIZER, STATE, SUMS] {
            for damage in ["altered", "truncated", "missing"] {
                let dir = tempfile::tempdir().unwrap();
                save(dir.path(), &state(1), b"first", b"m", 2).unwrap();
                let newest = save(dir.path(), &state(2), b"second", b"m", 2).unwrap();
                let path = newest.join(file);
                let mut bytes = fs::read(&path).unwrap();
                match damage {
                    "altered" => bytes[0] ^= 1,
                    "truncated" => bytes.truncate(bytes.len() / 2),
                    _ => fs::remove_file(&path).unwrap(),
                }
                if damage != "missing" {
                    fs::write(&path, bytes).unwrap();
                }
                let loaded = load_newest(dir.path()).unwrap().unwrap();
                assert_eq!(loaded.state.position.step, 1, "{damage} {file}");
                assert_eq!(
                    sorted_names(dir.path()),
                    ["damaged-step-0000002", "step-0000001"]
                );
            }
        }
    }

    #[cfg(unix)]
    #[test]
    fn what_cannot_be_read_is_not_damaged() {
        for file in [WEIGHTS, SUMS] {
            let dir = tempfile::tempdir().unwrap();
            save(dir.path(), &state(1), b"first", b"m", 2).unwrap();
            let newest = save(dir.path(), &state(2), b"second", b"m", 2).unwrap();
            let path = newest.join(file);
            fs::rename(&path, newest.join("kept")).unwrap();
            // A link to itself: an error that even root gets.
            std::os::unix::fs::symlink(&path, &path).unwrap();
            let error = load_newest(dir.path()).unwrap_err();
            assert!(matches!(error, Error::Io { action: "read", .. }), "{error}");
            assert_eq!(sorted_names(dir.path()), ["step-0000001", "step-0000002"]);
            fs::remove_file(&path).unwrap();
            fs::rename(newest.join("kept"), &path).unwrap();
            let loaded = load_newest(dir.path()).unwrap().unwrap();
            assert_eq!(loaded.weights, b"second");
        }
        assert!(is_damage(&io::Error::from_raw_os_error(5)));
        assert!(!is_damage(&io::Error::from_raw_os_error(13)));
    }

    #[test]
    fn when_all_checkpoints_are_damaged_each_call_is_the_same_error_and_nothing_moves() {
        let dir = tempfile::tempdir().unwrap();
        for step in [1, 2] {
            let path = save(dir.path(), &state(step), b"w", b"m", 2).unwrap();
            fs::write(path.join(WEIGHTS), b"other").unwrap();
        }
        for _ in 0..2 {
            let error = load_newest(dir.path()).unwrap_err().to_string();
            assert!(error.contains("none of the 2 checkpoints"), "{error}");
            assert!(error.contains(WEIGHTS), "{error}");
            assert_eq!(sorted_names(dir.path()), ["step-0000001", "step-0000002"]);
        }
    }

    #[test]
    fn a_run_whose_folder_has_gone_is_an_error_and_not_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let error = save(&run.join("checkpoints"), &state(1), b"w", b"m", 2).unwrap_err();
        assert!(error.to_string().contains("cannot create"), "{error}");
        assert!(!run.exists());
    }

    #[test]
    fn where_only_checkpoints_set_aside_are_left_the_run_does_not_begin_anew() {
        let dir = tempfile::tempdir().unwrap();
        for step in [1, 2] {
            save(dir.path(), &state(step), b"w", b"m", 2).unwrap();
        }
        let newest = newest_path(dir.path()).unwrap().unwrap();
        fs::write(newest.join(WEIGHTS), b"other").unwrap();
        assert!(load_newest(dir.path()).unwrap().is_some());
        fs::remove_dir_all(dir.path().join("step-0000001")).unwrap();
        let error = load_newest(dir.path()).unwrap_err().to_string();
        assert!(error.contains("damaged-step-0000002"), "{error}");
    }

    #[test]
    fn half_written_checkpoints_are_ignored_and_removed_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &state(1), b"w", b"m", 2).unwrap();
        fs::create_dir(dir.path().join(".step-0000002.tmp")).unwrap();
        let loaded = load_newest(dir.path()).unwrap().unwrap();
        assert_eq!(loaded.state.position.step, 1);
        save(dir.path(), &state(3), b"w", b"m", 2).unwrap();
        assert_eq!(sorted_names(dir.path()), ["step-0000001", "step-0000003"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_that_cannot_be_listed_is_not_taken_for_one_that_was_never_made() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = dir.path().join("checkpoints");
        assert!(!was_saved(&checkpoints).unwrap());
        let beside = dir.path().join("a file");
        fs::write(&beside, "").unwrap();
        let error = was_saved(&beside.join("checkpoints"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("cannot look at"), "{error}");
        assert!(load_newest(&checkpoints).unwrap().is_none());
        std::os::unix::fs::symlink(dir.path().join("not mounted"), &checkpoints).unwrap();
        for error in [
            was_saved(&checkpoints).err(),
            load_newest(&checkpoints).err(),
        ] {
            assert!(error.unwrap().to_string().contains("cannot list"));
        }
    }

    #[test]
    fn a_replacement_killed_between_its_renames_keeps_the_older_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let path = save(dir.path(), &state(1), b"w", b"m", 2).unwrap();
        // Though this program may not be the one that can read it.
        let other = State {
            stream_scheme: "v0".into(),
            ..state(2)
        };
        let unknown = save(dir.path(), &other, b"w", b"m", 2).unwrap();
        for path in [&path, &unknown] {
            fs::rename(path, replaced_by(path)).unwrap();
        }
        assert!(was_saved(dir.path()).unwrap());
        assert!(load_newest(dir.path()).is_err());
        assert_eq!(sorted_names(dir.path()), ["step-0000001", "step-0000002"]);
        fs::remove_dir_all(unknown).unwrap();
        let loaded = load_newest(dir.path()).unwrap().unwrap();
        assert_eq!(loaded.path, path);
    }

    #[test]
    fn the_same_step_can_be_saved_again() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &state(1), b"old", b"m", 2).unwrap();
        save(dir.path(), &state(1), b"new", b"m", 2).unwrap();
        let loaded = load_newest(dir.path()).unwrap().unwrap();
        assert_eq!(loaded.weights, b"new");
        assert_eq!(sorted_names(dir.path()), ["step-0000001"]);
    }

    #[test]
    fn checkpoints_of_other_random_streams_are_not_silently_continued() {
        let dir = tempfile::tempdir().unwrap();
        let other = State {
            stream_scheme: "v0".into(),
            ..state(1)
        };
        save(dir.path(), &other, b"w", b"m", 2).unwrap();
        assert!(load_newest(dir.path()).is_err());
    }
}
