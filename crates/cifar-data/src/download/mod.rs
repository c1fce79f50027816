//! Fetches CIFAR-10 and verifies it: a file is complete (size and SHA-256) under its final name, or absent.
//!
//! [`fetch`] gets the files of one [`Source`] into a data folder. What is already there and right is never fetched
//! again; what an interrupted run left is continued; a copy in the Hugging Face Hub cache is used before the network.
//! Nothing is printed here: [`Event`]s tell a caller what happens.
//!
//! ```no_run
//! use cifar_data::download::{Event, FileEvent, Request, Source, fetch};
//!
//! let request = Request::from_env(Source::Hub, "data");
//! let report = fetch(&request, &mut |event| {
//!     if let Event::File(FileEvent::Progress { done, bytes }) = event {
//!         eprint!("\r{done} of {bytes} bytes");
//!     }
//! })?;
//! assert_eq!(report.files.len(), 2);
//! # Ok::<(), cifar_data::download::DownloadError>(())
//! ```

mod archive;
mod error;
mod manifest;

use std::path::{Path, PathBuf};

pub use verified_download::hub::HubSettings;
use verified_download::hub::{CACHE_NAME, HubFile, OFFLINE, RepositoryKind};
use verified_download::{CachedCopy, Downloader, FileRequest, Options};
pub use verified_download::{
    Event as FileEvent, Hints, Interrupt, Mismatch, Network, Proxy, RemoteError, Text, Token,
};

pub use error::{ArchiveError, DownloadError};
pub use manifest::{
    ArchiveManifest, CIFAR10_HUB, CIFAR10_TORONTO, HubManifest, Manifest, PinnedFile, Source,
};

/// Makes the files of `request` complete, and reports where each came from.
///
/// Blocks until all are there, or until the first failure that retrying does not mend. Two processes may fetch
/// into the same folder: the second waits for the first and finds its files.
///
/// # Errors
/// [`DownloadError`]. Files completed before the error stay; of the one under way the bytes received are kept
/// in a `.part` file, unless they are wrong or the disk is full.
pub fn fetch(
    request: &Request,
    progress: &mut dyn FnMut(Event<'_>),
) -> Result<Report, DownloadError> {
    let mut run = Run {
        request,
        downloader: Downloader::new(Options {
            network: request.network.clone(),
            offline: request.hub.offline,
            interrupt: request.interrupt.clone(),
        }),
        progress,
    };
    let files = match &request.manifest {
        Manifest::Hub(manifest) => run.hub(manifest)?,
        Manifest::Archive(manifest) => run.archive(manifest)?,
    };
    Ok(Report { files })
}

/// What to fetch, whereto and how.
#[derive(Debug, Clone)]
pub struct Request {
    /// The files.
    pub manifest: Manifest,
    /// The data folder; created when missing.
    pub dir: PathBuf,
    /// The Hub: its address, the token for it alone, which CIFAR-10 does not need, and the cache to copy from, if it holds
    /// the files. Its `offline` forbids the network to every source.
    pub hub: HubSettings,
    /// Timeouts and retries.
    pub network: Network,
    /// Raise the flag inside to stop soon, with what has arrived kept.
    pub interrupt: Interrupt,
    /// What error messages say; a program adds how its user takes another source or folder.
    pub hints: Hints,
}

impl Request {
    /// CIFAR-10 from `source` into `dir`, whatever the environment says.
    pub fn new(source: Source, dir: impl Into<PathBuf>) -> Request {
        Request {
            manifest: source.manifest(),
            dir: dir.into(),
            hub: HubSettings::default(),
            network: Network::default(),
            interrupt: Interrupt::default(),
            hints: Hints {
                not_delivered: format!("{source} did not deliver CIFAR-10").into(),
                offline: OFFLINE.into(),
                other_folder: "choose another folder".into(),
                refused: "".into(),
            },
        }
    }

    /// As [`Request::new`], with the Hub's variables: `HF_ENDPOINT`, `HF_TOKEN`, the cache at `HF_HUB_CACHE` or
    /// `HF_HOME`, and `HF_HUB_OFFLINE` (`1`, `true`, `yes` or `on`). Empty ones count as unset.
    pub fn from_env(source: Source, dir: impl Into<PathBuf>) -> Request {
        Request {
            hub: HubSettings::from_env(),
            ..Request::new(source, dir)
        }
    }
}

/// The files, all complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// In the manifest's order; an archive that was needed comes before the files from it.
    pub files: Vec<FileReport>,
}

/// One complete file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileReport {
    /// Where it is.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Where it came from.
    pub origin: Origin,
}

/// Where a complete file came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It was there.
    AlreadyComplete,
    /// Copied from the Hub cache.
    HubCache,
    /// Fetched.
    Network {
        /// Bytes that came over the network in this run.
        received: u64,
    },
    /// Unpacked from the archive.
    Archive,
}

impl From<verified_download::Origin> for Origin {
    fn from(origin: verified_download::Origin) -> Origin {
        match origin {
            verified_download::Origin::AlreadyComplete => Origin::AlreadyComplete,
            verified_download::Origin::Cache => Origin::HubCache,
            verified_download::Origin::Network { received } => Origin::Network { received },
        }
    }
}

/// What happens during [`fetch`], in order. Paths are those of the final files.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Something happens to one file, or a file from the archive is complete.
    File(FileEvent<'a>),
    /// An archive is complete and is being unpacked.
    Unpacking {
        /// The archive.
        archive: &'a Path,
    },
    /// What is unpacked grew.
    UnpackingProgress {
        /// Bytes so far.
        done: u64,
        /// Bytes at the end.
        bytes: u64,
    },
    /// What an unpacking that was killed had left was removed.
    RemovedStaleFolder {
        /// What was removed.
        path: &'a Path,
    },
}

impl Event<'_> {
    /// What happened, as a line for people. None where only a bar moves: [`Event::UnpackingProgress`], and as
    /// [`FileEvent::message`] says.
    pub fn message(&self) -> Option<String> {
        match self {
            Event::File(event) => event.message(),
            Event::Unpacking { archive } => Some(format!("unpacking {}", archive.display())),
            Event::UnpackingProgress { .. } => None,
            Event::RemovedStaleFolder { path } => Some(format!(
                "removed {}, which an unpacking that was killed had left",
                path.display()
            )),
        }
    }
}

struct Run<'a> {
    request: &'a Request,
    downloader: Downloader,
    progress: &'a mut dyn FnMut(Event<'_>),
}

impl Run<'_> {
    fn hub(&mut self, manifest: &HubManifest) -> Result<Vec<FileReport>, DownloadError> {
        let request = self.request;
        let mut reports = Vec::new();
        for pinned in manifest.files.iter() {
            let on_hub = HubFile {
                kind: RepositoryKind::Dataset,
                repository: manifest.repository.clone(),
                revision: manifest.revision.clone(),
                path: pinned.path.clone(),
            };
            let mut file = self.request_for(pinned, on_hub.url(&request.hub.endpoint)?);
            file.token.clone_from(&request.hub.token);
            if request.hub.token.is_some() {
                file.hints.refused =
                    "HF_TOKEN may be wrong or expired; the data set is public, so unset it".into();
            }
            let cache = request.hub.cache.as_deref();
            let cached = || {
                Some(CachedCopy {
                    path: on_hub.find_in_cache(cache?)?,
                    cache: CACHE_NAME.into(),
                })
            };
            reports.push(self.file(file, &cached)?);
        }
        Ok(reports)
    }

    fn archive(&mut self, manifest: &ArchiveManifest) -> Result<Vec<FileReport>, DownloadError> {
        let request = self.request;
        let dir = &request.dir;
        let mut reports = Vec::new();
        let mut wanted = Vec::new();
        for member in manifest.members.iter() {
            let path = dir.join(&*manifest.folder).join(&*member.path);
            let complete = verified_download::is_complete(&path, &member.pin(), &mut |event| {
                (self.progress)(Event::File(event));
            })?;
            if !complete {
                wanted.push(member);
            }
            let origin = if complete {
                Origin::AlreadyComplete
            } else {
                Origin::Archive
            };
            reports.push(FileReport {
                path,
                bytes: member.bytes,
                origin,
            });
        }
        if !wanted.is_empty() {
            let file = self.request_for(&manifest.archive, manifest.url.to_string());
            let archive = self.file(file, &|| None)?;
            archive::unpack(
                &archive.path,
                manifest,
                &wanted,
                dir,
                &request.interrupt,
                self.progress,
            )
            .map_err(|error| error.with_hints(&request.hints))?;
            for report in reports
                .iter()
                .filter(|report| report.origin == Origin::Archive)
            {
                (self.progress)(Event::File(FileEvent::Complete {
                    path: &report.path,
                    bytes: report.bytes,
                }));
            }
            reports.insert(0, archive);
        }
        Ok(reports)
    }

    fn request_for(&self, pinned: &PinnedFile, url: String) -> FileRequest {
        let path = self.request.dir.join(&*pinned.path);
        FileRequest {
            hints: self.request.hints.clone(),
            ..FileRequest::new(path, url, pinned.pin())
        }
    }

    fn file(
        &mut self,
        file: FileRequest,
        cached: &dyn Fn() -> Option<CachedCopy>,
    ) -> Result<FileReport, DownloadError> {
        let fetched = self.downloader.fetch(&file, cached, &mut |event| {
            (self.progress)(Event::File(event));
        })?;
        Ok(FileReport {
            path: file.path,
            bytes: fetched.bytes,
            origin: fetched.origin.into(),
        })
    }
}
