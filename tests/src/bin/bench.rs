//! Times networks at their published widths, with random weights.

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use e2e::bench::{self, Block};

/// Times networks at their published widths, with random weights in f32, and prints one JSON object.
///
/// The number of threads is that of `RAYON_NUM_THREADS`, else all. `tests/bench/pytorch.py` compares with PyTorch.
#[derive(Parser)]
#[command(name = "bench", version)]
struct Arguments {
    #[command(subcommand)]
    network: Network,
}

#[derive(Args)]
struct Runs {
    /// Runs to take the median of, after one that is not counted; 0 counts the first.
    #[arg(long, default_value_t = 3)]
    runs: usize,
}

#[derive(Subcommand)]
enum Network {
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
}

fn main() -> Result<()> {
    let row = match Arguments::parse().network {
        Network::Block { kind, tokens, runs } => bench::block(kind, tokens, runs.runs)?,
        Network::VaeDecode { frames, side, runs } => bench::vae_decode(frames, side, runs.runs)?,
        Network::Whisper { runs } => bench::whisper(runs.runs)?,
    };
    println!("{}", serde_json::to_string(&row)?);
    Ok(())
}
