//! Where a run ran: what is needed to judge its speed and to repeat it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Machine, programs and settings that do not decide the numbers but explain them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Environment {
    /// When this was recorded, RFC 3339.
    pub time: String,
    /// The command line; the program without its folder.
    pub command: Vec<String>,
    /// Versions of the program and of the packages that compute.
    pub packages: BTreeMap<String, String>,
    /// The compiler.
    pub rustc: String,
    /// Commit, when the run started, of the repository with the program's sources; None where git
    /// does not track them.
    pub git_commit: Option<String>,
    /// Whether tracked files differed from that commit.
    pub git_dirty: Option<bool>,
    /// Operating system and architecture.
    pub os: String,
    /// Kernel release, where the system tells.
    pub kernel: Option<String>,
    /// Processor, where the system tells.
    pub cpu_model: Option<String>,
    /// Vector instructions the processor offers.
    pub cpu_features: Vec<String>,
    /// Cores this process may use.
    pub cores: usize,
    /// Threads that compute.
    pub threads: usize,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// The run's seed.
    pub seed: u64,
}

/// The program that trains, as cargo knows its package.
#[derive(Debug, Clone, Copy)]
pub struct Program<'a> {
    /// `env!("CARGO_PKG_NAME")`.
    pub name: &'a str,
    /// `env!("CARGO_PKG_VERSION")`.
    pub version: &'a str,
    /// `env!("CARGO_MANIFEST_DIR")`, or another folder of its repository with a `Cargo.toml` that git tracks: of any other no
    /// commit is recorded.
    pub sources: &'a str,
}

impl Environment {
    /// Records machine, versions, commit and settings as they are now.
    pub fn capture(program: Program<'_>, device: &str, threads: usize, seed: u64) -> Self {
        let mut packages: BTreeMap<String, String> = env!("TRAINER_PACKAGES")
            .split_whitespace()
            .filter_map(|entry| entry.split_once('='))
            .map(|(name, version)| (name.into(), version.into()))
            .collect();
        packages.insert(program.name.into(), program.version.into());
        // Sources that were unpacked within somebody else's repository are none of its files.
        let git = |arguments: &[&str]| git(program.sources, arguments);
        let tracked = git(&["ls-files", "--error-unmatch", "Cargo.toml"]).is_some();
        let source_git = |arguments: &[&str]| tracked.then(|| git(arguments)).flatten();
        Self {
            time: Timestamp::now().to_string(),
            command: command(),
            packages,
            rustc: env!("TRAINER_RUSTC").into(),
            git_commit: source_git(&["rev-parse", "HEAD"]),
            git_dirty: source_git(&["status", "--porcelain", "--untracked-files=no"])
                .map(|changes| !changes.is_empty()),
            os: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .ok()
                .map(|release| release.trim().into()),
            cpu_model: cpu_model(),
            cpu_features: cpu_features(),
            cores: std::thread::available_parallelism().map_or(1, |cores| cores.get()),
            threads,
            device: device.into(),
            seed,
        }
    }
}

fn command() -> Vec<String> {
    let arguments = std::env::args_os();
    let mut command: Vec<String> = arguments
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    if let Some(program) = command.first_mut() {
        let name = Path::new(&*program)
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        *program = name.unwrap_or_default();
    }
    command
}

/// Output of git in the folder; None without git, outside a repository, or where the folder is gone.
fn git(folder: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new("git")
        .args(["-C", folder])
        .args(arguments)
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_string())
}

fn cpu_model() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().into())
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<String> {
    let features = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
    ];
    let present = features.into_iter().filter(|(_, present)| *present);
    present.map(|(name, _)| name.to_string()).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Vec<String> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(sources: &str) -> Environment {
        let program = Program {
            name: "some-experiment",
            version: "1.2.3",
            sources,
        };
        Environment::capture(program, "cpu", 2, 7)
    }

    #[test]
    fn the_commit_is_that_of_the_programs_sources() {
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join("Cargo.toml"), "").unwrap();
        let environment = environment(elsewhere.path().to_str().unwrap());
        assert_eq!(
            (environment.git_commit, environment.git_dirty),
            (None, None)
        );
    }

    #[test]
    fn the_environment_names_compiler_and_computing_packages() {
        let environment = environment(env!("CARGO_MANIFEST_DIR"));
        assert!(
            environment.rustc.starts_with("rustc "),
            "{}",
            environment.rustc
        );
        assert_eq!(environment.packages["some-experiment"], "1.2.3");
        for name in ["candle-core", "rayon", "safetensors"] {
            let version = &environment.packages[name];
            assert!(
                version.starts_with(|c: char| c.is_ascii_digit()),
                "{name} {version}"
            );
        }
        assert!(environment.cores >= 1);
    }
}
