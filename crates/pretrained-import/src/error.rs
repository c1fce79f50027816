//! Why a file of weights was refused.

use std::io;
use std::path::PathBuf;

use crate::torch::WRAPPERS;

/// A file that cannot be read as weights.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The system could not read the file.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },

    /// None of the formats.
    #[error(
        "{path} holds no weights: it begins with {found}, expected a PyTorch file (.pth, legacy or zip) \
         or safetensors"
    )]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// Its first bytes, for people.
        found: String,
    },

    /// The pickle inside of a PyTorch file holds what no state dict holds, or is damaged.
    #[error("{path}: byte {offset} of the pickle: {problem}")]
    Pickle {
        /// The file.
        path: PathBuf,
        /// Bytes from the beginning of the pickle.
        offset: u64,
        /// What was found, and what was expected.
        problem: String,
    },

    /// What surrounds pickle and numbers is damaged.
    #[error("{path} is damaged: {problem}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found, and what was expected.
        problem: String,
    },

    /// A tensor that does not fit what the file holds.
    #[error("{path}: tensor {name:?}: {problem}")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// Its key.
        name: String,
        /// What was found, and what was expected.
        problem: String,
    },

    /// Metadata that cannot be meant.
    #[error("{path}: {key} is {found:?} in its metadata, and {expected}")]
    Metadata {
        /// The file.
        path: PathBuf,
        /// What it is said of.
        key: &'static str,
        /// What is said.
        found: String,
        /// "it must be true or false".
        expected: String,
    },

    /// A readable file without a state dict.
    #[error(
        "{path} holds no state dict: {found}; expected a dictionary of tensors, or one under \
         {} (in PyTorch: torch.save(model.state_dict(), …))",
        wrappers()
    )]
    NoStateDict {
        /// The file.
        path: PathBuf,
        /// What it holds.
        found: String,
    },
}

/// For people: `"state_dict", …, "net" or "weights"`.
fn wrappers() -> String {
    let quoted = WRAPPERS.map(|wrapper| format!("{wrapper:?}"));
    let (last, first) = (&quoted[quoted.len() - 1], &quoted[..quoted.len() - 1]);
    format!("{} or {last}", first.join(", "))
}

/// A problem whose file is not known where it is found.
#[derive(Debug)]
pub(crate) enum Problem {
    /// The source failed, or ended too early.
    Io(io::Error),
    Pickle {
        offset: u64,
        problem: String,
    },
    Damaged(String),
    Tensor {
        name: String,
        problem: String,
    },
    NoStateDict(String),
}

impl Problem {
    /// On one line: what libraries say of a file may quote it.
    pub(crate) fn damaged(problem: impl Into<String>) -> Self {
        Self::Damaged(problem.into().replace(char::is_control, " "))
    }

    pub(crate) fn of(self, path: &std::path::Path) -> ImportError {
        let path = path.to_path_buf();
        match self {
            Self::Io(source) if source.kind() == io::ErrorKind::UnexpectedEof => {
                ImportError::Damaged {
                    path,
                    problem: "it ends too early (is it truncated?)".into(),
                }
            }
            // A wrong checksum, for example.
            Self::Io(source) if source.kind() == io::ErrorKind::InvalidData => {
                ImportError::Damaged {
                    path,
                    problem: source.to_string(),
                }
            }
            Self::Io(source) => ImportError::Read { path, source },
            Self::Pickle { offset, problem } => ImportError::Pickle {
                path,
                offset,
                problem,
            },
            Self::Damaged(problem) => ImportError::Damaged { path, problem },
            Self::Tensor { name, problem } => ImportError::Tensor {
                path,
                name,
                problem,
            },
            Self::NoStateDict(found) => ImportError::NoStateDict { path, found },
        }
    }
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}
