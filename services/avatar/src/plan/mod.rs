//! `avatar plan` and `avatar tiers`: what the planner would do, before any weight is read.

pub(crate) mod card;
pub mod flags;
mod machine;
pub(crate) mod rates;
mod show;

use std::path::Path;

use gateway::{
    TierOptions,
    config::TierFlags,
    planning::{Fleet, FleetSource, Wanted},
};
use model::checkpoint::Choice as Form;
use planner::{
    Bytes, Device, DeviceKind, ModelTable, Plan, Planner, Precision, Refusal, Request, cost::work::Rates,
    plan::Placement,
};
use serde_json::json;
use service_kit::hardware::{DeviceConfig, DeviceName, Driver, HAS_CUDA, Nvml, cards};

use self::flags::{PlanFlags, TiersFlags};
use crate::{
    Setup,
    compute::ComputeByStage,
    failure::{FAILED, Failure},
    progress::{print_line, print_text},
};

/// Lists the tiers.
///
/// Errors: the file of tiers is wrong.
pub fn tiers(flags: &TiersFlags) -> Result<(), Failure> {
    let TierOptions { tiers, .. } = tier_options(&TierFlags { tiers: flags.tiers.clone(), ..TierFlags::default() })?;
    match flags.json {
        true => print_line(&json!({ "tiers": tiers })),
        false => print_text(&show::tiers(&tiers)),
    }
    Ok(())
}

/// Makes a plan and shows it.
///
/// Errors: the checkpoint or the file of tiers is wrong, the request is past the tier's limits, or nothing fits.
pub fn plan(flags: &PlanFlags) -> Result<(), Failure> {
    let TierOptions { tiers, choice: tier, allow_degrade } = tier_options(&flags.tier)?;
    let planner = Planner {
        table: table(flags.models.as_deref(), flags.weights)?,
        tiers,
        devices: devices(flags)?,
        placement: None,
        tier,
        precisions: flags.precision.clone(),
        allow_degrade,
    };
    let of_speech = |seconds: f64| ((seconds * f64::from(planner::clip::FPS)) as u32).max(1);
    let request = Request {
        size: flags.size.map(|size| size.0),
        frames: flags.frames.or(flags.seconds.map(of_speech)),
        steps: flags.steps,
        prompt_tokens: flags.prompt_tokens,
        branches: None,
        no_feature_cache: flags.no_feature_cache,
    };
    let plan = planner.plan(&request).map_err(|refusal| failure(&refusal))?;
    match flags.json {
        true => print_line(&json(&plan)?),
        false => print_text(&show::plan(&plan)),
    }
    Ok(())
}

fn json(plan: &Plan) -> Result<serde_json::Value, Failure> {
    serde_json::to_value(plan).map_err(|e| Failure::local("the plan", e))
}

/// What flags about tiers say.
///
/// Errors: the file of tiers cannot be read or is wrong, or no tier has the name.
pub fn tier_options(flags: &TierFlags) -> Result<TierOptions, Failure> {
    flags.resolve().map_err(|(flag, told)| Failure::input(flag, told))
}

/// The options with the tier of the largest device instead of `auto`.
#[must_use]
pub fn here(options: TierOptions, devices: &[DeviceConfig]) -> TierOptions {
    options.on_device(Bytes(devices.iter().map(|device| device.budget_bytes).max().unwrap_or_default()))
}

/// What a gateway in this process plans for: the checkpoint below `models`, and the devices of its stages.
#[must_use]
pub fn fleet(models: &Path, setup: &Setup, placement: Option<Placement>) -> FleetSource {
    let (models, setup) = (models.to_owned(), setup.clone());
    FleetSource::new(move |wanted| {
        let told = |failure: Failure| failure.to_string();
        let table = table(Some(&models), setup.weights).map_err(told)?;
        let devices = all_local(&setup.devices, setup.compute, wanted).map_err(told)?;
        Ok(Fleet { table, devices, placement: placement.clone() })
    })
}

/// Where each stage is, where a process has several devices: the placement of the largest request, from what the tier
/// leaves open on downwards, that fits.
///
/// Errors: the checkpoint's headers cannot be read, or no request fits.
pub fn placement(models: &Path, setup: &Setup, tier: &TierOptions) -> Result<Option<Placement>, Failure> {
    if setup.devices.len() < 2 {
        return Ok(None);
    }
    let devices = all_local(&setup.devices, setup.compute, Wanted::Bytes)?;
    let planner = Planner {
        table: table(Some(models), setup.weights)?,
        tiers: tier.tiers.clone(),
        devices,
        placement: None,
        tier: tier.choice.clone(),
        precisions: vec![Precision::Bf16],
        allow_degrade: true,
    };
    // The smallest request was tried too, so there is nothing to lower.
    let refused = |refusal| Failure { advice: None, ..failure(&refusal) };
    let plan = planner.plan(&Request::default()).map_err(refused)?;
    let number = |name: &str| planner.devices.iter().position(|device| device.name == name);
    let numbers: Option<Vec<usize>> = plan.stages.iter().map(|stage| number(&stage.device)).collect();
    let parts = plan.stages.iter().flat_map(|stage| &stage.spread);
    let spread: Vec<(usize, u64)> =
        parts.filter_map(|part| number(&part.device).map(|number| (number, part.blocks))).collect();
    for stage in &plan.stages {
        tracing::info!(stage = stage.stage.name(), device = stage.device, "placed");
        for part in &stage.spread {
            tracing::info!(stage = stage.stage.name(), device = part.device, blocks = part.blocks, "spread");
        }
    }
    Ok(numbers.and_then(|numbers| Some(Placement { devices: numbers.try_into().ok()?, spread })))
}

/// What was to be expected of a generation that has ended, by its tier; nothing where no plan can be made any more.
#[must_use]
pub fn hindsight(
    models: &Path,
    (setup, placement): (&Setup, Option<Placement>),
    (request, tier): (&Request, &TierOptions),
) -> Option<Plan> {
    let planner = Planner {
        table: table(Some(models), setup.weights).ok()?,
        tiers: tier.tiers.clone(),
        devices: all_local(&setup.devices, setup.compute, Wanted::Seconds).ok()?,
        placement,
        tier: tier.choice.clone(),
        precisions: vec![Precision::Bf16],
        allow_degrade: false,
    };
    planner.plan(request).inspect_err(|refusal| tracing::debug!("no plan in hindsight: {refusal}")).ok()
}

fn table(models: Option<&Path>, weights: Form) -> Result<ModelTable, Failure> {
    match models {
        None => ModelTable::published().map_err(|e| Failure::local("the embedded table", e)),
        Some(models) => {
            let models = crate::generate::models_folder(Some(models))?;
            model::blueprint::model_table(&models, weights).map_err(|e| Failure {
                code: "FAILED_PRECONDITION",
                exit: FAILED,
                ..Failure::input("models", e.to_string())
            })
        }
    }
}

fn devices(flags: &PlanFlags) -> Result<Vec<Device>, Failure> {
    if flags.vram.is_empty() {
        if let [only] = flags.device[..] {
            return Ok(vec![local((only, None), flags.compute, Wanted::Seconds)?]);
        }
        let unbound = DeviceName::Cpu { budget_bytes: None };
        if flags.device.contains(&unbound) {
            let told = "each of several devices needs its bytes, as in cpu:2GiB,cpu:3GiB";
            return Err(Failure::input("device", told.to_owned()));
        }
        let numbered = flags.device.iter().enumerate();
        return numbered.map(|(number, name)| local((*name, Some(number)), flags.compute, Wanted::Seconds)).collect();
    }
    Ok(flags.vram.iter().enumerate().map(|(i, total)| Device::card(i, *total)).collect())
}

/// The devices of a process's stages.
fn all_local(devices: &[DeviceConfig], compute: ComputeByStage, wanted: Wanted) -> Result<Vec<Device>, Failure> {
    devices.iter().map(|device| local((device.name, device.number), compute, wanted)).collect()
}

/// A device of this machine: the CPU with the budget that a stage has there, or a card as its driver says.
fn local(
    (name, number): (DeviceName, Option<usize>),
    compute: ComputeByStage,
    wanted: Wanted,
) -> Result<Device, Failure> {
    match name {
        DeviceName::Cpu { budget_bytes } => {
            let budget = Bytes(budget_bytes.unwrap_or_else(|| DeviceConfig::cpu().budget_bytes));
            Ok(Device {
                name: number.map_or_else(|| "cpu".to_owned(), |number| format!("cpu.{number}")),
                kind: DeviceKind::Cpu(machine::cpus(compute)),
                total: budget,
                free: budget,
                rates: match wanted {
                    Wanted::Bytes => rates::kept().unwrap_or_else(rates::assumed),
                    Wanted::Seconds => rates::of_this_machine(),
                },
            })
        }
        DeviceName::Cuda { index } => {
            let driver = Nvml::load();
            let driver = driver.as_ref().map(|driver| driver as &dyn Driver);
            let all = cards(driver);
            let card = all.iter().find(|card| card.index == index).ok_or_else(|| {
                Failure::input(
                    "device",
                    format!("cuda:{index}: there is no such card here; --vram plans for one all the same"),
                )
            })?;
            Ok(Device {
                // What this process holds is its own to give back.
                free: Bytes(card.total_bytes.saturating_sub(card.used_by_others_bytes)),
                name: name.to_string(),
                // A build without CUDA plans for the card that it sees, and cannot ask it.
                rates: match HAS_CUDA {
                    true => card::rates(card, driver.and_then(Driver::version).as_deref()),
                    false => Rates::CUDA,
                },
                ..Device::card(0, Bytes(card.total_bytes))
            })
        }
    }
}

/// A refusal as a command's failure.
fn failure(refusal: &Refusal) -> Failure {
    let told = refusal.to_string();
    match refusal {
        Refusal::UnknownTier(_) | Refusal::NoTier => Failure::input("tier", told),
        Refusal::Limits(excesses) => {
            let field = if let [only] = excesses.as_slice() { only.field } else { "tier" };
            Failure { advice: Some("--allow-degrade lowers what is past the limits"), ..Failure::input(field, told) }
        }
        Refusal::Model { .. } => Failure::input("size", told),
        Refusal::NoPrecision => Failure::input("precision", told),
        Refusal::NoDevice => Failure::input("vram", told),
        Refusal::Memory(_) => Failure {
            code: "RESOURCE_EXHAUSTED",
            message: told,
            field: None,
            exit: FAILED,
            advice: Some("--allow-degrade takes the nearest setting that fits"),
        },
    }
}
