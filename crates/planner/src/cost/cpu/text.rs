//! Prompt and picture to text states.

use super::{Heap, audio};
use crate::{
    size::PictureSize,
    table::{Clip, Llava},
};

/// Width of a head of CLIP.
const CLIP_HEAD: u64 = 64;

/// `TextEncoder::encode`: the picture through the vision tower, then two prompts through the Llama.
///
/// - `asked`: rows of the caller's prompt, as [`Llava::rows`] gives them
pub(super) fn encode(heap: &mut Heap, (l, c): (&Llava, &Clip), size: PictureSize, asked: u64) {
    let side = (l.vision_positions - 1).isqrt() * l.patch;
    // The resized picture, and what the vision tower takes of it.
    heap.take(3 * u64::from(size.width) * u64::from(size.height));
    let pixels = heap.take(3 * side * side * 4);
    let features = vision(heap, l);
    heap.give(pixels);
    for valid in [asked, l.rows(l.negative)] {
        branch(heap, l, valid + l.crop);
    }
    heap.give(features);
    let layer = |heap: &mut Heap| audio::layer(heap, c.positions, [c.width, c.inner, (c.width / CLIP_HEAD).max(1)]);
    heap.aside(|heap| {
        heap.counted(2 * c.layers, layer);
    });
    // Both prompts' states leave as bytes.
    heap.take(l.states() * l.width * 4);
    heap.pass(2 * l.states() * l.width * 4);
}

/// The vision tower and the projector; gives the features.
fn vision(heap: &mut Heap, l: &Llava) -> u64 {
    let (rows, patches) = (l.vision_positions, l.vision_positions - 1);
    // Patches of pixels, their embeddings, and those with positions stay to the end.
    let cut = heap.take_tensor(patches * 3 * l.patch * l.patch);
    let embedded = heap.linear(patches, &[3 * l.patch * l.patch], l.vision, false);
    let placed = heap.take_tensor(rows * l.vision);
    heap.pass(heap.tensor(rows * l.vision));
    let x = heap.map(rows * l.vision);
    let layer = |heap: &mut Heap| audio::layer(heap, rows, [l.vision, l.vision_inner, l.vision_heads]);
    let out = heap.counted(l.vision_layers, layer);
    heap.give(cut + embedded + placed + x);
    let first = heap.linear(patches, &[l.vision], l.projector, false);
    let features = heap.linear(patches, &[l.projector], l.width, false);
    heap.give(first + out);
    features
}

/// One prompt of `valid` rows with its template: its states stay.
fn branch(heap: &mut Heap, l: &Llava, valid: u64) {
    let all = l.states() + l.crop;
    let padded = u64::from(all > valid);
    let rows = valid + padded;
    // Embeddings of the words, then beside the picture's features as one.
    let words = heap.take_tensor(rows.saturating_sub(l.vision_positions - 1) * l.width);
    let joined = heap.take_tensor(rows * l.width);
    // Angles, their cosines and sines; the mask grows by a row, then by a column.
    let causal = heap.take(valid * valid * 4);
    heap.take(rows * rows * 4);
    heap.pass(rows * valid * 4);
    heap.give(causal);
    let head = l.width / l.heads.max(1);
    let tables = heap.take(rows * head * 4);
    heap.pass(rows * head * 2);
    let x = if l.layers > 1 { heap.take_tensor(rows * l.width) } else { 0 };
    let out = heap.counted(l.layers, |heap| llama(heap, l, rows));
    heap.give(x + tables + rows * rows * 4);
    let filling = heap.take_tensor(all.saturating_sub(valid) * l.width);
    let states = heap.take_tensor(all * l.width);
    if heap.tensor(1) != 4 {
        heap.take(l.states() * l.width * 4);
        heap.give(states);
    }
    heap.give(filling + out + joined + words);
}

/// One layer of the Llama; its input is taken already, and what it has made so far stays until its end.
fn llama(heap: &mut Heap, l: &Llava, rows: u64) -> u64 {
    let normed = heap.map(rows * l.width);
    let q = turned(heap, l, rows, l.width);
    let k = turned(heap, l, rows, l.keys);
    let v = heap.linear(rows, &[l.width], l.keys, false);
    // Each head of keys and values as often as queries need it.
    let repeated = heap.take_tensor(2 * rows * l.width);
    let mask = heap.take(rows * rows * 4);
    let seen = heap.attention(l.heads, (rows, rows), [l.width / l.heads.max(1); 2], false);
    heap.give(mask);
    let out = heap.linear(rows, &[l.width], l.width, false);
    let next = heap.take_tensor(rows * l.width);
    heap.give(out);
    let second = heap.map(rows * l.width);
    let gate = heap.linear(rows, &[l.width], l.inner, false);
    let up = heap.linear(rows, &[l.width], l.inner, false);
    let product = heap.take_tensor(rows * l.inner);
    heap.give(gate + up);
    let down = heap.linear(rows, &[l.inner], l.width, false);
    let sum = heap.take_tensor(rows * l.width);
    heap.give(down + product + second + next + seen + repeated + v + k + q + normed);
    sum
}

/// Queries or keys, which are laid out head by head and turned in f32.
fn turned(heap: &mut Heap, l: &Llava, rows: u64, width: u64) -> u64 {
    let plain = heap.linear(rows, &[l.width], width, false);
    let laid = heap.take_tensor(rows * width);
    let wide = if heap.tensor(1) == 4 { 0 } else { heap.take(rows * width * 4) };
    let turned = heap.take(rows * width * 4);
    let rounded = if wide == 0 { turned } else { heap.take_tensor(rows * width) };
    heap.give(plain + laid + wide + if wide == 0 { 0 } else { turned });
    rounded
}
