//! Which pictures, in which order.

use rand::Rng;

use crate::{CLASSES, DataError, ImageSet};

/// A random order of `0..len`, each order equally likely.
///
/// The Fisher–Yates shuffle, from the last position down: position `i` is swapped with a position
/// drawn from `0..=i`. The draw is written out here, not taken from a library, since a resumed run
/// must find the order that it had and libraries change theirs between versions. It takes one
/// `u64` from `rng` for each position, and another in less than one of 2³² draws.
///
/// # Panics
/// If `len` exceeds `u32::MAX`.
pub fn shuffled_order(len: usize, rng: &mut (impl Rng + ?Sized)) -> Vec<u32> {
    let len = u32::try_from(len).expect("at most u32::MAX pictures");
    let mut order: Vec<u32> = (0..len).collect();
    for i in (1..order.len()).rev() {
        let j = below(i as u64 + 1, rng);
        order.swap(i, j as usize);
    }
    order
}

/// Splits `set` into what remains for training and `validation` pictures, drawn by `rng`.
///
/// Stratified: each class gives the same share, up to rounding (the largest remainders are rounded
/// up, the lower class first among equals). Both parts keep the order of `set`. With `validation`
/// 0 the second part is empty.
///
/// Returns (train, validation).
///
/// # Errors
/// [`DataError::Validation`] if nothing would remain to train on.
pub fn stratified_split(
    set: &ImageSet,
    validation: usize,
    rng: &mut (impl Rng + ?Sized),
) -> Result<(ImageSet, ImageSet), DataError> {
    let len = set.len();
    if validation >= len {
        return Err(DataError::Validation { validation, len });
    }
    let quotas = quotas(set.class_counts(), validation, len);
    let mut chosen = vec![false; len];
    for (class, &quota) in quotas.iter().enumerate() {
        let members: Vec<usize> = (0..len)
            .filter(|&i| usize::from(set.label(i)) == class)
            .collect();
        let order = shuffled_order(members.len(), rng);
        for &i in &order[..quota] {
            chosen[members[i as usize]] = true;
        }
    }
    let (validation, train): (Vec<usize>, Vec<usize>) = (0..len).partition(|&i| chosen[i]);
    Ok((set.select(&train), set.select(&validation)))
}

/// How many of `total` each class gives; they sum to `total`, which is at most `len`.
fn quotas(counts: [usize; CLASSES], total: usize, len: usize) -> [usize; CLASSES] {
    let mut quotas = counts.map(|count| count * total / len);
    let mut by_remainder: Vec<usize> = (0..CLASSES).collect();
    // The sort is stable: equal remainders stay in the order of the classes.
    by_remainder.sort_by_key(|&class| std::cmp::Reverse(counts[class] * total % len));
    let missing = total - quotas.iter().sum::<usize>();
    for &class in &by_remainder[..missing] {
        quotas[class] += 1;
    }
    quotas
}

/// A number of `0..bound`, each equally likely: Lemire's multiplication, with rejection of the
/// draws that would favour some numbers (arXiv:1805.10941).
fn below(bound: u64, rng: &mut (impl Rng + ?Sized)) -> u64 {
    let rejected_below = bound.wrapping_neg() % bound;
    loop {
        let product = u128::from(rng.next_u64()) * u128::from(bound);
        if product as u64 >= rejected_below {
            return (product >> 64) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::IMAGE_BYTES;
    use crate::shapes::{self, Split};

    fn rng(seed: u64) -> ChaCha8Rng {
        ChaCha8Rng::seed_from_u64(seed)
    }

    #[test]
    fn the_order_holds_every_picture_once() {
        let mut order = shuffled_order(1000, &mut rng(1));
        assert_ne!(order, (0..1000).collect::<Vec<_>>());
        order.sort();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
        assert!(shuffled_order(0, &mut rng(1)).is_empty());
        assert_eq!(shuffled_order(1, &mut rng(1)), [0]);
    }

    #[test]
    fn the_same_seed_gives_the_same_order_on_every_machine_and_version() {
        assert_eq!(shuffled_order(10, &mut rng(7)), FROZEN);
        assert_ne!(shuffled_order(10, &mut rng(8)), FROZEN);
    }

    const FROZEN: [u32; 10] = [4, 6, 2, 0, 8, 3, 7, 5, 9, 1];

    #[test]
    fn each_of_the_six_orders_of_three_is_equally_likely() {
        let mut rng = rng(2);
        let mut counts = std::collections::BTreeMap::new();
        for _ in 0..60_000 {
            *counts.entry(shuffled_order(3, &mut rng)).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 6);
        // 10,000 expected; five standard deviations are 456.
        for (order, count) in counts {
            assert!((9_544..=10_456).contains(&count), "{order:?}: {count}");
        }
    }

    /// A set with `counts[c]` pictures of class `c`, classes mixed, every picture different.
    fn uneven_set(counts: [usize; CLASSES]) -> ImageSet {
        let mut labels: Vec<u8> = Vec::new();
        for round in 0..*counts.iter().max().unwrap() {
            labels.extend((0..10u8).filter(|&c| counts[usize::from(c)] > round));
        }
        let mut pixels = vec![0; labels.len() * IMAGE_BYTES];
        for (i, image) in pixels.chunks_mut(IMAGE_BYTES).enumerate() {
            image[..2].copy_from_slice(&(i as u16).to_le_bytes());
        }
        ImageSet::new(pixels, labels).unwrap()
    }

    fn ids(set: &ImageSet) -> Vec<u16> {
        (0..set.len())
            .map(|i| u16::from_le_bytes([set.image(i)[0], set.image(i)[1]]))
            .collect()
    }

    #[test]
    fn each_class_gives_its_share_to_the_validation_set() {
        let set = shapes::generate(0, Split::Train, 200);
        let (train, validation) = stratified_split(&set, 50, &mut rng(1)).unwrap();
        assert_eq!(validation.class_counts(), [5; 10]);
        assert_eq!(train.class_counts(), [15; 10]);
    }

    #[test]
    fn shares_are_rounded_to_the_size_asked_for() {
        let counts = [30, 1, 2, 10, 7, 0, 5, 3, 11, 8];
        let set = uneven_set(counts);
        for validation in [1, 5, 13, 40, set.len() - 1] {
            let (train, held) = stratified_split(&set, validation, &mut rng(3)).unwrap();
            assert_eq!(held.len(), validation);
            assert_eq!(train.len(), set.len() - validation);
            for (class, &count) in held.class_counts().iter().enumerate() {
                let share = counts[class] as f64 * validation as f64 / set.len() as f64;
                assert!(
                    (count as f64 - share).abs() < 1.0,
                    "class {class}: {count} of {share}"
                );
            }
        }
    }

    #[test]
    fn the_parts_hold_every_picture_once_and_keep_the_order() {
        let set = uneven_set([9; 10]);
        let (train, validation) = stratified_split(&set, 31, &mut rng(3)).unwrap();
        let (train, validation) = (ids(&train), ids(&validation));
        assert!(train.is_sorted() && validation.is_sorted());
        let mut all = [train, validation].concat();
        all.sort();
        assert_eq!(all, ids(&set));
    }

    #[test]
    fn the_split_depends_on_the_seed_alone() {
        let set = uneven_set([9; 10]);
        let split = |seed| stratified_split(&set, 31, &mut rng(seed)).unwrap();
        assert_eq!(split(1), split(1));
        assert_ne!(split(1).1, split(2).1);
    }

    #[test]
    fn no_validation_leaves_the_set_as_it_is() {
        let set = uneven_set([2; 10]);
        let (train, validation) = stratified_split(&set, 0, &mut rng(1)).unwrap();
        assert_eq!(train, set);
        assert!(validation.is_empty());
    }

    #[test]
    fn a_validation_set_that_takes_everything_is_an_error() {
        let error = stratified_split(&uneven_set([1; 10]), 10, &mut rng(1)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a validation set of 10 pictures needs a larger training set than 10"
        );
    }
}
