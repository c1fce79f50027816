//! One seed, many independent streams.
//!
//! A stream is a pure function of (seed, name, index). Nothing is carried from one draw to the
//! next, so the position in a run (epoch, step) is all it takes to restore its randomness: there is
//! no generator state to save, and a resumed run cannot draw other numbers than an uninterrupted
//! one.
//!
//! The trainer draws no weights. Whoever makes a model draws them from `stream(seed, INIT, 0)`: Candle's own generator cannot be
//! seeded on the CPU, so that weights from `Var::randn` or a `VarBuilder` are others in every run. [`rand`] is that of the generator.

pub use rand;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

/// Names the derivation below. It is hashed into every key and recorded in every checkpoint, so
/// that a run begun under another derivation is refused instead of silently continued.
pub const STREAM_SCHEME: &str = "sha256-chacha8-v1";

/// Stream of the initial weights (index 0; 1 for a fresh head).
pub const INIT: &str = "init";
/// Stream of the order of images; index = epoch.
pub const SHUFFLE: &str = "shuffle";
/// Stream of dropout masks; index = step.
pub const DROPOUT: &str = "dropout";
/// Stream of the train/validation split (index 0).
pub const VALIDATION: &str = "validation";

/// The generator of the stream `name` at `index`.
///
/// Its key is the SHA-256 of the scheme, the seed, the name (with its length, so that no two
/// (name, index) pairs share a text) and the index.
pub fn stream(seed: u64, name: &str, index: u64) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(STREAM_SCHEME.as_bytes());
    hash.update(seed.to_le_bytes());
    hash.update((name.len() as u64).to_le_bytes());
    hash.update(name.as_bytes());
    hash.update(index.to_le_bytes());
    ChaCha8Rng::from_seed(hash.finalize().into())
}

/// The seed of the dropout masks of `step` (0-based).
pub fn dropout_seed(seed: u64, step: u64) -> u64 {
    stream(seed, DROPOUT, step).next_u64()
}

/// The seed of the dropout masks of `step` (0-based) for one process of several that train together,
/// see [`Training::distributed`](crate::Training::distributed): rank 0 has the seed of a process that is
/// alone, every other a stream of its own, since equal masks would be no independent draws.
pub fn dropout_seed_of_rank(seed: u64, step: u64, rank: usize) -> u64 {
    match rank {
        0 => dropout_seed(seed, step),
        _ => stream(seed, &format!("{DROPOUT}.rank{rank}"), step).next_u64(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(seed: u64, name: &str, index: u64) -> u64 {
        stream(seed, name, index).next_u64()
    }

    #[test]
    fn the_same_seed_name_and_index_give_the_same_numbers() {
        assert_eq!(first(7, SHUFFLE, 3), first(7, SHUFFLE, 3));
    }

    #[test]
    fn seed_name_and_index_each_change_the_stream() {
        let base = first(7, SHUFFLE, 3);
        assert_ne!(base, first(8, SHUFFLE, 3));
        assert_ne!(base, first(7, DROPOUT, 3));
        assert_ne!(base, first(7, SHUFFLE, 4));
    }

    #[test]
    fn the_ranks_draw_different_masks_and_the_first_those_of_a_single_process() {
        assert_eq!(dropout_seed_of_rank(42, 1, 0), dropout_seed(42, 1));
        let others = [1, 2].map(|rank| dropout_seed_of_rank(42, 1, rank));
        assert_ne!(others[0], others[1]);
        assert_ne!(others[0], dropout_seed(42, 1));
        assert_ne!(others[0], dropout_seed_of_rank(42, 2, 1));
    }

    /// Frozen values: a change here breaks the resumption of every existing run and must come
    /// with a new `STREAM_SCHEME`.
    #[test]
    fn the_derivation_is_frozen() {
        assert_eq!(first(0, INIT, 0), 12_767_145_550_975_993_265);
        assert_eq!(dropout_seed(42, 1), 4_951_222_040_109_721_163);
        assert_eq!(dropout_seed_of_rank(42, 1, 1), 17_220_715_353_952_281_996);
    }
}
