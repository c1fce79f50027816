//! PyTorch's two file formats: legacy (pickles, then numbers, in one stream) and zip.

use std::io::{BufRead, Read, Seek};
use std::rc::Rc;

use candle_core::{DType, Device, Tensor};

use crate::error::Problem;
use crate::pickle::{Element, Pickle, Storage, TensorView, Value, kind};

/// The tensors of a file under their keys, and the keys of everything else.
pub(crate) struct Contents {
    pub(crate) tensors: Vec<(String, Tensor)>,
    pub(crate) ignored: Vec<String>,
}

/// The number that legacy files begin with, as the bytes of a pickled integer.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const PROTOCOL_VERSION: i64 = 1001;

/// A legacy file of `len` bytes: pickles of the magic number, the protocol version, the system,
/// the object and the list of storage keys, then each storage in that list's order as its number
/// of elements (i64) and the elements, little-endian.
pub(crate) fn read_legacy(input: &mut dyn BufRead, len: u64) -> Result<Contents, Problem> {
    let magic = Pickle::read(input)?.root;
    if !matches!(&magic, Value::Long(bytes) if **bytes == MAGIC) {
        return Err(Problem::damaged(format!(
            "it begins with a pickle of {}, expected the number that torch.save begins with",
            kind(Some(&magic))
        )));
    }
    let version = Pickle::read(input)?.root;
    if version != Value::Int(PROTOCOL_VERSION) {
        return Err(Problem::damaged(format!(
            "its protocol version is {version:?}, expected {PROTOCOL_VERSION}"
        )));
    }
    let system = Pickle::read(input)?;
    if system.get(&system.root, "little_endian") == Some(&Value::Bool(false)) {
        return Err(Problem::damaged(
            "it was written on a big-endian machine, which is not supported",
        ));
    }
    let pickle = Pickle::read(input)?;
    let wanted = Wanted::new(&pickle)?;
    let keys = Pickle::read(input)?;
    let Some(keys_list) = keys.sequence(&keys.root) else {
        return Err(Problem::damaged("its list of storages is none"));
    };

    let mut build = Build::new(&pickle, wanted, len);
    for key in keys_list {
        let Value::Text(key) = key else {
            return Err(Problem::damaged("its list of storages holds no keys"));
        };
        let mut count = [0; 8];
        input.read_exact(&mut count)?;
        let count = u64::from_le_bytes(count);
        let Some(storage) = pickle.storages.iter().position(|s| s.key == *key) else {
            return Err(Problem::damaged(format!(
                "storage {key:?} is listed and no tensor has it"
            )));
        };
        let expected = pickle.storages[storage].len;
        if count != expected {
            return Err(Problem::damaged(format!(
                "storage {key:?} has {count} elements, its tensors say {expected}"
            )));
        }
        build.storage(storage, input)?;
    }
    build.finish()
}

/// A zip file of `len` bytes: `<name>/data.pkl` with the object, `<name>/data/<key>` with each storage.
pub(crate) fn read_zip(file: &mut (impl Read + Seek), len: u64) -> Result<Contents, Problem> {
    let damaged =
        |error: zip::result::ZipError| Problem::damaged(format!("as a zip archive: {error}"));
    let mut archive = zip::ZipArchive::new(file).map_err(damaged)?;
    let names = archive
        .file_names()
        .map(|name| name.map(|name| name.into_owned()));
    let names: Vec<String> = names.collect::<Result<_, _>>().map_err(damaged)?;
    let folders: Vec<&str> = names
        .iter()
        .filter_map(|name| name.strip_suffix("/data.pkl"))
        .filter(|folder| !folder.contains('/'))
        .collect();
    let &[folder] = folders.as_slice() else {
        return Err(Problem::damaged(
            "it is a zip archive without one <name>/data.pkl, as torch.save writes it",
        ));
    };
    if names
        .iter()
        .any(|name| name.starts_with(&format!("{folder}/code/")))
    {
        return Err(Problem::NoStateDict(
            "it is a TorchScript program (torch.jit.save)".into(),
        ));
    }
    let byte_order = format!("{folder}/byteorder");
    if names.contains(&byte_order) {
        let mut order = String::new();
        let entry = archive.by_name(&byte_order).map_err(damaged)?;
        entry.take(16).read_to_string(&mut order)?;
        if order != "little" {
            return Err(Problem::damaged(format!(
                "its byte order is {order:?}, expected \"little\""
            )));
        }
    }
    let entry = archive.by_name(&format!("{folder}/data.pkl"));
    let pickle = Pickle::read(&mut entry.map_err(damaged)?)?;
    let wanted = Wanted::new(&pickle)?;
    let mut build = Build::new(&pickle, wanted, len);
    for (index, storage) in pickle.storages.iter().enumerate() {
        let name = format!("{folder}/data/{}", storage.key);
        let mut entry = match archive.by_name(&name) {
            Ok(entry) => entry,
            Err(zip::result::ZipError::FileNotFound) => {
                return Err(Problem::damaged(format!("it lacks {name:?}")));
            }
            Err(error) => return Err(damaged(error)),
        };
        if entry.compression() != zip::CompressionMethod::Stored {
            return Err(Problem::damaged(format!(
                "{name:?} is compressed, which torch.save never does"
            )));
        }
        let expected = storage.len.checked_mul(storage.element.size() as u64);
        if Some(entry.size()) != expected {
            return Err(Problem::damaged(format!(
                "{name:?} has {} bytes, its tensors say {} elements of {}",
                entry.size(),
                storage.len,
                storage.element.size()
            )));
        }
        build.storage(index, &mut entry)?;
        // The end, where the checksum is compared.
        std::io::copy(&mut entry, &mut std::io::sink())?;
    }
    build.finish()
}

/// What to take from a pickle.
struct Wanted {
    /// Key and index into the pickle's tensors.
    tensors: Vec<(Rc<str>, usize)>,
    ignored: Vec<String>,
}

/// Where checkpoints keep their state dict.
const WRAPPERS: [&str; 4] = ["state_dict", "model", "model_state_dict", "module"];

impl Wanted {
    /// The state dict: the root, or what lies under the usual keys of a checkpoint.
    fn new(pickle: &Pickle) -> Result<Self, Problem> {
        let tensors_of = |value: &Value| {
            let mut wanted = Self {
                tensors: Vec::new(),
                ignored: Vec::new(),
            };
            for (key, value) in pickle.dict(value)? {
                match (key, value) {
                    (Value::Text(key), Value::Tensor(index)) => {
                        wanted.tensors.push((key.clone(), *index));
                    }
                    (Value::Text(key), _) => wanted.ignored.push(key.to_string()),
                    _ => wanted.ignored.push(kind(Some(key)).to_owned()),
                }
            }
            (!wanted.tensors.is_empty()).then_some(wanted)
        };
        let candidates = std::iter::once(&pickle.root).chain(
            WRAPPERS
                .iter()
                .filter_map(|key| pickle.get(&pickle.root, key)),
        );
        if let Some(wanted) = candidates.into_iter().find_map(tensors_of) {
            return Ok(wanted);
        }
        let mut found = kind(Some(&pickle.root)).to_owned();
        if let Some(items) = pickle.dict(&pickle.root) {
            let keys: Vec<String> = items
                .take(5)
                .map(|(key, _)| match key {
                    Value::Text(key) => format!("{:?}", key.chars().take(40).collect::<String>()),
                    other => kind(Some(other)).to_owned(),
                })
                .collect();
            found = match keys.is_empty() {
                true => "an empty dictionary".into(),
                false => format!("a dictionary without tensors, of {}", keys.join(", ")),
            };
        }
        Err(Problem::NoStateDict(found))
    }
}

/// Tensors in the making: each storage is read once, and its tensors are made while it is there.
struct Build<'a> {
    pickle: &'a Pickle,
    wanted: Wanted,
    made: Vec<Option<Tensor>>,
    /// Of the file.
    len: u64,
    /// Bytes that tensors may still take.
    budget: u64,
}

impl<'a> Build<'a> {
    fn new(pickle: &'a Pickle, wanted: Wanted, len: u64) -> Self {
        /// Storages may be shared; a file of tiny ones with many large views is none.
        const SHARED: u64 = 4;
        Self {
            pickle,
            made: vec![None; wanted.tensors.len()],
            wanted,
            len,
            budget: len.saturating_mul(SHARED),
        }
    }

    /// Reads one storage and makes the tensors that view it.
    fn storage(&mut self, index: usize, input: &mut dyn Read) -> Result<(), Problem> {
        let storage = &self.pickle.storages[index];
        let size = storage.element.size() as u64;
        let bytes = storage
            .len
            .checked_mul(size)
            .filter(|&bytes| bytes <= self.len);
        let Some(bytes) = bytes else {
            return Err(Problem::damaged(format!(
                "storage {:?} of {} elements is larger than the file of {} bytes",
                storage.key, storage.len, self.len
            )));
        };
        let mut data = Vec::with_capacity(bytes as usize);
        if (input.take(bytes).read_to_end(&mut data)? as u64) < bytes {
            return Err(Problem::Io(std::io::ErrorKind::UnexpectedEof.into()));
        }
        for ((name, tensor), made) in self.wanted.tensors.iter().zip(&mut self.made) {
            let view = &self.pickle.tensors[*tensor];
            if view.storage == index && made.is_none() {
                let problem = |problem| Problem::Tensor {
                    name: name.to_string(),
                    problem,
                };
                let elements = check(view, storage).map_err(problem)?;
                let taken = elements.saturating_mul(size);
                let Some(left) = self.budget.checked_sub(taken) else {
                    return Err(problem(format!(
                        "with it the tensors take more than four times the file's {} bytes",
                        self.len
                    )));
                };
                self.budget = left;
                let tensor = make(view, storage.element, &data, elements as usize);
                *made = Some(tensor.map_err(|error| problem(error.to_string()))?);
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<Contents, Problem> {
        let mut tensors = Vec::with_capacity(self.made.len());
        for ((name, index), tensor) in self.wanted.tensors.into_iter().zip(self.made) {
            let Some(tensor) = tensor else {
                let storage = self.pickle.tensors[index].storage;
                return Err(Problem::Tensor {
                    name: name.to_string(),
                    problem: format!(
                        "its storage {:?} is not in the file",
                        self.pickle.storages[storage].key
                    ),
                });
            };
            tensors.push((name.to_string(), tensor));
        }
        Ok(Contents {
            tensors,
            ignored: self.wanted.ignored,
        })
    }
}

/// The number of elements, all of which lie inside of the storage.
fn check(view: &TensorView, storage: &Storage) -> Result<u64, String> {
    let elements = view.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    let mut last = view.shape.iter().zip(&view.strides);
    let last = last.try_fold(view.offset, |at, (&d, &stride)| {
        at.checked_add(d.saturating_sub(1).checked_mul(stride)?)
    });
    match (elements, last) {
        (Some(0), _) => Ok(0),
        (Some(elements), Some(last)) if last < storage.len && elements <= storage.len => {
            Ok(elements)
        }
        _ => Err(format!(
            "shape {:?} with strides {:?} from element {} on does not fit its storage of {} elements",
            view.shape, view.strides, view.offset, storage.len
        )),
    }
}

/// The elements of a view that [`check`] has passed, as a tensor of their own.
fn make(
    view: &TensorView,
    element: Element,
    storage: &[u8],
    elements: usize,
) -> candle_core::Result<Tensor> {
    let shape: Vec<usize> = view.shape.iter().map(|&d| d as usize).collect();
    let size = element.size();
    let gathered;
    let bytes = if is_contiguous(view) {
        let start = if elements == 0 {
            0
        } else {
            view.offset as usize * size
        };
        &storage[start..start + elements * size]
    } else {
        gathered = gather(view, storage, size, elements);
        &gathered
    };
    let device = &Device::Cpu;
    match element {
        Element::F64 => Tensor::from_raw_buffer(bytes, DType::F64, &shape, device),
        Element::F32 => Tensor::from_raw_buffer(bytes, DType::F32, &shape, device),
        Element::F16 => Tensor::from_raw_buffer(bytes, DType::F16, &shape, device),
        Element::BF16 => Tensor::from_raw_buffer(bytes, DType::BF16, &shape, device),
        Element::I64 => Tensor::from_raw_buffer(bytes, DType::I64, &shape, device),
        Element::U8 | Element::Bool => Tensor::from_raw_buffer(bytes, DType::U8, &shape, device),
        // Candle computes with few of these: the one that holds all of them.
        Element::I32 => {
            let values = bytes.as_chunks::<4>().0.iter();
            let values = values.map(|&bytes| i64::from(i32::from_le_bytes(bytes)));
            Tensor::from_vec(values.collect::<Vec<_>>(), shape, device)
        }
        Element::I16 => {
            let values = bytes.as_chunks::<2>().0.iter();
            let values = values.map(|&bytes| i64::from(i16::from_le_bytes(bytes)));
            Tensor::from_vec(values.collect::<Vec<_>>(), shape, device)
        }
        Element::I8 => {
            let values = bytes.iter().map(|&byte| i64::from(byte as i8));
            Tensor::from_vec(values.collect::<Vec<_>>(), shape, device)
        }
    }
}

fn is_contiguous(view: &TensorView) -> bool {
    let mut expected = 1;
    view.shape.contains(&0)
        || view
            .shape
            .iter()
            .zip(&view.strides)
            .rev()
            .all(|(&d, &stride)| {
                let fits = d == 1 || stride == expected;
                expected *= d;
                fits
            })
}

/// The elements in the order of the shape.
fn gather(view: &TensorView, storage: &[u8], size: usize, elements: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(elements * size);
    let mut index = vec![0u64; view.shape.len()];
    let mut at = view.offset;
    for _ in 0..elements {
        let start = at as usize * size;
        bytes.extend_from_slice(&storage[start..start + size]);
        for dimension in (0..index.len()).rev() {
            index[dimension] += 1;
            at += view.strides[dimension];
            if index[dimension] < view.shape[dimension] {
                break;
            }
            at -= view.strides[dimension] * index[dimension];
            index[dimension] = 0;
        }
    }
    bytes
}
