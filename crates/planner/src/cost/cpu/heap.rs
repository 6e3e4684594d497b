//! A heap on which operations take and give back, as `model::ops` does it, and what they do meanwhile.

use super::{Cpu, Ops};

/// Tiles of the products and of attention, as `model::ops` has them.
const MR: u64 = 12;
const NR: u64 = 32;
const KC: u64 = 384;
const COLUMNS: u64 = 256;
const PANEL: u64 = 1 << 20;
const PIECE: u64 = 16 << 20;
const FEWEST: u64 = 256;
pub(super) const QUERIES: u64 = 240;
const KEYS: u64 = 256;
const APART: u64 = 16;
const POSITIONS: u64 = 256;
/// Bytes of an f32.
const WIDE: u64 = 4;

/// How often something is done; a part of once where not all of it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times(pub(super) f64);

impl From<u64> for Times {
    fn from(times: u64) -> Self {
        Self(times as f64)
    }
}

/// Bytes on the heap now, and the most so far.
#[derive(Debug)]
pub(super) struct Heap {
    cpu: Cpu,
    /// Whether weights are decoded, panel by panel, before they are multiplied.
    decodes: bool,
    now: u64,
    most: u64,
    /// How often what is followed now is done.
    times: f64,
    ops: Ops,
}

impl Heap {
    pub(super) fn new(cpu: Cpu, decodes: bool) -> Self {
        Self { cpu, decodes, now: 0, most: 0, times: 1.0, ops: Ops::default() }
    }

    /// The most bytes that were on it.
    pub(super) fn peak(&self) -> u64 {
        self.most
    }

    /// What was done.
    pub(super) fn ops(&self) -> Ops {
        self.ops
    }

    fn did(&mut self, ops: Ops) {
        self.ops = self.ops.plus(ops.times(self.times));
    }

    /// Notes that a piece of 30 s of speech became a spectrum.
    pub(super) fn heard(&mut self) {
        self.did(Ops { spectra: 1.0, ..Ops::default() });
    }

    /// Notes that faces were looked for among so many pixels.
    pub(super) fn looked(&mut self, pixels: u64) {
        self.did(Ops { looked: pixels as f64, ..Ops::default() });
    }

    /// Follows once what is done so many times, one after the other on the same memory.
    pub(super) fn counted<R>(&mut self, times: impl Into<Times>, f: impl FnOnce(&mut Self) -> R) -> R {
        let before = self.times;
        self.times *= times.into().0;
        let result = f(self);
        self.times = before;
        result
    }

    /// Follows the first and the second of so many blocks, of which all others are like the second.
    pub(super) fn repeat(&mut self, blocks: u64, mut f: impl FnMut(&mut Self, u64)) {
        for block in 0..blocks.min(2) {
            let times = if block == 0 { 1 } else { blocks - 1 };
            self.counted(times, |heap| f(heap, block));
        }
    }

    /// Follows what is small beside everything else on the heap.
    pub(super) fn aside(&mut self, f: impl FnOnce(&mut Self)) {
        let before = (self.now, self.most);
        f(self);
        (self.now, self.most) = before;
    }

    /// How much longer work takes because its pieces are not shared out evenly among the threads.
    fn uneven(&self, pieces: u64) -> f64 {
        let threads = self.cpu.threads.max(1);
        (pieces.div_ceil(threads) * threads) as f64 / pieces.max(1) as f64
    }

    /// Values of some rows as the kernel computes them: whole tiles.
    fn tiled(&self, rows: u64, tile: u64) -> f64 {
        (if self.cpu.packs { rows.next_multiple_of(tile) } else { rows }) as f64
    }

    /// Bytes of a tensor of so many values.
    pub(super) fn tensor(&self, values: u64) -> u64 {
        values * self.cpu.value_bytes
    }

    /// Takes bytes and says how many.
    pub(super) fn take(&mut self, bytes: u64) -> u64 {
        self.now += bytes;
        self.most = self.most.max(self.now);
        self.did(Ops { moved: bytes as f64, ..Ops::default() });
        bytes
    }

    /// Takes a tensor, which an operation makes of another.
    pub(super) fn take_tensor(&mut self, values: u64) -> u64 {
        let bytes = self.tensor(values);
        self.did(Ops { calls: 1.0, moved: bytes as f64, ..Ops::default() });
        self.take(bytes)
    }

    /// Takes a copy in the stage's type of f32 values, where that is another one.
    pub(super) fn rounded(&mut self, values: u64) -> u64 {
        if self.cpu.value_bytes == WIDE { 0 } else { self.take_tensor(values) }
    }

    /// Gives back bytes that were taken.
    pub(super) fn give(&mut self, bytes: u64) {
        self.now = self.now.saturating_sub(bytes);
    }

    /// Takes bytes for a moment.
    pub(super) fn pass(&mut self, bytes: u64) {
        self.take(bytes);
        self.give(bytes);
    }

    /// An f32 copy of a tensor's values, where it has another type.
    fn widened(&self, values: u64) -> u64 {
        if self.cpu.value_bytes == WIDE { 0 } else { values * WIDE }
    }

    /// The left operand of a product, laid out.
    fn packed(&self, rows: u64, depth: u64) -> u64 {
        if self.cpu.packs { rows.next_multiple_of(MR) * depth * WIDE } else { 0 }
    }

    /// A thread's part of the right operand of a product with so many columns, laid out.
    fn room(&self, depth: u64, columns: u64) -> u64 {
        if self.cpu.packs { (columns.next_multiple_of(NR) * depth.min(KC) + columns) * WIDE } else { 0 }
    }

    /// Runs `f` where weights are on the heap as they are needed.
    pub(super) fn undecoded<R>(&mut self, f: impl FnOnce(&mut Self) -> R) -> R {
        let before = std::mem::replace(&mut self.decodes, false);
        let result = f(self);
        self.decodes = before;
        result
    }

    /// Runs `f` where values are f32 whatever the stage computes in.
    pub(super) fn in_f32<R>(&mut self, f: impl FnOnce(&mut Self) -> R) -> R {
        let before = std::mem::replace(&mut self.cpu.value_bytes, WIDE);
        let result = f(self);
        self.cpu.value_bytes = before;
        result
    }

    /// Turns f32 values that were taken into a tensor.
    fn settle(&mut self, values: u64) -> u64 {
        if self.cpu.value_bytes == WIDE {
            return values * WIDE;
        }
        let bytes = self.take_tensor(values);
        self.give(values * WIDE);
        bytes
    }

    /// A layer: inputs side by side, and a residual connection or none.
    pub(super) fn linear(&mut self, rows: u64, widths: &[u64], out: u64, residual: bool) -> u64 {
        self.take(rows * out * WIDE);
        let columns: u64 = widths.iter().sum();
        let most = (PANEL / columns.max(1)).next_multiple_of(32).clamp(32, COLUMNS);
        let panel = out.div_ceil(self.cpu.threads.max(1)).next_multiple_of(32).clamp(32, most).min(out);
        let panels = out.div_ceil(panel.max(1));
        let threads = self.cpu.threads.min(panels);
        let flops = 2.0 * self.tiled(rows, MR) * columns as f64 * self.tiled(out, NR) * self.uneven(panels);
        self.did(Ops { calls: 1.0, products: flops, moved: (rows * columns * WIDE) as f64, ..Ops::default() });
        for (i, width) in widths.iter().enumerate() {
            // The input is laid out piece by piece.
            let piece = (PIECE / width.max(&1)).max(FEWEST).min(rows);
            let mut extra = self.widened(rows * width) + self.packed(piece, *width);
            if residual && i + 1 == widths.len() {
                extra += self.widened(rows * out);
            }
            let decoded = if self.decodes { panel * columns * WIDE } else { 0 };
            extra += threads * (decoded + self.room(*width, panel));
            self.pass(extra + 2 * out * WIDE);
        }
        self.settle(rows * out)
    }

    /// An operation that gives as many values as it takes: a norm, or the split into heads.
    pub(super) fn map(&mut self, values: u64) -> u64 {
        self.take(values * WIDE);
        self.did(Ops { calls: 1.0, moved: (values * WIDE) as f64, ..Ops::default() });
        let extra = self.widened(values);
        self.pass(extra);
        self.settle(values)
    }

    /// Attention; gives `queries · heads · value_width` values. Heads that lie `apart`, as a split leaves them, are
    /// laid out side by side first.
    pub(super) fn attention(&mut self, heads: u64, (queries, keys): (u64, u64), widths: [u64; 2], apart: bool) -> u64 {
        let [d, dv] = widths;
        let values = heads * queries * dv;
        self.take(values * WIDE);
        let laid = if apart { self.take_tensor(heads * (queries * d + keys * (d + dv))) } else { 0 };
        let inputs =
            self.widened(heads * queries * d) + self.widened(heads * keys * d) + self.widened(heads * keys * dv);
        let (rows, columns) = (QUERIES.min(queries), KEYS.min(keys));
        let scores = rows.next_multiple_of(MR) * (columns + APART);
        let mut room = (scores + rows * (dv + 2)) * WIDE;
        room += self.packed(rows, d) + self.room(d, columns).max(self.room(columns, dv));
        let tasks = heads * queries.div_ceil(QUERIES);
        let threads = self.cpu.threads.min(tasks);
        let uneven = self.uneven(tasks);
        let (each, all) = (self.tiled(queries, MR) * heads as f64, self.tiled(keys, NR));
        self.did(Ops {
            calls: 1.0,
            attention: 2.0 * each * (all * d as f64 + keys as f64 * self.tiled(dv, NR)) * uneven,
            scores: (heads * queries * keys) as f64 * uneven,
            moved: (heads * (queries * d + keys * (d + dv)) * WIDE) as f64,
            ..Ops::default()
        });
        self.pass(inputs + threads * room);
        self.give(laid);
        self.settle(values)
    }

    /// A convolution of the VAE to `out` channels at `[frames, rows, columns]` positions.
    pub(super) fn convolution(&mut self, inp: (u64, u64), out: u64, at: [u64; 3], residual: bool, kernel: u64) -> u64 {
        let (channels, inp_positions) = inp;
        let [frames, rows, columns] = at;
        let positions = frames * rows * columns;
        let depth = channels * kernel.pow(3);
        self.take(out * positions * WIDE);
        let tasks = positions.div_ceil(POSITIONS);
        let threads = self.cpu.threads.min(tasks);
        let uneven = self.uneven(tasks);
        self.did(Ops {
            calls: 1.0,
            convolutions: 2.0 * positions as f64 * depth as f64 * self.tiled(out, MR) * uneven,
            unfolded: (positions * depth) as f64 * uneven,
            moved: (channels * inp_positions * WIDE) as f64,
            ..Ops::default()
        });
        let columns = POSITIONS.min(positions);
        // Where the kernel is not to be had, a thread unfolds its positions as a whole.
        let room = if self.cpu.packs { self.room(depth, columns) } else { depth * columns * WIDE };
        let extra = self.widened(channels * inp_positions)
            + self.widened(out * depth)
            + self.packed(out, depth)
            + threads * room;
        self.pass(extra);
        if residual {
            self.did(Ops { moved: (out * positions * WIDE) as f64, ..Ops::default() });
            let extra = self.widened(out * positions);
            self.pass(extra);
        }
        self.settle(out * positions)
    }
}
