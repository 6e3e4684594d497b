//! Scaled dot-product attention that never holds queries x keys for more than a chunk.

use candle_core::{D, DType, Tensor};

/// Most scores held at once (f32: 64 MiB).
const SCORES: usize = 16 << 20;

/// `softmax(q·kᵀ·scale + mask)·v`, one head and one chunk of queries at a time.
///
/// - `q`: `(B, heads, Lq, d)`; `k`: `(B, heads, Lk, d)`; `v`: `(B, heads, Lk, dv)`
/// - `mask`: added to the scores, `(B or 1, Lq or 1, Lk)`, f32, 0 or -inf; no row may be all -inf
/// - returns: `(B, heads, Lq, dv)`, dtype of `q`; softmax in f32
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: Option<&Tensor>) -> candle_core::Result<Tensor> {
    let (batch, heads, queries, _) = q.dims4()?;
    let keys = k.dim(2)?;
    let chunk = (SCORES / keys.max(1)).clamp(1, queries.max(1));
    let mut items = Vec::with_capacity(batch);
    for b in 0..batch {
        let mut per_head = Vec::with_capacity(heads);
        for h in 0..heads {
            let q = (q.get(b)?.get(h)?.contiguous()? * scale)?; // (Lq, d)
            let k = k.get(b)?.get(h)?.contiguous()?; //            (Lk, d)
            let v = v.get(b)?.get(h)?.contiguous()?; //            (Lk, dv)
            let mut rows = Vec::with_capacity(queries.div_ceil(chunk));
            for start in (0..queries).step_by(chunk) {
                let length = chunk.min(queries - start);
                let mut scores = q.narrow(0, start, length)?.matmul(&k.t()?)?.to_dtype(DType::F32)?; // (chunk, Lk)
                if let Some(mask) = mask {
                    let mask = mask.get(if mask.dim(0)? == 1 { 0 } else { b })?;
                    let mask = if mask.dim(0)? == 1 { mask } else { mask.narrow(0, start, length)? };
                    scores = scores.broadcast_add(&mask)?;
                }
                let weights = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(v.dtype())?;
                rows.push(weights.matmul(&v)?);
            }
            per_head.push(Tensor::cat(&rows, 0)?);
        }
        items.push(Tensor::stack(&per_head, 0)?);
    }
    Tensor::stack(&items, 0)
}

/// Splits `(B, L, heads·d)` into `(B, heads, L, d)`.
pub fn split_heads(x: &Tensor, heads: usize) -> candle_core::Result<Tensor> {
    let (b, l, width) = x.dims3()?;
    x.reshape((b, l, heads, width / heads))?.transpose(1, 2)
}

/// Joins `(B, heads, L, d)` into `(B, L, heads·d)`.
pub fn join_heads(x: &Tensor) -> candle_core::Result<Tensor> {
    let (b, heads, l, d) = x.dims4()?;
    x.transpose(1, 2)?.reshape((b, l, heads * d))
}

/// A mask that lets query `i` see keys `..= i`.
///
/// - returns: `(1, length, length)`, f32
pub fn causal_mask(length: usize, device: &candle_core::Device) -> candle_core::Result<Tensor> {
    let values: Vec<f32> =
        (0..length).flat_map(|i| (0..length).map(move |j| if j <= i { 0.0 } else { f32::NEG_INFINITY })).collect();
    Tensor::from_vec(values, (1, length, length), device)
}

/// A mask over keys from `(B, Lk)` of 0 and 1, for all queries.
///
/// - returns: `(B, 1, Lk)`, f32: 0 where visible, -inf where not
pub fn key_mask(visible: &Tensor) -> candle_core::Result<Tensor> {
    let (b, keys) = visible.dims2()?;
    let on = Tensor::zeros((b, keys), DType::F32, visible.device())?;
    let off = Tensor::full(f32::NEG_INFINITY, (b, keys), visible.device())?;
    visible.ne(0i64)?.where_cond(&on, &off)?.unsqueeze(D::Minus2)
}
