//! `cargo xtask gpu-report --pack DIR`: what the report runs, for a machine with a GPU that builds nothing.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::cuda_check::nvcc;
use crate::workspace::{cargo, repository};

/// What is built, and where the programs go below the folder. Tests that compile something themselves are left out, and those of the
/// programs, which look for their program where it was built.
const PARTS: [(&str, &str); 3] = [
    (
        "build --features cuda --package scratch-train --package finetune-full --package finetune-frozen",
        "",
    ),
    (
        "test --no-run --features cuda --package candle-cnn --package inception-model --package trainer --lib \
         --test backward --test cuda_conv2d --test cuda_memory --test cuda_static_graph --test pytorch_fixtures \
         --test googlenet_parity --test pytorch_parity --test pytorch_sgd",
        "tests",
    ),
    ("build --package xtask", ""),
];

/// Builds it all into a new folder, without debug information.
pub(super) fn pack(dir: &Path) -> Result<()> {
    ensure!(
        !dir.exists(),
        "--pack: {} exists already, and nothing is overwritten",
        dir.display()
    );
    let mut programs = Vec::new();
    for (arguments, folder) in PARTS {
        for program in build(arguments)? {
            programs.push((program, dir.join(folder)));
        }
    }
    let mut bytes = 0;
    for (program, folder) in &programs {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let name = program.file_name().context("a program without a name")?;
        let copy = folder.join(name);
        let status = Command::new("strip")
            .arg("-o")
            .args([&copy, program])
            .status()
            .context("cannot start strip, which is in binutils")?;
        ensure!(status.success(), "cannot write {}", copy.display());
        bytes += fs::metadata(&copy)?.len();
    }
    let nvcc = nvcc();
    let said = Command::new(&nvcc).arg("--version").output();
    let said = said.map_or(String::new(), |output| {
        String::from_utf8_lossy(&output.stdout).into_owned()
    });
    let release = said.lines().find(|line| line.contains("release"));
    let release = release.unwrap_or("which does not name its release").trim();
    println!("Of the nvcc {}: {release}.", nvcc.display());
    let (count, mib) = (programs.len(), bytes as f64 / f64::from(1 << 20));
    let (dir, here) = (dir.display(), repository().display());
    println!(
        "{count} programs, {mib:.0} MiB, in {dir}. On the machine with the GPU, in the repository, which must lie at \
         {here} or be linked there:\n\n  {dir}/xtask gpu-report --binaries {dir} --pytorch python3"
    );
    Ok(())
}

/// What cargo says of something that it has built.
#[derive(Deserialize)]
struct Message {
    reason: String,
    executable: Option<PathBuf>,
}

/// Runs cargo, and returns the programs that are built by it.
fn build(arguments: &str) -> Result<Vec<PathBuf>> {
    let mut process = cargo()
        .args(arguments.split_whitespace())
        .arg("--message-format=json-render-diagnostics")
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let messages = process.stdout.take().context("a piped stdout is there")?;
    let mut programs = Vec::new();
    for line in BufReader::new(messages).lines() {
        programs.extend(program_of(&line?)?);
    }
    let status = process.wait()?;
    if !status.success() {
        bail!("`cargo {arguments}` ended with {status}: see above");
    }
    ensure!(!programs.is_empty(), "`cargo {arguments}` built no program");
    Ok(programs)
}

fn program_of(line: &str) -> Result<Option<PathBuf>> {
    let message: Message =
        serde_json::from_str(line).with_context(|| format!("cargo said {line:?}"))?;
    let is_artifact = message.reason == "compiler-artifact";
    Ok(message.executable.filter(|_| is_artifact))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_those_that_cargo_names() {
        let program = r#"{"reason":"compiler-artifact","target":{"name":"a"},"executable":"/target/debug/a"}"#;
        assert_eq!(program_of(program).unwrap(), Some("/target/debug/a".into()));
        let library = r#"{"reason":"compiler-artifact","executable":null}"#;
        assert_eq!(program_of(library).unwrap(), None);
        let end = r#"{"reason":"build-finished","success":true}"#;
        assert_eq!(program_of(end).unwrap(), None);
        assert!(program_of("warning").is_err());
    }
}
