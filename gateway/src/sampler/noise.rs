//! Seeded noise that is the same on every machine.
//!
//! A counter-based generator (Philox 4x32, 10 rounds): element `i` depends on the seed and `i` alone, so a clip can
//! be drawn in any order and in parts. Box-Muller in f64, with a mathematics library that rounds alike everywhere.

use std::f64::consts::TAU;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Standard normal values `0..count` of a seed.
#[must_use]
pub fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut values = Vec::with_capacity(count + 3);
    for block in 0..count.div_ceil(4) {
        values.extend(normal(seed, block as u64));
    }
    values.truncate(count);
    values
}

/// Values `4·block .. 4·block + 4`.
fn normal(seed: u64, block: u64) -> [f32; 4] {
    let [a, b, c, d] = philox([block as u32, (block >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let [first, second] = [(a, b), (c, d)].map(|(radius, angle)| {
        // (0, 1], so that the logarithm is finite.
        let radius = libm::sqrt(-2.0 * libm::log((f64::from(radius) + 1.0) / 4_294_967_296.0));
        let angle = TAU * (f64::from(angle) / 4_294_967_296.0);
        [(radius * libm::cos(angle)) as f32, (radius * libm::sin(angle)) as f32]
    });
    [first[0], first[1], second[0], second[1]]
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let [low, high] = [(0, 0), (1, 2)].map(|(m, c)| u64::from(MULTIPLIERS[m]) * u64::from(counter[c]));
        counter = [
            (high >> 32) as u32 ^ counter[1] ^ key[0],
            high as u32,
            (low >> 32) as u32 ^ counter[3] ^ key[1],
            low as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the generator's authors.
    #[test]
    fn the_generator_gives_its_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn a_value_depends_on_the_seed_and_its_place_alone() {
        let long = noise(7, 1001);
        assert_eq!(noise(7, 10), long[..10]);
        assert_eq!(noise(7, 1001), long);
        assert_ne!(noise(8, 1001), long);
        assert_ne!(noise(7 | 1 << 40, 1001), long);
        assert!(noise(7, 0).is_empty());
    }

    #[test]
    fn the_moments_are_those_of_the_normal_distribution() {
        let values = noise(1024, 400_000);
        let moment = |p: i32| values.iter().map(|&v| f64::from(v).powi(p)).sum::<f64>() / values.len() as f64;
        assert!(moment(1).abs() < 0.006, "{}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.01, "{}", moment(2));
        assert!(moment(3).abs() < 0.03, "{}", moment(3));
        assert!((moment(4) - 3.0).abs() < 0.07, "{}", moment(4));
        let lag: f64 = values.windows(2).map(|w| f64::from(w[0] * w[1])).sum::<f64>() / values.len() as f64;
        assert!(lag.abs() < 0.006, "{lag}");
        assert!(values.iter().all(|v| v.is_finite()));
    }
}
