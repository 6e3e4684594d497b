//! The block forms that GGUF files hold: some values share a scale, and are small integers beside it.
//!
//! | form | values | bytes | a value is |
//! | --- | --- | --- | --- |
//! | q8_0 | 32 | 34 | `d·q`, q of 8 bits |
//! | q4_0 | 32 | 18 | `d·(q - 8)`, q of 4 bits |
//! | q6_k | 256 | 210 | `d·s·(q - 32)`, q of 6 bits, s of 8 bits for each 16 values |
//! | q5_k | 256 | 176 | `d·s·q - e·m`, q of 5 bits, s and m of 6 bits for each 32 values |
//! | q4_k | 256 | 144 | as q5_k, q of 4 bits |
//!
//! `d` and `e` are half precision, little endian. All products are exact in single precision, so there is one
//! rounding at most, and every correct reader gets the same bits.

pub(in crate::weights) mod blocks;
mod pack;
mod unpack;

#[cfg(test)]
pub(super) mod tests;

use super::stored::Encoding;
use blocks::for_each_block;

// Each converts both ways: `unpack` has the layouts, `pack` chooses the scales.
struct Q8_0;
struct Q4_0;
struct Q6K;
struct Q5K;
struct Q4K;

/// Whether a tensor of this shape can be stored so: each row is a whole number of blocks.
#[must_use]
pub fn fits(encoding: Encoding, shape: &[usize]) -> bool {
    is_block_form(encoding) && shape.last().is_some_and(|side| side.is_multiple_of(encoding.block().0))
}

fn is_block_form(encoding: Encoding) -> bool {
    matches!(encoding, Encoding::Q8_0 | Encoding::Q6K | Encoding::Q5K | Encoding::Q4K | Encoding::Q4_0)
}

/// The values of whole blocks.
///
/// Panics: the encoding is no block form, or the bytes are not as many as `out` has blocks.
pub fn dequantise(encoding: Encoding, bytes: &[u8], out: &mut [f32]) {
    assert_lengths(encoding, bytes.len(), out.len());
    match encoding {
        Encoding::Q8_0 => for_each_block(bytes, out, Q8_0),
        Encoding::Q6K => for_each_block(bytes, out, Q6K),
        Encoding::Q5K => for_each_block(bytes, out, Q5K),
        Encoding::Q4K => for_each_block(bytes, out, Q4K),
        _ => for_each_block(bytes, out, Q4_0),
    }
}

/// Appends the blocks of finite values.
///
/// Scales are the largest that a half holds at most, so the blocks are finite; values past them saturate.
///
/// Panics: the encoding is no block form, or the values do not fill whole blocks.
pub fn quantise(encoding: Encoding, values: &[f32], out: &mut Vec<u8>) {
    let (each, bytes) = encoding.block();
    let start = out.len();
    out.resize(start + values.len() / each * bytes, 0);
    let out = &mut out[start..];
    assert_lengths(encoding, out.len(), values.len());
    match encoding {
        Encoding::Q8_0 => for_each_block(values, out, Q8_0),
        Encoding::Q6K => for_each_block(values, out, Q6K),
        Encoding::Q5K => for_each_block(values, out, Q5K),
        Encoding::Q4K => for_each_block(values, out, Q4K),
        _ => for_each_block(values, out, Q4_0),
    }
}

fn assert_lengths(encoding: Encoding, bytes: usize, values: usize) {
    assert!(is_block_form(encoding), "{} is no block form", encoding.name());
    assert_eq!(encoding.bytes(values), Some(bytes), "bytes of {values} values in {}", encoding.name());
}

/// Whether the scales of all blocks are numbers, which makes all values numbers.
///
/// Panics: the encoding is no block form, or the bytes are not whole blocks.
#[must_use]
pub fn finite(encoding: Encoding, bytes: &[u8]) -> bool {
    let (each, length) = encoding.block();
    assert_lengths(encoding, bytes.len(), bytes.len() / length * each);
    // Where in a block its halves are. All exponent bits set means infinite or NaN.
    let scales: &[usize] = match encoding {
        Encoding::Q6K => &[208],
        Encoding::Q5K | Encoding::Q4K => &[0, 2],
        _ => &[0],
    };
    bytes.chunks_exact(length).all(|block| scales.iter().all(|&at| block[at + 1] & 0x7c != 0x7c))
}
