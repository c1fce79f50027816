//! `cargo xtask bench`: our training step beside PyTorch's, one kind of it or all.
//!
//! Every side is a process that lives for the whole run and steps on request (`run <steps>` on its
//! standard input, one line of JSON back). In each round every side steps once, one after the
//! other, so that a paired ratio compares two stretches of time that lie close together: on a
//! machine that others use, times drift and only such ratios count.

mod cpu;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};
use trainer::Environment;

use crate::record;
use crate::workspace::{cargo, repository};

/// What can be timed.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Time a training step of a GoogLeNet, alternating with PyTorch where it is at hand
    TrainStep(TrainStep),
    /// Time every kind of step that the README tells of, and keep one record of all
    Cpu(cpu::Cpu),
    /// Rewrite the README's table of performance from a record of `bench cpu`
    Readme(cpu::Readme),
}

#[derive(Debug, Args)]
pub(crate) struct TrainStep {
    /// Python that can import torch [default: python3, if it can; else only our side is timed]
    #[arg(long, value_name = "PYTHON")]
    pytorch: Option<PathBuf>,
    /// Rounds that count; one more goes before them as warm-up
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Steps a side makes in a round
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    #[command(flatten)]
    work: Work,
    /// Threads of every side [default: all cores]
    // Between those of the work: after the size of the pictures.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), display_order = 4)]
    threads: Option<u32>,
    /// Where the record goes; must not exist yet [default: `results/DATE-train-step-MACHINE`]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// What a step is of.
#[derive(Debug, Args)]
struct Work {
    /// Images in a step
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Height and width of the pictures
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(15..))]
    image_size: u32,
    /// The whole step, or only the forward pass without gradients
    #[arg(long, value_enum, default_value_t = Mode::Train)]
    mode: Mode,
    /// The network
    #[arg(long, value_enum, default_value_t = Model::Lesson)]
    model: Model,
    /// Train the head alone, in training mode
    #[arg(long)]
    frozen: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mode {
    Train,
    Inference,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Model {
    /// The lesson's net for CIFAR
    Lesson,
    /// torchvision's, with ten classes
    Torchvision,
}

/// Runs the benchmark, prints its table and writes its record.
pub(crate) fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::TrainStep(arguments) => train_step(arguments),
        Bench::Cpu(arguments) => cpu::run(arguments),
        Bench::Readme(arguments) => cpu::update_readme(arguments),
    }
}

fn train_step(arguments: &TrainStep) -> Result<()> {
    let work = &arguments.work;
    let threads = arguments
        .threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get() as u32));
    ensure!(
        !work.frozen || work.model == Model::Torchvision,
        "--frozen needs --model torchvision: the lesson freezes that network only"
    );
    let environment = record::environment(threads as usize);
    let out = record::new_directory(arguments.out.clone(), &work.subject(), &environment)?;

    let python = pytorch(arguments.pytorch.as_deref(), IMPORTS_TORCH)?;
    let mut sides = vec![Side::start(OURS, our_side(work, threads))?];
    if let Some(python) = &python {
        for layout in ["nchw", "channels_last"] {
            let side = pytorch_side(python, layout, work, threads);
            sides.push(Side::start(&format!("PyTorch, {layout}"), side)?);
        }
    }
    let rounds = alternate(sides, arguments.rounds, arguments.steps)?;

    let table = table(&rounds);
    print!("\n{table}");
    let readme = describe(arguments, &environment, &table);
    record::write(&out, &readme, ("rounds.json", &rounds), &environment)?;
    println!("\nRecorded in {}", out.display());
    Ok(())
}

const OURS: &str = "ours";

/// A competitor: a process that steps when told to.
pub(crate) struct Side {
    name: String,
    process: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

/// What a side says about the steps it was told to make.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Answer {
    seconds_per_step: f64,
    pub(crate) images_per_second: f64,
    /// The most memory the process has held so far; absent where the system does not tell.
    peak_mib: Option<f64>,
    threads: usize,
    pub(crate) framework: String,
}

/// Every side's answer in one round.
type Round = BTreeMap<String, Answer>;

impl Side {
    pub(crate) fn start(name: &str, mut command: Command) -> Result<Self> {
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name} ({command:?})"))?;
        let orders = process.stdin.take().context("a piped stdin is there")?;
        let answers = process.stdout.take().context("a piped stdout is there")?;
        Ok(Self {
            name: name.to_string(),
            process,
            orders,
            answers: BufReader::new(answers),
        })
    }

    pub(crate) fn run(&mut self, steps: u32) -> Result<Answer> {
        let name = &self.name;
        // A side that has died cannot be written to; what its end says is the better error.
        let order = writeln!(self.orders, "run {steps}").and_then(|()| self.orders.flush());
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        if line.is_empty() {
            let status = self.process.wait()?;
            bail!("{name} ended without an answer ({status}); its message is above");
        }
        order.with_context(|| format!("cannot reach {name}"))?;
        let answer: Answer = serde_json::from_str(&line)
            .with_context(|| format!("{name} answered {:?}", line.trim_end()))?;
        ensure!(
            answer.seconds_per_step > 0.0,
            "{name} answered a time of {} s",
            answer.seconds_per_step
        );
        Ok(answer)
    }

    /// Ends the process, and with it all that it holds.
    pub(crate) fn finish(self) -> Result<()> {
        let Self {
            name,
            mut process,
            orders,
            ..
        } = self;
        drop(orders);
        let status = process.wait()?;
        ensure!(status.success(), "{name} ended with {status}");
        Ok(())
    }
}

/// Rounds in which every side steps, after one that does not count. Each round starts with the
/// next side, so that no side always runs in another's wake. In the end all have ended, so that none computes while
/// others are timed next, and one that fails only then is an error too.
fn alternate(mut sides: Vec<Side>, rounds: u32, steps: u32) -> Result<Vec<Round>> {
    let mut counted = Vec::new();
    let count = sides.len();
    for number in 0..=rounds {
        let mut round = Round::new();
        for turn in 0..count {
            let side = &mut sides[(turn + number as usize) % count];
            round.insert(side.name.clone(), side.run(steps)?);
        }
        let times: Vec<String> = sides
            .iter()
            .map(|s| format!("{} {:.0} ms", s.name, 1e3 * round[&s.name].seconds_per_step))
            .collect();
        match number {
            0 => eprintln!("warm-up: {}", times.join(", ")),
            _ => {
                eprintln!("round {number}/{rounds}: {}", times.join(", "));
                counted.push(round);
            }
        }
    }
    sides.into_iter().try_for_each(Side::finish)?;
    Ok(counted)
}

fn our_side(work: &Work, threads: u32) -> Command {
    let mut command = cargo();
    command
        .args(["run", "--quiet", "--package", "step-bench", "--"])
        .args(common_arguments(work, threads))
        // Candle sizes its own pools by this variable.
        .env("RAYON_NUM_THREADS", threads.to_string());
    command
}

fn pytorch_side(python: &Path, layout: &str, work: &Work, threads: u32) -> Command {
    let mut command = Command::new(python);
    command
        .arg(repository().join("tools/pytorch/bench_train_step.py"))
        .args(["--layout", layout])
        .args(common_arguments(work, threads));
    command
}

fn common_arguments(work: &Work, threads: u32) -> Vec<String> {
    let pairs = [
        ("--model", work.model.name().to_string()),
        ("--mode", work.mode.name().to_string()),
        ("--batch", work.batch.to_string()),
        ("--image-size", work.image_size.to_string()),
        ("--threads", threads.to_string()),
    ];
    let frozen = work.frozen.then(|| "--frozen".to_string());
    pairs
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_string(), value])
        .chain(frozen)
        .collect()
}

impl Work {
    /// What is timed, as the record's folder names it.
    fn subject(&self) -> String {
        let mut subject = "train-step".to_string();
        if self.model != Model::Lesson {
            subject += &format!("-{}", self.model.name());
        }
        if self.frozen {
            subject += "-frozen";
        }
        subject
    }

    /// The network in words.
    fn network(&self) -> String {
        let network = match (self.model, self.frozen) {
            (Model::Lesson, _) => "the lesson's GoogLeNet",
            (Model::Torchvision, false) => "torchvision's GoogLeNet",
            (Model::Torchvision, true) => "torchvision's GoogLeNet with all but `fc` frozen",
        };
        let size = self.image_size;
        format!("{network} on {size}×{size} pictures")
    }
}

impl Model {
    fn name(self) -> &'static str {
        match self {
            Self::Lesson => "lesson",
            Self::Torchvision => "torchvision",
        }
    }
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Inference => "inference",
        }
    }
}

/// Asks a Python for what PyTorch's side of a benchmark on the CPU imports.
pub(crate) const IMPORTS_TORCH: &str = "import torch";

/// The Python to use: the given one must be able to run `script`, which asks for what is needed; the default one may.
pub(crate) fn pytorch(given: Option<&Path>, script: &str) -> Result<Option<PathBuf>> {
    let python = given.unwrap_or(Path::new("python3"));
    match (run_python(python, script), given) {
        (Ok(()), _) => Ok(Some(python.to_path_buf())),
        (Err(error), Some(_)) => Err(error),
        (Err(error), None) => {
            eprintln!(
                "No PyTorch, and no --pytorch is given: {error:#}. Only our side is timed; tools/pytorch/README.md says how \
                 to install the other."
            );
            Ok(None)
        }
    }
}

fn run_python(python: &Path, script: &str) -> Result<()> {
    let output = Command::new(python)
        .args(["-c", script])
        .output()
        .with_context(|| format!("cannot start {}", python.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    // Of a traceback the line that says what is wrong.
    let last = said.trim().lines().last().unwrap_or_default();
    ensure!(
        output.status.success(),
        "{} cannot do PyTorch's side: {last}",
        python.display()
    );
    Ok(())
}

/// One line a side: medians, and how our time compares with it, pair by pair.
fn table(rounds: &[Round]) -> String {
    let mut text = format!(
        "| side | ms/step | images/s | our time ÷ its (median of {}, least–most) | peak memory |\n\
         | --- | ---: | ---: | ---: | ---: |\n",
        rounds.len()
    );
    for name in side_names(rounds) {
        let of = |value: fn(&Answer) -> f64| -> Vec<f64> {
            rounds.iter().map(|round| value(&round[name])).collect()
        };
        let seconds = of(|a| a.seconds_per_step);
        let ratio = match name {
            OURS => "".to_string(),
            _ => ratios(rounds, &[name]),
        };
        let peak = match rounds.last().and_then(|round| round[name].peak_mib) {
            Some(mib) => format!("{mib:.0} MiB"),
            None => "unknown".to_string(),
        };
        let framework = rounds.first().map_or("", |round| &round[name].framework);
        text += &format!(
            "| {name} ({framework}) | {:.0} | {:.1} | {ratio} | {peak} |\n",
            1e3 * median(&seconds),
            median(&of(|a| a.images_per_second)),
        );
    }
    text
}

/// Our time in a round as a share of the least of the others', the faster of them in that very
/// round; None where a side is missing.
fn ratio(round: &Round, others: &[&str]) -> Option<f64> {
    let times = others
        .iter()
        .map(|other| Some(round.get(*other)?.seconds_per_step));
    let least = times
        .collect::<Option<Vec<f64>>>()
        .map(|times| minimum(&times))?;
    Some(round.get(OURS)?.seconds_per_step / least)
}

/// Median of a ratio over all rounds with its least and greatest value.
fn ratios(rounds: &[Round], others: &[&str]) -> String {
    let ratios: Option<Vec<f64>> = rounds.iter().map(|round| ratio(round, others)).collect();
    match ratios {
        Some(ratios) if !ratios.is_empty() => format!(
            "{:.2} ({:.2}–{:.2})",
            median(&ratios),
            minimum(&ratios),
            maximum(&ratios)
        ),
        _ => String::new(),
    }
}

/// Ours first, then the others by name.
fn side_names(rounds: &[Round]) -> Vec<&str> {
    let mut names: Vec<&str> = rounds
        .first()
        .into_iter()
        .flat_map(|round| round.keys().map(String::as_str))
        .collect();
    names.sort_by_key(|name| *name != OURS);
    names
}

pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

fn minimum(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn maximum(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

fn describe(arguments: &TrainStep, environment: &Environment, table: &str) -> String {
    let work = &arguments.work;
    format!(
        "# {} step of {}, batch {}, f32, {} threads\n\n\
         {}, {}\n\n\
         {table}\n\
         All sides alternate in one run, {} steps a round, after a warm-up round. Ratios are of times in the\n\
         same round: below 1 we are faster. Each number behind the table is in `rounds.json`, the machine in\n\
         `environment.json`.\n",
        match work.mode {
            Mode::Train => "Training",
            Mode::Inference => "Inference",
        },
        work.network(),
        work.batch,
        environment.threads,
        record::origin(environment),
        record::processor(environment),
        arguments.steps,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(seconds_per_step: f64) -> Answer {
        Answer {
            seconds_per_step,
            images_per_second: 32.0 / seconds_per_step,
            peak_mib: Some(1000.4),
            threads: 2,
            framework: "F 1".to_string(),
        }
    }

    #[test]
    fn ratios_are_taken_within_rounds_before_their_median() {
        // The machine slows down tenfold in the middle round; the ratio of medians would be 1.
        let rounds: Vec<Round> = [(1.0, 2.0), (10.0, 5.0), (2.0, 8.0)]
            .map(|(ours, theirs)| {
                BTreeMap::from([
                    ("other".into(), answer(theirs)),
                    (OURS.into(), answer(ours)),
                ])
            })
            .into();
        let table = table(&rounds);
        let lines: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(
            lines,
            [
                "| ours (F 1) | 2000 | 16.0 |  | 1000 MiB |",
                "| other (F 1) | 5000 | 6.4 | 0.50 (0.25–2.00) | 1000 MiB |",
            ]
        );
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        assert_eq!(median(&[4.0, 1.0, 3.0, 100.0]), 3.5);
        assert_eq!(median(&[9.0, 1.0, 3.0]), 3.0);
    }

    #[test]
    fn a_python_that_does_not_start_is_an_error_that_names_it() {
        let error = pytorch(Some(Path::new("no-such-python")), IMPORTS_TORCH).unwrap_err();
        assert!(format!("{error:#}").contains("no-such-python"), "{error:#}");
    }

    #[cfg(unix)]
    mod with_processes {
        use super::*;

        /// A side in shell: `{n}` in its answer counts the orders it got.
        fn shell(script: &str) -> Command {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        }

        const COUNTING: &str = r#"n=0; while read word steps; do n=$((n+1)); echo "{\"seconds_per_step\": $n, \"images_per_second\": $steps, \"peak_mib\": null, \"threads\": 1, \"framework\": \"sh\"}"; done"#;

        #[test]
        fn the_first_round_is_warm_up_and_every_side_runs_in_each() {
            let sides = ["ours", "other"].map(|n| Side::start(n, shell(COUNTING)).unwrap());
            let rounds = alternate(sides.into(), 2, 5).unwrap();
            let seconds: Vec<[f64; 2]> = rounds
                .iter()
                .map(|r| ["ours", "other"].map(|n| r[n].seconds_per_step))
                .collect();
            assert_eq!(seconds, [[2.0, 2.0], [3.0, 3.0]]);
            assert_eq!(rounds[0]["ours"].images_per_second, 5.0);
        }

        #[test]
        fn all_sides_have_ended_after_the_last_round_and_one_that_fails_then_is_an_error() {
            let dir = tempfile::tempdir().unwrap();
            let ended = dir.path().join("ended");
            let slowly = format!("{COUNTING}; sleep 0.5; touch '{}'", ended.display());
            let side = Side::start("ours", shell(&slowly)).unwrap();
            alternate(vec![side], 1, 1).unwrap();
            assert!(ended.exists());

            let failing = format!("{COUNTING}; exit 3");
            let sides = [("ours", COUNTING), ("other", &failing)]
                .map(|(name, script)| Side::start(name, shell(script)).unwrap());
            let error = format!("{:#}", alternate(sides.into(), 1, 1).unwrap_err());
            assert!(
                error.contains("other ended with") && error.contains('3'),
                "{error}"
            );
        }

        #[test]
        fn a_side_that_dies_is_an_error_with_its_name_and_status() {
            let mut side = Side::start("other", shell("exit 3")).unwrap();
            let error = format!("{:#}", side.run(1).unwrap_err());
            assert!(
                error.contains("other ended") && error.contains('3'),
                "{error}"
            );
        }

        #[test]
        fn an_answer_that_is_no_json_is_an_error_that_shows_it() {
            let mut side = Side::start("other", shell("read line; echo hello")).unwrap();
            let error = format!("{:#}", side.run(1).unwrap_err());
            assert!(error.contains("hello"), "{error}");
        }
    }

    #[test]
    #[cfg(unix)]
    fn a_python_without_what_the_scripts_import_is_refused_with_its_reason() {
        let script = "import pyarrow";
        let error = run_python(Path::new("/nonexistent/python"), script).unwrap_err();
        assert!(format!("{error:#}").contains("cannot start"), "{error:#}");
        let folder = tempfile::tempdir().unwrap();
        let python = folder.path().join("python");
        let stand_in =
            "#!/bin/sh\necho 'Traceback' >&2\necho \"No module named 'pyarrow'\" >&2\nexit 1\n";
        std::fs::write(&python, stand_in).unwrap();
        let mut permissions = std::fs::metadata(&python).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o755);
        std::fs::set_permissions(&python, permissions).unwrap();
        let error = pytorch(Some(&python), script).unwrap_err().to_string();
        assert!(error.contains("No module named 'pyarrow'"), "{error}");
    }
}
