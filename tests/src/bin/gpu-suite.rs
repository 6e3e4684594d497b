//! The GPU suite, as `gpu-pack/run` starts it.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Result;
use clap::Parser;
use e2e::gpu::{self, Outcome, Setup};

/// Asks a card what can only be known on one, prints a table and writes JSON.
///
/// Without a card, the reference cases are held on the processor and the rest is counted as skipped. Exits 0 only if
/// nothing that was asked fails.
#[derive(Parser)]
#[command(name = "gpu-suite", version)]
struct Arguments {
    /// Folder of the reference cases.
    #[arg(long, value_name = "DIR")]
    cases: PathBuf,
    /// Times of PyTorch for the same, as `gpu_pytorch.py` prints them.
    #[arg(long, value_name = "FILE")]
    pytorch: Option<PathBuf>,
    /// The product's binary, for a whole generation; it needs ffmpeg.
    #[arg(long, value_name = "FILE")]
    avatar: Option<PathBuf>,
    /// Where the results go.
    #[arg(long, value_name = "FILE")]
    json: PathBuf,
    /// No question is begun after so many seconds.
    #[arg(long, default_value_t = 480)]
    limit: u64,
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
    let Arguments { cases, pytorch, avatar, json, limit } = arguments;
    let setup = Setup {
        cases: cases.clone(),
        pytorch: pytorch.clone(),
        avatar: avatar.clone(),
        limit: Duration::from_secs(*limit),
    };
    let results = gpu::run(&setup, &mut |row| {
        if row.outcome != Outcome::Skipped {
            eprintln!("{}: {}: {:?}", row.part, row.name, row.outcome);
        }
    })?;
    std::fs::write(json, serde_json::to_vec_pretty(&results)?)?;
    print!("{}", results.table());
    Ok(results.count(Outcome::Fails) == 0)
}
