//! Any bytes through every reader: the format is chosen by their beginning.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use pretrained_import::StateDict;

fuzz_target!(|bytes: &[u8]| {
    let _ = StateDict::from_bytes(bytes, Path::new("input"));
});
