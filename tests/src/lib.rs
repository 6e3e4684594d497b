//! Whole-system tests: the reference cases ([`parity`]), and a stack of real processes for the tests.

pub mod bench;
pub mod gpu;
pub mod parity;
pub mod proof;
pub mod quality;
pub mod tiers;
