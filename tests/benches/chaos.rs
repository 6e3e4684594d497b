//! The chaos tests for longer, with tables of what was done for docs/benchmarks/reliability.md: `make chaos ROUNDS=200`.

#[path = "../tests/e2e/chaos/calls.rs"]
mod calls;
#[path = "../tests/e2e/chaos/cancels.rs"]
mod cancels;
#[path = "../tests/e2e/chaos/replicas.rs"]
mod replicas;
#[path = "../tests/e2e/chaos/rounds.rs"]
mod rounds;
// The whole-system tests use the rest of these.
#[allow(dead_code)]
#[path = "../tests/e2e/inputs.rs"]
mod inputs;
#[allow(dead_code)]
#[path = "../tests/e2e/stack.rs"]
mod stack;

use std::time::Duration;

use clap::Parser;

use rounds::Plan;

/// How long a gateway stands still, and the lease that it loses meanwhile: that of the default settings.
const PAUSE: Duration = Duration::from_secs(60);
const LEASE: Duration = Duration::from_secs(15);

/// Kills processes and cancels generations at random moments, and holds what comes out against undisturbed runs.
#[derive(Parser)]
struct Arguments {
    /// Kills, on each of the two databases, and cancels.
    #[arg(long, default_value_t = 200)]
    rounds: usize,
    /// Another seed hits other processes at other moments.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What `cargo bench` says to every program that it starts.
    #[arg(long, hide = true)]
    bench: bool,
}

#[tokio::main]
async fn main() {
    let Arguments { rounds, seed, bench: _ } = Arguments::parse();
    for on_postgresql in [false, true] {
        println!("{}\n", rounds::run(Plan { rounds, seed, on_postgresql }).await);
    }
    println!("{}\n", cancels::run(rounds, None, seed).await);
    println!("{}", replicas::run(LEASE, PAUSE).await);
}
