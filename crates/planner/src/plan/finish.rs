//! The plan of a placement: its stages and phases, bytes and seconds.

use super::{
    CpuFit, Device, DeviceKind, DeviceRates, Fit, Outcome, PartPlan, Phase, Plan, Planner, StagePlan,
    choose::{Chosen, Placed, index},
    spread::Share,
};
use crate::{
    cost::{Job, cpu, cuda, work},
    stage::Stage,
    tiers::Tier,
};

impl Planner {
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
            phases.push(self.phase(&chosen, stage, (number, placed)));
            let spread = if stage == Stage::Diffusion { self.parts(&chosen) } else { Vec::new() };
            if let Some((_, others)) = chosen.shares.split_first().filter(|_| stage == Stage::Diffusion) {
                phases.extend(others.iter().map(|share| self.phase(&chosen, stage, (share.device, &share.placed))));
            }
            stages.push(StagePlan {
                stage,
                device: device.name.clone(),
                fit: placed.fit,
                resident_bytes: placed.resident,
                peak_bytes: placed.peak(),
                seconds: self.seconds(job, (stage, placed), (device, turns), &chosen),
                rung: placed.rung,
                spread,
            });
        }
        let used = |device: &&Device| phases.iter().any(|phase: &Phase| phase.device == device.name);
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

    /// What is on a device while a stage works there.
    fn phase(&self, chosen: &Chosen, stage: Stage, (number, placed): (usize, &Placed)) -> Phase {
        let device = self.devices.get(number);
        // What the other stages of the device hold meanwhile.
        let others: u64 = if chosen.in_turn.get(number).copied().unwrap_or(false) {
            0
        } else {
            let on_card = device.is_some_and(|device| device.kind == DeviceKind::Cuda);
            let context = if on_card { cuda::CONTEXT_BYTES } else { 0 };
            let there = |other: &Stage| *other != stage && chosen.devices[index(*other)] == number;
            let spread = !chosen.shares.is_empty();
            let whole = Stage::ALL.into_iter().filter(|other| !(spread && *other == Stage::Diffusion));
            let of_stages = whole.filter(there).map(|other| &chosen.stages[index(other)]);
            let shares = chosen.shares.iter().filter(|share| stage != Stage::Diffusion && share.device == number);
            let all = of_stages.chain(shares.map(|share| &share.placed));
            all.map(|placed| placed.resident.saturating_sub(context)).sum()
        };
        Phase {
            device: device.map(|device| device.name.clone()).unwrap_or_default(),
            phase: stage,
            peak_bytes: placed.peak().saturating_add(others),
            usable_bytes: device.map_or(0, Device::usable),
        }
    }

    /// The devices that the transformer is spread over.
    fn parts(&self, chosen: &Chosen) -> Vec<PartPlan> {
        let part = |share: &Share| {
            Some(PartPlan {
                device: self.devices.get(share.device)?.name.clone(),
                first_block: share.part.blocks.start as u64,
                blocks: share.part.blocks.len() as u64,
                resident_blocks: share.part.resident as u64,
                peak_bytes: share.placed.peak(),
            })
        };
        chosen.shares.iter().filter_map(part).collect()
    }

    /// Bytes of blocks that one pass reads, since they do not stay.
    pub(super) fn moved_on_cpu(&self, chosen: &Chosen, stage: Stage, fit: &CpuFit) -> u64 {
        if stage == Stage::Diffusion && !chosen.shares.is_empty() {
            return self.moved(chosen, fit.precision);
        }
        let (blocks, _) = cpu::blocks(&self.table, stage, fit.precision);
        let away = fit.blocks.saturating_sub(fit.resident_blocks) as usize;
        blocks.iter().take(away).sum()
    }

    fn seconds(
        &self,
        job: &Job,
        (stage, placed): (Stage, &Placed),
        (device, turns): (&Device, bool),
        chosen: &Chosen,
    ) -> f64 {
        let shares = if stage == Stage::Diffusion { &chosen.shares[..] } else { &[] };
        // Of the transformer, the full ones: a cached pass needs the last block alone, which stays. Of the Llama, one for
        // each prompt.
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
                let moved = self.moved_on_cpu(chosen, stage, &fit);
                // What does not stay is read while another block computes.
                computing.max(moved as f64 * passes / device.rates.files)
            }
            Fit::Cuda(fit) => {
                let in_turn = |share: &&Share| chosen.in_turn.get(share.device) == Some(&true);
                let loaded = match shares {
                    [] if turns => placed.resident,
                    _ => shares.iter().filter(in_turn).map(|share| share.placed.resident).sum(),
                };
                let load = loaded as f64 / device.rates.files;
                let moved = match shares {
                    [] => cuda::weights(&self.table, stage, &fit).1,
                    _ => self.moved(chosen, fit.precision),
                };
                // Tokens go from card to card through the machine's memory: down and up.
                let hops = 2 * shares.len().saturating_sub(1) as u64 * cuda::passed_on(&self.table, job);
                let passing = hops as f64 * passes / device.rates.weights;
                // What is brought ahead comes while another block computes.
                load + passing + work.max(moved as f64 * passes / device.rates.weights)
            }
        }
    }
}
