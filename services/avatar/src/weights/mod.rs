//! `avatar weights`: gets, makes, converts and checks checkpoints.

mod checksums;
pub mod convert;
pub mod fetch;
mod place;
mod report;
pub mod synth;
pub mod verify;

pub use report::failed;
