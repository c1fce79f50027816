//! The command, and how a state dict is held against the network.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use candle_core::{DType, Device, Tensor};
use inception_model::{GoogLeNet, GoogLeNetConfig};
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use pretrained_import::{
    AuxHeads, Ignored, MatchError, MatchOptions, StateDict, match_backbone, match_googlenet,
    write_safetensors,
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

fn import(arguments: &[&str]) -> Command {
    let path = env!("CARGO_BIN_EXE_pretrained-import");
    let mut command = Command::from_std(test_support::program(path, ""));
    command.args(arguments);
    command
}

#[cfg(target_os = "linux")]
#[test]
fn what_is_no_file_is_not_replaced_and_a_report_that_is_lost_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from.safetensors");
    write(&from, &googlenet(10, false));
    let pipe = dir.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    for to in [&pipe, dir.path()] {
        import(&[text(&from), "--out", text(to), "--force"])
            .assert()
            .failure()
            .stderr(contains(format!("{} is no file", text(to))));
    }
    assert!(!pipe.metadata().unwrap().is_file());
    let to = dir.path().join("to.safetensors");
    let listed_to = |stdout: std::process::Stdio| {
        test_support::program(env!("CARGO_BIN_EXE_pretrained-import"), "")
            .args([text(&from), "--out", text(&to), "--json", "--force"])
            .stdout(stdout)
            .stderr(std::process::Stdio::piped())
            .output()
            .unwrap()
    };
    let full = listed_to(std::fs::File::create("/dev/full").unwrap().into());
    assert_eq!(full.status.code(), Some(1));
    let said = String::from_utf8(full.stderr).unwrap();
    assert!(
        said.starts_with("error: cannot write to standard output: "),
        "{said}"
    );
    // A reader that has gone away, as `head` does.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let gone = listed_to(writer.into());
    assert!(gone.status.success(), "{gone:?}");
}

/// A state dict of the right shapes: each tensor filled with its place in the list.
fn googlenet(classes: usize, aux_heads: bool) -> Vec<(String, Tensor)> {
    let config = GoogLeNetConfig {
        num_classes: classes,
        aux_heads,
        ..GoogLeNetConfig::default()
    };
    GoogLeNet::state_dict_shapes(&config)
        .into_iter()
        .enumerate()
        .map(|(place, (name, shape, dtype))| {
            let tensor = Tensor::full(place as f32, shape, &Device::Cpu).unwrap();
            (name, tensor.to_dtype(dtype).unwrap())
        })
        .collect()
}

fn write(path: &Path, tensors: &[(String, Tensor)]) {
    write_safetensors(path, tensors, &BTreeMap::new(), false).unwrap();
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_file_is_imported_with_its_provenance_and_nothing_is_overwritten_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (
        dir.path().join("from.safetensors"),
        dir.path().join("a new/to.safetensors"),
    );
    let tensors = googlenet(10, true);
    write(&from, &tensors);
    import(&[text(&from), "--out", text(&to)])
        .assert()
        .success()
        .stdout(contains("364 loaded, 0 missing, 0 unexpected, 0 misshapen"))
        .stdout(contains("10 classes, with auxiliary heads"))
        .stdout(contains("input       not known whether it is converted"))
        .stdout(contains(format!(
            "cargo run -p finetune-full -- --weights '{}'\n",
            text(&to)
        )));
    let state = StateDict::read(&to).unwrap();
    assert_eq!(state.tensors.len(), 364);
    for (name, tensor) in &tensors {
        let found = &state.tensors[name];
        assert_eq!(found.dims(), tensor.dims(), "{name}");
        let first = |t: &Tensor| {
            t.to_dtype(DType::F64)?
                .flatten_all()?
                .get(0)?
                .to_scalar::<f64>()
        };
        assert_eq!(first(found).unwrap(), first(tensor).unwrap(), "{name}");
    }
    for (key, value) in [
        ("architecture", "googlenet-torchvision"),
        ("classes", "10"),
        ("source", text(&from)),
        ("source_format", "safetensors"),
        ("format", "pt"),
    ] {
        assert_eq!(state.metadata[key], value, "{key}");
    }
    assert!(!state.metadata.contains_key("transform_input"));
    assert_eq!(state.metadata["source_sha256"].len(), 64);
    let date: jiff::Timestamp = state.metadata["imported"].parse().unwrap();
    assert!(date <= jiff::Timestamp::now());

    let before = std::fs::read(&to).unwrap();
    import(&[text(&from), "--out", text(&to)])
        .assert()
        .failure()
        .stderr(contains("to.safetensors exists already"))
        .stderr(contains("--force"));
    assert_eq!(std::fs::read(&to).unwrap(), before);
    import(&[
        text(&from),
        "--out",
        text(&to),
        "--force",
        "--drop-aux",
        "--no-transform-input",
        "--json",
    ])
    .assert()
    .success()
    .stdout(contains("\"transform_input\": \"false\""));
    let again = dir.path().join("again.safetensors");
    import(&[text(&to), "--out", text(&again)])
        .assert()
        .success()
        .stdout(contains("(transform_input=false: the file says so)"));
    let kept = StateDict::read(&again).unwrap();
    assert_eq!(kept.transform_input(&again).unwrap(), Some(false));
    let state = StateDict::read(&to).unwrap();
    assert_eq!(state.tensors.len(), 344);
    assert!(!state.tensors.keys().any(|name| name.starts_with("aux")));
    let left: Vec<_> = std::fs::read_dir(to.parent().unwrap()).unwrap().collect();
    assert_eq!(left.len(), 1, "no temporary file stays");
}

#[test]
fn what_a_file_says_of_itself_is_kept_however_often_it_is_imported() {
    let dir = tempfile::tempdir().unwrap();
    let [from, once, twice] =
        ["from", "once", "twice"].map(|name| dir.path().join(name).with_extension("safetensors"));
    let said = [
        ("transform_input", "false"),
        ("image_size", "40"),
        ("class_names", "shapes"),
    ];
    let metadata = said.map(|(key, value)| (key.to_owned(), value.to_owned()));
    write_safetensors(&from, &googlenet(10, false), &metadata.into(), false).unwrap();
    for (from, to) in [(&from, &once), (&once, &twice)] {
        let imported = import(&[text(from), "--out", text(to)]).assert();
        imported.success();
        let metadata = StateDict::read(to).unwrap().metadata;
        for (key, value) in said {
            assert_eq!(metadata[key], value, "{key}");
        }
        assert_eq!(metadata["source"], text(from));
    }
}

#[test]
fn what_does_not_fit_is_listed_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (
        dir.path().join("from.safetensors"),
        dir.path().join("to.safetensors"),
    );
    let mut tensors = googlenet(5, false);
    tensors.retain(|(name, _)| name != "conv2.bn.bias");
    let (_, weight) = tensors
        .iter_mut()
        .find(|(name, _)| name == "conv3.conv.weight")
        .unwrap();
    *weight = Tensor::zeros((192, 64, 1, 1), DType::F32, &Device::Cpu).unwrap();
    tensors.push((
        "extra.weight".into(),
        Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap(),
    ));
    write(&from, &tensors);
    import(&[text(&from), "--out", text(&to)])
        .assert()
        .code(1)
        .stderr(contains("from.safetensors"))
        .stderr(contains("missing (1): conv2.bn.bias"))
        .stderr(contains("unexpected (1): extra.weight"))
        .stderr(contains(
            "conv3.conv.weight is [192, 64, 1, 1], expected [192, 64, 3, 3]",
        ));
    assert!(!to.exists());
    import(&[text(&from), "--out", text(&to), "--no-strict"])
        .assert()
        .success()
        .stdout(contains("342 loaded, 1 missing, 1 unexpected, 1 misshapen"))
        .stdout(contains("It is not whole").and(contains("Next:").not()));
    assert_eq!(StateDict::read(&to).unwrap().tensors.len(), 342);

    import(&[text(&from), "--out", text(&to), "--force", "--keep-aux"])
        .assert()
        .code(1)
        .stderr(contains("missing (21): "))
        .stderr(contains("aux1.conv.conv.weight"));
}

#[test]
fn a_conversion_that_cannot_be_read_is_refused_unless_a_flag_overrides_it() {
    let dir = tempfile::tempdir().unwrap();
    let [from, to] = ["from", "to"].map(|name| dir.path().join(name).with_extension("safetensors"));
    let said = BTreeMap::from([("transform_input".to_owned(), "nein".to_owned())]);
    write_safetensors(&from, &googlenet(10, false), &said, false).unwrap();
    let refused = import(&[text(&from), "--out", text(&to)]).assert().code(1);
    refused.stderr(
        contains("from.safetensors: transform_input is \"nein\" in its metadata")
            .and(contains("must be true or false"))
            .and(contains("--no-transform-input")),
    );
    assert!(!to.exists());
    let line = [text(&from), "--out", text(&to), "--no-transform-input"];
    import(&line).assert().success();
    let written = StateDict::read(&to).unwrap();
    assert_eq!(written.metadata["transform_input"], "false");
}

#[test]
fn names_from_a_file_do_not_steer_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let [headless, whole, other_type, to] = ["headless", "whole", "type", "to"]
        .map(|name| dir.path().join(name).with_extension("safetensors"));
    const NAME: &str = "\u{1b}]0;title\u{7}\u{1b}[2J\u{9b}2J\rfc";
    let tensor = |name: &str, shape: &[usize]| {
        let tensor = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        (name.to_owned(), tensor)
    };
    write(&headless, &[tensor(NAME, &[1])]);
    write(
        &whole,
        &[tensor(NAME, &[1]), tensor("fc.weight", &[3, 1024])],
    );
    // The library that reads the header quotes it.
    let header = r#"{"a":{"dtype":"\u001b[2J","shape":[0],"data_offsets":[0,0]}}"#;
    let len = (header.len() as u64).to_le_bytes();
    std::fs::write(&other_type, [&len, header.as_bytes()].concat()).unwrap();
    let imported = [text(&whole), "--out", text(&to)];
    for (line, shown) in [
        (&[text(&whole), "--list"][..], "]0;title"),
        (&[text(&whole), "--list", "--json"], "]0;title"),
        (&[text(&headless), "--out", text(&to)], "]0;title"),
        (&imported, "unexpected (1): \\u{1b}]0;title"),
        (&[&imported[..], &["--no-strict"]].concat(), "]0;title"),
        (&[text(&other_type), "--list"], "[2J"),
    ] {
        let run = import(line).assert();
        let output = run.get_output();
        let said = [&output.stdout[..], &output.stderr].concat();
        let said = String::from_utf8(said).unwrap();
        assert!(said.contains(shown), "{line:?}: {said}");
        // JSON is for programs, and has no byte of ASCII's control characters.
        let steers = |c: &char| match line.contains(&"--json") {
            true => c.is_ascii_control(),
            false => c.is_control(),
        };
        let steering = said.chars().find(|c| *c != '\n' && steers(c));
        assert_eq!(steering, None, "{line:?}: {said:?}");
    }
}

#[test]
fn a_cache_dir_holds_the_files_of_the_hub_too() {
    let dir = tempfile::tempdir().unwrap();
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let repository = dir.path().join("huggingface/hub/models--owner--name");
    std::fs::create_dir_all(repository.join("refs")).unwrap();
    std::fs::create_dir_all(repository.join("snapshots").join(commit)).unwrap();
    std::fs::write(repository.join("refs/main"), commit).unwrap();
    let file = repository
        .join("snapshots")
        .join(commit)
        .join("w.safetensors");
    write(&file, &googlenet(10, false));
    let offline = |arguments: &[&str]| {
        let mut command = import(arguments);
        command.env("HF_HUB_CACHE", dir.path().join("empty"));
        command.assert()
    };
    let source = "owner/name:w.safetensors";
    let line = [source, "--list", "--cache-dir", text(dir.path())];
    offline(&line).success().stdout(contains("fc.weight"));
    let elsewhere = offline(&["owner/name", "--list"]).code(1);
    elsewhere.stderr(contains("no such file or folder here").and(contains("HF_HUB_OFFLINE")));
}

#[test]
fn bad_input_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("to.safetensors");
    let not_a_folder = dir.path().join("file");
    std::fs::write(&not_a_folder, "x").unwrap();
    let inside = not_a_folder.join("to.safetensors");
    for (source, out, expected) in [
        ("absent.pth", &to, "owner/name[@revision][:file]"),
        (text(&fixture("hostile.pth")), &to, "is not run"),
        (text(&fixture("torchscript.pth")), &to, "TorchScript"),
        (text(&fixture("legacy.pth")), &to, "fc.weight"),
        (text(dir.path()), &to, "is not a file"),
        (text(&not_a_folder), &to, "holds no weights"),
        (text(&fixture("legacy.pth")), &inside, "fc.weight"),
    ] {
        // What the command line cannot mean ends with 2, as with other programs.
        let code = if source == "absent.pth" { 2 } else { 1 };
        let assert = import(&[source, "--out", text(out)]).assert().code(code);
        let stderr = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
        assert!(stderr.contains(expected), "{source}: {stderr}");
        assert!(!out.exists());
    }
}

#[test]
fn the_same_tensors_give_the_same_bytes_and_names_are_unique() {
    let dir = tempfile::tempdir().unwrap();
    let metadata: BTreeMap<_, _> = (0..20).map(|i| (i.to_string(), "x".into())).collect();
    let [first, second] = ["first", "second"].map(|name| dir.path().join(name));
    let mut tensors = googlenet(3, false);
    write_safetensors(&first, &tensors, &metadata, false).unwrap();
    tensors.reverse();
    write_safetensors(&second, &tensors, &metadata, false).unwrap();
    assert_eq!(
        std::fs::read(&first).unwrap(),
        std::fs::read(&second).unwrap()
    );

    let one = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
    for (names, expected) in [(["a", "a"], "taken"), (["a", "__metadata__"], "taken")] {
        let tensors = names.map(|name| (name.to_owned(), one.clone()));
        let error = write_safetensors(&second, &tensors, &metadata, true).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    let half = [("h".to_owned(), one.to_dtype(DType::F16).unwrap())];
    let error = write_safetensors(&second, &half, &metadata, true).unwrap_err();
    assert!(error.to_string().contains("f16"), "{error}");
    assert_eq!(
        std::fs::read(&first).unwrap(),
        std::fs::read(&second).unwrap(),
        "what was there is still there"
    );
}

#[test]
fn any_file_can_be_listed() {
    import(&[text(&fixture("legacy.pth")), "--list"])
        .assert()
        .success()
        .stdout(contains("half  f16 [3, 4]"))
        .stdout(contains("counter  i64 []"))
        .stdout(contains("18 tensors"))
        .stdout(contains("PyTorch legacy"));
}

#[test]
fn small_floats_become_f32_and_absent_counters_0_as_in_pytorch() {
    let mut tensors: BTreeMap<String, Tensor> = googlenet(3, false).into_iter().collect();
    tensors.retain(|name, _| !name.ends_with("num_batches_tracked"));
    for (name, dtype) in [
        ("fc.weight", DType::BF16),
        ("conv1.conv.weight", DType::F64),
    ] {
        let tensor = tensors[name].to_dtype(dtype).unwrap();
        tensors.insert(name.into(), tensor);
    }
    let state = StateDict {
        tensors,
        ignored: Ignored::default(),
        metadata: BTreeMap::new(),
        format: pretrained_import::Format::TorchZip,
    };
    let matched = match_googlenet(&state, MatchOptions::default()).unwrap();
    let report = matched.report;
    assert!(report.is_exact());
    assert_eq!(report.filled.len(), 57);
    let converted = BTreeMap::from([("bf16".to_owned(), 1), ("f64".to_owned(), 1)]);
    assert_eq!(report.converted, converted);
    assert_eq!(report.classes, 3);
    for (name, tensor) in &matched.tensors {
        let is_counter = name.ends_with("num_batches_tracked");
        let expected = if is_counter { DType::I64 } else { DType::F32 };
        assert_eq!(tensor.dtype(), expected, "{name}");
    }

    let mut headless = state;
    headless.tensors.remove("fc.weight");
    let error = match_googlenet(&headless, MatchOptions::default()).unwrap_err();
    assert!(matches!(*error, MatchError::NoHead { .. }));
}

#[test]
fn counters_of_one_dimension_are_scalars_as_in_pytorch() {
    let mut tensors: BTreeMap<String, Tensor> = googlenet(1, false).into_iter().collect();
    let name = "conv2.bn.num_batches_tracked";
    let count = tensors[name].to_scalar::<i64>().unwrap();
    for (name, tensor) in &mut tensors {
        if name.ends_with("num_batches_tracked") {
            *tensor = tensor.reshape(1).unwrap();
        }
    }
    let mut state = StateDict {
        tensors,
        ignored: Ignored::default(),
        metadata: BTreeMap::new(),
        format: pretrained_import::Format::TorchLegacy,
    };
    let matched = match_googlenet(&state, MatchOptions::default()).unwrap();
    let taken: BTreeMap<String, Tensor> = matched.tensors.into_iter().collect();
    assert_eq!(taken[name].to_scalar::<i64>().unwrap(), count);

    // Two values are none, and one value is no vector of one.
    let two = Tensor::zeros(2, DType::I64, &Device::Cpu).unwrap();
    state.tensors.insert(name.into(), two);
    let bias = "fc.bias";
    let scalar = Tensor::zeros((), DType::F32, &Device::Cpu).unwrap();
    state.tensors.insert(bias.into(), scalar);
    let error = match_googlenet(&state, MatchOptions::default()).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains(&format!("{name} is [2], expected []")),
        "{error}"
    );
    assert!(
        error.contains(&format!("{bias} is [], expected [1]")),
        "{error}"
    );
}

#[test]
fn a_backbone_is_matched_whatever_head_is_on_it() {
    let mut state = StateDict {
        tensors: googlenet(3, true).into_iter().collect(),
        ignored: Ignored::default(),
        metadata: BTreeMap::new(),
        format: pretrained_import::Format::TorchZip,
    };
    let names = |state: &StateDict, options| {
        let matched = match_backbone(state, options).unwrap().tensors.into_iter();
        matched.map(|(name, _)| name).collect::<Vec<_>>()
    };
    let with_aux = names(&state, MatchOptions::default());
    assert_eq!(with_aux.len(), 364 - 3 * 2);
    assert!(with_aux.contains(&"aux1.fc1.weight".to_owned()));
    let without = MatchOptions {
        aux_heads: AuxHeads::Drop,
        ..MatchOptions::default()
    };
    assert_eq!(names(&state, without).len(), 344 - 2);

    state.tensors.remove("fc.weight");
    let bias = state.tensors.remove("fc.bias").unwrap();
    state.tensors.insert("fc.1.bias".into(), bias.clone());
    assert_eq!(names(&state, MatchOptions::default()), with_aux);
    state.tensors.insert("head.bias".into(), bias);
    let error = match_backbone(&state, without).unwrap_err().to_string();
    assert!(error.contains("unexpected (1): head.bias"), "{error}");
}
