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
    pub(super) targets: Speedup,
}

/// Our images/s as a multiple of PyTorch's: what is aimed at, at the least, or what is found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Speedup {
    /// Of PyTorch eager's.
    pub(super) eager: Option<f64>,
    /// Of the fastest PyTorch's.
    pub(super) fastest: Option<f64>,
}

/// About what a round of any row takes on an H100, by our default way and PyTorch's sides.
pub(super) const ROUND: Duration = Duration::from_secs(30);
/// And each other way of ours besides.
pub(super) const OTHER_WAY: Duration = Duration::from_secs(20);

impl Row {
    /// One of its sides, as failures and what is left out name it.
    pub(super) fn side(&self, name: &str) -> String {
        format!("{}, {name}", self.name)
    }

    /// The variants of PyTorch that it is held against.
    pub(super) fn variants(&self) -> &'static [(&'static str, &'static [&'static str])] {
        match self.is_held_against_the_fastest() {
            true => &VARIANTS,
            false => &VARIANTS[..1],
        }
    }

    /// Whether it is held against the fastest PyTorch, for which all variants run, and not against eager alone.
    pub(super) fn is_held_against_the_fastest(&self) -> bool {
        self.targets.fastest.is_some()
    }

    /// About what it takes on an H100 with one round: to start PyTorch's sides, of which one is compiled, and to run them.
    pub(super) fn takes(&self, pytorch: bool) -> Duration {
        let start = match pytorch && self.is_held_against_the_fastest() {
            true => 100,
            false => 10,
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
        targets: Speedup {
            eager: Some(3.0),
            fastest: Some(1.0),
        },
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
        targets: Speedup {
            eager: None,
            fastest: Some(1.0),
        },
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
        targets: Speedup {
            eager: Some(3.0),
            fastest: None,
        },
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
        targets: Speedup {
            eager: Some(3.0),
            fastest: None,
        },
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

/// About what training the lesson's 7 epochs takes on an H100 or H200, of a seed.
const ACCURACY: Duration = Duration::from_secs(60);
pub(super) const PYTORCH_ACCURACY: Duration = Duration::from_secs(80);

/// What the accuracies have a claim to before a row has one to another round: to the seeds that a comparison needs, of which
/// PyTorch takes so long for each. More of them are repetitions, as more rounds are, and have what time the rounds leave.
pub(super) fn accuracy_claims(seeds: u32, pytorch: Duration) -> Duration {
    seeds.min(SEEDS) * (ACCURACY + pytorch)
}

/// The time that must be left for this seed of ours to be begun: its own, and once ours are as many as a comparison needs, that of
/// PyTorch's to compare them with.
pub(super) fn needs_of_ours(seed: u32, pytorch: Duration) -> Duration {
    let free = match seed < SEEDS {
        true => Duration::ZERO,
        false => SEEDS * pytorch,
    };
    ACCURACY + free
}

/// How many of the trainings that are asked for end in the time that is left, if each takes about so long.
pub(super) fn those_that_fit(asked: u32, left: Option<Duration>, each: Duration) -> u32 {
    match left {
        Some(left) => asked.min(left.div_duration_f64(each) as u32),
        None => asked,
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    /// Seeds of ours and of PyTorch's that are trained, if all take what they are thought to.
    fn trained(asked: u32, minutes: u64) -> (u32, u32) {
        let mut left = Duration::from_secs(60 * minutes);
        let mut ours = 0;
        for seed in 0..asked {
            if needs_of_ours(seed, PYTORCH_ACCURACY) <= left {
                left -= ACCURACY;
                ours += 1;
            }
        }
        (ours, those_that_fit(asked, Some(left), PYTORCH_ACCURACY))
    }

    #[test]
    fn within_a_limit_three_seeds_of_each_side_go_before_more_of_one() {
        // Three of ours take 3 minutes, three of PyTorch's 4.
        assert_eq!(trained(3, 7), (3, 3));
        assert_eq!(trained(5, 7), (3, 3));
        assert_eq!(trained(5, 8), (4, 3));
        assert_eq!(trained(5, 12), (5, 5));
        assert_eq!(trained(5, 60), (5, 5));
        // What does not fit as a whole is trained in part.
        assert_eq!(trained(5, 6), (3, 2));
        assert_eq!(trained(3, 4), (3, 0));
        assert_eq!(trained(3, 2), (2, 0));
        assert_eq!(trained(3, 0), (0, 0));
    }

    #[test]
    fn without_a_limit_or_pytorch_nothing_is_left_out_or_kept_free() {
        assert_eq!(those_that_fit(u32::MAX, None, PYTORCH_ACCURACY), u32::MAX);
        let hours = Duration::from_secs(u64::MAX);
        assert_eq!(those_that_fit(7, Some(hours), PYTORCH_ACCURACY), 7);
        assert_eq!(needs_of_ours(SEEDS, Duration::ZERO), ACCURACY);
        assert_eq!(accuracy_claims(2, Duration::ZERO), 2 * ACCURACY);
    }

    #[test]
    fn another_round_waits_for_the_accuracies_that_a_comparison_needs_and_for_no_more() {
        let of_a_seed = ACCURACY + PYTORCH_ACCURACY;
        assert_eq!(accuracy_claims(2, PYTORCH_ACCURACY), 2 * of_a_seed);
        assert_eq!(accuracy_claims(3, PYTORCH_ACCURACY), 3 * of_a_seed);
        assert_eq!(accuracy_claims(20, PYTORCH_ACCURACY), 3 * of_a_seed);
    }
}
