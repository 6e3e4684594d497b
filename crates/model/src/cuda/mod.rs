//! Networks on NVIDIA cards: the operations of [`ops`](crate::ops) and of the VAE by kernels of our own.
//!
//! Matrix products are cuBLAS's. Around them each group of operations is one kernel, as on the processor, with the same
//! arithmetic: f32 inside, rounded once at the end. Whatever has no kernel for a shape is done by the clear operations,
//! which run on any device. Kernels are in `kernels`, one image for each file and several generations of cards; the
//! clear operations are the twins that [`checks`] hold them against.
//!
//! Everything runs on the device's one stream, and no kernel adds in an order that depends on timing.
//!
//! Tests of this crate have the module without a card and without NVIDIA's compiler: kernels then run on an emulation.

mod attention;
#[cfg(feature = "cuda")]
mod card;
pub mod checks;
mod decode;
#[cfg(not(feature = "cuda"))]
mod emulated;
mod launch;
mod layer;
mod norm;
mod vae;

#[cfg(feature = "cuda")]
use candle_core::{DType, Device, Tensor};

pub(crate) use attention::attention;
pub(crate) use decode::decode;
pub(crate) use layer::{heads, linear, turn};
pub(crate) use norm::{layer_norm, rms_norm};
pub(crate) use vae::{Convolution, convolve, group_norm};

/// Whether this module's operations apply.
#[cfg(feature = "cuda")]
pub(crate) fn here(x: &Tensor) -> bool {
    matches!(x.device(), Device::Cuda(_)) && matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16)
}
