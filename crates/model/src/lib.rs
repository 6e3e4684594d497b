//! The networks of HunyuanVideo-Avatar, and nothing else: tensors in, tensors out.
//!
//! No async, no network, no environment, no clock. Widths come from the checkpoint's tensor shapes and
//! `config.json`; nothing is fixed to one published size.

pub mod attention;
pub mod audio;
pub mod blueprint;
pub mod checkpoint;
pub mod convert;
#[cfg(any(feature = "cuda", test))]
pub mod cuda;
pub mod diffusion;
pub mod image;
pub mod inspect;
pub mod memory;
pub mod nn;
pub mod ops;
pub mod speed;
pub mod synth;
pub mod text;
pub mod vae;
pub mod weights;

mod device;
mod error;
#[cfg(test)]
mod golden;
mod onnx;
mod precision;

pub use device::device;
pub use error::{Error, Result};
pub use precision::Precision;
