//! The `config.json` files of the official tree: what they say that tensor shapes do not, in the native terms.
//!
//! What is absent has the published value. What contradicts the networks here is refused by name.

use std::{fmt::Debug, path::Path};

use serde::Deserialize;

use crate::{
    Error, Result,
    audio::AudioConfig,
    diffusion::TransformerConfig,
    text::{ClipConfig, LlavaConfig},
    vae::VaeConfig,
    weights::read_json,
};

/// Refuses any value but one; a key that is absent, or null, is silent.
fn only<T: PartialEq + Debug>(path: &Path, key: &str, found: Option<T>, supported: T) -> Result<()> {
    match found {
        Some(found) if found != supported => {
            Err(Error::file(path, format!("{key} is {found:?}, supported is {supported:?}")))
        }
        _ => Ok(()),
    }
}

#[derive(Deserialize)]
struct Whisper {
    encoder_attention_heads: Option<usize>,
    encoder_layers: Option<usize>,
    activation_function: Option<String>,
    num_mel_bins: Option<usize>,
    max_source_positions: Option<usize>,
    scale_embedding: Option<bool>,
}

pub(crate) fn audio(path: &Path) -> Result<AudioConfig> {
    let file: Whisper = read_json(path)?;
    only(path, "activation_function", file.activation_function.as_deref(), "gelu")?;
    only(path, "num_mel_bins", file.num_mel_bins, crate::audio::MELS)?;
    only(path, "max_source_positions", file.max_source_positions, crate::audio::COLUMNS / 2)?;
    only(path, "scale_embedding", file.scale_embedding, false)?;
    let published = AudioConfig::default();
    Ok(AudioConfig { heads: file.encoder_attention_heads.unwrap_or(published.heads), layers: file.encoder_layers })
}

#[derive(Deserialize)]
struct Clip {
    text_config: Option<ClipText>,
    #[serde(flatten)]
    top: ClipText,
}

#[derive(Deserialize)]
struct ClipText {
    num_attention_heads: Option<usize>,
    num_hidden_layers: Option<usize>,
    hidden_act: Option<String>,
    layer_norm_eps: Option<f64>,
}

/// `vocabulary` is the number of tokens that have an embedding. The end token is the last of them (49407 in the
/// published one), whatever `eos_token_id` says: files exist that say 2.
pub(crate) fn clip(path: &Path, vocabulary: usize) -> Result<ClipConfig> {
    let file: Clip = read_json(path)?;
    let text = file.text_config.unwrap_or(file.top);
    only(path, "hidden_act", text.hidden_act.as_deref(), "quick_gelu")?;
    only(path, "layer_norm_eps", text.layer_norm_eps, 1e-5)?;
    let published = ClipConfig::default();
    let eot_token = vocabulary.checked_sub(1).and_then(|last| u32::try_from(last).ok());
    Ok(ClipConfig {
        heads: text.num_attention_heads.unwrap_or(published.heads),
        eot_token: eot_token.unwrap_or(published.eot_token),
        layers: text.num_hidden_layers,
    })
}

#[derive(Deserialize)]
struct Llava {
    #[serde(default)]
    text_config: LlavaText,
    #[serde(default)]
    vision_config: LlavaVision,
    image_token_index: Option<u32>,
    pad_token_id: Option<u32>,
    projector_hidden_act: Option<String>,
    vision_feature_layer: Option<i64>,
    vision_feature_select_strategy: Option<String>,
}

#[derive(Default, Deserialize)]
struct LlavaText {
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    num_hidden_layers: Option<usize>,
    rope_theta: Option<f64>,
    rope_scaling: Option<serde_json::Value>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    bos_token_id: Option<u32>,
}

#[derive(Default, Deserialize)]
struct LlavaVision {
    num_attention_heads: Option<usize>,
    num_hidden_layers: Option<usize>,
    hidden_act: Option<String>,
    layer_norm_eps: Option<f64>,
}

/// Layers of a Llama whose file does not say how many it has, as the library that wrote the file has it.
const LLAMA_LAYERS: usize = 32;

pub(crate) fn llava(path: &Path) -> Result<LlavaConfig> {
    let file: Llava = read_json(path)?;
    let (text, vision) = (&file.text_config, &file.vision_config);
    only(path, "projector_hidden_act", file.projector_hidden_act.as_deref(), "gelu")?;
    only(path, "vision_feature_layer", file.vision_feature_layer, -2)?;
    only(path, "vision_feature_select_strategy", file.vision_feature_select_strategy.as_deref(), "default")?;
    only(path, "text_config.hidden_act", text.hidden_act.as_deref(), "silu")?;
    only(path, "text_config.attention_bias", text.attention_bias, false)?;
    only(path, "text_config.mlp_bias", text.mlp_bias, false)?;
    only(path, "text_config.rope_scaling", text.rope_scaling.as_ref(), &serde_json::Value::Null)?;
    only(path, "vision_config.hidden_act", vision.hidden_act.as_deref(), "quick_gelu")?;
    only(path, "vision_config.layer_norm_eps", vision.layer_norm_eps, 1e-5)?;
    let published = LlavaConfig::default();
    Ok(LlavaConfig {
        heads: text.num_attention_heads.unwrap_or(published.heads),
        kv_heads: text.num_key_value_heads.unwrap_or(published.kv_heads),
        layers: Some(text.num_hidden_layers.unwrap_or(LLAMA_LAYERS)),
        rope_theta: text.rope_theta.unwrap_or(published.rope_theta),
        rms_eps: text.rms_norm_eps.unwrap_or(published.rms_eps),
        vision_heads: vision.num_attention_heads.unwrap_or(published.vision_heads),
        vision_layers: vision.num_hidden_layers,
        bos_token: text.bos_token_id.unwrap_or(published.bos_token),
        image_token: file.image_token_index.unwrap_or(published.image_token),
        pad_token: file.pad_token_id.unwrap_or(published.pad_token),
        ..published
    })
}

#[derive(Deserialize)]
struct Vae {
    act_fn: Option<String>,
    down_block_types: Option<Vec<String>>,
    up_block_types: Option<Vec<String>>,
}

pub(crate) fn vae(path: &Path) -> Result<VaeConfig> {
    let file: Vae = read_json(path)?;
    only(path, "act_fn", file.act_fn.as_deref(), "silu")?;
    for (key, found, supported) in [
        ("down_block_types", file.down_block_types, "DownEncoderBlockCausal3D"),
        ("up_block_types", file.up_block_types, "UpDecoderBlockCausal3D"),
    ] {
        for kind in found.unwrap_or_default() {
            only(path, key, Some(kind.as_str()), supported)?;
        }
    }
    read_json(path)
}

/// The published tree has no such file, and needs none; one that stands there is in the native terms.
pub(crate) fn transformer(path: &Path) -> Result<TransformerConfig> {
    if path.is_file() { TransformerConfig::open(path) } else { Ok(TransformerConfig::default()) }
}
