//! Peaks that were predicted, held against those that were counted.

use std::{fs, path::Path};

use candle_core::Tensor;
use model::{
    Precision,
    audio::AudioEncoder,
    blueprint::model_table,
    checkpoint::{Choice, Setup},
    image::{ImageEncoder, Rgb8, face::FaceBox},
    text::TextEncoder,
};
use planner::{
    Stage,
    clip::ClipPlan,
    cost::{
        Job,
        cpu::{Cpu, need},
    },
    size::PictureSize,
};
use proto::tensor::HostTensor;
use serde_json::Value;
use service_kit::memory::StageMeter;

use crate::{
    inputs::{portrait, tone},
    stack::{avatar, text, tiny_models},
};

/// How far a prediction may be from what is counted.
const NEAR: f64 = 0.05;

fn hold(what: &str, predicted: u64, measured: u64) {
    let ratio = measured as f64 / predicted as f64;
    assert!((ratio - 1.0).abs() <= NEAR, "{what}: {measured} bytes were counted, {predicted} predicted: {ratio:.3}");
}

fn predicted(stage: Stage, (size, frames): (PictureSize, usize), prompt: u64, precision: Precision) -> u64 {
    let table = model_table(&tiny_models(), Choice::Auto).unwrap();
    let job = Job::new(size, &ClipPlan::new(frames, 1, 33), 1, 1).unwrap();
    let value_bytes = if precision == Precision::F32 { 4 } else { 2 };
    let (threads, packs) = (model::ops::threads() as u64, model::ops::has_kernel());
    need(&table, stage, &Job { prompt_tokens: Some(prompt), ..job }, Cpu { threads, packs, value_bytes }).peak()
}

fn picture(side: usize) -> Rgb8 {
    let data = (0..side * side * 3).map(|i| (i * 7 % 256) as u8).collect();
    Rgb8::new(side, side, data).unwrap()
}

fn setup(precision: Precision) -> Setup {
    Setup { precision, ..Setup::default() }
}

/// Runs once before anything is counted: threads that multiply without a kernel of ours keep what they packed in.
fn warm<R>(run: impl FnOnce() -> R) {
    drop(run());
}

/// A tensor as its service gives it back.
fn sent(tensor: &Tensor) -> HostTensor {
    HostTensor::from_candle("sent", tensor).unwrap()
}

#[test]
fn the_audio_encoder_takes_what_was_predicted() {
    for precision in [Precision::F32, Precision::Bf16] {
        for frames in [10, 400, 800] {
            let samples: Vec<f32> = (0..640 * frames).map(|i| (i as f32 * 0.05).sin() * 0.4).collect();
            let meter = StageMeter::default();
            let encoder = meter.load(|| AudioEncoder::open(&tiny_models(), &setup(precision))).unwrap();
            let run = || sent(&encoder.encode(&samples).unwrap());
            warm(run);
            drop(meter.measure(run));
            let size = PictureSize { width: 64, height: 64 };
            let expected = predicted(Stage::AudioEncoder, (size, frames), 0, precision);
            hold(&format!("{frames} frames in {precision:?}"), expected, meter.report().peak_bytes);
        }
    }
}

#[test]
fn the_text_encoder_takes_what_was_predicted() {
    for precision in [Precision::F32, Precision::Bf16] {
        for (side, words) in [(64, 0), (256, 20), (512, 60)] {
            let (prompt, picture) = ("waves ".repeat(words), picture(side as usize));
            let meter = StageMeter::default();
            let encoder = meter.load(|| TextEncoder::open(&tiny_models(), &setup(precision))).unwrap();
            let run = || {
                let states = encoder.encode(&prompt, &picture, side, side).unwrap();
                let sent = [&states.positive, &states.negative].map(|b| (sent(&b.states), sent(&b.pooled)));
                (states.prompt_tokens, sent)
            };
            warm(run);
            let (tokens, _) = meter.measure(run);
            let size = PictureSize { width: side, height: side };
            let expected = predicted(Stage::TextEncoder, (size, 5), tokens as u64, precision);
            hold(&format!("{side} pixels, {words} words in {precision:?}"), expected, meter.report().peak_bytes);
        }
    }
}

#[test]
fn the_image_encoder_takes_what_was_predicted() {
    let face = FaceBox { x: 10.0, y: 10.0, width: 30.0, height: 30.0, score: None };
    for precision in [Precision::F32, Precision::Bf16] {
        for (side, face) in [(64, None), (128, Some(face)), (256, None), (384, Some(face))] {
            let picture = picture(side as usize);
            let meter = StageMeter::default();
            let encoder = meter.load(|| ImageEncoder::open(&tiny_models(), &setup(precision))).unwrap();
            let run = || {
                let reference = encoder.encode(&picture, side, side, face).unwrap();
                [sent(&reference.latents), sent(&reference.face_mask)]
            };
            warm(run);
            drop(meter.measure(run));
            let size = PictureSize { width: side, height: side };
            let expected = predicted(Stage::ImageEncoder, (size, 5), 0, precision);
            hold(&format!("{side} pixels in {precision:?}"), expected, meter.report().peak_bytes);
        }
    }
}

/// What a command printed last.
fn last(arguments: &[&str]) -> Value {
    let done = avatar(arguments);
    let stdout = text(&done.stdout);
    let last = stdout.lines().last().unwrap_or_else(|| panic!("{}", text(&done.stderr)));
    serde_json::from_str(last).unwrap()
}

/// Generates, plans the same, and holds the peaks of the stages in which buffers of the wire are small.
fn generate_as_planned(models: &Path, seconds: f32, more: &[&str], compute: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (image, audio, out) = (path("portrait.png"), path("speech.wav"), path("a.mp4"));
    fs::write(&image, portrait()).unwrap();
    fs::write(&audio, tone(seconds, 16_000)).unwrap();
    let models = models.to_str().unwrap();
    let inputs = ["generate", "--image", &image, "--audio", &audio, "--out", &out, "--json", "--models", models];
    let made = last(&[&inputs[..], &["--compute", compute], more].concat());
    assert_eq!(made["event"], "completed", "{made}");
    let number = |key: &str| made[key].to_string();
    let size = format!("{}x{}", number("width"), number("height"));
    let (frames, steps, tokens) = (number("frames"), number("steps"), number("prompt_tokens"));
    let of_clip = ["plan", "--models", models, "--size", &size, "--frames", &frames, "--steps", &steps];
    let plan = last(&[&of_clip[..], &["--prompt-tokens", &tokens, "--compute", compute, "--json"]].concat());
    for stage in ["diffusion", "vae-decode"] {
        let planned = plan["stages"].as_array().unwrap().iter().find(|planned| planned["stage"] == stage).unwrap();
        let what = format!("{stage}, {size}, {frames} frames, {steps} steps in {compute}");
        hold(&what, planned["peak_bytes"].as_u64().unwrap(), made["peak_bytes"][stage].as_u64().unwrap());
    }
}

#[test]
fn transformer_and_decoder_take_what_was_predicted_at_every_size() {
    for (size, seconds) in [("64", 0.2), ("128", 0.3), ("192", 0.6), ("256", 0.2)] {
        let one = ["--size", size, "--steps", "1", "--guidance-scale", "1"];
        generate_as_planned(&tiny_models(), seconds, &one, "f32");
    }
}

#[test]
fn transformer_and_decoder_take_what_was_predicted_in_16_bits_and_with_kept_features() {
    let few = ["--size", "128", "--steps", "2", "--guidance-scale", "1"];
    generate_as_planned(&tiny_models(), 0.5, &few, "bf16");
    generate_as_planned(&tiny_models(), 0.3, &["--size", "128", "--steps", "30", "--guidance-scale", "7.5"], "f32");
}

#[test]
fn transformer_and_decoder_take_what_was_predicted_with_8_bit_weights() {
    let folder = tempfile::tempdir().unwrap();
    for precision in ["fp8", "q8_0"] {
        let models = folder.path().join(precision);
        let made = avatar(&[
            "weights",
            "synth",
            "--size",
            "tiny",
            "--precision",
            precision,
            "--out",
            models.to_str().unwrap(),
        ]);
        assert!(made.status.success(), "{}", text(&made.stderr));
        generate_as_planned(&models, 0.3, &["--size", "192", "--steps", "1", "--guidance-scale", "1"], "f32");
    }
}
