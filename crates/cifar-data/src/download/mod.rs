//! Fetches CIFAR-10 and verifies it: a file is complete (size and SHA-256) under its final name, or absent.
//!
//! [`fetch`] gets the files of one [`Source`] into a data folder. What is already there and right is never fetched
//! again; what an interrupted run left is continued; a copy in the Hugging Face Hub cache is used before the network.
//! Nothing is printed here: [`Event`]s tell a caller what happens.
//!
//! ```no_run
//! use cifar_data::download::{Event, Request, Source, fetch};
//!
//! let request = Request::from_env(Source::Hub, "data");
//! let report = fetch(&request, &mut |event| {
//!     if let Event::Progress { done, bytes } = event {
//!         eprint!("\r{done} of {bytes} bytes");
//!     }
//! })?;
//! assert_eq!(report.files.len(), 2);
//! # Ok::<(), cifar_data::download::DownloadError>(())
//! ```

mod archive;
mod error;
mod hub_cache;
mod manifest;
mod store;
mod transfer;

use std::env;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::Url;
use reqwest::blocking::Client;

pub use error::{ArchiveError, DownloadError, Mismatch, RemoteError};
pub use manifest::{
    ArchiveManifest, CIFAR10_HUB, CIFAR10_TORONTO, HubManifest, Manifest, PinnedFile, Source, Text,
};
use store::{Folders, PartFile, State};
use transfer::Transfer;

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
        client: None,
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
    /// Who publishes it; error messages name it and its alternative.
    pub source: Source,
    /// The files.
    pub manifest: Manifest,
    /// The data folder; created when missing.
    pub dir: PathBuf,
    /// Address of the Hub or a mirror of it.
    pub hub_endpoint: String,
    /// Access token for [`Request::hub_endpoint`]; never sent to any other host. Not needed for CIFAR-10.
    pub hub_token: Option<Token>,
    /// A Hugging Face cache folder to copy from, if it holds the files.
    pub hub_cache: Option<PathBuf>,
    /// Whether the network may be used at all.
    pub offline: bool,
    /// Timeouts and retries.
    pub network: Network,
    /// Raise the flag inside to stop soon, with what has arrived kept.
    pub interrupt: Interrupt,
}

impl Request {
    /// CIFAR-10 from `source` into `dir`, whatever the environment says.
    pub fn new(source: Source, dir: impl Into<PathBuf>) -> Request {
        Request {
            source,
            manifest: source.manifest(),
            dir: dir.into(),
            hub_endpoint: "https://huggingface.co".to_owned(),
            hub_token: None,
            hub_cache: None,
            offline: false,
            network: Network::default(),
            interrupt: Interrupt::default(),
        }
    }

    /// As [`Request::new`], with the Hub's variables: `HF_ENDPOINT`, `HF_TOKEN`, the cache at `HF_HUB_CACHE` or
    /// `HF_HOME`, and `HF_HUB_OFFLINE` (`1`, `true`, `yes` or `on`). Empty ones count as unset.
    pub fn from_env(source: Source, dir: impl Into<PathBuf>) -> Request {
        let variable = |name| {
            env::var(name)
                .ok()
                .map(|value| value.trim().to_owned())
                .filter(|value| !value.is_empty())
        };
        let mut request = Request::new(source, dir);
        if let Some(endpoint) = variable("HF_ENDPOINT") {
            request.hub_endpoint = endpoint;
        }
        request.hub_token = variable("HF_TOKEN").map(Token::new);
        request.hub_cache = Some(hf_hub::resolve_cache_dir());
        request.offline = variable("HF_HUB_OFFLINE").is_some_and(|value| {
            matches!(value.to_lowercase().as_str(), "1" | "true" | "yes" | "on")
        });
        request
    }
}

/// A secret: its `Debug` output does not show it.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// Wraps a token.
    pub fn new(token: impl Into<String>) -> Token {
        Token(token.into())
    }

    fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// A shared flag that stops a run.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(pub Arc<AtomicBool>);

impl Interrupt {
    fn is_raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Timeouts and retries. The defaults suit people: who is offline hears so within 30 seconds, and a transfer
/// that makes any progress is never given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// The longest wait for a connection, name lookup included.
    pub connect_timeout: Duration,
    /// The longest silence while waiting for an answer or its next bytes.
    pub read_timeout: Duration,
    /// Attempts in a row without a new byte before giving up.
    pub attempts: u32,
    /// The same while the server never answered at all.
    pub attempts_to_connect: u32,
    /// The wait after the first failure; it doubles with each further one.
    pub first_backoff: Duration,
    /// The longest such wait.
    pub longest_backoff: Duration,
    /// The longest `Retry-After` that is waited for; a longer one ends the run.
    pub longest_retry_after: Duration,
    /// Whether to go through a proxy.
    pub proxy: Proxy,
}

impl Default for Network {
    fn default() -> Network {
        Network {
            connect_timeout: Duration::from_secs(8),
            read_timeout: Duration::from_secs(30),
            attempts: 7,
            attempts_to_connect: 3,
            first_backoff: Duration::from_millis(500),
            longest_backoff: Duration::from_secs(30),
            longest_retry_after: Duration::from_secs(120),
            proxy: Proxy::FromEnvironment,
        }
    }
}

/// Which proxy the requests go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Proxy {
    /// The one named by `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`, if any.
    #[default]
    FromEnvironment,
    /// None.
    None,
}

/// What happens during [`fetch`], in order. Paths are those of the final files.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A file of the right size is there and is being hashed.
    Checking {
        /// The file.
        path: &'a Path,
        /// Its size.
        bytes: u64,
    },
    /// A file is complete already and is not fetched.
    AlreadyComplete {
        /// The file.
        path: &'a Path,
        /// Its size.
        bytes: u64,
    },
    /// A file is there but wrong. It stays until the right one is complete, and is replaced then.
    WillReplace {
        /// The file.
        path: &'a Path,
        /// What is wrong with it.
        problem: &'a Mismatch,
    },
    /// Another process is fetching the file; we wait for it.
    WaitingForOtherProcess {
        /// The file.
        path: &'a Path,
    },
    /// The Hub cache has the file, and it is right.
    CopyingFromHubCache {
        /// The copy in the cache.
        cached: &'a Path,
        /// The file.
        path: &'a Path,
    },
    /// The Hub cache has the file, but it is wrong, so it is fetched instead. The cache is left as it is.
    HubCacheIsWrong {
        /// The copy in the cache.
        cached: &'a Path,
        /// What is wrong with it.
        problem: &'a Mismatch,
    },
    /// A file is about to be fetched (or, when all of it is there unverified, only verified).
    Fetching {
        /// The address.
        url: &'a str,
        /// The file.
        path: &'a Path,
        /// Bytes an earlier run left.
        from: u64,
        /// Its size.
        bytes: u64,
    },
    /// A server answered and bytes begin to flow, at first or again.
    Transferring {
        /// The file.
        path: &'a Path,
        /// The byte it begins with.
        from: u64,
        /// The size of the file.
        bytes: u64,
    },
    /// The file under way (or what is unpacked) grew.
    Progress {
        /// Bytes so far.
        done: u64,
        /// Bytes at the end.
        bytes: u64,
    },
    /// An attempt failed and another follows after a wait.
    Retrying {
        /// Why it failed.
        problem: &'a RemoteError,
        /// Failures in a row without progress.
        failures: u32,
        /// How many of them there may be.
        attempts: u32,
        /// The wait.
        delay: Duration,
    },
    /// Bytes received so far are dropped.
    StartingOver {
        /// The file.
        path: &'a Path,
        /// Why.
        why: &'a str,
    },
    /// The archive is complete and is being unpacked.
    Unpacking {
        /// The archive.
        archive: &'a Path,
    },
    /// A file has been verified and has its final name.
    Complete {
        /// The file.
        path: &'a Path,
        /// Its size.
        bytes: u64,
    },
    /// An unfinished download of another version of a file that is now complete was removed.
    RemovedStalePart {
        /// What was removed.
        path: &'a Path,
    },
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

struct Run<'a> {
    request: &'a Request,
    /// Built at the first need: complete files need none.
    client: Option<Client>,
    progress: &'a mut dyn FnMut(Event<'_>),
}

impl Run<'_> {
    fn hub(&mut self, manifest: &HubManifest) -> Result<Vec<FileReport>, DownloadError> {
        let endpoint = self.request.hub_endpoint.trim_end_matches('/');
        let bad_endpoint = || DownloadError::BadEndpoint {
            endpoint: self.request.hub_endpoint.clone(),
        };
        // On its own: with the path behind it, "http://" would make the path's first part the host.
        let base = Url::parse(endpoint).map_err(|_| bad_endpoint())?;
        if !matches!(base.scheme(), "http" | "https")
            || base.query().is_some()
            || base.fragment().is_some()
        {
            return Err(bad_endpoint());
        }
        let mut reports = Vec::new();
        for file in manifest.files.iter() {
            let (repository, revision) = (&manifest.repository, &manifest.revision);
            let address = format!(
                "{endpoint}/datasets/{repository}/resolve/{revision}/{}",
                file.path
            );
            let url = Url::parse(&address).map_err(|_| bad_endpoint())?;
            let cache = self.request.hub_cache.as_deref();
            let cached = || cache.and_then(|cache| hub_cache::find(cache, manifest, &file.path));
            reports.push(self.file(file, url, self.request.hub_token.as_ref(), &cached)?);
        }
        Ok(reports)
    }

    fn archive(&mut self, manifest: &ArchiveManifest) -> Result<Vec<FileReport>, DownloadError> {
        let dir = &self.request.dir;
        let mut reports = Vec::new();
        let mut wanted = Vec::new();
        for member in manifest.members.iter() {
            let path = dir.join(&*manifest.folder).join(&*member.path);
            let complete = self.is_complete(&path, member)?;
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
            let url = Url::parse(&manifest.url).map_err(|_| DownloadError::BadEndpoint {
                endpoint: manifest.url.to_string(),
            })?;
            let archive = self.file(&manifest.archive, url, None, &|| None)?;
            archive::unpack(
                &archive.path,
                manifest,
                &wanted,
                dir,
                &self.request.interrupt,
                self.progress,
            )?;
            for report in reports
                .iter()
                .filter(|report| report.origin == Origin::Archive)
            {
                (self.progress)(Event::Complete {
                    path: &report.path,
                    bytes: report.bytes,
                });
            }
            reports.insert(0, archive);
        }
        Ok(reports)
    }

    /// Makes one file complete.
    fn file(
        &mut self,
        pinned: &PinnedFile,
        url: Url,
        token: Option<&Token>,
        cached: &dyn Fn() -> Option<PathBuf>,
    ) -> Result<FileReport, DownloadError> {
        let request = self.request;
        let path = request.dir.join(&*pinned.path);
        let bytes = pinned.bytes;
        if self.is_complete(&path, pinned)? {
            return Ok(FileReport {
                path,
                bytes,
                origin: Origin::AlreadyComplete,
            });
        }
        let was_absent = !path.exists();
        let _folders = Folders::create(path.parent().unwrap_or(&request.dir))?;
        let (mut part, waited) = PartFile::open(&path, pinned, &request.interrupt, self.progress)?;
        // Whoever held the lock until now may have done the work.
        if (waited || (was_absent && path.exists())) && self.is_complete(&path, pinned)? {
            return Ok(FileReport {
                path,
                bytes,
                origin: Origin::AlreadyComplete,
            });
        }

        let from_cache = match cached() {
            Some(cached) => self.copy_from_cache(&cached, &path, pinned, &mut part)?,
            None => false,
        };
        let origin = if from_cache {
            Origin::HubCache
        } else if request.offline {
            return Err(DownloadError::Offline { path });
        } else {
            let client = match &self.client {
                Some(client) => client,
                None => self.client.insert(transfer::client(&request.network)?),
            };
            let transfer = Transfer {
                client,
                network: &request.network,
                source: request.source,
                url,
                token,
                pinned,
                target: &path,
                interrupt: &request.interrupt,
            };
            let received = transfer.run(&mut part, self.progress)?;
            Origin::Network { received }
        };
        part.publish(&path)?;
        store::remove_stale_parts(&path, self.progress);
        (self.progress)(Event::Complete { path: &path, bytes });
        Ok(FileReport {
            path,
            bytes,
            origin,
        })
    }

    fn is_complete(&mut self, path: &Path, pinned: &PinnedFile) -> Result<bool, DownloadError> {
        match store::check(path, pinned, self.progress)? {
            State::Absent => Ok(false),
            State::Complete => {
                (self.progress)(Event::AlreadyComplete {
                    path,
                    bytes: pinned.bytes,
                });
                Ok(true)
            }
            State::Wrong(problem) => {
                (self.progress)(Event::WillReplace {
                    path,
                    problem: &problem,
                });
                Ok(false)
            }
        }
    }

    /// Fills `part` from the cached file, if that is right.
    fn copy_from_cache(
        &mut self,
        cached: &Path,
        path: &Path,
        pinned: &PinnedFile,
        part: &mut PartFile<'_>,
    ) -> Result<bool, DownloadError> {
        match store::check(cached, pinned, self.progress)? {
            State::Absent => return Ok(false),
            State::Wrong(problem) => {
                (self.progress)(Event::HubCacheIsWrong {
                    cached,
                    problem: &problem,
                });
                return Ok(false);
            }
            State::Complete => {}
        }
        (self.progress)(Event::CopyingFromHubCache { cached, path });
        part.restart()?;
        part.append_file(cached, self.progress)?;
        // It was right a moment ago; what was copied is what counts.
        let copied = part.verify();
        if let Err(problem) = &copied {
            (self.progress)(Event::HubCacheIsWrong { cached, problem });
            part.restart()?;
        }
        Ok(copied.is_ok())
    }
}
