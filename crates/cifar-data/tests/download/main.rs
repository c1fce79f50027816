//! The download of CIFAR-10: where it is asked for, what errors add, and archives that misbehave. What servers and
//! disks can do to a single file is tested in verified-download. No request leaves 127.0.0.1.

mod archive;
mod hub;

use std::path::Path;
use std::time::Duration;

use cifar_data::download::{
    DownloadError, Event, FileEvent, HubManifest, HubSettings, Manifest, Network, PinnedFile,
    Proxy, Report, Request, Source, fetch,
};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use test_support::files::{content, listing, message, put};

const REVISION: &str = "0123456789abcdef0123456789abcdef01234567";
const FILE: &str = "plain_text/train.parquet";

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
        hub: HubSettings {
            endpoint: endpoint.to_owned(),
            ..HubSettings::default()
        },
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
    let result = fetch(request, &mut |event| match event {
        Event::File(FileEvent::Progress { .. }) | Event::UnpackingProgress { .. } => {}
        Event::File(event) => events.push(format!("{event:?}")),
        event => events.push(format!("{event:?}")),
    });
    (result, events)
}

fn temporary() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}
