//! Speech to features.

use super::Heap;
use crate::{cost::Job, table::Whisper};

/// `AudioEncoder::encode`: 30 s at a time.
pub(super) fn encode(heap: &mut Heap, w: &Whisper, job: &Job) {
    const SECONDS: f64 = 30.0;
    let rows = w.positions;
    let done = ((job.seconds / SECONDS).ceil() as u64).saturating_sub(1);
    // What the pieces before gave, and the states of this one.
    heap.take(done * rows * (w.layers + 1) * w.width * 4);
    let mel = heap.take(2 * rows * w.bands * 4);
    // The columns that a convolution reads, its output, and the activation's copy.
    heap.pass(2 * rows * (3 * w.bands + 2 * w.width) * 4);
    heap.pass((2 * rows * w.width + rows * (3 * w.width + 2 * w.width)) * 4);
    let states = heap.take_tensor((w.layers + 1) * rows * w.width);
    let normed = heap.map(rows * w.width);
    let qkv: u64 = (0..3).map(|_| heap.linear(rows, &[w.width], w.width, false)).sum();
    let copies = heap.take_tensor(3 * rows * w.width);
    let head = 64.min(w.width);
    let seen = heap.attention(w.width / head.max(1), rows, rows, [head; 2]);
    heap.give(copies);
    let next = heap.take_tensor(2 * rows * w.width);
    let inner = heap.linear(rows, &[w.width], w.inner, false);
    let out = heap.linear(rows, &[w.inner], w.width, false);
    heap.give(normed + qkv + seen + next + inner + out);
    let stacked = heap.take_tensor((w.layers + 1) * rows * w.width);
    let f32 = heap.take((w.layers + 1) * rows * w.width * 4);
    heap.give(mel + states + stacked + f32);
}
