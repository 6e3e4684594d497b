use std::path::Path;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::{VaeConfig, VaeDecoder};
use crate::{
    Error, Result,
    checkpoint::{Network, Setup, Stage, locate},
};

/// The `vae-decode` stage: latents to frames of 8-bit RGB.
#[derive(Debug, Clone)]
pub struct VaeStage {
    /// What the stage's `config.json` says.
    pub config: VaeConfig,
    /// The network.
    pub decoder: VaeDecoder,
    device: Device,
}

impl VaeStage {
    /// Opens the stage below a folder of models, in the native layout or in the official one.
    ///
    /// The encoder's tensors may be there too and are not read; any other unknown one is refused.
    pub fn open(models: &Path, setup: &Setup) -> Result<Self> {
        let located = locate(models, Stage::VaeDecode, setup.choice)?;
        let config = VaeConfig::of(&located)?;
        let weights = located.source(Network::Vae)?.open(setup)?;
        let decoder = VaeDecoder::load(&weights, &config)?;
        weights.refuse_unused(|name| name.starts_with("encoder.") || name.starts_with("quant_conv."))?;
        Ok(Self { config, decoder, device: setup.device.clone() })
    }

    /// The same stage with tiles `divisor` times shorter; see [`VaeDecoder::with_smaller_tiles`].
    #[must_use]
    pub fn with_smaller_tiles(&self, divisor: usize) -> Self {
        Self { decoder: self.decoder.with_smaller_tiles(&self.config, divisor), ..self.clone() }
    }

    /// Decodes latents as the transformer has them, and hands on runs of `n` frames in order.
    ///
    /// - `latents`: `(C, T, h, w)`, scaled
    /// - `frame_limit`: frames after it are dropped; `None` gives all `4T - 3`
    /// - `emit`: gets `n` and `n·H·W·3` bytes, rows from the top, RGB; its error ends the decoding
    ///
    /// Errors: latents of another shape or not finite (`Input`); pictures that are not finite (`Compute`).
    pub fn decode_frames(
        &self,
        latents: &Tensor,
        frame_limit: Option<usize>,
        emit: &mut dyn FnMut(usize, Vec<u8>) -> Result<()>,
    ) -> Result<()> {
        let (c, t, h, w) = match *latents.dims() {
            [c, t, h, w] if c == self.config.latent_channels && t * h * w > 0 => (c, t, h, w),
            ref dims => {
                let reason = format!("shape {dims:?}, expected ({}, T, h, w), no side 0", self.config.latent_channels);
                return Err(Error::input("latents", reason));
            }
        };
        let values = latents.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(Error::input("latents", format!("{} at element {at}, finite values are needed", values[at])));
        }
        let z = Tensor::from_vec(values, (1, c, t, h, w), &self.device)?;
        let z = ((z / self.config.scaling_factor)? + self.config.shift_factor.unwrap_or(0.0))?;
        let space = self.config.spatial_compression_ratio;
        let (height, width) = (h * space, w * space);
        let mut left = frame_limit.unwrap_or(usize::MAX);
        self.decoder.decode_tiled_each(&z, &mut |frames| {
            let dims = frames.dims().to_vec();
            if dims[1] != 3 || dims[3] != height || dims[4] != width {
                let reason = format!("frames of shape {dims:?}, expected (1, 3, n, {height}, {width})");
                return Err(candle_core::Error::Msg(reason).into());
            }
            let n = dims[2].min(left);
            left -= n;
            if n == 0 {
                return Ok(());
            }
            let values = frames.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            drop(frames);
            emit(n, to_rgb(&values, dims[2], n, height * width)?)
        })
    }
}

/// `(3, frames, pixels)` of -1..1 to `n` frames of interleaved bytes, truncated, not rounded.
fn to_rgb(values: &[f32], frames: usize, n: usize, pixels: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0u8; n * pixels * 3];
    bytes.par_chunks_mut(pixels * 3).enumerate().try_for_each(|(frame, bytes)| {
        for channel in 0..3 {
            let plane = &values[(channel * frames + frame) * pixels..][..pixels];
            for (rgb, &value) in bytes.as_chunks_mut::<3>().0.iter_mut().zip(plane) {
                if !value.is_finite() {
                    let reason = format!("the decoder gave {value} in frame {frame} of a tile");
                    return Err(Error::Compute(candle_core::Error::Msg(reason)));
                }
                rgb[channel] = ((value / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0) as u8;
            }
        }
        Ok(())
    })?;
    Ok(bytes)
}
