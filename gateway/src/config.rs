//! The gateway's flags.

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Parser};
use http::Uri;
use planner::{Tier, Tiers, plan::Choice, tiers::EMERGENCY};
use service_kit::config::{CommonConfig, CommonFlags, Mistakes, Settings, parse_listen, parse_number};

use crate::{
    stages::StageUris,
    store::{
        ByEnd, Database, Records, Retention,
        artifacts::place::{Access, Place},
    },
    validate::MOST_AUDIO_SECONDS,
    webhook::{self, Secret, WebhookOptions},
};

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
    /// Where the decoder is; or several, with commas between: one that cannot be reached, has no room or runs out of
    /// memory is left for the next.
    #[arg(long, env = "AVATAR_VAE_DECODE", value_name = "URL,..", default_value = "http://127.0.0.1:50055")]
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
    /// gateway at a time uses it, or all that share a --database. With --database and --artifacts only what is being
    /// written lies there.
    #[arg(long, env = "AVATAR_DATA_DIR", value_name = "DIR", default_value = "avatar-data")]
    pub data_dir: PathBuf,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub records: RecordFlags,
    /// Generations that may wait (0 to 10000) behind those that run; more are refused with RESOURCE_EXHAUSTED.
    #[arg(long, env = "AVATAR_QUEUE", value_name = "N", default_value = "16")]
    pub queue: String,
    /// Generations of one caller that may wait or run (1 to 10064). Default: as many as of all.
    #[arg(long, env = "AVATAR_QUEUE_PER_CALLER", value_name = "N")]
    pub queue_per_caller: Option<String>,
    /// Generations that run at the same time (1 to 64); between their steps they share the stages.
    #[arg(long, env = "AVATAR_CONCURRENT", value_name = "N", default_value = "2")]
    pub concurrent: String,
    /// Bytes (0 to 2^63-1) that must stay free on the data folder's disk; with less, generations are refused with
    /// RESOURCE_EXHAUSTED.
    #[arg(long, env = "AVATAR_MIN_FREE_BYTES", value_name = "BYTES", default_value = "268435456")]
    pub min_free_bytes: String,
    /// Hours (1 to 87600) that a generation is kept after its end, for all or by its last state, as in
    /// `24,completed=720`; states are completed, failed and cancelled. Default: until it is deleted.
    #[arg(long, env = "AVATAR_KEEP_HOURS", value_name = "HOURS|STATE=HOURS,..")]
    pub keep_hours: Option<String>,
    /// Bytes that the files of all generations may have, or of those that ended in a state, or both, as in
    /// `10000000000,failed=1000000000`; those that ended first are removed first. Default: any number.
    #[arg(long, env = "AVATAR_KEEP_BYTES", value_name = "BYTES|STATE=BYTES,..")]
    pub keep_bytes: Option<String>,
    /// Bytes that the encoders' answers may have that are kept, so that the same inputs are encoded once.
    #[arg(long, env = "AVATAR_KEEP_ENCODED_BYTES", value_name = "BYTES", default_value = "4294967296")]
    pub keep_encoded_bytes: String,
    /// Seconds (0 to 86400) that a stage may stay away before a generation that needs it fails.
    #[arg(long, env = "AVATAR_STAGE_PATIENCE", value_name = "SECONDS", default_value = "600")]
    pub stage_patience: String,
    /// Seconds (1 to 86400) after which a call of a stage can be taken for stuck, if it has also taken five times what is
    /// predicted of it and its worker finishes no layer any more; then the worker is suspected, and the call is made
    /// again. Ten times as long for a first call, which may have to read the weights; sixty times where nothing is
    /// predicted of it.
    #[arg(long, env = "AVATAR_STUCK_AFTER", value_name = "SECONDS", default_value = "60")]
    pub stuck_after: String,
    /// How many times what is predicted of it (0 to 1000) a generation may take that has no deadline of its caller, and
    /// never less than ten minutes; 0 lets it take as long as it does. Time in the queue does not count.
    #[arg(long, env = "AVATAR_DEFAULT_DEADLINE", value_name = "TIMES", default_value = "4")]
    pub default_deadline: String,
    /// Small pictures (0 to 100) of how far each generation is, evenly spread over its steps; 0 makes none. The decoder
    /// makes them beside the steps where its device has room to spare.
    #[arg(long, env = "AVATAR_PREVIEWS", value_name = "N", default_value = "5")]
    pub previews: String,
    /// Longest recording in seconds (1 to 600).
    #[arg(long, env = "AVATAR_MAX_AUDIO_SECONDS", value_name = "SECONDS", default_value = "600")]
    pub max_audio_seconds: String,
    /// The program that writes the video.
    #[arg(long, env = "AVATAR_FFMPEG", value_name = "PROGRAM", default_value = "ffmpeg")]
    pub ffmpeg: PathBuf,
    /// File with the secret that webhooks are signed with: `whsec_` and 24 to 64 bytes in Base64. Without it nobody is
    /// called back.
    #[arg(long, env = "AVATAR_WEBHOOK_SECRET_FILE", value_name = "FILE")]
    pub webhook_secret_file: Option<PathBuf>,
    /// Hosts that webhooks may also reach without TLS and at addresses that are not public: HOST or HOST:PORT, with
    /// commas between.
    #[arg(long, env = "AVATAR_WEBHOOK_ALLOW", value_name = "HOST,..")]
    pub webhook_allow: Option<String>,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub tier: TierFlags,
}

/// The flags about records.
#[derive(Clone, Args)]
pub struct RecordFlags {
    /// PostgreSQL database for the records, as in postgres://USER@HOST:PORT/NAME, instead of a file in --data-dir.
    /// Several gateways may share it, with the same --artifacts or one --data-dir that all of them see. Other users of
    /// the machine can read flags: give the password in a file, or the URL in the environment.
    #[arg(long, env = "AVATAR_DATABASE", value_name = "URL", hide_env_values = true)]
    pub database: Option<String>,
    /// File whose first line is the password for --database.
    #[arg(long, env = "AVATAR_DATABASE_PASSWORD_FILE", value_name = "FILE")]
    pub database_password_file: Option<PathBuf>,
    /// Bucket for inputs, latents, encoders' answers and videos, instead of a folder in --data-dir: s3://BUCKET/PREFIX,
    /// gs://BUCKET/PREFIX or az://CONTAINER/PREFIX. Gateways that share a --database share it too; no others may.
    #[arg(long, env = "AVATAR_ARTIFACTS", value_name = "URL")]
    pub artifacts: Option<String>,
    /// Where the --artifacts are served, if not by the service's maker, as in https://s3.example.com.
    #[arg(long, env = "AVATAR_ARTIFACTS_ENDPOINT", value_name = "URL")]
    pub artifacts_endpoint: Option<String>,
    /// Speak to --artifacts-endpoint without TLS even if it is not on this machine.
    #[arg(long, env = "AVATAR_ARTIFACTS_PLAIN_HTTP")]
    pub artifacts_plain_http: bool,
    /// File with the credentials for --artifacts: for s3 and az lines as in the environment (AWS_ACCESS_KEY_ID=…,
    /// AZURE_STORAGE_ACCOUNT_KEY=…) or an AWS credentials file, for gs a service account's key. Default: the environment,
    /// or the machine's or pod's own identity.
    #[arg(long, env = "AVATAR_ARTIFACTS_CREDENTIALS_FILE", value_name = "FILE")]
    pub artifacts_credentials_file: Option<PathBuf>,
    /// Seconds (1 to 3600) after the last sign of life of a gateway after which another one that shares the --database
    /// goes on with its generations.
    #[arg(long, env = "AVATAR_LEASE", value_name = "SECONDS", default_value = "15")]
    pub lease: String,
}

/// Without the URL, which may hold a password.
impl fmt::Debug for RecordFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordFlags").field("lease", &self.lease).finish_non_exhaustive()
    }
}

/// Most bytes of a file with a password.
const PASSWORD_BYTES: u64 = 4 << 10;

impl RecordFlags {
    /// Gives the values their types; what is wrong goes to `mistakes`.
    fn resolve(self, mistakes: &mut Mistakes) -> Option<Records> {
        let lease = mistakes.check("--lease", &self.lease, |text| parse_number(text, 1, 3600));
        let password = self.database_password_file.as_deref().map(read_password).transpose();
        if let Err(told) = &password {
            mistakes.note(format!("--database-password-file: {told}"));
        }
        if self.database.is_none() && self.database_password_file.is_some() {
            mistakes.note("--database-password-file: there is no --database that it is for");
        }
        let password = password.ok()?;
        // The URL is not repeated in the message.
        let database = self.database.map(|url| Database::new(&url, password)).transpose();
        let database = database.map_err(|told| mistakes.note(format!("--database: {told}"))).ok();
        let access = Access {
            endpoint: self.artifacts_endpoint.as_deref(),
            plain: self.artifacts_plain_http,
            credentials: self.artifacts_credentials_file.as_deref(),
        };
        if self.artifacts.is_none() && access != Access::default() {
            mistakes.note("--artifacts-endpoint and the like: there are no --artifacts that they are for");
        }
        let artifacts = self.artifacts.map(|url| Place::new(&url, &access)).transpose();
        let artifacts = artifacts.map_err(|(flag, told)| mistakes.note(format!("{flag}: {told}"))).ok();
        Some(Records { database: database?, artifacts: artifacts?, lease: Duration::from_secs(lease? as u64) })
    }
}

fn read_password(file: &Path) -> Result<String, String> {
    let shown = file.display();
    let length = std::fs::metadata(file).map_err(|e| format!("{shown}: {e}"))?.len();
    if length > PASSWORD_BYTES {
        return Err(format!("{shown}: {length} bytes, the limit is {PASSWORD_BYTES}"));
    }
    let text = std::fs::read_to_string(file).map_err(|e| format!("{shown}: {e}"))?;
    let line = text.lines().next().filter(|line| !line.is_empty());
    line.map(str::to_owned).ok_or_else(|| format!("{shown}: its first line is empty"))
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

fn read_tiers(file: &Path) -> Result<Tiers, String> {
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

/// How long a generation may be worked on that has no deadline of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DefaultDeadline {
    /// How many times what is predicted of a stage it may take; 0 for no limit.
    pub times: u32,
    /// What a stage may always take: predictions of what is short can be several times too short.
    pub least: Duration,
}

impl Default for DefaultDeadline {
    fn default() -> Self {
        Self { times: 0, least: Duration::from_secs(600) }
    }
}

/// What [`OptionFlags`] say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Folder for all that outlives the process.
    pub data_dir: PathBuf,
    /// Where records are, if not there.
    pub records: Records,
    /// Generations that may wait behind those that run.
    pub queue: usize,
    /// Generations of one caller that may wait or run; without it as many as of all.
    pub queue_per_caller: Option<usize>,
    /// Generations that run at the same time.
    pub concurrent: usize,
    /// Bytes that must stay free on the data folder's disk.
    pub min_free_bytes: u64,
    /// How much is kept of what has ended.
    pub retention: Retention,
    /// How long a stage may stay away.
    pub stage_patience: Duration,
    /// The shortest time after which a call is taken for stuck.
    pub stuck_after: Duration,
    /// How long a generation may be worked on that has no deadline of its caller; by default as long as it takes.
    pub default_deadline: DefaultDeadline,
    /// Small pictures of how far each generation is; by default none, as nobody may be watching.
    pub previews: usize,
    /// Longest recording in seconds.
    pub max_audio_seconds: u32,
    /// The program that writes the video.
    pub ffmpeg: PathBuf,
    /// Which limits requests are held to.
    pub tier: TierOptions,
    /// Who is called back, and how it is signed.
    pub webhooks: WebhookOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            data_dir: "avatar-data".into(),
            records: Records::default(),
            queue: 16,
            queue_per_caller: None,
            concurrent: 2,
            min_free_bytes: 256 << 20,
            retention: Retention::default(),
            stage_patience: Duration::from_secs(600),
            stuck_after: Duration::from_secs(60),
            default_deadline: DefaultDeadline::default(),
            previews: 0,
            max_audio_seconds: MOST_AUDIO_SECONDS,
            ffmpeg: "ffmpeg".into(),
            tier: TierOptions::default(),
            webhooks: WebhookOptions::default(),
        }
    }
}

impl OptionFlags {
    /// Gives the values their types; what is wrong goes to `mistakes`.
    pub fn resolve(self, mistakes: &mut Mistakes) -> Option<Options> {
        let queue = mistakes.check("--queue", &self.queue, |text| parse_number(text, 0, 10_000));
        let concurrent = mistakes.check("--concurrent", &self.concurrent, |text| parse_number(text, 1, 64));
        let queue_per_caller = self
            .queue_per_caller
            .map(|text| mistakes.check("--queue-per-caller", &text, |text| parse_number(text, 1, 10_064)));
        let min_free_bytes = mistakes.check("--min-free-bytes", &self.min_free_bytes, parse_bytes);
        let hours = |text: &str| parse_number(text, 1, 87_600).map(|hours| Duration::from_secs(3600 * hours as u64));
        let keep_hours = self.keep_hours.unwrap_or_default();
        let age = mistakes.check("--keep-hours", &keep_hours, |text| parse_by_end(text, hours));
        let keep_bytes = self.keep_bytes.unwrap_or_default();
        let bytes = mistakes.check("--keep-bytes", &keep_bytes, |text| parse_by_end(text, parse_bytes));
        let stage_output_bytes = mistakes.check("--keep-encoded-bytes", &self.keep_encoded_bytes, parse_bytes);
        let stage_patience =
            mistakes.check("--stage-patience", &self.stage_patience, |text| parse_number(text, 0, 86_400));
        let stuck_after = mistakes.check("--stuck-after", &self.stuck_after, |text| parse_number(text, 1, 86_400));
        let times = mistakes.check("--default-deadline", &self.default_deadline, |text| parse_number(text, 0, 1000));
        let previews = mistakes.check("--previews", &self.previews, |text| parse_number(text, 0, 100));
        let max_audio_seconds = mistakes.check("--max-audio-seconds", &self.max_audio_seconds, |text| {
            parse_number(text, 1, MOST_AUDIO_SECONDS as usize)
        });
        if self.ffmpeg.as_os_str().is_empty() {
            mistakes.note("--ffmpeg: the name of a program is needed");
        }
        let secret = self.webhook_secret_file.map(|file| {
            let read = Secret::read(&file);
            read.map_err(|told| mistakes.note(format!("--webhook-secret-file: {}: {told}", file.display()))).ok()
        });
        let allow = self.webhook_allow.map(|text| mistakes.check("--webhook-allow", &text, webhook::parse_hosts));
        let records = self.records.resolve(mistakes);
        let tier = self.tier.resolve().map_err(|(flag, told)| mistakes.note(format!("--{flag}: {told}"))).ok();
        Some(Options {
            tier: tier?,
            data_dir: self.data_dir,
            records: records?,
            queue: queue?,
            queue_per_caller: queue_per_caller.map_or(Some(None), |limit| limit.map(Some))?,
            concurrent: concurrent?,
            min_free_bytes: min_free_bytes?,
            retention: Retention {
                age: age.map(|(all, by_end)| by_end.or(all))?,
                bytes: bytes?.0,
                bytes_by_end: bytes?.1,
                stage_output_bytes: stage_output_bytes?,
            },
            stage_patience: Duration::from_secs(stage_patience? as u64),
            stuck_after: Duration::from_secs(stuck_after? as u64),
            default_deadline: DefaultDeadline { times: times? as u32, ..DefaultDeadline::default() },
            previews: previews?,
            max_audio_seconds: max_audio_seconds? as u32,
            ffmpeg: self.ffmpeg,
            webhooks: WebhookOptions {
                secret: secret.map_or(Some(None), |secret| secret.map(Some))?,
                allow: allow.map_or(Some(Vec::new()), |hosts| hosts)?,
            },
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
        let vae_decode = mistakes.check("--vae-decode", &self.vae_decode, parse_urls);
        let options = self.options.resolve(mistakes);
        let common = self.common.resolve(mistakes);
        if options.as_ref().is_some_and(|options| options.tier.choice == Choice::Auto) {
            mistakes.note("--tier: auto needs to know the devices, which this process does not; name a tier");
        }
        let (vae_decode, spare_decoders) = vae_decode?;
        let stages = StageUris {
            audio_encoder: audio_encoder?,
            text_encoder: text_encoder?,
            image_encoder: image_encoder?,
            diffusion: diffusion?,
            vae_decode,
            spare_decoders,
        };
        Some(Config { grpc: grpc?, http: http?, stages, options: options?, common: common? })
    }
}

fn parse_bytes(text: &str) -> Result<u64, String> {
    let bytes = text.trim().parse().ok().filter(|bytes| i64::try_from(*bytes).is_ok());
    bytes.ok_or_else(|| "not a number of bytes from 0 to 9223372036854775807".to_owned())
}

/// Reads a limit for all, limits by last state, or both, with commas between; of nothing there are none.
fn parse_by_end<T: Copy>(
    text: &str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<(Option<T>, ByEnd<T>), String> {
    let (mut all, mut by_end) = (None, ByEnd::default());
    for part in text.split(',').filter(|_| !text.is_empty()) {
        let (state, limit) = part.split_once('=').map_or(("", part), |(state, limit)| (state.trim(), limit));
        let place = match state {
            "" => &mut all,
            "completed" => &mut by_end.completed,
            "failed" => &mut by_end.failed,
            "cancelled" => &mut by_end.cancelled,
            _ => return Err(format!("{state:?} is no last state; they are completed, failed and cancelled")),
        };
        if place.replace(parse(limit.trim())?).is_some() {
            return Err(format!("{part:?} comes after another limit of the same kind"));
        }
    }
    Ok((all, by_end))
}

fn parse_url(text: &str) -> Result<Uri, String> {
    service_kit::client::address_uri(text).map_err(|_| "not a URL such as http://127.0.0.1:50051".to_owned())
}

/// The first URL, and those after it.
fn parse_urls(text: &str) -> Result<(Uri, Vec<Uri>), String> {
    let mut urls = text.split(',').map(|url| parse_url(url.trim()));
    let first = urls.next().unwrap_or_else(|| parse_url(text))?;
    Ok((first, urls.collect::<Result<_, _>>()?))
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
        assert!(config.stages.spare_decoders.is_empty());
        let several = parse(&["--vae-decode", "http://a:1, http://b:2,http://c:3"]).unwrap().stages;
        assert_eq!((several.vae_decode, several.spare_decoders.len()), ("http://a:1".parse().unwrap(), 2));
        assert!(parse(&["--vae-decode", "http://a:1,"]).is_err());
        let default_deadline = DefaultDeadline { times: 4, ..DefaultDeadline::default() };
        assert_eq!(config.options, Options { previews: 5, default_deadline, ..Options::default() });
    }

    #[test]
    fn what_is_kept_is_told_in_hours_and_bytes() {
        let config = parse(&["--keep-hours", "24", "--keep-bytes", "1000", "--keep-encoded-bytes", "0"]).unwrap();
        let hours = |hours: u64| Some(Duration::from_secs(3600 * hours));
        let age = ByEnd::default().or(hours(24));
        let retention = Retention { age, bytes: Some(1000), stage_output_bytes: 0, ..Retention::default() };
        assert_eq!(config.options.retention, retention);
        let by_state = parse(&["--keep-hours", "24, completed=720", "--keep-bytes", "failed=5,cancelled=0"]).unwrap();
        let Retention { age, bytes, bytes_by_end, .. } = by_state.options.retention;
        assert_eq!((age.completed, age.failed, age.cancelled), (hours(720), hours(24), hours(24)));
        assert_eq!((bytes, bytes_by_end), (None, ByEnd { completed: None, failed: Some(5), cancelled: Some(0) }));
        assert_eq!(parse(&[]).unwrap().options.retention, Retention::default());
        for wrong in [
            ["--keep-hours", "0"],
            ["--keep-hours", "queued=1"],
            ["--keep-hours", "failed=1,failed=2"],
            ["--keep-hours", "1,"],
            ["--keep-bytes", "1.5"],
            ["--keep-bytes", "1,2"],
            ["--min-free-bytes", "9223372036854775808"],
        ] {
            assert!(matches!(parse(&wrong), Err(ConfigError::Mistakes(_))), "{wrong:?}");
        }
    }

    #[test]
    fn a_database_is_taken_with_the_password_of_a_file_and_no_password_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let (file, empty) = (dir.path().join("password"), dir.path().join("empty"));
        std::fs::write(&file, "first\nsecond\n").unwrap();
        std::fs::write(&empty, "\n").unwrap();
        let (file, empty) = (file.to_str().unwrap(), empty.to_str().unwrap());
        let url = "postgres://me@db/avatar";
        let records =
            parse(&["--database", url, "--database-password-file", file, "--lease", "2"]).unwrap().options.records;
        assert_eq!(records.database, Some(Database::new(url, Some("first".into())).unwrap()));
        assert_eq!(records.lease, Duration::from_secs(2));
        let flags = ["--database", "postgres://me:first@db/avatar"];
        let flags = Flags::try_parse_from(std::iter::once("gateway").chain(flags)).unwrap();
        assert!(!format!("{flags:?}").contains("first"));
        for (arguments, part) in [
            (vec!["--database", "mysql://me:first@db/avatar"], "--database: it does not begin with postgres://"),
            (vec!["--database-password-file", file], "there is no --database"),
            (vec!["--database", url, "--database-password-file", empty], "its first line is empty"),
            (vec!["--database", url, "--database-password-file", "/no/such/file"], "/no/such/file"),
            (vec!["--lease", "0"], "--lease"),
        ] {
            let Err(ConfigError::Mistakes(mistakes)) = parse(&arguments) else { panic!("{arguments:?}") };
            let told = mistakes.to_string();
            assert!(told.contains(part) && !told.contains("first@"), "{told}");
        }
    }

    #[test]
    fn a_bucket_is_taken_with_the_credentials_of_a_file_and_none_are_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "aws_access_key_id=me\naws_secret_access_key=hidden\n").unwrap();
        let credentials = ["--artifacts-credentials-file", file.path().to_str().unwrap()];
        let config = parse(&[&["--artifacts", "s3://films/avatar"][..], &credentials].concat()).unwrap();
        let shown = format!("{:?}", config.options.records);
        assert!(shown.contains("s3://films/avatar") && !shown.contains("hidden"), "{shown}");
        for (arguments, part) in [
            (&credentials[..], "there are no --artifacts"),
            (&["--artifacts", "films"], "--artifacts: it does not begin with s3://"),
            (
                &["--artifacts", "s3://films", "--artifacts-endpoint", "http://store"],
                "--artifacts-endpoint: without TLS",
            ),
            (&["--artifacts", "s3://films", "--artifacts-plain-http"], "--artifacts-plain-http: there is no"),
        ] {
            let Err(ConfigError::Mistakes(mistakes)) = parse(arguments) else { panic!("{arguments:?}") };
            assert!(mistakes.to_string().contains(part), "{mistakes}");
        }
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
    fn a_webhooks_secret_is_read_when_the_flags_are_and_never_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let path = file.path().to_str().unwrap();
        let config = parse(&["--webhook-secret-file", path, "--webhook-allow", "localhost:80,hooks"]).unwrap();
        assert_eq!(config.options.webhooks.allow, ["localhost:80", "hooks"]);
        assert!(format!("{config:?}").contains("Some(***)") && !format!("{config:?}").contains("MfKQ"));
        for wrong in [["--webhook-secret-file", "/no/such/file"], ["--webhook-allow", "http://x"]] {
            let Err(ConfigError::Mistakes(mistakes)) = parse(&wrong) else { panic!("{wrong:?}") };
            assert!(mistakes.to_string().contains(wrong[0]), "{mistakes}");
        }
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
