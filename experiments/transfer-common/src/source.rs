//! Where weights come from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;
use experiment_common::InitFile;
use trainer::weights;

/// The value of `--weights`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WeightsSource {
    /// torchvision's ImageNet weights, fetched and verified.
    Torchvision,
    /// None: drawn at random.
    Random,
    /// A `.pth` or `.safetensors` file, or the folder of a finished run.
    File(PathBuf),
    /// A file of a repository on the Hugging Face Hub: `owner/name[@revision][:file]`.
    Hub(String),
}

/// Endings of files of weights; what has one of them is no repository.
const EXTENSIONS: [&str; 4] = [".safetensors", ".pth", ".pt", ".bin"];

impl FromStr for WeightsSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "torchvision" => Ok(Self::Torchvision),
            "random" => Ok(Self::Random),
            "" => Err(EXPECTED.into()),
            _ if Path::new(text).exists() => Ok(Self::File(text.into())),
            _ if is_repository(text) => Ok(Self::Hub(text.into())),
            _ if EXTENSIONS.iter().any(|ending| text.ends_with(ending)) => {
                Err(format!("there is no such file; {EXPECTED}"))
            }
            _ => Err(format!("there is no such file, and {EXPECTED}")),
        }
    }
}

const EXPECTED: &str = "it must be torchvision, random, a .pth or .safetensors file, a finished run, \
                        or a Hub repository as owner/name[@revision][:file]";

/// Whether this is `owner/name[@revision][:file]`.
fn is_repository(text: &str) -> bool {
    let (repository, file) = match text.split_once(':') {
        Some((repository, file)) => (repository, Some(file)),
        None => (text, None),
    };
    let repository = repository
        .split_once('@')
        .map_or(repository, |(name, _)| name);
    let is_name = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let named = repository
        .split_once('/')
        .is_some_and(|(owner, name)| is_name(owner) && is_name(name));
    named && (file.is_some() || !EXTENSIONS.iter().any(|ending| text.ends_with(ending)))
}

impl fmt::Display for WeightsSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Torchvision => f.write_str("torchvision"),
            Self::Random => f.write_str("random"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Hub(repository) => f.write_str(repository),
        }
    }
}

impl WeightsSource {
    /// The file, fetched if need be; None for random weights.
    ///
    /// # Errors
    /// What cannot be found or fetched, with the ways on.
    pub fn find(&self) -> Result<Option<InitFile>> {
        let path = match self {
            Self::Random => return Ok(None),
            Self::File(path) => weights_file(path, "--weights")?,
            Self::Torchvision | Self::Hub(_) => fetch(self).with_context(|| {
                format!(
                    "the weights {self} are not here and could not be fetched. Two ways on without \
                     a network:\n  \
                     --weights FILE        a .pth or .safetensors file of torchvision's GoogLeNet\n  \
                     --weights random      no pretrained weights\nThe reason"
                )
            })?,
        };
        InitFile::given(path).resolve("--weights").map(Some)
    }
}

fn fetch(_source: &WeightsSource) -> Result<PathBuf> {
    bail!("fetching weights is not built in yet")
}

/// The file of weights that a path means: a file itself, the final weights of a finished run, or
/// those of a checkpoint. `flag` names the argument in errors.
///
/// # Errors
/// A folder that is none of these.
pub fn weights_file(path: &Path, flag: &str) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_path_buf());
    }
    let (shown, file) = (path.display(), path.join("model.safetensors"));
    if file.is_file() {
        return Ok(file);
    }
    if path.join("config.json").is_file() {
        bail!(
            "cannot use {flag} {shown}: this run is not finished. Finish it with --resume, or give one \
             of its checkpoints, {shown}/checkpoints/step-…"
        );
    }
    bail!("cannot use {flag} {shown}: the folder is neither a run nor a checkpoint of one")
}

/// A file of weights that has been read.
#[derive(Debug, Clone)]
pub struct Weights {
    /// Where it is.
    pub path: PathBuf,
    /// By state-dict key.
    pub tensors: BTreeMap<String, Tensor>,
    /// What the file says of itself; empty for files that are not ours.
    pub metadata: BTreeMap<String, String>,
}

impl Weights {
    /// Reads a file, which must be the one that was resolved.
    ///
    /// # Errors
    /// A file that has changed, or that holds no weights.
    pub fn read(file: &InitFile) -> Result<Self> {
        let bytes = file.read()?;
        let metadata = weights::metadata(&bytes, &file.path)?;
        Ok(Self {
            path: file.path.clone(),
            tensors: weights::decode(&bytes, &file.path)?,
            metadata,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_told_apart_by_their_form() {
        let here = env!("CARGO_MANIFEST_DIR");
        for (text, expected) in [
            ("torchvision", WeightsSource::Torchvision),
            ("random", WeightsSource::Random),
            (here, WeightsSource::File(here.into())),
            ("owner/name", WeightsSource::Hub("owner/name".into())),
            (
                "o/n@main:a/b.pth",
                WeightsSource::Hub("o/n@main:a/b.pth".into()),
            ),
            (
                "o/n:m.safetensors",
                WeightsSource::Hub("o/n:m.safetensors".into()),
            ),
        ] {
            assert_eq!(text.parse::<WeightsSource>(), Ok(expected));
        }
        for text in [
            "",
            "absent.pth",
            "weights/absent.safetensors",
            "a/b/c",
            "/absent",
            "../x",
        ] {
            let error = text.parse::<WeightsSource>().unwrap_err();
            assert!(error.contains("owner/name"), "{text}: {error}");
        }
    }

    #[test]
    fn a_folder_means_the_weights_of_the_finished_run_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let of = |path: &Path| weights_file(path, "--init").map_err(|error| error.to_string());
        let error = of(dir.path()).unwrap_err();
        assert!(error.contains("neither a run"), "{error}");
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        let error = of(dir.path()).unwrap_err();
        assert!(
            error.contains("not finished") && error.contains("--resume"),
            "{error}"
        );
        let file = dir.path().join("model.safetensors");
        std::fs::write(&file, "").unwrap();
        assert_eq!(of(dir.path()), Ok(file.clone()));
        assert_eq!(of(&file), Ok(file));
    }
}
