//! A state dict held against torchvision's GoogLeNet.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use inception_model::{GoogLeNet, GoogLeNetConfig};

use crate::names::first_of;
use crate::state_dict::{Ignored, StateDict};

/// What to do with auxiliary heads, and with what does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatchOptions {
    /// What becomes of `aux1` and `aux2`.
    pub aux_heads: AuxHeads,
    /// Anything missing, unexpected or misshapen is an error.
    pub strict: bool,
}

/// What becomes of the two auxiliary heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AuxHeads {
    /// They are kept where the file has them.
    #[default]
    AsInFile,
    /// They are kept, and missing where the file has none.
    Keep,
    /// They are left out, as torchvision does after loading.
    Drop,
}

impl Default for MatchOptions {
    fn default() -> Self {
        Self {
            aux_heads: AuxHeads::default(),
            strict: true,
        }
    }
}

/// The tensors of a file that are torchvision's GoogLeNet, and how they compare with it.
#[derive(Debug, Clone)]
pub struct Matched {
    /// In the state dict's order, f32 (counters i64).
    pub tensors: Vec<(String, Tensor)>,
    /// How the file compares with the network.
    pub report: Report,
}

/// How a file compares with torchvision's GoogLeNet.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Outputs of the head; 0 where [`match_backbone`] asked for none.
    pub classes: usize,
    /// Whether the auxiliary heads are among the loaded.
    pub aux_heads: bool,
    /// Keys that were taken.
    pub loaded: Vec<String>,
    /// Keys of the network that the file lacks.
    pub missing: Vec<String>,
    /// Keys of the file that the network lacks.
    pub unexpected: Vec<String>,
    /// Tensors of another shape.
    pub misshapen: Vec<Misshapen>,
    /// Keys that were left out on request: of auxiliary heads, or of heads.
    pub dropped: Vec<String>,
    /// How many tensors were of another type, by type: they are f32 (counters: i64) now.
    pub converted: BTreeMap<String, usize>,
    /// Counters of batch norms that were filled with 0, in a file that has none: those from before
    /// PyTorch 0.4.1.
    pub filled: Vec<String>,
    /// Keys of the file that hold no tensor.
    #[serde(flatten)]
    pub ignored: Ignored,
}

/// A tensor of another shape than the network's.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Misshapen {
    /// Its key.
    pub name: String,
    /// Its shape in the file.
    pub found: Vec<usize>,
    /// The network's.
    pub expected: Vec<usize>,
}

/// Why a state dict is not torchvision's GoogLeNet.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MatchError {
    /// Something does not fit, and everything had to.
    #[error("not torchvision's GoogLeNet:{}", listed(.0))]
    Mismatch(Box<Report>),
    /// Without a head of two dimensions nobody knows the number of classes.
    #[error(
        "no tensor \"fc.weight\" of two dimensions among {count} tensors ({}, …), so this is not \
         torchvision's GoogLeNet",
        first.escape_debug()
    )]
    NoHead {
        /// Tensors in the file.
        count: usize,
        /// The first key.
        first: String,
    },
    /// A type that has no f32.
    #[error("tensor {name:?} cannot be converted from {found} to {expected}")]
    Convert {
        /// Its key.
        name: String,
        /// Its type.
        found: String,
        /// The network's.
        expected: String,
        /// Candle's error.
        source: candle_core::Error,
    },
}

impl Report {
    /// Whether every key of both sides was used.
    pub fn is_exact(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.misshapen.is_empty()
    }
}

/// What does not fit, a line each; a few names of each kind.
fn listed(report: &Report) -> String {
    const SHOWN: usize = 5;
    let mut lines = String::new();
    let mut add = |kind: &str, names: Vec<String>| {
        if names.is_empty() {
            return;
        }
        let shown = first_of(&names, SHOWN, 0);
        lines.push_str(&format!("\n  {kind} ({}): {shown}", names.len()));
    };
    add("missing", report.missing.clone());
    add("unexpected", report.unexpected.clone());
    let misshapen = report.misshapen.iter();
    let misshapen =
        misshapen.map(|m| format!("{} is {:?}, expected {:?}", m.name, m.found, m.expected));
    add("misshapen", misshapen.collect());
    lines
}

fn is_counter(name: &str) -> bool {
    name.ends_with(".num_batches_tracked")
}

/// Takes torchvision's GoogLeNet out of a state dict. The number of classes is that of `fc.weight`.
///
/// # Errors
/// [`MatchError`]; with `strict` also for what is missing, unexpected or misshapen.
pub fn match_googlenet(
    state: &StateDict,
    options: MatchOptions,
) -> Result<Matched, Box<MatchError>> {
    let classes = match state.tensors.get("fc.weight").map(Tensor::dims) {
        Some(&[classes, _]) => classes,
        _ => {
            return Err(Box::new(MatchError::NoHead {
                count: state.tensors.len(),
                first: state.tensors.keys().next().cloned().unwrap_or_default(),
            }));
        }
    };
    compare(state, options, Some(classes))
}

/// As [`match_googlenet`] without the layers that have an output for each class
/// ([`GoogLeNet::is_head`]): what the file has of them plays no part.
///
/// # Errors
/// As [`match_googlenet`], but that a file may have no head.
pub fn match_backbone(
    state: &StateDict,
    options: MatchOptions,
) -> Result<Matched, Box<MatchError>> {
    compare(state, options, None)
}

/// `classes` is what the head has; None: no head is asked for.
fn compare(
    state: &StateDict,
    options: MatchOptions,
    classes: Option<usize>,
) -> Result<Matched, Box<MatchError>> {
    let is_left_out = |name: &str| {
        (classes.is_none() && GoogLeNet::is_head(name))
            || (options.aux_heads == AuxHeads::Drop && GoogLeNet::is_auxiliary(name))
    };
    let config = GoogLeNetConfig {
        num_classes: classes.unwrap_or(1),
        aux_heads: match options.aux_heads {
            AuxHeads::AsInFile => state
                .tensors
                .keys()
                .any(|name| GoogLeNet::is_auxiliary(name)),
            AuxHeads::Keep => true,
            AuxHeads::Drop => false,
        },
        ..GoogLeNetConfig::default()
    };
    let mut report = Report {
        classes: classes.unwrap_or_default(),
        aux_heads: config.aux_heads,
        ignored: state.ignored.clone(),
        ..Report::default()
    };
    let has_counters = state.tensors.keys().any(|name| is_counter(name));
    let mut tensors = Vec::new();
    let mut expected_names = BTreeSet::new();
    let shapes = GoogLeNet::state_dict_shapes(&config).into_iter();
    for (name, shape, dtype) in shapes.filter(|(name, ..)| !is_left_out(name)) {
        expected_names.insert(name.clone());
        match state.tensors.get(&name) {
            None if !has_counters && is_counter(&name) => {
                report.filled.push(name.clone());
                tensors.push((name.clone(), zero(&name)?));
            }
            None => report.missing.push(name),
            Some(tensor) if tensor.dims() != shape && !is_old_scalar(tensor, &shape) => {
                report.misshapen.push(Misshapen {
                    name,
                    found: tensor.dims().to_vec(),
                    expected: shape,
                })
            }
            Some(tensor) => {
                if tensor.dtype() != dtype {
                    let found = tensor.dtype().as_str().to_owned();
                    *report.converted.entry(found).or_default() += 1;
                }
                tensors.push((name.clone(), convert(&name, tensor, &shape, dtype)?));
                report.loaded.push(name);
            }
        }
    }
    for name in state.tensors.keys() {
        if is_left_out(name) {
            report.dropped.push(name.clone());
        } else if !expected_names.contains(name) {
            report.unexpected.push(name.clone());
        }
    }
    match options.strict && !report.is_exact() {
        true => Err(Box::new(MatchError::Mismatch(Box::new(report)))),
        false => Ok(Matched { tensors, report }),
    }
}

fn zero(name: &str) -> Result<Tensor, Box<MatchError>> {
    Tensor::zeros((), DType::I64, &Device::Cpu).map_err(|source| {
        Box::new(MatchError::Convert {
            name: name.to_owned(),
            found: "nothing".into(),
            expected: "i64".into(),
            source,
        })
    })
}

/// Whether PyTorch takes it for a scalar: files from before 0.4 have one dimension there.
fn is_old_scalar(tensor: &Tensor, expected: &[usize]) -> bool {
    expected.is_empty() && tensor.dims() == [1]
}

fn convert(
    name: &str,
    tensor: &Tensor,
    shape: &[usize],
    dtype: DType,
) -> Result<Tensor, Box<MatchError>> {
    let converted = tensor
        .reshape(shape)
        .and_then(|tensor| tensor.to_dtype(dtype));
    converted.map_err(|source| {
        Box::new(MatchError::Convert {
            name: name.to_owned(),
            found: tensor.dtype().as_str().into(),
            expected: dtype.as_str().into(),
            source,
        })
    })
}
