//! Text states as text tokens.

use candle_core::{DType, Tensor};

use super::{
    embed::{Embedder, TimeEmbedder},
    norm::refiner_norm,
};
use crate::{
    Error, Result,
    attention::{attention, join_heads, split_heads},
    nn::{LayerNorm, Linear},
    ops::Activation,
    weights::Weights,
};

/// Maps text states to the transformer's width and lets them see each other, under the flow time.
#[derive(Debug, Clone)]
pub struct TokenRefiner {
    input: Linear,
    time: TimeEmbedder,
    context: Embedder,
    blocks: Vec<Block>,
}

#[derive(Debug, Clone)]
struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    gates: Linear,
    heads: usize,
}

impl TokenRefiner {
    /// Reads `input_embedder`, `t_embedder`, `c_embedder` and the blocks that there are.
    pub fn load(weights: &Weights, heads: usize) -> Result<Self> {
        let context = Embedder::load(&weights.pp("c_embedder"), "linear_1", "linear_2")?;
        let input = Linear::load(&weights.pp("input_embedder"), context.inp())?;
        let hidden = input.out();
        let refiner = weights.pp("individual_token_refiner");
        let blocks = (0..refiner.count("blocks", "norm1.weight"))
            .map(|i| Block::load(&refiner.pp(format!("blocks.{i}")), hidden, heads))
            .collect::<Result<_>>()?;
        Ok(Self { input, time: TimeEmbedder::load(&weights.pp("t_embedder"))?, context, blocks })
    }

    /// Width of a text state.
    #[must_use]
    pub fn inp(&self) -> usize {
        self.context.inp()
    }

    /// Refines one prompt's states.
    ///
    /// The mask is used by position: a visible token sees the visible ones, and everyone sees token 0. Rows that
    /// are not visible are computed all the same, since what follows takes the first `mask.sum()` rows, which
    /// need not be the visible ones.
    ///
    /// - `states`: `(L, D)`; `mask`: L values of 0 and 1, or nothing where all tokens see each other
    /// - returns: `(L, H)`
    ///
    /// Errors: the mask has another length, another value, or no 1.
    pub fn forward(&self, states: &Tensor, t: f32, mask: Option<&[i64]>) -> Result<Tensor> {
        let (length, _) = states.dims2()?;
        let (mean, scores) = match mask {
            None => (states.to_dtype(DType::F32)?.mean(0)?, None),
            Some(mask) => {
                if mask.len() != length || mask.iter().any(|m| !(0..=1).contains(m)) || mask.iter().all(|&m| m == 0) {
                    return Err(Error::input(
                        "text_mask",
                        format!("{} values, expected {length} of 0 and 1 with at least one 1", mask.len()),
                    ));
                }
                let weight: Vec<f32> = mask.iter().map(|&m| m as f32).collect();
                let visible = weight.iter().sum::<f32>();
                let weight = Tensor::from_vec(weight, (length, 1), states.device())?;
                let mean = (states.to_dtype(DType::F32)?.broadcast_mul(&weight)?.sum(0)? / f64::from(visible))?;
                (mean, Some(see(mask, states)?))
            }
        };
        let condition = (self.time.forward(&[t])? + self.context.forward(&mean.unsqueeze(0)?)?)?.silu()?; // (1, H), f32
        let mut x = self.input.forward(states)?;
        for block in &self.blocks {
            x = block.forward(&x, &condition, scores.as_ref())?;
        }
        Ok(x)
    }
}

/// 0 where query i may see key j, -inf elsewhere: `(1, L, L)`.
fn see(mask: &[i64], states: &Tensor) -> Result<Tensor> {
    let length = mask.len();
    let mut values = Vec::with_capacity(length * length);
    for &query in mask {
        let allowed = |(j, &key): (usize, &i64)| j == 0 || (query == 1 && key == 1);
        values.extend(mask.iter().enumerate().map(|at| if allowed(at) { 0.0 } else { f32::NEG_INFINITY }));
    }
    Ok(Tensor::from_vec(values, (1, length, length), states.device())?)
}

impl Block {
    fn load(weights: &Weights, hidden: usize, heads: usize) -> Result<Self> {
        if heads == 0 || !hidden.is_multiple_of(heads) {
            return Err(Error::input("num_heads", format!("{heads} heads do not divide a width of {hidden}")));
        }
        let fc1 = Linear::load(&weights.pp("mlp.fc1"), hidden)?;
        Ok(Self {
            norm1: refiner_norm(&weights.pp("norm1"), hidden)?,
            qkv: Linear::load_sized(&weights.pp("self_attn_qkv"), hidden, 3 * hidden)?,
            proj: Linear::load_sized(&weights.pp("self_attn_proj"), hidden, hidden)?,
            norm2: refiner_norm(&weights.pp("norm2"), hidden)?,
            fc2: Linear::load_sized(&weights.pp("mlp.fc2"), fc1.out(), hidden)?,
            fc1,
            gates: Linear::load_sized(&weights.pp("adaLN_modulation.1"), hidden, 2 * hidden)?,
            heads,
        })
    }

    fn forward(&self, x: &Tensor, condition: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let hidden = x.dim(1)?;
        let gates = self.gates.forward(condition)?.reshape((2, hidden))?;
        let qkv = self.qkv.forward(&self.norm1.forward(x)?)?.unsqueeze(0)?; // (1, L, 3H)
        let part = |i: usize| split_heads(&qkv.narrow(2, i * hidden, hidden)?, self.heads);
        let scale = ((hidden / self.heads) as f64).powf(-0.5);
        let seen = join_heads(&attention(&part(0)?, &part(1)?, &part(2)?, scale, mask)?)?.squeeze(0)?; // (L, H)
        let x = self.proj.forward_onto(x, &[&seen], Some(&gates.get(0)?))?;
        let y = self.fc1.forward_then(&self.norm2.forward(&x)?, Activation::Silu)?;
        Ok(self.fc2.forward_onto(&x, &[&y], Some(&gates.get(1)?))?)
    }
}
