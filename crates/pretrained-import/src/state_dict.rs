//! Files of weights of any format as tensors under their keys.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};

use crate::error::{ImportError, Problem};
use crate::torch::{self, Contents};

/// What a file of weights holds.
#[derive(Debug, Clone)]
pub struct StateDict {
    /// By key, on the CPU, in the file's types: f16, bf16, f32 and f64 as they are, bool and u8 as
    /// u8, the other integers of PyTorch's files as i64 (safetensors files may have no others). A `module.` in front of all keys, from
    /// `nn.DataParallel` and `AveragedModel`, and `_orig_mod.`, from `torch.compile`, are taken off.
    pub tensors: BTreeMap<String, Tensor>,
    /// What else the file holds.
    pub ignored: Ignored,
    /// What a safetensors file says of itself; empty in the others.
    pub metadata: BTreeMap<String, String>,
    /// Of the file.
    pub format: Format,
}

/// Keys of what a file holds beside its tensors, such as `epoch` and `optimizer` of a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Ignored {
    /// The first of them.
    #[serde(rename = "ignored")]
    pub keys: Vec<String>,
    /// How many follow.
    #[serde(rename = "ignored_more")]
    pub more: usize,
}

impl Ignored {
    pub(crate) fn push(&mut self, key: String) {
        /// Checkpoints have a few dozen. A file says one long key again and again in three bytes.
        const MOST: usize = 1000;
        match self.keys.len() < MOST {
            true => self.keys.push(key),
            false => self.more += 1,
        }
    }
}

/// Formats of files of weights, told apart by their first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// PyTorch's until 1.5: pickles, then numbers.
    TorchLegacy,
    /// PyTorch's since 1.6.
    TorchZip,
    /// Hugging Face's.
    Safetensors,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TorchLegacy => "PyTorch legacy",
            Self::TorchZip => "PyTorch zip",
            Self::Safetensors => "safetensors",
        })
    }
}

impl StateDict {
    /// Reads a `.pth` file of either format or a safetensors file; its name plays no part.
    ///
    /// A PyTorch file is untrusted code: nothing of it is run, only dictionaries of tensors are
    /// understood, and no size is believed that the file does not back.
    ///
    /// # Errors
    /// [`ImportError`], with the file's name.
    pub fn read(path: &Path) -> Result<Self, ImportError> {
        let open = || -> std::io::Result<(File, u64)> {
            // A pipe may never end, nor be opened.
            if !std::fs::metadata(path)?.is_file() {
                return Err(std::io::Error::other("it is no file"));
            }
            let file = File::open(path)?;
            let len = file.metadata()?.len();
            Ok((file, len))
        };
        let (file, len) = open().map_err(|source| ImportError::Read {
            path: path.to_path_buf(),
            source,
        })?;
        Self::read_from(BufReader::with_capacity(1 << 16, file), len, path)
    }

    /// As [`Self::read`], from bytes in memory; `path` names them in errors.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self, ImportError> {
        Self::read_from(std::io::Cursor::new(bytes), bytes.len() as u64, path)
    }

    /// Whether the network converts its input from ImageNet's normalisation to that of 0.5 (torchvision's
    /// `transform_input`), where the file's metadata say so; also as Python prints it, `True` and `False`. `path`
    /// names the file in errors.
    ///
    /// # Errors
    /// [`ImportError::Metadata`] where they say anything else.
    pub fn transform_input(&self, path: &Path) -> Result<Option<bool>, ImportError> {
        self.said("transform_input", path, |said| {
            let said = said.to_ascii_lowercase().parse();
            said.map_err(|_| "it must be true or false".into())
        })
    }

    /// What the metadata say of `key`; None where they say nothing. `read` may refuse it with what it must be, and
    /// `path` names the file then.
    ///
    /// # Errors
    /// [`ImportError::Metadata`].
    pub fn said<T>(
        &self,
        key: &'static str,
        path: &Path,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ImportError> {
        let Some(said) = self.metadata.get(key) else {
            return Ok(None);
        };
        let value = read(said).map_err(|expected| ImportError::Metadata {
            path: path.to_path_buf(),
            key,
            found: said.chars().take(100).collect(),
            expected,
        })?;
        Ok(Some(value))
    }

    fn read_from(
        mut file: impl std::io::BufRead + Seek,
        len: u64,
        path: &Path,
    ) -> Result<Self, ImportError> {
        let mut start = Vec::new();
        let peek = file.by_ref().take(16).read_to_end(&mut start);
        let back = peek.and_then(|_| file.seek(SeekFrom::Start(0)));
        back.map_err(|source| Problem::Io(source).of(path))?;
        let contents = match start.as_slice() {
            [b'P', b'K', 3, 4, ..] => {
                let contents = torch::read_zip(&mut file, len);
                contents.map(|contents| (contents, BTreeMap::new(), Format::TorchZip))
            }
            // Before the pickles: the length of a header may begin as they do, and theirs have no such byte here.
            [_, _, _, _, _, _, _, _, b'{', ..] => {
                let contents = read_safetensors(&mut file, len);
                contents.map(|(contents, metadata)| (contents, metadata, Format::Safetensors))
            }
            [0x80, ..] => {
                let contents = torch::read_legacy(&mut file, len);
                contents.map(|contents| (contents, BTreeMap::new(), Format::TorchLegacy))
            }
            _ => {
                return Err(ImportError::UnknownFormat {
                    path: path.to_path_buf(),
                    found: shown(&start),
                });
            }
        };
        let (contents, metadata, format) = contents.map_err(|problem| problem.of(path))?;
        let contents = without_wrappers(contents);
        Ok(Self {
            tensors: contents.tensors.into_iter().collect(),
            ignored: contents.ignored,
            metadata,
            format,
        })
    }
}

/// First bytes for people: as text if they are.
fn shown(start: &[u8]) -> String {
    if start.is_empty() {
        return "nothing (it is empty)".into();
    }
    let is_text = start
        .iter()
        .all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace());
    match str::from_utf8(start) {
        Ok(text) if is_text => format!("{text:?}"),
        _ => {
            let bytes = start.iter().take(8);
            let bytes: Vec<String> = bytes.map(|byte| format!("{byte:02x}")).collect();
            format!("the bytes {}", bytes.join(" "))
        }
    }
}

/// Of `nn.DataParallel`, `DistributedDataParallel` and `AveragedModel`, and of `torch.compile`.
const PREFIXES: [&str; 2] = ["module.", "_orig_mod."];

/// What an `AveragedModel` holds beside the network's tensors.
const COUNT_OF_AVERAGED: &str = "n_averaged";

/// The network's tensors under the network's names, whatever it was wrapped in: keys lose a prefix that all of them have, as with
/// PyTorch's `consume_prefix_in_state_dict_if_present`. Where only some have it, it is a part of the network that is called so, and stays.
fn without_wrappers(mut contents: Contents) -> Contents {
    /// One in the other: compiled, averaged, and that in parallel, twice over.
    const MOST_WRAPPERS: usize = 6;
    for _ in 0..MOST_WRAPPERS {
        let is_wrapper = |prefix: &&str| {
            let is_count = |name: &str| *prefix == PREFIXES[0] && name == COUNT_OF_AVERAGED;
            let names = contents.tensors.iter().map(|(name, _)| name.as_str());
            let mut names = names.filter(|name| !is_count(name)).peekable();
            let inner = |name: &str| {
                name.strip_prefix(*prefix)
                    .is_some_and(|inner| !inner.is_empty())
            };
            names.peek().is_some() && names.all(inner)
        };
        let Some(prefix) = PREFIXES.into_iter().find(is_wrapper) else {
            break;
        };
        let counts = contents
            .tensors
            .extract_if(.., |(name, _)| name == COUNT_OF_AVERAGED);
        counts.for_each(|(name, _)| contents.ignored.push(name));
        for (name, _) in &mut contents.tensors {
            name.drain(..prefix.len());
        }
    }
    contents
}

type Metadata = BTreeMap<String, String>;

fn read_safetensors(file: &mut impl Read, len: u64) -> Result<(Contents, Metadata), Problem> {
    let mut bytes = Vec::new();
    file.take(len).read_to_end(&mut bytes)?;
    let damaged = |error: safetensors::SafeTensorError| {
        Problem::damaged(format!("as a safetensors file: {error}"))
    };
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(damaged)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let file = SafeTensors::deserialize(&bytes).map_err(damaged)?;
    let mut tensors = Vec::new();
    for (name, view) in file.iter() {
        let problem = |problem: String| Problem::Tensor {
            name: name.to_owned(),
            problem,
        };
        let (shape, data) = (view.shape(), view.data());
        if !torch::is_countable(shape.iter().map(|&d| d as u64)) {
            return Err(problem(format!(
                "shape {shape:?} has more elements than can be"
            )));
        }
        let tensor = match view.dtype() {
            Dtype::F64 => Tensor::from_raw_buffer(data, DType::F64, shape, &Device::Cpu),
            Dtype::F32 => Tensor::from_raw_buffer(data, DType::F32, shape, &Device::Cpu),
            Dtype::F16 => Tensor::from_raw_buffer(data, DType::F16, shape, &Device::Cpu),
            Dtype::BF16 => Tensor::from_raw_buffer(data, DType::BF16, shape, &Device::Cpu),
            Dtype::I64 => Tensor::from_raw_buffer(data, DType::I64, shape, &Device::Cpu),
            Dtype::U8 | Dtype::BOOL => {
                Tensor::from_raw_buffer(data, DType::U8, shape, &Device::Cpu)
            }
            other => {
                return Err(problem(format!(
                    "type {other:?}, expected F16, BF16, F32, F64, I64, U8 or BOOL"
                )));
            }
        };
        tensors.push((name.to_owned(), tensor.map_err(|e| problem(e.to_string()))?));
    }
    if tensors.is_empty() {
        return Err(Problem::NoStateDict(
            "a safetensors file without tensors".into(),
        ));
    }
    let contents = Contents {
        tensors,
        ignored: Ignored::default(),
    };
    Ok((contents, metadata.into_iter().collect()))
}
