//! The command line.

use std::{ffi::OsString, path::PathBuf, str::FromStr};

use clap::{
    Args, Parser, Subcommand, ValueEnum,
    builder::{OsStringValueParser, TypedValueParser},
};
use proto::v1::{FaceBox, GenerationSpec};

use crate::compute::ComputeByStage;

/// Makes a talking video of a picture, a speech recording and a sentence.
#[derive(Debug, Parser)]
#[command(name = "avatar", version)]
pub struct Cli {
    #[allow(missing_docs)]
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make one video, in this process, and exit.
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted.
    Generate(GenerateFlags),
    /// Serve gRPC and HTTP, with all model stages in this process.
    ///
    /// Prints `ready grpc=ADDR http=ADDR` once it answers. SIGTERM ends it gracefully. Exit code 64: wrong settings.
    Serve(crate::serve::ServeFlags),
    /// Make checkpoints.
    #[command(subcommand)]
    Weights(WeightsCommand),
}

/// What to do with checkpoints.
#[derive(Debug, Subcommand)]
pub enum WeightsCommand {
    /// Write a complete checkpoint of random weights: it shows that the system works, not faces.
    Synth(SynthFlags),
}

/// Sizes of random checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SynthSize {
    /// Hidden widths of 64 and 128; about 13 MB.
    Tiny,
}

/// The flags of `avatar weights synth`.
#[derive(Debug, Args)]
pub struct SynthFlags {
    /// How large the networks are.
    #[arg(long, value_enum, default_value = "tiny")]
    pub size: SynthSize,
    /// Seeds the weights; the same seed gives the same files everywhere.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Folder to write; made if missing, refused if it is not empty.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// The flags of `avatar generate`.
#[derive(Debug, Args)]
pub struct GenerateFlags {
    /// Picture of the person: PNG, JPEG or WebP.
    #[arg(long, value_name = "FILE")]
    pub image: PathBuf,
    /// Recording of the speech: WAV, MP3, M4A/AAC, FLAC or OGG.
    #[arg(long, value_name = "FILE")]
    pub audio: PathBuf,
    /// What the person does, and where.
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = OsStringValueParser::new().try_map(text))]
    pub prompt: String,
    /// Video file to write (H.264 and AAC in MP4); replaced only by a finished video.
    #[arg(long, value_name = "FILE", default_value = "avatar.mp4")]
    pub out: PathBuf,
    /// Folder of the models: one subfolder a stage, or the official download. `avatar weights synth` makes a small one.
    #[arg(long, env = "AVATAR_MODELS", value_name = "DIR")]
    pub models: Option<PathBuf>,
    /// Type to compute in: f32, bf16 or f16; or by stage, as in `diffusion=bf16,vae-decode=f16`. Sums are f32 in any case.
    #[arg(long, env = "AVATAR_COMPUTE", value_name = "TYPE|STAGE=TYPE,...", default_value = "f32")]
    pub compute: ComputeByStage,
    /// Seeds the noise; the same seed, inputs and models give the same video. Default 128.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Denoise steps, 1 to 200. Default: the checkpoint's own, else 50.
    #[arg(long, value_name = "N")]
    pub steps: Option<u32>,
    /// Shorter side of the video, 64 to 1280. Default: the checkpoint's own, else 704.
    #[arg(long, value_name = "PIXELS")]
    pub size: Option<u32>,
    /// How strongly prompt and speech are followed, 1 to 20. Default: the checkpoint's own, else 7.5.
    #[arg(long, value_name = "FACTOR")]
    pub guidance_scale: Option<f32>,
    /// Bends the time grid towards noise, 0.1 to 20. Default: the checkpoint's own, else 5.
    #[arg(long, value_name = "FACTOR")]
    pub flow_shift: Option<f32>,
    /// The face to animate, in pixels of the upright picture. Default: found.
    #[arg(long, value_name = "X,Y,WIDTH,HEIGHT", allow_hyphen_values = true)]
    pub face: Option<Face>,
    /// Denoise at least this many frames, 1 to 400; 129 is what the reference does. Default 1.
    #[arg(long, value_name = "N")]
    pub min_frames: Option<u32>,
    /// Print one JSON object a line on standard output: events, and last the result or the failure.
    #[arg(long)]
    pub json: bool,
    /// Print nothing but errors; with --json, nothing but the last line.
    #[arg(long)]
    pub quiet: bool,
    /// What to log to standard error: a level, or levels by module as in `warn,gateway=debug`.
    #[arg(long, env = "AVATAR_LOG", value_name = "FILTER", default_value = "error")]
    pub log: String,
}

impl GenerateFlags {
    /// What the flags ask for; what they leave open stays open.
    #[must_use]
    pub fn spec(&self) -> GenerationSpec {
        GenerationSpec {
            prompt: self.prompt.clone(),
            seed: self.seed,
            steps: self.steps,
            size: self.size,
            guidance_scale: self.guidance_scale,
            flow_shift: self.flow_shift,
            min_frames: self.min_frames,
            face: self.face.map(|face| face.0),
        }
    }
}

/// A face box as the command line writes it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Face(pub FaceBox);

impl FromStr for Face {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let numbers: Result<Vec<f64>, _> = text.split(',').map(|part| part.trim().parse()).collect();
        match numbers.as_deref() {
            Ok(&[x, y, width, height]) => Ok(Self(FaceBox { x, y, width, height, score: None })),
            _ => Err("not four numbers of pixels with commas between, as in 120,80,200,220".to_owned()),
        }
    }
}

/// A value that is text; clap's own refusal would not name the flag.
fn text(value: OsString) -> Result<String, &'static str> {
    value.into_string().map_err(|_| "it is not valid UTF-8")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_face_is_four_numbers() {
        let face: Face = "1, 2.5,3,4".parse().unwrap();
        assert_eq!((face.0.x, face.0.y, face.0.width, face.0.height), (1.0, 2.5, 3.0, 4.0));
        for wrong in ["", "1,2,3", "1,2,3,4,5", "a,b,c,d"] {
            assert!(wrong.parse::<Face>().is_err(), "{wrong}");
        }
    }
}
