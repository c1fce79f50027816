//! `cargo xtask cuda-emulate`: runs the CUDA build on a machine without CUDA.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};

use crate::cuda_stand_in::{StandIn, before};
use crate::workspace::repository;

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
    /// The real libcudnn.so.9 (9.11 or later), which is asked what it has on an H200 for each convolution; needs no GPU.
    /// Each of its offers is planned by it, and only those are taken. To be given before cargo's arguments
    #[arg(long, value_name = "LIBRARY")]
    cudnn: Option<PathBuf>,
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
    "test --features cuda,nccl --lib --tests --package candle-cnn --package inception-model --package trainer --package experiment-common",
    "test --features cuda,nccl --package scratch-train --package finetune-full --package predict --test cuda",
];
/// The names under which programs are linked with the library.
const TAKES_THE_PLACE_OF: [&str; 8] = [
    "cuda", "cudart", "nvrtc", "cudnn", "cublas", "cublasLt", "curand", "nccl",
];
const LIBRARY: &str = "libcuda-emulation.so";
/// All that the device and the process with cuDNN are made of is C++.
const COMPILER: [&str; 4] = ["-std=c++20", "-O3", "-pthread", "-Wall"];

pub(crate) fn run(arguments: &CudaEmulate) -> Result<()> {
    ensure!(
        cfg!(target_os = "linux"),
        "the emulated device is built for Linux only"
    );
    let stand_in = StandIn::new()?;
    let libraries = stand_in.libraries();
    build(&libraries)?;
    let library_path = before("LD_LIBRARY_PATH", [libraries])?;
    let cudnn = arguments.cudnn.as_deref();
    let cudnn = cudnn.map(|library| RealCudnn::new(&stand_in, library));
    let cudnn = cudnn.transpose()?;
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
        if let Some(cudnn) = &cudnn {
            cudnn.put_in_place(&mut cargo);
        }
        let status = cargo.status().context("cannot start cargo")?;
        ensure!(status.success(), "cargo ended with {status}: see above");
        Ok(())
    };
    if arguments.arguments.is_empty() {
        for tests in TESTS {
            let words = tests.split(' ').map(OsString::from);
            run(&words.collect::<Vec<_>>())?;
        }
    } else {
        run(&arguments.arguments)?;
    }
    match &cudnn {
        Some(cudnn) => cudnn.summarize(),
        None => Ok(()),
    }
}

/// The process that asks the real cuDNN, and what it has answered.
struct RealCudnn {
    /// Program and library, as the emulated device takes them.
    setting: OsString,
    report: PathBuf,
}

impl RealCudnn {
    fn new(stand_in: &StandIn, library: &Path) -> Result<Self> {
        let library = fs::canonicalize(library)
            .with_context(|| format!("--cudnn: cannot find {}", library.display()))?;
        let source = sources().join("real_cudnn.cpp");
        let program = stand_in.tools_made().join("real_cudnn");
        let status = Command::new("c++")
            .args(COMPILER)
            .arg(source)
            .args(["-ldl", "-o"])
            .arg(&program)
            .status()
            .context("cannot start c++")?;
        ensure!(
            status.success(),
            "real_cudnn.cpp does not compile: see above"
        );
        let report = stand_in.tools_made().join("cudnn.csv");
        fs::write(&report, HEADER).with_context(|| format!("cannot write {}", report.display()))?;
        let mut setting = program.into_os_string();
        setting.push(":");
        setting.push(library);
        Ok(Self { setting, report })
    }

    fn put_in_place(&self, cargo: &mut Command) {
        cargo
            .env("CUDA_EMULATION_CUDNN", &self.setting)
            .env("CUDA_EMULATION_CUDNN_REPORT", &self.report);
    }

    /// Prints how many questions there were, and those that cuDNN had no answer to.
    fn summarize(&self) -> Result<()> {
        let text = fs::read_to_string(&self.report)
            .with_context(|| format!("cannot read {}", self.report.display()))?;
        let answers = Answers::read(&text)?;
        println!("{answers}\nAll of them: {}", self.report.display());
        ensure!(
            answers.unanswered.is_empty(),
            "cuDNN has no engine for {} of the computations",
            answers.unanswered.len()
        );
        Ok(())
    }
}

/// The columns that `cudnn.h` writes.
const HEADER: &str = "pass,type,layout,input,kernels,stride,padding,adds,bias,relu,mode,offered,planned,\
                      without tensor cores,deterministic,compiled at run time,first engine,its workspace,refusals\n";

/// What cuDNN said of all computations that it was asked for.
#[derive(Debug, Default, PartialEq)]
struct Answers {
    computations: usize,
    offered: usize,
    refused: usize,
    /// Passes with a bias or a ReLU that no engine does in one; then a kernel of ours follows.
    unfused: usize,
    /// Passes alone with no engine under any mode of the heuristics.
    unanswered: Vec<String>,
}

impl Answers {
    fn read(text: &str) -> Result<Self> {
        let mut answers = Self::default();
        // Equal questions come again and again.
        let lines: BTreeSet<&str> = text.lines().skip(1).collect();
        let mut planned_of: BTreeMap<String, usize> = BTreeMap::new();
        for line in lines {
            let fields: Vec<&str> = line.split(',').collect();
            let number = |column: usize| -> Result<usize> {
                let field = fields.get(column).copied().unwrap_or_default();
                field
                    .parse()
                    .with_context(|| format!("no answer: {line:?}"))
            };
            let (offered, planned) = (number(11)?, number(12)?);
            answers.offered += offered;
            answers.refused += offered.saturating_sub(planned);
            *planned_of.entry(fields[..10].join(",")).or_default() += planned;
        }
        answers.computations = planned_of.len();
        let unanswered = planned_of.into_iter().filter(|&(_, planned)| planned == 0);
        let (alone, followed): (Vec<_>, Vec<_>) = unanswered
            .map(|(computation, _)| computation)
            .partition(|computation| computation.ends_with(",,"));
        answers.unanswered = alone;
        answers.unfused = followed.len();
        Ok(answers)
    }
}

impl fmt::Display for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "cuDNN was asked for {} different computations and offered {} engines and settings, of which it cannot plan {}. \
             {} with a bias or a ReLU have no engine and are computed without.",
            self.computations, self.offered, self.refused, self.unfused
        )?;
        for computation in &self.unanswered {
            write!(f, "\nNo engine: {computation}")?;
        }
        Ok(())
    }
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
            .args(COMPILER)
            .args(["-march=native", "-ffp-contract=off"])
            .args(["-fPIC", "-shared", "-fvisibility=hidden"])
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn computations_without_an_engine_are_named() {
        let text = format!(
            "{HEADER}\
             forward,f32,planes,1x2x3x4,5x1x1,stride 1 1,padding 0 0,,,,mode 3,4,3,1,4,0,0,0, engine 7: why;\n\
             forward,f32,planes,1x2x3x4,5x1x1,stride 1 1,padding 0 0,,,,mode 3,4,3,1,4,0,0,0, engine 7: why;\n\
             forward,f32,planes,1x2x3x4,5x1x1,stride 1 1,padding 0 0,,,,mode 2,1,1,1,1,0,0,0,\n\
             forward,f64,planes,1x2x3x4,5x1x1,stride 1 1,padding 0 0,,bias,,mode 3,0,0,0,0,0,-1,0,\n\
             forward,f64,planes,1x2x3x4,5x1x1,stride 1 1,padding 0 0,,,,mode 3,0,0,0,0,0,-1,0,\n"
        );
        let answers = Answers::read(&text).unwrap();
        let expected = Answers {
            computations: 3,
            offered: 5,
            refused: 1,
            unfused: 1,
            unanswered: vec![
                "forward,f64,planes,1x2x3x4,5x1x1,stride 1 1,padding 0 0,,,".to_string(),
            ],
        };
        assert_eq!(answers, expected);
        assert!(Answers::read("pass\nforward").is_err());
    }
}
