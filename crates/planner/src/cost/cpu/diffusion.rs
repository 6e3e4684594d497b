//! One pass of the transformer.

use super::{Cpu, Heap};
use crate::{
    cost::Job,
    table::{ModelTable, Transformer},
};

/// What a session keeps: the conditioning in f32, and features of full passes in the type of the pass.
pub(super) fn kept(table: &ModelTable, job: &Job, cpu: Cpu) -> u64 {
    let t = &table.transformer;
    let (h, w) = job.latent();
    let states = table.llava.tokens + table.llava.vision_positions - 1 - table.llava.crop.min(table.llava.tokens);
    let heard = (job.seconds * 50.0).ceil() as u64 * t.audio / 10;
    let conditioning = 4 * (heard + (t.latent + 1) * h * w + 2 * (states * t.text + t.pooled)) + 2 * 8 * states;
    let features = match job.caches() {
        true => job.branches * job.latent_frames * job.frame_tokens() * t.hidden * cpu.value_bytes,
        false => 0,
    };
    conditioning + features
}

/// `Model::predict` of one item.
pub(super) fn pass(heap: &mut Heap, table: &ModelTable, job: &Job) {
    let t = &table.transformer;
    let each = job.frame_tokens();
    let (tokens, image) = (job.window * each, job.image_tokens());
    let text = job.text_tokens(&table.llava);
    let states = table.llava.tokens + table.llava.vision_positions - 1 - table.llava.crop.min(table.llava.tokens);
    let (h, w) = job.latent();
    // The windows of features, cut from the speech, and the latents.
    let frames = job.window_frames();
    heap.take(frames * t.audio * 4);
    heap.take(job.window * t.latent * h * w * 4);
    heap.pass((job.seconds * 50.0).ceil() as u64 * t.audio / 10 * 4);
    prepare(heap, t, [job.window, each, frames]);
    refine(heap, t, states);

    let patches = heap.take_tensor(tokens * 4 * t.latent);
    let noisy = heap.linear(tokens, &[4 * t.latent], t.hidden, false);
    heap.give(patches);
    let added = heap.take_tensor(tokens * t.hidden);
    heap.give(noisy);
    let all = heap.take_tensor(image * t.hidden);
    heap.give(added);
    heap.take((image + text) * t.head * 4);
    for block in 0..t.double.min(2) {
        double(heap, t, [image, text]);
        if t.adapters > 0 && block == 0 {
            adapt(heap, t, [job.window, each]);
        }
    }
    let x = heap.take_tensor((image + text) * t.hidden);
    heap.give(all);
    single(heap, t, image + text);
    // The last layer works in f32.
    let wide = if heap.tensor(1) == 4 { 0 } else { heap.take(tokens * t.hidden * 4) };
    let out = heap.take_tensor((image + text) * t.hidden);
    let normed = heap.take(tokens * t.hidden * 4);
    heap.linear(tokens, &[t.hidden], 4 * t.latent, false);
    heap.take(3 * tokens * 4 * t.latent * 4);
    heap.give(normed + out + wide + x);
}

/// What does not change over the steps: reference tokens, what is added to each frame, the speech.
fn prepare(heap: &mut Heap, t: &Transformer, [window, each, frames]: [u64; 3]) {
    for _ in 0..2 {
        heap.linear(each, &[4 * t.latent], t.hidden, false);
    }
    let first = heap.linear(frames, &[t.audio], t.audio_inner, false);
    let second = heap.linear(frames, &[t.audio_inner], t.audio_inner, false);
    let third = heap.linear(frames, &[t.audio_inner], t.audio_tokens * t.hidden, false);
    let normed = heap.map(frames * t.audio_tokens * t.hidden);
    heap.give(first + second + third);
    heap.take_tensor(4 * window * t.audio_tokens * t.hidden);
    heap.give(normed);
}

/// The refiner, over all rows of the text.
fn refine(heap: &mut Heap, t: &Transformer, rows: u64) {
    let mask = heap.take(rows * rows * 4);
    let mut x = heap.linear(rows, &[t.text], t.hidden, false);
    for _ in 0..t.refiner.min(2) {
        let normed = heap.map(rows * t.hidden);
        let qkv = heap.linear(rows, &[t.hidden], 3 * t.hidden, false);
        heap.give(normed);
        // Copies of the heads, which lie apart, and of the mask.
        let copies = heap.take_tensor(3 * rows * t.hidden) + heap.take(mask);
        let seen = heap.attention(t.hidden / t.head.max(1), rows, rows, [t.head; 2]);
        heap.give(copies);
        let next = heap.linear(rows, &[t.hidden], t.hidden, true);
        let normed = heap.map(rows * t.hidden);
        let inner = heap.linear(rows, &[t.hidden], t.refiner_inner, false);
        heap.give(normed);
        let last = heap.linear(rows, &[t.refiner_inner], t.hidden, true);
        heap.give(qkv + seen + next + inner + x);
        x = last;
    }
    heap.give(mask);
}

/// Tokens that pass a block's wide layers at once, as `model::diffusion` has them.
const TOKENS_AT_ONCE: u64 = 8192;

/// Takes what the other pieces of the tokens gave, where they are more than one; at the end all are joined.
fn pieces(heap: &mut Heap, rows: u64, width: u64) -> u64 {
    match rows.saturating_sub(TOKENS_AT_ONCE) {
        0 => 0,
        others => {
            let whole = heap.tensor(rows * width);
            heap.pass(2 * whole);
            heap.take_tensor(others * width)
        }
    }
}

/// A double block; its inputs are taken already, and what it gives takes their place.
fn double(heap: &mut Heap, t: &Transformer, [image, text]: [u64; 2]) {
    let h = t.hidden;
    let before = |heap: &mut Heap, rows: u64| {
        let normed = heap.map(rows * h);
        let qkv = heap.linear(rows, &[h], 3 * h, false);
        let heads = heap.map(rows * 3 * h);
        heap.give(normed + qkv);
        heads
    };
    let own = before(heap, image) + before(heap, text);
    let joined = heap.take_tensor((image + text) * 3 * h);
    heap.give(own);
    let seen = heap.attention(h / t.head.max(1), image + text, image + text, [t.head; 2]);
    heap.give(joined);
    let after = |heap: &mut Heap, rows: u64| {
        let x = heap.linear(rows, &[h], h, true);
        let others = pieces(heap, rows, h);
        let piece = rows.min(TOKENS_AT_ONCE);
        let normed = heap.map(piece * h);
        let inner = heap.linear(piece, &[h], t.inner, false);
        heap.give(normed);
        let out = heap.linear(piece, &[t.inner], h, true);
        heap.give(inner + x);
        others + out
    };
    let out = after(heap, image) + after(heap, text);
    heap.give(seen + out);
}

/// An audio adapter, and what is done with what it heard.
fn adapt(heap: &mut Heap, t: &Transformer, [window, each]: [u64; 2]) {
    let tokens = window * each;
    let normed = heap.map(tokens * t.hidden);
    let q = heap.linear(tokens, &[t.hidden], t.adapter, false);
    heap.give(normed);
    let seen = heap.attention(window, each, 4 * t.audio_tokens, [t.adapter; 2]);
    let heard = heap.linear(tokens, &[t.adapter], t.hidden, false);
    heap.give(q + seen);
    let sum = heap.take_tensor(2 * tokens * t.hidden);
    heap.give(heard + sum);
}

/// A single block; its input is taken already.
fn single(heap: &mut Heap, t: &Transformer, rows: u64) {
    let h = t.hidden;
    let normed = heap.map(rows * h);
    let qkv = heap.linear(rows, &[h], 3 * h, false);
    let heads = heap.map(rows * 3 * h);
    heap.give(normed + qkv);
    let seen = heap.attention(h / t.head.max(1), rows, rows, [t.head; 2]);
    heap.give(heads);
    let others = pieces(heap, rows, h);
    let piece = rows.min(TOKENS_AT_ONCE);
    let normed = heap.map(piece * h);
    let inner = heap.linear(piece, &[h], t.inner, false);
    let out = heap.linear(piece, &[h, t.inner], h, true);
    heap.give(normed + inner + out + others + seen);
}
