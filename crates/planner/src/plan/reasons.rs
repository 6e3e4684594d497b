//! Why a plan is as it is, in sentences.

use super::{Choice, DeviceKind, Fit, Planner, Request, choose::Chosen};
use crate::{
    bytes::Bytes,
    cost::{Job, cuda},
    stage::Stage,
    tiers::{Tier, nominal_gb},
};

/// Where the tier comes from, and what it means for the request.
pub(super) fn of_tier(tier: &Tier, limited: bool, planner: &Planner, request: &Request) -> Vec<String> {
    let total = planner.devices.iter().map(|device| device.total).max().unwrap_or_default();
    let card = format!("the largest device has {total}, nominally {} GB", nominal_gb(total));
    let limits = &tier.limits;
    let mut said = vec![match &planner.tier {
        Choice::Named(name) => format!("tier {name} was asked for"),
        Choice::Auto | Choice::Unlimited => format!("{card}: tier {}", tier.name),
    }];
    let beyond = request.size.is_some_and(|size| size.width.min(size.height) > limits.pixels)
        || request.steps.is_some_and(|steps| steps > limits.steps);
    if !limited && beyond {
        said.push(format!("the request goes past tier {}, which was not asked for and limits nothing", tier.name));
    }
    if request.size.is_none() || request.frames.is_none() || request.steps.is_none() {
        said.push(format!("what the request leaves open is taken from tier {}", tier.name));
    }
    said
}

/// What was given up, and for what.
pub(super) fn of_choice(planner: &Planner, job: &Job, chosen: &Chosen) -> Vec<String> {
    let mut said = Vec::new();
    if job.windows > 1 {
        said.push(format!(
            "{} frames are made of {} windows of {} frames, averaged where they overlap",
            job.frames,
            job.windows,
            job.window_frames()
        ));
    }
    for (number, device) in planner.devices.iter().enumerate() {
        let here: Vec<Stage> =
            Stage::ALL.into_iter().filter(|stage| chosen.devices[*stage as usize] == number).collect();
        if here.is_empty() {
            continue;
        }
        let usable = Bytes(device.usable());
        match device.kind {
            DeviceKind::Cpu(_) => said.push(format!(
                "{}: weights stay mapped from their files and are not counted; all stages stay open",
                device.name
            )),
            DeviceKind::Cuda if chosen.in_turn.get(number) == Some(&true) => {
                said.push(in_turn(chosen, &here, &device.name, usable));
            }
            DeviceKind::Cuda => {
                let names: Vec<&str> = here.iter().map(|stage| stage.name()).collect();
                said.push(format!("{}: {} fit together in {usable} and stay loaded", device.name, names.join(", ")));
            }
        }
    }
    for stage in Stage::ALL {
        said.extend(of_stage(planner, job, chosen, stage));
    }
    if cuda::features(&planner.table, job) > 0 {
        let kept = Bytes(cuda::features(&planner.table, job));
        said.push(format!("features of full steps, {kept} in 16 bits, are kept in host memory for the cached steps"));
    }
    if planner.devices.iter().any(|device| !device.rates.measured) {
        said.push("seconds rest on assumed rates: nothing was measured on this device".to_owned());
    }
    said
}

/// Why stages take turns: the two largest do not fit beside each other, or all of them together do not.
fn in_turn(chosen: &Chosen, here: &[Stage], device: &str, usable: Bytes) -> String {
    let placed = |stage: Stage| &chosen.stages[stage as usize];
    let peak = |stage: Stage| placed(stage).resident.saturating_add(placed(stage).work);
    let weights = |stage: Stage| placed(stage).resident.saturating_sub(cuda::CONTEXT_BYTES);
    if let Some(one) = here.iter().copied().max_by_key(|stage| peak(*stage))
        && let Some(other) = here.iter().copied().filter(|stage| *stage != one).max_by_key(|stage| weights(*stage))
        && peak(one).saturating_add(weights(other)) > usable.0
    {
        let (first, second) = if (one as usize) < other as usize { (one, other) } else { (other, one) };
        let precision = match placed(one).fit {
            Fit::Cuda(fit) if matches!(one, Stage::Diffusion | Stage::TextEncoder) => {
                format!(" at {}", fit.precision)
            }
            _ => String::new(),
        };
        return format!(
            "{one}: {}{precision} does not fit beside {other} ({}) in {usable} of {device}, so {first} runs first and \
             is unloaded before {second}; every stage is there for its own work only",
            Bytes(peak(one)),
            Bytes(weights(other)),
        );
    }
    let all = here.iter().map(|stage| weights(*stage)).fold(0, u64::saturating_add);
    format!(
        "{device}: the stages' weights, {} in all, do not fit with the activations in {usable}, so every stage is there \
         for its own work only",
        Bytes(all)
    )
}

/// What a stage gave up on its card.
fn of_stage(planner: &Planner, job: &Job, chosen: &Chosen, stage: Stage) -> Vec<String> {
    let fit = match chosen.stages[stage as usize].fit {
        Fit::Cuda(fit) => fit,
        Fit::Cpu(fit) if fit.resident_blocks < fit.blocks => {
            return vec![format!(
                "{stage}: {} of {} blocks stay in memory and {} a pass are read while another computes",
                fit.resident_blocks,
                fit.blocks,
                Bytes(planner.moved_on_cpu(stage, &fit)),
            )];
        }
        Fit::Cpu(fit) if chosen.stages[stage as usize].rung > 0 => return vec![in_tiles(stage, fit.tile)],
        Fit::Cpu(_) => return Vec::new(),
    };
    let Some(device) = planner.devices.get(chosen.devices[stage as usize]) else { return Vec::new() };
    let usable = Bytes(device.usable());
    let precisions = planner.precisions_of(stage);
    let fits = planner.card_fits(job, stage, &precisions);
    let mut said = Vec::new();
    let large = matches!(stage, Stage::Diffusion | Stage::TextEncoder);
    let best = precisions.first().copied().unwrap_or(fit.precision);
    if large && fit.precision != best {
        let smallest = fits.iter().filter_map(|placed| match placed.fit {
            Fit::Cuda(fit) if fit.precision == best && fit.resident() => Some(placed.resident + placed.work),
            _ => None,
        });
        let needed = Bytes(smallest.min().unwrap_or(0));
        said.push(format!(
            "{stage}: {needed} at {best} do not fit in {usable}, so its large layers are in {precision}, as `avatar \
             weights convert --precision {precision}` makes them",
            precision = fit.precision
        ));
    }
    if !fit.resident() {
        let whole = Bytes(planner.table.weights(stage, fit.precision));
        let (_, moved) = cuda::weights(&planner.table, stage, &fit);
        said.push(format!(
            "{stage}: its weights, {whole} at {}, do not fit with its activations, so {} of {} blocks stay and {} a pass \
             are brought while another computes",
            fit.precision,
            fit.resident_blocks,
            fit.blocks,
            Bytes(moved),
        ));
    }
    if stage == Stage::Diffusion && fit.token_chunks > 1 {
        said.push(format!(
            "{stage}: the MLP takes its tokens in {} parts, which does not change the result",
            fit.token_chunks
        ));
    }
    if stage == Stage::VaeDecode && chosen.stages[stage as usize].rung > 0 {
        said.push(in_tiles(stage, fit.tile));
    }
    said
}

fn in_tiles(stage: Stage, [side, length]: [u64; 2]) -> String {
    format!("{stage}: tiles of {side} pixels and {length} frames, since larger ones do not fit")
}
