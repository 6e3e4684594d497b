//! A checkpoint in one form to the same checkpoint in another.
//!
//! Tensors go from mapped file to file some rows at a time, on all threads, so that no network is ever in memory.

mod safetensors;
mod source;
mod storage;
pub(crate) mod stream;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

pub use self::{
    source::{Part, Source},
    storage::{Form, Storage, Target},
};
use crate::{Error, Result, blueprint::Network, checkpoint::Stage, inspect, weights::Encoding};
use stream::Job;

/// What became of one network.
#[derive(Debug, Clone)]
pub struct Converted {
    /// Which.
    pub network: Network,
    /// Tensors written.
    pub tensors: usize,
    /// Their values.
    pub parameters: u64,
    /// Their bytes before.
    pub bytes_before: u64,
    /// Their bytes now, with scales.
    pub bytes: u64,
    /// How many are stored in each encoding.
    pub encodings: BTreeMap<&'static str, usize>,
    /// Tensors in another encoding than asked for, whose rows do not fit that: name and encoding.
    pub fallbacks: Vec<(String, &'static str)>,
    /// Tensors of the source that the network does not read.
    pub left_out: Vec<String>,
}

/// How far a conversion is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// The stage.
    pub stage: &'a str,
    /// The tensor of which a piece has been converted.
    pub tensor: &'a str,
    /// Tensors begun, this one too, of all stages.
    pub tensors: usize,
    /// Tensors of all stages.
    pub tensors_total: usize,
    /// Bytes made, of all stages.
    pub bytes: u64,
    /// Bytes of all stages when they are done.
    pub bytes_total: u64,
}

/// Bytes of a tensor with what stands beside it.
#[must_use]
pub fn stored_bytes(encoding: Encoding, shape: &[usize]) -> u64 {
    let values = shape.iter().fold(1usize, |product, side| product.saturating_mul(*side));
    let scales = match encoding {
        Encoding::F8E4M3 => 4,
        Encoding::I8 => 4 * shape.first().copied().unwrap_or(1) as u64,
        _ => 0,
    };
    encoding.bytes(values).unwrap_or(usize::MAX) as u64 + scales
}

/// Counts pieces for the caller, over all stages.
pub(crate) struct Meter<'a> {
    pub(crate) stage: &'a str,
    last: String,
    now: (usize, u64),
    total: (usize, u64),
    tell: &'a mut dyn FnMut(Progress<'_>),
}

impl<'a> Meter<'a> {
    pub(crate) fn new(total: (usize, u64), tell: &'a mut dyn FnMut(Progress<'_>)) -> Self {
        Self { stage: "", last: String::new(), now: (0, 0), total, tell }
    }

    pub(crate) fn add(&mut self, tensor: &str, bytes: u64) {
        if self.last != tensor {
            self.last = tensor.to_owned();
            self.now.0 += 1;
        }
        self.now.1 += bytes;
        (self.tell)(Progress {
            stage: self.stage,
            tensor,
            tensors: self.now.0,
            tensors_total: self.total.0,
            bytes: self.now.1,
            bytes_total: self.total.1,
        });
    }
}

/// Converts stages into `out`, one folder for each, in the native layout.
///
/// `out` is there and empty. What the networks do not read is left out and named in the result.
///
/// Errors: a checkpoint that is not complete, or has tensors that no network has; a value
/// that is not finite, or that the new precision cannot hold; a file that cannot be written.
pub fn stages(
    sources: &[Source],
    storage: Storage,
    out: &Path,
    tell: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<(Stage, Vec<Converted>)>> {
    let plans = plans(sources, storage)?;
    let all = plans.iter().flatten();
    let total = all.fold((0, 0), |(n, bytes), plan| (n + plan.result.tensors, bytes + plan.result.bytes));
    let mut meter = Meter::new(total, tell);
    let mut results = Vec::with_capacity(sources.len());
    for (source, plans) in sources.iter().zip(plans) {
        meter.stage = source.stage.name();
        let folder = out.join(source.stage.name());
        std::fs::create_dir_all(&folder).map_err(|e| Error::file(&folder, e))?;
        let mut converted = Vec::with_capacity(plans.len());
        for plan in plans {
            converted.push(plan.write(&folder, &mut meter)?);
        }
        source.write_rest(&folder)?;
        results.push((source.stage, converted));
    }
    Ok(results)
}

/// Bytes of the tensors that [`stages`] would write; headers, configs and tokenizers come on top.
///
/// Errors: a checkpoint that is not complete, or has tensors that no network has.
pub fn bytes(sources: &[Source], storage: Storage) -> Result<u64> {
    Ok(plans(sources, storage)?.iter().flatten().map(|plan| plan.result.bytes).fold(0, u64::saturating_add))
}

fn plans(sources: &[Source], storage: Storage) -> Result<Vec<Vec<Plan<'_>>>> {
    sources.iter().map(|source| source.parts.iter().map(|part| Plan::new(part, storage)).collect()).collect()
}

/// What is to be done with one network.
struct Plan<'a> {
    part: &'a Part,
    form: Form,
    jobs: Vec<Job<crate::weights::Raw<'a>>>,
    result: Converted,
}

impl<'a> Plan<'a> {
    fn new(part: &'a Part, storage: Storage) -> Result<Self> {
        let network = part.config.network();
        let faults = inspect::structure(part);
        if let Some(first) = faults.first() {
            let more = match faults.len() - 1 {
                0 => String::new(),
                more => format!(" (and {more} more faults; `avatar weights verify` lists them)"),
            };
            let reason = format!("{}{more}", first.reason);
            return Err(match &first.tensor {
                Some(tensor) => {
                    Error::Tensor { tensor: tensor.clone(), file: first.file.display().to_string(), reason }
                }
                None => Error::file(&first.file, reason),
            });
        }
        let expected = part.expected()?;
        let names: BTreeSet<&str> = expected.iter().map(|spec| spec.name.as_str()).collect();
        let listed = part.weights.list();
        let mut result = Converted {
            network,
            tensors: expected.len(),
            parameters: 0,
            bytes_before: 0,
            bytes: 0,
            encodings: BTreeMap::new(),
            fallbacks: Vec::new(),
            left_out: listed.iter().map(|t| t.name.clone()).filter(|n| !names.contains(n.as_str())).collect(),
        };
        let mut jobs = Vec::with_capacity(expected.len());
        for spec in &expected {
            let raw = part.weights.raw(&spec.name)?;
            let target = storage.target(network, &spec.name, &spec.shape, raw.encoding());
            if target.fallback {
                result.fallbacks.push((spec.name.clone(), target.encoding.name()));
            }
            result.parameters += spec.parameters() as u64;
            result.bytes_before += stored_bytes(raw.encoding(), &spec.shape);
            result.bytes += stored_bytes(target.encoding, &spec.shape);
            *result.encodings.entry(target.encoding.name()).or_default() += 1;
            let (name, shape) = (spec.name.clone(), spec.shape.clone());
            jobs.push(Job { name, shape, encoding: target.encoding, rows: raw });
        }
        jobs.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { part, form: storage.form(network), jobs, result })
    }

    fn write(self, stage: &Path, meter: &mut Meter<'_>) -> Result<Converted> {
        let folder = stage.join(self.part.config.network().folder());
        std::fs::create_dir_all(&folder).map_err(|e| Error::file(&folder, e))?;
        stream::write(self.form, &folder.join(self.form.file_name()), &self.jobs, &mut |name, n| meter.add(name, n))?;
        Ok(self.result)
    }
}

impl Form {
    /// The name of a network's only file.
    #[must_use]
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Safetensors => "model.safetensors",
            Self::Gguf => "model.gguf",
        }
    }
}

impl Part {
    /// The tensors that the network reads.
    pub(crate) fn expected(&self) -> Result<Vec<crate::blueprint::Spec>> {
        let shapes = self.weights.list().into_iter().map(|t| (t.name, t.shape)).collect();
        self.config.expected(&shapes).map_err(|missing| {
            let file = self.place.display().to_string();
            Error::Tensor { tensor: missing.name, file, reason: missing.reason }
        })
    }
}
