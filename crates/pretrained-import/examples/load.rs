//! Reads a file of weights and prints how long it took, as tools/pytorch/time_load.py wants it.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use pretrained_import::StateDict;

fn main() -> ExitCode {
    let Some(path) = std::env::args().nth(1) else {
        eprintln!("error: give the file to read");
        return ExitCode::FAILURE;
    };
    let before = peak_mib();
    let start = Instant::now();
    match StateDict::read(Path::new(&path)) {
        Ok(state) => {
            let seconds = start.elapsed().as_secs_f64();
            let peak = peak_mib();
            println!(
                "{{\"seconds\": {seconds}, \"tensors\": {}, \"peak_mib\": {peak}, \"added_mib\": {}}}",
                state.tensors.len(),
                peak - before
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// 0 where the system does not tell.
fn peak_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}
