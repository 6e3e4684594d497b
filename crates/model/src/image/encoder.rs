use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::{Detector, Rgb8, face, face::FaceBox, resize_lanczos, vae_pixels};
use crate::{
    Error, Result,
    checkpoint::{Network, Setup, Stage, locate},
    vae::{VaeConfig, VaeEncoder},
};

/// What the transformer needs of a picture.
#[derive(Debug, Clone)]
pub struct Reference {
    /// Latents of the picture `(C, 1, h, w)`, f32, scaled as the transformer takes them.
    pub latents: Tensor,
    /// Where the speech may move the picture `(1, 1, h, w)`, f32, 0..1.
    pub face_mask: Tensor,
    /// Every face that was found, largest first, in pixels of the picture as given; empty where a face was given.
    pub faces: Vec<FaceBox>,
    /// The face that the mask is made of, in pixels of the picture as given; `None` moves all of it.
    pub face: Option<FaceBox>,
}

/// The `image-encoder` stage: a picture to its latents and face mask.
#[derive(Debug, Clone)]
pub struct ImageEncoder {
    /// What the stage's `config.json` says.
    pub config: VaeConfig,
    /// The network.
    pub encoder: VaeEncoder,
    device: Device,
}

impl ImageEncoder {
    /// Opens the stage below a folder of models, in the native layout or in the official one.
    ///
    /// The decoder's tensors may be there too and are not read; any other unknown one is refused.
    pub fn open(models: &Path, setup: &Setup) -> Result<Self> {
        let located = locate(models, Stage::ImageEncoder, setup.choice)?;
        let config = VaeConfig::of(&located)?;
        let weights = located.source(Network::Vae)?.open(setup)?;
        let encoder = VaeEncoder::load(&weights, &config)?;
        weights.refuse_unused(|name| name.starts_with("decoder.") || name.starts_with("post_quant_conv."))?;
        Ok(Self { config, encoder, device: setup.device.clone() })
    }

    /// Encodes a picture at the size that is generated, as the mean of its latents (no sampling).
    ///
    /// One frame is encoded; every latent frame of the still clip is the same.
    ///
    /// - `width`, `height`: pixels, multiples of 16
    /// - `face`: in pixels of the picture as given; `None` looks for the largest
    ///
    /// Errors: another size; a face that is not finite, empty, or outside the picture.
    pub fn encode(&self, picture: &Rgb8, width: u32, height: u32, face: Option<FaceBox>) -> Result<Reference> {
        self.encode_with(picture, (width, height), face, &Detector::BuiltIn)
    }

    /// As [`encode`](Self::encode), with a detector of the caller's choice; it sees the picture at the size that is
    /// generated.
    ///
    /// Errors: also those of the detector.
    pub fn encode_with(
        &self,
        picture: &Rgb8,
        (width, height): (u32, u32),
        face: Option<FaceBox>,
        detector: &Detector,
    ) -> Result<Reference> {
        let unit = 2 * self.config.spatial_compression_ratio;
        for (field, size) in [("width", width as usize), ("height", height as usize)] {
            if size == 0 || size % unit != 0 {
                return Err(Error::input(field, format!("{size} pixels, a multiple of {unit} is needed")));
            }
        }
        if let Some(face) = &face {
            check(face, picture)?;
        }
        let (width, height) = (width as usize, height as usize);
        let resized = resize_lanczos(picture, width, height);
        let (x, y) = (width as f64 / picture.width as f64, height as f64 / picture.height as f64);
        let (faces, chosen) = match face {
            Some(face) => (Vec::new(), Some(face.scaled(x, y))),
            None => {
                let faces = detector.detect(&resized)?;
                let chosen = face::largest(&faces).copied();
                (faces, chosen)
            }
        };
        let mask = face::latent_mask(&face::mask(chosen.as_ref(), width, height), width, height);
        let moments = self.encoder.encode_tiled(&vae_pixels(&resized, &self.device)?)?;
        let shift = self.config.shift_factor.unwrap_or(0.0);
        let latents = ((moments.mean.squeeze(0)?.to_dtype(DType::F32)? - shift)? * self.config.scaling_factor)?; // (C, 1, h, w)
        let (h, w) = (latents.dim(2)?, latents.dim(3)?);
        if h * w != mask.len() {
            let reason = format!("{h}x{w} latents of {height}x{width} pixels, one for 8x8 pixels is needed");
            return Err(Error::input("spatial_compression_ratio", reason));
        }
        // Within the picture, so that a caller can give one of them back.
        let given = |face: &FaceBox| face.scaled(1.0 / x, 1.0 / y).within(picture);
        Ok(Reference {
            face_mask: Tensor::from_vec(mask, (1, 1, h, w), &self.device)?,
            faces: faces.iter().map(given).collect(),
            face: face.or(chosen.as_ref().map(given)),
            latents,
        })
    }
}

fn check(face: &FaceBox, picture: &Rgb8) -> Result<()> {
    let values = [face.x, face.y, face.width, face.height];
    let (width, height) = (picture.width as f64, picture.height as f64);
    let inside = face.x < width && face.y < height && face.x + face.width > 0.0 && face.y + face.height > 0.0;
    if values.iter().all(|v| v.is_finite()) && face.width > 0.0 && face.height > 0.0 && inside {
        return Ok(());
    }
    let reason = format!("x, y, width, height {values:?}, a box within the picture of {width}x{height} is needed");
    Err(Error::input("face", reason))
}
