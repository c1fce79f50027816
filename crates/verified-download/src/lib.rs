//! One file whose content is known before it comes: complete and verified under its final name, or absent.
//!
//! [`Downloader::fetch`] makes it so. What is already there and right is never fetched again, a copy in a cache is
//! used before the network, what an interrupted run left is continued, and servers that stall, break off or send
//! something else are retried or named. Two processes may want the same file: the second waits for the first.
//! Nothing is printed here: [`Event`]s tell a caller what happens.
//!
//! Of a file whose hash is known but not its exact size, the [`Size`] is a bound. [`hub`] knows the addresses of
//! the Hugging Face Hub, its cache, and how to ask it for the [`Pin`] of a file.
//!
//! ```no_run
//! use verified_download::{Downloader, Event, FileRequest, Options, Pin};
//!
//! let file = FileRequest::new(
//!     "weights/googlenet.bin",
//!     "https://example.org/googlenet.bin",
//!     Pin::sha256(5, "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824".into()),
//! );
//! let fetched = Downloader::new(Options::default()).fetch(&file, &|| None, &mut |event| {
//!     if let Event::Progress { done, bytes } = event {
//!         eprint!("\r{done} of {bytes} bytes");
//!     }
//! })?;
//! assert_eq!(fetched.bytes, 5);
//! # Ok::<(), verified_download::DownloadError>(())
//! ```

pub mod hub;

mod error;
mod pin;
mod retry;
mod store;
mod transfer;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::Url;
use reqwest::blocking::Client;

pub use error::{DownloadError, Mismatch, RemoteError};
pub use pin::{Pin, Size, Text, Verifier};
pub use store::sync_folder;
use store::{Folders, PartFile, State};
use transfer::Transfer;

/// Fetches files, one after another over one client.
#[derive(Debug)]
pub struct Downloader {
    options: Options,
    /// Built at the first need: complete files need none.
    client: Option<Client>,
}

/// How to fetch.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Timeouts and retries.
    pub network: Network,
    /// Whether the network must not be used.
    pub offline: bool,
    /// Raise the flag inside to stop soon, with what has arrived kept.
    pub interrupt: Interrupt,
}

/// One file: what it is, where it goes, where it comes from.
#[derive(Debug, Clone)]
pub struct FileRequest {
    /// Its final place; missing folders are created.
    pub path: PathBuf,
    /// Its address, `http://` or `https://`.
    pub url: String,
    /// What it must be.
    pub pin: Pin,
    /// Sent to the host of [`FileRequest::url`] and never where that redirects.
    pub token: Option<Token>,
    /// What error messages add.
    pub hints: Hints,
}

impl FileRequest {
    /// Without a token, and with messages that know nothing of the caller.
    pub fn new(path: impl Into<PathBuf>, url: impl Into<String>, pin: Pin) -> FileRequest {
        FileRequest {
            path: path.into(),
            url: url.into(),
            pin,
            token: None,
            hints: Hints::default(),
        }
    }
}

/// What error messages say that only the caller knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hints {
    /// Heads the message when a server does not deliver: who, what, and another way to it.
    pub not_delivered: Text,
    /// What forbids the network and how to allow it.
    pub offline: Text,
    /// How to choose another folder; may be empty.
    pub other_folder: Text,
    /// What to do when the server answers 401 or 403; may be empty.
    pub refused: Text,
}

impl Default for Hints {
    fn default() -> Hints {
        Hints {
            not_delivered: Text::Borrowed("the file could not be fetched"),
            offline: Text::Borrowed("the network must not be used"),
            other_folder: Text::Borrowed(""),
            refused: Text::Borrowed(""),
        }
    }
}

/// A copy of a file in a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedCopy {
    /// Where it is.
    pub path: PathBuf,
    /// What messages call the cache, with the article: `the Hugging Face cache`.
    pub cache: Text,
}

/// A complete file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetched {
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
    /// Copied from a cache.
    Cache,
    /// Fetched.
    Network {
        /// Bytes that came over the network in this run.
        received: u64,
    },
}

impl Downloader {
    /// Touches nothing yet.
    pub fn new(options: Options) -> Downloader {
        Downloader {
            options,
            client: None,
        }
    }

    /// Makes `file` complete. `cached` is asked for a copy, and in which cache that is, when the file is not there.
    ///
    /// Blocks until it is, or until the first failure that retrying does not mend.
    ///
    /// # Errors
    /// [`DownloadError`]. The bytes received are kept in a `.part` file beside the final place, unless they are
    /// wrong or the disk is full.
    pub fn fetch(
        &mut self,
        file: &FileRequest,
        cached: &dyn Fn() -> Option<CachedCopy>,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<Fetched, DownloadError> {
        self.try_fetch(file, cached, progress)
            .map_err(|error| error.with_hints(&file.hints))
    }

    fn try_fetch(
        &mut self,
        file: &FileRequest,
        cached: &dyn Fn() -> Option<CachedCopy>,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<Fetched, DownloadError> {
        let FileRequest { path, pin, .. } = file;
        if let Some(complete) = already_complete(path, pin, progress)? {
            return Ok(complete);
        }
        let was_absent = !path.exists();
        let folder = path.parent().unwrap_or(Path::new(""));
        let _folders = Folders::create(folder)?;
        let (mut part, waited) = PartFile::open(path, pin, &self.options.interrupt, progress)?;
        // Whoever held the lock until now may have done the work.
        if (waited || (was_absent && path.exists()))
            && let Some(complete) = already_complete(path, pin, progress)?
        {
            return Ok(complete);
        }

        let from_cache = match cached() {
            Some(cached) => copy_from_cache(&cached, file, &mut part, progress)?,
            None => false,
        };
        let origin = if from_cache {
            Origin::Cache
        } else if self.options.offline {
            return Err(DownloadError::Offline {
                path: path.clone(),
                why: file.hints.offline.clone(),
            });
        } else {
            let url = parse_url(&file.url, "the address")?;
            let client = match &self.client {
                Some(client) => client,
                None => self.client.insert(transfer::client(&self.options.network)?),
            };
            let transfer = Transfer {
                client,
                options: &self.options,
                file,
                url,
            };
            let received = transfer.run(&mut part, progress)?;
            Origin::Network { received }
        };
        let bytes = part.len();
        part.publish(path)?;
        store::remove_stale_parts(path, progress);
        progress(Event::Complete { path, bytes });
        Ok(Fetched { bytes, origin })
    }
}

/// Refuses what cannot end well, before anything is fetched for it.
fn check_request(path: &Path, pin: &Pin) -> Result<(), DownloadError> {
    let bad_place = |why| {
        let path = path.to_path_buf();
        Err(DownloadError::BadPlace { path, why })
    };
    if path.file_name().is_none() {
        return bad_place("has no name");
    }
    if path.is_dir() {
        return bad_place("is a folder");
    }
    let (hash, digits) = (pin.hash(), pin.digits());
    match hash.len() == digits && hash.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        true => Ok(()),
        false => Err(DownloadError::BadPin {
            path: path.to_path_buf(),
            found: hash.to_string().into(),
            digits,
        }),
    }
}

/// Whether the file at `path` is what `pin` says. A wrong one is only reported: it stays.
///
/// # Errors
/// A file that cannot be read, a place where none can lie, or what is no hash.
pub fn is_complete(
    path: &Path,
    pin: &Pin,
    progress: &mut dyn FnMut(Event<'_>),
) -> Result<bool, DownloadError> {
    Ok(already_complete(path, pin, progress)?.is_some())
}

fn already_complete(
    path: &Path,
    pin: &Pin,
    progress: &mut dyn FnMut(Event<'_>),
) -> Result<Option<Fetched>, DownloadError> {
    check_request(path, pin)?;
    match store::check(path, pin, progress)? {
        State::Absent => Ok(None),
        State::Complete(bytes) => {
            progress(Event::AlreadyComplete { path, bytes });
            let origin = Origin::AlreadyComplete;
            Ok(Some(Fetched { bytes, origin }))
        }
        State::Wrong(problem) => {
            progress(Event::WillReplace {
                path,
                problem: &problem,
            });
            Ok(None)
        }
    }
}

/// Fills `part` from the cached file, if that is right. One that cannot be checked is no reason to give up.
fn copy_from_cache(
    copy: &CachedCopy,
    file: &FileRequest,
    part: &mut PartFile<'_>,
    progress: &mut dyn FnMut(Event<'_>),
) -> Result<bool, DownloadError> {
    let CachedCopy {
        path: cached,
        cache,
    } = copy;
    match store::check(cached, &file.pin, progress) {
        Err(error) => {
            let error = &error;
            progress(Event::CacheIsUnreadable {
                cache,
                cached,
                error,
            });
            return Ok(false);
        }
        Ok(State::Absent) => return Ok(false),
        Ok(State::Wrong(problem)) => {
            progress(Event::CacheIsWrong {
                cache,
                cached,
                problem: &problem,
            });
            return Ok(false);
        }
        Ok(State::Complete(_)) => {}
    }
    let path = &file.path;
    progress(Event::CopyingFromCache {
        cache,
        cached,
        path,
    });
    part.restart()?;
    part.append_file(cached, progress)?;
    // It was right a moment ago; what was copied is what counts.
    let copied = part.verify();
    if let Err(problem) = &copied {
        progress(Event::CacheIsWrong {
            cache,
            cached,
            problem,
        });
        part.restart()?;
    }
    Ok(copied.is_ok())
}

fn parse_url(address: &str, what: &'static str) -> Result<Url, DownloadError> {
    Url::parse(address)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https"))
        .ok_or_else(|| DownloadError::BadAddress {
            what: Text::Borrowed(what),
            address: address.to_owned(),
        })
}

/// A secret: its `Debug` output does not show it.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// Wraps a token.
    pub fn new(token: impl Into<String>) -> Token {
        Token(token.into())
    }

    /// The secret, for a request.
    pub fn expose(&self) -> &str {
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
    /// Whether it was raised.
    pub fn is_raised(&self) -> bool {
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

/// What happens during [`Downloader::fetch`], in order. Paths are those of the final files.
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
    /// A cache has the file, and it is right.
    CopyingFromCache {
        /// What the caller calls the cache.
        cache: &'a str,
        /// The copy in the cache.
        cached: &'a Path,
        /// The file.
        path: &'a Path,
    },
    /// A cache has the file, but it is wrong, so it is fetched instead. The cache is left as it is.
    CacheIsWrong {
        /// What the caller calls the cache.
        cache: &'a str,
        /// The copy in the cache.
        cached: &'a Path,
        /// What is wrong with it.
        problem: &'a Mismatch,
    },
    /// A cache has the file and it cannot be read, so it is fetched instead.
    CacheIsUnreadable {
        /// What the caller calls the cache.
        cache: &'a str,
        /// The copy in the cache.
        cached: &'a Path,
        /// Why it cannot be read.
        error: &'a DownloadError,
    },
    /// A file is about to be fetched (or, when all of it is there unverified, only verified).
    Fetching {
        /// The address.
        url: &'a str,
        /// The file.
        path: &'a Path,
        /// Bytes an earlier run left.
        from: u64,
        /// Its size, or the most that it may be.
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
    /// The file under way grew.
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

impl Event<'_> {
    /// What happened, as a line for people. None where only a bar moves: [`Event::Progress`] and [`Event::Transferring`].
    pub fn message(&self) -> Option<String> {
        Some(match self {
            Event::Checking { path, bytes } => {
                format!("checking {} ({})", path.display(), Megabytes(*bytes))
            }
            Event::AlreadyComplete { path, .. } => {
                format!("{} is complete: not fetched again", path.display())
            }
            Event::WillReplace { path, problem } => format!(
                "{} is wrong: {problem}; it is replaced as soon as the right file is complete",
                path.display()
            ),
            Event::WaitingForOtherProcess { path } => format!(
                "another process is fetching {}: waiting for it",
                path.display()
            ),
            Event::CopyingFromCache { cache, cached, .. } => {
                format!("copying {} from {cache}", cached.display())
            }
            Event::CacheIsWrong {
                cache,
                cached,
                problem,
            } => format!("not using {} from {cache}: {problem}", cached.display()),
            Event::CacheIsUnreadable { cache, error, .. } => {
                format!("not using {cache}: {}", with_causes(error))
            }
            Event::Fetching {
                url, from, bytes, ..
            } => {
                let kept = match from {
                    0 => String::new(),
                    from => format!(", {} of them from an earlier run", Megabytes(*from)),
                };
                format!("fetching {url} ({}{kept})", Megabytes(*bytes))
            }
            Event::Retrying {
                problem,
                failures,
                attempts,
                delay,
            } => format!(
                "{}; attempt {} of {attempts} in {:.1} s",
                with_causes(problem),
                failures + 1,
                delay.as_secs_f64()
            ),
            Event::StartingOver { path, why } => format!("starting {} over: {why}", path.display()),
            Event::Complete { path, .. } => format!("{} is complete and verified", path.display()),
            Event::RemovedStalePart { path } => format!(
                "removed {}, an unfinished download of another version",
                path.display()
            ),
            Event::Transferring { .. } | Event::Progress { .. } => return None,
        })
    }
}

/// A number of bytes for people.
struct Megabytes(u64);

impl fmt::Display for Megabytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes @ 0..100_000 => write!(f, "{bytes} bytes"),
            bytes => write!(f, "{:.1} MB", bytes as f64 / 1e6),
        }
    }
}

/// An error with its causes in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |error| error.source())
        .fold(error.to_string(), |text, error| format!("{text}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_is_a_line_unless_only_a_bar_moves() {
        let path = Path::new("weights.bin");
        let fetching = |from| Event::Fetching {
            url: "http://host/weights.bin",
            path,
            from,
            bytes: 52_000_000,
        };
        let lines = [
            (
                fetching(0),
                Some("fetching http://host/weights.bin (52.0 MB)"),
            ),
            (
                fetching(99),
                Some(
                    "fetching http://host/weights.bin (52.0 MB, 99 bytes of them from an earlier run)",
                ),
            ),
            (
                Event::RemovedStalePart { path },
                Some("removed weights.bin, an unfinished download of another version"),
            ),
            (
                Event::StartingOver {
                    path,
                    why: "the server has another file",
                },
                Some("starting weights.bin over: the server has another file"),
            ),
            (
                Event::CopyingFromCache {
                    cache: hub::CACHE_NAME,
                    cached: Path::new("blobs/1f"),
                    path,
                },
                Some("copying blobs/1f from the Hugging Face cache"),
            ),
            (
                Event::CacheIsWrong {
                    cache: "the office's cache",
                    cached: Path::new("blobs/1f"),
                    problem: &Mismatch::Size {
                        found: 1,
                        expected: 2,
                    },
                },
                Some("not using blobs/1f from the office's cache: it has 1 bytes instead of 2"),
            ),
            (Event::Progress { done: 1, bytes: 2 }, None),
            (
                Event::Transferring {
                    path,
                    from: 0,
                    bytes: 2,
                },
                None,
            ),
        ];
        for (event, expected) in lines {
            assert_eq!(event.message().as_deref(), expected);
        }
    }
}
