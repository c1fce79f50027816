//! The cache that other Hugging Face tools on this machine share.

use std::path::{Path, PathBuf};

use hf_hub::HFClient;

use super::manifest::HubManifest;

/// The file in the cache folder `cache`, if it was ever fetched there at this revision. Touches no network.
pub(super) fn find(cache: &Path, manifest: &HubManifest, file: &str) -> Option<PathBuf> {
    let (owner, name) = manifest.repository.split_once('/')?;
    let found = HFClient::builder()
        .cache_dir(cache)
        .build_sync()
        .and_then(|client| {
            client
                .dataset(owner, name)
                .download_file()
                .filename(file)
                .revision(&*manifest.revision)
                .local_files_only(true)
                .send()
        });
    found
        .inspect_err(|error| tracing::debug!(%error, file, "not in the Hub cache"))
        .ok()
}
