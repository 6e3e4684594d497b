//! Generates with the full-width model within budgets of memory, and prints predicted and measured peaks.

use std::path::PathBuf;

use clap::Parser;
use e2e::proof::{Options, document, seconds};

/// Generates with random weights of the published widths, in q4_k, within budgets of a CPU's memory, and prints a row
/// for each: what was predicted, and what was counted. Fails where a peak passes its budget or is not the predicted one.
#[derive(Parser)]
#[command(name = "proof", version)]
struct Arguments {
    /// All blocks: about 16 GB on the disk and hours. Otherwise 2 double and 4 single blocks and 4 layers of the Llama,
    /// about 6 GB, with budgets in proportion.
    #[arg(long)]
    full_size: bool,
    /// Folder of the checkpoint, kept for the next time. Default: below `target`.
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    /// Budgets in GiB. Default: 4 at full size, else 4, 6, 8 and 12.
    #[arg(long, value_name = "GIB,..", value_delimiter = ',')]
    budgets: Vec<u64>,
    /// Denoise steps.
    #[arg(long, value_name = "N", default_value_t = 2)]
    steps: u32,
    /// Hold seconds against their prediction instead, with a tiny checkpoint at three sizes, so many rounds in turn. For
    /// a machine that does nothing else.
    #[arg(long, value_name = "ROUNDS", num_args = 0..=1, default_missing_value = "3", conflicts_with_all = ["full_size", "budgets", "steps"])]
    seconds: Option<usize>,
}

fn main() -> anyhow::Result<()> {
    let Arguments { full_size, models, mut budgets, steps, seconds: rounds } = Arguments::parse();
    if let Some(rounds) = rounds {
        print!("{}", seconds(&models.unwrap_or_else(|| "target/proof-tiny".into()), rounds)?);
        return Ok(());
    }
    if budgets.is_empty() {
        budgets = if full_size { vec![4] } else { vec![4, 6, 8, 12] };
    }
    let folder = if full_size { "target/proof-full" } else { "target/proof-reduced" };
    let depths = (!full_size).then_some([2, 4, 4]);
    let options = Options { models: models.unwrap_or_else(|| folder.into()), depths, budgets, steps };
    print!("{}", document(&options)?);
    Ok(())
}
