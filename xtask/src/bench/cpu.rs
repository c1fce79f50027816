//! `cargo xtask bench cpu`: every row of the README's table of performance in one record.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use trainer::Environment;

use super::{
    Mode, Model, OURS, Round, Side, Work, alternate, median, our_side, pytorch, pytorch_side,
    ratios, table,
};
use crate::record;
use crate::workspace::repository;

#[derive(Debug, Args)]
pub(crate) struct Cpu {
    /// Python that can import torch [default: python3, if it can; else only our side is timed]
    #[arg(long, value_name = "PYTHON")]
    pytorch: Option<PathBuf>,
    /// Rounds that count; one more goes before them as warm-up
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only these, for example lesson-train,torchvision-full [default: all]
    #[arg(long, value_name = "ROW", value_delimiter = ',')]
    rows: Vec<String>,
    /// Where the record goes; must not exist yet [default: `results/DATE-cpu-MACHINE`]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Readme {
    /// The record's folder
    record: PathBuf,
}

/// One kind of work.
struct Row {
    name: &'static str,
    what: &'static str,
    work: Work,
    /// Steps a side makes in a round.
    steps: u32,
    against: Against,
}

/// Whom our side is compared with.
#[derive(Clone, Copy, PartialEq)]
enum Against {
    /// PyTorch in both layouts.
    PyTorch,
    /// The same, and the machine's rate of matrix products.
    PyTorchAndLimit,
    /// PyTorch in both layouts, all restricted to AVX2.
    PyTorchOnAvx2,
    /// Ourselves with one thread.
    OneThread,
}

const LESSON: Row = Row {
    name: "lesson-train",
    what: "lesson's net, training step, batch 32",
    work: Work {
        model: Model::Lesson,
        mode: Mode::Train,
        frozen: false,
        batch: 32,
        image_size: 32,
    },
    steps: 1,
    against: Against::PyTorchAndLimit,
};

const TORCHVISION: Row = Row {
    name: "torchvision-full",
    what: "torchvision's net, 32×32, training step, batch 32",
    work: Work {
        model: Model::Torchvision,
        ..LESSON.work
    },
    steps: 8,
    against: Against::PyTorch,
};

const ROWS: [Row; 9] = [
    LESSON,
    Row {
        name: "lesson-inference-32",
        what: "lesson's net, inference, batch 32",
        work: Work {
            mode: Mode::Inference,
            ..LESSON.work
        },
        steps: 3,
        against: Against::PyTorch,
    },
    Row {
        name: "lesson-inference-1",
        what: "lesson's net, inference, one picture",
        work: Work {
            mode: Mode::Inference,
            batch: 1,
            ..LESSON.work
        },
        steps: 40,
        against: Against::PyTorch,
    },
    TORCHVISION,
    Row {
        name: "torchvision-frozen",
        what: "torchvision's net, 32×32, training step of the head alone, batch 32",
        work: Work {
            frozen: true,
            ..TORCHVISION.work
        },
        steps: 20,
        ..TORCHVISION
    },
    Row {
        name: "torchvision-224-inference-8",
        what: "torchvision's net, 224×224, inference, batch 8",
        work: Work {
            mode: Mode::Inference,
            batch: 8,
            image_size: 224,
            ..TORCHVISION.work
        },
        steps: 6,
        ..TORCHVISION
    },
    Row {
        name: "lesson-train-threads",
        what: "lesson's net, training step, batch 32: all threads against one",
        against: Against::OneThread,
        ..LESSON
    },
    Row {
        name: "lesson-train-avx2",
        what: "lesson's net, training step, batch 32, all on AVX2",
        against: Against::PyTorchOnAvx2,
        ..LESSON
    },
    Row {
        name: "torchvision-full-avx2",
        what: "torchvision's net, 32×32, training step, batch 32, all on AVX2",
        against: Against::PyTorchOnAvx2,
        ..TORCHVISION
    },
];

const NCHW: &str = "PyTorch, nchw";
const CHANNELS_LAST: &str = "PyTorch, channels_last";
const LIMIT: &str = "matrix products alone";
const ONE_THREAD: &str = "ours, one thread";

/// The rounds of each row that was measured.
type Record = BTreeMap<String, Vec<Round>>;

pub(super) fn run(arguments: &Cpu) -> Result<()> {
    let names: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
    for wanted in &arguments.rows {
        ensure!(
            names.contains(&wanted.as_str()),
            "--rows: there is no {wanted:?}; the rows are {}",
            names.join(", ")
        );
    }
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let environment = record::environment(threads as usize);
    let out = record::new_directory(arguments.out.clone(), "cpu", &environment)?;
    let python = pytorch(arguments.pytorch.as_deref(), super::IMPORTS_TORCH)?;
    let mut record = Record::new();
    for row in &ROWS {
        if !arguments.rows.is_empty() && !arguments.rows.iter().any(|wanted| wanted == row.name) {
            continue;
        }
        eprintln!("{}: {}", row.name, row.what);
        let sides = row.sides(python.as_deref(), threads)?;
        let rounds = alternate(sides, arguments.rounds, row.steps)?;
        println!("\n{}\n\n{}", row.what, table(&rounds));
        record.insert(row.name.to_string(), rounds);
        // After each row, so that a failure later loses nothing.
        write(&out, &record, &environment)?;
    }
    println!("{}\nRecorded in {}", summary(&record), out.display());
    Ok(())
}

impl Row {
    fn sides(&self, python: Option<&Path>, threads: u32) -> Result<Vec<Side>> {
        let mut ours = our_side(&self.work, threads);
        if self.against == Against::PyTorchOnAvx2 {
            ours.env("CANDLE_CNN_ISA", "avx2");
        }
        let mut sides = vec![Side::start(OURS, ours)?];
        if self.against == Against::OneThread {
            sides.push(Side::start(ONE_THREAD, our_side(&self.work, 1))?);
        }
        let Some(python) = python else {
            return Ok(sides);
        };
        if self.against != Against::OneThread {
            for (name, layout) in [(NCHW, "nchw"), (CHANNELS_LAST, "channels_last")] {
                let mut side = pytorch_side(python, layout, &self.work, threads);
                if self.against == Against::PyTorchOnAvx2 {
                    side.env("ATEN_CPU_CAPABILITY", "avx2")
                        .env("ONEDNN_MAX_CPU_ISA", "AVX2")
                        .env("MKL_ENABLE_INSTRUCTIONS", "AVX2");
                }
                sides.push(Side::start(name, side)?);
            }
        }
        if self.against == Against::PyTorchAndLimit {
            let mut side = Command::new(python);
            side.arg(repository().join("tools/pytorch/bench_sgemm.py"))
                .args(["--batch", &self.work.batch.to_string()])
                .args(["--threads", &threads.to_string()]);
            sides.push(Side::start(LIMIT, side)?);
        }
        Ok(sides)
    }
}

/// The table of all rows.
fn summary(record: &Record) -> String {
    let mut text = "| work | ours | ÷ PyTorch NCHW | ÷ channels_last | ÷ the faster | memory, ours ÷ the lesser |\n\
                    | --- | ---: | ---: | ---: | ---: | ---: |\n"
        .to_string();
    let mut notes = String::new();
    for row in &ROWS {
        let Some(rounds) = record.get(row.name) else {
            continue;
        };
        let times: Vec<f64> = rounds
            .iter()
            .filter_map(|round| round.get(OURS))
            .map(|answer| 1e3 * answer.seconds_per_step)
            .collect();
        let time = if times.is_empty() {
            f64::NAN
        } else {
            median(&times)
        };
        if row.against == Against::OneThread {
            let _ = writeln!(
                notes,
                "\nThreads: a step of the lesson's net with all threads takes {} of the time with one.",
                ratios(rounds, &[ONE_THREAD])
            );
            continue;
        }
        let _ = writeln!(
            text,
            "| {} | {time:.0} ms | {} | {} | {} | {} |",
            row.what,
            ratios(rounds, &[NCHW]),
            ratios(rounds, &[CHANNELS_LAST]),
            ratios(rounds, &[NCHW, CHANNELS_LAST]),
            memory(rounds).unwrap_or_default(),
        );
        if row.against == Against::PyTorchAndLimit {
            let limit = ratios(rounds, &[LIMIT]);
            if !limit.is_empty() {
                let _ = writeln!(
                    notes,
                    "\nThe machine's limit: a training step of the lesson's net takes {limit} of the time that its 278 GFLOP \
                     take as matrix products of MKL in the same rounds."
                );
            }
        }
    }
    text + &notes
}

/// Our peak of memory beside the smaller of PyTorch's.
fn memory(rounds: &[Round]) -> Option<String> {
    let last = rounds.last()?;
    let peak = |side: &str| last.get(side)?.peak_mib;
    let (ours, theirs) = (peak(OURS)?, peak(NCHW)?.min(peak(CHANNELS_LAST)?));
    Some(format!(
        "{:.2} ({ours:.0} of {theirs:.0} MiB)",
        ours / theirs
    ))
}

fn write(out: &Path, rows: &Record, environment: &Environment) -> Result<()> {
    let mut readme = format!(
        "# Steps of both networks on the CPU, f32, {} threads\n\n{}, {}\n\n{}\n\
         All sides of a row alternate in one run after a warm-up round. Ratios are of times in the same round, as the\n\
         median with the least and the greatest: below 1 we are faster. AVX2 rows restrict our kernels, PyTorch's and\n\
         oneDNN's; small matrix products of the head use what the processor has. Each number is in `rounds.json`, the\n\
         machine in `environment.json`.\n",
        environment.threads,
        record::origin(environment),
        record::processor(environment),
        summary(rows),
    );
    for row in &ROWS {
        if let Some(rounds) = rows.get(row.name) {
            let _ = write!(
                readme,
                "\n## {}: {}\n\n{}",
                row.name,
                row.what,
                table(rounds)
            );
        }
    }
    record::write(out, &readme, ("rounds.json", rows), environment)
}

const BEGIN: &str = "<!-- performance: begin -->";
const END: &str = "<!-- performance: end -->";

pub(super) fn update_readme(arguments: &Readme) -> Result<()> {
    let rounds = arguments.record.join("rounds.json");
    let record: Record = read_json(&rounds)
        .with_context(|| format!("{} is no record of `bench cpu`", rounds.display()))?;
    let origin = origin(repository(), &arguments.record)?;
    let path = repository().join("README.md");
    let readme =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let readme = between_marks(&readme, &format!("{origin}\n\n{}", summary(&record)))
        .with_context(|| format!("cannot update {}", path.display()))?;
    fs::write(&path, readme).with_context(|| format!("cannot write {}", path.display()))
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("cannot read {} as JSON", path.display()))
}

/// Where a record is and what it was measured on, as a line of the README.
fn origin(repository: &Path, record: &Path) -> Result<String> {
    #[derive(Deserialize)]
    struct Origin {
        git_commit: Option<String>,
        git_dirty: Option<bool>,
        cpu_model: Option<String>,
        threads: usize,
    }
    let repository = repository.canonicalize()?;
    let dir = record
        .canonicalize()
        .with_context(|| format!("cannot find {}", record.display()))?;
    let Ok(link) = dir.strip_prefix(repository.join("results")) else {
        bail!(
            "{} does not lie under results/, where the README could point to it: copy it there first",
            record.display()
        );
    };
    let origin: Origin = read_json(&dir.join("environment.json"))?;
    let commit = origin.git_commit.as_deref().unwrap_or("unknown");
    let changes = match origin.git_dirty {
        Some(true) => " with local changes",
        _ => "",
    };
    Ok(format!(
        "Commit {}{changes}, {}, {} threads: [record](results/{}).",
        &commit[..commit.len().min(7)],
        origin.cpu_model.as_deref().unwrap_or("unknown processor"),
        origin.threads,
        link.display()
    ))
}

/// `readme` with `text` between the two marks.
fn between_marks(readme: &str, text: &str) -> Result<String> {
    let parts = readme.split_once(BEGIN).and_then(|(before, rest)| {
        let (_, after) = rest.split_once(END)?;
        Some((before, after))
    });
    match parts {
        Some((before, after)) => Ok(format!(
            "{before}{BEGIN}\n{}\n{END}{after}",
            text.trim_end()
        )),
        None => bail!("it must hold a line {BEGIN} and, after it, a line {END}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Answer;
    use super::*;

    fn round(times: &[(&str, f64, f64)]) -> Round {
        let answer = |&(name, seconds_per_step, mib): &(&str, f64, f64)| {
            let answer = Answer {
                seconds_per_step,
                images_per_second: 1.0,
                peak_mib: Some(mib),
                threads: 2,
                framework: "F".to_string(),
            };
            (name.to_string(), answer)
        };
        times.iter().map(answer).collect()
    }

    #[test]
    fn the_faster_side_is_chosen_in_each_round() {
        let rounds = [
            round(&[
                (OURS, 1.0, 50.0),
                (NCHW, 4.0, 100.0),
                (CHANNELS_LAST, 2.0, 120.0),
            ]),
            round(&[
                (OURS, 1.0, 50.0),
                (NCHW, 1.0, 100.0),
                (CHANNELS_LAST, 2.0, 120.0),
            ]),
            round(&[
                (OURS, 3.0, 50.0),
                (NCHW, 4.0, 100.0),
                (CHANNELS_LAST, 6.0, 120.0),
            ]),
        ];
        assert_eq!(ratios(&rounds, &[NCHW, CHANNELS_LAST]), "0.75 (0.50–1.00)");
        assert_eq!(ratios(&rounds, &[NCHW]), "0.75 (0.25–1.00)");
        assert_eq!(ratios(&rounds, &["absent"]), "");
        assert_eq!(memory(&rounds).unwrap(), "0.50 (50 of 100 MiB)");
    }

    #[test]
    fn a_row_without_pytorch_shows_our_time_alone() {
        let record = Record::from([("lesson-train".into(), vec![round(&[(OURS, 1.5, 50.0)])])]);
        let line = "| lesson's net, training step, batch 32 | 1500 ms |  |  |  |  |";
        assert_eq!(summary(&record).lines().nth(2), Some(line));
    }

    #[test]
    fn the_threads_row_is_a_sentence() {
        let rounds = vec![round(&[(OURS, 1.0, 1.0), (ONE_THREAD, 2.0, 1.0)])];
        let record = Record::from([("lesson-train-threads".into(), rounds)]);
        assert!(summary(&record).contains("takes 0.50 (0.50–0.50) of the time with one"));
    }

    #[test]
    fn the_readme_points_to_a_record_under_results_and_to_no_other() {
        let repository = tempfile::tempdir().unwrap();
        let environment =
            r#"{"git_commit": "0123456789", "git_dirty": true, "cpu_model": "C", "threads": 2}"#;
        let dirs = ["results/a", "b"].map(|dir| repository.path().join(dir));
        for dir in &dirs {
            fs::create_dir_all(dir).unwrap();
            fs::write(dir.join("environment.json"), environment).unwrap();
        }
        assert_eq!(
            origin(repository.path(), &dirs[0]).unwrap(),
            "Commit 0123456 with local changes, C, 2 threads: [record](results/a)."
        );
        let error = origin(repository.path(), &dirs[1]).unwrap_err().to_string();
        assert!(error.contains("results/"), "{error}");
    }

    #[test]
    fn the_readme_changes_between_its_marks_alone() {
        let readme = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        let expected = format!("a\n{BEGIN}\nnew\n{END}\nb\n");
        assert_eq!(between_marks(&readme, "new\n").unwrap(), expected);
        for bad in ["", BEGIN, &format!("{END} {BEGIN}")] {
            let error = between_marks(bad, "new").unwrap_err().to_string();
            assert!(error.contains(BEGIN) && error.contains(END), "{error}");
        }
    }

    #[test]
    fn every_row_has_a_name_of_its_own() {
        let names: std::collections::BTreeSet<_> = ROWS.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), ROWS.len());
    }
}
