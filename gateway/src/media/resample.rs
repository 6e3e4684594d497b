//! Resampling with a windowed-sinc filter that has no delay.
//!
//! Output sample `k` stands at input position `k · from / to`; its value is a Kaiser-windowed sinc, centred exactly
//! there, over the input. Flat to 0.91 of the lower Nyquist frequency, 110 dB down from that frequency on.

use std::num::NonZeroU32;

use rayon::prelude::*;

/// Attenuation beyond the lower Nyquist frequency, dB.
const STOPBAND_DB: f64 = 110.0;
/// End of the pass band, as a part of the lower Nyquist frequency. The stop band begins at 1.
const PASSBAND: f64 = 0.913;
/// Outputs of one phase that share one computed row of coefficients. Bounds the memory of a task.
const OUTPUTS_PER_TASK: usize = 4096;

/// Converts between two fixed rates.
///
/// Coefficients are computed one phase at a time and dropped again: 47999 Hz to 16 kHz has 16000 phases of 492
/// coefficients, so a table of all would be 31 MB, of which a short recording uses little.
#[derive(Debug, Clone)]
pub struct Resampler {
    /// Outputs after which the phases repeat; `to` over the common divisor.
    up: usize,
    /// Inputs after which the phases repeat; `from` over the common divisor.
    down: usize,
    /// Centre of the transition band as a part of the input's Nyquist frequency.
    cutoff: f64,
    /// Half the filter's length in input samples.
    half_width: f64,
    /// Shape parameter of the Kaiser window.
    beta: f64,
}

impl Resampler {
    /// Prepares a conversion `from` one rate `to` another, in Hz.
    #[must_use]
    pub fn new(from: NonZeroU32, to: NonZeroU32) -> Self {
        let (from, to) = (from.get(), to.get());
        let divisor = greatest_common_divisor(from, to);
        // The lower of the two Nyquist frequencies bounds what both sides can hold.
        let band = (f64::from(to) / f64::from(from)).min(1.0);
        // Kaiser's estimates of the length and shape that reach an attenuation.
        let transition = std::f64::consts::PI * (1.0 - PASSBAND);
        let half_width = (STOPBAND_DB - 7.95) / (2.285 * transition) / 2.0;
        Self {
            up: (to / divisor) as usize,
            down: (from / divisor) as usize,
            cutoff: band * (1.0 + PASSBAND) / 2.0,
            half_width: half_width / band,
            beta: 0.1102 * (STOPBAND_DB - 8.7),
        }
    }

    /// How many samples come out for `samples` in: `samples · to / from`, rounded to nearest.
    ///
    /// Rounding keeps the duration within half an output sample; rounding up would grow a recording that is decoded,
    /// resampled and encoded again, rounding down would lose the last frame of speech that just fills it.
    #[must_use]
    pub fn output_len(&self, samples: usize) -> usize {
        let exact = (samples as u128 * self.up as u128 * 2 + self.down as u128) / (self.down as u128 * 2);
        usize::try_from(exact).unwrap_or(usize::MAX)
    }

    /// Resamples one channel. Beyond its ends the input counts as silence.
    ///
    /// Equal rates give back the input bit for bit. The result does not depend on the number of threads.
    #[must_use]
    pub fn process(&self, input: &[f32]) -> Vec<f32> {
        if self.up == self.down {
            return input.to_vec();
        }
        let len = self.output_len(input.len());
        let tasks: Vec<(usize, usize)> = (0..self.up.min(len))
            .flat_map(|phase| (phase..len).step_by(self.up * OUTPUTS_PER_TASK).map(move |first| (phase, first)))
            .collect();
        let parts: Vec<Vec<f32>> = tasks
            .par_iter()
            .map(|&(phase, first)| {
                let row = self.row(phase);
                (first..len).step_by(self.up).take(OUTPUTS_PER_TASK).map(|k| row.apply(input, self.base(k))).collect()
            })
            .collect();
        let mut output = vec![0.0; len];
        for (&(_, first), part) in tasks.iter().zip(&parts) {
            for (slot, value) in output[first..].iter_mut().step_by(self.up).zip(part) {
                *slot = *value;
            }
        }
        output
    }

    /// The last input sample at or before output sample `k`.
    fn base(&self, k: usize) -> usize {
        (k as u128 * self.down as u128 / self.up as u128) as usize
    }

    /// Computes the coefficients of all outputs `phase + j · up`.
    fn row(&self, phase: usize) -> Row {
        let fraction = ((phase as u128 * self.down as u128) % self.up as u128) as f64 / self.up as f64;
        let reach = self.half_width.ceil() as usize;
        let before = reach - 1;
        let exact: Vec<f64> = (0..2 * reach).map(|i| self.kernel(fraction + before as f64 - i as f64)).collect();
        // A gain of exactly one at 0 Hz for every phase: no ripple on a constant.
        let sum: f64 = exact.iter().sum();
        Row { before, coefficients: exact.iter().map(|c| (c / sum) as f32).collect() }
    }

    /// The filter at `t` input samples from its centre.
    fn kernel(&self, t: f64) -> f64 {
        let inside = t / self.half_width;
        if inside.abs() >= 1.0 {
            return 0.0;
        }
        let angle = std::f64::consts::PI * self.cutoff * t;
        let sinc = if angle == 0.0 { 1.0 } else { libm::sin(angle) / angle };
        self.cutoff * sinc * bessel_i0(self.beta * (1.0 - inside * inside).sqrt())
    }
}

/// The coefficients of one phase.
struct Row {
    /// Coefficients that lie before the base sample.
    before: usize,
    coefficients: Vec<f32>,
}

impl Row {
    /// One output: the row laid over the input around sample `base`, cut to where there is input.
    fn apply(&self, input: &[f32], base: usize) -> f32 {
        let skipped = self.before.saturating_sub(base);
        let start = (base + skipped).saturating_sub(self.before).min(input.len());
        let count = (self.coefficients.len().saturating_sub(skipped)).min(input.len() - start);
        dot(&self.coefficients[skipped..skipped + count], &input[start..start + count])
    }
}

/// Sum of products in sixteen running sums, which the compiler turns into vector instructions.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (a, a_rest) = a.as_chunks::<16>();
    let (b, b_rest) = b.as_chunks::<16>();
    for (a, b) in a.iter().zip(b) {
        for lane in 0..16 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// Modified Bessel function of the first kind, order zero, by its power series.
fn bessel_i0(x: f64) -> f64 {
    let quarter = x * x / 4.0;
    let (mut sum, mut term) = (1.0, 1.0);
    for k in 1..200 {
        term *= quarter / f64::from(k * k);
        sum += term;
        if term < sum * 1e-17 {
            break;
        }
    }
    sum
}

fn greatest_common_divisor(mut a: u32, mut b: u32) -> u32 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resampler(from: u32, to: u32) -> Resampler {
        Resampler::new(NonZeroU32::new(from).unwrap(), NonZeroU32::new(to).unwrap())
    }

    fn sine(rate: u32, hz: f64, samples: usize) -> Vec<f32> {
        let step = std::f64::consts::TAU * hz / f64::from(rate);
        (0..samples).map(|i| libm::sin(step * i as f64 + 0.3) as f32).collect()
    }

    /// Fits `a sin + b cos` at `hz` to the middle half: amplitude, phase relative to [`sine`] and the rest's RMS.
    fn fit(signal: &[f32], rate: u32, hz: f64) -> (f64, f64, f64) {
        let step = std::f64::consts::TAU * hz / f64::from(rate);
        let range = signal.len() / 4..signal.len() * 3 / 4;
        let (mut ss, mut sc, mut cc, mut ys, mut yc) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for i in range.clone() {
            let (s, c) = libm::sincos(step * i as f64 + 0.3);
            let y = f64::from(signal[i]);
            (ss, sc, cc, ys, yc) = (ss + s * s, sc + s * c, cc + c * c, ys + y * s, yc + y * c);
        }
        let determinant = ss * cc - sc * sc;
        let (a, b) = ((ys * cc - yc * sc) / determinant, (yc * ss - ys * sc) / determinant);
        let rest: f64 = range
            .clone()
            .map(|i| {
                let (s, c) = libm::sincos(step * i as f64 + 0.3);
                (f64::from(signal[i]) - a * s - b * c).powi(2)
            })
            .sum();
        ((a * a + b * b).sqrt(), libm::atan2(b, a), (rest / range.len() as f64).sqrt())
    }

    fn decibels(x: f64) -> f64 {
        20.0 * libm::log10(x)
    }

    #[test]
    fn sines_below_0_91_of_nyquist_keep_level_and_phase_and_gain_no_images() {
        for from in [8000, 11025, 22050, 24000, 32000, 44100, 47952, 48000, 96000, 384_000] {
            let filter = resampler(from, 16000);
            let nyquist = f64::from(from.min(16000)) / 2.0;
            for part in [0.01, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.91] {
                let output = filter.process(&sine(from, nyquist * part, from as usize / 2));
                let (gain, phase, rest) = fit(&output, 16000, nyquist * part);
                assert!(decibels(gain).abs() < 0.001, "{from} Hz at {part}: {} dB", decibels(gain));
                // 1e-4 rad at 0.91 of 8 kHz is 3.5e-5 samples of delay.
                assert!(phase.abs() < 1e-4, "{from} Hz at {part}: phase {phase}");
                assert!(decibels(rest) < -110.0, "{from} Hz at {part}: rest {} dB", decibels(rest));
            }
        }
    }

    #[test]
    fn sines_above_the_new_nyquist_disappear() {
        for from in [22050, 24000, 32000, 44100, 47952, 48000, 96000, 192_000] {
            let filter = resampler(from, 16000);
            let mut hz = 8000.0;
            while hz < f64::from(from) / 2.0 {
                let output = filter.process(&sine(from, hz, from as usize / 4));
                let middle = &output[1000..3000];
                let level = (middle.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 2000.0).sqrt();
                assert!(decibels(level) < -108.0, "{from} Hz: {hz} Hz at {} dB", decibels(level));
                hz += f64::from(from) / 57.0;
            }
        }
    }

    #[test]
    fn an_impulse_stays_where_it_is() {
        for (from, at) in [(8000, 4000), (44100, 22050), (48000, 24000), (47952, 23976), (96000, 48000)] {
            let mut input = vec![0.0; from as usize];
            input[at] = 1.0;
            let output = resampler(from, 16000).process(&input);
            let (peak, _) = output.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
            assert_eq!(peak, 8000, "{from} Hz");
            for offset in 1..200 {
                let (left, right) = (output[8000 - offset], output[8000 + offset]);
                assert!((left - right).abs() < 1e-7, "{from} Hz is not symmetric at {offset}: {left} {right}");
            }
        }
    }

    #[test]
    fn a_constant_keeps_its_value() {
        for from in [1000, 8000, 11025, 44100, 44101, 47952, 48000, 192_000, 384_000] {
            let output = resampler(from, 16000).process(&vec![0.5; from as usize]);
            assert_eq!(output.len(), 16000);
            for value in &output[2000..14000] {
                assert!((value - 0.5).abs() < 1e-6, "{from} Hz: {value}");
            }
        }
    }

    #[test]
    fn equal_rates_are_the_identity() {
        let input = sine(16000, 440.0, 1234);
        assert_eq!(resampler(16000, 16000).process(&input), input);
    }

    #[test]
    fn the_length_is_rounded_to_nearest() {
        for (from, samples, expected) in [
            (44100, 1764, 640),
            (44100, 1763, 640),
            (44100, 1, 0),
            (48000, 1, 0),
            (48000, 2, 1),
            (8000, 3, 6),
            (8000, 0, 0),
        ] {
            let filter = resampler(from, 16000);
            assert_eq!(filter.output_len(samples), expected, "{samples} samples at {from} Hz");
            assert_eq!(filter.process(&vec![0.1; samples]).len(), expected);
        }
    }

    /// Each output straight from the definition, against the phases and tasks.
    #[test]
    fn phases_agree_with_the_definition() {
        for (from, to) in [(44100, 16000), (8000, 16000), (44101, 16000), (48000, 16000), (16000, 48000)] {
            let filter = resampler(from, to);
            let input: Vec<f32> = (0..3000).map(|i| ((i * i * 31 + i * 7) % 201) as f32 / 100.0 - 1.0).collect();
            let output = filter.process(&input);
            for k in (0..output.len()).step_by(37) {
                let position = k as f64 * f64::from(from) / f64::from(to);
                let (mut sum, mut weight) = (0.0, 0.0);
                let reach = filter.half_width.ceil() as i64 + 1;
                for n in position.floor() as i64 - reach..=position.floor() as i64 + reach {
                    let coefficient = filter.kernel(position - n as f64);
                    weight += coefficient;
                    if let Some(x) = usize::try_from(n).ok().and_then(|n| input.get(n)) {
                        sum += coefficient * f64::from(*x);
                    }
                }
                let expected = sum / weight;
                assert!(
                    (f64::from(output[k]) - expected).abs() < 2e-6,
                    "{from} to {to} at {k}: {} {expected}",
                    output[k]
                );
            }
        }
    }
}
