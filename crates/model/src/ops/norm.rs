//! Normalisation over the last dimension.

use candle_core::{D, DType, Result, Tensor};
use rayon::prelude::*;

use super::{
    host,
    simd::{fma, sum, vectorised},
};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::memory;

/// Values that one thread takes at once.
const PIECE: usize = 64 << 10;

/// Layer normalisation: `(x - mean) / sqrt(variance + eps) · weight + bias`.
///
/// - `x`: `(.., width)`; `weight`, `bias`: `(width)`
/// - returns: the same shape and type
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    if !host::here(x) {
        #[cfg(feature = "cuda")]
        if cuda::here(x) {
            return cuda::layer_norm(x, weight, bias, eps);
        }
        return layer_norm_clear(x, weight, bias, eps);
    }
    by_line(x, weight, Some(bias), |line, weight, bias, out| normalise(line, weight, bias, eps, out))
}

/// The same with candle's operations, on any device and in any type.
pub fn layer_norm_clear(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let y = centred.broadcast_div(&(variance + f64::from(eps))?.sqrt()?)?;
    y.broadcast_mul(&weight.to_dtype(DType::F32)?)?.broadcast_add(&bias.to_dtype(DType::F32)?)?.to_dtype(x.dtype())
}

/// Root-mean-square normalisation: `x / sqrt(mean(x²) + eps) · weight`.
///
/// - `x`: `(.., width)`; `weight`: `(width)`
/// - returns: the same shape and type
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    if !host::here(x) {
        #[cfg(feature = "cuda")]
        if cuda::here(x) {
            return cuda::rms_norm(x, weight, eps);
        }
        return rms_norm_clear(x, weight, eps);
    }
    by_line(x, weight, None, |line, weight, _, out| scale_to_unit(line, weight, eps, out))
}

/// The same with candle's operations, on any device and in any type.
pub fn rms_norm_clear(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let mean = wide.sqr()?.mean_keepdim(D::Minus1)?;
    let y = wide.broadcast_div(&(mean + f64::from(eps))?.sqrt()?)?;
    y.broadcast_mul(&weight.to_dtype(DType::F32)?)?.to_dtype(x.dtype())
}

fn by_line(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    f: impl Fn(&[f32], &[f32], &[f32], &mut [f32]) + Sync,
) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    let weight = host::with_values(weight, <[f32]>::to_vec)?;
    let bias = bias.map(|b| host::with_values(b, <[f32]>::to_vec)).transpose()?.unwrap_or_default();
    if weight.len() != width || !(bias.is_empty() || bias.len() == width) {
        candle_core::bail!("a norm over {} values of lines of {width}", weight.len());
    }
    memory::room_for(x.dtype(), x.elem_count(), x.elem_count())?;
    let out = host::with_values(x, |x| {
        let mut out = vec![0f32; x.len()];
        let piece = (PIECE / width.max(1)).max(1) * width.max(1);
        out.par_chunks_mut(piece).zip(x.par_chunks(piece)).for_each(|(out, x)| {
            for (out, x) in out.chunks_mut(width).zip(x.chunks(width)) {
                f(x, &weight, &bias, out);
            }
        });
        out
    })?;
    host::tensor(out, x.dims(), x.dtype())
}

vectorised! {
    fn normalise(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
        let count = x.len() as f32;
        let mean = sum(x, |v| v) / count;
        let variance = sum(x, |v| (v - mean) * (v - mean)) / count;
        let scale = 1.0 / (variance + eps).sqrt();
        for (((o, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            *o = fma::<FMA>((x - mean) * scale, *w, *b);
        }
    }
}

vectorised! {
    /// `x / sqrt(mean(x²) + eps) · weight`.
    fn scale_to_unit(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let scale = 1.0 / (sum(x, |v| v * v) / x.len() as f32 + eps).sqrt();
        for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
            *o = x * scale * w;
        }
    }
}
