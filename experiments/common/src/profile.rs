//! `--profile`: where the time of training steps went, layer by layer and pass by pass.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Adds up what `candle-cnn` and the trainer tell of their time.
#[derive(Clone, Debug, Default)]
pub struct Profile(Arc<Mutex<Rows>>);

#[derive(Debug, Default)]
struct Rows {
    /// In the order in which they came first.
    rows: Vec<Row>,
    index: HashMap<(String, String), usize>,
    /// Those of the pass under way, until it is known whether it is a training step's or an evaluation's.
    pending: Vec<Row>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Row {
    /// Empty for a part of the step.
    layer: String,
    pass: String,
    calls: u64,
    nanoseconds: u64,
    flop: u64,
    bytes: u64,
}

impl Profile {
    /// What is measured by the libraries' targets.
    pub(crate) fn targets() -> tracing_subscriber::filter::Targets {
        tracing_subscriber::filter::Targets::new()
            .with_target(candle_cnn::PROFILE_TARGET, tracing::Level::TRACE)
            .with_target(trainer::PROFILE_TARGET, tracing::Level::TRACE)
    }

    fn lock(&self) -> MutexGuard<'_, Rows> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The table for people: milliseconds a step, the rates of a direct computation in that time.
    pub fn table(&self) -> String {
        let rows = self.lock().rows.clone();
        let parts = || rows.iter().filter(|row| row.layer.is_empty());
        let layers = || rows.iter().filter(|row| !row.layer.is_empty());
        let steps = parts().map(|row| row.calls).max().unwrap_or(0);
        if steps == 0 {
            return "No training step was measured.\n".to_string();
        }
        let total: u64 = parts().map(|row| row.nanoseconds).sum();
        let per_step = |nanoseconds: u64| nanoseconds as f64 / 1e6 / steps as f64;
        let share = |nanoseconds: u64| 100.0 * nanoseconds as f64 / total.max(1) as f64;

        let mut text = format!("{steps} steps of {:.1} ms\n\n", per_step(total));
        let width = layers().map(|row| row.layer.chars().count()).max();
        let width = width.unwrap_or(0).max("layer".len());
        let _ = writeln!(
            text,
            "{:width$}  {:15}  {:>9}  {:>6}  {:>8}  {:>6}",
            "layer", "pass", "ms/step", "share", "GFLOP/s", "GB/s"
        );
        // Layers as the network has them, each with its passes, forward first.
        let mut order: Vec<&str> = Vec::new();
        for row in layers() {
            if !order.contains(&row.layer.as_str()) {
                order.push(&row.layer);
            }
        }
        for layer in order {
            for row in layers().filter(|row| row.layer == layer) {
                let seconds = row.nanoseconds.max(1) as f64 / 1e9;
                let rate = |count: u64| match count {
                    0 => String::new(),
                    _ => format!("{:.1}", count as f64 / seconds / 1e9),
                };
                let _ = writeln!(
                    text,
                    "{layer:width$}  {:15}  {:>9.3}  {:>4.1} %  {:>8}  {:>6}",
                    row.pass,
                    per_step(row.nanoseconds),
                    share(row.nanoseconds),
                    rate(row.flop),
                    rate(row.bytes),
                );
            }
        }
        let _ = writeln!(text, "\n{:15}  {:>9}  {:>6}", "part", "ms/step", "share");
        let mut passes: Vec<(&str, u64)> = Vec::new();
        for row in layers() {
            match passes.iter_mut().find(|(pass, _)| *pass == row.pass) {
                Some((_, sum)) => *sum += row.nanoseconds,
                None => passes.push((&row.pass, row.nanoseconds)),
            }
        }
        for row in parts() {
            let _ = writeln!(
                text,
                "{:15}  {:>9.3}  {:>4.1} %",
                row.pass,
                per_step(row.nanoseconds),
                share(row.nanoseconds)
            );
            let inside = passes.iter().filter(|(pass, _)| match row.pass.as_str() {
                "forward" => pass.starts_with("forward"),
                "backward" => pass.ends_with("gradient"),
                _ => false,
            });
            for (pass, nanoseconds) in inside {
                let name = format!("  {pass}");
                let _ = writeln!(
                    text,
                    "{name:17}  {:>7.3}  {:>4.1} %",
                    per_step(*nanoseconds),
                    share(*nanoseconds)
                );
            }
        }
        text
    }

    /// Writes the sums as `profile.csv` into a run's folder.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, run: &Path) -> Result<()> {
        let mut text = "layer,pass,calls,nanoseconds,flop,bytes\n".to_string();
        for row in &self.lock().rows {
            let _ = writeln!(
                text,
                "{},{},{},{},{},{}",
                row.layer, row.pass, row.calls, row.nanoseconds, row.flop, row.bytes
            );
        }
        let path = run.join("profile.csv");
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

impl<S: Subscriber> Layer<S> for Profile {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut row = Row::default();
        event.record(&mut row);
        let mut rows = self.lock();
        match (row.layer.as_str(), row.pass.as_str()) {
            // What came before a step was an evaluation.
            ("", "data") => rows.pending.clear(),
            ("", _) => {
                for row in std::mem::take(&mut rows.pending) {
                    rows.add(row);
                }
            }
            _ => return rows.pending.push(row),
        }
        rows.add(row);
    }
}

impl Rows {
    fn add(&mut self, row: Row) {
        let key = (row.layer.clone(), row.pass.clone());
        match self.index.get(&key).map(|&index| &mut self.rows[index]) {
            Some(sum) => {
                sum.calls += 1;
                sum.nanoseconds += row.nanoseconds;
                sum.flop += row.flop;
                sum.bytes += row.bytes;
            }
            None => {
                self.index.insert(key, self.rows.len());
                self.rows.push(Row { calls: 1, ..row });
            }
        }
    }
}

impl Visit for Row {
    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "nanoseconds" => self.nanoseconds = value,
            "flop" => self.flop = value,
            "bytes" => self.bytes = value,
            _ => (),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "layer" => self.layer = value.to_string(),
            "pass" | "part" => self.pass = value.to_string(),
            _ => (),
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing_subscriber::layer::SubscriberExt;

    fn told(tell: impl FnOnce()) -> Profile {
        let profile = Profile::default();
        let subscriber =
            tracing_subscriber::registry().with(profile.clone().with_filter(Profile::targets()));
        tracing::subscriber::with_default(subscriber, tell);
        profile
    }

    fn layer(layer: &str, pass: &str, nanoseconds: u64, flop: u64) {
        tracing::trace!(target: candle_cnn::PROFILE_TARGET, layer, pass, nanoseconds, flop, bytes = 0u64);
    }

    fn part(part: &str, nanoseconds: u64) {
        tracing::trace!(target: trainer::PROFILE_TARGET, part, nanoseconds);
    }

    #[test]
    fn times_of_steps_and_not_of_evaluations_are_summed_by_layer_and_pass() {
        let profile = told(|| {
            layer("conv1", "forward", 7_000_000, 9_000_000);
            for _ in 0..2 {
                part("data", 0);
                layer("conv1", "forward", 2_000_000, 4_000_000);
                part("forward", 3_000_000);
                layer("conv1", "input gradient", 4_000_000, 4_000_000);
                part("backward", 5_000_000);
            }
            layer("conv1", "forward", 7_000_000, 9_000_000);
        });
        let table = profile.table();
        for line in [
            "2 steps of 8.0 ms",
            "conv1  forward              2.000  25.0 %       2.0        ",
            "conv1  input gradient       4.000  50.0 %       1.0        ",
            "forward              3.000  37.5 %",
            "  forward            2.000  25.0 %",
            "backward             5.000  62.5 %",
            "  input gradient     4.000  50.0 %",
        ] {
            assert!(table.lines().any(|l| l == line), "{line:?} in\n{table}");
        }
    }

    #[test]
    fn without_a_step_there_is_no_table_but_a_sentence() {
        assert_eq!(told(|| ()).table(), "No training step was measured.\n");
    }

    #[test]
    fn the_file_has_one_line_for_each_layer_and_pass() {
        let profile = told(|| {
            layer("a", "forward", 1, 2);
            layer("a", "forward", 3, 4);
            part("forward", 5);
        });
        let folder = tempfile::tempdir().unwrap();
        profile.write(folder.path()).unwrap();
        let text = std::fs::read_to_string(folder.path().join("profile.csv")).unwrap();
        assert_eq!(
            text,
            "layer,pass,calls,nanoseconds,flop,bytes\na,forward,2,4,6,0\n,forward,1,5,0,0\n"
        );
    }
}
