//! The 3D causal VAE: pictures to latents and back, 4 frames and 8x8 pixels to one latent.
//!
//! Everything runs on whole tensors `(B, C, T, H, W)`. Convolutions pad by repeating the edge, in time in
//! front only; group normalisation takes its statistics over all frames. Long or large inputs are cut into
//! overlapping tiles ([`tiling`]), whose seams are blended.

mod blocks;
mod config;
mod conv;
mod decoder;
mod encoder;
mod norm;
mod stage;
mod tiling;

#[cfg(test)]
mod tests;

pub use blocks::{MidBlock, Resnet};
pub use config::VaeConfig;
pub use conv::{CausalConv3d, Step};
pub use decoder::VaeDecoder;
pub use encoder::{Moments, VaeEncoder};
pub use norm::{EPS, GroupNorm};
pub use stage::VaeStage;

use candle_core::Tensor;

/// Sees intermediate tensors by name while a network runs.
///
/// The names are those of the layers: `conv_in`, `down_blocks.0`, `mid_attn_tokens`, `mid_block`, `up_blocks.0`.
pub type Tap<'a> = &'a mut dyn FnMut(&str, &Tensor);
