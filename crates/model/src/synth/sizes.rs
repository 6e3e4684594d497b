//! The two sizes of random checkpoints: every network's tensors, configs and tokenizers.

use serde_json::{Value, json};

use super::tokenizer::{self, Special};
use crate::{
    blueprint::{ClipSizes, LlavaSizes, Network, Spec, TransformerSizes, VaeHalf, VaeSizes, WhisperSizes},
    checkpoint::Stage,
    text::LlavaConfig,
};

/// How many blocks the large networks have; the published model's where nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Depth {
    /// Double blocks of the transformer, 1 to 20. Every second one is followed by an audio adapter.
    pub double_blocks: usize,
    /// Single blocks of the transformer, 1 to 40.
    pub single_blocks: usize,
    /// Layers of the Llama, 3 to 32; the last two are not run.
    pub llama_layers: usize,
}

impl Default for Depth {
    fn default() -> Self {
        let TransformerSizes { double, single, .. } = TransformerSizes::PUBLISHED;
        Self { double_blocks: double, single_blocks: single, llama_layers: LlavaSizes::PUBLISHED.layers }
    }
}

/// How large a random checkpoint's networks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// Widths of 64 and 128.
    Tiny,
    /// The published model's widths.
    Full(Depth),
}

/// What is written of one network.
pub(super) struct Sheet {
    pub(super) network: Network,
    pub(super) tensors: Vec<Spec>,
    pub(super) tokenizer: Option<Value>,
}

const TINY_WIDTH: usize = 64;

const TINY_WHISPER: WhisperSizes =
    WhisperSizes { width: TINY_WIDTH, inner: 2 * TINY_WIDTH, layers: 4, bands: 80, positions: 1500 };

const TINY_LLAVA: LlavaSizes = LlavaSizes {
    vision: TINY_WIDTH,
    vision_inner: 2 * TINY_WIDTH,
    vision_layers: 4,
    patch: 14,
    vision_positions: 17,
    projector: TINY_WIDTH,
    words: tokenizer::vocabulary(&tokenizer::LLAVA),
    width: TINY_WIDTH,
    keys: TINY_WIDTH / 2,
    inner: 2 * TINY_WIDTH,
    layers: 5,
    ends: true,
};

const TINY_CLIP: ClipSizes = ClipSizes {
    width: TINY_WIDTH,
    inner: 2 * TINY_WIDTH,
    layers: 3,
    words: tokenizer::vocabulary(&tokenizer::CLIP),
    positions: 77,
};

const TINY_TRANSFORMER: TransformerSizes = TransformerSizes {
    hidden: 128,
    head: 32,
    inner: 512,
    double: 2,
    single: 3,
    refiner: 2,
    refiner_inner: 512,
    latent: 16,
    text: TINY_WIDTH,
    pooled: TINY_WIDTH,
    sinusoids: 256,
    audio: 10 * 5 * TINY_WIDTH,
    audio_inner: 64,
    audio_tokens: 4,
    adapters: 1,
    adapter: 64,
};

/// The template that wraps a prompt of the tiny network; `{}` is the prompt.
const TINY_TEMPLATE: &str = "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video:<|eot_id|>\
    <|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>\nThe person looks like<image>";
/// As many tokens before the prompt as in the published template, where a token is a byte: 95, with the first.
const FULL_TEMPLATE: &str = "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video: contents, objects, \
    actions, background, camera, lights.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>\n\
    The person looks like<image>";

impl Size {
    /// The networks of a stage, and its `config.json`.
    pub(super) fn stage(self, stage: Stage) -> (Vec<Sheet>, Value) {
        match stage {
            Stage::AudioEncoder => {
                let (sizes, heads) = match self {
                    Self::Tiny => (TINY_WHISPER, 4),
                    Self::Full(_) => (WhisperSizes::PUBLISHED, 6),
                };
                (vec![plain(Network::Whisper, sizes.tensors())], json!({ "heads": heads }))
            }
            Stage::TextEncoder => self.text(),
            Stage::ImageEncoder => self.vae(Network::VaeEncoder, VaeHalf::Encoder),
            Stage::Diffusion => self.transformer(),
            Stage::VaeDecode => self.vae(Network::VaeDecoder, VaeHalf::Decoder),
        }
    }

    fn text(self) -> (Vec<Sheet>, Value) {
        let (llava, clip, words, clip_words) = match self {
            Self::Tiny => (TINY_LLAVA, TINY_CLIP, &tokenizer::LLAVA[..], &tokenizer::CLIP[..]),
            Self::Full(depth) => (
                LlavaSizes { layers: depth.llama_layers, ..LlavaSizes::PUBLISHED },
                ClipSizes::PUBLISHED,
                &tokenizer::PUBLISHED_LLAVA[..],
                &tokenizer::PUBLISHED_CLIP[..],
            ),
        };
        let sheet = |network, tensors, words: &[Special], end| Sheet {
            network,
            tensors,
            tokenizer: Some(tokenizer::byte_level(words, end)),
        };
        let sheets = vec![
            sheet(Network::Llava, llava.tensors(), words, None),
            sheet(Network::Clip, clip.tensors(), clip_words, Some(1)),
        ];
        let id = |token| tokenizer::id(words, token);
        let ids = json!({
            "bos_token": id("<|begin_of_text|>"), "image_token": id("<image>"), "pad_token": id("<pad>"),
        });
        let mut said = match self {
            Self::Tiny => json!({
                "heads": 4, "kv_heads": 2, "rope_theta": 500000.0, "vision_heads": 4,
                "template": TINY_TEMPLATE, "prompt_tokens": 512,
            }),
            Self::Full(_) => {
                let LlavaConfig { heads, kv_heads, rope_theta, vision_heads, prompt_tokens, .. } =
                    LlavaConfig::default();
                json!({
                    "heads": heads, "kv_heads": kv_heads, "rope_theta": rope_theta, "vision_heads": vision_heads,
                    "template": FULL_TEMPLATE, "prompt_tokens": prompt_tokens,
                })
            }
        };
        if let (Some(said), Value::Object(ids)) = (said.as_object_mut(), ids) {
            said.extend(ids);
        }
        let heads = if self == Self::Tiny { 4 } else { 12 };
        let eot = tokenizer::id(clip_words, "<|endoftext|>");
        (sheets, json!({ "llava": said, "clip": { "heads": heads, "eot_token": eot } }))
    }

    fn vae(self, network: Network, half: VaeHalf) -> (Vec<Sheet>, Value) {
        let (sizes, groups) = match self {
            Self::Tiny => (VaeSizes { channels: vec![16, 32, 32, 32], ..VaeSizes::published() }, 8),
            Self::Full(_) => (VaeSizes::published(), 32),
        };
        let config = json!({
            "block_out_channels": sizes.channels, "layers_per_block": sizes.resnets, "latent_channels": sizes.latent,
            "norm_num_groups": groups, "sample_size": 256, "sample_tsize": 64, "scaling_factor": 0.476986,
            "time_compression_ratio": 4, "spatial_compression_ratio": 8,
            "mid_block_add_attention": true, "mid_block_causal_attn": true,
        });
        (vec![plain(network, sizes.tensors(half))], config)
    }

    fn transformer(self) -> (Vec<Sheet>, Value) {
        let sizes = match self {
            Self::Tiny => TINY_TRANSFORMER,
            Self::Full(Depth { double_blocks: double, single_blocks: single, .. }) => {
                TransformerSizes { double, single, adapters: double / 2, ..TransformerSizes::PUBLISHED }
            }
        };
        let rope = if self == Self::Tiny { [8, 12, 12] } else { [16, 56, 56] };
        let mut config = json!({
            "hidden_size": sizes.hidden, "num_heads": sizes.hidden / sizes.head, "rope_dim_list": rope,
            "rope_theta": 256.0, "in_channels": sizes.latent,
            "depth_double_blocks": sizes.double, "depth_single_blocks": sizes.single,
            "text_states_dim": sizes.text, "text_states_dim_2": sizes.pooled,
            "audio_double_blocks": (1..sizes.double).step_by(2).collect::<Vec<_>>(),
        });
        if self == Self::Tiny {
            config["defaults"] = json!({ "size": 128, "steps": 8, "guidance_scale": 2.5, "flow_shift": 5.0 });
        }
        (vec![plain(Network::Transformer, sizes.tensors())], config)
    }
}

fn plain(network: Network, tensors: Vec<Spec>) -> Sheet {
    Sheet { network, tensors, tokenizer: None }
}
