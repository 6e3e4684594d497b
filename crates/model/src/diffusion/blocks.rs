//! The transformer's blocks and its final layer.

use candle_core::Tensor;

use super::{
    norm::{modulated_norm, qk_norm},
    rope::Rope,
};
use crate::{
    Error, Result,
    attention::attention,
    nn::{Linear, RmsNorm},
    ops::{Activation, QkvHeads, heads},
    weights::Weights,
};

/// Makes `count` vectors `(H)` of the conditioning vector `(1, H)`: shifts, scales and gates.
fn modulation(linear: &Linear, vec: &Tensor, count: usize) -> candle_core::Result<Vec<Tensor>> {
    let all = linear.forward(&vec.silu()?)?;
    let all = all.reshape((count, all.dim(1)? / count))?;
    (0..count).map(|i| all.get(i)).collect()
}

/// Norms of queries and keys; their width says how many heads there are.
#[derive(Debug, Clone)]
struct QkNorm {
    q: RmsNorm,
    k: RmsNorm,
}

impl QkNorm {
    fn load(weights: &Weights, stream: &str, hidden: usize) -> Result<Self> {
        let name = |part: &str| format!("{stream}{part}_norm");
        let [width] = weights.dims(format!("{}.weight", name("q")))?;
        if width == 0 || !hidden.is_multiple_of(width) {
            let reason = format!("heads of width {width} do not make up a width of {hidden}");
            return Err(Error::input("num_heads", reason));
        }
        let norm = |part: &str| qk_norm(&weights.pp(name(part)), width);
        Ok(Self { q: norm("q")?, k: norm("k")? })
    }

    /// - `qkv`: `(L, 3H)`; `rope`: of its L tokens, or nothing where they do not turn
    fn heads(&self, qkv: &Tensor, rope: Option<&Rope>) -> candle_core::Result<QkvHeads> {
        heads(qkv, [self.q.weight(), self.k.weight()], self.q.eps(), rope.map(Rope::halves))
    }
}

/// - returns: `(L, H)`
fn attend(q: &Tensor, k: &Tensor, v: &Tensor) -> candle_core::Result<Tensor> {
    let (heads, length, width) = q.dims3()?;
    let scale = (width as f64).powf(-0.5);
    attention(&q.unsqueeze(0)?, &k.unsqueeze(0)?, &v.unsqueeze(0)?, scale, None)?
        .squeeze(0)?
        .transpose(0, 1)?
        .reshape((length, heads * width))
}

/// Most tokens that pass a block's wide layers at once. These are four times as wide as the tokens, so at full length
/// they would be most of what a block holds; each piece reads the weights again, which so many tokens outweigh.
pub const TOKENS_AT_ONCE: usize = 8192;

/// Applies `f` to at most `chunk` tokens at a time, each of which it treats alone.
///
/// - `x`: `(L, H)`; `f`: gets some rows of it and the first's number
/// - returns: `(L, H)`
fn by_tokens(
    x: &Tensor,
    chunk: usize,
    f: impl Fn(&Tensor, usize) -> candle_core::Result<Tensor>,
) -> candle_core::Result<Tensor> {
    let length = x.dim(0)?;
    if length <= chunk {
        return f(x, 0);
    }
    let pieces = (0..length).step_by(chunk).map(|start| f(&x.narrow(0, start, chunk.min(length - start))?, start));
    let pieces = pieces.collect::<candle_core::Result<Vec<_>>>()?;
    crate::memory::room(x.elem_count() * x.dtype().size_in_bytes())?;
    Tensor::cat(&pieces, 0)
}

/// Two layers with the tanh form of GELU between them.
#[derive(Debug, Clone)]
pub struct Mlp {
    fc1: Linear,
    fc2: Linear,
}

impl Mlp {
    /// Reads `fc1` and `fc2`.
    pub fn load(weights: &Weights, hidden: usize) -> Result<Self> {
        let fc1 = Linear::load(&weights.pp("fc1"), hidden)?;
        Ok(Self { fc2: Linear::load_sized(&weights.pp("fc2"), fc1.out(), hidden)?, fc1 })
    }

    fn inner(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.fc1.forward_then(x, Activation::GeluTanh)
    }

    /// - `x`: `(L, H)`
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.fc2.forward(&self.inner(x)?)
    }
}

/// One of a double block's two streams.
#[derive(Debug, Clone)]
struct Stream {
    modulation: Linear,
    qkv: Linear,
    norm: QkNorm,
    proj: Linear,
    mlp: Mlp,
}

impl Stream {
    fn load(weights: &Weights, stream: &str, hidden: usize) -> Result<Self> {
        let part = |name: &str| weights.pp(format!("{stream}_{name}"));
        Ok(Self {
            modulation: Linear::load_sized(&part("mod.linear"), hidden, 6 * hidden)?,
            qkv: Linear::load_sized(&part("attn_qkv"), hidden, 3 * hidden)?,
            norm: QkNorm::load(weights, &format!("{stream}_attn_"), hidden)?,
            proj: Linear::load_sized(&part("attn_proj"), hidden, hidden)?,
            mlp: Mlp::load(&part("mlp"), hidden)?,
        })
    }

    fn before(&self, x: &Tensor, m: &[Tensor], rope: Option<&Rope>) -> candle_core::Result<QkvHeads> {
        self.norm.heads(&self.qkv.forward(&modulated_norm(x, &m[0], &m[1])?)?, rope)
    }

    fn after(&self, x: &Tensor, seen: &Tensor, m: &[Tensor], chunk: usize) -> candle_core::Result<Tensor> {
        let x = self.proj.forward_onto(x, &[seen], Some(&m[2]))?;
        by_tokens(&x, chunk, |x, _| {
            let inner = self.mlp.inner(&modulated_norm(x, &m[3], &m[4])?)?;
            self.mlp.fc2.forward_onto(x, &[&inner], Some(&m[5]))
        })
    }
}

/// A block in which picture and text have weights of their own and see each other.
#[derive(Debug, Clone)]
pub struct DoubleBlock {
    image: Stream,
    text: Stream,
}

impl DoubleBlock {
    /// Reads the `img_*` and `txt_*` tensors.
    pub fn load(weights: &Weights, hidden: usize) -> Result<Self> {
        Ok(Self { image: Stream::load(weights, "img", hidden)?, text: Stream::load(weights, "txt", hidden)? })
    }

    /// - `image`: `(I, H)`; `text`: `(L, H)`, valid rows only; `vec`: `(1, H)`; `rope`: of the I image tokens
    /// - returns: image and text, the same shapes
    pub fn forward(&self, image: &Tensor, text: &Tensor, vec: &Tensor, rope: &Rope) -> Result<(Tensor, Tensor)> {
        self.forward_in((image, text), vec, rope, TOKENS_AT_ONCE)
    }

    /// As [`forward`](Self::forward), with at most `chunk` tokens in the wide layers at once.
    pub fn forward_in(
        &self,
        (image, text): (&Tensor, &Tensor),
        vec: &Tensor,
        rope: &Rope,
        chunk: usize,
    ) -> Result<(Tensor, Tensor)> {
        let of_image = modulation(&self.image.modulation, vec, 6)?;
        let of_text = modulation(&self.text.modulation, vec, 6)?;
        let (i, t) = (self.image.before(image, &of_image, Some(rope))?, self.text.before(text, &of_text, None)?);
        let q = Tensor::cat(&[&i.q, &t.q], 1)?; // (heads, I + L, d)
        let k = Tensor::cat(&[&i.k, &t.k], 1)?;
        let v = Tensor::cat(&[&i.v, &t.v], 1)?;
        drop((i, t));
        let seen = attend(&q, &k, &v)?; // (I + L, H)
        drop((q, k, v));
        let (images, texts) = (image.dim(0)?, text.dim(0)?);
        Ok((
            self.image.after(image, &seen.narrow(0, 0, images)?, &of_image, chunk)?,
            self.text.after(text, &seen.narrow(0, images, texts)?, &of_text, chunk)?,
        ))
    }
}

/// A block in which picture and text share weights; attention and MLP run side by side.
#[derive(Debug, Clone)]
pub struct SingleBlock {
    modulation: Linear,
    /// The first outputs of `linear1`.
    qkv: Linear,
    /// The rest of them.
    mlp: Linear,
    linear2: Linear,
    norm: QkNorm,
}

impl SingleBlock {
    /// Reads `modulation`, `linear1`, `linear2`, `q_norm` and `k_norm`.
    pub fn load(weights: &Weights, hidden: usize) -> Result<Self> {
        let linear1 = Linear::load(&weights.pp("linear1"), hidden)?;
        let Some(mlp) = linear1.out().checked_sub(3 * hidden) else {
            let reason = format!("{} outputs, expected at least {}", linear1.out(), 3 * hidden);
            return Err(Error::input("single_blocks.linear1", reason));
        };
        Ok(Self {
            modulation: Linear::load_sized(&weights.pp("modulation.linear"), hidden, 3 * hidden)?,
            linear2: Linear::load_sized(&weights.pp("linear2"), hidden + mlp, hidden)?,
            qkv: linear1.narrow(0..3 * hidden)?,
            mlp: linear1.narrow(3 * hidden..linear1.out())?,
            norm: QkNorm::load(weights, "", hidden)?,
        })
    }

    /// - `x`: `(L, H)`, image then text; `vec`: `(1, H)`; `rope`: of all L tokens, the text's standing still
    /// - returns: `(L, H)`
    pub fn forward(&self, x: &Tensor, vec: &Tensor, rope: &Rope) -> Result<Tensor> {
        self.forward_in(x, vec, rope, TOKENS_AT_ONCE)
    }

    /// As [`forward`](Self::forward), with at most `chunk` tokens in the wide layers at once.
    pub fn forward_in(&self, x: &Tensor, vec: &Tensor, rope: &Rope, chunk: usize) -> Result<Tensor> {
        let m = modulation(&self.modulation, vec, 3)?;
        let heads = self.norm.heads(&self.qkv.forward(&modulated_norm(x, &m[0], &m[1])?)?, Some(rope))?;
        let seen = attend(&heads.q, &heads.k, &heads.v)?; // (L, H)
        drop(heads);
        Ok(by_tokens(x, chunk, |x, start| {
            // Norming a second time is cheaper than holding the result during attention.
            let x_in = modulated_norm(x, &m[0], &m[1])?;
            let mlp = self.mlp.forward_then(&x_in, Activation::GeluTanh)?; // (piece, mlp)
            let seen = seen.narrow(0, start, x.dim(0)?)?;
            self.linear2.forward_onto(x, &[&seen, &mlp], Some(&m[2]))
        })?)
    }
}

/// Tokens as patches of velocity.
#[derive(Debug, Clone)]
pub struct FinalLayer {
    modulation: Linear,
    linear: Linear,
}

impl FinalLayer {
    /// Reads `adaLN_modulation.1` and `linear`.
    pub fn load(weights: &Weights, hidden: usize) -> Result<Self> {
        Ok(Self {
            modulation: Linear::load_sized(&weights.pp("adaLN_modulation.1"), hidden, 2 * hidden)?,
            linear: Linear::load(&weights.pp("linear"), hidden)?,
        })
    }

    /// Values of one patch: channels x 4.
    #[must_use]
    pub fn out(&self) -> usize {
        self.linear.out()
    }

    /// - `x`: `(L, H)`; `vec`: `(1, H)`
    /// - returns: `(L, C·4)`
    pub fn forward(&self, x: &Tensor, vec: &Tensor) -> Result<Tensor> {
        let m = modulation(&self.modulation, vec, 2)?;
        Ok(self.linear.forward(&modulated_norm(x, &m[0], &m[1])?)?)
    }
}
