//! `cargo xtask gpu-report --pack DIR`: what the report runs, for a machine with a GPU that builds nothing.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::cuda_check::nvcc;
use crate::workspace::{cargo, repository};

/// What is built, as arguments of cargo. Tests that compile something themselves are left out.
const PARTS: [&str; 4] = [
    "build --features cuda --package scratch-train --package finetune-full --package finetune-frozen --package predict",
    "test --no-run --features cuda --package candle-cnn --package inception-model --package trainer --lib \
     --test backward --test cuda_conv2d --test cuda_memory --test cuda_static_graph --test pytorch_fixtures \
     --test googlenet_parity --test pytorch_parity --test pytorch_sgd",
    "test --no-run --features cuda --package scratch-train --package finetune-full --package predict --test cuda",
    "build --package xtask",
];

/// Builds it all into a new folder, without debug information.
pub(super) fn pack(dir: &Path) -> Result<()> {
    ensure!(
        !dir.exists(),
        "--pack: {} exists already, and nothing is overwritten",
        dir.display()
    );
    // A program is built with its tests once more.
    let mut programs = BTreeSet::new();
    for arguments in PARTS {
        programs.extend(build(arguments)?);
    }
    let mut bytes = 0;
    let tests = dir.join("tests");
    fs::create_dir_all(&tests).with_context(|| format!("cannot make {}", tests.display()))?;
    for Program { path, copy } in &programs {
        let copy = dir.join(copy);
        let status = Command::new("strip")
            .arg("-o")
            .args([&copy, path])
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
    manifest_path: Option<PathBuf>,
    executable: Option<PathBuf>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Program {
    path: PathBuf,
    /// Where it goes, below the pack's folder.
    copy: PathBuf,
}

/// Runs cargo, and returns the programs that are built by it.
fn build(arguments: &str) -> Result<Vec<Program>> {
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

fn program_of(line: &str) -> Result<Option<Program>> {
    let message: Message =
        serde_json::from_str(line).with_context(|| format!("cargo said {line:?}"))?;
    let executable = message.executable;
    let Some(path) = executable.filter(|_| message.reason == "compiler-artifact") else {
        return Ok(None);
    };
    let name = path.file_name().context("a program without a name")?;
    let name = name.to_string_lossy();
    let manifest = message.manifest_path.unwrap_or_default();
    let package = manifest.parent().and_then(Path::file_name);
    let copy = match message.profile.is_some_and(|profile| profile.test) {
        // Tests of several packages have one name.
        true => {
            let package = package.context("a test without a package")?;
            format!("tests/{}-{name}", package.to_string_lossy())
        }
        false => name.into_owned(),
    };
    Ok(Some(Program {
        copy: copy.into(),
        path,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu_report::suite;

    #[test]
    fn programs_are_those_that_cargo_names() {
        let artifact = |test: &str| {
            let profile = format!(r#"{{"opt_level":"3","test":{test}}}"#);
            let line = format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"/experiments/predict/Cargo.toml","profile":{profile},"executable":"/target/a-1"}}"#
            );
            program_of(&line).unwrap()
        };
        // What cargo builds besides, since the tests start it, is no test.
        for (is_test, copy) in [("true", "tests/predict-a-1"), ("false", "a-1")] {
            let (path, copy) = ("/target/a-1".into(), copy.into());
            assert_eq!(artifact(is_test), Some(Program { path, copy }));
        }
        let library = r#"{"reason":"compiler-artifact","executable":null}"#;
        assert_eq!(program_of(library).unwrap(), None);
        let end = r#"{"reason":"build-finished","success":true}"#;
        assert_eq!(program_of(end).unwrap(), None);
        assert!(program_of("warning").is_err());
    }

    #[test]
    fn a_pack_has_tests_of_all_that_the_report_tests_without_one() {
        let packages = |lines: &[&'static str]| -> BTreeSet<&str> {
            let lines = lines.iter().filter(|line| line.starts_with("test "));
            let words: Vec<&str> = lines.flat_map(|line| line.split_whitespace()).collect();
            let pairs = words.windows(2).filter(|pair| pair[0] == "--package");
            pairs.map(|pair| pair[1]).collect()
        };
        assert_eq!(packages(&PARTS), packages(&suite::TESTS));
        assert!(packages(&PARTS).contains("predict"));
    }
}
