//! Random tensors that depend on nothing but seed, name and position.

use std::ops::Range;

use crate::{blueprint::Spec, convert::stream::Rows};

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's finaliser: a bijection that spreads every input bit over the output.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A source of values; each name opens its own stream.
#[derive(Clone, Copy)]
pub(super) struct Values(u64);

impl Values {
    pub(super) fn new(seed: u64) -> Self {
        Self(mix(seed.wrapping_add(GOLDEN)))
    }

    /// The source for one part, independent of all others.
    pub(super) fn part(self, name: &str) -> Self {
        // FNV-1a, so that names which share letters still differ.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        Self(mix(self.0 ^ hash))
    }

    /// Value `index`, uniform in -1..1 with 24 bits.
    fn at(self, index: u64) -> f32 {
        let bits = mix(self.0.wrapping_add((index + 1).wrapping_mul(GOLDEN))) >> 40;
        bits as f32 / (1 << 23) as f32 - 1.0
    }
}

/// One tensor's values, made whenever they are asked for.
pub(super) struct Random {
    source: Values,
    rows: usize,
    columns: usize,
    mean: f32,
    scale: f32,
}

impl Random {
    pub(super) fn new(values: Values, spec: &Spec) -> Self {
        let rows = if spec.shape.len() < 2 { 1 } else { spec.shape[0] };
        let columns = spec.parameters().checked_div(rows).unwrap_or(0);
        // A uniform value in -1..1 has the standard deviation 1/sqrt(3).
        let scale = spec.deviation * 3f32.sqrt();
        Self { source: values.part(&spec.name), rows, columns, mean: spec.mean, scale }
    }
}

impl Rows for Random {
    fn sides(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    fn fill(&self, rows: Range<usize>, out: &mut [f32]) {
        let first = (rows.start * self.columns) as u64;
        for (i, out) in (first..).zip(out) {
            *out = self.mean + self.scale * self.source.at(i);
        }
    }
}
