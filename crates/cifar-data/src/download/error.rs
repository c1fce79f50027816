//! Everything that can go wrong, with what was found, what was expected and what to do.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::manifest::Source;

/// Why [`fetch`](super::fetch) did not end with complete files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DownloadError {
    /// The server could not be reached, or what it sent was not the file.
    #[error(
        "{from} did not deliver CIFAR-10 (the other source: `cargo xtask download-data --source {}`)",
        from.other().flag()
    )]
    SourceFailed {
        /// Who was asked.
        from: Source,
        /// What happened.
        #[source]
        cause: Box<RemoteError>,
    },

    /// A file is missing and `HF_HUB_OFFLINE` forbids to fetch it.
    #[error("{path} is missing and HF_HUB_OFFLINE is set: unset it to download the file")]
    Offline {
        /// The missing file.
        path: PathBuf,
    },

    /// `HF_ENDPOINT` is no address.
    #[error("HF_ENDPOINT is {endpoint:?}, which is no http:// or https:// address")]
    BadEndpoint {
        /// Its value.
        endpoint: String,
    },

    /// The device is full. What was written of the file is removed again.
    #[error(
        "no space left for {path} ({bytes} bytes): free some, or choose another folder with `--data-dir`"
    )]
    DiskFull {
        /// The file that did not fit.
        path: PathBuf,
        /// Its full size.
        bytes: u64,
        /// The system's error.
        source: io::Error,
    },

    /// The folder does not let us write.
    #[error(
        "{path} cannot be written: make it writable, or choose another folder with `--data-dir`"
    )]
    NotWritable {
        /// What could not be created or written.
        path: PathBuf,
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

    /// The archive has the right bytes for its manifest, but not the right content.
    #[error("{archive} cannot be unpacked")]
    Archive {
        /// The archive.
        archive: PathBuf,
        /// What is wrong with it.
        #[source]
        problem: ArchiveError,
    },

    /// [`Request::interrupt`](super::Request::interrupt) was raised.
    #[error("interrupted; {kept} bytes of {path} are kept, and the next run continues from there")]
    Interrupted {
        /// The file under way.
        path: PathBuf,
        /// How much of it is on disk.
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

    /// Nothing arrived for [`Network::read_timeout`](super::Network::read_timeout).
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
        hint: &'static str,
        /// How long the server asks us to wait (`Retry-After`).
        retry_after: Option<Duration>,
    },

    /// The server asks for a longer wait than we grant.
    #[error("{url} answered {status} and asks to wait {} s: run the command again then", wait.as_secs())]
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

/// What is wrong with an archive.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// Not a gzip-compressed tar archive, or cut off.
    #[error("it is damaged")]
    Unreadable(#[source] io::Error),

    /// A name that does not belong there: outside of the folder, absolute, unknown or twice.
    #[error("entry {entry:?} does not belong there; nothing was written outside of the folder")]
    UnexpectedEntry {
        /// The entry's path.
        entry: String,
    },

    /// A link, device or other thing that is no plain file.
    #[error("entry {entry:?} is a {kind}, not a plain file")]
    NotAPlainFile {
        /// The entry's path.
        entry: String,
        /// What it is.
        kind: String,
    },

    /// An entry is larger or smaller than the file it should be.
    #[error("entry {entry:?} has {found} bytes instead of {expected}")]
    WrongSize {
        /// The entry's path.
        entry: String,
        /// Its size in the archive.
        found: u64,
        /// The size (or the largest size) it may have.
        expected: u64,
    },

    /// An entry's bytes are not those of the file.
    #[error("entry {entry:?}: {problem}")]
    WrongBytes {
        /// The entry's path.
        entry: String,
        /// The difference.
        problem: Mismatch,
    },

    /// A file is not in the archive.
    #[error("it lacks {entry:?}")]
    Missing {
        /// The path of the file.
        entry: String,
    },
}

/// How a file differs from its [`PinnedFile`](super::PinnedFile).
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
        }
    }
}

impl RemoteError {
    /// Whether the same request may well succeed in a moment.
    pub(super) fn is_transient(&self) -> bool {
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
    /// Sorts an error of the file system by what its reader can do about it. `bytes` is the size of the file.
    pub(super) fn io(
        action: &'static str,
        path: &Path,
        bytes: u64,
        source: io::Error,
    ) -> DownloadError {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => DownloadError::DiskFull {
                path,
                bytes,
                source,
            },
            io::ErrorKind::PermissionDenied
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::NotADirectory
                if action != "read" =>
            {
                DownloadError::NotWritable { path, source }
            }
            _ => DownloadError::Io {
                action,
                path,
                source,
            },
        }
    }
}

fn separated(separator: &str, text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!("{separator}{text}")
    }
}

fn kept_note(kept: u64) -> String {
    match kept {
        0 => String::new(),
        kept => format!(" ({kept} bytes are kept, and the next run continues from there)"),
    }
}
