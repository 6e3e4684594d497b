//! This machine's CPU, as the planner sees it.

use planner::{Stage, cost::cpu::Cpu};
use service_kit::config::Compute;

use crate::compute::ComputeByStage;

/// The CPU as each stage's code sees it.
pub(super) fn cpus(compute: ComputeByStage) -> [Cpu; 5] {
    let (threads, packs) = (model::ops::threads() as u64, model::ops::has_kernel());
    Stage::ALL.map(|stage| Cpu {
        threads,
        packs,
        value_bytes: match compute.of(stage.name()) {
            Compute::F32 => 4,
            Compute::Bf16 | Compute::F16 => 2,
        },
    })
}
