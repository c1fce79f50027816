//! Programs under test, and what they have written.

use std::env;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Which rank of whose group a program is, what it logs, and whose the Hub's cache is: nothing that a test may inherit.
const INHERITED: [&str; 20] = [
    "RUST_LOG",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
    "DATA_PARALLEL_TIMEOUT",
    "DATA_PARALLEL_LAUNCHED",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    "HUGGINGFACE_HUB_CACHE",
    "NO_PROXY",
    "no_proxy",
    "ALL_PROXY",
    "all_proxy",
];

/// The variable that names a folder with the programs that tests start, where they are not run where cargo has built them.
pub const TESTED_PROGRAMS: &str = "TESTED_PROGRAMS";

/// The program at `path`, or of that name in the folder of [`TESTED_PROGRAMS`], with these arguments, parted by spaces, in an
/// environment that is the same on every machine: it is alone, logs what it logs by default, and reaches neither the network nor
/// the caches of whoever runs the tests.
pub fn program(path: &str, arguments: &str) -> Command {
    let folder = env::var_os(TESTED_PROGRAMS).map(PathBuf::from);
    let mut command = Command::new(moved(Path::new(path), folder.as_deref()));
    command.args(arguments.split_whitespace());
    for variable in INHERITED {
        command.env_remove(variable);
    }
    command.env("HF_HUB_OFFLINE", "1");
    for cache in ["HF_HUB_CACHE", "TORCH_HOME"] {
        command.env(cache, "no-such-cache");
    }
    // Nobody listens there.
    for proxy in ["HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"] {
        command.env(proxy, "http://127.0.0.1:9");
    }
    command
}

fn moved(path: &Path, folder: Option<&Path>) -> PathBuf {
    match (folder, path.file_name()) {
        (Some(folder), Some(name)) if path.is_absolute() => folder.join(name),
        _ => path.to_path_buf(),
    }
}

/// A port of loopback on which nobody listens.
///
/// # Panics
/// Where there is none.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("no free port");
    listener.local_addr().expect("no address").port()
}

/// The only run of `experiment` below `out`; None before it has begun.
///
/// # Panics
/// Where there is more than one.
#[track_caller]
pub fn run_begun(out: &Path, experiment: &str) -> Option<PathBuf> {
    let runs = fs::read_dir(out.join(experiment)).ok()?;
    let runs: Vec<PathBuf> = runs
        .map(|entry| entry.expect("unreadable folder").path())
        .collect();
    assert!(runs.len() < 2, "not one run: {runs:?}");
    runs.into_iter().next()
}

/// The only run of `experiment` below `out`.
///
/// # Panics
/// Where there is none, or more than one.
#[track_caller]
pub fn only_run(out: &Path, experiment: &str) -> PathBuf {
    run_begun(out, experiment).expect("no run")
}

/// Lets a run that was stopped end after so many epochs, whatever it began with; the trainer minds no change of their number.
///
/// # Panics
/// Where its `config.json` is not what the trainer writes.
pub fn set_epochs(run: &Path, epochs: usize) {
    let path = run.join("config.json");
    let config = fs::read_to_string(&path).expect("no config.json");
    let mut config: Value = serde_json::from_str(&config).expect("no JSON");
    config["config"]["training"]["epochs"] = epochs.into();
    fs::write(path, config.to_string()).expect("cannot write config.json");
}

/// Losses of the steps of the only run of `experiment` below `out`.
///
/// # Panics
/// Where there is none, or more than one, or its `metrics.jsonl` is not what the trainer writes.
pub fn step_losses(out: &Path, experiment: &str) -> Vec<f64> {
    let metrics = only_run(out, experiment).join("metrics.jsonl");
    let metrics = fs::read_to_string(metrics).expect("no metrics.jsonl");
    let events = metrics
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("no JSON"));
    events
        .filter(|event| event["event"] == "step")
        .map(|event| event["loss"].as_f64().expect("no loss"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_where_cargo_has_built_it_unless_a_folder_is_named() {
        let built = Path::new("/target/debug/predict");
        assert_eq!(moved(built, None), built);
        let elsewhere = moved(built, Some(Path::new("/pack")));
        assert_eq!(elsewhere, Path::new("/pack/predict"));
        let of_the_system = Path::new("sh");
        assert_eq!(
            moved(of_the_system, Some(Path::new("/pack"))),
            of_the_system
        );
    }
}
