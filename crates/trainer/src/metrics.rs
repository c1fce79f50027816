//! The numbers of a run, as files.
//!
//! `metrics.jsonl` holds only what the seed decides: two runs of the same configuration on the same
//! machine have the same bytes, stopped and resumed or not (on a GPU with deterministic engines). Times, which differ from run to run,
//! stand in `metrics.csv` alone.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use crate::durable::io_error;
use crate::error::{Error, Result};
use crate::evaluate::Evaluation;
use crate::observer::EpochReport;

/// One line of `metrics.jsonl`. Epochs and steps count from 1. An f32 is written as the shortest
/// decimal that reads back to the same bits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Metric {
    /// A training step.
    Step {
        /// Steps made, this one included.
        step: u64,
        /// Epoch of the step.
        epoch: u64,
        /// Mean loss of the batch before the step moved the weights.
        loss: f32,
        /// Images of the batch whose largest logit was the right one.
        correct: u64,
        /// Images in the batch.
        images: u64,
        /// Learning rate of the step.
        lr: f64,
    },
    /// An evaluation over a whole set.
    Evaluation {
        /// Steps made before it.
        step: u64,
        /// Epoch at whose end it was.
        epoch: u64,
        /// `test` or `validation`.
        set: String,
        /// Mean loss over the images; `null` where it is not finite, which reads as NaN.
        #[serde(deserialize_with = "number")]
        loss: f64,
        /// Images classified correctly, as a fraction.
        accuracy: f64,
        /// Images classified correctly.
        correct: u64,
        /// Images of the set.
        images: u64,
    },
    /// The end of an epoch.
    Epoch {
        /// Steps made so far.
        step: u64,
        /// The epoch.
        epoch: u64,
        /// Mean training loss over the epoch's images, each at the weights of its step.
        train_loss: f64,
        /// Training accuracy over the epoch's images, likewise.
        train_accuracy: f64,
        /// Images seen in the epoch.
        images: u64,
    },
}

/// A number of a file, which JSON cannot say where it is not finite: that is written as `null`.
pub(crate) fn number<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// A line of `metrics.csv`: one an epoch, times included.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct CsvRow {
    pub(crate) epoch: u64,
    pub(crate) step: u64,
    pub(crate) lr: f64,
    pub(crate) train_loss: f64,
    pub(crate) train_accuracy: f64,
    pub(crate) validation_loss: Option<f64>,
    pub(crate) validation_accuracy: Option<f64>,
    pub(crate) test_loss: Option<f64>,
    pub(crate) test_accuracy: Option<f64>,
    pub(crate) train_seconds: f64,
    pub(crate) images_per_second: f64,
    pub(crate) evaluation_seconds: f64,
}

impl CsvRow {
    pub(crate) fn of(report: &EpochReport) -> Self {
        let evaluated = |set: &str| report.evaluations.get(set);
        Self {
            epoch: report.epoch,
            step: report.step,
            lr: report.lr,
            train_loss: report.train_loss,
            train_accuracy: report.train_accuracy,
            validation_loss: evaluated("validation").map(|e| e.loss),
            validation_accuracy: evaluated("validation").map(Evaluation::accuracy),
            test_loss: evaluated("test").map(|e| e.loss),
            test_accuracy: evaluated("test").map(Evaluation::accuracy),
            train_seconds: report.train_time.as_secs_f64(),
            images_per_second: report.images_per_second(),
            evaluation_seconds: report.evaluation_time.as_secs_f64(),
        }
    }
}

/// How much of the metrics files a checkpoint covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct MetricsPosition {
    /// Bytes of `metrics.jsonl`.
    pub(crate) jsonl_bytes: u64,
    /// Bytes of `metrics.csv`.
    pub(crate) csv_bytes: u64,
}

/// The open metrics files of a run.
#[derive(Debug)]
pub(crate) struct MetricsFiles {
    jsonl: AppendFile,
    csv: AppendFile,
}

impl MetricsFiles {
    /// Opens the files of the run in `dir`, which a checkpoint covers up to `position`. They stay as they are until [`Self::cut`].
    pub(crate) fn open(dir: &Path, position: MetricsPosition) -> Result<Self> {
        Ok(Self {
            jsonl: AppendFile::open(dir.join("metrics.jsonl"), position.jsonl_bytes)?,
            csv: AppendFile::open(dir.join("metrics.csv"), position.csv_bytes)?,
        })
    }

    /// Cuts off everything after the position: lines of steps that a killed run made after its last checkpoint and that will be
    /// made again.
    pub(crate) fn cut(&mut self) -> Result<()> {
        self.jsonl.cut()?;
        self.csv.cut()
    }

    pub(crate) fn write(&mut self, metric: &Metric) -> Result<()> {
        let mut line = serde_json::to_vec(metric).map_err(|source| Error::Encode {
            what: "metrics.jsonl",
            source,
        })?;
        line.push(b'\n');
        self.jsonl.append(&line)
    }

    pub(crate) fn write_row(&mut self, row: &CsvRow) -> Result<()> {
        let mut writer = csv::WriterBuilder::new()
            .has_headers(self.csv.bytes == 0)
            .from_writer(Vec::new());
        // A Vec takes every byte and the row is flat, so only a full memory could fail here.
        let bytes = writer
            .serialize(row)
            .map_err(std::io::Error::other)
            .and_then(|()| writer.into_inner().map_err(|error| error.into_error()))
            .map_err(io_error("write", &self.csv.path))?;
        self.csv.append(&bytes)
    }

    /// Waits until the disk has all lines; a checkpoint may then count on them.
    pub(crate) fn sync(&mut self) -> Result<MetricsPosition> {
        self.jsonl.sync()?;
        self.csv.sync()?;
        Ok(MetricsPosition {
            jsonl_bytes: self.jsonl.bytes,
            csv_bytes: self.csv.bytes,
        })
    }
}

/// The epoch of the last whole line of the metrics of the run in `dir`, if there are any. After it may lie anything.
pub(crate) fn last_epoch(dir: &Path) -> Result<Option<u64>> {
    let path = dir.join("metrics.jsonl");
    let bytes = match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        read => read.map_err(io_error("read", &path))?,
    };
    let metrics = bytes.rsplit(|&byte| byte == b'\n');
    let mut metrics = metrics.filter_map(|line| serde_json::from_slice::<Metric>(line).ok());
    Ok(metrics.next().map(|metric| metric.epoch()))
}

impl Metric {
    fn epoch(&self) -> u64 {
        let (Self::Step { epoch, .. } | Self::Evaluation { epoch, .. } | Self::Epoch { epoch, .. }) =
            self;
        *epoch
    }
}

#[derive(Debug)]
struct AppendFile {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl AppendFile {
    fn open(path: PathBuf, bytes: u64) -> Result<Self> {
        let open = || {
            // One that should hold something is not made.
            let create = bytes == 0;
            let file = OpenOptions::new().create(create).append(true).open(&path)?;
            let found = file.metadata()?.len();
            Ok((file, found))
        };
        let (file, found) = open().map_err(io_error("open", &path))?;
        if found < bytes {
            return Err(Error::MetricsLost {
                path,
                found,
                recorded: bytes,
            });
        }
        Ok(Self { path, file, bytes })
    }

    fn cut(&mut self) -> Result<()> {
        let cut = self.file.set_len(self.bytes);
        cut.map_err(io_error("truncate", &self.path))
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .map_err(io_error("append to", &self.path))?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(io_error("sync", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(loss: f32) -> Metric {
        Metric::Step {
            step: 1,
            epoch: 1,
            loss,
            correct: 1,
            images: 4,
            lr: 1e-4,
        }
    }

    #[test]
    fn every_f32_loss_reads_back_to_the_same_bits() {
        let mut bits = 0x3f00_0000u32;
        for _ in 0..1000 {
            let loss = f32::from_bits(bits);
            let line = serde_json::to_string(&step(loss)).unwrap();
            let Metric::Step { loss: back, .. } = serde_json::from_str(&line).unwrap() else {
                panic!("{line}");
            };
            assert_eq!(back.to_bits(), loss.to_bits(), "{line}");
            bits += 104_729;
        }
    }

    #[test]
    fn reopening_cuts_off_the_lines_after_the_position() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = MetricsFiles::open(dir.path(), MetricsPosition::default()).unwrap();
        files.write(&step(1.0)).unwrap();
        let position = files.sync().unwrap();
        let kept = std::fs::read(dir.path().join("metrics.jsonl")).unwrap();
        files.write(&step(2.0)).unwrap();
        let mut files = MetricsFiles::open(dir.path(), position).unwrap();
        files.cut().unwrap();
        assert_eq!(
            std::fs::read(dir.path().join("metrics.jsonl")).unwrap(),
            kept
        );
    }

    #[test]
    fn a_file_shorter_than_its_checkpoint_says_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let position = MetricsPosition {
            jsonl_bytes: 10,
            csv_bytes: 0,
        };
        let error = MetricsFiles::open(dir.path(), position).unwrap_err();
        assert!(error.to_string().contains("metrics.jsonl"), "{error}");
    }
}
