//! Weights stored as float8 (e4m3fn) with one scale per layer.
//!
//! Weight-only: a weight becomes `bf16(w8)·bf16(scale)`, rounded to bf16, when it is loaded; nothing else changes.

use half::bf16;

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

/// The layer's weights: `bf16(w8)·bf16(scale)`, rounded to bf16, as f32.
pub fn dequantise_into(bytes: &[u8], scale: f32, out: &mut [f32]) {
    let scale = bf16::from_f32(scale).to_f32();
    let table: [f32; 256] = std::array::from_fn(|b| bf16::from_f32(e4m3_to_f32(b as u8) * scale).to_f32());
    out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = table[usize::from(*byte)]);
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
}
