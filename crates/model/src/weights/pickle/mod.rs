//! Checkpoints as `torch.save` writes them: a zip archive of a pickle and one record per storage of tensors.
//!
//! A pickle is a program, and unpickling an unknown one runs what its writer likes. Here it can say which tensors
//! are where and nothing more: the [`machine`] knows the few globals that a state dict takes and calls none.
//! Reading allocates in proportion to the pickle, which has a limit; the tensors stay in the file.

mod machine;
mod state;
mod tensor;
#[cfg(test)]
mod tests;
mod value;
mod zip;

use std::{collections::BTreeMap, path::Path};

use self::{tensor::Records, zip::Zip};
use crate::{Error, Result, weights::stored::Found};

pub use self::zip::is_zip;

/// Why a file is refused.
type Fault = String;

/// A checkpoint of a thousand tensors has about 200 KB of pickle.
const LONGEST_PICKLE: usize = 16 << 20;

/// What a pickle holds.
#[derive(Debug)]
pub struct Archive {
    /// Tensors of the state dict, in its order. Their bytes stay in the file.
    pub tensors: Vec<Found>,
    /// Plain numbers of the state dict, by name: a map of scales may hold Python's floats instead of tensors.
    pub numbers: BTreeMap<String, f64>,
}

/// Reads where the tensors of a checkpoint are. Dicts under `module` or `state_dict` are unwrapped; plain data
/// beside them is ignored.
///
/// - `path`: what errors name
/// - `file`: the whole file, usually mapped
///
/// Errors: it is no such archive or truncated, its records are compressed, its pickle names a global that no state
/// dict takes, or a tensor is not row-major or not within its record.
pub fn read(path: &Path, file: &[u8]) -> Result<Archive> {
    let fault = |reason| Error::file(path, reason);
    let (records, root) = open(file).map_err(fault)?;
    state::archive(path, &records, root)
}

fn open(file: &[u8]) -> Result<(Records<'_>, value::Value<'_>), Fault> {
    if !is_zip(file) {
        // PROTO, in the versions that PyTorch has written.
        let pickle = matches!(file, [0x80, 1..=5, ..]);
        return Err(if pickle {
            "a legacy pickle; save it again with torch.save of a current PyTorch, or as safetensors".into()
        } else {
            "it is not a zip archive, as torch.save writes them".into()
        });
    }
    let zip = Zip::open(file)?;
    let prefix = prefix(&zip)?;
    let record = |name| zip.record(&format!("{prefix}/{name}")).map(|range| &file[range]);
    if let Some(order) = record("byteorder").filter(|order| *order != b"little") {
        return Err(format!("byte order {}, expected little", shown(&String::from_utf8_lossy(order))));
    }
    let pickle = record("data.pkl").unwrap_or_default();
    if pickle.len() > LONGEST_PICKLE {
        return Err(format!("data.pkl has {} bytes, the limit is {LONGEST_PICKLE}", pickle.len()));
    }
    let (root, heap) = machine::run(pickle)?;
    Ok((Records { zip, heap, prefix }, root))
}

/// The folder that the archive's records are in; PyTorch names it after the file.
fn prefix<'a>(zip: &Zip<'a>) -> Result<&'a str, Fault> {
    let mut prefixes = zip.names().filter_map(|name| name.strip_suffix("/data.pkl"));
    match (prefixes.next(), prefixes.next()) {
        (Some(prefix), None) => Ok(prefix),
        (None, _) => Err("the zip archive has no record data.pkl in a folder".into()),
        (_, Some(_)) => Err("the zip archive has more than one data.pkl".into()),
    }
}

/// A name from a file as a message may bear it: short, and without control characters.
fn shown(name: &str) -> String {
    const LONGEST: usize = 120;
    let end = if name.chars().nth(LONGEST).is_some() { "..." } else { "" };
    name.chars().take(LONGEST).flat_map(char::escape_debug).chain(end.chars()).collect()
}
