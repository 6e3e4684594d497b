//! `avatar weights`: checkpoints are made, converted and checked by the command.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;

use crate::stack::{binary, own_models, text};

fn weights(arguments: &[&str], models: &Path) -> Output {
    let mut command = Command::new(binary("avatar"));
    command.arg("weights").args(arguments).arg("--json");
    // `synth` has no models to read.
    if arguments[0] != "synth" {
        command.arg("--models").arg(models);
    }
    command.output().unwrap()
}

/// The last line of what a command that went well printed.
fn result(output: &Output) -> Value {
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    serde_json::from_str(text(&output.stdout).lines().last().unwrap()).unwrap()
}

#[test]
fn a_converted_checkpoint_is_found_good_and_a_spoiled_one_is_not() {
    let models = own_models();
    let out = models.path().join("converted");
    let out_text = out.to_str().unwrap();
    let converted = result(&weights(&["convert", "--precision", "q8_0", "--out", out_text], models.path()));
    assert_eq!((&converted["event"], &converted["precision"]), (&"completed".into(), &"q8_0".into()));
    assert!(out.join("diffusion/model.gguf").is_file() && out.join("vae-decode/model.safetensors").is_file());

    let sums = models.path().join("SHA256SUMS");
    let sums = sums.to_str().unwrap();
    let found = result(&weights(&["verify", "--write-checksums", sums], &out));
    let files = found["files"].as_array().unwrap();
    let gguf = files.iter().find(|file| file["file"] == "diffusion/model.gguf").unwrap();
    assert_eq!((&gguf["form"], &gguf["encodings"]["q8_0"]), (&"gguf".into(), &29.into()));

    fs::write(out.join("text-encoder/clip/tokenizer.json"), "{}").unwrap();
    fs::remove_file(out.join("image-encoder/config.json")).unwrap();
    let spoiled = weights(&["verify", "--checksums", sums], &out);
    assert_eq!(spoiled.status.code(), Some(1), "{}", text(&spoiled.stderr));
    let last: Value = serde_json::from_str(text(&spoiled.stdout).lines().last().unwrap()).unwrap();
    let reasons: Vec<&str> =
        last["faults"].as_array().unwrap().iter().filter_map(|fault| fault["reason"].as_str()).collect();
    assert_eq!(last["event"], "failed");
    for part in ["config.json", "tokenizer", "sha256 ", "no file of a stage"] {
        assert!(reasons.iter().any(|reason| reason.contains(part)), "{part}: {reasons:?}");
    }
}

/// 0.9 billion values of the published widths: 1.8 GB in bf16, 1.3 GB in fp8. A process that held one of its
/// larger matrices in single precision would already pass the limit.
#[test]
fn wide_matrices_are_made_and_converted_in_little_memory() {
    const LIMIT: u64 = 192 << 20;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (made, out) = (folder.path().join("made"), folder.path().join("out"));
    let depth = ["--size", "full", "--stages", "diffusion", "--double-blocks", "1", "--single-blocks", "1"];
    let arguments = [&["synth", "--out", made.to_str().unwrap()][..], &depth].concat();
    let synth = result(&weights(&arguments, folder.path()));
    assert_eq!(synth["networks"][0]["parameters"], 886_666_048u64);
    let converted = result(&weights(
        &["convert", "--precision", "fp8", "--out", out.to_str().unwrap(), "--stages", "diffusion"],
        &made,
    ));
    assert_eq!(converted["networks"][0]["encodings"]["fp8"], 13);
    for result in [synth, converted] {
        let peak = result["peak_bytes"].as_u64().unwrap();
        assert!(peak < LIMIT, "{peak} bytes at once, the limit is {LIMIT}");
    }
}
