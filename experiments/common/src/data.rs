//! From data arguments to the sets of a run.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use cifar_data::download::{Request, Source, fetch};
use cifar_data::{
    CLASS_NAMES, CLASSES, DataError, ImageSet, Layout, Normalization, TrainTest, find_layout,
    hub_parquet, incomplete_layout, load, python_version, shapes, stratified_split,
};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use trainer::{DataSets, random};

use crate::arguments::DataArguments;
use crate::init_file::check_recordable;
use crate::progress::{DownloadProgress, print, say};
use crate::session::quoted;

/// The value of `--dataset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dataset {
    /// 60,000 photographs of ten classes, fetched when missing
    #[default]
    Cifar10,
    /// Coloured shapes of ten classes, drawn by the program: no file, no network
    Shapes,
}

impl Dataset {
    /// Its value of `--dataset`; what weights that were trained on it say under `class_names`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cifar10 => "cifar10",
            Self::Shapes => "shapes",
        }
    }

    /// What its classes are called, in the order of their labels.
    pub fn classes(self) -> &'static [&'static str; CLASSES] {
        match self {
            Self::Cifar10 => &CLASS_NAMES,
            Self::Shapes => &shapes::CLASS_NAMES,
        }
    }
}

/// What a run is trained and tested on, resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataConfig {
    /// Which pictures.
    pub dataset: Dataset,
    /// Where CIFAR-10 is; shapes have no place.
    pub data_dir: Option<PathBuf>,
    /// How many training images there are before validation images are set aside; None: all.
    pub train_limit: Option<u64>,
    /// How many test images; None: all.
    pub test_limit: Option<u64>,
    /// How many training images are set aside.
    pub validation: u64,
}

/// Seed of the pictures of `--dataset shapes`: a set like CIFAR-10, the same in every run, whatever
/// `--seed` is.
const SHAPES_SEED: u64 = 0;
/// Training pictures of `--dataset shapes` unless limited.
const SHAPES_TRAIN: u64 = 10_000;
/// Test pictures of `--dataset shapes` unless limited.
const SHAPES_TEST: u64 = 2_000;
/// Pictures of each set that `--dataset shapes` draws at most: 3 GB.
const SHAPES_MOST: u64 = 1_000_000;

impl DataArguments {
    /// Fills in what was not given.
    ///
    /// # Errors
    /// A folder for pictures that are drawn, or more of them than are drawn at most; as many
    /// validation images as there are training images.
    pub fn resolve(&self) -> Result<DataConfig> {
        let dataset = self.dataset.unwrap_or_default();
        if dataset == Dataset::Shapes && self.data_dir.is_some() {
            bail!(
                "--dataset shapes cannot be combined with --data-dir: these pictures are drawn by \
                 the program and read from no folder"
            );
        }
        let limits = [
            ("--train-limit", self.train_limit),
            ("--test-limit", self.test_limit),
        ];
        if dataset == Dataset::Shapes {
            for (flag, limit) in limits {
                check_drawn(flag, limit.unwrap_or(0))?;
            }
        }
        let config = match dataset {
            Dataset::Cifar10 => DataConfig {
                dataset,
                data_dir: Some(self.data_dir.clone().unwrap_or_else(|| "data".into())),
                train_limit: self.train_limit,
                test_limit: self.test_limit,
                validation: self.validation.unwrap_or(0),
            },
            Dataset::Shapes => DataConfig {
                dataset,
                data_dir: None,
                train_limit: Some(self.train_limit.unwrap_or(SHAPES_TRAIN)),
                test_limit: Some(self.test_limit.unwrap_or(SHAPES_TEST)),
                validation: self.validation.unwrap_or(0),
            },
        };
        match config.train_limit {
            Some(limit) if config.validation >= limit => {
                Err(too_much_validation(config.validation, limit))
            }
            _ => Ok(config),
        }
    }
}

/// A number of shapes to draw, unless they would not fit into memory.
fn check_drawn(what: &str, limit: u64) -> Result<usize> {
    ensure!(
        limit <= SHAPES_MOST,
        "{what} {limit} is more than the {SHAPES_MOST} shapes that are drawn at most"
    );
    Ok(limit as usize)
}

fn too_much_validation(validation: u64, train: u64) -> anyhow::Error {
    anyhow::anyhow!(
        "--validation {validation} would leave nothing to train on: there are {train} training \
         images"
    )
}

impl DataConfig {
    /// With the folder as it is found from anywhere, so that a run can be resumed from another folder.
    ///
    /// # Errors
    /// A working folder that is gone, or a path that cannot be recorded.
    pub(crate) fn located(mut self) -> Result<Self> {
        if let Some(dir) = &self.data_dir {
            let located = std::path::absolute(dir);
            let located = located.with_context(|| format!("cannot locate {}", dir.display()))?;
            check_recordable("--data-dir", &located)?;
            self.data_dir = Some(located);
        }
        Ok(self)
    }

    /// The test pictures alone, fetched first where they are missing.
    ///
    /// # Errors
    /// Data that cannot be read or fetched, and fewer than asked for.
    pub fn load_test(&self) -> Result<Arc<ImageSet>> {
        let TrainTest { test, source, .. } = self.read("")?;
        let test = limited(test, self.test_limit, "--test-limit")?;
        say(&format!("Data: {source}: {} to test", test.len()));
        Ok(Arc::new(test))
    }

    /// `way_on` is what else can be done where they cannot be fetched, a line of two columns.
    fn read(&self, way_on: &str) -> Result<TrainTest> {
        if let Some(dir) = &self.data_dir {
            let data = load_or_fetch(dir, way_on)?;
            warn_of_other_sizes(dir, &data);
            return Ok(data);
        }
        // Of a run that is resumed they come from its file.
        let (train, test) = (self.train_limit, self.test_limit);
        let train = check_drawn("train_limit", train.unwrap_or(SHAPES_TRAIN))?;
        let test = check_drawn("test_limit", test.unwrap_or(SHAPES_TEST))?;
        Ok(shapes::train_test(SHAPES_SEED, train, test))
    }

    /// Reads or draws the pictures, fetching them first where they are missing, and splits them.
    ///
    /// # Errors
    /// Data that cannot be read, fetched or split as asked.
    pub fn load(&self, seed: u64) -> Result<DataSets> {
        let TrainTest {
            train,
            test,
            source,
        } = self.read("\n  --dataset shapes              pictures drawn by the program")?;
        let train = limited(train, self.train_limit, "--train-limit")?;
        let test = limited(test, self.test_limit, "--test-limit")?;
        if self.validation >= train.len() as u64 {
            return Err(too_much_validation(self.validation, train.len() as u64));
        }
        let mut rng = random::stream(seed, random::VALIDATION, 0);
        let (train, validation) = stratified_split(&train, self.validation as usize, &mut rng)?;
        let counts = match validation.len() {
            0 => format!("{} to train, {} to test", train.len(), test.len()),
            n => format!(
                "{} to train, {n} to validate, {} to test",
                train.len(),
                test.len()
            ),
        };
        print(&format!("Data: {source}: {counts}"));
        Ok(DataSets {
            train: Arc::new(train),
            validation: (!validation.is_empty()).then(|| Arc::new(validation)),
            test: Arc::new(test),
            normalization: Normalization::HALF,
        })
    }
}

/// Says so where a folder does not hold as many images as CIFAR-10 has: a part of it may be what is wanted.
fn warn_of_other_sizes(dir: &Path, data: &TrainTest) {
    for (name, set, expected) in [
        ("training", &data.train, 50_000),
        ("test", &data.test, 10_000),
    ] {
        let (found, dir) = (set.len(), dir.display());
        if found != expected {
            tracing::warn!("{dir} holds {found} {name} images; CIFAR-10 has {expected}");
        }
    }
}

fn limited(set: ImageSet, limit: Option<u64>, flag: &str) -> Result<ImageSet> {
    match limit {
        Some(limit) if limit > set.len() as u64 => {
            bail!(
                "{flag} {limit} is more than the {} images there are",
                set.len()
            )
        }
        Some(limit) => Ok(set.take_first(limit as usize)),
        None => Ok(set),
    }
}

fn load_or_fetch(dir: &Path, way_on: &str) -> Result<TrainTest> {
    if find_layout(dir).is_none() {
        let lacking = match incomplete_layout(dir) {
            Some(candidate) => {
                format!("CIFAR-10 is not complete in {}: {candidate}", dir.display())
            }
            None => match python_version(dir) {
                Some(folder) => format!(
                    "there is no CIFAR-10 that can be read in {}: {} is the version for Python, whose \
                     pickles are not read",
                    dir.display(),
                    folder.display()
                ),
                None => format!("there is no CIFAR-10 in {}", dir.display()),
            },
        };
        say(&format!(
            "Fetching the data: {lacking}. They come from the Hugging Face Hub (144 MB), as with `cargo \
             xtask download-data`"
        ));
        download(dir).with_context(|| {
            format!(
                "{lacking}, and it could not be fetched. Ways on:\n  \
                 cargo xtask download-data     where there is a network; from its authors with --source toronto\n  \
                 --data-dir DIR                a folder that holds CIFAR-10{way_on}\nThe reason"
            )
        })?;
    }
    load(dir).map_err(|error| match error {
        // The system's reason, as a lack of permission: the file may be right.
        DataError::Read { .. } => error.into(),
        damaged => anyhow::Error::new(damaged).context(repair(dir)),
    })
}

/// What else can be done about data that are there and damaged.
fn repair(dir: &Path) -> String {
    // As it fetches them; of files under other names it knows nothing.
    let (train, _) = hub_parquet::FILES[0];
    let source = match find_layout(dir) {
        Some(Layout::Binary { dir: found }) if found != dir => Some(" --source toronto"),
        Some(Layout::HubParquet { train: found, .. })
            if found == dir.join("plain_text").join(train) =>
        {
            Some("")
        }
        _ => None,
    };
    let (shown, quoted) = (dir.display(), quoted(dir));
    match source {
        Some(source) => format!(
            "the data in {shown} cannot be used; `cargo xtask download-data{source} --data-dir {quoted}` verifies them \
             and replaces what is wrong. The reason"
        ),
        None => format!(
            "the data in {shown} cannot be used; `cargo xtask download-data --data-dir DIR` fetches others into another \
             folder, for `--data-dir DIR`. The reason"
        ),
    }
}

fn download(dir: &Path) -> Result<()> {
    let mut request = Request::from_env(Source::Hub, dir);
    request.hints.other_folder = "choose another folder with `--data-dir`".into();
    let mut progress = DownloadProgress::new();
    fetch(&request, &mut |event| progress.show_data(&event))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use cifar_data::binary;

    use super::*;

    fn shapes(train: u64, validation: u64) -> DataArguments {
        DataArguments {
            dataset: Some(Dataset::Shapes),
            train_limit: Some(train),
            test_limit: Some(20),
            validation: Some(validation),
            ..Default::default()
        }
    }

    #[test]
    fn limits_and_validation_decide_the_sizes_of_the_sets() {
        let config = shapes(100, 30).resolve().unwrap();
        let data = config.load(1).unwrap();
        let validation = data.validation.unwrap();
        assert_eq!(
            (data.train.len(), validation.len(), data.test.len()),
            (70, 30, 20)
        );
    }

    #[test]
    fn black_becomes_minus_one_and_white_one_as_in_the_lesson() {
        let config = shapes(10, 0).resolve().unwrap();
        let normalization = config.load(1).unwrap().normalization;
        for channel in 0..3 {
            let ends = [0, 255].map(|byte| normalization.apply(channel, byte));
            assert_eq!(ends, [-1.0, 1.0]);
        }
    }

    #[test]
    fn the_seed_changes_the_split_but_not_the_pictures() {
        let config = shapes(100, 30).resolve().unwrap();
        let [a, b, c] = [1, 1, 2].map(|seed| config.load(seed).unwrap().fingerprints());
        assert_eq!(a, b);
        assert_ne!(a.validation, c.validation);
        assert_eq!(a.test, c.test);
    }

    #[test]
    fn more_shapes_than_fit_into_memory_are_refused() {
        for limit in [SHAPES_MOST + 1, u64::MAX] {
            let error = shapes(limit, 0).resolve().unwrap_err();
            assert!(error.to_string().contains("--train-limit"), "{error}");
            let mut arguments = shapes(100, 0);
            arguments.test_limit = Some(limit);
            let error = arguments.resolve().unwrap_err();
            assert!(error.to_string().contains("--test-limit"), "{error}");
            // Of a file.
            let mut config = shapes(100, 0).resolve().unwrap();
            config.test_limit = Some(limit);
            let error = config.load(0).unwrap_err();
            assert!(error.to_string().starts_with("test_limit"), "{error}");
        }
    }

    #[test]
    fn validation_of_all_training_images_is_refused() {
        let error = shapes(30, 30).resolve().unwrap_err();
        assert!(error.to_string().contains("--validation 30"), "{error}");
    }

    #[test]
    fn of_damaged_data_the_command_that_replaces_them_is_named() {
        let truncated = |files: &[&str]| {
            let dir = tempfile::Builder::new().prefix("of two").tempdir().unwrap();
            for file in files {
                let path = dir.path().join(file);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, "PAR1").unwrap();
            }
            let error = load_or_fetch(dir.path(), "").unwrap_err();
            format!("{error:#}").replace(&dir.path().display().to_string(), "DIR")
        };
        let (train, test) = hub_parquet::FILES[0];
        let hub = [train, test].map(|file| format!("plain_text/{file}"));
        let error = truncated(&hub.each_ref().map(String::as_str));
        assert!(
            error.contains("`cargo xtask download-data --data-dir 'DIR'`")
                && error.contains(&format!("cannot read `DIR/{}` as Parquet", hub[0])),
            "{error}"
        );
        let binary = [&binary::TRAIN_FILES[..], &[binary::TEST_FILE]].concat();
        let within = binary
            .iter()
            .map(|file| format!("cifar-10-batches-bin/{file}"));
        let within: Vec<String> = within.collect();
        let error = truncated(&within.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(
            error.contains("`cargo xtask download-data --source toronto --data-dir 'DIR'`"),
            "{error}"
        );
        // Which it would not look at.
        let (train, test) = hub_parquet::FILES[1];
        for files in [&binary[..], &[train, test]] {
            let error = truncated(files);
            assert!(
                error.contains("fetches others into another folder"),
                "{error}"
            );
        }
    }
}
