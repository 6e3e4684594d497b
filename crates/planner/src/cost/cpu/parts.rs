//! What the transformer needs of each device that has some of its blocks.

use std::{cell::RefCell, collections::BTreeMap, ops::Range};

use super::{Cpu, Heap, Need, Pass, diffusion};
use crate::{
    cost::{Job, spread},
    stage::Stage,
    table::{ModelTable, Network},
};

/// What a part's work depends on: whether it is the first and the last one, and what blocks it has.
type Kind = (bool, bool, [u64; 2], bool, bool);

/// What the parts of the transformer need of the heap for a job. Parts that are alike are followed once.
#[derive(Debug)]
pub struct PartNeeds<'a> {
    table: &'a ModelTable,
    job: &'a Job,
    cpu: Cpu,
    /// Bytes that the blocks before each hold from their opening on, and all of them.
    held: Vec<u64>,
    /// What is held besides blocks.
    beside: u64,
    works: RefCell<BTreeMap<Kind, u64>>,
}

impl<'a> PartNeeds<'a> {
    /// Of the transformer of a model, as a CPU runs it.
    #[must_use]
    pub fn new(table: &'a ModelTable, job: &'a Job, cpu: Cpu) -> Self {
        let (mut held, mut beside) = (vec![0u64], table.tables_of(Stage::Diffusion));
        for part in table.of(Stage::Diffusion) {
            let bytes = part.heap.saturating_mul(cpu.value_bytes);
            if part.swaps() {
                let last = held.last().copied().unwrap_or(0);
                held.extend((1..=part.count).map(|blocks| last.saturating_add(bytes.saturating_mul(blocks))));
            } else {
                beside = beside.saturating_add(bytes.saturating_mul(part.count));
            }
        }
        Self { table, job, cpu, held, beside, works: RefCell::default() }
    }

    /// Of a device that has some of the blocks, where others have the rest.
    #[must_use]
    pub fn of(&self, blocks: &Range<usize>) -> Need {
        let held = |blocks: usize| self.held.get(blocks).or(self.held.last()).copied().unwrap_or(0);
        let first = blocks.start == 0;
        Need {
            resident: (held(blocks.end) - held(blocks.start)).saturating_add(if first { self.beside } else { 0 }),
            kept: if first { diffusion::kept(self.table, self.job, self.cpu) } else { 0 },
            work: self.work(blocks),
        }
    }

    fn work(&self, blocks: &Range<usize>) -> u64 {
        let t = &self.table.transformer;
        let all = t.double + t.single;
        let (begin, end) = ((blocks.start as u64).min(all), (blocks.end as u64).min(all));
        let kinds = [end.min(t.double) - begin.min(t.double), end.max(t.double) - begin.max(t.double)];
        let adapts = spread::adapters(t, blocks) > 0;
        let kind = (begin == 0, end == all, kinds.map(|count| count.min(2)), adapts, end >= t.double);
        if let Some(known) = self.works.borrow().get(&kind) {
            return *known;
        }
        let parts: Vec<u64> = [begin, end - begin, all - end].into_iter().filter(|blocks| *blocks > 0).collect();
        let plain = self.cpu.value_bytes == 4 && self.table.in_f32.contains(&Network::Transformer);
        let mut heap = Heap::new(self.cpu, !plain);
        let works = diffusion::pass_over(&mut heap, t, &Pass::of(self.table, self.job), &parts);
        let work = works.get(usize::from(begin > 0)).copied().unwrap_or(0);
        self.works.borrow_mut().insert(kind, work);
        work
    }
}
