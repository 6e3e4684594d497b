//! Prompt and picture to text states: LLaVA for the sequence, CLIP for the pooled vector.

mod block;
pub mod clip;
mod clip_bpe;
pub mod config;
mod llama;
pub mod llava;
pub mod tokens;
pub mod vision;

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use self::tokens::{ClipTokenizer, PromptTokenizer, Tokens};
pub use self::{
    clip::ClipText,
    config::{ClipConfig, LlavaConfig, TextConfig},
    llava::{Llava, PromptEmbeds},
    vision::VisionTower,
};
use crate::{
    Error, Result,
    checkpoint::{Layout, Network, Setup, Stage, locate, official},
    image::{Rgb8, llava_pixels, resize_lanczos},
    weights::{Swap, read_json},
};

/// What is put before every prompt.
pub const QUALITY_PREFIX: &str = "Authentic, Realistic, Natural, High-quality, Lens-Fixed, ";
/// The prompt of a caller who gives none.
pub const DEFAULT_PROMPT: &str = "Authentic, Realistic, Natural, High-quality, Lens-Fixed.";
/// The prompt of the branch that guidance leads away from.
pub const NEGATIVE_PROMPT: &str = "Aerial view, aerial view, overexposed, low quality, deformation, a poor \
    composition, bad hands, bad teeth, bad eyes, bad limbs, distortion, blurring, Lens changes";

/// The prompt that the networks read for a caller's words.
#[must_use]
pub fn positive_prompt(words: &str) -> String {
    if words.trim().is_empty() { DEFAULT_PROMPT.to_owned() } else { format!("{QUALITY_PREFIX}{words}") }
}

/// What the transformer reads of one prompt.
#[derive(Debug, Clone)]
pub struct Branch {
    /// `(L, D)`, f32, from LLaVA.
    pub states: Tensor,
    /// L values, 1 or 0; see [`PromptEmbeds::mask`].
    pub mask: Vec<i64>,
    /// `(P)`, f32, from CLIP.
    pub pooled: Tensor,
}

/// What the text stage gives for one request.
#[derive(Debug, Clone)]
pub struct TextStates {
    /// The caller's prompt.
    pub positive: Branch,
    /// [`NEGATIVE_PROMPT`], with the same picture.
    pub negative: Branch,
    /// Tokens of the caller's prompt, with the words that are put before it.
    pub prompt_tokens: usize,
    /// Of these, the tokens that LLaVA read, from the first: all, or those before the cut.
    pub prompt_tokens_kept: usize,
    /// Most tokens that a prompt may have.
    pub prompt_token_limit: usize,
    /// CLIP's tokens of what LLaVA read, without the two around them.
    pub clip_tokens: usize,
    /// Of these, the tokens that CLIP read: at most 75 in the published model.
    pub clip_tokens_kept: usize,
}

/// The text stage.
pub struct TextEncoder {
    llava: Llava,
    llava_tokens: PromptTokenizer,
    clip: ClipText,
    clip_tokens: ClipTokenizer,
    /// Bytes of all weights in their files that are in no layer of the Llama.
    unswapped: u64,
    device: Device,
}

impl TextEncoder {
    /// Opens the stage below a folder of models, in the native layout (its config is [`TextConfig`]) or in the
    /// official one. LLaVA and CLIP each have their `tokenizer.json` beside their tensors.
    ///
    /// What the stage does not run is never read: CLIP's picture half, LLaVA's last layers and its head.
    /// Errors: as [`locate`] and [`read_json`], any other tensor that the networks do not have, a tokenizer that
    /// does not fit its network.
    pub fn open(models: &Path, setup: &Setup) -> Result<Self> {
        let located = locate(models, Stage::TextEncoder, setup.choice)?;
        let (llava_source, clip_source) = (located.source(Network::Llava)?, located.source(Network::Clip)?);
        let (llava_weights, clip_weights) = (llava_source.open(setup)?, clip_source.open(setup)?);
        let config = match located.layout {
            Layout::Native => read_json(&located.config(Network::Llava)?)?,
            Layout::Official => TextConfig {
                llava: official::llava(&located.config(Network::Llava)?)?,
                clip: official::clip(&located.config(Network::Clip)?, clip::vocabulary(&clip_weights)?)?,
            },
        };

        let llava = Llava::load(&llava_weights, &config.llava)?;
        llava_weights.refuse_unused(|name| llava.may_skip(name))?;
        let llava_tokens = PromptTokenizer::open(&llava_source.folder, &config.llava, llava.vocabulary()?)?;

        let clip = ClipText::load(&clip_weights, &config.clip)?;
        clip_weights.refuse_unused(ClipText::may_skip)?;
        let sizes = (clip.length(), clip.vocabulary()?);
        let clip_tokens = ClipTokenizer::open(&clip_source.folder, config.clip.eot_token, sizes)?;
        let unswapped = Llava::unswapped_bytes(&llava_weights) + clip_weights.extent().bytes();
        Ok(Self { llava, llava_tokens, clip, clip_tokens, unswapped, device: setup.device.clone() })
    }

    /// The weights of the Llama's layers, which may stay in memory or come and go.
    #[must_use]
    pub fn swap(&self) -> &Swap {
        self.llava.swap()
    }

    /// Bytes of all weights in their files that are in no layer of the Llama.
    #[must_use]
    pub fn unswapped_bytes(&self) -> u64 {
        self.unswapped
    }

    /// Tokens that LLaVA reads of a caller's prompt, with the words that are put before it; no more than it can read.
    ///
    /// Errors: the tokenizer does not take the text.
    pub fn prompt_tokens(&self, prompt: &str) -> Result<usize> {
        let positive = positive_prompt(prompt);
        let (kept, _) = self.llava_tokens.cut(&positive)?;
        Ok(self.llava_tokens.encode(kept)?.prompt)
    }

    /// Encodes a caller's prompt, and the negative prompt, with a picture.
    ///
    /// The picture is resized to `width` x `height` pixels (the size that is generated), then to the vision tower's
    /// side, as the reference does it.
    ///
    /// Errors: a prompt of more tokens than [`TextStates::prompt_token_limit`], a size of 0.
    pub fn encode(&self, prompt: &str, picture: &Rgb8, width: u32, height: u32) -> Result<TextStates> {
        self.encode_positive(&positive_prompt(prompt), picture, width, height)
    }

    /// As [`encode`](Self::encode), but a prompt of too many tokens is cut, as [`PromptTokenizer::cut`] does it.
    pub fn encode_cut(&self, prompt: &str, picture: &Rgb8, width: u32, height: u32) -> Result<TextStates> {
        let positive = positive_prompt(prompt);
        let (kept, total) = self.llava_tokens.cut(&positive)?;
        let states = self.encode_positive(kept, picture, width, height)?;
        Ok(TextStates { prompt_tokens: total, ..states })
    }

    fn encode_positive(&self, positive: &str, picture: &Rgb8, width: u32, height: u32) -> Result<TextStates> {
        for (field, value) in [("width", width), ("height", height)] {
            if !(1..=MAX_SIDE).contains(&value) {
                return Err(Error::input(field, format!("{value} pixels, expected 1 to {MAX_SIDE}")));
            }
        }
        let tokens = self.llava_tokens.encode(positive)?;
        let negative_tokens = self.llava_tokens.encode(NEGATIVE_PROMPT)?;
        let resized = resize_lanczos(picture, width as usize, height as usize);
        let features = self.llava.image_features(&llava_pixels(&resized, self.llava.vision().side())?)?;
        let (clip, negative_clip) = (self.clip_tokens.encode(positive)?, self.clip_tokens.encode(NEGATIVE_PROMPT)?);
        Ok(TextStates {
            prompt_tokens: tokens.prompt,
            prompt_tokens_kept: tokens.prompt,
            prompt_token_limit: self.llava_tokens.limit(),
            clip_tokens: clip.prompt,
            clip_tokens_kept: clip.prompt.min(self.clip_tokens.limit()),
            positive: self.branch(&tokens, clip, &features)?,
            negative: self.branch(&negative_tokens, negative_clip, &features)?,
        })
    }

    fn branch(&self, tokens: &Tokens, clip: Tokens, features: &Tensor) -> Result<Branch> {
        let embeds = self.llava.encode_with(&tokens.ids, &tokens.mask, features, self.llava_tokens.crop())?;
        let row = |values: Vec<i64>| Tensor::new(values, &self.device)?.unsqueeze(0);
        let (_, pooled) = self.clip.forward(&row(clip.ids)?, &row(clip.mask)?)?;
        Ok(Branch {
            states: embeds.states.to_dtype(DType::F32)?,
            mask: embeds.mask,
            pooled: pooled.squeeze(0)?.to_dtype(DType::F32)?,
        })
    }
}

/// Longest side of a generated picture, far past what the transformer can do.
const MAX_SIDE: u32 = 8192;

#[cfg(test)]
mod tests;
