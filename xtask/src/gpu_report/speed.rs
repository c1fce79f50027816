//! Speed and memory of a kind of work, ours in turn with PyTorch's.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use super::runs::{Runs, words};
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

impl Runs<'_> {
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
    use super::*;

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
    fn the_speed_is_that_of_the_last_epoch() {
        let csv = "epoch,images_per_second,x\n1,10.5,0\n2,20.25,0\n";
        assert_eq!(last_speed(csv).unwrap(), 20.25);
        assert!(last_speed("epoch\n").is_err());
    }
}
