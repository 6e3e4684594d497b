//! Plans and tiers as people read them.

use std::fmt::Write as _;

use planner::{
    Bytes, Plan, Tiers,
    plan::{Fit, PartPlan, StagePlan},
};

/// The table of tiers.
pub(super) fn tiers(tiers: &Tiers) -> String {
    let mut text =
        format!("{:16} {:>8} {:>7} {:>7} {:>8} {:>6}\n", "tier", "GB", "pixels", "frames", "speech", "steps");
    for tier in tiers.all() {
        let range = match (tier.from_gb, tier.to_gb) {
            (Some(from), Some(to)) if from == to => from.to_string(),
            (Some(from), Some(to)) => format!("{from}-{to}"),
            (Some(from), None) => format!("{from}+"),
            (None, _) => "by name".to_owned(),
        };
        let limits = &tier.limits;
        let speech = format!("{} s", limits.audio_seconds);
        // A text that is written to does not fail.
        let _ = writeln!(
            text,
            "{:16} {range:>8} {:>7} {:>7} {speech:>8} {:>6}",
            tier.name, limits.pixels, limits.frames, limits.steps
        );
    }
    text.truncate(text.trim_end().len());
    text
}

/// A plan, stage by stage.
pub(super) fn plan(plan: &Plan) -> String {
    let what = plan.outcome;
    let limited = if plan.limited { "its limits hold" } else { "its limits do not hold" };
    let mut text = format!(
        "{}\ntier {} ({limited}): {}x{}, {} frames in {} of {}, {} steps\n\n",
        plan.model,
        plan.tier,
        what.width,
        what.height,
        what.frames,
        if what.windows == 1 { "one window".to_owned() } else { format!("{} windows", what.windows) },
        what.window_frames,
        what.steps,
    );
    let _ = writeln!(text, "{:15} {:8} {:>10} {:>11}  fit", "stage", "device", "peak", "time");
    for stage in &plan.stages {
        let peak = Bytes(stage.peak_bytes).to_string();
        let _ = writeln!(
            text,
            "{:15} {:8} {peak:>10} {:>11}  {}",
            stage.stage.name(),
            stage.device,
            time(stage.seconds),
            fit(stage)
        );
        for part in stage.spread.iter().skip(1) {
            let peak = Bytes(part.peak_bytes).to_string();
            let _ = writeln!(text, "{:15} {:8} {peak:>10} {:>11}  {}", "", part.device, "", blocks(part));
        }
    }
    let rates = if plan.rates.iter().all(|r| r.rates.measured) { "measured here" } else { "assumed" };
    let _ = write!(text, "\npeak {} on one device, {} ({rates} rates)\n", Bytes(plan.peak_bytes), time(plan.seconds));
    for lowered in &plan.degraded {
        let _ = write!(text, "\nlowered: {lowered}");
    }
    for reason in &plan.reasons {
        let _ = write!(text, "\n- {reason}");
    }
    text
}

/// The blocks of one of several devices.
fn blocks(part: &PartPlan) -> String {
    let PartPlan { first_block, blocks, resident_blocks, .. } = part;
    format!("{blocks} blocks from {first_block} on, {resident_blocks} stay")
}

fn fit(stage: &StagePlan) -> String {
    let whole = whole_fit(stage);
    match stage.spread.first() {
        Some(part) => format!("{whole}; here {}", blocks(part)),
        None => whole,
    }
}

fn whole_fit(stage: &StagePlan) -> String {
    match stage.fit {
        Fit::Cpu(fit) => {
            let stays = match fit.resident_blocks < fit.blocks {
                true => format!(", {} of {} blocks stay", fit.resident_blocks, fit.blocks),
                false => String::new(),
            };
            format!("{}-bit values, weights mapped{stays}", fit.compute_bits)
        }
        Fit::Cuda(fit) => {
            let mut parts = Vec::new();
            if fit.blocks > 0 {
                parts.push(fit.precision.to_string());
                if !fit.resident() {
                    parts.push(format!("{} of {} blocks stay", fit.resident_blocks, fit.blocks));
                }
            }
            if fit.token_chunks > 1 {
                parts.push(format!("tokens in {} parts", fit.token_chunks));
            }
            match stage.stage {
                planner::Stage::Diffusion if fit.branches_together => parts.push("branches together".to_owned()),
                planner::Stage::VaeDecode | planner::Stage::ImageEncoder => {
                    parts.push(format!("tiles {} x {}", fit.tile[0], fit.tile[1]));
                }
                _ => {}
            }
            if parts.is_empty() { "whole".to_owned() } else { parts.join(", ") }
        }
    }
}

/// Seconds as people say them.
fn time(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.1} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
