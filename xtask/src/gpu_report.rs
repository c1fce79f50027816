//! `cargo xtask gpu-report`: everything that has to be shown on a GPU, in one command and one record.

mod pack;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::bench::{Side, median, pytorch, repository};
use crate::record;

/// Run the CUDA tests, compare CPU and GPU, time us beside PyTorch, and record it all
///
/// Needs a GPU with its driver, CUDA 13 with nvcc (or programs built elsewhere, see --binaries), and for the other half of the
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
    /// Time only this kind of work; may be given several times [default: all]
    #[arg(long, value_name = "NAME", value_parser = ROW_NAMES)]
    row: Vec<String>,
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

/// One kind of work.
struct Row {
    name: &'static str,
    what: &'static str,
    program: &'static str,
    arguments: &'static [&'static str],
    batch: u32,
    /// Pictures of an epoch of our side.
    images: u32,
    model: &'static str,
    frozen: bool,
    bf16: bool,
    /// Least images/s as a multiple of PyTorch eager's, and of the fastest PyTorch's.
    targets: (Option<f64>, Option<f64>),
}

const ROWS: [Row; 4] = [
    Row {
        name: "lesson-32",
        what: "lesson's net, batch 32, TF32 in convolutions",
        program: "scratch-train",
        arguments: &[],
        batch: 32,
        images: 12_800,
        model: "lesson",
        frozen: false,
        bf16: false,
        targets: (Some(3.0), Some(1.0)),
    },
    Row {
        name: "lesson-512-bf16",
        what: "lesson's net, batch 512, bf16",
        program: "scratch-train",
        arguments: &["--precision", "bf16"],
        batch: 512,
        images: 51_200,
        model: "lesson",
        frozen: false,
        bf16: true,
        targets: (None, Some(1.0)),
    },
    Row {
        name: "torchvision-full-32",
        what: "torchvision's net, 32×32, batch 32",
        program: "finetune-full",
        arguments: &["--weights", "random"],
        batch: 32,
        images: 12_800,
        model: "torchvision",
        frozen: false,
        bf16: false,
        targets: (Some(3.0), None),
    },
    Row {
        name: "torchvision-frozen-32",
        what: "torchvision's net, 32×32, the head alone, batch 32",
        program: "finetune-frozen",
        arguments: &["--weights", "random"],
        batch: 32,
        images: 12_800,
        model: "torchvision",
        frozen: true,
        bf16: false,
        targets: (Some(3.0), None),
    },
];

const ROW_NAMES: [&str; ROWS.len()] = {
    let mut names = [""; ROWS.len()];
    let mut i = 0;
    while i < names.len() {
        names[i] = ROWS[i].name;
        i += 1;
    }
    names
};

const OURS: &str = "ours";
const OURS_BY_PLANES: &str = "ours, --no-channels-last";
const OURS_ON_ONE_STREAM: &str = "ours, --streams 1";
/// Our ways and their flags. All but the first run in one round only.
const WAYS: [(&str, &[&str]); 3] = [
    (OURS, &[]),
    (OURS_BY_PLANES, &["--no-channels-last"]),
    (OURS_ON_ONE_STREAM, &["--streams", "1"]),
];
/// Of the runs whose accuracy is compared.
const SEEDS: [u32; 3] = [0, 1, 2];

const EAGER: &str = "PyTorch, eager";
/// PyTorch's variants and their flags. Work that is held against eager alone has the first only.
const VARIANTS: [(&str, &[&str]); 3] = [
    (EAGER, &[]),
    ("PyTorch, channels_last", &["--layout", "channels_last"]),
    (
        "PyTorch, channels_last, compiled",
        &["--layout", "channels_last", "--compile"],
    ),
];

/// Speed of a side in a round, and the GPU memory that it took beyond what was taken before.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Timing {
    images_per_second: f64,
    gpu_mib: u64,
}

type Round = BTreeMap<String, Timing>;

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
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Gpu {
    name: String,
    driver: String,
    memory: String,
}

/// Two runs of the same steps.
#[derive(Debug, Serialize)]
struct Parity {
    what: String,
    /// Of the losses of all steps.
    largest_relative_difference: f64,
    bound: f64,
    first: Vec<f64>,
    second: Vec<f64>,
}

impl Parity {
    fn new(what: &str, bound: f64, first: Vec<f64>, second: Vec<f64>) -> Result<Self> {
        ensure!(
            !first.is_empty() && first.len() == second.len(),
            "{what}: {} and {} steps cannot be compared",
            first.len(),
            second.len()
        );
        let pairs = first.iter().zip(&second);
        let largest = pairs
            .map(|(a, b)| (a - b).abs() / a.abs().max(f64::MIN_POSITIVE))
            .fold(0.0, |largest: f64, d| {
                if d > largest || d.is_nan() {
                    d
                } else {
                    largest
                }
            });
        Ok(Self {
            what: what.to_string(),
            largest_relative_difference: largest,
            bound,
            first,
            second,
        })
    }

    fn holds(&self) -> bool {
        self.largest_relative_difference <= self.bound
    }
}

pub(crate) fn run(arguments: &GpuReport) -> Result<()> {
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
    let write = |report: &Report| write(&out, report, &environment);
    if !arguments.skip_tests {
        attempt(&mut report, "the tests", |report| {
            report.tests = Some(tests(arguments.binaries.as_deref())?);
            Ok(())
        });
        write(&report)?;
    }
    let runs = Runs {
        programs: &programs,
        work: &work,
        rehearse: arguments.rehearse,
        skip_other_ways: arguments.skip_other_ways,
    };
    let rounds = match arguments.rehearse {
        true => 1,
        false => arguments.rounds,
    };
    if !arguments.skip_parity {
        attempt(&mut report, "the parity of CPU and GPU", |report| {
            let parity = runs.parity()?;
            for parity in parity.iter().filter(|parity| !parity.holds()) {
                report
                    .failures
                    .push(format!("{}: beyond the bound", parity.what));
            }
            report.parity = parity;
            Ok(())
        });
        write(&report)?;
    }
    let is_asked_for = |row: &&Row| {
        let named = arguments.row.is_empty() || arguments.row.iter().any(|name| name == row.name);
        named && !arguments.skip_timing
    };
    for row in ROWS.iter().filter(is_asked_for) {
        eprintln!("{}: {}", row.name, row.what);
        attempt(&mut report, row.name, |report| {
            runs.row(row, python.as_deref(), rounds, report)
        });
        // After each row, so that a failure later loses nothing.
        write(&report)?;
    }
    if let Some(data) = &arguments.accuracy {
        for seed in SEEDS {
            attempt(&mut report, "the accuracy", |report| {
                report.accuracy.insert(seed, runs.accuracy(data, seed)?);
                Ok(())
            });
            write(&report)?;
        }
        if let Some(python) = &python {
            attempt(&mut report, "PyTorch's accuracy", |report| {
                pytorch_accuracy(python, data, |seed, accuracy| {
                    report.pytorch_accuracy.insert(seed, accuracy);
                    write(report)
                })
            });
            write(&report)?;
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

/// Our programs and where they may work.
struct Runs<'a> {
    programs: &'a Path,
    work: &'a Path,
    rehearse: bool,
    skip_other_ways: bool,
}

impl Runs<'_> {
    /// Runs a program to its end; its run directory.
    fn train(&self, program: &str, name: &str, arguments: &[OsString]) -> Result<PathBuf> {
        let out = self.work.join(name);
        let output = Command::new(self.programs.join(program))
            .args(arguments)
            .arg("--out")
            .arg(&out)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .output()
            .with_context(|| format!("cannot start {program}"))?;
        ensure!(
            output.status.success(),
            "{program} failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let runs = out.join(program);
        let mut entries =
            fs::read_dir(&runs).with_context(|| format!("cannot read {}", runs.display()))?;
        let run = entries.next().context("the program made no run")??;
        Ok(run.path())
    }

    /// The losses of the same steps on both devices, and with and without the graph.
    fn parity(&self) -> Result<Vec<Parity>> {
        let pictures = match self.rehearse {
            true => "--train-limit 9 --test-limit 2 --batch-size 2",
            false => "--train-limit 640 --test-limit 100",
        };
        let losses = |name: &str, extra: &str| -> Result<Vec<f64>> {
            let arguments =
                format!("--dataset shapes {pictures} --epochs 1 --seed 3 --lr 1e-7 {extra}");
            let run = self.train("scratch-train", name, &words(&arguments))?;
            let path = run.join("metrics.jsonl");
            let text = fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            step_losses(&text)
        };
        let cpu = losses("parity-cpu", "--device cpu")?;
        let f32 = losses(
            "parity-f32",
            "--device cuda --precision f32 --deterministic",
        )?;
        let eager = losses(
            "parity-eager",
            "--device cuda --precision f32 --deterministic --no-cuda-graph",
        )?;
        let planes = losses(
            "parity-planes",
            "--device cuda --precision f32 --deterministic --no-channels-last",
        )?;
        let default = losses("parity-default", "--device cuda")?;
        let bf16 = losses("parity-bf16", "--device cuda --precision bf16")?;
        // Rounding grows from step to step: at the lesson's rate two instruction sets of a CPU are 1e-1 apart after
        // five steps, at this one 4e-5 after twenty, while the loss falls by half; on the emulated device TF32 sets them
        // 5e-4 apart and bf16 3e-3. The bounds leave room for that and none for a wrong gradient.
        Ok(vec![
            Parity::new(
                match self.rehearse {
                    true => "5 steps of 2 pictures, GPU in f32 against the CPU",
                    false => "20 steps, GPU in f32 against the CPU",
                },
                1e-3,
                cpu.clone(),
                f32.clone(),
            )?,
            Parity::new(
                "the same, GPU in f32 with a plane per channel against the CPU",
                1e-3,
                cpu.clone(),
                planes,
            )?,
            Parity::new(
                "the same, CUDA graph against one operation at a time",
                0.0,
                eager,
                f32,
            )?,
            Parity::new(
                "the same, GPU with TF32 in convolutions against the CPU",
                1e-2,
                cpu.clone(),
                default,
            )?,
            Parity::new("the same, GPU in bf16 against the CPU", 5e-2, cpu, bf16)?,
        ])
    }

    fn row(
        &self,
        row: &Row,
        python: Option<&Path>,
        rounds: u32,
        report: &mut Report,
    ) -> Result<()> {
        let side_of = |name: &str| format!("{}, {name}", row.name);
        // PyTorch's processes live through all rounds, since to compile takes a minute.
        let variants = match row.targets.1 {
            Some(_) => &VARIANTS[..],
            None => &VARIANTS[..1],
        };
        let mut sides = Vec::new();
        for &(name, flags) in variants {
            let Some(python) = python else { break };
            let idle = gpu_mib()?;
            match with_peak_memory(|| pytorch_side(row, python, name, flags)) {
                Ok((side, peak)) => sides.push((name, side, peak.saturating_sub(idle))),
                Err(error) => report.fail(&side_of(name), &error),
            }
        }
        for number in 0..rounds {
            let mut round = Round::new();
            let idle = gpu_mib()?;
            for (name, flags) in WAYS {
                if name != OURS && (number > 0 || self.skip_other_ways) {
                    continue;
                }
                // One way may fail on a GPU where another works.
                match with_peak_memory(|| self.our_speed(row, number, flags)) {
                    Ok((images_per_second, peak)) => {
                        let timing = Timing {
                            images_per_second,
                            gpu_mib: peak.saturating_sub(idle),
                        };
                        round.insert(name.to_string(), timing);
                    }
                    Err(error) => report.fail(&side_of(name), &error),
                }
            }
            for (name, side, gpu_mib) in &mut sides {
                match side.run(row.images / row.batch) {
                    Ok(answer) => {
                        let timing = Timing {
                            images_per_second: answer.images_per_second,
                            gpu_mib: *gpu_mib,
                        };
                        round.insert((*name).to_string(), timing);
                    }
                    Err(error) => report.fail(&side_of(name), &error),
                }
            }
            let text: Vec<String> = round
                .iter()
                .map(|(name, t)| format!("{name} {:.0} images/s", t.images_per_second))
                .collect();
            eprintln!("round {}/{rounds}: {}", number + 1, text.join(", "));
            let kept = report.rows.entry(row.name.to_string()).or_default();
            kept.push(round);
        }
        // What they hold of the GPU must not count for the next row.
        for (name, side, _) in sides {
            if let Err(error) = side.finish() {
                report.fail(&side_of(name), &error);
            }
        }
        Ok(())
    }

    /// Of the second epoch: the first has the warm-up. The rate is small so that no run diverges.
    fn our_speed(&self, row: &Row, number: u32, flags: &[&str]) -> Result<f64> {
        let (images, tests, batch) = match self.rehearse {
            true => (8, 2, 2),
            false => (row.images, 100, row.batch),
        };
        let mut arguments = words(&format!(
            "--device cuda --dataset shapes --train-limit {images} --test-limit {tests} --epochs 2 \
             --batch-size {batch} --lr 1e-7 --eval-every 0 --checkpoint-every 0"
        ));
        arguments.extend(row.arguments.iter().chain(flags).map(OsString::from));
        let name = format!("{}{}-{number}", row.name, flags.concat());
        let run = self.train(row.program, &name, &arguments)?;
        let path = run.join("metrics.csv");
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        last_speed(&text)
    }

    fn accuracy(&self, data: &Path, seed: u32) -> Result<f64> {
        let mut arguments = words(&format!("--device cuda --seed {seed}"));
        arguments.extend(["--data-dir".into(), data.into()]);
        let run = self.train("scratch-train", &format!("accuracy-{seed}"), &arguments)?;
        let path = run.join("finished.json");
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let summary: trainer::Summary = serde_json::from_str(&text)?;
        let test = summary
            .evaluations
            .get("test")
            .context("no test evaluation")?;
        Ok(100.0 * test.accuracy())
    }
}

fn words(text: &str) -> Vec<OsString> {
    text.split_whitespace().map(OsString::from).collect()
}

/// Losses of the steps in `metrics.jsonl`.
fn step_losses(text: &str) -> Result<Vec<f64>> {
    let mut losses = Vec::new();
    for line in text.lines() {
        let metric: trainer::Metric =
            serde_json::from_str(line).with_context(|| format!("no metric: {line:?}"))?;
        if let trainer::Metric::Step { loss, .. } = metric {
            losses.push(f64::from(loss));
        }
    }
    Ok(losses)
}

/// `images_per_second` of the last line of `metrics.csv`.
fn last_speed(text: &str) -> Result<f64> {
    let mut lines = text.lines();
    let header = lines.next().context("metrics.csv is empty")?;
    let column = header
        .split(',')
        .position(|name| name == "images_per_second")
        .context("metrics.csv has no column images_per_second")?;
    let last = lines.last().context("metrics.csv has no epoch")?;
    let value = last.split(',').nth(column).context("a line is too short")?;
    value
        .parse()
        .with_context(|| format!("no number: {value:?}"))
}

/// A process of PyTorch's that has warmed up.
fn pytorch_side(row: &Row, python: &Path, name: &str, flags: &[&str]) -> Result<Side> {
    let mut command = Command::new(python);
    command
        .arg(repository().join("tools/pytorch/bench_train_step.py"))
        .args(["--device", "cuda", "--model", row.model])
        .args(["--batch", &row.batch.to_string()])
        .args(flags);
    if row.frozen {
        command.arg("--frozen");
    }
    if row.bf16 {
        command.args(["--precision", "bf16"]);
    }
    let mut side = Side::start(name, command)?;
    // Chooses algorithms, compiles, and records its graphs.
    side.run(10)?;
    Ok(side)
}

/// Calls `f` with each seed and the accuracy, in percent, of the lesson's 7 epochs by PyTorch, as soon as it is known. By the
/// fastest PyTorch, which computes the same: eager it takes three minutes a seed and more.
fn pytorch_accuracy(
    python: &Path,
    data: &Path,
    mut f: impl FnMut(u32, f64) -> Result<()>,
) -> Result<()> {
    let mut command = Command::new(python);
    command
        .arg(repository().join("tools/pytorch/train_lesson.py"))
        .args(["--device", "cuda", "--compile", "--data-dir"])
        .arg(data)
        .arg("--seed")
        .args(SEEDS.map(|seed| seed.to_string()))
        .stdout(Stdio::piped());
    let mut process = command
        .spawn()
        .with_context(|| format!("cannot start {}", python.display()))?;
    let answers = process.stdout.take().context("a piped stdout is there")?;
    let outcome = BufReader::new(answers).lines().try_for_each(|line| {
        let line = line?;
        let trained: Trained = serde_json::from_str(&line)
            .with_context(|| format!("train_lesson.py answered {line:?}"))?;
        f(trained.seed, trained.accuracy)
    });
    if outcome.is_err() {
        let _ = process.kill();
    }
    let status = process.wait()?;
    outcome?;
    ensure!(status.success(), "train_lesson.py failed: see above");
    Ok(())
}

/// What train_lesson.py prints of a seed.
#[derive(Debug, Deserialize)]
struct Trained {
    seed: u32,
    /// In percent.
    accuracy: f64,
}

/// What all processes hold of the first GPU.
fn gpu_mib() -> Result<u64> {
    let output = Command::new("nvidia-smi")
        .args(["--query-gpu=memory.used", "--format=csv,noheader,nounits"])
        .output()
        .context("cannot start nvidia-smi")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let first = text.lines().next().unwrap_or_default().trim();
    first
        .parse()
        .with_context(|| format!("nvidia-smi says {first:?} of the memory in use"))
}

/// The most that is held of the GPU while `f` runs, looked at five times a second.
fn with_peak_memory<T>(f: impl FnOnce() -> Result<T>) -> Result<(T, u64)> {
    let (done, peak) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                if let Ok(mib) = gpu_mib() {
                    peak.fetch_max(mib, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        let result = f();
        done.store(true, Ordering::Relaxed);
        result
    })
    .map(|value| (value, peak.load(Ordering::Relaxed)))
}

/// Images per second of each side, and how ours compares.
fn summary(report: &Report) -> String {
    let mut text = String::new();
    if let Some(tests) = &report.tests {
        let _ = writeln!(text, "CUDA tests: {tests}.\n");
    }
    if !report.parity.is_empty() {
        text += "| the same steps twice | largest relative difference of the loss | bound | |\n| --- | ---: | ---: | --- |\n";
    }
    for parity in &report.parity {
        let verdict = if parity.holds() { "holds" } else { "**fails**" };
        let _ = writeln!(
            text,
            "| {} | {:.1e} | {:.1e} | {verdict} |",
            parity.what, parity.largest_relative_difference, parity.bound
        );
    }
    text += "\n| work | ours, images/s | ÷ ours by planes | ÷ ours on one stream | ÷ PyTorch eager | ÷ PyTorch's fastest | memory, ours ÷ PyTorch's least | target |\n\
             | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n";
    for row in &ROWS {
        let Some(rounds) = report
            .rows
            .get(row.name)
            .filter(|rounds| !rounds.is_empty())
        else {
            let _ = writeln!(text, "| {} | not measured | | | | | | |", row.what);
            continue;
        };
        let ours = rounds.iter().filter_map(|round| round.get(OURS));
        let ours: Vec<f64> = ours.map(|timing| timing.images_per_second).collect();
        if ours.is_empty() {
            let _ = writeln!(text, "| {} | failed | | | | | | |", row.what);
            continue;
        }
        let [planes, one_stream] = [OURS_BY_PLANES, OURS_ON_ONE_STREAM]
            .map(|way| ratio(rounds, |round| Some(round.get(way)?.images_per_second)));
        let eager = ratio(rounds, |round| Some(round.get(EAGER)?.images_per_second));
        // Where nothing but eager was timed, that is not PyTorch's fastest.
        let fastest = row.targets.1.and_then(|_| {
            ratio(rounds, |round| {
                others(round).map(|t| t.images_per_second).reduce(f64::max)
            })
        });
        let memory = rounds.last().and_then(|round| {
            let least = others(round).map(|t| t.gpu_mib).min()?;
            Some((round.get(OURS)?.gpu_mib, least))
        });
        let memory_ratio = memory.map(|(ours, least)| ours as f64 / least as f64);
        let memory = memory
            .zip(memory_ratio)
            .map(|((ours, least), ratio)| format!("{ratio:.2} ({ours} of {least} MiB)"));
        let show = |ratio: Option<f64>| ratio.map(|r| format!("{r:.2}")).unwrap_or_default();
        let _ = writeln!(
            text,
            "| {} | {:.0} | {} | {} | {} | {} | {} | {} |",
            row.what,
            median(&ours),
            show(planes),
            show(one_stream),
            show(eager),
            show(fastest),
            memory.unwrap_or_default(),
            verdict(row.targets, (eager, fastest), memory_ratio),
        );
    }
    text += &accuracies(report);
    for failure in &report.failures {
        let _ = writeln!(text, "\nFailed: {failure}.");
    }
    text
}

/// The accuracy of each seed, ours and PyTorch's, and how far the means are apart, where both have all seeds.
fn accuracies(report: &Report) -> String {
    /// Percentage points, either way.
    const TARGET: f64 = 2.0;
    let (ours, other) = (&report.accuracy, &report.pytorch_accuracy);
    if ours.is_empty() && other.is_empty() {
        return String::new();
    }
    let mut text = "\n| test accuracy after the lesson's 7 epochs, % | ours | PyTorch |\n| --- | ---: | ---: |\n".to_string();
    let show = |accuracy: Option<&f64>| accuracy.map(|a| format!("{a:.2}")).unwrap_or_default();
    for seed in SEEDS {
        let [ours, other] = [ours, other].map(|of| show(of.get(&seed)));
        let _ = writeln!(text, "| seed {seed} | {ours} | {other} |");
    }
    let both = SEEDS.map(|seed| Some((*ours.get(&seed)?, *other.get(&seed)?)));
    let both: Vec<(f64, f64)> = both.into_iter().flatten().collect();
    if both.len() < SEEDS.len() {
        // Means of different seeds cannot be compared.
        return text;
    }
    let (ours, other): (Vec<f64>, Vec<f64>) = both.into_iter().unzip();
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
    let (ours, other) = (mean(&ours), mean(&other));
    let apart = ours - other;
    let verdict = match apart.abs() <= TARGET {
        true => "reached",
        false => "missed",
    };
    let _ = writeln!(text, "| mean | {ours:.2} | {other:.2} |");
    let _ = writeln!(
        text,
        "\nOurs − PyTorch's, of the means: {apart:+.2} points; at most {TARGET} either way: {verdict}."
    );
    text
}

/// PyTorch's sides of a round.
fn others(round: &Round) -> impl Iterator<Item = &Timing> {
    round
        .iter()
        .filter(|(name, _)| WAYS.iter().all(|(way, _)| name != way))
        .map(|(_, timing)| timing)
}

/// Median of our speed over another's of the same round, of the rounds that have both.
fn ratio(rounds: &[Round], other: impl Fn(&Round) -> Option<f64>) -> Option<f64> {
    let ratios: Vec<f64> = rounds
        .iter()
        .filter_map(|round| Some(round.get(OURS)?.images_per_second / other(round)?))
        .collect();
    (!ratios.is_empty()).then(|| median(&ratios))
}

fn verdict(
    targets: (Option<f64>, Option<f64>),
    found: (Option<f64>, Option<f64>),
    memory: Option<f64>,
) -> String {
    let verdict = |reached: Option<bool>| match reached {
        Some(true) => "reached",
        Some(false) => "missed",
        None => "not measured",
    };
    let speed = |name: &str, target: Option<f64>, found: Option<f64>| {
        let target = target?;
        let reached = found.map(|found| found >= target);
        Some(format!("{target} × {name}: {}", verdict(reached)))
    };
    let memory = memory.map(|ratio| ratio <= 1.0);
    let lines = [
        speed("eager", targets.0, found.0),
        speed("the fastest", targets.1, found.1),
        Some(format!("no more memory: {}", verdict(memory))),
    ];
    lines.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

const REHEARSED: &str = "**A rehearsal**, of a few steps of a few pictures: every part runs, and speeds mean nothing.\n\n";

fn write(out: &Path, report: &Report, environment: &trainer::Environment) -> Result<()> {
    let readme = format!(
        "# CUDA on {}\n\n{}, driver {}, {}\n\n{}{}\n\
         Our speed is that of a run's second epoch, data and logging included; PyTorch's that of steps on one batch that is\n\
         on the GPU already. Sides take turns; ratios are of the same round, as the median of the rounds: above 1 we are faster.\n\
         Memory is the most that nvidia-smi showed beyond what was taken before. Each number is in `report.json`, the\n\
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

    fn round(sides: &[(&str, f64, u64)]) -> Round {
        let timing = |&(name, images_per_second, gpu_mib): &(&str, f64, u64)| {
            let timing = Timing {
                images_per_second,
                gpu_mib,
            };
            (name.to_string(), timing)
        };
        sides.iter().map(timing).collect()
    }

    #[test]
    fn the_table_holds_each_target_against_the_median_of_its_rounds() {
        let compiled = VARIANTS[2].0;
        let rounds = vec![
            round(&[
                (OURS, 400.0, 500),
                (OURS_BY_PLANES, 500.0, 400),
                (OURS_ON_ONE_STREAM, 160.0, 400),
                (EAGER, 100.0, 1000),
                (compiled, 300.0, 2000),
            ]),
            round(&[
                (OURS, 100.0, 500),
                (EAGER, 100.0, 1000),
                (compiled, 300.0, 2000),
            ]),
            round(&[
                (OURS, 350.0, 500),
                (EAGER, 100.0, 1000),
                (compiled, 400.0, 2000),
            ]),
        ];
        let report = Report {
            rows: BTreeMap::from([("lesson-32".to_string(), rounds)]),
            ..Report::default()
        };
        let text = summary(&report);
        let line = "| lesson's net, batch 32, TF32 in convolutions | 350 | 0.80 | 2.50 | 3.50 | 0.88 | 0.50 (500 of 1000 MiB) | \
                    3 × eager: reached, 1 × the fastest: missed, no more memory: reached |";
        assert!(text.contains(line), "{text}");
        assert!(text.contains("32×32, batch 32 | not measured"), "{text}");
    }

    #[test]
    fn a_row_whose_main_way_failed_says_so() {
        let rounds = vec![round(&[(OURS_BY_PLANES, 400.0, 500), (EAGER, 100.0, 1000)])];
        let report = Report {
            rows: BTreeMap::from([("lesson-32".to_string(), rounds)]),
            failures: vec!["lesson-32, ours: no algorithm".to_string()],
            ..Report::default()
        };
        let text = summary(&report);
        let line = "| lesson's net, batch 32, TF32 in convolutions | failed |";
        assert!(text.contains(line), "{text}");
        assert!(
            text.contains("Failed: lesson-32, ours: no algorithm."),
            "{text}"
        );
    }

    #[test]
    fn without_pytorch_our_speed_stands_alone() {
        let rounds = vec![round(&[(OURS, 400.0, 500)])];
        assert_eq!(
            ratio(&rounds, |round| Some(round.get(EAGER)?.images_per_second)),
            None
        );
        let text = verdict((Some(3.0), None), (None, None), None);
        assert_eq!(
            text,
            "3 × eager: not measured, no more memory: not measured"
        );
        let text = verdict((Some(3.0), None), (Some(2.9), None), Some(1.01));
        assert_eq!(text, "3 × eager: missed, no more memory: missed");
    }

    #[test]
    fn accuracies_are_held_against_each_other_by_their_means() {
        let seeds =
            |accuracies: &[f64]| SEEDS.into_iter().zip(accuracies.iter().copied()).collect();
        let text_of = |other: &[f64]| {
            summary(&Report {
                accuracy: seeds(&[50.0, 54.0, 55.0]),
                pytorch_accuracy: seeds(other),
                ..Report::default()
            })
        };
        let text = text_of(&[51.0, 51.0, 51.0]);
        assert!(text.contains("| seed 1 | 54.00 | 51.00 |"), "{text}");
        assert!(text.contains("| mean | 53.00 | 51.00 |"), "{text}");
        assert!(
            text.contains("+2.00 points; at most 2 either way: reached"),
            "{text}"
        );
        let text = text_of(&[56.0, 55.0, 55.5]);
        assert!(
            text.contains("-2.50 points; at most 2 either way: missed"),
            "{text}"
        );
        // The third seed has nothing to be held against.
        let text = text_of(&[56.0, 53.0]);
        assert!(text.contains("| seed 2 | 55.00 |  |"), "{text}");
        assert!(!text.contains("points"), "{text}");
        assert!(!text_of(&[]).contains("points"));
        let line = r#"{"seed": 2, "accuracy": 55.5, "loss": 1.2, "images_per_second": 5, "framework": "PyTorch"}"#;
        let trained: Trained = serde_json::from_str(line).unwrap();
        assert_eq!((trained.seed, trained.accuracy), (2, 55.5));
    }

    #[test]
    fn curves_that_differ_or_are_not_numbers_fail() {
        let parity =
            |second: f64| Parity::new("a", 1e-3, vec![2.0, 1.0], vec![2.0, second]).unwrap();
        assert!(parity(1.0005).holds());
        assert!(!parity(1.01).holds());
        assert!(!parity(f64::NAN).holds());
        assert!(Parity::new("a", 1.0, vec![1.0], Vec::new()).is_err());
    }

    #[test]
    fn what_programs_write_is_read() {
        let csv = "epoch,images_per_second,x\n1,10.5,0\n2,20.25,0\n";
        assert_eq!(last_speed(csv).unwrap(), 20.25);
        assert!(last_speed("epoch\n").is_err());
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
