//! The kinds of work that are timed, and the sides that do it.

use std::time::Duration;

/// One kind of work.
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) what: &'static str,
    pub(super) program: &'static str,
    pub(super) arguments: &'static [&'static str],
    pub(super) batch: u32,
    /// Pictures of an epoch of our side.
    pub(super) images: u32,
    pub(super) model: &'static str,
    pub(super) frozen: bool,
    pub(super) bf16: bool,
    /// Least images/s as a multiple of PyTorch eager's, and of the fastest PyTorch's.
    pub(super) targets: (Option<f64>, Option<f64>),
}

/// About what a round of any row takes on an H100, by our default way and PyTorch's sides.
pub(super) const ROUND: Duration = Duration::from_secs(30);
/// And each other way of ours besides.
pub(super) const OTHER_WAY: Duration = Duration::from_secs(20);

impl Row {
    /// The variants of PyTorch that it is held against.
    pub(super) fn variants(&self) -> &'static [(&'static str, &'static [&'static str])] {
        match self.targets.1 {
            Some(_) => &VARIANTS,
            None => &VARIANTS[..1],
        }
    }

    /// About what it takes on an H100 with one round: to start PyTorch's sides, of which one is compiled, and to run them.
    pub(super) fn takes(&self, pytorch: bool) -> Duration {
        let start = match self.targets.1 {
            Some(_) if pytorch => 100,
            _ => 10,
        };
        Duration::from_secs(start) + ROUND
    }
}

pub(super) const ROWS: [Row; 4] = [
    Row {
        name: "lesson-32",
        what: "lesson's net, batch 32, TF32 in convolutions",
        program: "scratch-train",
        arguments: &[],
        batch: 32,
        images: 12_800,
        model: "lesson",
        frozen: false,
        bf16: false,
        targets: (Some(3.0), Some(1.0)),
    },
    Row {
        name: "lesson-512-bf16",
        what: "lesson's net, batch 512, bf16",
        program: "scratch-train",
        arguments: &["--precision", "bf16"],
        batch: 512,
        images: 51_200,
        model: "lesson",
        frozen: false,
        bf16: true,
        targets: (None, Some(1.0)),
    },
    Row {
        name: "torchvision-full-32",
        what: "torchvision's net, 32×32, batch 32",
        program: "finetune-full",
        arguments: &["--weights", "random"],
        batch: 32,
        images: 12_800,
        model: "torchvision",
        frozen: false,
        bf16: false,
        targets: (Some(3.0), None),
    },
    Row {
        name: "torchvision-frozen-32",
        what: "torchvision's net, 32×32, the head alone, batch 32",
        program: "finetune-frozen",
        arguments: &["--weights", "random"],
        batch: 32,
        images: 12_800,
        model: "torchvision",
        frozen: true,
        bf16: false,
        targets: (Some(3.0), None),
    },
];

pub(super) const ROW_NAMES: [&str; ROWS.len()] = {
    let mut names = [""; ROWS.len()];
    let mut i = 0;
    while i < names.len() {
        names[i] = ROWS[i].name;
        i += 1;
    }
    names
};

pub(super) const OURS: &str = "ours";
pub(super) const OURS_BY_PLANES: &str = "ours, --no-channels-last";
pub(super) const OURS_ON_ONE_STREAM: &str = "ours, --streams 1";
/// Our ways and their flags. All but the first run in one round only.
pub(super) const WAYS: [(&str, &[&str]); 3] = [
    (OURS, &[]),
    (OURS_BY_PLANES, &["--no-channels-last"]),
    (OURS_ON_ONE_STREAM, &["--streams", "1"]),
];
/// Of how many seeds accuracies are compared at the least: they differ by points from seed to seed.
pub(super) const SEEDS: u32 = 3;

pub(super) const EAGER: &str = "PyTorch, eager";
/// PyTorch's variants and their flags. Work that is held against eager alone has the first only.
pub(super) const VARIANTS: [(&str, &[&str]); 3] = [
    (EAGER, &[]),
    ("PyTorch, channels_last", &["--layout", "channels_last"]),
    (
        "PyTorch, channels_last, compiled",
        &["--layout", "channels_last", "--compile"],
    ),
];
