//! Questions about a card's memory: that it runs out without harm, that it is counted, that nothing stays.

use std::{path::Path, time::Instant};

use anyhow::{Context as _, Result, ensure};
use candle_core::{DType, Device, Tensor};
use service_kit::{
    hardware::{DeviceName, Driver as _, Nvml},
    memory::StageMeter,
};

use super::{
    Asked, Outcome, Question, Row,
    goals::{LEAK, ROUNDS},
    parts::{apart, of},
};
use crate::{bench::Place, parity};

/// The card that the suite asks.
pub(super) const CARD: DeviceName = DeviceName::Cuda { index: 0 };

/// The questions of this file.
pub(super) fn questions(cases: &Path, questions: &mut Vec<Question>) -> Result<()> {
    questions.push(Question::new("memory", "a failed allocation leaves the card usable", out_of_memory));
    questions.push(Question::new("memory", "the meter against NVML", meter));
    stages_out_of_memory(cases, questions)?;
    leak(cases, questions)
}

/// More than any card has is an error, and after it the card computes as before.
fn out_of_memory(asked: Asked<'_>) -> Result<Row> {
    let most = Tensor::zeros((1 << 20, 1 << 20), DType::F32, asked.device);
    ensure!(most.is_err(), "4 TiB were given");
    let place = Place { device: asked.device.clone(), dtype: DType::F32 };
    let x = place.random(&[64, 64], 1)?;
    let error = apart(&x.matmul(&x)?.to_device(&Device::Cpu)?, &{
        let x = x.to_device(&Device::Cpu)?;
        x.matmul(&x)?
    })?;
    ensure!(error < 1e-5, "a product after it differs by {error:.1e}");
    Ok(Row { error: Some(error), ..asked.row })
}

/// What the card's allocator counts against what the driver sees, for a gigabyte more.
fn meter(asked: Asked<'_>) -> Result<Row> {
    const BYTES: usize = 1 << 30;
    let driver = Nvml::load().context("no driver answers")?;
    let free = || -> Result<u64> {
        let cards = driver.cards().map_err(anyhow::Error::msg)?;
        Ok(cards.first().context("the driver knows no card")?.free_bytes)
    };
    asked.device.synchronize()?;
    let (before, meter) = (free()?, StageMeter::on(CARD));
    let held = meter.load(|| Tensor::zeros(BYTES, DType::U8, asked.device))?;
    asked.device.synchronize()?;
    let (seen, counted) = (before.saturating_sub(free()?) as f64, meter.report().resident_bytes as f64);
    drop(held);
    ensure!((counted - BYTES as f64).abs() < 1e6, "{counted} bytes were counted, {BYTES} were taken");
    let error = (seen / counted - 1.0).abs();
    let outcome = if error <= 0.05 { Outcome::Holds } else { Outcome::Fails };
    Ok(Row { error: Some(error), outcome, ..asked.row })
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
        questions.push(Question::new("memory", name, move |asked| {
            let full = fill(asked.device);
            let error = parity::run_on(&case, DType::F32, asked.device).error;
            drop(full);
            let said = error.context("it fitted into a full card")?;
            let known = ["OUT_OF_MEMORY", "ALLOC_FAILED", "ALLOCATION_FAILED"].iter().any(|name| said.contains(name));
            ensure!(known, "not told as memory: {said}");
            let again = of(parity::run_on(&case, DType::F32, asked.device), "memory", |_, _| None);
            Ok(Row { outcome: again.outcome, error: again.error, reason: again.reason, ..asked.row })
        }));
    }
    Ok(())
}

/// All reference cases on the card again and again; nothing of them may stay.
fn leak(cases: &Path, questions: &mut Vec<Question>) -> Result<()> {
    let cases: Vec<_> = parity::find(cases)?.into_iter().filter(|case| parity::has_network(case)).collect();
    let ask = move |asked: Asked<'_>| {
        let round = || cases.iter().for_each(|case| drop(parity::run_on(case, DType::BF16, asked.device)));
        // The first may leave what is made once.
        round();
        asked.device.synchronize()?;
        let (before, begin) = (StageMeter::on(CARD).report().process_bytes, Instant::now());
        let mut rounds = 1u32;
        // The last round is not to be cut off: what it had would be missing, and seem to have gone.
        while rounds < ROUNDS && Instant::now() + begin.elapsed() / rounds < asked.until {
            round();
            rounds += 1;
        }
        asked.device.synchronize()?;
        let after = StageMeter::on(CARD).report().process_bytes;
        ensure!(after <= before, "{before} bytes were held before, {after} after {rounds} rounds");
        let reason = (rounds < ROUNDS).then(|| format!("{rounds} rounds in its time"));
        Ok(Row { seconds: Some(begin.elapsed().as_secs_f64()), reason, ..asked.row })
    };
    questions.push(Question::new("memory", format!("{ROUNDS} {LEAK}"), ask).within(60));
    Ok(())
}
