//! Finding and loading CIFAR-10 in a folder.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::{DataError, TrainTest, binary, hub_parquet};

/// The complete files of CIFAR-10 that a folder holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The binary version: `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`.
    Binary {
        /// The folder of the six files.
        dir: PathBuf,
    },
    /// The Hugging Face Hub's version: one Parquet file each.
    HubParquet {
        /// Training pictures.
        train: PathBuf,
        /// Test pictures.
        test: PathBuf,
    },
}

/// Files that were looked for as one layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The layout.
    pub layout: Layout,
    /// The files of it that are not there.
    pub missing: Vec<PathBuf>,
}

/// Loads CIFAR-10 from `dir`, which holds any of these, looked for in this order:
///
/// 1. `cifar-10-batches-bin/` with `data_batch_1.bin` … `data_batch_5.bin` and `test_batch.bin`;
/// 2. `plain_text/train-00000-of-00001.parquet` and `plain_text/test-00000-of-00001.parquet`;
/// 3. `plain_text/train/0000.parquet` and `plain_text/test/0000.parquet`.
///
/// `dir` may also be the folder `cifar-10-batches-bin` or `plain_text` itself.
///
/// # Errors
/// [`DataError::NoData`] if no layout is complete: it lists what was looked for, what is missing,
/// what is there (also a version that is not read) and what to do. Otherwise the errors of [`binary::load`] and
/// [`hub_parquet::load`].
pub fn load(dir: &Path) -> Result<TrainTest, DataError> {
    match find_layout(dir) {
        Some(Layout::Binary { dir }) => binary::load(&dir),
        Some(Layout::HubParquet { train, test }) => hub_parquet::load(&train, &test),
        None => Err(DataError::NoData {
            dir: dir.to_owned(),
            looked_for: candidates(dir),
            found: listing(dir),
        }),
    }
}

/// The layout that [`load`] would read, if `dir` has one that is complete. It looks at file names
/// only and opens nothing.
pub fn find_layout(dir: &Path) -> Option<Layout> {
    candidates(dir)
        .into_iter()
        .find(|candidate| candidate.missing.is_empty())
        .map(|candidate| candidate.layout)
}

/// The first layout of which `dir` has some files and lacks others.
pub fn incomplete_layout(dir: &Path) -> Option<Candidate> {
    candidates(dir)
        .into_iter()
        .find(|candidate| (1..candidate.layout.files().len()).contains(&candidate.missing.len()))
}

/// The folder of the version for Python (torchvision's), which is not read, where it is `dir` or in it.
pub fn python_version(dir: &Path) -> Option<PathBuf> {
    [dir.join("cifar-10-batches-py"), dir.to_owned()]
        .into_iter()
        .find(|folder| {
            ["data_batch_1", "test_batch"].map(|name| folder.join(name).is_file()) == [true; 2]
        })
}

impl Layout {
    /// The layout's files, the training files first.
    pub fn files(&self) -> Vec<PathBuf> {
        match self {
            Layout::Binary { dir } => binary::TRAIN_FILES
                .iter()
                .chain([&binary::TEST_FILE])
                .map(|name| dir.join(name))
                .collect(),
            Layout::HubParquet { train, test } => vec![train.clone(), test.clone()],
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Layout::Binary { dir } => write!(
                f,
                "`{}` with data_batch_1.bin to data_batch_5.bin and test_batch.bin",
                dir.display()
            ),
            Layout::HubParquet { train, test } => {
                write!(f, "`{}` and `{}`", train.display(), test.display())
            }
        }
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.layout)?;
        let files = self.layout.files().len();
        if self.missing.is_empty() || self.missing.len() == files {
            return Ok(()); // nothing of it is there: the listing says enough
        }
        let missing: Vec<_> = self
            .missing
            .iter()
            .map(|path| format!("`{}`", path.display()))
            .collect();
        write!(f, " (incomplete: {} is missing)", missing.join(", "))
    }
}

fn candidates(dir: &Path) -> Vec<Candidate> {
    let binary = |dir: PathBuf| Layout::Binary { dir };
    let parquet = |dir: &Path, train: &str, test: &str| Layout::HubParquet {
        train: dir.join(train),
        test: dir.join(test),
    };
    let plain_text = dir.join("plain_text");
    let [(train_a, test_a), (train_b, test_b)] = hub_parquet::FILES;
    [
        binary(dir.join("cifar-10-batches-bin")),
        binary(dir.to_owned()),
        parquet(&plain_text, train_a, test_a),
        parquet(dir, train_a, test_a),
        parquet(&plain_text, train_b, test_b),
        parquet(dir, train_b, test_b),
    ]
    .into_iter()
    .map(|layout| {
        let mut missing = layout.files();
        missing.retain(|path| !path.is_file());
        Candidate { layout, missing }
    })
    .collect()
}

/// Names in `dir`, sorted, folders with a slash; at most 12.
fn listing(dir: &Path) -> Vec<String> {
    const SHOWN: usize = 12;
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) => return vec![format!("it cannot be listed ({error})")],
    };
    let mut names: Vec<String> = entries
        .flatten()
        .map(|entry| {
            let slash = if entry.path().is_dir() { "/" } else { "" };
            format!("{}{slash}", entry.file_name().to_string_lossy())
        })
        .collect();
    names.sort();
    if names.len() > SHOWN {
        let more = names.len() - SHOWN;
        names.truncate(SHOWN);
        names.push(format!("and {more} more"));
    }
    names
}
