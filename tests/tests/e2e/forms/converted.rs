//! `avatar weights convert` and `--weights`, of every layout and form of the official download.

use std::{
    path::{Path, PathBuf},
    process::Output,
};

use model::checkpoint::{Choice, Setup};
use tempfile::TempDir;

use super::{
    official::{self, TRANSFORMERS, native},
    output,
    outputs::{ALL, velocity},
    torch::{self, FP8},
};
use crate::stack::{avatar, text};

fn weights(command: &str, models: &Path, more: &[&str]) -> Output {
    avatar(&[&["weights", command, "--quiet", "--models", models.to_str().unwrap()], more].concat())
}

fn convert(models: &Path, precision: &str, more: &[&str]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let written = ["--precision", precision, "--out", out.to_str().unwrap()];
    let done = weights("convert", models, &[&written, more].concat());
    assert!(done.status.success(), "{}", text(&done.stderr));
    (folder, out)
}

/// The files of tensors of a native checkpoint, by the folder that they are in.
fn files(models: &Path, gguf: bool) -> Vec<(&'static str, Vec<u8>)> {
    let read = |(folder, large): (&'static str, bool)| {
        let name = if large && gguf { "model.gguf" } else { "model.safetensors" };
        (folder, std::fs::read(models.join(folder).join(name)).unwrap())
    };
    [
        ("audio-encoder", false),
        ("text-encoder/llava", true),
        ("text-encoder/clip", false),
        ("image-encoder", false),
        ("diffusion", true),
        ("vae-decode", false),
    ]
    .map(read)
    .to_vec()
}

#[test]
fn the_official_tree_and_its_archives_convert_to_the_same_bytes_as_the_native_layout() {
    let native = native();
    let (tree, archives) = (official::of(native.path()), torch::published(native.path()));
    for (precision, gguf) in [("bf16", false), ("q8_0", true)] {
        let (_kept, expected) = convert(native.path(), precision, &[]);
        for models in [&tree, &archives] {
            let (_kept, converted) = convert(models.path(), precision, &[]);
            for ((folder, found), (_, wanted)) in files(&converted, gguf).iter().zip(files(&expected, gguf)) {
                assert!(*found == wanted, "{precision}: {folder}");
            }
            // The configs, which are written anew of the official ones, say the same.
            for (stage, run) in ALL {
                assert!(output(run, &converted) == output(run, &expected), "{precision}: {stage}");
            }
        }
    }
}

#[test]
fn of_several_forms_of_the_transformer_the_chosen_one_is_converted_and_checked() {
    let native = native();
    let official = torch::published(native.path());
    torch::add_fp8(native.path(), &official.path().join(TRANSFORMERS));
    let only = |weights| ["--stages", "diffusion", "--weights", weights];

    let (_kept, plain) = convert(official.path(), "bf16", &only("bf16"));
    assert!(output(velocity, &plain) == output(velocity, native.path()));
    let (_kept, eighth) = convert(official.path(), "fp8", &only("fp8"));
    let fp8 = Setup { choice: Choice::Fp8, ..Setup::default() };
    assert!(output(velocity, &eighth) == velocity(official.path(), &fp8).unwrap());

    let found = weights("verify", official.path(), &[&only("fp8")[..], &["--json"]].concat());
    let line: serde_json::Value = serde_json::from_str(text(&found.stdout).lines().last().unwrap()).unwrap();
    let file = line["files"].as_array().unwrap().iter().find(|f| f["file"].as_str().unwrap().ends_with(FP8)).unwrap();
    assert!(file["encodings"]["fp8"].as_u64().unwrap() > 0, "{line}");

    let refused = weights("verify", official.path(), &only("int8"));
    let reason = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{reason}");
    assert!(reason.contains(official::INT8), "{reason}");
}

#[test]
fn a_native_checkpoint_in_another_form_than_the_chosen_one_is_refused() {
    let native = native();
    let (_kept, int8) = convert(native.path(), "int8", &["--stages", "diffusion"]);
    let (_kept, q4_k) = convert(native.path(), "q4_k", &["--stages", "diffusion"]);
    let open =
        |models: &Path, choice| velocity(models, &Setup { choice, ..Setup::default() }).map_err(|e| e.to_string());
    for (models, stored, form) in
        [(native.path(), "bf16", Some(Choice::Bf16)), (&int8, "int8", Some(Choice::Int8)), (&q4_k, "q4_k", None)]
    {
        for choice in Choice::ALL {
            let opened = open(models, choice);
            if choice == Choice::Auto || Some(choice) == form {
                opened.unwrap();
                continue;
            }
            let error = opened.unwrap_err();
            let parts = ["diffusion".to_owned(), stored.to_owned(), format!("{} was chosen", choice.name())];
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }
}
