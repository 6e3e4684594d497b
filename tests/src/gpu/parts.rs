//! The suite's questions.

use std::{path::Path, time::Instant};

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use model::ops;

use super::{
    Asked, Outcome, Question, Row,
    goals::{ATTENTION, BLOCKS},
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

/// The questions of this file; `seed` draws the shapes of some.
pub(super) fn questions(cases: &Path, seed: u64, questions: &mut Vec<Question>) -> Result<()> {
    parity_on_card(cases, questions)?;
    kernels(seed, questions);
    questions.push(Question::new("determinism", "a block gives the same bits twice", same_bits));
    attention(questions);
    blocks(questions);
    vae(questions);
    Ok(())
}

/// The row of a case: its worst tensor, against the case's own tolerance or the one that `limit` gives for its drift.
pub(super) fn of(report: Report, part: &'static str, limit: impl Fn(&str, &str) -> Option<f64>) -> Row {
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
        questions.push(Question::new("parity, card, f32", name.clone(), move |asked| {
            Ok(of(parity::run_on(&own, DType::F32, asked.device), "parity, card, f32", |_, _| None))
        }));
        let documented = documented.clone();
        questions.push(Question::new("parity, card, bf16", name, move |asked| {
            Ok(of(parity::run_on(&case, DType::BF16, asked.device), "parity, card, bf16", |case, tensor| {
                let known = documented.iter().find(|row| row.case == case && row.tensor == tensor);
                // Tensors within networks are in no table; they drift like results.
                Some(2.0 * known.map_or(1.5e-2, |row| row.bf16))
            }))
        }));
    }
    Ok(())
}

#[cfg(feature = "cuda")]
fn kernels(seed: u64, questions: &mut Vec<Question>) {
    use model::cuda::checks::{all, drawn};
    for check in all().into_iter().chain(drawn(seed)) {
        questions.push(Question::new("kernels", check.name.clone(), move |asked| {
            let off = check.run(asked.device)?;
            let (outcome, reason) = match off <= check.tolerance {
                true => (Outcome::Holds, None),
                false => (Outcome::Fails, Some(format!("allowed are {:.1e}", check.tolerance))),
            };
            Ok(Row { error: Some(f64::from(off)), outcome, reason, ..asked.row })
        }));
    }
}

/// Without CUDA in the build there are no kernels, and so nothing to name one by one.
#[cfg(not(feature = "cuda"))]
fn kernels(_: u64, questions: &mut Vec<Question>) {
    let ask = |_: Asked<'_>| anyhow::bail!("this build has no kernels");
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
        let ask = move |asked: Asked<'_>| {
            let place = Place { device: asked.device.clone(), dtype: DType::BF16 };
            let part = |seed: u64| place.random(&[1, HEADS, tokens, HEAD], seed);
            let (q, k, v) = (part(1)?, part(2)?, part(3)?);
            let scale = (HEAD as f64).powf(-0.5);
            // Some queries with all keys say enough of the error; the clear way takes long.
            let rows = 100.min(tokens);
            let wide = |t: Tensor| t.to_dtype(DType::F32);
            let [q32, k32, v32] = [wide(q.narrow(2, tokens - rows, rows)?)?, wide(k.clone())?, wide(v.clone())?];
            let clear = ops::attention_clear(&q32, &k32, &v32, scale, None)?;
            drop((q32, k32, v32));
            let out = ops::attention(&q, &k, &v, scale, None)?;
            let error = apart(&out.narrow(2, tokens - rows, rows)?, &clear)?;
            let out = out.transpose(1, 2)?.reshape((tokens, HEADS * HEAD))?;
            let seconds = median(asked.device, || {
                ops::attention(&q, &k, &v, scale, None)?;
                Ok(())
            })?;
            let operations = 4.0 * (tokens * tokens * HEADS * HEAD) as f64;
            let outcome = if error <= 8e-3 { Outcome::Holds } else { Outcome::Fails };
            let row = Row { outcome, error: Some(error), ..asked.row.clone() };
            row.timed(seconds, operations, &asked).beside_pytorch(&out, &asked)
        };
        questions.push(Question::new(ATTENTION, format!("attention, {tokens} tokens, bf16"), ask).within(40));
    }
}

/// The largest difference, relative to the largest value.
pub(super) fn apart(got: &Tensor, wanted: &Tensor) -> Result<f64> {
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
            let ask = move |asked: Asked<'_>| {
                let place = Place { device: asked.device.clone(), dtype: DType::BF16 };
                let run = bench::block_of(kind, tokens, &place)?;
                let out = run()?;
                let seconds = median(asked.device, || run().map(drop))?;
                let width = HEADS * HEAD;
                // Products with weights of 12 times the width squared in all, and attention.
                let operations = 24.0 * (tokens * width * width) as f64 + 4.0 * (tokens * tokens * width) as f64;
                asked.row.clone().timed(seconds, operations, &asked).beside_pytorch(&out, &asked)
            };
            questions.push(Question::new(BLOCKS, format!("{name} block, {tokens} tokens, bf16"), ask).within(40));
        }
    }
}

fn vae(questions: &mut Vec<Question>) {
    for (frames, side) in [(5, 32), (17, 32)] {
        let name = format!("decode of one tile, {frames}x{side}x{side} latents, f16");
        questions.push(Question::new("VAE", name, move |asked| {
            let place = Place { device: asked.device.clone(), dtype: DType::F16 };
            Ok(Row { seconds: Some(bench::vae_decode(frames, side, 3, &place)?.seconds), ..asked.row })
        }));
    }
}

fn same_bits(asked: Asked<'_>) -> Result<Row> {
    let place = Place { device: asked.device.clone(), dtype: DType::BF16 };
    for kind in [Block::Double, Block::Single] {
        let run = bench::block_of(kind, 1_234, &place)?;
        let bits = || -> Result<Vec<f32>> { Ok(run()?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?) };
        let first = bits()?;
        for _ in 0..3 {
            ensure!(first == bits()?, "two runs of a {kind:?} block differ");
        }
    }
    Ok(asked.row)
}
