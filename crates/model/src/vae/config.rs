use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    checkpoint::{Layout, Located, Network, official},
    weights::read_json,
};

/// Shape of a VAE, with the names of its published `config.json`.
///
/// Channel counts of the layers are read from the checkpoint's tensors; `block_out_channels` says how many
/// blocks there are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VaeConfig {
    /// Channels after each block of the encoder; the decoder has them in reverse.
    pub block_out_channels: Vec<usize>,
    /// Residual layers in each block of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Groups of every group normalisation.
    pub norm_num_groups: usize,
    /// Side of a tile, in pixels.
    pub sample_size: usize,
    /// Length of a tile, in frames.
    pub sample_tsize: usize,
    /// What latents are multiplied by before the transformer sees them.
    pub scaling_factor: f64,
    /// What is subtracted from latents before scaling, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shift_factor: Option<f64>,
    /// Frames per latent frame (the first frame has a latent frame of its own). A power of two.
    #[serde(default = "default_time_ratio")]
    pub time_compression_ratio: usize,
    /// Pixels per latent along each side. A power of two.
    #[serde(default = "default_space_ratio")]
    pub spatial_compression_ratio: usize,
    /// Whether the middle block has an attention layer.
    #[serde(default = "default_true")]
    pub mid_block_add_attention: bool,
    /// Whether that attention sees no later frame.
    #[serde(default)]
    pub mid_block_causal_attn: bool,
    /// Side of a tile in latents, where it is not `sample_size / spatial_compression_ratio`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tile_latent: Option<usize>,
    /// Length of a tile in latent frames, where it is not `sample_tsize / time_compression_ratio`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tile_latent_t: Option<usize>,
}

fn default_time_ratio() -> usize {
    4
}

fn default_space_ratio() -> usize {
    8
}

fn default_true() -> bool {
    true
}

impl VaeConfig {
    /// Reads and checks the config of a stage that holds a half of the VAE.
    pub(crate) fn of(located: &Located) -> Result<Self> {
        let path = located.config(Network::Vae)?;
        let config: Self = match located.layout {
            Layout::Native => read_json(&path)?,
            Layout::Official => official::vae(&path)?,
        };
        config.validate().map_err(|e| Error::file(&path, e))?;
        Ok(config)
    }

    /// Refuses what no network can have: a zero, a ratio that is no power of two or needs more blocks than
    /// there are, a tile too small to overlap.
    pub fn validate(&self) -> Result<()> {
        let blocks = self.block_out_channels.len();
        let check = |good: bool, reason: String| if good { Ok(()) } else { Err(Error::input("vae config", reason)) };
        check(blocks > 0, "block_out_channels is empty".to_owned())?;
        for (name, value) in [
            ("layers_per_block", self.layers_per_block),
            ("latent_channels", self.latent_channels),
            ("norm_num_groups", self.norm_num_groups),
        ] {
            check(value > 0, format!("{name} is 0, at least 1 is needed"))?;
        }
        for (name, ratio) in [
            ("time_compression_ratio", self.time_compression_ratio),
            ("spatial_compression_ratio", self.spatial_compression_ratio),
        ] {
            check(ratio.is_power_of_two(), format!("{name} is {ratio}, a power of two is needed"))?;
            check(
                (ratio.ilog2() as usize) < blocks,
                format!("{name} is {ratio}, too much for {blocks} blocks: each but the last can halve once"),
            )?;
        }
        for (name, tile) in [("tile side", self.tile_latent_side()), ("tile length", self.tile_latent_length())] {
            check(tile >= 2, format!("the {name} is {tile} latents, at least 2 are needed"))?;
        }
        check(
            self.scaling_factor.is_finite() && self.scaling_factor != 0.0,
            format!("scaling_factor is {}, a finite number other than 0 is needed", self.scaling_factor),
        )
    }

    /// Side of a tile in latents.
    #[must_use]
    pub fn tile_latent_side(&self) -> usize {
        self.tile_latent.unwrap_or(self.sample_size / self.spatial_compression_ratio.max(1))
    }

    /// Length of a tile in latent frames.
    #[must_use]
    pub fn tile_latent_length(&self) -> usize {
        self.tile_latent_t.unwrap_or(self.sample_tsize / self.time_compression_ratio.max(1))
    }

    /// How block `index` of the encoder shrinks its input (time, rows, columns), or that of the decoder grows it.
    pub(crate) fn scale_of_block(&self, index: usize) -> [usize; 3] {
        let last = self.block_out_channels.len() - 1;
        let space = if index < self.spatial_compression_ratio.ilog2() as usize { 2 } else { 1 };
        let times = self.time_compression_ratio.ilog2() as usize;
        let time = if index + times >= last && index < last { 2 } else { 1 };
        [time, space, space]
    }
}
