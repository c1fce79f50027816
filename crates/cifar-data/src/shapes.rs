//! Ten classes of pictures drawn from a seed, so that everything runs with no file and no network.
//!
//! A 32×32 picture shows one shape in one colour on a ground of another, with noise. Position,
//! size, rotation and both colours are random, and figure and ground swap their colours as often
//! as not. So every class has the same mean picture and the same colours, and only form tells them
//! apart: the tests measure 17 % for the nearest mean picture and 33 % for a linear classifier of
//! the pixels, where chance is 10 %.
//!
//! Pictures are the same bits on every machine: whole numbers, and `f64` arithmetic of +, −, ×, ÷
//! and floor only, which IEEE 754 defines exactly.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::{CLASSES, IMAGE_BYTES, ImageSet, SIDE, TrainTest};

/// The ten classes; the label is the index.
pub const CLASS_NAMES: [&str; CLASSES] = [
    "disc",
    "square",
    "triangle",
    "cross",
    "ring",
    "star",
    "horizontal stripes",
    "vertical stripes",
    "checkerboard",
    "diamond",
];

/// Which of the two sets of pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// Pictures to train on.
    Train,
    /// Pictures to test on.
    Test,
}

/// The first `n` pictures of `split`.
///
/// Picture `i` depends on (`seed`, `split`, `i`) alone, so a longer set begins with the shorter
/// one. Its class is `i % 10`: a set whose size is a multiple of ten is balanced.
pub fn generate(seed: u64, split: Split, n: usize) -> ImageSet {
    let mut pixels = vec![0; n * IMAGE_BYTES];
    pixels
        .par_chunks_exact_mut(IMAGE_BYTES)
        .enumerate()
        .for_each(|(index, image)| draw(seed, split, index, image));
    let labels = (0..n).map(|index| (index % CLASSES) as u8).collect();
    ImageSet::new(pixels, labels).expect("every label is below ten and has its picture")
}

/// `train` and `test` pictures of `seed`.
pub fn train_test(seed: u64, train: usize, test: usize) -> TrainTest {
    TrainTest {
        train: generate(seed, Split::Train, train),
        test: generate(seed, Split::Test, test),
        source: format!("shapes (drawn from seed {seed}; no photographs)"),
    }
}

/// Where and how large a shape is.
struct Placement {
    centre: [f64; 2],
    /// Half the shape's extent, in pixels.
    radius: f64,
    cos: f64,
    sin: f64,
    /// Width of a stripe or a field of the checkerboard, in pixels.
    stripe: f64,
}

impl Placement {
    fn random(draws: &mut Draws) -> Self {
        let radius = draws.between(11.0, 13.5);
        let centre = [draws.between(13.5, 18.5), draws.between(13.5, 18.5)];
        // A rotation by at most 12.6°, from the tangent of half the angle: no sine is called,
        // whose last bit differs between machines.
        let t = draws.between(-0.11, 0.11);
        Self {
            centre,
            radius,
            cos: (1.0 - t * t) / (1.0 + t * t),
            sin: 2.0 * t / (1.0 + t * t),
            stripe: draws.between(3.0, 5.0),
        }
    }

    /// Whether the point (`x`, `y`), in pixels from the top left, is within the shape of `class`.
    fn covers(&self, class: usize, x: f64, y: f64) -> bool {
        let (dx, dy) = (x - self.centre[0], y - self.centre[1]);
        // The point in the shape's own axes, in pixels and in radii; v points down.
        let (px, py) = (self.cos * dx + self.sin * dy, self.cos * dy - self.sin * dx);
        let (u, v) = (px / self.radius, py / self.radius);
        let is_odd = |position: f64| (position / self.stripe).floor() as i64 & 1 == 1;
        match class {
            0 => u * u + v * v <= 1.0,
            1 => u.abs() <= 0.85 && v.abs() <= 0.85,
            2 => v <= 0.8 && u.abs() <= 0.55 * (v + 1.0),
            3 => (u.abs() <= 0.3 && v.abs() <= 1.0) || (v.abs() <= 0.3 && u.abs() <= 1.0),
            4 => (0.36..=1.0).contains(&(u * u + v * v)),
            5 => in_star(u, v),
            6 => is_odd(py),
            7 => is_odd(px),
            8 => is_odd(px) != is_odd(py),
            _ => u.abs() + v.abs() <= 1.1,
        }
    }
}

/// A five-pointed star with its tips on a circle of radius 1.1: the points that lie inside at
/// least four of the five lines through its edges.
fn in_star(u: f64, v: f64) -> bool {
    /// Directions away from the tips (cosine and sine of 90° + k · 72°), the upper tip's first.
    const AWAY: [[f64; 2]; 5] = [
        [0.0, 1.0],
        [-0.951_056_516, 0.309_016_994],
        [-0.587_785_252, -0.809_016_994],
        [0.587_785_252, -0.809_016_994],
        [0.951_056_516, 0.309_016_994],
    ];
    /// Distance of the edges from the centre: the tips' times the cosine of 72°.
    const EDGE: f64 = 1.1 * 0.309_016_994;
    AWAY.iter().filter(|[a, b]| a * u + b * v <= EDGE).count() >= 4
}

fn draw(seed: u64, split: Split, index: usize, image: &mut [u8]) {
    /// Points per pixel and axis at which the shape is sampled, for smooth edges.
    const SAMPLES: usize = 3;
    /// Noise is the sum of two uniform numbers of −NOISE to NOISE.
    const NOISE: i32 = 8;

    let mut draws = Draws::new(seed, split, index);
    let class = index % CLASSES;
    let [figure, ground] = two_colours(&mut draws);
    let placement = Placement::random(&mut draws);

    for y in 0..SIDE {
        for x in 0..SIDE {
            let mut covered = 0;
            for j in 0..SAMPLES {
                for i in 0..SAMPLES {
                    let at = |pixel: usize, sample: usize| {
                        pixel as f64 + (sample as f64 + 0.5) / SAMPLES as f64
                    };
                    covered += i32::from(placement.covers(class, at(x, i), at(y, j)));
                }
            }
            let all = (SAMPLES * SAMPLES) as i32;
            for channel in 0..3 {
                let mixed = figure[channel] * covered + ground[channel] * (all - covered);
                let noise = draws.within(NOISE) + draws.within(NOISE);
                let value = (mixed + all / 2) / all + noise;
                image[(channel * SIDE + y) * SIDE + x] = value.clamp(0, 255) as u8;
            }
        }
    }
}

/// Two random colours that differ clearly: in brightness, so that no channel is needed to see the
/// shape. Swapping them is as likely as not.
fn two_colours(draws: &mut Draws) -> [[i32; 3]; 2] {
    /// Least difference of the sums of the three channels, of at most 765.
    const CONTRAST: i32 = 300;
    loop {
        let [a, b] = [(); 2].map(|()| [(); 3].map(|()| draws.byte()));
        if (a.iter().sum::<i32>() - b.iter().sum::<i32>()).abs() >= CONTRAST {
            return [a, b];
        }
    }
}

/// The random numbers of one picture.
struct Draws(ChaCha8Rng);

impl Draws {
    fn new(seed: u64, split: Split, index: usize) -> Self {
        let split: u64 = match split {
            Split::Train => 0,
            Split::Test => 1,
        };
        // ChaCha's key is the whole identity of the picture: no two pictures share a stream.
        let mut key = *b"shapes-1........................";
        key[8..16].copy_from_slice(&seed.to_le_bytes());
        key[16..24].copy_from_slice(&split.to_le_bytes());
        key[24..].copy_from_slice(&(index as u64).to_le_bytes());
        Self(ChaCha8Rng::from_seed(key))
    }

    /// 0 to 255.
    fn byte(&mut self) -> i32 {
        (self.0.next_u32() >> 24) as i32
    }

    /// −`most` to `most`.
    fn within(&mut self, most: i32) -> i32 {
        let count = 2 * most as u64 + 1;
        ((u64::from(self.0.next_u32()) * count) >> 32) as i32 - most
    }

    /// `low` to below `high`.
    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (f64::from(self.0.next_u32() >> 8) / f64::from(1 << 24))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pictures_are_the_same_bits_on_every_machine() {
        let prints = [Split::Train, Split::Test].map(|s| generate(42, s, 200).fingerprint());
        assert_eq!(prints, FROZEN);
    }

    /// A change here changes what every recorded run on shapes was measured on.
    const FROZEN: [&str; 2] = [
        "96f699ada6a34967a3d5ba0b3172176928b6b065ab3bfeb131877f257c1094d7",
        "370fee983905da351ef4c6c8726e9b8b6134934885f01e7610dbcbcd56fbd93b",
    ];

    #[test]
    fn a_longer_set_begins_with_the_shorter_one() {
        let long = generate(1, Split::Train, 37);
        assert_eq!(long.take_first(13), generate(1, Split::Train, 13));
        assert_eq!(generate(1, Split::Train, 0).len(), 0);
    }

    #[test]
    fn seed_split_and_index_each_change_the_picture() {
        let set = generate(1, Split::Train, 11);
        assert_ne!(set.image(0), set.image(10), "same class, other index");
        assert_ne!(set.image(0), generate(2, Split::Train, 1).image(0));
        assert_ne!(set.image(0), generate(1, Split::Test, 1).image(0));
    }

    #[test]
    fn classes_are_balanced() {
        assert_eq!(generate(1, Split::Test, 500).class_counts(), [50; 10]);
    }

    /// Pixels in −1 to 1 and a constant 1.
    fn features(set: &ImageSet) -> Vec<Vec<f32>> {
        let scaled = |&x: &u8| f32::from(x) / 127.5 - 1.0;
        (0..set.len())
            .map(|i| set.image(i).iter().map(scaled).chain([1.0]).collect())
            .collect()
    }

    fn dot(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0f32; 16];
        for (a, b) in a.chunks_exact(16).zip(b.chunks_exact(16)) {
            for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *lane += a * b;
            }
        }
        let rest = a.len() - a.len() % 16;
        let tail = a[rest..].iter().zip(&b[rest..]).map(|(a, b)| a * b);
        lanes.iter().copied().chain(tail).sum()
    }

    /// Share of `set` on which the largest of the ten linear `weights` is the right one.
    fn linear_accuracy(weights: &[Vec<f32>], features: &[Vec<f32>], set: &ImageSet) -> f64 {
        let right = features.iter().zip(set.labels()).filter(|(x, label)| {
            let best =
                (0..CLASSES).max_by(|&a, &b| dot(&weights[a], x).total_cmp(&dot(&weights[b], x)));
            best == Some(usize::from(**label))
        });
        right.count() as f64 / set.len() as f64
    }

    /// Softmax regression by SGD, with the best of its epochs on the test set: more than any
    /// honest use of it would reach.
    #[test]
    fn a_linear_classifier_of_the_pixels_does_not_tell_the_classes_apart() {
        let (train, test) = (
            generate(0, Split::Train, 4000),
            generate(0, Split::Test, 1000),
        );
        let (train_x, test_x) = (features(&train), features(&test));
        let mut weights = vec![vec![0f32; IMAGE_BYTES + 1]; CLASSES];
        let mut best = 0f64;
        for epoch in 0..12 {
            let rate = 0.001 / (1.0 + epoch as f32);
            for (x, &label) in train_x.iter().zip(train.labels()) {
                let logits: Vec<f32> = weights.iter().map(|w| dot(w, x)).collect();
                let largest = logits.iter().copied().fold(f32::MIN, f32::max);
                let powers: Vec<f32> = logits.iter().map(|l| (l - largest).exp()).collect();
                let sum: f32 = powers.iter().sum();
                for (class, weights) in weights.iter_mut().enumerate() {
                    let target = f32::from(u8::from(class == usize::from(label)));
                    let step = rate * (target - powers[class] / sum);
                    for (w, x) in weights.iter_mut().zip(x) {
                        *w += step * x;
                    }
                }
            }
            best = best.max(linear_accuracy(&weights, &test_x, &test));
        }
        let on_train = linear_accuracy(&weights, &train_x, &train);
        println!("softmax regression: test {best:.3} at best, train {on_train:.3}");
        assert!(
            on_train > 0.2,
            "it has learned something by heart: {on_train}"
        );
        assert!(best < 0.40, "{best}");
    }

    #[test]
    fn the_mean_picture_of_a_class_does_not_tell_it_apart() {
        let (train, test) = (
            generate(0, Split::Train, 4000),
            generate(0, Split::Test, 1000),
        );
        let mut means = vec![vec![0f32; IMAGE_BYTES + 1]; CLASSES];
        for (x, &label) in features(&train).iter().zip(train.labels()) {
            for (mean, x) in means[usize::from(label)].iter_mut().zip(x) {
                *mean += x / 400.0;
            }
        }
        // |x − m|² is least where x·m − |m|²/2 is largest, which is linear in x.
        for mean in &mut means {
            mean[IMAGE_BYTES] = 0.0;
            mean[IMAGE_BYTES] = -dot(mean, mean) / 2.0;
        }
        let accuracy = linear_accuracy(&means, &features(&test), &test);
        println!("nearest class mean: test {accuracy:.3}");
        assert!(accuracy < 0.25, "{accuracy}");
    }

    #[test]
    fn figure_and_ground_swap_their_brightness_as_often_as_not() {
        let set = generate(0, Split::Train, 2000);
        // The disc covers the centre and leaves the corner free.
        let brightness = |image: &[u8], at: usize| -> i32 {
            [0, 1, 2]
                .iter()
                .map(|c| i32::from(image[c * 1024 + at]))
                .sum()
        };
        let discs: Vec<_> = (0..set.len()).filter(|&i| set.label(i) == 0).collect();
        let lighter = discs.iter().filter(|&&i| {
            let image = set.image(i);
            brightness(image, 16 * SIDE + 16) > brightness(image, 0)
        });
        // 100 of 200 expected; four standard deviations are 28.
        let count = lighter.count();
        assert!((72..=128).contains(&count), "{count} of {}", discs.len());
    }
}
