//! Heads and masks of attention.

use candle_core::{D, DType, Tensor};

pub use crate::ops::attention;

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
    let mut values = vec![f32::NEG_INFINITY; length * length];
    values.chunks_mut(length.max(1)).enumerate().for_each(|(i, row)| row[..=i].fill(0.0));
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
