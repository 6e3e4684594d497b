//! Scaled dot-product attention that never holds queries x keys for more than a tile.

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use super::{
    host::{self, Shared},
    product::{Left, View},
    simd::{self, exp, vectorised},
};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::memory;

/// Queries and keys of one tile: its scores (f32: 255 KiB) stay in a core's second cache. The queries are whole tiles of
/// sums; they are many, since keys and values are laid out for each tile anew.
const QUERIES: usize = 240;
const KEYS: usize = 256;

/// Values between two lines of scores: lines whole pages or powers of two apart would share a few places of the first
/// cache.
const APART: usize = 16;

/// `softmax(q·kᵀ·scale + mask)·v`, a tile of queries and keys at a time, with a running maximum and sum.
///
/// - `q`: `(B, heads, Lq, d)`; `k`: `(B, heads, Lk, d)`; `v`: `(B, heads, Lk, dv)`
/// - `mask`: added to the scores, `(B or 1, Lq or 1, Lk)`, f32, 0 or -inf; no row may be all -inf
/// - returns: `(B, heads, Lq, dv)`, type of `q`, laid out so that joining the heads copies nothing
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: Option<&Tensor>) -> Result<Tensor> {
    if ![q, k, v].into_iter().all(host::here) {
        #[cfg(feature = "cuda")]
        if [q, k, v].into_iter().all(cuda::here) {
            return cuda::attention(q, k, v, scale, mask);
        }
        return attention_clear(q, k, v, scale, mask);
    }
    let (batch, heads, queries, d) = q.dims4()?;
    let (keys, dv) = (k.dim(2)?, v.dim(3)?);
    if k.dims() != [batch, heads, keys, d] || v.dims() != [batch, heads, keys, dv] || keys == 0 {
        candle_core::bail!("attention of q {:?}, k {:?}, v {:?}", q.dims(), k.dims(), v.dims());
    }
    let mask = mask.map(|m| Mask::new(m, [batch, queries, keys])).transpose()?;
    let inputs = batch * heads * (queries * d + keys * (d + dv));
    memory::room_for(q.dtype(), inputs, batch * queries * heads * dv)?;
    let mut out = vec![0f32; batch * queries * heads * dv];
    host::with_values(q, |q| {
        host::with_values(k, |k| {
            host::with_values(v, |v| {
                let out = Shared::new(&mut out);
                let tiles = queries.div_ceil(QUERIES);
                (0..batch * heads * tiles).into_par_iter().for_each_init(Room::default, |room, task| {
                    let (head, first) = (task / tiles, task % tiles * QUERIES);
                    let rows = QUERIES.min(queries - first);
                    let q = &q[(head * queries + first) * d..][..rows * d];
                    let (k, v) = (&k[head * keys * d..][..keys * d], &v[head * keys * dv..][..keys * dv]);
                    let mask = mask.as_ref().map(|m| m.at(head / heads, first));
                    room.run((q, k, v), [rows, d, dv], scale as f32, mask);
                    for (row, values) in room.sum.chunks(dv.max(1)).enumerate().take(rows) {
                        let at = ((head / heads * queries + first + row) * heads + head % heads) * dv;
                        // SAFETY: one head of one query is one task's.
                        unsafe { out.slice(at, dv) }.copy_from_slice(values);
                    }
                });
            })
        })
    })???;
    host::tensor(out, &[batch, queries, heads, dv], q.dtype())?.transpose(1, 2)
}

/// The same with candle's operations, one head at a time, on any device and in any type.
pub fn attention_clear(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: Option<&Tensor>) -> Result<Tensor> {
    /// Most scores held at once (f32: 64 MiB).
    const SCORES: usize = 16 << 20;
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

/// What is added to the scores.
struct Mask {
    values: Vec<f32>,
    /// Values from one batch item to the next, and from one query to the next; 0 where all share them.
    strides: [usize; 2],
    keys: usize,
}

impl Mask {
    fn new(mask: &Tensor, [batch, queries, keys]: [usize; 3]) -> Result<Self> {
        let (b, q, k) = mask.dims3()?;
        if !(b == 1 || b == batch) || !(q == 1 || q == queries) || k != keys {
            candle_core::bail!("a mask {:?} for {batch} x {queries} x {keys} scores", mask.dims());
        }
        let strides = [if b == 1 { 0 } else { q * k }, if q == 1 { 0 } else { k }];
        Ok(Self { values: host::with_values(mask, <[f32]>::to_vec)?, strides, keys })
    }

    /// The mask from query `first` of an item on, and its stride.
    fn at(&self, item: usize, first: usize) -> (&[f32], usize, usize) {
        (&self.values[item * self.strides[0] + first * self.strides[1]..], self.strides[1], self.keys)
    }
}

/// One thread's working memory.
#[derive(Default)]
struct Room {
    scores: Vec<f32>,
    /// `(queries, dv)`: the weighted sum so far, and at the end the result.
    sum: Vec<f32>,
    /// Largest score and sum of exponentials so far, for each query.
    most: Vec<f32>,
    total: Vec<f32>,
    /// Packed operands.
    queries: Vec<f32>,
    packed: Vec<f32>,
}

impl Room {
    fn run(
        &mut self,
        (q, k, v): (&[f32], &[f32], &[f32]),
        [rows, d, dv]: [usize; 3],
        scale: f32,
        mask: Option<(&[f32], usize, usize)>,
    ) {
        let keys = k.len().checked_div(d).unwrap_or(0);
        self.sum.clear();
        self.sum.resize(rows * dv, 0.0);
        self.most.clear();
        self.most.resize(rows, f32::NEG_INFINITY);
        self.total.clear();
        self.total.resize(rows, 0.0);
        let left = Left::new(View::rows(q, d), rows, d, std::mem::take(&mut self.queries));
        let stride = KEYS.min(keys) + APART;
        self.scores.resize(Left::whole_tiles(rows) * stride, 0.0);
        for first in (0..keys).step_by(KEYS) {
            let count = KEYS.min(keys - first);
            let k = View::columns(&k[first * d..][..count * d], d);
            // SAFETY: the scores are this thread's, and there are `rows · stride` of them.
            unsafe { left.times(k, count, (self.scores.as_mut_ptr(), stride), (scale, false), &mut self.packed) };
            for row in 0..rows {
                let line = &mut self.scores[row * stride..][..count];
                if let Some((mask, stride, _)) = mask {
                    line.iter_mut().zip(&mask[row * stride + first..]).for_each(|(s, m)| *s += m);
                }
                let sum = &mut self.sum[row * dv..][..dv];
                soften(line, sum, &mut self.most[row], &mut self.total[row]);
            }
            let v = View::rows(&v[first * dv..][..count * dv], dv);
            let weights = Left::in_place(View::rows(&self.scores, stride), rows, count);
            // SAFETY: the sums are this thread's, and there are `rows · dv` of them.
            unsafe { weights.times(v, dv, (self.sum.as_mut_ptr(), dv), (1.0, true), &mut self.packed) };
        }
        self.queries = left.into_room();
        for (sum, total) in self.sum.chunks_mut(dv.max(1)).zip(&self.total) {
            let scale = 1.0 / total;
            sum.iter_mut().for_each(|v| *v *= scale);
        }
    }
}

vectorised! {
    /// Turns a line of scores into exponentials and keeps the running maximum, total and sum in step.
    fn soften(line: &mut [f32], sum: &mut [f32], most: &mut f32, total: &mut f32) {
        let now = simd::max(line).max(*most);
        if now == f32::NEG_INFINITY {
            line.fill(0.0);
            return;
        }
        if now > *most {
            // What was summed up so far was relative to the old maximum.
            let shrink = exp::<FMA>(*most - now);
            *total *= shrink;
            sum.iter_mut().for_each(|v| *v *= shrink);
            *most = now;
        }
        *total += simd::sum_changed(line, |v| exp::<FMA>(v - now));
    }
}
