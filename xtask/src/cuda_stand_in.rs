//! What takes CUDA's place on a machine without it, so that `--features cuda` builds there.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::workspace::{cargo, repository};

/// A toolkit under `target/` whose compiler writes empty kernels. Its libraries are those that others put there.
pub(crate) struct StandIn {
    home: PathBuf,
}

impl StandIn {
    /// Makes the folders where they are missing.
    pub(crate) fn new() -> Result<Self> {
        let home = repository().join("target/cuda-stand-in");
        let stand_in = Self { home };
        let libraries = stand_in.libraries();
        fs::create_dir_all(&libraries)
            .with_context(|| format!("cannot make {}", libraries.display()))?;
        Ok(stand_in)
    }

    /// Where the linker looks for CUDA's libraries.
    pub(crate) fn libraries(&self) -> PathBuf {
        self.home.join("lib64")
    }

    /// Where programs and files go that are made beside it.
    pub(crate) fn tools_made(&self) -> &Path {
        &self.home
    }

    /// The folder of its `nvcc`.
    pub(crate) fn tools(&self) -> PathBuf {
        repository().join("tools/cuda-check")
    }

    /// Cargo with CUDA's place taken.
    pub(crate) fn cargo(&self) -> Result<Command> {
        let mut command = cargo();
        command
            .env("PATH", before("PATH", [self.tools()])?)
            .env("NVCC", self.tools().join("nvcc"))
            .env("CUDA_HOME", &self.home)
            .env("CUDA_PATH", &self.home)
            // No GPU is asked for its capability; 87 keeps these outputs apart
            // from those of a real build in the same target folder.
            .env("CUDA_COMPUTE_CAP", "87");
        Ok(command)
    }
}

/// The value of a variable that lists folders, with more in front.
pub(crate) fn before(
    variable: &str,
    folders: impl IntoIterator<Item = PathBuf>,
) -> Result<OsString> {
    let others = env::var_os(variable).unwrap_or_default();
    let others = env::split_paths(&others).filter(|path| !path.as_os_str().is_empty());
    env::join_paths(folders.into_iter().chain(others))
        .with_context(|| format!("cannot set {variable}"))
}
