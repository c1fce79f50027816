//! The program as its users meet it, with weights of which it is known what they answer.

mod answers;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use answers::{
    ALL_CLASSES, assert_predicts, discerned, draw, json_lines, likeliest, predict, seeded, shapes,
};
use candle_core::{DType, Device, Tensor};
use cifar_data::CLASSES;
use inception_model::{CifarConfig, CifarGoogLeNet, GoogLeNet, GoogLeNetConfig};
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

const PICTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pictures");

const CPU: [&str; 2] = ["--device", "cpu"];

/// Of probabilities and losses from f32 logits, which batches of another size may round otherwise.
const TOLERANCE: f64 = 1e-6;

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn write(path: &Path, mut tensors: Tensors, answers: &[usize], metadata: &[(&str, &str)]) {
    // A head that answers one class, or several alike, whatever the picture.
    let (_, _, weight) = tensors.get_mut("fc.weight").unwrap();
    weight.fill(0);
    let (_, _, bias) = tensors.get_mut("fc.bias").unwrap();
    bias.fill(0);
    for answer in answers {
        bias[4 * answer..4 * answer + 4].copy_from_slice(&8f32.to_le_bytes());
    }
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    let metadata = metadata.iter().map(|(k, v)| (k.to_string(), v.to_string()));
    let metadata: HashMap<String, String> = metadata.collect();
    safetensors::serialize_to_file(views, Some(metadata), path).unwrap();
}

/// torchvision's network with small weights; with auxiliary heads, as the published file has them.
fn torchvision(dir: &Path, classes: usize, answer: usize, metadata: &[(&str, &str)]) -> PathBuf {
    let config = GoogLeNetConfig {
        num_classes: classes,
        aux_heads: true,
        ..GoogLeNetConfig::default()
    };
    let tensors = GoogLeNet::state_dict_shapes(&config).into_iter();
    let tensors = tensors.map(|(name, shape, dtype)| {
        let count = shape.iter().product::<usize>();
        let value = if name.ends_with("var") { 1f32 } else { 0.01 };
        match dtype {
            DType::I64 => (name, (Dtype::I64, shape, vec![0; 8 * count])),
            _ => (name, (Dtype::F32, shape, value.to_le_bytes().repeat(count))),
        }
    });
    let path = dir.join(format!("torchvision-{classes}-{answer}.safetensors"));
    write(&path, tensors.collect(), &[answer], metadata);
    path
}

fn cifar(dir: &Path, answer: usize, metadata: &[(&str, &str)]) -> PathBuf {
    undecided(dir, &[answer], metadata)
}

/// The lesson's network, which finds these classes equally likely.
fn undecided(dir: &Path, answers: &[usize], metadata: &[(&str, &str)]) -> PathBuf {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let network = CifarGoogLeNet::new(&CifarConfig::default(), &Device::Cpu, &mut rng).unwrap();
    let tensors = network.named_parameters().into_iter().map(|(name, var)| {
        let shape = var.dims().to_vec();
        let values = vec![0; 4 * var.elem_count()];
        (name, (Dtype::F32, shape, values))
    });
    let path = dir.join(format!("cifar-{answers:?}.safetensors"));
    write(&path, tensors.collect(), answers, metadata);
    path
}

#[test]
fn torchvisions_weights_name_imagenets_classes_with_probabilities() {
    let dir = tempfile::tempdir().unwrap();
    let weights = torchvision(dir.path(), 1000, 281, &[]);
    let run = predict(&weights)
        .arg(format!("{PICTURES}/wide.jpg"))
        .assert()
        .success();
    // e⁸ of e⁸ + 999.
    run.stdout(contains("wide.jpg\n   74.90 %  tabby\n    0.03 %  tench\n"));
}

#[test]
fn a_pth_file_names_what_the_same_weights_name_in_safetensors() {
    let dir = tempfile::tempdir().unwrap();
    let safetensors = torchvision(dir.path(), 10, 3, &[]);
    let tensors = candle_core::safetensors::load(&safetensors, &Device::Cpu).unwrap();
    let mut tensors: BTreeMap<String, Tensor> = tensors.into_iter().collect();
    let pth = dir.path().join("googlenet.pth");
    let names_a_cat = |tensors: &BTreeMap<String, Tensor>| {
        fs::write(&pth, test_support::legacy_pth(tensors).unwrap()).unwrap();
        let run = predict(&pth).arg(format!("{PICTURES}/tiny.bmp")).assert();
        run.success().stdout(contains("  99.70 %  cat"));
    };
    names_a_cat(&tensors);
    // As PyTorch wrote it before 0.4.1.
    tensors.retain(|name, _| !name.ends_with("num_batches_tracked"));
    names_a_cat(&tensors);
}

#[test]
fn weights_of_half_precision_name_the_same_whichever_network_they_are_of() {
    let dir = tempfile::tempdir().unwrap();
    let weights = [
        torchvision(dir.path(), 10, 3, &[]),
        cifar(dir.path(), 3, &[]),
    ];
    for path in weights {
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        let half = tensors.into_iter().map(|(name, tensor)| {
            let half = match tensor.dtype() {
                DType::F32 => tensor.to_dtype(DType::F16).unwrap(),
                _ => tensor,
            };
            (name, half)
        });
        let half: HashMap<String, Tensor> = half.collect();
        candle_core::safetensors::save(&half, &path).unwrap();
        let run = predict(&path).arg(format!("{PICTURES}/tiny.bmp")).assert();
        run.success().stdout(contains("  99.70 %  cat"));
    }
}

#[test]
fn without_network_the_error_names_what_helps_here() {
    let dir = tempfile::tempdir().unwrap();
    for weights in ["torchvision", "owner/name@v1:w.pth"] {
        let mut command = predict(Path::new(weights));
        for cache in ["TORCH_HOME", "HF_HUB_CACHE"] {
            command.env(cache, dir.path().join("cache"));
        }
        let run = command.arg(format!("{PICTURES}/tiny.bmp")).assert();
        run.code(1).stdout("").stderr(
            contains(format!("the weights {weights} are not here"))
                .and(contains("--weights FILE"))
                .and(contains("random").not())
                .and(contains("HF_HUB_OFFLINE is set")),
        );
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn our_checkpoints_name_the_classes_they_were_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let picture = format!("{PICTURES}/tiny.bmp");
    let ours = [
        ("architecture", "googlenet-torchvision"),
        ("image_size", "40"),
    ];
    let shapes = [&ours[..], &[("class_names", "shapes")]].concat();
    let cases = [
        (torchvision(dir.path(), 10, 3, &ours), "  99.70 %  cat"),
        (torchvision(dir.path(), 10, 4, &shapes), "  99.70 %  ring"),
        (torchvision(dir.path(), 3, 1, &[]), "  99.93 %  class 1"),
        (
            cifar(dir.path(), 8, &[("architecture", "googlenet-cifar")]),
            "  99.70 %  ship",
        ),
        (cifar(dir.path(), 9, &[]), "  99.70 %  truck"),
    ];
    for (weights, expected) in cases {
        let run = predict(&weights).arg(&picture).assert().success();
        run.stdout(contains(expected));
    }
}

#[test]
fn what_weights_do_not_say_is_named_with_what_is_taken_for_granted_instead() {
    const CIFAR: &str = "taken as CIFAR-10's are, 32×32 pixels, normalised to −1…1";
    const IMAGENET: &str = "normalised by ImageNet's mean and standard deviation";
    const CONVERSION: &str = "converts its input: it does, from ImageNet's";
    let dir = tempfile::tempdir().unwrap();
    let size = ("image_size", "40");
    let converts = ("transform_input", "false");
    // torchvision's own file, as `pretrained-import` writes it.
    let published = pretrained_import::source::TORCHVISION_GOOGLENET;
    let imported = ("source_sha256", published.pin.hash());
    let ours = ("architecture", "googlenet-cifar");
    let torchvision = |classes, said: &[_]| torchvision(dir.path(), classes, 1, said);
    let cases = [
        (torchvision(10, &[]), &[CIFAR, CONVERSION][..]),
        (torchvision(3, &[]), &[IMAGENET, CONVERSION]),
        (torchvision(20, &[converts]), &[IMAGENET]),
        (torchvision(21, &[size]), &[CONVERSION]),
        (torchvision(22, &[size, converts]), &[]),
        (torchvision(1000, &[imported]), &[]),
        (cifar(dir.path(), 1, &[]), &[CIFAR]),
        (cifar(dir.path(), 2, &[ours]), &[]),
    ];
    for (weights, expected) in cases {
        let run = predict(&weights)
            .arg(format!("{PICTURES}/tiny.bmp"))
            .assert()
            .success();
        let said = String::from_utf8(run.get_output().stderr.clone()).unwrap();
        let notices = said.matches("do not say").count();
        assert_eq!(notices, expected.len(), "{}: {said}", weights.display());
        for expected in expected {
            assert!(said.contains(expected), "{}: {said}", weights.display());
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_result_that_is_lost_is_an_error_unless_its_reader_has_gone_away() {
    let dir = tempfile::tempdir().unwrap();
    let weights = cifar(dir.path(), 0, &[]);
    let full = fs::File::create("/dev/full").unwrap();
    let (reader, gone) = std::io::pipe().unwrap();
    drop(reader);
    for (stdout, code, said) in [
        (full.into(), 1, "cannot write to standard output: No space"),
        (std::process::Stdio::from(gone), 0, ""),
    ] {
        let output = test_support::program(env!("CARGO_BIN_EXE_predict"), "")
            .arg("--weights")
            .arg(&weights)
            .arg(format!("{PICTURES}/tiny.bmp"))
            .stdout(stdout)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(stderr.contains(said), "{stderr}");
    }
}

#[test]
fn a_broken_picture_is_reported_and_the_rest_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let weights = cifar(dir.path(), 0, &[]);
    let folder = dir.path().join("pictures");
    fs::create_dir(&folder).unwrap();
    for name in ["wide.jpg", "small.png", "lossy.webp", "tiny.bmp"] {
        fs::copy(format!("{PICTURES}/{name}"), folder.join(name)).unwrap();
    }
    fs::write(folder.join("broken.png"), "no picture").unwrap();
    let jpeg = fs::read(format!("{PICTURES}/wide.jpg")).unwrap();
    fs::write(folder.join("cut.jpg"), &jpeg[..300]).unwrap();
    let run = predict(&weights)
        .arg(&folder)
        .arg(folder.join("absent.jpg"))
        .assert();
    let run = run.failure().code(1).stderr(
        contains("broken.png: is no JPEG, PNG, WebP or BMP picture")
            .and(contains("cut.jpg: cannot be decoded"))
            .and(contains("absent.jpg: cannot be read"))
            .and(contains("3 of 7 pictures"))
            .and(contains("panicked").not()),
    );
    let said = String::from_utf8(run.get_output().stdout.clone()).unwrap();
    assert_eq!(said.matches("airplane").count(), 4, "{said}");
    let places = ["lossy.webp", "small.png", "tiny.bmp", "wide.jpg"].map(|name| said.find(name));
    assert!(places.is_sorted() && places[0].is_some(), "{said}");
}

#[test]
fn a_picture_that_makes_a_decoder_panic_is_one_error_among_answers() {
    let dir = tempfile::tempdir().unwrap();
    let weights = cifar(dir.path(), 0, &[]);
    let good = format!("{PICTURES}/wide.jpg");
    let jpeg = fs::read(&good).unwrap();
    let bad = dir.path().join("odd.jpg");
    // Of printing, with sampling factors that do not divide each other; and 12 bits of two colours.
    for (precision, sampling) in [(8, &[0x11, 0x12, 0x41, 0x24][..]), (12, &[0x11, 0x22])] {
        fs::write(&bad, test_support::odd_jpeg(&jpeg, precision, sampling)).unwrap();
        let mut command = predict(&weights);
        let run = command.arg(&good).arg(&bad).arg(&good).assert().code(1);
        let run = run.stderr(
            contains("odd.jpg: cannot be decoded")
                .count(1)
                .and(contains("1 of 3 pictures"))
                .and(contains("panicked").not()),
        );
        run.stdout(contains("airplane").count(2));
    }
}

#[cfg(unix)]
#[test]
fn what_is_no_file_is_reported_and_never_read() {
    let dir = tempfile::tempdir().unwrap();
    let weights = cifar(dir.path(), 0, &[]);
    predict(&weights)
        .args(["/dev/zero", &format!("{PICTURES}/tiny.bmp")])
        .assert()
        .code(1)
        .stdout(contains("airplane").count(1))
        .stderr(contains("/dev/zero: is neither a file nor a folder"));
    predict(Path::new("/dev/zero"))
        .arg(format!("{PICTURES}/tiny.bmp"))
        .assert()
        .code(1)
        .stderr(contains("/dev/zero: it is no file"));
}

#[test]
fn json_has_a_line_for_each_picture_good_or_not() {
    let dir = tempfile::tempdir().unwrap();
    let weights = cifar(dir.path(), 6, &[]);
    let mut command = predict(&weights);
    command.args(["--json", "--top", "2", "absent.jpg"]);
    let run = command.arg(format!("{PICTURES}/tiny.bmp")).assert().code(1);
    let lines = json_lines(&run);
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert_eq!(lines[0]["file"], "absent.jpg");
    assert!(
        lines[0]["error"]
            .as_str()
            .unwrap()
            .contains("cannot be read")
    );
    let guesses = lines[1]["predictions"].as_array().unwrap();
    assert_eq!(guesses.len(), 2);
    assert_eq!(
        (&guesses[0]["index"], &guesses[0]["class"]),
        (&6.into(), &"frog".into())
    );
    let probability = guesses[0]["probability"].as_f64().unwrap();
    assert!((probability - 0.996_99).abs() < 1e-5, "{probability}");
}

#[test]
fn each_picture_has_its_own_answer_behind_a_broken_one_and_beyond_a_batch() {
    let dir = tempfile::tempdir().unwrap();
    let set = shapes(18);
    let (weights, expected) = discerned(dir.path(), &set);
    let classes: BTreeSet<usize> = expected.iter().map(|row| likeliest(row)).collect();
    assert!(
        classes.len() > 5,
        "hardly a mistake would be seen: {classes:?}"
    );

    let pictures = dir.path().join("pictures");
    fs::create_dir(&pictures).unwrap();
    for index in 0..set.len() {
        draw(&pictures.join(format!("{index:02}.png")), set.image(index));
    }
    fs::write(pictures.join("07-broken.png"), "no picture").unwrap();
    let mut command = predict(&weights);
    command.args(ALL_CLASSES).args(CPU).arg(&pictures);
    let mut lines = json_lines(&command.assert().code(1));
    // Its name comes before 07.png.
    let broken = lines.remove(7);
    assert!(broken["error"].is_string(), "{broken}");
    assert_eq!(lines.len(), set.len());
    for (index, (line, expected)) in lines.iter().zip(&expected).enumerate() {
        let picture = pictures.join(format!("{index:02}.png"));
        assert_eq!(line["file"], picture.to_str().unwrap());
        assert_predicts(line, expected, TOLERANCE);
    }
}

#[test]
fn torchvisions_network_takes_pictures_as_its_weights_say() {
    let dir = tempfile::tempdir().unwrap();
    let set = shapes(1);
    let picture = dir.path().join("picture.png");
    draw(&picture, set.image(0));
    let cases = [("true", "32"), ("false", "32"), ("true", "40")];
    let answers = cases.map(|said| {
        let (weights, mut expected) = seeded(dir.path(), &set, said);
        let expected = expected.remove(0);
        let mut command = predict(&weights);
        command.args(ALL_CLASSES).args(CPU).arg(&picture);
        let line = &json_lines(&command.assert().success())[0];
        assert_predicts(line, &expected, TOLERANCE);
        expected
    });
    for (one, other) in [(0, 1), (0, 2), (1, 2)] {
        let pairs = answers[one].iter().zip(&answers[other]);
        let largest = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(
            largest > 100.0 * TOLERANCE,
            "hardly a mistake would be seen: {largest}"
        );
    }
}

#[test]
fn an_evaluation_holds_each_answer_against_the_label_of_its_picture() {
    let dir = tempfile::tempdir().unwrap();
    // More than a batch.
    let set = shapes(40);
    let (weights, expected) = discerned(dir.path(), &set);
    let mut taken_for = [[0; CLASSES]; CLASSES];
    let mut loss = 0.0;
    for (&label, row) in set.labels().iter().zip(&expected) {
        taken_for[usize::from(label)][likeliest(row)] += 1;
        loss -= row[usize::from(label)].ln() / set.len() as f64;
    }

    let mut command = predict(&weights);
    command.args(["--evaluate", "shapes", "--test-limit", "40", "--json"]);
    command.args(CPU);
    let line = json_lines(&command.assert().success()).remove(0);
    for (class, expected) in taken_for.iter().enumerate() {
        let found = &line["classes"][class]["taken_for"];
        assert_eq!(found, &json!(expected), "{class}");
    }
    let correct: usize = (0..CLASSES).map(|class| taken_for[class][class]).sum();
    assert_eq!(line["correct"], correct);
    let difference = line["loss"].as_f64().unwrap() - loss;
    assert!(difference.abs() < TOLERANCE, "{loss}: {line}");
}

#[test]
fn a_test_set_is_evaluated_class_by_class() {
    let dir = tempfile::tempdir().unwrap();
    // Shapes of each class in turn, of which it knows one.
    let weights = cifar(dir.path(), 2, &[("class_names", "shapes")]);
    let evaluate = |line: &str| {
        let mut command = predict(&weights);
        command.args(line.split_whitespace()).assert()
    };
    let class = cifar_data::shapes::CLASS_NAMES[2];
    evaluate("--evaluate shapes --test-limit 40")
        .success()
        .stdout(
            contains("Test accuracy: 10.00% (4 of 40)")
                .and(contains("  100.00 % of 4\n"))
                .and(contains(format!("0.00 % of 4, 100.0 % taken for {class}"))),
        );
    // It trains with nobody, whatever a launcher has left in the environment.
    let mut rank = predict(&weights);
    rank.envs([("RANK", "1"), ("WORLD_SIZE", "2")]);
    rank.envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")]);
    rank.args(["--evaluate", "shapes", "--test-limit", "40"]);
    rank.assert().success().stdout(contains("(4 of 40)"));
    let run = evaluate("--evaluate shapes --test-limit 40 --json").success();
    // Nothing else is on standard output.
    let [line] = &json_lines(&run)[..] else {
        panic!("not one line")
    };
    assert_eq!((&line["correct"], &line["images"]), (&4.into(), &40.into()));
    assert_eq!(line["classes"][0]["taken_for"][2], 4);
    // One logit of 8 beside nine of 0.
    let right = (9.0 * f64::exp(-8.0)).ln_1p();
    let expected = 0.1 * right + 0.9 * (8.0 + right);
    assert!(
        (line["loss"].as_f64().unwrap() - expected).abs() < 1e-5,
        "{line}"
    );

    let refused = evaluate("--evaluate cifar10").failure();
    refused.stderr(contains("its classes are airplane").and(contains("panicked").not()));
    let refused = evaluate("--evaluate shapes --data-dir data").failure();
    refused.stderr(contains("--data-dir is for --evaluate cifar10"));
    for line in [
        "--evaluate shapes picture.jpg",
        "--test-limit 3 picture.jpg",
        "",
    ] {
        evaluate(line).code(2);
    }
}

#[test]
fn of_classes_that_are_equally_likely_an_evaluation_takes_the_first_as_training_does() {
    let dir = tempfile::tempdir().unwrap();
    let weights = undecided(dir.path(), &[2, 5], &[("class_names", "shapes")]);
    let mut command = predict(&weights);
    command.args(["--evaluate", "shapes", "--test-limit", "10", "--json"]);
    let line = json_lines(&command.assert().success()).remove(0);
    assert_eq!(line["correct"], 1, "{line}");
    for class in line["classes"].as_array().unwrap() {
        let taken_for = &class["taken_for"];
        assert_eq!((&taken_for[2], &taken_for[5]), (&1.into(), &0.into()));
    }
}

/// A head of ten classes, and a tensor of no network.
fn head(path: &Path, other: &str, metadata: &[(&str, &str)]) {
    let tensor = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let tensors = [
        ("fc.weight", tensor(&[CLASSES, inception_model::FEATURES])),
        (other, tensor(&[1])),
    ];
    let metadata = metadata.iter().map(|(k, v)| (k.to_string(), v.to_string()));
    safetensors::serialize_to_file(tensors, Some(metadata.collect()), path).unwrap();
}

#[test]
fn what_weights_say_of_their_input_and_cannot_mean_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let weights = dir.path().join("weights.safetensors");
    let sizes = ["0", "14", "1025", "100000", "4611686018427387904", "abc"];
    let cases = sizes.map(|size| ("image_size", size, "15, the smallest"));
    let conversion = ("transform_input", "nein", "it must be true or false");
    for (key, said, expected) in cases.into_iter().chain([conversion]) {
        let architecture = ("architecture", GoogLeNet::ARCHITECTURE);
        head(&weights, "x", &[architecture, (key, said)]);
        let refused = predict(&weights)
            .arg(format!("{PICTURES}/tiny.bmp"))
            .assert()
            .code(1);
        let named = format!("weights.safetensors: {key} is {said:?} in its metadata");
        refused.stderr(contains(named).and(contains(expected)));
    }
}

#[test]
fn names_from_a_file_do_not_steer_the_terminal() {
    const NAME: &str = "\u{1b}]0;title\u{7}\u{1b}[2J\u{9b}2J\r";
    let dir = tempfile::tempdir().unwrap();
    let weights = dir.path().join("weights.safetensors");
    for (architecture, expected) in [
        (NAME, r"it is a \u{1b}]0;title"),
        (GoogLeNet::ARCHITECTURE, r"unexpected (1): \u{1b}]0;title"),
        (CifarGoogLeNet::ARCHITECTURE, r"unexpected: \u{1b}]0;title"),
    ] {
        head(&weights, NAME, &[("architecture", architecture)]);
        let refused = predict(&weights)
            .arg(format!("{PICTURES}/tiny.bmp"))
            .assert()
            .code(1);
        let said = String::from_utf8(refused.get_output().stderr.clone()).unwrap();
        assert!(said.contains(expected), "{said:?}");
        let steers = |c: char| c.is_control() && c != '\n';
        assert!(!said.contains(steers), "{said:?}");
    }
}

#[test]
fn bad_input_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let other = dir.path().join("other.safetensors");
    let tensor = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    safetensors::serialize_to_file([("x", tensor)], None, &other).unwrap();
    let alien = dir.path().join("alien.safetensors");
    let metadata = HashMap::from([("architecture".to_string(), "resnet18".to_string())]);
    let tensor = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    safetensors::serialize_to_file([("x", tensor)], Some(metadata), &alien).unwrap();
    // No byte backs this number of classes.
    let boundless = dir.path().join("boundless.safetensors");
    let tensors = ["fc.weight", "conv1.conv.weight"].map(|name| {
        let tensor = TensorView::new(Dtype::F32, vec![1 << 50, 0], &[]).unwrap();
        (name, tensor)
    });
    safetensors::serialize_to_file(tensors, None, &boundless).unwrap();
    let text = dir.path().join("text.safetensors");
    fs::write(&text, "no weights").unwrap();
    let cases = [
        (
            other,
            "no state dict of the lesson's or torchvision's GoogLeNet",
        ),
        (alien, "it is a resnet18"),
        (text, "text.safetensors"),
        (boundless, "fc.weight should have shape (classes, 1024)"),
        ("random".into(), "knows nothing"),
        ("absent.pth".into(), "no such file"),
    ];
    for (weights, expected) in cases {
        let refused = predict(&weights)
            .arg(format!("{PICTURES}/tiny.bmp"))
            .assert()
            .failure();
        refused.stderr(contains(expected).and(contains("panicked").not()));
    }
    predict(Path::new("random"))
        .assert()
        .failure()
        .stderr(contains("PICTURE"));
    predict(Path::new("random"))
        .args(["--no-cuda-graph", "x.png"])
        .assert()
        .failure()
        .stderr(contains("--no-cuda-graph"));
}
