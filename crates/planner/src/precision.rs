//! In what a network's large layers are stored.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The type of a network's large layers: the 320 of the transformer's blocks, the seven of each of the Llama's layers.
/// Everything else is in 16 bits; the VAE and Whisper are not lowered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 16 bits.
    Bf16,
    /// e4m3fn with one scale a layer.
    Fp8,
    /// Signed bytes with one scale a row.
    Int8,
    /// GGUF's blocks of 32 values in 34 bytes.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// GGUF's blocks of 256 values in 144 bytes.
    #[serde(rename = "q4_k")]
    Q4K,
}

impl Precision {
    /// All of them, the largest first.
    pub const ALL: [Self; 5] = [Self::Bf16, Self::Q8_0, Self::Fp8, Self::Int8, Self::Q4K];

    /// The name that `avatar weights convert --precision` takes.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
        }
    }

    /// Bytes of a large layer of `values` values in `rows` rows.
    #[must_use]
    pub fn bytes(self, values: u64, rows: u64) -> u64 {
        match self {
            Self::Bf16 => values.saturating_mul(2),
            Self::Fp8 => values,
            Self::Int8 => values.saturating_add(rows.saturating_mul(4)),
            Self::Q8_0 => values.div_ceil(32).saturating_mul(34),
            Self::Q4K => values.div_ceil(256).saturating_mul(144),
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let names = || Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|p| p.name() == text).ok_or_else(|| format!("{text:?} is not one of {}", names()))
    }
}
