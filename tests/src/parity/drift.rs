//! How far the networks drift from their f32 references when they compute in 16 bits, and the table of it.
//!
//! Drift is the root mean square of the differences over that of the reference. The largest difference of a tensor
//! hangs on one rounding; this one is nearly the same on every machine.

use std::{fmt, path::PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::DType;

use super::{Report, run_in};

/// What drifts less was computed in f32: that is a thousand times nearer, and half precision rounds to 1 of 2048.
const LEAST: f64 = 1e-5;

/// One output tensor of one case.
#[derive(Debug, Clone, PartialEq)]
pub struct Drift {
    /// What the case exercises.
    pub kind: String,
    /// The case.
    pub case: String,
    /// The tensor.
    pub tensor: String,
    /// Its drift in bf16.
    pub bf16: f64,
    /// Its drift in f16.
    pub f16: f64,
}

impl Drift {
    /// Runs the cases in both types. Rows are the results of what computes in them, not the tensors within networks.
    ///
    /// Errors: a case cannot be run.
    pub fn measure(cases: &[PathBuf]) -> Result<Vec<Self>> {
        let mut rows = Vec::new();
        for case in cases {
            let [bf16, f16] = [DType::BF16, DType::F16].map(|compute| run_in(case, compute));
            if let Some(error) = bf16.error.as_ref().or(f16.error.as_ref()) {
                bail!("{}: {error}", bf16.case);
            }
            rows.extend(Self::of(&bf16, &f16)?);
        }
        Ok(rows)
    }

    fn of(bf16: &Report, f16: &Report) -> Result<Vec<Self>> {
        let results = bf16.tensors.iter().zip(&f16.tensors).filter(|(row, _)| !row.tensor.starts_with("tap."));
        let mut rows = Vec::new();
        for (bf16_row, f16_row) in results {
            if let Some(reason) = &bf16_row.reason {
                bail!("{}: {}: {reason}", bf16.case, bf16_row.tensor);
            }
            // Written so that what is no number is a row too.
            if bf16_row.drift <= LEAST && f16_row.drift <= LEAST {
                continue;
            }
            rows.push(Self {
                kind: bf16.kind.context("the case's kind is unknown")?.to_owned(),
                case: bf16.case.clone(),
                tensor: bf16_row.tensor.clone(),
                bf16: bf16_row.drift,
                f16: f16_row.drift,
            });
        }
        Ok(rows)
    }

    /// The rows of the tables of a text in Markdown.
    ///
    /// Errors: a row whose drifts are no numbers.
    pub fn read(markdown: &str) -> Result<Vec<Self>> {
        let cells = |line: &str| -> Vec<String> {
            line.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`').to_owned()).collect()
        };
        let rows = markdown.lines().filter(|line| line.starts_with('|')).map(cells);
        // The head and the line below it.
        rows.filter(|cells| cells[0] != "kind" && !cells[0].starts_with('-'))
            .map(|cells| match <[String; 5]>::try_from(cells) {
                Ok([kind, case, tensor, bf16, f16]) => {
                    let number = |text: &str| text.parse().with_context(|| format!("{case}: {tensor}: {text:?}"));
                    Ok(Self { bf16: number(&bf16)?, f16: number(&f16)?, kind, case, tensor })
                }
                Err(cells) => bail!("not five cells: {cells:?}"),
            })
            .collect()
    }
}

impl fmt::Display for Drift {
    /// A row of the table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, case, tensor, bf16, f16 } = self;
        write!(f, "| {kind} | `{case}` | `{tensor}` | {bf16:.1e} | {f16:.1e} |")
    }
}
