//! The flags of the commands that talk to a server.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use proto::v1::GenerationState;

use crate::config::RequestFlags;

/// Which server, and in what form its answers are shown.
#[derive(Debug, Args)]
pub struct ServerFlags {
    /// Address of the server's gRPC door.
    #[arg(long, env = "AVATAR_SERVER", value_name = "URL", default_value = "http://127.0.0.1:50050")]
    pub server: String,
    /// Print one JSON object a line on standard output.
    #[arg(long)]
    pub json: bool,
}

/// The flags of `avatar submit`.
#[derive(Debug, Args)]
pub struct SubmitFlags {
    #[allow(missing_docs)] // A doc comment would replace the description of the command in --help.
    #[command(flatten)]
    pub request: RequestFlags,
    /// A name for this request, so that handing it in again makes no second video: at most 255 visible ASCII characters.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub idempotency_key: String,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub order: OrderFlags,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub server: ServerFlags,
}

/// How a request is to be served; for `submit` and `batch`.
#[derive(Debug, Clone, Args)]
pub struct OrderFlags {
    /// Who asks: at most 64 visible ASCII characters; callers of one priority take turns.
    #[arg(long, env = "AVATAR_CALLER", value_name = "NAME", default_value = "")]
    pub caller: String,
    /// How urgent it is, -9 to 9, the higher the earlier.
    #[arg(long, value_name = "N", default_value_t = 0, allow_hyphen_values = true)]
    pub priority: i32,
    /// A word of your own, by which `avatar list` finds it: at most 64 visible ASCII characters.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub label: String,
    /// Have the server call this https URL back at the end, signed as the Standard Webhooks specification says.
    #[arg(long, value_name = "URL", default_value = "")]
    pub webhook: String,
    /// Seconds, 1 to 2592000, in which it must have ended; else it fails. Default: the server's own limit.
    #[arg(long, value_name = "SECONDS")]
    pub deadline: Option<u64>,
}

/// The flags of the commands about one generation.
#[derive(Debug, Args)]
pub struct OneFlags {
    /// The generation.
    #[arg(value_name = "ID")]
    pub id: String,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub server: ServerFlags,
}

/// The flags of `avatar watch`.
#[derive(Debug, Args)]
pub struct WatchFlags {
    /// The generation.
    #[arg(value_name = "ID")]
    pub id: String,
    /// Number of the first event to show; 1 shows all.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub from: u64,
    /// Folder for the previews that events tell of, made if missing: `step-008.jpg` and so on.
    #[arg(long, value_name = "DIR")]
    pub previews: Option<PathBuf>,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub server: ServerFlags,
}

/// States by their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)] // They say what they are.
pub enum State {
    Queued,
    Encoding,
    Denoising,
    Decoding,
    Completed,
    Failed,
    Cancelled,
}

impl From<State> for GenerationState {
    fn from(state: State) -> Self {
        match state {
            State::Queued => Self::Queued,
            State::Encoding => Self::Encoding,
            State::Denoising => Self::Denoising,
            State::Decoding => Self::Decoding,
            State::Completed => Self::Completed,
            State::Failed => Self::Failed,
            State::Cancelled => Self::Cancelled,
        }
    }
}

/// The flags of `avatar list`.
#[derive(Debug, Args)]
pub struct ListFlags {
    /// Show only those in these states, with commas between.
    #[arg(long, value_enum, value_name = "STATE,..", value_delimiter = ',')]
    pub state: Vec<State>,
    /// Show only those of this caller.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub caller: String,
    /// Show only those with this label.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub label: String,
    /// Show only those created at this Unix time in seconds or later.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub created_from: u64,
    /// Show only those created before this Unix time in seconds; 0 for no limit.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub created_before: u64,
    /// Show at most this many.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub limit: usize,
    /// Show the oldest first.
    #[arg(long)]
    pub oldest_first: bool,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub server: ServerFlags,
}

/// The flags of `avatar download`.
#[derive(Debug, Args)]
pub struct DownloadFlags {
    /// The generation.
    #[arg(value_name = "ID")]
    pub id: String,
    /// Video file to write; replaced only by a whole video.
    #[arg(long, value_name = "FILE", default_value = "avatar.mp4")]
    pub out: PathBuf,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub server: ServerFlags,
}
