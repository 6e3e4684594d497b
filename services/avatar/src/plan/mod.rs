//! `avatar plan` and `avatar tiers`: what the planner would do, before any weight is read.

pub mod flags;
mod machine;
mod rates;
mod show;

use std::path::Path;

use gateway::{
    TierOptions,
    config::TierFlags,
    planning::{Fleet, FleetSource},
};
use model::checkpoint::Choice as Form;
use planner::{Device, DeviceKind, ModelTable, Plan, Planner, Refusal, Request, plan::Choice};
use serde_json::json;

use self::flags::{PlanFlags, TiersFlags};
use crate::{
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
        tier,
        precisions: flags.precision.clone(),
        allow_degrade,
    };
    let of_speech = |seconds: f64| ((seconds * f64::from(planner::clip::FPS)) as u32).max(1);
    let request = Request {
        size: flags.size.map(|size| size.0),
        frames: flags.frames.or(flags.seconds.map(of_speech)),
        steps: flags.steps,
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

/// As [`tier_options`], with the tier of this machine instead of `auto`.
pub fn tier_options_here(flags: &TierFlags) -> Result<TierOptions, Failure> {
    here(tier_options(flags)?)
}

/// The options with the tier of this machine instead of `auto`.
pub fn here(options: TierOptions) -> Result<TierOptions, Failure> {
    if options.choice != Choice::Auto {
        return Ok(options);
    }
    let (total, _) = machine::memory()?;
    Ok(options.on_device(total))
}

/// What a gateway in this process plans for: the checkpoint below `models`, and this machine's CPU.
#[must_use]
pub fn fleet(models: &Path, compute: ComputeByStage, weights: Form) -> FleetSource {
    let models = models.to_owned();
    FleetSource::new(move || {
        let told = |failure: Failure| failure.to_string();
        Ok(Fleet {
            table: table(Some(&models), weights).map_err(told)?,
            devices: vec![cpu(None, compute).map_err(told)?],
        })
    })
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
        return Ok(vec![cpu(flags.ram, flags.compute)?]);
    }
    Ok(flags.vram.iter().enumerate().map(|(i, total)| Device::card(i, *total)).collect())
}

/// This machine's CPU, with a budget or with what is available of its memory.
fn cpu(budget: Option<planner::Bytes>, compute: ComputeByStage) -> Result<Device, Failure> {
    let (total, free) = match budget {
        Some(budget) => (budget, budget),
        None => machine::memory()?,
    };
    let kind = DeviceKind::Cpu(machine::cpus(compute));
    Ok(Device { name: "cpu".to_owned(), kind, total, free, rates: rates::of_this_machine() })
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
