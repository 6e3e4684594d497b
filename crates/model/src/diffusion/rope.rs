//! Rotary positions over frames, rows and columns.

use candle_core::{Device, Tensor};

use super::parts::carried;
use crate::{Error, Result, ops::turn};

/// Tokens of one pass: latent frames of `rows` x `columns` tokens each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Latent frames, without the reference frame.
    pub frames: usize,
    /// Rows of tokens, half of the latent rows.
    pub rows: usize,
    /// Columns of tokens, half of the latent columns.
    pub columns: usize,
}

impl Grid {
    /// Tokens of one latent frame.
    #[must_use]
    pub fn per_frame(self) -> usize {
        self.rows * self.columns
    }

    /// Tokens of all latent frames, without the reference frame.
    #[must_use]
    pub fn tokens(self) -> usize {
        self.frames * self.per_frame()
    }
}

/// Cosines and sines that turn queries and keys by their place.
///
/// The first channels of a head turn with the frame, the next with the row, the last with the column; pair `k` of an
/// axis of `d` channels at position `p` turns by `p·theta^(-2k/d)`. The reference frame comes first, as frame -1.
/// Tables are computed in f64 and held in f32: in 16 bits the cosine would be off by up to 0.1.
#[derive(Debug, Clone)]
pub struct Rope {
    cos: Tensor, // (tokens, head width / 2)
    sin: Tensor, // (tokens, head width / 2)
}

impl Rope {
    /// The table of the reference frame and `grid`, followed by `still` tokens that do not turn (text).
    pub fn new(grid: Grid, dims: [usize; 3], theta: f64, still: usize, device: &Device) -> Result<Self> {
        if dims.iter().any(|d| d % 2 != 0) {
            return Err(Error::input("rope_dim_list", format!("{dims:?}: every part must be even")));
        }
        // -1 is the reference frame.
        let axes = [(-1, grid.frames + 1), (0, grid.rows), (0, grid.columns)];
        let angles = |axis: usize| -> Vec<Vec<(f32, f32)>> {
            let (first, count) = axes[axis];
            let pairs = dims[axis] / 2;
            (0..count)
                .map(|i| {
                    let position = f64::from(first) + i as f64;
                    (0..pairs)
                        .map(|k| {
                            let angle = position * theta.powf(-2.0 * k as f64 / dims[axis] as f64);
                            (angle.cos() as f32, angle.sin() as f32)
                        })
                        .collect()
                })
                .collect()
        };
        let [frames, rows, columns] = [angles(0), angles(1), angles(2)];
        let half = dims.iter().sum::<usize>() / 2;
        let tokens = grid.tokens() + grid.per_frame() + still;
        let (mut cos, mut sin) = (Vec::with_capacity(tokens * half), Vec::with_capacity(tokens * half));
        for frame in &frames {
            for row in &rows {
                for column in &columns {
                    for &(c, s) in frame.iter().chain(row).chain(column) {
                        cos.push(c);
                        sin.push(s);
                    }
                }
            }
        }
        cos.resize(tokens * half, 1.0);
        sin.resize(tokens * half, 0.0);
        let cos = Tensor::from_vec(cos, (tokens, half), device)?;
        let sin = Tensor::from_vec(sin, (tokens, half), device)?;
        Ok(Self { cos, sin })
    }

    /// The table of the first `tokens` tokens.
    pub fn first(&self, tokens: usize) -> candle_core::Result<Self> {
        Ok(Self { cos: self.cos.narrow(0, 0, tokens)?, sin: self.sin.narrow(0, 0, tokens)? })
    }

    /// The table on another device.
    pub(super) fn carried(&self, device: &Device) -> candle_core::Result<Self> {
        Ok(Self { cos: carried(&self.cos, device)?, sin: carried(&self.sin, device)? })
    }

    /// Cosines and sines, each `(tokens, head width / 2)`.
    #[must_use]
    pub fn halves(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    /// Turns adjacent channels `(2k, 2k + 1)`.
    ///
    /// - `x`: `(heads, tokens, head width)`
    /// - returns: the same shape
    pub fn rotate(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        turn(x, &self.cos, &self.sin)
    }

    /// Cosines and sines as the reference lays them out, each standing twice: `(tokens, head width)`.
    pub fn tables(&self) -> candle_core::Result<(Tensor, Tensor)> {
        let twice = |half: &Tensor| {
            let (tokens, pairs) = half.dims2()?;
            half.unsqueeze(2)?.broadcast_as((tokens, pairs, 2))?.reshape((tokens, 2 * pairs))
        };
        Ok((twice(&self.cos)?, twice(&self.sin)?))
    }
}
