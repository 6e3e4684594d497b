//! Measures what the demo's model makes.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Parser;
use e2e::quality::{self, Make};

/// Measures whether the mouth follows the voice, and whether the rest of the picture stays: prints a row for each clip of
/// a folder, and the medians.
///
/// With --models, videos that are missing are made first: of each clip with its own speech, and with that of other
/// clips.
#[derive(Parser)]
#[command(name = "quality", version)]
struct Arguments {
    /// Folder of the clips: NN.png, NN.wav, NN.json, NN.still.png.
    clips: PathBuf,
    /// Folder of the videos: NN-own.mp4, and with the speech of another clip NN-MM.mp4.
    #[arg(long, value_name = "DIR")]
    videos: PathBuf,
    /// Makes missing videos with the models in this folder.
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    /// The program that makes them [default: the one beside this program].
    #[arg(long, value_name = "FILE", requires = "models")]
    avatar: Option<PathBuf>,
    /// The first so many clips [default: all].
    #[arg(long, value_name = "N")]
    count: Option<usize>,
    /// Other clips whose speech each clip gets too.
    #[arg(long, default_value_t = 1, requires = "models")]
    others: usize,
    /// Frames of a window, at whose borders seams are looked for.
    #[arg(long, default_value_t = 129)]
    window: usize,
    /// One JSON object instead of a table.
    #[arg(long)]
    json: bool,
    /// More flags of `avatar generate`.
    #[arg(last = true, requires = "models")]
    flags: Vec<String>,
}

fn main() -> Result<()> {
    let Arguments { clips, videos, models, avatar, count, others, window, json, flags } = Arguments::parse();
    let mut names = quality::clips(&clips)?;
    names.truncate(count.unwrap_or(usize::MAX));
    if let Some(models) = models {
        let avatar = match avatar {
            Some(avatar) => avatar,
            None => std::env::current_exe().context("where this program is")?.with_file_name("avatar"),
        };
        quality::make(&Make { avatar, models, flags, others }, &clips, &names, &videos)?;
    }
    let rows = quality::measure(&clips, &names, &videos, window)?;
    match json {
        true => println!("{}", quality::json(&rows)),
        false => print!("{}", quality::table(&rows)),
    }
    Ok(())
}
