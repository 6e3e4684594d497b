//! The flags of `avatar plan` and `avatar tiers`.

use std::{path::PathBuf, str::FromStr};

use clap::Args;
use gateway::config::TierFlags;
use model::checkpoint::Choice;
use planner::{Bytes, Precision, size::PictureSize};
use service_kit::hardware::DeviceName;

use crate::compute::ComputeByStage;

/// The flags of `avatar tiers`.
#[derive(Debug, Args)]
pub struct TiersFlags {
    /// TOML file that adds tiers, or changes values of those there are.
    #[arg(long, env = "AVATAR_TIERS", value_name = "FILE")]
    pub tiers: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// The flags of `avatar plan`.
#[derive(Debug, Args)]
pub struct PlanFlags {
    /// Plan for cards of so much memory that need not be here, such as `8GiB` or `8GiB,12GiB`, instead of --device.
    #[arg(long, value_name = "BYTES,..", value_delimiter = ',')]
    pub vram: Vec<Bytes>,
    /// Plan for devices of this machine: `cpu`, `cpu:4GiB` for so much of its memory, or a card as in `cuda:0`; several
    /// with commas between, as in `cpu:2GiB,cpu:3GiB`.
    #[arg(long, env = "AVATAR_DEVICE", value_name = "DEVICE,..", value_delimiter = ',', default_value = "cpu")]
    pub device: Vec<DeviceName>,
    /// Plan for the checkpoint in this folder, of which only headers are read. Default: the published model.
    #[arg(long, env = "AVATAR_MODELS", value_name = "DIR")]
    pub models: Option<PathBuf>,
    /// Form in which the transformer's weights are taken, as `avatar generate` takes it.
    #[arg(long, env = "AVATAR_WEIGHTS", value_name = "FORM", default_value = "auto")]
    pub weights: Choice,
    #[allow(missing_docs)] // A doc comment would replace the description of the command in --help.
    #[command(flatten)]
    pub tier: TierFlags,
    /// Shorter side of the video, of a square, or WIDTHxHEIGHT. Default: the tier's.
    #[arg(long, value_name = "PIXELS|WxH")]
    pub size: Option<Size>,
    /// Frames of the video, 1 to 15000. Default: those that one pass of the tier holds.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=15_000))]
    pub frames: Option<u32>,
    /// Seconds of speech, instead of frames.
    #[arg(long, value_name = "SECONDS", conflicts_with = "frames", value_parser = seconds)]
    pub seconds: Option<f64>,
    /// Denoise steps, 1 to 200. Default: the tier's.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=200))]
    pub steps: Option<u32>,
    /// Tokens of the prompt, as a finished generation tells them. Default: about 130.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub prompt_tokens: Option<u32>,
    /// Every step in full, as `avatar generate` takes it.
    #[arg(long)]
    pub no_feature_cache: bool,
    /// What the large layers may be in on a card: bf16, fp8, int8, q8_0, q4_k, with commas between. A checkpoint's are
    /// as they are stored.
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', default_value = "bf16,fp8,q4_k")]
    pub precision: Vec<Precision>,
    /// Type to compute in on a CPU, as `avatar generate` takes it.
    #[arg(long, env = "AVATAR_COMPUTE", value_name = "TYPE|STAGE=TYPE,...", default_value = "f32")]
    pub compute: ComputeByStage,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// A size as the command line writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub PictureSize);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let side = |text: &str| text.trim().parse::<u32>().ok().filter(|side| (64..=4096).contains(side));
        let sides = match text.split_once('x') {
            Some((width, height)) => side(width).zip(side(height)),
            None => side(text).map(|side| (side, side)),
        };
        let (width, height) = sides.ok_or("not pixels from 64 to 4096, such as 704 or 704x768")?;
        // The network's grid.
        let on_grid = |side: u32| side.next_multiple_of(16);
        Ok(Self(PictureSize { width: on_grid(width), height: on_grid(height) }))
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let number: Option<f64> = text.parse().ok();
    number.filter(|s| *s > 0.0 && *s <= 600.0).ok_or_else(|| "not a number over 0 and up to 600".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_a_side_or_two() {
        let size = |text: &str| text.parse::<Size>().map(|s| (s.0.width, s.0.height));
        assert_eq!(size("704"), Ok((704, 704)));
        assert_eq!(size("704x768"), Ok((704, 768)));
        assert_eq!(size("100x100"), Ok((112, 112)));
        for wrong in ["", "63", "5000", "704x", "axb", "1x2x3"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
        assert!(seconds("0").is_err() && seconds("NaN").is_err() && seconds("601").is_err() && seconds("8.5").is_ok());
    }
}
