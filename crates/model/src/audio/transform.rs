//! The Fourier transform of 400 real samples, in f32 and with the roundings of the reference's.
//!
//! What a transform in f32 rounds away is, 80 dB below a loud tone, a part in a thousand of what is there, and the
//! logarithm shows it. A transform in f64 is nearer to the truth, and up to 4e-5 of the spectrum's range away from
//! what the network was given in the reference. The order of operations here is that of the library behind the
//! reference cases (Intel's, without AVX): the numbers are the same to the bit. With AVX that library rounds in yet
//! another order, which moves its own spectrum by as much.

use std::{
    array,
    f64::consts::TAU,
    ops::{Add, Mul, Sub},
};

/// Samples of a frame.
pub(super) const FRAME: usize = 400;
/// Frequencies from 0 to half the sample rate.
pub(super) const BINS: usize = FRAME / 2 + 1;

/// The real samples are taken for half as many complex ones: 200 = 5 x 5 x 8.
const HALF: usize = FRAME / 2;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Complex {
    pub(super) re: f32,
    pub(super) im: f32,
}

const ZERO: Complex = Complex { re: 0.0, im: 0.0 };

impl Complex {
    /// `e^(-2πi·part/whole)`.
    fn root(part: usize, whole: usize) -> Self {
        let angle = TAU * (part % whole) as f64 / whole as f64;
        Self { re: angle.cos() as f32, im: -angle.sin() as f32 }
    }

    /// By `-i`.
    fn turned(self) -> Self {
        Self { re: self.im, im: -self.re }
    }
}

impl Add for Complex {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { re: self.re + other.re, im: self.im + other.im }
    }
}

impl Sub for Complex {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self { re: self.re - other.re, im: self.im - other.im }
    }
}

impl Mul for Complex {
    type Output = Self;

    fn mul(self, other: Self) -> Self {
        Self { re: self.re * other.re - self.im * other.im, im: self.re * other.im + self.im * other.re }
    }
}

impl Mul<Complex> for f32 {
    type Output = Complex;

    fn mul(self, other: Complex) -> Complex {
        Complex { re: self * other.re, im: self * other.im }
    }
}

/// Roots of unity for frames of 400 samples.
#[derive(Debug)]
pub(super) struct Transform {
    inner: [[Complex; 8]; 5],
    outer: [[Complex; 40]; 5],
    /// `(1 - sin)/2` and `cos/2` of each frequency below a quarter of the sample rate.
    split: [(f32, f32); HALF / 2],
    fifths: [Complex; 2],
}

impl Transform {
    pub(super) fn new() -> Self {
        Self {
            inner: array::from_fn(|i| array::from_fn(|k| Complex::root(i * k, 40))),
            outer: array::from_fn(|i| array::from_fn(|k| Complex::root(i * k, HALF))),
            split: array::from_fn(|k| {
                let angle = TAU * k as f64 / FRAME as f64;
                (0.5 - (angle.sin() / 2.0) as f32, (angle.cos() / 2.0) as f32)
            }),
            fifths: [Complex::root(1, 5), Complex::root(2, 5)],
        }
    }

    /// The spectrum of one frame.
    pub(super) fn spectrum(&self, frame: &[f32; FRAME]) -> [Complex; BINS] {
        let z = self.complex(&array::from_fn(|i| Complex { re: frame[2 * i], im: frame[2 * i + 1] }));
        let mut bins = [ZERO; BINS];
        bins[0].re = z[0].re + z[0].im;
        bins[HALF].re = z[0].re - z[0].im;
        bins[HALF / 2] = Complex { re: z[HALF / 2].re, im: -z[HALF / 2].im };
        for (k, (sine, cosine)) in self.split.iter().enumerate().skip(1) {
            let (low, high) = (z[k], z[HALF - k]);
            let (re, im) = (low.re - high.re, low.im + high.im);
            let (even, odd) = (sine * re + cosine * im, sine * im - cosine * re);
            bins[k] = Complex { re: high.re + even, im: odd - high.im };
            bins[HALF - k] = Complex { re: low.re - even, im: odd - low.im };
        }
        bins
    }

    fn complex(&self, z: &[Complex; HALF]) -> [Complex; HALF] {
        let columns: [[Complex; 40]; 5] = array::from_fn(|i| {
            let rows: [[Complex; 8]; 5] = array::from_fn(|j| {
                let samples = array::from_fn(|n| z[i + 5 * j + 25 * n]);
                // The library takes four rows at once, and the fifth by another formula.
                let row = if j < 4 { eight(&samples) } else { eight_by_halves(&samples) };
                if j == 0 { row } else { array::from_fn(|k| row[k] * self.inner[j][k]) }
            });
            let column: [Complex; 40] = self.fives(&rows);
            if i == 0 { column } else { array::from_fn(|k| column[k] * self.outer[i][k]) }
        });
        self.fives(&columns)
    }

    /// Transforms of five over rows of `N`; `M` = 5·`N`.
    fn fives<const N: usize, const M: usize>(&self, rows: &[[Complex; N]; 5]) -> [Complex; M] {
        let mut all = [ZERO; M];
        for k in 0..N {
            for (q, value) in self.five(rows.map(|row| row[k])).into_iter().enumerate() {
                all[k + N * q] = value;
            }
        }
        all
    }

    fn five(&self, v: [Complex; 5]) -> [Complex; 5] {
        let [Complex { re: c1, im: s1 }, Complex { re: c2, im: s2 }] = self.fifths;
        let (sum1, sum2, difference1, difference2) = (v[1] + v[4], v[2] + v[3], v[1] - v[4], v[2] - v[3]);
        let (a1, a2) = (v[0] + (c1 * sum1 + c2 * sum2), v[0] + (c2 * sum1 + c1 * sum2));
        let b1 = (-s1 * difference1 + -s2 * difference2).turned();
        let b2 = (-s2 * difference1 - -s1 * difference2).turned();
        [v[0] + (sum1 + sum2), a1 + b1, a2 + b2, a2 - b2, a1 - b1]
    }
}

/// `√½` in f32.
const ROOT: f32 = std::f32::consts::FRAC_1_SQRT_2;

fn four(v: [Complex; 4]) -> [Complex; 4] {
    let (a, b, c, d) = (v[0] + v[2], v[0] - v[2], v[1] + v[3], (v[1] - v[3]).turned());
    [a + c, b + d, a - c, b - d]
}

fn eight(v: &[Complex; 8]) -> [Complex; 8] {
    let even = four(array::from_fn(|i| v[i] + v[i + 4]));
    let [d0, d1, d2, d3]: [Complex; 4] = array::from_fn(|i| v[i] - v[i + 4]);
    let (d1, d3) = (ROOT * d1, ROOT * d3);
    let (p, q) = (d1 - d3, d1 + d3);
    let (a, b, c, d) = (d0 + p, (d2 + q).turned(), d0 - p, (d2 - q).turned());
    [even[0], a + b, even[1], c - d, even[2], c + d, even[3], a - b]
}

fn eight_by_halves(v: &[Complex; 8]) -> [Complex; 8] {
    let even = four([v[0], v[2], v[4], v[6]]);
    let odd = four([v[1], v[3], v[5], v[7]]);
    let (first, third) = (ROOT * odd[1], ROOT * odd[3]);
    let odd = [
        odd[0],
        Complex { re: first.re + first.im, im: first.im - first.re },
        odd[2].turned(),
        Complex { re: third.im - third.re, im: -(third.re + third.im) },
    ];
    array::from_fn(|k| if k < 4 { even[k] + odd[k] } else { even[k - 4] - odd[k - 4] })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> [f32; FRAME] {
        let mut state = 1u32;
        array::from_fn(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        })
    }

    /// Against the definition in f64. The largest values are about 40.
    #[test]
    fn the_spectrum_is_that_of_the_definition() {
        let frame = frame();
        for (k, bin) in Transform::new().spectrum(&frame).into_iter().enumerate() {
            let (mut re, mut im) = (0.0, 0.0);
            for (n, value) in frame.iter().enumerate() {
                let angle = TAU * (n * k % FRAME) as f64 / FRAME as f64;
                re += f64::from(*value) * angle.cos();
                im -= f64::from(*value) * angle.sin();
            }
            assert!((f64::from(bin.re) - re).abs() < 1e-5 && (f64::from(bin.im) - im).abs() < 1e-5, "{k}: {bin:?}");
        }
    }

    /// `torch.fft.rfft` of the same frame with `MKL_ENABLE_INSTRUCTIONS=SSE4_2`: some bins, and a sum (FNV-1a) of all.
    #[test]
    fn the_roundings_are_those_of_the_reference() {
        let bins = Transform::new().spectrum(&frame());
        for (k, re, im) in [
            (1, 0x4082_bd5e, 0x4111_3c6f),
            (6, 0xbfe5_b2e2, 0x4001_b9f4),
            (57, 0x4057_2a4a, 0x4060_a078),
            (100, 0x412c_d753, 0xc0ce_b2fc),
            (143, 0xc0e3_7938, 0x3e80_ee70),
            (199, 0xc0d8_978d, 0x405d_bb08),
        ] {
            assert_eq!((bins[k].re.to_bits(), bins[k].im.to_bits()), (re, im), "{k}: {:?}", bins[k]);
        }
        // Adding 0 makes -0 and 0 the same.
        let bytes = bins.iter().flat_map(|bin| [bin.re, bin.im]).flat_map(|v| (v + 0.0).to_le_bytes());
        let sum = bytes.fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        assert_eq!(sum, 0xce72_ca82_0bda_76a5);
    }
}
