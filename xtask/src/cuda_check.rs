//! `cargo xtask cuda-check`: lints `--features cuda` on a machine without CUDA.

mod kernels;

pub(crate) use self::kernels::nvcc;

use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use crate::cuda_stand_in::StandIn;
use crate::workspace::repository;

/// Type-check and lint the CUDA build; needs neither a GPU nor CUDA
///
/// Runs `cargo clippy` on the experiments and what they use with `--features cuda`, then with `--features nccl`, with a stand-in for
/// nvcc that writes empty kernels.
/// It makes no program: to build one, install CUDA and run `cargo build --features cuda`.
#[derive(clap::Args)]
pub(crate) struct CudaCheck {
    /// The release of CUDA whose interface it is checked against [default: 13.0]. That of another one has a build of its own, under
    /// target/cuda-RELEASE
    #[arg(long, value_name = "RELEASE", conflicts_with = "kernels")]
    cuda_version: Option<Release>,
    /// Compile our CUDA kernels instead, and print what each takes of a GPU. Needs a real nvcc ($NVCC, else
    /// $CUDA_HOME/bin/nvcc, else the PATH's), but no GPU
    #[arg(long)]
    kernels: bool,
}

/// A release of CUDA, as `nvcc --version` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Release {
    major: u8,
    minor: u8,
}

impl Release {
    /// Makes the bindings those of this release. In a folder apart, since cargo would build all anew whenever the release changes.
    fn set(&self, cargo: &mut Command) {
        let Self { major, minor } = self;
        cargo
            .env("CUDARC_CUDA_VERSION", format!("{major}0{minor}0"))
            .env(
                "CARGO_TARGET_DIR",
                repository().join(format!("target/cuda-{major}.{minor}")),
            );
    }
}

impl FromStr for Release {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let numbers = text.split_once('.').and_then(|(major, minor)| {
            Some(Self {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
            })
        });
        numbers.with_context(|| format!("a release has two numbers, as 12.4, and not {text:?}"))
    }
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
        let mut cargo = stand_in.cargo()?;
        if let Some(release) = &arguments.cuda_version {
            release.set(&mut cargo);
        }
        let status = cargo
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
