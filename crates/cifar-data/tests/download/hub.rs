use std::fs;

use cifar_data::download::{
    CIFAR10_HUB, CIFAR10_TORONTO, DownloadError, HubManifest, Manifest, Origin, Request, Source,
    Token,
};
use test_support::http::{Reply, Server};

use crate::{FILE, REVISION, content, listing, message, pinned, put, request, run, temporary};

#[test]
fn fetches_every_file_of_the_revision_and_leaves_nothing_else() {
    let (train, test) = (content(300_000), content(1000));
    let server = Server::start([Reply::file(&train), Reply::file(&test)]);
    let dir = temporary();
    let mut request = request(
        &format!("{}/", server.url()),
        &dir.path().join("not/there/yet"),
        &train,
    );
    let files = vec![
        pinned(FILE, &train),
        pinned("plain_text/test.parquet", &test),
    ];
    request.manifest = Manifest::Hub(HubManifest {
        repository: "uoft-cs/cifar10".into(),
        revision: REVISION.into(),
        files: files.into(),
    });
    let report = run(&request).0.expect("success");

    let paths: Vec<_> = server.asked().into_iter().map(|asked| asked.path).collect();
    let base = format!("/datasets/uoft-cs/cifar10/resolve/{REVISION}/plain_text");
    assert_eq!(
        paths,
        [
            format!("{base}/train.parquet"),
            format!("{base}/test.parquet")
        ]
    );
    assert_eq!(
        report.files[0].origin,
        Origin::Network { received: 300_000 }
    );
    assert_eq!(
        report.files[1].path,
        request.dir.join("plain_text/test.parquet")
    );
    assert_eq!(fs::read(&report.files[0].path).unwrap(), train);
    assert_eq!(fs::read(&report.files[1].path).unwrap(), test);
    assert_eq!(
        listing(&request.dir),
        [
            "plain_text",
            "plain_text/test.parquet",
            "plain_text/train.parquet"
        ]
    );
    assert!(server.asked()[0].header("authorization").is_none());
}

#[test]
fn a_refused_token_is_suspected() {
    let body = content(10);
    let server = Server::start([Reply::status(401, "Invalid credentials")]);
    let dir = temporary();
    let mut request = request(&server.url(), dir.path(), &body);
    request.hub.token = Some(Token::new("hf_secret"));
    let text = message(&run(&request).0.unwrap_err());
    assert!(
        text.contains("HF_TOKEN may be wrong") && !text.contains("hf_secret"),
        "{text}"
    );
}

#[test]
fn a_file_in_the_hub_cache_needs_no_network() {
    let body = content(1000);
    let (dir, cache) = (temporary(), temporary());
    put(
        &cache
            .path()
            .join("datasets--uoft-cs--cifar10/snapshots")
            .join(REVISION)
            .join(FILE),
        &body,
    );
    let server = Server::start([]);
    let mut request = request(&server.url(), dir.path(), &body);
    request.hub.cache = Some(cache.path().to_path_buf());
    request.hub.offline = true;
    let report = run(&request).0.unwrap();
    assert_eq!(report.files[0].origin, Origin::HubCache);
    assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), body);
    assert_eq!(listing(dir.path()), ["plain_text", FILE]);
    assert!(server.asked().is_empty());
}

#[test]
fn a_wrong_file_in_the_hub_cache_is_fetched_instead_and_left_alone() {
    let body = content(1000);
    let (dir, cache) = (temporary(), temporary());
    let cached = cache
        .path()
        .join("datasets--uoft-cs--cifar10/snapshots")
        .join(REVISION)
        .join(FILE);
    put(&cached, &[7; 1000]);
    let server = Server::start([Reply::file(&body)]);
    let mut request = request(&server.url(), dir.path(), &body);
    request.hub.cache = Some(cache.path().to_path_buf());
    let (result, events) = run(&request);
    assert_eq!(
        result.unwrap().files[0].origin,
        Origin::Network { received: 1000 }
    );
    assert!(
        events.iter().any(|event| event.starts_with("CacheIsWrong")),
        "{events:?}"
    );
    assert_eq!(fs::read(cached).unwrap(), [7; 1000]);
}

#[test]
fn an_endpoint_that_is_no_address_is_refused() {
    for endpoint in [
        "",
        "huggingface.co",
        "ftp://huggingface.co",
        "http://",
        "http:///",
        "https://a/?b",
    ] {
        let dir = temporary();
        let error = run(&request(endpoint, dir.path(), &content(10)))
            .0
            .unwrap_err();
        assert!(
            matches!(
                &error,
                DownloadError::File(verified_download::DownloadError::BadAddress { .. })
            ),
            "{endpoint:?}: {error:?}"
        );
    }
}

#[test]
fn the_pinned_manifests_are_whole() {
    let Manifest::Hub(hub) = Source::Hub.manifest() else {
        panic!()
    };
    assert_eq!((&hub, hub.revision.len()), (&CIFAR10_HUB, 40));
    assert_eq!(
        hub.files.iter().map(|file| file.bytes).sum::<u64>(),
        143_646_105
    );
    let Manifest::Archive(toronto) = Source::Toronto.manifest() else {
        panic!()
    };
    assert_eq!(toronto, CIFAR10_TORONTO);
    assert!(
        toronto.members.iter().all(|file| file.bytes == 30_730_000) && toronto.members.len() == 6
    );
    let mut hashes: Vec<_> = hub
        .files
        .iter()
        .chain(toronto.members.iter())
        .map(|file| &file.sha256)
        .collect();
    assert!(hashes.iter().all(
        |hash| hash.len() == 64 && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    ));
    hashes.sort();
    hashes.dedup();
    assert_eq!(hashes.len(), 8);
    assert_eq!(
        Request::new(Source::Hub, "data").hub.endpoint,
        "https://huggingface.co"
    );
}

#[test]
fn a_failure_says_what_the_program_knows_of_other_ways() {
    let body = content(1000);
    let server = Server::start([Reply::status(404, "Entry not found")]);
    let dir = temporary();
    let mut request = request(&server.url(), dir.path(), &body);
    request.hints.not_delivered = "not delivered; try --source toronto".into();
    let error = run(&request).0.unwrap_err();
    let text = message(&error);
    assert!(text.contains("404 Not Found: Entry not found"), "{text}");
    assert!(text.contains("try --source toronto"), "{text}");
}

#[test]
fn offline_names_the_variable_that_forbids_the_network() {
    let body = content(1000);
    let server = Server::start([Reply::file(&body)]);
    let dir = temporary();
    let mut request = request(&server.url(), dir.path(), &body);
    request.hub.offline = true;
    let error = run(&request).0.unwrap_err();
    assert!(
        matches!(
            &error,
            DownloadError::File(verified_download::DownloadError::Offline { .. })
        ) && error.to_string().contains("HF_HUB_OFFLINE"),
        "{error}"
    );
}
