//! The command as a user meets it. Nothing here leaves this machine.

use std::fs;
use std::process::Command;
use std::time::Duration;

use assert_cmd::prelude::*;
use predicates::prelude::*;
use predicates::str::contains;
use test_support::free_port;

/// The command with an environment of its own: no proxy, no token, an empty Hub cache below `home`.
fn download_data(home: &tempfile::TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    for name in [
        "HF_TOKEN",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_ENDPOINT",
    ] {
        command.env_remove(name);
    }
    command
        .env("HF_HOME", home.path().join("hf"))
        .env("NO_PROXY", "127.0.0.1")
        .current_dir(home.path());
    command.arg("download-data");
    command
}

#[test]
fn without_a_server_it_fails_soon_names_the_other_source_and_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    assert_cmd::Command::from_std(download_data(&home))
        .env("HF_ENDPOINT", format!("http://127.0.0.1:{}", free_port()))
        .timeout(Duration::from_secs(30))
        .assert()
        .code(1)
        .stdout("")
        .stderr(
            contains("error: ")
                .and(contains("--source toronto"))
                .and(contains("refused")),
        );
    assert_eq!(
        fs::read_dir(home.path()).unwrap().count(),
        0,
        "no folder was created"
    );
}

#[cfg(unix)]
#[test]
fn a_signal_ends_a_download_with_130_and_says_how_it_goes_on() {
    use std::io::{BufRead, BufReader};
    use std::thread::sleep;
    use std::time::Instant;
    use test_support::http::{Reply, Server};
    let home = tempfile::tempdir().unwrap();
    let (release, released) = std::sync::mpsc::channel();
    let server = Server::start([Reply::body(&[0; 1000])
        .unannounced()
        .stalled_until(1000, released)]);
    let mut child = download_data(&home)
        .env("HF_ENDPOINT", server.url())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let begun = lines.find(|line| line.as_ref().unwrap().starts_with("fetching "));
    assert!(begun.is_some());
    let folder = home.path().join("data/plain_text");
    let deadline = Instant::now() + Duration::from_secs(60);
    let bytes = || {
        // The folder need not be there yet.
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        let files = entries.filter_map(|entry| entry.metadata().ok());
        files.map(|file| file.len()).sum::<u64>()
    };
    while bytes() < 1000 {
        assert!(
            Instant::now() < deadline,
            "no bytes in {}",
            folder.display()
        );
        sleep(Duration::from_millis(10));
    }
    let kill = Command::new("kill")
        .args(["-s", "INT", &child.id().to_string()])
        .status();
    assert!(kill.unwrap().success());
    // What waits for the next bytes goes on.
    drop(release);
    let said: Vec<String> = lines.map(Result::unwrap).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said:?}");
    let last = said.last().expect("a last line");
    assert!(
        last.contains("the next run continues from there"),
        "{said:?}"
    );
}

#[test]
fn offline_it_says_which_variable_forbids_the_request() {
    let home = tempfile::tempdir().unwrap();
    for source in ["hub", "toronto"] {
        download_data(&home)
            .env("HF_HUB_OFFLINE", "1")
            .args(["--source", source])
            .assert()
            .code(1)
            .stderr(contains("HF_HUB_OFFLINE is set"));
    }
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
}

#[test]
fn help_explains_both_sources_and_the_variables() {
    let home = tempfile::tempdir().unwrap();
    download_data(&home)
        .arg("--help")
        .assert()
        .success()
        .stdout(
            contains("--data-dir <DIR>")
                .and(contains("[default: data]"))
                .and(contains("toronto"))
                .and(contains("HF_ENDPOINT")),
        );
}

#[test]
fn an_unknown_source_is_refused_with_the_known_ones() {
    let home = tempfile::tempdir().unwrap();
    download_data(&home)
        .args(["--source", "moon"])
        .assert()
        .code(2)
        .stderr(contains("hub, toronto"));
}
