//! Checkpoints that are missing something: the error names the file and the tensor.

use std::{fs, path::Path};

use serde_json::Value;

use crate::{
    inputs::{portrait, tone},
    stack::{avatar, own_models, text},
};

fn failure(models: &Path) -> (Option<i32>, Value) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("a.png"), portrait()).unwrap();
    fs::write(path("a.wav"), tone(0.2, 16_000)).unwrap();
    let models = models.to_str().unwrap();
    let (image, sound, out) = (path("a.png"), path("a.wav"), path("a.mp4"));
    let done = avatar(&[
        "generate", "--image", &image, "--audio", &sound, "--out", &out, "--models", models, "--size", "64", "--steps",
        "1", "--json",
    ]);
    assert!(!Path::new(&out).exists());
    let stdout = text(&done.stdout);
    let last = stdout.lines().last().unwrap_or_else(|| panic!("{}", text(&done.stderr)));
    (done.status.code(), serde_json::from_str(last).unwrap())
}

/// The one weight file of a stage, or of a part of it.
fn weights(models: &Path, stage: &str) -> std::path::PathBuf {
    let mut found = fs::read_dir(models.join(stage)).unwrap().map(|e| e.unwrap().path());
    found.find(|p| p.extension().is_some_and(|e| e == "safetensors")).unwrap()
}

/// Renames a tensor in a safetensors file's header without moving a byte.
fn rename(file: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let mut bytes = fs::read(file).unwrap();
    let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    fs::write(file, bytes).unwrap();
}

#[test]
fn a_missing_folder_names_the_stage_and_the_path() {
    let models = own_models();
    fs::remove_dir_all(models.path().join("vae-decode")).unwrap();
    let (code, last) = failure(models.path());
    assert_eq!((code, &last["event"]), (Some(1), &"failed".into()), "{last}");
    assert!(last["message"].as_str().unwrap().contains("vae-decode"), "{last}");
}

#[test]
fn a_missing_tensor_is_named() {
    let models = own_models();
    rename(&weights(models.path(), "diffusion"), "\"img_in.proj.weight\"", "\"img_in.proj.weighs\"");
    let (code, last) = failure(models.path());
    assert_eq!((code, &last["code"]), (Some(1), &"FAILED_PRECONDITION".into()), "{last}");
    let message = last["message"].as_str().unwrap();
    assert!(message.contains("img_in.proj.weight") && message.contains("missing"), "{last}");
}

#[test]
fn an_unexpected_tensor_is_named() {
    let models = own_models();
    let file = weights(models.path(), "audio-encoder");
    let mut bytes = fs::read(&file).unwrap();
    // One more tensor that shares the first bytes: the header grows, the data stays.
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let end = header.as_object().unwrap().values().filter_map(|t| t["data_offsets"][1].as_u64()).max().unwrap();
    header["surprise"] = serde_json::json!({"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]});
    let header = serde_json::to_vec(&header).unwrap();
    let data = bytes.split_off(8 + length);
    let file_bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &data, &[0; 4]].concat();
    fs::write(&file, file_bytes).unwrap();
    let (code, last) = failure(models.path());
    assert_eq!((code, &last["code"]), (Some(1), &"FAILED_PRECONDITION".into()), "{last}");
    assert!(last["message"].as_str().unwrap().contains("surprise"), "{last}");
}

#[test]
fn a_truncated_file_is_named() {
    let models = own_models();
    let file = weights(models.path(), "image-encoder");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let (code, last) = failure(models.path());
    assert_eq!((code, &last["code"]), (Some(1), &"FAILED_PRECONDITION".into()), "{last}");
    assert!(last["message"].as_str().unwrap().contains(file.file_name().unwrap().to_str().unwrap()), "{last}");
}

#[test]
fn a_wrong_shape_names_the_tensor_and_both_shapes() {
    let models = own_models();
    let file = weights(models.path(), "vae-decode");
    let bytes = fs::read(&file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let tensor = &mut header["decoder.conv_out.conv.bias"];
    assert_eq!(tensor["shape"], serde_json::json!([3]), "{tensor}");
    tensor["shape"] = serde_json::json!([1, 3]);
    let header = serde_json::to_vec(&header).unwrap();
    let changed = [&(header.len() as u64).to_le_bytes()[..], &header, &bytes[8 + length..]].concat();
    fs::write(&file, changed).unwrap();
    let (code, last) = failure(models.path());
    assert_eq!((code, &last["code"]), (Some(1), &"FAILED_PRECONDITION".into()), "{last}");
    let message = last["message"].as_str().unwrap();
    assert!(
        message.contains("decoder.conv_out.conv.bias") && message.contains("[1, 3]") && message.contains("[3]"),
        "{last}"
    );
}

#[test]
fn a_misspelt_key_of_the_config_is_named() {
    let models = own_models();
    let file = models.path().join("diffusion/config.json");
    let config = fs::read_to_string(&file).unwrap();
    assert!(config.contains("\"rope_theta\""));
    fs::write(&file, config.replace("\"rope_theta\"", "\"rope_tehta\"")).unwrap();
    let (code, last) = failure(models.path());
    assert_eq!((code, &last["code"]), (Some(1), &"FAILED_PRECONDITION".into()), "{last}");
    assert!(last["message"].as_str().unwrap().contains("rope_tehta"), "{last}");
}
