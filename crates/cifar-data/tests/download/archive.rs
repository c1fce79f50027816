use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::Ordering;

use cifar_data::download::{
    ArchiveError, ArchiveManifest, DownloadError, Event, Interrupt, Manifest, Origin, Request,
    fetch,
};
use flate2::Compression;
use flate2::write::GzEncoder;
use tar::{EntryType, Header};
use test_support::http::{Reply, Server};

use crate::{content, listing, message, pinned, put, request, run, temporary};

/// An entry whose header is written as it is: `tar::Builder` would refuse the names we need.
struct Entry {
    name: String,
    kind: EntryType,
    link: &'static str,
    body: Vec<u8>,
}

fn file(name: &str, body: &[u8]) -> Entry {
    Entry {
        name: name.to_owned(),
        kind: EntryType::Regular,
        link: "",
        body: body.to_vec(),
    }
}

fn special(name: &str, kind: EntryType, link: &'static str) -> Entry {
    Entry {
        name: name.to_owned(),
        kind,
        link,
        body: Vec::new(),
    }
}

fn tar_gz(entries: &[Entry]) -> Vec<u8> {
    let mut gz = GzEncoder::new(Vec::new(), Compression::fast());
    for entry in entries {
        let mut header = Header::new_ustar();
        header.as_old_mut().name[..entry.name.len()].copy_from_slice(entry.name.as_bytes());
        header.as_old_mut().linkname[..entry.link.len()].copy_from_slice(entry.link.as_bytes());
        header.set_entry_type(entry.kind);
        header.set_mode(0o777);
        header.set_size(entry.body.len() as u64);
        header.set_cksum();
        gz.write_all(header.as_bytes()).unwrap();
        gz.write_all(&entry.body).unwrap();
        gz.write_all(&vec![
            0;
            entry.body.len().next_multiple_of(512)
                - entry.body.len()
        ])
        .unwrap();
    }
    gz.write_all(&[0; 1024]).unwrap();
    gz.finish().unwrap()
}

fn first() -> Vec<u8> {
    content(3000)
}

fn second() -> Vec<u8> {
    content(4000)[1000..].to_vec()
}

/// The published archive in small: two files wanted, one not.
fn good_entries() -> Vec<Entry> {
    vec![
        special("batches/", EntryType::Directory, ""),
        file("batches/one.bin", &first()),
        file("batches/readme.html", b"<html>"),
        file("batches/two.bin", &second()),
    ]
}

fn archive_request(server: &Server, dir: &Path, archive: &[u8]) -> Request {
    let manifest = Manifest::Archive(ArchiveManifest {
        url: format!("{}/~kriz/batches.tar.gz", server.url()).into(),
        archive: pinned("batches.tar.gz", archive),
        folder: "batches".into(),
        members: vec![pinned("one.bin", &first()), pinned("two.bin", &second())].into(),
        unneeded: vec!["readme.html".into()].into(),
    });
    // The endpoint and token are the Hub's: this request must not care.
    let mut request = request("nonsense", dir, &[]);
    request.hub.token = Some(cifar_data::download::Token::new("hf_secret"));
    Request {
        manifest,
        ..request
    }
}

#[test]
fn an_archive_is_fetched_verified_and_unpacked() {
    let archive = tar_gz(&good_entries());
    let server = Server::start([
        Reply::file(&archive).dropped_after(1000),
        Reply::file(&archive),
    ]);
    let dir = temporary();
    let request = archive_request(&server, dir.path(), &archive);
    let report = run(&request).0.unwrap();
    let origins: Vec<_> = report.files.iter().map(|file| file.origin).collect();
    assert_eq!(
        origins,
        [
            Origin::Network {
                received: archive.len() as u64
            },
            Origin::Archive,
            Origin::Archive
        ]
    );
    assert_eq!(
        fs::read(dir.path().join("batches/one.bin")).unwrap(),
        first()
    );
    assert_eq!(
        fs::read(dir.path().join("batches/two.bin")).unwrap(),
        second()
    );
    assert_eq!(
        listing(dir.path()),
        [
            "batches",
            "batches.tar.gz",
            "batches/one.bin",
            "batches/two.bin"
        ]
    );
    assert!(
        server
            .asked()
            .iter()
            .all(|asked| asked.header("authorization").is_none()),
        "the token is the Hub's"
    );

    let report = run(&request).0.unwrap();
    assert!(
        report
            .files
            .iter()
            .all(|file| file.origin == Origin::AlreadyComplete)
    );
    assert_eq!(server.asked().len(), 2, "complete files need no request");
}

#[test]
fn a_damaged_or_missing_file_comes_from_the_kept_archive_and_others_stay() {
    let archive = tar_gz(&good_entries());
    let server = Server::start([Reply::file(&archive)]);
    let dir = temporary();
    let request = archive_request(&server, dir.path(), &archive);
    run(&request).0.unwrap();
    let batches = dir.path().join("batches");
    fs::write(batches.join("one.bin"), [7; 3000]).unwrap();
    fs::remove_file(batches.join("two.bin")).unwrap();
    fs::write(batches.join("mine.txt"), "notes").unwrap();
    let (result, events) = run(&request);
    result.unwrap();
    assert!(
        events.iter().any(|event| event.starts_with("WillReplace")),
        "{events:?}"
    );
    assert_eq!(fs::read(batches.join("one.bin")).unwrap(), first());
    assert_eq!(fs::read(batches.join("two.bin")).unwrap(), second());
    assert_eq!(fs::read(batches.join("mine.txt")).unwrap(), b"notes");
    assert_eq!(server.asked().len(), 1);
}

#[test]
fn what_happens_to_an_archive_is_told_in_lines() {
    let archive = tar_gz(&good_entries());
    let server = Server::start([]);
    let dir = temporary();
    let request = archive_request(&server, dir.path(), &archive);
    put(&dir.path().join("batches.tar.gz"), &archive);
    put(&dir.path().join(".batches.aB3dE9/one.bin"), b"a part");
    let mut lines = Vec::new();
    fetch(&request, &mut |event| lines.extend(event.message())).unwrap();
    let folder = format!("{}/", dir.path().display());
    let lines = lines.iter().map(|line| line.replace(&folder, ""));
    assert_eq!(
        lines.collect::<Vec<_>>(),
        [
            &format!("checking batches.tar.gz ({} bytes)", archive.len()),
            "batches.tar.gz is complete: not fetched again",
            "removed .batches.aB3dE9, which an unpacking that was killed had left",
            "unpacking batches.tar.gz",
            "batches/one.bin is complete and verified",
            "batches/two.bin is complete and verified",
        ]
    );
}

#[test]
fn an_unpacking_that_is_interrupted_promises_nothing() {
    let archive = tar_gz(&good_entries());
    let server = Server::start([Reply::file(&archive)]);
    let dir = temporary();
    let request = archive_request(&server, dir.path(), &archive);
    let Interrupt(flag) = request.interrupt.clone();
    let error = fetch(&request, &mut |event| {
        if matches!(event, Event::Unpacking { .. }) {
            flag.store(true, Ordering::Relaxed);
        }
    })
    .unwrap_err();
    assert!(error.is_interruption());
    assert_eq!(message(&error), "interrupted");
    let DownloadError::File(verified_download::DownloadError::Interrupted { path, .. }) = error
    else {
        panic!("{error:?}")
    };
    assert_eq!(path, dir.path().join("batches/one.bin"));
    assert_eq!(listing(dir.path()), ["batches.tar.gz"]);
}

#[test]
fn what_a_killed_unpacking_left_is_removed_unless_one_goes_on() {
    let archive = tar_gz(&good_entries());
    let server = Server::start([Reply::file(&archive)]);
    let dir = temporary();
    let request = archive_request(&server, dir.path(), &archive);
    let staging = dir.path().join(".batches.aB3dE9");
    put(&staging.join("batches/one.bin"), b"a part");
    let not_ours = dir.path().join(".batches.notes1.txt");
    put(&not_ours, b"notes");
    put(&dir.path().join("batches.tar.gz"), &archive);

    let other = fs::File::open(dir.path().join("batches.tar.gz")).unwrap();
    other.lock_shared().unwrap();
    run(&request).0.unwrap();
    assert!(staging.exists(), "another process may be at it");
    other.unlock().unwrap();

    fs::remove_dir_all(dir.path().join("batches")).unwrap();
    let (result, events) = run(&request);
    result.unwrap();
    assert!(!staging.exists() && not_ours.exists());
    assert!(
        events
            .iter()
            .any(|event| event.starts_with("RemovedStaleFolder")),
        "{events:?}"
    );
    assert!(server.asked().is_empty());
}

/// Unpacks an archive of the good entries and `bad`, and returns what was wrong.
fn refusal(bad: Vec<Entry>, at_front: bool) -> ArchiveError {
    let mut entries = good_entries();
    let at = if at_front { 0 } else { entries.len() };
    entries.splice(at..at, bad);
    refusal_of(&tar_gz(&entries))
}

fn refusal_of(archive: &[u8]) -> ArchiveError {
    let server = Server::start([Reply::file(archive)]);
    let outer = temporary();
    let dir = outer.path().join("data");
    let error = run(&archive_request(&server, &dir, archive)).0.unwrap_err();
    assert_eq!(
        listing(outer.path()),
        ["data", "data/batches.tar.gz"],
        "after {}",
        message(&error)
    );
    match error {
        DownloadError::Archive { problem, .. } => problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn names_that_leave_the_folder_or_are_unknown_are_refused() {
    for name in [
        "../evil",
        "batches/../../evil",
        "batches/../one.bin",
        "/tmp/cifar-data-evil",
        "one.bin",
        "batches/sub/one.bin",
        "batches/three.bin",
        "batches\\one.bin",
        "",
    ] {
        for at_front in [true, false] {
            match refusal(vec![file(name, b"evil")], at_front) {
                ArchiveError::UnexpectedEntry { entry } => assert_eq!(entry, name),
                other => panic!("{name:?}: {other:?}"),
            }
        }
    }
    assert!(!Path::new("/tmp/cifar-data-evil").exists());
}

#[test]
fn a_name_that_comes_twice_is_refused() {
    let problem = refusal(vec![file("./batches/one.bin", &first())], true);
    assert!(
        matches!(problem, ArchiveError::UnexpectedEntry { .. }),
        "{problem:?}"
    );
}

#[test]
fn links_and_devices_are_refused() {
    for (kind, link) in [
        (EntryType::Symlink, "../../evil"),
        (EntryType::Link, "/etc/passwd"),
        (EntryType::Char, ""),
        (EntryType::Fifo, ""),
        (EntryType::Directory, ""),
    ] {
        let problem = refusal(vec![special("batches/one.bin", kind, link)], true);
        assert!(
            matches!(problem, ArchiveError::NotAPlainFile { .. }),
            "{kind:?}: {problem:?}"
        );
    }
}

#[test]
fn entries_of_another_size_are_refused() {
    for (name, size, limit) in [
        ("batches/one.bin", 3001, 3000),
        ("batches/one.bin", 10, 3000),
        ("batches/readme.html", 2 << 20, 1 << 20),
    ] {
        match refusal(vec![file(name, &vec![0; size])], true) {
            ArchiveError::WrongSize {
                found, expected, ..
            } => assert_eq!((found, expected), (size as u64, limit)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn an_entry_with_wrong_bytes_is_refused() {
    let mut entries = good_entries();
    entries[3].body[5] ^= 1;
    let problem = refusal_of(&tar_gz(&entries));
    assert!(
        matches!(&problem, ArchiveError::WrongBytes { entry, .. } if entry == "batches/two.bin"),
        "{problem:?}"
    );
}

#[test]
fn an_archive_without_a_file_names_it() {
    let mut entries = good_entries();
    entries.remove(1);
    let problem = refusal_of(&tar_gz(&entries));
    assert!(
        matches!(&problem, ArchiveError::Missing { entry } if entry == "batches/one.bin"),
        "{problem:?}"
    );
}

#[test]
fn a_damaged_archive_is_an_error() {
    let good = tar_gz(&good_entries());
    let mut flipped = good.clone();
    flipped[2000] ^= 0xff;
    for damaged in [
        &good[..good.len() / 2],
        &flipped,
        b"this is no gzip".as_slice(),
    ] {
        let problem = refusal_of(damaged);
        assert!(
            matches!(
                problem,
                ArchiveError::Unreadable(_) | ArchiveError::WrongBytes { .. }
            ),
            "{problem:?}"
        );
    }
}

#[test]
fn an_archive_that_unpacks_without_end_is_stopped() {
    // A long-name record of 64 MiB of zeros packs into a few kilobytes.
    let bomb = vec![Entry {
        name: "././@LongLink".into(),
        kind: EntryType::GNULongName,
        link: "",
        body: vec![0; 64 << 20],
    }];
    let problem = refusal(bomb, true);
    assert!(
        matches!(problem, ArchiveError::Unreadable(_)),
        "{problem:?}"
    );
}
