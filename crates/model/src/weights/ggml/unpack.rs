//! From one block to its values.
//!
//! Loops have constant bounds and no branches, so that they become vector instructions.

use half::f16;

use super::{Q4_0, Q4K, Q5K, Q6K, Q8_0, blocks::Convert};

#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    // The crate's `to_f32` asks for the processor's features each time.
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32_const()
}

/// `d`, then 32 signed bytes.
impl Convert<u8, f32, 34, 32> for Q8_0 {
    #[inline(always)]
    fn block(&self, block: &[u8; 34], out: &mut [f32; 32]) {
        let d = half(block, 0);
        for i in 0..32 {
            out[i] = f32::from(block[2 + i] as i8) * d;
        }
    }
}

/// `d`, then 16 bytes: the low halves are the first 16 values, the high halves the others.
impl Convert<u8, f32, 18, 32> for Q4_0 {
    #[inline(always)]
    fn block(&self, block: &[u8; 18], out: &mut [f32; 32]) {
        let d = half(block, 0);
        let mut levels = [0; 32];
        for i in 0..16 {
            levels[i] = (block[2 + i] & 15).wrapping_sub(8) as i8;
            levels[16 + i] = (block[2 + i] >> 4).wrapping_sub(8) as i8;
        }
        for i in 0..32 {
            out[i] = f32::from(levels[i]) * d;
        }
    }
}

/// 128 bytes of lower 4 bits, 64 bytes of upper 2 bits, 16 scales, `d`.
///
/// Of each 128 values, value `32k + i` has the lower bits in byte `32(k mod 2) + i`, half `k / 2`, and the upper bits in
/// byte `i`, bits `2k`.
impl Convert<u8, f32, 210, 256> for Q6K {
    #[inline(always)]
    fn block(&self, block: &[u8; 210], out: &mut [f32; 256]) {
        let d = half(block, 208);
        for group in 0..2 {
            let (low, high) = (64 * group, 128 + 32 * group);
            for k in 0..4 {
                for part in 0..2 {
                    let scale = d * f32::from(block[192 + 8 * group + 2 * k + part] as i8);
                    for i in 16 * part..16 * part + 16 {
                        let lower = block[low + 32 * (k % 2) + i] >> (4 * (k / 2)) & 15;
                        let upper = block[high + i] >> (2 * k) & 3;
                        out[128 * group + 32 * k + i] = scale * (f32::from(lower | upper << 4) - 32.0);
                    }
                }
            }
        }
    }
}

/// `d`, `e`, 12 bytes of scales, 32 bytes of the fifth bits, then as [`Q4K`].
///
/// Value `32k + i` has its fifth bit in byte `i`, bit `k`.
impl Convert<u8, f32, 176, 256> for Q5K {
    #[inline(always)]
    fn block(&self, block: &[u8; 176], out: &mut [f32; 256]) {
        let (scales, lows) = scales_and_lows(block);
        for k in 0..8 {
            for i in 0..32 {
                let lower = block[48 + 32 * (k / 2) + i] >> (4 * (k % 2)) & 15;
                let upper = block[16 + i] >> k & 1;
                out[32 * k + i] = scales[k] * f32::from(lower | upper << 4) - lows[k];
            }
        }
    }
}

/// `d`, `e`, 12 bytes of scales, then 128 bytes of 4 bits.
///
/// Value `32k + i` is in byte `32(k / 2) + i`, half `k mod 2`.
impl Convert<u8, f32, 144, 256> for Q4K {
    #[inline(always)]
    fn block(&self, block: &[u8; 144], out: &mut [f32; 256]) {
        let (scales, lows) = scales_and_lows(block);
        for k in 0..8 {
            for i in 0..32 {
                let quant = block[16 + 32 * (k / 2) + i] >> (4 * (k % 2)) & 15;
                out[32 * k + i] = scales[k] * f32::from(quant) - lows[k];
            }
        }
    }
}

/// `d·s` and `e·m` of each 32 values.
///
/// Of the 12 bytes, 0 to 3 have the first four `s` and 4 to 7 the first four `m` in their lower 6 bits. The other four
/// have their lower 4 bits in bytes 8 to 11 (`s` low, `m` high) and their upper 2 above the first four.
#[inline(always)]
fn scales_and_lows<const N: usize>(block: &[u8; N]) -> ([f32; 8], [f32; 8]) {
    let (d, e) = (half(block, 0), half(block, 2));
    let (mut scales, mut lows) = ([0.0; 8], [0.0; 8]);
    for i in 0..4 {
        let (s, m, both) = (block[4 + i], block[8 + i], block[12 + i]);
        scales[i] = d * f32::from(s & 63);
        lows[i] = e * f32::from(m & 63);
        scales[4 + i] = d * f32::from(both & 15 | s >> 6 << 4);
        lows[4 + i] = e * f32::from(both >> 4 | m >> 6 << 4);
    }
    (scales, lows)
}
