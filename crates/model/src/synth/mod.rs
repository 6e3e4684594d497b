//! A complete checkpoint with random weights: every network and every block kind, in the native layout.
//!
//! It makes noise, not faces. It exists so that the whole system runs, and is tested and measured, without the
//! published weights. The bytes depend on the seed alone: values come from a counter-based generator and from
//! operations that IEEE 754 rounds exactly, so every machine writes the same files.

mod sizes;
#[cfg(test)]
mod tests;
mod tokenizer;
mod values;

use std::{collections::BTreeMap, path::Path};

use serde::Serialize;

pub use self::sizes::{Depth, Size};
use crate::{
    Error, Result,
    blueprint::{Network, Spec},
    checkpoint::Stage,
    convert::{
        Converted, Meter, Progress, Storage, stored_bytes,
        stream::{self, Job, Rows as _},
    },
    weights::Encoding,
};
use values::{Random, Values};

/// What is written.
#[derive(Debug, Clone)]
pub struct Options {
    /// How large the networks are.
    pub size: Size,
    /// What transformer and text encoders are stored in; the audio encoder and the VAE are f32.
    pub storage: Storage,
    /// Which stages are written.
    pub stages: Vec<Stage>,
    /// Decides all values.
    pub seed: u64,
}

/// Writes the small checkpoint's five stage folders into `out`, about 13 MB in all, in the published precisions:
/// bf16 for the transformer and the text encoders, f32 for the audio encoder and the VAE.
///
/// Errors: as [`write()`].
pub fn tiny(out: &Path, seed: u64) -> Result<()> {
    let options = Options { size: Size::Tiny, storage: Storage::Bf16, stages: Stage::ALL.to_vec(), seed };
    write(&options, out, &mut |_| ()).map(drop)
}

/// Writes a checkpoint's stage folders into `out`.
///
/// `out` is made if it is missing; files of the same name are replaced. Values are made as they are written, some
/// rows at a time, so memory does not grow with the networks.
///
/// Errors: a folder or file cannot be written.
pub fn write(
    options: &Options,
    out: &Path,
    tell: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<(Stage, Vec<Converted>)>> {
    let values = Values::new(options.seed);
    let plans: Vec<_> = options.stages.iter().map(|stage| (*stage, options.size.stage(*stage))).collect();
    let tensors = plans.iter().flat_map(|(_, (sheets, _))| sheets).map(|sheet| sheet.tensors.len()).sum();
    let mut meter = Meter::new((tensors, bytes(options)), tell);
    let mut results = Vec::with_capacity(plans.len());
    for (stage, (sheets, config)) in &plans {
        meter.stage = stage.name();
        let folder = out.join(stage.name());
        let mut written = Vec::with_capacity(sheets.len());
        for sheet in sheets {
            let below = sheet.network.folder();
            let folder = folder.join(below);
            std::fs::create_dir_all(&folder).map_err(|e| Error::file(&folder, e))?;
            let values = values.part(stage.name());
            let values = if below.is_empty() { values } else { values.part(below) };
            let mut jobs: Vec<Job<Random>> = sheet
                .tensors
                .iter()
                .map(|spec| Job {
                    name: spec.name.clone(),
                    shape: spec.shape.clone(),
                    encoding: encoding(options.storage, sheet.network, spec),
                    rows: Random::new(values, spec),
                })
                .collect();
            jobs.sort_by(|a, b| a.name.cmp(&b.name));
            let form = options.storage.form(sheet.network);
            stream::write(form, &folder.join(form.file_name()), &jobs, &mut |name, n| meter.add(name, n))?;
            if let Some(tokenizer) = &sheet.tokenizer {
                write_json(&folder.join("tokenizer.json"), tokenizer)?;
            }
            written.push(account(sheet.network, &jobs));
        }
        write_json(&folder.join("config.json"), config)?;
        results.push((*stage, written));
    }
    Ok(results)
}

/// Bytes of the tensors that [`write()`] writes; headers, configs and tokenizers come on top.
#[must_use]
pub fn bytes(options: &Options) -> u64 {
    let sheets = options.stages.iter().flat_map(|stage| options.size.stage(*stage).0);
    let of_sheet = |sheet: sizes::Sheet| {
        let of_spec = |spec: &Spec| stored_bytes(encoding(options.storage, sheet.network, spec), &spec.shape);
        sheet.tensors.iter().map(of_spec).sum::<u64>()
    };
    sheets.map(of_sheet).sum()
}

/// All values of one tensor, as a checkpoint of that seed would have them before they are rounded to its precision.
#[must_use]
pub fn values_of(spec: &Spec, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; spec.parameters()];
    let random = Random::new(Values::new(seed), spec);
    let (rows, _) = random.sides();
    random.fill(0..rows, &mut values);
    values
}

fn encoding(storage: Storage, network: Network, spec: &Spec) -> Encoding {
    match network {
        Network::Whisper | Network::VaeEncoder | Network::VaeDecoder => Encoding::F32,
        _ => storage.target(network, &spec.name, &spec.shape, Encoding::Bf16).encoding,
    }
}

fn account(network: Network, jobs: &[Job<Random>]) -> Converted {
    let mut encodings: BTreeMap<&'static str, usize> = BTreeMap::new();
    let (mut parameters, mut bytes) = (0, 0);
    for job in jobs {
        *encodings.entry(job.encoding.name()).or_default() += 1;
        parameters += job.shape.iter().product::<usize>() as u64;
        bytes += stored_bytes(job.encoding, &job.shape);
    }
    Converted {
        network,
        tensors: jobs.len(),
        parameters,
        bytes_before: 0,
        bytes,
        encodings,
        fallbacks: Vec::new(),
        left_out: Vec::new(),
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| Error::file(path, e))?;
    text.push(b'\n');
    std::fs::write(path, text).map_err(|e| Error::file(path, e))
}
