//! Weights in safetensors files, under PyTorch's state-dict names.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

use crate::durable::write_atomically;
use crate::model::Model;

/// Where a safetensors header keeps what is said of the file; no tensor can have this name.
const METADATA: &str = "__metadata__";

/// Parameters, then buffers, under the keys of PyTorch's `state_dict()`.
pub fn state_dict(model: &dyn Model) -> Vec<(String, Var)> {
    let mut all = model.named_parameters();
    all.extend(model.named_buffers());
    all
}

/// Writes every parameter and buffer of `model` into a safetensors file, with the model's metadata: whole or not at all, in
/// the place of a file that is there. [`load`] reads it as long as all values are finite, and in Python
/// `load_state_dict(safetensors.torch.load_file(path))`.
///
/// # Errors
/// [`Error::Weights`](crate::Error::Weights) as of [`encode`], [`Error::Io`](crate::Error::Io).
pub fn save(model: &dyn Model, path: &Path) -> crate::Result<()> {
    write_atomically(path, &of_model(model)?)
}

/// The file that [`save`] writes.
pub(crate) fn of_model(model: &dyn Model) -> Result<Vec<u8>, WeightsError> {
    encode(&detached(state_dict(model)), &model.metadata())
}

/// The tensors of variables, in the same memory and out of Candle's graph.
pub(crate) fn detached(variables: Vec<(String, Var)>) -> Vec<(String, Tensor)> {
    let variables = variables.into_iter();
    variables
        .map(|(name, var)| (name, var.as_detached_tensor()))
        .collect()
}

/// Fills every parameter and buffer of `model` from a safetensors file. Strict: the file must hold
/// exactly the model's tensors, each of its type and shape, or nothing is changed. Only those of PyTorch's counters of
/// batches (`….num_batches_tracked`) that the model does not have are left out: nothing needs them where the momentum of a
/// batch norm is a number.
///
/// # Errors
/// [`WeightsError`]; one error lists everything missing, unexpected and misshapen.
pub fn load(model: &dyn Model, path: &Path) -> Result<(), WeightsError> {
    let bytes = std::fs::read(path).map_err(|source| WeightsError::Read {
        path: path.to_path_buf(),
        source,
    })?;
    load_from_bytes(model, &bytes, path)
}

/// [`load`] from bytes already in memory; `path` only names them in errors.
///
/// # Errors
/// As [`load`].
pub fn load_from_bytes(model: &dyn Model, bytes: &[u8], path: &Path) -> Result<(), WeightsError> {
    assign(state_dict(model), decode(bytes, path)?, path)
}

/// Fills variables, such as those of [`state_dict`], from tensors already read, as strictly as
/// [`load`]; `path` only names them in errors.
///
/// # Errors
/// As [`load`].
pub fn assign(
    variables: Vec<(String, Var)>,
    mut found: BTreeMap<String, Tensor>,
    path: &Path,
) -> Result<(), WeightsError> {
    let mut mismatch = Mismatch::default();
    let mut assignments = Vec::new();
    for (name, var) in variables {
        match found.remove(&name) {
            None => mismatch.missing.push(name),
            Some(tensor) if tensor.shape() != var.shape() || tensor.dtype() != var.dtype() => {
                mismatch.misshapen.push(Misshapen {
                    name,
                    found: describe(&tensor),
                    expected: describe(&var),
                });
            }
            Some(tensor) => assignments.push((name, var, tensor)),
        }
    }
    let is_counter = |name: &String| name.ends_with(".num_batches_tracked");
    mismatch.unexpected = found.into_keys().filter(|name| !is_counter(name)).collect();
    if !mismatch.is_empty() {
        return Err(WeightsError::Mismatch {
            path: path.to_path_buf(),
            mismatch: Box::new(mismatch),
        });
    }
    for (name, _, tensor) in &assignments {
        let finite = is_finite(tensor).map_err(|source| WeightsError::Tensor { source })?;
        if !finite {
            return Err(WeightsError::NotFinite {
                path: path.to_path_buf(),
                name: name.clone(),
            });
        }
    }
    for (_, var, tensor) in assignments {
        tensor
            .to_device(var.device())
            .and_then(|tensor| var.set(&tensor))
            .map_err(|source| WeightsError::Tensor { source })?;
    }
    Ok(())
}

/// Whether no value is NaN or infinite; of other types than floats none is.
pub(crate) fn is_finite(tensor: &Tensor) -> candle_core::Result<bool> {
    if !tensor.dtype().is_float() {
        return Ok(true);
    }
    let values = tensor.flatten_all()?;
    // In f32 large ones of an f64 would be infinite.
    Ok(match values.dtype() {
        DType::F64 => values.to_vec1::<f64>()?.iter().all(|v| v.is_finite()),
        _ => {
            let values = values.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            values.iter().all(|v| v.is_finite())
        }
    })
}

/// The bytes of a safetensors file that `safetensors.torch.load_file` and `load_state_dict` take.
/// Equal tensors and metadata give equal bytes, so that two runs can be compared by hash.
///
/// # Errors
/// Two tensors of one name, one named `__metadata__`, a tensor of a type that is not saved, or Candle's
/// error when a device cannot be read.
pub fn encode(
    tensors: &[(String, Tensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, WeightsError> {
    // The header is written here and not by `safetensors::serialize`, which takes the metadata as a
    // HashMap and writes its keys in another order each time.
    let mut metadata = metadata.clone();
    // Readers of the transformers family ask for this key before they take a file as PyTorch's.
    metadata.insert("format".into(), "pt".into());
    let mut header = BTreeMap::from([(METADATA.to_string(), json!(metadata))]);
    let mut data: Vec<u8> = Vec::new();
    check_names(tensors.iter().map(|(name, _)| name))?;
    let mut order: Vec<&(String, Tensor)> = tensors.iter().collect();
    // Widest type first keeps every tensor aligned to its elements.
    order.sort_by_key(|(name, tensor)| (Reverse(tensor.dtype().size_in_bytes()), name));
    for (name, tensor) in order {
        let begin = data.len();
        let dtype = append_bytes(name, tensor, &mut data)?;
        let entry = json!({
            "dtype": dtype,
            "shape": tensor.dims(),
            "data_offsets": [begin, data.len()],
        });
        header.insert(name.clone(), entry);
    }
    let mut header = json!(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.append(&mut data);
    Ok(file)
}

/// The tensors of a safetensors file, on the CPU; `path` only names them in errors.
///
/// # Errors
/// Bytes that are no safetensors file, or a tensor of a type that Candle lacks.
pub fn decode(bytes: &[u8], path: &Path) -> Result<BTreeMap<String, Tensor>, WeightsError> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| WeightsError::Parse {
        path: path.to_path_buf(),
        reason: match bytes {
            // A zip archive or a pickle, whose third byte is an opcode; the length of a header would have zeros.
            [b'P', b'K', 3, 4, ..] | [0x80, 2..=5, 1..=255, ..] => {
                "it looks like a .pth file; in Python, \
                safetensors.torch.save_file(state_dict, FILE) writes what is read here"
                    .to_string()
            }
            // It may quote the file.
            _ => error.to_string().replace(char::is_control, " "),
        },
    })?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        let tensor = from_view(&view).map_err(|reason| WeightsError::UnsupportedTensor {
            path: path.to_path_buf(),
            name: name.clone(),
            reason,
        })?;
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

/// A file of weights that cannot be read, or does not fit the model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The file cannot be read.
    #[error("cannot read the weights {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not safetensors.
    #[error("{} is not a safetensors file: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A tensor of a type that cannot be used.
    #[error("{}: {} cannot be used: {reason}", path.display(), name.escape_debug())]
    UnsupportedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Why.
        reason: String,
    },
    /// The file holds other tensors than the model.
    #[error("the weights {} do not fit the model:{mismatch}", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// All differences.
        mismatch: Box<Mismatch>,
    },
    /// A weight is NaN or infinite.
    #[error("{}: {name} has values that are not finite: what it was saved from had diverged, or the file is damaged", path.display())]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The parameter or buffer.
        name: String,
    },
    /// Two tensors have one name.
    #[error(
        "two tensors are named {name}: a file can hold only one of them. Give each a name of its own"
    )]
    DuplicateName {
        /// The name.
        name: String,
    },
    /// A tensor with the name under which a file keeps its metadata.
    #[error("tensor {name} cannot be saved: its name is taken")]
    TakenName {
        /// The name.
        name: String,
    },
    /// A tensor of a type that is not saved.
    #[error("{name} is {}, and cannot be saved: f32, f64 and i64 can", dtype.as_str())]
    NotSaved {
        /// The parameter or buffer.
        name: String,
        /// Its type.
        dtype: DType,
    },
    /// Candle failed.
    #[error("cannot copy the weights")]
    Tensor {
        /// Candle's error.
        source: candle_core::Error,
    },
}

/// All differences between a file of weights and a model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mismatch {
    /// In the model, not in the file.
    pub missing: Vec<String>,
    /// In the file, not in the model.
    pub unexpected: Vec<String>,
    /// In both, of another type or shape.
    pub misshapen: Vec<Misshapen>,
}

/// A tensor of another type or shape than the model's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misshapen {
    /// State-dict key.
    pub name: String,
    /// Type and shape in the file.
    pub found: String,
    /// Type and shape in the model.
    pub expected: String,
}

impl Mismatch {
    fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.misshapen.is_empty()
    }
}

impl fmt::Display for Mismatch {
    /// A line each. The names of the file are escaped: they are whatever it says.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for name in &self.missing {
            write!(f, "\n  missing: {name}")?;
        }
        for name in &self.unexpected {
            write!(f, "\n  unexpected: {}", name.escape_debug())?;
        }
        for Misshapen {
            name,
            found,
            expected,
        } in &self.misshapen
        {
            write!(
                f,
                "\n  misshapen: {name} is {found}, the model has {expected}"
            )?;
        }
        Ok(())
    }
}

fn describe(tensor: &Tensor) -> String {
    format!("{} {:?}", tensor.dtype().as_str(), tensor.dims())
}

/// Refuses the names and types that [`encode`] would.
pub(crate) fn check_savable(state: &[(String, Var)]) -> Result<(), WeightsError> {
    check_names(state.iter().map(|(name, _)| name))?;
    let mut state = state.iter();
    state.try_for_each(|(name, var)| saved_as(name, var.dtype()).map(drop))
}

/// Refuses a name that comes twice, or is taken.
fn check_names<'a>(mut names: impl Iterator<Item = &'a String>) -> Result<(), WeightsError> {
    let mut seen = BTreeSet::new();
    match names.find(|name| *name == METADATA || !seen.insert(*name)) {
        Some(name) if name == METADATA => Err(WeightsError::TakenName { name: name.clone() }),
        Some(name) => Err(WeightsError::DuplicateName { name: name.clone() }),
        None => Ok(()),
    }
}

/// Appends a tensor's values; returns safetensors' name of their type.
fn append_bytes(
    name: &str,
    tensor: &Tensor,
    out: &mut Vec<u8>,
) -> Result<&'static str, WeightsError> {
    let saved = saved_as(name, tensor.dtype())?;
    let mut append = || {
        let flat = tensor.flatten_all()?;
        match tensor.dtype() {
            DType::F32 => out.extend(flat.to_vec1::<f32>()?.iter().flat_map(|v| v.to_le_bytes())),
            DType::F64 => out.extend(flat.to_vec1::<f64>()?.iter().flat_map(|v| v.to_le_bytes())),
            _ => out.extend(flat.to_vec1::<i64>()?.iter().flat_map(|v| v.to_le_bytes())),
        }
        Ok(())
    };
    append().map_err(|source| WeightsError::Tensor { source })?;
    Ok(saved)
}

/// safetensors' name of a type that is saved.
fn saved_as(name: &str, dtype: DType) -> Result<&'static str, WeightsError> {
    match dtype {
        DType::F32 => Ok("F32"),
        DType::F64 => Ok("F64"),
        DType::I64 => Ok("I64"),
        dtype => Err(WeightsError::NotSaved {
            name: name.into(),
            dtype,
        }),
    }
}

fn from_view(view: &TensorView<'_>) -> Result<Tensor, String> {
    let dtype = match view.dtype() {
        Dtype::F32 => DType::F32,
        Dtype::F64 => DType::F64,
        Dtype::I64 => DType::I64,
        other => {
            return Err(format!(
                "its type is {other:?}; F32, F64 and I64 are supported"
            ));
        }
    };
    Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::durable::sha256_hex;
    use crate::tiny_model::TinyModel;

    fn encoded(tensors: &[(String, Tensor)]) -> Vec<u8> {
        encode(tensors, &BTreeMap::new()).unwrap()
    }

    fn tensors(model: &TinyModel) -> Vec<(String, Tensor)> {
        detached(state_dict(model))
    }

    #[test]
    fn a_name_that_comes_twice_is_refused() {
        let tensor = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        let tensors = ["a", "b", "a"].map(|name| (name.to_string(), tensor.clone()));
        let error = encode(&tensors, &BTreeMap::new()).unwrap_err().to_string();
        assert!(error.contains("two tensors are named a"), "{error}");
    }

    #[test]
    fn the_name_under_which_a_file_keeps_its_metadata_is_refused() {
        let tensors = [(
            METADATA.to_string(),
            Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap(),
        )];
        let error = encode(&tensors, &BTreeMap::new()).unwrap_err().to_string();
        assert!(error.contains("__metadata__ cannot be saved"), "{error}");
        let [(name, tensor)] = tensors;
        let error = check_savable(&[(name, Var::from_tensor(&tensor).unwrap())]).unwrap_err();
        assert!(matches!(error, WeightsError::TakenName { .. }), "{error}");
    }

    #[test]
    fn saved_weights_load_with_the_same_bits_and_metadata_of_pytorch() {
        let (saved, loaded) = (TinyModel::new(1), TinyModel::new(2));
        let bytes = encoded(&tensors(&saved));
        assert_ne!(saved.bits(), loaded.bits());
        load_from_bytes(&loaded, &bytes, Path::new("w")).unwrap();
        assert_eq!(saved.bits(), loaded.bits());
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    }

    #[test]
    fn a_file_is_loaded_whole_and_an_absent_one_is_named() {
        let (saved, loaded) = (TinyModel::new(1), TinyModel::new(2));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        std::fs::write(&path, encoded(&tensors(&saved))).unwrap();
        load(&loaded, &path).unwrap();
        assert_eq!(saved.bits(), loaded.bits());
        save(&TinyModel::new(3), &path).unwrap();
        load(&loaded, &path).unwrap();
        assert_eq!(TinyModel::new(3).bits(), loaded.bits());
        let error = load(&loaded, &dir.path().join("absent")).unwrap_err();
        assert!(matches!(&error, WeightsError::Read { path, .. } if path.ends_with("absent")));
    }

    #[test]
    fn equal_weights_and_metadata_give_equal_bytes() {
        let metadata: BTreeMap<String, String> = (0..9)
            .map(|i| (format!("key{i}"), "value".to_string()))
            .collect();
        let file = || encode(&tensors(&TinyModel::new(1)), &metadata).unwrap();
        assert_eq!(sha256_hex(&file()), sha256_hex(&file()));
    }

    #[test]
    fn f64_and_i64_tensors_are_kept_and_empty_and_scalar_shapes_too() {
        let cpu = &Device::Cpu;
        let saved = [
            (
                "f32".to_string(),
                Tensor::new(&[[1.5f32, -0.0]], cpu).unwrap(),
            ),
            ("scalar".into(), Tensor::new(7i64, cpu).unwrap()),
            ("f64".into(), Tensor::new(&[0.1f64], cpu).unwrap()),
            (
                "empty".into(),
                Tensor::zeros((0, 3), DType::F32, cpu).unwrap(),
            ),
        ];
        let loaded = decode(&encoded(&saved), Path::new("w")).unwrap();
        assert_eq!(loaded.len(), saved.len());
        for (name, tensor) in &saved {
            assert_eq!(loaded[name].dims(), tensor.dims());
            assert_eq!(loaded[name].to_string(), tensor.to_string());
        }
    }

    #[test]
    fn one_error_lists_everything_missing_unexpected_and_misshapen_and_changes_nothing() {
        let model = TinyModel::new(1);
        let before = model.bits();
        let mut file = tensors(&TinyModel::new(2));
        file[0].0 = "extra.weight".into();
        file[1].1 = file[1].1.unsqueeze(0).unwrap();
        let error = load_from_bytes(&model, &encoded(&file), Path::new("init.safetensors"))
            .unwrap_err()
            .to_string();
        for part in [
            "init.safetensors",
            "missing: fc1.weight",
            "unexpected: extra.weight",
            "misshapen: fc1.bias is f32 [1, 12], the model has f32 [12]",
        ] {
            assert!(error.contains(part), "{part} not in {error}");
        }
        assert_eq!(model.bits(), before);
    }

    #[test]
    fn pytorchs_counters_of_batches_are_left_out_where_the_model_has_none() {
        let (model, other) = (TinyModel::new(1), TinyModel::new(2));
        let mut file = tensors(&other);
        let counter = Tensor::new(7i64, &Device::Cpu).unwrap();
        file.push(("bn1.num_batches_tracked".into(), counter));
        load_from_bytes(&model, &encoded(&file), Path::new("init.safetensors")).unwrap();
        assert_eq!(model.bits(), other.bits());
        file[0].0 = "extra_num_batches_tracked".into();
        let error = load_from_bytes(&model, &encoded(&file), Path::new("init.safetensors"));
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("unexpected: extra_num_batches_tracked"),
            "{error}"
        );
    }

    #[test]
    fn a_pth_file_is_refused_with_what_to_do_instead() {
        for file in [&b"PK\x03\x04"[..], b"\x80\x02}q\x00."] {
            let error = decode(file, Path::new("w.pth")).unwrap_err().to_string();
            assert!(
                error.starts_with("w.pth is not a safetensors file"),
                "{error}"
            );
            assert!(error.contains("save_file"), "{error}");
        }
    }

    #[test]
    fn a_weight_that_is_not_finite_is_named_and_changes_nothing() {
        let model = TinyModel::new(1);
        let before = model.bits();
        for value in [f32::NAN, f32::INFINITY] {
            let mut file = tensors(&TinyModel::new(2));
            let (name, tensor) = &mut file[1];
            let mut values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values[0] = value;
            *tensor = Tensor::from_vec(values, tensor.dims(), &Device::Cpu).unwrap();
            let expected = format!("init.safetensors: {name} has values that are not finite");
            let loaded = load_from_bytes(&model, &encoded(&file), Path::new("init.safetensors"));
            let error = loaded.unwrap_err().to_string();
            assert!(error.starts_with(&expected), "{error}");
            assert_eq!(model.bits(), before);
        }
    }

    #[test]
    fn names_from_a_file_do_not_steer_the_terminal() {
        const NAME: &str = "\u{1b}]0;title\u{7}";
        let wide = Tensor::new(&[0f32], &Device::Cpu).unwrap();
        let wide = encoded(&[(NAME.to_string(), wide)]);
        // Of the same length each.
        let header = String::from_utf8_lossy(&wide);
        let narrow = header.replace("F32", "I32").into_bytes();
        let unknown = header.replace("F32", r"\r9").into_bytes();
        for (file, shown) in [
            (wide, r"unexpected: \u{1b}]0;title\u{7}"),
            (narrow, r"w: \u{1b}]0;title\u{7} cannot be used"),
            (unknown, "w is not a safetensors file: "),
        ] {
            let error = load_from_bytes(&TinyModel::new(1), &file, Path::new("w")).unwrap_err();
            let error = error.to_string();
            assert!(error.contains(shown), "{error:?}");
            let steers = |c: char| c.is_control() && c != '\n';
            assert!(!error.contains(steers), "{error:?}");
        }
    }

    #[test]
    fn a_truncated_file_is_an_error_that_names_the_file() {
        let model = TinyModel::new(1);
        let bytes = encoded(&tensors(&model));
        let error = load_from_bytes(
            &model,
            &bytes[..bytes.len() - 1],
            Path::new("cut.safetensors"),
        )
        .unwrap_err();
        assert!(error.to_string().contains("cut.safetensors"), "{error}");
    }
}
