//! Runs reference cases through the product's own functions and compares every output tensor.
//!
//! A case is a folder with `config.json`, `inputs.safetensors` (unless it has none), `outputs.safetensors` and mostly
//! `weights.safetensors` (or `weights_from` in the config, naming a sibling folder). What a case exercises is read
//! from its tensors' names; widths, shapes, seeds and depths from its config and tensors. Nothing knows a case by name.

mod case;
mod compare;
mod drift;
mod kinds;
mod loop_kind;
mod media_kinds;
mod network_kinds;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use serde::Serialize;

pub use case::Case;
pub use compare::{Comparison, Outputs};
pub use drift::Drift;

/// What came of one case.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The case's folder name.
    pub case: String,
    /// What it exercises; absent when nothing here knows it.
    pub kind: Option<&'static str>,
    /// One row for every output tensor of the case.
    pub tensors: Vec<Comparison>,
    /// Why the case could not be run, if it could not.
    pub error: Option<String>,
}

impl Report {
    /// Whether the case was run, every output was compared, and every one holds.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.error.is_none() && !self.tensors.is_empty() && self.tensors.iter().all(|t| t.holds)
    }
}

/// The cases under `dir`: itself if it is one, else its subfolders that hold a `config.json`, by name.
///
/// Errors: there is none, or the folder cannot be read.
pub fn find(dir: &Path) -> Result<Vec<PathBuf>> {
    if dir.join("config.json").is_file() {
        return Ok(vec![dir.to_owned()]);
    }
    let listing = std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
    let mut cases: Vec<PathBuf> =
        listing.filter_map(|e| e.ok().map(|e| e.path())).filter(|p| p.join("config.json").is_file()).collect();
    cases.sort();
    if cases.is_empty() {
        bail!("{} holds no case: a case is a folder with config.json and outputs.safetensors", dir.display());
    }
    Ok(cases)
}

/// Whether a case runs a network, whose results another device could give. One that cannot be read is taken for one.
#[must_use]
pub fn has_network(dir: &Path) -> bool {
    let case = Case::open(dir, DType::F32);
    case.and_then(|case| Ok(kinds::of(&case)?.network)).unwrap_or(true)
}

/// Runs one case; its networks compute in f32, as the case's tolerance asks.
#[must_use]
pub fn run(dir: &Path) -> Report {
    run_in(dir, DType::F32)
}

/// Runs one case with networks that compute in another type, to see how far they drift.
#[must_use]
pub fn run_in(dir: &Path, compute: DType) -> Report {
    run_on(dir, compute, &Device::Cpu)
}

/// As [`run_in`], on another device than the processor.
#[must_use]
pub fn run_on(dir: &Path, compute: DType, device: &Device) -> Report {
    let name = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let mut report = Report { case: name, kind: None, tensors: Vec::new(), error: None };
    let outcome = Case::open_on(dir, compute, device).and_then(|case| {
        let kind = kinds::of(&case)?;
        report.kind = Some(kind.name);
        let mut outputs = Outputs::new(&case);
        (kind.run)(&case, &mut outputs)?;
        Ok(outputs.finish())
    });
    match outcome {
        Ok(rows) => report.tensors = rows,
        Err(error) => report.error = Some(format!("{error:#}")),
    }
    report
}
