#![allow(missing_docs)]
use super::stored::Encoding;
pub fn dequantise(_: Encoding, _: &[u8], _: &mut [f32]) {}
pub fn finite(_: Encoding, _: &[u8]) -> bool {
    true
}
