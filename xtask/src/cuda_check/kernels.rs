//! `cargo xtask cuda-check --kernels`: what the CUDA kernels take of a GPU, by nvcc.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::workspace::repository;

/// The GPU to compile for: Hopper.
const ARCH: &str = "sm_90";

/// Prints registers, shared memory and what did not fit into registers ("spilled") by kernel, as a table in Markdown.
pub(super) fn run() -> Result<()> {
    let root = repository();
    let sources = root.join("crates/candle-cnn/src");
    let prelude = fs::read_to_string(sources.join("cuda/prelude.cuh"))?;
    let nvcc = nvcc();
    let folder = root.join("target/cuda-kernels");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut rows = Vec::new();
    for file in kernel_files(&sources)? {
        let text = fs::read_to_string(&file)?;
        let whole = folder.join("kernels.cu");
        fs::write(&whole, format!("{prelude}\n{text}"))?;
        let output = Command::new(&nvcc)
            .args(["-cubin", "-arch", ARCH, "-Xptxas", "-v", "-o"])
            .arg(folder.join("kernels.cubin"))
            .arg(&whole)
            .output()
            .with_context(|| {
                format!(
                    "cannot start {}: install CUDA's nvcc, or name it in NVCC",
                    nvcc.display()
                )
            })?;
        let log = String::from_utf8_lossy(&output.stderr);
        let name = file.strip_prefix(&sources)?.display().to_string();
        if !output.status.success() {
            bail!("{name} does not compile: {log}");
        }
        let found = resources(&log);
        if found.is_empty() {
            bail!(
                "{} says nothing of {name}: is it a stand-in?",
                nvcc.display()
            );
        }
        rows.extend(found.into_iter().map(|r| (name.clone(), r)));
    }
    println!("| file | kernel | registers | shared, bytes | spilled, bytes |");
    println!("| --- | --- | ---: | ---: | ---: |");
    for (file, r) in rows {
        let (kernel, registers, shared, spilled) = (r.kernel, r.registers, r.shared, r.spilled);
        println!("| {file} | {kernel} | {registers} | {shared} | {spilled} |");
    }
    Ok(())
}

/// The nvcc that a build would take, or one that is at hand.
pub(crate) fn nvcc() -> PathBuf {
    let of_home = |home| Path::new(&home).join("bin/nvcc");
    match (env::var_os("NVCC"), env::var_os("CUDA_HOME").map(of_home)) {
        (Some(nvcc), _) => nvcc.into(),
        (None, Some(nvcc)) if nvcc.exists() => nvcc,
        _ => "nvcc".into(),
    }
}

/// Every `.cu` file, in order.
fn kernel_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(kernel_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "cu") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[derive(Debug, PartialEq)]
struct Resources {
    kernel: String,
    registers: u32,
    shared: u32,
    spilled: u32,
}

/// What `ptxas -v` says of each kernel, by name.
fn resources(log: &str) -> Vec<Resources> {
    let mut found = Vec::new();
    let (mut kernel, mut spilled) = (None, 0);
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            kernel = rest.split_once('\'').map(|(name, _)| name.to_owned());
        } else if line.contains("bytes spill stores") {
            spilled = number_before(line, " bytes spill stores").unwrap_or(0)
                + number_before(line, " bytes spill loads").unwrap_or(0);
        } else if let Some(registers) = number_before(line, " registers")
            && let Some(kernel) = kernel.take()
        {
            found.push(Resources {
                kernel,
                registers,
                shared: number_before(line, " bytes smem").unwrap_or(0),
                spilled,
            });
        }
    }
    found.sort_by(|a, b| a.kernel.cmp(&b.kernel));
    found
}

fn number_before(line: &str, what: &str) -> Option<u32> {
    let (before, _) = line.split_once(what)?;
    before.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_are_read_from_what_ptxas_says() {
        let log = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'relu_f32' for 'sm_90'
ptxas info    : Function properties for relu_f32
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 2048 bytes smem
ptxas info    : Compiling entry function 'relu_bf16' for 'sm_90'
ptxas info    : Function properties for relu_bf16
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
";
        let expected = |kernel: &str, registers, shared, spilled| Resources {
            kernel: kernel.to_owned(),
            registers,
            shared,
            spilled,
        };
        assert_eq!(
            resources(log),
            [
                expected("relu_bf16", 10, 0, 0),
                expected("relu_f32", 12, 2048, 12)
            ]
        );
    }
}
