//! Everything that can go wrong, with what was found, what was expected and what to do.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Hints, Text};

/// Why [`Downloader::fetch`](crate::Downloader::fetch) did not end with a complete file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DownloadError {
    /// The server could not be reached, or what it sent was not the file.
    #[error("{what}")]
    NotDelivered {
        /// Who did not deliver what, and another way to it: [`Hints::not_delivered`].
        what: Text,
        /// What happened.
        #[source]
        cause: Box<RemoteError>,
    },

    /// A file is missing and must not be fetched.
    #[error("{path} is missing and {why}")]
    Offline {
        /// The missing file.
        path: PathBuf,
        /// What forbids the network, and what to do about it: [`Hints::offline`].
        why: Text,
    },

    /// A file cannot lie there.
    #[error("{path:?} cannot be the place of a file: it {why}")]
    BadPlace {
        /// The place.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },

    /// No file can have such a hash.
    #[error("{path} is to have the hash {found:?}, which is not {digits} hexadecimal digits")]
    BadPin {
        /// The file.
        path: PathBuf,
        /// The hash of its [`Pin`](crate::Pin).
        found: Text,
        /// How many digits a hash of its kind has.
        digits: usize,
    },

    /// An address that is none.
    #[error("{what} is {address:?}, which is no http:// or https:// address")]
    BadAddress {
        /// What it was given as: the name of a variable, say.
        what: Text,
        /// Its value.
        address: String,
    },

    /// The device is full. What was written of the file is removed again.
    #[error(
        "no space left for {path} ({bytes} bytes): free some{}",
        separated(", or ", other_folder)
    )]
    DiskFull {
        /// The file that did not fit.
        path: PathBuf,
        /// Its full size, or the most that it may be.
        bytes: u64,
        /// How to choose another folder: [`Hints::other_folder`].
        other_folder: Text,
        /// The system's error.
        source: io::Error,
    },

    /// The folder does not let us write.
    #[error(
        "{path} cannot be written: make it writable{}",
        separated(", or ", other_folder)
    )]
    NotWritable {
        /// What could not be created or written.
        path: PathBuf,
        /// How to choose another folder: [`Hints::other_folder`].
        other_folder: Text,
        /// The system's error.
        source: io::Error,
    },

    /// Any other failure of the file system.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried: "read", "create" and so on.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },

    /// [`Options::interrupt`](crate::Options::interrupt) was raised.
    #[error("interrupted{}", kept_of(path, *kept))]
    Interrupted {
        /// The file under way.
        path: PathBuf,
        /// How much of it is on disk, for the next run to continue from.
        kept: u64,
    },

    /// The HTTP client could not be set up.
    #[error("the HTTP client cannot be set up")]
    Client {
        /// The client's error.
        #[source]
        source: reqwest::Error,
    },
}

/// What a server did wrong. `url` is the address asked for; a redirect away from it is named by its host alone,
/// since the rest of such addresses is often a signature.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// No answer: no such host, refused, no network, TLS, too slow.
    #[error("no answer from {url}")]
    NoAnswer {
        /// The address.
        url: String,
        /// The client's error, without the address.
        #[source]
        source: reqwest::Error,
    },

    /// The body ended too early.
    #[error("{url} broke off after {received} of {expected} bytes")]
    BrokeOff {
        /// The address.
        url: String,
        /// Bytes of the file on disk by now.
        received: u64,
        /// Its full size.
        expected: u64,
        /// The reason, where the connection gave one.
        #[source]
        source: Option<io::Error>,
    },

    /// Nothing arrived for [`Network::read_timeout`](crate::Network::read_timeout).
    #[error("{url} sent nothing for {silence:?} after {received} of {expected} bytes")]
    Stalled {
        /// The address.
        url: String,
        /// Bytes of the file on disk by now.
        received: u64,
        /// Its full size.
        expected: u64,
        /// How long we waited.
        silence: Duration,
    },

    /// An HTTP status that is no success.
    #[error(
        "{url} answered {status}{}{}",
        separated(": ", excerpt),
        separated("; ", hint)
    )]
    Status {
        /// The address.
        url: String,
        /// The status.
        status: reqwest::StatusCode,
        /// The start of what came with it.
        excerpt: String,
        /// What to do about it, or nothing.
        hint: Text,
        /// How long the server asks us to wait (`Retry-After`).
        retry_after: Option<Duration>,
    },

    /// The server asks for a longer wait than we grant.
    #[error("{url} answered {status} and asks to wait {} s: try again then", wait.as_secs())]
    AsksToWait {
        /// The address.
        url: String,
        /// The status.
        status: reqwest::StatusCode,
        /// The wait it asks for.
        wait: Duration,
    },

    /// The announced size is not that of the file, so nothing was read.
    #[error("{url} announces {announced} bytes, but the file has {expected}")]
    WrongLength {
        /// The address.
        url: String,
        /// The file's size according to the server.
        announced: u64,
        /// Its true size.
        expected: u64,
    },

    /// More bytes came than the file has.
    #[error("{url} sends more than the file's {expected} bytes")]
    TooLong {
        /// The address.
        url: String,
        /// The file's true size.
        expected: u64,
    },

    /// A web page came in place of the file, with a status of success.
    #[error(
        "{url} answered with a web page in place of the file (a login page or proxy between us and the server?): {excerpt}"
    )]
    WebPage {
        /// The address.
        url: String,
        /// The start of the page.
        excerpt: String,
    },

    /// The Hub, or a mirror of it, states no hash to verify the file with.
    #[error("{url}: the server states no hash of the file")]
    NoHash {
        /// The address.
        url: String,
    },

    /// All bytes came, and they are not those of the file. They are removed.
    #[error("{url} sent wrong bytes: {problem}")]
    WrongBytes {
        /// The address.
        url: String,
        /// The difference.
        problem: Mismatch,
    },

    /// The last of several attempts failed too.
    #[error("gave up after {attempts} attempts without progress{}", kept_note(*kept))]
    GaveUp {
        /// How many attempts in a row brought nothing new.
        attempts: u32,
        /// Bytes kept on disk, from which the next run continues.
        kept: u64,
        /// The last failure.
        #[source]
        last: Box<RemoteError>,
    },
}

/// How a file differs from its [`Pin`](crate::Pin).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mismatch {
    /// Another size.
    Size {
        /// Bytes on disk.
        found: u64,
        /// Bytes it should have.
        expected: u64,
    },
    /// The right size, another content.
    Sha256 {
        /// Of the file.
        found: String,
        /// Of the published file.
        expected: String,
    },
    /// The same, by git's hash.
    GitBlob {
        /// Of the file.
        found: String,
        /// Of the published file.
        expected: String,
    },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::Size { found, expected } => {
                write!(f, "it has {found} bytes instead of {expected}")
            }
            Mismatch::Sha256 { found, expected } => {
                write!(f, "its SHA-256 is {found} instead of {expected}")
            }
            Mismatch::GitBlob { found, expected } => {
                write!(f, "its git blob hash is {found} instead of {expected}")
            }
        }
    }
}

impl RemoteError {
    /// Whether the same request may well succeed in a moment.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            RemoteError::NoAnswer { source, .. } => !source.is_builder() && !source.is_redirect(),
            RemoteError::BrokeOff { .. } | RemoteError::Stalled { .. } => true,
            RemoteError::Status { status, .. } => {
                matches!(status.as_u16(), 408 | 425 | 429 | 500 | 502 | 503 | 504)
            }
            _ => false,
        }
    }
}

impl DownloadError {
    /// Sorts an error of the file system by what its reader can do about it. `action` is "read", "create" and so
    /// on, `bytes` the size of the file.
    pub fn io(action: &'static str, path: &Path, bytes: u64, source: io::Error) -> DownloadError {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => DownloadError::DiskFull {
                path,
                bytes,
                other_folder: Text::Borrowed(""),
                source,
            },
            io::ErrorKind::PermissionDenied
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::NotADirectory
                if action != "read" =>
            {
                DownloadError::NotWritable {
                    path,
                    other_folder: Text::Borrowed(""),
                    source,
                }
            }
            _ => DownloadError::Io {
                action,
                path,
                source,
            },
        }
    }

    /// The same with what the caller adds to messages about the disk.
    #[must_use]
    pub fn with_hints(mut self, hints: &Hints) -> DownloadError {
        if let DownloadError::DiskFull { other_folder, .. }
        | DownloadError::NotWritable { other_folder, .. } = &mut self
        {
            other_folder.clone_from(&hints.other_folder);
        }
        self
    }
}

fn separated(separator: &str, text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!("{separator}{text}")
    }
}

fn kept_of(path: &Path, kept: u64) -> String {
    match kept {
        0 => String::new(),
        kept => format!(
            "; {kept} bytes of {} are kept, and the next run continues from there",
            path.display()
        ),
    }
}

fn kept_note(kept: u64) -> String {
    match kept {
        0 => String::new(),
        kept => format!(" ({kept} bytes are kept, and the next run continues from there)"),
    }
}
