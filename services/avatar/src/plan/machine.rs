//! This machine, as the planner sees it.

use planner::{Bytes, Stage, cost::cpu::Cpu};
use service_kit::config::Compute;

use crate::{compute::ComputeByStage, failure::Failure};

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

/// All memory, and what is available of it; a container's limit counts.
pub(super) fn memory() -> Result<(Bytes, Bytes), Failure> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|e| Failure {
        advice: Some("name it: --ram BYTES, or --vram BYTES for a card"),
        ..Failure::local("the memory of this machine cannot be read", e)
    })?;
    let limit = number("/sys/fs/cgroup/memory.max");
    let used = number("/sys/fs/cgroup/memory.current").unwrap_or(0);
    let total = field(&text, "MemTotal").unwrap_or(0);
    let available = field(&text, "MemAvailable").unwrap_or(0);
    let bounded = |bytes: u64, limit: Option<u64>| limit.map_or(bytes, |limit| bytes.min(limit));
    Ok((Bytes(bounded(total, limit)), Bytes(bounded(available, limit.map(|limit| limit.saturating_sub(used))))))
}

fn number(file: &str) -> Option<u64> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// A line `name:   123 kB`, in bytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_of_the_systems_table_is_read_in_bytes() {
        let text = "MemTotal:        2048 kB\nMemAvailable:    1024 kB\n";
        assert_eq!((field(text, "MemTotal"), field(text, "MemAvailable")), (Some(2 << 20), Some(1 << 20)));
        assert_eq!((field(text, "Mem"), field("MemTotal: x", "MemTotal")), (None, None));
    }
}
