//! CUDA C kernels, compiled by NVRTC when first needed and kept by device.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::CudaFunction;
use candle_core::cuda_backend::cudarc::nvrtc::{self, CompileError};
use candle_core::cuda_backend::{CudaDevice, DeviceId, WrapErr};

use crate::error::OpError;

/// A `.cu` file of this crate.
pub(crate) struct Source {
    /// Its path under `src`, which also is its name among the device's modules.
    pub(crate) file: &'static str,
    /// What it holds, behind [`PRELUDE`].
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
    let options = nvrtc::CompileOptions {
        options: vec![format!("--gpu-architecture=compute_{major}{minor}")],
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
