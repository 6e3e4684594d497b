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
    let states = table.llava.states();
    let heard = (job.seconds * 50.0).ceil() as u64 * t.audio / 10;
    let conditioning = 4 * (heard + (t.latent + 1) * h * w + 2 * (states * t.text + t.pooled)) + 2 * 8 * states;
    let features = match job.caches() {
        true => job.branches * job.latent_frames * job.frame_tokens() * t.hidden * cpu.value_bytes,
        false => 0,
    };
    conditioning + features
}

/// One pass of the transformer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// Latent frames.
    pub window: u64,
    /// Rows and columns of the latents.
    pub latent: [u64; 2],
    /// Rows of the text states, and of these the valid ones.
    pub text: [u64; 2],
    /// Features of the whole speech, one every 20 ms.
    pub heard: u64,
    /// Whether its features are kept.
    pub keeps: bool,
}

impl Pass {
    /// The full passes of a job.
    pub(crate) fn of(table: &ModelTable, job: &Job) -> Self {
        let (h, w) = job.latent();
        Self {
            window: job.window,
            latent: [h, w],
            text: [table.llava.states(), job.text_tokens(&table.llava)],
            heard: (job.seconds * 50.0).ceil() as u64,
            keeps: job.caches(),
        }
    }
}

/// `Model::predict` of one item.
pub(super) fn pass(heap: &mut Heap, t: &Transformer, pass: &Pass) {
    let Pass { window, latent: [h, w], text: [states, text], heard, keeps } = *pass;
    let each = (h / 2) * (w / 2);
    let (tokens, image) = (window * each, (window + 1) * each);
    // The windows of features, cut from the speech, and the latents.
    let frames = (4 * window).saturating_sub(3);
    heap.take(frames * t.audio * 4);
    heap.pass(heard * t.audio / 10 * 4);
    heap.take(window * t.latent * h * w * 4);
    prepare(heap, t, [window, each, frames]);
    let mut refined = refine(heap, t, states);

    let own = heap.rounded(window * t.latent * h * w);
    let patches = heap.take_tensor(tokens * 4 * t.latent);
    let noisy = heap.linear(tokens, &[4 * t.latent], t.hidden, false);
    heap.give(patches + own);
    let added = heap.take_tensor(tokens * t.hidden);
    heap.give(noisy);
    let all = heap.take_tensor(image * t.hidden);
    heap.give(added);
    heap.take((image + text) * t.head * 4);
    // A second block has the first one's text, which is of the valid rows alone.
    heap.repeat(t.double, |heap, block| {
        heap.aside(|heap| modulated(heap, t, 12));
        let out = double(heap, t, [image, text]);
        heap.give(all + refined);
        refined = out.saturating_sub(all);
        if t.adapters > 0 && block == 0 {
            heap.counted(t.adapters, |heap| adapt(heap, t, [window, each]));
        }
    });
    let mut x = heap.take_tensor((image + text) * t.hidden);
    heap.give(all + refined);
    heap.repeat(t.single, |heap, _| {
        heap.aside(|heap| modulated(heap, t, 3));
        let out = single(heap, t, image + text);
        heap.give(x);
        x = out;
    });
    // The features of a full pass are the last block's input.
    if keeps {
        heap.take_tensor((image + text) * t.hidden);
    }
    finish(heap, t, [tokens, image + text], x);
}

/// A cached pass of one item: the last block, on features that were kept.
pub(super) fn cached(heap: &mut Heap, t: &Transformer, pass: &Pass) {
    let Pass { window, latent: [h, w], text: [_, text], .. } = *pass;
    let each = (h / 2) * (w / 2);
    let (tokens, rows) = (window * each, (window + 1) * each + text);
    let joined = heap.take_tensor(rows * t.hidden);
    heap.aside(|heap| modulated(heap, t, 3));
    let x = single(heap, t, rows);
    heap.give(joined);
    finish(heap, t, [tokens, rows], x);
}

/// The layer that makes a block's shifts, scales and gates.
fn modulated(heap: &mut Heap, t: &Transformer, parts: u64) {
    heap.linear(1, &[t.hidden], parts * t.hidden, false);
}

/// The last layer, which works in f32, over the `tokens` of all `rows`.
fn finish(heap: &mut Heap, t: &Transformer, [tokens, rows]: [u64; 2], x: u64) {
    heap.in_f32(|heap| {
        let wide = if x == rows * t.hidden * 4 { 0 } else { heap.take(tokens * t.hidden * 4) };
        let normed = heap.map(tokens * t.hidden);
        let out = heap.linear(tokens, &[t.hidden], 4 * t.latent, false);
        heap.give(normed);
        // Patches as latents, then as bytes.
        heap.pass(3 * tokens * 4 * t.latent * 4);
        heap.give(out + wide);
    });
}

/// What does not change over the steps: reference tokens, what is added to each frame, the speech.
fn prepare(heap: &mut Heap, t: &Transformer, [window, each, frames]: [u64; 3]) {
    let picture = heap.rounded(each * 4 * t.latent);
    let patches = heap.take_tensor(each * 4 * t.latent);
    let embedded = heap.linear(each, &[4 * t.latent], t.hidden, false);
    heap.give(patches);
    heap.linear(each, &[t.hidden], t.hidden, false);
    heap.give(embedded);
    let own = heap.rounded(frames * t.audio);
    let first = heap.linear(frames, &[t.audio], t.audio_inner, false);
    let second = heap.linear(frames, &[t.audio_inner], t.audio_inner, false);
    let third = heap.linear(frames, &[t.audio_inner], t.audio_tokens * t.hidden, false);
    heap.give(second);
    let normed = heap.map(frames * t.audio_tokens * t.hidden);
    heap.give(first + third + own);
    let patches = heap.take_tensor(each * 4 * t.latent);
    heap.linear(each, &[4 * t.latent], t.hidden, false);
    heap.give(patches);
    heap.take_tensor(4 * window * t.audio_tokens * t.hidden);
    heap.give(normed + picture);
}

/// The refiner, over all rows of the text; gives its result.
fn refine(heap: &mut Heap, t: &Transformer, rows: u64) -> u64 {
    let own = heap.rounded(rows * t.text);
    // The mean of the states.
    let wide = if own > 0 { rows * t.text * 4 } else { 0 };
    heap.pass(wide + rows * t.text * 4);
    let mask = heap.take(rows * rows * 4);
    let mut x = heap.linear(rows, &[t.text], t.hidden, false);
    heap.repeat(t.refiner, |heap, _| {
        let normed = heap.map(rows * t.hidden);
        let qkv = heap.linear(rows, &[t.hidden], 3 * t.hidden, false);
        heap.give(normed);
        // Copies of the parts, whose heads lie apart, and of the mask.
        let copies = heap.take_tensor(3 * rows * t.hidden) + heap.take(mask);
        let seen = heap.attention(t.hidden / t.head.max(1), (rows, rows), [t.head; 2], true);
        heap.give(copies);
        let next = heap.linear(rows, &[t.hidden], t.hidden, true);
        let normed = heap.map(rows * t.hidden);
        let inner = heap.linear(rows, &[t.hidden], t.refiner_inner, false);
        heap.give(normed);
        let last = heap.linear(rows, &[t.refiner_inner], t.hidden, true);
        heap.give(qkv + seen + next + inner + x);
        x = last;
    });
    heap.give(mask + own);
    x
}

/// Tokens that pass a block's wide layers at once, as `model::diffusion` has them.
pub const TOKENS_AT_ONCE: u64 = 8192;

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

/// A double block; its inputs are taken already. Gives its results.
fn double(heap: &mut Heap, t: &Transformer, [image, text]: [u64; 2]) -> u64 {
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
    let seen = heap.attention(h / t.head.max(1), (image + text, image + text), [t.head; 2], false);
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
    heap.give(seen);
    out
}

/// An audio adapter, and what is done with what it heard.
fn adapt(heap: &mut Heap, t: &Transformer, [window, each]: [u64; 2]) {
    let (tokens, sounds) = (window * each, 4 * window * t.audio_tokens);
    let normed = heap.map(tokens * t.hidden);
    let q = heap.linear(tokens, &[t.hidden], t.adapter, false);
    heap.give(normed);
    let normed = heap.map(sounds * t.hidden);
    let kv = heap.linear(sounds, &[t.hidden], 2 * t.adapter, false);
    heap.give(normed);
    // Keys and values lie beside each other, and are laid out apart.
    let laid = heap.take_tensor(2 * sounds * t.adapter);
    let seen = heap.attention(window, (each, 4 * t.audio_tokens), [t.adapter; 2], false);
    heap.give(laid);
    let heard = heap.linear(tokens, &[t.adapter], t.hidden, false);
    heap.give(q + kv + seen);
    let gated = heap.take_tensor(tokens * t.hidden);
    let sum = heap.take_tensor(tokens * t.hidden);
    heap.give(gated);
    let joined = heap.take_tensor((tokens + each) * t.hidden);
    heap.give(heard + sum + joined);
}

/// A single block; its input is taken already. Gives its result.
fn single(heap: &mut Heap, t: &Transformer, rows: u64) -> u64 {
    let h = t.hidden;
    let normed = heap.map(rows * h);
    let qkv = heap.linear(rows, &[h], 3 * h, false);
    let heads = heap.map(rows * 3 * h);
    heap.give(normed + qkv);
    let seen = heap.attention(h / t.head.max(1), (rows, rows), [t.head; 2], false);
    heap.give(heads);
    let others = pieces(heap, rows, h);
    let piece = rows.min(TOKENS_AT_ONCE);
    let normed = heap.map(piece * h);
    let inner = heap.linear(piece, &[h], t.inner, false);
    let out = heap.linear(piece, &[h, t.inner], h, true);
    heap.give(normed + inner + seen);
    others + out
}
