//! Every form that a checkpoint may have gives what the native one gives.
//!
//! A form that holds the same values gives the same bits. One that holds rounded values drifts, as much as was
//! measured; the bounds are twice that.

mod blocks;
mod converted;
mod hostile;
mod official;
mod outputs;
mod pickles;
mod sheet;
mod torch;

use std::{fs, path::Path};

use model::{
    checkpoint::{Choice, Setup},
    diffusion::DiffusionStage,
};
use safetensors::Dtype;
use tempfile::TempDir;

use self::{
    official::{BF16, CLIP, INT8, LLAVA, TRANSFORMERS, VAE, WHISPER, native},
    outputs::{ALL, Run, drift, velocity},
    sheet::{Plain, Sheet, quantised, read, write},
};
use crate::{
    inputs::{portrait, tone},
    stack::{avatar, text, video_stream},
};

/// Twice 1.2e-3.
const INT8_DRIFT: f64 = 2.5e-3;
/// Twice 8.6e-3.
const FP8_DRIFT: f64 = 1.8e-2;

fn output(run: Run, models: &Path) -> Vec<f32> {
    run(models, &Setup::default()).unwrap()
}

fn refusal(run: Run, models: &Path) -> String {
    run(models, &Setup::default()).unwrap_err().to_string()
}

#[test]
fn the_official_tree_gives_the_same_bits_as_the_native_layout() {
    let native = native();
    let official = official::of(native.path());
    for (stage, run) in ALL {
        assert!(output(run, official.path()) == output(run, native.path()), "{stage}");
    }
    assert!(output(velocity, &official.path().join("ckpts")) == output(velocity, native.path()));
}

/// The tiny checkpoint's transformer in the official tree, in 8 bits as quanto writes them.
fn quanto(native: &Path) -> (TempDir, std::path::PathBuf) {
    let official = official::of(native);
    let folder = official.path().join(TRANSFORMERS);
    fs::remove_file(folder.join(BF16)).unwrap();
    let mut sheet = Sheet::new();
    for (name, plain) in official::stage(native, "diffusion") {
        if !quantised(&name, &plain) {
            sheet.insert(name, plain);
            continue;
        }
        let (data, scales) = plain.int8();
        let module = name.trim_end_matches(".weight");
        sheet.insert(format!("{module}.input_scale"), Plain::f32(&[], &[1.0]));
        sheet.insert(format!("{module}.output_scale"), Plain::f32(&[], &[1.0]));
        sheet.insert(format!("{name}._scale"), Plain::f32(&[scales.len(), 1], &scales));
        sheet.insert(format!("{name}._data"), data);
    }
    let file = folder.join(INT8);
    write(&file, &sheet);
    fs::write(folder.join(INT8.replace(".safetensors", "_map.json")), "{\"not\": \"read\"}").unwrap();
    (official, file)
}

#[test]
fn int8_weights_with_scales_by_row_stay_near() {
    let native = native();
    let (official, _) = quanto(native.path());
    let drift = drift(&output(velocity, official.path()), &output(velocity, native.path()));
    println!("int8: {drift:.2e}");
    assert!(drift > 0.0 && drift < INT8_DRIFT, "{drift:e}");
}

/// The tiny transformer's tensors with the blocks' weights in fp8, and the scales by weight.
fn fp8(native: &Path) -> (Sheet, Vec<(String, f32)>) {
    let mut scales = Vec::new();
    let eighth = |(name, plain): (String, Plain)| {
        if !quantised(&name, &plain) {
            return (name, plain);
        }
        let (data, scale) = plain.fp8();
        scales.push((name.clone(), scale));
        (name, data)
    };
    let sheet = official::stage(native, "diffusion").into_iter().map(eighth).collect();
    (sheet, scales)
}

#[test]
fn fp8_weights_with_a_scale_each_stay_near() {
    let native = native();
    let exact = output(velocity, native.path());
    let (mut sheet, scales) = fp8(native.path());
    for (name, scale) in scales {
        sheet.insert(format!("{name}_scale"), Plain::f32(&[1], &[scale]));
    }
    let file = native.path().join("diffusion/model.safetensors");
    write(&file, &sheet);
    let drift = drift(&output(velocity, native.path()), &exact);
    println!("fp8: {drift:.2e}");
    assert!(drift > 0.0 && drift < FP8_DRIFT, "{drift:e}");

    let lost = sheet.keys().find(|name| name.ends_with("_scale")).unwrap().clone();
    sheet.remove(&lost);
    write(&file, &sheet);
    let error = refusal(velocity, native.path());
    assert!(error.contains(&format!("{lost:?}")) && error.contains("model.safetensors: it is missing"), "{error}");
}

/// A way to spoil a file's tensors.
type Spoil = fn(&mut Sheet);

/// Spoils one file of the official tree and gives the refusal.
fn spoilt(file: &str, run: Run, spoil: Spoil) -> String {
    let native = native();
    let official = official::of(native.path());
    let path = official.path().join(file);
    let mut sheet = read(&path);
    spoil(&mut sheet);
    write(&path, &sheet);
    refusal(run, official.path())
}

#[test]
fn what_is_wrong_in_the_official_tree_is_named_with_tensor_and_file() {
    const VAE_FILE: &str = "hunyuan_video_custom_VAE_fp32.safetensors";
    let (vae, whisper, clip, transformer) = (
        format!("{VAE}/{VAE_FILE}"),
        format!("{WHISPER}/model.safetensors"),
        format!("{CLIP}/model.safetensors"),
        format!("{TRANSFORMERS}/{BF16}"),
    );
    let cases: [(&str, Run, Spoil, &[&str]); 8] = [
        (
            &vae,
            outputs::pixels,
            |sheet| drop(sheet.remove("vae.decoder.conv_out.conv.bias")),
            &["\"decoder.conv_out.conv.bias\"", VAE, "missing", "[3]"],
        ),
        (
            &vae,
            outputs::pixels,
            |sheet| sheet.get_mut("vae.decoder.conv_out.conv.bias").unwrap().shape = vec![1, 3],
            &["\"decoder.conv_out.conv.bias\"", VAE_FILE, "[1, 3]", "[3]"],
        ),
        (
            &whisper,
            outputs::audio,
            |sheet| drop(sheet.insert("model.encoder.surprise".to_owned(), Plain::f32(&[1], &[0.0]))),
            &["\"encoder.surprise\"", "whisper-tiny/model.safetensors", "no such tensor"],
        ),
        (
            &whisper,
            outputs::audio,
            |sheet| sheet.retain(|name, _| !name.starts_with("model.encoder.layers.3.")),
            &["whisper-tiny/config.json", "4 layers", "make up 3"],
        ),
        (
            &clip,
            outputs::text,
            |sheet| drop(sheet.insert("text_model.surprise".to_owned(), Plain::f32(&[1], &[0.0]))),
            &["\"text_model.surprise\"", "text_encoder_2/model.safetensors", "no such tensor"],
        ),
        (
            &clip,
            outputs::text,
            |sheet| sheet.retain(|name, _| !name.starts_with("text_model.encoder.layers.2.")),
            &["\"text_model.encoder.layers.2.self_attn.q_proj.weight\"", "text_encoder_2", "missing"],
        ),
        (
            &transformer,
            velocity,
            |sheet| sheet.get_mut("img_in.proj.bias").unwrap().bytes[..2].copy_from_slice(&[0xff; 2]),
            &["\"img_in.proj.bias\"", BF16, "not finite"],
        ),
        (
            &transformer,
            velocity,
            |sheet| sheet.get_mut("img_in.proj.bias").unwrap().dtype = Dtype::I16,
            &["\"img_in.proj.bias\"", BF16, "type I16", "expected F32, F16, BF16"],
        ),
    ];
    for (file, run, spoil, parts) in cases {
        let error = spoilt(file, run, spoil);
        for part in parts {
            assert!(error.contains(part), "{file}: {part} in {error}");
        }
    }
}

#[test]
fn a_shard_that_the_index_names_and_that_is_missing_is_named() {
    let native = native();
    let official = official::of(native.path());
    fs::remove_file(official.path().join(LLAVA).join("model-00002-of-00003.safetensors")).unwrap();
    let error = refusal(outputs::text, official.path());
    assert!(error.contains("model-00002-of-00003.safetensors") && error.contains("missing"), "{error}");
}

#[test]
fn int8_weights_without_their_scales_are_named() {
    let native = native();
    let cases: [(Spoil, &str); 3] = [
        (|sheet| drop(sheet.remove("single_blocks.0.linear1.weight._scale")), "missing"),
        (
            |sheet| drop(sheet.insert("single_blocks.0.linear1.weight._scale".to_owned(), Plain::f32(&[2], &[1.0; 2]))),
            "shape [2], expected [896, 1]",
        ),
        (|sheet| sheet.get_mut("single_blocks.0.linear1.weight._scale").unwrap().bytes[..4].fill(0xff), "not finite"),
    ];
    for (spoil, part) in cases {
        let (official, file) = quanto(native.path());
        let mut sheet = read(&file);
        spoil(&mut sheet);
        write(&file, &sheet);
        let error = refusal(velocity, official.path());
        assert!(error.contains("single_blocks.0.linear1.weight._scale") && error.contains(INT8), "{error}");
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_choice_that_is_not_there_names_the_files_that_would_be() {
    let native = native();
    let official = official::of(native.path());
    let fp8 = Setup { choice: Choice::Fp8, ..Setup::default() };
    let error = DiffusionStage::open(official.path(), &fp8).unwrap_err().to_string();
    assert!(error.contains("mp_rank_00_model_states_fp8.pt"), "{error}");
}

#[test]
fn the_command_line_makes_the_same_video_of_both_layouts_and_another_in_16_bits() {
    let native = native();
    let official = official::of(native.path());
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("a.png"), portrait()).unwrap();
    fs::write(path("a.wav"), tone(0.2, 16_000)).unwrap();
    let (image, sound) = (path("a.png"), path("a.wav"));
    let video = |models: &Path, name: &str, compute: &str, weights: &str| {
        let (models, out) = (models.to_str().unwrap(), path(name));
        let done = avatar(&[
            "generate",
            "--image",
            &image,
            "--audio",
            &sound,
            "--out",
            &out,
            "--models",
            models,
            "--size",
            "64",
            "--steps",
            "2",
            "--compute",
            compute,
            "--weights",
            weights,
        ]);
        if !done.status.success() {
            return Err((done.status.code(), text(&done.stderr)));
        }
        Ok(video_stream(out.as_ref()))
    };
    let exact = video(native.path(), "native.mp4", "f32", "bf16").unwrap();
    assert!(video(official.path(), "official.mp4", "f32", "auto").unwrap() == exact);
    assert!(video(native.path(), "bf16.mp4", "bf16", "auto").unwrap() != exact);
    assert!(video(native.path(), "f16.mp4", "diffusion=f16,vae-decode=bf16", "auto").unwrap() != exact);
    let (code, error) = video(native.path(), "none.mp4", "decoder=bf16", "auto").unwrap_err();
    assert_eq!(code, Some(2));
    assert!(error.contains("--compute") && error.contains("vae-decode"), "{error}");
    let (code, error) = video(official.path(), "none.mp4", "f32", "fp8").unwrap_err();
    assert_eq!(code, Some(1));
    assert!(error.contains(torch::FP8), "{error}");
    let (code, error) = video(native.path(), "none.mp4", "f32", "q4_k").unwrap_err();
    assert_eq!(code, Some(2));
    assert!(error.contains("--weights") && error.contains("auto, bf16, fp8, int8"), "{error}");
}
