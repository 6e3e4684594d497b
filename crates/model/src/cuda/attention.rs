//! Attention: which kernel, or the clear operations.

use candle_core::{DType, Result, Tensor};

use super::launch::{File, Launch, Number, int, long, ready, suffix};
use crate::ops::attention_clear;

/// Queries of a block of the kernel on tensor cores, and its threads.
const QUERIES: usize = 128;
const THREADS: u32 = 128;

/// The same of the plain kernel, one query for each warp.
const PLAIN_QUERIES: usize = 8;
const PLAIN_THREADS: u32 = 256;
/// Most keys for which the plain kernel is taken: it fetches all of them for every eight queries.
const PLAIN_KEYS: usize = 2048;

/// As [`ops::attention`](crate::ops::attention): on tensor cores where values have 16 bits, heads are 64 or 128 wide and
/// nothing is masked; in plain f32 for few keys; by matrix products of some queries at a time otherwise.
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: Option<&Tensor>) -> Result<Tensor> {
    let (batch, heads, _, d) = q.dims4()?;
    let keys = k.dim(2)?;
    let alike = k.dims() == [batch, heads, keys, d] && v.dims() == k.dims() && keys > 0;
    let typed = [k, v].iter().all(|t| t.dtype() == q.dtype());
    // More blocks than a grid's second side has are work for several launches, which no network here needs.
    if !alike || !typed || batch * heads > 65535 {
        return attention_clear(q, k, v, scale, mask);
    }
    if mask.is_none() && q.dtype() != DType::F32 && matches!(d, 64 | 128) {
        return flash(q, k, v, scale);
    }
    match d {
        32 | 64 | 128 | 512 | 1024 if keys <= PLAIN_KEYS => plain(q, k, v, scale, mask),
        _ => attention_clear(q, k, v, scale, mask),
    }
}

fn flash(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
    let (batch, heads, queries, d) = q.dims4()?;
    let keys = k.dim(2)?;
    // Keys of a tile, as the kernel has them for this width.
    let tile = if d > 64 { 32 } else { 64 };
    let (q, k, v) = (ready(q)?, ready(k)?, ready(v)?);
    Launch {
        file: File::Attention,
        kernel: format!("flash_{d}_{}", suffix(q.dtype())?),
        inputs: &[Some(&q), Some(&k), Some(&v)],
        numbers: &[int(queries)?, int(keys)?, int(heads)?, Number::Float(scale as f32)],
        grid: [queries.div_ceil(QUERIES), batch * heads, 1],
        threads: THREADS,
        shared: ((QUERIES + 2 * tile) * d * 2) as u32,
    }
    .run(&[batch, queries, heads, d], q.dtype())?
    .transpose(1, 2)
}

fn plain(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: Option<&Tensor>) -> Result<Tensor> {
    let (batch, heads, queries, d) = q.dims4()?;
    let keys = k.dim(2)?;
    let mask = mask.map(|m| ready(&m.to_dtype(DType::F32)?)).transpose()?;
    let mut strides = [0, 0];
    if let Some(mask) = &mask {
        let (b, l, seen) = mask.dims3()?;
        if !(b == 1 || b == batch) || !(l == 1 || l == queries) || seen != keys {
            candle_core::bail!("a mask {:?} for {batch} x {queries} x {keys} scores", mask.dims());
        }
        strides = [if b == 1 { 0 } else { l * keys }, if l == 1 { 0 } else { keys }];
    }
    let (q, k, v) = (ready(q)?, ready(k)?, ready(v)?);
    let numbers =
        [long(queries), long(keys), int(heads)?, Number::Float(scale as f32), long(strides[0]), long(strides[1])];
    Launch {
        file: File::Attention,
        kernel: format!("plain_{d}_{}", suffix(q.dtype())?),
        inputs: &[Some(&q), Some(&k), Some(&v), mask.as_ref()],
        numbers: &numbers,
        grid: [queries.div_ceil(PLAIN_QUERIES), batch * heads, 1],
        threads: PLAIN_THREADS,
        shared: 0,
    }
    .run(&[batch, queries, heads, d], q.dtype())?
    .transpose(1, 2)
}
