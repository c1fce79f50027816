//! A file whose exact size is not pinned: the server says it, within a bound, and the hash decides.

use std::fs;

use test_support::http::{Reply, Server};
use verified_download::{Mismatch, Origin, Pin, RemoteError, Size};

use crate::{FILE, Job, cause, content, listing, part_path, put, request, run, sha256, temporary};

/// As [`request`], with a bound in place of the size.
fn bounded(server: &Server, dir: &std::path::Path, body: &[u8], most: u64) -> Job {
    let mut job = request(&server.url(), dir, body);
    job.file.pin = Pin::Sha256 {
        size: Size::AtMost(most),
        sha256: sha256(body).into(),
    };
    job
}

#[test]
fn the_server_tells_the_size_and_a_broken_transfer_is_continued() {
    let body = content(100_000);
    for second in [
        Reply::file(&body),
        Reply::body(&body),
        Reply::body(&body).unannounced(),
    ] {
        let server = Server::start([Reply::file(&body).dropped_after(60_000), second]);
        let dir = temporary();
        let (result, events) = run(&bounded(&server, dir.path(), &body, 200_000));
        let fetched = result.unwrap();
        assert_eq!(fetched.bytes, 100_000);
        assert!(matches!(fetched.origin, Origin::Network { .. }));
        assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), body);
        assert_eq!(server.asked()[1].header("range"), Some("bytes=60000-"));
        assert!(
            events
                .iter()
                .any(|event| event.starts_with("Transferring") && event.contains("100000")),
            "{events:?}"
        );
    }
}

#[test]
fn without_an_announced_size_the_end_of_the_answer_is_the_end_of_the_file() {
    let body = content(1000);
    let server = Server::start([Reply::body(&body).unannounced()]);
    let dir = temporary();
    run(&bounded(&server, dir.path(), &body, 2000)).0.unwrap();
    assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), body);
}

#[test]
fn what_an_earlier_run_left_complete_needs_no_request() {
    let body = content(1000);
    let dir = temporary();
    put(&part_path(dir.path(), &body), &body);
    let server = Server::start([]);
    run(&bounded(&server, dir.path(), &body, 2000)).0.unwrap();
    assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), body);
    assert!(server.asked().is_empty());

    let (result, _) = run(&bounded(&server, dir.path(), &body, 2000));
    assert_eq!(result.unwrap().origin, Origin::AlreadyComplete);
}

#[test]
fn wrong_bytes_of_an_earlier_run_are_dropped() {
    let body = content(1000);
    for kept in [vec![7; 400], vec![7; 1000], vec![7; 1500], vec![7; 3000]] {
        let dir = temporary();
        put(&part_path(dir.path(), &body), &kept);
        let server = Server::start([Reply::file(&body), Reply::file(&body)]);
        run(&bounded(&server, dir.path(), &body, 2000)).0.unwrap();
        assert_eq!(
            fs::read(dir.path().join(FILE)).unwrap(),
            body,
            "{}",
            kept.len()
        );
        assert_eq!(listing(dir.path()), ["folder", FILE]);
    }
}

#[test]
fn no_server_sends_more_than_the_bound() {
    let body = content(3000);
    let announced = Reply::body(&body);
    let partial = Reply::status(206, &body[400..]).header("Content-Range", "bytes 400-2999/3000");
    for (reply, kept) in [
        (announced.clone(), 0),
        (announced.unannounced(), 0),
        (partial.unannounced(), 400),
    ] {
        let dir = temporary();
        if kept > 0 {
            put(&part_path(dir.path(), &body), &body[..kept]);
        }
        let server = Server::start([reply]);
        let error = cause(run(&bounded(&server, dir.path(), &body, 2000)).0);
        assert!(
            matches!(error, RemoteError::TooLong { expected: 2000, .. }),
            "{error:?}"
        );
        assert!(!dir.path().join(FILE).exists());
    }
}

#[test]
fn wrong_bytes_are_named_by_their_hash_and_removed() {
    let (body, wrong) = (content(1000), content(999));
    let server = Server::start([Reply::file(&wrong)]);
    let dir = temporary();
    let error = cause(run(&bounded(&server, dir.path(), &body, 2000)).0);
    assert!(
        matches!(&error, RemoteError::WrongBytes { problem: Mismatch::Sha256 { found, .. }, .. } if *found == sha256(&wrong)),
        "{error:?}"
    );
    assert_eq!(listing(dir.path()), [""; 0]);
}
