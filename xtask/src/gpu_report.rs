//! `cargo xtask gpu-report`: everything that has to be shown on a GPU, in one command and one record.

mod accuracy;
mod gpu;
mod pack;
mod parity;
mod runs;
mod speed;
mod suite;
mod table;
mod work;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use self::accuracy::{Outcome, pytorch_lesson};
use self::gpu::Gpu;
use self::parity::Parity;
use self::runs::Runs;
use self::speed::{Plan, Round};
use self::table::summary;
use self::work::{
    PYTORCH_ACCURACY, ROW_NAMES, ROWS, Row, SEEDS, accuracy_claims, needs_of_ours, those_that_fit,
};
use crate::bench::pytorch;
use crate::record;
use crate::workspace::{cargo, repository};

/// Run the CUDA tests, compare CPU and GPU, time us beside PyTorch, and record it all
///
/// Needs a GPU with its driver, CUDA with nvcc (or programs built elsewhere, see --binaries), and for the other half of the
/// table a PyTorch that was built for CUDA. Takes ten minutes and more, without --accuracy.
#[derive(Debug, clap::Args)]
pub(crate) struct GpuReport {
    /// Python that can import torch [default: python3, if it can; else only our side is timed]
    #[arg(long, value_name = "PYTHON")]
    pytorch: Option<PathBuf>,
    /// Folder with scratch-train, finetune-full, finetune-frozen and predict, and with tests/ of programs that
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
    /// Also train the lesson's 7 epochs on CIFAR-10 in this folder (the Hub's parquet files), ours and PyTorch
    #[arg(long, value_name = "DIR")]
    accuracy: Option<PathBuf>,
    /// Seeds of these trainings, from 0 on. Means are compared only where three of each side end; as some diverge, ask for more
    #[arg(long, value_name = "N", default_value_t = SEEDS, value_parser = clap::value_parser!(u32).range(1..), requires = "accuracy")]
    seeds: u32,
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
    /// The device as our programs describe it, and PyTorch's versions.
    versions: Versions,
    tests: Option<String>,
    parity: Vec<Parity>,
    rows: BTreeMap<String, Vec<Round>>,
    /// By seed.
    accuracy: BTreeMap<u32, Outcome>,
    pytorch_accuracy: BTreeMap<u32, Outcome>,
    /// What failed, in words.
    failures: Vec<String>,
    /// What our programs warned of, and in which run.
    warnings: Vec<String>,
    /// What was not begun, and why.
    left_out: Vec<String>,
}

/// What decides a comparison beside the GPU.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Versions {
    ours: Option<String>,
    pytorch: Option<String>,
}

pub(crate) fn run(arguments: &GpuReport) -> Result<()> {
    if let Some(dir) = &arguments.pack {
        return pack::pack(dir);
    }
    let begin = Instant::now();
    let gpu = gpu::find()?;
    // Tests and scripts are looked for where this program was built.
    ensure!(
        repository().join("tools/pytorch").is_dir(),
        "this program was built in {0}, and the repository is not there: link it, as by `ln -s \"$PWD\" {0}`",
        repository().display()
    );
    eprintln!(
        "GPU: {}, driver {}, {}, compute capability {}",
        gpu.name, gpu.driver, gpu.memory, gpu.compute_capability
    );
    let mut environment =
        record::environment(std::thread::available_parallelism().map_or(1, |n| n.get()));
    environment.device = gpu.name.clone();
    let out = record::new_directory(arguments.out.clone(), "gpu", &environment)?;
    let python = arguments.python()?;
    let work = out.join("runs");
    fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    // To build takes minutes, which are not those of the GPU.
    let before = begin.elapsed();
    let programs = match &arguments.binaries {
        Some(dir) => dir.clone(),
        None => build(arguments.skip_tests)?,
    };
    let within =
        |minutes| Instant::now() + Duration::from_secs(60 * minutes).saturating_sub(before);
    let mut session = Session {
        arguments,
        runs: Runs {
            programs: &programs,
            work: &work,
            logs: &out.join("logs"),
            rehearse: arguments.rehearse,
            skip_other_ways: arguments.skip_other_ways,
            warnings: RefCell::default(),
            device: RefCell::default(),
            end: arguments.within.map(within),
        },
        report: Report {
            gpu,
            rehearsed: arguments.rehearse,
            ..Report::default()
        },
        python,
        out: &out,
        environment,
    };
    session.tests()?;
    session.parity()?;
    session.rows()?;
    session.accuracy()?;
    // Where nothing failed, it is empty.
    let _ = fs::remove_dir(&work);
    let report = &session.report;
    print!("{}", summary(report));
    println!("\nRecorded in {}", out.display());
    ensure!(
        report.failures.is_empty(),
        "{} part(s) of the report failed: {}",
        report.failures.len(),
        report.failures.join("; ")
    );
    Ok(())
}

/// A report in the making. After each part it is written, so that a failure later loses nothing.
struct Session<'a> {
    arguments: &'a GpuReport,
    runs: Runs<'a>,
    report: Report,
    python: Option<PathBuf>,
    out: &'a Path,
    environment: trainer::Environment,
}

impl Session<'_> {
    fn tests(&mut self) -> Result<()> {
        let what = "the tests";
        if self.arguments.skip_tests || !self.runs.has_time(&mut self.report, what, TESTS) {
            return Ok(());
        }
        let binaries = self.arguments.binaries.as_deref();
        let log = self.runs.logs.join("tests.log");
        attempt(&mut self.report, what, |report| {
            let outcome = suite::run(binaries, &log)?;
            ensure!(
                !outcome.found_no_gpu,
                "the tests found no GPU: {}",
                outcome.counted
            );
            report.tests = Some(outcome.counted);
            let failed = outcome.failed.into_iter();
            report
                .failures
                .extend(failed.map(|name| format!("the test {name}")));
            let broken = outcome.broken_off.into_iter();
            let broken = broken.map(|command| format!("{command} ended before its tests' end"));
            report.failures.extend(broken);
            Ok(())
        });
        self.write()
    }

    fn parity(&mut self) -> Result<()> {
        let what = "the parity of CPU and GPU";
        if self.arguments.skip_parity || !self.runs.has_time(&mut self.report, what, PARITY) {
            return Ok(());
        }
        self.runs.parity(&mut self.report);
        self.write()
    }

    fn rows(&mut self) -> Result<()> {
        let rounds = match self.arguments.rehearse {
            true => 1,
            false => self.arguments.rounds,
        };
        let rows = self.arguments.rows();
        let accuracy = match self.arguments.accuracy {
            Some(_) => accuracy_claims(self.arguments.seeds, self.pytorch_takes()),
            None => Duration::ZERO,
        };
        for (index, row) in rows.iter().enumerate() {
            eprintln!("{}: {}", row.name, row.what);
            let python = self.python.as_deref();
            // What comes later has a claim to its time before this row has one to another round.
            let later = rows[index + 1..].iter();
            let later: Duration = later.map(|row| row.takes(python.is_some())).sum();
            let later = later + accuracy;
            let plan = Plan { rounds, later };
            attempt(&mut self.report, row.name, |report| {
                self.runs.row(row, python, plan, report)
            });
            self.write()?;
        }
        Ok(())
    }

    /// About what PyTorch takes for the accuracy of a seed.
    fn pytorch_takes(&self) -> Duration {
        match self.python {
            Some(_) => PYTORCH_ACCURACY,
            None => Duration::ZERO,
        }
    }

    /// One after the other: which engines are the fastest depends on what else the GPU does.
    fn accuracy(&mut self) -> Result<()> {
        let Some(data) = &self.arguments.accuracy else {
            return Ok(());
        };
        let seeds = self.arguments.seeds;
        for seed in 0..seeds {
            let what = format!("the accuracy of seed {seed}");
            let needs = needs_of_ours(seed, self.pytorch_takes());
            if !self.runs.has_time(&mut self.report, &what, needs) {
                continue;
            }
            attempt(&mut self.report, &what, |report| {
                let outcome = self.runs.accuracy(data, seed)?;
                say("ours", seed, outcome);
                report.accuracy.insert(seed, outcome);
                Ok(())
            });
            self.write()?;
        }
        self.pytorch_accuracy(data)
    }

    /// Of as many seeds as there is time for: one process trains them all, so that it compiles once.
    fn pytorch_accuracy(&mut self, data: &Path) -> Result<()> {
        let Some(python) = &self.python else {
            return Ok(());
        };
        let asked = self.arguments.seeds;
        let seeds = those_that_fit(asked, self.runs.time_left(), PYTORCH_ACCURACY);
        for seed in seeds..asked {
            let what = format!("PyTorch's accuracy of seed {seed}");
            self.report.leave_out_for_want_of_time(&what);
        }
        let (out, environment) = (self.out, &self.environment);
        if seeds > 0 {
            attempt(&mut self.report, "PyTorch's accuracy", |report| {
                pytorch_lesson(python, data, seeds, |trained| {
                    let outcome = trained.outcome()?;
                    say("PyTorch's", trained.seed, outcome);
                    report.pytorch_accuracy.insert(trained.seed, outcome);
                    report.versions.pytorch.get_or_insert(trained.framework);
                    write(out, report, environment)
                })
            });
        }
        self.write()
    }

    fn write(&mut self) -> Result<()> {
        let warnings = self.runs.warnings.get_mut();
        self.report.warnings.append(warnings);
        self.report
            .versions
            .ours
            .clone_from(self.runs.device.get_mut());
        write(self.out, &self.report, &self.environment)
    }
}

/// About what parts take on an H100 or H200.
const TESTS: Duration = Duration::from_secs(150);
const PARITY: Duration = Duration::from_secs(90);

impl GpuReport {
    /// The Python of PyTorch's sides, if there is one. What it needs is asked before anything is measured.
    fn python(&self) -> Result<Option<PathBuf>> {
        if self.rehearse || (self.skip_timing && self.accuracy.is_none()) {
            return Ok(None);
        }
        let mut packages = vec!["torch"];
        let rows = self.rows();
        packages.extend(
            rows.iter()
                .any(|row| row.model == "torchvision")
                .then_some("torchvision"),
        );
        if self.accuracy.is_some() {
            packages.extend(["numpy", "PIL", "pyarrow"]);
        }
        let script = format!(
            "import {}\nif not torch.cuda.is_available(): raise SystemExit('PyTorch finds no GPU')",
            packages.join(", ")
        );
        pytorch(self.pytorch.as_deref(), &script)
    }

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

    /// Notes that a part was not begun, since it would probably not have ended in time.
    fn leave_out_for_want_of_time(&mut self, part: &str) {
        eprintln!("left out, for want of time: {part}");
        self.left_out.push(format!("{part} (for want of time)"));
    }
}

/// Does one part of the report. Its failure is recorded and does not keep the others from being done.
fn attempt(report: &mut Report, part: &str, f: impl FnOnce(&mut Report) -> Result<()>) {
    if let Err(error) = f(report) {
        report.fail(part, &error);
    }
}

/// Says what came of a training, long before the record is read.
fn say(whose: &str, seed: u32, outcome: Outcome) {
    eprintln!("test accuracy in %, {whose}, seed {seed}: {outcome}");
}

/// Builds the experiments, and the tests unless they are left out, and says where the experiments are.
fn build(skip_tests: bool) -> Result<PathBuf> {
    let status = cargo()
        .args(["build", "--features", "cuda", "--package", "scratch-train"])
        .args(["--package", "finetune-full", "--package", "finetune-frozen"])
        .status()
        .context("cannot start cargo")?;
    ensure!(
        status.success(),
        "the programs cannot be built for CUDA: see above, and CONTRIBUTING.md for what it needs"
    );
    if !skip_tests {
        suite::build()?;
    }
    let target = std::env::var_os("CARGO_TARGET_DIR");
    let target = target.map_or_else(|| repository().join("target"), PathBuf::from);
    Ok(target.join("debug"))
}

fn versions(versions: &Versions) -> String {
    let sides = [("Ours", &versions.ours), ("PyTorch", &versions.pytorch)];
    let known = sides
        .into_iter()
        .filter_map(|(side, said)| Some((side, said.as_ref()?)));
    let lines: String = known
        .map(|(side, said)| format!("- {side}: {said}\n"))
        .collect();
    match lines.is_empty() {
        true => lines,
        false => lines + "\n",
    }
}

const REHEARSED: &str = "**A rehearsal**, of a few steps of a few pictures: every part runs, and speeds mean nothing.\n\n";

fn write(out: &Path, report: &Report, environment: &trainer::Environment) -> Result<()> {
    let readme = format!(
        "# CUDA on {}\n\n{}, driver {}, {}\n\n{}{}{}\n\
         Our speed is that of a run's second epoch, data and logging included; PyTorch's that of steps on one batch that is\n\
         on the GPU already. Sides take turns; ratios are of the same round, as the median of the rounds: above 1 we are faster.\n\
         Memory is the most that nvidia-smi showed beyond what was taken before; it is looked at in the first of our runs of a row, which\n\
         it may slow down a little. Each number is in `report.json`, the\n\
         machine in `environment.json`.\n",
        report.gpu.name,
        record::origin(environment),
        report.gpu.driver,
        report.gpu.memory,
        versions(&report.versions),
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
}
