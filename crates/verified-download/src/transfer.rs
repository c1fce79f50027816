//! One file over HTTP: continued after interruptions, retried, and refused as early as it can be.

use std::io::{self, Read};
use std::time::Duration;

use reqwest::blocking::{Client, Response};
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap, HeaderName,
    IF_RANGE, RANGE,
};
use reqwest::{StatusCode, Url, redirect};

use crate::error::{DownloadError, RemoteError};
use crate::retry::{Retry, status_error, wait};
use crate::store::PartFile;
use crate::{Event, FileRequest, Network, Options, Proxy};

/// The client for one run. Redirects lose the token when they leave the host (reqwest's rule), and never
/// lead from https to http.
pub(crate) fn client(network: &Network) -> Result<Client, DownloadError> {
    let policy = redirect::Policy::custom(|attempt| {
        let was_secure = attempt
            .previous()
            .last()
            .is_some_and(|url| url.scheme() == "https");
        if was_secure && attempt.url().scheme() != "https" {
            attempt.error("redirected from https to http")
        } else if attempt.previous().len() > 10 {
            attempt.error("redirected more than 10 times")
        } else {
            attempt.follow()
        }
    });
    client_with(network, policy)
}

pub(crate) fn client_with(
    network: &Network,
    policy: redirect::Policy,
) -> Result<Client, DownloadError> {
    let mut builder = Client::builder()
        .user_agent(concat!("verified-download/", env!("CARGO_PKG_VERSION")))
        .redirect(policy)
        .connect_timeout(network.connect_timeout)
        // In the blocking client this bounds the wait for the headers and for each read, not their sum.
        .timeout(network.read_timeout);
    if network.proxy == Proxy::None {
        builder = builder.no_proxy();
    }
    builder
        .build()
        .map_err(|source| DownloadError::Client { source })
}

/// One file to fetch and all that is needed for it.
pub(crate) struct Transfer<'a> {
    pub(crate) client: &'a Client,
    pub(crate) options: &'a Options,
    pub(crate) file: &'a FileRequest,
    pub(crate) url: Url,
}

impl Transfer<'_> {
    /// Fills `part` until it is the pinned file, and returns how many bytes came over the network.
    pub(crate) fn run(
        &self,
        part: &mut PartFile<'_>,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<u64, DownloadError> {
        let mut state = State {
            received: 0,
            total: self.file.pin.exact_bytes(),
            best: part.len(),
            retry: Retry::new(&self.options.network),
            etag: None,
            use_range: true,
            from_earlier_run: part.len() > 0,
        };
        progress(Event::Fetching {
            url: &self.shown_url(None),
            path: &self.file.path,
            from: part.len(),
            bytes: self.file.pin.most_bytes(),
        });
        if state.total.is_none() && part.len() > 0 && part.verify().is_ok() {
            return Ok(0);
        }
        loop {
            if state.total == Some(part.len()) {
                match part.verify() {
                    Ok(()) => return Ok(state.received),
                    Err(problem) if state.from_earlier_run => {
                        tracing::debug!(%problem, "the bytes kept from an earlier run are wrong");
                        progress(Event::StartingOver {
                            path: &self.file.path,
                            why: "the bytes kept from an earlier run are wrong",
                        });
                        part.restart()?;
                        state.from_earlier_run = false;
                        state.best = 0;
                        continue;
                    }
                    Err(problem) => {
                        part.discard();
                        return Err(self.failed(RemoteError::WrongBytes {
                            url: self.shown_url(None),
                            problem,
                        }));
                    }
                }
            }
            match self.attempt(part, &mut state, progress) {
                Ok(()) => {}
                Err(Failure::Local(error)) => return Err(error),
                Err(Failure::Remote(RemoteError::Status {
                    status: StatusCode::RANGE_NOT_SATISFIABLE,
                    ..
                })) if state.use_range && part.len() > 0 => state.use_range = false,
                Err(Failure::Remote(error)) => {
                    let delay = self.delay_after(error, part, &mut state, progress)?;
                    if !wait(delay, &self.options.interrupt) {
                        return Err(self.interrupted(part));
                    }
                }
            }
        }
    }

    /// One request, read until the file is full or something fails.
    fn attempt(
        &self,
        part: &mut PartFile<'_>,
        state: &mut State<'_>,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Failure> {
        // What is there stays until bytes of the file come that take its place.
        let wanted = if state.use_range { part.len() } else { 0 };
        let mut answer = self.ask(wanted, state.etag.as_deref())?;
        let from = match answer.response.status() {
            StatusCode::OK => 0,
            StatusCode::PARTIAL_CONTENT => {
                self.check_range(&answer, wanted, part, state)?;
                wanted
            }
            _ => return Err(self.refused(answer).into()),
        };
        answer.refuse_web_page()?;
        self.check_announced_size(&mut answer, from, state)?;
        // Only a strong tag promises the same bytes. It is remembered for this run alone: between runs a
        // content network may answer from elsewhere with another tag for the same bytes, and the hash decides anyway.
        state.etag = header(answer.response.headers(), ETAG)
            .filter(|tag| tag.starts_with('"'))
            .map(str::to_owned);
        progress(Event::Transferring {
            path: &self.file.path,
            from,
            bytes: state.expected(self.file),
        });
        self.read_body(answer, from, part, state, progress)
    }

    /// Asks for the file from the byte `wanted` on, or for all of it if its tag is no longer `etag`.
    fn ask(&self, wanted: u64, etag: Option<&str>) -> Result<Answer, RemoteError> {
        // Compressed transfer would make lengths and ranges those of other bytes.
        let mut request = self
            .client
            .get(self.url.clone())
            .header(ACCEPT_ENCODING, "identity");
        if let Some(token) = &self.file.token {
            request = request.bearer_auth(token.expose());
        }
        if wanted > 0 {
            request = request.header(RANGE, format!("bytes={wanted}-"));
            if let Some(etag) = etag {
                request = request.header(IF_RANGE, etag);
            }
        }
        let response = request.send().map_err(|error| RemoteError::NoAnswer {
            url: self.shown_url(None),
            source: error.without_url(),
        })?;
        let url = self.shown_url(Some(response.url()));
        Ok(Answer { response, url })
    }

    /// Checks which part of the file a partial answer says it is, and of how many bytes, which may be news.
    fn check_range(
        &self,
        answer: &Answer,
        wanted: u64,
        part: &PartFile<'_>,
        state: &mut State<'_>,
    ) -> Result<(), RemoteError> {
        let url = || answer.url.clone();
        let (start, total) = content_range(answer.response.headers()).unwrap_or((u64::MAX, None));
        if let (Some(announced), Some(expected)) = (total, self.file.pin.exact_bytes())
            && announced != expected
        {
            return Err(RemoteError::WrongLength {
                url: url(),
                announced,
                expected,
            });
        }
        let most = self.file.pin.most_bytes();
        if total.is_some_and(|total| total > most) {
            return Err(RemoteError::TooLong {
                url: url(),
                expected: most,
            });
        }
        state.total = state.total.or(total);
        if start != wanted {
            // It answers ranges, but not the one we asked for: do without.
            state.use_range = false;
            return Err(RemoteError::BrokeOff {
                url: url(),
                received: part.len(),
                expected: state.expected(self.file),
                source: None,
            });
        }
        Ok(())
    }

    /// The error for an answer whose status promises no file.
    fn refused(&self, mut answer: Answer) -> RemoteError {
        let said = excerpt(&read_start(&mut answer.response));
        let Answer { response, url } = answer;
        let (status, headers) = (response.status(), response.headers());
        status_error(url, status, headers, said, &self.file.hints)
    }

    /// Checks at which size of the file a body ends that begins at the byte `from`; that of a whole one is the file's.
    fn check_announced_size(
        &self,
        answer: &mut Answer,
        from: u64,
        state: &mut State<'_>,
    ) -> Result<(), RemoteError> {
        let length = header(answer.response.headers(), CONTENT_LENGTH);
        let Some(length) = length.and_then(|length| length.trim().parse::<u64>().ok()) else {
            return Ok(());
        };
        let announced = from.saturating_add(length);
        let (exact, most) = (self.file.pin.exact_bytes(), self.file.pin.most_bytes());
        // A partial answer may stop short of the end; a whole one may not.
        let is_whole = answer.response.status() == StatusCode::OK;
        if announced > most || (is_whole && exact.is_some_and(|exact| announced < exact)) {
            let url = answer.url.clone();
            return Err(match (page_instead(&mut answer.response), exact) {
                (Some(excerpt), _) => RemoteError::WebPage { url, excerpt },
                (None, Some(expected)) => RemoteError::WrongLength {
                    url,
                    announced,
                    expected,
                },
                (None, None) => RemoteError::TooLong {
                    url,
                    expected: most,
                },
            });
        }
        if is_whole {
            state.total = Some(announced);
        }
        Ok(())
    }

    /// Appends the body to the first `from` bytes of `part`, which are all of it or none.
    fn read_body(
        &self,
        answer: Answer,
        from: u64,
        part: &mut PartFile<'_>,
        state: &mut State<'_>,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Failure> {
        let expected = state.expected(self.file);
        let mut body = Body {
            answer,
            expected,
            buffer: vec![0; 1 << 16],
        };
        let mut next = self.next_chunk(&mut body, part);
        if from == 0
            && let Ok(Chunk::Bytes(count)) = next
        {
            body.refuse_page(count)?;
        }
        if from < part.len() {
            // Nothing that is no part of the file takes the place of what is there.
            let first = next?;
            match first {
                Chunk::Bytes(count) if count as u64 <= expected => {}
                Chunk::Bytes(_) => return Err(body.too_long().into()),
                Chunk::End => return Err(body.broke_off(part, None).into()),
            }
            self.start_over(part, state, progress)?;
            next = Ok(first);
        }
        loop {
            match next {
                Ok(Chunk::Bytes(count)) if part.len() + count as u64 > expected => {
                    part.discard();
                    return Err(body.too_long().into());
                }
                Ok(Chunk::Bytes(count)) => {
                    part.append(&body.buffer[..count])?;
                    state.received += count as u64;
                    state.retry.heard();
                    progress(Event::Progress {
                        done: part.len(),
                        bytes: expected,
                    });
                }
                // Where nobody knows the size, the end is where the server ends, and the hash decides.
                Ok(Chunk::End)
                    if part.len() == expected || (state.total.is_none() && part.len() > 0) =>
                {
                    state.total = Some(part.len());
                    return Ok(());
                }
                Ok(Chunk::End) => return Err(body.broke_off(part, None).into()),
                // All bytes are there: how the connection ends no longer matters.
                Err(Failure::Remote(_)) if part.len() == expected => return Ok(()),
                Err(failure) => return Err(failure),
            }
            next = self.next_chunk(&mut body, part);
        }
    }

    /// Reads what comes next into the buffer of `body`, unless interrupted.
    fn next_chunk(&self, body: &mut Body, part: &PartFile<'_>) -> Result<Chunk, Failure> {
        loop {
            if self.options.interrupt.is_raised() {
                return Err(self.interrupted(part).into());
            }
            return match body.answer.response.read(&mut body.buffer) {
                Ok(0) => Ok(Chunk::End),
                Ok(count) => Ok(Chunk::Bytes(count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if is_timeout(&error) => Err(RemoteError::Stalled {
                    url: body.answer.url.clone(),
                    received: part.len(),
                    expected: body.expected,
                    silence: self.options.network.read_timeout,
                }
                .into()),
                Err(error) => Err(body.broke_off(part, Some(error)).into()),
            };
        }
    }

    /// Drops what is there, since bytes from the start of the file take its place.
    fn start_over(
        &self,
        part: &mut PartFile<'_>,
        state: &mut State<'_>,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), DownloadError> {
        let why = match state.use_range {
            true => "the server sends the file from its start",
            false => "the server cannot continue from here",
        };
        let path = &self.file.path;
        progress(Event::StartingOver { path, why });
        part.restart()?;
        state.from_earlier_run = false;
        Ok(())
    }

    /// Decides whether to try again, and after which wait.
    fn delay_after(
        &self,
        error: RemoteError,
        part: &PartFile<'_>,
        state: &mut State<'_>,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<Duration, DownloadError> {
        if part.len() > state.best {
            state.best = part.len();
            state.retry.made_progress();
        }
        let again = state.retry.after(error, part.len());
        let again = again.map_err(|error| self.failed(error))?;
        progress(again.event());
        Ok(again.delay)
    }

    fn failed(&self, cause: RemoteError) -> DownloadError {
        DownloadError::NotDelivered {
            what: self.file.hints.not_delivered.clone(),
            cause: Box::new(cause),
        }
    }

    fn interrupted(&self, part: &PartFile<'_>) -> DownloadError {
        DownloadError::Interrupted {
            path: self.file.path.clone(),
            kept: part.len(),
        }
    }

    fn shown_url(&self, ended_at: Option<&Url>) -> String {
        shown_url(&self.url, ended_at)
    }
}

/// The address as users may see it: no password, no signature.
pub(crate) fn shown_url(url: &Url, ended_at: Option<&Url>) -> String {
    let mut shown = url.clone();
    let _ = shown.set_password(None);
    let _ = shown.set_username("");
    match ended_at.and_then(Url::host_str) {
        Some(host) if Some(host) != url.host_str() => format!("{shown} (redirected to {host})"),
        _ => shown.to_string(),
    }
}

/// What one attempt leaves to the next.
struct State<'a> {
    /// Bytes that came over the network in this run.
    received: u64,
    /// The size of the file, as it is pinned or else as the server says.
    total: Option<u64>,
    /// The most bytes of the file there ever were: only more than that is progress.
    best: u64,
    retry: Retry<'a>,
    etag: Option<String>,
    use_range: bool,
    /// Whether the part holds bytes that this run did not see arrive.
    from_earlier_run: bool,
}

impl State<'_> {
    /// The size of the file, or the most it may be while that is unknown.
    fn expected(&self, file: &FileRequest) -> u64 {
        self.total.unwrap_or(file.pin.most_bytes())
    }
}

/// What a server answered, its body still to be read.
struct Answer {
    response: Response,
    /// As users may see it.
    url: String,
}

impl Answer {
    fn refuse_web_page(&mut self) -> Result<(), RemoteError> {
        match header(self.response.headers(), CONTENT_TYPE) {
            Some(kind) if kind.trim_start().starts_with("text/html") => Err(RemoteError::WebPage {
                url: self.url.clone(),
                excerpt: excerpt(&read_start(&mut self.response)),
            }),
            _ => Ok(()),
        }
    }
}

/// An answer's body under way.
struct Body {
    answer: Answer,
    /// The size of the file, or the most it may be.
    expected: u64,
    buffer: Vec<u8>,
}

/// What was read of a body.
#[derive(Clone, Copy)]
enum Chunk {
    /// So many bytes.
    Bytes(usize),
    End,
}

impl Body {
    /// Refuses a file whose first `count` bytes are those of a page.
    fn refuse_page(&self, count: usize) -> Result<(), RemoteError> {
        let bytes = &self.buffer[..count];
        match looks_like_a_page(bytes) {
            true => Err(RemoteError::WebPage {
                url: self.answer.url.clone(),
                excerpt: excerpt(bytes),
            }),
            false => Ok(()),
        }
    }

    fn too_long(&self) -> RemoteError {
        RemoteError::TooLong {
            url: self.answer.url.clone(),
            expected: self.expected,
        }
    }

    fn broke_off(&self, part: &PartFile<'_>, source: Option<io::Error>) -> RemoteError {
        RemoteError::BrokeOff {
            url: self.answer.url.clone(),
            received: part.len(),
            expected: self.expected,
            source,
        }
    }
}

enum Failure {
    Local(DownloadError),
    Remote(RemoteError),
}

impl From<DownloadError> for Failure {
    fn from(error: DownloadError) -> Failure {
        Failure::Local(error)
    }
}

impl From<RemoteError> for Failure {
    fn from(error: RemoteError) -> Failure {
        Failure::Remote(error)
    }
}

pub(crate) fn header(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// `bytes START-END/TOTAL`; the total may be unknown (`*`).
fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let (range, total) = header(headers, CONTENT_RANGE)?
        .trim()
        .strip_prefix("bytes ")?
        .split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.trim().parse().ok()?, total.trim().parse().ok()))
}

fn is_timeout(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::TimedOut
        || error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<reqwest::Error>())
            .is_some_and(reqwest::Error::is_timeout)
}

/// The first bytes of a body that is no file.
pub(crate) fn read_start(response: &mut Response) -> Vec<u8> {
    let mut start = Vec::new();
    let _ = response.take(1024).read_to_end(&mut start);
    start
}

fn page_instead(response: &mut Response) -> Option<String> {
    let start = read_start(response);
    looks_like_a_page(&start).then(|| excerpt(&start))
}

fn looks_like_a_page(bytes: &[u8]) -> bool {
    let start = bytes.trim_ascii_start();
    ["<!doctype", "<html", "<?xml"].iter().any(|tag| {
        start
            .get(..tag.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(tag.as_bytes()))
    })
}

/// One printable line of at most 120 characters: a server's text must not steer the terminal.
pub(crate) fn excerpt(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let printable: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let line = printable.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(120) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}
