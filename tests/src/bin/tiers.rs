//! Prints `docs/benchmarks/tiers.md`.

fn main() -> anyhow::Result<()> {
    print!("{}", e2e::tiers::document()?);
    Ok(())
}
