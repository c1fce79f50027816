//! The Hugging Face Hub: addresses, the cache that its tools share, and what it states of a file.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::HFClient;
use reqwest::header::{ACCEPT_ENCODING, CONTENT_LENGTH, ETAG, HeaderMap, HeaderName};
use reqwest::{Url, redirect};

use crate::error::{DownloadError, RemoteError};
use crate::retry::{Retry, status_error, wait};
use crate::transfer::{client_with, excerpt, header, shown_url};
use crate::{Event, Hints, Options, Pin, Text, Token, parse_url};

/// What messages call the cache that Hugging Face tools share.
pub const CACHE_NAME: &str = "the Hugging Face cache";

/// What messages say where [`HubSettings::offline`] forbids the network: for [`Hints::offline`].
pub const OFFLINE: &str = "HF_HUB_OFFLINE is set: unset it to download the file";

/// Where the Hub is and how to use it.
#[derive(Debug, Clone)]
pub struct HubSettings {
    /// Address of the Hub or a mirror of it.
    pub endpoint: String,
    /// Access token for [`HubSettings::endpoint`].
    pub token: Option<Token>,
    /// The cache folder that Hugging Face tools on this machine share.
    pub cache: Option<PathBuf>,
    /// Whether the network must not be used.
    pub offline: bool,
}

impl Default for HubSettings {
    /// The public Hub, whatever the environment says.
    fn default() -> HubSettings {
        HubSettings {
            endpoint: "https://huggingface.co".to_owned(),
            token: None,
            cache: None,
            offline: false,
        }
    }
}

impl HubSettings {
    /// The Hub's own variables: `HF_ENDPOINT`, `HF_TOKEN`, the cache at `HF_HUB_CACHE` or `HF_HOME`, and
    /// `HF_HUB_OFFLINE` (`1`, `true`, `yes` or `on`). Empty ones count as unset.
    pub fn from_env() -> HubSettings {
        let defaults = HubSettings::default();
        HubSettings {
            endpoint: variable("HF_ENDPOINT").unwrap_or(defaults.endpoint),
            token: variable("HF_TOKEN").map(Token::new),
            cache: Some(cache_from_env()),
            offline: variable("HF_HUB_OFFLINE").is_some_and(|value| {
                matches!(value.to_lowercase().as_str(), "1" | "true" | "yes" | "on")
            }),
        }
    }

    /// As [`HubSettings::from_env`]; without `HF_TOKEN` the token is the one that `hf auth login` stored (at
    /// `HF_TOKEN_PATH`, or `token` in `HF_HOME`), unless `HF_HUB_DISABLE_IMPLICIT_TOKEN` is set.
    pub fn from_env_and_login() -> HubSettings {
        let mut settings = HubSettings::from_env();
        if settings.token.is_none() && variable("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_none() {
            let file = match variable("HF_TOKEN_PATH") {
                Some(path) => PathBuf::from(path),
                None => home(&from_env).join("token"),
            };
            let stored = fs::read_to_string(file).unwrap_or_default();
            let stored = Some(stored.trim()).filter(|token| !token.is_empty());
            settings.token = stored.map(Token::new);
        }
        settings
    }

    /// Checks that [`HubSettings::endpoint`] can be one, before anything is asked of it.
    ///
    /// # Errors
    /// One that is no address, called by the variable that users set it with: `HF_ENDPOINT`.
    pub fn check_endpoint(&self) -> Result<(), DownloadError> {
        endpoint_url(&self.endpoint).map(|_| ())
    }
}

/// The value of an environment variable; an empty one counts as unset.
fn variable(name: &str) -> Option<String> {
    let value = env::var(name).ok()?.trim().to_owned();
    Some(value).filter(|value| !value.is_empty())
}

/// The value of an environment variable.
type Lookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;

fn from_env(name: &str) -> Option<OsString> {
    env::var_os(name)
}

/// The folder that a variable names; an empty one counts as unset.
fn folder(lookup: Lookup<'_>, name: &str) -> Option<PathBuf> {
    let value = lookup(name).filter(|value| !value.is_empty());
    value.map(PathBuf::from)
}

/// Where Hugging Face's tools keep what is theirs. As `hf_hub` finds it, which takes empty variables for folders.
fn home(lookup: Lookup<'_>) -> PathBuf {
    folder(lookup, "HF_HOME").unwrap_or_else(|| {
        let caches = folder(lookup, "XDG_CACHE_HOME");
        let caches = caches.unwrap_or_else(|| env::home_dir().unwrap_or_default().join(".cache"));
        caches.join("huggingface")
    })
}

/// The Hub's cache that the environment names: at `HF_HUB_CACHE`, below `HF_HOME` or `XDG_CACHE_HOME`, or in `~/.cache`.
pub fn cache_from_env() -> PathBuf {
    cache_folder(&from_env)
}

fn cache_folder(lookup: Lookup<'_>) -> PathBuf {
    let named = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"];
    let mut named = named.iter().filter_map(|name| folder(lookup, name));
    named.next().unwrap_or_else(|| home(lookup).join("hub"))
}

/// The Hub's own address, below which its files are.
fn endpoint_url(endpoint: &str) -> Result<Url, DownloadError> {
    // On its own: with the path behind it, "http://" would make the path's first part the host.
    let url = parse_url(endpoint.trim_end_matches('/'), "HF_ENDPOINT");
    let url = url.map_err(|_| bad_endpoint(endpoint))?;
    match url.query().is_some() || url.fragment().is_some() {
        true => Err(bad_endpoint(endpoint)),
        false => Ok(url),
    }
}

fn bad_endpoint(endpoint: &str) -> DownloadError {
    DownloadError::BadAddress {
        what: Text::Borrowed("HF_ENDPOINT"),
        address: endpoint.to_owned(),
    }
}

/// One file of one revision of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubFile {
    /// What the repository holds.
    pub kind: RepositoryKind,
    /// `owner/name`.
    pub repository: Text,
    /// A commit, branch or tag.
    pub revision: Text,
    /// The path in the repository, with `/` between the parts.
    pub path: Text,
}

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepositoryKind {
    /// Weights.
    Model,
    /// Data.
    Dataset,
}

impl HubFile {
    /// Its address at `endpoint`.
    ///
    /// # Errors
    /// An `endpoint` that is no address, called by the variable that users set it with: `HF_ENDPOINT`.
    pub fn url(&self, endpoint: &str) -> Result<String, DownloadError> {
        let mut url = endpoint_url(endpoint)?;
        url.path_segments_mut()
            .map_err(|()| bad_endpoint(endpoint))?
            .pop_if_empty()
            .extend((self.kind == RepositoryKind::Dataset).then_some("datasets"))
            .extend(self.repository.split('/'))
            .extend(["resolve", &self.revision])
            .extend(self.path.split('/'));
        Ok(url.into())
    }

    /// The file in the cache folder `cache`, if it was ever fetched there at this revision. Touches no network.
    pub fn find_in_cache(&self, cache: &Path) -> Option<PathBuf> {
        let (owner, name) = self.repository.split_once('/')?;
        let client = HFClient::builder().cache_dir(cache).build_sync().ok()?;
        // The two kinds of repository are two types.
        macro_rules! find {
            ($repository:expr) => {
                $repository
                    .download_file()
                    .filename(&*self.path)
                    .revision(&*self.revision)
                    .local_files_only(true)
                    .send()
            };
        }
        let found = match self.kind {
            RepositoryKind::Model => find!(client.model(owner, name)),
            RepositoryKind::Dataset => find!(client.dataset(owner, name)),
        };
        found
            .inspect_err(|error| tracing::debug!(%error, file = %self.path, "not in the Hub cache"))
            .ok()
    }

    /// Asks the Hub for size and hash of the file: the SHA-256 of large files, git's hash of small ones.
    ///
    /// hf-hub 1.0.0 cannot: its listing of files drops the SHA-256, and its question for one file follows the
    /// redirect to the content network, which no longer states it.
    ///
    /// A Hub that is busy is asked again as one that sends a file is, which `progress` hears of.
    ///
    /// # Errors
    /// A Hub that does not answer, that refuses, or that states no hash.
    pub fn pin(
        &self,
        endpoint: &str,
        token: Option<&Token>,
        options: &Options,
        hints: &Hints,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<Pin, DownloadError> {
        let url = parse_url(&self.url(endpoint)?, "HF_ENDPOINT")?;
        // A renamed repository redirects within the Hub; the way out of it ends at what the Hub states.
        let policy = redirect::Policy::custom(|attempt| {
            let before = attempt.previous().last();
            let stays = before.is_some_and(|url| url.origin() == attempt.url().origin());
            match stays && attempt.previous().len() <= 10 {
                true => attempt.follow(),
                false => attempt.stop(),
            }
        });
        let client = client_with(&options.network, policy)?;
        let not_delivered = |cause| DownloadError::NotDelivered {
            what: hints.not_delivered.clone(),
            cause: Box::new(cause),
        };
        let mut retry = Retry::new(&options.network);
        loop {
            let mut request = client.head(url.clone()).header(ACCEPT_ENCODING, "identity");
            if let Some(token) = token {
                request = request.bearer_auth(token.expose());
            }
            let shown = shown_url(&url, None);
            let error = match request.send() {
                Ok(answer) if answer.status().is_success() || answer.status().is_redirection() => {
                    return stated_pin(answer.headers())
                        .ok_or_else(|| not_delivered(RemoteError::NoHash { url: shown }));
                }
                Ok(answer) => {
                    let headers = answer.headers();
                    let said = headers.get("x-error-message");
                    let said = said.map(|text| excerpt(text.as_bytes()));
                    let said = said.unwrap_or_default();
                    status_error(shown, answer.status(), headers, said, hints)
                }
                Err(source) => RemoteError::NoAnswer {
                    url: shown,
                    source: source.without_url(),
                },
            };
            let again = retry.after(error, 0).map_err(not_delivered)?;
            progress(again.event());
            if !wait(again.delay, &options.interrupt) {
                return Err(DownloadError::Interrupted {
                    path: PathBuf::from(&*self.path),
                    kept: 0,
                });
            }
        }
    }
}

/// Size and hash from the headers of the Hub: `X-Linked-…` for large files, else those of the answer itself.
fn stated_pin(headers: &HeaderMap) -> Option<Pin> {
    let linked = |name| header(headers, HeaderName::from_static(name));
    let hash = linked("x-linked-etag").or_else(|| header(headers, ETAG))?;
    let hash = hash.trim_start_matches("W/").trim_matches('"');
    let size = linked("x-linked-size").or_else(|| header(headers, CONTENT_LENGTH))?;
    let bytes: u64 = size.trim().parse().ok()?;
    pin_from(hash, bytes)
}

/// The pin that a name in the cache's folder of blobs, or an `ETag` of the Hub, stands for.
pub fn pin_from(hash: &str, bytes: u64) -> Option<Pin> {
    if !hash.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    match hash.len() {
        64 => Some(Pin::sha256(bytes, hash.to_owned().into())),
        40 => Some(Pin::GitBlob {
            bytes,
            sha1: hash.to_owned().into(),
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_where_the_variables_say_and_empty_ones_say_nothing() {
        let cases: [(&[(&str, &str)], &str); 6] = [
            (&[("HF_HUB_CACHE", "/a"), ("HF_HOME", "/b")], "/a"),
            (&[("HF_HUB_CACHE", ""), ("HF_HOME", "/b")], "/b/hub"),
            (&[("HUGGINGFACE_HUB_CACHE", "/a")], "/a"),
            (&[("HF_HOME", "/b"), ("XDG_CACHE_HOME", "/c")], "/b/hub"),
            (
                &[("HF_HOME", ""), ("XDG_CACHE_HOME", "/c")],
                "/c/huggingface/hub",
            ),
            (&[("XDG_CACHE_HOME", "")], "~/.cache/huggingface/hub"),
        ];
        for (set, expected) in cases {
            let lookup = |name: &str| {
                let found = set.iter().find(|(variable, _)| *variable == name);
                found.map(|(_, value)| OsString::from(value))
            };
            let home = env::home_dir().unwrap_or_default();
            let expected = match expected.strip_prefix("~/") {
                Some(below) => home.join(below),
                None => PathBuf::from(expected),
            };
            assert_eq!(cache_folder(&lookup), expected, "{set:?}");
        }
    }
}
