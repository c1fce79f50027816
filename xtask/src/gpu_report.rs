//! `cargo xtask gpu-report`: everything that has to be shown on a GPU, in one command and one record.

mod pack;
mod runs;
mod table;
mod work;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use self::runs::{Parity, Round, Runs, pytorch_accuracy};
use self::table::summary;
use self::work::{ROW_NAMES, ROWS, Row, SEEDS};
use crate::bench::{pytorch, repository};
use crate::record;

/// Run the CUDA tests, compare CPU and GPU, time us beside PyTorch, and record it all
///
/// Needs a GPU with its driver, CUDA with nvcc (or programs built elsewhere, see --binaries), and for the other half of the
/// table a PyTorch that was built for CUDA. Takes ten minutes and more, without --accuracy.
#[derive(Debug, clap::Args)]
pub(crate) struct GpuReport {
    /// Python that can import torch [default: python3, if it can; else only our side is timed]
    #[arg(long, value_name = "PYTHON")]
    pytorch: Option<PathBuf>,
    /// Folder with scratch-train, finetune-full and finetune-frozen, and with tests/ of programs that
    /// test, all built with --features cuda, as by --pack [default: builds them]
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
    /// Only build what --binaries takes, and this program, into a folder that must not exist yet: for a GPU's machine that
    /// builds nothing. Needs no GPU
    #[arg(long, value_name = "DIR", exclusive = true)]
    pack: Option<PathBuf>,
    /// Time only this kind of work; may be given several times, in the order in which they are timed [default: all]
    #[arg(long, value_name = "NAME", value_parser = ROW_NAMES)]
    row: Vec<String>,
    /// Begin nothing that would probably end later than so many minutes from now, and say what was left out
    #[arg(long, value_name = "MINUTES", value_parser = clap::value_parser!(u64).range(1..))]
    within: Option<u64>,
    /// Rounds of each row; each side runs once in each
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Also train the lesson's 7 epochs on CIFAR-10 in this folder (the Hub's parquet files), with seeds 0 to 2, ours and PyTorch
    #[arg(long, value_name = "DIR")]
    accuracy: Option<PathBuf>,
    /// Leave the tests out
    #[arg(long)]
    skip_tests: bool,
    /// Leave out that CPU and GPU are compared
    #[arg(long)]
    skip_parity: bool,
    /// Leave out all timing
    #[arg(long, conflicts_with = "row")]
    skip_timing: bool,
    /// Time us as the programs run by default alone, not by planes and on one stream too, which takes half a minute a row
    #[arg(long)]
    skip_other_ways: bool,
    /// Try out that every part runs: a few steps of a few pictures each, no PyTorch, and figures that mean nothing
    #[arg(long, conflicts_with_all = ["pytorch", "accuracy"])]
    rehearse: bool,
    /// Where the record goes; must not exist yet [default: `results/DATE-gpu-MACHINE`]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// What the report found out.
#[derive(Debug, Default, Serialize)]
struct Report {
    gpu: Gpu,
    rehearsed: bool,
    tests: Option<String>,
    parity: Vec<Parity>,
    rows: BTreeMap<String, Vec<Round>>,
    /// In percent, by seed.
    accuracy: BTreeMap<u32, f64>,
    pytorch_accuracy: BTreeMap<u32, f64>,
    /// What failed, in words.
    failures: Vec<String>,
    /// What our programs warned of, and in which run.
    warnings: Vec<String>,
    /// What was not begun, for want of time.
    left_out: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Gpu {
    name: String,
    driver: String,
    memory: String,
}

pub(crate) fn run(arguments: &GpuReport) -> Result<()> {
    let begin = Instant::now();
    if let Some(dir) = &arguments.pack {
        return pack::pack(dir);
    }
    let gpu = find_gpu()?;
    // Tests and scripts are looked for where this program was built.
    ensure!(
        repository().join("tools/pytorch").is_dir(),
        "this program was built in {0}, and the repository is not there: link it, as by `ln -s \"$PWD\" {0}`",
        repository().display()
    );
    eprintln!("GPU: {}, driver {}, {}", gpu.name, gpu.driver, gpu.memory);
    let mut environment =
        record::environment(std::thread::available_parallelism().map_or(1, |n| n.get()));
    environment.device = gpu.name.clone();
    let out = record::new_directory(arguments.out.clone(), "gpu", &environment)?;
    let python = match arguments.rehearse {
        true => None,
        false => pytorch(arguments.pytorch.as_deref())?,
    };
    let work = out.join("runs");
    fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    let mut report = Report {
        gpu,
        rehearsed: arguments.rehearse,
        ..Report::default()
    };
    let programs = match &arguments.binaries {
        Some(dir) => dir.clone(),
        None => build()?,
    };
    let runs = Runs {
        programs: &programs,
        work: &work,
        logs: &out.join("logs"),
        rehearse: arguments.rehearse,
        skip_other_ways: arguments.skip_other_ways,
        warnings: RefCell::default(),
        end: arguments
            .within
            .map(|minutes| begin + Duration::from_secs(60 * minutes)),
    };
    // After each part, so that a failure later loses nothing.
    let write = |report: &mut Report| {
        report.warnings.append(&mut runs.warnings.borrow_mut());
        write(&out, report, &environment)
    };
    if !arguments.skip_tests && runs.has_time(&mut report, "the tests", TESTS) {
        attempt(&mut report, "the tests", |report| {
            report.tests = Some(tests(arguments.binaries.as_deref())?);
            Ok(())
        });
        write(&mut report)?;
    }
    let rounds = match arguments.rehearse {
        true => 1,
        false => arguments.rounds,
    };
    let parity = "the parity of CPU and GPU";
    if !arguments.skip_parity && runs.has_time(&mut report, parity, PARITY) {
        attempt(&mut report, parity, |report| {
            let parity = runs.parity()?;
            for parity in parity.iter().filter(|parity| !parity.holds()) {
                report
                    .failures
                    .push(format!("{}: beyond the bound", parity.what));
            }
            report.parity = parity;
            Ok(())
        });
        write(&mut report)?;
    }
    for row in arguments.rows() {
        eprintln!("{}: {}", row.name, row.what);
        attempt(&mut report, row.name, |report| {
            runs.row(row, python.as_deref(), rounds, report)
        });
        write(&mut report)?;
    }
    if let Some(data) = &arguments.accuracy {
        for seed in SEEDS {
            if !runs.has_time(
                &mut report,
                &format!("the accuracy of seed {seed}"),
                ACCURACY,
            ) {
                continue;
            }
            attempt(&mut report, "the accuracy", |report| {
                report.accuracy.insert(seed, runs.accuracy(data, seed)?);
                Ok(())
            });
            write(&mut report)?;
        }
        let theirs = "PyTorch's accuracy";
        if let Some(python) = &python
            && runs.has_time(&mut report, theirs, ACCURACY * SEEDS.len() as u32)
        {
            attempt(&mut report, theirs, |report| {
                pytorch_accuracy(python, data, |seed, accuracy| {
                    report.pytorch_accuracy.insert(seed, accuracy);
                    write(report)
                })
            });
            write(&mut report)?;
        }
    }
    let _ = fs::remove_dir_all(&work);
    print!("{}", summary(&report));
    println!("\nRecorded in {}", out.display());
    ensure!(
        report.failures.is_empty(),
        "{} part(s) of the report failed: {}",
        report.failures.len(),
        report.failures.join("; ")
    );
    Ok(())
}

/// About what parts take on an H100.
const TESTS: Duration = Duration::from_secs(90);
const PARITY: Duration = Duration::from_secs(75);
const ACCURACY: Duration = Duration::from_secs(80);

impl GpuReport {
    /// What is to be timed, in this order.
    fn rows(&self) -> Vec<&'static Row> {
        let mut names: Vec<&str> = Vec::new();
        for name in &self.row {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        let named = names.into_iter();
        let named = named.filter_map(|name| ROWS.iter().find(|row| row.name == name));
        match (self.skip_timing, self.row.is_empty()) {
            (true, _) => Vec::new(),
            (false, true) => ROWS.iter().collect(),
            (false, false) => named.collect(),
        }
    }
}

impl Report {
    /// Notes that a part failed.
    fn fail(&mut self, part: &str, error: &anyhow::Error) {
        let failure = format!("{part}: {error:#}");
        eprintln!("failed: {failure}");
        self.failures.push(failure);
    }
}

/// Does one part of the report. Its failure is recorded and does not keep the others from being done.
fn attempt(report: &mut Report, part: &str, f: impl FnOnce(&mut Report) -> Result<()>) {
    if let Err(error) = f(report) {
        report.fail(part, &error);
    }
}

fn find_gpu() -> Result<Gpu> {
    let none = "this machine has no NVIDIA GPU that can be used, and gpu-report shows nothing without one \
                (`cargo xtask cuda-check` needs none)";
    let output = Command::new("nvidia-smi")
        .args([
            "--query-gpu=name,driver_version,memory.total",
            "--format=csv,noheader",
        ])
        .output()
        .with_context(|| format!("{none}: cannot start nvidia-smi"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{none}: nvidia-smi says {:?}", text.trim());
    }
    parse_gpu(&text).with_context(|| format!("{none}: nvidia-smi lists {:?}", text.trim()))
}

/// The first line of nvidia-smi's list.
fn parse_gpu(text: &str) -> Option<Gpu> {
    let mut fields = text
        .lines()
        .next()?
        .split(',')
        .map(|f| f.trim().to_string());
    let gpu = Gpu {
        name: fields.next().filter(|name| !name.is_empty())?,
        driver: fields.next()?,
        memory: fields.next()?,
    };
    Some(gpu)
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(repository());
    command
}

/// Builds the experiments and says where they are.
fn build() -> Result<PathBuf> {
    let status = cargo()
        .args(["build", "--features", "cuda", "--package", "scratch-train"])
        .args(["--package", "finetune-full", "--package", "finetune-frozen"])
        .status()
        .context("cannot start cargo")?;
    ensure!(
        status.success(),
        "the programs cannot be built for CUDA: see above, and CONTRIBUTING.md for what it needs"
    );
    let target = std::env::var_os("CARGO_TARGET_DIR");
    let target = target.map_or_else(|| repository().join("target"), PathBuf::from);
    Ok(target.join("debug"))
}

/// Runs the CUDA tests and counts them.
fn tests(binaries: Option<&Path>) -> Result<String> {
    let mut commands = Vec::new();
    match binaries {
        None => {
            let mut command = cargo();
            command
                .args(["test", "--features", "cuda", "--package", "candle-cnn"])
                .args(["--package", "inception-model", "--package", "trainer"]);
            commands.push(command);
        }
        Some(dir) => {
            let dir = dir.join("tests");
            let entries =
                fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
            for entry in entries {
                commands.push(Command::new(entry?.path()));
            }
        }
    }
    let (mut text, mut success) = (String::new(), true);
    for mut command in commands {
        let output = command
            // A test must not pass because it found no device.
            .env("CUDA_TESTS_MUST_RUN", "1")
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("cannot start {command:?}"))?;
        text += &String::from_utf8_lossy(&output.stdout);
        success &= output.status.success();
    }
    let counted = count_tests(&text);
    print!("{text}");
    ensure!(success, "{counted}: see above");
    ensure!(
        !text.contains("skipped: CUDA"),
        "the tests found no GPU: {counted}"
    );
    Ok(counted)
}

/// Sums up the lines `test result: …`.
fn count_tests(text: &str) -> String {
    let (mut passed, mut failed) = (0, 0);
    for line in text.lines().filter(|line| line.starts_with("test result:")) {
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
    format!("{passed} passed, {failed} failed")
}

const REHEARSED: &str = "**A rehearsal**, of a few steps of a few pictures: every part runs, and speeds mean nothing.\n\n";

fn write(out: &Path, report: &Report, environment: &trainer::Environment) -> Result<()> {
    let readme = format!(
        "# CUDA on {}\n\n{}, driver {}, {}\n\n{}{}\n\
         Our speed is that of a run's second epoch, data and logging included; PyTorch's that of steps on one batch that is\n\
         on the GPU already. Sides take turns; ratios are of the same round, as the median of the rounds: above 1 we are faster.\n\
         Memory is the most that nvidia-smi showed beyond what was taken before; it is looked at in the first of our runs of a row, which\n\
         it may slow down a little. Each number is in `report.json`, the\n\
         machine in `environment.json`.\n",
        report.gpu.name,
        record::origin(environment),
        report.gpu.driver,
        report.gpu.memory,
        if report.rehearsed { REHEARSED } else { "" },
        summary(report),
    );
    record::write(out, &readme, ("report.json", report), environment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_timed_once_in_the_order_in_which_they_are_asked_for() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            report: GpuReport,
        }
        let names = |line: &str| -> Vec<&str> {
            let line = ["x"].into_iter().chain(line.split_whitespace());
            let line = <Line as clap::Parser>::parse_from(line);
            line.report.rows().iter().map(|row| row.name).collect()
        };
        let twice = "--row torchvision-full-32 --row lesson-32 --row torchvision-full-32";
        assert_eq!(names(twice), ["torchvision-full-32", "lesson-32"]);
        assert_eq!(names(""), ROW_NAMES);
        assert!(names("--skip-timing").is_empty());
    }

    #[test]
    fn tests_are_counted_and_the_gpu_is_read() {
        let tests = "test result: ok. 5 passed; 0 failed; 0 ignored\ntest result: FAILED. 2 passed; 1 failed;";
        assert_eq!(count_tests(tests), "7 passed, 1 failed");
        let gpu = parse_gpu("NVIDIA H200, 580.1, 143771 MiB\n").unwrap();
        assert_eq!(
            (gpu.name.as_str(), gpu.driver.as_str()),
            ("NVIDIA H200", "580.1")
        );
        assert_eq!(parse_gpu(""), None);
    }
}
