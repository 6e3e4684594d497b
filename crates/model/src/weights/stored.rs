//! How tensors lie in files.

use std::ops::Range;

/// How a tensor's values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    Bf16,
    /// 8 bits, e4m3fn, with one scale per tensor beside it.
    F8E4M3,
    /// Signed bytes, with one scale per row beside them.
    I8,
    /// GGUF: 32 signed bytes and an f16 scale in 34 bytes.
    Q8_0,
    /// GGUF: 256 values in 210 bytes.
    Q6K,
    /// GGUF: 256 values in 176 bytes.
    Q5K,
    /// GGUF: 256 values in 144 bytes.
    Q4K,
    /// GGUF: 32 values in 18 bytes.
    Q4_0,
    /// One that no network takes, by the name that its format gives it. It may stand in a file, unread.
    Other(&'static str),
}

impl Encoding {
    /// Values that are stored together, and the bytes that they take.
    #[must_use]
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::F8E4M3 | Self::I8 | Self::Other(_) => (1, 1),
            Self::Q8_0 => (32, 34),
            Self::Q6K => (256, 210),
            Self::Q5K => (256, 176),
            Self::Q4K => (256, 144),
            Self::Q4_0 => (32, 18),
        }
    }

    /// Bytes of `values` values; nothing where they do not fill whole blocks, or where the number overflows.
    #[must_use]
    pub fn bytes(self, values: usize) -> Option<usize> {
        let (each, bytes) = self.block();
        if !values.is_multiple_of(each) {
            return None;
        }
        (values / each).checked_mul(bytes)
    }

    /// The name that messages and tables give it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F8E4M3 => "fp8",
            Self::I8 => "int8",
            Self::Q8_0 => "q8_0",
            Self::Q6K => "q6_k",
            Self::Q5K => "q5_k",
            Self::Q4K => "q4_k",
            Self::Q4_0 => "q4_0",
            Self::Other(name) => name,
        }
    }
}

/// One tensor of a file, as its format's reader found it. The bytes lie within the file, and are as many as shape
/// and encoding say (for [`Encoding::Other`] whatever the format says).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Name in the file.
    pub name: String,
    /// How its values are stored.
    pub encoding: Encoding,
    /// Row-major: the last side varies fastest.
    pub shape: Vec<usize>,
    /// Where its values are in the file; row-major and without gaps.
    pub bytes: Range<usize>,
}
