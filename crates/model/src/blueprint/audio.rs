use super::{Missing, Shapes, Sheet, Spec};
use crate::audio::AudioConfig;

/// Sizes of Whisper's encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WhisperSizes {
    /// Width of a state.
    pub width: usize,
    /// Width within the feed-forward layers.
    pub inner: usize,
    /// Layers.
    pub layers: usize,
    /// Bands of the spectrum.
    pub bands: usize,
    /// States of 30 s.
    pub positions: usize,
}

impl WhisperSizes {
    /// Whisper-tiny.
    pub const PUBLISHED: Self = Self { width: 384, inner: 1536, layers: 4, bands: 80, positions: 1500 };

    pub(super) fn of(found: &Shapes, config: &AudioConfig) -> Result<Self, Missing> {
        Ok(Self {
            width: found.side("encoder.conv1.weight", 0)?,
            bands: found.side("encoder.conv1.weight", 1)?,
            positions: found.side("encoder.embed_positions.weight", 0)?,
            inner: found.side("encoder.layers.0.fc1.weight", 0)?,
            layers: found.depth("encoder.layers", config.layers)?,
        })
    }

    /// The encoder's tensors.
    #[must_use]
    pub fn tensors(&self) -> Vec<Spec> {
        let Self { width, inner, .. } = *self;
        let mut sheet = Sheet::default();
        sheet.layer("encoder.conv1", &[width, self.bands, 3], 1.0);
        sheet.layer("encoder.conv2", &[width, width, 3], 1.5);
        sheet.table("encoder.embed_positions.weight", &[self.positions, width], 0.3);
        for i in 0..self.layers {
            let layer = format!("encoder.layers.{i}");
            sheet.weight(&format!("{layer}.self_attn.k_proj"), &[width, width], 1.0);
            for name in ["q_proj", "v_proj", "out_proj"] {
                sheet.layer(&format!("{layer}.self_attn.{name}"), &[width, width], 1.0);
            }
            sheet.norm(&format!("{layer}.self_attn_layer_norm"), width);
            sheet.layer(&format!("{layer}.fc1"), &[inner, width], 1.0);
            sheet.layer(&format!("{layer}.fc2"), &[width, inner], 1.0);
            sheet.norm(&format!("{layer}.final_layer_norm"), width);
        }
        sheet.norm("encoder.layer_norm", width);
        sheet.0
    }
}
