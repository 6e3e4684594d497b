//! The Llama of LLaVA, up to the hidden state that the transformer is conditioned on.

use candle_core::{DType, Tensor};

use super::{config::LlavaConfig, vision::layers_for};
use crate::{
    Error, Result,
    attention::{attention, join_heads, split_heads},
    nn::{Linear, RmsNorm},
    ops::Activation,
    weights::{Swap, Weights},
};

const WORDS: &str = "embed_tokens.weight";

/// The Llama's needed layers. Its table of tokens stays in the file, on a CPU its matrices too, and what comes after
/// the hidden state that is taken (the last layers, the final normalisation, the head) is never read.
pub(super) struct Llama {
    weights: Weights,
    layers: Vec<Layer>,
    shape: Shape,
    rope_theta: f64,
    /// The layers' weights.
    swap: Swap,
}

/// What all layers have in common.
#[derive(Debug, Clone, Copy)]
struct Shape {
    width: usize,
    heads: usize,
    kv_heads: usize,
    eps: f32,
}

impl Llama {
    /// Reads the part of a checkpoint that begins with `embed_tokens.` and `layers.`.
    pub(super) fn load(weights: &Weights, config: &LlavaConfig) -> Result<Self> {
        let [_, width] = weights.dims(WORDS)?;
        let (heads, kv_heads) = (config.heads, config.kv_heads);
        if heads == 0
            || !width.is_multiple_of(heads)
            || !(width / heads).is_multiple_of(2)
            || kv_heads == 0
            || !heads.is_multiple_of(kv_heads)
        {
            let reason = format!("{heads} heads and {kv_heads} key heads do not fit its width {width}");
            return Err(weights.fault(WORDS, reason));
        }
        let shape = Shape { width, heads, kv_heads, eps: config.rms_eps as f32 };
        let found = weights.count("layers", "self_attn.q_proj.weight");
        let needed = match layers_for(config.hidden_state_index, config.layers.unwrap_or(found)) {
            // Hidden state -1 of a Llama is the one after the final normalisation.
            Ok(_) if config.hidden_state_index == -1 => Err("hidden state -1 is not given".to_owned()),
            other => other,
        }
        .map_err(|reason| weights.fault("layers.0.self_attn.q_proj.weight", reason))?;
        if found < needed {
            return Err(weights.fault(format!("layers.{found}.self_attn.q_proj.weight"), "it is missing"));
        }
        let coming = weights.pp("layers").later();
        let layers = (0..needed).map(|i| Layer::load(&coming.pp(i), shape)).collect::<Result<_>>()?;
        let swap = Swap::new((0..needed).map(|i| weights.pp("layers").pp(i).extent()).collect());
        Ok(Self { weights: weights.clone(), layers, shape, rope_theta: config.rope_theta, swap })
    }

    /// The layers' weights, which may stay in memory or come and go.
    pub(super) fn swap(&self) -> &Swap {
        &self.swap
    }

    /// Layers that are run.
    pub(super) fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Width of a hidden state.
    pub(super) fn width(&self) -> usize {
        self.shape.width
    }

    /// Number of tokens that have an embedding.
    pub(super) fn vocabulary(&self) -> Result<usize> {
        Ok(self.weights.dims::<2>(WORDS)?[0])
    }

    /// Embeddings of tokens, `(ids.len(), width)`.
    pub(super) fn embed(&self, ids: &[usize]) -> Result<Tensor> {
        self.weights.rows(WORDS, ids)
    }

    /// Runs the needed layers.
    ///
    /// - `x`: `(1, L, width)`; `positions`: L; `mask`: as [`attention`] takes it
    /// - returns: `(1, L, width)`, without the final normalisation
    pub(super) fn forward(&self, x: &Tensor, positions: &[usize], mask: &Tensor) -> Result<Tensor> {
        let rope = Rope::new(positions, self.shape.width / self.shape.heads, self.rope_theta, x.device())?;
        let mut x = x.clone();
        let mut pass = self.swap.pass();
        for (i, layer) in self.layers.iter().enumerate() {
            pass.enter(i);
            x = layer.forward(&x, &rope, mask)?;
            pass.leave(i);
        }
        Ok(x)
    }
}

/// Rotation of each head's halves by angles that grow with the position.
struct Rope {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// Tables `(L, d/2)` in f32: whatever the network's type, angles need its precision.
    fn new(positions: &[usize], d: usize, theta: f64, device: &candle_core::Device) -> candle_core::Result<Self> {
        let rates: Vec<f32> = (0..d / 2).map(|k| theta.powf(-2.0 * k as f64 / d as f64) as f32).collect();
        let angles: Vec<f32> = positions.iter().flat_map(|p| rates.iter().map(move |rate| *p as f32 * rate)).collect();
        let angles = Tensor::from_vec(angles, (positions.len(), d / 2), device)?;
        Ok(Self { cos: angles.cos()?, sin: angles.sin()? })
    }

    /// - `x`: `(1, heads, L, d)`
    fn rotate(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let wide = x.contiguous()?.to_dtype(DType::F32)?;
        candle_nn::rotary_emb::rope(&wide, &self.cos, &self.sin)?.to_dtype(x.dtype())
    }
}

#[derive(Debug)]
struct Layer {
    shape: Shape,
    norm1: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    norm2: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Layer {
    fn load(weights: &Weights, shape: Shape) -> Result<Self> {
        let width = shape.width;
        let kv = width / shape.heads * shape.kv_heads;
        let [inner, _] = weights.dims("mlp.gate_proj.weight")?;
        let linear = |name: &str, inp, out| Linear::load_no_bias(&weights.pp(name), inp, out);
        Ok(Self {
            shape,
            norm1: RmsNorm::load(&weights.pp("input_layernorm"), width, shape.eps)?,
            q: linear("self_attn.q_proj", width, width)?,
            k: linear("self_attn.k_proj", width, kv)?,
            v: linear("self_attn.v_proj", width, kv)?,
            o: linear("self_attn.o_proj", width, width)?,
            norm2: RmsNorm::load(&weights.pp("post_attention_layernorm"), width, shape.eps)?,
            gate: linear("mlp.gate_proj", width, inner)?,
            up: linear("mlp.up_proj", width, inner)?,
            down: linear("mlp.down_proj", inner, width)?,
        })
    }

    fn forward(&self, x: &Tensor, rope: &Rope, mask: &Tensor) -> Result<Tensor> {
        let Shape { heads, kv_heads, .. } = self.shape;
        let y = self.norm1.forward(x)?;
        let q = rope.rotate(&split_heads(&self.q.forward(&y)?, heads)?)?; //    (1, heads, L, d)
        let k = rope.rotate(&split_heads(&self.k.forward(&y)?, kv_heads)?)?; // (1, kv heads, L, d)
        let v = split_heads(&self.v.forward(&y)?, kv_heads)?;
        let (k, v) = (repeat_heads(&k, heads / kv_heads)?, repeat_heads(&v, heads / kv_heads)?);
        let scale = (q.dim(3)? as f64).powf(-0.5);
        let mixed = join_heads(&attention(&q, &k, &v, scale, Some(mask))?)?;
        let x = (x + self.o.forward(&mixed)?)?;
        let y = self.norm2.forward(&x)?;
        let y = (self.gate.forward_then(&y, Activation::Silu)? * self.up.forward(&y)?)?;
        (x + self.down.forward(&y)?).map_err(Error::from)
    }
}

/// Each head `times` times in a row: `(1, heads, L, d)` to `(1, heads·times, L, d)`.
fn repeat_heads(x: &Tensor, times: usize) -> candle_core::Result<Tensor> {
    let (b, heads, l, d) = x.dims4()?;
    x.unsqueeze(2)?.expand((b, heads, times, l, d))?.reshape((b, heads * times, l, d))
}
