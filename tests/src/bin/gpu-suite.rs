//! The GPU suite, as `gpu-pack/run` starts it.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use clap::Parser;
use e2e::gpu::{self, Outcome, Results, Setup};

/// Asks a card what can only be known on one, prints tables and writes JSON.
///
/// Without a card, the reference cases are held on the processor and the rest is counted as skipped. Exits 0 only if
/// nothing that was asked fails and no goal that was measured is missed.
#[derive(Parser)]
#[command(name = "gpu-suite", version)]
struct Arguments {
    /// Folder of the reference cases.
    #[arg(long, value_name = "DIR")]
    cases: PathBuf,
    /// Times and results of PyTorch for the same, as `gpu_pytorch.py` prints them.
    #[arg(long, value_name = "FILE")]
    pytorch: Option<PathBuf>,
    /// The product's binary, for a whole generation; it needs ffmpeg.
    #[arg(long, value_name = "FILE")]
    avatar: Option<PathBuf>,
    /// Where the results go, again after every question: what ends the suite leaves those that it had.
    #[arg(long, value_name = "FILE")]
    json: PathBuf,
    /// Seconds for all; what is not answered by then is stopped or not asked.
    #[arg(long, default_value_t = 520)]
    limit: u64,
    /// Draws the shapes that kernels are held on. Default: another one at each run, which the results say.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<bool> {
    let Arguments { cases, pytorch, avatar, json, limit, seed } = arguments;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let setup = Setup {
        cases: cases.clone(),
        pytorch: pytorch.clone(),
        avatar: avatar.clone(),
        limit: Duration::from_secs(*limit),
        seed: seed.unwrap_or(now.as_secs()),
    };
    let results = gpu::run(&setup, &mut |results| {
        if let Some(row) = results.rows.last().filter(|row| row.outcome != Outcome::Skipped || results.card.is_some()) {
            eprintln!("{}: {}: {:?}", row.part, row.name, row.outcome);
        }
        write(json, results)
    })?;
    write(json, &results)?;
    print!("{}", results.table());
    Ok(results.count(Outcome::Fails) == 0 && results.missed() == 0)
}

/// A reader sees the file as it was before or as it is after.
fn write(path: &Path, results: &Results) -> Result<()> {
    let part = path.with_extension("part");
    std::fs::write(&part, serde_json::to_vec_pretty(results)?).with_context(|| part.display().to_string())?;
    std::fs::rename(&part, path).with_context(|| path.display().to_string())
}
