//! PyTorch's two file formats: legacy (pickles, then numbers, in one stream) and zip.

use std::collections::BTreeMap;
use std::io::{BufRead, Read, Seek};
use std::rc::Rc;

use candle_core::{DType, Device, Tensor};

use crate::error::Problem;
use crate::pickle::{Element, Pickle, Storage, TensorView, Value, kind};
use crate::state_dict::Ignored;

/// The tensors of a file under their keys, and the keys of everything else.
pub(crate) struct Contents {
    pub(crate) tensors: Vec<(String, Tensor)>,
    pub(crate) ignored: Ignored,
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
        let Some(storage) = pickle.storage(key) else {
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
        let entry = stored(&mut archive, &byte_order)?;
        entry.take(16).read_to_string(&mut order)?;
        if order != "little" {
            return Err(Problem::damaged(format!(
                "its byte order is {order:?}, expected \"little\""
            )));
        }
    }
    let pickle = Pickle::read(&mut stored(&mut archive, &format!("{folder}/data.pkl"))?)?;
    let wanted = Wanted::new(&pickle)?;
    let mut build = Build::new(&pickle, wanted, len);
    // Entries may overlap: what is read in all is bounded here, not by the archive.
    let mut unread = len;
    for (index, storage) in pickle.storages.iter().enumerate() {
        if build.views[index].is_empty() {
            // Of an optimizer, for example.
            continue;
        }
        let name = format!("{folder}/data/{}", storage.key);
        let mut entry = stored(&mut archive, &name)?;
        let expected = storage.len.checked_mul(storage.element.size() as u64);
        if Some(entry.size()) != expected {
            return Err(Problem::damaged(format!(
                "{name:?} has {} bytes, its tensors say {} elements of {}",
                entry.size(),
                storage.len,
                storage.element.size()
            )));
        }
        let Some(left) = unread.checked_sub(entry.size()) else {
            return Err(Problem::damaged(format!(
                "its storages have more bytes than the file, which has {len}"
            )));
        };
        unread = left;
        build.storage(index, &mut entry)?;
        // The end, where the checksum is compared.
        std::io::copy(&mut entry, &mut std::io::sink())?;
    }
    build.finish()
}

fn damaged(error: zip::result::ZipError) -> Problem {
    Problem::damaged(format!("as a zip archive: {error}"))
}

/// An entry, which must be as long as its bytes in the file.
fn stored<'a, R: Read + Seek>(
    archive: &'a mut zip::ZipArchive<R>,
    name: &str,
) -> Result<zip::read::ZipFile<'a, R>, Problem> {
    let Some(index) = archive.index_for_name(name) else {
        return Err(Problem::damaged(format!("it lacks {name:?}")));
    };
    // `torch.serialization.set_crc32_options(False)` writes 0 for every checksum: there is none to compare.
    let has_no_checksum = archive.by_index_raw(index).map_err(damaged)?.crc32() == 0;
    let options = zip::read::ZipReadOptions::new().ignore_crc32(has_no_checksum);
    let entry = archive.by_index_with_options(index, options);
    let entry = entry.map_err(damaged)?;
    match entry.compression() {
        zip::CompressionMethod::Stored => Ok(entry),
        _ => Err(Problem::damaged(format!(
            "{name:?} is compressed, which torch.save never does"
        ))),
    }
}

/// What to take from a pickle.
struct Wanted {
    /// Index into the pickle's tensors by key: of a key given twice the last counts, as in Python.
    tensors: BTreeMap<Rc<str>, usize>,
    ignored: Ignored,
}

/// Where checkpoints keep their state dict; the first of them that has tensors, and no fewer than the root, counts.
pub(crate) const WRAPPERS: [&str; 8] = [
    "state_dict",
    "model",
    "model_state_dict",
    "module",
    "net",
    "network",
    "model_state",
    "weights",
];

impl Wanted {
    /// The state dict: what lies under the usual keys of a checkpoint, or else the root. A
    /// checkpoint may have tensors of its own beside it, such as the best accuracy, but fewer.
    fn new(pickle: &Pickle) -> Result<Self, Problem> {
        let tensors_of = |value: &Value| {
            let mut wanted = Self {
                tensors: BTreeMap::new(),
                ignored: Ignored::default(),
            };
            for (key, value) in pickle.dict(value)? {
                match (key, value) {
                    (Value::Text(key), Value::Tensor(index)) => {
                        wanted.tensors.insert(key.clone(), *index);
                    }
                    (key, _) => wanted.ignored.push(shown(key)),
                }
            }
            (!wanted.tensors.is_empty()).then_some(wanted)
        };
        let root = tensors_of(&pickle.root);
        let in_root = root.as_ref().map_or(0, |root| root.tensors.len());
        for wrapper in WRAPPERS {
            let wrapped = pickle.get(&pickle.root, wrapper).and_then(tensors_of);
            // A state dict may have something by such a name beside its tensors, too.
            let wrapped = wrapped.filter(|wrapped| wrapped.tensors.len() >= in_root);
            if let (Some(mut wanted), Some(items)) = (wrapped, pickle.dict(&pickle.root)) {
                let beside = items.map(|(key, _)| shown(key));
                let beside = beside.filter(|key| key != wrapper);
                beside.for_each(|key| wanted.ignored.push(key));
                return Ok(wanted);
            }
        }
        if let Some(wanted) = root {
            return Ok(wanted);
        }
        let mut found = kind(Some(&pickle.root)).to_owned();
        if let Some(items) = pickle.dict(&pickle.root) {
            let keys: Vec<String> = items
                .take(5)
                .map(|(key, _)| format!("{:?}", shown(key)))
                .collect();
            found = match keys.is_empty() {
                true => "an empty dictionary".into(),
                false => format!("a dictionary without tensors, of {}", keys.join(", ")),
            };
        }
        Err(Problem::NoStateDict(found))
    }
}

/// A key for people.
fn shown(key: &Value) -> String {
    match key {
        Value::Text(key) => key.chars().take(100).collect(),
        other => kind(Some(other)).to_owned(),
    }
}

/// Tensors in the making: each storage is read once, and its tensors are made while it is there.
struct Build<'a> {
    pickle: &'a Pickle,
    /// Of each storage: keys and indices of the wanted tensors that view it.
    views: Vec<Vec<(Rc<str>, usize)>>,
    made: BTreeMap<Rc<str>, Tensor>,
    ignored: Ignored,
    /// Of the file.
    len: u64,
    /// Bytes that tensors may still take.
    budget: u64,
}

impl<'a> Build<'a> {
    fn new(pickle: &'a Pickle, wanted: Wanted, len: u64) -> Self {
        /// Storages may be shared, and int8 becomes i64; a file of tiny storages with many large views is none.
        const SHARED: u64 = 8;
        let mut views = vec![Vec::new(); pickle.storages.len()];
        for (name, tensor) in wanted.tensors {
            views[pickle.tensors[tensor].storage].push((name, tensor));
        }
        Self {
            pickle,
            views,
            made: BTreeMap::new(),
            ignored: wanted.ignored,
            len,
            budget: len.saturating_mul(SHARED),
        }
    }

    /// Reads one storage and makes the tensors that view it.
    fn storage(&mut self, index: usize, input: &mut dyn Read) -> Result<(), Problem> {
        /// What a tensor takes beside its elements, at least. A file spends half as much on it.
        const TENSOR: u64 = 256;
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
        let views = std::mem::take(&mut self.views[index]);
        let mut input = input.take(bytes);
        let mut data = Vec::new();
        let read = if views.is_empty() {
            std::io::copy(&mut input, &mut std::io::sink())?
        } else {
            data.reserve_exact(bytes as usize);
            input.read_to_end(&mut data)? as u64
        };
        if read < bytes {
            return Err(Problem::Io(std::io::ErrorKind::UnexpectedEof.into()));
        }
        for (name, tensor) in views {
            let problem = |problem| Problem::Tensor {
                name: name.to_string(),
                problem,
            };
            let view = &self.pickle.tensors[tensor];
            let elements = check(view, storage).map_err(problem)?;
            let element = dtype(storage.element).size_in_bytes() as u64;
            let taken = elements.saturating_mul(element).saturating_add(TENSOR);
            let Some(left) = self.budget.checked_sub(taken) else {
                return Err(problem(format!(
                    "with it the tensors take more than eight times the file's {} bytes",
                    self.len
                )));
            };
            self.budget = left;
            let tensor = make(view, storage.element, &data, elements as usize);
            let tensor = tensor.map_err(|error| problem(error.to_string()))?;
            self.made.insert(name, tensor);
        }
        Ok(())
    }

    fn finish(self) -> Result<Contents, Problem> {
        for (storage, views) in self.pickle.storages.iter().zip(&self.views) {
            if let Some((name, _)) = views.first() {
                return Err(Problem::Tensor {
                    name: name.to_string(),
                    problem: format!("its storage {:?} is not in the file", storage.key),
                });
            }
        }
        let tensors = self.made.into_iter();
        Ok(Contents {
            tensors: tensors
                .map(|(name, tensor)| (name.to_string(), tensor))
                .collect(),
            ignored: self.ignored,
        })
    }
}

/// Whether the product of the dimensions, and of any of them, fits an address. Only shapes that hold no
/// element can fail this and be backed by a file.
pub(crate) fn is_countable(mut shape: impl Iterator<Item = u64>) -> bool {
    /// Bytes.
    const LARGEST_ELEMENT: u64 = 8;
    shape
        .try_fold(LARGEST_ELEMENT, |n, d| n.checked_mul(d.max(1)))
        .is_some_and(|bytes| isize::try_from(bytes).is_ok())
}

/// The number of elements, all of which lie inside of the storage.
fn check(view: &TensorView, storage: &Storage) -> Result<u64, String> {
    let elements = view.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    let mut last = view.shape.iter().zip(&view.strides);
    let last = last.try_fold(view.offset, |at, (&d, &stride)| {
        at.checked_add(d.saturating_sub(1).checked_mul(stride)?)
    });
    match (elements, last) {
        (Some(0), _) if is_countable(view.shape.iter().copied()) => Ok(0),
        (Some(elements), Some(last)) if last < storage.len && elements <= storage.len => {
            Ok(elements)
        }
        _ => Err(format!(
            "shape {:?} with strides {:?} from element {} on does not fit its storage of {} elements (views that repeat elements are not read)",
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
        _ => Tensor::from_raw_buffer(bytes, dtype(element), &shape, device),
    }
}

/// What a tensor of these has.
fn dtype(element: Element) -> DType {
    match element {
        Element::F64 => DType::F64,
        Element::F32 => DType::F32,
        Element::F16 => DType::F16,
        Element::BF16 => DType::BF16,
        Element::U8 | Element::Bool => DType::U8,
        // Candle computes with few of these: the one that holds all of them.
        Element::I64 | Element::I32 | Element::I16 | Element::I8 => DType::I64,
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
