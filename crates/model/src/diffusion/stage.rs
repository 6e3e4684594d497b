//! The transformer as a stage.

use std::path::Path;

use super::{Part, Transformer, TransformerConfig};
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
        Self::open_over(models, setup, &[])
    }

    /// As [`open`](Self::open), over the devices of some parts instead of the setup's.
    ///
    /// Errors: as there, and the parts do not have all blocks.
    pub fn open_over(models: &Path, setup: &Setup, parts: &[Part]) -> Result<Self> {
        let located = locate(models, Stage::Diffusion, setup.choice)?;
        let config = config_of(&located)?;
        let weights = located.source(Network::Transformer)?.open(setup)?;
        let transformer = Transformer::load_over(&weights, &config, parts)?;
        weights.refuse_unused(|_| false)?;
        Ok(Self { config, transformer })
    }

    /// Bytes in its files of each of the transformer's blocks, double ones first, and of all that is in no block; only
    /// headers are read.
    ///
    /// Errors: a file is missing or malformed.
    pub fn block_bytes(models: &Path, setup: &Setup) -> Result<(Vec<u64>, u64)> {
        let weights = locate(models, Stage::Diffusion, setup.choice)?.source(Network::Transformer)?.open(setup)?;
        let of_kind = |kind: &'static str, tensor: &str| {
            let weights = weights.clone();
            let blocks = 0..weights.count(kind, tensor);
            blocks.map(move |block| weights.pp(format!("{kind}.{block}")).extent().bytes())
        };
        let single = of_kind("single_blocks", "linear1.weight");
        let blocks: Vec<u64> = of_kind("double_blocks", "img_attn_qkv.weight").chain(single).collect();
        let others = weights.extent().bytes().saturating_sub(blocks.iter().sum());
        Ok((blocks, others))
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
