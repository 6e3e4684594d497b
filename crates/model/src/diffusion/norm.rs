//! The transformer's norms. Their epsilons differ by place, so each place has its function.

use candle_core::Tensor;

use crate::{
    Result,
    nn::{LayerNorm, RmsNorm},
    ops::layer_norm,
    weights::Weights,
};

const BLOCK_EPS: f32 = 1e-6;
const AUDIO_EPS: f32 = 1e-5;

/// The norm of the double blocks, single blocks and the final layer: no weight of its own, then `·(1+scale) + shift`.
///
/// - `x`: `(L, H)`; `shift`, `scale`: `(H)`
pub fn modulated_norm(x: &Tensor, shift: &Tensor, scale: &Tensor) -> candle_core::Result<Tensor> {
    // Modulation has the form of an affine layer norm, which is one pass over the tokens.
    layer_norm(x, &(scale + 1.0)?, shift, BLOCK_EPS)
}

/// The same norm without modulation.
pub fn block_norm(x: &Tensor) -> candle_core::Result<Tensor> {
    let zero = Tensor::zeros(x.dim(candle_core::D::Minus1)?, x.dtype(), x.device())?;
    modulated_norm(x, &zero, &zero)
}

/// The norm of queries and keys, over one head.
pub fn qk_norm(weights: &Weights, width: usize) -> Result<RmsNorm> {
    RmsNorm::load(weights, width, BLOCK_EPS)
}

/// The two norms of a text refiner block.
pub fn refiner_norm(weights: &Weights, width: usize) -> Result<LayerNorm> {
    LayerNorm::load(weights, width, BLOCK_EPS)
}

/// The norm of the audio projection, and both norms of an audio adapter.
pub fn audio_norm(weights: &Weights, width: usize) -> Result<LayerNorm> {
    LayerNorm::load(weights, width, AUDIO_EPS)
}
