//! What a model is, as far as bytes and seconds depend on it: its networks' sizes, and the values of their tensors by
//! block.

use serde::{Deserialize, Serialize};

use crate::{precision::Precision, stage::Stage};

const PUBLISHED: &str = include_str!("published.toml");
/// Largest width or length that sums are made of, so that they stay numbers.
const MOST_WIDE: u64 = 1 << 20;
/// Most blocks of one kind, and most kinds.
const MOST_BLOCKS: u64 = 512;

/// A network, as stages run them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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

impl Network {
    /// The stage that runs it.
    #[must_use]
    pub const fn stage(self) -> Stage {
        match self {
            Self::Whisper => Stage::AudioEncoder,
            Self::Llava | Self::Clip => Stage::TextEncoder,
            Self::VaeEncoder => Stage::ImageEncoder,
            Self::Transformer => Stage::Diffusion,
            Self::VaeDecoder => Stage::VaeDecode,
        }
    }
}

/// Tensors that live and move together, in one or more blocks that are alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Whose they are.
    pub network: Network,
    /// What their names begin with.
    pub name: String,
    /// Blocks; what is below is of one of them.
    pub count: u64,
    /// Values of the large layers, which a precision lowers.
    pub large: u64,
    /// Rows of the large layers.
    pub rows: u64,
    /// Values of all other tensors, which a stage keeps.
    pub other: u64,
    /// Of these, the values that a CPU copies to its heap: vectors, tables and convolutions. Matrices stay in their
    /// file.
    pub heap: u64,
    /// Values of a table of which a stage reads single rows, so that it stays in its file.
    #[serde(default)]
    pub on_disk: u64,
}

/// Sizes of Whisper's encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // As the blueprint of the networks names them.
pub struct Whisper {
    pub width: u64,
    pub inner: u64,
    pub layers: u64,
    pub bands: u64,
    /// States of 30 s.
    pub positions: u64,
    pub heads: u64,
}

/// Sizes of LLaVA, of what is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Llava {
    pub vision: u64,
    pub vision_inner: u64,
    pub vision_layers: u64,
    pub vision_heads: u64,
    /// Patches of a picture, and one.
    pub vision_positions: u64,
    pub patch: u64,
    pub projector: u64,
    pub width: u64,
    /// Width of all keys, or of all values.
    pub keys: u64,
    pub inner: u64,
    pub layers: u64,
    pub heads: u64,
    /// Tokens of the longest prompt with its template.
    pub tokens: u64,
    /// Of these, the rows before the prompt, which are dropped from the result.
    pub crop: u64,
    /// Tokens of the template after the prompt, with the picture's.
    pub tail: u64,
    /// Tokens of the prompt that guidance leads away from.
    pub negative: u64,
}

impl Llava {
    /// Rows of the text that see each other, after the template's first: a prompt of so many tokens, the rest of the
    /// template, and the picture's patches in the place of its token.
    #[must_use]
    pub fn rows(&self, prompt_tokens: u64) -> u64 {
        (prompt_tokens + self.tail + self.vision_positions).saturating_sub(2).min(self.states()).max(1)
    }

    /// Rows of the text states, those that only fill included.
    #[must_use]
    pub fn states(&self) -> u64 {
        (self.tokens + self.vision_positions).saturating_sub(2 + self.crop)
    }
}

/// Sizes of CLIP's text half.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Clip {
    pub width: u64,
    pub inner: u64,
    pub layers: u64,
    pub positions: u64,
}

/// Sizes of the VAE.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vae {
    /// Channels after each block of the encoder; the decoder has them in reverse.
    pub channels: Vec<u64>,
    /// How each block of the encoder shrinks its input (time, space).
    pub shrinks: Vec<[u64; 2]>,
    /// How each block of the decoder grows its input.
    pub grows: Vec<[u64; 2]>,
    /// Residual layers of each block of the encoder; the decoder has one more.
    pub resnets: u64,
    /// Channels of a latent.
    pub latent: u64,
    /// Whether the middle block has an attention layer.
    pub attention: bool,
    /// Side of a tile in latents.
    pub tile_side: u64,
    /// Length of a tile in latent frames; the first frame comes on top.
    pub tile_length: u64,
}

impl Vae {
    /// With tiles `divisor` times shorter along every side, in whole strides of 4, as `model::vae` cuts them.
    #[must_use]
    pub fn with_smaller_tiles(&self, divisor: u64) -> Self {
        let smaller = |tile: u64| (tile / divisor.max(1) / 4 * 4).max(4).min(tile);
        let (tile_side, tile_length) = match divisor {
            0 | 1 => (self.tile_side, self.tile_length),
            _ => (smaller(self.tile_side), smaller(self.tile_length)),
        };
        Self { tile_side, tile_length, ..self.clone() }
    }

    /// Side of a tile in pixels, and its length in frames.
    #[must_use]
    pub fn tile(&self) -> [u64; 2] {
        [8 * self.tile_side, 4 * self.tile_length]
    }
}

/// Sizes of the transformer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Transformer {
    pub hidden: u64,
    pub head: u64,
    pub inner: u64,
    pub double: u64,
    pub single: u64,
    pub refiner: u64,
    pub refiner_inner: u64,
    pub latent: u64,
    pub text: u64,
    pub pooled: u64,
    /// Audio values of a frame.
    pub audio: u64,
    pub audio_inner: u64,
    pub audio_tokens: u64,
    pub adapters: u64,
    pub adapter: u64,
}

/// A model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelTable {
    /// What messages call it.
    pub name: String,
    /// Whisper's encoder.
    pub whisper: Whisper,
    /// LLaVA.
    pub llava: Llava,
    /// CLIP's text half.
    pub clip: Clip,
    /// The VAE.
    pub vae: Vae,
    /// The transformer.
    pub transformer: Transformer,
    /// All tensors that are run.
    pub parts: Vec<Part>,
    /// Bytes on a CPU's heap that are no tensors: tokenizers, names and places of tensors, by stage.
    #[serde(default)]
    pub tables: Vec<(Stage, u64)>,
    /// The precision of the large layers in the files, by stage; none for a model that is not there.
    #[serde(default)]
    pub stored: Vec<(Stage, Precision)>,
    /// Networks whose matrices are f32 in their files, so that a CPU that computes in f32 need not decode them.
    #[serde(default)]
    pub in_f32: Vec<Network>,
}

/// A number of a table that is too large to count with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{model}: {field} is {value}, allowed are 1 to {limit}")]
pub struct TableError {
    /// The model.
    pub model: String,
    /// The number.
    pub field: &'static str,
    /// Its value.
    pub value: u64,
    /// The largest allowed one.
    pub limit: u64,
}

impl ModelTable {
    /// The published model at its full size.
    ///
    /// Errors: never, as a test holds.
    pub fn published() -> Result<Self, String> {
        toml::from_str(PUBLISHED).map_err(|e| e.to_string())
    }

    /// Refuses numbers that sums cannot be made of.
    pub fn check(&self) -> Result<(), TableError> {
        let (t, l, v) = (&self.transformer, &self.llava, &self.vae);
        let widths = [
            ("transformer.hidden", t.hidden),
            ("transformer.head", t.head),
            ("transformer.inner", t.inner),
            ("transformer.latent", t.latent),
            ("transformer.text", t.text),
            ("transformer.audio", t.audio),
            ("transformer.audio_inner", t.audio_inner),
            ("transformer.audio_tokens", t.audio_tokens),
            ("transformer.refiner_inner", t.refiner_inner),
            ("llava.width", l.width),
            ("llava.inner", l.inner),
            ("llava.keys", l.keys),
            ("llava.tokens", l.tokens),
            ("llava.tail", l.tail),
            ("llava.negative", l.negative),
            ("llava.vision", l.vision),
            ("llava.vision_inner", l.vision_inner),
            ("llava.vision_positions", l.vision_positions),
            ("llava.projector", l.projector),
            ("llava.heads", l.heads),
            ("llava.vision_heads", l.vision_heads),
            ("whisper.heads", self.whisper.heads),
            ("clip.width", self.clip.width),
            ("clip.inner", self.clip.inner),
            ("clip.positions", self.clip.positions),
            ("whisper.width", self.whisper.width),
            ("whisper.inner", self.whisper.inner),
            ("whisper.bands", self.whisper.bands),
            ("whisper.positions", self.whisper.positions),
            ("vae.latent", v.latent),
            ("vae.tile_side", v.tile_side),
            ("vae.tile_length", v.tile_length),
        ];
        let channels = v.channels.iter().map(|c| ("vae.channels", *c));
        let counts = [
            ("transformer.single", t.single),
            ("llava.layers", l.layers),
            ("llava.vision_layers", l.vision_layers),
            ("clip.layers", self.clip.layers),
            ("whisper.layers", self.whisper.layers),
            ("vae.resnets", v.resnets),
            ("vae.blocks", v.channels.len() as u64),
            ("parts", self.parts.len() as u64),
        ];
        let blocks = self.parts.iter().map(|part| ("parts.count", part.count));
        let check = |limit: u64| {
            move |(field, value): (&'static str, u64)| match (1..=limit).contains(&value) {
                true => Ok(()),
                false => Err(TableError { model: self.name.clone(), field, value, limit }),
            }
        };
        widths.into_iter().chain(channels).try_for_each(check(MOST_WIDE))?;
        counts.into_iter().chain(blocks).try_for_each(check(MOST_BLOCKS))
    }

    /// The parts that a stage runs.
    pub fn of(&self, stage: Stage) -> impl Iterator<Item = &Part> {
        self.parts.iter().filter(move |part| part.network.stage() == stage)
    }

    /// Bytes of all weights that a stage keeps in memory, its large layers at a precision and everything else in 16 bits.
    #[must_use]
    pub fn weights(&self, stage: Stage, precision: Precision) -> u64 {
        self.of(stage).map(|part| part.bytes(precision).saturating_mul(part.count)).fold(0, u64::saturating_add)
    }

    /// The precision that a stage's large layers have in their files.
    #[must_use]
    pub fn stored_of(&self, stage: Stage) -> Option<Precision> {
        self.stored.iter().find(|(of, _)| *of == stage).map(|(_, precision)| *precision)
    }

    /// Bytes on a CPU's heap that are no tensors.
    #[must_use]
    pub fn tables_of(&self, stage: Stage) -> u64 {
        self.tables.iter().filter(|(of, _)| *of == stage).map(|(_, bytes)| *bytes).fold(0, u64::saturating_add)
    }
}

impl Part {
    /// Bytes of one block, its large layers at a precision and everything else in 16 bits; Whisper is in 32.
    #[must_use]
    pub fn bytes(&self, precision: Precision) -> u64 {
        let each = if self.network == Network::Whisper { 4 } else { 2 };
        precision.bytes(self.large, self.rows).saturating_add(self.other.saturating_mul(each))
    }

    /// Whether its blocks can be swapped one by one: those of the transformer and the layers of the Llama.
    #[must_use]
    pub fn swaps(&self) -> bool {
        self.large > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Section 3 of the specification, in GB of 1e9 bytes.
    #[test]
    fn the_published_model_has_its_bytes_in_every_precision() {
        let table = ModelTable::published().unwrap();
        table.check().unwrap();
        for (stage, precision, gb) in [
            (Stage::Diffusion, Precision::Bf16, 25.98),
            (Stage::Diffusion, Precision::Fp8, 13.53),
            (Stage::Diffusion, Precision::Int8, 13.53),
            (Stage::Diffusion, Precision::Q8_0, 14.3),
            (Stage::Diffusion, Precision::Q4K, 8.08),
            (Stage::AudioEncoder, Precision::Bf16, 0.033),
        ] {
            let bytes = table.weights(stage, precision) as f64 / 1e9;
            assert!((bytes - gb).abs() < 0.02, "{stage} in {precision}: {bytes} GB, expected {gb}");
        }
        let vae =
            table.weights(Stage::ImageEncoder, Precision::Bf16) + table.weights(Stage::VaeDecode, Precision::Bf16);
        assert!((vae as f64 / 1e9 - 0.493).abs() < 0.002, "{vae}");
    }

    #[test]
    fn a_number_that_cannot_be_counted_with_is_refused_by_name() {
        let mut table = ModelTable::published().unwrap();
        table.llava.inner = u64::MAX;
        assert_eq!(table.check().unwrap_err().field, "llava.inner");
    }
}
