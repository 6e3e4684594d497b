//! Numbers of bytes as people write them.

use std::{fmt, str::FromStr};

use serde::{Serialize, Serializer};

/// A number of bytes. Written `8GiB`, `8188MiB`, `6.5GB` or without a unit; serialised as a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bytes(pub u64);

/// Why a text is no number of bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BytesError {
    /// No number, or one that is negative or not finite.
    #[error("{0:?} does not begin with a number, as in 8GiB, 8188MiB or 6.5GB")]
    Number(String),
    /// A unit that is none.
    #[error("{0:?} is no unit; the units are B, KB, MB, GB, TB and KiB, MiB, GiB, TiB")]
    Unit(String),
    /// A number that is too large.
    #[error("{0:?} is more than {max} bytes", max = MOST)]
    TooMany(String),
    /// Less than a byte.
    #[error("{0:?} is no whole byte")]
    None(String),
}

/// An exbibyte, far past any device, so that sums of a few stay numbers.
const MOST: u64 = 1 << 60;
const UNITS: [(&str, u64); 10] = [
    ("", 1),
    ("b", 1),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
];

impl Bytes {
    /// Whole gibibytes.
    #[must_use]
    pub const fn gib(count: u64) -> Self {
        Self(count << 30)
    }

    /// In gibibytes.
    #[must_use]
    pub fn as_gib(self) -> f64 {
        self.0 as f64 / Self::gib(1).0 as f64
    }
}

impl FromStr for Bytes {
    type Err = BytesError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let number: f64 = number.parse().map_err(|_| BytesError::Number(text.to_owned()))?;
        let unit = unit.trim().to_ascii_lowercase();
        let (_, each) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(|| BytesError::Unit(unit.clone()))?;
        let bytes = number * *each as f64;
        match bytes {
            _ if !(bytes <= MOST as f64) => Err(BytesError::TooMany(text.to_owned())),
            _ if bytes < 1.0 => Err(BytesError::None(text.to_owned())),
            _ => Ok(Self(bytes as u64)),
        }
    }
}

impl fmt::Display for Bytes {
    /// The largest binary unit of which there is at least one, with as many digits as tell two plans apart.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, unit) = [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)]
            .into_iter()
            .find(|(_, unit)| self.0 >= *unit)
            .unwrap_or(("B", 1));
        if self.0.is_multiple_of(unit) {
            return write!(f, "{} {name}", self.0 / unit);
        }
        write!(f, "{:.2} {name}", self.0 as f64 / unit as f64)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_in_every_unit() {
        for (text, bytes) in [
            ("4GiB", 4 << 30),
            ("8188MiB", 8188 << 20),
            ("6.5GB", 6_500_000_000),
            (" 12 gib ", 12 << 30),
            ("1.5KiB", 1536),
            ("7", 7),
            ("2TB", 2_000_000_000_000),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_number_of_bytes_is_refused_with_the_reason() {
        for (text, part) in [
            ("", "does not begin with a number"),
            ("GiB", "does not begin with a number"),
            ("-4GiB", "does not begin with a number"),
            ("1.2.3GiB", "does not begin with a number"),
            ("4Gib/s", "is no unit"),
            ("4e3", "is no unit"),
            ("99999999TiB", "is more than"),
            ("0", "no whole byte"),
            ("0.1B", "no whole byte"),
        ] {
            let error = text.parse::<Bytes>().unwrap_err().to_string();
            assert!(error.contains(part), "{text:?}: {error}");
        }
        assert!("9".repeat(400).parse::<Bytes>().is_err());
    }

    #[test]
    fn bytes_are_written_in_the_unit_that_reads_well() {
        for (bytes, text) in
            [(4u64 << 30, "4 GiB"), (8188 << 20, "8.00 GiB"), (1536, "1.50 KiB"), (12, "12 B"), (1 << 40, "1 TiB")]
        {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }
}
