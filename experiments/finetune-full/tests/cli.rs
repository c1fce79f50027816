//! The program as its users meet it: a few steps of a few drawn pictures.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use candle_core::{DType, Device, Tensor};
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use test_support::http::{Reply, Server};

const TINY: &str = "--dataset shapes --train-limit 8 --test-limit 4 --max-steps 2 --batch-size 4";

fn program(arguments: &str) -> Command {
    let path = env!("CARGO_BIN_EXE_finetune-full");
    Command::from_std(test_support::program(path, arguments))
}

fn tiny(more: &str, out: &Path) -> Command {
    let mut command = program(&format!("{TINY} {more}"));
    command.arg("--out").arg(out);
    command
}

fn run_directory(out: &Path) -> PathBuf {
    test_support::only_run(out, "finetune-full")
}

struct Weights {
    metadata: BTreeMap<String, String>,
    /// Shape and bytes.
    tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)>,
}

fn weights(file: &Path) -> Weights {
    let bytes = fs::read(file).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    Weights {
        metadata: header.metadata().clone().into_iter().flatten().collect(),
        tensors: tensors
            .into_iter()
            .map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec())))
            .collect(),
    }
}

fn finished(more: &str) -> (tempfile::TempDir, Weights) {
    let out = tempfile::tempdir().unwrap();
    tiny(more, out.path()).assert().success();
    let weights = weights(&run_directory(out.path()).join("model.safetensors"));
    (out, weights)
}

#[test]
fn a_run_leaves_torchvisions_state_dict_with_moved_statistics_and_says_what_it_is() {
    let (_out, weights) = finished("--weights random");
    let said = |key: &str| weights.metadata[key].as_str();
    assert_eq!(said("architecture"), "googlenet-torchvision");
    assert_eq!((said("classes"), said("class_names")), ("10", "shapes"));
    assert_eq!(
        (said("transform_input"), said("image_size")),
        ("true", "32")
    );
    // 57 convolutions with five tensors of batch norm each, and the head.
    assert_eq!(weights.tensors.len(), 57 * 6 + 2);
    assert_eq!(weights.tensors["fc.weight"].0, [10, 1024]);
    let (shape, counted) = &weights.tensors["inception3a.branch2.1.bn.num_batches_tracked"];
    assert!(shape.is_empty());
    assert_eq!(counted[..], 2i64.to_le_bytes());
}

#[test]
fn a_run_killed_and_resumed_ends_with_the_bits_of_one_never_stopped() {
    let line = "--dataset shapes --train-limit 8 --test-limit 2 --epochs 2 --batch-size 4 --aux \
                --weights random --checkpoint-every 1";
    let whole = tempfile::tempdir().unwrap();
    program(line)
        .arg("--out")
        .arg(whole.path())
        .assert()
        .success();
    let whole = run_directory(whole.path());
    let stopped = tempfile::tempdir().unwrap();
    program(line)
        .arg("--out")
        .arg(stopped.path())
        .assert()
        .success();
    let run = run_directory(stopped.path());
    // What a process leaves that is killed after its third step.
    for file in [
        "finished.json",
        "model.safetensors",
        "checkpoints/step-0000004",
    ] {
        let path = run.join(file);
        fs::remove_file(&path)
            .or_else(|_| fs::remove_dir_all(&path))
            .unwrap();
    }
    assert!(run.join("checkpoints/step-0000003").is_dir());
    program("").arg("--resume").arg(&run).assert().success();
    for file in ["model.safetensors", "metrics.jsonl"] {
        let [a, b] = [&whole, &run].map(|run| fs::read(run.join(file)).unwrap());
        assert!(a == b, "{file} differs");
    }
    program("")
        .arg("--resume")
        .arg(&run)
        .assert()
        .success()
        .stdout(contains("finished already"));
    let mut other = program("--aux");
    other.arg("--resume").arg(&run).assert().failure();
}

#[test]
fn a_run_resumed_before_its_first_checkpoint_begins_with_its_weights_again_or_not_at_all() {
    let (first_out, first) = finished("--weights random");
    let file = first_out.path().join("begin.safetensors");
    let model = run_directory(first_out.path()).join("model.safetensors");
    fs::copy(&model, &file).unwrap();
    for flag in ["--weights", "--init"] {
        let (out, expected) = finished(&format!("{flag} {} --lr 0 --seed 7", file.display()));
        let run = run_directory(out.path());
        // What a process leaves that is killed within its first step.
        for name in ["finished.json", "model.safetensors"] {
            fs::remove_file(run.join(name)).unwrap();
        }
        fs::remove_dir_all(run.join("checkpoints")).unwrap();
        fs::write(run.join("metrics.jsonl"), "").unwrap();
        let resume = || {
            let mut command = program("");
            command.arg("--resume").arg(&run);
            command.assert()
        };
        fs::write(&file, "other weights").unwrap();
        let refused = resume().code(1);
        let reason = "begin.safetensors is no longer the file that the run began with";
        refused.stderr(contains(reason));

        fs::copy(&model, &file).unwrap();
        let begun = resume().success();
        begun.stderr(contains(
            "no checkpoint had been saved: the run begins again",
        ));
        let resumed = weights(&run.join("model.safetensors"));
        assert!(resumed.tensors == expected.tensors, "{flag}");
        let name = "inception3a.branch1.conv.weight";
        assert_eq!(resumed.tensors[name], first.tensors[name]);
    }
}

#[test]
fn weights_bring_a_backbone_under_a_fresh_head_and_init_the_whole_state() {
    let (first_out, first) = finished("--weights random");
    let first_run = run_directory(first_out.path());
    let second = |flag: &str| {
        let file = match flag {
            "--init" => first_run.clone(),
            _ => first_run.join("model.safetensors"),
        };
        finished(&format!("{flag} {} --lr 0 --seed 7", file.display())).1
    };
    let (backbone, state) = (second("--weights"), second("--init"));
    for name in ["conv1.conv.weight", "inception5b.branch4.1.bn.bias"] {
        assert_eq!(backbone.tensors[name], first.tensors[name], "{name}");
        assert_eq!(state.tensors[name], first.tensors[name], "{name}");
    }
    assert_ne!(backbone.tensors["fc.weight"], first.tensors["fc.weight"]);
    assert_eq!(state.tensors["fc.weight"], first.tensors["fc.weight"]);
    let name = "conv1.bn.num_batches_tracked";
    assert_eq!(state.tensors[name].1[..], 4i64.to_le_bytes());
}

#[test]
fn auxiliary_heads_train_and_are_neither_lost_nor_invented() {
    let (out, with_aux) = finished("--weights random --aux");
    let (_out, without) = finished("--weights random");
    assert_eq!(with_aux.tensors["aux2.fc2.weight"].0, [10, 1024]);
    // Their gradient reaches the backbone, whose initial weights are the same.
    let first = "inception4a.branch1.conv.weight";
    assert_ne!(with_aux.tensors[first].1, without.tensors[first].1);
    let run = run_directory(out.path()).display().to_string();
    let elsewhere = tempfile::tempdir().unwrap();
    let refused = |line: &str, expected: &str| {
        let assert = tiny(line, elsewhere.path()).assert().failure();
        assert.stderr(contains(expected).and(contains("panicked").not()));
    };
    refused(&format!("--init {run}"), "add --aux");
    // A backbone may come from a network with heads.
    tiny(&format!("--weights {run}"), elsewhere.path())
        .assert()
        .success();
    let plain = run_directory(elsewhere.path()).display().to_string();
    refused(&format!("--aux --init {plain}"), "no auxiliary heads");
    refused(&format!("--aux --weights {plain}"), "no auxiliary heads");
}

#[test]
fn pictures_of_another_size_are_trained_on_and_recorded() {
    let (_out, weights) = finished("--weights random --image-size 40");
    assert_eq!(weights.metadata["image_size"], "40");
}

#[test]
fn what_weights_say_of_their_input_is_how_they_are_used() {
    let (first_out, _) = finished("--weights random");
    let bytes = fs::read(run_directory(first_out.path()).join("model.safetensors")).unwrap();
    let saying = |name: &str, metadata: &[(&str, &str)]| {
        let file = first_out.path().join(name);
        let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
        let metadata = metadata.iter().map(|(k, v)| (k.to_string(), v.to_string()));
        safetensors::serialize_to_file(tensors, Some(metadata.collect()), &file).unwrap();
        file.display().to_string()
    };
    let others = [("image_size", "40"), ("class_names", "cifar10")];
    let [converts, does_not] = ["true", "false"].map(|said| {
        let metadata = [&others[..], &[("transform_input", said)]].concat();
        saying(said, &metadata)
    });
    let says_nothing = saying("nothing", &[]);

    const ASSUMED: &str = "do not say whether the network converts its input";
    const OTHER_CLASSES: &str = "knows the classes of cifar10";
    let cases = [
        (format!("--init {does_not}"), ["false", "40"], OTHER_CLASSES),
        (
            format!("--init {does_not} --image-size 32"),
            ["false", "32"],
            OTHER_CLASSES,
        ),
        (
            format!("--init {converts} --image-size 32"),
            ["true", "32"],
            OTHER_CLASSES,
        ),
        (format!("--init {says_nothing}"), ["true", "32"], ASSUMED),
        // Under a fresh head classes and size are free.
        (format!("--weights {does_not}"), ["false", "32"], ""),
    ];
    let losses = cases.map(|(line, [transform_input, image_size], told)| {
        let out = tempfile::tempdir().unwrap();
        let begun = tiny(&line, out.path()).assert().success();
        let said = String::from_utf8_lossy(&begun.get_output().stdout);
        for sentence in [ASSUMED, OTHER_CLASSES] {
            assert_eq!(said.contains(sentence), sentence == told, "{line}: {said}");
        }
        let run = run_directory(out.path());
        let config = fs::read_to_string(run.join("config.json")).unwrap();
        let metadata = weights(&run.join("model.safetensors")).metadata;
        for (key, value) in [
            ("transform_input", transform_input),
            ("image_size", image_size),
        ] {
            let setting = format!("\"{key}\": {value}");
            assert!(config.contains(&setting), "{line}: {config}");
            assert_eq!(metadata[key], value, "{line}");
        }
        assert_eq!(metadata["class_names"], "shapes");
        test_support::step_losses(out.path(), "finetune-full")[0]
    });
    let [large, small, converted, unsaid, _] = losses;
    assert_ne!(large, small);
    assert_ne!(small, converted);
    assert_eq!(converted, unsaid);
}

#[test]
fn what_weights_say_of_their_input_and_cannot_mean_is_refused_before_a_run_begins() {
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("weights.safetensors");
    let sizes = ["0", "14", "1025", "100000", "4611686018427387904", "abc"];
    let cases = sizes.map(|size| ("image_size", size, "15, the smallest"));
    let conversion = ("transform_input", "nein", "it must be true or false");
    for (key, said, expected) in cases.into_iter().chain([conversion]) {
        let head = Tensor::zeros((10, 1024), DType::F32, &Device::Cpu).unwrap();
        let metadata = [(key.to_string(), said.to_string())].into();
        safetensors::serialize_to_file([("fc.weight", head)], Some(metadata), &file).unwrap();
        let init = format!("--init {}", file.display());
        let refused = tiny(&init, out.path()).assert().code(1);
        let named = format!("weights.safetensors: {key} is {said:?} in its metadata");
        refused.stderr(contains(named).and(contains(expected)));
        assert_eq!(test_support::run_begun(out.path(), "finetune-full"), None);
        if key == "image_size" {
            let line = format!("{init} --image-size 32");
            let goes_on = tiny(&line, out.path()).assert().code(1);
            goes_on.stderr(contains("missing (").and(contains(key).not()));
        }
    }
}

#[test]
fn weights_that_do_not_fit_are_refused_with_every_difference() {
    let (out, _) = finished("--weights random");
    let file = run_directory(out.path()).join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let safetensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut changed: BTreeMap<String, TensorView<'_>> = safetensors.tensors().into_iter().collect();
    let conv = changed.remove("conv2.conv.weight").unwrap();
    changed.insert("conv9.conv.weight".into(), conv);
    let other = out.path().join("other.safetensors");
    safetensors::serialize_to_file(changed, None, &other).unwrap();
    tiny(&format!("--weights {}", other.display()), out.path())
        .assert()
        .failure()
        .stderr(
            contains("missing (1): conv2.conv.weight")
                .and(contains("unexpected (1): conv9.conv.weight"))
                .and(contains("other.safetensors")),
        );

    let head = vec![0u8; 4 * 1024];
    let head = TensorView::new(safetensors::Dtype::F32, vec![1, 1024], &head).unwrap();
    let mut changed: BTreeMap<String, TensorView<'_>> = safetensors.tensors().into_iter().collect();
    changed.insert("fc.weight".into(), head);
    safetensors::serialize_to_file(changed, None, &other).unwrap();
    let line = format!("--init {}", other.display());
    let refused = tiny(&line, out.path()).assert().failure();
    refused.stderr(contains("head of 1 classes").and(contains("--weights")));

    let metadata = [("architecture".to_string(), "googlenet-cifar".to_string())];
    let metadata = Some(metadata.into_iter().collect());
    let tensors: BTreeMap<String, TensorView<'_>> = safetensors.tensors().into_iter().collect();
    safetensors::serialize_to_file(tensors, metadata, &other).unwrap();
    let refused = tiny(&line, out.path()).assert().failure();
    refused.stderr(contains("is a googlenet-cifar"));

    fs::write(&other, &bytes[..1000]).unwrap();
    let refused = tiny(&line, out.path()).assert().failure();
    refused.stderr(contains("other.safetensors"));
}

#[test]
fn without_network_the_error_names_the_ways_on() {
    let out = tempfile::tempdir().unwrap();
    for weights in ["", "--weights owner/name"] {
        let mut refused = tiny(weights, out.path());
        refused
            .current_dir(out.path())
            .assert()
            .code(1)
            .stdout("")
            .stderr(
                contains("--weights FILE")
                    .and(contains("--weights random"))
                    .and(contains("HF_HUB_OFFLINE is set")),
            );
    }
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
}

#[test]
fn weights_come_from_a_pth_file_of_half_precision() {
    let (first_out, _) = finished("--weights random");
    let first = run_directory(first_out.path()).join("model.safetensors");
    let tensors = candle_core::safetensors::load(&first, &Device::Cpu).unwrap();
    let half = tensors.into_iter().map(|(name, tensor)| {
        let half = match tensor.dtype() {
            DType::F32 => tensor.to_dtype(DType::F16).unwrap(),
            _ => tensor,
        };
        (name, half)
    });
    let half: BTreeMap<String, Tensor> = half.collect();
    let file = first_out.path().join("googlenet.pth");
    fs::write(&file, test_support::legacy_pth(&half).unwrap()).unwrap();

    let (out, trained) = finished(&format!("--weights {} --lr 0", file.display()));
    let name = "inception4e.branch2.1.conv.weight";
    let expected = half[name].to_dtype(DType::F32).unwrap();
    let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let expected: Vec<u8> = expected.into_iter().flat_map(f32::to_le_bytes).collect();
    assert!(trained.tensors[name].1 == expected);
    let config = fs::read_to_string(run_directory(out.path()).join("config.json")).unwrap();
    let hash = trainer::sha256_hex(&fs::read(&file).unwrap());
    assert!(
        config.contains(&hash) && config.contains("googlenet.pth"),
        "{config}"
    );

    let whole = fs::read(&file).unwrap();
    let refused = |content: &[u8], expected: &str| {
        fs::write(&file, content).unwrap();
        let mut command = tiny(&format!("--weights {}", file.display()), out.path());
        let assert = command.assert().code(1).stdout("");
        assert.stderr(contains("googlenet.pth").and(contains(expected)));
    };
    refused(&whole[..whole.len() - 1], "damaged");
    refused(b"weights are elsewhere\n", "holds no weights");
    refused(
        b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.",
        "googlenet.pth",
    );
}

#[test]
fn a_file_from_before_batch_norms_counted_batches_is_taken_as_pytorch_takes_it() {
    let (first_out, first) = finished("--weights random");
    let model = run_directory(first_out.path()).join("model.safetensors");
    let mut tensors: BTreeMap<String, Tensor> =
        candle_core::safetensors::load(&model, &Device::Cpu)
            .unwrap()
            .into_iter()
            .collect();
    tensors.retain(|name, _| !name.ends_with("num_batches_tracked"));
    let write = |name: &str, tensors: &BTreeMap<String, Tensor>| {
        let file = first_out.path().join(name);
        fs::write(&file, test_support::legacy_pth(tensors).unwrap()).unwrap();
        file.display().to_string()
    };
    let whole = write("old.pth", &tensors);
    tensors.retain(|name, _| !name.starts_with("fc."));
    let headless = write("headless.pth", &tensors);
    for begin in [
        format!("--init {whole}"),
        format!("--weights {whole}"),
        format!("--weights {headless}"),
    ] {
        let (_out, trained) = finished(&format!("{begin} --lr 0"));
        let name = "conv1.conv.weight";
        assert_eq!(trained.tensors[name], first.tensors[name], "{begin}");
        let counted = &trained.tensors["conv1.bn.num_batches_tracked"].1;
        assert_eq!(counted[..], 2i64.to_le_bytes(), "{begin}");
    }
    let refused = tiny(&format!("--init {headless}"), first_out.path()).assert();
    refused
        .code(1)
        .stderr(contains("headless.pth").and(contains("fc.weight")));
}

/// The Hub's answers for a repository with one file of weights.
fn hub(file: &str, content: &[u8]) -> Server {
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let info = format!(
        r#"{{"_id":"1","id":"owner/name","sha":"{commit}","siblings":[{{"rfilename":"{file}"}}]}}"#
    );
    let stated = Reply::body(content)
        .header("X-Linked-Etag", trainer::sha256_hex(content))
        .header("X-Linked-Size", content.len().to_string());
    Server::start([Reply::body(info.as_bytes()), stated, Reply::file(content)])
}

#[test]
fn weights_come_from_the_hub_once_and_the_run_records_the_commit() {
    let (first_out, first) = finished("--weights random");
    let content = fs::read(run_directory(first_out.path()).join("model.safetensors")).unwrap();
    let server = hub("model.safetensors", &content);
    let cache = tempfile::tempdir().unwrap();
    let begin = |offline: &str| {
        let out = tempfile::tempdir().unwrap();
        let mut command = tiny("--weights owner/name --lr 0", out.path());
        command.env("HF_HUB_OFFLINE", offline);
        command.env("HF_ENDPOINT", server.url());
        command.env("HF_HUB_CACHE", cache.path());
        command.env("NO_PROXY", "127.0.0.1");
        command.assert().success().stderr(contains("Weights: "));
        let run = run_directory(out.path());
        let config = fs::read_to_string(run.join("config.json")).unwrap();
        (weights(&run.join("model.safetensors")), config)
    };
    for offline in ["0", "1"] {
        let (trained, config) = begin(offline);
        let name = "conv1.conv.weight";
        assert_eq!(trained.tensors[name], first.tensors[name]);
        for known in [
            "\"owner/name\"",
            "@0123456789abcdef",
            &trainer::sha256_hex(&content),
        ] {
            assert!(config.contains(known), "{known} is not in {config}");
        }
    }
    assert_eq!(server.asked().len(), 3);
}

#[test]
fn the_summary_shows_torchvisions_network_with_ten_classes() {
    program("--summary")
        .assert()
        .success()
        .stdout(contains("5,610,154"));
    program("--summary --epochs 1")
        .assert()
        .failure()
        .stderr(contains("trains nothing"));
}

#[test]
fn bad_input_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let unfinished = dir.path().join("run");
    fs::create_dir(&unfinished).unwrap();
    fs::write(unfinished.join("config.json"), "{}").unwrap();
    let unfinished = unfinished.display();
    let cases = [
        ("--weights absent.pth".to_string(), "no such file"),
        ("--weights a/b/c".into(), "owner/name"),
        ("--weights random --init x".into(), "head included"),
        ("--init absent".into(), "cannot read --init absent"),
        (format!("--init {unfinished}"), "not finished"),
        ("--image-size 14".into(), "from 15"),
        ("--bn-eval".into(), "--bn-eval"),
        ("--quick --data-dir data".into(), "drawn by the program"),
        (
            format!("--resume {unfinished} --lr 1"),
            "takes every setting",
        ),
        (
            "--weights random --dataset shapes --train-limit 5 --test-limit 1 --batch-size 4"
                .into(),
            "single picture",
        ),
        (
            "--weights random --dataset shapes --train-limit 5 --test-limit 1 --batch-size 4 --image-size 46"
                .into(),
            "single picture",
        ),
        (
            "--weights random --dataset shapes --train-limit 6 --test-limit 1 --batch-size 4 --processes 2"
                .into(),
            "shared out among 2 processes",
        ),
    ];
    for (line, expected) in cases {
        let refused = program(&line)
            .arg("--out")
            .arg(dir.path())
            .assert()
            .failure();
        refused.stderr(contains(expected).and(contains("panicked").not()));
    }
}
