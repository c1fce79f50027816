//! Where pretrained weights come from: torchvision, the Hugging Face Hub, or a file that is there.
//!
//! [`Source::find`] ends with a file on disk that has been verified, or with an error that says what to do. Files
//! are kept where PyTorch and the Hugging Face tools keep theirs, so that each finds what the others have fetched.

mod error;
mod hub;

use std::env;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use verified_download::hub::{HubSettings, OFFLINE};
use verified_download::{
    Downloader, Event, FileRequest, Hints, Interrupt, Network, Options, Pin, Size, Text,
};

pub use error::FetchError;

/// Where weights come from.
///
/// ```
/// use pretrained_import::Source;
///
/// let source: Source = "owner/name@v1:weights/googlenet.pth".parse()?;
/// assert_eq!(
///     source,
///     Source::Hub {
///         repository: "owner/name".into(),
///         revision: Some("v1".into()),
///         file: Some("weights/googlenet.pth".into()),
///     }
/// );
/// assert_eq!(source.to_string(), "owner/name@v1:weights/googlenet.pth");
/// # Ok::<(), pretrained_import::source::ParseSourceError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// torchvision's GoogLeNet, trained on ImageNet.
    Torchvision,
    /// A file of a model repository on the Hugging Face Hub.
    Hub {
        /// `owner/name`.
        repository: String,
        /// A branch, tag or commit; None: `main`.
        revision: Option<String>,
        /// The path in the repository; None: the one file of weights there is.
        file: Option<String>,
    },
    /// A file.
    File(PathBuf),
}

/// A text that means no [`Source`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no file that exists, not torchvision, and no Hub repository as owner/name[@revision][:file]"
)]
pub struct ParseSourceError {
    /// The text.
    pub text: String,
}

/// Endings of files of weights. A source that has one of them is no repository.
const EXTENSIONS: [&str; 4] = [".safetensors", ".pth", ".pt", ".bin"];

impl FromStr for Source {
    type Err = ParseSourceError;

    /// `torchvision`, a path that exists, or `owner/name[@revision][:file]`.
    fn from_str(text: &str) -> Result<Source, ParseSourceError> {
        match text {
            "torchvision" => Ok(Source::Torchvision),
            _ if !text.is_empty() && Path::new(text).exists() => Ok(Source::File(text.into())),
            _ => parse_hub(text).ok_or_else(|| ParseSourceError {
                text: text.to_owned(),
            }),
        }
    }
}

fn parse_hub(text: &str) -> Option<Source> {
    let (rest, file) = match text.split_once(':') {
        Some((rest, file)) => (rest, Some(file)),
        None => (text, None),
    };
    let (repository, revision) = match rest.split_once('@') {
        Some((repository, revision)) => (repository, Some(revision)),
        None => (rest, None),
    };
    let is_name = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let (owner, name) = repository.split_once('/')?;
    let is_file_name = file.is_none() && EXTENSIONS.iter().any(|ending| rest.ends_with(ending));
    let is_hub = is_name(owner)
        && is_name(name)
        && !is_file_name
        && revision.is_none_or(hub::is_plain_path)
        && file.is_none_or(hub::is_plain_path);
    is_hub.then(|| Source::Hub {
        repository: repository.to_owned(),
        revision: revision.map(str::to_owned),
        file: file.map(str::to_owned),
    })
}

impl fmt::Display for Source {
    /// The text that [`FromStr`] reads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Torchvision => f.write_str("torchvision"),
            Source::Hub {
                repository,
                revision,
                file,
            } => {
                f.write_str(repository)?;
                if let Some(revision) = revision {
                    write!(f, "@{revision}")?;
                }
                match file {
                    Some(file) => write!(f, ":{file}"),
                    None => Ok(()),
                }
            }
            Source::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// How to fetch, and where fetched files are kept.
#[derive(Debug, Clone)]
pub struct FetchOptions {
    /// The Hub: its address, token and cache. Its `offline` forbids the network to every source.
    pub hub: HubSettings,
    /// Where PyTorch keeps the weights that it fetches.
    pub torch_checkpoints: PathBuf,
    /// What [`Source::Torchvision`] means.
    pub torchvision: PublishedFile,
    /// Timeouts and retries.
    pub network: Network,
    /// Raise the flag inside to stop soon, with what has arrived kept.
    pub interrupt: Interrupt,
}

/// A file at a fixed address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedFile {
    /// Its address.
    pub url: Text,
    /// Its name below [`FetchOptions::torch_checkpoints`].
    pub name: Text,
    /// What it must be.
    pub pin: Pin,
}

/// torchvision's `GoogLeNet_Weights.IMAGENET1K_V1`, as torchvision fetches it.
///
/// The name holds the first digits of the SHA-256. Of the size torchvision says 49.731 MiB, which is no exact number
/// of bytes, so the pin holds a bound and the SHA-256 decides.
pub const TORCHVISION_GOOGLENET: PublishedFile = PublishedFile {
    url: Text::Borrowed("https://download.pytorch.org/models/googlenet-1378be20.pth"),
    name: Text::Borrowed("googlenet-1378be20.pth"),
    pin: Pin::Sha256 {
        size: Size::AtMost(50 << 20),
        sha256: Text::Borrowed("1378be20a8e875cf1568b8a71654e704449655e34711a959a38b04fb34905cef"),
    },
};

impl PublishedFile {
    /// Whether a file with this SHA-256, in hexadecimal, is the one that is published here.
    pub fn is(&self, sha256: &str) -> bool {
        self.pin.hash().eq_ignore_ascii_case(sha256)
    }
}

impl FetchOptions {
    /// The public servers, with files kept below `cache`, whatever the environment says.
    pub fn new(cache: &Path) -> FetchOptions {
        FetchOptions {
            hub: HubSettings {
                cache: Some(cache.join("huggingface/hub")),
                ..HubSettings::default()
            },
            torch_checkpoints: cache.join("torch/hub/checkpoints"),
            torchvision: TORCHVISION_GOOGLENET,
            network: Network::default(),
            interrupt: Interrupt::default(),
        }
    }

    /// As the environment says: the variables of the Hub (`HF_ENDPOINT`, `HF_TOKEN` or what `hf auth login` stored,
    /// `HF_HUB_CACHE`, `HF_HOME`, `HF_HUB_OFFLINE`) and of PyTorch (`TORCH_HOME`). Files are kept in
    /// `~/.cache/huggingface/hub` and `~/.cache/torch/hub/checkpoints` unless these or `XDG_CACHE_HOME` say otherwise.
    pub fn from_env() -> FetchOptions {
        let folder = |name| env::var_os(name).filter(|value| !value.is_empty());
        let cache = || match folder("XDG_CACHE_HOME") {
            Some(cache) => PathBuf::from(cache),
            None => env::home_dir().unwrap_or_default().join(".cache"),
        };
        let torch = folder("TORCH_HOME").map_or_else(|| cache().join("torch"), PathBuf::from);
        FetchOptions {
            hub: HubSettings::from_env_and_login(),
            torch_checkpoints: torch.join("hub/checkpoints"),
            ..FetchOptions::new(Path::new(""))
        }
    }

    fn downloader(&self) -> Downloader {
        Downloader::new(self.transfer_options())
    }

    fn transfer_options(&self) -> Options {
        Options {
            network: self.network.clone(),
            offline: self.hub.offline,
            interrupt: self.interrupt.clone(),
        }
    }
}

/// A file of weights on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its SHA-256 in lower-case hexadecimal, where it was verified by it: not for [`Source::File`].
    pub sha256: Option<String>,
    /// Where it came from, for people: the address, or repository, commit and file.
    pub origin: String,
}

impl Source {
    /// As [`fmt::Display`] has it; `owner/name` also with why it is no path, which may have been meant.
    pub fn in_errors(&self) -> String {
        match self {
            Source::Hub {
                revision: None,
                file: None,
                ..
            } => format!(
                "{self} (a repository of the Hub, since there is no such file or folder here)"
            ),
            _ => self.to_string(),
        }
    }

    /// The file, fetched and verified if it is not there yet. `progress` hears what happens.
    ///
    /// # Errors
    /// What is missing, wrong or unreachable, with what to do about it.
    pub fn find(
        &self,
        options: &FetchOptions,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<FoundFile, FetchError> {
        match self {
            Source::Torchvision => find_torchvision(options, progress),
            Source::Hub {
                repository,
                revision,
                file,
            } => hub::Wanted::new(repository, revision.as_deref(), file.as_deref(), options)?
                .find(progress),
            Source::File(path) if path.is_file() => Ok(FoundFile {
                path: path.clone(),
                sha256: None,
                origin: path.display().to_string(),
            }),
            Source::File(path) => Err(FetchError::NoFile { path: path.clone() }),
        }
    }
}

fn find_torchvision(
    options: &FetchOptions,
    progress: &mut dyn FnMut(Event<'_>),
) -> Result<FoundFile, FetchError> {
    let PublishedFile { url, name, pin } = &options.torchvision;
    let path = options.torch_checkpoints.join(&**name);
    let file = FileRequest {
        hints: Hints {
            not_delivered: format!(
                "torchvision's weights could not be fetched (fetched elsewhere, {name} can be put into {})",
                options.torch_checkpoints.display()
            )
            .into(),
            offline: OFFLINE.into(),
            other_folder: "choose another folder with TORCH_HOME".into(),
            refused: "".into(),
        },
        ..FileRequest::new(&path, url.as_ref(), pin.clone())
    };
    options.downloader().fetch(&file, &|| None, progress)?;
    Ok(FoundFile {
        path,
        sha256: Some(pin.hash().to_lowercase()),
        origin: url.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(repository: &str, revision: Option<&str>, file: Option<&str>) -> Source {
        Source::Hub {
            repository: repository.into(),
            revision: revision.map(Into::into),
            file: file.map(Into::into),
        }
    }

    #[test]
    fn sources_are_told_apart_by_their_form_and_print_as_they_are_read() {
        let here = env!("CARGO_MANIFEST_DIR");
        for (text, expected) in [
            ("torchvision", Source::Torchvision),
            (here, Source::File(here.into())),
            ("owner/name", hub("owner/name", None, None)),
            ("o/n.v2@v1.0", hub("o/n.v2", Some("v1.0"), None)),
            (
                "o/n@main:a/b.pth",
                hub("o/n", Some("main"), Some("a/b.pth")),
            ),
            ("o/n@refs/pr/1", hub("o/n", Some("refs/pr/1"), None)),
            ("o/n:m.safetensors", hub("o/n", None, Some("m.safetensors"))),
        ] {
            let source: Source = text.parse().unwrap();
            assert_eq!(source, expected);
            assert_eq!(source.to_string(), text);
            let may_be_a_path = text == "owner/name";
            assert_eq!(source.in_errors().contains("no such file"), may_be_a_path);
        }
    }

    #[test]
    fn what_is_no_source_is_refused() {
        for text in [
            "",
            "random",
            "absent.pth",
            "weights/absent.safetensors",
            "a/b/c",
            "/absent",
            "../x",
            "o/n@",
            "o/n:",
            "o/n@../../x",
            "o/n:../x.pth",
            "o/n:/etc/passwd",
            "o/n:a//b.pth",
            "o/n:a\\b.pth",
            "http://o/n",
        ] {
            let error = text.parse::<Source>().unwrap_err();
            assert!(error.to_string().contains("owner/name"), "{text}: {error}");
        }
    }

    #[test]
    fn torchvisions_file_is_pinned_by_the_hash_in_its_name() {
        let PublishedFile { url, name, pin } = TORCHVISION_GOOGLENET;
        assert!(url.ends_with(&format!("/{name}")));
        assert_eq!(pin.hash().len(), 64);
        assert_eq!(name, format!("googlenet-{}.pth", &pin.hash()[..8]));
        // torchvision: "_file_size": 49.731, in MiB.
        assert_eq!(pin.most_bytes(), 52_428_800);
    }

    #[test]
    fn torchvisions_file_is_known_by_its_hash_in_whichever_case() {
        let hash = TORCHVISION_GOOGLENET.pin.hash().to_owned();
        for same in [hash.clone(), hash.to_uppercase()] {
            assert!(TORCHVISION_GOOGLENET.is(&same), "{same}");
        }
        for other in ["", &hash[..8], &"0".repeat(64)] {
            assert!(!TORCHVISION_GOOGLENET.is(other), "{other}");
        }
    }
}
