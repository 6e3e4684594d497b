//! Bytes on a CPU's heap, by following the networks' code: what each operation takes, and when it is given back.
//!
//! Weights stay in their mapped files and are not counted. The heap holds vectors, tables and convolutions, which are
//! copied when a stage is opened, and activations. In 16 bits tensors are half as large, but every operation widens its
//! inputs and gives f32 first.

mod audio;
mod diffusion;
mod heap;
mod ops;
mod text;
mod vae;

use self::heap::Heap;
pub use self::{
    diffusion::Pass,
    ops::{Ops, Pace, around},
};
use super::Job;
use crate::{
    precision::Precision,
    size::PictureSize,
    stage::Stage,
    table::{Clip, Llava, ModelTable, Network, Transformer, Vae},
};

/// Queries that attention takes at once, as `model::ops` has them.
pub const QUERIES: u64 = heap::QUERIES;
pub use self::diffusion::TOKENS_AT_ONCE;

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
    need_in_tiles((table, &table.vae), stage, job, cpu)
}

/// As [`need`], with the decoder in tiles of a VAE of its own.
#[must_use]
pub fn need_in_tiles((table, vae): (&ModelTable, &Vae), stage: Stage, job: &Job, cpu: Cpu) -> Need {
    let plain = |network: &Network| network.stage() == stage && cpu.value_bytes == 4;
    let mut heap = Heap::new(cpu, !table.in_f32.iter().any(plain));
    let kept = match stage {
        Stage::AudioEncoder => {
            audio::encode(&mut heap, &table.whisper, job);
            0
        }
        Stage::TextEncoder => {
            text::encode(&mut heap, (&table.llava, &table.clip), job.size, job.text_tokens(&table.llava));
            0
        }
        Stage::ImageEncoder => {
            vae::encode(&mut heap, &table.vae, job);
            0
        }
        Stage::Diffusion => {
            diffusion::pass(&mut heap, &table.transformer, &Pass::of(table, job));
            diffusion::kept(table, job, cpu)
        }
        Stage::VaeDecode => {
            vae::decode(&mut heap, vae, job);
            0
        }
    };
    Need { resident: resident(table, stage, cpu), kept, work: heap.peak() }
}

/// What the networks of a stage do over the whole of a job, besides decoding their weights.
#[must_use]
pub fn ops(table: &ModelTable, stage: Stage, job: &Job, cpu: Cpu) -> Ops {
    let mut heap = Heap::new(cpu, true);
    match stage {
        Stage::AudioEncoder => {
            let pieces = (job.seconds / audio::SECONDS).ceil().max(1.0) as u64;
            heap.counted(pieces, |heap| audio::encode(heap, &table.whisper, job));
        }
        Stage::TextEncoder => {
            text::encode(&mut heap, (&table.llava, &table.clip), job.size, job.text_tokens(&table.llava));
        }
        Stage::ImageEncoder => vae::look(&mut heap, &table.vae, job),
        Stage::Diffusion => {
            let ((full, cached), t) = (job.passes(), &table.transformer);
            let pass = Pass::of(table, job);
            heap.counted(full, |heap| diffusion::pass(heap, t, &pass));
            heap.counted(cached, |heap| diffusion::cached(heap, t, &pass));
        }
        Stage::VaeDecode => vae::show(&mut heap, &table.vae, job),
    }
    heap.ops()
}

/// Bytes that one pass of the transformer takes besides what its stage holds and keeps.
#[must_use]
pub fn pass_bytes(transformer: &Transformer, pass: &Pass, cpu: Cpu) -> u64 {
    let mut heap = Heap::new(cpu, true);
    diffusion::pass(&mut heap, transformer, pass);
    heap.peak()
}

/// Bytes that the encoding of a prompt of so many tokens takes besides what its stage holds.
#[must_use]
pub fn prompt_bytes(networks: (&Llava, &Clip), size: PictureSize, prompt_tokens: u64, cpu: Cpu) -> u64 {
    let mut heap = Heap::new(cpu, true);
    text::encode(&mut heap, networks, size, networks.0.rows(prompt_tokens));
    heap.peak()
}

/// How many of a network's blocks, the last ones, stay in `room` bytes with the one that computes and the one that is
/// read meanwhile; all of them where they fit.
///
/// - `blocks`: bytes of each, in the order in which a pass needs them
#[must_use]
pub fn resident_blocks(blocks: &[u64], room: u64) -> usize {
    if blocks.iter().fold(0, |sum: u64, block| sum.saturating_add(*block)) <= room {
        return blocks.len();
    }
    let moving = blocks.iter().max().copied().unwrap_or(0).saturating_mul(2);
    let mut left = room.saturating_sub(moving);
    let stays = |block: &&u64| match left.checked_sub(**block) {
        Some(less) => {
            left = less;
            true
        }
        None => false,
    };
    blocks.iter().rev().take_while(stays).count()
}

/// Bytes in its files of each of a stage's blocks, in the order in which a pass needs them, and of all that is in no
/// block.
#[must_use]
pub fn blocks(table: &ModelTable, stage: Stage, precision: Precision) -> (Vec<u64>, u64) {
    let (mut blocks, mut others) = (Vec::new(), 0u64);
    for part in table.of(stage) {
        let bytes = part.bytes(precision);
        match part.swaps() {
            true => blocks.extend((0..part.count).map(|_| bytes)),
            false => others = others.saturating_add(bytes.saturating_mul(part.count)),
        }
    }
    (blocks, others)
}

fn resident(table: &ModelTable, stage: Stage, cpu: Cpu) -> u64 {
    let values = |part: &crate::table::Part| {
        // The convolutions before Whisper are f32 in any case.
        let each = if part.network == Network::Whisper { 4 } else { cpu.value_bytes };
        part.heap.saturating_mul(part.count).saturating_mul(each)
    };
    table.of(stage).map(values).fold(table.tables_of(stage), u64::saturating_add)
}
