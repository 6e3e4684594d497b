//! The transformer over several devices: consecutive blocks on each, which work one after the other.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::{Prepared, rope::Rope};
use crate::{
    Error, Result, memory,
    weights::{Extent, Swap, swap},
};

/// A device, and how many of the transformer's blocks it has: those that follow the part's before.
#[derive(Debug, Clone)]
pub struct Part {
    /// Where they are computed.
    pub device: Device,
    /// How many they are, at least one.
    pub blocks: usize,
}

/// Consecutive blocks on one device.
#[derive(Debug)]
pub(super) struct Span {
    pub(super) device: Device,
    pub(super) blocks: Range<usize>,
    /// The weights of its blocks.
    pub(super) swap: Swap,
}

/// The blocks of each part, from the first block on.
///
/// Errors: a part has none, or they are not `count` together.
pub(super) fn ranges(parts: &[Part], count: usize) -> Result<Vec<Range<usize>>> {
    let mut first = 0;
    let ranges: Vec<Range<usize>> = parts
        .iter()
        .map(|part| {
            let begin = first;
            first += part.blocks;
            begin..first
        })
        .collect();
    if first != count || ranges.iter().any(Range::is_empty) {
        let each: Vec<usize> = parts.iter().map(|part| part.blocks).collect();
        let reason = format!("{each:?} blocks on {} devices, expected {count} and at least one on each", parts.len());
        return Err(Error::input("parts", reason));
    }
    Ok(ranges)
}

impl Span {
    pub(super) fn new(part: &Part, blocks: Range<usize>, extents: Vec<Extent>) -> Self {
        Self { device: part.device.clone(), blocks, swap: Swap::new(extents) }
    }
}

/// A tensor on a device; itself where it is there.
///
/// From card to card it goes through the machine's memory, as few machines have a shorter way.
pub(super) fn carried(tensor: &Tensor, device: &Device) -> candle_core::Result<Tensor> {
    if tensor.device().same_device(device) {
        return Ok(tensor.clone());
    }
    let tensor = match (tensor.device(), device) {
        (Device::Cpu, _) | (_, Device::Cpu) => tensor.clone(),
        _ => tensor.to_device(&Device::Cpu)?,
    };
    if !matches!(device, Device::Cpu) {
        memory::room(bytes(&tensor))?;
    }
    tensor.to_device(device)
}

/// Bytes of a tensor's values.
pub(super) fn bytes(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}

/// Where a pass is: the part that works, and what its blocks need on its device.
pub(super) struct Place<'a> {
    spans: &'a [Span],
    number: usize,
    pass: swap::Pass<'a>,
    pub(super) vec: Tensor,
    pub(super) rope: Rope,
    /// What was heard, and how much of it reaches each token; for the adapters.
    pub(super) heard: Option<(Tensor, Tensor)>,
}

impl<'a> Place<'a> {
    /// At the first part.
    pub(super) fn first(spans: &'a [Span], (vec, rope): (Tensor, Rope), prepared: &Prepared) -> Result<Self> {
        let heard = Some((prepared.audio.clone(), prepared.gate.clone()));
        Self::at(spans, 0, (vec, rope, heard))
    }

    /// At the last part, for its last block; nothing goes there but the conditioning vector.
    pub(super) fn last(spans: &'a [Span], vec: &Tensor, rope: impl FnOnce(&Device) -> Result<Rope>) -> Result<Self> {
        let number = spans.len().saturating_sub(1);
        let device = spans.get(number).map_or(&Device::Cpu, |span| &span.device);
        if number > 0 {
            memory::moved(number, 0);
        }
        Self::at(spans, number, (carried(vec, device)?, rope(device)?, None))
    }

    fn at(
        spans: &'a [Span],
        number: usize,
        (vec, rope, heard): (Tensor, Rope, Option<(Tensor, Tensor)>),
    ) -> Result<Self> {
        let span = spans.get(number).ok_or_else(|| Error::input("parts", "there is none"))?;
        Ok(Self { spans, number, pass: span.swap.pass(), vec, rope, heard })
    }

    fn span(&self) -> Option<&'a Span> {
        self.spans.get(self.number)
    }

    /// Goes to the part that has a block, where it is another one, and takes tensors there; waits for the block's weights.
    pub(super) fn enter<const N: usize>(&mut self, block: usize, tensors: [Tensor; N]) -> Result<[Tensor; N]> {
        let mut tensors = tensors;
        while self.span().is_some_and(|span| block >= span.blocks.end)
            && let Some(next) = self.spans.get(self.number + 1)
        {
            memory::moved(self.number + 1, tensors.iter().map(bytes).sum());
            for tensor in &mut tensors {
                *tensor = carried(tensor, &next.device)?;
            }
            let heard = match &self.heard {
                Some((audio, gate)) => Some((carried(audio, &next.device)?, carried(gate, &next.device)?)),
                None => None,
            };
            let (vec, rope) = (carried(&self.vec, &next.device)?, self.rope.carried(&next.device)?);
            *self = Self::at(self.spans, self.number + 1, (vec, rope, heard))?;
        }
        if let Some(span) = self.span() {
            self.pass.enter(block.saturating_sub(span.blocks.start));
        }
        Ok(tensors)
    }

    /// Says that a block was used.
    pub(super) fn leave(&mut self, block: usize) {
        if let Some(span) = self.span() {
            self.pass.leave(block.saturating_sub(span.blocks.start));
        }
    }

    /// Ends the pass, with so many bytes of results; the first part goes on with them.
    pub(super) fn end(self, results: usize) {
        if self.number > 0 {
            memory::moved(0, results);
        }
    }
}
