//! The transformer at its published width, with values made on the card: the whole of it, and a part of it whose blocks
//! come and go; the VAE's decoder at the largest size; a whole generation.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use model::{
    blueprint::TransformerSizes,
    diffusion::{Conditioning, MOTION_EXP, MOTION_POSE, Transformer, TransformerConfig},
    synth,
    weights::Weights,
};
use service_kit::{hardware::DeviceName, memory::StageMeter};

use super::{Outcome, Question, Row, parts::median};
use crate::bench::{self, Place};

/// Latent frames of a window of 129 frames.
const FRAMES: usize = 33;
/// Name, and rows and columns of the latents.
const SIZES: [(&str, [usize; 2]); 2] = [("256x256x129", [32, 32]), ("704x768x129", [88, 96])];
/// Text tokens of a prompt of usual length, and of the longest.
const TEXT: [usize; 2] = [610, 831];
/// The part of the transformer that is written to files: two double blocks with an adapter, and four single ones.
const PART: TransformerSizes = TransformerSizes { double: 2, single: 4, adapters: 1, ..TransformerSizes::PUBLISHED };

/// The questions of this file; `avatar` is the product's binary, where there is one.
pub(super) fn questions(avatar: Option<&Path>, questions: &mut Vec<Question>) {
    for (name, sides) in SIZES {
        questions.push(Question::new("full", format!("13B, one pass, {name}, bf16"), move |device, row| {
            let place = Place { device: device.clone(), dtype: DType::BF16 };
            let transformer = Transformer::load(&made(&TransformerSizes::PUBLISHED, &place)?, &config())?;
            timed(&transformer, sides, device, row)
        }));
    }
    for (name, sides) in SIZES {
        questions.push(Question::new("swap", format!("2 + 4 blocks, {name}, none stays, bf16"), move |device, row| {
            swapped(sides, device, row)
        }));
    }
    questions.push(Question::new("VAE", "decode of 704x768x129 in tiles, f16", |device, row| {
        let place = Place { device: device.clone(), dtype: DType::F16 };
        let meter = StageMeter::on(CARD);
        let [rows, columns] = SIZES[1].1;
        let seconds = meter.measure(|| bench::vae_decode_tiled([FRAMES, rows, columns], &place))?;
        Ok(Row { seconds: Some(seconds), peak_bytes: Some(meter.report().peak_bytes), ..row })
    }));
    let avatar = avatar.map(Path::to_owned);
    questions.push(Question::new("generation", "a small model, tier maximum", move |_, row| match &avatar {
        Some(avatar) => generated(avatar, row),
        None => Ok(Row { outcome: Outcome::Skipped, reason: Some("no --avatar was given".to_owned()), ..row }),
    }));
}

/// The card that the suite asks.
pub(super) const CARD: DeviceName = DeviceName::Cuda { index: 0 };

fn config() -> TransformerConfig {
    TransformerConfig::default()
}

/// Random weights, made where they are used: on the processor 13 billion values would take longer than all else.
fn made(sizes: &TransformerSizes, place: &Place) -> Result<Weights> {
    let one = |spec: model::blueprint::Spec| -> Result<(String, Tensor)> {
        let values = Tensor::randn(spec.mean, spec.deviation, spec.shape.as_slice(), &place.device)?;
        Ok((spec.name, values.to_dtype(place.dtype)?))
    };
    let tensors: HashMap<String, Tensor> = sizes.tensors().into_iter().map(one).collect::<Result<_>>()?;
    Ok(Weights::from_tensors(tensors, place.dtype, &place.device))
}

/// One pass over a window of the size, in which everything is heard.
fn pass(transformer: &Transformer, [rows, columns]: [usize; 2], device: &Device) -> Result<Tensor> {
    let widths = transformer.widths();
    let [valid, longest] = TEXT;
    let mask: Vec<i64> = (0..longest).map(|i| i64::from(i < valid)).collect();
    let random = |shape: &[usize]| Tensor::rand(-1f32, 1f32, shape, device);
    let given = Conditioning {
        reference_latents: random(&[widths.channels, 1, rows, columns])?,
        face_mask: Tensor::ones((1, 1, rows, columns), DType::F32, device)?,
        text_states: random(&[longest, widths.text])?,
        text_mask: &mask,
        pooled: random(&[widths.pooled])?,
        audio: random(&[4 * FRAMES - 3, 1, 1, widths.audio])?,
        fps: 25.0,
        motion_exp: MOTION_EXP,
        motion_pose: MOTION_POSE,
    };
    let latents = random(&[widths.channels, FRAMES, rows, columns])?;
    Ok(transformer.predict(&latents, 900.0, &given, false)?.velocity)
}

/// Seconds of a pass after one that is not counted, and the most bytes that it held on the card, weights included.
fn timed(transformer: &Transformer, sides: [usize; 2], device: &Device, row: Row) -> Result<Row> {
    let meter = StageMeter::on(CARD);
    let mut seconds = [0.0; 2];
    for second in &mut seconds {
        device.synchronize()?;
        let begin = Instant::now();
        let velocity = pass(transformer, sides, device)?;
        device.synchronize()?;
        *second = begin.elapsed().as_secs_f64();
        let sum = velocity.sum_all()?.to_scalar::<f32>()?;
        ensure!(sum.is_finite(), "the velocity is not finite");
    }
    let peak = meter.measure(|| -> Result<u64> {
        drop(pass(transformer, sides, device)?);
        Ok(meter.report().process_bytes)
    })?;
    Ok(Row { seconds: Some(seconds[1]), peak_bytes: Some(peak + meter.report().peak_bytes), ..row })
}

fn clock() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed()
}

/// A pass whose blocks all come and go against one whose blocks stay, from the same files.
fn swapped(sides: [usize; 2], device: &Device, row: Row) -> Result<Row> {
    let folder = std::env::temp_dir().join(format!("gpu-suite-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let place = Place { device: device.clone(), dtype: DType::BF16 };
    let outcome = written(&folder, &place).and_then(|()| {
        let weights = Weights::open(&folder, DType::BF16, device)?;
        let transformer = Transformer::load(&weights, &config())?;
        let swap = transformer.swaps().next().context("the transformer has no blocks")?;
        let run = || {
            median(device, || {
                pass(&transformer, sides, device)?;
                Ok(())
            })
        };
        let resident = run()?;
        swap.keep(0, clock);
        let coming = run()?;
        let told = swap.told();
        let (waited, hidden) = (told.waited.as_secs_f64(), told.hidden.as_secs_f64());
        let more = coming / resident - 1.0;
        let reason = format!("{:.1} % more than resident; waited {waited:.2} s, hidden {hidden:.2} s", 100.0 * more);
        Ok(Row { seconds: Some(coming), peak_bytes: Some(told.held_bytes), reason: Some(reason), ..row })
    });
    std::fs::remove_dir_all(&folder)?;
    outcome
}

fn written(folder: &Path, place: &Place) -> Result<()> {
    let values = |spec: model::blueprint::Spec| -> Result<(String, Tensor)> {
        let values = Tensor::randn(spec.mean, spec.deviation, spec.shape.as_slice(), &place.device)?;
        Ok((spec.name, values.to_dtype(place.dtype)?.to_device(&Device::Cpu)?))
    };
    let tensors: HashMap<String, Tensor> = PART.tensors().into_iter().map(values).collect::<Result<_>>()?;
    Ok(candle_core::safetensors::save(&tensors, folder.join("model.safetensors"))?)
}

/// Runs the product on a model, a picture and a sound that are made here.
fn generated(avatar: &Path, row: Row) -> Result<Row> {
    let folder = std::env::temp_dir().join(format!("gpu-suite-generation-{}", std::process::id()));
    let outcome = generate(avatar, &folder);
    // What is left of it matters to nobody.
    let _ = std::fs::remove_dir_all(&folder);
    Ok(Row { seconds: Some(outcome?), ..row })
}

fn generate(avatar: &Path, folder: &Path) -> Result<f64> {
    let models = folder.join("models");
    synth::tiny(&models, 1)?;
    let (picture, sound, out) = (folder.join("picture.ppm"), folder.join("sound.wav"), folder.join("out.mp4"));
    std::fs::write(&picture, [b"P6 256 256 255\n".as_slice(), &[128; 256 * 256 * 3]].concat())?;
    std::fs::write(&sound, silence())?;
    let begin = Instant::now();
    let given = [("--models", &models), ("--image", &picture), ("--audio", &sound), ("--out", &out)];
    let done = Command::new(avatar)
        .arg("generate")
        .args(given.iter().flat_map(|(flag, path): &(&str, &PathBuf)| [(*flag).as_ref(), path.as_os_str()]))
        .args(["--device", "cuda:0", "--compute", "bf16", "--tier", "maximum", "--steps", "2", "--prompt", "A person."])
        .output()
        .with_context(|| avatar.display().to_string())?;
    if !done.status.success() || !out.is_file() {
        bail!("{}: {}", done.status, String::from_utf8_lossy(&done.stderr));
    }
    Ok(begin.elapsed().as_secs_f64())
}

/// One second of it, 16 kHz, 16 bits, one channel.
fn silence() -> Vec<u8> {
    const RATE: u32 = 16_000;
    let mut wav = b"RIFF".to_vec();
    wav.extend((36 + 2 * RATE).to_le_bytes());
    wav.extend(b"WAVEfmt ");
    wav.extend(16u32.to_le_bytes());
    wav.extend([1u16, 1].map(u16::to_le_bytes).concat());
    wav.extend([RATE, 2 * RATE].map(u32::to_le_bytes).concat());
    wav.extend([2u16, 16].map(u16::to_le_bytes).concat());
    wav.extend(b"data");
    wav.extend((2 * RATE).to_le_bytes());
    wav.resize(wav.len() + 2 * RATE as usize, 0);
    wav
}
