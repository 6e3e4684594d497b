//! The gateway's flags.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser};
use http::Uri;
use planner::{Tier, Tiers, plan::Choice, tiers::EMERGENCY};
use service_kit::config::{CommonConfig, CommonFlags, Mistakes, Settings, parse_listen, parse_number};

use crate::stages::StageUris;

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
    /// Folder for the videos, made if missing. Without it they lie in a temporary folder that is removed at the end.
    #[arg(long, env = "AVATAR_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Generations that may wait (0 to 10000) behind those that run; more are refused with RESOURCE_EXHAUSTED.
    #[arg(long, env = "AVATAR_QUEUE", value_name = "N", default_value = "16")]
    pub queue: String,
    /// Generations that run at the same time (1 to 64).
    #[arg(long, env = "AVATAR_CONCURRENT", value_name = "N", default_value = "1")]
    pub concurrent: String,
    /// Longest recording in seconds (1 to 600).
    #[arg(long, env = "AVATAR_MAX_AUDIO_SECONDS", value_name = "SECONDS", default_value = "600")]
    pub max_audio_seconds: String,
    /// The program that writes the video.
    #[arg(long, env = "AVATAR_FFMPEG", value_name = "PROGRAM", default_value = "ffmpeg")]
    pub ffmpeg: PathBuf,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub tier: TierFlags,
}

/// The flags about tiers; shared by every command that holds requests to one.
#[derive(Debug, Clone, Default, Args)]
pub struct TierFlags {
    /// Hold requests to a tier's limits on size, frames of a pass, speech and steps: to those of the tier of that name
    /// (`avatar tiers` lists them), or with `auto` to those of the tier that the memory at hand is for. Default: none.
    #[arg(long, env = "AVATAR_TIER", value_name = "auto|NAME")]
    pub tier: Option<String>,
    /// TOML file that adds tiers, or changes values of those there are.
    #[arg(long, env = "AVATAR_TIERS", value_name = "FILE")]
    pub tiers: Option<PathBuf>,
    /// Take tier `emergency`, whatever the memory and whatever --tier says.
    #[arg(long, env = "AVATAR_FORCE_EMERGENCY")]
    pub force_emergency: bool,
    /// Lower what is past a tier's limit, and say so, instead of refusing it.
    #[arg(long, env = "AVATAR_ALLOW_DEGRADE")]
    pub allow_degrade: bool,
}

/// What [`TierFlags`] say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TierOptions {
    /// The tiers that there are.
    pub tiers: Tiers,
    /// Which one's limits hold.
    pub choice: Choice,
    /// Lower what is past a limit instead of refusing it.
    pub allow_degrade: bool,
}

/// Largest file of tiers that is read.
const TIERS_BYTES: u64 = 64 << 10;

impl TierFlags {
    /// Reads the file of tiers, and looks the name up.
    ///
    /// Errors: the flag's name, and what is wrong.
    pub fn resolve(&self) -> Result<TierOptions, (&'static str, String)> {
        let tiers = match self.tiers.as_deref() {
            Some(file) => read_tiers(file).map_err(|e| ("tiers", format!("{}: {e}", file.display())))?,
            None => Tiers::default(),
        };
        let choice = match self.tier.as_deref() {
            _ if self.force_emergency => Choice::Named(EMERGENCY.to_owned()),
            None => Choice::Unlimited,
            Some("auto") => Choice::Auto,
            Some(name) => Choice::Named(name.to_owned()),
        };
        if let Choice::Named(name) = &choice {
            tiers.named(name).map_err(|e| ("tier", e.to_string()))?;
        }
        Ok(TierOptions { tiers, choice, allow_degrade: self.allow_degrade })
    }
}

fn read_tiers(file: &std::path::Path) -> Result<Tiers, String> {
    let length = std::fs::metadata(file).map_err(|e| e.to_string())?.len();
    if length > TIERS_BYTES {
        return Err(format!("{length} bytes, the limit is {TIERS_BYTES}"));
    }
    let text = std::fs::read_to_string(file).map_err(|e| e.to_string())?;
    Tiers::with_file(&text).map_err(|e| e.to_string())
}

impl TierOptions {
    /// The tier that requests are held to.
    #[must_use]
    pub fn limit(&self) -> Option<&Tier> {
        match &self.choice {
            Choice::Named(name) => self.tiers.named(name).ok(),
            Choice::Auto | Choice::Unlimited => None,
        }
    }

    /// The same with the tier of a device instead of `auto`.
    #[must_use]
    pub fn on_device(self, total: planner::Bytes) -> Self {
        match (&self.choice, self.tiers.for_total(total)) {
            (Choice::Auto, Some(tier)) => Self { choice: Choice::Named(tier.name.clone()), ..self },
            _ => self,
        }
    }
}

/// What [`OptionFlags`] say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Folder for the videos; `None` for a temporary one.
    pub data_dir: Option<PathBuf>,
    /// Generations that may wait behind those that run.
    pub queue: usize,
    /// Generations that run at the same time.
    pub concurrent: usize,
    /// Longest recording in seconds.
    pub max_audio_seconds: u32,
    /// The program that writes the video.
    pub ffmpeg: PathBuf,
    /// Which limits requests are held to.
    pub tier: TierOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            data_dir: None,
            queue: 16,
            concurrent: 1,
            max_audio_seconds: 600,
            ffmpeg: "ffmpeg".into(),
            tier: TierOptions::default(),
        }
    }
}

impl OptionFlags {
    /// Gives the values their types; what is wrong goes to `mistakes`.
    pub fn resolve(self, mistakes: &mut Mistakes) -> Option<Options> {
        let queue = mistakes.check("--queue", &self.queue, |text| parse_number(text, 0, 10_000));
        let concurrent = mistakes.check("--concurrent", &self.concurrent, |text| parse_number(text, 1, 64));
        let max_audio_seconds =
            mistakes.check("--max-audio-seconds", &self.max_audio_seconds, |text| parse_number(text, 1, 600));
        if self.ffmpeg.as_os_str().is_empty() {
            mistakes.note("--ffmpeg: the name of a program is needed");
        }
        let tier = self.tier.resolve().map_err(|(flag, told)| mistakes.note(format!("--{flag}: {told}"))).ok();
        Some(Options {
            tier: tier?,
            data_dir: self.data_dir,
            queue: queue?,
            concurrent: concurrent?,
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
        if options.as_ref().is_some_and(|options| options.tier.choice == Choice::Auto) {
            mistakes.note("--tier: auto needs to know the devices, which this process does not; name a tier");
        }
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
    fn a_tier_is_looked_up_when_the_flags_are_read() {
        let config = parse(&["--tier", "low"]).unwrap();
        assert_eq!(config.options.tier.limit().unwrap().limits.pixels, 384);
        let forced = parse(&["--tier", "low", "--force-emergency"]).unwrap();
        assert_eq!(forced.options.tier.limit().unwrap().name, "emergency");
        for (arguments, part) in [
            (["--tier", "big"], "the tiers are emergency"),
            (["--tier", "auto"], "needs to know the devices"),
            (["--tiers", "/no/such/file"], "--tiers: /no/such/file"),
        ] {
            let Err(ConfigError::Mistakes(mistakes)) = parse(&arguments) else { panic!("{arguments:?}") };
            assert!(mistakes.to_string().contains(part), "{mistakes}");
        }
        let auto = TierOptions { choice: Choice::Auto, ..TierOptions::default() };
        assert_eq!(auto.on_device(planner::Bytes::gib(12)).limit().unwrap().name, "low");
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
