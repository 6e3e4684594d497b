//! Finds the state dict among what a pickle holds.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
};

use super::{
    Archive, Fault, shown,
    tensor::Records,
    value::{Object, Value},
};
use crate::{Error, Result, weights::stored::Found};

/// Keys that trainers wrap a state dict in.
const WRAPPERS: [&str; 2] = ["module", "state_dict"];
const MOST_WRAPPERS: usize = 4;
const MOST_TENSORS: usize = 1 << 15;
const LONGEST_NAME: usize = 512;

type Dict<'a> = [(Value<'a>, Value<'a>)];

/// The tensors and numbers of the state dict that `root` is or wraps.
///
/// Errors: it is none, tensors stand elsewhere too, or one cannot be read.
pub fn archive<'a>(path: &Path, records: &Records<'a>, root: Value<'a>) -> Result<Archive> {
    let mut search = Search { records, barren: vec![false; records.heap.len()] };
    let dict = search.state_dict(root).map_err(|reason| Error::file(path, reason))?;
    let (mut tensors, mut numbers, mut names) = (Vec::new(), BTreeMap::new(), HashSet::new());
    for &(key, value) in dict {
        let tensor = match records.object(value) {
            Some(Object::Tensor { arguments, typed }) => Some((*arguments, *typed)),
            _ => None,
        };
        let number = match value {
            Value::Int(number) => Some(number as f64),
            Value::Float(number) => Some(number),
            _ => None,
        };
        if tensor.is_none() && number.is_none() {
            if search.bears(value) {
                let reason = format!("entry {} holds tensors, but is none itself", named(key));
                return Err(Error::file(path, reason));
            }
            continue;
        }
        let Value::Text(name) = key else {
            if tensor.is_some() {
                return Err(Error::file(path, "a tensor's name is not text"));
            }
            continue;
        };
        if name.len() > LONGEST_NAME {
            let reason = format!("name {} has {} bytes, the limit is {LONGEST_NAME}", shown(name), name.len());
            return Err(Error::file(path, reason));
        }
        let fault = |reason| Error::Tensor { tensor: name.to_owned(), file: path.display().to_string(), reason };
        if !names.insert(name) {
            return Err(fault("it is there twice".to_owned()));
        }
        if names.len() > MOST_TENSORS {
            return Err(Error::file(path, format!("more than {MOST_TENSORS} tensors")));
        }
        if let Some((arguments, typed)) = tensor {
            let placed = records.place(arguments, typed).map_err(fault)?;
            let (encoding, shape, bytes) = (placed.encoding, placed.shape, placed.bytes);
            tensors.push(Found { name: name.to_owned(), encoding, shape, bytes });
        } else if let Some(number) = number {
            numbers.insert(name.to_owned(), number);
        }
    }
    Ok(Archive { tensors, numbers })
}

struct Search<'r, 'a> {
    records: &'r Records<'a>,
    /// Objects that are known to hold no tensor, so that each is looked at once, however often it is shared.
    barren: Vec<bool>,
}

impl<'r, 'a> Search<'r, 'a> {
    fn state_dict(&mut self, root: Value<'a>) -> Result<&'r Dict<'a>, Fault> {
        let mut dict = self.dict(root).ok_or("the pickle holds no dict of tensors")?;
        for _ in 0..=MOST_WRAPPERS {
            if dict.iter().any(|(_, value)| matches!(self.records.object(*value), Some(Object::Tensor { .. }))) {
                return Ok(dict);
            }
            match self.wrapped(dict)? {
                Some(inner) => dict = inner,
                None => return Ok(dict),
            }
        }
        Err(format!("the state dict is wrapped more than {MOST_WRAPPERS} times"))
    }

    /// The dict that `dict`, which has no tensors of its own, is wrapped around.
    fn wrapped(&mut self, dict: &'r Dict<'a>) -> Result<Option<&'r Dict<'a>>, Fault> {
        let is_wrapper = |key| matches!(key, Value::Text(key) if WRAPPERS.contains(&key));
        let mut bearing = Vec::new();
        for entry in dict {
            if self.bears(entry.1) {
                bearing.push(*entry);
            }
            if let [first, second] = bearing.as_slice() {
                let (first, second) = (named(first.0), named(second.0));
                return Err(format!("there are tensors under {first} and under {second}, expected one state dict"));
            }
        }
        if let [(key, value)] = bearing.as_slice() {
            let inner = self.dict(*value).filter(|_| is_wrapper(*key));
            return inner.map(Some).ok_or_else(|| {
                format!("the tensors are under {}, expected a dict under one of {WRAPPERS:?}", named(*key))
            });
        }
        let mut dicts = dict.iter().filter(|(key, _)| is_wrapper(*key)).filter_map(|(_, value)| self.dict(*value));
        match (dicts.next(), dicts.next()) {
            (inner, None) => Ok(inner),
            (_, Some(_)) => Err(format!("there is more than one dict under {WRAPPERS:?}")),
        }
    }

    fn dict(&self, value: Value<'a>) -> Option<&'r Dict<'a>> {
        match self.records.object(value) {
            Some(Object::Dict(dict)) => Some(dict),
            _ => None,
        }
    }

    /// Whether there is a tensor in it, at any depth.
    fn bears(&mut self, value: Value<'a>) -> bool {
        let (mut open, mut seen) = (vec![value], Vec::new());
        while let Some(value) = open.pop() {
            let Value::Object(index) = value else { continue };
            if std::mem::replace(&mut self.barren[index], true) {
                continue;
            }
            seen.push(index);
            match &self.records.heap[index] {
                Object::Tuple(items) | Object::List(items) => open.extend(items),
                Object::Dict(pairs) => open.extend(pairs.iter().flat_map(|(key, value)| [key, value])),
                Object::Storage(_) | Object::Tensor { .. } => {
                    for index in seen {
                        self.barren[index] = false;
                    }
                    return true;
                }
            }
        }
        false
    }
}

fn named(key: Value<'_>) -> String {
    match key {
        Value::Text(key) => format!("\"{}\"", shown(key)),
        _ => "a key that is not text".into(),
    }
}
