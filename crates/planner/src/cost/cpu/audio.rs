//! Speech to features.

use super::Heap;
use crate::{cost::Job, table::Whisper};

/// Seconds that are heard at once, samples of them with half a transform before and behind, and features a second.
pub(super) const SECONDS: f64 = 30.0;
const SAMPLES: u64 = 480_400;
const FEATURES: f64 = 50.0;

/// `AudioEncoder::encode`: 30 s at a time.
pub(super) fn encode(heap: &mut Heap, w: &Whisper, job: &Job) {
    let rows = w.positions;
    let all = (w.layers + 1) * w.width;
    let done = ((job.seconds / SECONDS).ceil() as u64).saturating_sub(1);
    let heard = (job.seconds * FEATURES).ceil() as u64;
    // What the pieces before gave.
    let before = heap.take(done * rows * all * 4);
    // The spectrum is made in f64.
    let mel = heap.take(2 * rows * w.bands * 4);
    heap.pass(SAMPLES * 4 + 2 * rows * w.bands * 8);
    heap.heard();
    let embedded = heap.in_f32(|heap| heap.undecoded(|heap| convolve(heap, w)));
    let rounded = heap.rounded(rows * w.width);
    heap.give(if rounded > 0 { embedded } else { 0 });
    // The last layer, beside the states of those before; of them the embedding is counted already.
    let states = heap.take_tensor((w.layers - 1) * rows * w.width);
    let last = heap.counted(w.layers, |heap| layer(heap, rows, [w.width, w.inner, w.heads]));
    let normed = heap.map(rows * w.width);
    let stacked = heap.take_tensor(rows * all);
    let wide = if heap.tensor(1) == 4 { 0 } else { heap.take(heard.saturating_sub(done * rows).min(rows) * all * 4) };
    heap.give(mel + if rounded > 0 { rounded } else { embedded } + states + last + normed);
    // All pieces together, then as bytes.
    let joined = if done > 0 { heap.take(heard * all * 4) } else { 0 };
    heap.give(if done > 0 { before + stacked + wide } else { 0 });
    heap.pass(2 * heard * all * 4);
    heap.give(joined);
}

/// Both convolutions and the table of positions: `(positions, width)`.
fn convolve(heap: &mut Heap, w: &Whisper) -> u64 {
    let rows = w.positions;
    let turned = heap.take(2 * rows * w.bands * 4);
    let padded = heap.take((2 * rows + 2) * w.bands * 4);
    let first = heap.linear(2 * rows, &[w.bands; 3], w.width, false);
    heap.give(padded + turned);
    let padded = heap.take((2 * rows + 2) * w.width * 4);
    // Every second row, laid out.
    let laid = heap.take(rows * w.width * 4);
    let second = heap.linear(rows, &[w.width; 3], w.width, false);
    heap.give(laid + padded + first);
    let sum = heap.take(rows * w.width * 4);
    heap.give(second);
    sum
}

/// One layer of Whisper or of a CLIP; its input is taken already, and what it makes stays to its end.
pub(super) fn layer(heap: &mut Heap, rows: u64, [width, inner, heads]: [u64; 3]) -> u64 {
    let normed = heap.map(rows * width);
    let qkv: u64 = (0..3).map(|_| heap.linear(rows, &[width], width, false)).sum();
    let seen = heap.attention(heads, (rows, rows), [width / heads.max(1); 2], true);
    let out = heap.linear(rows, &[width], width, false);
    let next = heap.take_tensor(rows * width);
    heap.give(out + seen);
    let second = heap.map(rows * width);
    let inner_values = heap.linear(rows, &[width], inner, false);
    heap.give(second);
    let last = heap.linear(rows, &[inner], width, false);
    let sum = heap.take_tensor(rows * width);
    heap.give(normed + qkv + next + inner_values + last);
    sum
}
