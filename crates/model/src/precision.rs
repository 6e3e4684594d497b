//! The type in which a network computes.

use candle_core::DType;

/// The type of a network's tensors between operations, and of its weights where they are stored in a wider one.
///
/// Within an operation sums are f32. So are time embeddings, modulation, rotary tables, masks and scores, whatever
/// the type, and what a stage takes and gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// IEEE single precision.
    #[default]
    F32,
    /// The upper half of a single: its range, 8 bits of precision.
    Bf16,
    /// IEEE half precision: 11 bits of precision, nothing above 65504.
    F16,
}

impl Precision {
    /// The tensors' type.
    #[must_use]
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

#[cfg(test)]
mod tests;
