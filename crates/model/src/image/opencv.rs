//! Two-tap linear resizing of 8-bit pictures, as OpenCV does it.

use rayon::prelude::*;

use super::Rgb8;

/// Weights are whole numbers with 11 bits after the point.
const ONE: f32 = 2048.0;

/// Two neighbouring source pixels of one output pixel, and a weight for each.
struct Taps {
    pixels: [usize; 2],
    weights: [i32; 2],
}

fn taps(source: usize, target: usize) -> Vec<Taps> {
    let ratio = source as f64 / target as f64;
    (0..target)
        .map(|i| {
            let centre = ((i as f64 + 0.5) * ratio - 0.5) as f32;
            let floor = centre.floor();
            let fraction = centre - floor;
            let (first, last) = (floor as i64, source as i64 - 1);
            Taps {
                pixels: [first.clamp(0, last) as usize, (first + 1).clamp(0, last) as usize],
                weights: [((1.0 - fraction) * ONE).round_ties_even() as i32, (fraction * ONE).round_ties_even() as i32],
            }
        })
        .collect()
}

/// Resizes with `INTER_LINEAR`: no antialiasing; a level of difference is possible between OpenCV's own versions.
///
/// Sides of 0 are taken as 1.
#[must_use]
pub fn resize_cv2_linear(picture: &Rgb8, width: usize, height: usize) -> Rgb8 {
    let (width, height) = (width.max(1), height.max(1));
    let (across, down) = (taps(picture.width, width), taps(picture.height, height));
    let mut data = vec![0u8; height * width * 3];
    data.par_chunks_mut(width * 3).zip(down.par_iter()).for_each(|(line, rows)| {
        let [upper, lower] =
            rows.pixels.map(|row| picture.data[row * picture.width * 3..][..picture.width * 3].as_chunks::<3>().0);
        for (rgb, columns) in line.as_chunks_mut::<3>().0.iter_mut().zip(&across) {
            let [left, right] = columns.pixels;
            for (channel, value) in rgb.iter_mut().enumerate() {
                let row = |row: &[[u8; 3]]| {
                    i32::from(row[left][channel]) * columns.weights[0]
                        + i32::from(row[right][channel]) * columns.weights[1]
                };
                // The product of two weights has 22 bits after the point; four go before the second
                // multiplication, sixteen after, the last two with the rounding.
                let sum = ((rows.weights[0] * (row(upper) >> 4)) >> 16) + ((rows.weights[1] * (row(lower) >> 4)) >> 16);
                *value = ((sum + 2) >> 2).clamp(0, 255) as u8;
            }
        }
    });
    Rgb8 { width, height, data }
}
