//! What each stage gives of a checkpoint, to compare two.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use model::{
    Result,
    audio::AudioEncoder,
    checkpoint::Setup,
    diffusion::{Conditioning, DiffusionStage, MOTION_EXP, MOTION_POSE},
    image::{ImageEncoder, Rgb8},
    text::TextEncoder,
    vae::VaeStage,
};

fn wave(shape: &[usize], step: f32) -> Tensor {
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|i| (i as f32 * step).sin()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

fn picture() -> Rgb8 {
    Rgb8::new(64, 64, (0..64 * 64 * 3).map(|i| (i * 7 % 251) as u8).collect()).unwrap()
}

pub fn audio(models: &Path, setup: &Setup) -> Result<Vec<f32>> {
    let samples: Vec<f32> = (0..3200).map(|i| (i as f32 * 0.05).sin() * 0.3).collect();
    values(&AudioEncoder::open(models, setup)?.encode(&samples)?)
}

/// LLaVA's states and then CLIP's.
pub fn text(models: &Path, setup: &Setup) -> Result<Vec<f32>> {
    let states = TextEncoder::open(models, setup)?.encode("A person speaks.", &picture(), 64, 64)?;
    Ok([values(&states.positive.states)?, values(&states.negative.pooled)?].concat())
}

pub fn image(models: &Path, setup: &Setup) -> Result<Vec<f32>> {
    values(&ImageEncoder::open(models, setup)?.encode(&picture(), 64, 64, None)?.latents)
}

pub fn velocity(models: &Path, setup: &Setup) -> Result<Vec<f32>> {
    let given = Conditioning {
        reference_latents: wave(&[16, 1, 8, 8], 0.3),
        face_mask: Tensor::ones((1, 1, 8, 8), DType::F32, &Device::Cpu)?,
        text_states: wave(&[12, 64], 0.7),
        text_mask: &[1; 12],
        pooled: wave(&[64], 0.5),
        audio: wave(&[5, 10, 5, 64], 0.11),
        fps: 25.0,
        motion_exp: MOTION_EXP,
        motion_pose: MOTION_POSE,
    };
    let transformer = DiffusionStage::open(models, setup)?.transformer;
    values(&transformer.predict(&wave(&[16, 2, 8, 8], 0.9), 900.0, &given, false)?.velocity)
}

pub fn pixels(models: &Path, setup: &Setup) -> Result<Vec<f32>> {
    let mut pixels = Vec::new();
    VaeStage::open(models, setup)?.decode_frames(&wave(&[16, 2, 6, 6], 0.7), None, &mut |_, bytes| {
        pixels.extend(bytes.into_iter().map(f32::from));
        Ok(())
    })?;
    Ok(pixels)
}

/// A stage's output as a function of its weights.
pub type Run = fn(&Path, &Setup) -> Result<Vec<f32>>;

/// Every stage.
pub const ALL: [(&str, Run); 5] =
    [("audio", audio), ("text", text), ("image", image), ("velocity", velocity), ("pixels", pixels)];

/// `|a - b| / |b|`, root mean square.
pub fn drift(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |v: f32| f64::from(v).powi(2);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / b.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}
