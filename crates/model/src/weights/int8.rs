//! Weights stored as signed bytes with one scale per row: a value is `byte · scale`.

use super::ggml::blocks::{Convert, for_each_block};

/// The bytes of finite rows, and each row's scale.
///
/// A scale is the row's largest magnitude through 127, so bytes are in ±127. A row of zeros has the scale 1.
/// `columns` is not zero; values that fill no row are left out.
#[must_use]
pub fn quantise_rows(values: &[f32], columns: usize) -> (Vec<i8>, Vec<f32>) {
    let mut bytes = Vec::with_capacity(values.len());
    let mut scales = Vec::with_capacity(values.len() / columns.max(1));
    for row in values.chunks_exact(columns.max(1)) {
        let largest = row.iter().fold(0f32, |largest, v| largest.max(v.abs()));
        // The smallest normal number keeps a scale's inverse finite.
        let scale = if largest == 0.0 { 1.0 } else { (largest / 127.0).max(f32::MIN_POSITIVE) };
        let inverse = 1.0 / scale;
        bytes.extend(row.iter().map(|v| (v * inverse).round_ties_even() as i8));
        scales.push(scale);
    }
    (bytes, scales)
}

/// The values of a row, or of a part of it.
///
/// Panics: there are not as many bytes as values.
pub fn dequantise(bytes: &[u8], scale: f32, out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len(), "bytes and values");
    let whole = out.len() / WIDTH * WIDTH;
    for_each_block(bytes, out, Scaled(scale));
    for (value, byte) in out[whole..].iter_mut().zip(&bytes[whole..]) {
        *value = f32::from(*byte as i8) * scale;
    }
}

/// Values that are converted together.
const WIDTH: usize = 32;

struct Scaled(f32);

impl Convert<u8, f32, WIDTH, WIDTH> for Scaled {
    #[inline(always)]
    fn block(&self, bytes: &[u8; WIDTH], values: &mut [f32; WIDTH]) {
        for i in 0..WIDTH {
            values[i] = f32::from(bytes[i] as i8) * self.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_has_its_scale_and_comes_back_within_half_a_step() {
        let rows = [vec![0.0; 67], vec![-2.54; 67], (0..67).map(|i| (i - 30) as f32 * 1e-3).collect()].concat();
        let (bytes, scales) = quantise_rows(&rows, 67);
        assert_eq!(scales[0], 1.0);
        assert!(bytes[..67].iter().all(|b| *b == 0) && bytes[67..134].iter().all(|b| *b == -127));
        for ((row, bytes), scale) in rows.chunks(67).zip(bytes.chunks(67)).zip(scales) {
            let bytes: Vec<u8> = bytes.iter().map(|b| *b as u8).collect();
            let mut read = vec![f32::NAN; 67];
            dequantise(&bytes, scale, &mut read);
            for (i, (value, read)) in row.iter().zip(&read).enumerate() {
                assert!((value - read).abs() <= 0.5001 * scale, "{i}: {value} became {read}");
                assert_eq!(*read, f32::from(bytes[i] as i8) * scale);
            }
        }
    }

    #[test]
    fn rows_of_extreme_values_have_finite_scales() {
        for value in [f32::MAX, f32::MIN_POSITIVE, 1e-45] {
            let (_, scales) = quantise_rows(&[value, -value], 2);
            assert!(scales[0].is_normal(), "{value}: {scales:?}");
        }
    }
}
