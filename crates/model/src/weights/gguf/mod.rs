//! GGUF files: one header with names, shapes and offsets, then the tensors.
//!
//! All numbers are little endian:
//!
//! ```text
//! "GGUF"  version u32  tensors u64  entries u64
//! entry:  key, type u32, value          (a string is its length u64 and UTF-8; an array is type u32, count u64, values)
//! tensor: name, sides u32, side u64 ..., type u32, offset u64
//! padding to the alignment, then the tensors, each at a multiple of it; offsets count from here
//! ```
//!
//! A tensor's sides are in the file with the one that varies fastest first; ours has it last.

mod reader;
mod writer;

#[cfg(test)]
mod tests;

pub use reader::{is_gguf, read};
pub use writer::Writer;

use super::stored::Encoding;

const MAGIC: &[u8; 4] = b"GGUF";
const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: usize = 32;
/// The format's own readers take 4; pictures' patches have 5.
const MAX_SIDES: usize = 8;
const MAX_NAME: usize = 1024;

/// Types that networks take, by number.
const TAKEN: [(u32, Encoding); 8] = [
    (0, Encoding::F32),
    (1, Encoding::F16),
    (2, Encoding::Q4_0),
    (8, Encoding::Q8_0),
    (12, Encoding::Q4K),
    (13, Encoding::Q5K),
    (14, Encoding::Q6K),
    (30, Encoding::Bf16),
];

/// Types that may stand in a file, unread: number, name, values and bytes of a block.
const OTHERS: [(u32, &str, usize, usize); 25] = [
    (3, "q4_1", 32, 20),
    (6, "q5_0", 32, 22),
    (7, "q5_1", 32, 24),
    (10, "q2_k", 256, 84),
    (11, "q3_k", 256, 110),
    (15, "q8_k", 256, 292),
    (16, "iq2_xxs", 256, 66),
    (17, "iq2_xs", 256, 74),
    (18, "iq3_xxs", 256, 98),
    (19, "iq1_s", 256, 50),
    (20, "iq4_nl", 32, 18),
    (21, "iq3_s", 256, 110),
    (22, "iq2_s", 256, 82),
    (23, "iq4_xs", 256, 136),
    (24, "i8", 1, 1),
    (25, "i16", 1, 2),
    (26, "i32", 1, 4),
    (27, "i64", 1, 8),
    (28, "f64", 1, 8),
    (29, "iq1_m", 256, 56),
    (34, "tq1_0", 256, 54),
    (35, "tq2_0", 256, 66),
    (39, "mxfp4", 32, 17),
    (40, "nvfp4", 64, 36),
    (41, "q1_0", 128, 18),
];
