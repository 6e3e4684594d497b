//! `avatar weights`: gets and makes checkpoints.

pub mod fetch;
pub mod synth;
