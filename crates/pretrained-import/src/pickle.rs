//! Pickles of state dicts: a machine that knows only what such pickles hold.
//!
//! A pickle is a program, and Python's machine lets it call anything. This one
//! builds values out of the opcodes that `torch.save` writes for dictionaries
//! of tensors, and knows the handful of constructors that those name; every
//! other opcode or name is an error that says which. Nothing is ever executed.
//!
//! Values lie in one list and refer to each other by index, so that neither
//! cycles nor depth can overflow a stack. Memory is bounded by the pickle's
//! length: an opcode takes at least one byte and makes at most one value, and
//! the few that make more are counted. Both have a limit, too.

use std::collections::HashMap;
use std::io::Read;
use std::rc::Rc;

use crate::error::Problem;

/// Bytes of the longest pickle. A thousand tensors take some 200 KiB.
const LONGEST: u64 = 4 << 20;

/// The most values in all containers and shapes together, and the most values on the stack,
/// marks, containers and remembered values. A thousand tensors take some 20,000.
const MOST_VALUES: usize = 1 << 20;

/// One value; containers are indices into a [`Pickle`].
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    /// What this program has no use for: None, a number that is no i64, an object's attributes.
    Other,
    None,
    Bool(bool),
    Int(i64),
    Text(Rc<str>),
    /// Little-endian two's complement, longer than an i64.
    Long(Rc<[u8]>),
    Tuple(usize),
    List(usize),
    Dict(usize),
    Global(Global),
    /// A storage that lies outside of the pickle: index into [`Pickle::storages`].
    Storage(usize),
    /// Index into [`Pickle::tensors`].
    Tensor(usize),
}

/// The names that may be called or mentioned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildTensorV2,
    RebuildParameter,
    /// A parameter to which somebody gave attributes.
    RebuildParameterWithState,
    Size,
    Counter,
    /// A class whose values this program has no use for, such as a set or a device.
    Unused,
    /// An element type by itself: it is mentioned and never called.
    Dtype,
    Storage(Element),
}

/// Element types of PyTorch's storages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl Element {
    /// Bytes.
    pub(crate) fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    fn of_storage(class: &str) -> Option<Self> {
        Some(match class {
            "DoubleStorage" => Self::F64,
            "FloatStorage" => Self::F32,
            "HalfStorage" => Self::F16,
            "BFloat16Storage" => Self::BF16,
            "LongStorage" => Self::I64,
            "IntStorage" => Self::I32,
            "ShortStorage" => Self::I16,
            "CharStorage" => Self::I8,
            "ByteStorage" => Self::U8,
            "BoolStorage" => Self::Bool,
            _ => return None,
        })
    }
}

/// PyTorch's element types, also those that no tensor here has.
const DTYPES: [&str; 23] = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "complex128",
    "complex64",
    "complex32",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
    "qint32",
    "qint8",
    "quint8",
];

impl Global {
    fn named(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensorV2,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch._utils", "_rebuild_parameter_with_state") => Self::RebuildParameterWithState,
            ("torch", "Size") => Self::Size,
            ("collections", "Counter") => Self::Counter,
            // Up to protocol 2 with Python 2's name of the module, and bytes as text to be encoded.
            (
                "__builtin__" | "builtins",
                "set" | "frozenset" | "bytes" | "bytearray" | "complex",
            )
            | ("_codecs", "encode")
            | ("torch", "device") => Self::Unused,
            ("torch", name) if DTYPES.contains(&name) => Self::Dtype,
            ("torch", class) => Self::Storage(Element::of_storage(class)?),
            _ => return None,
        })
    }
}

/// A run of numbers outside of the pickle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Storage {
    /// Its name in the file.
    pub(crate) key: Rc<str>,
    pub(crate) element: Element,
    /// Elements.
    pub(crate) len: u64,
}

/// A view of a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorView {
    pub(crate) storage: usize,
    /// Elements before its first.
    pub(crate) offset: u64,
    pub(crate) shape: Vec<u64>,
    /// Elements from one to the next along each dimension.
    pub(crate) strides: Vec<u64>,
}

/// What a pickle says.
#[derive(Debug)]
pub(crate) struct Pickle {
    pub(crate) root: Value,
    pub(crate) storages: Vec<Storage>,
    pub(crate) tensors: Vec<TensorView>,
    storage_of: HashMap<Rc<str>, usize>,
    containers: Vec<Vec<Value>>,
}

impl Pickle {
    /// Reads one pickle, up to its end and not a byte further.
    pub(crate) fn read(input: &mut dyn Read) -> Result<Self, Problem> {
        let mut machine = Machine {
            input,
            offset: 0,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            storage_of: HashMap::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
            containers: Vec::new(),
            values: 0,
        };
        let root = machine.run()?;
        Ok(Self {
            root,
            storages: machine.storages,
            tensors: machine.tensors,
            storage_of: machine.storage_of,
            containers: machine.containers,
        })
    }

    /// Index of the storage of this name.
    pub(crate) fn storage(&self, key: &str) -> Option<usize> {
        self.storage_of.get(key).copied()
    }

    /// The elements of a list or tuple.
    pub(crate) fn sequence(&self, value: &Value) -> Option<&[Value]> {
        match value {
            Value::List(at) | Value::Tuple(at) => self.containers.get(*at).map(Vec::as_slice),
            _ => None,
        }
    }

    /// Keys and values of a dictionary, in the order in which they were set.
    pub(crate) fn dict(&self, value: &Value) -> Option<impl Iterator<Item = (&Value, &Value)>> {
        let Value::Dict(at) = value else {
            return None;
        };
        let items = self.containers.get(*at)?;
        Some(
            items
                .as_chunks::<2>()
                .0
                .iter()
                .map(|[key, value]| (key, value)),
        )
    }

    /// The value of a text key; the last one that was set.
    pub(crate) fn get(&self, dict: &Value, key: &str) -> Option<&Value> {
        let items = self.dict(dict)?;
        items
            .filter(|(k, _)| matches!(k, Value::Text(text) if &**text == key))
            .map(|(_, value)| value)
            .last()
    }
}

struct Machine<'a> {
    input: &'a mut dyn Read,
    offset: u64,
    stack: Vec<Value>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    storage_of: HashMap<Rc<str>, usize>,
    storages: Vec<Storage>,
    tensors: Vec<TensorView>,
    /// Elements of lists and tuples, and keys and values of dictionaries by turns.
    containers: Vec<Vec<Value>>,
    /// In all of them, and in the shapes of tensors.
    values: usize,
}

type Step<T> = Result<T, Problem>;

impl Machine<'_> {
    fn run(&mut self) -> Step<Value> {
        loop {
            self.count(0)?;
            let start = self.offset;
            let [opcode] = self.bytes()?;
            match opcode {
                // PROTO
                0x80 => {
                    let [version] = self.bytes()?;
                    if !(2..=5).contains(&version) {
                        return self.fail(start, format!("protocol {version}, expected 2 to 5"));
                    }
                }
                // FRAME
                0x95 => {
                    self.bytes::<8>()?;
                }
                // STOP
                b'.' => return self.pop(),
                // MARK, POP, POP_MARK, DUP
                b'(' => self.marks.push(self.stack.len()),
                b'0' => {
                    self.pop()?;
                }
                b'1' => {
                    self.pop_mark()?;
                }
                b'2' => {
                    let top = self.pop()?;
                    self.stack.push(top.clone());
                    self.stack.push(top);
                }
                // NONE, NEWTRUE, NEWFALSE
                b'N' => self.stack.push(Value::None),
                0x88 => self.stack.push(Value::Bool(true)),
                0x89 => self.stack.push(Value::Bool(false)),
                // BININT, BININT1, BININT2, LONG1, LONG4, BINFLOAT
                b'J' => {
                    let value = i32::from_le_bytes(self.bytes()?);
                    self.stack.push(Value::Int(value.into()));
                }
                b'K' => {
                    let [value] = self.bytes()?;
                    self.stack.push(Value::Int(value.into()));
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.bytes()?);
                    self.stack.push(Value::Int(value.into()));
                }
                0x8a => {
                    let [len] = self.bytes()?;
                    self.long(len.into())?;
                }
                0x8b => {
                    let len = u32::from_le_bytes(self.bytes()?);
                    self.long(len.into())?;
                }
                b'G' => {
                    self.bytes::<8>()?;
                    self.stack.push(Value::Other);
                }
                // SHORT_BINUNICODE, BINUNICODE, BINUNICODE8; BINSTRING and SHORT_BINSTRING of Python 2
                0x8c | b'U' => {
                    let [len] = self.bytes()?;
                    self.text(len.into())?;
                }
                b'X' | b'T' => {
                    let len = u32::from_le_bytes(self.bytes()?);
                    self.text(len.into())?;
                }
                0x8d => {
                    let len = u64::from_le_bytes(self.bytes()?);
                    self.text(len)?;
                }
                // SHORT_BINBYTES, BINBYTES, BINBYTES8, BYTEARRAY8
                b'C' => {
                    let [len] = self.bytes()?;
                    self.skip(len.into())?;
                }
                b'B' => {
                    let len = u32::from_le_bytes(self.bytes()?);
                    self.skip(len.into())?;
                }
                0x8e | 0x96 => {
                    let len = u64::from_le_bytes(self.bytes()?);
                    self.skip(len)?;
                }
                // EMPTY_TUPLE, TUPLE1 to 3, TUPLE
                b')' => self.tuple(Vec::new())?,
                0x85..=0x87 => {
                    let count = usize::from(opcode - 0x84);
                    let values = self.pop_many(count)?;
                    self.tuple(values)?;
                }
                b't' => {
                    let values = self.pop_mark()?;
                    self.tuple(values)?;
                }
                // EMPTY_LIST, APPEND, APPENDS
                b']' => {
                    let list = self.container(Vec::new());
                    self.stack.push(Value::List(list));
                }
                b'a' => {
                    let value = self.pop()?;
                    self.extend(start, vec![value], false)?;
                }
                b'e' => {
                    let values = self.pop_mark()?;
                    self.extend(start, values, false)?;
                }
                // EMPTY_DICT, SETITEM, SETITEMS
                b'}' => {
                    let dict = self.container(Vec::new());
                    self.stack.push(Value::Dict(dict));
                }
                b's' => {
                    let pair = self.pop_many(2)?;
                    self.extend(start, pair, true)?;
                }
                b'u' => {
                    let pairs = self.pop_mark()?;
                    self.extend(start, pairs, true)?;
                }
                // EMPTY_SET, ADDITEMS, FROZENSET
                0x8f => self.stack.push(Value::Other),
                0x90 => {
                    self.pop_mark()?;
                    if !matches!(self.stack.last(), Some(Value::Other)) {
                        let found = kind(self.stack.last());
                        return self.fail(start, format!("items for {found}, expected a set"));
                    }
                }
                0x91 => {
                    self.pop_mark()?;
                    self.stack.push(Value::Other);
                }
                // GLOBAL, STACK_GLOBAL
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.global(start, &module, &name)?;
                }
                0x93 => {
                    let names = self.pop_many(2)?;
                    let [Value::Text(module), Value::Text(name)] = names.as_slice() else {
                        return self.fail(start, "a name that is no text");
                    };
                    let (module, name) = (module.clone(), name.clone());
                    self.global(start, &module, &name)?;
                }
                // REDUCE, BUILD, BINPERSID
                b'R' => self.reduce(start)?,
                b'b' => {
                    // Attributes of an OrderedDict: `_metadata` of a state dict. Not needed.
                    self.pop()?;
                    if !matches!(self.stack.last(), Some(Value::Dict(_))) {
                        return self.fail(start, "attributes of something other than a dictionary");
                    }
                }
                b'Q' => self.persistent(start)?,
                // BINPUT, LONG_BINPUT, MEMOIZE
                b'q' => {
                    let [index] = self.bytes()?;
                    self.memoize(start, index.into())?;
                }
                b'r' => {
                    let index = u32::from_le_bytes(self.bytes()?);
                    self.memoize(start, index)?;
                }
                0x94 => {
                    let index = u32::try_from(self.memo.len()).unwrap_or(u32::MAX);
                    self.memoize(start, index)?;
                }
                // BINGET, LONG_BINGET
                b'h' => {
                    let [index] = self.bytes()?;
                    self.recall(start, index.into())?;
                }
                b'j' => {
                    let index = u32::from_le_bytes(self.bytes()?);
                    self.recall(start, index)?;
                }
                _ => {
                    return self.fail(
                        start,
                        format!("opcode 0x{opcode:02x}, which no state dict needs"),
                    );
                }
            }
        }
    }

    fn fail<T>(&self, offset: u64, problem: impl Into<String>) -> Step<T> {
        Err(Problem::Pickle {
            offset,
            problem: problem.into(),
        })
    }

    fn advance(&mut self, len: u64) -> Step<()> {
        let end = self.offset.checked_add(len).filter(|&end| end <= LONGEST);
        let Some(end) = end else {
            return self.fail(
                self.offset,
                format!("{len} bytes more, expected a pickle of at most {LONGEST}"),
            );
        };
        self.offset = end;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Step<[u8; N]> {
        self.advance(N as u64)?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// As many bytes as are announced, and no room for more than are there.
    fn counted(&mut self, len: u64) -> Step<Vec<u8>> {
        self.advance(len)?;
        let mut bytes = Vec::new();
        let read = (&mut *self.input).take(len).read_to_end(&mut bytes)?;
        if (read as u64) < len {
            return Err(Problem::Io(std::io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(bytes)
    }

    fn skip(&mut self, len: u64) -> Step<()> {
        self.counted(len)?;
        self.stack.push(Value::Other);
        Ok(())
    }

    fn text(&mut self, len: u64) -> Step<()> {
        let start = self.offset;
        match String::from_utf8(self.counted(len)?) {
            Ok(text) => self.stack.push(Value::Text(text.into())),
            Err(_) => return self.fail(start, "text that is not UTF-8"),
        }
        Ok(())
    }

    fn long(&mut self, len: u64) -> Step<()> {
        let bytes = self.counted(len)?;
        let value = if bytes.len() <= 8 {
            let negative = bytes.last().is_some_and(|&byte| byte >= 0x80);
            let mut wide = [if negative { 0xff } else { 0 }; 8];
            wide[..bytes.len()].copy_from_slice(&bytes);
            Value::Int(i64::from_le_bytes(wide))
        } else {
            Value::Long(bytes.into())
        };
        self.stack.push(value);
        Ok(())
    }

    fn line(&mut self) -> Step<String> {
        let start = self.offset;
        let mut line = Vec::new();
        loop {
            match self.bytes()? {
                [b'\n'] => break,
                [byte] => line.push(byte),
            }
        }
        match String::from_utf8(line) {
            Ok(line) => Ok(line),
            Err(_) => self.fail(start, "a name that is not UTF-8"),
        }
    }

    fn pop(&mut self) -> Step<Value> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return self.fail(self.offset, "a value is taken from an empty stack");
        }
        Ok(self.stack.pop().unwrap_or(Value::Other))
    }

    fn pop_many(&mut self, count: usize) -> Step<Vec<Value>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(count) {
            Some(from) if from >= floor => Ok(self.stack.split_off(from)),
            _ => self.fail(self.offset, "values are taken from an empty stack"),
        }
    }

    fn pop_mark(&mut self) -> Step<Vec<Value>> {
        match self.marks.pop() {
            Some(from) => Ok(self.stack.split_off(from)),
            None => self.fail(self.offset, "a mark that was not set"),
        }
    }

    fn container(&mut self, values: Vec<Value>) -> usize {
        self.containers.push(values);
        self.containers.len() - 1
    }

    /// Counts values that a container or shape is about to hold.
    fn count(&mut self, values: usize) -> Step<()> {
        self.values = self.values.saturating_add(values);
        let lists = [
            self.stack.len(),
            self.marks.len(),
            self.containers.len(),
            self.memo.len(),
            self.values,
        ];
        match lists.iter().all(|&len| len <= MOST_VALUES) {
            true => Ok(()),
            false => self.fail(self.offset, format!("more than {MOST_VALUES} values")),
        }
    }

    fn tuple(&mut self, values: Vec<Value>) -> Step<()> {
        self.count(values.len())?;
        let tuple = self.container(values);
        self.stack.push(Value::Tuple(tuple));
        Ok(())
    }

    fn extend(&mut self, start: u64, values: Vec<Value>, is_dict: bool) -> Step<()> {
        if is_dict && !values.len().is_multiple_of(2) {
            return self.fail(start, "a key without a value");
        }
        let at = match self.stack.last() {
            Some(Value::Dict(at)) if is_dict => *at,
            Some(Value::List(at)) if !is_dict => *at,
            other => {
                let found = kind(other);
                let expected = if is_dict { "a dictionary" } else { "a list" };
                return self.fail(start, format!("items for {found}, expected {expected}"));
            }
        };
        self.count(values.len())?;
        self.containers[at].extend(values);
        Ok(())
    }

    fn global(&mut self, start: u64, module: &str, name: &str) -> Step<()> {
        match Global::named(module, name) {
            Some(global) => {
                self.stack.push(Value::Global(global));
                Ok(())
            }
            None => {
                let shown: String = format!("{module}.{name}").chars().take(100).collect();
                self.fail(
                    start,
                    format!(
                        "it names {shown:?}, which is no part of a state dict and is not run; \
                         save model.state_dict() alone"
                    ),
                )
            }
        }
    }

    fn memoize(&mut self, start: u64, index: u32) -> Step<()> {
        match self.stack.last() {
            Some(top) => {
                self.memo.insert(index, top.clone());
                Ok(())
            }
            None => self.fail(start, "nothing to remember"),
        }
    }

    fn recall(&mut self, start: u64, index: u32) -> Step<()> {
        match self.memo.get(&index) {
            Some(value) => {
                self.stack.push(value.clone());
                Ok(())
            }
            None => self.fail(start, format!("memo {index} was never set")),
        }
    }

    fn elements(&self, value: &Value) -> &[Value] {
        match value {
            Value::Tuple(at) | Value::List(at) => &self.containers[*at],
            _ => &[],
        }
    }

    fn reduce(&mut self, start: u64) -> Step<()> {
        let call = self.pop_many(2)?;
        let [Value::Global(function), arguments @ Value::Tuple(_)] = call.as_slice() else {
            return self.fail(start, "a call of what is no known constructor");
        };
        /// `_rebuild_tensor_v2` has the most, seven.
        const MOST_ARGUMENTS: usize = 8;
        let arguments = self.elements(arguments);
        if arguments.len() > MOST_ARGUMENTS {
            let count = arguments.len();
            return self.fail(start, format!("{function:?} of {count} unexpected values"));
        }
        let arguments = arguments.to_vec();
        let value = match (function, arguments.as_slice()) {
            (Global::OrderedDict, []) => Value::Dict(self.container(Vec::new())),
            (Global::OrderedDict, [pairs]) => {
                // The same list may be given again and again.
                self.count(2 * self.elements(pairs).len())?;
                let mut items = Vec::new();
                for pair in self.elements(pairs) {
                    match self.elements(pair) {
                        [key, value] => items.extend([key.clone(), value.clone()]),
                        _ => return self.fail(start, "an item that is no pair"),
                    }
                }
                Value::Dict(self.container(items))
            }
            (Global::RebuildTensor, [storage, offset, shape, strides])
            | (Global::RebuildTensorV2, [storage, offset, shape, strides, _, _, ..]) => {
                self.tensor(start, storage, offset, shape, strides)?
            }
            (
                Global::RebuildParameter | Global::RebuildParameterWithState,
                [tensor @ Value::Tensor(_), ..],
            ) => tensor.clone(),
            (Global::Size, [dimensions @ Value::Tuple(_)]) => dimensions.clone(),
            (Global::Counter, [counts @ Value::Dict(_)]) => counts.clone(),
            (Global::Unused, _) => Value::Other,
            _ => {
                let count = arguments.len();
                return self.fail(start, format!("{function:?} of {count} unexpected values"));
            }
        };
        self.stack.push(value);
        Ok(())
    }

    fn tensor(
        &mut self,
        start: u64,
        storage: &Value,
        offset: &Value,
        shape: &Value,
        strides: &Value,
    ) -> Step<Value> {
        /// PyTorch's own limit.
        const MOST_DIMENSIONS: usize = 64;
        let natural = |value: &Value| match value {
            Value::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        };
        let all = |values: &Value| -> Option<Vec<u64>> {
            let values = self.elements(values);
            let values = values.iter().take(MOST_DIMENSIONS + 1);
            values.map(natural).collect()
        };
        let (&Value::Storage(storage), Some(offset), Some(shape), Some(strides)) =
            (storage, natural(offset), all(shape), all(strides))
        else {
            return self.fail(
                start,
                "a tensor whose storage, offset, shape or strides are none",
            );
        };
        if shape.len() != strides.len() || shape.len() > MOST_DIMENSIONS {
            return self.fail(
                start,
                format!(
                    "a tensor of {} dimensions and {} strides",
                    shape.len(),
                    strides.len()
                ),
            );
        }
        // The same shape may be given again and again.
        self.count(shape.len() + strides.len())?;
        self.tensors.push(TensorView {
            storage,
            offset,
            shape,
            strides,
        });
        Ok(Value::Tensor(self.tensors.len() - 1))
    }

    /// `('storage', FloatStorage, key, location, number of elements[, None])`.
    fn persistent(&mut self, start: u64) -> Step<()> {
        let id = self.pop()?;
        let (key, element, len) = match self.elements(&id) {
            [
                Value::Text(kind),
                Value::Global(Global::Storage(element)),
                Value::Text(key),
                _,
                Value::Int(len),
                rest @ ..,
            ] if &**kind == "storage" && matches!(rest, [] | [Value::None]) => {
                (key.clone(), *element, *len)
            }
            _ => return self.fail(start, "a reference to something other than a storage"),
        };
        let Ok(len) = u64::try_from(len) else {
            return self.fail(start, format!("a storage of {len} elements"));
        };
        let storage = Storage { key, element, len };
        let index = match self.storage_of.get(&storage.key) {
            Some(&index) if self.storages[index] == storage => index,
            Some(_) => {
                let key = &storage.key;
                return self.fail(start, format!("storage {key:?} with two types or lengths"));
            }
            None => {
                self.storage_of
                    .insert(storage.key.clone(), self.storages.len());
                self.storages.push(storage);
                self.storages.len() - 1
            }
        };
        self.stack.push(Value::Storage(index));
        Ok(())
    }
}

/// What a value is, for people.
pub(crate) fn kind(value: Option<&Value>) -> &'static str {
    match value {
        None => "nothing",
        Some(Value::Other | Value::Long(_)) => "some value",
        Some(Value::None) => "None",
        Some(Value::Bool(_)) => "a bool",
        Some(Value::Int(_)) => "a number",
        Some(Value::Text(_)) => "text",
        Some(Value::Tuple(_)) => "a tuple",
        Some(Value::List(_)) => "a list",
        Some(Value::Dict(_)) => "a dictionary",
        Some(Value::Global(_)) => "a class",
        Some(Value::Storage(_)) => "a storage",
        Some(Value::Tensor(_)) => "a tensor",
    }
}
