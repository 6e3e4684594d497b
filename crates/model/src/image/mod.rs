//! Pictures: resizing exactly as the reference's libraries do, the face and its mask, the reference latents.

pub mod face;

mod detector;
mod encoder;
mod face_family;
mod face_network;
mod opencv;
mod pillow;
mod torch_detector;

#[cfg(test)]
mod face_network_tests;
#[cfg(test)]
mod tests;

pub use detector::Detector;
pub use encoder::{ImageEncoder, Reference};
pub use face_network::FaceNetwork;
pub use opencv::resize_cv2_linear;
pub use pillow::{resize_bilinear, resize_lanczos};
pub use torch_detector::unused_detector;

use candle_core::{Device, Tensor};

use crate::{Error, Result};

/// A picture of 8-bit RGB, rows from the top.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb8 {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `height · width · 3` bytes.
    pub data: Vec<u8>,
}

impl Rgb8 {
    /// Wraps pixels.
    ///
    /// Errors: a side of 0, or another number of bytes than the sides ask for.
    pub fn new(width: usize, height: usize, data: Vec<u8>) -> Result<Self> {
        let bytes = width.checked_mul(height).and_then(|pixels| pixels.checked_mul(3));
        if width == 0 || height == 0 || bytes != Some(data.len()) {
            let reason = format!("{} bytes for {width}x{height} pixels of 3 bytes, no side 0", data.len());
            return Err(Error::input("picture", reason));
        }
        Ok(Self { width, height, data })
    }
}

/// What the vision tower sees: resized to a square (the aspect is not kept), scaled and centred per channel.
///
/// - `picture`: of the size that is generated
/// - returns: `(3, side, side)`, f32, on the CPU
pub fn llava_pixels(picture: &Rgb8, side: usize) -> Result<Tensor> {
    const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
    const STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];
    if side == 0 {
        return Err(Error::input("side", "0, at least 1 is needed"));
    }
    let small = resize_bilinear(picture, side, side);
    let values = by_channel(&small, |c, v| (v / 255.0 - MEAN[c]) / STD[c]);
    Ok(Tensor::from_vec(values, (3, side, side), &Device::Cpu)?)
}

/// A picture as the VAE takes it: `(1, 3, 1, H, W)`, f32, -1..1.
fn vae_pixels(picture: &Rgb8, device: &Device) -> Result<Tensor> {
    let values = by_channel(picture, |_, v| v / 127.5 - 1.0);
    Ok(Tensor::from_vec(values, (1, 3, 1, picture.height, picture.width), device)?)
}

/// All values of one channel after the other, each as `f` makes it of the channel's number and the value.
fn by_channel(picture: &Rgb8, f: impl Fn(usize, f32) -> f32) -> Vec<f32> {
    let mut values = Vec::with_capacity(picture.data.len());
    for c in 0..3 {
        values.extend(picture.data.iter().skip(c).step_by(3).map(|v| f(c, f32::from(*v))));
    }
    values
}
