//! The download of CIFAR-10: where it is asked for, what errors add, and archives that misbehave. What servers and
//! disks can do to a single file is tested in verified-download. No request leaves 127.0.0.1.

mod archive;
mod hub;

use std::fs;
use std::path::Path;
use std::time::Duration;

use cifar_data::download::{
    DownloadError, Event, HubManifest, Manifest, Network, PinnedFile, Proxy, Report, Request,
    Source, fetch,
};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

const REVISION: &str = "0123456789abcdef0123456789abcdef01234567";
const FILE: &str = "plain_text/train.parquet";

/// Bytes that no two offsets share by chance.
fn content(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..bytes).map(|_| next()).collect()
}

fn pinned(path: &str, content: &[u8]) -> PinnedFile {
    let sha256: String = Sha256::digest(content)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    PinnedFile {
        path: path.to_owned().into(),
        bytes: content.len() as u64,
        sha256: sha256.into(),
    }
}

/// A request for one small file at `endpoint`, with waits short enough for a test.
fn request(endpoint: &str, dir: &Path, body: &[u8]) -> Request {
    Request {
        hub_endpoint: endpoint.to_owned(),
        manifest: Manifest::Hub(HubManifest {
            repository: "uoft-cs/cifar10".into(),
            revision: REVISION.into(),
            files: vec![pinned(FILE, body)].into(),
        }),
        network: Network {
            connect_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_secs(5),
            attempts: 3,
            attempts_to_connect: 2,
            first_backoff: Duration::from_millis(1),
            longest_backoff: Duration::from_millis(4),
            longest_retry_after: Duration::from_secs(5),
            proxy: Proxy::None,
        },
        ..Request::new(Source::Hub, dir)
    }
}

/// Runs `fetch` and returns the names of its events (without the fine-grained progress) beside its result.
fn run(request: &Request) -> (Result<Report, DownloadError>, Vec<String>) {
    let mut events = Vec::new();
    let result = fetch(request, &mut |event| {
        if !matches!(event, Event::Progress { .. }) {
            events.push(format!("{event:?}"));
        }
    });
    (result, events)
}

/// The whole message, as a program prints it.
fn message(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text.push_str(&format!(": {error}"));
        next = error.source();
    }
    text
}

/// Every file and folder below `dir`.
fn listing(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a readable folder") {
            let path = entry.expect("an entry").path();
            found.push(
                path.strip_prefix(dir)
                    .expect("below")
                    .to_string_lossy()
                    .into_owned(),
            );
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
    found.sort();
    found
}

fn temporary() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// Puts a file at a path whose folders may not exist yet.
fn put(path: &Path, content: &[u8]) {
    fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
    fs::write(path, content).expect("written");
}
