//! The CUDA tests: which are run, and what came of them.

use std::ffi::OsStr;
use std::fs::{self, DirEntry};
use std::io;
use std::path::{self, Path};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::gpu;
use crate::workspace::cargo;

/// Cargo's arguments: the tests of the packages that compute on a GPU, and those of the programs that are about it. A test that
/// fails keeps no other from being run.
pub(super) const TESTS: [&str; 2] = [
    "test --no-fail-fast --features cuda --lib --tests --package candle-cnn --package inception-model --package trainer",
    "test --no-fail-fast --features cuda --package scratch-train --package finetune-full --package predict --test cuda",
];

/// The variable by which tests are told where the programs are that they start: `test_support::TESTED_PROGRAMS`.
const TESTED_PROGRAMS: &str = "TESTED_PROGRAMS";

/// What the tests said.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Outcome {
    /// In words.
    pub(super) counted: String,
    /// The names of those that failed.
    pub(super) failed: Vec<String>,
    /// Commands of which a program ended before its tests' end.
    pub(super) broken_off: Vec<String>,
    pub(super) found_no_gpu: bool,
}

/// Builds them, so that it counts for no time limit.
pub(super) fn build() -> Result<()> {
    for arguments in TESTS {
        let status = cargo()
            .args(arguments.split(' '))
            .arg("--no-run")
            .status()
            .context("cannot start cargo")?;
        ensure!(
            status.success(),
            "the tests cannot be built for CUDA: see above"
        );
    }
    Ok(())
}

/// Runs those that `build` built, or the programs in a folder; all that they print is kept in the file `log`.
pub(super) fn run(binaries: Option<&Path>, log: &Path) -> Result<Outcome> {
    let (mut text, mut broken_off) = (String::new(), Vec::new());
    for mut command in commands(binaries)? {
        let name = name_of(&command);
        let heading = format!("Tests of {name}\n");
        eprint!("{heading}");
        text += &heading;
        let output = gpu::in_order(&mut command)
            // A test must not pass because it found no device.
            .env("CUDA_TESTS_MUST_RUN", "1")
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("cannot start {command:?}"))?;
        let printed = String::from_utf8_lossy(&output.stdout);
        print!("{printed}");
        text += &printed;
        if !output.status.success() && is_broken_off(&printed) {
            broken_off.push(name);
        }
    }
    let parent = log.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent)
        .and_then(|()| fs::write(log, &text))
        .with_context(|| format!("cannot write {}", log.display()))?;
    Ok(Outcome {
        broken_off,
        ..read(&text)
    })
}

/// The program's name without its folder, and its arguments.
fn name_of(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name();
    let words = program.into_iter().chain(command.get_args());
    let words: Vec<_> = words.map(OsStr::to_string_lossy).collect();
    words.join(" ")
}

/// Of cargo, or the programs of tests in a folder.
fn commands(binaries: Option<&Path>) -> Result<Vec<Command>> {
    let Some(programs) = binaries else {
        let of_cargo = |arguments: &str| {
            let mut command = cargo();
            command.args(arguments.split(' '));
            command
        };
        return Ok(TESTS.map(of_cargo).into());
    };
    let programs = path::absolute(programs)?;
    let dir = programs.join("tests");
    let entries = fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let of_program = |entry: io::Result<DirEntry>| {
        let mut command = Command::new(entry?.path());
        command.env(TESTED_PROGRAMS, &programs);
        Ok(command)
    };
    entries.map(of_program).collect()
}

/// Whether a program of tests began and did not come to its result, or none began at all.
fn is_broken_off(text: &str) -> bool {
    let lines = |start: &str| text.lines().filter(|line| line.starts_with(start)).count();
    let begun = lines("running ");
    begun == 0 || begun > lines("test result:")
}

/// Sums up the lines `test result: …`, and takes the names from those like `test NAME ... FAILED`.
fn read(text: &str) -> Outcome {
    let (mut passed, mut failed) = (0, 0);
    let mut names = Vec::new();
    for line in text.lines() {
        let name = line.strip_prefix("test ");
        if let Some(name) = name.and_then(|line| line.strip_suffix(" ... FAILED")) {
            names.push(name.to_string());
        }
        if !line.starts_with("test result:") {
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        for pair in words.windows(2) {
            let number = pair[0].parse().unwrap_or(0);
            match pair[1] {
                "passed;" => passed += number,
                "failed;" => failed += number,
                _ => {}
            }
        }
    }
    Outcome {
        counted: format!("{passed} passed, {failed} failed"),
        failed: names,
        broken_off: Vec::new(),
        found_no_gpu: text.contains("skipped: CUDA"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_of_a_pack_are_told_where_its_programs_are() {
        assert_eq!(TESTED_PROGRAMS, test_support::TESTED_PROGRAMS);
        let dir = tempfile::tempdir().unwrap();
        let tests = dir.path().join("tests");
        fs::create_dir(&tests).unwrap();
        fs::write(tests.join("cuda-1"), "").unwrap();
        let commands = commands(Some(dir.path())).unwrap();
        let [command] = &commands[..] else {
            panic!("{commands:?}");
        };
        assert_eq!(command.get_program(), tests.join("cuda-1"));
        assert_eq!(name_of(command), "cuda-1");
        let told = (TESTED_PROGRAMS.as_ref(), Some(dir.path().as_os_str()));
        assert_eq!(command.get_envs().collect::<Vec<_>>(), [told]);
    }

    #[test]
    fn tests_are_counted_and_those_that_failed_are_named() {
        let text = "running 3 tests\ntest a::b ... ok\ntest a::c ... FAILED\n\
                    test result: FAILED. 5 passed; 1 failed; 0 ignored\ntest result: ok. 2 passed; 0 failed;";
        let outcome = read(text);
        assert_eq!(outcome.counted, "7 passed, 1 failed");
        assert_eq!(outcome.failed, ["a::c"]);
        assert!(!outcome.found_no_gpu);
        assert!(read("skipped: CUDA cannot be used").found_no_gpu);
    }

    #[test]
    fn a_program_that_dies_is_told_from_one_whose_tests_fail() {
        let whole = "running 1 test\ntest a ... FAILED\ntest result: FAILED. 0 passed; 1 failed;\n";
        assert!(!is_broken_off(whole));
        assert!(is_broken_off(&format!(
            "{whole}running 2 tests\ntest b ... ok\n"
        )));
        assert!(is_broken_off(""));
    }
}
