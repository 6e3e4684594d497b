//! Tiers: named promises about memory.

mod limits;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize};

pub use self::limits::{Change, Excess, Limits, Wanted};
use crate::bytes::Bytes;

const DEFAULT: &str = include_str!("default.toml");
/// The tier that `--force-emergency` takes.
pub const EMERGENCY: &str = "emergency";
/// Most tiers, so that a file cannot make a table without end.
const MOST_TIERS: usize = 64;
/// Largest file that is read.
const MOST_BYTES: usize = 64 << 10;

/// One tier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Tier {
    /// Its name.
    pub name: String,
    /// Smallest nominal size in GB that it is for; nothing where it is chosen by name only.
    pub from_gb: Option<u64>,
    /// Largest one; nothing where there is no largest.
    pub to_gb: Option<u64>,
    /// What a request may ask for.
    #[serde(flatten)]
    pub limits: Limits,
}

/// The table of tiers, the smallest first; those that are chosen by name only come last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Tiers(Vec<Tier>);

/// What is wrong with a file of tiers: all of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct TiersError(pub Vec<String>);

/// A name that no tier has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is no tier; the tiers are {}", .known.join(", "))]
pub struct UnknownTier {
    /// The name.
    pub name: String,
    /// Those that there are.
    pub known: Vec<String>,
}

/// A tier as a file has it. Every key is taken as it comes, so that all mistakes can be told at once.
#[derive(Debug, Default, Deserialize)]
#[serde(transparent)]
struct Row(BTreeMap<String, toml::Value>);

/// Keys, and the values that they may have.
const KEYS: [(&str, u64, u64); 6] = [
    ("from_gb", 1, 1 << 20),
    ("to_gb", 1, 1 << 20),
    ("pixels", 64, 1280),
    ("frames", 1, 1024),
    ("audio_seconds", 1, 600),
    ("steps", 1, 200),
];

impl Default for Tiers {
    /// The seven tiers.
    fn default() -> Self {
        // The embedded file is held by a test.
        Self::read(&BTreeMap::new(), DEFAULT).unwrap_or(Self(Vec::new()))
    }
}

impl Tiers {
    /// The seven tiers with those of an operator's file, which adds tiers or changes single values of those there are.
    ///
    /// Errors: everything that is wrong with the file, together.
    pub fn with_file(text: &str) -> Result<Self, TiersError> {
        let default = rows(DEFAULT, &mut Vec::new());
        Self::read(&default, text)
    }

    fn read(base: &BTreeMap<String, Said>, text: &str) -> Result<Self, TiersError> {
        let mut all = base.clone();
        let mut mistakes = Vec::new();
        // What is wrong with one value does not keep the others from being looked at.
        for (name, said) in rows(text, &mut mistakes) {
            let row = all.entry(name).or_default();
            row.numbers.extend(said.numbers);
            row.wrong.extend(said.wrong);
        }
        if all.len() > MOST_TIERS {
            mistakes.push(format!("{} tiers, the most are {MOST_TIERS}", all.len()));
            return Err(TiersError(mistakes));
        }
        let mut tiers: Vec<Tier> = all.iter().filter_map(|(name, said)| tier(name, said, &mut mistakes)).collect();
        tiers.sort_by_key(|tier| tier.from_gb.unwrap_or(u64::MAX));
        let mut ranges: Vec<Range<'_>> = all.iter().filter_map(|(name, said)| Range::of(name, said)).collect();
        ranges.sort_by_key(|range| range.from);
        for pair in ranges.windows(2) {
            if let [lower, upper] = pair
                && lower.to.is_none_or(|to| to >= upper.from)
            {
                mistakes.push(format!("{}: {upper} overlaps {}: {lower}", upper.name, lower.name));
            }
        }
        if mistakes.is_empty() { Ok(Self(tiers)) } else { Err(TiersError(mistakes)) }
    }

    /// The tiers, the smallest first.
    #[must_use]
    pub fn all(&self) -> &[Tier] {
        &self.0
    }

    /// The tier of that name.
    ///
    /// Errors: there is none; the message lists those that there are.
    pub fn named(&self, name: &str) -> Result<&Tier, UnknownTier> {
        self.0.iter().find(|tier| tier.name == name).ok_or_else(|| UnknownTier {
            name: name.chars().take(64).collect(),
            known: self.0.iter().map(|tier| tier.name.clone()).collect(),
        })
    }

    /// The tier of a device by its total memory: that of its nominal size, or where no tier is for that, the next
    /// smaller one, or where there is none, the smallest.
    #[must_use]
    pub fn for_total(&self, total: Bytes) -> Option<&Tier> {
        let nominal = nominal_gb(total);
        let sized = || self.0.iter().filter(|tier| tier.from_gb.is_some());
        sized().rev().find(|tier| tier.from_gb.is_some_and(|from| from <= nominal)).or_else(|| sized().next())
    }
}

impl Tier {
    /// A card of the size that the tier is named after: its largest one, or where there is no largest, its smallest.
    #[must_use]
    pub fn nominal_card(&self) -> Option<Bytes> {
        self.to_gb.or(self.from_gb).map(Bytes::gib)
    }
}

/// A card's size as its box says it: an "8 GB" card reports 8188 MiB.
#[must_use]
pub fn nominal_gb(total: Bytes) -> u64 {
    (total.as_gib().round() as u64).max(1)
}

/// What a file says of one tier.
#[derive(Debug, Clone, Default)]
struct Said {
    numbers: BTreeMap<String, u64>,
    /// Keys with values that are none.
    wrong: BTreeSet<String>,
}

/// The tables of a file, with whole numbers for known keys; what is wrong goes to `mistakes`.
fn rows(text: &str, mistakes: &mut Vec<String>) -> BTreeMap<String, Said> {
    if text.len() > MOST_BYTES {
        mistakes.push(format!("{} bytes, the limit is {MOST_BYTES}", text.len()));
        return BTreeMap::new();
    }
    let read: BTreeMap<String, toml::Value> = match toml::from_str(text) {
        Ok(read) => read,
        Err(e) => {
            mistakes.push(e.to_string().trim_end().to_owned());
            return BTreeMap::new();
        }
    };
    let mut rows = BTreeMap::new();
    for (name, value) in read {
        if !is_name(&name) {
            mistakes.push(format!("{name:?}: a tier's name is 1 to 32 lower-case letters, digits and hyphens"));
        }
        let Ok(Row(row)) = value.try_into::<Row>() else {
            mistakes.push(format!("{name}: not a table, as in [{name}]"));
            continue;
        };
        let mut said = Said::default();
        for (key, value) in row {
            let Some((_, least, most)) = KEYS.iter().find(|(known, ..)| *known == key) else {
                let known = KEYS.map(|(key, ..)| key).join(", ");
                mistakes.push(format!("{name}: unknown key {key:?}; the keys are {known}"));
                continue;
            };
            match value.as_integer().and_then(|v| u64::try_from(v).ok()).filter(|v| (*least..=*most).contains(v)) {
                Some(number) => drop(said.numbers.insert(key, number)),
                None => {
                    mistakes.push(format!(
                        "{name}: {key} = {}; a whole number from {least} to {most} is needed",
                        shown(&value)
                    ));
                    said.wrong.insert(key);
                }
            }
        }
        rows.insert(name, said);
    }
    rows
}

/// A value as messages show it.
fn shown(value: &toml::Value) -> String {
    match value {
        toml::Value::Integer(number) => number.to_string(),
        toml::Value::Float(number) => number.to_string(),
        toml::Value::Boolean(truth) => truth.to_string(),
        toml::Value::String(text) => format!("{:?}", text.chars().take(32).collect::<String>()),
        other => format!("a {}", other.type_str()),
    }
}

fn is_name(name: &str) -> bool {
    (1..=32).contains(&name.len())
        && name != "auto"
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// Nominal sizes that a tier is for, as far as they can be made out.
struct Range<'a> {
    name: &'a str,
    from: u64,
    to: Option<u64>,
}

impl<'a> Range<'a> {
    fn of(name: &'a str, said: &Said) -> Option<Self> {
        let known = ["from_gb", "to_gb"].iter().all(|key| !said.wrong.contains(*key));
        let (from, to) = (*said.numbers.get("from_gb")?, said.numbers.get("to_gb").copied());
        (known && to.is_none_or(|to| to >= from)).then_some(Self { name, from, to })
    }
}

impl fmt::Display for Range<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.to {
            Some(to) => write!(f, "{} to {to} GB", self.from),
            None => write!(f, "{} GB and more", self.from),
        }
    }
}

fn tier(name: &str, said: &Said, mistakes: &mut Vec<String>) -> Option<Tier> {
    let number = |key: &str| said.numbers.get(key).copied();
    let there = |key: &&str| said.numbers.contains_key(*key) || said.wrong.contains(*key);
    let missing: Vec<&str> =
        ["pixels", "frames", "audio_seconds", "steps"].into_iter().filter(|key| !there(key)).collect();
    if !missing.is_empty() {
        mistakes.push(format!("{name}: a tier of its own needs {}", missing.join(", ")));
    }
    let (from_gb, to_gb) = (number("from_gb"), number("to_gb"));
    match (from_gb, to_gb) {
        (None, Some(_)) if !there(&"from_gb") => mistakes.push(format!("{name}: to_gb without from_gb")),
        (Some(from), Some(to)) if from > to => {
            mistakes.push(format!("{name}: from_gb = {from} is more than to_gb = {to}"))
        }
        _ => {}
    }
    let limit = |key: &str| number(key).and_then(|n| u32::try_from(n).ok());
    Some(Tier {
        name: name.to_owned(),
        from_gb,
        to_gb,
        limits: Limits {
            pixels: limit("pixels")?,
            frames: limit("frames")?,
            audio_seconds: limit("audio_seconds")?,
            steps: limit("steps")?,
        },
    })
}

#[cfg(test)]
mod tests;
