//! Numbers that Rust and Python make alike, from a name alone; the definition
//! is written out in `tools/pytorch/seeded_weights.py`.

/// Uniform f32 numbers of width `width` around 0, in row-major order.
pub fn seeded_values(name: &str, count: usize, width: f64) -> Vec<f32> {
    bits(name, count)
        .map(|z| (((z >> 40) as f64 / (1u64 << 24) as f64 - 0.5) * width) as f32)
        .collect()
}

/// Whole numbers below `below`.
pub fn seeded_indices(name: &str, count: usize, below: u64) -> Vec<u32> {
    bits(name, count).map(|z| (z % below) as u32).collect()
}

/// A weight as the parity fixtures use it: standard deviation √(2 / fan_in),
/// or 0.05 for a bias.
pub fn seeded_weight(name: &str, dims: &[usize]) -> Vec<f32> {
    let std = match dims {
        [_, fan @ ..] if !fan.is_empty() => (2.0 / fan.iter().product::<usize>() as f64).sqrt(),
        _ => 0.05,
    };
    seeded_values(name, dims.iter().product(), 2.0 * 3f64.sqrt() * std)
}

fn bits(name: &str, count: usize) -> impl Iterator<Item = u64> {
    let hash = name.bytes().fold(0xCBF2_9CE4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3)
    });
    (0..count as u64).map(move |i| {
        let z = hash.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generator_gives_the_test_values_of_the_python_side() {
        let values: Vec<u64> = bits("input", 3).collect();
        let expected = [
            0x02E1_7CA9_0FF2_EC39,
            0x190A_9F76_A9BD_8BF6,
            0xA701_17D0_9CB2_BC5B,
        ];
        assert_eq!(values, expected);
    }
}
