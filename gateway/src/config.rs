//! The gateway's flags.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser};
use http::Uri;
use service_kit::config::{CommonConfig, CommonFlags, Mistakes, Settings, parse_listen, parse_number};

use crate::{stages::StageUris, validate::MOST_AUDIO_SECONDS};

/// Takes pictures, recordings and sentences, and makes talking videos with the five stages.
#[derive(Debug, Parser)]
#[command(name = "gateway", version)]
pub struct Flags {
    /// Address and port to serve gRPC on; port 0 takes a free one.
    #[arg(long, env = "AVATAR_GRPC", value_name = "ADDR:PORT", default_value = "127.0.0.1:50050")]
    grpc: String,
    /// Address and port to serve REST on; port 0 takes a free one.
    #[arg(long, env = "AVATAR_HTTP", value_name = "ADDR:PORT", default_value = "127.0.0.1:7860")]
    http: String,
    /// Where the audio encoder is.
    #[arg(long, env = "AVATAR_AUDIO_ENCODER", value_name = "URL", default_value = "http://127.0.0.1:50051")]
    audio_encoder: String,
    /// Where the text encoder is.
    #[arg(long, env = "AVATAR_TEXT_ENCODER", value_name = "URL", default_value = "http://127.0.0.1:50052")]
    text_encoder: String,
    /// Where the image encoder is.
    #[arg(long, env = "AVATAR_IMAGE_ENCODER", value_name = "URL", default_value = "http://127.0.0.1:50053")]
    image_encoder: String,
    /// Where the transformer is.
    #[arg(long, env = "AVATAR_DIFFUSION", value_name = "URL", default_value = "http://127.0.0.1:50054")]
    diffusion: String,
    /// Where the decoder is.
    #[arg(long, env = "AVATAR_VAE_DECODE", value_name = "URL", default_value = "http://127.0.0.1:50055")]
    vae_decode: String,
    #[allow(missing_docs)] // A doc comment would replace the description of the program in --help.
    #[command(flatten)]
    options: OptionFlags,
    #[allow(missing_docs)]
    #[command(flatten)]
    common: CommonFlags,
}

/// The flags about generations; shared by every program that has a gateway inside.
#[derive(Debug, Clone, Args)]
pub struct OptionFlags {
    /// Folder for records, inputs, work in progress and videos, made if missing; a restart goes on from there. One
    /// gateway at a time uses it.
    #[arg(long, env = "AVATAR_DATA_DIR", value_name = "DIR", default_value = "avatar-data")]
    pub data_dir: PathBuf,
    /// Generations that may wait (0 to 10000) behind those that run; more are refused with RESOURCE_EXHAUSTED.
    #[arg(long, env = "AVATAR_QUEUE", value_name = "N", default_value = "16")]
    pub queue: String,
    /// Generations that run at the same time (1 to 64).
    #[arg(long, env = "AVATAR_CONCURRENT", value_name = "N", default_value = "1")]
    pub concurrent: String,
    /// Seconds (0 to 86400) that a stage may stay away before a generation that needs it fails.
    #[arg(long, env = "AVATAR_STAGE_PATIENCE", value_name = "SECONDS", default_value = "600")]
    pub stage_patience: String,
    /// Longest recording in seconds (1 to 600).
    #[arg(long, env = "AVATAR_MAX_AUDIO_SECONDS", value_name = "SECONDS", default_value = "600")]
    pub max_audio_seconds: String,
    /// The program that writes the video.
    #[arg(long, env = "AVATAR_FFMPEG", value_name = "PROGRAM", default_value = "ffmpeg")]
    pub ffmpeg: PathBuf,
}

/// What [`OptionFlags`] say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Folder for all that outlives the process.
    pub data_dir: PathBuf,
    /// Generations that may wait behind those that run.
    pub queue: usize,
    /// Generations that run at the same time.
    pub concurrent: usize,
    /// How long a stage may stay away.
    pub stage_patience: Duration,
    /// Longest recording in seconds.
    pub max_audio_seconds: u32,
    /// The program that writes the video.
    pub ffmpeg: PathBuf,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            data_dir: "avatar-data".into(),
            queue: 16,
            concurrent: 1,
            stage_patience: Duration::from_secs(600),
            max_audio_seconds: MOST_AUDIO_SECONDS,
            ffmpeg: "ffmpeg".into(),
        }
    }
}

impl OptionFlags {
    /// Gives the values their types; what is wrong goes to `mistakes`.
    pub fn resolve(self, mistakes: &mut Mistakes) -> Option<Options> {
        let queue = mistakes.check("--queue", &self.queue, |text| parse_number(text, 0, 10_000));
        let concurrent = mistakes.check("--concurrent", &self.concurrent, |text| parse_number(text, 1, 64));
        let stage_patience =
            mistakes.check("--stage-patience", &self.stage_patience, |text| parse_number(text, 0, 86_400));
        let max_audio_seconds = mistakes.check("--max-audio-seconds", &self.max_audio_seconds, |text| {
            parse_number(text, 1, MOST_AUDIO_SECONDS as usize)
        });
        if self.ffmpeg.as_os_str().is_empty() {
            mistakes.note("--ffmpeg: the name of a program is needed");
        }
        Some(Options {
            data_dir: self.data_dir,
            queue: queue?,
            concurrent: concurrent?,
            stage_patience: Duration::from_secs(stage_patience? as u64),
            max_audio_seconds: max_audio_seconds? as u32,
            ffmpeg: self.ffmpeg,
        })
    }
}

/// What [`Flags`] say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where to serve gRPC.
    pub grpc: SocketAddr,
    /// Where to serve REST.
    pub http: SocketAddr,
    /// Where the stages are.
    pub stages: StageUris,
    /// About generations.
    pub options: Options,
    /// What every process has.
    pub common: CommonConfig,
}

impl Settings for Flags {
    type Config = Config;

    fn resolve(self, mistakes: &mut Mistakes) -> Option<Config> {
        let grpc = mistakes.check("--grpc", &self.grpc, parse_listen);
        let http = mistakes.check("--http", &self.http, parse_listen);
        let audio_encoder = mistakes.check("--audio-encoder", &self.audio_encoder, parse_url);
        let text_encoder = mistakes.check("--text-encoder", &self.text_encoder, parse_url);
        let image_encoder = mistakes.check("--image-encoder", &self.image_encoder, parse_url);
        let diffusion = mistakes.check("--diffusion", &self.diffusion, parse_url);
        let vae_decode = mistakes.check("--vae-decode", &self.vae_decode, parse_url);
        let options = self.options.resolve(mistakes);
        let common = self.common.resolve(mistakes);
        let stages = StageUris {
            audio_encoder: audio_encoder?,
            text_encoder: text_encoder?,
            image_encoder: image_encoder?,
            diffusion: diffusion?,
            vae_decode: vae_decode?,
        };
        Some(Config { grpc: grpc?, http: http?, stages, options: options?, common: common? })
    }
}

fn parse_url(text: &str) -> Result<Uri, String> {
    service_kit::client::address_uri(text).map_err(|_| "not a URL such as http://127.0.0.1:50051".to_owned())
}

#[cfg(test)]
mod tests {
    use service_kit::config::{ConfigError, parse_from};

    use super::*;

    fn parse(arguments: &[&str]) -> Result<Config, ConfigError> {
        parse_from::<Flags>(std::iter::once("gateway").chain(arguments.iter().copied()).map(Into::into))
    }

    #[test]
    fn the_stages_are_looked_for_on_this_host_one_port_after_the_other() {
        let config = parse(&[]).unwrap();
        assert_eq!(config.grpc.to_string(), "127.0.0.1:50050");
        assert_eq!(config.stages.audio_encoder, "http://127.0.0.1:50051");
        assert_eq!(config.stages.vae_decode, "http://127.0.0.1:50055");
        assert_eq!(config.options, Options::default());
    }

    #[test]
    fn all_mistakes_are_reported_together() {
        let arguments = ["--grpc", "x", "--diffusion", "ftp://y", "--queue", "many", "--max-audio-seconds=601"];
        let Err(ConfigError::Mistakes(mistakes)) = parse(&arguments) else { panic!() };
        let text = mistakes.to_string();
        assert_eq!(text.lines().count(), 4, "{text}");
        for flag in ["--grpc", "--diffusion", "--queue", "--max-audio-seconds"] {
            assert!(text.contains(flag), "{flag} in {text}");
        }
    }
}
