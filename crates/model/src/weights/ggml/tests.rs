use candle_core::quantized::k_quants::{BlockQ4_0, BlockQ4K, BlockQ5K, BlockQ6K, BlockQ8_0, GgmlType};
use half::f16;
use proptest::prelude::*;

use super::*;
use crate::weights::{fp8, int8};

const FORMS: [Encoding; 5] = [Encoding::Q8_0, Encoding::Q6K, Encoding::Q5K, Encoding::Q4K, Encoding::Q4_0];

/// Normal values (12 uniform ones added up) of a standard deviation.
pub fn gaussian(count: usize, deviation: f32, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 24) as f32
    };
    (0..count).map(|_| ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * deviation).collect()
}

/// √(Σ(a-b)² / Σa²)
fn error(values: &[f32], read: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let (error, all) =
        values.iter().zip(read).fold((0.0, 0.0), |(error, all), (a, b)| (error + square(a - b), all + square(*a)));
    (error / all).sqrt()
}

fn there_and_back(encoding: Encoding, values: &[f32]) -> Vec<f32> {
    let (mut bytes, mut read) = (Vec::new(), vec![f32::NAN; values.len()]);
    quantise(encoding, values, &mut bytes);
    assert!(finite(encoding, &bytes), "{}", encoding.name());
    dequantise(encoding, &bytes, &mut read);
    read
}

/// The clear twin: each value by itself, from the format's description.
fn clear(encoding: Encoding, bytes: &[u8], index: usize) -> f32 {
    let (each, size) = encoding.block();
    let (block, i) = (&bytes[index / each * size..][..size], index % each);
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let bits = |byte: usize, shift: usize, count: u32| u32::from(block[byte]) >> shift & ((1 << count) - 1);
    // Scale and minimum of the 32 values that value i of a block of 256 is among.
    let line = || {
        let k = i / 32;
        match k {
            0..4 => (bits(4 + k, 0, 6), bits(8 + k, 0, 6)),
            _ => (bits(8 + k, 0, 4) | bits(k, 6, 2) << 4, bits(8 + k, 4, 4) | bits(4 + k, 6, 2) << 4),
        }
    };
    let nibble = |at: usize| bits(at + i / 64 * 32 + i % 32, i / 32 % 2 * 4, 4);
    match encoding {
        Encoding::Q8_0 => f32::from(block[2 + i] as i8) * half(0),
        Encoding::Q4_0 => (bits(2 + i % 16, i / 16 * 4, 4) as f32 - 8.0) * half(0),
        Encoding::Q4K => half(0) * line().0 as f32 * nibble(16) as f32 - half(2) * line().1 as f32,
        Encoding::Q5K => {
            let level = nibble(48) | bits(16 + i % 32, i / 32, 1) << 4;
            half(0) * line().0 as f32 * level as f32 - half(2) * line().1 as f32
        }
        _ => {
            let (group, j) = (i / 128, i % 128);
            let low = bits(64 * group + j % 64, j / 64 * 4, 4);
            let high = bits(128 + 32 * group + j % 32, j / 32 * 2, 2);
            half(208) * f32::from(block[192 + i / 16] as i8) * ((low | high << 4) as f32 - 32.0)
        }
    }
}

/// Random blocks; their halves are made finite.
fn blocks(encoding: Encoding) -> impl Strategy<Value = Vec<u8>> {
    let size = encoding.block().1;
    (1..5usize).prop_flat_map(move |count| prop::collection::vec(any::<u8>(), count * size)).prop_map(
        move |mut bytes| {
            for block in bytes.chunks_exact_mut(size) {
                for at in [1, 3, size - 1] {
                    block[at] &= 0xbf;
                }
            }
            bytes
        },
    )
}

fn by_candle<T: GgmlType>(bytes: &[u8], values: usize) -> Vec<f32> {
    let mut blocks = vec![T::zeros(); values / T::BLCK_SIZE];
    assert_eq!(size_of_val(blocks.as_slice()), bytes.len());
    // SAFETY: the blocks are of integers and halves without gaps, which may hold any bits, and are as long as `bytes`.
    unsafe { blocks.as_mut_ptr().cast::<u8>().copy_from(bytes.as_ptr(), bytes.len()) };
    let mut out = vec![0.0; values];
    T::to_float(&blocks, &mut out);
    out
}

fn there_and_back_by_candle<T: GgmlType>(values: &[f32]) -> Vec<f32> {
    let mut blocks = vec![T::zeros(); values.len() / T::BLCK_SIZE];
    T::from_float(values, &mut blocks);
    let mut out = vec![0.0; values.len()];
    T::to_float(&blocks, &mut out);
    out
}

proptest! {
    #[test]
    fn blocks_mean_what_the_format_says_and_what_candle_reads(
        (encoding, bytes) in prop::sample::select(FORMS.to_vec()).prop_flat_map(|form| (Just(form), blocks(form)))
    ) {
        let (each, size) = encoding.block();
        let count = bytes.len() / size * each;
        prop_assert!(finite(encoding, &bytes));
        let mut fast = vec![f32::NAN; count];
        dequantise(encoding, &bytes, &mut fast);
        let candle = match encoding {
            Encoding::Q8_0 => by_candle::<BlockQ8_0>(&bytes, count),
            Encoding::Q6K => by_candle::<BlockQ6K>(&bytes, count),
            Encoding::Q5K => by_candle::<BlockQ5K>(&bytes, count),
            Encoding::Q4K => by_candle::<BlockQ4K>(&bytes, count),
            _ => by_candle::<BlockQ4_0>(&bytes, count),
        };
        for (i, value) in fast.iter().enumerate() {
            prop_assert_eq!(value.to_bits(), clear(encoding, &bytes, i).to_bits(), "{} value {}", encoding.name(), i);
            prop_assert_eq!(value.to_bits(), candle[i].to_bits(), "{} value {}, candle", encoding.name(), i);
        }
    }

    #[test]
    fn any_finite_values_give_finite_blocks(
        values in prop::collection::vec(any::<f32>().prop_filter("finite", |v| v.is_finite()), 256)
    ) {
        for encoding in FORMS {
            prop_assert!(there_and_back(encoding, &values).iter().all(|v| v.is_finite()), "{}", encoding.name());
        }
    }
}

/// Measured with these 2²⁰ roughly normal values; the bound is a fifth above.
#[test]
fn each_form_keeps_normal_weights_to_its_error() {
    let values = gaussian(1 << 20, 0.02, 1);
    let mut read = vec![0.0; values.len()];
    let (bytes, scales) = int8::quantise_rows(&values, 1024);
    let bytes: Vec<u8> = bytes.into_iter().map(|byte| byte as u8).collect();
    for ((row, scale), read) in bytes.chunks(1024).zip(scales).zip(read.chunks_mut(1024)) {
        int8::dequantise(row, scale, read);
    }
    let int8 = read.clone();
    let (bytes, scale) = fp8::quantise(&values);
    fp8::dequantise_into(&bytes, scale, &mut read);
    for (name, read, measured) in [
        ("q8_0", there_and_back(Encoding::Q8_0, &values), 0.00526),
        ("q6_k", there_and_back(Encoding::Q6K, &values), 0.01717),
        ("q5_k", there_and_back(Encoding::Q5K, &values), 0.03542),
        ("q4_k", there_and_back(Encoding::Q4K, &values), 0.07052),
        ("q4_0", there_and_back(Encoding::Q4_0, &values), 0.07969),
        ("int8", int8, 0.00753),
        ("fp8", read, 0.02639),
    ] {
        let found = error(&values, &read);
        assert!(found < 1.2 * measured, "{name}: {found}, measured {measured}");
    }
}

#[test]
fn no_form_is_worse_than_candles() {
    for deviation in [0.02, 0.001] {
        let values = gaussian(1 << 16, deviation, 2);
        for (encoding, candle) in [
            (Encoding::Q8_0, there_and_back_by_candle::<BlockQ8_0>(&values)),
            (Encoding::Q6K, there_and_back_by_candle::<BlockQ6K>(&values)),
            (Encoding::Q5K, there_and_back_by_candle::<BlockQ5K>(&values)),
            (Encoding::Q4K, there_and_back_by_candle::<BlockQ4K>(&values)),
            (Encoding::Q4_0, there_and_back_by_candle::<BlockQ4_0>(&values)),
        ] {
            let (ours, theirs) = (error(&values, &there_and_back(encoding, &values)), error(&values, &candle));
            assert!(ours <= 1.001 * theirs, "{} at {deviation}: {ours}, candle {theirs}", encoding.name());
        }
    }
}

#[test]
fn values_that_a_form_can_hold_come_back() {
    // One scale of 1/2 for all, and each form's whole range of levels.
    for (encoding, low, high) in
        [(Encoding::Q8_0, -127, 127), (Encoding::Q6K, -32, 31), (Encoding::Q4_0, -8, 7), (Encoding::Q4K, 0, 15)]
    {
        let each = encoding.block().0;
        let values: Vec<f32> = (0..2 * each as i32)
            .map(|i| {
                if i % 16 == 0 {
                    low
                } else if i % 16 == 1 {
                    high
                } else {
                    low + i * 7 % (high - low + 1)
                }
            })
            .map(|level| level as f32 * 0.5)
            .collect();
        let found = error(&values, &there_and_back(encoding, &values));
        assert!(found < 1e-3, "{}: {found}", encoding.name());
    }
}

#[test]
fn zeros_and_equal_values_come_back() {
    for encoding in FORMS {
        for value in [0.0, 1.0, -1.0] {
            let read = there_and_back(encoding, &[value; 256]);
            assert!(read.iter().all(|v| (v - value).abs() < 2e-3), "{} {value}: {:?}", encoding.name(), &read[..4]);
        }
    }
}

#[test]
fn a_scale_that_is_no_number_is_seen_in_any_block() {
    for (encoding, places) in [
        (Encoding::Q8_0, vec![1]),
        (Encoding::Q6K, vec![209]),
        (Encoding::Q5K, vec![1, 3]),
        (Encoding::Q4K, vec![1, 3]),
        (Encoding::Q4_0, vec![1]),
    ] {
        let size = encoding.block().1;
        let sound: Vec<u8> = vec![0x55; 3 * size];
        assert!(finite(encoding, &sound) && finite(encoding, &[]));
        for (place, block) in places.iter().flat_map(|place| (0..3).map(move |block| (place, block))) {
            for infinite in [0x7c, 0xfc, 0x7e] {
                let mut bytes = sound.clone();
                bytes[block * size + place] = infinite;
                assert!(!finite(encoding, &bytes), "{} {place}", encoding.name());
            }
        }
    }
}

#[test]
fn a_shape_fits_when_its_rows_are_whole_blocks() {
    assert!(fits(Encoding::Q4K, &[3, 512]) && fits(Encoding::Q8_0, &[3, 96]));
    for (encoding, shape) in [
        (Encoding::Q4K, &[256, 128][..]),
        (Encoding::Q8_0, &[32, 48]),
        (Encoding::Q8_0, &[]),
        (Encoding::Bf16, &[32]),
        (Encoding::I8, &[32]),
    ] {
        assert!(!fits(encoding, shape), "{} {shape:?}", encoding.name());
    }
}
