//! The search: placements of the stages on the devices, and of each the best fits that its devices hold.

use std::fmt;

use super::{
    CpuFit, Device, DeviceKind, Fit, Planner, ladder,
    spread::{Beside, Placement, Share},
};
use crate::{
    bytes::Bytes,
    clip::ClipPlan,
    cost::{Job, cpu, cuda},
    precision::Precision,
    size::{PictureSize, generation_size},
    stage::Stage,
    tiers::{Excess, UnknownTier},
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
    pub(super) fn peak(&self) -> u64 {
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
    /// The devices that the transformer is spread over; none where it is on one. The first one's is its stage's too.
    pub(super) shares: Vec<Share>,
    pub(super) rank: [usize; 5],
}

/// Which number a stage has.
pub(super) fn index(stage: Stage) -> usize {
    stage as usize
}

impl Planner {
    /// The best placement whose stages all fit.
    ///
    /// Errors: the shortage of the placement that comes nearest to fitting.
    pub(super) fn fit(&self, job: &Job) -> Result<Chosen, Shortage> {
        let (mut best, mut shortage): (Option<Chosen>, Option<Shortage>) = (None, None);
        let mut take = |number: usize, placed: Result<Chosen, Shortage>| match placed {
            Ok(mut chosen) => {
                chosen.rank[4] = self.fullest(&chosen).unwrap_or(number);
                if best.as_ref().is_none_or(|best| chosen.rank < best.rank) {
                    best = Some(chosen);
                }
                best.as_ref().is_some_and(|best| best.rank[..3] == [0; 3])
            }
            Err(told) => {
                let missing = |s: &Shortage| s.needed.0.saturating_sub(s.free.0);
                if shortage.as_ref().is_none_or(|before| missing(&told) < missing(before)) {
                    shortage = Some(told);
                }
                false
            }
        };
        let mut whole = false;
        for (number, placement) in self.placements().into_iter().enumerate() {
            whole |= take(number, self.place(job, &placement, true));
            if !placement.spread.is_empty() {
                take(number, self.place(job, &placement, false));
            }
        }
        // Where nothing has to be given up on one device, the transformer stays there.
        if self.placement.is_none() && !whole {
            for (number, placement) in self.spreads() {
                for together in [true, false] {
                    // What one device lacks says more than what one of several does.
                    let _ = self.place(job, &placement, together).map(|chosen| take(number, Ok(chosen)));
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
            let spread = !chosen.shares.is_empty();
            let stages = Stage::ALL.into_iter().filter(move |stage| !spread || *stage != Stage::Diffusion);
            let of_stage = stages.filter(|stage| chosen.devices[index(*stage)] == number);
            let of_stage = of_stage.map(|stage| &chosen.stages[index(stage)]);
            let parts = chosen.shares.iter().filter(|share| share.device == number).map(|share| &share.placed);
            let here: Vec<&Placed> = of_stage.chain(parts).collect();
            let resident = here.iter().map(|stage| stage.resident).fold(0, u64::saturating_add);
            let most = here.iter().map(|stage| stage.kept.saturating_add(stage.work)).max().unwrap_or(0);
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
    fn placements(&self) -> Vec<Placement> {
        if let Some(placement) = &self.placement {
            return vec![placement.clone()];
        }
        self.on_one().into_iter().map(Placement::from).collect()
    }

    fn on_one(&self) -> Vec<[usize; 5]> {
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

    /// - `together`: a spread transformer leaves room for the other stages to stay loaded beside it
    fn place(&self, job: &Job, placement: &Placement, together: bool) -> Result<Chosen, Shortage> {
        let devices = placement.devices;
        let spread = !placement.spread.is_empty();
        let mut stages: [Option<Placed>; 5] = [None; 5];
        let mut in_turn = vec![false; self.devices.len()];
        let mut rank = [0; 5];
        let mut others: Vec<(Vec<Stage>, Vec<Placed>)> = Vec::new();
        for (number, device) in self.devices.iter().enumerate() {
            let here: Vec<Stage> = Stage::ALL
                .into_iter()
                .filter(|s| devices[index(*s)] == number && !(spread && *s == Stage::Diffusion))
                .collect();
            let placed = match device.kind {
                DeviceKind::Cpu(cpus) => self.on_cpu(job, device, cpus, &here)?,
                DeviceKind::Cuda => self.on_card(job, device, &here)?,
            };
            others.push((here, placed));
        }
        let beside = |(device, (_, placed)): (&Device, &(Vec<Stage>, Vec<Placed>))| self.beside(device, placed);
        let beside: Vec<Beside> = self.devices.iter().zip(&others).map(beside).collect();
        let mut shares = Vec::new();
        if spread {
            let cards = placement
                .spread
                .iter()
                .all(|(device, _)| self.devices.get(*device).is_some_and(|device| device.kind == DeviceKind::Cuda));
            let none = vec![Beside::default(); beside.len()];
            let beside = if together || !cards { &beside } else { &none };
            (shares, rank[0]) = self.shares(job, placement, beside)?;
            rank[3] = shares.len().saturating_sub(1);
            stages[index(Stage::Diffusion)] = shares.first().map(|share| share.placed);
        }
        for (number, (device, (here, placed))) in self.devices.iter().zip(others).enumerate() {
            let share = shares.iter().find(|share| share.device == number);
            if device.kind == DeviceKind::Cuda {
                in_turn[number] = self.turns(device, (&here, &placed), share);
            }
            rank[2] += usize::from(in_turn[number]);
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
        Ok(Chosen { devices, stages: [a, t, i, d, v], in_turn, shares, rank })
    }

    /// What some stages take of their device together.
    fn beside(&self, device: &Device, placed: &[Placed]) -> Beside {
        // The context is part of every stage's bytes, but is there once.
        let context = if device.kind == DeviceKind::Cuda { cuda::CONTEXT_BYTES } else { 0 };
        Beside {
            resident: placed.iter().map(|p| p.resident.saturating_sub(context)).fold(0, u64::saturating_add),
            work: placed.iter().map(|p| p.kept.saturating_add(p.work)).max().unwrap_or(0),
        }
    }

    /// How a stage lives on a CPU, before it is known which of its blocks stay.
    pub(super) fn cpu_fit(&self, job: &Job, stage: Stage, cpu: cpu::Cpu) -> CpuFit {
        CpuFit {
            precision: self.precisions_of(stage).first().copied().unwrap_or(Precision::Bf16),
            weights_mapped: true,
            resident_blocks: 0,
            blocks: 0,
            prefetch: 0,
            token_chunks: if stage == Stage::Diffusion { job.token_chunks(&self.table.llava) } else { 1 },
            query_chunk: cpu::QUERIES,
            compute_bits: 8 * cpu.value_bytes,
            branches_together: false,
            tile: self.table.vae.tile(),
        }
    }

    /// On a CPU all stages stay open, since what they hold is little.
    fn on_cpu(&self, job: &Job, device: &Device, cpus: [cpu::Cpu; 5], here: &[Stage]) -> Result<Vec<Placed>, Shortage> {
        let mut placed: Vec<Placed> = here
            .iter()
            .map(|&stage| {
                let cpu = cpus[index(stage)];
                let need = cpu::need(&self.table, stage, job, cpu);
                let fit = Fit::Cpu(self.cpu_fit(job, stage, cpu));
                Placed { fit, rung: 0, resident: need.resident, kept: need.kept, work: need.work }
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

    /// The best fits of the stages, each alone.
    fn on_card(&self, job: &Job, device: &Device, here: &[Stage]) -> Result<Vec<Placed>, Shortage> {
        let usable = device.usable();
        here.iter()
            .map(|&stage| {
                let mut smallest = u64::MAX;
                let mut fits = self.card_fits(job, stage, &self.precisions_of(stage)).into_iter();
                let found = fits.find(|placed| {
                    smallest = smallest.min(placed.peak());
                    placed.peak() <= usable
                });
                found.ok_or_else(|| self.shortage(device, stage, smallest))
            })
            .collect()
    }

    /// Whether the stages of a card, and a part of the transformer, must load and unload in turn.
    fn turns(&self, device: &Device, (here, placed): (&[Stage], &[Placed]), share: Option<&Share>) -> bool {
        let Beside { resident, work } = self.beside(device, placed);
        let of_share = share.map_or(0, |share| share.placed.resident.saturating_sub(cuda::CONTEXT_BYTES));
        let weights = resident.saturating_add(of_share);
        let work = work.max(share.map_or(0, |share| share.placed.work));
        // A part of the transformer that has its card alone takes turns with nobody.
        !here.is_empty() && weights.saturating_add(work).saturating_add(cuda::CONTEXT_BYTES) > device.usable()
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
}
