//! The stages of a generation.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One of the five model stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Speech to features.
    AudioEncoder,
    /// Prompt and picture to text states.
    TextEncoder,
    /// Picture to reference latents.
    ImageEncoder,
    /// Latents to velocities.
    Diffusion,
    /// Latents to frames.
    VaeDecode,
}

impl Stage {
    /// All of them, in the order in which a generation needs them.
    pub const ALL: [Self; 5] =
        [Self::AudioEncoder, Self::TextEncoder, Self::ImageEncoder, Self::Diffusion, Self::VaeDecode];

    /// Its name, as the binary, the folder of its weights and the log have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::AudioEncoder => "audio-encoder",
            Self::TextEncoder => "text-encoder",
            Self::ImageEncoder => "image-encoder",
            Self::Diffusion => "diffusion",
            Self::VaeDecode => "vae-decode",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
