//! Operations on tensors in host memory, fused and threaded.
//!
//! candle multiplies matrices as fast as anyone, but what stands around a product (activations, norms, gates,
//! softmax) it does one operation at a time, and much of it on one thread. Here each such group is one pass. Every
//! operation has a clear twin out of candle's own operations, which also serves other devices; tests hold one
//! against the other on random shapes.
//!
//! Arithmetic is f32 whatever the tensors' type; a result is rounded to its tensor's type once, at the end. No
//! result depends on the number of threads: work is cut by shape alone.

mod activation;
mod attention;
pub(crate) mod host;
mod linear;
mod norm;
pub(crate) mod product;
mod rotary;
mod simd;
#[cfg(test)]
mod tests;

pub use activation::Activation;
pub use attention::{attention, attention_clear};
pub use linear::{Gate, linear, linear_clear};
pub use norm::{layer_norm, layer_norm_clear, rms_norm, rms_norm_clear};
pub use product::has_kernel;
pub use rotary::{QkvHeads, heads, heads_clear, turn, turn_clear};

/// Threads that the operations run on.
#[must_use]
pub fn threads() -> usize {
    rayon::current_num_threads()
}
