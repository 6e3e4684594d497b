//! Times networks at their published widths, with random weights.
//!
//! `tests/bench/pytorch.py` times the same networks in PyTorch and puts both side by side.

pub mod full;
mod made;

use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use model::{
    audio::WhisperEncoder,
    diffusion::{DoubleBlock, Grid, Rope, SingleBlock},
    vae::{VaeConfig, VaeDecoder},
};
use serde::Serialize;

use made::random;

/// Width of a token, and of the heads' parts that turn with frame, row and column.
const HIDDEN: usize = 3072;
const ROPE: [usize; 3] = [16, 56, 56];
/// Text tokens of a prompt of usual length.
const TEXT: usize = 610;

/// One measured row.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What was run.
    pub name: String,
    /// Median seconds of the runs after the first.
    pub seconds: f64,
    /// Most memory that a run held above weights and inputs, bytes of the process.
    pub working_bytes: u64,
    /// Runs that the median is of.
    pub runs: usize,
}

/// Where a network runs, and in which type.
#[derive(Debug, Clone)]
pub struct Place {
    /// The device of weights and inputs.
    pub device: Device,
    /// Their type.
    pub dtype: DType,
}

impl Place {
    /// This machine's processor, f32.
    #[must_use]
    pub fn processor() -> Self {
        Self { device: Device::Cpu, dtype: DType::F32 }
    }

    /// Deterministic values in -1..1.
    pub fn random(&self, shape: &[usize], seed: u64) -> Result<Tensor> {
        Ok(random(shape, seed)?.to_dtype(self.dtype)?.to_device(&self.device)?)
    }
}

/// Which of the transformer's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Block {
    /// Picture and text with weights of their own.
    Double,
    /// One set of weights.
    Single,
}

/// One block of the transformer over `tokens` tokens, 610 of them text.
pub fn block(block: Block, tokens: usize, runs: usize, place: &Place) -> Result<Row> {
    let name = format!("{block:?} block, {tokens} tokens").to_lowercase();
    measure(name, runs, place, block_of(block, tokens, place)?)
}

/// What runs a network on inputs that are there.
type Run = Box<dyn Fn() -> Result<Tensor>>;

/// The same block, to be run; gives its tokens, of a double block the picture's.
pub fn block_of(block: Block, tokens: usize, place: &Place) -> Result<Run> {
    let images = tokens.checked_sub(TEXT).filter(|n| *n > 0).context("more than 610 tokens are needed")?;
    let (image, text) = (place.random(&[images, HIDDEN], 1)?, place.random(&[TEXT, HIDDEN], 2)?);
    // What conditions a block is f32 in every type.
    let vec = random(&[1, HIDDEN], 3)?.to_device(&place.device)?;
    // A row of tokens: how they lie in the picture changes no time.
    let grid = Grid { frames: 0, rows: 1, columns: images };
    let rope = |still| Rope::new(grid, ROPE, 256.0, still, &place.device);
    Ok(match block {
        Block::Double => {
            let (block, rope) = (DoubleBlock::load(&made::block("double_blocks", place)?, HIDDEN)?, rope(0)?);
            Box::new(move || Ok(block.forward(&image, &text, &vec, &rope)?.0))
        }
        Block::Single => {
            let (block, rope) = (SingleBlock::load(&made::block("single_blocks", place)?, HIDDEN)?, rope(TEXT)?);
            let x = Tensor::cat(&[&image, &text], 0)?;
            Box::new(move || Ok(block.forward(&x, &vec, &rope)?))
        }
    })
}

/// The VAE's decoder, untiled, widths 128, 256, 512, 512.
pub fn vae_decode(frames: usize, side: usize, runs: usize, place: &Place) -> Result<Row> {
    let decoder = VaeDecoder::load(&made::vae_decoder(place)?, &published_vae()?)?;
    let z = place.random(&[1, 16, frames, side, side], 7)?;
    measure(format!("vae decode, {frames}x{side}x{side} latents"), runs, place, || {
        Ok(decoder.decode_tapped(&z, &mut |name, x| tracing::debug!("{name} {:?}", x.dims()))?)
    })
}

/// Seconds of the VAE's decoder in tiles, as the product decodes; the pictures are dropped as they come.
///
/// - `sides`: latent frames, rows and columns
pub fn vae_decode_tiled(sides: [usize; 3], place: &Place) -> Result<f64> {
    let decoder = VaeDecoder::load(&made::vae_decoder(place)?, &published_vae()?)?;
    let [frames, rows, columns] = sides;
    let z = place.random(&[1, 16, frames, rows, columns], 7)?;
    place.device.synchronize()?;
    let begin = Instant::now();
    decoder.decode_tiled_each(&z, &mut |_| Ok(()))?;
    place.device.synchronize()?;
    Ok(begin.elapsed().as_secs_f64())
}

fn published_vae() -> Result<VaeConfig> {
    Ok(serde_json::from_value(serde_json::json!({
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16,
        "norm_num_groups": 32, "sample_size": 256, "sample_tsize": 64, "scaling_factor": 0.476986,
        "mid_block_causal_attn": true,
    }))?)
}

/// Whisper-tiny's encoder over 30 s of speech.
pub fn whisper(runs: usize) -> Result<Row> {
    let place = Place::processor();
    let encoder = WhisperEncoder::load(&made::whisper(&place)?, 6)?;
    let mel = random(&[80, 3000], 5)?;
    measure("whisper encoder, 30 s".to_owned(), runs, &place, || Ok(encoder.hidden_states(&mel)?))
}

fn measure(name: String, runs: usize, place: &Place, mut run: impl FnMut() -> Result<Tensor>) -> Result<Row> {
    // The first run touches every page for the first time.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    let before = resident("VmRSS:")?;
    let mut seconds = Vec::with_capacity(runs);
    for i in 0..=runs {
        let begin = Instant::now();
        let out = run()?;
        place.device.synchronize()?;
        if i > 0 || runs == 0 {
            seconds.push(begin.elapsed().as_secs_f64());
        }
        let largest = out.to_dtype(DType::F32)?.abs()?.max_all()?.to_scalar::<f32>()?;
        anyhow::ensure!(largest.is_finite(), "{name}: the result is not finite");
    }
    seconds.sort_by(f64::total_cmp);
    let working_bytes = resident("VmHWM:")?.saturating_sub(before);
    Ok(Row { name, seconds: seconds[seconds.len() / 2], working_bytes, runs: runs.max(1) })
}

/// A figure of this process's memory, bytes.
fn resident(field: &str) -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such line")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse::<u64>()? * 1024)
}
