//! Which folders are recognised, and what is said of those that are not.

use std::path::Path;
use std::time::Instant;

use cifar_data::{
    Layout, Split, binary, find_layout, incomplete_layout, load, python_version, shapes,
};

fn write_binary_layout(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    let bytes = binary::encode(&shapes::generate(0, Split::Train, 2));
    for name in binary::TRAIN_FILES.iter().chain([&binary::TEST_FILE]) {
        std::fs::write(dir.join(name), &bytes).unwrap();
    }
}

fn error_of(dir: &Path) -> String {
    let text = load(dir).unwrap_err().to_string();
    text.replace(&dir.display().to_string(), "DIR")
}

#[test]
fn an_empty_folder_is_an_error_that_lists_every_layout() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(find_layout(dir.path()), None);
    assert_eq!(
        error_of(dir.path()),
        "no CIFAR-10 data in `DIR`
looked for:
  `DIR/cifar-10-batches-bin` with data_batch_1.bin to data_batch_5.bin and test_batch.bin
  `DIR` with data_batch_1.bin to data_batch_5.bin and test_batch.bin
  `DIR/plain_text/train-00000-of-00001.parquet` and `DIR/plain_text/test-00000-of-00001.parquet`
  `DIR/train-00000-of-00001.parquet` and `DIR/test-00000-of-00001.parquet`
  `DIR/plain_text/train/0000.parquet` and `DIR/plain_text/test/0000.parquet`
  `DIR/train/0000.parquet` and `DIR/test/0000.parquet`
found in `DIR`: nothing
`cifar_data::download` fetches and verifies the files"
    );
}

#[test]
fn a_folder_that_is_not_there_is_an_error_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let text = error_of(&dir.path().join("absent"));
    assert!(
        text.contains("found in `DIR`: it cannot be listed ("),
        "{text}"
    );
}

#[test]
fn an_incomplete_layout_is_an_error_that_names_the_missing_files_and_those_there() {
    let dir = tempfile::tempdir().unwrap();
    let batches = dir.path().join("cifar-10-batches-bin");
    write_binary_layout(&batches);
    std::fs::remove_file(batches.join("data_batch_3.bin")).unwrap();
    std::fs::write(dir.path().join("notes.txt"), "").unwrap();
    assert_eq!(find_layout(dir.path()), None);
    let incomplete = incomplete_layout(dir.path()).expect("some of its files are there");
    assert_eq!(incomplete.missing, [batches.join("data_batch_3.bin")]);
    let text = error_of(dir.path());
    let missing = "(incomplete: `DIR/cifar-10-batches-bin/data_batch_3.bin` is missing)";
    assert!(text.contains(missing), "{text}");
    let found = "found in `DIR`: cifar-10-batches-bin/, notes.txt";
    assert!(text.contains(found), "{text}");
}

#[test]
fn the_version_for_python_is_named_as_one_that_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let batches = dir.path().join("cifar-10-batches-py");
    std::fs::create_dir(&batches).unwrap();
    assert_eq!(python_version(dir.path()), None);
    for name in ["data_batch_1", "test_batch"] {
        std::fs::write(batches.join(name), "").unwrap();
    }
    for asked in [dir.path(), &batches] {
        assert_eq!(find_layout(asked), None);
        assert_eq!(python_version(asked).as_ref(), Some(&batches));
    }
    let text = error_of(dir.path());
    let named = "`DIR/cifar-10-batches-py` is the version for Python, whose pickles are not read";
    assert!(text.contains(named), "{text}");
}

#[test]
fn complete_binary_files_are_found_and_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let batches = dir.path().join("cifar-10-batches-bin");
    write_binary_layout(&batches);
    let layout = Layout::Binary {
        dir: batches.clone(),
    };
    assert_eq!(find_layout(dir.path()), Some(layout.clone()));
    assert_eq!(find_layout(&batches), Some(layout));
    let data = load(dir.path()).unwrap();
    assert_eq!((data.train.len(), data.test.len()), (10, 2));
}

#[test]
fn a_damaged_file_is_an_error_that_names_which_of_the_six() {
    let dir = tempfile::tempdir().unwrap();
    write_binary_layout(dir.path());
    let file = dir.path().join("data_batch_4.bin");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[binary::RECORD_BYTES] = 77;
    std::fs::write(&file, &bytes).unwrap();
    assert_eq!(
        error_of(dir.path()),
        "`DIR/data_batch_4.bin`, record 1: label byte 77, expected 0 to 9"
    );
    bytes.pop();
    std::fs::write(&file, &bytes).unwrap();
    assert!(error_of(dir.path()).starts_with("`DIR/data_batch_4.bin` has 6145 bytes"));
}

#[test]
fn the_whole_data_set_has_the_published_sizes() {
    let Some(dir) = std::env::var_os("CIFAR_DATA_DIR") else {
        test_support::skipped("CIFAR_DATA_DIR names no folder with CIFAR-10");
        return;
    };
    let start = Instant::now();
    let data = load(Path::new(&dir)).unwrap();
    println!("{} in {:.2} s", data.source, start.elapsed().as_secs_f64());
    assert_eq!(data.train.class_counts(), [5000; 10]);
    assert_eq!(data.test.class_counts(), [1000; 10]);
    let start = Instant::now();
    let print = data.train.fingerprint();
    println!(
        "fingerprint {print} in {:.2} s",
        start.elapsed().as_secs_f64()
    );
    // The mean of the published training set is 0.4914, 0.4822, 0.4465 of 255.
    for (channel, published) in [(0, 125.31), (1, 122.95), (2, 113.87)] {
        let mut sum = 0u64;
        for i in 0..data.train.len() {
            let plane = &data.train.image(i)[channel * 1024..][..1024];
            sum += plane.iter().map(|&x| u64::from(x)).sum::<u64>();
        }
        let mean = sum as f64 / (1024 * data.train.len()) as f64;
        assert!(
            (mean - published).abs() < 1.0,
            "channel {channel}: mean {mean}"
        );
    }
}
