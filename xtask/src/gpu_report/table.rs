//! What the report says of its figures: the table, and whether targets are reached.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::Report;
use super::accuracy::Outcome;
use super::speed::{Round, Timing};
use super::work::{EAGER, OURS, OURS_BY_PLANES, OURS_ON_ONE_STREAM, ROWS, Row, SEEDS, Speedup};
use crate::bench::median;

/// Images per second of each side, and how ours compares.
pub(super) fn summary(report: &Report) -> String {
    let mut text = String::new();
    if let Some(tests) = &report.tests {
        let _ = writeln!(text, "CUDA tests: {tests}.\n");
    }
    text += &parity(report);
    text += "\n| work | ours, images/s | ÷ ours by planes | ÷ ours on one stream | ÷ PyTorch eager | ÷ PyTorch's fastest | memory, ours ÷ PyTorch's least | target |\n\
             | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n";
    for row in &ROWS {
        let rounds = report.rows.get(row.name).map_or(&[][..], Vec::as_slice);
        text += &line(row, rounds);
    }
    text += &accuracies(report);
    for failure in &report.failures {
        let _ = writeln!(text, "\nFailed: {failure}.");
    }
    for warning in &report.warnings {
        let _ = writeln!(text, "\nWarned of in {warning}");
    }
    if !report.left_out.is_empty() {
        let _ = writeln!(text, "\nLeft out: {}.", report.left_out.join("; "));
    }
    text
}

/// How far apart the losses of the same steps are.
fn parity(report: &Report) -> String {
    if report.parity.is_empty() {
        return String::new();
    }
    let mut text = "| the same steps twice | largest relative difference of the loss | bound | |\n| --- | ---: | ---: | --- |\n".to_string();
    for parity in &report.parity {
        let _ = writeln!(
            text,
            "| {} | {:.1e} | {:.1e} | {} |",
            parity.what,
            parity.largest_relative_difference,
            parity.bound,
            parity.verdict()
        );
    }
    text
}

/// A row's line of the table.
fn line(row: &Row, rounds: &[Round]) -> String {
    if rounds.is_empty() {
        return format!("| {} | not measured | | | | | | |\n", row.what);
    }
    let ours = rounds.iter().filter_map(|round| round.get(OURS));
    let ours: Vec<f64> = ours.map(|timing| timing.images_per_second).collect();
    if ours.is_empty() {
        return format!("| {} | failed | | | | | | |\n", row.what);
    }
    let over = |side: &str| ratio(rounds, |round| Some(round.get(side)?.images_per_second));
    let found = Speedup {
        eager: over(EAGER),
        fastest: over_the_fastest(row, rounds),
    };
    let memory = memory(row, rounds);
    let memory_ratio = memory.map(|(ours, least)| ours as f64 / least as f64);
    let memory = memory
        .zip(memory_ratio)
        .map(|((ours, least), ratio)| format!("{ratio:.2} ({ours} of {least} MiB)"));
    let show = |ratio: Option<f64>| ratio.map(|r| format!("{r:.2}")).unwrap_or_default();
    format!(
        "| {} | {:.0} | {} | {} | {} | {} | {} | {} |\n",
        row.what,
        median(&ours),
        show(over(OURS_BY_PLANES)),
        show(over(OURS_ON_ONE_STREAM)),
        show(found.eager),
        show(found.fastest),
        memory.unwrap_or_default(),
        verdict(row.targets, found, memory_ratio),
    )
}

/// All of PyTorch's variants in a round. Where one of them failed, nobody knows whether it was the fastest, or took the least
/// memory.
fn theirs(row: &Row, round: &Round) -> Option<Vec<Timing>> {
    let variants = row.variants().iter();
    variants
        .map(|(name, _)| round.get(*name).copied())
        .collect()
}

fn over_the_fastest(row: &Row, rounds: &[Round]) -> Option<f64> {
    if !row.is_held_against_the_fastest() {
        return None;
    }
    ratio(rounds, |round| {
        let speeds = theirs(row, round)?.into_iter();
        speeds.map(|t| t.images_per_second).reduce(f64::max)
    })
}

/// Our GPU memory in MiB and the least of PyTorch's, in the last round that has both.
fn memory(row: &Row, rounds: &[Round]) -> Option<(u64, u64)> {
    rounds.iter().rev().find_map(|round| {
        let least = theirs(row, round)?.into_iter().map(|t| t.gpu_mib).min()?;
        // Nothing at all is what a driver says that does not tell.
        (least > 0).then_some((round.get(OURS)?.gpu_mib, least))
    })
}

/// The accuracy of each seed, ours and PyTorch's, and how far the means of those are apart that ended.
fn accuracies(report: &Report) -> String {
    /// Percentage points, either way.
    const TARGET: f64 = 2.0;
    let (ours, other) = (&report.accuracy, &report.pytorch_accuracy);
    if ours.is_empty() && other.is_empty() {
        return String::new();
    }
    let mut text = "\n| test accuracy after the lesson's 7 epochs, % | ours | PyTorch |\n| --- | ---: | ---: |\n".to_string();
    let show = |outcome: Option<&Outcome>| outcome.map(Outcome::to_string).unwrap_or_default();
    let seeds: BTreeSet<u32> = ours.keys().chain(other.keys()).copied().collect();
    for seed in &seeds {
        let [ours, other] = [ours, other].map(|of| show(of.get(seed)));
        let _ = writeln!(text, "| seed {seed} | {ours} | {other} |");
    }
    if ours.is_empty() || other.is_empty() {
        return text;
    }
    // A seed stands for other weights, order and masks on each side, so that there are no pairs.
    let ended = |of: &BTreeMap<u32, Outcome>| -> Vec<f64> {
        let accuracies = of.values().filter_map(|outcome| match outcome {
            Outcome::Accuracy(accuracy) => Some(*accuracy),
            Outcome::Diverged(_) => None,
        });
        accuracies.collect()
    };
    let (ours, other) = (ended(ours), ended(other));
    let counts = (ours.len(), other.len());
    if counts.0.min(counts.1) < SEEDS as usize {
        let _ = writeln!(
            text,
            "\nThe means are not compared: {} of ours and {} of PyTorch's ended, and {SEEDS} of each are needed.",
            counts.0, counts.1
        );
        return text;
    }
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
    let (ours, other) = (mean(&ours), mean(&other));
    let apart = ours - other;
    let verdict = match apart.abs() <= TARGET {
        true => "reached",
        false => "missed",
    };
    let _ = writeln!(
        text,
        "| mean of those that ended | {ours:.2} | {other:.2} |"
    );
    let _ = writeln!(
        text,
        "\nOurs − PyTorch's, of the means of {} and {} seeds: {apart:+.2} points; at most {TARGET} either way: {verdict}.",
        counts.0, counts.1
    );
    text
}

/// Median of our speed over another's of the same round, of the rounds that have both.
fn ratio(rounds: &[Round], other: impl Fn(&Round) -> Option<f64>) -> Option<f64> {
    let ratios: Vec<f64> = rounds
        .iter()
        .filter_map(|round| Some(round.get(OURS)?.images_per_second / other(round)?))
        .collect();
    (!ratios.is_empty()).then(|| median(&ratios))
}

fn verdict(targets: Speedup, found: Speedup, memory: Option<f64>) -> String {
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
        speed("eager", targets.eager, found.eager),
        speed("the fastest", targets.fastest, found.fastest),
        Some(format!("no more memory: {}", verdict(memory))),
    ];
    lines.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::gpu_report::work::VARIANTS;

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
        let [_, (channels_last, _), (compiled, _)] = VARIANTS;
        let rounds = vec![
            round(&[
                (OURS, 400.0, 500),
                (OURS_BY_PLANES, 500.0, 400),
                (OURS_ON_ONE_STREAM, 160.0, 400),
                (EAGER, 100.0, 1000),
                (channels_last, 200.0, 1500),
                (compiled, 300.0, 2000),
            ]),
            round(&[
                (OURS, 100.0, 500),
                (EAGER, 100.0, 1000),
                (channels_last, 200.0, 1500),
                (compiled, 300.0, 2000),
            ]),
            round(&[
                (OURS, 350.0, 500),
                (EAGER, 100.0, 1000),
                (channels_last, 200.0, 1500),
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
    fn without_one_of_pytorchs_variants_nobody_is_its_fastest_or_leanest() {
        let rounds = vec![round(&[
            (OURS, 400.0, 500),
            (EAGER, 100.0, 1000),
            (VARIANTS[1].0, 200.0, 900),
        ])];
        let report = Report {
            rows: BTreeMap::from([("lesson-32".to_string(), rounds)]),
            ..Report::default()
        };
        let text = summary(&report);
        let line = "| 400 |  |  | 4.00 |  |  | 3 × eager: reached, 1 × the fastest: not measured, no more memory: not measured |";
        assert!(text.contains(line), "{text}");
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
        let eager = |eager| Speedup {
            eager,
            fastest: None,
        };
        let text = verdict(eager(Some(3.0)), eager(None), None);
        assert_eq!(
            text,
            "3 × eager: not measured, no more memory: not measured"
        );
        let text = verdict(eager(Some(3.0)), eager(Some(2.9)), Some(1.01));
        assert_eq!(text, "3 × eager: missed, no more memory: missed");
    }

    #[test]
    fn accuracies_are_held_against_each_other_by_their_means() {
        let seeds = |outcomes: &[Outcome]| (0..).zip(outcomes.iter().copied()).collect();
        let text_of = |ours: &[Outcome], other: &[Outcome]| {
            summary(&Report {
                accuracy: seeds(ours),
                pytorch_accuracy: seeds(other),
                ..Report::default()
            })
        };
        let ours = [50.0, 54.0, 55.0].map(Outcome::Accuracy);
        let text = text_of(&ours, &[51.0; 3].map(Outcome::Accuracy));
        assert!(text.contains("| seed 1 | 54.00 | 51.00 |"), "{text}");
        let means = "| mean of those that ended | 53.00 | 51.00 |";
        assert!(text.contains(means), "{text}");
        let reached = "of 3 and 3 seeds: +2.00 points; at most 2 either way: reached";
        assert!(text.contains(reached), "{text}");
        let text = text_of(&ours, &[56.0, 55.0, 55.5].map(Outcome::Accuracy));
        let missed = "of 3 and 3 seeds: -2.50 points; at most 2 either way: missed";
        assert!(text.contains(missed), "{text}");
        let text = text_of(&ours, &[56.0, 53.0].map(Outcome::Accuracy));
        assert!(text.contains("| seed 2 | 55.00 |  |"), "{text}");
        let unknown = "not compared: 3 of ours and 2 of PyTorch's ended, and 3 of each are needed";
        assert!(text.contains(unknown), "{text}");
        assert!(!text.contains("points"), "{text}");
        assert!(!text_of(&ours, &[]).contains("compared"));
    }

    #[test]
    fn a_seed_that_diverged_counts_for_no_mean() {
        let with_one_more = |first: Outcome| {
            let of: Vec<(u32, Outcome)> =
                (1..4).map(|seed| (seed, Outcome::Accuracy(54.0))).collect();
            of.into_iter().chain([(0, first)]).collect()
        };
        let text = summary(&Report {
            accuracy: with_one_more(Outcome::Diverged(23)),
            pytorch_accuracy: with_one_more(Outcome::Accuracy(58.0)),
            ..Report::default()
        });
        let line = "| seed 0 | diverged at step 23 | 58.00 |";
        assert!(text.contains(line), "{text}");
        assert!(text.contains("of 3 and 4 seeds: -1.00 points"), "{text}");
    }
}
