//! The promise about memory, kept: generations of the full-width model within budgets, beside what was predicted.

use std::{
    f32::consts::TAU,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use model::{blueprint::model_table, checkpoint::Choice as Form};
use planner::{
    Bytes, Device, DeviceKind, ModelTable, Planner, Precision, Request, Stage, Tier, Tiers,
    clip::FPS,
    cost::{
        cpu::{Cpu, blocks},
        work::Rates,
    },
    plan::Choice,
    size::PictureSize,
};
use serde_json::Value;

/// What is proven.
#[derive(Debug, Clone)]
pub struct Options {
    /// Folder of the checkpoint, which is made where it is missing.
    pub models: PathBuf,
    /// Depths of transformer (double and single blocks) and Llama; nothing for the published ones.
    pub depths: Option<[usize; 3]>,
    /// Budgets in GiB; each takes the tier of a card of that size.
    pub budgets: Vec<u64>,
    /// Denoise steps.
    pub steps: u32,
}

/// How far a peak may be from its prediction.
const NEAR: f64 = 0.05;

/// Makes the checkpoint where it is missing, generates within each budget, and gives a table of what came out.
///
/// Errors: a generation fails, takes more than its budget, or another peak than was predicted.
pub fn document(options: &Options) -> Result<String> {
    let avatar = std::env::current_exe()?.with_file_name("avatar");
    ensure!(avatar.exists(), "{} is not built", avatar.display());
    synthesise(&avatar, options)?;
    let mut text =
        "| tier, card | budget | what is made | predicted peak | measured peak | ratio | blocks that stay | \
                    waited for weights | reading hidden | a step | made in, predicted |\n\
                    | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
            .to_owned();
    for gib in &options.budgets {
        let card = Bytes::gib(*gib);
        let tiers = Tiers::default();
        let tier = tiers.for_total(card).context("no tier is for the card")?;
        let budget = match options.depths {
            None => card,
            Some(_) => in_proportion(&options.models, tier, card, options.steps)?,
        };
        let made = generate(&avatar, options, tier, budget)?;
        row(&mut text, (tier, card, budget), &made)?;
    }
    Ok(text)
}

fn synthesise(avatar: &Path, options: &Options) -> Result<()> {
    if options.models.exists() {
        return Ok(());
    }
    let mut make = Command::new(avatar);
    make.args(["weights", "synth", "--size", "full", "--precision", "q4_k", "--seed", "1", "--out"])
        .arg(&options.models);
    if let Some([double, single, llama]) = options.depths {
        for (flag, depth) in [("--double-blocks", double), ("--single-blocks", single), ("--llama-layers", llama)] {
            make.arg(flag).arg(depth.to_string());
        }
    }
    // It looks for room on the disk first.
    ensure!(make.status()?.success(), "the checkpoint was not made");
    Ok(())
}

/// The tier's request: its size, one pass of its frames.
fn request(tier: &Tier, steps: u32) -> Request {
    let side = tier.limits.pixels.next_multiple_of(16);
    Request {
        size: Some(PictureSize { width: side, height: side }),
        frames: Some(tier.limits.frames),
        steps: Some(steps),
        prompt_tokens: None,
        branches: None,
        no_feature_cache: false,
    }
}

/// A budget for a model of fewer blocks: what the heap needs, as it is, and of what the card has left for weights the
/// part that these blocks are of all.
fn in_proportion(models: &Path, tier: &Tier, card: Bytes, steps: u32) -> Result<Bytes> {
    let table = model_table(models, Form::Auto)?;
    let cpu = Cpu { threads: model::ops::threads() as u64, packs: model::ops::has_kernel(), value_bytes: 4 };
    let roomy = Bytes::gib(1 << 10);
    let device = Device {
        name: "cpu".to_owned(),
        kind: DeviceKind::Cpu([cpu; 5]),
        total: roomy,
        free: roomy,
        rates: Rates::of_cores(1),
    };
    let stored = table.stored_of(Stage::Diffusion).unwrap_or(Precision::Bf16);
    let (own, others) = blocks(&table, Stage::Diffusion, stored);
    let planner = Planner {
        table,
        tiers: Tiers::default(),
        devices: vec![device],
        placement: None,
        tier: Choice::Named(tier.name.clone()),
        precisions: vec![stored],
        allow_degrade: false,
    };
    let need = planner.plan(&request(tier, steps))?.peak_bytes;
    let published = ModelTable::published().map_err(anyhow::Error::msg)?;
    let (all, beside) = blocks(&published, Stage::Diffusion, stored);
    let room = card.0.saturating_sub(need).saturating_sub(beside) as f64;
    let share = (room / all.iter().sum::<u64>() as f64).min(1.0);
    // A process holds a little besides its stages.
    let heap = need + need / 20 + (16 << 20);
    Ok(Bytes(heap + others + (share * own.iter().sum::<u64>() as f64) as u64))
}

fn generate(avatar: &Path, options: &Options, tier: &Tier, budget: Bytes) -> Result<Value> {
    let mut run = Command::new(avatar);
    run.args(["generate", "--json", "--tier", &tier.name, "--steps", &options.steps.to_string()]).args([
        "--size",
        &tier.limits.pixels.to_string(),
        "--device",
        &format!("cpu:{}", budget.0),
    ]);
    finished(run, &options.models, (&tier.name, tier.limits.frames)).with_context(|| format!("in {budget}"))
}

/// Runs a generation of so many frames; gives what it says at its end.
fn finished(mut run: Command, models: &Path, (name, frames): (&str, u32)) -> Result<Value> {
    let folder = models.with_extension("out");
    fs::create_dir_all(&folder)?;
    let speech = folder.join("speech.wav");
    fs::write(&speech, tone(frames))?;
    let portrait = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/portrait.png");
    run.arg("--models").arg(models).arg("--image").arg(&portrait).arg("--audio").arg(&speech);
    let done = run.arg("--out").arg(folder.join(format!("{name}.mp4"))).output()?;
    let told = String::from_utf8_lossy(&done.stdout);
    let last: Value = serde_json::from_str(told.lines().last().unwrap_or_default())
        .with_context(|| String::from_utf8_lossy(&done.stderr).into_owned())?;
    match last["event"] == "completed" {
        true => Ok(last),
        false => bail!("{name}: {last}"),
    }
}

fn row(text: &mut String, (tier, card, budget): (&Tier, Bytes, Bytes), made: &Value) -> Result<()> {
    let most = |of: &Value| of.as_object().into_iter().flatten().filter_map(|(_, v)| v.as_u64()).max().unwrap_or(0);
    let sum = |of: &Value| of.as_object().into_iter().flatten().filter_map(|(_, v)| v.as_f64()).sum::<f64>();
    let (predicted, weights) = (&made["predicted"], &made["weights"]);
    let (expected, measured) = (most(&predicted["peak_bytes"]), most(&made["peak_bytes"]));
    let ratio = measured as f64 / expected.max(1) as f64;
    ensure!(measured <= budget.0, "{}: {measured} bytes of {}", tier.name, budget.0);
    ensure!((ratio - 1.0).abs() <= NEAR, "{}: {measured} bytes were counted, {expected} predicted", tier.name);
    writeln!(
        text,
        "| {}, {card} | {budget} | {}x{}x{}, {} steps | {} | {} | {ratio:.3} | {} of {} | {:.1} s | {:.1} s | \
         {:.1} s | {:.0} s, {:.0} s |",
        tier.name,
        made["width"],
        made["height"],
        made["frames"],
        made["steps"],
        Bytes(expected),
        Bytes(measured),
        weights["resident_blocks"],
        weights["blocks"],
        weights["waited_seconds"].as_f64().unwrap_or_default(),
        weights["hidden_seconds"].as_f64().unwrap_or_default(),
        made["seconds"]["diffusion"].as_f64().unwrap_or_default() / made["steps"].as_f64().unwrap_or(1.0),
        made["elapsed_seconds"].as_f64().context("a generation has no seconds")?,
        sum(&predicted["seconds"]),
    )?;
    Ok(())
}

/// Requests of which seconds are predicted: side, frames, steps.
const SIZES: [(u32, u32, u32); 3] = [(64, 9, 2), (128, 33, 4), (256, 33, 4)];
/// How far off the predicted seconds may be.
const SECONDS_NEAR: f64 = 0.25;

/// Generates at three sizes, so many rounds in turn, and gives a table of seconds that were predicted and measured. Each
/// round measures the machine's speed anew: one that others share is now faster and now slower.
///
/// Errors: a generation fails, or the middle one of a size's ratios is too far from 1.
pub fn seconds(models: &Path, rounds: usize) -> Result<String> {
    let avatar = std::env::current_exe()?.with_file_name("avatar");
    ensure!(avatar.exists(), "{} is not built", avatar.display());
    if !models.exists() {
        let mut make = Command::new(&avatar);
        make.args(["weights", "synth", "--size", "tiny", "--seed", "1", "--out"]).arg(models);
        ensure!(make.status()?.success(), "the checkpoint was not made");
    }
    let mut made_in = SIZES.map(|_| Vec::new());
    for _ in 0..rounds.max(1) {
        ensure!(
            Command::new(&avatar).args(["devices", "--measure"]).output()?.status.success(),
            "nothing was measured"
        );
        for (i, (side, frames, steps)) in SIZES.into_iter().enumerate() {
            let mut run = Command::new(&avatar);
            run.args(["generate", "--json", "--size", &side.to_string(), "--steps", &steps.to_string()]);
            let made = finished(run, models, (&side.to_string(), frames))?;
            let of_stages = made["predicted"]["seconds"].as_object().context("a generation has no prediction")?;
            let predicted = of_stages.values().filter_map(Value::as_f64).sum::<f64>();
            made_in[i].push((predicted, made["elapsed_seconds"].as_f64().context("a generation has no seconds")?));
        }
    }
    let mut text = "| request | predicted | measured | ratio |\n| --- | --- | --- | --- |\n".to_owned();
    let mut off = Vec::new();
    for ((side, frames, steps), mut rounds) in SIZES.into_iter().zip(made_in) {
        rounds.sort_by(|a, b| (a.1 / a.0).total_cmp(&(b.1 / b.0)));
        let (predicted, measured) = rounds[rounds.len() / 2];
        let ratio = measured / predicted;
        let request = format!("{side}x{side}x{frames}, {steps} steps");
        writeln!(text, "| {request} | {predicted:.2} s | {measured:.2} s | {ratio:.2} |")?;
        off.extend(((ratio - 1.0).abs() > SECONDS_NEAR).then_some(request));
    }
    ensure!(off.is_empty(), "{text}more than {:.0} % off: {}", SECONDS_NEAR * 100.0, off.join("; "));
    Ok(text)
}

/// Speech for so many frames: a tone, as 16-bit mono WAV.
fn tone(frames: u32) -> Vec<u8> {
    const RATE: u32 = 16_000;
    let samples = (0..RATE / FPS * frames).map(|i| ((i as f32 * 220.0 * TAU / RATE as f32).sin() * 9000.0) as i16);
    let data: Vec<u8> = samples.flat_map(i16::to_le_bytes).collect();
    let mut wav = b"RIFF".to_vec();
    wav.extend((36 + data.len() as u32).to_le_bytes());
    wav.extend(b"WAVEfmt ");
    wav.extend(16u32.to_le_bytes());
    [1u16, 1].iter().for_each(|v| wav.extend(v.to_le_bytes()));
    [RATE, 2 * RATE].iter().for_each(|v| wav.extend(v.to_le_bytes()));
    [2u16, 16].iter().for_each(|v| wav.extend(v.to_le_bytes()));
    wav.extend(b"data");
    wav.extend((data.len() as u32).to_le_bytes());
    wav.extend(data);
    wav
}
