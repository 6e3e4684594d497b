//! Every network in 16 bits against itself in f32, over the small random checkpoint.
//!
//! Drift is `|difference| / |f32|` over all values, root mean square. A bound is twice what was measured.

use candle_core::{DType, Device, Tensor};

use super::Precision;
use crate::{
    Result,
    audio::AudioEncoder,
    checkpoint::Setup,
    diffusion::{Conditioning, DiffusionStage, MOTION_EXP, MOTION_POSE},
    image::{ImageEncoder, Rgb8},
    text::{TextEncoder, TextStates},
    vae::VaeStage,
};

const SIXTEEN: [Precision; 2] = [Precision::Bf16, Precision::F16];

fn setup(precision: Precision) -> Setup {
    Setup { precision, ..Setup::default() }
}

fn models() -> tempfile::TempDir {
    let models = tempfile::tempdir().unwrap();
    crate::synth::tiny(models.path(), 5).unwrap();
    models
}

fn wave(shape: &[usize], step: f32) -> Tensor {
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|i| (i as f32 * step).sin()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn picture() -> Rgb8 {
    Rgb8::new(64, 64, (0..64 * 64 * 3).map(|i| (i * 7 % 251) as u8).collect()).unwrap()
}

/// Asserts that a network in 16 bits drifts from f32, and by how much at most; bounds are for bf16 and f16.
fn drifts(name: &str, bounds: [f64; 2], run: impl Fn(Precision) -> Result<Tensor>) {
    let values = |precision| {
        let tensor = run(precision).unwrap();
        assert_eq!(tensor.dtype(), DType::F32, "{name} in {precision:?} gives another type");
        tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let exact = values(Precision::F32);
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    for (precision, bound) in SIXTEEN.into_iter().zip(bounds) {
        let rounded = values(precision);
        let drift = norm(&mut exact.iter().zip(&rounded).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied());
        println!("{name} {precision:?}: {drift:.2e} of {bound:.1e}");
        assert!(drift > 0.0 && drift < bound, "{name} in {precision:?} drifts by {drift:e}, expected up to {bound:e}");
    }
}

#[test]
fn the_audio_encoder_in_16_bits_stays_near() {
    let models = models();
    let samples: Vec<f32> = (0..16_000).map(|i| (i as f32 * 0.05).sin() * 0.3).collect();
    drifts("features", [1.5e-2, 1.7e-3], |precision| {
        AudioEncoder::open(models.path(), &setup(precision))?.encode(&samples)
    });
}

#[test]
fn llava_and_clip_in_16_bits_stay_near() {
    let models = models();
    let encode = |precision| -> Result<TextStates> {
        TextEncoder::open(models.path(), &setup(precision))?.encode("A person speaks.", &picture(), 64, 64)
    };
    let states = [Precision::F32, Precision::Bf16, Precision::F16].map(|precision| encode(precision).unwrap());
    let of = |precision: Precision| &states[precision as usize].positive;
    drifts("LLaVA", [1.7e-2, 2e-3], |precision| Ok(of(precision).states.clone()));
    drifts("CLIP", [1.3e-2, 1.5e-3], |precision| Ok(of(precision).pooled.clone()));
}

#[test]
fn the_image_encoder_in_16_bits_stays_near() {
    let models = models();
    drifts("reference latents", [3.4e-2, 4.1e-3], |precision| {
        Ok(ImageEncoder::open(models.path(), &setup(precision))?.encode(&picture(), 64, 64, None)?.latents)
    });
}

#[test]
fn the_transformer_in_16_bits_stays_near_in_full_and_cached_passes() {
    let models = models();
    let mask: Vec<i64> = (0..12).map(|i| i64::from(i < 9)).collect();
    let run = |precision| -> Result<[Tensor; 2]> {
        let transformer = DiffusionStage::open(models.path(), &setup(precision))?.transformer;
        let given = Conditioning {
            reference_latents: wave(&[16, 1, 8, 8], 0.3),
            face_mask: Tensor::ones((1, 1, 8, 8), DType::F32, &Device::Cpu)?,
            text_states: wave(&[12, 64], 0.7),
            text_mask: &mask,
            pooled: wave(&[64], 0.5),
            audio: wave(&[9, 10, 5, 64], 0.11),
            fps: 25.0,
            motion_exp: MOTION_EXP,
            motion_pose: MOTION_POSE,
        };
        let pass = transformer.predict(&wave(&[16, 3, 8, 8], 0.9), 900.0, &given, true)?;
        let features = pass.features.unwrap();
        assert_eq!(features.image.dtype(), precision.dtype());
        Ok([pass.velocity, transformer.predict_cached(&features, 850.0, &given)?])
    };
    let passes = [Precision::F32, Precision::Bf16, Precision::F16].map(|precision| run(precision).unwrap());
    drifts("velocity", [1.1e-2, 1.5e-3], |precision| Ok(passes[precision as usize][0].clone()));
    drifts("cached velocity", [1.1e-2, 1.5e-3], |precision| Ok(passes[precision as usize][1].clone()));
}

/// Long and large enough for tiles in time and space, so that their seams are in 16 bits too.
#[test]
fn the_vae_decoder_in_16_bits_stays_near() {
    let models = models();
    let path = models.path().join("vae-decode/config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["sample_size"] = 32.into();
    config["sample_tsize"] = 8.into();
    std::fs::write(&path, config.to_string()).unwrap();
    drifts("pixels", [1.5e-2, 4.2e-3], |precision| {
        let stage = VaeStage::open(models.path(), &setup(precision))?;
        let mut pixels = Vec::new();
        stage.decode_frames(&wave(&[16, 3, 6, 6], 0.7), None, &mut |_, bytes| {
            pixels.extend(bytes.into_iter().map(f32::from));
            Ok(())
        })?;
        let count = pixels.len();
        Ok(Tensor::from_vec(pixels, count, &Device::Cpu)?)
    });
}
