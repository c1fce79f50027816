//! The download against servers and disks that misbehave. No request leaves 127.0.0.1.

mod disk;
mod http;
mod hub;
mod size;

use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use tempfile::TempDir;
use test_support::files::{content, listing, message, put};
use verified_download::{
    CachedCopy, DownloadError, Downloader, Event, Fetched, FileRequest, Network, Options, Pin,
    Proxy, RemoteError,
};

const FILE: &str = "folder/file.bin";

fn sha256(content: &[u8]) -> String {
    let hash = Sha256::digest(content);
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn pin(content: &[u8]) -> Pin {
    Pin::sha256(content.len() as u64, sha256(content).into())
}

/// A file to fetch and how.
#[derive(Debug)]
struct Job {
    file: FileRequest,
    options: Options,
    cached: Option<CachedCopy>,
}

impl Job {
    fn fetch(&self, progress: &mut dyn FnMut(Event<'_>)) -> Result<Fetched, DownloadError> {
        Downloader::new(self.options.clone()).fetch(&self.file, &|| self.cached.clone(), progress)
    }
}

/// A request for one small file at `endpoint`, with waits short enough for a test.
fn request(endpoint: &str, dir: &Path, body: &[u8]) -> Job {
    let network = Network {
        connect_timeout: Duration::from_secs(5),
        read_timeout: Duration::from_secs(5),
        attempts: 3,
        attempts_to_connect: 2,
        first_backoff: Duration::from_millis(1),
        longest_backoff: Duration::from_millis(4),
        longest_retry_after: Duration::from_secs(5),
        proxy: Proxy::None,
    };
    Job {
        file: FileRequest::new(dir.join(FILE), format!("{endpoint}/{FILE}"), pin(body)),
        options: Options {
            network,
            ..Options::default()
        },
        cached: None,
    }
}

/// Runs it and returns the names of its events (without the fine-grained progress) beside its result.
fn run(request: &Job) -> (Result<Fetched, DownloadError>, Vec<String>) {
    let mut events = Vec::new();
    let result = request.fetch(&mut |event| {
        if !matches!(event, Event::Progress { .. }) {
            events.push(format!("{event:?}"));
        }
    });
    (result, events)
}

/// The remote cause of a failure.
fn cause(result: Result<Fetched, DownloadError>) -> RemoteError {
    match result {
        Err(DownloadError::NotDelivered { cause, .. }) => *cause,
        other => panic!("a failure of the source is expected, not {other:?}"),
    }
}

fn part_path(dir: &Path, body: &[u8]) -> PathBuf {
    dir.join(format!("{FILE}.{}.part", &sha256(body)[..12]))
}

fn temporary() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}
