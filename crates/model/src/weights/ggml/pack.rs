//! From values to one block, with the scales that leave the smallest squared error.
//!
//! The layouts are in [`unpack`](super::unpack). Scales are rounded to what the block stores before the values are
//! divided by them: weights near 0.001 have scales among the subnormals of half precision, where that matters.

use half::f16;

use super::{Q4_0, Q4K, Q5K, Q6K, Q8_0, blocks::Convert};

/// Past what any of the forms can hold (at most 65504·127·32), and far from where squares overflow.
const REACH: f32 = 1e9;

/// The values within ±[`REACH`], and none of them NaN.
#[inline(always)]
fn bounded<const N: usize>(values: &[f32; N]) -> [f32; N] {
    let mut bounded = [0.0; N];
    for i in 0..N {
        bounded[i] = within(values[i], -REACH, REACH);
    }
    bounded
}

/// `clamp` has branches, which are in the way of vectors.
#[inline(always)]
fn within(value: f32, low: f32, high: f32) -> f32 {
    value.max(low).min(high)
}

/// Rounds to a whole number in `low..=high`, ties to even.
///
/// Past 2²³ a single has no fraction, so adding 1.5·2²³ rounds; the function `round` would be a call.
#[inline(always)]
fn level(value: f32, low: f32, high: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (within(value, low, high) + SHIFT) - SHIFT
}

/// 1 divided by a scale; a scale of zero makes every level zero.
#[inline(always)]
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// Stores a scale and returns it as a reader will see it.
#[inline(always)]
fn put_half(block: &mut [u8], at: usize, scale: f32) -> f32 {
    let limit = f16::MAX.to_f32_const();
    let half = f16::from_f32_const(within(scale, -limit, limit));
    block[at..at + 2].copy_from_slice(&half.to_le_bytes());
    half.to_f32_const()
}

/// The value that is farthest from zero.
#[inline(always)]
fn farthest(values: &[f32]) -> f32 {
    // Without their sign, singles are in the order of their bits; a maximum of integers is a vector instruction.
    let far = f32::from_bits(values.iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap_or(0));
    if values.contains(&far) { far } else { -far }
}

/// Σab, in eight parts as vectors add.
#[inline(always)]
fn dot<const N: usize>(a: &[f32; N], b: &[f32; N]) -> f32 {
    let mut lanes = [0.0; 8];
    for (a, b) in a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0) {
        for i in 0..8 {
            lanes[i] += a[i] * b[i];
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (b + f)) + ((c + g) + (d + h))
}

/// The smallest or the largest value.
#[inline(always)]
fn extreme(values: &[f32; 32], choose: fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [values[0]; 8];
    for chunk in values.as_chunks::<8>().0 {
        for i in 0..8 {
            lanes[i] = choose(lanes[i], chunk[i]);
        }
    }
    lanes.into_iter().fold(values[0], choose)
}

/// The scale for levels in `-reach..reach`.
///
/// Levels are tried that put the farthest value a little above or below `-reach`; for each, the scale that leaves the
/// smallest squared error is `Σvq / Σq²`, and takes `(Σvq)² / Σq²` off it.
#[inline(always)]
fn scale_about_zero<const N: usize>(values: &[f32; N], reach: f32) -> f32 {
    let far = farthest(values);
    if far == 0.0 {
        return 0.0;
    }
    let (mut best, mut scale) = (0.0, 0.0);
    for step in -5..=5 {
        let inverse = -(reach + 0.15 * step as f32) / far;
        let mut levels = [0.0; N];
        for i in 0..N {
            levels[i] = level(values[i] * inverse, -reach, reach - 1.0);
        }
        let (vq, qq) = (dot(values, &levels), dot(&levels, &levels));
        let gain = vq * vq / qq.max(1.0);
        if gain > best {
            (best, scale) = (gain, vq / qq);
        }
    }
    scale
}

/// Scale and offset below zero (its sign dropped) for levels in `0..=top`.
///
/// As [`scale_about_zero`], with a line instead of a scale: `v ≈ scale·q - low` and `low ≥ 0`.
#[inline(always)]
fn scale_and_low(values: &[f32; 32], top: f32) -> (f32, f32) {
    let (low, high) = (extreme(values, f32::min).min(0.0), extreme(values, f32::max));
    if high <= low {
        return (0.0, -low);
    }
    let total = dot(values, &[1.0; 32]);
    let (mut best, mut line) = (0.0, (0.0, 0.0));
    for step in 0..=20 {
        let inverse = (top - 1.0 + 0.1 * step as f32) / (high - low);
        let mut levels = [0.0; 32];
        for i in 0..32 {
            levels[i] = level((values[i] - low) * inverse, 0.0, top);
        }
        let (q, qq, vq) = (dot(&levels, &[1.0; 32]), dot(&levels, &levels), dot(values, &levels));
        let spread = 32.0 * qq - q * q;
        let offset = if spread > 0.0 { (qq * total - q * vq) / spread } else { 0.0 };
        // An offset above zero cannot be stored, and zero is the best of the others then.
        let (scale, offset) =
            if offset < 0.0 { ((32.0 * vq - total * q) / spread, offset) } else { (vq / qq.max(1.0), 0.0) };
        let gain = scale * vq + offset * total;
        if gain > best && scale > 0.0 {
            (best, line) = (gain, (scale, -offset));
        }
    }
    line
}

impl Convert<f32, u8, 32, 34> for Q8_0 {
    #[inline(always)]
    fn block(&self, values: &[f32; 32], block: &mut [u8; 34]) {
        let values = bounded(values);
        let inverse = inverse(put_half(block, 0, farthest(&values).abs() / 127.0));
        for i in 0..32 {
            block[2 + i] = level(values[i] * inverse, -127.0, 127.0) as i8 as u8;
        }
    }
}

impl Convert<f32, u8, 32, 18> for Q4_0 {
    #[inline(always)]
    fn block(&self, values: &[f32; 32], block: &mut [u8; 18]) {
        let values = bounded(values);
        let inverse = inverse(put_half(block, 0, scale_about_zero(&values, 8.0)));
        let mut levels = [0; 32];
        for i in 0..32 {
            levels[i] = (level(values[i] * inverse, -8.0, 7.0) + 8.0) as u8;
        }
        for i in 0..16 {
            block[2 + i] = levels[i] | levels[16 + i] << 4;
        }
    }
}

impl Convert<f32, u8, 256, 210> for Q6K {
    #[inline(always)]
    fn block(&self, values: &[f32; 256], block: &mut [u8; 210]) {
        let values = bounded(values);
        let mut scales = [0.0; 16];
        for (scale, part) in scales.iter_mut().zip(values.as_chunks::<16>().0) {
            *scale = scale_about_zero(part, 32.0);
        }
        let d = put_half(block, 208, farthest(&scales) / -128.0);
        let mut levels = [0; 256];
        for part in 0..16 {
            let scale = level(scales[part] * inverse(d), -128.0, 127.0);
            block[192 + part] = scale as i8 as u8;
            let inverse = inverse(d * scale);
            for i in 16 * part..16 * part + 16 {
                levels[i] = (level(values[i] * inverse, -32.0, 31.0) + 32.0) as u8;
            }
        }
        for group in 0..2 {
            let levels = &levels[128 * group..128 * group + 128];
            for i in 0..64 {
                block[64 * group + i] = levels[i] & 15 | levels[64 + i] << 4;
            }
            for i in 0..32 {
                block[128 + 32 * group + i] =
                    levels[i] >> 4 | levels[32 + i] >> 4 << 2 | levels[64 + i] >> 4 << 4 | levels[96 + i] >> 4 << 6;
            }
        }
    }
}

impl Convert<f32, u8, 256, 176> for Q5K {
    #[inline(always)]
    fn block(&self, values: &[f32; 256], block: &mut [u8; 176]) {
        let levels = lines(values, block, 31.0);
        put_nibbles(&levels, &mut block[48..]);
        for i in 0..32 {
            let mut byte = 0;
            for k in 0..8 {
                byte |= levels[32 * k + i] >> 4 << k;
            }
            block[16 + i] = byte;
        }
    }
}

impl Convert<f32, u8, 256, 144> for Q4K {
    #[inline(always)]
    fn block(&self, values: &[f32; 256], block: &mut [u8; 144]) {
        let levels = lines(values, block, 15.0);
        put_nibbles(&levels, &mut block[16..]);
    }
}

/// Stores `d`, `e` and the 12 bytes of scales, and returns the levels.
#[inline(always)]
fn lines<const N: usize>(values: &[f32; 256], block: &mut [u8; N], top: f32) -> [u8; 256] {
    let values = bounded(values);
    let (mut scales, mut lows) = ([0.0; 8], [0.0; 8]);
    for (k, part) in values.as_chunks().0.iter().enumerate() {
        (scales[k], lows[k]) = scale_and_low(part, top);
    }
    let d = put_half(block, 0, farthest(&scales) / 63.0);
    let e = put_half(block, 2, farthest(&lows) / 63.0);
    let (mut s, mut m) = ([0; 8], [0; 8]);
    let mut levels = [0; 256];
    for k in 0..8 {
        let scale = level(scales[k] * inverse(d), 0.0, 63.0);
        let low = level(lows[k] * inverse(e), 0.0, 63.0);
        (s[k], m[k]) = (scale as u8, low as u8);
        let (inverse, low) = (inverse(d * scale), e * low);
        for i in 32 * k..32 * k + 32 {
            levels[i] = level((values[i] + low) * inverse, 0.0, top) as u8;
        }
    }
    for i in 0..4 {
        block[4 + i] = s[i] | s[4 + i] >> 4 << 6;
        block[8 + i] = m[i] | m[4 + i] >> 4 << 6;
        block[12 + i] = s[4 + i] & 15 | m[4 + i] << 4;
    }
    levels
}

#[inline(always)]
fn put_nibbles(levels: &[u8; 256], bytes: &mut [u8]) {
    for pair in 0..4 {
        for i in 0..32 {
            bytes[32 * pair + i] = levels[64 * pair + i] & 15 | levels[64 * pair + 32 + i] << 4;
        }
    }
}
