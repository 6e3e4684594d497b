//! Arithmetic that gateway and stages must agree on: picture sizes, frames, windows. No I/O, no candle.

pub mod clip;
pub mod size;
