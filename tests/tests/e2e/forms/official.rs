//! The official download's folder tree, made of the tiny checkpoint.

use std::{fs, path::Path};

use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::sheet::{Plain, Sheet, read, renamed, write};

pub const TRANSFORMERS: &str = "ckpts/hunyuan-video-t2v-720p/transformers";
pub const VAE: &str = "ckpts/hunyuan-video-t2v-720p/vae";
pub const WHISPER: &str = "ckpts/whisper-tiny";
pub const CLIP: &str = "ckpts/text_encoder_2";
pub const LLAVA: &str = "ckpts/llava_llama_image";
pub const BF16: &str = "hunyuan_video_avatar_720_bf16.safetensors";
pub const INT8: &str = "hunyuan_video_avatar_720_quanto_bf16_int8.safetensors";

/// The tiny checkpoint in the native layout, with the published template around a prompt: the official tree has no
/// place for another.
pub fn native() -> TempDir {
    let models = tempfile::tempdir().unwrap();
    model::synth::tiny(models.path(), 1).unwrap();
    let path = models.path().join("text-encoder/config.json");
    let mut config = json(&path);
    for key in ["template", "prompt_tokens"] {
        config["llava"].as_object_mut().unwrap().remove(key).unwrap();
    }
    save(&path, &config);
    models
}

pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

pub fn save(path: &Path, value: &Value) {
    fs::write(path, value.to_string()).unwrap();
}

fn nan(shape: &[usize]) -> Plain {
    Plain::f32(shape, &vec![f32::NAN; shape.iter().product()])
}

/// Tensors of a native stage's only file.
pub fn stage(native: &Path, folder: &str) -> Sheet {
    read(&native.join(folder).join("model.safetensors"))
}

/// The official tree of safetensors with the same weights, and with all that published files hold besides.
pub fn of(native: &Path) -> TempDir {
    let models = tempfile::tempdir().unwrap();
    for folder in [TRANSFORMERS, VAE, WHISPER, CLIP, LLAVA, "ckpts/det_align"] {
        fs::create_dir_all(models.path().join(folder)).unwrap();
    }
    fs::write(models.path().join("ckpts/det_align/detface.pt"), "never read").unwrap();
    whisper(native, &models.path().join(WHISPER));
    clip(native, &models.path().join(CLIP));
    llava(native, &models.path().join(LLAVA));
    let vae = renamed(&vae_of(native), |name| format!("vae.{name}"));
    write(&models.path().join(VAE).join("hunyuan_video_custom_VAE_fp32.safetensors"), &vae);
    vae_config(native, &models.path().join(VAE));
    write(&models.path().join(TRANSFORMERS).join(BF16), &stage(native, "diffusion"));
    // The tiny one's rotary axes are not the published ones, which need no file.
    fs::copy(native.join("diffusion/config.json"), models.path().join(TRANSFORMERS).join("config.json")).unwrap();
    models
}

/// Both halves of the VAE.
pub fn vae_of(native: &Path) -> Sheet {
    let mut both = stage(native, "image-encoder");
    both.extend(stage(native, "vae-decode"));
    both
}

fn vae_config(native: &Path, out: &Path) {
    let mut config = json(&native.join("vae-decode/config.json"));
    config["_class_name"] = "AutoencoderKLCausal3D".into();
    config["act_fn"] = "silu".into();
    config["in_channels"] = 3.into();
    config["down_block_types"] = json!(vec!["DownEncoderBlockCausal3D"; 4]);
    save(&out.join("config.json"), &config);
}

fn whisper(native: &Path, out: &Path) {
    let mut sheet = renamed(&stage(native, "audio-encoder"), |name| format!("model.{name}"));
    sheet.insert("model.decoder.embed_positions.weight".to_owned(), nan(&[3, 4]));
    sheet.insert("proj_out.weight".to_owned(), nan(&[5]));
    write(&out.join("model.safetensors"), &sheet);
    fs::write(out.join("pytorch_model.bin"), "the same again").unwrap();
    save(
        &out.join("config.json"),
        &json!({
            "model_type": "whisper", "encoder_attention_heads": 4, "encoder_layers": 4, "activation_function": "gelu",
            "num_mel_bins": 80, "max_source_positions": 1500, "scale_embedding": false, "d_model": 64,
        }),
    );
}

fn clip(native: &Path, out: &Path) {
    let mut sheet = stage(native, "text-encoder/clip");
    for name in ["vision_model.post_layernorm.weight", "visual_projection.weight", "text_projection.weight"] {
        sheet.insert(name.to_owned(), nan(&[2]));
    }
    sheet.insert("logit_scale".to_owned(), nan(&[]));
    let positions = Plain { dtype: Dtype::I64, shape: vec![1, 1], bytes: vec![0; 8] };
    sheet.insert("text_model.embeddings.position_ids".to_owned(), positions);
    write(&out.join("model.safetensors"), &sheet);
    fs::copy(native.join("text-encoder/clip/tokenizer.json"), out.join("tokenizer.json")).unwrap();
    save(
        &out.join("config.json"),
        &json!({
            "model_type": "clip", "logit_scale_init_value": 2.6592,
            "text_config": {
                "num_attention_heads": 4, "num_hidden_layers": 3, "hidden_act": "quick_gelu", "eos_token_id": 2,
            },
        }),
    );
}

/// Three shards and their index.
fn llava(native: &Path, out: &Path) {
    let mut shards = [Sheet::new(), Sheet::new(), Sheet::new()];
    let file = |shard: usize| format!("model-{:05}-of-00003.safetensors", shard + 1);
    let mut index = serde_json::Map::new();
    for (i, (name, plain)) in stage(native, "text-encoder/llava").into_iter().enumerate() {
        index.insert(name.clone(), file(i % 3).into());
        shards[i % 3].insert(name, plain);
    }
    for (i, shard) in shards.iter().enumerate() {
        write(&out.join(file(i)), shard);
    }
    save(&out.join("model.safetensors.index.json"), &json!({ "metadata": { "total_size": 1 }, "weight_map": index }));
    fs::copy(native.join("text-encoder/llava/tokenizer.json"), out.join("tokenizer.json")).unwrap();
    let own = &json(&native.join("text-encoder/config.json"))["llava"];
    save(
        &out.join("config.json"),
        &json!({
            "model_type": "llava", "image_token_index": own["image_token"], "pad_token_id": own["pad_token"],
            "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
            "text_config": {
                "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 5, "rope_theta": 500000.0,
                "rms_norm_eps": 1e-5, "bos_token_id": own["bos_token"], "rope_scaling": null,
            },
            "vision_config": { "num_attention_heads": 4, "num_hidden_layers": 4, "hidden_act": "quick_gelu" },
        }),
    );
}
