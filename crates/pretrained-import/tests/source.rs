//! Finding weights, against servers and caches that have them and that do not. No request leaves 127.0.0.1.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pretrained_import::source::PublishedFile;
use pretrained_import::{FetchError, FetchOptions, FoundFile, Source};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use test_support::http::{Reply, Server};
use verified_download::hub::{HubFile, RepositoryKind};
use verified_download::{DownloadError, Network, Pin, Proxy, RemoteError, Size, Token};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Bytes that are no web page.
fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i * i / 7) as u8).collect()
}

fn sha256(content: &[u8]) -> String {
    let hash = Sha256::digest(content);
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Files below a folder of the test, and waits short enough for it.
fn options(cache: &TempDir, endpoint: &str) -> FetchOptions {
    let mut options = FetchOptions::new(cache.path());
    options.hub.endpoint = endpoint.to_owned();
    options.network = Network {
        attempts: 2,
        attempts_to_connect: 2,
        first_backoff: Duration::from_millis(1),
        longest_backoff: Duration::from_millis(2),
        proxy: Proxy::None,
        ..Network::default()
    };
    options
}

fn find(source: &str, options: &FetchOptions) -> Result<FoundFile, FetchError> {
    let source: Source = source.parse().expect("a source");
    source.find(options, &mut |_| {})
}

/// The whole message, as a program prints it.
fn message(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |error| error.source())
        .fold(error.to_string(), |text, error| format!("{text}: {error}"))
}

/// What the Hub says of a repository with these files.
fn info(files: &[&str]) -> Reply {
    let siblings: Vec<String> = files
        .iter()
        .map(|file| format!(r#"{{"rfilename":"{file}"}}"#))
        .collect();
    let body = format!(
        r#"{{"_id":"1","id":"owner/name","sha":"{COMMIT}","siblings":[{}]}}"#,
        siblings.join(",")
    );
    Reply::body(body.as_bytes()).header("Content-Type", "application/json")
}

/// What the Hub says of a large file, on the way to where it is.
fn stated(body: &[u8], location: &str) -> Reply {
    Reply::status(302, "")
        .header("X-Repo-Commit", COMMIT)
        .header("X-Linked-Etag", format!("\"{}\"", sha256(body)))
        .header("X-Linked-Size", body.len().to_string())
        .header("Location", location)
}

fn repository_folder(options: &FetchOptions) -> PathBuf {
    let cache = options.hub.cache.as_ref().expect("a cache");
    cache.join("models--owner--name")
}

fn put(path: &Path, content: &[u8]) {
    fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
    fs::write(path, content).expect("written");
}

fn torchvision(options: &mut FetchOptions, server: &Server, body: &[u8]) -> PathBuf {
    options.torchvision = PublishedFile {
        url: format!("{}/models/weights.pth", server.url()).into(),
        name: "weights.pth".into(),
        pin: Pin::Sha256 {
            size: Size::AtMost(1 << 20),
            sha256: sha256(body).into(),
        },
    };
    options.torch_checkpoints.join("weights.pth")
}

#[test]
fn torchvisions_weights_are_fetched_continued_and_then_found() {
    let (cache, body) = (TempDir::new().unwrap(), content(100_000));
    let server = Server::start([Reply::file(&body).dropped_after(60_000), Reply::file(&body)]);
    let mut options = options(&cache, "http://127.0.0.1:9");
    options.hub.token = Some(Token::new("hf_secret"));
    let path = torchvision(&mut options, &server, &body);
    let found = find("torchvision", &options).unwrap();
    assert_eq!(found.path, path);
    assert_eq!(fs::read(&path).unwrap(), body);
    assert_eq!(found.sha256, Some(sha256(&body)));
    assert_eq!(found.origin, options.torchvision.url);
    let asked = server.asked();
    assert_eq!(asked[1].header("range"), Some("bytes=60000-"));
    assert!(
        asked
            .iter()
            .all(|asked| asked.header("authorization").is_none())
    );

    options.hub.offline = true;
    assert_eq!(find("torchvision", &options).unwrap(), found);
    assert_eq!(server.asked().len(), 2);
}

#[test]
fn a_wrong_torchvision_file_of_pytorchs_is_replaced() {
    let (cache, body) = (TempDir::new().unwrap(), content(1000));
    let server = Server::start([Reply::file(&body)]);
    let mut options = options(&cache, "http://127.0.0.1:9");
    let path = torchvision(&mut options, &server, &body);
    put(&path, &body[..500]);
    find("torchvision", &options).unwrap();
    assert_eq!(fs::read(&path).unwrap(), body);
}

#[test]
fn torchvisions_weights_without_a_network_are_an_error_with_a_way_on() {
    let (cache, body) = (TempDir::new().unwrap(), content(10));
    let mut options = options(&cache, "http://127.0.0.1:9");
    let gone = Server::start([]);
    torchvision(&mut options, &gone, &body);
    drop(gone);
    let text = message(&find("torchvision", &options).unwrap_err());
    assert!(text.contains("weights.pth can be put into"), "{text}");
    assert!(
        text.contains("no answer from") && text.contains("refused"),
        "{text}"
    );

    options.hub.offline = true;
    let text = message(&find("torchvision", &options).unwrap_err());
    assert!(text.contains("HF_HUB_OFFLINE is set"), "{text}");
    assert_eq!(
        fs::read_dir(cache.path()).unwrap().count(),
        0,
        "nothing is left"
    );
}

#[test]
fn the_only_file_of_weights_is_fetched_verified_and_put_where_hub_tools_look() {
    let (cache, body) = (TempDir::new().unwrap(), content(100_000));
    let content_network =
        Server::start([Reply::file(&body).dropped_after(70_000), Reply::file(&body)]);
    let there = format!("{}/blob?signature=x", content_network.url());
    let hub = Server::start([
        info(&["README.md", "weights/googlenet.pth"]),
        stated(&body, &there),
        stated(&body, &there),
        stated(&body, &there),
    ]);
    let mut options = options(&cache, &hub.url());
    options.hub.token = Some(Token::new("hf_secret"));
    let found = find("owner/name", &options).unwrap();

    let folder = repository_folder(&options);
    assert_eq!(
        found.path,
        folder
            .join("snapshots")
            .join(COMMIT)
            .join("weights/googlenet.pth")
    );
    assert_eq!(fs::read(&found.path).unwrap(), body);
    assert_eq!(found.sha256, Some(sha256(&body)));
    assert!(
        found
            .origin
            .ends_with(&format!("/owner/name@{COMMIT}:weights/googlenet.pth")),
        "{}",
        found.origin
    );
    let asked = hub.asked();
    let lines: Vec<_> = asked
        .iter()
        .map(|asked| format!("{} {}", asked.method, asked.path))
        .collect();
    let address = format!("/owner/name/resolve/{COMMIT}/weights/googlenet.pth");
    assert_eq!(
        lines,
        [
            "GET /api/models/owner/name/revision/main".to_owned(),
            format!("HEAD {address}"),
            format!("GET {address}"),
            format!("GET {address}"),
        ]
    );
    assert!(
        asked
            .iter()
            .all(|asked| asked.header("authorization") == Some("Bearer hf_secret"))
    );
    assert!(
        content_network
            .asked()
            .iter()
            .all(|asked| asked.header("authorization").is_none())
    );
    assert_eq!(
        content_network.asked()[1].header("range"),
        Some("bytes=70000-")
    );

    // hf-hub finds it by branch and by commit.
    for revision in ["main", COMMIT] {
        let by_hf_hub = HubFile {
            kind: RepositoryKind::Model,
            repository: "owner/name".into(),
            revision: revision.into(),
            path: "weights/googlenet.pth".into(),
        };
        let cached = by_hf_hub.find_in_cache(options.hub.cache.as_ref().unwrap());
        assert_eq!(
            cached.unwrap().canonicalize().unwrap(),
            found.path.canonicalize().unwrap()
        );
    }
}

#[test]
fn a_cached_file_is_found_offline_and_when_the_hub_is_gone() {
    let (cache, body) = (TempDir::new().unwrap(), content(1000));
    let hub = Server::start([
        info(&["model.safetensors"]),
        stated(&body, "http://127.0.0.1:9/"),
        Reply::file(&body),
    ]);
    let mut options = options(&cache, &hub.url());
    let online = find("owner/name", &options).unwrap();
    drop(hub);

    let gone = find("owner/name", &options).unwrap();
    assert_eq!((&gone.path, &gone.sha256), (&online.path, &online.sha256));
    assert!(
        gone.origin.ends_with("could not be asked"),
        "{}",
        gone.origin
    );
    // A commit needs no question.
    let by_commit = format!("owner/name@{COMMIT}:model.safetensors");
    assert_eq!(find(&by_commit, &options).unwrap(), online);

    options.hub.offline = true;
    for source in [
        "owner/name",
        "owner/name@main:model.safetensors",
        &by_commit,
    ] {
        assert_eq!(find(source, &options).unwrap(), online, "{source}");
    }
    let error = find("owner/name:other.pth", &options).unwrap_err();
    assert!(matches!(error, FetchError::NotCached { .. }), "{error:?}");
    assert!(
        error.to_string().contains("HF_HUB_OFFLINE is set"),
        "{error}"
    );
    let error = find("owner/name@v2", &options).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("owner/name@v2 is not in the cache"),
        "{error}"
    );
}

#[test]
fn a_damaged_cached_file_is_never_used() {
    let (cache, body) = (TempDir::new().unwrap(), content(1000));
    let (known, file) = (info(&["model.safetensors"]), Reply::file(&body));
    let statement = stated(&body, "http://127.0.0.1:9/");
    let hub = Server::start([
        known.clone(),
        statement.clone(),
        file.clone(),
        known,
        statement,
        file,
    ]);
    let mut options = options(&cache, &hub.url());
    let path = find("owner/name", &options).unwrap().path;
    fs::write(&path, content(999)).unwrap();

    options.hub.offline = true;
    let error = find("owner/name", &options).unwrap_err();
    let FetchError::DamagedCache { path: damaged, .. } = &error else {
        panic!("{error:?}")
    };
    assert_eq!(*damaged, path.canonicalize().unwrap());
    options.hub.offline = false;
    find("owner/name", &options).unwrap();
    assert_eq!(fs::read(&path).unwrap(), body);
}

#[test]
fn a_small_file_is_verified_by_gits_hash() {
    let cache = TempDir::new().unwrap();
    let etag = "\"ce013625030ba8dba906f756967f9e9ca394464a\""; // git hash-object of "hello\n"
    let statement = Reply::body(b"hello\n").header("ETag", etag);
    for (body, is_right) in [(b"hallo\n", false), (b"hello\n", true)] {
        let hub = Server::start([info(&["tiny.bin"]), statement.clone(), Reply::body(body)]);
        let result = find("owner/name", &options(&cache, &hub.url()));
        match is_right {
            true => assert_eq!(result.unwrap().sha256, None),
            false => assert!(message(&result.unwrap_err()).contains("its git blob hash is")),
        }
    }
}

#[test]
fn bytes_that_are_not_those_the_hub_states_are_refused() {
    let (cache, body) = (TempDir::new().unwrap(), content(1000));
    let mut wrong = body.clone();
    wrong[0] ^= 1;
    let hub = Server::start([
        info(&["model.safetensors"]),
        stated(&body, "http://127.0.0.1:9/"),
        Reply::file(&wrong),
    ]);
    let options = options(&cache, &hub.url());
    let text = message(&find("owner/name", &options).unwrap_err());
    assert!(
        text.contains("did not deliver model.safetensors of owner/name at main")
            && text.contains("wrong bytes: its SHA-256 is"),
        "{text}"
    );
    assert!(!repository_folder(&options).join("snapshots").exists());
}

#[test]
fn a_hub_that_states_no_hash_is_not_believed() {
    let cache = TempDir::new().unwrap();
    let hub = Server::start([
        info(&["model.safetensors"]),
        Reply::body(&content(10)).header("ETag", "\"v1\""),
    ]);
    let error = find("owner/name", &options(&cache, &hub.url())).unwrap_err();
    assert!(
        matches!(&error, FetchError::Download(DownloadError::NotDelivered { cause, .. }) if matches!(**cause, RemoteError::NoHash { .. })),
        "{error:?}"
    );
}

#[test]
fn the_usual_name_is_preferred_and_otherwise_one_must_be_named() {
    let (cache, body) = (TempDir::new().unwrap(), content(100));
    let hub = Server::start([
        info(&["a.pth", "model.safetensors", "pytorch_model.bin"]),
        stated(&body, "http://127.0.0.1:9/"),
        Reply::file(&body),
        info(&["a.pth", "b.pth", "config.json"]),
        info(&["config.json"]),
        info(&["a.pth", "b.pth", "config.json"]),
    ]);
    let options = options(&cache, &hub.url());
    let found = find("owner/name", &options).unwrap();
    assert!(found.path.ends_with("model.safetensors"), "{found:?}");
    let error = find("owner/name", &options).unwrap_err().to_string();
    assert!(
        error.contains("2 files of weights: a.pth, b.pth. Name one as owner/name:FILE"),
        "{error}"
    );
    let error = find("owner/name", &options).unwrap_err().to_string();
    assert!(error.contains("0 files of weights: none"), "{error}");
    let error = find("owner/name:c.pth", &options).unwrap_err().to_string();
    assert_eq!(
        error,
        "owner/name at main has no file c.pth; its files of weights: a.pth, b.pth"
    );
}

#[test]
fn names_from_the_hub_do_not_steer_the_terminal() {
    let cache = TempDir::new().unwrap();
    // As JSON has them.
    let (two, one) = (["\\u001b[2J.pth", "b.pth"], ["\\u001b[2J.pth"]);
    let hub = Server::start([info(&two), info(&two), info(&one)]);
    let options = options(&cache, &hub.url());
    for (source, expected) in [
        ("owner/name", "2 files of weights: \\u{1b}[2J.pth, b.pth."),
        (
            "owner/name:c.pth",
            "its files of weights: \\u{1b}[2J.pth, b.pth",
        ),
        ("owner/name", "\"\\u{1b}[2J.pth\" cannot be the name"),
    ] {
        let error = find(source, &options).unwrap_err().to_string();
        assert!(error.contains(expected), "{source}: {error:?}");
    }
}

#[test]
fn what_does_not_exist_is_named() {
    let cache = TempDir::new().unwrap();
    let not_found = || Reply::status(404, r#"{"error":"not found"}"#);
    let hub = Server::start([
        not_found().header("X-Error-Code", "RevisionNotFound"),
        not_found().header("X-Error-Code", "RepoNotFound"),
        not_found(),
    ]);
    let options = options(&cache, &hub.url());
    let error = find("owner/name@v9", &options).unwrap_err();
    assert!(
        matches!(&error, FetchError::NoRevision { revision, .. } if revision == "v9"),
        "{error:?}"
    );
    for _ in 0..2 {
        let error = find("owner/name@v9", &options).unwrap_err().to_string();
        assert!(
            error.contains("no repository owner/name with a revision v9")
                && error.contains("HF_TOKEN"),
            "{error}"
        );
    }
    assert_eq!(hub.asked().len(), 3, "none of this is tried again");
}

#[test]
fn a_private_repository_asks_for_a_token() {
    for (status, code, token, hint) in [
        (
            401,
            "RepoNotFound",
            None,
            "does not exist, or it is private: then set HF_TOKEN",
        ),
        (
            401,
            "GatedRepo",
            None,
            "set HF_TOKEN to a token that may read it",
        ),
        (403, "GatedRepo", Some("hf_secret"), "lacks access"),
        (401, "", Some("hf_secret"), "is wrong, expired"),
    ] {
        let cache = TempDir::new().unwrap();
        let hub = Server::start([Reply::status(status, "no").header("X-Error-Code", code)]);
        let mut options = options(&cache, &hub.url());
        options.hub.token = token.map(Token::new);
        let error = find("owner/name", &options).unwrap_err().to_string();
        assert!(
            error.contains("refuses access to owner/name at main")
                && error.contains(&status.to_string())
                && error.contains(hint)
                && !error.contains("hf_secret"),
            "{error}"
        );
    }
    // The list may be public where the files are not.
    let cache = TempDir::new().unwrap();
    let hub = Server::start([info(&["a.pth"]), Reply::status(401, "")]);
    let text = message(&find("owner/name", &options(&cache, &hub.url())).unwrap_err());
    assert!(
        text.contains("a.pth of owner/name at main") && text.contains("set HF_TOKEN"),
        "{text}"
    );
}

#[test]
fn the_command_shows_the_hub_the_token_of_the_variable_or_else_of_the_login_if_it_may() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let body = fs::read(fixtures.join("legacy.pth")).unwrap();
    let home = TempDir::new().unwrap();
    put(&home.path().join("token"), b"hf_of_home\n");
    let stored = home.path().join("stored");
    put(&stored, b"hf_stored\n");
    let variable = ("HF_TOKEN", "hf_variable");
    let path = ("HF_TOKEN_PATH", stored.to_str().unwrap());
    let no_login = ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1");
    for (set, expected) in [
        (&[][..], Some("Bearer hf_of_home")),
        (&[path], Some("Bearer hf_stored")),
        (&[path, variable], Some("Bearer hf_variable")),
        (&[path, no_login], None),
        (&[variable, no_login], Some("Bearer hf_variable")),
    ] {
        let hub = Server::start([
            info(&["weights.pth"]),
            stated(&body, "http://content.network/blob"),
            Reply::file(&body),
        ]);
        let cache = TempDir::new().unwrap();
        let program = env!("CARGO_BIN_EXE_pretrained-import");
        let output = test_support::program(program, "owner/name --list")
            .env_remove("HF_HUB_OFFLINE")
            .env("NO_PROXY", "127.0.0.1")
            .env("HF_ENDPOINT", hub.url())
            .env("HF_HOME", home.path())
            .env("HF_HUB_CACHE", cache.path())
            .envs(set.iter().copied())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{set:?}: {said}");
        let asked = hub.asked();
        let tokens: Vec<_> = asked
            .iter()
            .map(|asked| asked.header("authorization"))
            .collect();
        assert_eq!(tokens, [expected; 3], "{set:?}");
    }
}

#[test]
fn a_hub_that_cannot_be_reached_is_an_error_that_says_so() {
    let cache = TempDir::new().unwrap();
    let gone = Server::start([]).url();
    let error = find("owner/name@v1", &options(&cache, &gone)).unwrap_err();
    let text = message(&error);
    assert!(
        text.starts_with(&format!("cannot ask {gone} for owner/name at v1"))
            && text.contains("refused")
            && text.matches(&gone).count() == 1,
        "{text}"
    );
    let text = message(&find("owner/name", &options(&cache, "huggingface.co")).unwrap_err());
    assert!(
        text.starts_with("HF_ENDPOINT is \"huggingface.co\""),
        "{text}"
    );
    assert_eq!(
        fs::read_dir(cache.path()).unwrap().count(),
        0,
        "nothing is left"
    );
}

#[test]
fn a_listing_cannot_lead_out_of_the_cache() {
    let cache = TempDir::new().unwrap();
    for name in ["../../../evil.pth", "/etc/evil.pth", "a/../../evil.bin"] {
        let hub = Server::start([info(&[name])]);
        let error = find("owner/name", &options(&cache, &hub.url())).unwrap_err();
        assert!(
            matches!(&error, FetchError::BadName { name: found } if found == name),
            "{error:?}"
        );
    }
    let source = Source::Hub {
        repository: "owner/name".into(),
        revision: Some("../../x".into()),
        file: None,
    };
    let error = source
        .find(&options(&cache, "http://127.0.0.1:9"), &mut |_| {})
        .unwrap_err();
    assert!(matches!(error, FetchError::BadName { .. }), "{error:?}");
}

#[test]
fn a_file_is_taken_as_it_is_and_must_be_one() {
    let cache = TempDir::new().unwrap();
    let file = cache.path().join("w.pth");
    fs::write(&file, "weights").unwrap();
    let options = options(&cache, "http://127.0.0.1:9");
    assert_eq!(
        find(&file.display().to_string(), &options).unwrap().path,
        file
    );
    let folder = Source::File(cache.path().to_path_buf());
    let error = folder.find(&options, &mut |_| {}).unwrap_err();
    assert!(matches!(error, FetchError::NoFile { .. }), "{error:?}");
}
