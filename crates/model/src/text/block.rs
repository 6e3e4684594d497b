//! The layer that CLIP's text network and its vision tower share.

use candle_core::Tensor;

use crate::{
    Result,
    attention::{attention, join_heads, split_heads},
    nn::{LayerNorm, Linear},
    ops::Activation,
    weights::Weights,
};

pub(super) const EPS: f32 = 1e-5;

/// Attention and MLP, each after a normalisation and added to what came in.
#[derive(Debug)]
pub(super) struct ClipBlock {
    heads: usize,
    norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl ClipBlock {
    pub(super) fn load(weights: &Weights, width: usize, heads: usize) -> Result<Self> {
        if heads == 0 || !width.is_multiple_of(heads) {
            let reason = format!("{heads} heads do not divide its width {width}");
            return Err(weights.fault("self_attn.q_proj.weight", reason));
        }
        let square = |name: &str| Linear::load_sized(&weights.pp("self_attn").pp(name), width, width);
        let fc1 = Linear::load(&weights.pp("mlp.fc1"), width)?;
        Ok(Self {
            heads,
            norm1: LayerNorm::load(&weights.pp("layer_norm1"), width, EPS)?,
            q: square("q_proj")?,
            k: square("k_proj")?,
            v: square("v_proj")?,
            out: square("out_proj")?,
            norm2: LayerNorm::load(&weights.pp("layer_norm2"), width, EPS)?,
            fc2: Linear::load_sized(&weights.pp("mlp.fc2"), fc1.out(), width)?,
            fc1,
        })
    }

    /// - `x`: `(B, L, width)`
    /// - `mask`: as [`attention`] takes it
    pub(super) fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> candle_core::Result<Tensor> {
        let heads = |x: &Tensor, linear: &Linear| split_heads(&linear.forward(x)?, self.heads);
        let y = self.norm1.forward(x)?;
        let (q, k, v) = (heads(&y, &self.q)?, heads(&y, &self.k)?, heads(&y, &self.v)?); // (B, heads, L, d)
        let scale = (q.dim(3)? as f64).powf(-0.5);
        let x = (x + self.out.forward(&join_heads(&attention(&q, &k, &v, scale, mask)?)?)?)?;
        let y = self.fc1.forward_then(&self.norm2.forward(&x)?, Activation::QuickGelu)?;
        x + self.fc2.forward(&y)?
    }
}
