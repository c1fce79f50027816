use std::fs;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use test_support::http::{Reply, Server};
use verified_download::{
    DownloadError, Event, FileRequest, Interrupt, Mismatch, Origin, Pin, RemoteError, Token,
};

use crate::{
    FILE, cause, content, listing, message, part_path, put, request, run, sha256, temporary,
};

#[test]
fn complete_files_are_never_fetched_again() {
    let body = content(5000);
    let server = Server::start([]);
    let dir = temporary();
    put(&dir.path().join(FILE), &body);
    let (result, events) = run(&request(&server.url(), dir.path(), &body));
    assert_eq!(result.unwrap().origin, Origin::AlreadyComplete);
    assert!(
        events.last().unwrap().starts_with("AlreadyComplete"),
        "{events:?}"
    );
    assert!(server.asked().is_empty());
}

#[test]
fn what_cannot_end_well_is_refused_before_anything_is_fetched() {
    let body = content(5000);
    let server = Server::start([Reply::file(&body)]);
    let dir = temporary();
    let refused = |change: &dyn Fn(&mut FileRequest)| {
        let mut request = request(&server.url(), dir.path(), &body);
        change(&mut request.file);
        message(&run(&request).0.unwrap_err())
    };
    let folder = dir.path().to_path_buf();
    let error = refused(&|request| request.path = folder.clone());
    assert!(error.contains("it is a folder"), "{error}");
    let error = refused(&|request| request.path = "".into());
    assert!(error.contains("it has no name"), "{error}");
    for hash in ["abc", &"../".repeat(22)[..64]] {
        let error = refused(&|request| {
            request.pin = Pin::sha256(5000, hash.to_string().into());
        });
        assert!(error.contains("not 64 hexadecimal digits"), "{error}");
    }
    assert!(server.asked().is_empty());
    assert!(listing(dir.path()).is_empty());
}

#[test]
fn a_dropped_connection_is_continued_where_it_broke() {
    let body = content(200_000);
    let server = Server::start([
        Reply::file(&body)
            .header("ETag", "\"v1\"")
            .dropped_after(70_000),
        Reply::file(&body)
            .header("ETag", "W/\"v1\"")
            .dropped_after(30_000),
        Reply::file(&body),
    ]);
    let dir = temporary();
    let (result, events) = run(&request(&server.url(), dir.path(), &body));
    assert_eq!(
        result.unwrap().origin,
        Origin::Network { received: 200_000 }
    );
    assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), body);

    let asked = server.asked();
    let ranges: Vec<_> = asked.iter().map(|asked| asked.header("range")).collect();
    assert_eq!(ranges, [None, Some("bytes=70000-"), Some("bytes=100000-")]);
    let conditions: Vec<_> = asked.iter().map(|asked| asked.header("if-range")).collect();
    assert_eq!(
        conditions,
        [None, Some("\"v1\""), None],
        "a weak tag promises nothing"
    );
    assert_eq!(
        events
            .iter()
            .filter(|event| event.starts_with("Retrying"))
            .count(),
        2
    );
}

#[test]
fn a_second_run_continues_what_the_first_one_left() {
    let body = content(100_000);
    let dir = temporary();
    let server = Server::start([
        Reply::file(&body).dropped_after(60_000),
        Reply::status(503, ""),
        Reply::status(503, ""),
    ]);
    let error = run(&request(&server.url(), dir.path(), &body))
        .0
        .unwrap_err();
    assert!(
        message(&error).contains("(60000 bytes are kept"),
        "{}",
        message(&error)
    );
    assert_eq!(
        fs::read(part_path(dir.path(), &body)).unwrap(),
        body[..60_000]
    );

    let server = Server::start([Reply::file(&body)]);
    let report = run(&request(&server.url(), dir.path(), &body)).0.unwrap();
    assert_eq!(report.origin, Origin::Network { received: 40_000 });
    assert_eq!(server.asked()[0].header("range"), Some("bytes=60000-"));
    assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), body);
    assert_eq!(listing(dir.path()), ["folder", FILE]);
}

#[test]
fn a_part_file_with_all_bytes_needs_no_request() {
    let body = content(1000);
    let dir = temporary();
    put(&part_path(dir.path(), &body), &body);
    let server = Server::start([]);
    run(&request(&server.url(), dir.path(), &body)).0.unwrap();
    assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), body);
    assert!(server.asked().is_empty());
}

#[test]
fn a_server_without_ranges_sends_the_file_from_its_start() {
    let body = content(100_000);
    let server = Server::start([Reply::body(&body).dropped_after(60_000), Reply::body(&body)]);
    let dir = temporary();
    let (result, events) = run(&request(&server.url(), dir.path(), &body));
    result.unwrap();
    assert_eq!(server.asked()[1].header("range"), Some("bytes=60000-"));
    assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), body);
    assert!(
        events
            .iter()
            .any(|event| event.contains("sends the file from its start")),
        "{events:?}"
    );
}

#[test]
fn a_server_that_answers_another_range_is_asked_without() {
    let body = content(1000);
    let dir = temporary();
    put(&part_path(dir.path(), &body), &body[..400]);
    let wrong = Reply::status(206, &body[100..]).header("Content-Range", "bytes 100-999/1000");
    let server = Server::start([wrong, Reply::body(&body)]);
    run(&request(&server.url(), dir.path(), &body)).0.unwrap();
    assert_eq!(server.asked()[1].header("range"), None);
    assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), body);
}

#[test]
fn no_answer_but_the_file_takes_the_place_of_a_part() {
    let body = content(1000);
    let page = b"<html><body>Please log in</body></html>";
    let mut padded = page.to_vec();
    padded.resize(1000, b' ');
    let other_range =
        Reply::status(206, &body[100..]).header("Content-Range", "bytes 100-999/1000");
    let answers = [
        vec![Reply::body(page).header("Content-Type", "text/html")],
        vec![Reply::body(&padded)],
        vec![Reply::body(page).unannounced()],
        vec![Reply::body(&content(900))],
        vec![Reply::body(&content(5000))],
        vec![Reply::body(&content(100_000)).unannounced()],
        vec![Reply::body(&[]).unannounced(); 3],
        vec![Reply::status(416, ""), Reply::body(&padded)],
        vec![other_range],
    ];
    for script in answers {
        let dir = temporary();
        let part = part_path(dir.path(), &body);
        put(&part, &body[..400]);
        let what = format!("{script:?}");
        let answers = script.len();
        let mut server = Some(Server::start(script));
        let wanted = request(&server.as_ref().unwrap().url(), dir.path(), &body);
        let mut retries = 0;
        // After the last answer the port refuses.
        let failed = wanted.fetch(&mut |event| {
            retries += usize::from(matches!(event, Event::Retrying { .. }));
            server = server.take().filter(|_| retries < answers);
        });
        assert!(failed.is_err(), "{what}");
        let kept = fs::read(&part).unwrap_or_default();
        assert!(kept == body[..400], "{} bytes after {what}", kept.len());

        let server = Server::start([Reply::file(&body)]);
        let report = run(&request(&server.url(), dir.path(), &body)).0.unwrap();
        assert_eq!(report.origin, Origin::Network { received: 600 }, "{what}");
        assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), body);
    }
}

#[test]
fn a_part_that_the_server_cannot_continue_gives_way_to_the_whole_file() {
    let body = content(1000);
    let dir = temporary();
    put(&part_path(dir.path(), &body), &body[..400]);
    let server = Server::start([Reply::status(416, ""), Reply::body(&body)]);
    let (result, events) = run(&request(&server.url(), dir.path(), &body));
    assert_eq!(result.unwrap().origin, Origin::Network { received: 1000 });
    assert_eq!(server.asked()[1].header("range"), None);
    assert!(
        events.iter().any(|event| event.contains("cannot continue")),
        "{events:?}"
    );
}

#[test]
fn wrong_bytes_of_an_earlier_run_are_dropped_and_fetched_anew() {
    let body = content(1000);
    for kept in [vec![7; 400], vec![7; 1000], vec![7; 2000]] {
        let dir = temporary();
        put(&part_path(dir.path(), &body), &kept);
        let server = Server::start([Reply::file(&body), Reply::file(&body)]);
        run(&request(&server.url(), dir.path(), &body)).0.unwrap();
        assert_eq!(
            fs::read(dir.path().join(FILE)).unwrap(),
            body,
            "after {} kept bytes",
            kept.len()
        );
        assert_eq!(listing(dir.path()), ["folder", FILE]);
    }
}

#[test]
fn an_unfinished_download_of_another_version_is_not_continued_but_removed() {
    let (old, new) = (content(2000), content(1000));
    let dir = temporary();
    put(&part_path(dir.path(), &old), &old[..500]);
    put(&dir.path().join(format!("{FILE}.notes.part")), b"not ours");
    let server = Server::start([Reply::file(&new)]);
    let (result, events) = run(&request(&server.url(), dir.path(), &new));
    result.unwrap();
    assert_eq!(server.asked()[0].header("range"), None);
    assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), new);
    assert_eq!(
        listing(dir.path()),
        ["folder", FILE, &format!("{FILE}.notes.part")]
    );
    assert!(
        events
            .iter()
            .any(|event| event.starts_with("RemovedStalePart")),
        "{events:?}"
    );
}

#[test]
fn a_wrong_announced_length_is_refused_before_the_body() {
    let body = content(1000);
    for announced in [10, 999, 1001, 5000] {
        let server = Server::start([Reply::body(&content(announced))]);
        let dir = temporary();
        match cause(run(&request(&server.url(), dir.path(), &body)).0) {
            RemoteError::WrongLength {
                announced: found,
                expected: 1000,
                ..
            } => assert_eq!(found, announced as u64),
            other => panic!("{other:?}"),
        }
        assert_eq!(
            server.asked().len(),
            1,
            "a wrong length does not mend itself"
        );
        assert_eq!(listing(dir.path()), [""; 0]);
    }
}

#[test]
fn a_changed_total_in_a_range_answer_is_refused_and_the_part_kept() {
    let body = content(1000);
    let dir = temporary();
    put(&part_path(dir.path(), &body), &body[..400]);
    let server = Server::start([Reply::file(&content(1500))]);
    let error = cause(run(&request(&server.url(), dir.path(), &body)).0);
    assert!(
        matches!(
            error,
            RemoteError::WrongLength {
                announced: 1500,
                expected: 1000,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(fs::read(part_path(dir.path(), &body)).unwrap(), body[..400]);
}

#[test]
fn a_longer_body_than_the_file_is_cut_off_and_removed() {
    let body = content(1000);
    let server = Server::start([Reply::body(&content(400_000)).unannounced()]);
    let dir = temporary();
    let error = cause(run(&request(&server.url(), dir.path(), &body)).0);
    assert!(
        matches!(error, RemoteError::TooLong { expected: 1000, .. }),
        "{error:?}"
    );
    assert_eq!(listing(dir.path()), [""; 0]);
}

#[test]
fn a_body_that_is_always_short_ends_in_an_error() {
    let body = content(1000);
    for server in [
        Server::start(vec![Reply::body(&body[..600]).unannounced(); 4]),
        Server::start(vec![Reply::file(&body[..600]).unannounced(); 6]),
    ] {
        let dir = temporary();
        let error = cause(run(&request(&server.url(), dir.path(), &body)).0);
        let RemoteError::GaveUp {
            attempts: 3, last, ..
        } = &error
        else {
            panic!("{error:?}")
        };
        assert!(
            matches!(
                **last,
                RemoteError::BrokeOff {
                    received: 600,
                    expected: 1000,
                    ..
                }
            ),
            "{last:?}"
        );
        assert!(!dir.path().join(FILE).exists());
    }
}

#[test]
fn wrong_bytes_of_the_right_length_are_named_and_removed() {
    let body = content(1000);
    let mut wrong = body.clone();
    wrong[500] ^= 1;
    let server = Server::start([Reply::file(&wrong)]);
    let dir = temporary();
    let error = cause(run(&request(&server.url(), dir.path(), &body)).0);
    let RemoteError::WrongBytes {
        problem: Mismatch::Sha256 { found, expected },
        ..
    } = &error
    else {
        panic!("{error:?}")
    };
    assert_eq!(
        (found.as_str(), expected.as_str()),
        (sha256(&wrong).as_str(), sha256(&body).as_str())
    );
    assert_eq!(listing(dir.path()), [""; 0]);
}

#[test]
fn a_web_page_with_status_200_is_called_one() {
    let body = content(1000);
    let page = b"<!DOCTYPE html>\n<html><body>Please \x1b[31mlog in\x1b[0m</body></html>".to_vec();
    let mut padded = page.clone();
    padded.resize(1000, b' ');
    for reply in [
        Reply::body(&page),
        Reply::body(&page).header("Content-Type", "text/html; charset=utf-8"),
        Reply::body(&page).unannounced(),
        Reply::body(&padded),
    ] {
        let server = Server::start([reply.clone()]);
        let dir = temporary();
        let error = cause(run(&request(&server.url(), dir.path(), &body)).0);
        let RemoteError::WebPage { excerpt, .. } = &error else {
            panic!("{reply:?}: {error:?}")
        };
        assert!(
            excerpt.contains("Please") && !excerpt.contains('\x1b'),
            "{excerpt:?}"
        );
        assert_eq!(server.asked().len(), 1);
        assert_eq!(listing(dir.path()), [""; 0]);
    }
}

#[test]
fn not_found_is_not_retried_and_says_what_the_caller_adds() {
    let body = content(1000);
    let server = Server::start([Reply::status(404, "Entry not found")]);
    let dir = temporary();
    let mut request = request(&server.url(), dir.path(), &body);
    request.file.hints.not_delivered = "no weights (try --weights random)".into();
    let error = run(&request).0.unwrap_err();
    let text = message(&error);
    assert!(text.contains("404 Not Found: Entry not found"), "{text}");
    assert!(
        text.starts_with("no weights (try --weights random): "),
        "{text}"
    );
    assert_eq!(server.asked().len(), 1);
    assert_eq!(listing(dir.path()), [""; 0]);
}

#[test]
fn too_many_requests_waits_as_long_as_asked() {
    let body = content(1000);
    let server = Server::start([
        Reply::status(429, "slow down").header("Retry-After", "1"),
        Reply::file(&body),
    ]);
    let dir = temporary();
    let begin = Instant::now();
    let (result, events) = run(&request(&server.url(), dir.path(), &body));
    result.unwrap();
    assert!(begin.elapsed() >= Duration::from_secs(1));
    assert!(
        events
            .iter()
            .any(|event| event.starts_with("Retrying") && event.contains("delay: 1s")),
        "{events:?}"
    );
}

#[test]
fn a_longer_wait_than_we_grant_ends_the_run_with_its_length() {
    let body = content(1000);
    for (value, at_least) in [("3600", 3600), ("Wed, 21 Oct 2099 07:28:00 GMT", 1_000_000)] {
        let server = Server::start([Reply::status(503, "").header("Retry-After", value)]);
        let dir = temporary();
        let error = cause(run(&request(&server.url(), dir.path(), &body)).0);
        let RemoteError::AsksToWait { wait, .. } = &error else {
            panic!("{error:?}")
        };
        assert!(wait.as_secs() >= at_least, "{wait:?}");
        assert_eq!(server.asked().len(), 1);
    }
}

#[test]
fn a_server_error_is_retried_until_it_passes() {
    let body = content(1000);
    let server = Server::start([
        Reply::status(500, "oops"),
        Reply::status(502, ""),
        Reply::file(&body),
    ]);
    let dir = temporary();
    run(&request(&server.url(), dir.path(), &body)).0.unwrap();
    assert_eq!(server.asked().len(), 3);
    assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), body);
}

#[test]
fn a_server_error_that_stays_ends_after_the_allowed_attempts() {
    let body = content(1000);
    let server = Server::start(vec![Reply::status(500, "oops"); 10]);
    let dir = temporary();
    let error = cause(run(&request(&server.url(), dir.path(), &body)).0);
    assert_eq!(server.asked().len(), 3);
    let text = message(&error);
    assert!(
        text.starts_with("gave up after 3 attempts")
            && text.contains("500 Internal Server Error: oops"),
        "{text}"
    );
    assert_eq!(listing(dir.path()), [""; 0]);
}

#[test]
fn progress_resets_the_count_of_failures() {
    let body = content(10_000);
    let script = (0..10).map(|_| Reply::file(&body).dropped_after(1000));
    let server = Server::start(script);
    let dir = temporary();
    run(&request(&server.url(), dir.path(), &body)).0.unwrap();
    assert_eq!(
        server.asked().len(),
        10,
        "more than the three attempts in a row that are allowed without progress"
    );
}

#[test]
fn a_silent_server_is_left_and_asked_again() {
    let body = content(1000);
    let (release, released) = mpsc::channel();
    let server = Server::start([
        Reply::file(&body).stalled_until(300, released),
        Reply::file(&body),
    ]);
    let dir = temporary();
    let mut request = request(&server.url(), dir.path(), &body);
    request.options.network.read_timeout = Duration::from_secs(1);
    let mut events = Vec::new();
    request
        .fetch(&mut |event| {
            // The server, which has one thread, is silent until it has been given up.
            if matches!(event, Event::Retrying { .. }) {
                let _ = release.send(());
            }
            events.push(format!("{event:?}"));
        })
        .unwrap();
    assert!(
        events.iter().any(|event| event.contains("Stalled")),
        "{events:?}"
    );
    assert_eq!(server.asked()[1].header("range"), Some("bytes=300-"));
}

#[test]
fn no_server_at_all_is_an_error_that_says_so() {
    let endpoint = Server::start([]).url(); // stopped again at once: the port refuses
    let dir = temporary();
    let error = cause(run(&request(&endpoint, &dir.path().join("data"), &content(10))).0);
    let text = message(&error);
    assert!(
        text.starts_with("gave up after 2 attempts")
            && text.contains("no answer from http://127.0.0.1"),
        "{text}"
    );
    assert!(text.contains("refused"), "{text}");
    assert_eq!(listing(dir.path()), [""; 0]);
}

#[test]
fn the_token_goes_to_the_host_asked_and_not_where_it_redirects() {
    let body = content(1000);
    let elsewhere = Server::start([Reply::file(&body)]);
    let hub =
        Server::start([Reply::status(302, "")
            .header("Location", format!("{}/blob?signature=x", elsewhere.url()))]);
    let dir = temporary();
    let mut request = request(&hub.url(), dir.path(), &body);
    request.file.token = Some(Token::new("hf_secret"));
    run(&request).0.unwrap();
    assert_eq!(
        hub.asked()[0].header("authorization"),
        Some("Bearer hf_secret")
    );
    assert_eq!(elsewhere.asked()[0].path, "/blob?signature=x");
    assert_eq!(elsewhere.asked()[0].header("authorization"), None);
    assert!(!format!("{request:?}").contains("hf_secret"));
}

#[test]
fn offline_means_no_request() {
    let body = content(1000);
    let server = Server::start([Reply::file(&body)]);
    let dir = temporary();
    let mut request = request(&server.url(), dir.path(), &body);
    request.options.offline = true;
    request.file.hints.offline = "HF_HUB_OFFLINE is set".into();
    let error = run(&request).0.unwrap_err();
    assert!(
        matches!(error, DownloadError::Offline { .. })
            && error
                .to_string()
                .ends_with("is missing and HF_HUB_OFFLINE is set"),
        "{error}"
    );
    assert!(server.asked().is_empty());
    assert_eq!(listing(dir.path()), [""; 0]);
}

#[test]
fn an_interrupt_keeps_what_has_arrived() {
    let body = content(300_000);
    let server = Server::start([Reply::file(&body)]);
    let dir = temporary();
    let request = request(&server.url(), dir.path(), &body);
    let Interrupt(flag) = request.options.interrupt.clone();
    let error = request
        .fetch(&mut |event| {
            if matches!(event, Event::Progress { done, .. } if done > 100_000) {
                flag.store(true, Ordering::Relaxed);
            }
        })
        .unwrap_err();
    let DownloadError::Interrupted { kept, .. } = error else {
        panic!("{error:?}")
    };
    assert_eq!(
        fs::read(part_path(dir.path(), &body)).unwrap(),
        body[..kept as usize]
    );
    assert!((100_000..300_000).contains(&kept), "{kept}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_series_of_drops_ends_in_the_right_file(
        size in 1..200_000_usize,
        drops in prop::collection::vec((any::<bool>(), 1..100_000_usize), 0..8),
    ) {
        let body = content(size);
        let mut script: Vec<Reply> = drops
            .into_iter()
            .map(|(ranges, sends)| if ranges { Reply::file(&body) } else { Reply::body(&body) }.dropped_after(sends))
            .collect();
        script.extend(vec![Reply::file(&body); 1]);
        let server = Server::start(script);
        let dir = temporary();
        let mut request = request(&server.url(), dir.path(), &body);
        request.options.network.attempts = 20;
        run(&request).0.expect("success");
        prop_assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), body);
        prop_assert_eq!(listing(dir.path()), ["folder", FILE]);
    }
}
