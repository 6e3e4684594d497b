//! The flags of `avatar batch`.

use std::path::PathBuf;

use clap::{Args, value_parser};

use crate::{
    client::flags::OrderFlags,
    config::{LocalFlags, SettingFlags},
};

/// The flags of `avatar batch`.
#[derive(Debug, Args)]
pub struct BatchFlags {
    /// Table of the videos: UTF-8, comma-separated, with the columns videoid, image, audio, prompt and fps in any order.
    /// A videoid has up to 100 of A-Z a-z 0-9 . _ -, begins with a letter or digit and is no name that Windows keeps for a
    /// device; fps is 25 or empty.
    #[arg(long, value_name = "FILE")]
    pub csv: PathBuf,
    /// Folder that the table's paths start in and do not leave. Default: the table's own.
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Folder for the videos and summary.csv; made if missing.
    #[arg(long, value_name = "DIR", default_value = "videos")]
    pub out: PathBuf,
    /// Have this server make the videos; the flags on models, device and tier are then its own affair. Default: this
    /// process makes them, and keeps its work in progress in `.batch` in the folder of the videos.
    #[arg(long, value_name = "URL")]
    pub server: Option<String>,
    /// Rows in work at the same time, 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = value_parser!(u8).range(1..=64))]
    pub at_once: u8,
    #[allow(missing_docs)] // A doc comment would replace the description of the command in --help.
    #[command(flatten)]
    pub settings: SettingFlags,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub order: OrderFlags,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub local: LocalFlags,
    /// Print one JSON object a line on standard output: events with their videoid, a line for each row that ends, and
    /// last the counts or the failure.
    #[arg(long)]
    pub json: bool,
    /// Print nothing but errors; with --json, nothing but the last line.
    #[arg(long)]
    pub quiet: bool,
    /// What to log to standard error: a level, or levels by module as in `warn,gateway=debug`.
    #[arg(long, env = "AVATAR_LOG", value_name = "FILTER", default_value = "error")]
    pub log: String,
}
