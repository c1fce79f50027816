//! Feeds mutated files to every reader: `cargo run -p pretrained-import --example fuzz -- --inputs 1000000`.
//!
//! Each input is one of PyTorch's fixtures with bytes changed, runs copied, cut out or exchanged
//! with another file's, numbers set to their extremes, or a program of random opcodes. A panic ends
//! the run with the input's number and seed, from which it can be made again. The largest single
//! allocation and the largest sum at any moment are reported beside the input's size.
//! `fuzz/` holds the same for cargo-fuzz, which needs a nightly compiler.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use pretrained_import::StateDict;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Mutates files of weights and reads them
#[derive(Parser)]
struct Arguments {
    /// Inputs for each reader
    #[arg(long, default_value_t = 100_000)]
    inputs: u64,
    /// Of the first input; each has its own
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let readers: [(&str, &[&str]); 3] = [
        (
            "legacy",
            &["legacy.pth", "state_dict_legacy.pth", "wrapped_legacy.pth"],
        ),
        ("zip", &["zip.pth", "protocol4.pth", "wrapped_zip.pth"]),
        ("safetensors", &["expected.safetensors"]),
    ];
    for (name, files) in readers {
        let files: Vec<Vec<u8>> = match files
            .iter()
            .map(|file| read(&fixtures.join(file)))
            .collect()
        {
            Ok(files) => files,
            Err(error) => {
                eprintln!("error: {error}");
                return ExitCode::FAILURE;
            }
        };
        let start = Instant::now();
        let (mut accepted, mut most) = (0, 0.0f64);
        for number in 0..arguments.inputs {
            let seed = arguments.seed.wrapping_add(number);
            let input = mutate(&files, &mut ChaCha8Rng::seed_from_u64(seed));
            let result =
                std::panic::catch_unwind(|| StateDict::from_bytes(&input, Path::new("input")));
            match result {
                Ok(Ok(state)) => {
                    accepted += 1;
                    let tensors = state.tensors.values();
                    let held: usize = tensors
                        .map(|t| t.elem_count() * t.dtype().size_in_bytes())
                        .sum();
                    most = most.max(held as f64 / input.len() as f64);
                }
                Ok(Err(_)) => {}
                Err(_) => {
                    eprintln!("error: {name}: the input of --seed {seed} --inputs 1 panics");
                    return ExitCode::FAILURE;
                }
            }
        }
        println!(
            "{name:12} {} inputs in {:.0} s, {accepted} accepted, no panic; tensors took at most {most:.2} \
             bytes per byte of input; peak memory of the process so far {}",
            arguments.inputs,
            start.elapsed().as_secs_f64(),
            peak()
        );
    }
    ExitCode::SUCCESS
}

fn read(path: &PathBuf) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

/// As the system counts it; it tells of an allocation that was used, and no input here has 100 KiB.
fn peak() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.map_or("unknown".into(), |line| line.trim().to_owned())
}

fn mutate(files: &[Vec<u8>], random: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = files[random.random_range(0..files.len())].clone();
    for _ in 0..random.random_range(1..6) {
        if bytes.is_empty() {
            break;
        }
        // What decides is at the beginning of legacy and safetensors files, at the end of zip files.
        let at = match random.random_range(0..3) {
            0 => random.random_range(0..bytes.len().min(400)),
            1 => bytes.len() - 1 - random.random_range(0..bytes.len().min(400)),
            _ => random.random_range(0..bytes.len()),
        };
        let len = random.random_range(1..=(bytes.len() - at).min(40));
        match random.random_range(0..8) {
            0 => bytes[at] = random.random(),
            1 => bytes[at] ^= 1 << random.random_range(0..8),
            2 => {
                bytes.drain(at..at + len);
            }
            3 => {
                let run = bytes[at..at + len].to_vec();
                let to = random.random_range(0..=bytes.len());
                bytes.splice(to..to, run);
            }
            4 => {
                let other = &files[random.random_range(0..files.len())];
                let from = random.random_range(0..other.len());
                let run = other[from..(from + len).min(other.len())].to_vec();
                bytes.splice(at..at + len, run);
            }
            5 => {
                let extreme = [
                    0u64,
                    1,
                    0x7fff_ffff,
                    u64::MAX,
                    1 << 63,
                    1 << 40,
                    0xffff_ffff,
                ];
                let value = extreme[random.random_range(0..extreme.len())].to_le_bytes();
                let width = [1, 2, 4, 8][random.random_range(0..4)].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&value[..width]);
            }
            6 => {
                const OPCODES: &[u8] = b"\x80\x95.(012N\x88\x89JKM\x8a\x8bG\x8cUXT\x8dCB\x8e)\x85\x86\x87t]ae}suc\x93RbQqr\x94hj\x81i";
                for byte in &mut bytes[at..at + len] {
                    *byte = OPCODES[random.random_range(0..OPCODES.len())];
                }
            }
            _ => bytes.truncate(at),
        }
    }
    bytes
}
