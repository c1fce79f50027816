//! What can go wrong between a folder and a batch.

use std::path::{Path, PathBuf};

use crate::layout::{Candidate, python_version};

/// An error of this crate. Its text names the file, the place in it, what was found and what was
/// expected; the cause, where there is one, is its `source()`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file could not be opened or read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },

    /// A folder holds CIFAR-10 in none of the layouts.
    #[error("{}", no_data(dir, looked_for, found))]
    NoData {
        /// The folder that was asked for.
        dir: PathBuf,
        /// Each layout's files that were looked for, and which of them are missing.
        looked_for: Vec<Candidate>,
        /// The names in the folder (at most 12), or why it cannot be listed.
        found: Vec<String>,
    },

    /// A file holds no picture.
    #[error("`{}` holds no picture", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },

    /// A file claims more pictures than this crate reads.
    #[error("`{}` claims {found} pictures; at most {max} are read from one file", path.display())]
    TooMany {
        /// The file.
        path: PathBuf,
        /// Pictures the file claims.
        found: u64,
        /// The bound.
        max: u64,
    },

    /// A binary file's size is no whole number of records.
    #[error(
        "`{}` has {found} bytes: {} whole records of {record} bytes and {} bytes of record {}; \
         expected a multiple of {record} (is the file truncated?)",
        path.display(), found / record, found % record, found / record
    )]
    BinarySize {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// Bytes of one record.
        record: u64,
    },

    /// A binary record begins with a byte that is no label.
    #[error("`{}`, record {record}: label byte {found}, expected 0 to 9", path.display())]
    BinaryLabel {
        /// The file.
        path: PathBuf,
        /// The record, counted from 0.
        record: usize,
        /// The byte found.
        found: u8,
    },

    /// A file is not readable as Parquet.
    #[error("cannot read `{}` as Parquet", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// The Parquet library's reason.
        source: parquet::errors::ParquetError,
    },

    /// A Parquet file lacks a column, or it has another type.
    #[error(
        "`{}`: expected a column `{column}` of type {expected}, found {found}",
        path.display()
    )]
    ParquetColumn {
        /// The file.
        path: PathBuf,
        /// The column expected.
        column: &'static str,
        /// Its type.
        expected: &'static str,
        /// What the file has: the column's type, or all its columns.
        found: String,
    },

    /// A Parquet column ends before, or goes on after, its last row.
    #[error("`{}`: column `{column}` has {found} values, expected {expected}", path.display())]
    ParquetRows {
        /// The file.
        path: PathBuf,
        /// The column.
        column: &'static str,
        /// Values read.
        found: usize,
        /// Rows the file claims.
        expected: usize,
    },

    /// A row of a Parquet file has no value.
    #[error("`{}`, row {row}: `{column}` is null", path.display())]
    ParquetNull {
        /// The file.
        path: PathBuf,
        /// The row, counted from 0.
        row: usize,
        /// The column.
        column: &'static str,
    },

    /// A row of a Parquet file has a label that is no class.
    #[error("`{}`, row {row}: label {found}, expected 0 to 9", path.display())]
    ParquetLabel {
        /// The file.
        path: PathBuf,
        /// The row, counted from 0.
        row: usize,
        /// The label found.
        found: i64,
    },

    /// An encoded picture is not what was expected.
    #[error(
        "`{}`, row {row}: the picture is {found}; expected a PNG or JPEG of 32×32 pixels, 8-bit RGB or grey",
        path.display()
    )]
    Picture {
        /// The file.
        path: PathBuf,
        /// The row, counted from 0.
        row: usize,
        /// What it is instead.
        found: String,
    },

    /// An encoded picture cannot be decoded.
    #[error("`{}`, row {row}: cannot decode the picture", path.display())]
    Decode {
        /// The file.
        path: PathBuf,
        /// The row, counted from 0.
        row: usize,
        /// The decoder's reason.
        source: image::ImageError,
    },

    /// Pixels and labels do not go together.
    #[error("{labels} labels need {} bytes of pixels, found {pixels}", labels * crate::IMAGE_BYTES)]
    SetSize {
        /// Number of labels.
        labels: usize,
        /// Number of bytes of pixels.
        pixels: usize,
    },

    /// A label is no class.
    #[error("label {found} at index {index}, expected 0 to 9")]
    SetLabel {
        /// The picture's index.
        index: usize,
        /// Its label.
        found: u8,
    },

    /// A validation set would leave nothing to train on.
    #[error("a validation set of {validation} pictures needs a larger training set than {len}")]
    Validation {
        /// Size asked for.
        validation: usize,
        /// Pictures there are.
        len: usize,
    },

    /// A batch of no picture was asked for.
    #[error("the batch size is 0, expected at least 1")]
    BatchSize,

    /// The order of pictures names one that there is not.
    #[error("position {position} of the order names picture {found}, but there are only {len}")]
    Order {
        /// Where in the order.
        position: usize,
        /// The index found there.
        found: u32,
        /// Number of pictures.
        len: usize,
    },

    /// A normalisation that cannot be computed.
    #[error(
        "normalisation of channel {channel}: mean {mean}, std {std}; expected finite numbers and std > 0"
    )]
    Normalization {
        /// 0 red, 1 green, 2 blue.
        channel: usize,
        /// The mean given.
        mean: f32,
        /// The standard deviation given.
        std: f32,
    },

    /// The thread that prepares batches could not be started.
    #[error("cannot start the thread that prepares batches")]
    Thread(#[source] std::io::Error),

    /// The thread that prepares batches ended before the last batch.
    #[error("the thread that prepares batches ended before batch {batch}")]
    ThreadEnded {
        /// The batch that was due, counted from 0.
        batch: usize,
    },

    /// A tensor could not be made.
    #[error("cannot make a tensor of pictures")]
    Tensor(#[from] candle_core::Error),
}

fn no_data(dir: &Path, looked_for: &[Candidate], found: &[String]) -> String {
    let mut text = format!("no CIFAR-10 data in `{}`\nlooked for:", dir.display());
    for candidate in looked_for {
        text.push_str(&format!("\n  {candidate}"));
    }
    let found = if found.is_empty() {
        "nothing".to_owned()
    } else {
        found.join(", ")
    };
    text.push_str(&format!("\nfound in `{}`: {found}\n", dir.display()));
    if let Some(folder) = python_version(dir) {
        text.push_str(&format!(
            "`{}` is the version for Python, whose pickles are not read\n",
            folder.display()
        ));
    }
    text.push_str("`cifar_data::download` fetches and verifies the files");
    text
}
