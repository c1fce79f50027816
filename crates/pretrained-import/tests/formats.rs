//! Files written by PyTorch (tools/pytorch/import_files.py), and what becomes of damaged and hostile ones.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use pretrained_import::{Format, ImportError, StateDict};
use proptest::prelude::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

fn expected() -> BTreeMap<String, Tensor> {
    let file = fixture("expected.safetensors");
    let tensors = candle_core::safetensors::load(file, &candle_core::Device::Cpu).unwrap();
    tensors.into_iter().collect()
}

/// Bits, so that nothing is equal by tolerance.
fn bits(tensor: &Tensor) -> Vec<u64> {
    let flat = tensor.flatten_all().unwrap();
    match tensor.dtype() {
        DType::F64 => flat
            .to_vec1::<f64>()
            .unwrap()
            .iter()
            .map(|v| v.to_bits())
            .collect(),
        DType::F32 => {
            let values = flat.to_vec1::<f32>().unwrap();
            values.iter().map(|v| u64::from(v.to_bits())).collect()
        }
        DType::I64 => flat
            .to_vec1::<i64>()
            .unwrap()
            .iter()
            .map(|&v| v as u64)
            .collect(),
        DType::U8 => flat
            .to_vec1::<u8>()
            .unwrap()
            .iter()
            .map(|&v| v.into())
            .collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_tensor_of_every_format_is_pytorchs_bit_by_bit() {
    let expected = expected();
    assert_eq!(expected.len(), 18);
    for (name, format) in [
        ("legacy.pth", Format::TorchLegacy),
        ("zip.pth", Format::TorchZip),
        ("protocol4.pth", Format::TorchZip),
        ("without_checksums.pth", Format::TorchZip),
        ("state_dict_legacy.pth", Format::TorchLegacy),
        ("wrapped_zip.pth", Format::TorchZip),
        ("wrapped_legacy.pth", Format::TorchLegacy),
        ("trainer_zip.pth", Format::TorchZip),
        ("trainer_protocol4.pth", Format::TorchZip),
        ("averaged.pth", Format::TorchZip),
        ("compiled.pth", Format::TorchZip),
        ("expected.safetensors", Format::Safetensors),
    ] {
        let state = StateDict::read(&fixture(name)).unwrap();
        assert_eq!(state.format, format, "{name}");
        let keys: Vec<_> = state.tensors.keys().collect();
        assert_eq!(keys, expected.keys().collect::<Vec<_>>(), "{name}");
        for (key, expected) in &expected {
            let found = &state.tensors[key];
            let is_small = matches!(found.dtype(), DType::F16 | DType::BF16);
            assert_eq!(
                is_small,
                matches!(key.as_str(), "half" | "bfloat16") && format != Format::Safetensors
            );
            // f32 holds every f16 and bf16.
            let dtype = if is_small { DType::F32 } else { found.dtype() };
            let found = found.to_dtype(dtype).unwrap();
            assert_eq!(found.dtype(), expected.dtype(), "{name}: {key}");
            assert_eq!(found.dims(), expected.dims(), "{name}: {key}");
            assert_eq!(bits(&found), bits(expected), "{name}: {key}");
        }
    }
}

#[test]
fn what_lies_beside_the_tensors_of_a_checkpoint_is_named_and_no_obstacle() {
    // Tensors of its own among them.
    let wrapped = ["epoch", "lr", "best", "name", "history", "optimizer"];
    let trainer = [
        "acc",
        "scheduler",
        "classes",
        "digest",
        "buffer",
        "dtype",
        "root",
    ];
    for (name, beside) in [
        ("wrapped_zip.pth", &wrapped[..]),
        ("trainer_zip.pth", &trainer),
        ("trainer_protocol4.pth", &trainer),
        ("averaged.pth", &["n_averaged"]),
    ] {
        let state = StateDict::read(&fixture(name)).unwrap();
        assert_eq!(state.tensors.len(), 18);
        for key in beside {
            assert!(state.ignored.keys.iter().any(|k| k == key), "{name}: {key}");
        }
    }
    let metadata = StateDict::read(&fixture("expected.safetensors"))
        .unwrap()
        .metadata;
    assert_eq!(metadata["script"], "tools/pytorch/import_files.py");
}

fn message(bytes: &[u8]) -> String {
    let error = StateDict::from_bytes(bytes, Path::new("weights.pth")).unwrap_err();
    // As programs print it: the error and what it comes from.
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// A legacy file around a pickled object, which a list of keys and storages may follow.
fn legacy(object: &[u8], rest: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".to_vec();
    bytes.extend(b"\x80\x02M\xe9\x03.");
    bytes.extend(b"\x80\x02}q\x00.");
    bytes.extend(object);
    bytes.extend(rest);
    bytes
}

/// The pickle of `{"w": tensor}`, where the tensor views a storage "0" of `len` f32.
fn one_tensor(len: i32, offset: i32, shape: &[i32], strides: &[i32]) -> Vec<u8> {
    let int = |value: i32| [&b"J"[..], &value.to_le_bytes()].concat();
    let tuple = |values: &[i32]| {
        let values: Vec<u8> = values.iter().flat_map(|&v| int(v)).collect();
        [&b"("[..], &values, b"t"].concat()
    };
    [
        &b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("[..],
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu",
        &int(len),
        b"NtQ",
        &int(offset),
        &tuple(shape),
        &tuple(strides),
        b"\x89}tRs.",
    ]
    .concat()
}

/// The list of the one key, and its storage.
fn one_storage(values: &[f32]) -> Vec<u8> {
    let mut bytes = b"\x80\x02]X\x01\x00\x00\x000a.".to_vec();
    bytes.extend((values.len() as u64).to_le_bytes());
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

#[test]
fn a_file_made_by_hand_reads_as_it_should_so_that_its_hostile_twins_mean_something() {
    let file = legacy(
        &one_tensor(4, 1, &[2, 1], &[2, 1]),
        &one_storage(&[1., 2., 3., 4.]),
    );
    let state = StateDict::from_bytes(&file, Path::new("x")).unwrap();
    assert_eq!(state.tensors["w"].to_vec2::<f32>().unwrap(), [[2.0], [4.0]]);
}

#[test]
fn a_tensor_with_the_negative_bit_is_refused_and_one_with_empty_metadata_read() {
    let with_metadata = |metadata: &[u8]| {
        let mut pickle = one_tensor(2, 0, &[2], &[1]);
        // Behind requires_grad and the hooks.
        pickle.splice(pickle.len() - 4..pickle.len() - 4, metadata.iter().copied());
        legacy(&pickle, &one_storage(&[1., 2.]))
    };
    for nothing in [&b"}"[..], b"N", b""] {
        let state = StateDict::from_bytes(&with_metadata(nothing), Path::new("x")).unwrap();
        assert_eq!(state.tensors["w"].to_vec1::<f32>().unwrap(), [1.0, 2.0]);
    }
    let found = message(&with_metadata(b"}X\x03\x00\x00\x00neg\x88s"));
    assert!(found.contains("resolve_neg()"), "{found}");
}

#[test]
fn hostile_and_damaged_files_are_errors_that_say_what_was_found() {
    let four = one_storage(&[1., 2., 3., 4.]);
    let tensor = |offset, shape: &[i32], strides: &[i32]| {
        legacy(&one_tensor(4, offset, shape, strides), &four)
    };
    let read = |name: &str| std::fs::read(fixture(name)).unwrap();
    let object = |pickle: &[u8]| legacy(&[b"\x80\x02", pickle].concat(), b"");
    let truncated = |name: &str, left: usize| read(name)[..left].to_vec();
    let whole = read("zip.pth");
    let mut wrong_crc = whole.clone();
    let weight = expected()["weight"].flatten_all().unwrap();
    let weight: Vec<u8> = weight.to_vec1::<f32>().unwrap()[..4]
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let first = whole.windows(16).position(|window| window == weight);
    wrong_crc[first.unwrap()] ^= 1;

    for (what, bytes, expected) in [
        ("empty", vec![], vec!["nothing (it is empty)"]),
        (
            "a web page",
            b"<!DOCTYPE html><html>".to_vec(),
            vec!["<!DOCTYPE html>", "safetensors"],
        ),
        ("noise", vec![1, 2, 3], vec!["the bytes 01 02 03"]),
        (
            "os.system",
            read("hostile.pth"),
            vec!["\"posix.system\"", "is not run", "state_dict()"],
        ),
        (
            "stack global",
            object(b"\x8c\x02os\x8c\x06system\x93."),
            vec!["\"os.system\""],
        ),
        (
            "eval",
            object(b"cbuiltins\neval\n."),
            vec!["\"builtins.eval\""],
        ),
        ("a program", read("torchscript.pth"), vec!["TorchScript"]),
        ("INST", object(b"(ios\nsystem\n."), vec!["opcode 0x69"]),
        ("NEWOBJ", object(b")\x81."), vec!["opcode 0x81"]),
        ("extension", object(b"\x82\x01."), vec!["opcode 0x82"]),
        (
            "a call of a tensor class",
            object(b"ctorch\nFloatStorage\n)R."),
            vec!["unexpected values"],
        ),
        ("protocol 0", object(b"\x80\x00."), vec!["protocol 0"]),
        ("empty stack", object(b"0."), vec!["empty stack"]),
        ("values below a mark", object(b"N(0."), vec!["empty stack"]),
        ("no mark", object(b"t."), vec!["a mark"]),
        ("memo", object(b"h\x05."), vec!["memo 5"]),
        (
            "items for a number",
            object(b"K\x01NNs."),
            vec!["a number", "a dictionary"],
        ),
        ("odd items", object(b"}(Nu."), vec!["without a value"]),
        (
            "endless text",
            object(b"X\xff\xff\xff\xffabc"),
            vec!["4294967295 bytes"],
        ),
        (
            "long text",
            object(b"X\x00\x00\x10\x00abc"),
            vec!["truncated"],
        ),
        ("bad text", object(b"X\x01\x00\x00\x00\xff."), vec!["UTF-8"]),
        (
            "persistent",
            object(b"K\x01Q."),
            vec!["other than a storage"],
        ),
        (
            "None",
            object(b"N."),
            vec![
                "no state dict",
                "None",
                "under \"state_dict\", \"model\", \"model_state_dict\", \"module\", \"net\", \"network\", \
                 \"model_state\" or \"weights\"",
            ],
        ),
        (
            "a call of an element type",
            object(b"ctorch\nfloat32\n)R."),
            vec!["Dtype of 0 unexpected values"],
        ),
        (
            "counts of a list",
            object(b"ccollections\nCounter\n]\x85R."),
            vec!["Counter of 1 unexpected values"],
        ),
        (
            "items of a set for a list",
            object(b"](N\x90."),
            vec!["a list", "a set"],
        ),
        (
            "empty dictionary",
            object(b"}."),
            vec!["an empty dictionary"],
        ),
        (
            "no tensors",
            object(b"}X\x03\x00\x00\x00lrsK\x01s."),
            vec!["without"],
        ),
        (
            "offset",
            tensor(3, &[2], &[1]),
            vec!["\"w\"", "[2]", "4 elements"],
        ),
        ("stride", tensor(0, &[2], &[4]), vec!["strides [4]"]),
        ("expanded", tensor(0, &[5], &[0]), vec!["does not fit"]),
        (
            "overflow",
            tensor(0, &[i32::MAX; 3], &[i32::MAX; 3]),
            vec!["does not fit"],
        ),
        (
            "empty and overflowing",
            tensor(0, &[0, i32::MAX, i32::MAX, i32::MAX], &[1; 4]),
            vec!["does not fit"],
        ),
        (
            "empty and overflowing safetensors",
            safetensors(
                r#"{"w":{"dtype":"F32","shape":[0,9999999999,9999999999],"data_offsets":[0,0]}}"#,
                b"",
            ),
            vec!["\"w\"", "9999999999"],
        ),
        (
            "safetensors of another type",
            safetensors(
                r#"{"w":{"dtype":"I16","shape":[1],"data_offsets":[0,2]}}"#,
                b"\0\0",
            ),
            vec!["\"w\"", "I16"],
        ),
        (
            "safetensors of another length",
            safetensors(
                r#"{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}"#,
                b"\0\0",
            ),
            vec!["safetensors file"],
        ),
        (
            "safetensors without tensors",
            safetensors(r#"{"__metadata__":{}}"#, b""),
            vec!["without tensors"],
        ),
        (
            "compressed pickle",
            with_method(&whole, 8),
            vec!["is damaged", "is compressed"],
        ),
        (
            "negative",
            tensor(0, &[-1], &[1]),
            vec!["storage, offset, shape"],
        ),
        (
            "ranks",
            tensor(0, &[1], &[]),
            vec!["1 dimensions and 0 strides"],
        ),
        (
            "storage larger than the file",
            legacy(
                &one_tensor(i32::MAX, 0, &[1], &[1]),
                &[
                    &b"\x80\x02]X\x01\x00\x00\x000a."[..],
                    &(i32::MAX as u64).to_le_bytes(),
                ]
                .concat(),
            ),
            vec!["larger than the file"],
        ),
        (
            "other length",
            legacy(&one_tensor(5, 0, &[1], &[1]), &four),
            vec!["has 4 elements", "say 5"],
        ),
        (
            "absent storage",
            legacy(&one_tensor(4, 0, &[1], &[1]), b"\x80\x02]."),
            vec!["\"w\"", "not in the file"],
        ),
        (
            "storage of nobody",
            legacy(b"\x80\x02}X\x01\x00\x00\x00wNs.", &four),
            vec!["no state dict"],
        ),
        (
            "truncated legacy",
            truncated("legacy.pth", 2_000),
            vec!["truncated"],
        ),
        (
            "truncated numbers",
            truncated("legacy.pth", read("legacy.pth").len() - 1),
            vec!["truncated"],
        ),
        (
            "truncated zip",
            truncated("zip.pth", whole.len() - 30),
            vec!["zip archive"],
        ),
        ("wrong checksum", wrong_crc, vec!["is damaged", "checksum"]),
        ("other zip", empty_zip(), vec!["data.pkl"]),
        (
            "safetensors",
            b"\xff\xff\xff\xff\xff\xff\xff\x7f{".to_vec(),
            vec!["safetensors file"],
        ),
        (
            "plain pickle",
            b"\x80\x02}.".to_vec(),
            vec!["a dictionary", "torch.save"],
        ),
    ] {
        let found = message(&bytes);
        assert!(found.contains("weights.pth"), "{what}: {found}");
        for expected in expected {
            assert!(
                found.to_lowercase().contains(&expected.to_lowercase()),
                "{what}: {found}"
            );
        }
    }
}

#[test]
fn wrappers_of_networks_leave_no_prefix_and_no_two_keys_become_one() {
    for (keys, expected, ignored) in [
        (&["module.a", "module.b"][..], &["a", "b"][..], &[][..]),
        (
            &["module._orig_mod.a", "module._orig_mod.b"],
            &["a", "b"],
            &[],
        ),
        (&["_orig_mod.module.a.module.b"], &["a.module.b"], &[]),
        (
            &["modules.a", "_orig_mod"],
            &["_orig_mod", "modules.a"],
            &[],
        ),
        // A part of the network that is called so.
        (&["a", "module.a"], &["a", "module.a"], &[]),
        (&["b", "module.a"], &["b", "module.a"], &[]),
        (
            &["_orig_mod.a", "module.a"],
            &["_orig_mod.a", "module.a"],
            &[],
        ),
        (&["module.a", "module.module.a"], &["a", "module.a"], &[]),
        (&["module."], &["module."], &[]),
        // Of an AveragedModel, and of whatever is called as its counter is.
        (&["module.a", "n_averaged"], &["a"], &["n_averaged"]),
        (
            &["_orig_mod.module.a", "_orig_mod.n_averaged"],
            &["a"],
            &["n_averaged"],
        ),
        (
            &["module.module.a", "module.n_averaged"],
            &["a"],
            &["n_averaged"],
        ),
        (&["a", "n_averaged"], &["a", "n_averaged"], &[]),
        (
            &["a", "module.b", "n_averaged"],
            &["a", "module.b", "n_averaged"],
            &[],
        ),
    ] {
        let tensor = r#"{"dtype":"F32","shape":[0],"data_offsets":[0,0]}"#;
        let entries: Vec<_> = keys
            .iter()
            .map(|key| format!("\"{key}\":{tensor}"))
            .collect();
        let file = safetensors(&format!("{{{}}}", entries.join(",")), b"");
        let state = StateDict::from_bytes(&file, Path::new("x")).unwrap();
        let found: Vec<_> = state.tensors.keys().collect();
        assert_eq!(found, expected, "{keys:?}");
        assert_eq!(state.ignored.keys, ignored, "{keys:?}");
    }
}

fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let len = (header.len() as u64).to_le_bytes();
    [&len, header.as_bytes(), data].concat()
}

/// A zip file whose entries claim another method of compression.
fn with_method(zip: &[u8], method: u8) -> Vec<u8> {
    let mut bytes = zip.to_vec();
    for at in 0..bytes.len() - 4 {
        match &bytes[at..at + 4] {
            b"PK\x03\x04" => bytes[at + 8] = method,
            b"PK\x01\x02" => bytes[at + 10] = method,
            _ => {}
        }
    }
    bytes
}

fn empty_zip() -> Vec<u8> {
    let mut bytes = b"PK\x05\x06".to_vec();
    bytes.resize(22, 0);
    // A local header first, by which the format is told.
    [&b"PK\x03\x04"[..], &[0; 26], &bytes].concat()
}

/// A zip archive of stored entries. Those named as another's place lie where that one does.
fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut bytes, mut directory) = (Vec::new(), Vec::new());
    let mut count = 0u16;
    for (names, data) in entries {
        let place = bytes.len() as u32;
        for (index, name) in names.split(' ').enumerate() {
            let crc = crc32(data).to_le_bytes();
            let len = (data.len() as u32).to_le_bytes();
            let name_len = (name.len() as u16).to_le_bytes();
            // Version, flags, method, time, date.
            let common = [
                &[20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0][..],
                &crc,
                &len,
                &len,
                &name_len,
            ]
            .concat();
            if index == 0 {
                bytes.extend([b"PK\x03\x04", &common[..], &[0; 2], name.as_bytes(), data].concat());
            }
            directory.extend([b"PK\x01\x02\x14\x00", &common[..], &[0; 12]].concat());
            directory.extend([&place.to_le_bytes()[..], name.as_bytes()].concat());
            count += 1;
        }
    }
    let start = (bytes.len() as u32).to_le_bytes();
    let len = (directory.len() as u32).to_le_bytes();
    let count = count.to_le_bytes();
    bytes.extend(directory);
    bytes.extend(
        [
            b"PK\x05\x06\0\0\0\0",
            &count[..],
            &count,
            &len,
            &start,
            &[0, 0],
        ]
        .concat(),
    );
    bytes
}

fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            if crc & 1 == 1 {
                crc >> 1 ^ 0xedb8_8320
            } else {
                crc >> 1
            }
        })
    })
}

#[test]
fn entries_of_a_zip_file_are_only_names() {
    let four: Vec<u8> = [1f32, 2., 3., 4.]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    let pickle = one_tensor(4, 1, &[2], &[2]);
    // No entry is ever a path of the disk, whatever it is called.
    for folder in ["a", "..", "C:"] {
        let [object, storage] = ["data.pkl", "data/0"].map(|name| format!("{folder}/{name}"));
        let file = zip(&[(&object, &pickle), (&storage, &four)]);
        let state = StateDict::from_bytes(&file, Path::new("x")).unwrap();
        assert_eq!(state.tensors["w"].to_vec1::<f32>().unwrap(), [2.0, 4.0]);
    }

    for (entries, expected) in [
        (
            &[("a/data.pkl", &pickle[..]), ("../data/0", &four)][..],
            "it lacks \"a/data/0\"",
        ),
        (
            &[("/a/data.pkl", &pickle), ("/a/data/0", &four)],
            "without one <name>/data.pkl",
        ),
        (
            &[("a/data.pkl b/data.pkl", &pickle), ("a/data/0", &four)],
            "without one <name>/data.pkl",
        ),
        (
            &[("a/data.pkl", &pickle), ("a/data/0", &four[..12])],
            "has 12 bytes",
        ),
        (
            &[
                ("a/data.pkl", &pickle),
                ("a/data/0", &four),
                ("a/byteorder", b"big"),
            ],
            "\"big\"",
        ),
    ] {
        let found = message(&zip(entries));
        assert!(found.contains(expected), "{expected}: {found}");
    }
}

#[test]
fn entries_of_a_zip_file_that_overlap_are_counted() {
    // Forty storages in the same 64 KiB, each with a tensor of one element.
    let one = one_tensor(16_384, 0, &[1], &[1]);
    let key = one.windows(6).position(|w| w == b"X\x01\0\0\x000").unwrap() + 5;
    let mut pickle = b"\x80\x02}".to_vec();
    let mut names = Vec::new();
    for index in 0..40u8 {
        let mut item = one.clone();
        (item[8], item[key]) = (b'0' + index, b'0' + index);
        pickle.extend(&item[3..item.len() - 2]);
        pickle.extend(b"s");
        names.push(format!("a/data/{}", char::from(item[key])));
    }
    pickle.extend(b".");
    let numbers = vec![0; 65_536];
    let found = message(&zip(&[
        ("a/data.pkl", &pickle),
        (&names.join(" "), &numbers),
    ]));
    assert!(found.contains("more bytes than the file"), "{found}");
}

#[test]
fn lists_given_again_and_again_are_counted() {
    // OrderedDict(list) of 100 pairs, over and over by the memo: 11 bytes for 200 values.
    let mut pickle = b"\x80\x02]q\x00(".to_vec();
    pickle.extend(b"NN\x86".repeat(100));
    pickle.extend(b"e");
    pickle.extend(b"ccollections\nOrderedDict\nq\x010");
    pickle.extend(b"h\x01h\x00\x85R".repeat(50_000));
    pickle.extend(b".");
    let found = message(&legacy(&pickle, b""));
    assert!(
        found.contains("more than") && found.contains("values"),
        "{found}"
    );
}

#[test]
fn one_shape_given_again_and_again_is_counted() {
    // A tensor of 60 dimensions by 5 bytes: call and arguments from the memo.
    let shape: Vec<i32> = vec![1; 60];
    let one = one_tensor(4, 0, &shape, &shape);
    // Up to the arguments, which the memo takes before the call.
    let mut pickle = one[..one.len() - 3].to_vec();
    let class = b"ctorch._utils\n_rebuild_tensor_v2\n";
    let at = pickle.windows(class.len()).position(|w| w == class);
    pickle.splice(at.unwrap()..at.unwrap() + class.len(), []);
    pickle.extend(b"q\x00");
    pickle.extend(class);
    pickle.extend(b"q\x01");
    pickle.extend(b"h\x01h\x00R0".repeat(100_000));
    let found = message(&legacy(&pickle, b""));
    assert!(found.contains("values"), "{found}");
}

#[test]
fn containers_without_end_are_counted() {
    for (opcode, count) in [(b']', 4_000_000), (b'N', 4_000_000), (b'(', 4_000_000)] {
        let mut pickle = b"\x80\x02".to_vec();
        pickle.resize(count, opcode);
        let found = message(&legacy(&pickle, b""));
        assert!(found.contains("values"), "{found}");
    }
}

#[test]
fn many_views_of_one_storage_are_bounded_by_the_file() {
    // Each tensor is a copy of the storage of 64 KiB.
    let one = one_tensor(16_384, 0, &[16_384], &[1]);
    let body = &one[3..one.len() - 2];
    let mut pickle = b"\x80\x02}".to_vec();
    for index in 0..50u8 {
        let mut item = body.to_vec();
        // The key's one letter.
        item[5] = b'0' + index;
        pickle.extend(item);
        pickle.extend(b"s");
    }
    pickle.extend(b".");
    let found = message(&legacy(&pickle, &one_storage(&vec![0.0; 16_384])));
    assert!(found.contains("more than eight times"), "{found}");
}

#[test]
fn a_state_dict_may_have_fewer_tensors_by_a_wrappers_name_beside_it() {
    let one = one_tensor(1, 0, &[1], &[1]);
    let item = |key: u8| {
        // Between the beginning, an empty dictionary's, and the end.
        let mut item = one[3..one.len() - 1].to_vec();
        item[5] = key;
        item
    };
    let items = |keys: &str| keys.bytes().flat_map(item).collect::<Vec<u8>>();
    for (beside, wrapped, expected) in [
        ("ab", "c", "ab"),
        ("a", "c", "c"),
        ("a", "cd", "cd"),
        ("", "c", "c"),
    ] {
        let pickle = [
            &b"\x80\x02}"[..],
            &items(beside),
            b"X\x07\0\0\0weights}",
            &items(wrapped),
            b"s.",
        ]
        .concat();
        let file = legacy(&pickle, &one_storage(&[1.]));
        let state = StateDict::from_bytes(&file, Path::new("x")).unwrap();
        let found: String = state.tensors.into_keys().collect();
        assert_eq!(found, expected, "{beside}, {wrapped}");
    }
}

#[test]
fn of_many_keys_without_a_tensor_the_first_are_kept_and_the_rest_counted() {
    let one = one_tensor(1, 0, &[1], &[1]);
    let mut pickle = one[..one.len() - 1].to_vec();
    for index in 0..1003 {
        pickle.extend(format!("X\x04\0\0\0{index:04}Ns").bytes());
    }
    pickle.extend(b".");
    let file = legacy(&pickle, &one_storage(&[1.]));
    let ignored = StateDict::from_bytes(&file, Path::new("x"))
        .unwrap()
        .ignored;
    assert_eq!((ignored.keys.len(), ignored.more), (1000, 3));
    assert_eq!((&*ignored.keys[0], &*ignored.keys[999]), ("0000", "0999"));
}

#[test]
fn a_safetensors_header_may_have_any_length_also_one_that_begins_as_a_pickle() {
    let fixture = std::fs::read(fixture("expected.safetensors")).unwrap();
    let (length, rest) = fixture.split_at(8);
    let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
    let (header, numbers) = rest.split_at(length);
    let expected = StateDict::from_bytes(&fixture, Path::new("a")).unwrap();
    // 0x80 begins a pickle, and the byte after it is the protocol.
    for version in 2..=5u64 {
        let padded = 0x80 + 0x100 * version + 0x10000;
        let mut bytes = padded.to_le_bytes().to_vec();
        bytes.extend_from_slice(header);
        bytes.resize(8 + padded as usize, b' ');
        bytes.extend_from_slice(numbers);
        let read = StateDict::from_bytes(&bytes, Path::new("b")).unwrap();
        assert_eq!(read.format, Format::Safetensors);
        assert!(read.tensors.keys().eq(expected.tensors.keys()));
    }
}

#[test]
fn a_missing_file_is_named() {
    let error = StateDict::read(Path::new("absent.pth")).unwrap_err();
    assert!(matches!(error, ImportError::Read { .. }));
    assert!(error.to_string().contains("absent.pth"));
}

const FIXTURES: [&str; 6] = [
    "legacy.pth",
    "zip.pth",
    "state_dict_legacy.pth",
    "wrapped_zip.pth",
    "trainer_protocol4.pth",
    "expected.safetensors",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damaged_files_neither_panic_nor_give_more_than_they_hold(
        file in 0..FIXTURES.len(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = std::fs::read(fixture(FIXTURES[file])).unwrap();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(state) = StateDict::from_bytes(&bytes, Path::new("x")) {
            let held: usize = state
                .tensors
                .values()
                .map(|t| t.elem_count() * t.dtype().size_in_bytes())
                .sum();
            // Integers are widened up to eightfold.
            prop_assert!(held <= 8 * 4 * bytes.len());
        }
    }

    #[test]
    fn noise_behind_a_true_beginning_never_panics(
        start in 0..4usize,
        noise in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let starts: [&[u8]; 4] = [b"", b"PK\x03\x04", &legacy(b"\x80\x02", b""), b"\x20\0\0\0\0\0\0\0{"];
        let bytes = [starts[start], &noise].concat();
        prop_assert!(StateDict::from_bytes(&bytes, Path::new("x")).is_err());
    }
}
