use std::fs;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use test_support::http::{Reply, Server};
use test_support::skipped;
use verified_download::{CachedCopy, DownloadError, Event, Mismatch, Origin};

use crate::{FILE, content, listing, message, part_path, put, request, run, temporary};

#[test]
fn a_corrupt_file_is_reported_and_replaced_only_by_a_verified_one() {
    let body = content(1000);
    let dir = temporary();
    let path = dir.path().join(FILE);
    put(&path, &[7; 1000]);

    let server = Server::start([Reply::status(404, "")]);
    let (result, events) = run(&request(&server.url(), dir.path(), &body));
    assert!(result.is_err());
    assert!(
        events.iter().any(|event| event.starts_with("WillReplace")),
        "{events:?}"
    );
    assert_eq!(fs::read(&path).unwrap(), [7; 1000], "nothing better came");
    assert_eq!(listing(dir.path()), ["folder", FILE]);

    let server = Server::start([Reply::file(&body)]);
    let mut seen_during_transfer = Vec::new();
    request(&server.url(), dir.path(), &body)
        .fetch(&mut |event| {
            if let Event::Progress { done: 1000, .. } = event {
                seen_during_transfer = fs::read(&path).unwrap();
            }
        })
        .unwrap();
    assert_eq!(seen_during_transfer, [7; 1000]);
    assert_eq!(fs::read(&path).unwrap(), body);
}

#[test]
fn a_file_of_another_size_is_reported_with_both_sizes() {
    let body = content(1000);
    let dir = temporary();
    put(&dir.path().join(FILE), &body[..999]);
    let server = Server::start([Reply::file(&body)]);
    let mut problem = None;
    request(&server.url(), dir.path(), &body)
        .fetch(&mut |event| {
            if let Event::WillReplace { problem: found, .. } = event {
                problem = Some(found.clone());
            }
        })
        .unwrap();
    assert_eq!(
        problem,
        Some(Mismatch::Size {
            found: 999,
            expected: 1000
        })
    );
    assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), body);
}

/// Fetches `body`, of which "the loft" has a copy; where it came from, and what was said.
fn fetched_beside(copy: &Path, body: &[u8]) -> (Origin, Vec<String>) {
    let server = Server::start([Reply::file(body)]);
    let dir = temporary();
    let mut request = request(&server.url(), dir.path(), body);
    request.cached = Some(CachedCopy {
        path: copy.to_path_buf(),
        cache: "the loft".into(),
    });
    let mut lines = Vec::new();
    let fetched = request.fetch(&mut |event| lines.extend(event.message()));
    let origin = fetched.unwrap().origin;
    assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), body);
    (origin, lines)
}

#[test]
fn a_copy_in_a_cache_is_taken_or_refused_under_the_caches_name() {
    let body = content(1000);
    let caches = temporary();
    for (content, origin, line) in [
        (body.clone(), Origin::Cache, "copying COPY from the loft"),
        (
            body[..999].to_vec(),
            Origin::Network { received: 1000 },
            "not using COPY from the loft: it has 999 bytes instead of 1000",
        ),
    ] {
        let copy = caches.path().join("copy.bin");
        put(&copy, &content);
        let (from, lines) = fetched_beside(&copy, &body);
        assert_eq!(from, origin);
        let line = line.replace("COPY", &copy.display().to_string());
        assert!(lines.contains(&line), "{lines:?}");
        assert_eq!(fs::read(copy).unwrap(), content, "the cache is left alone");
    }
}

#[cfg(unix)]
#[test]
fn a_copy_in_a_cache_that_cannot_be_read_is_fetched_instead() {
    let body = content(1000);
    let caches = temporary();
    let copy = caches.path().join("copy.bin");
    // A link to itself, which nobody can read, whatever their rights.
    std::os::unix::fs::symlink(&copy, &copy).unwrap();
    let (from, lines) = fetched_beside(&copy, &body);
    assert_eq!(from, Origin::Network { received: 1000 });
    let refused = format!("not using the loft: cannot read {}: ", copy.display());
    assert!(
        lines.iter().any(|line| line.starts_with(&refused)),
        "{lines:?}"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named_and_nothing_is_left() {
    let body = content(1000);
    let dir = temporary();
    // Every write to /dev/full fails as on a full disk.
    let part = part_path(dir.path(), &body);
    fs::create_dir_all(part.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", &part).unwrap();
    let server = Server::start([Reply::file(&body)]);
    let mut request = request(&server.url(), dir.path(), &body);
    request.file.hints.other_folder = "choose another folder with `--data-dir`".into();
    let error = run(&request).0.unwrap_err();
    assert!(
        matches!(&error, DownloadError::DiskFull { bytes: 1000, .. }),
        "{error:?}"
    );
    let text = message(&error);
    assert!(
        text.contains("no space left") && text.contains("free some, or choose another folder"),
        "{text}"
    );
    assert_eq!(listing(dir.path()), ["folder"]);
}

#[test]
fn a_data_folder_below_a_file_is_named_before_any_request() {
    let body = content(1000);
    let dir = temporary();
    put(&dir.path().join("file"), b"in the way");
    let server = Server::start([Reply::file(&body)]);
    let error = run(&request(
        &server.url(),
        &dir.path().join("file/data"),
        &body,
    ))
    .0
    .unwrap_err();
    assert!(
        matches!(&error, DownloadError::NotWritable { .. }),
        "{error:?}"
    );
    assert!(server.asked().is_empty());
    assert_eq!(listing(dir.path()), ["file"]);
}

#[cfg(unix)]
#[test]
fn a_read_only_folder_is_named_before_any_request() {
    use std::os::unix::fs::PermissionsExt;
    let body = content(1000);
    let dir = temporary();
    let folder = dir.path().join("read-only");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(folder.join("probe"), "").is_ok() {
        skipped("this user (root?) writes to read-only folders");
        return;
    }
    let server = Server::start([Reply::file(&body)]);
    let error = run(&request(&server.url(), &folder, &body)).0.unwrap_err();
    assert!(
        matches!(&error, DownloadError::NotWritable { .. }),
        "{error:?}"
    );
    assert!(message(&error).contains("read-only"), "{}", message(&error));
    assert!(server.asked().is_empty());
    assert_eq!(listing(&folder), [""; 0]);
}

#[test]
fn a_second_process_waits_and_finds_the_file_complete() {
    let body = content(100_000);
    let (release, released) = mpsc::channel();
    let server = Server::start([
        Reply::file(&body).stalled_until(50_000, released),
        Reply::file(&body),
    ]);
    let dir = temporary();
    let mut request = request(&server.url(), dir.path(), &body);
    request.options.network.read_timeout = Duration::from_secs(60);
    let request = &request;
    let (under_way, wait_for_it) = mpsc::channel();
    let (first, second, events) = thread::scope(|scope| {
        // A lock belongs to the opened file, so threads compete for it just as processes do.
        let first = scope.spawn(|| {
            let mut under_way = Some(under_way);
            request.fetch(&mut |event| {
                if matches!(event, Event::Progress { .. })
                    && let Some(under_way) = under_way.take()
                {
                    under_way.send(()).unwrap();
                }
            })
        });
        wait_for_it.recv().unwrap();
        // The first goes on once the second waits for it, or has ended without.
        let mut events = Vec::new();
        let second = request.fetch(&mut |event| {
            if matches!(event, Event::WaitingForOtherProcess { .. }) {
                release.send(()).unwrap();
            }
            events.push(format!("{event:?}"));
        });
        drop(release);
        (first.join().unwrap(), second, events)
    });
    assert_eq!(first.unwrap().origin, Origin::Network { received: 100_000 });
    assert_eq!(second.unwrap().origin, Origin::AlreadyComplete);
    assert!(
        events[0].starts_with("WaitingForOtherProcess"),
        "{events:?}"
    );
    assert_eq!(
        server.asked().len(),
        2,
        "the drop and its continuation, both by the first"
    );
    assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), body);
    assert_eq!(listing(dir.path()), ["folder", FILE]);
}
