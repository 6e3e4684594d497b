//! Queries, keys and values of a block: split into heads, normalised and turned in one pass.

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use super::{
    host::{self, Shared},
    norm::{rms_norm_clear, scale_to_unit},
    simd::vectorised,
};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::memory;

/// Queries, keys and values: each `(heads, L, d)`.
#[derive(Debug, Clone)]
pub struct QkvHeads {
    /// Queries.
    pub q: Tensor,
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
}

/// Splits `(L, 3H)` into heads; normalises queries and keys (root mean square) and turns adjacent channels
/// `(2k, 2k + 1)` of them.
///
/// - `qkv`: `(L, 3H)`, in the order q, k, v, heads side by side in each
/// - `norms`: weights `(d)` of the norms of queries and keys
/// - `turn`: cosines and sines `(at least L, d/2)`, f32; nothing turns nothing
pub fn heads(qkv: &Tensor, norms: [&Tensor; 2], eps: f32, turn: Option<(&Tensor, &Tensor)>) -> Result<QkvHeads> {
    if !host::here(qkv) {
        #[cfg(feature = "cuda")]
        if cuda::here(qkv) {
            return cuda::heads(qkv, norms, eps, turn);
        }
        return heads_clear(qkv, norms, eps, turn);
    }
    let (length, width) = qkv.dims2()?;
    let d = norms[0].dim(0)?;
    let hidden = width / 3;
    if d == 0 || hidden * 3 != width || !hidden.is_multiple_of(d) || norms[1].dims() != [d] {
        candle_core::bail!("{width} values a token do not make heads of {d}");
    }
    let weights = [host::with_values(norms[0], <[f32]>::to_vec)?, host::with_values(norms[1], <[f32]>::to_vec)?];
    let count = hidden / d;
    memory::room_for(qkv.dtype(), length * width, length * width)?;
    let mut out = vec![0f32; length * width];
    {
        let out = Shared::new(&mut out);
        let fill = |qkv: &[f32], turn: Option<(&[f32], &[f32])>| {
            (0..3 * count).into_par_iter().for_each(|part| {
                // SAFETY: each part is one head of q, k or v, and no other task has it.
                let lines = unsafe { out.slice(part * length * d, length * d) };
                for (token, line) in lines.chunks_mut(d).enumerate() {
                    let from = &qkv[token * width + part * d..][..d];
                    let Some(weight) = weights.get(part / count) else {
                        line.copy_from_slice(from);
                        continue;
                    };
                    scale_to_unit(from, weight, eps, line);
                    if let Some((cos, sin)) = turn {
                        rotate(line, &cos[token * (d / 2)..][..d / 2], &sin[token * (d / 2)..][..d / 2]);
                    }
                }
            });
        };
        host::with_values(qkv, |qkv| match turn {
            None => {
                fill(qkv, None);
                Ok(())
            }
            Some((cos, sin)) => {
                check_table(cos, sin, length, d)?;
                host::with_values(cos, |cos| host::with_values(sin, |sin| fill(qkv, Some((cos, sin)))))?
            }
        })??;
    }
    let all = host::tensor(out, &[3, count, length, d], qkv.dtype())?;
    Ok(QkvHeads { q: all.get(0)?, k: all.get(1)?, v: all.get(2)? })
}

/// The same with candle's operations, on any device and in any type.
pub fn heads_clear(qkv: &Tensor, norms: [&Tensor; 2], eps: f32, turn: Option<(&Tensor, &Tensor)>) -> Result<QkvHeads> {
    let (length, width) = qkv.dims2()?;
    let d = norms[0].dim(0)?;
    let parts = qkv.reshape((length, 3, width / 3 / d, d))?.permute((1, 2, 0, 3))?.contiguous()?; // (3, heads, L, d)
    let turned = |x: Tensor| match turn {
        Some((cos, sin)) => turn_clear(&x, cos, sin),
        None => Ok(x),
    };
    Ok(QkvHeads {
        q: turned(rms_norm_clear(&parts.get(0)?, norms[0], eps)?)?,
        k: turned(rms_norm_clear(&parts.get(1)?, norms[1], eps)?)?,
        v: parts.get(2)?,
    })
}

/// Turns adjacent channels `(2k, 2k + 1)`.
///
/// - `x`: `(heads, L, d)`; `cos`, `sin`: `(at least L, d/2)`, f32
/// - returns: the shape and type of `x`
pub fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if !host::here(x) {
        #[cfg(feature = "cuda")]
        if cuda::here(x) {
            return cuda::turn(x, cos, sin);
        }
        return turn_clear(x, cos, sin);
    }
    let (_, length, d) = x.dims3()?;
    check_table(cos, sin, length, d)?;
    let mut out = host::with_values(x, <[f32]>::to_vec)?;
    host::with_values(cos, |cos| {
        host::with_values(sin, |sin| {
            out.par_chunks_mut((length * d).max(1)).for_each(|head| {
                for (token, line) in head.chunks_mut(d).enumerate() {
                    rotate(line, &cos[token * (d / 2)..][..d / 2], &sin[token * (d / 2)..][..d / 2]);
                }
            });
        })
    })??;
    host::tensor(out, x.dims(), x.dtype())
}

/// The same with candle's operations, on any device and in any type.
pub fn turn_clear(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (heads, length, d) = x.dims3()?;
    let table = |t: &Tensor| t.narrow(0, 0, length)?.reshape((1, length, d / 2, 1));
    let pairs = x.to_dtype(DType::F32)?.reshape((heads, length, d / 2, 2))?;
    let (a, b) = (pairs.narrow(3, 0, 1)?, pairs.narrow(3, 1, 1)?);
    let (cos, sin) = (table(cos)?, table(sin)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], 3)?.reshape((heads, length, d))?.to_dtype(x.dtype())
}

fn check_table(cos: &Tensor, sin: &Tensor, length: usize, d: usize) -> Result<()> {
    if cos.dims() != sin.dims() || cos.dim(0)? < length || cos.dim(1)? * 2 != d {
        candle_core::bail!("a table of angles {:?} for {length} tokens of heads of {d}", cos.dims());
    }
    Ok(())
}

vectorised! {
    fn rotate(line: &mut [f32], cos: &[f32], sin: &[f32]) {
        for ((pair, c), s) in line.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
            let [a, b] = *pair;
            *pair = [a * c - b * s, b * c + a * s];
        }
    }
}
