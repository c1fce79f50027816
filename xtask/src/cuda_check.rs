//! `cargo xtask cuda-check`: lints `--features cuda` on a machine without CUDA.

mod kernels;

use anyhow::{Context, Result, bail};

use crate::cuda_stand_in::StandIn;

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
    let stand_in = StandIn::new()?;
    for (feature, packages) in FEATURES {
        let packages = packages.iter().flat_map(|package| ["--package", package]);
        let status = stand_in
            .cargo()?
            .arg("clippy")
            .args(packages)
            .args(["--all-targets", "--features", feature])
            .args(["--", "-D", "warnings"])
            .status()
            .context("cannot start cargo")?;
        if !status.success() {
            bail!("the build with --features {feature} does not pass: see above");
        }
    }
    Ok(())
}
