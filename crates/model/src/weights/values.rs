//! Stored values as numbers.

use half::{bf16, f16};
use rayon::prelude::*;

use super::{fp8, stored::Encoding};

/// Bytes that one thread looks at before the next piece: small enough to stop early at a fault.
const PIECE: usize = 4 << 20;

/// What stored values are multiplied by.
#[derive(Debug, Clone)]
pub(super) enum Scale {
    /// Nothing.
    None,
    /// One number for the whole tensor.
    Tensor(f32),
    /// One number for each row.
    Rows(std::sync::Arc<[f32]>),
}

/// Writes `out.len()` values of a matrix, beginning with row `row`; `bytes` are exactly theirs.
///
/// `columns` is the length of a row. Whole rows only.
pub(super) fn decode(encoding: Encoding, scale: &Scale, bytes: &[u8], row: usize, columns: usize, out: &mut [f32]) {
    assert_eq!(encoding.bytes(out.len()), Some(bytes.len()), "the caller gives the bytes of the values");
    match encoding {
        Encoding::F32 => {
            out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(o, b)| *o = f32::from_le_bytes(*b));
        }
        Encoding::Bf16 => widen_bf16(bytes.as_chunks::<2>().0, out),
        Encoding::F16 => widen_f16(bytes.as_chunks::<2>().0, out),
        Encoding::F8E4M3 => match scale {
            Scale::None => fp8::dequantise_into(bytes, 1.0, out),
            Scale::Tensor(scale) => fp8::dequantise_into(bytes, *scale, out),
            Scale::Rows(scales) => by_row(bytes, scales, (row, columns), out, fp8::dequantise_into),
        },
        Encoding::I8 => match scale {
            Scale::None => super::int8::dequantise(bytes, 1.0, out),
            Scale::Tensor(scale) => super::int8::dequantise(bytes, *scale, out),
            Scale::Rows(scales) => by_row(bytes, scales, (row, columns), out, super::int8::dequantise),
        },
        Encoding::Q8_0 | Encoding::Q6K | Encoding::Q5K | Encoding::Q4K | Encoding::Q4_0 => {
            super::ggml::dequantise(encoding, bytes, out);
        }
        Encoding::Other(name) => unreachable!("{name} is refused before its values are asked for"),
    }
}

/// One byte a value, one scale a row.
fn by_row(
    bytes: &[u8],
    scales: &[f32],
    (row, columns): (usize, usize),
    out: &mut [f32],
    f: fn(&[u8], f32, &mut [f32]),
) {
    let scales = &scales[row..];
    for ((bytes, out), scale) in bytes.chunks(columns).zip(out.chunks_mut(columns)).zip(scales) {
        f(bytes, *scale, out);
    }
}

fn widen_bf16(bytes: &[[u8; 2]], out: &mut [f32]) {
    for (out, bytes) in out.iter_mut().zip(bytes) {
        *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    }
}

fn widen_f16(bytes: &[[u8; 2]], out: &mut [f32]) {
    const BLOCK: usize = 64;
    for (out, bytes) in out.chunks_mut(BLOCK).zip(bytes.chunks(BLOCK)) {
        let mut halves = [f16::ZERO; BLOCK];
        halves.iter_mut().zip(bytes).for_each(|(h, b)| *h = f16::from_le_bytes(*b));
        // In blocks this uses the machine's own conversion where it has one.
        half::slice::HalfFloatSliceExt::convert_to_f32_slice(&halves[..out.len()], out);
    }
}

/// Rounds values to those that a 16-bit type can hold.
pub(super) fn round(values: &mut [f32], dtype: candle_core::DType) {
    match dtype {
        candle_core::DType::BF16 => values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
        candle_core::DType::F16 => values.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32()),
        _ => {}
    }
}

/// Whether all values are numbers.
pub(super) fn finite(encoding: Encoding, scale: &Scale, bytes: &[u8]) -> bool {
    let scale = match scale {
        Scale::None => true,
        Scale::Tensor(scale) => scale.is_finite(),
        Scale::Rows(scales) => scales.iter().all(|s| s.is_finite()),
    };
    let (_, block) = encoding.block();
    scale && bytes.par_chunks(PIECE / block * block).all(|piece| finite_piece(encoding, piece))
}

fn finite_piece(encoding: Encoding, bytes: &[u8]) -> bool {
    // All exponent bits set means infinite or NaN. Folding without an early end lets the loop use wide registers.
    match encoding {
        Encoding::F32 => !bytes
            .as_chunks::<4>()
            .0
            .iter()
            .fold(false, |found, b| found | (u32::from_le_bytes(*b) & 0x7f80_0000 == 0x7f80_0000)),
        Encoding::F16 => {
            !bytes.as_chunks::<2>().0.iter().fold(false, |found, b| found | (u16::from_le_bytes(*b) & 0x7c00 == 0x7c00))
        }
        Encoding::Bf16 => {
            !bytes.as_chunks::<2>().0.iter().fold(false, |found, b| found | (u16::from_le_bytes(*b) & 0x7f80 == 0x7f80))
        }
        Encoding::F8E4M3 => fp8::finite(bytes),
        Encoding::I8 | Encoding::Other(_) => true,
        Encoding::Q8_0 | Encoding::Q6K | Encoding::Q5K | Encoding::Q4K | Encoding::Q4_0 => {
            super::ggml::finite(encoding, bytes)
        }
    }
}
