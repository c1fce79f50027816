//! The GPU that the report is about, as nvidia-smi tells of it.

use std::env;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Serialize;

/// What nvidia-smi says of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Gpu {
    pub(super) name: String,
    pub(super) driver: String,
    pub(super) memory: String,
    /// Such as 9.0.
    pub(super) compute_capability: String,
}

impl Gpu {
    /// Whether cuDNN has convolutions in bf16 for it, and so our programs; one that is not known is given the benefit of the doubt.
    pub(super) fn has_bf16(&self) -> bool {
        let major = self.compute_capability.split('.').next();
        major
            .and_then(|major| major.parse::<u32>().ok())
            .is_none_or(|major| major >= 8)
    }
}

/// Has a program number the GPUs as nvidia-smi does: else CUDA counts the fastest first.
pub(super) fn in_order(command: &mut Command) -> &mut Command {
    command.env("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
}

/// The GPU that programs get as cuda:0.
pub(super) fn find() -> Result<Gpu> {
    let none = "this machine has no NVIDIA GPU that can be used, and gpu-report shows nothing without one \
                (`cargo xtask cuda-check` needs none)";
    let text = ask(
        "name,driver_version,memory.total,compute_cap",
        "csv,noheader",
    )
    .context(none)?;
    parse(&text).with_context(|| format!("{none}: nvidia-smi lists {:?}", text.trim()))
}

/// What all processes hold of its memory.
pub(super) fn memory_in_use() -> Result<u64> {
    let text = ask("memory.used", "csv,noheader,nounits")?;
    let first = text.lines().next().unwrap_or_default().trim();
    first
        .parse()
        .with_context(|| format!("nvidia-smi says {first:?} of the memory in use"))
}

fn ask(what: &str, format: &str) -> Result<String> {
    let visible = env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
    let output = Command::new("nvidia-smi")
        .arg(format!("--id={}", first_of(&visible)))
        .arg(format!("--query-gpu={what}"))
        .arg(format!("--format={format}"))
        .output()
        .context("cannot start nvidia-smi")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("nvidia-smi says {:?}", text.trim());
    }
    Ok(text)
}

/// A number or UUID, from the value of `CUDA_VISIBLE_DEVICES`.
fn first_of(visible: &str) -> &str {
    match visible.split(',').next().unwrap_or_default().trim() {
        "" => "0",
        first => first,
    }
}

/// The first line of nvidia-smi's list.
fn parse(text: &str) -> Option<Gpu> {
    let line = text.lines().next()?;
    let mut fields = line.split(',').map(|field| field.trim().to_string());
    let gpu = Gpu {
        name: fields.next().filter(|name| !name.is_empty())?,
        driver: fields.next()?,
        memory: fields.next()?,
        compute_capability: fields.next()?,
    };
    Some(gpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gpu_is_read() {
        let gpu = parse("NVIDIA H200, 580.1, 143771 MiB, 9.0\n").unwrap();
        let expected = ["NVIDIA H200", "580.1", "143771 MiB", "9.0"];
        let found = [gpu.name, gpu.driver, gpu.memory, gpu.compute_capability];
        assert_eq!(found, expected);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn bf16_is_there_from_8_0_on() {
        let has_bf16 = |capability: &str| {
            Gpu {
                compute_capability: capability.into(),
                ..Gpu::default()
            }
            .has_bf16()
        };
        let found = ["7.5", "8.0", "9.0", "12.0", "[N/A]"].map(has_bf16);
        assert_eq!(found, [false, true, true, true, true]);
    }

    #[test]
    fn the_first_visible_gpu_is_cudas_first() {
        let found = ["", "3", "2,0", " GPU-5f1a , 1"].map(first_of);
        assert_eq!(found, ["0", "3", "2", "GPU-5f1a"]);
    }
}
