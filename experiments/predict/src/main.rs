//! Says what is in pictures. The README tells what with.

mod arguments;
mod classifier;
mod evaluate;
mod pictures;
mod preprocess;

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use experiment_common::{
    Precision, bar_of_pictures, conclude, keep_freed_pages, print, say, start_logging,
};
use rayon::prelude::*;
use serde::Serialize;

use crate::arguments::Arguments;
use crate::classifier::{Classifier, Guess};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Pictures a forward pass: enough to keep all cores busy, and results appear as they come.
const BATCH: usize = 16;

fn main() -> ExitCode {
    keep_freed_pages();
    start_logging(None);
    conclude(run(&Arguments::parse_with_defaults()))
}

/// A line of `--json`.
#[derive(Debug, Serialize)]
struct Line<'a> {
    file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    predictions: Option<&'a [Guess]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let compute = arguments.compute.resolve()?;
    ensure!(
        compute.precision != Precision::Bf16,
        "--precision bf16 is for training: predict computes in f32, with or without TF32"
    );
    let to_evaluate = arguments.to_evaluate()?;
    let device = compute.start()?;
    let found = pictures::find(&arguments.pictures);
    let classifier = Classifier::load(&arguments.weights, &device)?;
    say(&classifier.description());
    classifier.assumed().iter().for_each(|line| say(line));
    if let Some((set, data)) = to_evaluate {
        classifier.check_set(set)?;
        let evaluation = evaluate::run(&classifier, &data.load_test()?)?;
        match arguments.json {
            true => print_json(&evaluation)?,
            false => evaluation.lines().iter().for_each(|line| print(line)),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let bar = bar_of_pictures(found.len() as u64);
    let mut failed = 0;
    for files in found.chunks(BATCH) {
        let prepared: Vec<Result<Vec<f32>>> = files
            .par_iter()
            .map(|file| classifier.prepare(file.as_ref().map_err(|e| anyhow::anyhow!("{e:#}"))?))
            .collect();
        let inputs: Vec<&[f32]> = prepared.iter().flatten().map(Vec::as_slice).collect();
        let mut answers = classifier.classify(&inputs, arguments.top())?.into_iter();
        for (file, prepared) in files.iter().zip(&prepared) {
            let path = match file {
                Ok(path) => path,
                Err(error) => &error.path,
            };
            match prepared {
                Ok(_) => show(path, &answers.next().unwrap_or_default(), arguments.json)?,
                Err(error) => {
                    failed += 1;
                    report(path, error, arguments.json)?;
                }
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    if failed > 0 {
        say(&format!(
            "{failed} of {} pictures could not be read",
            found.len()
        ));
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn show(path: &Path, guesses: &[Guess], json: bool) -> Result<()> {
    if json {
        return print_json(&Line {
            file: path.display().to_string(),
            predictions: Some(guesses),
            error: None,
        });
    }
    print(&path.display().to_string());
    for guess in guesses {
        print(&format!(
            "  {:6.2} %  {}",
            100.0 * guess.probability,
            guess.class
        ));
    }
    Ok(())
}

fn report(path: &Path, error: &anyhow::Error, json: bool) -> Result<()> {
    if json {
        print_json(&Line {
            file: path.display().to_string(),
            predictions: None,
            error: Some(format!("{error:#}")),
        })?;
    }
    // Also beside JSON, unless both would end up in front of the same eyes.
    if !json || !std::io::stdout().is_terminal() {
        say(&format!("error: {}: {error:#}", path.display()));
    }
    Ok(())
}

fn print_json(line: &impl Serialize) -> Result<()> {
    print(&serde_json::to_string(line)?);
    Ok(())
}
