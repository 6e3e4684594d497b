use std::{collections::BTreeMap, path::Path};

use candle_core::{Device, Tensor};

use super::*;

const TEXT: usize = 64;
const POOLED: usize = 64;
const AUDIO: usize = 64;
const AUDIO_STATES: usize = 5;
const LATENT: usize = 16;

use crate::{
    audio::AudioEncoder,
    checkpoint::Setup,
    diffusion::{Conditioning, DiffusionStage},
    image::{ImageEncoder, Rgb8},
    text::{
        TextEncoder,
        tokens::{ClipTokenizer, PromptTokenizer},
    },
    vae::VaeStage,
};

/// Files of a folder, by path in it.
fn files(folder: &Path, below: &str) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder.join(below)).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{below}/{}", entry.file_name().to_str().unwrap());
        match entry.file_type().unwrap().is_dir() {
            true => found.append(&mut files(folder, &name)),
            false => drop(found.insert(name, std::fs::read(entry.path()).unwrap())),
        }
    }
    found
}

fn made(seed: u64) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    tiny(folder.path(), seed).unwrap();
    folder
}

/// FNV-1a over everything but the tokenizers' and configs' text.
fn fingerprint(files: &BTreeMap<String, Vec<u8>>) -> u64 {
    files
        .iter()
        .filter(|(name, _)| name.ends_with(".safetensors"))
        .flat_map(|(_, bytes)| bytes)
        .fold(0xcbf2_9ce4_8422_2325, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
    let (one, again, other) = (made(7), made(7), made(8));
    let (one, again, other) = (files(one.path(), "."), files(again.path(), "."), files(other.path(), "."));
    assert!(one == again);
    assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
    for (name, bytes) in &one {
        assert_eq!(name.ends_with(".safetensors"), *bytes != other[name], "{name}");
    }
    assert!(one.values().map(Vec::len).sum::<usize>() < 32 << 20);
}

/// Ties the bytes to this value, so that another machine or a changed generator shows.
#[test]
fn the_bytes_are_those_of_every_other_machine() {
    assert_eq!(fingerprint(&files(made(7).path(), ".")), 0xa035fe7abfe9784b);
}

#[test]
fn a_decoded_clip_is_neither_black_nor_saturated() {
    let folder = made(7);
    let stage = VaeStage::open(folder.path(), &Setup::default()).unwrap();
    let noise: Vec<f32> = (0..16 * 3 * 64).map(|i| (i as f32 * 0.7).sin() * 1.4).collect();
    let latents = Tensor::from_vec(noise, (16, 3, 8, 8), &Device::Cpu).unwrap();
    let mut pixels = Vec::new();
    stage
        .decode_frames(&latents, None, &mut |_, bytes| {
            pixels.extend(bytes);
            Ok(())
        })
        .unwrap();
    assert_eq!(pixels.len(), 9 * 64 * 64 * 3);
    let clipped = pixels.iter().filter(|&&p| p == 0 || p == 255).count() as f64 / pixels.len() as f64;
    let mean = pixels.iter().map(|&p| f64::from(p)).sum::<f64>() / pixels.len() as f64;
    let variance = pixels.iter().map(|&p| (f64::from(p) - mean).powi(2)).sum::<f64>() / pixels.len() as f64;
    assert!(clipped < 0.1 && (60.0..200.0).contains(&mean) && variance.sqrt() > 15.0, "{clipped} {mean} {variance}");
}

#[test]
fn the_transformer_loads_strictly_and_heeds_speech() {
    let folder = made(7);
    let stage = DiffusionStage::open(folder.path(), &Setup::default()).unwrap();
    let wave = |count: usize, step: f32| (0..count).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
    let tensor =
        |shape: &[usize], step: f32| Tensor::from_vec(wave(shape.iter().product(), step), shape, &Device::Cpu).unwrap();
    let latents = tensor(&[16, 2, 4, 4], 0.9);
    let velocity = |audio: f32| {
        let conditioning = Conditioning {
            reference_latents: tensor(&[16, 1, 4, 4], 0.3),
            face_mask: Tensor::ones((1, 1, 4, 4), candle_core::DType::F32, &Device::Cpu).unwrap(),
            text_states: tensor(&[12, TEXT], 0.7),
            text_mask: &[1; 12],
            pooled: tensor(&[POOLED], 0.5),
            audio: (tensor(&[5, 10, AUDIO_STATES, AUDIO], 0.11) * f64::from(audio)).unwrap(),
            fps: 25.0,
            motion_exp: [30.0; 4],
            motion_pose: [25.0; 4],
        };
        let pass = stage.transformer.predict(&latents, 900.0, &conditioning, false).unwrap();
        pass.velocity.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let (speech, none) = (velocity(1.0), velocity(0.0));
    let rms = |v: &[f32]| (v.iter().map(|x| x * x).sum::<f32>() / v.len() as f32).sqrt();
    assert!((0.3..3.0).contains(&rms(&speech)), "{}", rms(&speech));
    let difference: Vec<f32> = speech.iter().zip(&none).map(|(a, b)| a - b).collect();
    assert!(rms(&difference) > 0.01, "{}", rms(&difference));
}

#[test]
fn the_audio_encoder_loads_strictly_and_hears() {
    let folder = made(7);
    let encoder = AudioEncoder::open(folder.path(), &Setup::default()).unwrap();
    let tone: Vec<f32> = (0..16_000).map(|i| (i as f32 * 0.05).sin() * 0.3).collect();
    let heard = encoder.encode(&tone).unwrap();
    assert_eq!(heard.dims(), [50, AUDIO_STATES, AUDIO]);
    let silence = encoder.encode(&vec![0.0; 16_000]).unwrap();
    let difference = (heard - silence).unwrap().abs().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(difference > 0.05, "{difference}");
}

#[test]
fn the_text_encoder_loads_strictly_and_takes_a_prompt() {
    let folder = made(7);
    let encoder = TextEncoder::open(folder.path(), &Setup::default()).unwrap();
    let picture = Rgb8::new(64, 64, vec![90; 64 * 64 * 3]).unwrap();
    let states = encoder.encode("A woman speaks to the camera.", &picture, 64, 64).unwrap();
    assert_eq!(states.prompt_tokens, "Authentic, Realistic, Natural, High-quality, Lens-Fixed, ".len() + 29);
    for branch in [&states.positive, &states.negative] {
        assert_eq!(branch.states.dims()[1], TEXT);
        assert_eq!(branch.pooled.dims(), [POOLED]);
        assert!(branch.mask.iter().sum::<i64>() > 16);
    }
}

#[test]
fn the_image_encoder_loads_strictly_and_sees() {
    let folder = made(7);
    let encoder = ImageEncoder::open(folder.path(), &Setup::default()).unwrap();
    let pixels = (0..64 * 64 * 3).map(|i| (i % 251) as u8).collect();
    let reference = encoder.encode(&Rgb8::new(64, 64, pixels).unwrap(), 64, 64, None).unwrap();
    assert_eq!(reference.latents.dims(), [LATENT, 1, 8, 8]);
    let square = reference.latents.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
    assert!((0.05..10.0).contains(&square), "{square}");
}

/// A prompt's text costs the large network what the published one costs: 95 tokens before the prompt, 351 in all.
#[test]
fn the_large_tokenizers_have_the_published_ids_and_lengths() {
    let folder = tempfile::tempdir().unwrap();
    let (sheets, config) = Size::Full(Depth::default()).stage(Stage::TextEncoder);
    let config: crate::text::TextConfig = serde_json::from_value(config).unwrap();
    for sheet in &sheets {
        let folder = folder.path().join(sheet.network.folder());
        std::fs::create_dir_all(&folder).unwrap();
        write_json(&folder.join("tokenizer.json"), sheet.tokenizer.as_ref().unwrap()).unwrap();
    }
    let llava = PromptTokenizer::open(&folder.path().join("llava"), &config.llava, 128_320).unwrap();
    let tokens = llava.encode("A person speaks.").unwrap();
    assert_eq!((llava.crop(), tokens.ids.len(), &tokens.ids[..2]), (95, 351, &[128_000, 128_006][..]));
    for (id, count) in [(128_257, 1), (128_009, 2), (128_258, 351 - 95 - 16 - 24)] {
        assert_eq!(tokens.ids.iter().filter(|found| **found == id).count(), count, "{id}");
    }
    let clip = ClipTokenizer::open(&folder.path().join("clip"), config.clip.eot_token, (77, 49_408)).unwrap();
    let tokens = clip.encode("A person speaks.").unwrap();
    assert_eq!((tokens.ids[0], tokens.ids[17], tokens.ids[76]), (49_406, 49_407, 49_407));
}
