//! The transformer as one stage's folder.

use std::path::Path;

use candle_core::{DType, Device};

use super::{Transformer, TransformerConfig};
use crate::{Result, weights::Weights};

/// The transformer of a model folder.
#[derive(Debug)]
pub struct DiffusionStage {
    /// The folder's `config.json`.
    pub config: TransformerConfig,
    /// The network.
    pub transformer: Transformer,
}

impl DiffusionStage {
    /// Opens `config.json` and the `*.safetensors` beside it.
    ///
    /// Errors: a file is missing or malformed; a tensor is missing, has another shape than the network's, bears
    /// values that are not finite, or is none of the network's.
    pub fn open(folder: &Path, device: &Device) -> Result<Self> {
        let config = TransformerConfig::open(&folder.join("config.json"))?;
        let weights = Weights::open(folder, DType::F32, device)?;
        let transformer = Transformer::load(&weights, &config)?;
        weights.refuse_unused(|_| false)?;
        Ok(Self { config, transformer })
    }
}
