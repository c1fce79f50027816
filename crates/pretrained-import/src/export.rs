//! Safetensors files with their provenance.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use safetensors::tensor::{Dtype, TensorView};

/// Why a file of weights could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// Nothing is overwritten unasked.
    #[error("{path} exists already: name another file, or pass --force to replace it")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The system could not write the file; what was there before is still there.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A tensor that cannot be read back or saved.
    #[error("tensor {name:?} cannot be saved: {problem}")]
    Tensor {
        /// Its key.
        name: String,
        /// Why.
        problem: String,
    },
}

/// Writes tensors (f32 or i64) and what is said of them as a safetensors file: whole, under its
/// final name, or not at all.
///
/// # Errors
/// [`ExportError`].
pub fn write_safetensors(
    path: &Path,
    tensors: &[(String, Tensor)],
    metadata: &BTreeMap<String, String>,
    force: bool,
) -> Result<(), ExportError> {
    if !force && path.exists() {
        return Err(ExportError::Exists {
            path: path.to_path_buf(),
        });
    }
    let failed = |source: io::Error| ExportError::Write {
        path: path.to_path_buf(),
        source,
    };
    let bytes = tensors
        .iter()
        .map(|(name, tensor)| Ok((name, bytes_of(name, tensor)?)))
        .collect::<Result<Vec<_>, ExportError>>()?;
    let mut views = Vec::with_capacity(bytes.len());
    for ((name, (dtype, bytes)), (_, tensor)) in bytes.iter().zip(tensors) {
        let view = TensorView::new(*dtype, tensor.dims().to_vec(), bytes);
        let view = view.map_err(|error| ExportError::Tensor {
            name: (*name).clone(),
            problem: error.to_string(),
        })?;
        views.push((name.as_str(), view));
    }
    // Readers of the transformers family ask for this key before they take a file as PyTorch's.
    let mut said: HashMap<String, String> = metadata.clone().into_iter().collect();
    said.insert("format".into(), "pt".into());
    let file = safetensors::serialize(views, Some(said));
    let file = file.map_err(|error| failed(io::Error::other(error)))?;

    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(folder).map_err(failed)?;
    let mut temporary = tempfile::Builder::new()
        .prefix(".weights-")
        .tempfile_in(folder)
        .map_err(failed)?;
    temporary.write_all(&file).map_err(failed)?;
    temporary.as_file().sync_all().map_err(failed)?;
    let persisted = if force {
        temporary.persist(path)
    } else {
        // Another process may have been quicker.
        temporary.persist_noclobber(path)
    };
    persisted.map(|_| ()).map_err(|error| failed(error.error))
}

fn bytes_of(name: &str, tensor: &Tensor) -> Result<(Dtype, Vec<u8>), ExportError> {
    let read = || -> candle_core::Result<(Dtype, Vec<u8>)> {
        let flat = tensor.flatten_all()?;
        match tensor.dtype() {
            DType::F32 => {
                let values = flat.to_vec1::<f32>()?;
                let bytes = values.iter().flat_map(|value| value.to_le_bytes());
                Ok((Dtype::F32, bytes.collect()))
            }
            DType::I64 => {
                let values = flat.to_vec1::<i64>()?;
                let bytes = values.iter().flat_map(|value| value.to_le_bytes());
                Ok((Dtype::I64, bytes.collect()))
            }
            other => candle_core::bail!("type {other:?}, expected f32 or i64"),
        }
    };
    read().map_err(|error| ExportError::Tensor {
        name: name.to_owned(),
        problem: error.to_string(),
    })
}
