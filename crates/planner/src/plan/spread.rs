//! The transformer over several devices: which blocks are where, and what they take.

use std::ops::Range;

use super::{
    CpuFit, Device, DeviceKind, Fit, Planner,
    choose::{Chosen, Placed, Shortage},
    ladder,
};
use crate::{
    bytes::Bytes,
    cost::{
        Job, cpu, cuda,
        spread::{Part, divide},
    },
    precision::Precision,
    stage::Stage,
};

/// Where stages are, by number of their devices.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Placement {
    /// The device of each stage; of a spread one the first.
    pub devices: [usize; 5],
    /// The devices that the transformer is spread over, and how many blocks each has; none where it is on one.
    pub spread: Vec<(usize, u64)>,
}

impl From<[usize; 5]> for Placement {
    fn from(devices: [usize; 5]) -> Self {
        Self { devices, spread: Vec::new() }
    }
}

/// What of the transformer is on one of its devices.
#[derive(Debug, Clone)]
pub(super) struct Share {
    pub(super) device: usize,
    pub(super) part: Part,
    pub(super) placed: Placed,
}

/// What the other stages take of a device.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Beside {
    /// From their start on.
    pub(super) resident: u64,
    /// The most of one of them on top, while it works.
    pub(super) work: u64,
}

/// Most devices that the planner spreads the transformer over.
const MOST_PARTS: usize = 4;

impl Planner {
    /// Ways to spread the transformer, with the devices of the other stages, and of each its place among them: over the
    /// two roomiest devices that are alike, the three roomiest, and so on.
    pub(super) fn spreads(&self) -> Vec<(usize, Placement)> {
        let mut order: Vec<usize> = (0..self.devices.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(self.devices[i].usable()));
        let on_cpu = |i: &usize| matches!(self.devices[*i].kind, DeviceKind::Cpu(_));
        if order.len() < 2 || (order.iter().any(on_cpu) && !order.iter().all(on_cpu)) {
            return Vec::new();
        }
        let mut all = Vec::new();
        for parts in 2..=order.len().min(MOST_PARTS) {
            let first = order[0];
            let spread: Vec<(usize, u64)> = order.iter().take(parts).map(|&device| (device, 0)).collect();
            let mut push = |number: usize, [audio, text, image, decoder]: [usize; 4]| {
                let devices = [audio, text, image, first, decoder];
                all.push((100 * parts + number, Placement { devices, spread: spread.clone() }));
            };
            // The first device has the most to hold already.
            let liked = [1, 0, 2, 3];
            let among = liked.into_iter().zip(order.iter().copied());
            for (n, encoders) in among.clone() {
                for (m, decoder) in among.clone() {
                    // On cards the others are together.
                    if on_cpu(&first) || n == m {
                        push(10 * n + m, [encoders, encoders, encoders, decoder]);
                    }
                }
            }
        }
        all
    }

    /// The shares of the transformer in a placement that spreads it.
    ///
    /// - `beside`: what the other stages take of each device
    ///
    /// Errors: the blocks fit in no division, or not in the one that is given.
    pub(super) fn shares(
        &self,
        job: &Job,
        placement: &Placement,
        beside: &[Beside],
    ) -> Result<(Vec<Share>, usize), Shortage> {
        let first = placement.spread.first().and_then(|(device, _)| self.devices.get(*device));
        match first.map(|device| device.kind) {
            Some(DeviceKind::Cpu(cpus)) => self.shares_of_cpu(job, placement, beside, cpus[Stage::Diffusion as usize]),
            Some(DeviceKind::Cuda) => self.shares_of_cards(job, placement, beside),
            None => Err(self.lacking(placement, 0, |_, _| 0)),
        }
    }

    /// The devices of a placement's parts: their numbers and what may be used of them.
    fn usable(&self, placement: &Placement, part: usize) -> Option<(usize, u64)> {
        let (number, _) = placement.spread.get(part)?;
        Some((*number, self.devices.get(*number)?.usable()))
    }

    fn divided(
        &self,
        placement: &Placement,
        blocks: &[u64],
        room: impl Fn(usize, Range<usize>) -> Option<u64>,
    ) -> Vec<Part> {
        if placement.spread.iter().all(|(_, blocks)| *blocks == 0) {
            return divide(blocks, placement.spread.len(), room);
        }
        // The division is given.
        let mut begin = 0usize;
        let mut parts = Vec::new();
        for (number, (_, count)) in placement.spread.iter().enumerate() {
            let range = begin..begin.saturating_add(usize::try_from(*count).unwrap_or(usize::MAX));
            let (Some(here), Some(room)) = (blocks.get(range.clone()), room(number, range.clone())) else {
                return Vec::new();
            };
            begin = range.end;
            parts.push(Part { resident: cpu::resident_blocks(here, room), blocks: range });
        }
        if begin == blocks.len() { parts } else { Vec::new() }
    }

    fn shares_of_cpu(
        &self,
        job: &Job,
        placement: &Placement,
        beside: &[Beside],
        cpu: cpu::Cpu,
    ) -> Result<(Vec<Share>, usize), Shortage> {
        let precision = self.precisions_of(Stage::Diffusion).first().copied().unwrap_or(Precision::Bf16);
        let (blocks, _) = cpu::blocks(&self.table, Stage::Diffusion, precision);
        let needs = cpu::PartNeeds::new(&self.table, job, cpu);
        let taken = |number: usize, range: &Range<usize>| {
            let (need, beside) = (needs.of(range), beside.get(number).copied().unwrap_or_default());
            let own = need.kept.saturating_add(need.work);
            let most = need.resident.saturating_add(beside.resident).saturating_add(own.max(beside.work));
            (most, need.peak().saturating_add(beside.resident))
        };
        let room = |part: usize, range: Range<usize>| {
            let (number, usable) = self.usable(placement, part)?;
            let (most, working) = taken(number, &range);
            let others = cpu::beside_blocks(&self.table, precision, &range);
            (most <= usable).then(|| usable.saturating_sub(working).saturating_sub(others))
        };
        let parts = self.divided(placement, &blocks, room);
        if parts.is_empty() {
            let needed = |part: usize, range: Range<usize>| {
                self.usable(placement, part).map_or(0, |(number, _)| taken(number, &range).0)
            };
            return Err(self.lacking(placement, blocks.len(), needed));
        }
        let stays: u64 = parts.iter().map(|part| part.resident as u64).sum();
        let share = |(part, (device, _)): (Part, &(usize, u64))| {
            let need = needs.of(&part.blocks);
            let (blocks, plain) = (blocks.len() as u64, self.cpu_fit(job, Stage::Diffusion, cpu));
            let fit = Fit::Cpu(CpuFit { resident_blocks: stays, blocks, prefetch: u64::from(stays < blocks), ..plain });
            let placed = Placed { fit, rung: 0, resident: need.resident, kept: need.kept, work: need.work };
            Share { device: *device, part, placed }
        };
        let shares = parts.into_iter().zip(&placement.spread).map(share).collect();
        Ok((shares, blocks.len() - stays as usize))
    }

    fn shares_of_cards(
        &self,
        job: &Job,
        placement: &Placement,
        beside: &[Beside],
    ) -> Result<(Vec<Share>, usize), Shortage> {
        let fits = ladder::fits(&self.table, Stage::Diffusion, job, &self.precisions_of(Stage::Diffusion));
        // All blocks stay, in one precision after the other, or as many as can of the last one.
        let swapped = fits.iter().position(|fit| !fit.resident()).unwrap_or(fits.len());
        for (rung, fit) in fits.iter().take(swapped + 1).enumerate() {
            let work = cuda::activations(&self.table, Stage::Diffusion, job, fit);
            let (blocks, _) = cpu::blocks(&self.table, Stage::Diffusion, fit.precision);
            let moving = blocks.iter().max().copied().unwrap_or(0).saturating_mul(2);
            let room = |part: usize, range: Range<usize>| {
                let (number, usable) = self.usable(placement, part)?;
                let beside = beside.get(number).copied().unwrap_or_default();
                let others = cpu::beside_blocks(&self.table, fit.precision, &range);
                let taken = [cuda::CONTEXT_BYTES, work.max(beside.work), beside.resident, others];
                let room = usable.checked_sub(taken.into_iter().fold(0, u64::saturating_add))?;
                let all: u64 = blocks.get(range)?.iter().fold(0, |sum, bytes| sum.saturating_add(*bytes));
                (all <= room || (rung == swapped && moving <= room)).then_some(room)
            };
            let parts = self.divided(placement, &blocks, room);
            if parts.is_empty() {
                continue;
            }
            let stays: usize = parts.iter().map(|part| part.resident).sum();
            // Each block less that stays is a rung further down.
            let away = blocks.len() - stays;
            let rung = if away == 0 { rung.min(swapped.saturating_sub(1)) } else { swapped + away - 1 };
            let fit = cuda::Fit { resident_blocks: stays as u64, prefetch: u64::from(away > 0), ..*fit };
            let share = |(part, (device, _)): (Part, &(usize, u64))| {
                let here = blocks.get(part.blocks.clone()).unwrap_or_default();
                let gone = here.len() - part.resident;
                let stay: u64 = here.iter().skip(gone).sum();
                let move_ = if gone > 0 { moving } else { 0 };
                let others = cpu::beside_blocks(&self.table, fit.precision, &part.blocks);
                let resident = [stay, move_, others, cuda::CONTEXT_BYTES].into_iter().fold(0, u64::saturating_add);
                Share { device: *device, part, placed: Placed { fit: Fit::Cuda(fit), rung, resident, kept: 0, work } }
            };
            return Ok((parts.into_iter().zip(&placement.spread).map(share).collect(), rung));
        }
        let needed = |part: usize, range: Range<usize>| {
            let Some((number, fit)) = self.usable(placement, part).map(|(number, _)| number).zip(fits.last()) else {
                return 0;
            };
            let (blocks, _) = cpu::blocks(&self.table, Stage::Diffusion, fit.precision);
            let beside = beside.get(number).copied().unwrap_or_default();
            let others = cpu::beside_blocks(&self.table, fit.precision, &range);
            let moving = blocks.iter().max().copied().unwrap_or(0).saturating_mul(2);
            let work = cuda::activations(&self.table, Stage::Diffusion, job, fit).max(beside.work);
            let taken = [cuda::CONTEXT_BYTES, work, beside.resident, others, moving];
            taken.into_iter().fold(0, u64::saturating_add)
        };
        Err(self.lacking(placement, (self.table.transformer.double + self.table.transformer.single) as usize, needed))
    }

    /// The part that does not fit of a placement that spreads the transformer.
    ///
    /// - `needed`: bytes that a device needs for some of the blocks, by its number among the parts
    fn lacking(&self, placement: &Placement, count: usize, needed: impl Fn(usize, Range<usize>) -> u64) -> Shortage {
        let even = count.div_ceil(placement.spread.len().max(1));
        let mut begin = 0;
        let mut most: Option<Shortage> = None;
        for (part, (number, blocks)) in placement.spread.iter().enumerate() {
            let own = usize::try_from(*blocks).unwrap_or(usize::MAX);
            let wanted = if own > 0 { own } else { even };
            let end = begin + wanted.min(count - begin);
            let device = self.devices.get(*number);
            let told = Shortage {
                device: device.map(|device| device.name.clone()).unwrap_or_default(),
                phase: Stage::Diffusion,
                needed: Bytes(needed(part, begin..end)),
                free: Bytes(device.map_or(0, Device::usable)),
                nearest: None,
            };
            begin = end;
            let missing = |s: &Shortage| s.needed.0.saturating_sub(s.free.0);
            if most.as_ref().is_none_or(|before| missing(&told) > missing(before)) {
                most = Some(told);
            }
        }
        most.unwrap_or(Shortage {
            device: String::new(),
            phase: Stage::Diffusion,
            needed: Bytes(0),
            free: Bytes(0),
            nearest: None,
        })
    }

    /// Bytes of the transformer's blocks that one pass brings, since they do not stay.
    pub(super) fn moved(&self, chosen: &Chosen, precision: Precision) -> u64 {
        let (blocks, _) = cpu::blocks(&self.table, Stage::Diffusion, precision);
        let away = |share: &Share| {
            let here = blocks.get(share.part.blocks.clone()).unwrap_or_default();
            here.iter().take(here.len() - share.part.resident).sum::<u64>()
        };
        chosen.shares.iter().map(away).sum()
    }
}
