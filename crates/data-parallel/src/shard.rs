//! Which part of a sequence is whose.

use std::ops::Range;

/// The part of `0..len` that belongs to `rank` of `world_size`: contiguous, in the order of the
/// ranks, and none longer than another by more than one; the first ranks have the longer ones.
///
/// ```
/// use data_parallel::shard;
/// let parts: Vec<_> = (0..3).map(|rank| shard(7, rank, 3)).collect();
/// assert_eq!(parts, [0..3, 3..5, 5..7]);
/// ```
pub fn shard(len: usize, rank: usize, world_size: usize) -> Range<usize> {
    let (each, more) = (len / world_size, len % world_size);
    let begin = rank * each + rank.min(more);
    begin..begin + each + usize::from(rank < more)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_follow_each_other_and_cover_everything() {
        for len in 0..20 {
            for world_size in 1..6 {
                let parts: Vec<_> = (0..world_size).map(|r| shard(len, r, world_size)).collect();
                let all: Vec<usize> = parts.iter().cloned().flatten().collect();
                assert_eq!(all, (0..len).collect::<Vec<_>>());
                assert!(parts.is_sorted_by(|a, b| a.len() >= b.len()));
                assert!(parts[0].len() - parts[world_size - 1].len() <= 1);
            }
        }
    }
}
