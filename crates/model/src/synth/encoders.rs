//! The audio encoder (Whisper) and the text encoder (LLaVA-Llama and CLIP).

use std::path::Path;

use safetensors::Dtype;
use serde_json::json;

use super::{
    AUDIO, AUDIO_STATES, POOLED, TEXT, folder, tokenizer,
    values::{Sheet, Values},
    write_json,
};
use crate::Result;

const VISION: usize = 64;
const VISION_LAYERS: usize = 4;
const PATCH: usize = 14;
const SIDE: usize = 56;

/// The template that wraps a prompt; `{}` is the prompt.
const TEMPLATE: &str = "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video:<|eot_id|>\
    <|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>\nThe person looks like<image>";

pub(super) fn audio(values: &Values, out: &Path) -> Result<()> {
    const FFN: usize = 2 * AUDIO;
    let mut sheet = Sheet::new(values);
    sheet.layer("encoder.conv1", &[AUDIO, 80, 3], 1.0);
    sheet.layer("encoder.conv2", &[AUDIO, AUDIO, 3], 1.5);
    sheet.table("encoder.embed_positions.weight", &[1500, AUDIO], 0.3);
    for i in 0..AUDIO_STATES - 1 {
        let layer = format!("encoder.layers.{i}");
        sheet.weight(&format!("{layer}.self_attn.k_proj"), &[AUDIO, AUDIO], 1.0);
        for name in ["q_proj", "v_proj", "out_proj"] {
            sheet.layer(&format!("{layer}.self_attn.{name}"), &[AUDIO, AUDIO], 1.0);
        }
        sheet.norm(&format!("{layer}.self_attn_layer_norm"), AUDIO);
        sheet.layer(&format!("{layer}.fc1"), &[FFN, AUDIO], 1.0);
        sheet.layer(&format!("{layer}.fc2"), &[AUDIO, FFN], 1.0);
        sheet.norm(&format!("{layer}.final_layer_norm"), AUDIO);
    }
    sheet.norm("encoder.layer_norm", AUDIO);
    sheet.save(&out.join("model.safetensors"), Dtype::F32)?;
    write_json(&out.join("config.json"), &json!({ "heads": 4 }))
}

pub(super) fn text(values: &Values, out: &Path) -> Result<()> {
    let (llava_folder, clip_folder) = (folder(out, "llava")?, folder(out, "clip")?);
    llava(&values.part("llava")).save(&llava_folder.join("model.safetensors"), Dtype::BF16)?;
    clip(&values.part("clip")).save(&clip_folder.join("model.safetensors"), Dtype::BF16)?;
    let words = tokenizer::byte_level(&tokenizer::LLAVA, "<|begin_of_text|>", None);
    write_json(&llava_folder.join("tokenizer.json"), &words)?;
    let words = tokenizer::byte_level(&tokenizer::CLIP, "<|startoftext|>", Some("<|endoftext|>"));
    write_json(&clip_folder.join("tokenizer.json"), &words)?;
    let llava_id = |token| tokenizer::id(&tokenizer::LLAVA, token);
    let clip_id = |token| tokenizer::id(&tokenizer::CLIP, token);
    write_json(
        &out.join("config.json"),
        &json!({
            "llava": {
                "heads": 4, "kv_heads": 2, "rope_theta": 500000.0,
                "vision_heads": 4,
                "bos_token": llava_id("<|begin_of_text|>"),
                "image_token": llava_id("<image>"),
                "pad_token": llava_id("<pad>"),
                "template": TEMPLATE, "prompt_tokens": 512,
            },
            "clip": { "heads": 4, "eot_token": clip_id("<|endoftext|>") },
        }),
    )
}

/// Vision tower, projector and Llama.
fn llava(values: &Values) -> Sheet {
    let mut sheet = Sheet::new(values);
    let vision = "vision_tower.vision_model";
    let positions = (SIDE / PATCH) * (SIDE / PATCH) + 1;
    sheet.table(&format!("{vision}.embeddings.class_embedding"), &[VISION], 0.5);
    sheet.weight(&format!("{vision}.embeddings.patch_embedding"), &[VISION, 3, PATCH, PATCH], 4.0);
    sheet.table(&format!("{vision}.embeddings.position_embedding.weight"), &[positions, VISION], 0.3);
    sheet.norm(&format!("{vision}.pre_layrnorm"), VISION);
    for i in 0..VISION_LAYERS {
        clip_layer(&mut sheet, &format!("{vision}.encoder.layers.{i}"), VISION);
    }
    sheet.norm(&format!("{vision}.post_layernorm"), VISION);
    sheet.layer("multi_modal_projector.linear_1", &[TEXT, VISION], 1.0);
    sheet.layer("multi_modal_projector.linear_2", &[TEXT, TEXT], 1.5);

    const LAYERS: usize = 5;
    const KV: usize = TEXT / 2;
    const FFN: usize = 2 * TEXT;
    let words = tokenizer::vocabulary(&tokenizer::LLAVA);
    let llama = "language_model.model";
    sheet.table(&format!("{llama}.embed_tokens.weight"), &[words, TEXT], 0.7);
    for i in 0..LAYERS {
        let layer = format!("{llama}.layers.{i}");
        for (name, out) in [("q_proj", TEXT), ("k_proj", KV), ("v_proj", KV), ("o_proj", TEXT)] {
            sheet.weight(&format!("{layer}.self_attn.{name}"), &[out, TEXT], 1.0);
        }
        sheet.weight(&format!("{layer}.mlp.gate_proj"), &[FFN, TEXT], 1.0);
        sheet.weight(&format!("{layer}.mlp.up_proj"), &[FFN, TEXT], 1.0);
        sheet.weight(&format!("{layer}.mlp.down_proj"), &[TEXT, FFN], 1.0);
        sheet.scale(&format!("{layer}.input_layernorm"), TEXT);
        sheet.scale(&format!("{layer}.post_attention_layernorm"), TEXT);
    }
    sheet.scale(&format!("{llama}.norm"), TEXT);
    sheet.weight("language_model.lm_head", &[words, TEXT], 1.0);
    sheet
}

fn clip(values: &Values) -> Sheet {
    let mut sheet = Sheet::new(values);
    let words = tokenizer::vocabulary(&tokenizer::CLIP);
    sheet.table("text_model.embeddings.token_embedding.weight", &[words, POOLED], 0.7);
    sheet.table("text_model.embeddings.position_embedding.weight", &[77, POOLED], 0.3);
    for i in 0..3 {
        clip_layer(&mut sheet, &format!("text_model.encoder.layers.{i}"), POOLED);
    }
    sheet.norm("text_model.final_layer_norm", POOLED);
    sheet
}

fn clip_layer(sheet: &mut Sheet, layer: &str, width: usize) {
    for name in ["k_proj", "v_proj", "q_proj", "out_proj"] {
        sheet.layer(&format!("{layer}.self_attn.{name}"), &[width, width], 1.0);
    }
    sheet.norm(&format!("{layer}.layer_norm1"), width);
    sheet.layer(&format!("{layer}.mlp.fc1"), &[2 * width, width], 1.0);
    sheet.layer(&format!("{layer}.mlp.fc2"), &[width, 2 * width], 1.0);
    sheet.norm(&format!("{layer}.layer_norm2"), width);
}
