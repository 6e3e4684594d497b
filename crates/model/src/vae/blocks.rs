use candle_core::Tensor;

use super::{CausalConv3d, GroupNorm, Step, Tap, VaeConfig};
use crate::{Result, attention::attention, nn::Linear, weights::Weights};

/// Two convolutions with norms before them, added to the input.
#[derive(Debug, Clone)]
pub struct Resnet {
    norm1: GroupNorm,
    conv1: CausalConv3d,
    norm2: GroupNorm,
    conv2: CausalConv3d,
    shortcut: Option<CausalConv3d>,
}

impl Resnet {
    /// Reads `norm1`, `conv1.conv`, `norm2`, `conv2.conv`, and `conv_shortcut.conv` where the width changes.
    pub fn load(weights: &Weights, groups: usize) -> Result<Self> {
        let norm1 = GroupNorm::load(&weights.pp("norm1"), groups)?;
        let inp = norm1.channels();
        let conv1 = CausalConv3d::load(&weights.pp("conv1.conv"), inp, [1; 3])?;
        let norm2 = GroupNorm::load(&weights.pp("norm2"), groups)?;
        let conv2 = CausalConv3d::load(&weights.pp("conv2.conv"), conv1.out(), [1; 3])?;
        let shortcut = match conv2.out() == inp {
            true => None,
            false => Some(CausalConv3d::load(&weights.pp("conv_shortcut.conv"), inp, [1; 3])?),
        };
        Ok(Self { norm1, conv1, norm2, conv2, shortcut })
    }

    /// Output channels.
    #[must_use]
    pub fn out(&self) -> usize {
        self.conv2.out()
    }

    /// Takes its input, so that its memory is free before the last product.
    ///
    /// - `x`: `(B, C, T, H, W)`
    /// - returns: `(B, O, T, H, W)`
    pub fn forward(&self, x: Tensor) -> Result<Tensor> {
        let h = self.conv1.forward(&self.norm1.forward_silu(&x)?)?;
        let normed = self.norm2.forward_silu(&h)?;
        drop(h);
        let residual = match &self.shortcut {
            Some(shortcut) => shortcut.forward(&x)?,
            None => x,
        };
        self.conv2.forward_step(&normed, Step { residual: Some(&residual), ..Step::default() })
    }
}

/// Attention over all positions, one head, added to the input.
#[derive(Debug, Clone)]
struct MidAttention {
    norm: GroupNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    causal: bool,
}

impl MidAttention {
    fn load(weights: &Weights, config: &VaeConfig) -> Result<Self> {
        let norm = GroupNorm::load(&weights.pp("group_norm"), config.norm_num_groups)?;
        let width = norm.channels();
        let q = Linear::load(&weights.pp("to_q"), width)?;
        Ok(Self {
            k: Linear::load_sized(&weights.pp("to_k"), width, q.out())?,
            v: Linear::load_sized(&weights.pp("to_v"), width, q.out())?,
            out: Linear::load_sized(&weights.pp("to_out.0"), q.out(), width)?,
            causal: config.mid_block_causal_attn,
            norm,
            q,
        })
    }

    /// - `x`: `(B, C, T, H, W)`
    /// - returns: tokens `(B, T·H·W, C)`
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, c, t, h, w) = x.dims5()?;
        let tokens = self.norm.forward(x)?.reshape((b, c, t * h * w))?.transpose(1, 2)?.contiguous()?;
        let heads = |linear: &Linear| linear.forward(&tokens)?.unsqueeze(1); // (B, 1, T·H·W, width)
        let (q, k, v) = (heads(&self.q)?, heads(&self.k)?, heads(&self.v)?);
        drop(tokens);
        let scale = 1.0 / (self.q.out() as f64).sqrt();
        let y = if self.causal {
            // The positions of a frame see those of their own frame and before: no mask, only fewer keys.
            let frames = (0..t).map(|f| {
                let seen = (f + 1) * h * w;
                attention(&q.narrow(2, f * h * w, h * w)?, &k.narrow(2, 0, seen)?, &v.narrow(2, 0, seen)?, scale, None)
            });
            Tensor::cat(&frames.collect::<candle_core::Result<Vec<_>>>()?, 2)?
        } else {
            attention(&q, &k, &v, scale, None)?
        };
        let tokens = x.reshape((b, c, t * h * w))?.transpose(1, 2)?;
        Ok((self.out.forward(&y.squeeze(1)?)? + tokens)?)
    }
}

/// Resnet, attention over all positions (where the model has it), resnet.
#[derive(Debug, Clone)]
pub struct MidBlock {
    first: Resnet,
    attention: Option<MidAttention>,
    second: Resnet,
}

impl MidBlock {
    /// Reads `resnets.0`, `attentions.0`, `resnets.1`.
    pub fn load(weights: &Weights, config: &VaeConfig) -> Result<Self> {
        let attention = match config.mid_block_add_attention {
            true => Some(MidAttention::load(&weights.pp("attentions.0"), config)?),
            false => None,
        };
        Ok(Self {
            first: Resnet::load(&weights.pp("resnets.0"), config.norm_num_groups)?,
            attention,
            second: Resnet::load(&weights.pp("resnets.1"), config.norm_num_groups)?,
        })
    }

    /// - `x`: `(B, C, T, H, W)`; the tap sees `mid_attn_tokens` `(B, T·H·W, C)` and `mid_block`
    pub fn forward(&self, x: Tensor, tap: Tap<'_>) -> Result<Tensor> {
        let mut x = self.first.forward(x)?;
        if let Some(attention) = &self.attention {
            let dims = x.dims().to_vec();
            let tokens = attention.forward(&x)?;
            tap("mid_attn_tokens", &tokens);
            x = tokens.transpose(1, 2)?.contiguous()?.reshape(dims)?;
        }
        let x = self.second.forward(x)?;
        tap("mid_block", &x);
        Ok(x)
    }
}
