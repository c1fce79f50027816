//! Tells the program, for `environment.json`, which compiler and which packages it was built from.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// Packages whose version can change a run's numbers or files.
const PACKAGES: [&str; 5] = ["candle-core", "rand", "rand_chacha", "rayon", "safetensors"];

fn main() {
    let rustc = env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let version = Command::new(rustc).arg("--version").output();
    let version = version.map_or_else(
        |_| "unknown".into(),
        |output| String::from_utf8_lossy(&output.stdout).trim().to_string(),
    );
    println!("cargo::rustc-env=TRAINER_RUSTC={version}");

    let folder = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let lock_file = Path::new(&folder).join("../../Cargo.lock");
    let lock = fs::read_to_string(&lock_file).unwrap_or_default();
    println!("cargo::rerun-if-changed={}", lock_file.display());
    println!("cargo::rustc-env=TRAINER_PACKAGES={}", versions(&lock));
}

/// `name=version` of each package above. Two versions of one package are joined by `+`.
fn versions(lock: &str) -> String {
    let value = |line: &str| Some(line.split_once(" = ")?.1.trim_matches('"').to_string());
    let mut found: Vec<String> = Vec::new();
    for name in PACKAGES {
        let versions: Vec<String> = lock
            .split("[[package]]")
            .filter(|entry| entry.contains(&format!("name = \"{name}\"\n")))
            .filter_map(|entry| entry.lines().find(|line| line.starts_with("version")))
            .filter_map(value)
            .collect();
        found.push(format!("{name}={}", versions.join("+")));
    }
    found.join(" ")
}
