//! How fast a card is at what networks do, measured with the networks' own parts.
//!
//! Predicted seconds are work over rates, and between the products of a block stand norms, turns and gates, which are no
//! work of their own there. So not a bare product is measured but a block of the transformer, at two lengths that tell
//! its layers from its attention, and a convolution with the norm before it.

use std::{collections::HashMap, path::Path, time::Duration};

use candle_core::{DType, Device, Tensor};
use planner::cost::{
    apart::{Run, apart},
    work::Rates,
};

use crate::{
    Error, Result,
    blueprint::{Spec, TransformerSizes},
    diffusion::{Grid, Rope, SingleBlock},
    vae::{CausalConv3d, GroupNorm},
    weights::{Clock, Swap, Weights},
};

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Type of all values.
    pub dtype: DType,
    /// Width of a token and of a head.
    pub widths: [usize; 2],
    /// Tokens of the short and of the long run.
    pub tokens: [usize; 2],
    /// Channels of the convolution, and its frames, rows and columns.
    pub video: [usize; 4],
    /// Rows and columns of a weight that comes from its file.
    pub weight: [usize; 2],
}

impl Load {
    /// Enough to fill the fastest card for milliseconds; seconds on a slow one.
    pub const CARD: Self = Self {
        dtype: DType::BF16,
        widths: [3072, 128],
        tokens: [2048, 16_384],
        video: [128, 9, 256, 256],
        weight: [8192, 4096],
    };
}

/// Groups of the norm before the convolution.
const GROUPS: usize = 32;
/// Runs that count; the middle one does.
const RUNS: usize = 3;
/// Weights that come and go.
const WEIGHTS: usize = 4;

/// Measures the rates of a device; `folder` is an empty one for files.
///
/// Errors: the device has no room for it, or the folder cannot be written.
pub fn rates(device: &Device, load: &Load, folder: &Path, clock: Clock) -> Result<Rates> {
    let (products, attention) = block(device, load, clock)?;
    let convolutions = convolution(device, load, clock)?;
    let (weights, files) = weights(device, load, folder, clock)?;
    Ok(Rates { measured: true, products, attention, convolutions, weights, files, pace: None })
}

/// Seconds of the middle run after one that is not counted.
fn middle(device: &Device, clock: Clock, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    device.synchronize()?;
    let mut seconds = [0.0; RUNS];
    for second in &mut seconds {
        let begin = clock();
        run()?;
        device.synchronize()?;
        *second = clock().saturating_sub(begin).as_secs_f64();
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[RUNS / 2].max(1e-9))
}

/// Random tensors, made where they are used.
fn made(specs: impl Iterator<Item = Spec>, device: &Device, dtype: DType) -> Result<Weights> {
    let one = |spec: Spec| -> Result<(String, Tensor)> {
        let values = Tensor::randn(spec.mean, spec.deviation, spec.shape.as_slice(), device)?;
        Ok((spec.name, values.to_dtype(dtype)?))
    };
    let tensors: HashMap<String, Tensor> = specs.map(one).collect::<Result<_>>()?;
    Ok(Weights::from_tensors(tensors, dtype, device))
}

/// FLOP/s of a block's layers with all that stands between them, and of its attention.
fn block(device: &Device, load: &Load, clock: Clock) -> Result<(f64, f64)> {
    let [hidden, head] = load.widths;
    let sizes = TransformerSizes { hidden, head, inner: 4 * hidden, ..TransformerSizes::PUBLISHED };
    let own = sizes.tensors().into_iter().filter(|spec| spec.name.starts_with("single_blocks.0."));
    let block = SingleBlock::load(&made(own, device, load.dtype)?.pp("single_blocks.0"), hidden)?;
    let vec = Tensor::randn(0f32, 1f32, (1, hidden), device)?;
    let run = |tokens: usize| -> Result<Run> {
        let x = Tensor::randn(0f32, 1f32, (tokens, hidden), device)?.to_dtype(load.dtype)?;
        // A row of tokens: how they lie in the picture changes no time.
        let grid = Grid { frames: 0, rows: 1, columns: tokens };
        let rope = Rope::new(grid, [head / 2, head / 4, head / 4], 256.0, 0, device)?;
        let seconds = middle(device, clock, || block.forward(&x, &vec, &rope).map(drop))?;
        let (n, h) = (tokens as f64, hidden as f64);
        Ok(Run { work: [24.0 * n * h * h, 4.0 * n * n * h], seconds })
    };
    let [short, long] = load.tokens;
    Ok(apart(run(long)?, run(short)?))
}

/// FLOP/s of a convolution with its norm.
fn convolution(device: &Device, load: &Load, clock: Clock) -> Result<f64> {
    let [channels, frames, rows, columns] = load.video;
    let spec = |name: &str, shape: &[usize], mean: f32| Spec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        mean,
        deviation: ((27 * channels) as f32).sqrt().recip(),
    };
    let layer = |name: &str, shape: &[usize]| {
        [spec(&format!("{name}.weight"), shape, 0.0), spec(&format!("{name}.bias"), &[channels], 0.0)]
    };
    let specs = layer("conv", &[channels, channels, 3, 3, 3]).into_iter().chain(layer("norm", &[channels]));
    let weights = made(specs, device, load.dtype)?;
    let conv = CausalConv3d::load(&weights.pp("conv"), channels, [1; 3])?;
    let norm = GroupNorm::load(&weights.pp("norm"), GROUPS.min(channels))?;
    let x = Tensor::randn(0f32, 1f32, &[1, channels, frames, rows, columns], device)?.to_dtype(load.dtype)?;
    let seconds = middle(device, clock, || conv.forward(&norm.forward_silu(&x)?).map(drop))?;
    Ok(2.0 * (27 * channels * channels * frames * rows * columns) as f64 / seconds)
}

/// Bytes/s of weights on their way from the system's cache to the device, and from their file.
fn weights(device: &Device, load: &Load, folder: &Path, clock: Clock) -> Result<(f64, f64)> {
    let [rows, columns] = load.weight;
    let values = Tensor::rand(-1f32, 1f32, (rows, columns), &Device::Cpu)?.to_dtype(DType::BF16)?;
    let name = |i: usize| format!("blocks.{i}");
    let tensors: HashMap<String, Tensor> =
        (0..WEIGHTS).map(|i| (format!("{}.weight", name(i)), values.clone())).collect();
    let file = folder.join("weights.safetensors");
    candle_core::safetensors::save(&tensors, &file)?;
    let all = Weights::open(folder, load.dtype, device)?.later();
    for i in 0..WEIGHTS {
        all.matrix(rows, columns, format!("{}.weight", name(i)))?;
    }
    let swap = Swap::new((0..WEIGHTS).map(|i| all.pp(name(i)).extent()).collect());
    swap.look_ahead(0);
    swap.keep(0, clock);
    let round = || {
        let mut pass = swap.pass();
        for block in 0..WEIGHTS {
            pass.enter(block);
            pass.leave(block);
        }
    };
    round();
    let before = swap.told().waited;
    for _ in 0..RUNS {
        round();
    }
    let rate = |bytes: usize, took: Duration| bytes as f64 / took.as_secs_f64().max(1e-9);
    let bytes = 2 * WEIGHTS * rows * columns;
    let moved = rate(RUNS * bytes, swap.told().waited.saturating_sub(before));
    let begin = clock();
    std::fs::read(&file).map_err(|e| Error::file(&file, e))?;
    Ok((moved, rate(bytes, clock().saturating_sub(begin))))
}

#[cfg(test)]
mod tests {
    use std::{sync::LazyLock, time::Instant};

    use super::*;

    fn clock() -> Duration {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        START.elapsed()
    }

    #[test]
    fn every_rate_is_measured_and_can_be_divided_by() {
        let folder = tempfile::tempdir().unwrap();
        let load = Load {
            dtype: DType::F32,
            widths: [128, 16],
            tokens: [64, 512],
            video: [16, 2, 16, 16],
            weight: [512, 512],
        };
        let rates = rates(&Device::Cpu, &load, folder.path(), clock).unwrap();
        assert!(rates.usable() && rates.measured && rates.pace.is_none(), "{rates:?}");
        // No processor is as fast as this, and none of today as slow.
        assert!([rates.products, rates.convolutions].iter().all(|rate| (1e6..1e15).contains(rate)), "{rates:?}");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_told() {
        let load = Load { dtype: DType::F32, widths: [32, 16], tokens: [8, 16], video: [4, 1, 4, 4], weight: [8, 8] };
        assert!(rates(&Device::Cpu, &load, Path::new("/nowhere/at/all"), clock).is_err());
    }
}
