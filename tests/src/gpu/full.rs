//! The transformer at its published width: all 13 billion weights made on the card in 16 bits, and from files in 8 bits,
//! where they stay or come and go; the VAE's decoder at the largest size; a whole generation.
//!
//! Beside each figure stands what the planner predicts for it, at the rates that the card was measured to have.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::LazyLock,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use model::{
    blueprint::TransformerSizes,
    convert::Storage,
    diffusion::{Conditioning, MOTION_EXP, MOTION_POSE, Transformer, TransformerConfig},
    speed, synth,
    weights::Weights,
};
use planner::{
    Precision, Stage,
    cost::{
        cuda::{self, Fit},
        work,
    },
};
use service_kit::memory::StageMeter;

use super::{
    Asked, Outcome, Question, Row,
    generation::generated,
    goals::SWAP,
    memory::CARD,
    parts::median,
    predicted::{FRAMES, LARGE, SMALL, Size, fit, job, planned, predicted, table, too_small},
};
use crate::bench::{self, Place};

/// Text tokens of a prompt of usual length, and of the longest.
const TEXT: [usize; 2] = [610, 831];
/// The part of the transformer that is written to files in 16 bits: two double blocks with an adapter, and four single
/// ones.
const PART: TransformerSizes = TransformerSizes { double: 2, single: 4, adapters: 1, ..TransformerSizes::PUBLISHED };
/// The form of the whole of it.
const EIGHT: Storage = Storage::Int8;
/// Blocks that are read ahead, beside the number that the product takes.
pub(super) const MORE_AHEAD: [u64; 2] = [2, 4];

/// The questions of this file; `avatar` is the product's binary, where there is one.
pub(super) fn questions(avatar: Option<&Path>, questions: &mut Vec<Question>) {
    let mut ask = |part, name: String, seconds, ask: Box<dyn FnOnce(Asked<'_>) -> Result<Row>>| {
        questions.push(Question::new(part, name, ask).within(seconds));
    };
    ask("planner", "the card's rates are measured".to_owned(), 30, Box::new(rates));
    for size in [SMALL, LARGE] {
        ask("full", format!("13B, one pass, {}, bf16", size.name), 90, Box::new(move |asked| in_16_bits(size, asked)));
    }
    ask("full", format!("13B written in {EIGHT}"), 120, Box::new(write));
    for size in [SMALL, LARGE] {
        let name = format!("13B, one pass, {}, {EIGHT}, all blocks stay", size.name);
        ask("full", name, 90, Box::new(move |asked| in_8_bits(size, None, asked)));
        let name = format!("13B, one pass, {}, {EIGHT}, blocks as planned for 8 GB", size.name);
        ask(SWAP, name, 90, Box::new(move |asked| in_8_bits(size, Some(cuda::AHEAD), asked)));
    }
    for ahead in MORE_AHEAD {
        let name = format!("13B, one pass, {}, {EIGHT}, {ahead} blocks ahead", SMALL.name);
        ask(SWAP, name, 30, Box::new(move |asked| in_8_bits(SMALL, Some(ahead), asked)));
    }
    for size in [SMALL, LARGE] {
        let name = format!("2 + 4 blocks, {}, bf16, none stays", size.name);
        ask(SWAP, name, 60, Box::new(move |asked| swapped(size, asked)));
    }
    ask("VAE", format!("decode of {} in tiles, f16", LARGE.name), 60, Box::new(decoded));
    let avatar = avatar.map(Path::to_owned);
    let whole = move |asked: Asked<'_>| match &avatar {
        Some(avatar) => Ok(Row { seconds: Some(generated(avatar)?), ..asked.row }),
        None => Ok(Row { outcome: Outcome::Skipped, reason: Some("no --avatar was given".to_owned()), ..asked.row }),
    };
    ask("generation", "a small model, tier maximum".to_owned(), 60, Box::new(whole));
}

fn clock() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed()
}

fn rates(asked: Asked<'_>) -> Result<Row> {
    let begin = Instant::now();
    let folder = Folder::new("rates")?;
    let rates = speed::rates(asked.device, &speed::Load::CARD, &folder.0, clock)?;
    ensure!(rates.usable(), "{rates:?}");
    asked.shared.rates.set(Some(rates));
    let told = format!(
        "TFLOP/s: layers {:.1}, attention {:.1}, convolutions {:.1}; GB/s: weights {:.1}, files {:.1}",
        rates.products / 1e12,
        rates.attention / 1e12,
        rates.convolutions / 1e12,
        rates.weights / 1e9,
        rates.files / 1e9,
    );
    Ok(Row { seconds: Some(begin.elapsed().as_secs_f64()), reason: Some(told), ..asked.row })
}

/// A folder that goes with what is in it.
#[derive(Debug)]
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("gpu-suite-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left of it matters to nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The whole transformer in files.
#[derive(Debug)]
pub(super) struct Files(Folder);

fn write(asked: Asked<'_>) -> Result<Row> {
    let begin = Instant::now();
    let folder = Folder::new("8-bits")?;
    let options = synth::Options {
        size: synth::Size::Full(synth::Depth::default()),
        storage: EIGHT,
        stages: vec![model::checkpoint::Stage::Diffusion],
        seed: 1,
    };
    synth::write(&options, &folder.0, &mut |_| ())?;
    let told = format!("{:.2} GB", synth::bytes(&options) as f64 / 1e9);
    *asked.shared.files.borrow_mut() = Some(Files(folder));
    Ok(Row { seconds: Some(begin.elapsed().as_secs_f64()), reason: Some(told), ..asked.row })
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
fn pass(transformer: &Transformer, size: Size, device: &Device) -> Result<Tensor> {
    let widths = transformer.widths();
    let ([rows, columns], [valid, longest]) = (size.sides, TEXT);
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

/// Seconds of a pass after a small one that is not counted, and the most bytes on the card meanwhile, weights included.
fn measured(transformer: &Transformer, size: Size, device: &Device) -> Result<(f64, u64)> {
    drop(pass(transformer, SMALL, device)?);
    device.synchronize()?;
    let meter = StageMeter::on(CARD);
    let before = meter.report().process_bytes;
    let begin = Instant::now();
    let velocity = meter.measure(|| -> Result<Tensor> {
        let velocity = pass(transformer, size, device)?;
        device.synchronize()?;
        Ok(velocity)
    })?;
    let seconds = begin.elapsed().as_secs_f64();
    ensure!(velocity.sum_all()?.to_scalar::<f32>()?.is_finite(), "the velocity is not finite");
    Ok((seconds, before + meter.report().peak_bytes))
}

/// The row of a pass, with what was predicted for it.
fn row((seconds, bytes): (f64, u64), size: Size, fit: &Fit, asked: &Asked<'_>) -> Result<Row> {
    let (predicted_bytes, predicted_seconds) = predicted(size, fit, asked.shared.rates.get())?;
    let operations = work::full_pass(&table()?, &job(size)?).total();
    Ok(Row {
        peak_bytes: Some(bytes),
        predicted_bytes: Some(predicted_bytes),
        predicted_seconds,
        ..asked.row.clone().timed(seconds, operations, asked)
    })
}

fn in_16_bits(size: Size, asked: Asked<'_>) -> Result<Row> {
    let fit = fit(size, Precision::Bf16)?;
    if let Some(row) = too_small(size, &fit, &asked)? {
        return Ok(row);
    }
    let place = Place { device: asked.device.clone(), dtype: DType::BF16 };
    let transformer = Transformer::load(&made(&TransformerSizes::PUBLISHED, &place)?, &TransformerConfig::default())?;
    let figures = measured(&transformer, size, asked.device)?;
    row(figures, size, &fit, &asked)
}

/// From the files in 8 bits; with `ahead`, on as much as a narrow card has.
fn in_8_bits(size: Size, ahead: Option<u64>, asked: Asked<'_>) -> Result<Row> {
    let fit = fit(size, Precision::Int8)?;
    if ahead.is_none()
        && let Some(row) = too_small(size, &fit, &asked)?
    {
        return Ok(row);
    }
    let files = asked.shared.files.borrow();
    let Files(folder) = files.as_ref().context("it was not written")?;
    let folder = folder.0.join(model::checkpoint::Stage::Diffusion.name());
    let config = TransformerConfig::open(&folder.join("config.json"))?;
    let transformer = Transformer::load(&Weights::open(&folder, DType::BF16, asked.device)?, &config)?;
    let Some(ahead) = ahead else {
        let figures = measured(&transformer, size, asked.device)?;
        asked.shared.resident.borrow_mut().insert(size.name, figures.0);
        return row(figures, size, &fit, &asked);
    };
    let fit = Fit { resident_blocks: planned(ahead)?, prefetch: ahead, ..fit };
    let swap = transformer.swaps().next().context("the transformer has no blocks")?;
    swap.look_ahead(usize::try_from(ahead)?);
    swap.keep(usize::try_from(fit.resident_blocks)?, clock);
    let figures = measured(&transformer, size, asked.device)?;
    let told = swap.told();
    let overhead = asked.shared.resident.borrow().get(size.name).map(|resident| figures.0 / resident - 1.0);
    let more = overhead.map_or(String::new(), |more| format!("{:.1} % more than where all stay; ", 100.0 * more));
    let (waited, hidden) = (told.waited.as_secs_f64(), told.hidden.as_secs_f64());
    let told = format!(
        "{more}{} of {} stay; two passes waited {waited:.2} s, hid {hidden:.2} s",
        fit.resident_blocks, fit.blocks
    );
    Ok(Row { overhead, reason: Some(told), ..row(figures, size, &fit, &asked)? })
}

/// A pass whose blocks all come and go against one whose blocks stay, from the same files.
fn swapped(size: Size, asked: Asked<'_>) -> Result<Row> {
    let device = asked.device;
    let folder = Folder::new("16-bits")?;
    written(&folder.0, &Place { device: device.clone(), dtype: DType::BF16 })?;
    let weights = Weights::open(&folder.0, DType::BF16, device)?;
    let transformer = Transformer::load(&weights, &TransformerConfig::default())?;
    let swap = transformer.swaps().next().context("the transformer has no blocks")?;
    let run = || median(device, || pass(&transformer, size, device).map(drop));
    let resident = run()?;
    swap.keep(0, clock);
    let coming = run()?;
    let told = swap.told();
    let (waited, hidden) = (told.waited.as_secs_f64(), told.hidden.as_secs_f64());
    let more = coming / resident - 1.0;
    let reason = format!("{:.1} % more than where all stay; waited {waited:.2} s, hid {hidden:.2} s", 100.0 * more);
    Ok(Row { seconds: Some(coming), overhead: Some(more), reason: Some(reason), ..asked.row })
}

fn written(folder: &Path, place: &Place) -> Result<()> {
    let values = |spec: model::blueprint::Spec| -> Result<(String, Tensor)> {
        let values = Tensor::randn(spec.mean, spec.deviation, spec.shape.as_slice(), &place.device)?;
        Ok((spec.name, values.to_dtype(place.dtype)?.to_device(&Device::Cpu)?))
    };
    let tensors: HashMap<String, Tensor> = PART.tensors().into_iter().map(values).collect::<Result<_>>()?;
    Ok(candle_core::safetensors::save(&tensors, folder.join("model.safetensors"))?)
}

fn decoded(asked: Asked<'_>) -> Result<Row> {
    let place = Place { device: asked.device.clone(), dtype: DType::F16 };
    let meter = StageMeter::on(CARD);
    let before = meter.report().process_bytes;
    let [rows, columns] = LARGE.sides;
    let seconds = meter.measure(|| bench::vae_decode_tiled([FRAMES, rows, columns], &place))?;
    let (table, job) = (table()?, job(LARGE)?);
    let fit = Fit { resident_blocks: 0, blocks: 0, ..fit(LARGE, Precision::Bf16)? };
    let (weights, _) = cuda::weights(&table, Stage::VaeDecode, &fit);
    let work = work::stage(&table, Stage::VaeDecode, &job);
    let row = asked.row.clone().timed(seconds, work.total(), &asked);
    Ok(Row {
        peak_bytes: Some(before + meter.report().peak_bytes),
        predicted_bytes: Some(weights + cuda::activations(&table, Stage::VaeDecode, &job, &fit)),
        predicted_seconds: asked.shared.rates.get().map(|rates| work.seconds(&rates)),
        ..row
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_goes_with_what_is_in_it() {
        let folder = Folder::new("of-a-test").unwrap();
        let path = folder.0.clone();
        std::fs::write(path.join("file"), [0]).unwrap();
        drop(folder);
        assert!(!path.exists());
    }
}
