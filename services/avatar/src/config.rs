//! The command line.

use std::{ffi::OsString, path::PathBuf, str::FromStr};

use clap::{
    Args, Parser, Subcommand, ValueEnum,
    builder::{OsStringValueParser, TypedValueParser},
};
use model::{
    checkpoint::{Choice, Stage},
    convert::Storage,
};
use proto::v1::{self, FaceBox, GenerationSpec};
use service_kit::config::DeviceFlags;

use crate::{
    client::flags::{DownloadFlags, ListFlags, OneFlags, SubmitFlags, WatchFlags},
    weights::{
        convert::{ConvertFlags, stage},
        verify::VerifyFlags,
    },
};

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
    Serve(Box<crate::serve::ServeFlags>),
    /// Hand a video to a server, which makes it on its own, and print its id.
    ///
    /// Exit codes of this and of the commands below: 0 done, 1 failed, 2 wrong usage or input.
    Submit(SubmitFlags),
    /// Show a generation on a server as it stands.
    Status(OneFlags),
    /// Follow a generation on a server to its end. Ctrl-C leaves it running.
    ///
    /// Exit codes: 0 completed, 1 failed or cancelled, 2 wrong usage, 130 interrupted.
    Watch(WatchFlags),
    /// List the generations of a server, the newest first.
    List(ListFlags),
    /// Stop a generation on a server.
    Cancel(OneFlags),
    /// Remove a generation and its video from a server; it is stopped if it runs.
    Delete(OneFlags),
    /// Fetch a generation's video from a server.
    Download(DownloadFlags),
    /// Make a video of each row of a CSV file, in this process or on a server; a second run makes what is missing.
    ///
    /// The columns are videoid, image, audio, prompt and fps. A row's video is VIDEOID.mp4 in the folder given with
    /// --out, and the summary there has a line for each row. A wrong row does not keep the others from being made.
    ///
    /// Exit codes: 0 all videos are there, 1 some are not, 2 wrong usage or no such table, 130 interrupted.
    Batch(crate::batch::BatchFlags),
    /// List this machine's devices with their memory: the processor, and CUDA devices where a driver answers.
    Devices(DevicesFlags),
    /// Say how full the device of a running stage is, and change from where on it counts as nearly full.
    Pressure(crate::pressure::PressureFlags),
    /// Say what would be done on some devices: tier, placement, fit, bytes and seconds, with reasons.
    ///
    /// No weight is read. Exit codes: 0 there is a plan, 1 nothing fits, 2 wrong usage or past the tier's limits.
    Plan(crate::plan::flags::PlanFlags),
    /// List the tiers: the memory that each is for, and what it lets a request ask for.
    Tiers(crate::plan::flags::TiersFlags),
    /// Get, make, convert and check checkpoints.
    #[command(subcommand)]
    Weights(WeightsCommand),
}

/// The flags of `avatar devices`.
#[derive(Debug, Args)]
pub struct DevicesFlags {
    /// Measure the speed of the processor and of each card again: predicted seconds rest on it, and it was measured when
    /// first needed.
    ///
    /// Of use after a change of the machine, or where it was busy then. Takes some seconds.
    #[arg(long)]
    pub measure: bool,
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

/// What to do with checkpoints.
#[derive(Debug, Subcommand)]
pub enum WeightsCommand {
    /// Download the official checkpoint, or the parts of it that some stages need.
    ///
    /// Downloads go on where they stopped, and every file's hash is checked. The weights come under the Tencent
    /// Hunyuan Community License, which grants nothing in the European Union, the United Kingdom and South Korea;
    /// without --accept-licence the files are only listed. The face detector's file is never needed.
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage or licence not accepted, 130 interrupted.
    Fetch(crate::weights::fetch::FetchFlags),
    /// Write a complete checkpoint of random weights: it shows that the system works, not faces.
    Synth(SynthFlags),
    /// Convert a checkpoint, in any form that is read, to the native layout in another precision.
    ///
    /// Tensors go through memory some rows at a time; parts that are never run are left out.
    /// Exit codes: 0 done, 1 failed, 2 wrong usage or input.
    Convert(ConvertFlags),
    /// Check a checkpoint: names, shapes, values, and checksums of the files.
    ///
    /// Everything that is wrong is listed. Exit codes: 0 nothing is wrong, 1 something is, 2 wrong usage or input.
    Verify(VerifyFlags),
}

/// Sizes of random checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SynthSize {
    /// Hidden widths of 64 and 128; about 13 MB.
    Tiny,
    /// The published model's tensors; 44 GB in bf16.
    Full,
}

impl SynthSize {
    /// The name that the command line takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tiny => "tiny",
            Self::Full => "full",
        }
    }
}

/// The flags of `avatar weights synth`.
#[derive(Debug, Args)]
pub struct SynthFlags {
    /// How large the networks are.
    #[arg(long, value_enum, default_value = "tiny")]
    pub size: SynthSize,
    /// What transformer and text encoders are stored in: bf16, f16, f32, fp8, int8, q8_0 or q4_k, the last four for
    /// their large layers alone. The VAE and Whisper are f32.
    #[arg(long, value_name = "NAME", default_value = "bf16")]
    pub precision: Storage,
    /// Stages to write, with commas between. Default: all.
    #[arg(long, value_name = "STAGE,..", value_delimiter = ',', value_parser = stage)]
    pub stages: Vec<Stage>,
    /// Double blocks of the full transformer, 1 to 20, for tests of memory. Default 20.
    #[arg(long, value_name = "N")]
    pub double_blocks: Option<usize>,
    /// Single blocks of the full transformer, 1 to 40, for tests of memory. Default 40.
    #[arg(long, value_name = "N")]
    pub single_blocks: Option<usize>,
    /// Layers of the full Llama, 3 to 32, for tests of memory; the last two are never run. Default 32.
    #[arg(long, value_name = "N")]
    pub llama_layers: Option<usize>,
    /// Seeds the weights; the same seed gives the same files everywhere.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Folder to write; made if missing, refused if it is not empty.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Print one JSON object a line on standard output: progress, and last the result or the failure.
    #[arg(long)]
    pub json: bool,
    /// Print nothing but errors; with --json, nothing but the last line.
    #[arg(long)]
    pub quiet: bool,
}

/// What a video is made of; for `generate` and `submit`.
#[derive(Debug, Args)]
pub struct RequestFlags {
    /// Picture of the person: PNG, JPEG or WebP.
    #[arg(long, value_name = "FILE")]
    pub image: PathBuf,
    /// Recording of the speech: WAV, MP3, M4A/AAC, FLAC or OGG.
    #[arg(long, value_name = "FILE")]
    pub audio: PathBuf,
    /// What the person does, and where.
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = OsStringValueParser::new().try_map(text))]
    pub prompt: String,
    /// The face to animate, in pixels of the upright picture. Default: found.
    #[arg(long, value_name = "X,Y,WIDTH,HEIGHT", allow_hyphen_values = true)]
    pub face: Option<Face>,
    #[allow(missing_docs)] // A doc comment would replace the description of the command in --help.
    #[command(flatten)]
    pub settings: SettingFlags,
}

/// How a video is made; what is left open is the checkpoint's own or the default.
#[derive(Debug, Clone, Args)]
pub struct SettingFlags {
    /// Cut a prompt of too many tokens at the model's limit, and say how many were kept, instead of refusing it.
    #[arg(long)]
    pub truncate_prompt: bool,
    /// Run every step in full, instead of reusing features of earlier steps in runs of 30 steps and more.
    #[arg(long)]
    pub no_feature_cache: bool,
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
    /// Denoise at least this many frames, 1 to 400; 129 is what the reference does. Default 1.
    #[arg(long, value_name = "N")]
    pub min_frames: Option<u32>,
    /// Whose rules hold where ours are not the reference's: `reference` denoises at least 129 frames, hears at most
    /// 400 (16 s), and takes its literal steps and rounding. Not together with --min-frames. Default: ours.
    #[arg(long, value_enum, value_name = "RULES")]
    pub parity: Option<Parity>,
}

/// The flags of `avatar generate`.
#[derive(Debug, Args)]
pub struct GenerateFlags {
    #[allow(missing_docs)] // A doc comment would replace the description of the command in --help.
    #[command(flatten)]
    pub request: RequestFlags,
    /// Video file to write (H.264 and AAC in MP4); replaced only by a finished video.
    #[arg(long, value_name = "FILE", default_value = "avatar.mp4")]
    pub out: PathBuf,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub local: LocalFlags,
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

/// The flags of the commands that make videos in this process and exit.
#[derive(Debug, Args)]
pub struct LocalFlags {
    /// Folder of the models: one subfolder a stage, or the official download. `avatar weights synth` makes a small one.
    #[arg(long, env = "AVATAR_MODELS", value_name = "DIR")]
    pub models: Option<PathBuf>,
    /// Type to compute in: f32, bf16 or f16; or by stage, as in `diffusion=bf16,vae-decode=f16`. Sums are f32 in any case.
    #[arg(long, env = "AVATAR_COMPUTE", value_name = "TYPE|STAGE=TYPE,...", default_value = "f32")]
    pub compute: ComputeByStage,
    #[allow(missing_docs)] // A doc comment would replace the description of the command in --help.
    #[command(flatten)]
    pub device: DeviceFlags,
    /// Form in which the transformer's weights are taken, where the official download has several: bf16, fp8, int8,
    /// or auto for the most exact that is there. Another form than the chosen one is refused.
    #[arg(long, env = "AVATAR_WEIGHTS", value_name = "FORM", default_value = "auto")]
    pub weights: Choice,
    /// Face detector to use instead of the built-in one: an ONNX file of UltraFace, YuNet, SCRFD or YOLO-face.
    #[arg(long, env = "AVATAR_FACE_MODEL", value_name = "FILE")]
    pub face_model: Option<PathBuf>,
    #[allow(missing_docs)] // A doc comment would replace the description of the command in --help.
    #[command(flatten)]
    pub tier: gateway::config::TierFlags,
}

impl RequestFlags {
    /// What the flags ask for; what they leave open stays open.
    #[must_use]
    pub fn spec(&self) -> GenerationSpec {
        GenerationSpec { face: self.face.map(|face| face.0), ..self.settings.spec(self.prompt.clone()) }
    }
}

impl SettingFlags {
    /// What the flags ask for with a prompt; what they leave open stays open.
    #[must_use]
    pub fn spec(&self, prompt: String) -> GenerationSpec {
        GenerationSpec {
            prompt,
            seed: self.seed,
            steps: self.steps,
            size: self.size,
            guidance_scale: self.guidance_scale,
            flow_shift: self.flow_shift,
            min_frames: self.min_frames,
            face: None,
            parity: self.parity.map_or(v1::Parity::Unspecified, |Parity::Reference| v1::Parity::Reference).into(),
            truncate_prompt: self.truncate_prompt,
            no_feature_cache: self.no_feature_cache,
        }
    }
}

/// Rules that are not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Parity {
    /// Those of the reference implementation.
    Reference,
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
