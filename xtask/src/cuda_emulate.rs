//! `cargo xtask cuda-emulate`: runs the CUDA build on a machine without CUDA.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};

use crate::bench::repository;
use crate::cuda_stand_in::{StandIn, before};

/// Run what is built with `--features cuda` on a device that the CPU emulates; needs neither a GPU nor CUDA
///
/// Builds a library that takes the place of the driver, NVRTC, cuDNN, cuBLAS, cuRAND and NCCL, and runs cargo with it. Without arguments that
/// is `cargo test` of everything that computes on a GPU; others are cargo's, as in
///
/// cargo xtask cuda-emulate run -p finetune-full --features cuda -- --device cuda --quick
///
/// Results are those of a GPU up to rounding. Times mean nothing: a step takes seconds.
#[derive(Debug, clap::Args)]
pub(crate) struct CudaEmulate {
    /// Arguments of cargo [default: test, of the packages that have a CUDA side]
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CARGO ARGUMENTS"
    )]
    arguments: Vec<OsString>,
}

/// The tests that use every device there is, and those of the programs that are about CUDA.
const TESTS: [&str; 2] = [
    "test --features cuda,nccl --lib --tests --package candle-cnn --package inception-model --package trainer",
    "test --features cuda,nccl --package scratch-train --package finetune-full --test cuda",
];
/// The names under which programs are linked with the library.
const TAKES_THE_PLACE_OF: [&str; 8] = [
    "cuda", "cudart", "nvrtc", "cudnn", "cublas", "cublasLt", "curand", "nccl",
];
const LIBRARY: &str = "libcuda-emulation.so";

pub(crate) fn run(arguments: &CudaEmulate) -> Result<()> {
    ensure!(
        cfg!(target_os = "linux"),
        "the emulated device is built for Linux only"
    );
    let stand_in = StandIn::new()?;
    let libraries = stand_in.libraries();
    build(&libraries)?;
    let library_path = before("LD_LIBRARY_PATH", [libraries])?;
    // With its nvidia-smi.
    let path = before("PATH", [stand_in.tools(), sources()])?;
    let run = |arguments: &[OsString]| -> Result<()> {
        let mut cargo = stand_in.cargo()?;
        cargo
            .args(arguments)
            .env("LD_LIBRARY_PATH", &library_path)
            .env("PATH", &path);
        if arguments.first().is_some_and(|first| first == "test") {
            // A test must not pass because it found no device.
            cargo.env("CUDA_TESTS_MUST_RUN", "1");
        }
        let status = cargo.status().context("cannot start cargo")?;
        ensure!(status.success(), "cargo ended with {status}: see above");
        Ok(())
    };
    if !arguments.arguments.is_empty() {
        return run(&arguments.arguments);
    }
    for tests in TESTS {
        let words = tests.split(' ').map(OsString::from);
        run(&words.collect::<Vec<_>>())?;
    }
    Ok(())
}

fn sources() -> PathBuf {
    repository().join("tools/cuda-emulation")
}

/// Compiles the library, unless it is newer than all that it is made of.
fn build(libraries: &Path) -> Result<()> {
    let sources = sources();
    let kernels = repository().join("crates/candle-cnn/src");
    let library = libraries.join(LIBRARY);
    let newest = newest(&sources)?.max(newest(&kernels)?);
    let built = fs::metadata(&library).and_then(|file| file.modified()).ok();
    if built.is_none_or(|built| Some(built) <= newest) {
        eprintln!("Compiling the emulated device");
        let unfinished = library.with_extension("unfinished");
        let mut compiler = Command::new("c++");
        compiler
            .args(["-std=c++20", "-O3", "-march=native", "-ffp-contract=off"])
            .args(["-fPIC", "-shared", "-fvisibility=hidden", "-pthread"])
            .arg(format!("-Wl,-soname,{LIBRARY}"))
            .arg("-I")
            .arg(&sources)
            .arg("-I")
            .arg(&kernels)
            .arg(sources.join("device.cpp"))
            // Shared memory, in C libraries before glibc 2.34.
            .arg("-lrt")
            .arg("-o")
            .arg(&unfinished);
        let status = compiler
            .status()
            .context("cannot start c++: the emulated device needs a compiler for C++20")?;
        if !status.success() {
            bail!("the emulated device does not compile: see above");
        }
        // All names first, so that what is newer than its sources is also complete.
        for name in TAKES_THE_PLACE_OF {
            let link = libraries.join(format!("lib{name}.so"));
            let _ = fs::remove_file(&link);
            fs::hard_link(&unfinished, &link)
                .with_context(|| format!("cannot make {}", link.display()))?;
        }
        fs::rename(&unfinished, &library)
            .with_context(|| format!("cannot write {}", library.display()))?;
    }
    Ok(())
}

/// When the newest C++ or CUDA source below a folder was changed.
fn newest(folder: &Path) -> Result<Option<SystemTime>> {
    let mut newest = None;
    let mut folders: Vec<PathBuf> = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path
                .extension()
                .is_some_and(|ending| ["cpp", "h", "cu", "cuh"].iter().any(|e| ending == *e))
            {
                newest = newest.max(Some(fs::metadata(&path)?.modified()?));
            }
        }
    }
    Ok(newest)
}
