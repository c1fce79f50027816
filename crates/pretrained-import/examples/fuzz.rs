//! Feeds mutated files to every reader: `cargo run -p pretrained-import --example fuzz -- --inputs 1000000`.
//!
//! Each input is one of PyTorch's fixtures with bytes changed, runs copied, cut out or exchanged
//! with another file's, numbers set to their extremes, or a program of random opcodes; half of the
//! zip files are mutated inside of their entries, under the right checksums. A panic ends the run
//! with the input's seed, from which it can be made again; so does an input that makes the reader
//! allocate more than it may.

use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use peak_alloc::PeakAlloc;
use pretrained_import::StateDict;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Bytes that a reader may have allocated at once for an input of `len` bytes, its tensors
/// included. A mebibyte is the archive's buffers; what a byte of pickle may take, tests/memory.rs
/// tells.
fn allowed(len: usize) -> usize {
    (1 << 20) + 128 * len
}

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
        (
            "zip",
            &[
                "zip.pth",
                "protocol4.pth",
                "wrapped_zip.pth",
                "trainer_zip.pth",
                "trainer_protocol4.pth",
                "averaged.pth",
            ],
        ),
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
        let (mut accepted, mut most) = (0u64, (0, 0));
        for number in 0..arguments.inputs {
            let seed = arguments.seed.wrapping_add(number);
            let input = mutated(name, &files, &mut ChaCha8Rng::seed_from_u64(seed));
            let before = ALLOCATOR.current_usage();
            ALLOCATOR.reset_peak_usage();
            let result =
                std::panic::catch_unwind(|| StateDict::from_bytes(&input, Path::new("input")));
            let peak = ALLOCATOR.peak_usage().saturating_sub(before);
            let failure = match result {
                Err(_) => Some("panics".to_owned()),
                Ok(_) if peak > allowed(input.len()) => {
                    let (len, allowed) = (input.len(), allowed(input.len()));
                    Some(format!(
                        "of {len} bytes makes the reader allocate {peak}, which may be {allowed}"
                    ))
                }
                Ok(result) => {
                    accepted += u64::from(result.is_ok());
                    None
                }
            };
            if let Some(failure) = failure {
                eprintln!("error: {name}: the input of --seed {seed} --inputs 1 {failure}");
                return ExitCode::FAILURE;
            }
            most = most.max((peak, input.len()));
        }
        println!(
            "{name:12} {} inputs in {:.0} s: {accepted} accepted, {} refused, no panic; at most {} \
             bytes allocated, for an input of {}",
            arguments.inputs,
            start.elapsed().as_secs_f64(),
            arguments.inputs - accepted,
            most.0,
            most.1,
        );
    }
    ExitCode::SUCCESS
}

fn read(path: &PathBuf) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

fn mutated(reader: &str, files: &[Vec<u8>], random: &mut ChaCha8Rng) -> Vec<u8> {
    if reader == "zip" && random.random() {
        let file = &files[random.random_range(0..files.len())];
        return with_mutated_entry(file, random).expect("a fixture is an archive");
    }
    mutate(files, random)
}

/// Changes an entry of an archive, most often the pickle, and gives it the right checksum.
fn with_mutated_entry(file: &[u8], random: &mut ChaCha8Rng) -> zip::result::ZipResult<Vec<u8>> {
    let mut archive = zip::ZipArchive::new(Cursor::new(file))?;
    let mut changed = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let stored =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index)?;
        let name = entry.name()?.into_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        let one_in = if name.ends_with("data.pkl") {
            1.0
        } else {
            0.03
        };
        if random.random_bool(one_in) {
            bytes = mutate(&[bytes], random);
        }
        changed.start_file(name, stored)?;
        changed.write_all(&bytes)?;
    }
    Ok(changed.finish()?.into_inner())
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
                const OPCODES: &[u8] = b"\x80\x95.(012N\x88\x89JKM\x8a\x8bG\x8cUXT\x8dCB\x8e)\x85\x86\x87t]ae}suc\x93RbQqr\x94hj\x81i\x8f\x90\x91\x96";
                for byte in &mut bytes[at..at + len] {
                    *byte = OPCODES[random.random_range(0..OPCODES.len())];
                }
            }
            _ => bytes.truncate(at),
        }
    }
    bytes
}
