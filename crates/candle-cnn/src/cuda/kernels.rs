//! CUDA C kernels, compiled by NVRTC when first needed and kept by device.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::CudaFunction;
use candle_core::cuda_backend::cudarc::nvrtc::{self, CompileError, sys};
use candle_core::cuda_backend::{CudaDevice, DeviceId, WrapErr};

use crate::error::OpError;

/// A `.cu` file of this crate.
pub(crate) struct Source {
    /// The file's path under `src`, which also is its name among the device's modules.
    pub(crate) file: &'static str,
    /// The file's text, which comes behind [`PRELUDE`].
    pub(crate) text: &'static str,
}

/// What every kernel begins with. NVRTC has no header to include, so that it comes before the text.
pub(crate) const PRELUDE: &str = include_str!("prelude.cuh");

/// PTX by device and file.
type Compiled = HashMap<(DeviceId, &'static str), Arc<str>>;

/// The function `name` of `source`, to be launched on the stream of `device`.
///
/// # Errors
/// [`OpError::Kernel`] with NVRTC's log, and CUDA's own where the function is missing.
pub(crate) fn function(device: &CudaDevice, source: &Source, name: &str) -> Result<CudaFunction> {
    static COMPILED: LazyLock<Mutex<Compiled>> = LazyLock::new(Mutex::default);
    let ptx = {
        let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
        match compiled.get(&(device.id(), source.file)) {
            Some(ptx) => ptx.clone(),
            None => {
                let ptx: Arc<str> = compile(device, source)?.into();
                compiled.insert((device.id(), source.file), ptx.clone());
                ptx
            }
        }
    };
    Ok(device
        .get_or_load_custom_func(name, source.file, &ptx)?
        .clone())
}

fn compile(device: &CudaDevice, source: &Source) -> Result<String> {
    // Without it NVRTC makes code for the oldest GPU that it knows.
    let (major, minor) = device.cuda_stream().context().compute_capability().w()?;
    let architecture = architecture(10 * major + minor, &known_architectures());
    let options = nvrtc::CompileOptions {
        options: vec![format!("--gpu-architecture=compute_{architecture}")],
        name: Some(source.file.to_owned()),
        ..Default::default()
    };
    // So that NVRTC names the lines of the file.
    let text = format!("{PRELUDE}\n#line 1 \"{}\"\n{}", source.file, source.text);
    match nvrtc::compile_ptx_with_opts(text, options) {
        Ok(ptx) => Ok(ptx.to_src()),
        Err(error) => {
            let log = match &error {
                CompileError::CompileError { nvrtc, log, .. } => {
                    format!("{nvrtc:?}: {}", log.to_string_lossy().trim())
                }
                other => other.to_string(),
            };
            Err(OpError::Kernel {
                file: source.file,
                log,
            }
            .into())
        }
    }
}

/// What to compile for: the GPU's own architecture, or the newest before it where NVRTC is older than the GPU, whose driver
/// compiles the PTX of that one.
fn architecture(gpu: i32, known: &[i32]) -> i32 {
    let before = known.iter().copied().filter(|&known| known <= gpu);
    before.max().unwrap_or(gpu)
}

/// The architectures that NVRTC compiles for; none where it cannot say.
fn known_architectures() -> Vec<i32> {
    let mut count = 0;
    // SAFETY: it writes a number.
    let said = unsafe { sys::nvrtcGetNumSupportedArchs(&raw mut count) }.result();
    let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: it writes as many numbers as it has just said.
    match said.and_then(|()| unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) }.result()) {
        Ok(()) => known,
        Err(error) => {
            tracing::debug!("NVRTC does not say what it compiles for: {error:?}");
            Vec::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::architecture;

    #[test]
    fn an_older_compiler_takes_the_newest_architecture_before_the_gpu() {
        let known = [52, 75, 80, 90];
        assert_eq!(architecture(80, &known), 80);
        assert_eq!(architecture(86, &known), 80);
        assert_eq!(architecture(120, &known), 90);
        // What is too old for it, it refuses itself, in words of its own.
        assert_eq!(architecture(50, &known), 50);
        assert_eq!(architecture(100, &[]), 100);
    }
}
