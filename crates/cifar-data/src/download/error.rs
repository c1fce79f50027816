//! What can go wrong with CIFAR-10 beside the download of a file.

use std::io;
use std::path::{Path, PathBuf};

use verified_download::{Hints, Mismatch};

/// Why [`fetch`](super::fetch) did not end with complete files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DownloadError {
    /// A file could not be fetched or written.
    #[error(transparent)]
    File(#[from] verified_download::DownloadError),

    /// The archive has the right bytes for its manifest, but not the right content.
    #[error("{archive} cannot be unpacked")]
    Archive {
        /// The archive.
        archive: PathBuf,
        /// What is wrong with it.
        #[source]
        problem: ArchiveError,
    },
}

impl DownloadError {
    /// Whether [`Request::interrupt`](super::Request::interrupt) ended it.
    pub fn is_interruption(&self) -> bool {
        use verified_download::DownloadError::Interrupted;
        matches!(self, DownloadError::File(Interrupted { .. }))
    }

    pub(super) fn io(
        action: &'static str,
        path: &Path,
        bytes: u64,
        source: io::Error,
    ) -> DownloadError {
        verified_download::DownloadError::io(action, path, bytes, source).into()
    }

    pub(super) fn with_hints(self, hints: &Hints) -> DownloadError {
        match self {
            DownloadError::File(error) => error.with_hints(hints).into(),
            other => other,
        }
    }
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
