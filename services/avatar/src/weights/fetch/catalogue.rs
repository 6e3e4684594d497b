//! Which files of the official repository each stage needs.

use clap::ValueEnum;

/// The official repository. Its files lie under `ckpts/`, and so do ours.
pub const REPO: &str = "tencent/HunyuanVideo-Avatar";
/// In the repository, but needed by no stage: the image encoder brings its own face detector.
pub const NEVER: &str = "ckpts/det_align/detface.pt";

/// A stage whose files are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum Stage {
    AudioEncoder,
    TextEncoder,
    ImageEncoder,
    Diffusion,
    VaeDecode,
}

/// How the transformer's weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    /// 16 bits a weight, 26 GB.
    Bf16,
    /// 8 bits a weight for most, with a file of scales.
    Fp8,
}

/// One thing that a stage needs, which the repository may hold in several forms.
#[derive(Debug, Clone, Copy)]
pub struct Need {
    /// What it is, for the sentence that says that it is missing.
    pub what: &'static str,
    /// The folder that its files lie in.
    pub folder: &'static str,
    /// Sets of file names, the best first: the first set that is there in full is taken.
    pub forms: &'static [&'static [&'static str]],
    /// False if the stage can do without.
    pub required: bool,
}

const WHISPER: &str = "ckpts/whisper-tiny";
const LLAVA: &str = "ckpts/llava_llama_image";
const CLIP: &str = "ckpts/text_encoder_2";
const VAE: &str = "ckpts/hunyuan-video-t2v-720p/vae";
const TRANSFORMERS: &str = "ckpts/hunyuan-video-t2v-720p/transformers";
const LLAVA_SHARDS: &[&str] = &[
    "model-00001-of-00004.safetensors",
    "model-00002-of-00004.safetensors",
    "model-00003-of-00004.safetensors",
    "model-00004-of-00004.safetensors",
    "model.safetensors.index.json",
];

/// What a stage needs. Stages may share files.
#[must_use]
pub fn needs(stage: Stage, precision: Precision) -> Vec<Need> {
    match stage {
        Stage::AudioEncoder => vec![
            required("Whisper's weights", WHISPER, &[&["model.safetensors"], &["pytorch_model.bin"]]),
            required("Whisper's configuration", WHISPER, &[&["config.json"]]),
            optional(WHISPER, &[&["preprocessor_config.json"]]),
        ],
        Stage::TextEncoder => vec![
            required("LLaVA's weights", LLAVA, &[LLAVA_SHARDS]),
            required("LLaVA's configuration", LLAVA, &[&["config.json"]]),
            required("LLaVA's tokenizer", LLAVA, &[&["tokenizer.json"]]),
            optional(LLAVA, &[&["tokenizer_config.json"]]),
            optional(LLAVA, &[&["special_tokens_map.json"]]),
            optional(LLAVA, &[&["added_tokens.json"]]),
            optional(LLAVA, &[&["preprocessor_config.json"]]),
            required("CLIP's weights", CLIP, &[&["model.safetensors"], &["pytorch_model.bin"]]),
            required("CLIP's configuration", CLIP, &[&["config.json"]]),
            required("CLIP's tokenizer", CLIP, &[&["tokenizer.json"], &["vocab.json", "merges.txt"]]),
            optional(CLIP, &[&["vocab.json", "merges.txt"]]),
            optional(CLIP, &[&["tokenizer_config.json"]]),
            optional(CLIP, &[&["special_tokens_map.json"]]),
        ],
        Stage::ImageEncoder | Stage::VaeDecode => vec![
            required("the VAE's weights", VAE, &[&["pytorch_model.pt"]]),
            required("the VAE's configuration", VAE, &[&["config.json"]]),
        ],
        Stage::Diffusion => match precision {
            Precision::Bf16 => {
                vec![required("the transformer's weights", TRANSFORMERS, &[&["mp_rank_00_model_states.pt"]])]
            }
            Precision::Fp8 => vec![required(
                "the transformer's 8-bit weights and their scales",
                TRANSFORMERS,
                &[&["mp_rank_00_model_states_fp8.pt", "mp_rank_00_model_states_fp8_map.pt"]],
            )],
        },
    }
}

const fn required(what: &'static str, folder: &'static str, forms: &'static [&'static [&'static str]]) -> Need {
    Need { what, folder, forms, required: true }
}

const fn optional(folder: &'static str, forms: &'static [&'static [&'static str]]) -> Need {
    Need { what: "", folder, forms, required: false }
}
