//! The losses of the same steps, computed in several ways.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::Report;
use super::runs::{Runs, words};

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

impl Runs<'_> {
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

#[cfg(test)]
mod tests {
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
}
