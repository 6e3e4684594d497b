//! Holds the product against reference cases.

use std::{path::PathBuf, process::ExitCode};

use candle_core::DType;
use clap::Parser;
use e2e::parity::{self, Drift, Report};

/// Runs reference cases through the product's own functions and compares every output tensor.
///
/// Exits 0 only if every case was run and every tensor is within the case's own tolerance.
#[derive(Parser)]
#[command(name = "parity", version)]
struct Arguments {
    /// A case, or a folder of cases.
    dir: PathBuf,
    /// One JSON object per case instead of text.
    #[arg(long)]
    json: bool,
    /// Type that the networks compute in. The cases' tolerances are for f32; other types show their drift.
    #[arg(long, value_enum, default_value = "f32")]
    compute: Compute,
    /// Print how far the networks drift in bf16 and f16, as the rows of `docs/benchmarks/precision.md`, and compare
    /// nothing.
    #[arg(long, conflicts_with_all = ["json", "compute"])]
    drift: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Compute {
    F32,
    Bf16,
    F16,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let cases = match parity::find(&arguments.dir) {
        Ok(cases) => cases,
        Err(error) => {
            eprintln!("error: {error:#}");
            return ExitCode::from(2);
        }
    };
    if arguments.drift {
        return match Drift::measure(&cases) {
            Ok(rows) => {
                rows.iter().for_each(|row| println!("{row}"));
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("error: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let compute = match arguments.compute {
        Compute::F32 => DType::F32,
        Compute::Bf16 => DType::BF16,
        Compute::F16 => DType::F16,
    };
    let mut held = 0;
    for case in &cases {
        let report = parity::run_in(case, compute);
        held += usize::from(report.holds());
        if arguments.json {
            println!("{}", serde_json::to_string(&report).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}")));
        } else {
            print_text(&report);
        }
    }
    if !arguments.json {
        println!("{held} of {} cases hold", cases.len());
    }
    ExitCode::from(u8::from(held != cases.len()))
}

fn print_text(report: &Report) {
    let verdict = if report.holds() { "holds" } else { "FAILS" };
    println!("{} ({}): {verdict}", report.case, report.kind.unwrap_or("unknown kind"));
    if let Some(error) = &report.error {
        println!("  error: {error}");
    }
    for row in &report.tensors {
        let mark = if row.holds { "ok  " } else { "FAIL" };
        if let Some(reason) = &row.reason {
            println!("  {mark} {:<34} {reason}", row.tensor);
            continue;
        }
        println!(
            "  {mark} {:<34} rel {:.2e}  abs {:.2e}  at {:?}  (tolerance {:.0e})",
            row.tensor, row.relative, row.absolute, row.at, row.tolerance
        );
        if !row.holds {
            for (index, got, want) in &row.pairs {
                println!("         {index:?}: got {got:e}, reference {want:e}");
            }
        }
    }
}
