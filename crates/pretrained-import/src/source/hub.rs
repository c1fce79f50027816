//! A file of a model repository on the Hugging Face Hub.
//!
//! hf-hub says which commit a revision is and which files it has. The transfer is verified-download's, since
//! hf-hub 1.0.0 neither continues one nor verifies it. The result lies where every Hugging Face tool looks:
//! `models--owner--name/blobs/<hash>`, with a link of the file's own name below `snapshots/<commit>` and the commit
//! in `refs/<revision>`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use hf_hub::{HFClient, HFError};
use verified_download::hub::{HubFile, OFFLINE, RepositoryKind, pin_from};
use verified_download::{Event, FileRequest, Hints, Mismatch, Pin, Proxy};

use super::{EXTENSIONS, FetchError, FetchOptions, FoundFile};

/// Branch of those who name no revision.
const MAIN: &str = "main";

/// The name that is taken where there are several and none is asked for.
const USUAL_NAME: &str = "model.safetensors";

/// What is looked for, and where.
pub(super) struct Wanted<'a> {
    owner: &'a str,
    name: &'a str,
    repository: &'a str,
    revision: &'a str,
    file: Option<&'a str>,
    options: &'a FetchOptions,
    cache: PathBuf,
}

/// A commit and one of its files.
struct Chosen {
    commit: String,
    file: String,
}

/// Whether the Hub has what it refuses.
#[derive(Clone, Copy)]
enum Existence {
    /// It said so.
    Certain,
    /// It may not.
    Open,
}

impl<'a> Wanted<'a> {
    pub(super) fn new(
        repository: &'a str,
        revision: Option<&'a str>,
        file: Option<&'a str>,
        options: &'a FetchOptions,
    ) -> Result<Wanted<'a>, FetchError> {
        let revision = revision.unwrap_or(MAIN);
        let names = [Some(repository), Some(revision), file];
        if let Some(name) = names
            .into_iter()
            .flatten()
            .find(|name| !is_plain_path(name))
        {
            return Err(bad_name(name));
        }
        let (owner, name) = repository
            .split_once('/')
            .filter(|(_, name)| !name.contains('/'))
            .ok_or_else(|| bad_name(repository))?;
        Ok(Wanted {
            owner,
            name,
            repository,
            revision,
            file,
            options,
            cache: options
                .hub
                .cache
                .clone()
                .unwrap_or_else(verified_download::hub::cache_from_env),
        })
    }

    /// The file, from the cache where no question is needed or none can be asked, else from the Hub.
    pub(super) fn find(
        &self,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<FoundFile, FetchError> {
        if self.options.hub.offline {
            return self
                .find_cached("", progress)?
                .ok_or_else(|| FetchError::NotCached {
                    wanted: self.shown(),
                    cache: self.cache.clone(),
                });
        }
        // A commit never changes, so there is nothing to ask for.
        if is_commit(self.revision)
            && self.file.is_some()
            && let Ok(Some(found)) = self.find_cached("", progress)
        {
            return Ok(found);
        }
        match self.ask() {
            Ok(chosen) => self.fetch(&chosen, progress),
            Err(HubAnswer::Wrong(error)) => Err(error),
            Err(HubAnswer::None(source)) => {
                tracing::debug!(%source, "the Hub cannot be asked");
                let note = ", from the cache, since the Hub could not be asked";
                self.find_cached(note, progress)?
                    .ok_or_else(|| FetchError::Unreachable {
                        endpoint: self.endpoint(),
                        repository: self.repository.to_owned(),
                        revision: self.revision.to_owned(),
                        cache: self.cache.clone(),
                        source: match source {
                            // Its own text repeats the address and the cause.
                            HFError::Request { source, .. } => source.without_url().into(),
                            other => other.into(),
                        },
                    })
            }
        }
    }

    fn shown(&self) -> String {
        match self.file {
            Some(file) => format!("{}@{}:{file}", self.repository, self.revision),
            None => format!("{}@{}", self.repository, self.revision),
        }
    }

    fn on_hub(&self, revision: &str, file: &str) -> HubFile {
        HubFile {
            kind: RepositoryKind::Model,
            repository: self.repository.to_owned().into(),
            revision: revision.to_owned().into(),
            path: file.to_owned().into(),
        }
    }

    fn endpoint(&self) -> String {
        self.options.hub.endpoint.trim_end_matches('/').to_owned()
    }

    /// Folder of the repository in the cache.
    fn folder(&self) -> PathBuf {
        self.cache
            .join(format!("models--{}--{}", self.owner, self.name))
    }
}

/// With the Hub.
impl Wanted<'_> {
    /// Which commit and file it is.
    fn ask(&self) -> Result<Chosen, HubAnswer> {
        self.options
            .hub
            .check_endpoint()
            .map_err(FetchError::from)?;
        let client = self.client()?;
        let info = client
            .model(self.owner, self.name)
            .info()
            .revision(self.revision)
            .send()
            .map_err(|error| self.sorted(error))?;
        let commit = info.sha.unwrap_or_default();
        if !is_commit(&commit) {
            return Err(self.bad_answer(format!("the commit is {commit:?}")).into());
        }
        let mut files: Vec<String> = info
            .siblings
            .into_iter()
            .flatten()
            .map(|sibling| sibling.rfilename)
            .collect();
        files.sort();
        let file = self.choose(files)?;
        Ok(Chosen { commit, file })
    }

    /// hf-hub's client with our timeouts: its own has none and tries five times.
    fn client(&self) -> Result<hf_hub::HFClientSync, HubAnswer> {
        let network = &self.options.network;
        let mut http = reqwest::Client::builder()
            .user_agent(concat!("pretrained-import/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(network.connect_timeout)
            .timeout(network.read_timeout);
        if network.proxy == Proxy::None {
            http = http.no_proxy();
        }
        let mut client = HFClient::builder()
            .endpoint(self.endpoint())
            .cache_dir(&self.cache)
            .client(http.build().map_err(HFError::from)?)
            .retry_max_attempts(network.attempts_to_connect.saturating_sub(1) as usize)
            .retry_base_delay(network.first_backoff);
        if let Some(token) = &self.options.hub.token {
            client = client.token(token.expose());
        }
        Ok(client.build_sync()?)
    }

    fn fetch(
        &self,
        chosen: &Chosen,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<FoundFile, FetchError> {
        let (hub, Chosen { commit, file }) = (&self.options.hub, chosen);
        let on_hub = self.on_hub(commit, file);
        let hints = Hints {
            not_delivered: format!(
                "{} did not deliver {file} of {} at {}",
                self.endpoint(),
                self.repository,
                self.revision
            )
            .into(),
            offline: OFFLINE.into(),
            other_folder: "choose another cache with HF_HUB_CACHE".into(),
            refused: self.hint(Existence::Certain).into(),
        };
        let options = self.options.transfer_options();
        let token = hub.token.as_ref();
        let pin = on_hub.pin(&hub.endpoint, token, &options, &hints, progress)?;
        let blob = self.folder().join("blobs").join(pin.hash());
        let request = FileRequest {
            token: hub.token.clone(),
            hints,
            ..FileRequest::new(&blob, on_hub.url(&hub.endpoint)?, pin.clone())
        };
        self.options
            .downloader()
            .fetch(&request, &|| None, progress)?;
        let path = self.publish(&blob, chosen)?;
        Ok(self.found(path, chosen, Some(pin), ""))
    }

    /// Gives the blob its own name in the snapshot of the commit, and the commit that of the revision.
    fn publish(&self, blob: &Path, chosen: &Chosen) -> Result<PathBuf, FetchError> {
        let snapshot = self.folder().join("snapshots").join(&chosen.commit);
        let path = snapshot.join(&chosen.file);
        let is_there = |path: &Path| {
            let ends = (path.canonicalize().ok(), blob.canonicalize().ok());
            matches!(ends, (Some(path), Some(blob)) if path == blob)
        };
        if !is_there(&path) {
            let linked = create_parent(&path).and_then(|()| link(blob, &path, &chosen.file));
            match linked {
                // Another process may have been as fast.
                Err(_) if is_there(&path) => {}
                linked => linked.map_err(|source| cache_error("link", &path, source))?,
            }
        }
        if self.revision != chosen.commit {
            let name = self.reference();
            let written = create_parent(&name).and_then(|()| fs::write(&name, &chosen.commit));
            written.map_err(|source| cache_error("write", &name, source))?;
        }
        Ok(path)
    }

    /// Sorts what hf-hub says by what its reader can do about it.
    fn sorted(&self, error: HFError) -> HubAnswer {
        let (endpoint, repository, revision) = (
            self.endpoint(),
            self.repository.to_owned(),
            self.revision.to_owned(),
        );
        let has_token = self.options.hub.token.is_some();
        let code = match &error {
            HFError::RevisionNotFound {
                context: Some(context),
                ..
            }
            | HFError::AuthRequired { context } => context.error_code.clone().unwrap_or_default(),
            _ => String::new(),
        };
        match &error {
            HFError::RevisionNotFound { .. } if code == "RevisionNotFound" => {
                FetchError::NoRevision {
                    repository,
                    revision,
                    endpoint,
                }
                .into()
            }
            HFError::RevisionNotFound { .. } | HFError::RepoNotFound { .. } => {
                FetchError::NoRepository {
                    repository,
                    revision,
                    endpoint,
                    hint: match has_token {
                        true => "HF_TOKEN may lack access to it",
                        false => "it may be private: then set HF_TOKEN",
                    },
                }
                .into()
            }
            HFError::AuthRequired { .. } | HFError::Forbidden { .. } => FetchError::Refused {
                endpoint,
                repository,
                revision,
                status: match error {
                    HFError::Forbidden { .. } => 403,
                    _ => 401,
                },
                hint: self.hint(match code.as_str() {
                    "GatedRepo" => Existence::Certain,
                    _ => Existence::Open,
                }),
            }
            .into(),
            _ => HubAnswer::from(error),
        }
    }

    /// What to do about 401 and 403. The Hub answers 401 to strangers who ask for what does not exist, too.
    fn hint(&self, existence: Existence) -> &'static str {
        match (self.options.hub.token.is_some(), existence) {
            (true, _) => {
                "HF_TOKEN (or the token that `hf auth login` stored) is wrong, expired, or lacks access; a gated \
                 repository must be asked for on its page"
            }
            (false, Existence::Certain) => "set HF_TOKEN to a token that may read it",
            (false, Existence::Open) => {
                "it does not exist, or it is private: then set HF_TOKEN to a token that may read it"
            }
        }
    }

    fn bad_answer(&self, problem: String) -> FetchError {
        FetchError::BadAnswer {
            endpoint: self.endpoint(),
            repository: self.repository.to_owned(),
            revision: self.revision.to_owned(),
            problem,
        }
    }
}

/// With the cache alone.
impl Wanted<'_> {
    /// The file of the commit that the revision was when the Hub was last asked. `note` is added to its origin.
    fn find_cached(
        &self,
        note: &str,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<Option<FoundFile>, FetchError> {
        let Some(commit) = self.cached_commit()? else {
            return Ok(None);
        };
        let snapshot = self.folder().join("snapshots").join(&commit);
        let file = match self.file {
            Some(file) => file.to_owned(),
            None => match files_below(&snapshot) {
                files if files.iter().any(|file| is_weights(file)) => self.choose(files)?,
                _ => return Ok(None),
            },
        };
        let path = snapshot.join(&file);
        if !path.is_file() {
            return Ok(None);
        }
        let pin = self.verify(&path, progress)?;
        Ok(Some(self.found(path, &Chosen { commit, file }, pin, note)))
    }

    fn cached_commit(&self) -> Result<Option<String>, FetchError> {
        if is_commit(self.revision) {
            return Ok(Some(self.revision.to_owned()));
        }
        let name = self.reference();
        match fs::read_to_string(&name) {
            Ok(commit) => Ok(Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(cache_error("read", &name, source)),
        }
    }

    /// Where the cache keeps the commit of the revision.
    fn reference(&self) -> PathBuf {
        self.folder().join("refs").join(self.revision)
    }

    /// Checks the file by the hash that is the name of its blob; None where the cache holds no links.
    fn verify(
        &self,
        path: &Path,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<Option<Pin>, FetchError> {
        let read = |source| cache_error("read", path, source);
        let blob = path.canonicalize().map_err(read)?;
        let bytes = fs::metadata(&blob).map_err(read)?.len();
        let name = blob.file_name().unwrap_or_default().to_string_lossy();
        let Some(pin) = pin_from(&name, bytes) else {
            return Ok(None);
        };
        let mut problem: Option<Mismatch> = None;
        let complete = verified_download::is_complete(path, &pin, &mut |event| match event {
            Event::WillReplace { problem: found, .. } => problem = Some(found.clone()),
            event => progress(event),
        })?;
        match (complete, problem) {
            (true, _) => Ok(Some(pin)),
            (false, Some(problem)) => Err(FetchError::DamagedCache {
                path: blob,
                problem,
            }),
            // Removed while it was looked at.
            (false, None) => Err(read(io::ErrorKind::NotFound.into())),
        }
    }
}

/// With both.
impl Wanted<'_> {
    /// The file that is meant among those of the repository.
    fn choose(&self, files: Vec<String>) -> Result<String, FetchError> {
        let (repository, revision) = (self.repository.to_owned(), self.revision.to_owned());
        if let Some(wanted) = self.file {
            return match files.iter().any(|file| file == wanted) {
                true => Ok(wanted.to_owned()),
                false => Err(FetchError::NoSuchFile {
                    repository,
                    revision,
                    file: wanted.to_owned(),
                    files: files.into_iter().filter(|file| is_weights(file)).collect(),
                }),
            };
        }
        let files: Vec<String> = files.into_iter().filter(|file| is_weights(file)).collect();
        let chosen = match &files[..] {
            [only] => Some(only),
            several => several.iter().find(|file| *file == USUAL_NAME),
        };
        match chosen {
            Some(file) if is_plain_path(file) => Ok(file.clone()),
            Some(file) => Err(bad_name(file)),
            None => Err(FetchError::NotOneFile {
                repository,
                revision,
                files,
            }),
        }
    }

    fn found(&self, path: PathBuf, chosen: &Chosen, pin: Option<Pin>, note: &str) -> FoundFile {
        let Chosen { commit, file } = chosen;
        FoundFile {
            path,
            sha256: match pin {
                Some(Pin::Sha256 { sha256, .. }) => Some(sha256.to_lowercase()),
                _ => None,
            },
            origin: format!(
                "{}/{}@{commit}:{file}{note}",
                self.endpoint(),
                self.repository
            ),
        }
    }
}

/// Why the Hub did not name a commit and a file.
enum HubAnswer {
    /// It did not answer, or said that it cannot just now.
    None(HFError),
    /// It answered, and trying again changes nothing.
    Wrong(FetchError),
}

impl From<FetchError> for HubAnswer {
    fn from(error: FetchError) -> HubAnswer {
        HubAnswer::Wrong(error)
    }
}

impl From<HFError> for HubAnswer {
    fn from(error: HFError) -> HubAnswer {
        HubAnswer::None(error)
    }
}

/// Whether this names something below a folder, in parts with `/` between them.
pub(super) fn is_plain_path(path: &str) -> bool {
    let is_not_plain = |c: char| matches!(c, '\\' | ':') || c.is_control();
    let is_plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(is_not_plain);
    path.split('/').all(is_plain)
}

fn bad_name(name: &str) -> FetchError {
    FetchError::BadName {
        name: name.to_owned(),
    }
}

fn cache_error(action: &'static str, path: &Path, source: io::Error) -> FetchError {
    FetchError::Cache {
        action,
        path: path.to_path_buf(),
        source,
    }
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn is_weights(file: &str) -> bool {
    EXTENSIONS.iter().any(|ending| file.ends_with(ending))
}

/// Names of the files below a snapshot, as the repository has them.
fn files_below(snapshot: &Path) -> Vec<String> {
    let (mut files, mut folders) = (Vec::new(), vec![snapshot.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(path),
                _ => files.extend(path.strip_prefix(snapshot).ok().and_then(|file| {
                    let parts = file.iter().map(|part| part.to_str());
                    Some(parts.collect::<Option<Vec<_>>>()?.join("/"))
                })),
            }
        }
    }
    files.sort();
    files
}

fn create_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

/// Puts the blob at `path`, whose name in the snapshot is `file`: a relative link as all Hugging Face tools make it.
fn link(blob: &Path, path: &Path, file: &str) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let up = "../".repeat(2 + file.split('/').count() - 1);
    let name = blob.file_name().unwrap_or_default();
    #[cfg(unix)]
    return std::os::unix::fs::symlink(Path::new(&up).join("blobs").join(name), path);
    // Links need a privilege there.
    #[cfg(not(unix))]
    {
        let _ = (up, name);
        fs::copy(blob, path).map(drop)
    }
}
