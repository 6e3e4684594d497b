//! The VAE's convolutions and norms.

use candle_core::{DType, Result, Tensor};

use super::launch::{File, Launch, Number, int, long, ready, suffix, wide};

const THREADS: u32 = 256;

/// A convolution: what [`convolve`] needs besides the input.
pub(crate) struct Convolution<'a> {
    /// `(O, taps, C)`
    pub(crate) weight: &'a Tensor,
    /// `(O)`
    pub(crate) bias: &'a Tensor,
    /// Added to the output, in its shape.
    pub(crate) residual: Option<&'a Tensor>,
    pub(crate) kernel: usize,
    /// Input index for each tap and output position of time, rows and columns, one after the other.
    pub(crate) sources: &'a [u32],
    /// Output frames, rows and columns.
    pub(crate) out: [usize; 3],
}

/// - `x`: `(B, C, T, H, W)`
/// - returns: `(B, O, T', H', W')`
pub(crate) fn convolve(x: &Tensor, given: &Convolution<'_>) -> Result<Tensor> {
    let (batch, channels, t, h, w) = x.dims5()?;
    let (outputs, [to, ho, wo]) = (given.weight.dim(0)?, given.out);
    let dtype = x.dtype();
    let sources = Tensor::new(given.sources, x.device())?;
    let own = |t: &Tensor| ready(&t.to_dtype(dtype)?);
    let (x, weight, bias) = (ready(x)?, own(given.weight)?, own(given.bias)?);
    let residual = given.residual.map(own).transpose()?;
    // A block's outputs and positions, as the kernels have them.
    let side = if dtype == DType::F32 { 64 } else { 128 };
    let sizes = [channels, outputs, given.kernel, t, h, w, to, ho, wo].map(int);
    let numbers = sizes.into_iter().collect::<Result<Vec<_>>>()?;
    Launch {
        file: File::Conv,
        kernel: format!("conv_{}", suffix(dtype)?),
        inputs: &[Some(&x), Some(&weight), Some(&bias), residual.as_ref(), Some(&sources)],
        numbers: &numbers,
        grid: [(to * ho * wo).div_ceil(side), outputs.div_ceil(side), batch],
        threads: THREADS,
        shared: 0,
    }
    .run(&[batch, outputs, to, ho, wo], dtype)
}

/// Group normalisation of `(B, C, ..)`, with `x·σ(x)` behind it where that is wanted.
pub(crate) fn group_norm(
    x: &Tensor,
    groups: usize,
    (weight, bias): (&Tensor, &Tensor),
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    /// Values of one slice: several for every block that a card can run at once, even of a small input.
    const SLICE: usize = 1 << 15;
    let (batch, channels) = (x.dim(0)?, x.dim(1)?);
    let positions: usize = x.dims()[2..].iter().product();
    let count = channels / groups * positions;
    let slices = count.div_ceil(SLICE);
    let (x, weight, bias) = (ready(x)?, wide(weight)?, wide(bias)?);
    let suffix = suffix(x.dtype())?;
    let parts = Launch {
        file: File::Group,
        kernel: format!("group_slices_{suffix}"),
        inputs: &[Some(&x)],
        numbers: &[long(count), int(SLICE)?],
        grid: [slices, batch * groups, 1],
        threads: THREADS,
        shared: 0,
    }
    .run(&[batch * groups, slices, 2], DType::F32)?;
    let statistics = Launch {
        file: File::Group,
        kernel: "group_merge".to_owned(),
        inputs: &[Some(&parts)],
        numbers: &[int(batch * groups)?, int(slices)?, long(count), int(SLICE)?, Number::Double(eps)],
        grid: [(batch * groups).div_ceil(32), 1, 1],
        threads: 32,
        shared: 0,
    }
    .run(&[batch * groups, 2], DType::F32)?;
    Launch {
        file: File::Group,
        kernel: format!("group_apply_{suffix}"),
        inputs: &[Some(&x), Some(&statistics), Some(&weight), Some(&bias)],
        numbers: &[long(positions), int(channels)?, int(channels / groups)?, Number::Int(i32::from(silu))],
        grid: [positions.div_ceil(4 * THREADS as usize).max(1), batch * channels, 1],
        threads: THREADS,
        shared: 0,
    }
    .run(x.dims(), x.dtype())
}
