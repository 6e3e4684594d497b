//! `config.json` of the text encoder's folder: what tensor shapes cannot say.

use serde::{Deserialize, Serialize};

use super::vision::layers_for;

/// The whole file.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TextConfig {
    /// Vision tower, projector and Llama.
    pub llava: LlavaConfig,
    /// CLIP's text network.
    pub clip: ClipConfig,
}

/// LLaVA: vision tower, projector and Llama. What is left out has the published model's value.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LlavaConfig {
    /// Attention heads of the Llama.
    pub heads: usize,
    /// Key and value heads of the Llama; they divide `heads`.
    pub kv_heads: usize,
    /// Layers of the whole Llama, from which `hidden_state_index` counts; absent: those that the file has.
    pub layers: Option<usize>,
    /// Which hidden state the Llama gives, counted from the end: -1 would be the output of the last layer.
    pub hidden_state_index: i64,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// Epsilon of the Llama's normalisations.
    pub rms_eps: f64,
    /// Attention heads of the vision tower.
    pub vision_heads: usize,
    /// Layers of the whole vision tower; absent: those that the file has.
    pub vision_layers: Option<usize>,
    /// Which hidden state the vision tower gives, counted from the end.
    pub vision_hidden_state_index: i64,
    /// Token that every text begins with.
    pub bos_token: u32,
    /// Token that the picture's features replace.
    pub image_token: u32,
    /// Token that fills a text up to its length.
    pub pad_token: u32,
    /// The text around a prompt, which stands for `{}`; the image token comes after it.
    pub template: String,
    /// Tokens from the prompt to the end of the template.
    pub prompt_tokens: usize,
}

impl Default for LlavaConfig {
    fn default() -> Self {
        Self {
            heads: 32,
            kv_heads: 8,
            layers: None,
            hidden_state_index: -3,
            rope_theta: 500_000.0,
            rms_eps: 1e-5,
            vision_heads: 16,
            vision_layers: None,
            vision_hidden_state_index: -2,
            bos_token: 128_000,
            image_token: 128_257,
            pad_token: 128_258,
            template: TEMPLATE.to_owned(),
            prompt_tokens: 256,
        }
    }
}

impl LlavaConfig {
    /// How many layers of the vision tower and of the Llama are run, of those that a checkpoint has.
    ///
    /// Errors: in words, that a hidden state is taken which the layers do not give.
    pub(crate) fn needed_layers(&self, vision: usize, llama: usize) -> Result<(usize, usize), String> {
        let vision = layers_for(self.vision_hidden_state_index, self.vision_layers.unwrap_or(vision))?;
        Ok((vision, layers_for(self.hidden_state_index, self.layers.unwrap_or(llama))?))
    }
}

/// CLIP's text network. What is left out has the published model's value.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClipConfig {
    /// Attention heads.
    pub heads: usize,
    /// Token that ends a text and fills it up to its length.
    pub eot_token: u32,
    /// Layers; absent: those that the file has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
}

impl Default for ClipConfig {
    fn default() -> Self {
        Self { heads: 12, eot_token: 49_407, layers: None }
    }
}

const TEMPLATE: &str = "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the \
    following aspects: 1. The main content and theme of the video.2. The color, shape, size, texture, quantity, \
    text, and spatial relationships of the objects.3. Actions, events, behaviors temporal relationships, physical \
    movement changes of the objects.4. background environment, light, style and atmosphere.5. camera angles, \
    movements, and transitions used in the video:<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}\
    <|eot_id|>\nThe person looks like<image>";
