//! What is run: ours and PyTorch's programs, and what they say of speed, losses and accuracy.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::work::{OTHER_WAY, OURS, ROUND, Row, WAYS};
use super::{Report, gpu};
use crate::bench::Side;
use crate::workspace::repository;

/// Speed of a side in a round, and the GPU memory that it took beyond what was taken before.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Timing {
    pub(super) images_per_second: f64,
    pub(super) gpu_mib: u64,
}

pub(super) type Round = BTreeMap<String, Timing>;

/// What came of training the lesson's 7 epochs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// On the test set, in percent.
    Accuracy(f64),
    /// At this step the loss was not finite any more.
    Diverged(u64),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accuracy(accuracy) => write!(f, "{accuracy:.2}"),
            Self::Diverged(step) => write!(f, "diverged at step {step}"),
        }
    }
}

/// Two runs of the same steps.
#[derive(Debug, Serialize)]
pub(super) struct Parity {
    pub(super) what: String,
    /// Of the losses of all steps.
    pub(super) largest_relative_difference: f64,
    pub(super) bound: f64,
    /// What may set them apart although both are right.
    #[serde(skip)]
    doubt: Option<&'static str>,
    pub(super) first: Vec<f64>,
    pub(super) second: Vec<f64>,
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
            doubt: None,
            first,
            second,
        })
    }

    /// In a word, or a few more where a failure need not be a mistake.
    pub(super) fn verdict(&self) -> String {
        let verdict = if self.holds() { "holds" } else { "**fails**" };
        let doubt = self.doubt.filter(|_| !self.holds());
        doubt.map_or(verdict.into(), |doubt| format!("{verdict}: {doubt}"))
    }

    pub(super) fn holds(&self) -> bool {
        self.largest_relative_difference <= self.bound
    }
}

const BF16: &str = "bf16";
const ONE_STREAM: &str = "one-stream";
/// Of the comparison with [`ONE_STREAM`]: its workspaces may be four times as large.
const OTHER_ENGINES: &str = "cuDNN's engines may differ (`RUST_LOG=candle_cnn=debug` names them)";
/// Runs of the same steps, and their arguments.
const CURVES: [(&str, &str); 8] = [
    ("cpu", "--device cpu"),
    ("f32", "--device cuda --precision f32 --deterministic"),
    (
        "eager",
        "--device cuda --precision f32 --deterministic --no-cuda-graph",
    ),
    (
        "planes",
        "--device cuda --precision f32 --deterministic --no-channels-last",
    ),
    ("default", "--device cuda"),
    ("tf32", "--device cuda --deterministic"),
    (
        ONE_STREAM,
        "--device cuda --deterministic --no-cuda-graph --streams 1",
    ),
    (BF16, "--device cuda --precision bf16"),
];
/// Which of them are compared, and how far apart they may be.
///
/// Rounding grows from step to step: at the lesson's rate two instruction sets of a CPU are 1e-1 apart after
/// five steps, at this one 4e-5 after twenty, while the loss falls by half; on the emulated device TF32 sets them
/// 5e-4 apart and bf16 3e-3. The bounds leave room for that and none for a wrong gradient. Steps of one precision take the same
/// engines, as long as the first that cuDNN names want no more workspace than a fourth of what one stream may have.
const COMPARISONS: [(&str, f64, [&str; 2]); 6] = [
    ("STEPS, GPU in f32 against the CPU", 1e-3, ["cpu", "f32"]),
    (
        "the same, GPU in f32 with a plane per channel against the CPU",
        1e-3,
        ["cpu", "planes"],
    ),
    (
        "the same, CUDA graph against one operation at a time",
        0.0,
        ["eager", "f32"],
    ),
    (
        "the same with TF32 in convolutions, CUDA graph on four streams against one operation at a time on one",
        0.0,
        [ONE_STREAM, "tf32"],
    ),
    (
        "the same, GPU with TF32 in convolutions against the CPU",
        1e-2,
        ["cpu", "default"],
    ),
    ("the same, GPU in bf16 against the CPU", 5e-2, ["cpu", BF16]),
];

/// Our programs and where they may work.
pub(super) struct Runs<'a> {
    pub(super) programs: &'a Path,
    pub(super) work: &'a Path,
    /// Where the log of each run goes that has one.
    pub(super) logs: &'a Path,
    pub(super) rehearse: bool,
    pub(super) skip_other_ways: bool,
    /// What programs warned of.
    pub(super) warnings: RefCell<Vec<String>>,
    /// How a program described the GPU and what it is used through.
    pub(super) device: RefCell<Option<String>>,
    /// When all is to be done.
    pub(super) end: Option<Instant>,
}

impl Runs<'_> {
    /// Whether a part that takes about so long will end in time; else notes that it was left out.
    pub(super) fn has_time(&self, report: &mut Report, part: &str, needs: Duration) -> bool {
        let is_late = self.time_left().is_some_and(|left| needs > left);
        if is_late {
            report.leave_out_for_want_of_time(part);
        }
        !is_late
    }

    /// Up to the limit, where there is one.
    pub(super) fn time_left(&self) -> Option<Duration> {
        let end = self.end?;
        Some(end.saturating_duration_since(Instant::now()))
    }

    /// Keeps what a program wrote of itself, and what it warned of.
    fn keep_log(&self, name: &str, log: &str) -> Result<()> {
        if log.is_empty() {
            return Ok(());
        }
        let path = self.logs.join(format!("{name}.log"));
        fs::create_dir_all(self.logs)
            .and_then(|()| fs::write(&path, log))
            .with_context(|| format!("cannot write {}", path.display()))?;
        self.warnings.borrow_mut().extend(warnings(name, log));
        if let Some(device) = device_of(log) {
            self.device.replace(Some(device));
        }
        Ok(())
    }

    /// Runs a program to its end; what `read` takes from this file of its run. The run is removed then, since its checkpoints
    /// are large, and one that fails is kept, to be looked into.
    fn train<T>(
        &self,
        program: &str,
        name: &str,
        arguments: &[OsString],
        (file, read): (&str, impl FnOnce(&str) -> Result<T>),
    ) -> Result<T> {
        let out = self.work.join(name);
        let output = gpu::in_order(&mut Command::new(self.programs.join(program)))
            .args(arguments)
            .arg("--out")
            .arg(&out)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .output()
            .with_context(|| format!("cannot start {program}"))?;
        let log = String::from_utf8_lossy(&output.stderr);
        self.keep_log(name, &log)?;
        ensure!(output.status.success(), "{program} failed: {}", log.trim());
        let runs = out.join(program);
        let mut entries =
            fs::read_dir(&runs).with_context(|| format!("cannot read {}", runs.display()))?;
        let run = entries.next().context("the program made no run")??;
        let path = run.path().join(file);
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let taken = read(&text)?;
        self.remove(name);
        Ok(taken)
    }

    /// Removes what a program wrote under this name; where that cannot be done, it takes room and does no other harm.
    fn remove(&self, name: &str) {
        let _ = fs::remove_dir_all(self.work.join(name));
    }

    /// The losses of the same steps on both devices, and with and without the graph. Epochs end with a smaller batch and an
    /// evaluation, for which a recorded step gives its memory back; in the second it is replayed after that. A run that fails is
    /// noted, and keeps no others from being compared.
    pub(super) fn parity(&self, report: &mut Report) {
        let (pictures, steps) = match self.rehearse {
            true => (
                "--train-limit 7 --test-limit 2 --batch-size 2",
                "8 steps of 2 pictures",
            ),
            false => ("--train-limit 304 --test-limit 70", "20 steps"),
        };
        let losses = |name: &str, extra: &str| -> Result<Vec<f64>> {
            let arguments =
                format!("--dataset shapes {pictures} --epochs 2 --seed 3 --lr 1e-7 {extra}");
            let read = ("metrics.jsonl", step_losses);
            self.train("scratch-train", name, &words(&arguments), read)
        };
        let mut curves = BTreeMap::new();
        for (name, arguments) in CURVES {
            if name == BF16 && !report.gpu.has_bf16() {
                let capability = &report.gpu.compute_capability;
                let why = format!("bf16, which compute capability {capability} does not have");
                report.left_out.push(why);
                continue;
            }
            match losses(&format!("parity-{name}"), arguments) {
                Ok(losses) => drop(curves.insert(name, losses)),
                Err(error) => report.fail(&format!("parity, {name}"), &error),
            }
        }
        for (what, bound, [first, second]) in COMPARISONS {
            let doubt = (first == ONE_STREAM).then_some(OTHER_ENGINES);
            let (Some(first), Some(second)) = (curves.get(first), curves.get(second)) else {
                continue;
            };
            let what = what.replace("STEPS", steps);
            match Parity::new(&what, bound, first.clone(), second.clone()) {
                Ok(parity) => {
                    if !parity.holds() {
                        let doubt = doubt.map(|doubt| format!(" ({doubt})"));
                        let doubt = doubt.unwrap_or_default();
                        let failure = format!("{what}: beyond the bound{doubt}");
                        report.failures.push(failure);
                    }
                    report.parity.push(Parity { doubt, ..parity });
                }
                Err(error) => report.fail(&what, &error),
            }
        }
    }

    /// Times a kind of work: ours in turn with PyTorch's, if there is a `python` for those.
    pub(super) fn row(
        &self,
        row: &Row,
        python: Option<&Path>,
        plan: Plan,
        report: &mut Report,
    ) -> Result<()> {
        if row.bf16 && !report.gpu.has_bf16() {
            let capability = &report.gpu.compute_capability;
            let why = format!("{}: compute capability {capability} has no bf16", row.name);
            report.left_out.push(why);
            return Ok(());
        }
        if !self.has_time(report, row.name, row.takes(python.is_some())) {
            return Ok(());
        }
        let mut timed = TimedRow {
            runs: self,
            row,
            rounds: plan.rounds,
            budget: Budget::new(plan.later),
            sides: Vec::new(),
            taken: BTreeMap::new(),
            report,
        };
        if let Some(python) = python {
            timed.start_sides(python)?;
        }
        for number in 0..plan.rounds {
            if timed.has_time_for(number) {
                timed.round(number)?;
            }
        }
        timed.finish();
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
        self.train(row.program, &name, &arguments, ("metrics.csv", last_speed))
    }

    pub(super) fn accuracy(&self, data: &Path, seed: u32) -> Result<Outcome> {
        let mut arguments = words(&format!("--device cuda --seed {seed}"));
        arguments.extend(["--data-dir".into(), data.into()]);
        let name = format!("accuracy-{seed}");
        let read = ("finished.json", test_accuracy);
        match self.train("scratch-train", &name, &arguments, read) {
            Ok(accuracy) => Ok(Outcome::Accuracy(accuracy)),
            Err(error) => {
                let step = step_of_divergence(&error.to_string()).ok_or(error)?;
                self.remove(&name);
                Ok(Outcome::Diverged(step))
            }
        }
    }
}

/// How often a row is timed at the most, and about what all takes that comes after it.
pub(super) struct Plan {
    pub(super) rounds: u32,
    pub(super) later: Duration,
}

/// What a row needs of the time that is left.
struct Budget {
    /// What comes after the row has a claim to so much.
    later: Duration,
    /// The longest round so far, or what one is thought to take.
    longest: Duration,
}

impl Budget {
    fn new(later: Duration) -> Self {
        Self {
            later,
            longest: ROUND,
        }
    }

    /// The time that must be left for this round to be begun. What comes later has a claim before all but the first.
    fn of_round(&self, number: u32) -> Duration {
        let claims = match number {
            0 => Duration::ZERO,
            _ => self.later,
        };
        self.longest + claims
    }

    /// And for another way of ours: what is held against PyTorch in this round, and in those of other rows, has the first claim to
    /// the time.
    fn of_another_way(&self) -> Duration {
        OTHER_WAY + ROUND + self.later
    }

    /// A round took so long.
    fn took(&mut self, round: Duration) {
        self.longest = self.longest.max(round);
    }
}

/// A row in the making.
struct TimedRow<'a> {
    runs: &'a Runs<'a>,
    row: &'a Row,
    rounds: u32,
    budget: Budget,
    /// PyTorch's. Its processes live through all rounds, since to compile takes a minute.
    sides: Vec<TheirSide>,
    /// Of the GPU's memory, by each of our ways.
    taken: BTreeMap<&'static str, u64>,
    report: &'a mut Report,
}

/// A side of PyTorch's, and what it took of the GPU's memory while it started.
struct TheirSide {
    name: &'static str,
    side: Side,
    gpu_mib: u64,
}

impl TimedRow<'_> {
    fn start_sides(&mut self, python: &Path) -> Result<()> {
        for &(name, flags) in self.row.variants() {
            let idle = gpu::memory_in_use()?;
            match with_peak_memory(|| pytorch_side(self.row, python, name, flags)) {
                Ok((side, peak)) => self.sides.push(TheirSide {
                    name,
                    side,
                    gpu_mib: peak.saturating_sub(idle),
                }),
                Err(error) => self.report.fail(&self.row.side(name), &error),
            }
        }
        Ok(())
    }

    fn has_time_for(&mut self, number: u32) -> bool {
        let part = format!("{}, round {}", self.row.name, number + 1);
        let needs = self.budget.of_round(number);
        self.runs.has_time(self.report, &part, needs)
    }

    /// Lets every side run once.
    fn round(&mut self, number: u32) -> Result<()> {
        let begin = Instant::now();
        let mut round = Round::new();
        let others = self.our_turn(number, &mut round)?;
        self.their_turn(&mut round);
        let text: Vec<String> = round
            .iter()
            .map(|(name, t)| format!("{name} {:.0} images/s", t.images_per_second))
            .collect();
        self.budget.took(begin.elapsed() - others);
        eprintln!("round {}/{}: {}", number + 1, self.rounds, text.join(", "));
        let kept = self.report.rows.entry(self.row.name.to_string());
        kept.or_default().push(round);
        Ok(())
    }

    /// Ours, by every way that has a turn. Returns what those took that later rounds do not have.
    fn our_turn(&mut self, number: u32, round: &mut Round) -> Result<Duration> {
        let mut others = Duration::ZERO;
        let idle = gpu::memory_in_use()?;
        for (name, flags) in WAYS {
            if !self.has_turn(name, number) {
                continue;
            }
            let begin = Instant::now();
            // One way may fail on a GPU where another works.
            match self.time_way(name, flags, number, idle) {
                Ok(timing) => {
                    self.taken.insert(name, timing.gpu_mib);
                    round.insert(name.to_string(), timing);
                }
                Err(error) => self.report.fail(&self.row.side(name), &error),
            }
            if name != OURS {
                others += begin.elapsed();
            }
        }
        Ok(others)
    }

    /// Whether a way of ours runs in this round; where only time is wanting, that is noted.
    fn has_turn(&mut self, way: &str, number: u32) -> bool {
        if way == OURS {
            return true;
        }
        let is_wanted = number == 0 && !self.runs.skip_other_ways;
        let (part, needs) = (self.row.side(way), self.budget.of_another_way());
        is_wanted && self.runs.has_time(self.report, &part, needs)
    }

    /// To look at the memory takes time, which PyTorch's steps do not lose while they are timed: so that is done once.
    fn time_way(&self, name: &str, flags: &[&str], number: u32, idle: u64) -> Result<Timing> {
        let speed = || self.runs.our_speed(self.row, number, flags);
        let (images_per_second, gpu_mib) = match self.taken.get(name) {
            Some(&gpu_mib) => (speed()?, gpu_mib),
            None => {
                let (speed, peak) = with_peak_memory(speed)?;
                (speed, peak.saturating_sub(idle))
            }
        };
        Ok(Timing {
            images_per_second,
            gpu_mib,
        })
    }

    fn their_turn(&mut self, round: &mut Round) {
        for their in &mut self.sides {
            match their.side.run(self.row.images / self.row.batch) {
                Ok(answer) => {
                    let timing = Timing {
                        images_per_second: answer.images_per_second,
                        gpu_mib: their.gpu_mib,
                    };
                    round.insert(their.name.to_string(), timing);
                    let versions = &mut self.report.versions;
                    versions.pytorch.get_or_insert(answer.framework);
                }
                Err(error) => self.report.fail(&self.row.side(their.name), &error),
            }
        }
    }

    /// Ends PyTorch's sides: what they hold of the GPU must not count for the next row.
    fn finish(self) {
        for their in self.sides {
            if let Err(error) = their.side.finish() {
                self.report.fail(&self.row.side(their.name), &error);
            }
        }
    }
}

/// In percent, as `finished.json` has it.
fn test_accuracy(text: &str) -> Result<f64> {
    let summary: trainer::Summary = serde_json::from_str(text)?;
    let test = summary.evaluations.get("test");
    Ok(100.0 * test.context("no test evaluation")?.accuracy())
}

/// The step that a program names where it says that training has diverged.
fn step_of_divergence(log: &str) -> Option<u64> {
    let (before, _) = log.split_once(": training has diverged")?;
    let (before, _) = before.rsplit_once(" (epoch ")?;
    before.split_whitespace().next_back()?.parse().ok()
}

/// The GPU that a program said it runs on.
fn device_of(log: &str) -> Option<String> {
    let device = log.lines().find_map(|line| line.strip_prefix("Device: "))?;
    device.starts_with("cuda").then(|| device.to_string())
}

/// The lines of a log that warn.
fn warnings(name: &str, log: &str) -> Vec<String> {
    let lines = log.lines().filter(|line| line.contains(" WARN "));
    lines
        .map(|line| format!("{name}: {}", line.trim()))
        .collect()
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
    gpu::in_order(&mut command)
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

/// Calls `f` with what train_lesson.py says of each seed, as soon as it is known. By the fastest PyTorch, which computes the same:
/// eager it takes three minutes a seed and more.
pub(super) fn pytorch_lesson(
    python: &Path,
    data: &Path,
    seeds: u32,
    mut f: impl FnMut(Trained) -> Result<()>,
) -> Result<()> {
    let mut command = Command::new(python);
    gpu::in_order(&mut command)
        .arg(repository().join("tools/pytorch/train_lesson.py"))
        .args(["--device", "cuda", "--compile", "--data-dir"])
        .arg(data)
        .arg("--seed")
        .args((0..seeds).map(|seed| seed.to_string()))
        .stdout(Stdio::piped());
    let mut process = command
        .spawn()
        .with_context(|| format!("cannot start {}", python.display()))?;
    let answers = process.stdout.take().context("a piped stdout is there")?;
    let outcome = BufReader::new(answers).lines().try_for_each(|line| {
        let line = line?;
        let trained = serde_json::from_str(&line)
            .with_context(|| format!("train_lesson.py answered {line:?}"))?;
        f(trained)
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
pub(super) struct Trained {
    pub(super) seed: u32,
    /// In percent.
    accuracy: Option<f64>,
    /// The step.
    diverged: Option<u64>,
    pub(super) framework: String,
}

impl Trained {
    pub(super) fn outcome(&self) -> Result<Outcome> {
        let diverged = self.diverged.map(Outcome::Diverged);
        diverged
            .or(self.accuracy.map(Outcome::Accuracy))
            .with_context(|| format!("train_lesson.py says nothing of seed {}", self.seed))
    }
}

/// The most that is held of the GPU while `f` runs, looked at five times a second.
fn with_peak_memory<T>(f: impl FnOnce() -> Result<T>) -> Result<(T, u64)> {
    let (done, peak) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                if let Ok(mib) = gpu::memory_in_use() {
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

#[cfg(test)]
mod tests {
    #[cfg(unix)]
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn curves_that_differ_or_are_not_numbers_fail() {
        let parity =
            |second: f64| Parity::new("a", 1e-3, vec![2.0, 1.0], vec![2.0, second]).unwrap();
        assert!(parity(1.0005).holds());
        assert!(!parity(1.01).holds());
        assert!(!parity(f64::NAN).holds());
        assert!(Parity::new("a", 1.0, vec![1.0], Vec::new()).is_err());

        let doubted = |second: f64| {
            let doubt = Some("or not");
            let parity = parity(second);
            Parity { doubt, ..parity }.verdict()
        };
        assert_eq!(parity(1.01).verdict(), "**fails**");
        assert_eq!(doubted(1.01), "**fails**: or not");
        assert_eq!(doubted(1.0005), "holds");
    }

    /// Everything in one folder, and no limit.
    fn runs_in(dir: &Path) -> Runs<'_> {
        Runs {
            programs: dir,
            work: dir,
            logs: dir,
            rehearse: false,
            skip_other_ways: false,
            warnings: RefCell::default(),
            device: RefCell::default(),
            end: None,
        }
    }

    #[test]
    fn what_comes_later_has_a_claim_before_more_rounds_and_our_other_ways() {
        let seconds = Duration::from_secs;
        let mut budget = Budget::new(seconds(100));
        assert_eq!(budget.of_round(0), ROUND);
        assert_eq!(budget.of_round(1), ROUND + seconds(100));
        assert_eq!(budget.of_another_way(), OTHER_WAY + ROUND + seconds(100));
        // The longest round counts, not the last.
        budget.took(seconds(45));
        budget.took(seconds(35));
        assert_eq!(budget.of_round(2), seconds(145));
        assert_eq!(budget.of_another_way(), OTHER_WAY + ROUND + seconds(100));
    }

    #[test]
    fn what_would_end_too_late_is_left_out_by_name() {
        let ending = |end: Option<Duration>| Runs {
            end: end.map(|end| Instant::now() + end),
            ..runs_in(Path::new(""))
        };
        let (long, short) = (Duration::from_secs(1000), Duration::from_secs(1));
        let mut report = Report::default();
        assert!(ending(None).has_time(&mut report, "a", long));
        assert!(ending(Some(long)).has_time(&mut report, "b", short));
        assert!(!ending(Some(short)).has_time(&mut report, "c", long));
        assert_eq!(report.left_out, ["c (for want of time)"]);
    }

    /// A program of that name in `dir`.
    #[cfg(unix)]
    fn program(dir: &Path, name: &str, script: &str) -> PathBuf {
        let [text, program] = ["text", name].map(|name| dir.join(name));
        fs::write(&text, format!("#!/bin/sh\n{script}\n")).unwrap();
        // By another process: what this one has open for writing, a child that another test starts at the time may hold
        // open too, and then it cannot be started.
        let installed = Command::new("install")
            .args(["-m", "700"])
            .args([&text, &program])
            .status();
        assert!(installed.unwrap().success());
        program
    }

    #[test]
    #[cfg(unix)]
    fn a_run_is_removed_once_its_outcome_is_known_and_kept_if_it_fails() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        // --out DIR comes last.
        let run = r#"for out; do :; done; run=$out/scratch-train/run; mkdir -p "$run""#;
        let outcome_of = |seed: u32, end: &str| {
            program(dir, "scratch-train", &format!("{run}\n{end}"));
            runs_in(dir).accuracy(Path::new("data"), seed)
        };
        let is_kept = |seed: u32| {
            dir.join(format!("accuracy-{seed}/scratch-train/run"))
                .exists()
        };

        let test = r#"{"test": {"loss": 1.5, "correct": 5, "images": 8}}"#;
        let finished =
            format!(r#"{{"steps": 9, "epochs": 7, "evaluations": {test}, "weights_sha256": ""}}"#);
        let outcome = outcome_of(0, &format!("echo '{finished}' > \"$run/finished.json\""));
        assert_eq!(outcome.unwrap(), Outcome::Accuracy(62.5));
        assert!(!is_kept(0));

        let diverged = "echo 'error: step 23 (epoch 1): training has diverged' >&2; exit 1";
        assert_eq!(outcome_of(1, diverged).unwrap(), Outcome::Diverged(23));
        assert!(!is_kept(1));

        let error = outcome_of(2, "echo 'error: no memory' >&2; exit 1").unwrap_err();
        assert!(error.to_string().contains("no memory"), "{error}");
        assert!(is_kept(2));
        assert!(outcome_of(3, "echo '{}' > \"$run/finished.json\"").is_err());
        assert!(is_kept(3));
    }

    /// What is read of a program in the place of Python, and what comes of it.
    #[cfg(unix)]
    fn lesson_by(script: &str) -> (Vec<(u32, Outcome)>, Result<()>) {
        let dir = tempfile::tempdir().unwrap();
        let python = program(dir.path(), "python", script);
        let mut outcomes = Vec::new();
        let end = pytorch_lesson(&python, Path::new("data"), 2, |trained| {
            outcomes.push((trained.seed, trained.outcome()?));
            Ok(())
        });
        (outcomes, end)
    }

    #[test]
    #[cfg(unix)]
    fn every_seed_of_pytorch_counts_up_to_a_failure() {
        let first =
            r#"echo '{"seed": 0, "diverged": null, "accuracy": 55.5, "framework": "PyTorch"}'"#;
        let seeds = r#"echo "{\"seed\": 1, \"diverged\": $#, \"framework\": \"\"}""#;
        let known = (0, Outcome::Accuracy(55.5));
        // --device cuda --compile --data-dir data --seed 0 1, after the script.
        let (outcomes, end) = lesson_by(&format!("{first}\n{seeds}"));
        assert_eq!(outcomes, [known, (1, Outcome::Diverged(9))]);
        end.unwrap();

        let (outcomes, end) = lesson_by(&format!("{first}\nexit 3"));
        assert_eq!(outcomes, [known]);
        assert!(end.unwrap_err().to_string().contains("failed"));

        let (outcomes, end) = lesson_by(&format!("{first}\necho no JSON\nexec sleep 20"));
        assert_eq!(outcomes, [known]);
        assert!(end.unwrap_err().to_string().contains("no JSON"));
    }

    #[test]
    fn what_programs_write_is_read() {
        let diverged = trainer::Error::NonFiniteLoss {
            epoch: 1,
            step: 23,
            loss: f32::NAN,
            steps_made: 65,
            last_checkpoint: trainer::LastCheckpoint::None,
        };
        let log = format!("scratch-train failed: Run: x\nerror: {diverged}");
        assert_eq!(step_of_divergence(&log), Some(23));
        assert_eq!(step_of_divergence("error: no such file"), None);

        let log = "Run: x\n WARN it cannot be recorded\nDEBUG an engine\nstep 1\n";
        assert_eq!(
            warnings("lesson-32-0", log),
            ["lesson-32-0: WARN it cannot be recorded"]
        );

        let log = "x\nDevice: cuda:0, NVIDIA H200 with 139.8 GiB\nData: y\n";
        let device = device_of(log).unwrap();
        assert_eq!(device, "cuda:0, NVIDIA H200 with 139.8 GiB");
        assert_eq!(device_of("Device: the CPU; no GPU can be used\n"), None);

        let csv = "epoch,images_per_second,x\n1,10.5,0\n2,20.25,0\n";
        assert_eq!(last_speed(csv).unwrap(), 20.25);
        assert!(last_speed("epoch\n").is_err());
        let outcome_of = |line: &str| serde_json::from_str::<Trained>(line).unwrap().outcome();
        let line = r#"{"seed": 2, "diverged": null, "accuracy": 55.5, "loss": 1.2, "images_per_second": 5, "framework": "PyTorch"}"#;
        assert_eq!(outcome_of(line).unwrap(), Outcome::Accuracy(55.5));
        let line = r#"{"seed": 4, "diverged": 19, "framework": "PyTorch"}"#;
        assert_eq!(outcome_of(line).unwrap(), Outcome::Diverged(19));
        assert!(outcome_of(r#"{"seed": 4, "framework": "PyTorch"}"#).is_err());
    }
}
