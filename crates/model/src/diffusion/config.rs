//! What a checkpoint's tensor shapes do not say.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Error, Result, weights::read_json};

/// `config.json` of the transformer.
///
/// Only `rope_dim_list` is needed: widths, depths and heads are read from the tensors. What is given all the same
/// is checked against them, so that a config of another checkpoint is refused by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransformerConfig {
    /// Channels of a head that turn with the frame, the row and the column. Their sum is the head's width.
    pub rope_dim_list: [usize; 3],
    /// Base of the rotary frequencies.
    #[serde(default = "default_theta")]
    pub rope_theta: f64,
    /// Double blocks that an audio adapter follows, ascending; when absent every second one, from block 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audio_double_blocks: Option<Vec<usize>>,
    /// Width of a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden_size: Option<usize>,
    /// Attention heads of every block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_heads: Option<usize>,
    /// Blocks with separate streams for picture and text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth_double_blocks: Option<usize>,
    /// Blocks with one stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth_single_blocks: Option<usize>,
    /// Channels of the latents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_channels: Option<usize>,
    /// Width of the text states.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_states_dim: Option<usize>,
    /// Width of the pooled text state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_states_dim_2: Option<usize>,
    /// How the checkpoint wants to be sampled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub defaults: Option<Defaults>,
}

/// Sampling settings that a checkpoint recommends.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    /// Shorter side of the picture, pixels.
    pub size: u32,
    /// Denoise steps.
    pub steps: u32,
    /// Guidance scale at the first step.
    pub guidance_scale: f32,
    /// Flow shift of the time grid.
    pub flow_shift: f32,
}

/// Every key of `config.json`.
const KEYS: [&str; 11] = [
    "rope_dim_list",
    "rope_theta",
    "audio_double_blocks",
    "hidden_size",
    "num_heads",
    "depth_double_blocks",
    "depth_single_blocks",
    "in_channels",
    "text_states_dim",
    "text_states_dim_2",
    "defaults",
];

impl TransformerConfig {
    /// Reads `config.json`.
    ///
    /// Errors: as [`read_json`], and a key that nothing reads: a misspelt setting must not be ignored.
    pub fn open(path: &Path) -> Result<Self> {
        let keys: serde_json::Map<String, serde_json::Value> = read_json(path)?;
        if let Some(key) = keys.keys().find(|key| !KEYS.contains(&key.as_str())) {
            return Err(Error::file(path, format!("unknown key {key:?}; the keys are {}", KEYS.join(", "))));
        }
        read_json(path)
    }
}

fn default_theta() -> f64 {
    256.0
}

impl Default for TransformerConfig {
    /// The published checkpoint's: heads of 16 + 56 + 56 channels, an adapter after every second double block.
    fn default() -> Self {
        Self {
            rope_dim_list: [16, 56, 56],
            rope_theta: default_theta(),
            audio_double_blocks: None,
            hidden_size: None,
            num_heads: None,
            depth_double_blocks: None,
            depth_single_blocks: None,
            in_channels: None,
            text_states_dim: None,
            text_states_dim_2: None,
            defaults: None,
        }
    }
}

impl TransformerConfig {
    /// Refuses a value that the checkpoint's tensors contradict.
    pub(crate) fn agree(name: &'static str, said: Option<usize>, found: usize) -> Result<()> {
        match said {
            Some(said) if said != found => {
                Err(Error::input(name, format!("config.json says {said}, the checkpoint's tensors say {found}")))
            }
            _ => Ok(()),
        }
    }

    /// The double blocks that an adapter follows, of `depth` blocks with `adapters` adapters in the checkpoint.
    pub(crate) fn adapted_blocks(&self, depth: usize, adapters: usize) -> Result<Vec<usize>> {
        let blocks = self.audio_double_blocks.clone().unwrap_or_else(|| (1..depth).step_by(2).collect());
        let ascending = blocks.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || blocks.last().is_some_and(|&last| last >= depth) || blocks.len() != adapters {
            return Err(Error::input(
                "audio_double_blocks",
                format!("{blocks:?}: expected {adapters} ascending numbers (one for each adapter) below {depth}"),
            ));
        }
        Ok(blocks)
    }
}
