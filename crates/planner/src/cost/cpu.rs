//! Bytes on a CPU's heap, by following the networks' code: what each operation takes, and when it is given back.
//!
//! Weights stay in their mapped files and are not counted. The heap holds vectors, tables and convolutions, which are
//! copied when a stage is opened, and activations. In 16 bits tensors are half as large, but every operation widens its
//! inputs and gives f32 first.

mod audio;
mod diffusion;
mod heap;
mod text;
mod vae;

use self::heap::Heap;
use super::Job;
use crate::{
    stage::Stage,
    table::{ModelTable, Network},
};

/// A CPU as the networks' code sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpu {
    /// Threads that compute.
    pub threads: u64,
    /// Whether products lay out their operands for a kernel of our own (AVX-512).
    pub packs: bool,
    /// Bytes of a value between operations: 4, or 2 where a stage computes in 16 bits.
    pub value_bytes: u64,
}

/// What a stage needs of the heap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// What it holds once it is open.
    pub resident: u64,
    /// What it keeps of a generation between its calls.
    pub kept: u64,
    /// What it takes on top while it works.
    pub work: u64,
}

impl Need {
    /// The most that the stage's meter shows.
    #[must_use]
    pub fn peak(&self) -> u64 {
        self.resident + self.kept + self.work
    }
}

/// What a stage needs of the heap for a job.
#[must_use]
pub fn need(table: &ModelTable, stage: Stage, job: &Job, cpu: Cpu) -> Need {
    let plain = |network: &Network| network.stage() == stage && cpu.value_bytes == 4;
    let mut heap = Heap::new(cpu, !table.in_f32.iter().any(plain));
    let kept = match stage {
        Stage::AudioEncoder => {
            audio::encode(&mut heap, &table.whisper, job);
            0
        }
        Stage::TextEncoder => {
            text::encode(&mut heap, table, job);
            0
        }
        Stage::ImageEncoder => {
            vae::encode(&mut heap, &table.vae, job);
            0
        }
        Stage::Diffusion => {
            diffusion::pass(&mut heap, table, job);
            diffusion::kept(table, job, cpu)
        }
        Stage::VaeDecode => {
            vae::decode(&mut heap, &table.vae, job);
            0
        }
    };
    Need { resident: resident(table, stage, cpu), kept, work: heap.peak() }
}

fn resident(table: &ModelTable, stage: Stage, cpu: Cpu) -> u64 {
    let values = |part: &crate::table::Part| {
        // The convolutions before Whisper are f32 in any case.
        let each = if part.network == Network::Whisper { 4 } else { cpu.value_bytes };
        part.heap.saturating_mul(part.count).saturating_mul(each)
    };
    table.of(stage).map(values).fold(table.tables_of(stage), u64::saturating_add)
}
