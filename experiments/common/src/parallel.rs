//! Processes that train one network together: who this one is, and how it joins the others.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use data_parallel::{Backend, Options, ProcessGroup, Ranks};
use serde::Serialize;
use serde_json::Value;

use crate::arguments::ParallelArguments;
use crate::compute::ComputeConfig;
use crate::experiment::RunConfig;

/// Seconds after which a rank that says nothing is given up.
const TIMEOUT: &str = "DATA_PARALLEL_TIMEOUT";

/// What a process does in a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Role {
    /// All of it.
    Alone,
    /// Starts the others and waits for them.
    Launcher { processes: usize },
    /// One part of it, told by the environment.
    Rank(Ranks),
}

impl Role {
    /// By the environment alone.
    pub(crate) fn from_environment() -> Result<Self> {
        let ranks = Ranks::from_environment()?;
        Ok(match ranks.filter(|ranks| ranks.world_size > 1) {
            Some(ranks) => Self::Rank(ranks),
            None => Self::Alone,
        })
    }

    /// By the flags and the environment.
    pub(crate) fn asked_for(parallel: &ParallelArguments) -> Result<Self> {
        let (flag, asked) = match (parallel.gpus, parallel.processes) {
            (Some(gpus), _) => ("--gpus", Some(gpus)),
            (None, processes) => ("--processes", processes),
        };
        let from_environment = Self::from_environment()?;
        Ok(match (from_environment, asked) {
            (Self::Rank(ranks), asked) => {
                let asked = asked.unwrap_or(ranks.world_size as u64);
                ensure!(
                    asked == ranks.world_size as u64,
                    "{flag} {asked} does not fit the environment, where WORLD_SIZE is {}",
                    ranks.world_size
                );
                Self::Rank(ranks)
            }
            (_, Some(processes @ 2..)) => Self::Launcher {
                processes: usize::try_from(processes)?,
            },
            _ => Self::Alone,
        })
    }

    /// In a run whose settings are known.
    pub(crate) fn of(compute: &ComputeConfig) -> Result<Self> {
        match (Self::from_environment()?, compute.processes) {
            (Self::Alone, 1) => Ok(Self::Alone),
            (Self::Alone, processes) => Ok(Self::Launcher { processes }),
            (rank, processes) => {
                ensure!(
                    rank.processes() == processes,
                    "the run is one of {processes} processes, and WORLD_SIZE is {}",
                    rank.processes()
                );
                Ok(rank)
            }
        }
    }

    /// Whether this process works in the run's folder, if it works at all.
    pub(crate) fn is_first(&self) -> bool {
        !matches!(self, Self::Rank(ranks) if ranks.rank > 0)
    }

    pub(crate) fn local_rank(&self) -> usize {
        match self {
            Self::Rank(ranks) => ranks.local_rank,
            _ => 0,
        }
    }

    pub(crate) fn processes(&self) -> usize {
        match self {
            Self::Alone => 1,
            Self::Launcher { processes } => *processes,
            Self::Rank(ranks) => ranks.world_size,
        }
    }

    pub(crate) fn processes_on_this_machine(&self) -> usize {
        match self {
            Self::Rank(ranks) => ranks.local_world_size,
            _ => self.processes(),
        }
    }
}

/// This process' number where it is one of several that train together.
static RANK: OnceLock<usize> = OnceLock::new();

/// Has this process speak as one of several, where the environment says so. A program that trains begins with it; any other speaks as
/// the only one, whatever a launcher has left in the environment.
pub(crate) fn speak_as_rank() {
    if let Ok(Role::Rank(ranks)) = Role::from_environment() {
        let _ = RANK.set(ranks.rank);
    }
}

/// The number that [`speak_as_rank`] found.
pub(crate) fn rank() -> Option<usize> {
    RANK.get().copied()
}

/// The same where it is not that of the first; such a process prints no results.
pub(crate) fn later_rank() -> Option<usize> {
    rank().filter(|&rank| rank > 0)
}

/// Joins the others, who must have the same `facts`; None for a process that is alone.
///
/// # Errors
/// That they cannot be found or differ, and a timeout that is no number.
pub(crate) fn connect(
    role: &Role,
    device: &Device,
    facts: BTreeMap<String, String>,
) -> Result<Option<ProcessGroup>> {
    let Role::Rank(ranks) = role else {
        return Ok(None);
    };
    let mut options = Options {
        facts,
        ..Options::default()
    };
    if let Some(text) = std::env::var_os(TIMEOUT) {
        let text = text.to_string_lossy();
        let seconds = text.parse().ok().filter(|&seconds: &u64| seconds > 0);
        let seconds = seconds.with_context(|| {
            format!(
                "the environment variable {TIMEOUT} is {text:?}; it must be a whole number of seconds, at least 1"
            )
        })?;
        options.timeout = Duration::from_secs(seconds);
    }
    let group = ProcessGroup::connect(ranks, &options, Backend::of(device));
    Ok(Some(group.context("the processes cannot train together")?))
}

/// What must be the same on all ranks: the program, and its settings but for those that may differ
/// between machines.
pub(crate) fn facts<M: Serialize>(
    (name, version): (&str, &str),
    config: &RunConfig<M>,
) -> Result<BTreeMap<String, String>> {
    let mut settings = serde_json::to_value(config).context("cannot write the settings")?;
    if let Value::Object(groups) = &mut settings {
        if let Some(Value::Object(compute)) = groups.get_mut("compute") {
            compute.remove("device");
            compute.remove("threads");
        }
        // What lies in the folder is compared instead.
        if let Some(Value::Object(data)) = groups.get_mut("data") {
            data.remove("data_dir");
        }
    }
    let mut facts = BTreeMap::from([("program".to_string(), format!("{name} {version}"))]);
    flatten("", &settings, &mut facts);
    Ok(facts)
}

/// `{"training": {"seed": 0}}` becomes `training.seed`: `0`.
fn flatten(name: &str, value: &Value, facts: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(fields) => {
            for (field, value) in fields {
                let dot = if name.is_empty() { "" } else { "." };
                flatten(&format!("{name}{dot}{field}"), value, facts);
            }
        }
        value => {
            facts.insert(name.to_string(), value.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_compared_one_by_one() {
        let mut facts = BTreeMap::new();
        let settings = serde_json::json!({"a": {"b": 1, "c": {"d": "x"}}, "e": [1, 2]});
        flatten("", &settings, &mut facts);
        let expected = [("a.b", "1"), ("a.c.d", "\"x\""), ("e", "[1,2]")];
        assert_eq!(
            facts,
            expected
                .map(|(name, value)| (name.into(), value.into()))
                .into()
        );
    }
}
