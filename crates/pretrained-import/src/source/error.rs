//! Why there is no file.

use std::io;
use std::path::PathBuf;

use verified_download::hub::OFFLINE;
use verified_download::{DownloadError, Mismatch};

use crate::names::first_of;

/// Why [`Source::find`](super::Source::find) ended without a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// A path that is no file.
    #[error("{} is not a file", path.display())]
    NoFile {
        /// The path.
        path: PathBuf,
    },

    /// A file could not be fetched, verified or written.
    #[error(transparent)]
    Download(#[from] DownloadError),

    /// The Hub has no such repository, or does not say so to strangers.
    #[error("{endpoint} has no repository {repository} with a revision {revision}; {hint}")]
    NoRepository {
        /// `owner/name`.
        repository: String,
        /// What was asked for.
        revision: String,
        /// The Hub or its mirror.
        endpoint: String,
        /// What else it may mean.
        hint: &'static str,
    },

    /// The repository has no such branch, tag or commit.
    #[error("the repository {repository} at {endpoint} has no revision {revision}")]
    NoRevision {
        /// `owner/name`.
        repository: String,
        /// What was asked for.
        revision: String,
        /// The Hub or its mirror.
        endpoint: String,
    },

    /// The repository has no such file.
    #[error(
        "{repository} at {revision} has no file {file}; its files of weights: {}",
        listed(files)
    )]
    NoSuchFile {
        /// `owner/name`.
        repository: String,
        /// The revision asked for.
        revision: String,
        /// What was asked for.
        file: String,
        /// The files of weights that are there.
        files: Vec<String>,
    },

    /// No file was named, and there is not exactly one candidate.
    #[error(
        "{repository} at {revision} has {} files of weights: {}. Name one as {repository}:FILE",
        files.len(),
        listed(files)
    )]
    NotOneFile {
        /// `owner/name`.
        repository: String,
        /// The revision asked for.
        revision: String,
        /// The files of weights that are there; may be none.
        files: Vec<String>,
    },

    /// The Hub refuses: the repository is private or gated, or the token is wrong.
    #[error("{endpoint} refuses access to {repository} at {revision} ({status}): {hint}")]
    Refused {
        /// The Hub or its mirror.
        endpoint: String,
        /// `owner/name`.
        repository: String,
        /// The revision asked for.
        revision: String,
        /// 401 or 403.
        status: u16,
        /// What to do about it.
        hint: &'static str,
    },

    /// The Hub could not be asked, and the cache does not have the file.
    #[error("cannot ask {endpoint} for {repository} at {revision}, and it is not in the cache {}", cache.display())]
    Unreachable {
        /// The Hub or its mirror.
        endpoint: String,
        /// `owner/name`.
        repository: String,
        /// The revision asked for.
        revision: String,
        /// The cache folder.
        cache: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// The network must not be used, and the cache does not have the file.
    #[error("{wanted} is not in the cache {} and {OFFLINE}", cache.display())]
    NotCached {
        /// Repository, revision and file.
        wanted: String,
        /// The cache folder.
        cache: PathBuf,
    },

    /// A cached file is not what its name says, and it could not be fetched anew.
    #[error("the cached file {} is damaged ({problem}): remove it", path.display())]
    DamagedCache {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: Mismatch,
    },

    /// The Hub answered with something that makes no sense.
    #[error("{endpoint} gives no usable answer for {repository} at {revision}: {problem}")]
    BadAnswer {
        /// The Hub or its mirror.
        endpoint: String,
        /// `owner/name`.
        repository: String,
        /// The revision asked for.
        revision: String,
        /// What is wrong.
        problem: String,
    },

    /// A name that could lead out of the cache.
    #[error("{name:?} cannot be the name of a repository, revision or file on the Hub")]
    BadName {
        /// The name.
        name: String,
    },

    /// The Hub's cache cannot be used.
    #[error("cannot {action} {} in the cache: choose another cache with HF_HUB_CACHE", path.display())]
    Cache {
        /// "read", "link" or "write".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl FetchError {
    /// Whether it would not have come to this with a network, or with the file at hand.
    pub fn is_for_want_of_a_network(&self) -> bool {
        matches!(
            self,
            FetchError::Unreachable { .. }
                | FetchError::NotCached { .. }
                | FetchError::Download(
                    DownloadError::NotDelivered { .. } | DownloadError::Offline { .. }
                )
        )
    }
}

fn listed(files: &[String]) -> String {
    /// Checkpoints of a whole training may be there.
    const SHOWN: usize = 20;
    match files {
        [] => "none".to_owned(),
        files => first_of(files, SHOWN, 0),
    }
}
