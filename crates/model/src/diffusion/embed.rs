//! Latents, times and pooled text as tokens and vectors, and tokens back as latents.

use candle_core::{Device, Tensor};

use super::rope::Grid;
use crate::{
    Error, Result,
    nn::Linear,
    ops::Activation,
    weights::{Matrix, Weights},
};

/// `[cos(t·f), sin(t·f)]` with `f_k = 10000^(-k/half)`.
///
/// In f32 with the reference's own roundings: at `t = 1000` the last bit of `f` moves the cosine by 6e-5.
///
/// - returns: `(t.len(), width)`, f32
pub fn timestep_embedding(t: &[f32], width: usize, device: &Device) -> Result<Tensor> {
    let half = width / 2;
    let step = -(10_000f64.ln() as f32);
    let mut frequencies: Vec<f32> = (0..half).map(|k| f64::from(step * k as f32 / half as f32).exp() as f32).collect();
    if half == REFERENCE_HALF {
        frequencies[ROUNDED_UP] = frequencies[ROUNDED_UP].next_up();
    }
    let mut values = Vec::with_capacity(t.len() * 2 * half);
    for &t in t {
        values.extend(frequencies.iter().map(|f| f64::from(t * f).cos() as f32));
        values.extend(frequencies.iter().map(|f| f64::from(t * f).sin() as f32));
    }
    Ok(Tensor::from_vec(values, (t.len(), 2 * half), device)?)
}

/// Frequencies of the reference's table.
const REFERENCE_HALF: usize = 128;
/// The one of them that matters and that the reference's exponential rounds away from the nearest f32: the exact
/// value lies 0.479 of a unit above the lower neighbour, and the reference holds the upper one.
const ROUNDED_UP: usize = 12;

/// Two layers with SiLU between them: `second(SiLU(first(x)))`.
#[derive(Debug, Clone)]
pub struct Embedder {
    first: Linear,
    second: Linear,
    inp: usize,
}

impl Embedder {
    /// Reads the layers of these names; widths are the tensors' own.
    pub fn load(weights: &Weights, first: &str, second: &str) -> Result<Self> {
        let (first, second) = (weights.pp(first), weights.pp(second));
        let [_, inp] = first.dims("weight")?;
        let first = Linear::load(&first, inp)?;
        Ok(Self { second: Linear::load(&second, first.out())?, first, inp })
    }

    /// Width it takes.
    #[must_use]
    pub fn inp(&self) -> usize {
        self.inp
    }

    /// Width it gives.
    #[must_use]
    pub fn out(&self) -> usize {
        self.second.out()
    }

    /// - `x`: `(.., in)`
    /// - returns: `(.., out)`
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.second.forward(&self.first.forward_then(x, Activation::Silu)?)
    }
}

/// Numbers (a flow time, a frame rate, a motion strength) as vectors.
#[derive(Debug, Clone)]
pub struct TimeEmbedder {
    mlp: Embedder,
    device: Device,
}

impl TimeEmbedder {
    /// Reads `mlp.0` and `mlp.2`.
    pub fn load(weights: &Weights) -> Result<Self> {
        let mlp = Embedder::load(weights, "mlp.0", "mlp.2")?;
        Ok(Self { mlp, device: weights.device().clone() })
    }

    /// Width of a vector.
    #[must_use]
    pub fn out(&self) -> usize {
        self.mlp.out()
    }

    /// - returns: `(t.len(), out)`, f32 whatever the weights' type
    pub fn forward(&self, t: &[f32]) -> Result<Tensor> {
        Ok(self.mlp.forward(&timestep_embedding(t, self.mlp.inp(), &self.device)?)?)
    }
}

/// Latents as tokens: each 2x2 square of one latent frame is one token.
#[derive(Debug, Clone)]
pub struct PatchEmbed {
    proj: Linear,
    channels: usize,
}

impl PatchEmbed {
    /// Reads `proj.weight` `(H, C, 1, 2, 2)` and `proj.bias` `(H)`.
    pub fn load(weights: &Weights) -> Result<Self> {
        let weights = weights.pp("proj");
        let [hidden, channels, ..] = weights.dims::<5>("weight")?;
        let weight = weights.get(&[hidden, channels, 1, 2, 2], "weight")?.reshape((hidden, channels * 4))?;
        Ok(Self { proj: Linear::new(Matrix::new(&weight)?, Some(weights.get(&[hidden], "bias")?)), channels })
    }

    /// Channels of the latents.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Width of a token.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.proj.out()
    }

    /// - `latents`: `(C, T, h, w)`, h and w even
    /// - returns: `(T·h/2·w/2, H)`, ordered (frame, row, column)
    pub fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        let grid = grid_of(latents)?;
        let Grid { frames, rows, columns } = grid;
        let patches = latents
            .reshape(&[self.channels, frames, rows, 2, columns, 2][..])? // (C, T, h/2, 2, w/2, 2)
            .permute([1, 2, 4, 0, 3, 5])? //                                (T, h/2, w/2, C, 2, 2)
            .reshape((grid.tokens(), self.channels * 4))?;
        Ok(self.proj.forward(&patches)?)
    }
}

/// The token grid of latents `(C, T, h, w)`.
///
/// Errors: there is no frame, or a side is odd or 0.
pub fn grid_of(latents: &Tensor) -> Result<Grid> {
    match *latents.dims() {
        [_, frames, h, w] if frames > 0 && h > 0 && w > 0 && h % 2 == 0 && w % 2 == 0 => {
            Ok(Grid { frames, rows: h / 2, columns: w / 2 })
        }
        _ => {
            let reason = format!("shape {:?}, expected (C, T, h, w) with even h and w", latents.dims());
            Err(Error::input("latents", reason))
        }
    }
}

/// Tokens back as latents.
///
/// - `tokens`: `(T·R, C·4)`, each ordered (channel, dy, dx)
/// - returns: `(C, T, h, w)`
pub fn unpatchify(tokens: &Tensor, grid: Grid) -> candle_core::Result<Tensor> {
    let channels = tokens.dim(1)? / 4;
    let Grid { frames, rows, columns } = grid;
    tokens
        .reshape(&[frames, rows, columns, channels, 2, 2][..])? // (T, h/2, w/2, C, 2, 2)
        .permute([3, 0, 1, 4, 2, 5])? //                           (C, T, h/2, 2, w/2, 2)
        .reshape((channels, frames, 2 * rows, 2 * columns))
}
