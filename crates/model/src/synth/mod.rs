//! A small complete checkpoint with random weights: every network and every block kind, in the native layout.
//!
//! It makes noise, not faces. It exists so that the whole system runs, and is tested, without the published
//! weights. The bytes depend on the seed alone: values come from a counter-based generator and from operations
//! that IEEE 754 rounds exactly, so every machine writes the same files.

mod diffusion;
mod encoders;
#[cfg(test)]
mod tests;
mod tokenizer;
mod vae;
mod values;

use std::path::Path;

use serde::Serialize;

use crate::{Error, Result};
use values::Values;

/// Width of the text states that the text encoder gives and the transformer takes.
const TEXT: usize = 64;
/// Width of CLIP's pooled state.
const POOLED: usize = 64;
/// Width of the audio encoder.
const AUDIO: usize = 64;
/// Hidden states of the audio encoder: the embedding and four layers.
const AUDIO_STATES: usize = 5;
/// Latent channels of the VAE and of the transformer.
const LATENT: usize = 16;

/// Writes the checkpoint's five stage folders into `out`, about 13 MB in all.
///
/// `out` is made if it is missing; files of the same name are replaced. Published precisions: bf16 for the
/// transformer and the text encoders, f32 for the audio encoder and the VAE.
///
/// Errors: a folder or file cannot be written.
pub fn tiny(out: &Path, seed: u64) -> Result<()> {
    let values = Values::new(seed);
    encoders::audio(&values.part("audio-encoder"), &folder(out, "audio-encoder")?)?;
    encoders::text(&values.part("text-encoder"), &folder(out, "text-encoder")?)?;
    vae::encoder(&values.part("image-encoder"), &folder(out, "image-encoder")?)?;
    diffusion::transformer(&values.part("diffusion"), &folder(out, "diffusion")?)?;
    vae::decoder(&values.part("vae-decode"), &folder(out, "vae-decode")?)
}

fn folder(out: &Path, name: &str) -> Result<std::path::PathBuf> {
    let folder = out.join(name);
    std::fs::create_dir_all(&folder).map_err(|e| Error::file(&folder, e))?;
    Ok(folder)
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| Error::file(path, e))?;
    text.push(b'\n');
    std::fs::write(path, text).map_err(|e| Error::file(path, e))
}
