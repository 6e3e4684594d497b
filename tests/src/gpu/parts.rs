//! The suite's questions.

use std::{path::Path, time::Instant};

use anyhow::{Context as _, Result, ensure};
use candle_core::{DType, Device, Tensor};
use model::ops;
use service_kit::{
    hardware::{Driver as _, Nvml},
    memory::StageMeter,
};

use super::{
    Outcome, Question, Row,
    full::{self, CARD},
};
use crate::{
    bench::{self, Block, Place},
    parity::{self, Drift, Report},
};

/// Tokens of one pass: the demo's size, 256x256 of 33 latent frames, and 704x768 of as many, each with its prompt.
const TOKENS: [usize; 3] = [718, 9_000, 72_000];

/// The transformer's heads and their width.
const HEADS: usize = 24;
const HEAD: usize = 128;

/// The reference cases on the processor.
pub(super) fn processor(cases: &Path) -> Result<Vec<Row>> {
    let report = |case: &std::path::PathBuf| of(parity::run(case), "parity, processor, f32", |_, _| None);
    Ok(parity::find(cases)?.iter().map(report).collect())
}

/// All that takes a card.
pub(super) fn questions(cases: &Path, avatar: Option<&Path>) -> Result<Vec<Question>> {
    let mut questions = Vec::new();
    parity_on_card(cases, &mut questions)?;
    kernels(&mut questions);
    attention(&mut questions);
    blocks(&mut questions);
    vae(&mut questions);
    questions.push(Question::new("determinism", "a block gives the same bits twice", same_bits));
    questions.push(Question::new("memory", "a failed allocation leaves the card usable", out_of_memory));
    questions.push(Question::new("memory", "the meter against NVML", meter));
    stages_out_of_memory(cases, &mut questions)?;
    leak(cases, &mut questions)?;
    full::questions(avatar, &mut questions);
    Ok(questions)
}

/// The row of a case: its worst tensor, against the case's own tolerance or the one that `limit` gives for its drift.
fn of(report: Report, part: &'static str, limit: impl Fn(&str, &str) -> Option<f64>) -> Row {
    if let Some(error) = report.error {
        return Row::failed(part, report.case, error);
    }
    let mut row = Row::new(part, report.case.clone(), Outcome::Holds);
    for tensor in &report.tensors {
        let (error, holds) = match limit(&report.case, &tensor.tensor) {
            Some(limit) => (tensor.drift, tensor.drift <= limit),
            None => (tensor.relative, tensor.holds),
        };
        if row.error.is_none_or(|worst| !(error <= worst)) {
            row.error = Some(error);
        }
        if !holds && row.outcome == Outcome::Holds {
            row.outcome = Outcome::Fails;
            row.reason = Some(format!("{}: {error:.1e}", tensor.tensor));
        }
    }
    if report.tensors.is_empty() {
        return Row::failed(part, report.case, "nothing was compared");
    }
    row
}

fn parity_on_card(cases: &Path, questions: &mut Vec<Question>) -> Result<()> {
    // In 16 bits a card may drift as far as the processor does, and as much again.
    let documented = Drift::read(include_str!("../../../docs/benchmarks/precision.md"))?;
    for case in parity::find(cases)?.into_iter().filter(|case| parity::has_network(case)) {
        let name = case.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let own = case.clone();
        questions.push(Question::new("parity, card, f32", name.clone(), move |device, _| {
            Ok(of(parity::run_on(&own, DType::F32, device), "parity, card, f32", |_, _| None))
        }));
        let documented = documented.clone();
        questions.push(Question::new("parity, card, bf16", name, move |device, _| {
            Ok(of(parity::run_on(&case, DType::BF16, device), "parity, card, bf16", |case, tensor| {
                let known = documented.iter().find(|row| row.case == case && row.tensor == tensor);
                // Tensors within networks are in no table; they drift like results.
                Some(2.0 * known.map_or(1.5e-2, |row| row.bf16))
            }))
        }));
    }
    Ok(())
}

#[cfg(feature = "cuda")]
fn kernels(questions: &mut Vec<Question>) {
    for check in model::cuda::checks::all() {
        questions.push(Question::new("kernels", check.name.clone(), move |device, row| {
            let off = check.run(device)?;
            let (outcome, reason) = match off <= check.tolerance {
                true => (Outcome::Holds, None),
                false => (Outcome::Fails, Some(format!("allowed are {:.1e}", check.tolerance))),
            };
            Ok(Row { error: Some(f64::from(off)), outcome, reason, ..row })
        }));
    }
}

/// Without CUDA in the build there are no kernels, and so nothing to name one by one.
#[cfg(not(feature = "cuda"))]
fn kernels(questions: &mut Vec<Question>) {
    let ask = |_: &Device, _| anyhow::bail!("this build has no kernels");
    questions.push(Question::new("kernels", "every kernel against its clear twin", ask));
}

/// Median seconds of three runs after one that is not counted.
pub(super) fn median(device: &Device, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    device.synchronize()?;
    let mut seconds = [0.0; 3];
    for second in &mut seconds {
        let begin = Instant::now();
        run()?;
        device.synchronize()?;
        *second = begin.elapsed().as_secs_f64();
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[1])
}

fn attention(questions: &mut Vec<Question>) {
    for tokens in TOKENS {
        questions.push(Question::new("attention", format!("attention, {tokens} tokens, bf16"), move |device, row| {
            let place = Place { device: device.clone(), dtype: DType::BF16 };
            let part = |seed: u64| place.random(&[1, HEADS, tokens, HEAD], seed);
            let (q, k, v) = (part(1)?, part(2)?, part(3)?);
            let scale = (HEAD as f64).powf(-0.5);
            // Some queries with all keys say enough of the error; the clear way takes long.
            let rows = 100.min(tokens);
            let wide = |t: Tensor| t.to_dtype(DType::F32);
            let [q32, k32, v32] = [wide(q.narrow(2, tokens - rows, rows)?)?, wide(k.clone())?, wide(v.clone())?];
            let clear = ops::attention_clear(&q32, &k32, &v32, scale, None)?;
            drop((q32, k32, v32));
            let got = ops::attention(&q, &k, &v, scale, None)?.narrow(2, tokens - rows, rows)?;
            let error = apart(&got, &clear)?;
            drop((got, clear));
            let seconds = median(device, || {
                ops::attention(&q, &k, &v, scale, None)?;
                Ok(())
            })?;
            let operations = 4.0 * (tokens * tokens * HEADS * HEAD) as f64;
            let outcome = if error <= 8e-3 { Outcome::Holds } else { Outcome::Fails };
            Ok(Row {
                outcome,
                error: Some(error),
                seconds: Some(seconds),
                tera_operations: Some(operations / seconds / 1e12),
                ..row
            })
        }));
    }
}

/// The largest difference, relative to the largest value.
fn apart(got: &Tensor, wanted: &Tensor) -> Result<f64> {
    let largest = |t: Tensor| -> Result<f64> {
        Ok(f64::from(t.to_dtype(DType::F32)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?))
    };
    let difference = largest((got.to_dtype(DType::F32)? - wanted.to_dtype(DType::F32)?)?)?;
    // A maximum passes over what is no number; a sum does not.
    let sum = got.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?;
    ensure!(sum.is_finite(), "the result is not finite");
    Ok(difference / largest(wanted.clone())?)
}

fn blocks(questions: &mut Vec<Question>) {
    for (kind, name) in [(Block::Double, "double"), (Block::Single, "single")] {
        for tokens in TOKENS {
            questions.push(Question::new(
                "blocks",
                format!("{name} block, {tokens} tokens, bf16"),
                move |device, row| {
                    let place = Place { device: device.clone(), dtype: DType::BF16 };
                    let timed = bench::block(kind, tokens, 3, &place)?;
                    let width = HEADS * HEAD;
                    // Products with weights of 12 times the width squared in all, and attention.
                    let operations = 24.0 * (tokens * width * width) as f64 + 4.0 * (tokens * tokens * width) as f64;
                    Ok(Row {
                        seconds: Some(timed.seconds),
                        tera_operations: Some(operations / timed.seconds / 1e12),
                        ..row
                    })
                },
            ));
        }
    }
}

fn vae(questions: &mut Vec<Question>) {
    for (frames, side) in [(5, 32), (17, 32)] {
        let name = format!("decode of one tile, {frames}x{side}x{side} latents, f16");
        questions.push(Question::new("VAE", name, move |device, row| {
            let place = Place { device: device.clone(), dtype: DType::F16 };
            Ok(Row { seconds: Some(bench::vae_decode(frames, side, 3, &place)?.seconds), ..row })
        }));
    }
}

/// More than any card has is an error, and after it the card computes as before.
fn out_of_memory(device: &Device, row: Row) -> Result<Row> {
    let most = Tensor::zeros((1 << 20, 1 << 20), DType::F32, device);
    ensure!(most.is_err(), "4 TiB were given");
    let place = Place { device: device.clone(), dtype: DType::F32 };
    let x = place.random(&[64, 64], 1)?;
    let error = apart(&x.matmul(&x)?.to_device(&Device::Cpu)?, &{
        let x = x.to_device(&Device::Cpu)?;
        x.matmul(&x)?
    })?;
    ensure!(error < 1e-5, "a product after it differs by {error:.1e}");
    Ok(Row { error: Some(error), ..row })
}

/// What the card's allocator counts against what the driver sees, for a gigabyte more.
fn meter(device: &Device, row: Row) -> Result<Row> {
    const BYTES: usize = 1 << 30;
    let driver = Nvml::load().context("no driver answers")?;
    let free = || -> Result<u64> {
        let cards = driver.cards().map_err(anyhow::Error::msg)?;
        Ok(cards.first().context("the driver knows no card")?.free_bytes)
    };
    device.synchronize()?;
    let (before, meter) = (free()?, StageMeter::on(CARD));
    let held = meter.load(|| Tensor::zeros(BYTES, DType::U8, device))?;
    device.synchronize()?;
    let (seen, counted) = (before.saturating_sub(free()?) as f64, meter.report().resident_bytes as f64);
    drop(held);
    ensure!((counted - BYTES as f64).abs() < 1e6, "{counted} bytes were counted, {BYTES} were taken");
    let error = (seen / counted - 1.0).abs();
    let outcome = if error <= 0.05 { Outcome::Holds } else { Outcome::Fails };
    Ok(Row { error: Some(error), outcome, ..row })
}

/// Takes the card's memory, down to the last kilobytes.
fn fill(device: &Device) -> Vec<Tensor> {
    let sizes = (10..=32).rev().step_by(2).map(|power| 1usize << power);
    sizes.flat_map(|bytes| std::iter::from_fn(move || Tensor::zeros(bytes, DType::U8, device).ok())).collect()
}

/// Each stage's reference case on a full card, and again on an empty one.
fn stages_out_of_memory(cases: &Path, questions: &mut Vec<Question>) -> Result<()> {
    for case in parity::find(cases)?.into_iter().filter(|case| parity::has_network(case)) {
        let name = case.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let name = format!("out of memory and again, {name}");
        questions.push(Question::new("memory", name, move |device, row| {
            let full = fill(device);
            let error = parity::run_on(&case, DType::F32, device).error;
            drop(full);
            let said = error.context("it fitted into a full card")?;
            let known = ["OUT_OF_MEMORY", "ALLOC_FAILED", "ALLOCATION_FAILED"].iter().any(|name| said.contains(name));
            ensure!(known, "not told as memory: {said}");
            let again = of(parity::run_on(&case, DType::F32, device), "memory", |_, _| None);
            Ok(Row { outcome: again.outcome, error: again.error, reason: again.reason, ..row })
        }));
    }
    Ok(())
}

/// All reference cases on the card again and again; nothing of them may stay.
fn leak(cases: &Path, questions: &mut Vec<Question>) -> Result<()> {
    const ROUNDS: usize = 50;
    let cases: Vec<_> = parity::find(cases)?.into_iter().filter(|case| parity::has_network(case)).collect();
    questions.push(Question::new(
        "memory",
        format!("{ROUNDS} rounds of the cases leave nothing"),
        move |device, row| {
            let round = || cases.iter().for_each(|case| drop(parity::run_on(case, DType::BF16, device)));
            // The first may leave what is made once.
            round();
            device.synchronize()?;
            let (before, begin) = (StageMeter::on(CARD).report().process_bytes, Instant::now());
            (1..ROUNDS).for_each(|_| round());
            device.synchronize()?;
            let after = StageMeter::on(CARD).report().process_bytes;
            ensure!(after <= before, "{before} bytes were held before, {after} after");
            Ok(Row { seconds: Some(begin.elapsed().as_secs_f64()), ..row })
        },
    ));
    Ok(())
}

fn same_bits(device: &Device, row: Row) -> Result<Row> {
    let place = Place { device: device.clone(), dtype: DType::BF16 };
    let part = |seed: u64| place.random(&[1, HEADS, 1_000, HEAD], seed);
    let (q, k, v) = (part(1)?, part(2)?, part(3)?);
    let weight = place.random(&[3072, 3072], 4)?;
    let run = || -> Result<Vec<f32>> {
        let seen = ops::attention(&q, &k, &v, 0.1, None)?.transpose(1, 2)?.reshape((1_000, HEADS * HEAD))?;
        Ok(seen.matmul(&weight)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    };
    let (first, second) = (run()?, run()?);
    ensure!(first == second, "two runs differ");
    Ok(row)
}
