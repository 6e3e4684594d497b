//! Tiers and plans as the contract has them: the gateway answers from the same planner as the command line.

use std::{fmt, sync::Arc};

use planner::{
    Bytes, Device, ModelTable, Plan, Planner, Precision, Refusal, Request, Stage, Tier,
    cost::work::Rates,
    plan::{Choice, DeviceRates, Fit, PartPlan, Placement},
    size::PictureSize,
    tiers::Excess,
};
use proto::v1;

use crate::{
    config::TierOptions,
    fault::{Fault, Kind, Violation},
};

/// Most cards of a request.
const MOST_CARDS: usize = 16;
const SIDE: std::ops::RangeInclusive<u32> = 64..=4096;
const FRAMES: std::ops::RangeInclusive<u32> = 1..=15_000;
const STEPS: std::ops::RangeInclusive<u32> = 1..=200;

/// What a gateway knows of the checkpoint and the devices of its stages.
#[derive(Debug, Clone)]
pub struct Fleet {
    /// The checkpoint.
    pub table: ModelTable,
    /// The devices.
    pub devices: Vec<Device>,
    /// Where the stages are, where there are several devices.
    pub placement: Option<Placement>,
}

type Ask = dyn Fn(Wanted) -> Result<Fleet, String> + Send + Sync;

/// What is asked of a fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Bytes alone; rates may be assumed.
    Bytes,
    /// Seconds too, so that a device whose rates are not known yet is measured.
    Seconds,
}

/// Asks for it; blocking, as headers are read and a device may be measured. The error is a sentence.
#[derive(Clone)]
pub struct FleetSource(Arc<Ask>);

impl FleetSource {
    /// A source that asks `ask`.
    pub fn new(ask: impl Fn(Wanted) -> Result<Fleet, String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(ask))
    }
}

impl fmt::Debug for FleetSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FleetSource")
    }
}

/// The tiers, as the contract has them.
#[must_use]
pub fn list(options: &TierOptions) -> v1::ListTiersResponse {
    v1::ListTiersResponse {
        tiers: options.tiers.all().iter().map(tier).collect(),
        in_force: options.limit().map(|tier| tier.name.clone()).unwrap_or_default(),
    }
}

fn tier(tier: &Tier) -> v1::Tier {
    v1::Tier {
        name: tier.name.clone(),
        from_gb: tier.from_gb,
        to_gb: tier.to_gb,
        pixels: tier.limits.pixels,
        frames: tier.limits.frames,
        audio_seconds: tier.limits.audio_seconds,
        steps: tier.limits.steps,
    }
}

/// Makes a plan. Blocking.
///
/// Errors: a value that is not allowed or past the tier's limits; no device; nothing that fits.
pub fn plan(
    request: &v1::PlanGenerationRequest,
    options: &TierOptions,
    source: Option<&FleetSource>,
) -> Result<Plan, Fault> {
    check(request)?;
    let unreadable = |reason: String| Fault::new(Kind::Precondition, reason);
    let fleet = source.map(|source| (source.0)(Wanted::Seconds)).transpose().map_err(unreadable)?;
    let table = match &fleet {
        Some(fleet) => fleet.table.clone(),
        None => ModelTable::published().map_err(unreadable)?,
    };
    let cards = request.vram_bytes.iter().enumerate();
    let (devices, placement): (Vec<Device>, _) = match (request.vram_bytes.is_empty(), fleet) {
        (false, _) => (cards.map(|(i, total)| Device::card(i, Bytes(*total))).collect(), None),
        (true, Some(fleet)) => (fleet.devices, fleet.placement),
        (true, None) => {
            let reason = "this gateway knows no device of its stages; name cards in vram_bytes";
            return Err(Fault::new(Kind::Precondition, reason));
        }
    };
    let planner = Planner {
        table,
        tiers: options.tiers.clone(),
        devices,
        placement,
        tier: match request.tier.as_str() {
            "" => Choice::Unlimited,
            "auto" => Choice::Auto,
            name => Choice::Named(name.to_owned()),
        },
        precisions: vec![Precision::Bf16, Precision::Fp8, Precision::Q4K],
        allow_degrade: request.allow_degrade,
    };
    let size = request.width.zip(request.height);
    let on_grid = |side: u32| side.next_multiple_of(16);
    let wanted = Request {
        size: size.map(|(width, height)| PictureSize { width: on_grid(width), height: on_grid(height) }),
        frames: request.frames,
        steps: request.steps,
        prompt_tokens: None,
        branches: None,
        no_feature_cache: request.no_feature_cache,
    };
    planner.plan(&wanted).map_err(|refusal| refused(&refusal))
}

/// What a generation is lowered to, since no more fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lowered {
    /// The shorter side in pixels.
    pub(crate) size: u32,
    /// Frames of the video.
    pub(crate) frames: u32,
    /// What was lowered, and why.
    pub(crate) said: String,
}

/// Predictions are this near, so nothing is refused that is not further off.
const NEAR_PERCENT: u64 = 5;

/// Holds a generation against the devices of its stages before any weight is read. Blocking. What can be said of it goes
/// to the log; nothing is held against a fleet that cannot be read, as the stages say better what is wrong.
///
/// Errors: it does not fit in any way, and may not be lowered to what does; with the device, the stage, the bytes and what
/// would fit.
pub(crate) fn admit(
    wanted: &Request,
    (tier, may_lower): (&TierOptions, bool),
    source: &FleetSource,
) -> Result<Option<Lowered>, Fault> {
    let fleet = match (source.0)(Wanted::Bytes) {
        Ok(fleet) => fleet,
        Err(reason) => {
            tracing::debug!("no plan before the work: {reason}");
            return Ok(None);
        }
    };
    let roomier = |device: Device| Device {
        free: Bytes(device.free.0.saturating_add(device.free.0 / 100 * NEAR_PERCENT)),
        ..device
    };
    let fleet = Fleet { devices: fleet.devices.into_iter().map(roomier).collect(), ..fleet };
    let plan = match planner(fleet, tier, may_lower).plan(wanted) {
        Ok(plan) => plan,
        Err(refusal @ Refusal::Memory(_)) => return Err(Fault::new(Kind::OutOfMemory, refusal.to_string())),
        Err(refusal) => {
            tracing::debug!("no plan before the work: {refusal}");
            return Ok(None);
        }
    };
    for degraded in &plan.degraded {
        tracing::warn!(tier = plan.tier, "planned: {degraded}");
    }
    for reason in &plan.reasons {
        tracing::info!(tier = plan.tier, "planned: {reason}");
    }
    let (made, of) = (plan.outcome, wanted.size);
    let same = of.is_none_or(|size| (size.width, size.height) == (made.width, made.height))
        && wanted.frames.is_none_or(|frames| u64::from(frames) == made.frames);
    let said = plan.degraded.last().filter(|_| !same);
    Ok(said.map(|said| Lowered {
        size: made.width.min(made.height),
        frames: u32::try_from(made.frames).unwrap_or(u32::MAX),
        said: format!("{said}."),
    }))
}

/// Plans what is asked of these stages, as they compute it.
fn planner(Fleet { table, devices, placement }: Fleet, tier: &TierOptions, allow_degrade: bool) -> Planner {
    let (tiers, tier, precisions) = (tier.tiers.clone(), tier.choice.clone(), vec![Precision::Bf16]);
    Planner { table, tiers, devices, placement, tier, precisions, allow_degrade }
}

/// Seconds that a generation's stages are expected to take, before anything of it was measured.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Foreseen {
    stages: Vec<(v1::Stage, f64)>,
    steps: u32,
}

impl Foreseen {
    /// Predictions of a device whose rates nobody measured are within so many times what it takes.
    const DOUBT: f64 = 4.0;
    /// The dearest step, all passes in full and two branches, takes so many times the mean of all.
    const DEAREST_STEP: f64 = 4.0;

    fn of(plan: &Plan) -> Self {
        let doubt = if plan.rates.iter().all(|rates| rates.rates.measured) { 1.0 } else { Self::DOUBT };
        let stages = plan.stages.iter().map(|one| (stage(one.stage), doubt * one.seconds)).collect();
        Self { stages, steps: u32::try_from(plan.outcome.steps).unwrap_or(u32::MAX) }
    }

    /// Seconds of a whole stage.
    pub(crate) fn seconds(&self, stage: v1::Stage) -> f64 {
        self.stages.iter().filter(|(of, _)| *of == stage).map(|(_, seconds)| seconds).sum()
    }

    /// Seconds of all stages.
    pub(crate) fn total(&self) -> f64 {
        self.stages.iter().map(|(_, seconds)| seconds).sum()
    }

    /// The most that a stage's first call takes: a step of the transformer, and of another stage all of it.
    pub(crate) fn first_call(&self, stage: v1::Stage) -> f64 {
        let whole = self.seconds(stage);
        match stage {
            v1::Stage::Diffusion => whole * (Self::DEAREST_STEP / f64::from(self.steps.max(1))).min(1.0),
            _ => whole,
        }
    }
}

/// What is expected of a generation that was accepted; nothing where the fleet cannot be read or has no way for it any
/// more. Blocking.
pub(crate) fn foresee(wanted: &Request, tier: &TierOptions, source: &FleetSource) -> Option<Foreseen> {
    let fleet =
        (source.0)(Wanted::Bytes).inspect_err(|reason| tracing::debug!("nothing is foreseen: {reason}")).ok()?;
    let plan = planner(fleet, tier, false).plan(wanted);
    plan.inspect_err(|refusal| tracing::debug!("nothing is foreseen: {refusal}")).ok().map(|plan| Foreseen::of(&plan))
}

fn check(request: &v1::PlanGenerationRequest) -> Result<(), Fault> {
    let mut wrong = Vec::new();
    for (field, value, range) in [
        ("width", request.width, SIDE),
        ("height", request.height, SIDE),
        ("frames", request.frames, FRAMES),
        ("steps", request.steps, STEPS),
    ] {
        if let Some(value) = value.filter(|value| !range.contains(value)) {
            let message = format!("{value}; allowed are {} to {}", range.start(), range.end());
            wrong.push(Violation { field: field.into(), message });
        }
    }
    if request.width.is_some() != request.height.is_some() {
        wrong.push(Violation { field: "width".into(), message: "width and height go together".into() });
    }
    let cards = request.vram_bytes.len();
    if cards > MOST_CARDS || request.vram_bytes.iter().any(|bytes| !(1..=1 << 50).contains(bytes)) {
        let message = format!("{cards} cards; allowed are up to {MOST_CARDS} of 1 to 2^50 bytes");
        wrong.push(Violation { field: "vram_bytes".into(), message });
    }
    if wrong.is_empty() { Ok(()) } else { Err(Fault::of_violations(Kind::Invalid, wrong)) }
}

/// Values past a tier's limits, as the caller's fault.
#[must_use]
pub fn past_limits(excesses: &[Excess]) -> Fault {
    let violation = |excess: &Excess| Violation { field: excess.field.into(), message: excess.to_string() };
    Fault::of_violations(Kind::Invalid, excesses.iter().map(violation).collect())
}

fn refused(refusal: &Refusal) -> Fault {
    let told = refusal.to_string();
    match refusal {
        Refusal::UnknownTier(_) | Refusal::NoTier => Fault::invalid("tier", told),
        Refusal::Limits(excesses) => past_limits(excesses),
        Refusal::Model { .. } => Fault::invalid("width", told),
        Refusal::NoPrecision | Refusal::NoDevice => Fault::new(Kind::Precondition, told),
        Refusal::Memory(_) => Fault::new(Kind::OutOfMemory, told),
    }
}

/// A plan, as the contract has it.
#[must_use]
pub fn message(plan: &Plan) -> v1::GenerationPlan {
    v1::GenerationPlan {
        tier: plan.tier.clone(),
        limited: plan.limited,
        model: plan.model.clone(),
        width: plan.outcome.width,
        height: plan.outcome.height,
        frames: plan.outcome.frames,
        window_frames: plan.outcome.window_frames,
        windows: plan.outcome.windows,
        steps: plan.outcome.steps,
        stages: plan
            .stages
            .iter()
            .map(|planned| v1::StagePlan {
                stage: stage(planned.stage).into(),
                device: planned.device.clone(),
                fit: Some(fit(&planned.fit)),
                resident_bytes: planned.resident_bytes,
                peak_bytes: planned.peak_bytes,
                seconds: planned.seconds,
                spread: planned.spread.iter().map(part).collect(),
            })
            .collect(),
        phases: plan
            .phases
            .iter()
            .map(|phase| v1::PlanPhase {
                device: phase.device.clone(),
                stage: stage(phase.phase).into(),
                peak_bytes: phase.peak_bytes,
                usable_bytes: phase.usable_bytes,
            })
            .collect(),
        peak_bytes: plan.peak_bytes,
        seconds: plan.seconds,
        rates_measured: plan.rates.iter().all(|rates| rates.rates.measured),
        degraded: plan.degraded.clone(),
        reasons: plan.reasons.clone(),
        rates: plan.rates.iter().map(rates).collect(),
    }
}

fn rates(of: &DeviceRates) -> v1::DeviceRates {
    let Rates { measured, products, attention, convolutions, weights, files, pace: _ } = of.rates;
    v1::DeviceRates { device: of.device.clone(), measured, products, attention, convolutions, weights, files }
}

fn part(part: &PartPlan) -> v1::PlanPart {
    v1::PlanPart {
        device: part.device.clone(),
        first_block: part.first_block,
        blocks: part.blocks,
        resident_blocks: part.resident_blocks,
        peak_bytes: part.peak_bytes,
    }
}

fn stage(stage: Stage) -> v1::Stage {
    match stage {
        Stage::AudioEncoder => v1::Stage::AudioEncoder,
        Stage::TextEncoder => v1::Stage::TextEncoder,
        Stage::ImageEncoder => v1::Stage::ImageEncoder,
        Stage::Diffusion => v1::Stage::Diffusion,
        Stage::VaeDecode => v1::Stage::VaeDecode,
    }
}

fn fit(fit: &Fit) -> v1::StageFit {
    match fit {
        Fit::Cuda(fit) => v1::StageFit {
            precision: fit.precision.name().to_owned(),
            weights_mapped: false,
            resident_blocks: fit.resident_blocks,
            blocks: fit.blocks,
            prefetch: fit.prefetch,
            token_chunks: fit.token_chunks,
            query_chunk: fit.query_chunk,
            tile_pixels: fit.tile[0],
            tile_frames: fit.tile[1],
            branches_together: fit.branches_together,
        },
        Fit::Cpu(fit) => v1::StageFit {
            precision: fit.precision.name().to_owned(),
            weights_mapped: fit.weights_mapped,
            resident_blocks: fit.resident_blocks,
            blocks: fit.blocks,
            prefetch: fit.prefetch,
            token_chunks: fit.token_chunks,
            query_chunk: fit.query_chunk,
            tile_pixels: fit.tile[0],
            tile_frames: fit.tile[1],
            branches_together: fit.branches_together,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(gib: u64) -> v1::PlanGenerationRequest {
        v1::PlanGenerationRequest { vram_bytes: vec![gib << 30], ..Default::default() }
    }

    #[test]
    fn a_plan_for_a_card_that_is_not_here_needs_no_device() {
        let options = TierOptions::default();
        let message = message(&plan(&card(8), &options, None).unwrap());
        assert_eq!((message.tier.as_str(), message.limited, message.stages.len()), ("ultra-low", false, 5));
        assert!(message.peak_bytes < 8 << 30 && !message.reasons.is_empty() && !message.rates_measured);
        let fault = plan(&v1::PlanGenerationRequest::default(), &options, None).unwrap_err();
        assert!(fault.kind == Kind::Precondition && fault.message.contains("vram_bytes"), "{fault}");
    }

    /// A processor with so much memory, and the published model.
    fn processor(free: u64) -> FleetSource {
        FleetSource::new(move |_| {
            let cpu = planner::cost::cpu::Cpu { threads: 2, packs: true, value_bytes: 4 };
            let device = Device {
                name: "cpu".into(),
                kind: planner::DeviceKind::Cpu([cpu; 5]),
                total: Bytes(free),
                free: Bytes(free),
                rates: Rates::of_cores(2),
            };
            Ok(Fleet { table: ModelTable::published()?, devices: vec![device], placement: None })
        })
    }

    /// Whatever the command line shows of a plan goes over the wire too.
    #[test]
    fn a_plan_over_the_wire_has_the_fit_of_each_stage_and_the_rates() {
        let request =
            v1::PlanGenerationRequest { width: Some(96), height: Some(96), frames: Some(5), ..Default::default() };
        let plan = plan(&request, &TierOptions::default(), Some(&processor(4 << 30))).unwrap();
        let sent = message(&plan);
        for (stage, told) in plan.stages.iter().zip(&sent.stages) {
            let Fit::Cpu(fit) = stage.fit else { panic!("{stage:?}") };
            let told = told.fit.as_ref().unwrap();
            assert_eq!(
                [told.resident_blocks, told.blocks, told.prefetch],
                [fit.resident_blocks, fit.blocks, fit.prefetch]
            );
            assert_eq!([told.token_chunks, told.query_chunk], [fit.token_chunks, fit.query_chunk]);
        }
        let transformer = sent.stages[3].fit.as_ref().unwrap();
        assert!(transformer.resident_blocks < 60 && transformer.blocks == 60 && transformer.prefetch == 1);
        assert_eq!((sent.rates[0].device.as_str(), sent.rates[0].products), ("cpu", plan.rates[0].rates.products));
    }

    #[test]
    fn what_cannot_fit_is_refused_before_the_work_and_lowered_where_that_is_allowed() {
        let size = Some(PictureSize { width: 704, height: 704 });
        let large = Request { size, frames: Some(129), steps: Some(30), ..Request::default() };
        let tier = TierOptions::default();
        let (strict, willing) = ((&tier, false), (&tier, true));
        assert_eq!(admit(&large, strict, &processor(1 << 40)), Ok(None));
        let fault = admit(&large, strict, &processor(2 << 30)).unwrap_err();
        assert_eq!(fault.kind, Kind::OutOfMemory);
        for part in ["needs at least", "on cpu, of which 2.10 GiB may be used", "would fit"] {
            assert!(fault.message.contains(part), "{part} in {fault}");
        }
        let lowered = admit(&large, willing, &processor(2 << 30)).unwrap().unwrap();
        assert!(lowered.size < 704 && lowered.frames <= 129 && lowered.said.contains("lowered to"), "{lowered:?}");
        assert!(admit(&large, willing, &processor(1 << 20)).is_err());
        let unreadable = FleetSource::new(|_| Err("no checkpoint".into()));
        assert_eq!(admit(&large, strict, &unreadable), Ok(None));
    }

    /// What is said to the log meanwhile.
    fn logged<R>(work: impl FnOnce() -> R) -> (R, String) {
        let log = tempfile::NamedTempFile::new().unwrap();
        let file = Arc::new(log.reopen().unwrap());
        let writer = tracing_subscriber::fmt().with_ansi(false).with_writer(file).finish();
        let result = tracing::subscriber::with_default(writer, work);
        (result, std::fs::read_to_string(log.path()).unwrap())
    }

    #[test]
    fn every_step_down_of_a_plan_is_in_the_log() {
        let size = Some(PictureSize { width: 704, height: 704 });
        let large = Request { size, frames: Some(129), steps: Some(30), ..Request::default() };
        let tier = TierOptions::default();
        let (lowered, log) = logged(|| admit(&large, (&tier, true), &processor(2 << 30)).unwrap().unwrap());
        let of_size: Vec<&str> = log.lines().filter(|line| line.contains(" WARN ")).collect();
        let said = lowered.said.trim_end_matches('.');
        assert!(of_size.iter().any(|line| line.contains(&format!("planned: {said}"))), "{said}: {log}");
        // Nothing of the request is lowered here: features are not kept, and blocks come and go instead.
        let (admitted, log) = logged(|| admit(&large, (&tier, false), &processor(8 << 30)));
        assert_eq!(admitted, Ok(None));
        let mut fleet = (processor(8 << 30).0)(Wanted::Bytes).unwrap();
        fleet.devices[0].free.0 += fleet.devices[0].free.0 / 100 * NEAR_PERCENT;
        let plan = planner(fleet, &tier, false).plan(&large).unwrap();
        assert!(!plan.reasons.is_empty() && !plan.degraded.is_empty());
        let said = [(" INFO ", &plan.reasons), (" WARN ", &plan.degraded)];
        for (level, sentence) in said.iter().flat_map(|(level, all)| all.iter().map(move |one| (level, one))) {
            let line = log.lines().find(|line| line.contains(&format!("planned: {sentence}")));
            assert!(line.is_some_and(|line| line.contains(*level)), "{sentence}: {log}");
        }
    }

    #[test]
    fn what_is_foreseen_of_a_device_that_nobody_measured_allows_for_that() {
        let size = Some(PictureSize { width: 256, height: 256 });
        let wanted = Request { size, frames: Some(65), steps: Some(50), ..Request::default() };
        let (tier, source) = (TierOptions::default(), processor(1 << 40));
        let foreseen = foresee(&wanted, &tier, &source).unwrap();
        let fleet = (source.0)(Wanted::Bytes).unwrap();
        let plan = planner(fleet.clone(), &tier, false).plan(&wanted).unwrap();
        assert!((foreseen.total() / plan.seconds - 4.0).abs() < 1e-6, "{foreseen:?}, {} s", plan.seconds);
        let [decode, denoise] = [v1::Stage::VaeDecode, v1::Stage::Diffusion];
        assert_eq!(foreseen.first_call(decode), foreseen.seconds(decode));
        assert!((foreseen.seconds(denoise) / foreseen.first_call(denoise) - 12.5).abs() < 1e-6);
        let measured = FleetSource::new(move |_| {
            let rates = |device: &Device| Rates { measured: true, ..device.rates };
            let devices =
                fleet.devices.iter().map(|device| Device { rates: rates(device), ..device.clone() }).collect();
            Ok(Fleet { devices, ..fleet.clone() })
        });
        let nearer = foresee(&wanted, &tier, &measured).unwrap();
        assert!((nearer.total() / plan.seconds - 1.0).abs() < 1e-6);
        assert_eq!(foresee(&wanted, &tier, &FleetSource::new(|_| Err("no checkpoint".into()))), None);
        assert_eq!(foresee(&wanted, &tier, &processor(1 << 20)), None);
    }

    #[test]
    fn every_wrong_value_of_a_plan_is_named_at_once() {
        let request = v1::PlanGenerationRequest {
            width: Some(63),
            frames: Some(0),
            steps: Some(201),
            vram_bytes: vec![0; 17],
            ..Default::default()
        };
        let fault = plan(&request, &TierOptions::default(), None).unwrap_err();
        let fields: Vec<&str> = fault.violations.iter().map(|v| v.field.as_str()).collect();
        assert_eq!(fields, ["width", "frames", "steps", "width", "vram_bytes"]);
    }

    #[test]
    fn what_does_not_fit_and_what_is_past_a_tier_are_told_apart() {
        let large = v1::PlanGenerationRequest { width: Some(1024), height: Some(1536), frames: Some(129), ..card(4) };
        let fault = plan(&large, &TierOptions::default(), None).unwrap_err();
        assert!(fault.kind == Kind::OutOfMemory && fault.message.contains("would fit"), "{fault}");
        let limited = v1::PlanGenerationRequest { tier: "low".into(), ..large };
        let fault = plan(&limited, &TierOptions::default(), None).unwrap_err();
        assert_eq!((fault.kind, fault.violations[0].field.as_str()), (Kind::Invalid, "size"));
        let unknown = v1::PlanGenerationRequest { tier: "none".into(), ..card(8) };
        assert_eq!(plan(&unknown, &TierOptions::default(), None).unwrap_err().field(), Some("tier"));
    }
}
