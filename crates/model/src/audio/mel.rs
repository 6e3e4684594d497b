//! Log-mel spectrum of speech, as Whisper takes it.

use std::{array, f64::consts::TAU};

use candle_core::{Device, Tensor};

use super::transform::{BINS, FRAME, Transform};
use crate::{Error, Result};

/// Samples a second of every speech input.
pub const SAMPLE_RATE: usize = 16_000;
/// Samples of one chunk: 30 s.
pub const CHUNK_SAMPLES: usize = 30 * SAMPLE_RATE;
/// Mel bands of the spectrum.
pub const MELS: usize = 80;
/// Columns of one chunk's spectrum: one per 10 ms.
pub const COLUMNS: usize = CHUNK_SAMPLES / HOP;

const HOP: usize = 160;

/// The log-mel spectrum of one chunk of speech.
///
/// - `samples`: mono, 16 kHz; cut or padded with zeros to 30 s
/// - returns: `(80, 3000)`, f32 on the CPU, one column per 10 ms
///
/// Errors: no samples, or one that is not finite or past 65536.
pub fn log_mel(samples: &[f32]) -> Result<Tensor> {
    check_samples(samples)?;
    let padded = padded(samples);
    let window = window();
    let bands = bands();
    let transform = Transform::new();
    let mut mel = vec![0f64; MELS * COLUMNS];
    // The transform has one column more than Whisper takes; it is not computed.
    for column in 0..COLUMNS {
        let start = column * HOP;
        let spectrum = transform.spectrum(&array::from_fn(|i| padded[start + i] * window[i]));
        let power = spectrum.map(|bin| f64::from(bin.re).powi(2) + f64::from(bin.im).powi(2));
        for (m, band) in bands.iter().enumerate() {
            let heard: f64 = power[band.first..].iter().zip(&band.weights).map(|(power, weight)| power * weight).sum();
            mel[m * COLUMNS + column] = heard.max(1e-10).log10();
        }
    }
    // Nothing is more than 80 dB below the chunk's loudest point.
    let floor = mel.iter().copied().fold(f64::NEG_INFINITY, f64::max) - 8.0;
    let mel: Vec<f32> = mel.into_iter().map(|value| ((value.max(floor) + 4.0) / 4.0) as f32).collect();
    Ok(Tensor::from_vec(mel, (MELS, COLUMNS), &Device::Cpu)?)
}

/// The filters that turn power over frequency into power over mel bands.
///
/// - returns: `(201, 80)`, f32 on the CPU: 201 frequencies of 0..8000 Hz by 80 bands
pub fn mel_filters() -> Result<Tensor> {
    let mut filters = vec![0f32; BINS * MELS];
    for (m, band) in bands().iter().enumerate() {
        for (i, weight) in band.weights.iter().enumerate() {
            filters[(band.first + i) * MELS + m] = *weight as f32;
        }
    }
    Ok(Tensor::from_vec(filters, (BINS, MELS), &Device::Cpu)?)
}

/// Most that a sample may be, far past full scale (1, or 32768 where somebody forgot to divide). The transform in f32
/// would overflow at 1e36.
const LOUDEST: f32 = 65_536.0;

/// Refuses speech without samples, or with one that is not finite or past [`LOUDEST`].
pub(super) fn check_samples(samples: &[f32]) -> Result<()> {
    if samples.is_empty() {
        return Err(Error::input("audio", "0 samples, at least 1 is needed"));
    }
    let wrong = samples.iter().enumerate().find(|(_, sample)| !(sample.abs() <= LOUDEST));
    match wrong {
        None => Ok(()),
        Some((at, value)) if value.is_finite() => {
            Err(Error::input("audio", format!("sample {at} is {value}, the limit is {LOUDEST}")))
        }
        Some((at, value)) => Err(Error::input("audio", format!("sample {at} is {value}, expected a finite value"))),
    }
}

/// Where the reference's cosine is the second nearest f32 to the exact one, not the nearest, and the window shows it.
const SECOND_NEAREST: [usize; 12] = [18, 26, 36, 55, 88, 160, 195, 239, 341, 381, 385, 398];

/// The periodic Hann window, rounded as the reference rounds it.
///
/// Its argument in f32 puts it up to 2.5e-7 off the exact one. That leaks more of a loud tone into bands 80 dB below
/// it than a transform in f32 does.
fn window() -> [f32; FRAME] {
    let turn = (TAU / FRAME as f64) as f32;
    array::from_fn(|i| {
        let exact = f64::from(i as f32 * turn).cos();
        let nearest = exact as f32;
        let cosine = match SECOND_NEAREST.contains(&i) {
            false => nearest,
            true if f64::from(nearest) < exact => nearest.next_up(),
            true => nearest.next_down(),
        };
        0.5 - 0.5 * cosine
    })
}

/// The chunk with half a transform before and behind it, each a mirror image of what it adjoins.
fn padded(samples: &[f32]) -> Vec<f32> {
    const SIDE: usize = FRAME / 2;
    let mut padded = vec![0f32; SIDE + CHUNK_SAMPLES + SIDE];
    for (to, from) in padded[SIDE..SIDE + CHUNK_SAMPLES].iter_mut().zip(samples) {
        *to = *from;
    }
    for i in 1..=SIDE {
        padded[SIDE - i] = padded[SIDE + i];
        padded[SIDE + CHUNK_SAMPLES - 1 + i] = padded[SIDE + CHUNK_SAMPLES - 1 - i];
    }
    padded
}

/// One triangular filter: its first frequency bin that is not zero, and the weights from there.
struct Band {
    first: usize,
    weights: Vec<f64>,
}

/// Triangles of equal area on the Slaney mel scale.
fn bands() -> Vec<Band> {
    let top = SAMPLE_RATE as f64 / 2.0;
    let edges: Vec<f64> = (0..MELS + 2).map(|i| mel_to_hz(hz_to_mel(top) * i as f64 / (MELS + 1) as f64)).collect();
    edges
        .windows(3)
        .map(|edge| {
            let weights: Vec<f64> = (0..BINS)
                .map(|bin| {
                    let hz = top * bin as f64 / (BINS - 1) as f64;
                    let rising = (hz - edge[0]) / (edge[1] - edge[0]);
                    let falling = (edge[2] - hz) / (edge[2] - edge[1]);
                    rising.min(falling).max(0.0) * 2.0 / (edge[2] - edge[0])
                })
                .collect();
            let first = weights.iter().position(|w| *w > 0.0).unwrap_or(0);
            let end = weights.iter().rposition(|w| *w > 0.0).map_or(first, |last| last + 1);
            Band { first, weights: weights[first..end].to_vec() }
        })
        .collect()
}

/// Mels are linear up to 1000 Hz (15 mel), then logarithmic: 27 mel for a factor of 6.4.
const LINEAR_HZ: f64 = 1000.0;
const LINEAR_MEL: f64 = 15.0;
const MEL_PER_LOG: f64 = 27.0;

fn hz_to_mel(hz: f64) -> f64 {
    if hz < LINEAR_HZ {
        hz * LINEAR_MEL / LINEAR_HZ
    } else {
        LINEAR_MEL + (hz / LINEAR_HZ).ln() * MEL_PER_LOG / 6.4f64.ln()
    }
}

fn mel_to_hz(mel: f64) -> f64 {
    if mel < LINEAR_MEL {
        mel * LINEAR_HZ / LINEAR_MEL
    } else {
        LINEAR_HZ * ((mel - LINEAR_MEL) * 6.4f64.ln() / MEL_PER_LOG).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of `torch.hann_window(400)`, and the sum (FNV-1a) of all. Exact ones at 1 and 293: 6.168376e-5, 0.554867156.
    #[test]
    fn the_window_is_the_references_to_the_bit() {
        let window = window();
        for (i, bits) in [(0, 0), (1, 948_002_816), (3, 974_225_920), (100, 0x3f00_0000), (293, 1_057_885_122)] {
            assert_eq!(window[i].to_bits(), bits, "{i}: {}", window[i]);
        }
        let bytes = window.iter().flat_map(|v| v.to_le_bytes());
        let sum = bytes.fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        assert_eq!(sum, 0x2445_28f7_03bf_0605);
    }

    /// Each chunk stands alone: 80 dB below its own loudest point, in a scale of a quarter a decade.
    #[test]
    fn no_value_is_more_than_80_db_below_the_loudest() -> Result<()> {
        let tone: Vec<f32> = (0..SAMPLE_RATE).map(|i| 0.5 * (i as f32 * 0.7).sin()).collect();
        let mel = log_mel(&tone)?.flatten_all()?.to_vec1::<f32>()?;
        let (low, high) = mel.iter().fold((f32::MAX, f32::MIN), |(low, high), v| (low.min(*v), high.max(*v)));
        assert!((high - low - 2.0).abs() < 1e-6, "{low} to {high}");
        let silence = log_mel(&[0.0])?.flatten_all()?.to_vec1::<f32>()?;
        assert!(silence.iter().all(|v| *v == -1.5), "{}", silence[0]);
        Ok(())
    }

    #[test]
    fn refuses_nothing_and_values_that_are_not_finite_or_far_too_large() {
        let reason = |samples: &[f32]| log_mel(samples).unwrap_err().to_string();
        assert_eq!(reason(&[]), "audio: 0 samples, at least 1 is needed");
        assert_eq!(reason(&[0.0, f32::NAN]), "audio: sample 1 is NaN, expected a finite value");
        assert_eq!(reason(&[f32::INFINITY]), "audio: sample 0 is inf, expected a finite value");
        assert_eq!(reason(&[0.0, -70_000.0]), "audio: sample 1 is -70000, the limit is 65536");
    }
}
