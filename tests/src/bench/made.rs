//! Random weights at published widths, scaled so that activations keep their size.

use anyhow::Result;
use candle_core::{Device, Tensor};
use model::{
    blueprint::{Spec, TransformerSizes, VaeHalf, VaeSizes, WhisperSizes},
    synth,
    weights::Weights,
};

use super::Place;

/// Deterministic values in -1..1.
pub(super) fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
    // That is as far as values of this deviation reach.
    let spec = Spec { name: String::new(), shape: shape.to_vec(), mean: 0.0, deviation: 3f32.sqrt().recip() };
    values(&spec, seed)
}

fn values(spec: &Spec, seed: u64) -> Result<Tensor> {
    Ok(Tensor::from_vec(synth::values_of(spec, seed), spec.shape.as_slice(), &Device::Cpu)?)
}

/// The tensors whose names begin so.
fn weights(specs: Vec<Spec>, part: &str, place: &Place) -> Result<Weights> {
    let specs = specs.into_iter().filter(|spec| spec.name.starts_with(part));
    let tensors = specs.map(|spec| Ok((spec.name.clone(), values(&spec, 1)?))).collect::<Result<_>>()?;
    Ok(Weights::from_tensors(tensors, place.dtype, &place.device))
}

/// The transformer's first block of one kind: `double_blocks` or `single_blocks`.
pub(super) fn block(kind: &str, place: &Place) -> Result<Weights> {
    let part = format!("{kind}.0");
    Ok(weights(TransformerSizes::PUBLISHED.tensors(), &format!("{part}."), place)?.pp(part))
}

pub(super) fn whisper(place: &Place) -> Result<Weights> {
    weights(WhisperSizes::PUBLISHED.tensors(), "encoder.", place)
}

pub(super) fn vae_decoder(place: &Place) -> Result<Weights> {
    weights(VaeSizes::published().tensors(VaeHalf::Decoder), "", place)
}
