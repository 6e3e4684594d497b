use std::fs;

use serde_json::json;

use super::*;

fn touch(path: &Path) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, "x").unwrap();
}

fn located(models: &Path, stage: Stage) -> Located {
    locate(models, stage, Choice::Auto).unwrap()
}

fn names(files: &[PathBuf]) -> Vec<&str> {
    files.iter().map(|file| file.file_name().unwrap().to_str().unwrap()).collect()
}

const TRANSFORMERS: &str = "hunyuan-video-t2v-720p/transformers";

#[test]
fn the_official_tree_may_be_given_by_any_of_its_roots() {
    for below in ["", "ckpts", "weights/ckpts"] {
        let models = tempfile::tempdir().unwrap();
        let root = models.path().join(below);
        touch(&root.join("hunyuan-video-t2v-720p/vae/pytorch_model.pt"));
        touch(&root.join("det_align/detface.pt"));
        for stage in [Stage::ImageEncoder, Stage::VaeDecode] {
            let found = located(models.path(), stage);
            assert_eq!((found.layout, &found.folder), (Layout::Official, &root), "{below:?}");
            assert_eq!(names(&found.source(Network::Vae).unwrap().files), ["pytorch_model.pt"]);
        }
    }
}

#[test]
fn each_stage_is_looked_for_natively_first() {
    let models = tempfile::tempdir().unwrap();
    touch(&models.path().join("ckpts/whisper-tiny/model.safetensors"));
    touch(&models.path().join("ckpts").join(TRANSFORMERS).join("mp_rank_00_model_states.pt"));
    touch(&models.path().join("audio-encoder/model.gguf"));
    touch(&models.path().join("audio-encoder/config.json"));
    let native = located(models.path(), Stage::AudioEncoder);
    assert_eq!(native.layout, Layout::Native);
    assert_eq!(names(&native.files()), ["config.json", "model.gguf"]);
    assert_eq!(located(models.path(), Stage::Diffusion).layout, Layout::Official);
}

#[test]
fn where_nothing_is_the_error_lists_where_it_was_looked_for() {
    let models = tempfile::tempdir().unwrap();
    let error = locate(models.path(), Stage::TextEncoder, Choice::Auto).unwrap_err().to_string();
    for part in [
        "/text-encoder,",
        "/llava_llama_image,",
        "/ckpts/text_encoder_2,",
        "/weights/ckpts/llava_llama_image,",
        "avatar weights fetch",
        "avatar weights convert",
        "avatar weights synth",
    ] {
        assert!(error.contains(part), "{part} in {error}");
    }
}

#[test]
fn a_tree_with_half_of_the_text_encoder_names_the_other_half() {
    let models = tempfile::tempdir().unwrap();
    touch(&models.path().join("ckpts/llava_llama_image/model.safetensors"));
    let error = locate(models.path(), Stage::TextEncoder, Choice::Auto).unwrap_err().to_string();
    assert!(error.contains("ckpts/text_encoder_2: "), "{error}");
}

#[test]
fn of_the_transformers_files_the_most_exact_is_taken_unless_fp8_is_asked_for() {
    let models = tempfile::tempdir().unwrap();
    let folder = models.path().join(TRANSFORMERS);
    let choose = |choice| {
        let found = locate(models.path(), Stage::Diffusion, choice);
        found.map(|found| names(&found.sources[0].files).join(" ")).map_err(|e| e.to_string())
    };
    let (plain, fp8, map) =
        ("mp_rank_00_model_states.pt", "mp_rank_00_model_states_fp8.pt", "mp_rank_00_model_states_fp8_map.pt");
    let [bf16, int8] = ["bf16", "quanto_bf16_int8"].map(|kind| format!("hunyuan_video_avatar_720_{kind}.safetensors"));
    touch(&folder.join(&int8));
    assert_eq!(choose(Choice::Auto).unwrap(), int8);
    assert!(choose(Choice::Bf16).unwrap_err().contains(&format!("looked for {plain}, {bf16}")));
    touch(&folder.join(&bf16));
    assert_eq!(choose(Choice::Auto).unwrap(), bf16);
    touch(&folder.join(fp8));
    for choice in [Choice::Auto, Choice::Fp8] {
        let error = choose(choice).unwrap_err();
        assert!(error.contains(&format!("{map}: it is missing")), "{error}");
    }
    assert_eq!(choose(Choice::Bf16).unwrap(), bf16);
    touch(&folder.join(map));
    assert_eq!(choose(Choice::Auto).unwrap(), format!("{fp8} {map}"));
    touch(&folder.join(plain));
    assert_eq!(choose(Choice::Auto).unwrap(), plain);
    assert_eq!(choose(Choice::Fp8).unwrap(), format!("{fp8} {map}"));
}

#[test]
fn of_a_repository_with_the_same_weights_twice_one_form_is_taken() {
    let models = tempfile::tempdir().unwrap();
    let folder = models.path().join("whisper-tiny");
    let files = || names(&located(models.path(), Stage::AudioEncoder).sources[0].files).join(" ");
    touch(&folder.join("pytorch_model.bin"));
    assert_eq!(files(), "pytorch_model.bin");
    touch(&folder.join("model.fp32-00002-of-00002.safetensors"));
    touch(&folder.join("model.fp32-00001-of-00002.safetensors"));
    assert_eq!(files(), "model.fp32-00001-of-00002.safetensors model.fp32-00002-of-00002.safetensors");
    touch(&folder.join("model.safetensors"));
    assert_eq!(files(), "model.safetensors");
    touch(&folder.join("a.safetensors"));
    fs::write(folder.join("model.safetensors.index.json"), r#"{"weight_map": {"x": "a.safetensors"}}"#).unwrap();
    assert_eq!(files(), "a.safetensors");
}

fn written(value: &serde_json::Value) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    fs::write(&path, value.to_string()).unwrap();
    (folder, path)
}

#[test]
fn what_published_configs_leave_out_has_the_published_value() {
    let (_folder, path) = written(&json!({
        "image_token_index": 128257, "pad_token_id": 128258, "projector_hidden_act": "gelu",
        "text_config": { "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "vocab_size": 128320 },
        "vision_config": { "num_attention_heads": 16, "num_hidden_layers": 24 },
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    }));
    let llava = official::llava(&path).unwrap();
    assert_eq!((llava.heads, llava.kv_heads, llava.layers, llava.vision_layers), (32, 8, Some(32), Some(24)));
    assert_eq!((llava.bos_token, llava.image_token, llava.pad_token), (128_000, 128_257, 128_258));
    let (_folder, path) = written(&json!({ "eos_token_id": 2, "text_config": { "eos_token_id": 2 } }));
    let clip = official::clip(&path, 49_408).unwrap();
    assert_eq!((clip.heads, clip.eot_token, clip.layers), (12, 49_407, None));
    let (_folder, path) = written(&json!({ "num_attention_heads": 4, "num_hidden_layers": 3, "eos_token_id": null }));
    let clip = official::clip(&path, 258).unwrap();
    assert_eq!((clip.heads, clip.eot_token, clip.layers), (4, 257, Some(3)));
    let (_folder, path) = written(&json!({ "encoder_attention_heads": 6, "encoder_layers": 4, "d_model": 384 }));
    let audio = official::audio(&path).unwrap();
    assert_eq!((audio.heads, audio.layers), (6, Some(4)));
}

#[test]
fn what_the_networks_cannot_do_is_refused_by_name() {
    type Read = fn(&Path) -> Option<Error>;
    let audio: Read = |path| official::audio(path).err();
    let clip: Read = |path| official::clip(path, 9).err();
    let llava: Read = |path| official::llava(path).err();
    let vae: Read = |path| official::vae(path).err();
    for (read, key, value) in [
        (audio, "activation_function", json!({ "activation_function": "relu" })),
        (audio, "num_mel_bins", json!({ "num_mel_bins": 128 })),
        (clip, "hidden_act", json!({ "text_config": { "hidden_act": "gelu" } })),
        (clip, "hidden_act", json!({ "hidden_act": "gelu" })),
        (llava, "vision_feature_layer", json!({ "vision_feature_layer": -1 })),
        (llava, "text_config.rope_scaling", json!({ "text_config": { "rope_scaling": { "factor": 8.0 } } })),
        (llava, "vision_config.hidden_act", json!({ "vision_config": { "hidden_act": "gelu" } })),
        (vae, "act_fn", json!({ "act_fn": "relu" })),
        (vae, "up_block_types", json!({ "up_block_types": ["UpDecoderBlockCausal3D", "UpBlock2D"] })),
    ] {
        let (_folder, path) = written(&value);
        let error = read(&path).unwrap().to_string();
        assert!(error.contains(&format!("config.json: {key} is ")) && error.contains("supported is"), "{error}");
    }
}
