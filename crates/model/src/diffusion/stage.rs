//! The transformer as a stage.

use std::path::Path;

use super::{Transformer, TransformerConfig};
use crate::{
    Result,
    checkpoint::{Choice, Layout, Located, Network, Setup, Stage, locate, official},
};

/// The transformer below a folder of models.
#[derive(Debug)]
pub struct DiffusionStage {
    /// What the stage's `config.json` says; in the official layout, the published model's values.
    pub config: TransformerConfig,
    /// The network.
    pub transformer: Transformer,
}

impl DiffusionStage {
    /// Opens the stage, in the native layout or in the official one.
    ///
    /// Errors: a file is missing or malformed; a tensor is missing, has another shape than the network's, bears
    /// values that are not finite, or is none of the network's.
    pub fn open(models: &Path, setup: &Setup) -> Result<Self> {
        let located = locate(models, Stage::Diffusion, setup.choice)?;
        let config = config_of(&located)?;
        let weights = located.source(Network::Transformer)?.open(setup)?;
        let transformer = Transformer::load(&weights, &config)?;
        weights.refuse_unused(|_| false)?;
        Ok(Self { config, transformer })
    }

    /// The stage's config alone, without its weights being opened.
    pub fn config(models: &Path) -> Result<TransformerConfig> {
        config_of(&locate(models, Stage::Diffusion, Choice::Auto)?)
    }
}

fn config_of(located: &Located) -> Result<TransformerConfig> {
    let path = located.config(Network::Transformer)?;
    match located.layout {
        Layout::Native => TransformerConfig::open(&path),
        Layout::Official => official::transformer(&path),
    }
}
