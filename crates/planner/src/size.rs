//! The size of the generated picture.

use std::fmt;

/// Width and height in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PictureSize {
    /// Pixels to the right.
    pub width: u32,
    /// Pixels down.
    pub height: u32,
}

impl fmt::Display for PictureSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

impl PictureSize {
    /// Height and width of the latents: an eighth of the picture's.
    #[must_use]
    pub fn latent(self) -> (usize, usize) {
        (self.height as usize / 8, self.width as usize / 8)
    }
}

/// Size from which the reference's grid of 64 pixels is used.
const COARSE_FROM: u32 = 256;

/// The size at which a picture of `width` x `height` is generated when `size` is asked for.
///
/// The shorter side becomes `size`, the area is bounded (704: x1216, 512: x768, 384: x576, 256: x384, else x1.5
/// size), both sides are rounded to 64, or to 16 below 256: there 64 would miss the request by up to a half,
/// and the network needs only 16.
#[must_use]
pub fn generation_size(size: u32, width: u32, height: u32) -> PictureSize {
    rounded_size(size, width, height, if size < COARSE_FROM { 16 } else { 64 })
}

/// The reference's own rule: always on a grid of 64.
#[must_use]
pub fn reference_size(size: u32, width: u32, height: u32) -> PictureSize {
    rounded_size(size, width, height, 64)
}

fn rounded_size(size: u32, width: u32, height: u32, grid: u32) -> PictureSize {
    let longer = match size {
        704 => 1216.0,
        512 => 768.0,
        384 => 576.0,
        256 => 384.0,
        other => 1.5 * f64::from(other),
    };
    let (w, h, grid_px) = (f64::from(width), f64::from(height), f64::from(grid));
    let area = f64::from(size) * longer;
    let at = |scale: f64| {
        let side = |length: f64| (length * scale / grid_px).round_ties_even() * grid_px;
        (side(w), side(h))
    };
    let (mut new_w, mut new_h) = at(f64::from(size) / w.min(h));
    if new_w * new_h > area {
        (new_w, new_h) = at((area / (w * h)).sqrt());
    }
    // A very long, thin picture would round to nothing.
    PictureSize { width: (new_w as u32).max(grid), height: (new_h as u32).max(grid) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portrait_of_the_specification_keeps_its_size() {
        assert_eq!(reference_size(704, 704, 768), PictureSize { width: 704, height: 768 });
        assert_eq!(generation_size(704, 704, 768).latent(), (96, 88));
    }

    #[test]
    fn small_sizes_are_met_exactly() {
        assert_eq!(generation_size(96, 512, 512), PictureSize { width: 96, height: 96 });
        assert_eq!(generation_size(128, 512, 512), PictureSize { width: 128, height: 128 });
    }

    #[test]
    fn an_extreme_picture_still_has_two_sides() {
        let size = generation_size(256, 12_000, 64);
        assert!(size.width >= 64 && size.height >= 64, "{size}");
    }
}
