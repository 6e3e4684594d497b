//! Which plan fits: tier, placement, and how each stage lives in its device.
//!
//! Sacrifices come in this order: placement and residency (other cards, stages that load and unload in turn), precision
//! (as far as it is allowed), speed (blocks that are swapped, smaller tiles, features that are not kept). Size, frames and
//! steps are lowered only to a tier's limits or by leave. Chunks of tokens and branches in turn cost next to nothing, so the
//! engine always works in them.

mod choose;
mod ladder;
mod reasons;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::Serialize;

pub use self::choose::Refusal;
use crate::{
    bytes::Bytes,
    clip::{ClipPlan, FPS, REFERENCE_WINDOW},
    cost::{Job, cpu::Cpu, cuda, work::Rates},
    precision::Precision,
    size::PictureSize,
    stage::Stage,
    table::ModelTable,
    tiers::{Change, Tier, Tiers, Wanted},
};

/// What a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// A card.
    Cuda,
    /// This machine's CPU, with the types that the stages compute in, in the order of [`Stage::ALL`].
    Cpu([Cpu; 5]),
}

/// A memory and what computes on it.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// `cuda:0`, `cpu`.
    pub name: String,
    /// What it is.
    pub kind: DeviceKind,
    /// All of its memory; its nominal size says the tier.
    pub total: Bytes,
    /// Memory that may be used.
    pub free: Bytes,
    /// How fast it is.
    pub rates: Rates,
}

impl Device {
    /// A card that is not here: all of its memory is free, and nothing was measured.
    #[must_use]
    pub fn card(index: usize, total: Bytes) -> Self {
        Self { name: format!("cuda:{index}"), kind: DeviceKind::Cuda, total, free: total, rates: Rates::CUDA }
    }

    /// Bytes that a plan may use: all that are free but for a card's spare part.
    #[must_use]
    pub fn usable(&self) -> u64 {
        match self.kind {
            DeviceKind::Cuda => cuda::usable(self.free.0),
            DeviceKind::Cpu(_) => self.free.0,
        }
    }
}

/// What is asked for. What is left open takes the tier's limits.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Request {
    /// Width and height.
    pub size: Option<PictureSize>,
    /// Frames of the video.
    pub frames: Option<u32>,
    /// Denoise steps.
    pub steps: Option<u32>,
    /// Tokens of the prompt without its template; a prompt of middle length where it is not known.
    pub prompt_tokens: Option<u32>,
    /// Branches of each step; two, as guidance needs them, where nothing is said.
    pub branches: Option<u64>,
    /// Every step runs in full.
    pub no_feature_cache: bool,
}

/// Which tier's limits hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Choice {
    /// None; the largest device's tier gives what a request leaves open.
    #[default]
    Unlimited,
    /// The largest device's.
    Auto,
    /// The one of that name.
    Named(String),
}

/// All that a plan is made from, but for the request.
#[derive(Debug, Clone)]
pub struct Planner {
    /// The model.
    pub table: ModelTable,
    /// The tiers.
    pub tiers: Tiers,
    /// The devices that there are.
    pub devices: Vec<Device>,
    /// The number of each stage's device, where the stages have their places already.
    pub placement: Option<[usize; 5]>,
    /// Which tier's limits hold.
    pub tier: Choice,
    /// What the large layers of transformer and Llama may be in.
    pub precisions: Vec<Precision>,
    /// Lower a request to what is allowed and fits, instead of refusing it.
    pub allow_degrade: bool,
}

/// What is made, after all that was lowered.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Outcome {
    /// Pixels to the right.
    pub width: u32,
    /// Pixels down.
    pub height: u32,
    /// Frames of the video.
    pub frames: u64,
    /// Frames of one window.
    pub window_frames: u64,
    /// Windows of one step.
    pub windows: u64,
    /// Denoise steps.
    pub steps: u64,
}

/// How a stage lives in its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Fit {
    /// On a card.
    Cuda(cuda::Fit),
    /// On this machine's CPU.
    Cpu(CpuFit),
}

/// How a stage lives on a CPU, where its weights stay in their files whatever their size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CpuFit {
    /// Of the large layers, in their files.
    pub precision: Precision,
    /// The system maps the files and keeps or drops their pages.
    pub weights_mapped: bool,
    /// Blocks whose weights stay in memory once they were read; the others come while another computes, and go. 0 of 0
    /// where the system alone decides.
    pub resident_blocks: u64,
    /// Blocks.
    pub blocks: u64,
    /// Blocks that are read while another computes.
    pub prefetch: u64,
    /// Parts in which the wide layers take their tokens.
    pub token_chunks: u64,
    /// Queries that attention takes at once.
    pub query_chunk: u64,
    /// Bits of a value between operations.
    pub compute_bits: u64,
    /// Both guidance branches go one after the other.
    pub branches_together: bool,
    /// Side of a tile of the VAE in pixels, and its length in frames.
    pub tile: [u64; 2],
}

/// One stage of a plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StagePlan {
    /// Which.
    pub stage: Stage,
    /// Where.
    pub device: String,
    /// How.
    pub fit: Fit,
    /// Bytes that it holds from its start: weights on a card; vectors, tables and convolutions on a CPU.
    pub resident_bytes: u64,
    /// The most that it takes of its device, with what it holds.
    pub peak_bytes: u64,
    /// Seconds of its work, with the loading of its weights where it is unloaded between.
    pub seconds: f64,
    /// Sacrifices from the best fit on.
    #[serde(skip)]
    pub rung: usize,
}

/// Bytes on a device while a stage works there.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Phase {
    /// The device.
    pub device: String,
    /// The stage that works.
    pub phase: Stage,
    /// Everything that is on the device meanwhile.
    pub peak_bytes: u64,
    /// What a plan may use of the device.
    pub usable_bytes: u64,
}

/// The rates that seconds rest on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DeviceRates {
    /// The device.
    pub device: String,
    /// Its rates.
    #[serde(flatten)]
    pub rates: Rates,
}

/// A plan that fits.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The tier by whose limits it was made, or that of the largest device.
    pub tier: String,
    /// Whether the tier's limits were applied.
    pub limited: bool,
    /// The model that it is for.
    pub model: String,
    /// What is made.
    pub outcome: Outcome,
    /// The device of each stage, by name.
    pub placement: BTreeMap<&'static str, String>,
    /// The stages, in the order in which a generation needs them.
    pub stages: Vec<StagePlan>,
    /// The most on each device while each stage works.
    pub phases: Vec<Phase>,
    /// The most on any one device.
    pub peak_bytes: u64,
    /// Seconds of all stages.
    pub seconds: f64,
    /// What the seconds rest on.
    pub rates: Vec<DeviceRates>,
    /// What was lowered.
    pub degraded: Vec<String>,
    /// Why it is so, in sentences.
    pub reasons: Vec<String>,
    /// Sacrifices: of the transformer, of the other stages, of residency, of placement. Less is better, the first most.
    #[serde(skip)]
    pub rank: [usize; 4],
}

impl Planner {
    /// Makes a plan.
    ///
    /// Errors: the tier is unknown, the request is past its limits, or nothing fits; no weight has been read then.
    pub fn plan(&self, request: &Request) -> Result<Plan, Refusal> {
        self.table.check().map_err(|e| Refusal::Model { reason: e.to_string() })?;
        if self.devices.is_empty() {
            return Err(Refusal::NoDevice);
        }
        if self.precisions.is_empty() {
            return Err(Refusal::NoPrecision);
        }
        let largest = self.devices.iter().map(|device| device.total).max().unwrap_or_default();
        let of_device = self.tiers.for_total(largest);
        let tier = match &self.tier {
            Choice::Named(name) => self.tiers.named(name).map_err(Refusal::UnknownTier)?,
            Choice::Auto | Choice::Unlimited => of_device.ok_or(Refusal::NoTier)?,
        };
        let limited = self.tier != Choice::Unlimited;
        let (request, mut degraded) = self.limited(request, tier, limited)?;
        let window = if limited { tier.limits.window() } else { REFERENCE_WINDOW };
        let job = request.job(tier, window)?;
        let mut reasons = reasons::of_tier(tier, limited, self, &request);
        match self.fit(&job) {
            Ok(chosen) => {
                reasons.extend(reasons::of_choice(self, &job, &chosen));
                Ok(self.finish(tier, limited, &job, chosen, (degraded, reasons)))
            }
            Err(with_features) => {
                let full = Job { no_feature_cache: true, ..job };
                let shortage = match self.fit(&full) {
                    Ok(chosen) => {
                        degraded.push(format!(
                            "{with_features}; without kept features it fits, so every step runs in full"
                        ));
                        reasons.extend(reasons::of_choice(self, &full, &chosen));
                        return Ok(self.finish(tier, limited, &full, chosen, (degraded, reasons)));
                    }
                    Err(least) => least,
                };
                let nearest = self.nearest(&full, window);
                let Some((smaller, told)) = nearest else { return Err(Refusal::Memory(shortage)) };
                if !self.allow_degrade {
                    return Err(Refusal::Memory(choose::Shortage { nearest: Some(told), ..shortage }));
                }
                let with_features = Job { no_feature_cache: job.no_feature_cache, ..smaller };
                let smaller = if self.fit(&with_features).is_ok() { with_features } else { smaller };
                let chosen = self.fit(&smaller).map_err(Refusal::Memory)?;
                degraded.push(format!("{shortage}; lowered to {told}"));
                reasons.extend(reasons::of_choice(self, &smaller, &chosen));
                Ok(self.finish(tier, limited, &smaller, chosen, (degraded, reasons)))
            }
        }
    }

    /// Holds the request against the tier's limits; lowers it where that is allowed.
    fn limited(&self, request: &Request, tier: &Tier, limited: bool) -> Result<(Request, Vec<String>), Refusal> {
        if !limited {
            return Ok((*request, Vec::new()));
        }
        let wanted = Wanted {
            size: request.size.map_or(tier.limits.pixels, |size| size.width.min(size.height)),
            steps: request.steps.unwrap_or(tier.limits.steps),
            seconds: f64::from(request.frames.unwrap_or(1)) / f64::from(FPS),
            window_frames: None,
        };
        let excesses = tier.excesses(&wanted);
        if excesses.is_empty() {
            return Ok((*request, Vec::new()));
        }
        if !self.allow_degrade {
            return Err(Refusal::Limits(excesses));
        }
        let (lowered, changes) = tier.lowered(&wanted).map_err(|excess| Refusal::Limits(vec![excess]))?;
        let of = |field: &str| changes.iter().any(|change: &Change| change.field == field);
        let mut request = *request;
        if let Some(size) = request.size.filter(|_| of("size")) {
            request.size = Some(crate::size::generation_size(lowered.size, size.width, size.height));
        }
        if of("steps") {
            request.steps = Some(lowered.steps);
        }
        if of("audio") {
            request.frames = Some((lowered.seconds * f64::from(FPS)) as u32);
        }
        let said = changes.iter().map(|change| format!("tier {}: {change}", tier.name)).collect();
        Ok((request, said))
    }
}

impl Request {
    /// The job of the request; what it leaves open is a square of the tier's pixels, one pass of its frames, its steps.
    fn job(&self, tier: &Tier, window: usize) -> Result<Job, Refusal> {
        let size = self.size.unwrap_or(PictureSize { width: tier.limits.pixels, height: tier.limits.pixels });
        let frames = self.frames.unwrap_or(tier.limits.frames.min(crate::clip::frames_of(REFERENCE_WINDOW) as u32));
        let clip = ClipPlan::new(frames.max(1) as usize, 1, window);
        let steps = self.steps.unwrap_or(tier.limits.steps);
        let job = Job::new(size, &clip, steps, self.branches.unwrap_or(2))
            .map_err(|e| Refusal::Model { reason: e.to_string() })?;
        let (prompt_tokens, no_feature_cache) = (self.prompt_tokens.map(u64::from), self.no_feature_cache);
        Ok(Job { prompt_tokens, no_feature_cache, ..job })
    }
}
