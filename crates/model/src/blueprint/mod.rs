//! Which tensors the networks have: every name and shape, without a value.
//!
//! Each network is described once, for any widths and depths: those of the published model, those of the small
//! random one, and those that a checkpoint's own tensors say ([`Shapes`]), against which it is then held.

mod audio;
mod shapes;
mod table;
#[cfg(test)]
mod tests;
mod text;
mod transformer;
mod vae;

pub use self::{
    audio::WhisperSizes,
    shapes::{Missing, Shapes},
    table::{model_table, text_tables, transformer_table},
    text::{ClipSizes, LlavaSizes},
    transformer::TransformerSizes,
    vae::{VaeHalf, VaeSizes},
};
use crate::{
    audio::AudioConfig,
    checkpoint::{self, Stage},
    diffusion::TransformerConfig,
    text::{ClipConfig, LlavaConfig},
    vae::VaeConfig,
};

/// One tensor that a network has.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// The reference's name.
    pub name: String,
    /// Row-major.
    pub shape: Vec<usize>,
    /// Mean of random values that keep a signal's scale.
    pub mean: f32,
    /// Their standard deviation.
    pub deviation: f32,
}

impl Spec {
    /// Number of values.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The networks as stages run them: of the VAE, a stage has one half.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Network {
    /// Whisper's encoder.
    Whisper,
    /// Vision tower, projector and Llama.
    Llava,
    /// CLIP's text half.
    Clip,
    /// The VAE's encoder.
    VaeEncoder,
    /// The transformer.
    Transformer,
    /// The VAE's decoder.
    VaeDecoder,
}

/// What a network's `config.json` says.
#[derive(Debug, Clone)]
pub enum Config {
    /// Of the audio encoder.
    Whisper(AudioConfig),
    /// Of LLaVA.
    Llava(Box<LlavaConfig>),
    /// Of CLIP.
    Clip(ClipConfig),
    /// Of the VAE's encoder.
    VaeEncoder(VaeConfig),
    /// Of the transformer.
    Transformer(TransformerConfig),
    /// Of the VAE's decoder.
    VaeDecoder(VaeConfig),
}

impl Config {
    /// The network that it is of.
    #[must_use]
    pub fn network(&self) -> Network {
        match self {
            Self::Whisper(_) => Network::Whisper,
            Self::Llava(_) => Network::Llava,
            Self::Clip(_) => Network::Clip,
            Self::VaeEncoder(_) => Network::VaeEncoder,
            Self::Transformer(_) => Network::Transformer,
            Self::VaeDecoder(_) => Network::VaeDecoder,
        }
    }

    /// The tensors that the network reads, of the widths and depths that the checkpoint's own tensors say.
    ///
    /// Errors: the names of missing tensors without which nothing can be said.
    pub fn expected(&self, found: &Shapes) -> Result<Vec<Spec>, Missing> {
        Ok(match self {
            Self::Whisper(config) => WhisperSizes::of(found, config)?.tensors(),
            Self::Llava(config) => LlavaSizes::of(found, config)?.tensors(),
            Self::Clip(config) => ClipSizes::of(found, config)?.tensors(),
            Self::VaeEncoder(config) => VaeSizes::of(found, config, VaeHalf::Encoder)?.tensors(VaeHalf::Encoder),
            Self::Transformer(config) => TransformerSizes::of(found, config)?.tensors(),
            Self::VaeDecoder(config) => VaeSizes::of(found, config, VaeHalf::Decoder)?.tensors(VaeHalf::Decoder),
        })
    }
}

impl Network {
    /// The network that a stage runs of a published one.
    #[must_use]
    pub fn of(stage: Stage, published: checkpoint::Network) -> Self {
        match published {
            checkpoint::Network::Whisper => Self::Whisper,
            checkpoint::Network::Llava => Self::Llava,
            checkpoint::Network::Clip => Self::Clip,
            checkpoint::Network::Transformer => Self::Transformer,
            checkpoint::Network::Vae if stage == Stage::ImageEncoder => Self::VaeEncoder,
            checkpoint::Network::Vae => Self::VaeDecoder,
        }
    }

    /// Its folder below its stage's, in the native layout; empty for the stage's own.
    #[must_use]
    pub fn folder(self) -> &'static str {
        match self {
            Self::Llava => "llava",
            Self::Clip => "clip",
            _ => "",
        }
    }

    /// Whether a tensor that the network does not read may be in its files all the same: the other parts of what
    /// it was published with.
    #[must_use]
    pub fn may_skip(self, name: &str) -> bool {
        match self {
            Self::Whisper => name.starts_with("decoder.") || name == "proj_out.weight",
            Self::Llava => {
                [
                    "language_model.lm_head.",
                    "language_model.model.norm.",
                    "language_model.model.layers.",
                    "vision_tower.vision_model.post_layernorm.",
                    "vision_tower.vision_model.encoder.layers.",
                ]
                .iter()
                .any(|part| name.starts_with(part))
                    || name.ends_with(".position_ids")
                    || name.ends_with(".rotary_emb.inv_freq")
            }
            Self::Clip => crate::text::ClipText::may_skip(name),
            Self::VaeEncoder => name.starts_with("decoder.") || name.starts_with("post_quant_conv."),
            Self::VaeDecoder => name.starts_with("encoder.") || name.starts_with("quant_conv."),
            Self::Transformer => false,
        }
    }

    /// The name that tables and messages give it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Whisper => "whisper",
            Self::Llava => "llava",
            Self::Clip => "clip",
            Self::VaeEncoder => "vae encoder",
            Self::Transformer => "transformer",
            Self::VaeDecoder => "vae decoder",
        }
    }

    /// Whether a tensor is one of the large products that are stored in 8 or 4 bits where that is asked for: the
    /// linear layers of the transformer's blocks and of the Llama's layers.
    #[must_use]
    pub fn quantises(self, name: &str, shape: &[usize]) -> bool {
        let parts: &[&str] = match self {
            Self::Transformer => &["double_blocks.", "single_blocks."],
            Self::Llava => &["language_model.model.layers."],
            _ => &[],
        };
        shape.len() == 2 && name.ends_with(".weight") && parts.iter().any(|part| name.starts_with(part))
    }
}

/// The tensors of one network, as they are described.
#[derive(Default)]
struct Sheet(Vec<Spec>);

impl Sheet {
    fn put(&mut self, name: String, shape: &[usize], mean: f32, deviation: f32) {
        self.0.push(Spec { name, shape: shape.to_vec(), mean, deviation });
    }

    /// A table of embeddings or positions.
    fn table(&mut self, name: &str, shape: &[usize], deviation: f32) {
        self.put(name.to_owned(), shape, 0.0, deviation);
    }

    /// The weight `(out, in, ..)` of a layer that keeps the scale of its input, times `gain`.
    fn weight(&mut self, name: &str, shape: &[usize], gain: f32) {
        let fan_in: usize = shape[1..].iter().product();
        self.put(format!("{name}.weight"), shape, 0.0, gain / (fan_in as f32).sqrt());
    }

    /// Weight and bias of a layer.
    fn layer(&mut self, name: &str, shape: &[usize], gain: f32) {
        self.weight(name, shape, gain);
        self.put(format!("{name}.bias"), &shape[..1], 0.0, 0.02);
    }

    /// The weight of a normalisation.
    fn scale(&mut self, name: &str, width: usize) {
        self.put(format!("{name}.weight"), &[width], 1.0, 0.02);
    }

    /// Weight and bias of a normalisation.
    fn norm(&mut self, name: &str, width: usize) {
        self.scale(name, width);
        self.put(format!("{name}.bias"), &[width], 0.0, 0.02);
    }
}
