//! The tables of `docs/benchmarks/tiers.md`: what the planner chooses for the published model.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use planner::{
    Bytes, Device, ModelTable, Plan, Planner, Precision, Refusal, Request, Stage, Tiers,
    plan::{Choice, Fit},
    size::PictureSize,
};

/// Sizes of the second table, in GiB.
const CARDS: [u64; 8] = [6, 8, 10, 12, 16, 24, 48, 80];

const HEAD: &str = "# Tiers and cards

What the planner chooses for the published model at its full size, from its embedded table of tensors. Predicted, not
measured on any card: peaks are those of the memory model, and seconds are left out. `cargo run -p e2e --bin tiers` prints this file;
a test compares.

Every peak counts 256 MiB for a process's context on a card, and leaves 5 % of the card unused. bf16, fp8 and q4_k are allowed.
";

const COLUMNS: &str = "peak | share | transformer | its fit | text encoder | decoder's tiles | stages |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
";

const SAVED: &str = "
## Against everything resident in bf16

All stages loaded at once in bf16, with the activations at the tier's size, against what the tier takes of its card, and
the time that this costs: predicted seconds on the tier's card over those on a card that holds everything, at the same
assumed rates. Others promise 87 % less memory and do not say less than what; these are ours, predicted on cards.

| tier and card | resident in bf16 | peak | less memory | time |
| --- | --- | --- | --- | --- |
";

/// The whole file.
///
/// Errors: a tier does not fit its card.
pub fn document() -> Result<String> {
    let mut text =
        format!("{HEAD}\n## Each tier on its nominal card\n\nOne pass at the tier's limits, a square picture.\n\n");
    text += "| tier and card | what is made | ";
    text += COLUMNS;
    for tier in Tiers::default().all() {
        let card = tier.nominal_card().context("a tier without a card")?;
        let plan = plan(card, Choice::Named(tier.name.clone()), &Request::default())?;
        row(&mut text, &format!("{}, {card}", tier.name), card, &plan)?;
    }
    text += "\n## 704x768, 129 frames, 50 steps\n\nNo tier's limits hold.\n\n| card | its tier | ";
    text += COLUMNS;
    let size = PictureSize { width: 704, height: 768 };
    let request = Request {
        size: Some(size),
        frames: Some(129),
        steps: Some(50),
        prompt_tokens: None,
        branches: None,
        no_feature_cache: false,
    };
    for gib in CARDS {
        let card = Bytes::gib(gib);
        let plan = plan(card, Choice::Unlimited, &request)?;
        row(&mut text, &card.to_string(), card, &plan)?;
    }
    text += "\nWhat was given up on the smallest card, as `avatar plan --vram 6GiB --size 704x768 --frames 129 --steps 50` says it:\n\n";
    for reason in plan(Bytes::gib(6), Choice::Unlimited, &request)?.reasons {
        writeln!(text, "- {reason}")?;
    }
    text += SAVED;
    for tier in Tiers::default().all() {
        let card = tier.nominal_card().context("a tier without a card")?;
        let named = || Choice::Named(tier.name.clone());
        let (own, roomy) = (plan(card, named(), &Request::default())?, resident(named())?);
        writeln!(
            text,
            "| {}, {card} | {} | {} | {:.0} % | {:.1} times |",
            tier.name,
            Bytes(roomy.peak_bytes),
            Bytes(own.peak_bytes),
            100.0 * (1.0 - own.peak_bytes as f64 / roomy.peak_bytes as f64),
            own.seconds / roomy.seconds,
        )?;
    }
    Ok(text)
}

/// A tier's request with everything in bf16 on a card that holds it.
fn resident(tier: Choice) -> Result<Plan, Refusal> {
    let planner = Planner { precisions: vec![Precision::Bf16], ..planner(Bytes::gib(1 << 10), tier)? };
    planner.plan(&Request::default())
}

fn plan(card: Bytes, tier: Choice, request: &Request) -> Result<Plan, Refusal> {
    planner(card, tier)?.plan(request)
}

fn planner(card: Bytes, tier: Choice) -> Result<Planner, Refusal> {
    let table = ModelTable::published().map_err(|reason| Refusal::Model { reason })?;
    Ok(Planner {
        table,
        tiers: Tiers::default(),
        devices: vec![Device::card(0, card)],
        placement: None,
        tier,
        precisions: vec![Precision::Bf16, Precision::Fp8, Precision::Q4K],
        allow_degrade: false,
    })
}

fn row(text: &mut String, first: &str, card: Bytes, plan: &Plan) -> Result<()> {
    let fit = |stage: Stage| {
        let planned = plan.stages.iter().find(|planned| planned.stage == stage).context("a stage is missing")?;
        match planned.fit {
            Fit::Cuda(fit) => Ok(fit),
            Fit::Cpu(_) => anyhow::bail!("{stage} is on a CPU"),
        }
    };
    let (diffusion, words, decoder) = (fit(Stage::Diffusion)?, fit(Stage::TextEncoder)?, fit(Stage::VaeDecode)?);
    let second = match plan.limited {
        true => format!(
            "{}x{}x{}, {} steps",
            plan.outcome.width, plan.outcome.height, plan.outcome.window_frames, plan.outcome.steps
        ),
        false => plan.tier.clone(),
    };
    let blocks = |fit: planner::cost::cuda::Fit| match fit.resident() {
        true => "all blocks stay".to_owned(),
        false => format!("{} of {} blocks stay", fit.resident_blocks, fit.blocks),
    };
    let tokens = match (diffusion.token_chunks, diffusion.branches_together) {
        (1, true) => "branches together".to_owned(),
        (1, false) => "branches in turn".to_owned(),
        (chunks, _) => format!("branches in turn, tokens in {chunks} parts"),
    };
    let together = plan
        .phases
        .iter()
        .all(|phase| plan.stages.iter().any(|stage| stage.stage == phase.phase && stage.peak_bytes < phase.peak_bytes));
    writeln!(
        text,
        "| {first} | {second} | {} | {:.0} % | {} | {}, {tokens} | {}, {} | {} px, {} frames | {} |",
        Bytes(plan.peak_bytes),
        100.0 * plan.peak_bytes as f64 / card.0 as f64,
        diffusion.precision,
        blocks(diffusion),
        words.precision,
        blocks(words),
        decoder.tile[0],
        decoder.tile[1],
        if together { "stay together" } else { "in turn" },
    )?;
    Ok(())
}
