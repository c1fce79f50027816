//! A file of weights that a run begins with.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use trainer::{Model, recorded_weights_sha256, sha256_hex, weights};

/// A file of weights and the hash that tells whether it is still the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitFile {
    /// Absolute once resolved.
    pub path: PathBuf,
    /// Empty until resolved, but for that of a run's own weights, which the run records.
    pub sha256: String,
}

impl InitFile {
    /// A file as it was given on the command line.
    pub fn given(path: PathBuf) -> Self {
        Self {
            path,
            sha256: String::new(),
        }
    }

    /// The weights in the folder of a finished run or of a checkpoint.
    ///
    /// # Errors
    /// A record of their hash that cannot be read.
    pub fn in_folder(folder: &Path) -> trainer::Result<Self> {
        Ok(Self {
            path: folder.join("model.safetensors"),
            sha256: recorded_weights_sha256(folder)?.unwrap_or_default(),
        })
    }

    /// Makes the path absolute, so that a resumption from another folder finds the file, and
    /// records its hash. `flag` names the argument in errors.
    ///
    /// # Errors
    /// A file that cannot be read, or is not what the run in whose folder it is has written.
    pub fn resolve(self, flag: &str) -> Result<Self> {
        let cannot_read = || format!("cannot read {flag} {}", self.path.display());
        // A device may never end, and a pipe is empty when it is read again.
        let metadata = std::fs::metadata(&self.path).with_context(cannot_read)?;
        ensure!(metadata.is_file(), "{}: it is no file", cannot_read());
        let bytes = std::fs::read(&self.path).with_context(cannot_read)?;
        let sha256 = sha256_hex(&bytes);
        ensure!(
            self.sha256.is_empty() || self.sha256 == sha256,
            "cannot use {flag} {}: its SHA-256 is {sha256}, and the one recorded beside it is {}, so it is damaged or was \
             replaced. --resume of a finished run writes its weights again; in place of a checkpoint give another",
            self.path.display(),
            self.sha256
        );
        let path = self.path.canonicalize().with_context(cannot_read)?;
        check_recordable(flag, &path)?;
        Ok(Self { path, sha256 })
    }

    /// The file's bytes.
    ///
    /// # Errors
    /// A file that cannot be read, or is another than when it was resolved.
    pub fn read(&self) -> Result<Vec<u8>> {
        let shown = self.path.display();
        let bytes = std::fs::read(&self.path).with_context(|| format!("cannot read {shown}"))?;
        ensure!(
            sha256_hex(&bytes) == self.sha256,
            "{shown} is no longer the file that the run began with (SHA-256 {})",
            self.sha256
        );
        Ok(bytes)
    }

    /// Fills every parameter and buffer of `model` with those of the file of `--init`, which must hold exactly those.
    ///
    /// # Errors
    /// As [`Self::read`]; weights that do not fit, with every difference.
    pub fn load_into(&self, model: &dyn Model) -> Result<()> {
        let bytes = self.read()?;
        weights::load_from_bytes(model, &bytes, &self.path).context("cannot use --init")
    }
}

/// Refuses a path that cannot be recorded; `flag` is the argument that names it.
///
/// # Errors
/// A path that is not UTF-8.
pub(crate) fn check_recordable(flag: &str, path: &Path) -> Result<()> {
    ensure!(
        path.to_str().is_some(),
        "{flag} {}: the path is not UTF-8, and config.json, which records it, takes nothing else. Rename that file or folder",
        path.display()
    );
    Ok(())
}
