//! How sums over a channel are cut between blocks. Nothing here needs CUDA, so that it is tested everywhere.

/// Into how many parts the sum over `values` of one channel is cut, and how many values each has; the last may
/// have fewer, and none is empty. Both depend on the number alone, hence the bits of the sum as well.
pub(crate) fn parts_of(values: usize) -> (usize, usize) {
    // 16 values for each of a block's 256 threads, before a second block is worth its sum's way through memory. 64
    // parts of 16 channels and more keep all processors of a large GPU busy.
    let wanted = values.div_ceil(16 * 256).clamp(1, 64);
    let per_part = values.div_ceil(wanted).max(1);
    (values.div_ceil(per_part).max(1), per_part)
}

#[cfg(test)]
mod tests {
    use super::parts_of;

    #[test]
    fn parts_of_a_sum_cover_all_values_and_none_is_empty() {
        for values in (1..10_000).chain([1 << 18, (1 << 18) + 1, 3_211_264, (1 << 31) - 1]) {
            let (parts, per_part) = parts_of(values);
            assert!(parts <= 64, "{values}: {parts} parts");
            assert!(
                parts * per_part >= values,
                "{values}: {parts} of {per_part}"
            );
            assert!(
                (parts - 1) * per_part < values,
                "{values}: the last is empty"
            );
        }
        assert_eq!(parts_of(4096).0, 1);
        assert_eq!(parts_of(3_211_264), (64, 50_176));
    }
}
