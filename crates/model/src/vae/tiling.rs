//! Overlapping tiles and their seams.
//!
//! A seam goes linearly from the earlier tile to the later one. Tiles are blended in order, each with its
//! neighbour as that one was after its own blending.

use candle_core::{DType, Tensor};

use super::VaeConfig;
use crate::Result;

/// How one side is cut: a tile and a stride on the way in, a seam and a kept part on the way out.
#[derive(Debug, Clone)]
pub(super) struct Cut {
    tile: usize,
    stride: usize,
    seam: usize,
    keep: usize,
}

impl Cut {
    /// A quarter of a tile overlaps. `inp` and `out` are the tile's sizes before and after the network.
    fn new(inp: usize, out: usize) -> Self {
        Self { tile: inp, stride: (inp * 3 / 4).max(1), seam: out / 4, keep: out - out / 4 }
    }
}

/// How a network's input is cut.
#[derive(Debug, Clone)]
pub(super) struct Tiling {
    pub(super) time: Cut,
    pub(super) space: Cut,
}

impl Tiling {
    pub(super) fn decode(config: &VaeConfig) -> Self {
        Self {
            time: Cut::new(config.tile_latent_length(), config.sample_tsize),
            space: Cut::new(config.tile_latent_side(), config.sample_size),
        }
    }

    /// As [`decode`](Self::decode), in tiles `divisor` times shorter along every side.
    pub(super) fn decode_smaller(config: &VaeConfig, divisor: usize) -> Self {
        let cut = |tile: usize, ratio: usize| {
            let tile = smaller(tile, divisor);
            Cut::new(tile, tile * ratio)
        };
        Self {
            time: cut(config.tile_latent_length(), config.time_compression_ratio),
            space: cut(config.tile_latent_side(), config.spatial_compression_ratio),
        }
    }

    pub(super) fn encode(config: &VaeConfig) -> Self {
        Self {
            time: Cut::new(config.sample_tsize, config.tile_latent_length()),
            space: Cut::new(config.sample_size, config.tile_latent_side()),
        }
    }

    pub(super) fn splits_time(&self, x: &Tensor) -> Result<bool> {
        Ok(x.dim(2)? > self.time.tile)
    }

    pub(super) fn splits_space(&self, x: &Tensor) -> Result<bool> {
        Ok(x.dim(3)?.max(x.dim(4)?) > self.space.tile)
    }
}

/// A tile's side divided, to a multiple of 4, so that strides and seams are whole latents; never below 4.
fn smaller(tile: usize, divisor: usize) -> usize {
    (tile / divisor.max(1) / 4 * 4).max(4).min(tile)
}

/// Runs a network over tiles in time and hands on the finished part of each.
///
/// A tile is one frame longer than its nominal length: the network treats a first frame on its own, so the first
/// output frame of every tile but the first is dropped.
pub(super) fn temporal(
    x: &Tensor,
    cut: &Cut,
    run: &mut dyn FnMut(&Tensor) -> Result<Tensor>,
    emit: &mut dyn FnMut(Tensor) -> Result<()>,
) -> Result<()> {
    let frames = x.dim(2)?;
    let mut earlier: Option<Tensor> = None;
    for start in (0..frames).step_by(cut.stride) {
        let length = (cut.tile + 1).min(frames - start);
        if start > 0 && length == 1 {
            break; // Its only frame would be dropped.
        }
        let mut y = run(&x.narrow(2, start, length)?.contiguous()?)?;
        if start > 0 {
            y = y.narrow(2, 1, y.dim(2)? - 1)?;
        }
        if let Some(earlier) = &earlier {
            y = blend(earlier, &y, 2, cut.seam)?;
        }
        earlier = Some(tail(&y, 2, cut.seam)?);
        let keep = (cut.keep + usize::from(start == 0)).min(y.dim(2)?);
        if keep > 0 {
            let piece = y.narrow(2, 0, keep)?.contiguous()?;
            drop(y);
            emit(piece)?;
        }
    }
    Ok(())
}

/// Runs a network over tiles in rows and columns and joins them.
pub(super) fn spatial(x: &Tensor, cut: &Cut, run: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (height, width) = (x.dim(3)?, x.dim(4)?);
    let mut rows = Vec::new();
    let mut above: Vec<Tensor> = Vec::new();
    for top in (0..height).step_by(cut.stride) {
        let strip = x.narrow(3, top, cut.tile.min(height - top))?;
        let (mut pieces, mut bottoms, mut before): (Vec<Tensor>, Vec<Tensor>, Option<Tensor>) = Default::default();
        for left in (0..width).step_by(cut.stride) {
            let mut y = run(&strip.narrow(4, left, cut.tile.min(width - left))?.contiguous()?)?;
            if let Some(above) = above.get(bottoms.len()) {
                y = blend(above, &y, 3, cut.seam)?;
            }
            if let Some(before) = &before {
                y = blend(before, &y, 4, cut.seam)?;
            }
            bottoms.push(tail(&y, 3, cut.seam)?);
            before = Some(tail(&y, 4, cut.seam)?);
            let kept = y.narrow(3, 0, cut.keep.min(y.dim(3)?))?.narrow(4, 0, cut.keep.min(y.dim(4)?))?;
            pieces.push(kept.contiguous()?);
        }
        rows.push(Tensor::cat(&pieces, 4)?);
        above = bottoms;
    }
    Ok(Tensor::cat(&rows, 3)?)
}

/// A copy of the last part, so that the tile itself can go.
fn tail(x: &Tensor, dim: usize, length: usize) -> Result<Tensor> {
    let length = length.min(x.dim(dim)?);
    Ok(x.narrow(dim, x.dim(dim)? - length, length)?.contiguous()?)
}

/// Goes from the end of `a` to the start of `b` over at most `extent` elements; the first is wholly `a`.
fn blend(a: &Tensor, b: &Tensor, dim: usize, extent: usize) -> Result<Tensor> {
    let (length, total) = (extent.min(a.dim(dim)?).min(b.dim(dim)?), b.dim(dim)?);
    if length == 0 {
        return Ok(b.clone());
    }
    let ramp = |f: &dyn Fn(f64) -> f64| {
        let weights: Vec<f32> = (0..length).map(|k| f(k as f64 / length as f64) as f32).collect();
        let mut shape = vec![1; b.rank()];
        shape[dim] = length;
        Tensor::from_vec(weights, shape, b.device())
    };
    let old = a.narrow(dim, a.dim(dim)? - length, length)?.to_dtype(DType::F32)?;
    let new = b.narrow(dim, 0, length)?.to_dtype(DType::F32)?;
    let seam = (old.broadcast_mul(&ramp(&|w| 1.0 - w)?)? + new.broadcast_mul(&ramp(&|w| w)?)?)?.to_dtype(b.dtype())?;
    if length == total {
        return Ok(seam);
    }
    Ok(Tensor::cat(&[seam, b.narrow(dim, length, total - length)?.contiguous()?], dim)?.contiguous()?)
}
