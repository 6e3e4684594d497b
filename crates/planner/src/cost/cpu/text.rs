//! Prompt and picture to text states.

use super::Heap;
use crate::{cost::Job, table::ModelTable};

/// `TextEncoder::encode`: the picture through the vision tower, then two prompts through the Llama.
pub(super) fn encode(heap: &mut Heap, table: &ModelTable, job: &Job) {
    let l = &table.llava;
    let (picture, patches) = (u64::from(job.size.width) * u64::from(job.size.height) * 3, l.vision_positions);
    // The picture, resized.
    heap.take(2 * picture);
    vision(heap, l, patches);
    let features = heap.take_tensor(patches * l.width);
    for prompt in 0..2 {
        // The negative prompt has about as many tokens as the caller's.
        let rows = job.text_tokens(l) + l.crop + 1;
        llama(heap, table, rows);
        if prompt == 0 {
            heap.take((l.tokens + patches - 1).saturating_sub(l.crop) * l.width * 4);
        }
    }
    heap.give(features);
}

/// The widest layer of the vision tower, and the projector.
fn vision(heap: &mut Heap, l: &crate::table::Llava, rows: u64) {
    let x = heap.take_tensor(rows * l.vision);
    let normed = heap.map(rows * l.vision);
    let qkv: u64 = (0..3).map(|_| heap.linear(rows, &[l.vision], l.vision, false)).sum();
    let copies = heap.take_tensor(3 * rows * l.vision);
    let head = 64.min(l.vision);
    let seen = heap.attention(l.vision / head.max(1), rows, rows, [head; 2]);
    heap.give(copies);
    let next = heap.take_tensor(2 * rows * l.vision);
    let inner = heap.linear(rows, &[l.vision], l.vision_inner, false);
    let out = heap.linear(rows, &[l.vision_inner], l.vision, false);
    heap.give(x + normed + qkv + seen + next + inner + out);
    let first = heap.linear(rows, &[l.vision], l.projector, false);
    let out = heap.linear(rows, &[l.projector], l.width, false);
    heap.give(first + out);
}

/// One layer of the Llama: what it has made so far stays until its end.
fn llama(heap: &mut Heap, table: &ModelTable, rows: u64) {
    let l = &table.llava;
    let mask = heap.take(rows * rows * 4);
    let x = heap.take_tensor(2 * rows * l.width);
    let normed = heap.map(rows * l.width);
    let head = l.width / l.heads.max(1);
    let q = heap.linear(rows, &[l.width], l.width, false);
    // Queries and keys are laid out anew before they turn.
    let turned = heap.take_tensor(rows * l.width);
    let copy = heap.take_tensor(rows * l.width);
    heap.give(copy + q);
    let keys = heap.linear(rows, &[l.width], l.keys, false) + heap.linear(rows, &[l.width], l.keys, false);
    let repeated = heap.take_tensor(2 * rows * l.width);
    let copied = heap.take(mask);
    let seen = heap.attention(l.heads, rows, rows, [head; 2]);
    heap.give(copied);
    let next = heap.linear(rows, &[l.width], l.width, false);
    let sum = heap.take_tensor(rows * l.width);
    heap.give(next);
    let second = heap.map(rows * l.width);
    let gate = heap.linear(rows, &[l.width], l.inner, false);
    let up = heap.linear(rows, &[l.width], l.inner, false);
    let product = heap.take_tensor(rows * l.inner);
    heap.give(gate + up);
    let down = heap.linear(rows, &[l.inner], l.width, false);
    let out = heap.take_tensor(rows * l.width);
    heap.give(down + out + product + second + sum + seen + repeated + keys + turned + normed + x + mask);
}
