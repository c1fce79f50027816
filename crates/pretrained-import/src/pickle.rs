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
    /// What this program has no use for: a float, bytes, a set, an object that is no tensor.
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

/// The opcodes that state dicts are written in, under the names of Python's `pickletools`.
mod op {
    pub(super) const PROTO: u8 = 0x80;
    pub(super) const FRAME: u8 = 0x95;
    pub(super) const STOP: u8 = b'.';

    pub(super) const MARK: u8 = b'(';
    pub(super) const POP: u8 = b'0';
    pub(super) const POP_MARK: u8 = b'1';
    pub(super) const DUP: u8 = b'2';

    pub(super) const NONE: u8 = b'N';
    pub(super) const NEWTRUE: u8 = 0x88;
    pub(super) const NEWFALSE: u8 = 0x89;
    pub(super) const BININT: u8 = b'J';
    pub(super) const BININT1: u8 = b'K';
    pub(super) const BININT2: u8 = b'M';
    pub(super) const LONG1: u8 = 0x8a;
    pub(super) const LONG4: u8 = 0x8b;
    pub(super) const BINFLOAT: u8 = b'G';

    pub(super) const SHORT_BINUNICODE: u8 = 0x8c;
    pub(super) const BINUNICODE: u8 = b'X';
    pub(super) const BINUNICODE8: u8 = 0x8d;
    pub(super) const SHORT_BINSTRING: u8 = b'U';
    pub(super) const BINSTRING: u8 = b'T';
    pub(super) const SHORT_BINBYTES: u8 = b'C';
    pub(super) const BINBYTES: u8 = b'B';
    pub(super) const BINBYTES8: u8 = 0x8e;
    pub(super) const BYTEARRAY8: u8 = 0x96;

    pub(super) const EMPTY_TUPLE: u8 = b')';
    pub(super) const TUPLE1: u8 = 0x85;
    pub(super) const TUPLE2: u8 = 0x86;
    pub(super) const TUPLE3: u8 = 0x87;
    pub(super) const TUPLE: u8 = b't';
    pub(super) const EMPTY_LIST: u8 = b']';
    pub(super) const APPEND: u8 = b'a';
    pub(super) const APPENDS: u8 = b'e';
    pub(super) const EMPTY_DICT: u8 = b'}';
    pub(super) const SETITEM: u8 = b's';
    pub(super) const SETITEMS: u8 = b'u';
    pub(super) const EMPTY_SET: u8 = 0x8f;
    pub(super) const ADDITEMS: u8 = 0x90;
    pub(super) const FROZENSET: u8 = 0x91;

    pub(super) const BINPUT: u8 = b'q';
    pub(super) const LONG_BINPUT: u8 = b'r';
    pub(super) const MEMOIZE: u8 = 0x94;
    pub(super) const BINGET: u8 = b'h';
    pub(super) const LONG_BINGET: u8 = b'j';

    pub(super) const GLOBAL: u8 = b'c';
    pub(super) const STACK_GLOBAL: u8 = 0x93;
    pub(super) const REDUCE: u8 = b'R';
    pub(super) const BUILD: u8 = b'b';
    pub(super) const BINPERSID: u8 = b'Q';
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
            if opcode == op::STOP {
                return self.pop();
            }
            let taken = self.take_framing(opcode, start)?
                || self.take_stack(opcode)?
                || self.take_constant(opcode)?
                || self.take_text_or_bytes(opcode)?
                || self.take_sequence(opcode, start)?
                || self.take_dict_or_set(opcode, start)?
                || self.take_memo(opcode, start)?
                || self.take_object(opcode, start)?;
            if !taken {
                return self.fail(
                    start,
                    format!("opcode 0x{opcode:02x}, which no state dict needs"),
                );
            }
        }
    }
}

/// Opcodes by family. Each function runs an opcode of its own and says whether it was one; errors
/// are at `start`, where the opcode is.
impl Machine<'_> {
    fn take_framing(&mut self, opcode: u8, start: u64) -> Step<bool> {
        match opcode {
            op::PROTO => {
                let version = self.u8()?;
                if !(2..=5).contains(&version) {
                    return self.fail(start, format!("protocol {version}, expected 2 to 5"));
                }
            }
            op::FRAME => {
                self.u64()?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn take_stack(&mut self, opcode: u8) -> Step<bool> {
        match opcode {
            op::MARK => self.marks.push(self.stack.len()),
            op::POP => {
                self.pop()?;
            }
            op::POP_MARK => {
                self.pop_mark()?;
            }
            op::DUP => {
                let top = self.pop()?;
                self.stack.push(top.clone());
                self.stack.push(top);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn take_constant(&mut self, opcode: u8) -> Step<bool> {
        let value = match opcode {
            op::NONE => Value::None,
            op::NEWTRUE => Value::Bool(true),
            op::NEWFALSE => Value::Bool(false),
            op::BININT => Value::Int(i32::from_le_bytes(self.bytes()?).into()),
            op::BININT1 => Value::Int(self.u8()?.into()),
            op::BININT2 => Value::Int(u16::from_le_bytes(self.bytes()?).into()),
            op::LONG1 => {
                let len = self.u8()?;
                self.long(len.into())?
            }
            op::LONG4 => {
                let len = self.u32()?;
                self.long(len.into())?
            }
            op::BINFLOAT => {
                self.u64()?;
                Value::Other
            }
            _ => return Ok(false),
        };
        self.stack.push(value);
        Ok(true)
    }

    fn take_text_or_bytes(&mut self, opcode: u8) -> Step<bool> {
        let len = match opcode {
            op::SHORT_BINUNICODE | op::SHORT_BINSTRING | op::SHORT_BINBYTES => self.u8()?.into(),
            op::BINUNICODE | op::BINSTRING | op::BINBYTES => self.u32()?.into(),
            op::BINUNICODE8 | op::BINBYTES8 | op::BYTEARRAY8 => self.u64()?,
            _ => return Ok(false),
        };
        let value = match opcode {
            op::SHORT_BINBYTES | op::BINBYTES | op::BINBYTES8 | op::BYTEARRAY8 => {
                self.counted(len)?;
                Value::Other
            }
            // The strings of Python 2 are text here.
            _ => self.text(len)?,
        };
        self.stack.push(value);
        Ok(true)
    }

    fn take_sequence(&mut self, opcode: u8, start: u64) -> Step<bool> {
        match opcode {
            op::EMPTY_TUPLE => self.tuple(Vec::new())?,
            op::TUPLE1 | op::TUPLE2 | op::TUPLE3 => {
                let count = usize::from(opcode - op::TUPLE1) + 1;
                let values = self.pop_many(count)?;
                self.tuple(values)?;
            }
            op::TUPLE => {
                let values = self.pop_mark()?;
                self.tuple(values)?;
            }
            op::EMPTY_LIST => {
                let list = self.container(Vec::new());
                self.stack.push(Value::List(list));
            }
            op::APPEND => {
                let value = self.pop()?;
                self.append(start, vec![value])?;
            }
            op::APPENDS => {
                let values = self.pop_mark()?;
                self.append(start, values)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn take_dict_or_set(&mut self, opcode: u8, start: u64) -> Step<bool> {
        match opcode {
            op::EMPTY_DICT => {
                let dict = self.container(Vec::new());
                self.stack.push(Value::Dict(dict));
            }
            op::SETITEM => {
                let pair = self.pop_many(2)?;
                self.set_items(start, pair)?;
            }
            op::SETITEMS => {
                let pairs = self.pop_mark()?;
                self.set_items(start, pairs)?;
            }
            op::EMPTY_SET => self.stack.push(Value::Other),
            op::ADDITEMS => {
                self.pop_mark()?;
                if !matches!(self.stack.last(), Some(Value::Other)) {
                    return self.fail_items(start, "a set");
                }
            }
            op::FROZENSET => {
                self.pop_mark()?;
                self.stack.push(Value::Other);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn take_memo(&mut self, opcode: u8, start: u64) -> Step<bool> {
        match opcode {
            op::BINPUT => {
                let index = self.u8()?;
                self.memoize(start, index.into())?;
            }
            op::LONG_BINPUT => {
                let index = self.u32()?;
                self.memoize(start, index)?;
            }
            op::MEMOIZE => {
                let index = u32::try_from(self.memo.len()).unwrap_or(u32::MAX);
                self.memoize(start, index)?;
            }
            op::BINGET => {
                let index = self.u8()?;
                self.recall(start, index.into())?;
            }
            op::LONG_BINGET => {
                let index = self.u32()?;
                self.recall(start, index)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn take_object(&mut self, opcode: u8, start: u64) -> Step<bool> {
        match opcode {
            op::GLOBAL => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(start, &module, &name)?;
            }
            op::STACK_GLOBAL => {
                let names = self.pop_many(2)?;
                let [Value::Text(module), Value::Text(name)] = names.as_slice() else {
                    return self.fail(start, "a name that is no text");
                };
                self.global(start, module, name)?;
            }
            op::REDUCE => self.reduce(start)?,
            op::BUILD => {
                // Attributes of an OrderedDict: `_metadata` of a state dict. Not needed.
                self.pop()?;
                if !matches!(self.stack.last(), Some(Value::Dict(_))) {
                    return self.fail(start, "attributes of something other than a dictionary");
                }
            }
            op::BINPERSID => self.persistent(start)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// What the opcodes are made of.
impl Machine<'_> {
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

    fn u8(&mut self) -> Step<u8> {
        let [byte] = self.bytes()?;
        Ok(byte)
    }

    fn u32(&mut self) -> Step<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Step<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
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

    fn text(&mut self, len: u64) -> Step<Value> {
        let start = self.offset;
        match String::from_utf8(self.counted(len)?) {
            Ok(text) => Ok(Value::Text(text.into())),
            Err(_) => self.fail(start, "text that is not UTF-8"),
        }
    }

    fn long(&mut self, len: u64) -> Step<Value> {
        let bytes = self.counted(len)?;
        Ok(if bytes.len() <= 8 {
            let negative = bytes.last().is_some_and(|&byte| byte >= 0x80);
            let mut wide = [if negative { 0xff } else { 0 }; 8];
            wide[..bytes.len()].copy_from_slice(&bytes);
            Value::Int(i64::from_le_bytes(wide))
        } else {
            Value::Long(bytes.into())
        })
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

    /// Into the list on top of the stack.
    fn append(&mut self, start: u64, values: Vec<Value>) -> Step<()> {
        match self.stack.last() {
            Some(&Value::List(at)) => self.extend(at, values),
            _ => self.fail_items(start, "a list"),
        }
    }

    /// Into the dictionary on top of the stack: keys and values by turns.
    fn set_items(&mut self, start: u64, items: Vec<Value>) -> Step<()> {
        if !items.len().is_multiple_of(2) {
            return self.fail(start, "a key without a value");
        }
        match self.stack.last() {
            Some(&Value::Dict(at)) => self.extend(at, items),
            _ => self.fail_items(start, "a dictionary"),
        }
    }

    fn extend(&mut self, container: usize, values: Vec<Value>) -> Step<()> {
        self.count(values.len())?;
        self.containers[container].extend(values);
        Ok(())
    }

    fn fail_items<T>(&self, start: u64, expected: &str) -> Step<T> {
        let found = kind(self.stack.last());
        self.fail(start, format!("items for {found}, expected {expected}"))
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
            (Global::RebuildTensor, [storage, offset, shape, strides]) => {
                self.tensor(start, storage, offset, shape, strides)?
            }
            (Global::RebuildTensorV2, [storage, offset, shape, strides, _, _, metadata @ ..]) => {
                self.check_metadata(start, metadata)?;
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

    /// Refuses a tensor whose values are not those of its storage: PyTorch keeps beside it that they are to be negated, for one.
    fn check_metadata(&self, start: u64, metadata: &[Value]) -> Step<()> {
        match metadata {
            [] | [Value::None] => Ok(()),
            [Value::Dict(at)] if self.containers[*at].is_empty() => Ok(()),
            _ => self.fail(
                start,
                "a tensor whose values are not as stored, such as one with PyTorch's negative bit; save what \
                 tensor.resolve_neg() gives",
            ),
        }
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
