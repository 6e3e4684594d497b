//! What is wrong with a checkpoint: everything, not only what would be met first.

use std::{collections::BTreeMap, path::PathBuf};

use rayon::prelude::*;

use crate::{
    blueprint::Shapes,
    convert::Part,
    weights::{Encoding, Listed},
};

/// Something that is wrong with a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The tensor, where it is one's.
    pub tensor: Option<String>,
    /// The file, or the folder where no file is at fault.
    pub file: PathBuf,
    /// In words.
    pub reason: String,
}

/// Faults that the headers of a network's files show: tensors that are missing or that no network has, shapes that
/// do not fit the others, types that no network takes.
#[must_use]
pub fn structure(part: &Part) -> Vec<Fault> {
    let network = part.config.network();
    let listed: BTreeMap<String, Listed> = part.weights.list().into_iter().map(|t| (t.name.clone(), t)).collect();
    let shapes: Shapes = listed.values().map(|t| (t.name.clone(), t.shape.clone())).collect();
    let fault = |tensor: &str, reason: String| Fault {
        tensor: Some(tensor.to_owned()),
        file: listed.get(tensor).map_or_else(|| part.place.clone(), |t| t.file.clone()),
        reason,
    };
    let expected = match part.config.expected(&shapes) {
        Ok(expected) => expected,
        Err(missing) => return vec![fault(&missing.name, missing.reason)],
    };
    let mut faults = Vec::new();
    let mut unexpected: BTreeMap<&str, &Listed> = listed.iter().map(|(name, t)| (name.as_str(), t)).collect();
    for spec in &expected {
        match unexpected.remove(spec.name.as_str()) {
            None => faults.push(fault(&spec.name, format!("it is missing, expected shape {:?}", spec.shape))),
            Some(found) if found.shape != spec.shape => {
                faults.push(fault(&spec.name, format!("shape {:?}, expected {:?}", found.shape, spec.shape)));
            }
            Some(found) if matches!(found.encoding, Encoding::Other(_)) => {
                faults.push(fault(&spec.name, format!("type {}, which no network takes", found.encoding.name())));
            }
            Some(_) => {}
        }
    }
    let unknown = unexpected.keys().filter(|name| !network.may_skip(name));
    faults.extend(unknown.map(|name| fault(name, "the network has no such tensor".to_owned())));
    faults
}

/// Tensors of a network with a value that is not finite. All bytes are read; what cannot be read is left to
/// [`structure`].
#[must_use]
pub fn values(part: &Part) -> Vec<Fault> {
    let Ok(expected) = part.expected() else { return Vec::new() };
    let bad = |name: &str| {
        let raw = part.weights.raw(name).ok()?;
        let (rows, columns) = raw.sides();
        let step = (PANEL / columns).max(1);
        let starts: Vec<usize> = (0..rows).step_by(step).collect();
        let finite = starts.into_par_iter().all(|at| {
            let rows = at..(at + step).min(rows);
            let finite = raw.is_finite(rows.clone());
            raw.release(rows);
            finite
        });
        (!finite).then(|| Fault {
            tensor: Some(name.to_owned()),
            file: raw.file().to_owned(),
            reason: "it holds a value that is not finite".to_owned(),
        })
    };
    expected.iter().filter_map(|spec| bad(&spec.name)).collect()
}

/// Values that one thread looks at before their memory is let go.
const PANEL: usize = 1 << 22;
