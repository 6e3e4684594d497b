//! Antialiased resizing of 8-bit pictures, to the bit as Pillow does it.
//!
//! The filter is stretched by the ratio when shrinking. One side is done after the other, with 8-bit values in between:
//! the width first, but the height where it shrinks by more than twice as many pixels as the width (since Pillow 13;
//! before, the width always. Only where one side shrinks much more than the other does a picture differ, mostly by a
//! level).
//! Weights are whole numbers with 22 bits after the point, so that the result does not depend on the machine.

use std::{borrow::Cow, f64::consts::PI};

use rayon::prelude::*;

use super::Rgb8;

/// Bits after the point of a weight: 32, less 8 for the value and 2 for what a filter can overshoot.
const BITS: u32 = 32 - 8 - 2;

/// Resizes with the Lanczos filter of three lobes.
///
/// Sides of 0 are taken as 1.
#[must_use]
pub fn resize_lanczos(picture: &Rgb8, width: usize, height: usize) -> Rgb8 {
    let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) };
    let lanczos = move |x: f64| if (-3.0..3.0).contains(&x) { sinc(x) * sinc(x / 3.0) } else { 0.0 };
    resize(picture, width, height, &Filter { support: 3.0, weight: &lanczos })
}

/// Resizes with the triangle filter.
///
/// Sides of 0 are taken as 1.
#[must_use]
pub fn resize_bilinear(picture: &Rgb8, width: usize, height: usize) -> Rgb8 {
    resize(picture, width, height, &Filter { support: 1.0, weight: &|x: f64| (1.0 - x.abs()).max(0.0) })
}

struct Filter<'a> {
    /// Half its width, in output pixels.
    support: f64,
    weight: &'a dyn Fn(f64) -> f64,
}

/// The source pixels of one output pixel: the first of them, and a weight for each.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

fn taps(source: usize, target: usize, filter: &Filter<'_>) -> Vec<Taps> {
    let ratio = source as f64 / target as f64;
    let stretch = ratio.max(1.0);
    let support = filter.support * stretch;
    (0..target)
        .map(|i| {
            let centre = (i as f64 + 0.5) * ratio;
            // Both bounds round half up; casts cut off the fraction and clamp below at 0.
            let first = (centre - support + 0.5) as usize;
            let end = ((centre + support + 0.5) as usize).min(source);
            let weights: Vec<f64> =
                (first..end).map(|x| (filter.weight)((x as f64 - centre + 0.5) * (1.0 / stretch))).collect();
            let sum: f64 = weights.iter().sum();
            let weights = weights.iter().map(|w| {
                let scaled = if sum == 0.0 { *w } else { w / sum } * f64::from(1u32 << BITS);
                (scaled + 0.5f64.copysign(scaled)) as i32
            });
            Taps { first, weights: weights.collect() }
        })
        .collect()
}

fn clip(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

fn resize(picture: &Rgb8, width: usize, height: usize, filter: &Filter<'_>) -> Rgb8 {
    let (width, height) = (width.max(1), height.max(1));
    let height_first = picture.height.saturating_sub(height) > 2 * picture.width.saturating_sub(width);
    if height_first {
        across(down(Cow::Borrowed(picture), height, filter), width, filter).into_owned()
    } else {
        down(across(Cow::Borrowed(picture), width, filter), height, filter).into_owned()
    }
}

/// Rounds sums to the nearest.
const HALF: i32 = 1 << (BITS - 1);

/// Resizes each row to a width.
fn across<'a>(picture: Cow<'a, Rgb8>, width: usize, filter: &Filter<'_>) -> Cow<'a, Rgb8> {
    if picture.width == width {
        return picture;
    }
    let taps = taps(picture.width, width, filter);
    let mut data = vec![0u8; picture.height * width * 3];
    data.par_chunks_mut(width * 3).zip(picture.data.par_chunks(picture.width * 3)).for_each(|(line, source)| {
        for (rgb, taps) in line.as_chunks_mut::<3>().0.iter_mut().zip(&taps) {
            let mut sums = [HALF; 3];
            for (weight, pixel) in taps.weights.iter().zip(&source.as_chunks::<3>().0[taps.first..]) {
                sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += weight * i32::from(*value));
            }
            *rgb = sums.map(clip);
        }
    });
    Cow::Owned(Rgb8 { width, height: picture.height, data })
}

/// Resizes each column to a height.
fn down<'a>(picture: Cow<'a, Rgb8>, height: usize, filter: &Filter<'_>) -> Cow<'a, Rgb8> {
    if picture.height == height {
        return picture;
    }
    let row = picture.width * 3;
    let taps = taps(picture.height, height, filter);
    let mut data = vec![0u8; height * row];
    data.par_chunks_mut(row).zip(taps.par_iter()).for_each(|(line, taps)| {
        let mut sums = vec![HALF; row];
        for (weight, source) in taps.weights.iter().zip(picture.data.chunks(row).skip(taps.first)) {
            sums.iter_mut().zip(source).for_each(|(sum, value)| *sum += weight * i32::from(*value));
        }
        line.iter_mut().zip(&sums).for_each(|(value, sum)| *value = clip(*sum));
    });
    Cow::Owned(Rgb8 { width: picture.width, height, data })
}
