//! `cargo xtask cuda-check`: lints `--features cuda` on a machine without CUDA.

mod kernels;

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Type-check and lint the CUDA build; needs neither a GPU nor CUDA
///
/// Runs `cargo clippy` on the experiments and what they use with `--features cuda`, then with `--features nccl`, with a stand-in for
/// nvcc that writes empty kernels.
/// The result cannot be run: to build a real binary, install CUDA 13 and run
/// `cargo build --features cuda`.
#[derive(clap::Args)]
pub(crate) struct CudaCheck {
    /// Compile our CUDA kernels instead, and print what each takes of a GPU. Needs a real nvcc ($NVCC, else
    /// $CUDA_HOME/bin/nvcc, else the PATH's), but no GPU
    #[arg(long)]
    kernels: bool,
}

/// What is checked, with the packages whose dependencies are all of the CUDA side.
const FEATURES: [(&str, &[&str]); 2] = [
    (
        "cuda",
        &[
            "scratch-train",
            "finetune-full",
            "finetune-frozen",
            "predict",
        ],
    ),
    (
        "nccl",
        &["scratch-train", "finetune-full", "finetune-frozen"],
    ),
];

pub(crate) fn run(arguments: &CudaCheck) -> Result<()> {
    if arguments.kernels {
        return kernels::run();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("xtask lies in the workspace")?;
    let stand_in = root.join("tools/cuda-check");
    let path = env::join_paths(
        std::iter::once(stand_in.clone())
            .chain(env::split_paths(&env::var_os("PATH").unwrap_or_default())),
    )?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    for (feature, packages) in FEATURES {
        let packages = packages.iter().flat_map(|package| ["--package", package]);
        let status = Command::new(&cargo)
            .current_dir(root)
            .arg("clippy")
            .args(packages)
            .args(["--all-targets", "--features", feature])
            .args(["--", "-D", "warnings"])
            .env("PATH", &path)
            .env("NVCC", stand_in.join("nvcc"))
            .env("CUDA_HOME", &stand_in)
            .env("CUDA_PATH", &stand_in)
            // No GPU is asked for its capability; 87 keeps these outputs apart
            // from those of a real build in the same target folder.
            .env("CUDA_COMPUTE_CAP", "87")
            .status()
            .context("cannot start cargo")?;
        if !status.success() {
            bail!("the build with --features {feature} does not pass: see above");
        }
    }
    Ok(())
}
