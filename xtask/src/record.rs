//! The folder that a measurement is recorded in: what was found, on what machine, from what commit.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use trainer::{Environment, Program, write_atomically};

use crate::workspace::repository;

/// This process' own, with a command that names no path of the machine.
pub(crate) fn environment(threads: usize) -> Environment {
    let program = Program {
        name: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        sources: env!("CARGO_MANIFEST_DIR"),
    };
    let mut environment = Environment::capture(program, "cpu", threads, 0);
    // Records are committed: a path on somebody's machine says nothing there.
    let command = std::mem::take(&mut environment.command);
    environment.command = recorded_command(command.into_iter().skip(1));
    environment
}

/// Flags that take a path, and what stands in a record in its place.
const PATHS: [(&str, &str); 4] = [
    ("--pytorch", "PYTHON"),
    ("--out", "DIR"),
    ("--binaries", "DIR"),
    ("--accuracy", "DIR"),
];

fn recorded_command(arguments: impl Iterator<Item = String>) -> Vec<String> {
    let mut command = vec!["cargo".to_string(), "xtask".to_string()];
    for argument in arguments {
        let flag = command.last().map(String::as_str);
        let after = PATHS.iter().find(|(path, _)| flag == Some(path));
        let within = argument.split_once('=');
        let within = within.and_then(|(flag, _)| PATHS.iter().find(|(path, _)| *path == flag));
        command.push(match (after, within) {
            (Some((_, placeholder)), _) => placeholder.to_string(),
            (None, Some((flag, placeholder))) => format!("{flag}={placeholder}"),
            (None, None) => argument,
        });
    }
    command
}

/// The folder of the record, checked before the minutes of measuring: nothing is overwritten.
pub(crate) fn new_directory(
    given: Option<PathBuf>,
    subject: &str,
    environment: &Environment,
) -> Result<PathBuf> {
    if let Some(out) = given {
        ensure!(
            !out.exists(),
            "{} exists already; name a new folder",
            out.display()
        );
        return Ok(out);
    }
    let date = environment.time.to_string();
    let date = date.split('T').next().unwrap_or_default();
    let model = environment.cpu_model.as_deref().unwrap_or("unknown cpu");
    let machine = slug(&format!("{model} {} threads", environment.threads));
    let results = repository().join("results");
    let name = format!("{date}-{subject}-{machine}");
    let repeated = (2..).map(|n| format!("{name}-{n}"));
    let mut candidates = std::iter::once(name.clone())
        .chain(repeated)
        .map(|n| results.join(n));
    candidates
        .find(|path| !path.exists())
        .context("no free folder name")
}

/// `Intel(R) Xeon(R) Processor @ 2.50GHz` → `intel-xeon-processor-2-50ghz`
fn slug(text: &str) -> String {
    let text = text.replace("(R)", "").replace("(TM)", "").to_lowercase();
    let words = text.split(|c: char| !c.is_ascii_alphanumeric());
    words
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join("-")
}

/// The command and the commit of a measurement, as a record's first line says them.
pub(crate) fn origin(environment: &Environment) -> String {
    let changes = match environment.git_dirty {
        Some(true) => " with changes",
        _ => "",
    };
    format!(
        "`{}`, commit {}{changes}",
        environment.command.join(" "),
        environment.git_commit.as_deref().unwrap_or("unknown"),
    )
}

pub(crate) fn processor(environment: &Environment) -> &str {
    environment
        .cpu_model
        .as_deref()
        .unwrap_or("unknown processor")
}

/// Writes the record into `out`, over an earlier state of the same: `numbers` is a file's name and what it holds. Whoever is killed
/// meanwhile leaves each file whole.
pub(crate) fn write<T: Serialize + ?Sized>(
    out: &Path,
    readme: &str,
    numbers: (&str, &T),
    environment: &Environment,
) -> Result<()> {
    let json = |text: serde_json::Result<String>| text.map(|text| text + "\n");
    let files = [
        ("README.md", readme.to_string()),
        (numbers.0, json(serde_json::to_string_pretty(numbers.1))?),
        (
            "environment.json",
            json(serde_json::to_string_pretty(environment))?,
        ),
    ];
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    for (name, text) in files {
        write_atomically(&out.join(name), text.as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_names_no_path_of_its_machine() {
        let command =
            |words: &[&str]| recorded_command(words.iter().map(|w| w.to_string())).join(" ");
        assert_eq!(
            command(&[
                "bench",
                "train-step",
                "--pytorch",
                "/home/a/python",
                "--rounds",
                "5"
            ]),
            "cargo xtask bench train-step --pytorch PYTHON --rounds 5"
        );
        assert_eq!(
            command(&["--pytorch=/home/a/python", "--out", "/home/a/b"]),
            "cargo xtask --pytorch=PYTHON --out DIR"
        );
        for (flag, placeholder) in PATHS {
            assert_eq!(
                command(&[&format!("{flag}=/home/a"), flag, "/home/b", "--rounds=2"]),
                format!("cargo xtask {flag}={placeholder} {flag} {placeholder} --rounds=2")
            );
        }
    }

    #[test]
    fn a_machine_becomes_a_folder_name() {
        let name = slug("Intel(R) Xeon(R) Processor @ 2.50GHz 2 threads");
        assert_eq!(name, "intel-xeon-processor-2-50ghz-2-threads");
    }

    #[test]
    fn a_file_of_the_record_is_replaced_as_a_whole_or_stays() {
        let folder = tempfile::tempdir().unwrap();
        let record = folder.path().join("record");
        let numbers = ("report.json", &[1, 2]);
        for readme in ["earlier", "later"] {
            write(&record, readme, numbers, &environment(1)).unwrap();
        }
        let readme = record.join("README.md");
        assert_eq!(fs::read_to_string(&readme).unwrap(), "later");
        assert_eq!(fs::read_dir(&record).unwrap().count(), 3);
        // What cannot be written whole replaces nothing.
        fs::create_dir(record.join(".README.md.tmp")).unwrap();
        let error = write(&record, "last", numbers, &environment(1)).unwrap_err();
        assert!(error.to_string().contains("README.md"), "{error}");
        assert_eq!(fs::read_to_string(&readme).unwrap(), "later");
    }

    #[test]
    fn a_given_folder_that_exists_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error =
            new_directory(Some(folder.path().into()), "train-step", &environment(1)).unwrap_err();
        assert!(error.to_string().contains("exists already"), "{error}");
    }
}
