//! How fast this machine's CPU is: measured once, with the networks' own operations, and kept.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Tensor};
use model::{
    ops::{Activation, attention, linear},
    vae::CausalConv3d,
    weights::{Matrix, Weights},
};
use planner::cost::work::Rates;

/// How long each operation is run.
const PATIENCE: Duration = Duration::from_millis(250);
/// Most bytes of the file that keeps the rates.
const KEPT_BYTES: u64 = 4096;

/// The rates of this machine: those that were kept, or measured now; assumed ones where it cannot be measured.
pub(super) fn of_this_machine() -> Rates {
    let file = kept_in();
    let known = file.as_ref().and_then(|file| {
        let small = std::fs::metadata(file).ok().filter(|info| info.len() <= KEPT_BYTES)?;
        let rates: Rates = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
        (small.is_file() && rates.usable() && rates.measured).then_some(rates)
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
    let key = format!("{name}|{}|{}", model::ops::threads(), model::ops::has_kernel());
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

/// Measures every kind of operation.
fn measure() -> model::Result<Rates> {
    const WIDTH: usize = 2048;
    const ROWS: usize = 512;
    let noise = |shape: &[usize]| Tensor::rand(-1f32, 1f32, shape, &Device::Cpu);
    let x = noise(&[ROWS, WIDTH])?;
    let weight = Matrix::new(&noise(&[WIDTH, WIDTH])?)?;
    let products = rate(2.0 * (ROWS * WIDTH * WIDTH) as f64, || {
        linear(&[&x], &weight, None, Activation::None, None)?;
        Ok(())
    })?;

    let (heads, length, d) = (8, 1024, 128);
    let [q, k, v] = [noise(&[1, heads, length, d])?, noise(&[1, heads, length, d])?, noise(&[1, heads, length, d])?];
    let seen = rate(4.0 * (heads * length * length * d) as f64, || {
        attention(&q, &k, &v, 0.1, None)?;
        Ok(())
    })?;

    let (channels, frames, side) = (64, 4, 64);
    let tensors =
        [("weight".to_owned(), noise(&[channels, channels, 3, 3, 3])?), ("bias".to_owned(), noise(&[channels])?)];
    let layer = Weights::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
    let layer = CausalConv3d::load(&layer, channels, [1; 3])?;
    let video = noise(&[1, channels, frames, side, side])?;
    let flops = 2.0 * (27 * channels * channels * frames * side * side) as f64;
    let convolutions = rate(flops, || layer.forward(&video).map(drop))?;

    let (weights, files) = streamed(WIDTH)?;
    Ok(Rates { measured: true, products, attention: seen, convolutions, weights, files })
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

/// How much of `amount` is done in a second, by the quickest of some runs.
fn rate(amount: f64, mut run: impl FnMut() -> model::Result<()>) -> model::Result<f64> {
    let begin = Instant::now();
    let mut quickest = f64::INFINITY;
    loop {
        let start = Instant::now();
        run()?;
        quickest = quickest.min(start.elapsed().as_secs_f64());
        if begin.elapsed() >= PATIENCE {
            return Ok(amount / quickest.max(1e-9));
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
}
