//! The search: placements of the stages on the devices, and of each the best fits that its devices hold.

use std::fmt;

use super::{CpuFit, Device, DeviceKind, DeviceRates, Fit, Outcome, Phase, Plan, Planner, StagePlan, ladder};
use crate::{
    bytes::Bytes,
    clip::ClipPlan,
    cost::{Job, cpu, cuda, work},
    precision::Precision,
    size::{PictureSize, generation_size},
    stage::Stage,
    tiers::{Excess, Tier, UnknownTier},
};

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// No device was given.
    #[error("there is no device to plan for")]
    NoDevice,
    /// No precision is allowed.
    #[error("no precision is allowed")]
    NoPrecision,
    /// The table of tiers has none with a nominal size.
    #[error("no tier is for a nominal size; name one")]
    NoTier,
    /// No tier has the name.
    #[error(transparent)]
    UnknownTier(UnknownTier),
    /// The model or the request is not one that can be counted with.
    #[error("{reason}")]
    Model {
        /// In words.
        reason: String,
    },
    /// Values past the tier's limits.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Limits(Vec<Excess>),
    /// Nothing fits.
    #[error("{0}")]
    Memory(Shortage),
}

/// The stage that does not fit, in the smallest fit that there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// The device.
    pub device: String,
    /// While this stage works.
    pub phase: Stage,
    /// Bytes that it needs at least.
    pub needed: Bytes,
    /// Bytes that may be used.
    pub free: Bytes,
    /// The nearest setting that would fit.
    pub nearest: Option<String>,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, phase, needed, free, nearest } = self;
        write!(f, "{phase} needs at least {needed} on {device}, of which {free} may be used")?;
        match nearest {
            Some(nearest) => write!(f, "; {nearest} would fit"),
            None => Ok(()),
        }
    }
}

/// One stage in a device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    pub(super) fit: Fit,
    pub(super) rung: usize,
    /// Bytes from its start on.
    pub(super) resident: u64,
    /// Bytes that it keeps between its calls.
    pub(super) kept: u64,
    /// Bytes while it works, on top.
    pub(super) work: u64,
}

impl Placed {
    fn peak(&self) -> u64 {
        self.resident.saturating_add(self.kept).saturating_add(self.work)
    }
}

/// A placement with its fits.
#[derive(Debug, Clone)]
pub(super) struct Chosen {
    /// The device of each stage, by number.
    pub(super) devices: [usize; 5],
    pub(super) stages: [Placed; 5],
    /// Whether the stages of each device load and unload in turn.
    pub(super) in_turn: Vec<bool>,
    pub(super) rank: [usize; 4],
}

/// Which number a stage has.
fn index(stage: Stage) -> usize {
    stage as usize
}

impl Planner {
    /// The best placement whose stages all fit.
    ///
    /// Errors: the shortage of the placement that comes nearest to fitting.
    pub(super) fn fit(&self, job: &Job) -> Result<Chosen, Shortage> {
        let (mut best, mut shortage): (Option<Chosen>, Option<Shortage>) = (None, None);
        for (number, devices) in self.placements().into_iter().enumerate() {
            match self.place(job, devices) {
                Ok(mut chosen) => {
                    chosen.rank[3] = self.fullest(&chosen).unwrap_or(number);
                    if best.as_ref().is_none_or(|best| chosen.rank < best.rank) {
                        best = Some(chosen);
                    }
                }
                Err(told) => {
                    let missing = |s: &Shortage| s.needed.0.saturating_sub(s.free.0);
                    if shortage.as_ref().is_none_or(|before| missing(&told) < missing(before)) {
                        shortage = Some(told);
                    }
                }
            }
        }
        best.ok_or_else(|| {
            shortage.unwrap_or(Shortage {
                device: String::new(),
                phase: Stage::Diffusion,
                needed: Bytes(0),
                free: Bytes(0),
                nearest: None,
            })
        })
    }

    /// How full the fullest device is, in thousandths of what may be used, where all are this machine's CPU.
    fn fullest(&self, chosen: &Chosen) -> Option<usize> {
        let full = |(number, device): (usize, &Device)| {
            let DeviceKind::Cpu(_) = device.kind else { return None };
            let here = || chosen.stages.iter().zip(chosen.devices).filter(move |(_, at)| *at == number).map(|(s, _)| s);
            let resident = here().map(|stage| stage.resident).fold(0, u64::saturating_add);
            let most = here().map(|stage| stage.kept.saturating_add(stage.work)).max().unwrap_or(0);
            let parts = u128::from(resident.saturating_add(most)) * 1000 / u128::from(device.usable().max(1));
            usize::try_from(parts).ok()
        };
        self.devices.iter().enumerate().map(full).collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    /// The precisions that a stage may have, the largest first: that of its files, or where there are none, those that
    /// are allowed.
    pub(super) fn precisions_of(&self, stage: Stage) -> Vec<Precision> {
        match self.table.stored_of(stage) {
            Some(stored) => vec![stored],
            None => Precision::ALL.into_iter().filter(|p| self.precisions.contains(p)).collect(),
        }
    }

    /// Device numbers by stage: all on the roomiest; the transformer there and the others on the next; the text encoder
    /// on the next and the rest on the third. Where all are this machine's CPU, nothing has to be moved between them:
    /// then encoders, transformer and decoder are on any of the three roomiest.
    fn placements(&self) -> Vec<[usize; 5]> {
        if let Some(placement) = self.placement {
            return vec![placement];
        }
        let mut order: Vec<usize> = (0..self.devices.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(self.devices[i].usable()));
        let at = |n: usize| order.get(n).copied();
        if self.devices.iter().all(|device| matches!(device.kind, DeviceKind::Cpu(_))) {
            order.truncate(3);
            let mut all = Vec::new();
            for &encoders in &order {
                for &transformer in &order {
                    all.extend(order.iter().map(|&decoder| [encoders, encoders, encoders, transformer, decoder]));
                }
            }
            return all;
        }
        let mut all = Vec::new();
        if let Some(first) = at(0) {
            all.push([first; 5]);
            if let Some(second) = at(1) {
                all.push([second, second, second, first, second]);
                if let Some(third) = at(2) {
                    all.push([third, second, third, first, third]);
                }
            }
        }
        all
    }

    fn place(&self, job: &Job, devices: [usize; 5]) -> Result<Chosen, Shortage> {
        let mut stages: [Option<Placed>; 5] = [None; 5];
        let mut in_turn = vec![false; self.devices.len()];
        let mut rank = [0; 4];
        for (number, device) in self.devices.iter().enumerate() {
            let here: Vec<Stage> = Stage::ALL.into_iter().filter(|s| devices[index(*s)] == number).collect();
            if here.is_empty() {
                continue;
            }
            let (placed, turns) = match device.kind {
                DeviceKind::Cpu(cpus) => (self.on_cpu(job, device, cpus, &here)?, false),
                DeviceKind::Cuda => self.on_card(job, device, &here)?,
            };
            in_turn[number] = turns;
            rank[2] += usize::from(turns);
            for (stage, placed) in here.iter().zip(placed) {
                match (stage, placed.fit) {
                    // Blocks that do not stay are a sacrifice too.
                    (Stage::Diffusion, Fit::Cpu(fit)) => {
                        rank[0] = usize::try_from(fit.blocks - fit.resident_blocks).unwrap_or(usize::MAX);
                    }
                    (Stage::Diffusion, Fit::Cuda(_)) => rank[0] = placed.rung,
                    (Stage::TextEncoder, Fit::Cpu(fit)) => {
                        rank[1] += usize::try_from(fit.blocks - fit.resident_blocks).unwrap_or(usize::MAX);
                    }
                    _ => rank[1] += placed.rung,
                }
                stages[index(*stage)] = Some(placed);
            }
        }
        let nowhere = || Shortage {
            device: String::new(),
            phase: Stage::Diffusion,
            needed: Bytes(0),
            free: Bytes(0),
            nearest: None,
        };
        let [Some(a), Some(t), Some(i), Some(d), Some(v)] = stages else { return Err(nowhere()) };
        Ok(Chosen { devices, stages: [a, t, i, d, v], in_turn, rank })
    }

    /// On a CPU all stages stay open, since what they hold is little.
    fn on_cpu(&self, job: &Job, device: &Device, cpus: [cpu::Cpu; 5], here: &[Stage]) -> Result<Vec<Placed>, Shortage> {
        let mut placed: Vec<Placed> = here
            .iter()
            .map(|&stage| {
                let cpu = cpus[index(stage)];
                let need = cpu::need(&self.table, stage, job, cpu);
                let wide = stage == Stage::Diffusion;
                let fit = CpuFit {
                    precision: self.precisions_of(stage).first().copied().unwrap_or(Precision::Bf16),
                    weights_mapped: true,
                    resident_blocks: 0,
                    blocks: 0,
                    prefetch: 0,
                    token_chunks: if wide { job.token_chunks(&self.table.llava) } else { 1 },
                    query_chunk: cpu::QUERIES,
                    compute_bits: 8 * cpu.value_bytes,
                    branches_together: false,
                    tile: self.table.vae.tile(),
                };
                Placed { fit: Fit::Cpu(fit), rung: 0, resident: need.resident, kept: need.kept, work: need.work }
            })
            .collect();
        let resident: u64 = placed.iter().map(|p| p.resident).sum();
        for (stage, placed) in here.iter().zip(&mut placed) {
            if *stage == Stage::VaeDecode {
                self.cut(job, cpus[index(*stage)], placed, device.usable().saturating_sub(resident));
            }
            let needed = resident.saturating_add(placed.kept).saturating_add(placed.work);
            if needed > device.usable() {
                return Err(self.shortage(device, *stage, needed));
            }
            if matches!(stage, Stage::Diffusion | Stage::TextEncoder)
                && let Fit::Cpu(fit) = &mut placed.fit
            {
                // What the heap leaves of the memory is for the pages of weights.
                let (blocks, others) = cpu::blocks(&self.table, *stage, fit.precision);
                let room = device.usable().saturating_sub(needed).saturating_sub(others);
                fit.blocks = blocks.len() as u64;
                fit.resident_blocks = cpu::resident_blocks(&blocks, room) as u64;
                fit.prefetch = u64::from(fit.resident_blocks < fit.blocks);
            }
        }
        Ok(placed)
    }

    /// Lets the decoder work in the largest tiles for which `room` bytes are enough, or else in the smallest.
    fn cut(&self, job: &Job, cpu: cpu::Cpu, placed: &mut Placed, room: u64) {
        for (rung, divisor) in ladder::TILE_DIVISORS.into_iter().enumerate() {
            let vae = self.table.vae.with_smaller_tiles(divisor);
            let need = cpu::need_in_tiles((&self.table, &vae), Stage::VaeDecode, job, cpu);
            if let Fit::Cpu(fit) = &mut placed.fit {
                fit.tile = vae.tile();
            }
            (placed.rung, placed.work) = (rung, need.work);
            if need.work <= room {
                return;
            }
        }
    }

    /// The best fits of the stages, and whether they must load and unload in turn.
    fn on_card(&self, job: &Job, device: &Device, here: &[Stage]) -> Result<(Vec<Placed>, bool), Shortage> {
        let usable = device.usable();
        let placed = here
            .iter()
            .map(|&stage| {
                let mut smallest = u64::MAX;
                let mut fits = self.card_fits(job, stage, &self.precisions_of(stage)).into_iter();
                let found = fits.find(|placed| {
                    smallest = smallest.min(placed.peak());
                    placed.peak() <= usable
                });
                found.ok_or_else(|| self.shortage(device, stage, smallest))
            })
            .collect::<Result<Vec<_>, _>>()?;
        // The context is part of every stage's bytes, but is there once.
        let weights = placed.iter().map(|p| p.resident - cuda::CONTEXT_BYTES).fold(0, u64::saturating_add);
        let work = placed.iter().map(|p| p.work).max().unwrap_or(0);
        let in_turn = weights.saturating_add(work).saturating_add(cuda::CONTEXT_BYTES) > usable;
        Ok((placed, in_turn))
    }

    /// A stage's fits on a card, the best first.
    pub(super) fn card_fits(&self, job: &Job, stage: Stage, precisions: &[Precision]) -> Vec<Placed> {
        let fits = ladder::fits(&self.table, stage, job, precisions);
        let placed = |(rung, fit): (usize, cuda::Fit)| {
            let (weights, _) = cuda::weights(&self.table, stage, &fit);
            let work = cuda::activations(&self.table, stage, job, &fit);
            Placed { fit: Fit::Cuda(fit), rung, resident: weights.saturating_add(cuda::CONTEXT_BYTES), kept: 0, work }
        };
        fits.into_iter().enumerate().map(placed).collect()
    }

    fn shortage(&self, device: &Device, phase: Stage, needed: u64) -> Shortage {
        let free = Bytes(device.usable());
        Shortage { device: device.name.clone(), phase, needed: Bytes(needed), free, nearest: None }
    }

    /// The largest smaller request that fits, and its words.
    pub(super) fn nearest(&self, job: &Job, window: usize) -> Option<(Job, String)> {
        const SIZES: [u32; 9] = [1024, 704, 512, 384, 256, 192, 128, 96, 64];
        const FRAMES: [u64; 7] = [129, 97, 65, 33, 17, 9, 5];
        let PictureSize { width, height } = job.size;
        let shorter = width.min(height);
        let mut smaller = Vec::new();
        for size in SIZES.into_iter().filter(|s| *s < shorter).chain([shorter]) {
            let size = if size == shorter { job.size } else { generation_size(size, width, height) };
            for frames in FRAMES.into_iter().filter(|f| *f < job.frames).chain([job.frames]) {
                let clip = ClipPlan::new(frames as usize, 1, window);
                let Ok(try_) = Job::new(size, &clip, job.steps as u32, job.branches) else { continue };
                let (prompt_tokens, no_feature_cache) = (job.prompt_tokens, job.no_feature_cache);
                let try_ = Job { prompt_tokens, no_feature_cache, ..try_ };
                if try_.size != job.size || try_.frames != job.frames {
                    smaller.push(try_);
                }
            }
        }
        smaller.sort_by_key(|job| std::cmp::Reverse((job.image_tokens(), job.frames)));
        let found = smaller.into_iter().find(|job| self.fit(job).is_ok())?;
        let told = format!("{} with {} frames", found.size, found.frames);
        Some((found, told))
    }

    /// The plan of a placement.
    pub(super) fn finish(
        &self,
        tier: &Tier,
        limited: bool,
        job: &Job,
        chosen: Chosen,
        (degraded, reasons): (Vec<String>, Vec<String>),
    ) -> Plan {
        let mut stages = Vec::new();
        let mut phases = Vec::new();
        for (stage, placed) in Stage::ALL.into_iter().zip(&chosen.stages) {
            let number = chosen.devices[index(stage)];
            let Some(device) = self.devices.get(number) else { continue };
            let turns = chosen.in_turn.get(number).copied().unwrap_or(false);
            // What the other stages of the device hold meanwhile.
            let others: u64 = if turns {
                0
            } else {
                let context = if device.kind == DeviceKind::Cuda { cuda::CONTEXT_BYTES } else { 0 };
                let there = Stage::ALL.iter().zip(&chosen.stages).enumerate();
                there
                    .filter(|(i, (other, _))| **other != stage && chosen.devices[*i] == number)
                    .map(|(_, (_, placed))| placed.resident.saturating_sub(context))
                    .sum()
            };
            phases.push(Phase {
                device: device.name.clone(),
                phase: stage,
                peak_bytes: placed.peak().saturating_add(others),
                usable_bytes: device.usable(),
            });
            stages.push(StagePlan {
                stage,
                device: device.name.clone(),
                fit: placed.fit,
                resident_bytes: placed.resident,
                peak_bytes: placed.peak(),
                seconds: self.seconds(job, stage, device, placed, turns),
                rung: placed.rung,
            });
        }
        let used = |device: &&Device| stages.iter().any(|stage| stage.device == device.name);
        Plan {
            tier: tier.name.clone(),
            limited,
            model: self.table.name.clone(),
            outcome: Outcome {
                width: job.size.width,
                height: job.size.height,
                frames: job.frames,
                window_frames: job.window_frames(),
                windows: job.windows,
                steps: job.steps,
            },
            placement: stages.iter().map(|s| (s.stage.name(), s.device.clone())).collect(),
            peak_bytes: phases.iter().map(|p| p.peak_bytes).max().unwrap_or(0),
            seconds: stages.iter().map(|s| s.seconds).sum(),
            rates: self
                .devices
                .iter()
                .filter(used)
                .map(|d| DeviceRates { device: d.name.clone(), rates: d.rates })
                .collect(),
            stages,
            phases,
            degraded,
            reasons,
            rank: chosen.rank,
        }
    }

    /// Bytes of blocks that one pass reads, since they do not stay.
    pub(super) fn moved_on_cpu(&self, stage: Stage, fit: &CpuFit) -> u64 {
        let (blocks, _) = cpu::blocks(&self.table, stage, fit.precision);
        let away = fit.blocks.saturating_sub(fit.resident_blocks) as usize;
        blocks.iter().take(away).sum()
    }

    fn seconds(&self, job: &Job, stage: Stage, device: &Device, placed: &Placed, turns: bool) -> f64 {
        // Of the transformer, the full ones: a cached pass needs the last block alone, which stays. Of the Llama, one for each prompt.
        let passes = match stage {
            Stage::Diffusion => job.passes().0 as f64,
            Stage::TextEncoder => 2.0,
            _ => 0.0,
        };
        let work = match (device.kind, device.rates.pace) {
            (DeviceKind::Cpu(cpus), Some(pace)) => {
                let ops = cpu::ops(&self.table, stage, job, cpus[index(stage)]);
                ops.seconds(&device.rates, &pace) + cpu::around(stage, job)
            }
            _ => work::stage(&self.table, stage, job).seconds(&device.rates),
        };
        match placed.fit {
            Fit::Cpu(fit) => {
                let computing =
                    work + work::weights_read(&self.table, stage, job, fit.precision) / device.rates.weights;
                let moved = self.moved_on_cpu(stage, &fit);
                // What does not stay is read while another block computes.
                computing.max(moved as f64 * passes / device.rates.files)
            }
            Fit::Cuda(fit) => {
                let load = if turns { placed.resident as f64 / device.rates.files } else { 0.0 };
                let (_, moved) = cuda::weights(&self.table, stage, &fit);
                // What is brought ahead comes while another block computes.
                load + work.max(moved as f64 * passes / device.rates.weights)
            }
        }
    }
}
