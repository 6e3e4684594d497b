//! Generates with the full-width model within budgets of memory, and prints predicted and measured peaks.

use std::path::PathBuf;

use clap::Parser;
use e2e::proof::{Options, document};

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
}

fn main() -> anyhow::Result<()> {
    let Arguments { full_size, models, mut budgets, steps } = Arguments::parse();
    if budgets.is_empty() {
        budgets = if full_size { vec![4] } else { vec![4, 6, 8, 12] };
    }
    let folder = if full_size { "target/proof-full" } else { "target/proof-reduced" };
    let depths = (!full_size).then_some([2, 4, 4]);
    let options = Options { models: models.unwrap_or_else(|| folder.into()), depths, budgets, steps };
    print!("{}", document(&options)?);
    Ok(())
}
