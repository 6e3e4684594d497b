//! Weights stored as float8 (e4m3fn) with one scale per layer.
//!
//! Weight-only: a weight becomes `bf16(w8)·bf16(scale)`, rounded to bf16, when it is loaded; nothing else changes.

use half::bf16;

use super::ggml::blocks::{Convert, for_each_block};

/// The value of one e4m3fn byte: 1 sign, 4 exponent (bias 7) and 3 mantissa bits; no infinities, `S.1111.111` is NaN.
#[must_use]
pub fn e4m3_to_f32(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 0xf), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Whether every byte is a number.
#[must_use]
pub fn finite(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| b & 0x7f != 0x7f)
}

/// The layer's weights, or a part of them: `bf16(w8)·bf16(scale)`, rounded to bf16, as f32.
///
/// Without a table, which would take longer to fill than a block of 256 takes to convert.
///
/// Panics: there are not as many bytes as values.
pub fn dequantise_into(bytes: &[u8], scale: f32, out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len(), "bytes and values");
    let scale = bf16::from_f32(scale).to_f32();
    let whole = out.len() / WIDTH * WIDTH;
    for_each_block(bytes, out, Scaled(scale));
    for (value, byte) in out[whole..].iter_mut().zip(&bytes[whole..]) {
        *value = scaled(*byte, scale);
    }
}

/// Values that are converted together.
const WIDTH: usize = 32;

/// Converts both ways with one scale.
struct Scaled(f32);

impl Convert<u8, f32, WIDTH, WIDTH> for Scaled {
    #[inline(always)]
    fn block(&self, bytes: &[u8; WIDTH], values: &mut [f32; WIDTH]) {
        for i in 0..WIDTH {
            values[i] = scaled(bytes[i], self.0);
        }
    }
}

impl Convert<f32, u8, WIDTH, WIDTH> for Scaled {
    #[inline(always)]
    fn block(&self, values: &[f32; WIDTH], bytes: &mut [u8; WIDTH]) {
        for i in 0..WIDTH {
            bytes[i] = f32_to_e4m3(values[i] / self.0);
        }
    }
}

/// `e4m3(byte)·scale`, rounded to bf16.
#[inline(always)]
fn scaled(byte: u8, scale: f32) -> f32 {
    let magnitude = u32::from(byte & 0x7f);
    let value = match magnitude {
        // Exponent and mantissa, with the bias of a single: 127 - 7 more.
        8..0x7f => f32::from_bits((magnitude << 20) + (120 << 23)),
        0x7f => f32::NAN,
        _ => magnitude as f32 / 512.0,
    };
    rounded(f32::from_bits(value.to_bits() | u32::from(byte & 0x80) << 24) * scale)
}

/// The nearest bf16, ties to even.
#[inline(always)]
fn rounded(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

/// The bytes of finite weights, and the layer's scale ([`scale_of`]).
#[must_use]
pub fn quantise(values: &[f32]) -> (Vec<u8>, f32) {
    let scale = scale_of(largest(values));
    let mut bytes = vec![0; values.len()];
    quantise_into(values, scale, &mut bytes);
    (bytes, scale)
}

/// The largest magnitude of finite values.
#[must_use]
pub fn largest(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap_or(0))
}

/// The scale that takes a layer's largest magnitude to 448, the format's largest; it is a bf16, as readers round it
/// to one, and 1 for weights that are all zero.
#[must_use]
pub fn scale_of(largest: f32) -> f32 {
    // The smallest normal number keeps the quotients finite.
    bf16::from_f32(if largest == 0.0 { 1.0 } else { (largest / LARGEST).max(f32::MIN_POSITIVE) }).to_f32()
}

/// The bytes of a layer's finite weights, or of a part of them, by the layer's scale.
///
/// Panics: there are not as many bytes as values.
pub fn quantise_into(values: &[f32], scale: f32, bytes: &mut [u8]) {
    assert_eq!(bytes.len(), values.len(), "bytes and values");
    let whole = values.len() / WIDTH * WIDTH;
    for_each_block(values, bytes, Scaled(scale));
    for (byte, value) in bytes[whole..].iter_mut().zip(&values[whole..]) {
        *byte = f32_to_e4m3(value / scale);
    }
}

/// The largest value of a byte.
const LARGEST: f32 = 448.0;

/// The nearest byte, ties to even; past ±448 that of ±448.
#[inline(always)]
fn f32_to_e4m3(value: f32) -> u8 {
    let magnitude = value.abs().min(LARGEST);
    // From 2^-6 on there are three bits of mantissa: the others are rounded off. Below, bytes count in steps of 2^-9,
    // and adding 1.5·2^23 of them leaves the count in the lowest bits.
    let normal = magnitude.to_bits();
    let normal = normal.wrapping_add(0x7_ffff + (normal >> 20 & 1)).wrapping_sub(120 << 23) >> 20;
    let subnormal = (magnitude * 512.0 + 12_582_912.0).to_bits();
    let byte = if magnitude < 0.015_625 { subnormal } else { normal } & 0x7f;
    byte as u8 | (value.to_bits() >> 24 & 0x80) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_the_values_of_the_format() {
        for (byte, value) in
            [(0x00, 0.0), (0x01, 0.001_953_125), (0x08, 0.015_625), (0x38, 1.0), (0x7e, 448.0), (0xb8, -1.0)]
        {
            assert_eq!(e4m3_to_f32(byte), value, "{byte:#x}");
        }
        assert!(e4m3_to_f32(0x7f).is_nan() && e4m3_to_f32(0xff).is_nan());
        assert!(finite(&[0x7e, 0xfe]) && !finite(&[0x00, 0xff]));
    }

    #[test]
    fn all_bytes_become_what_the_table_has() {
        let bytes: Vec<u8> = (0..=255).chain(0..=36).collect();
        for scale in [1.0, 0.003_21, -0.7, 1e-38, 3e38, 1.003_906_3] {
            let mut values = vec![0.0; bytes.len()];
            dequantise_into(&bytes, scale, &mut values);
            for (byte, value) in bytes.iter().zip(values) {
                let expected = bf16::from_f32(e4m3_to_f32(*byte) * bf16::from_f32(scale).to_f32()).to_f32();
                let same = value.to_bits() == expected.to_bits() || value.is_nan() && expected.is_nan();
                assert!(same, "{byte:#x} at {scale}: {value}, expected {expected}");
            }
        }
    }

    #[test]
    fn a_value_becomes_the_nearest_byte_and_of_two_the_even_one() {
        for byte in (0..0x7f).chain(0x80..0xff) {
            assert_eq!(f32_to_e4m3(e4m3_to_f32(byte)), byte);
        }
        for byte in 0..0x7e {
            let (low, high) = (e4m3_to_f32(byte), e4m3_to_f32(byte + 1));
            let middle = (low + high) / 2.0;
            assert_eq!(f32_to_e4m3(middle), byte + byte % 2, "between {low} and {high}");
            assert_eq!(f32_to_e4m3(middle.next_down()), byte);
            assert_eq!(f32_to_e4m3(-middle.next_up()), 0x80 | (byte + 1));
        }
        assert_eq!((f32_to_e4m3(1e9), f32_to_e4m3(f32::NEG_INFINITY)), (0x7e, 0xfe));
    }

    #[test]
    fn a_scale_is_a_bf16_and_takes_the_largest_weight_to_the_largest_byte() {
        for largest in [0.123, 7.0, 448.0, 1e-6, f32::MAX] {
            let values: Vec<f32> = (0..71).map(|i| largest * (i - 70) as f32 / 70.0).collect();
            let (bytes, scale) = quantise(&values);
            assert_eq!(bf16::from_f32(scale).to_f32(), scale);
            assert_eq!((bytes[0], bytes[70]), (0xfe, 0), "{largest}");
            assert!(finite(&bytes));
        }
        assert_eq!(quantise(&[0.0; 40]), (vec![0; 40], 1.0));
        assert!(quantise(&[1e-45; 3]).1.is_normal());
    }
}
