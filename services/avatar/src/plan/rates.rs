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

/// How long the operations take turns, and how many rounds at least.
const PATIENCE: Duration = Duration::from_secs(3);
const LEAST_ROUNDS: usize = 5;
/// Which measures they are; another number wherever operations or their measures change.
const MEASURES: u32 = 3;
/// Most bytes of the file that keeps the rates.
const KEPT_BYTES: u64 = 4096;

/// The rates of this machine: those that were kept, or measured now; assumed ones where it cannot be measured.
pub(super) fn of_this_machine() -> Rates {
    kept().or_else(measured_now).unwrap_or_else(|| {
        tracing::warn!("the speed of this machine could not be measured; predicted seconds are those of another");
        assumed()
    })
}

/// The rates of a machine that nobody measured.
pub(super) fn assumed() -> Rates {
    Rates::of_cores(model::ops::threads() as u64)
}

/// The rates that were kept.
pub(crate) fn kept() -> Option<Rates> {
    let file = kept_in()?;
    let small = std::fs::metadata(&file).ok().filter(|info| info.len() <= KEPT_BYTES)?;
    let rates: Rates = serde_json::from_slice(&std::fs::read(&file).ok()?).ok()?;
    (small.is_file() && rates.usable() && rates.measured && rates.pace.is_some()).then_some(rates)
}

/// Measures the rates and keeps them instead of those that were; nothing where that fails.
pub(crate) fn measured_now() -> Option<Rates> {
    let rates = measure().ok().filter(Rates::usable)?;
    if let Some(file) = kept_in() {
        keep(&file, &rates);
    }
    Some(rates)
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
///
/// The operations take turns, round after round, and each counts with its middle time: a machine is now faster and now
/// slower, and what was measured in one good or bad moment would be held against work of hours.
fn measure() -> model::Result<Rates> {
    const WIDTH: usize = 2048;
    const ROWS: usize = 512;
    let x = noise(&[ROWS, WIDTH])?;
    let weight = Matrix::new(&noise(&[WIDTH, WIDTH])?)?;
    let (wide, narrow) = (Attended::new(128)?, Attended::new(16)?);
    let (many, few) = (Convolved::new(96)?, Convolved::new(12)?);
    let streamed = Streamed::new(WIDTH)?;
    let moved = Moved::new()?;
    let looked = Looked::new()?;
    let seconds = in_turn([
        &mut || linear(&[&x], &weight, None, Activation::None, None).map(drop).map_err(Into::into),
        &mut || wide.run(),
        &mut || narrow.run(),
        &mut || many.run(),
        &mut || few.run(),
        &mut || streamed.weights(),
        &mut || streamed.file(),
        &mut || moved.run(),
        &mut || log_mel(&[0.1; CHUNK_SAMPLES]).map(drop),
        &mut || looked.run(),
    ])?;
    let [product, wide_seconds, narrow_seconds, many_seconds, few_seconds, weights, file, moves, spectrum, look] =
        seconds;
    let (attention, scores) = apart(wide.took(wide_seconds), narrow.took(narrow_seconds));
    let (convolutions, unfolded) = apart(many.took(many_seconds), few.took(few_seconds));
    let pace = Pace {
        scores,
        unfolded,
        moved: Moved::BYTES / moves,
        call_seconds: call()?,
        spectrum_seconds: spectrum,
        looked: Looked::PIXELS / look,
    };
    Ok(Rates {
        measured: true,
        products: tiled(ROWS, ROW_TILE) * (2 * WIDTH * WIDTH) as f64 / product,
        attention,
        convolutions,
        weights: streamed.bytes / weights,
        files: streamed.bytes / file,
        pace: Some(pace),
    })
}

/// Runs operations in turn for some time; the middle seconds of each.
fn in_turn<const N: usize>(mut runs: [&mut dyn FnMut() -> model::Result<()>; N]) -> model::Result<[f64; N]> {
    let mut seconds = [(); N].map(|()| Vec::new());
    let begin = Instant::now();
    // The first round brings files, pages and threads to where they stay.
    for round in 0.. {
        for (run, seconds) in runs.iter_mut().zip(&mut seconds) {
            let start = Instant::now();
            run()?;
            if round > 0 {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        if round >= LEAST_ROUNDS && begin.elapsed() >= PATIENCE {
            break;
        }
    }
    Ok(seconds.map(|mut seconds| {
        seconds.sort_by(f64::total_cmp);
        seconds.get(seconds.len() / 2).copied().unwrap_or_default().max(1e-9)
    }))
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

/// Attention with heads of some width.
struct Attended {
    width: usize,
    inputs: [Tensor; 3],
}

impl Attended {
    const HEADS: usize = 8;
    const LENGTH: usize = 960;

    fn new(width: usize) -> model::Result<Self> {
        let of = || noise(&[1, Self::HEADS, Self::LENGTH, width]);
        Ok(Self { width, inputs: [of()?, of()?, of()?] })
    }

    fn run(&self) -> model::Result<()> {
        let [q, k, v] = &self.inputs;
        attention(q, k, v, 0.1, None).map(drop).map_err(Into::into)
    }

    /// FLOP of its products, and scores.
    fn took(&self, seconds: f64) -> Run {
        let scores = (Self::HEADS * Self::LENGTH * Self::LENGTH) as f64;
        Run { work: [2.0 * scores * (self.width as f64 + tiled(self.width, COLUMN_TILE)), scores], seconds }
    }
}

/// A convolution to some channels.
struct Convolved {
    out: usize,
    layer: CausalConv3d,
    video: Tensor,
}

impl Convolved {
    const CHANNELS: usize = 32;
    const FRAMES: usize = 4;
    const SIDE: usize = 64;

    fn new(out: usize) -> model::Result<Self> {
        let weight = noise(&[out, Self::CHANNELS, 3, 3, 3])?;
        let tensors = [("weight".to_owned(), weight), ("bias".to_owned(), noise(&[out])?)];
        let layer = Weights::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
        let layer = CausalConv3d::load(&layer, Self::CHANNELS, [1; 3])?;
        Ok(Self { out, layer, video: noise(&[1, Self::CHANNELS, Self::FRAMES, Self::SIDE, Self::SIDE])? })
    }

    fn run(&self) -> model::Result<()> {
        self.layer.forward(&self.video).map(drop)
    }

    /// FLOP of its products, and values that it unfolds.
    fn took(&self, seconds: f64) -> Run {
        let unfolded = (27 * Self::CHANNELS * Self::FRAMES * Self::SIDE * Self::SIDE) as f64;
        Run { work: [2.0 * unfolded * tiled(self.out, ROW_TILE), unfolded], seconds }
    }
}

/// The operations between products: the VAE's norms, the transformer's, a plain sum.
struct Moved {
    x: Tensor,
    video: Tensor,
    scale: Tensor,
    norm: GroupNorm,
}

impl Moved {
    const ROWS: usize = 1024;
    const WIDTH: usize = 2048;
    /// Each reads and writes all values.
    const BYTES: f64 = (3 * 2 * 4 * Self::ROWS * Self::WIDTH) as f64;

    fn new() -> model::Result<Self> {
        const CHANNELS: usize = 64;
        let x = noise(&[Self::ROWS, Self::WIDTH])?;
        let video = x.reshape((1, CHANNELS, Self::ROWS * Self::WIDTH / CHANNELS))?;
        let tensors = [("weight".to_owned(), noise(&[CHANNELS])?), ("bias".to_owned(), noise(&[CHANNELS])?)];
        let norm = Weights::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
        Ok(Self { x, video, scale: noise(&[Self::WIDTH])?, norm: GroupNorm::load(&norm, 32)? })
    }

    fn run(&self) -> model::Result<()> {
        self.norm.forward_silu(&self.video)?;
        rms_norm(&self.x, &self.scale, 1e-6)?;
        (&self.x + &self.x)?;
        Ok(())
    }
}

/// Seconds of an operation on next to nothing, on the average.
fn call() -> model::Result<f64> {
    const PATIENCE: Duration = Duration::from_millis(200);
    let (x, weight) = (noise(&[1, 64])?, Matrix::new(&noise(&[64, 64])?)?);
    let (begin, mut calls) = (Instant::now(), 0u32);
    while begin.elapsed() < PATIENCE {
        linear(&[&x], &weight, None, Activation::None, None)?;
        calls += 1;
    }
    Ok(begin.elapsed().as_secs_f64() / f64::from(calls.max(1)))
}

/// A picture in which a face is looked for.
struct Looked {
    detector: Detector,
    picture: Rgb8,
}

impl Looked {
    const SIDE: usize = 128;
    const PIXELS: f64 = (Self::SIDE * Self::SIDE) as f64;

    fn new() -> model::Result<Self> {
        let values = (0..3 * Self::SIDE * Self::SIDE).map(|i| (i * 7919 % 251) as u8).collect();
        Ok(Self { detector: Detector::open(None)?, picture: Rgb8::new(Self::SIDE, Self::SIDE, values)? })
    }

    fn run(&self) -> model::Result<()> {
        self.detector.detect(&self.picture).map(drop)
    }
}

/// Weights in 16 bits in a file.
struct Streamed {
    folder: tempfile::TempDir,
    weight: Matrix,
    x: Tensor,
    bytes: f64,
}

impl Streamed {
    const FILE: &str = "weight.safetensors";

    fn new(width: usize) -> model::Result<Self> {
        const ROWS: usize = 8192;
        let folder = tempfile::tempdir().map_err(Self::failed)?;
        let values = noise(&[ROWS, width])?.to_dtype(DType::BF16)?;
        let file = folder.path().join(Self::FILE);
        candle_core::safetensors::save(&[("weight".to_owned(), values)].into_iter().collect(), &file)?;
        let weight = Weights::open(folder.path(), DType::F32, &Device::Cpu)?.matrix(ROWS, width, "weight")?;
        Ok(Self { folder, weight, x: noise(&[1, width])?, bytes: (2 * ROWS * width) as f64 })
    }

    /// Through a product of few rows.
    fn weights(&self) -> model::Result<()> {
        linear(&[&self.x], &self.weight, None, Activation::None, None).map(drop).map_err(Into::into)
    }

    fn file(&self) -> model::Result<()> {
        std::fs::read(self.folder.path().join(Self::FILE)).map(drop).map_err(Self::failed)
    }

    fn failed(error: std::io::Error) -> model::Error {
        model::Error::file(std::path::Path::new("temporary file"), error)
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
