//! The official tree in the files that its authors publish: PyTorch's archives.

use std::fs;

use model::checkpoint::{Choice, Setup};
use tempfile::TempDir;

use super::{
    FP8_DRIFT, fp8,
    official::{self, BF16, TRANSFORMERS, VAE, WHISPER, native},
    output,
    outputs::{ALL, drift, velocity},
    pickles,
    sheet::{Plain, Sheet, read, renamed},
};

const PLAIN: &str = "mp_rank_00_model_states.pt";
pub const FP8: &str = "mp_rank_00_model_states_fp8.pt";
const FP8_MAP: &str = "mp_rank_00_model_states_fp8_map.pt";

/// The official tree as published: transformer and VAE in archives, Whisper in one too.
pub fn published(native: &std::path::Path) -> TempDir {
    let official = official::of(native);
    let path = |folder: &str| official.path().join(folder);
    fs::remove_file(path(TRANSFORMERS).join(BF16)).unwrap();
    pickles::write(&path(TRANSFORMERS).join(PLAIN), Some("module"), &official::stage(native, "diffusion"));
    fs::remove_file(path(VAE).join("hunyuan_video_custom_VAE_fp32.safetensors")).unwrap();
    let vae = renamed(&official::vae_of(native), |name| format!("vae.{name}"));
    pickles::write(&path(VAE).join("pytorch_model.pt"), Some("state_dict"), &vae);
    let whisper = read(&path(WHISPER).join("model.safetensors"));
    fs::remove_file(path(WHISPER).join("model.safetensors")).unwrap();
    pickles::write(&path(WHISPER).join("pytorch_model.bin"), None, &whisper);
    official
}

/// The transformer in fp8 and the map of its scales, as a folder has them beside the bf16 ones.
pub fn add_fp8(native: &std::path::Path, folder: &std::path::Path) {
    let (sheet, scales) = fp8(native);
    pickles::write(&folder.join(FP8), Some("module"), &sheet);
    let by_module =
        |(name, scale): (String, f32)| (name.trim_end_matches(".weight").to_owned(), Plain::f32(&[1], &[scale]));
    let scales: Sheet = scales.into_iter().map(by_module).collect();
    pickles::write(&folder.join(FP8_MAP), Some("module"), &scales);
}

#[test]
fn the_published_archives_give_the_same_bits_as_the_native_layout() {
    let native = native();
    let official = published(native.path());
    for (stage, run) in ALL {
        assert!(output(run, official.path()) == output(run, native.path()), "{stage}");
    }
}

#[test]
fn the_published_fp8_weights_with_their_map_stay_near() {
    let native = native();
    let official = published(native.path());
    let folder = official.path().join(TRANSFORMERS);
    add_fp8(native.path(), &folder);
    let exact = output(velocity, native.path());
    assert!(output(velocity, official.path()) == exact, "bf16 comes first");
    let chosen = Setup { choice: Choice::Fp8, ..Setup::default() };
    let drift = drift(&velocity(official.path(), &chosen).unwrap(), &exact);
    println!("fp8 with a map: {drift:.2e}");
    assert!(drift > 0.0 && drift < FP8_DRIFT, "{drift:e}");
    // The same values as with the scales beside the weights, in another form.
    fs::remove_file(folder.join(PLAIN)).unwrap();
    assert!(output(velocity, official.path()) == velocity(official.path(), &chosen).unwrap());

    fs::remove_file(folder.join(FP8_MAP)).unwrap();
    let error = velocity(official.path(), &Setup::default()).unwrap_err().to_string();
    assert!(error.contains(FP8_MAP), "{error}");
}

#[test]
fn what_is_wrong_in_an_archive_is_named_with_tensor_and_file() {
    let native = native();
    let official = published(native.path());
    let file = official.path().join(TRANSFORMERS).join(PLAIN);
    let spoil = |spoil: fn(&mut Sheet)| {
        let mut sheet = official::stage(native.path(), "diffusion");
        spoil(&mut sheet);
        pickles::write(&file, Some("module"), &sheet);
        velocity(official.path(), &Setup::default()).unwrap_err().to_string()
    };
    let cases: [(fn(&mut Sheet), &[&str]); 4] = [
        (|sheet| drop(sheet.remove("img_in.proj.bias")), &["\"img_in.proj.bias\"", "missing", "[128]"]),
        (
            |sheet| sheet.get_mut("img_in.proj.bias").unwrap().shape = vec![2, 64],
            &["\"img_in.proj.bias\"", PLAIN, "[2, 64]", "[128]"],
        ),
        (
            |sheet| sheet.get_mut("img_in.proj.bias").unwrap().bytes[..2].copy_from_slice(&[0xff; 2]),
            &["\"img_in.proj.bias\"", PLAIN, "not finite"],
        ),
        (
            |sheet| drop(sheet.insert("surprise".to_owned(), Plain::f32(&[1], &[0.0]))),
            &["\"surprise\"", PLAIN, "no such tensor"],
        ),
    ];
    for (wrong, parts) in cases {
        let error = spoil(wrong);
        for part in parts {
            assert!(error.contains(part), "{part} in {error}");
        }
    }
}
