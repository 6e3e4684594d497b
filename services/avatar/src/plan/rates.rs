//! How fast this machine's CPU is: measured once, with the networks' own operations, and kept.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Tensor};
use model::{
    audio::{CHUNK_SAMPLES, log_mel},
    image::{Detector, Rgb8},
    ops::{Activation, attention, linear, rms_norm},
    vae::{CausalConv3d, GroupNorm},
    weights::{Matrix, Weights},
};
use planner::cost::{cpu::Pace, work::Rates};

/// How long each operation is run.
const PATIENCE: Duration = Duration::from_millis(200);
/// Which measures they are; another number wherever operations or their measures change.
const MEASURES: u32 = 2;
/// Most bytes of the file that keeps the rates.
const KEPT_BYTES: u64 = 4096;

/// The rates of this machine: those that were kept, or measured now; assumed ones where it cannot be measured.
pub(super) fn of_this_machine() -> Rates {
    let file = kept_in();
    let known = file.as_ref().and_then(|file| {
        let small = std::fs::metadata(file).ok().filter(|info| info.len() <= KEPT_BYTES)?;
        let rates: Rates = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
        (small.is_file() && rates.usable() && rates.measured && rates.pace.is_some()).then_some(rates)
    });
    if let Some(rates) = known {
        return rates;
    }
    match measure() {
        Ok(rates) if rates.usable() => {
            if let Some(file) = &file {
                keep(file, &rates);
            }
            rates
        }
        Ok(_) | Err(_) => {
            tracing::warn!("the speed of this machine could not be measured; predicted seconds are those of another");
            Rates::of_cores(model::ops::threads() as u64)
        }
    }
}

/// Where the rates of this processor and this build are kept, in the user's folder for such things.
fn kept_in() -> Option<PathBuf> {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    // A build without optimisation is another machine.
    let build = if cfg!(debug_assertions) { "checked" } else { "release" };
    let key = format!("{name}|{}|{}|{build}|{MEASURES}", model::ops::threads(), model::ops::has_kernel());
    let name = format!("cpu-{:08x}-{}.json", crc32c::crc32c(key.as_bytes()), env!("CARGO_PKG_VERSION"));
    Some(std::env::home_dir()?.join(".cache/avatar/rates").join(name))
}

/// Keeps the rates; a machine on which nothing can be kept measures again.
fn keep(file: &std::path::Path, rates: &Rates) {
    let written = || -> std::io::Result<()> {
        let folder = file.parent().ok_or(std::io::ErrorKind::NotFound)?;
        std::fs::create_dir_all(folder)?;
        let mut part = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer(&mut part, rates)?;
        part.persist(file).map_err(|e| e.error)?;
        Ok(())
    };
    if let Err(reason) = written() {
        tracing::debug!("the rates of this machine are not kept: {reason}");
    }
}

/// Measures every kind of operation, at sizes that tell its parts from each other.
fn measure() -> model::Result<Rates> {
    const WIDTH: usize = 2048;
    const ROWS: usize = 512;
    let x = noise(&[ROWS, WIDTH])?;
    let weight = Matrix::new(&noise(&[WIDTH, WIDTH])?)?;
    let products = tiled(ROWS, ROW_TILE) * (2 * WIDTH * WIDTH) as f64
        / quickest(|| linear(&[&x], &weight, None, Activation::None, None).map(drop).map_err(Into::into))?;
    let (attention, scores) = apart(attended(128)?, attended(16)?);
    let (convolutions, unfolded) = apart(convolved(96)?, convolved(12)?);
    let (weights, files) = streamed(WIDTH)?;
    let pace = Pace {
        scores,
        unfolded,
        moved: moved()?,
        call_seconds: call()?,
        spectrum_seconds: quickest(|| log_mel(&[0.1; CHUNK_SAMPLES]).map(drop))?,
        looked: looked()?,
    };
    Ok(Rates { measured: true, products, attention, convolutions, weights, files, pace: Some(pace) })
}

fn noise(shape: &[usize]) -> model::Result<Tensor> {
    Ok(Tensor::rand(-1f32, 1f32, shape, &Device::Cpu)?)
}

/// Rows and columns of a tile of the kernel for products, as `model::ops` has them.
const ROW_TILE: usize = 12;
const COLUMN_TILE: usize = 32;

/// So many rows as whole tiles have, where the kernel works in tiles.
fn tiled(rows: usize, tile: usize) -> f64 {
    (if model::ops::has_kernel() { rows.next_multiple_of(tile) } else { rows }) as f64
}

/// What one operation did of two kinds of work, and its seconds.
#[derive(Debug, Clone, Copy)]
struct Run {
    work: [f64; 2],
    seconds: f64,
}

/// Rates of two kinds of work, of which two operations did different parts. Where times do not tell them apart, all of the
/// time is the first one's.
fn apart(long: Run, short: Run) -> (f64, f64) {
    /// A rate at which work takes no time that counts.
    const FREE: f64 = 1e15;
    let ([a, b], [c, d]) = (long.work, short.work);
    let whole = a * d - b * c;
    let first = (long.seconds * d - short.seconds * b) / whole;
    let second = (a * short.seconds - c * long.seconds) / whole;
    match first.is_finite() && second.is_finite() && first > 0.0 && second > 0.0 {
        true => (1.0 / first, 1.0 / second),
        false => (a / long.seconds.max(1e-9), FREE),
    }
}

/// Attention with heads of some width: FLOP of its products, and scores.
fn attended(width: usize) -> model::Result<Run> {
    let (heads, length) = (8, 960);
    let [q, k, v] = [(); 3].map(|()| noise(&[1, heads, length, width]));
    let (q, k, v) = (q?, k?, v?);
    let seconds = quickest(|| attention(&q, &k, &v, 0.1, None).map(drop).map_err(Into::into))?;
    let products = 2.0 * (heads * length * length) as f64 * (width as f64 + tiled(width, COLUMN_TILE));
    Ok(Run { work: [products, (heads * length * length) as f64], seconds })
}

/// A convolution to some channels: FLOP of its products, and values that it unfolds.
fn convolved(out: usize) -> model::Result<Run> {
    let (channels, frames, side) = (32, 4, 64);
    let tensors = [("weight".to_owned(), noise(&[out, channels, 3, 3, 3])?), ("bias".to_owned(), noise(&[out])?)];
    let layer = Weights::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
    let layer = CausalConv3d::load(&layer, channels, [1; 3])?;
    let video = noise(&[1, channels, frames, side, side])?;
    let seconds = quickest(|| layer.forward(&video).map(drop))?;
    let unfolded = (27 * channels * frames * side * side) as f64;
    Ok(Run { work: [2.0 * unfolded * tiled(out, ROW_TILE), unfolded], seconds })
}

/// Bytes/s through the operations between products: of the VAE's norms, of the transformer's, of a plain sum.
fn moved() -> model::Result<f64> {
    const CHANNELS: usize = 64;
    let (rows, width) = (1024, 2048);
    let x = noise(&[rows, width])?;
    let video = x.reshape((1, CHANNELS, rows * width / CHANNELS))?;
    let scale = noise(&[width])?;
    let tensors = [("weight".to_owned(), noise(&[CHANNELS])?), ("bias".to_owned(), noise(&[CHANNELS])?)];
    let norm = Weights::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
    let norm = GroupNorm::load(&norm, 32)?;
    let seconds = quickest(|| norm.forward_silu(&video).map(drop))?
        + quickest(|| rms_norm(&x, &scale, 1e-6).map(drop).map_err(Into::into))?
        + quickest(|| (&x + &x).map(drop).map_err(Into::into))?;
    Ok((3 * 2 * 4 * rows * width) as f64 / seconds)
}

/// Seconds of an operation on next to nothing, on the average.
fn call() -> model::Result<f64> {
    let (x, weight) = (noise(&[1, 64])?, Matrix::new(&noise(&[64, 64])?)?);
    let (begin, mut calls) = (Instant::now(), 0u32);
    while begin.elapsed() < PATIENCE {
        linear(&[&x], &weight, None, Activation::None, None)?;
        calls += 1;
    }
    Ok(begin.elapsed().as_secs_f64() / f64::from(calls.max(1)))
}

/// Pixels a second in which faces are looked for.
fn looked() -> model::Result<f64> {
    const SIDE: usize = 128;
    let detector = Detector::open(None)?;
    let picture = Rgb8::new(SIDE, SIDE, (0..3 * SIDE * SIDE).map(|i| (i * 7919 % 251) as u8).collect())?;
    Ok((SIDE * SIDE) as f64 / quickest(|| detector.detect(&picture).map(drop))?)
}

/// Bytes/s of weights in 16 bits through a product of few rows, and of a file that is read.
fn streamed(width: usize) -> model::Result<(f64, f64)> {
    const ROWS: usize = 8192;
    let failed = |e: std::io::Error| model::Error::file(std::path::Path::new("temporary file"), e);
    let folder = tempfile::tempdir().map_err(failed)?;
    let values = Tensor::rand(-1f32, 1f32, (ROWS, width), &Device::Cpu)?.to_dtype(DType::BF16)?;
    let file = folder.path().join("weight.safetensors");
    candle_core::safetensors::save(&[("weight".to_owned(), values)].into_iter().collect(), &file)?;
    let bytes = (2 * ROWS * width) as f64;
    let files = rate(bytes, || std::fs::read(&file).map(drop).map_err(failed))?;
    let weight = Weights::open(folder.path(), DType::F32, &Device::Cpu)?.matrix(ROWS, width, "weight")?;
    let x = Tensor::rand(-1f32, 1f32, (1, width), &Device::Cpu)?;
    let weights = rate(bytes, || {
        linear(&[&x], &weight, None, Activation::None, None)?;
        Ok(())
    })?;
    Ok((weights, files))
}

/// How much of `amount` is done in a second.
fn rate(amount: f64, run: impl FnMut() -> model::Result<()>) -> model::Result<f64> {
    Ok(amount / quickest(run)?)
}

/// Seconds of the quickest of some runs.
fn quickest(mut run: impl FnMut() -> model::Result<()>) -> model::Result<f64> {
    let begin = Instant::now();
    let mut quickest = f64::INFINITY;
    loop {
        let start = Instant::now();
        run()?;
        quickest = quickest.min(start.elapsed().as_secs_f64());
        if begin.elapsed() >= PATIENCE {
            return Ok(quickest.max(1e-9));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_measured_is_a_rate_and_comes_back_from_its_file() {
        let rates = measure().unwrap();
        assert!(rates.usable() && rates.measured, "{rates:?}");
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a/rates.json");
        keep(&file, &rates);
        let back: Rates = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert!((back.products / rates.products - 1.0).abs() < 1e-9 && back.measured);
    }

    #[test]
    fn two_kinds_of_work_are_told_apart_by_two_operations() {
        let run = |work: [f64; 2]| Run { work, seconds: work[0] / 100.0 + work[1] / 5.0 };
        let (first, second) = apart(run([1000.0, 10.0]), run([100.0, 10.0]));
        assert!((first - 100.0).abs() < 1e-9 && (second - 5.0).abs() < 1e-9, "{first} {second}");
        let same = Run { work: [1000.0, 10.0], seconds: 2.0 };
        assert_eq!(apart(same, same), (500.0, 1e15));
    }
}
