//! LLaVA's vision tower: CLIP's picture network up to the hidden state that LLaVA takes.

use candle_core::Tensor;

use super::{
    block::{ClipBlock, EPS},
    config::LlavaConfig,
};
use crate::{
    Error, Result,
    nn::{LayerNorm, Linear},
    weights::{Matrix, Weights},
};

/// The vision tower. Layers after the hidden state that is taken are not read.
#[derive(Debug)]
pub struct VisionTower {
    patch: Linear,
    channels: usize,
    patch_side: usize,
    grid: usize,
    class: Tensor,
    positions: Tensor,
    norm: LayerNorm,
    blocks: Vec<ClipBlock>,
}

impl VisionTower {
    /// Reads the tower from the part of a checkpoint that begins with `embeddings.`, `pre_layrnorm.` and so on.
    pub fn load(weights: &Weights, config: &LlavaConfig) -> Result<Self> {
        let embeddings = weights.pp("embeddings");
        let [width, channels, patch_side, _] = embeddings.dims("patch_embedding.weight")?;
        let [tokens, _] = embeddings.dims("position_embedding.weight")?;
        let grid = tokens.saturating_sub(1).isqrt();
        if grid == 0 || grid * grid + 1 != tokens {
            return Err(embeddings.fault("position_embedding.weight", format!("{tokens} rows are not a square and 1")));
        }
        let patch = embeddings.get(&[width, channels, patch_side, patch_side], "patch_embedding.weight")?;
        let layers = weights.pp("encoder.layers");
        let found = weights.count("encoder.layers", "self_attn.q_proj.weight");
        let needed = layers_for(config.vision_hidden_state_index, config.vision_layers.unwrap_or(found))
            .map_err(|reason| layers.fault("0.self_attn.q_proj.weight", reason))?;
        Ok(Self {
            patch: Linear::new(Matrix::new(&patch.reshape((width, ()))?)?, None),
            channels,
            patch_side,
            grid,
            class: embeddings.get(&[width], "class_embedding")?.reshape((1, width))?,
            positions: embeddings.get(&[tokens, width], "position_embedding.weight")?,
            norm: LayerNorm::load(&weights.pp("pre_layrnorm"), width, EPS)?,
            blocks: (0..needed)
                .map(|i| ClipBlock::load(&layers.pp(i), width, config.vision_heads))
                .collect::<Result<_>>()?,
        })
    }

    /// Side in pixels of the pictures that the tower takes.
    #[must_use]
    pub fn side(&self) -> usize {
        self.grid * self.patch_side
    }

    /// Layers that are read and run.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.blocks.len()
    }

    /// The hidden state that LLaVA takes, class token first.
    ///
    /// - `pixels`: `(3, side, side)`, normalised
    /// - returns: `(patches + 1, width)`
    ///
    /// Errors: a picture of another shape.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let (p, g) = (self.patch_side, self.grid);
        let channels = self.channels;
        let expected = [channels, self.side(), self.side()];
        if pixels.dims() != expected {
            return Err(Error::input("pixels", format!("shape {:?}, expected {expected:?}", pixels.dims())));
        }
        let x = pixels
            .to_device(self.positions.device())?
            .to_dtype(self.positions.dtype())?
            .reshape(&[channels, g, p, g, p])?
            .permute([1, 3, 0, 2, 4])? //            (g, g, channels, p, p)
            .reshape((g * g, channels * p * p))?;
        let x = self.patch.forward(&x)?; //          (patches, width)
        let x = (Tensor::cat(&[&self.class, &x], 0)? + &self.positions)?;
        let mut x = self.norm.forward(&x)?.unsqueeze(0)?;
        for block in &self.blocks {
            x = block.forward(&x, None)?;
        }
        Ok(x.squeeze(0)?)
    }
}

/// How many of `layers` layers give hidden state `index`, which counts from the end: -1 is the last layer's.
pub(super) fn layers_for(index: i64, layers: usize) -> Result<usize, String> {
    let at = i64::try_from(layers).ok().and_then(|layers| (layers + 1).checked_add(index));
    match at.and_then(|at| usize::try_from(at).ok()).filter(|at| (1..=layers).contains(at)) {
        Some(needed) => Ok(needed),
        None => Err(format!("hidden state {index} of {layers} layers, expected -{layers} to -1")),
    }
}
