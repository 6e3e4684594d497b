//! Names and shapes that a checkpoint has, and the sizes that they say.

use std::collections::BTreeMap;

/// Blocks of one kind past which names are not counted: far more than any network has.
pub(super) const MOST_BLOCKS: usize = 512;
/// Longest side that sizes are read from, so that their products stay numbers.
const LONGEST_SIDE: usize = 1 << 24;

/// A tensor without which a network's sizes cannot be told, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// Its name.
    pub name: String,
    /// In words.
    pub reason: String,
}

/// Names and shapes that a checkpoint has.
#[derive(Debug, Clone, Default)]
pub struct Shapes(BTreeMap<String, Vec<usize>>);

impl FromIterator<(String, Vec<usize>)> for Shapes {
    fn from_iter<I: IntoIterator<Item = (String, Vec<usize>)>>(tensors: I) -> Self {
        Self(tensors.into_iter().collect())
    }
}

impl Shapes {
    /// Name and shape of every tensor, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.0.iter().map(|(name, shape)| (name.as_str(), shape.as_slice()))
    }

    /// The tensor's shape, if it is there.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[usize]> {
        self.0.get(name).map(Vec::as_slice)
    }

    /// One side of a tensor.
    pub(super) fn side(&self, name: &str, side: usize) -> Result<usize, Missing> {
        let fault = |reason: String| Missing { name: name.to_owned(), reason };
        let shape = self.0.get(name).ok_or_else(|| fault("it is missing".to_owned()))?;
        match shape.get(side) {
            Some(&length) if (1..=LONGEST_SIDE).contains(&length) => Ok(length),
            _ => Err(fault(format!("shape {shape:?}, whose side {side} says nothing"))),
        }
    }

    /// As [`side`](Self::side), where another size stands for a network that does not have the tensor.
    pub(super) fn side_or(&self, name: &str, side: usize, other: usize) -> Result<usize, Missing> {
        if self.0.contains_key(name) { self.side(name, side) } else { Ok(other) }
    }

    /// Blocks that a network has, which its config may say.
    pub(super) fn depth(&self, prefix: &str, said: Option<usize>) -> Result<usize, Missing> {
        match said {
            Some(depth) if depth > MOST_BLOCKS => {
                let reason = format!("the config says {depth} blocks, the limit is {MOST_BLOCKS}");
                Err(Missing { name: prefix.to_owned(), reason })
            }
            Some(depth) => Ok(depth),
            None => Ok(self.blocks(prefix)),
        }
    }

    /// Blocks `prefix.0.`, `prefix.1.` and so on, up to the last that has any tensor.
    pub(super) fn blocks(&self, prefix: &str) -> usize {
        let start = format!("{prefix}.");
        let number = |name: &str| name.strip_prefix(&start)?.split('.').next()?.parse::<usize>().ok();
        let of_prefix = self.0.range(start.clone()..).take_while(|(name, _)| name.starts_with(&start));
        of_prefix.filter_map(|(name, _)| number(name)).filter(|&n| n < MOST_BLOCKS).map(|n| n + 1).max().unwrap_or(0)
    }
}
