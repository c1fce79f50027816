//! Safetensors files with their provenance.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use serde_json::{Value, json};

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
    /// A folder, a device or a pipe: it would be replaced, and not written to.
    #[error("{path} is no file: name a file with --out")]
    NoFile {
        /// What is there.
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

/// Where a safetensors header keeps what is said of the file; no tensor can have this name.
const METADATA: &str = "__metadata__";

/// Whether a file may be written here: what exists is a file, and with `force` alone.
///
/// # Errors
/// [`ExportError::NoFile`], [`ExportError::Exists`].
pub fn can_be_written(path: &Path, force: bool) -> Result<(), ExportError> {
    match path.metadata() {
        Ok(found) if !found.is_file() => Err(ExportError::NoFile {
            path: path.to_path_buf(),
        }),
        Ok(_) if !force => Err(ExportError::Exists {
            path: path.to_path_buf(),
        }),
        _ => Ok(()),
    }
}

/// Writes tensors (f32 or i64) and what is said of them as a safetensors file: whole, under its
/// final name, or not at all. The same tensors and words give the same bytes.
///
/// # Errors
/// [`ExportError`].
pub fn write_safetensors(
    path: &Path,
    tensors: &[(String, Tensor)],
    metadata: &BTreeMap<String, String>,
    force: bool,
) -> Result<(), ExportError> {
    can_be_written(path, force)?;
    // What is aligned to more bytes comes first, then by name, as in the format's own library.
    // That one shuffles the metadata, and wants all bytes in memory or a file of its own.
    let mut tensors: Vec<_> = tensors.iter().collect();
    tensors.sort_by_key(|(name, tensor)| (tensor.dtype() != DType::I64, name));
    let header = header(&tensors, metadata)?;

    let failed = |source: io::Error| ExportError::Write {
        path: path.to_path_buf(),
        source,
    };
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(folder).map_err(failed)?;
    let mut temporary = tempfile::Builder::new();
    temporary.prefix(".weights-");
    // As other new files, and not for the user alone.
    #[cfg(unix)]
    temporary.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let temporary = temporary.tempfile_in(folder).map_err(failed)?;
    {
        let mut file = BufWriter::new(temporary.as_file());
        let len = (header.len() as u64).to_le_bytes();
        file.write_all(&len).map_err(failed)?;
        file.write_all(&header).map_err(failed)?;
        for (name, tensor) in tensors {
            file.write_all(&bytes_of(name, tensor)?).map_err(failed)?;
        }
        file.flush().map_err(failed)?;
    }
    temporary.as_file().sync_all().map_err(failed)?;
    let persisted = if force {
        temporary.persist(path)
    } else {
        // Another process may have been quicker.
        temporary.persist_noclobber(path)
    };
    persisted.map_err(|error| failed(error.error))?;
    // Only Unix lets a folder be opened and synced; elsewhere renames are journalled anyway.
    match cfg!(unix) {
        true => File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(failed),
        false => Ok(()),
    }
}

/// JSON, filled with spaces to a multiple of 8 bytes.
fn header(
    tensors: &[&(String, Tensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, ExportError> {
    let refused = |name: &str, problem: String| ExportError::Tensor {
        name: name.to_owned(),
        problem,
    };
    // Readers of the transformers family ask for this key before they take a file as PyTorch's.
    let mut said = metadata.clone();
    said.insert("format".into(), "pt".into());
    let mut header = BTreeMap::from([(METADATA, json!(said))]);
    let mut start = 0;
    for (name, tensor) in tensors {
        let dtype = match tensor.dtype() {
            DType::F32 => "F32",
            DType::I64 => "I64",
            other => {
                let found = other.as_str();
                return Err(refused(name, format!("type {found}, expected f32 or i64")));
            }
        };
        let end = start + tensor.elem_count() * tensor.dtype().size_in_bytes();
        let entry: Value = json!({
            "dtype": dtype,
            "shape": tensor.dims(),
            "data_offsets": [start, end],
        });
        start = end;
        if header.insert(name, entry).is_some() {
            return Err(refused(name, "its name is taken".into()));
        }
    }
    let mut bytes = json!(header).to_string().into_bytes();
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    Ok(bytes)
}

fn bytes_of(name: &str, tensor: &Tensor) -> Result<Vec<u8>, ExportError> {
    let read = || -> candle_core::Result<Vec<u8>> {
        let flat = tensor.flatten_all()?;
        Ok(match tensor.dtype() {
            DType::I64 => {
                let values = flat.to_vec1::<i64>()?;
                values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect()
            }
            _ => {
                let values = flat.to_vec1::<f32>()?;
                values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect()
            }
        })
    };
    read().map_err(|error| ExportError::Tensor {
        name: name.to_owned(),
        problem: error.to_string(),
    })
}
