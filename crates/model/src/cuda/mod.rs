//! Networks on NVIDIA cards: the operations of [`ops`](crate::ops) and of the VAE by kernels of our own.
//!
//! Matrix products are cuBLAS's. Around them each group of operations is one kernel, as on the processor, with the same
//! arithmetic: f32 inside, rounded once at the end. Whatever has no kernel for a shape is done by the clear operations,
//! which run on any device. Kernels are in `kernels`, one image for each file and several generations of cards; the
//! processor's operations are the twins that the GPU suite holds them against.
//!
//! Everything runs on the device's one stream, and no kernel adds in an order that depends on timing.

mod attention;
mod decode;
mod launch;
mod layer;
mod norm;
mod vae;

pub(crate) use attention::attention;
pub(crate) use decode::decode;
pub(crate) use layer::{heads, linear, turn};
pub(crate) use norm::{layer_norm, rms_norm};
pub(crate) use vae::{Convolution, convolve, group_norm};

use candle_core::{DType, Device, Tensor};

/// Whether this module's operations apply.
pub(crate) fn here(x: &Tensor) -> bool {
    matches!(x.device(), Device::Cuda(_)) && matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16)
}
