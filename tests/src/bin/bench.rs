//! Times networks at their published widths, with random weights, and lends parts to scripts that measure them.

use std::{
    io::{Read, Write, stdin, stdout},
    num::NonZeroU32,
    path::PathBuf,
};

use anyhow::{Result, ensure};
use clap::{Args, Parser, Subcommand};
use e2e::bench::{self, Block, Place};
use gateway::media::{audio::MODEL_RATE, resample::Resampler};

/// Times networks at their published widths, with random weights in f32, and prints one JSON object; or lends a part
/// to a script that measures it.
///
/// The number of threads is that of `RAYON_NUM_THREADS`, else all. `tests/bench/pytorch.py` compares with PyTorch.
#[derive(Parser)]
#[command(name = "bench", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Args)]
struct Runs {
    /// Runs to take the median of, after one that is not counted; 0 counts the first.
    #[arg(long, default_value_t = 3)]
    runs: usize,
}

#[derive(Subcommand)]
enum Task {
    /// One block of the transformer, width 3072, 24 heads.
    Block {
        /// Which block.
        #[arg(long, value_enum)]
        kind: Block,
        /// Tokens, 610 of them text.
        #[arg(long, default_value_t = 718)]
        tokens: usize,
        #[command(flatten)]
        runs: Runs,
    },
    /// The VAE's decoder, widths 128, 256, 512, 512, untiled.
    VaeDecode {
        /// Latent frames.
        #[arg(long, default_value_t = 17)]
        frames: usize,
        /// Rows and columns of the latents; the picture has eight times as many.
        #[arg(long, default_value_t = 16)]
        side: usize,
        #[command(flatten)]
        runs: Runs,
    },
    /// Whisper-tiny's encoder, 30 s of speech.
    Whisper {
        #[command(flatten)]
        runs: Runs,
    },
    /// One pass of a whole transformer from its files, which stay where they are, and some of its blocks against
    /// another checkpoint's.
    FullPass {
        /// Folder of the transformer, in any accepted form.
        #[arg(long, value_name = "DIR")]
        folder: PathBuf,
        /// Folder of the same transformer in an exacter form.
        #[arg(long, value_name = "DIR")]
        against: Option<PathBuf>,
        /// Latent frames.
        #[arg(long, default_value_t = 2)]
        frames: usize,
        /// Rows and columns of the latents; the picture has eight times as many.
        #[arg(long, default_value_t = 12)]
        side: usize,
    },
    /// Resamples one channel from standard input to standard output, both little-endian f32 without a header.
    Resample {
        /// Rate of the input, Hz.
        #[arg(long)]
        from: NonZeroU32,
        /// Rate of the output, Hz; without it, the model's.
        #[arg(long)]
        to: Option<NonZeroU32>,
    },
}

fn main() -> Result<()> {
    let row = match Arguments::parse().task {
        Task::Resample { from, to } => return resample(from, to),
        Task::FullPass { folder, against, frames, side } => {
            let pass = bench::full::pass(&folder, against.as_deref(), frames, side)?;
            println!("{}", serde_json::to_string(&pass)?);
            return Ok(());
        }
        Task::Block { kind, tokens, runs } => bench::block(kind, tokens, runs.runs, &Place::processor())?,
        Task::VaeDecode { frames, side, runs } => bench::vae_decode(frames, side, runs.runs, &Place::processor())?,
        Task::Whisper { runs } => bench::whisper(runs.runs)?,
    };
    println!("{}", serde_json::to_string(&row)?);
    Ok(())
}

fn resample(from: NonZeroU32, to: Option<NonZeroU32>) -> Result<()> {
    let mut bytes = Vec::new();
    stdin().lock().read_to_end(&mut bytes)?;
    let (values, rest) = bytes.as_chunks::<4>();
    ensure!(rest.is_empty(), "the input has {} bytes, which is no whole number of f32", bytes.len());
    let input: Vec<f32> = values.iter().map(|value| f32::from_le_bytes(*value)).collect();
    let to = match to {
        Some(to) => to,
        None => NonZeroU32::try_from(MODEL_RATE)?,
    };
    let output: Vec<u8> = Resampler::new(from, to).process(&input).into_iter().flat_map(f32::to_le_bytes).collect();
    stdout().lock().write_all(&output)?;
    Ok(())
}
