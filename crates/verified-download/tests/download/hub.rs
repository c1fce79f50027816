//! The question for the pin of a file on the Hub.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use test_support::http::{Reply, Server};
use verified_download::hub::{HubFile, RepositoryKind};
use verified_download::{DownloadError, Event, Hints, Interrupt, Pin, RemoteError};

use crate::{content, message, request, sha256, temporary};

/// Asks the Hub at `endpoint` as the other tests fetch, and returns the waits between the attempts beside the result.
fn ask(endpoint: &str) -> (Result<Pin, DownloadError>, Vec<Duration>) {
    let options = request(endpoint, temporary().path(), &[]).options;
    let mut waits = Vec::new();
    let pin = file().pin(endpoint, None, &options, &hints(), &mut |event| {
        if let Event::Retrying { delay, .. } = event {
            waits.push(delay);
        }
    });
    (pin, waits)
}

fn file() -> HubFile {
    HubFile {
        kind: RepositoryKind::Model,
        repository: "owner/name".into(),
        revision: "main".into(),
        path: "model.safetensors".into(),
    }
}

fn hints() -> Hints {
    Hints {
        refused: "log in".into(),
        ..Hints::default()
    }
}

/// What the Hub says of a large file.
fn stated(body: &[u8]) -> Reply {
    Reply::status(302, "")
        .header("Location", "http://content.network/blob")
        .header("X-Linked-Size", body.len().to_string())
        .header("X-Linked-Etag", format!("\"{}\"", sha256(body)))
}

fn cause(result: Result<Pin, DownloadError>) -> RemoteError {
    match result {
        Err(DownloadError::NotDelivered { cause, .. }) => *cause,
        other => panic!("a failure of the Hub is expected, not {other:?}"),
    }
}

#[test]
fn a_busy_hub_is_asked_again_as_late_as_it_asks_and_as_often_as_a_file() {
    let body = content(1000);
    for busy in [429, 503] {
        let hub = Server::start([
            Reply::status(busy, "").header("Retry-After", "1"),
            Reply::status(busy, ""),
            stated(&body),
        ]);
        let begin = Instant::now();
        let (pin, waits) = ask(&hub.url());
        assert_eq!(pin.unwrap(), Pin::sha256(1000, sha256(&body).into()));
        assert_eq!(waits[0], Duration::from_secs(1), "{waits:?}");
        assert!(begin.elapsed() >= Duration::from_secs(1));
        assert!(hub.asked().iter().all(|asked| asked.method == "HEAD"));
        assert_eq!(hub.asked().len(), 3);
    }
}

#[test]
fn a_hub_that_asks_for_a_longer_wait_than_we_grant_is_not_asked_again() {
    let hub = Server::start([Reply::status(429, "").header("Retry-After", "3600")]);
    let error = cause(ask(&hub.url()).0);
    assert!(
        matches!(error, RemoteError::AsksToWait { wait, .. } if wait.as_secs() == 3600),
        "{error:?}"
    );
    assert_eq!(hub.asked().len(), 1);
}

#[test]
fn a_hub_that_stays_busy_is_given_up_and_so_is_one_that_never_answers_but_sooner() {
    let hub = Server::start(vec![
        Reply::status(503, "")
            .header("X-Error-Message", "overloaded");
        5
    ]);
    let text = message(&cause(ask(&hub.url()).0));
    assert!(
        text.starts_with("gave up after 3 attempts")
            && text.contains("503 Service Unavailable: overloaded"),
        "{text}"
    );
    let gone = Server::start([]).url();
    let text = message(&cause(ask(&gone).0));
    assert!(text.starts_with("gave up after 2 attempts"), "{text}");
}

#[test]
fn a_hub_that_refuses_is_not_asked_again_and_the_hint_says_what_to_do() {
    for (status, hinted) in [(401, true), (403, true), (404, false)] {
        let hub = Server::start([Reply::status(status, "")]);
        let text = message(&cause(ask(&hub.url()).0));
        assert_eq!(text.ends_with("; log in"), hinted, "{text}");
        assert_eq!(hub.asked().len(), 1);
    }
}

#[test]
fn an_interrupt_ends_the_wait_for_the_hub() {
    let hub = Server::start([Reply::status(429, "").header("Retry-After", "4")]);
    let options = request(&hub.url(), temporary().path(), &[]).options;
    let Interrupt(flag) = options.interrupt.clone();
    let error = file()
        .pin(&hub.url(), None, &options, &hints(), &mut |_| {
            flag.store(true, Ordering::Relaxed);
        })
        .unwrap_err();
    assert!(
        matches!(error, DownloadError::Interrupted { kept: 0, .. }),
        "{error:?}"
    );
    assert_eq!(hub.asked().len(), 1);
}
