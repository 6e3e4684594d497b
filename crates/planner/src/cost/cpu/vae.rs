//! The VAE's two halves, tile by tile.

use super::{Heap, heap::Times};
use crate::{
    cost::{Job, work},
    table::Vae,
};

/// A tensor of the network that runs: channels, frames, rows and columns.
#[derive(Debug, Clone, Copy)]
struct Shape {
    channels: u64,
    at: [u64; 3],
}

impl Shape {
    fn positions(&self) -> u64 {
        self.at.iter().product()
    }

    fn values(&self) -> u64 {
        self.channels * self.positions()
    }
}

/// `VaeStage::decode_frames`: runs of tiles in time, each of tiles in space.
pub(super) fn decode(heap: &mut Heap, vae: &Vae, job: &Job) {
    let (h, w) = job.latent();
    let length = job.kept_latent_frames.min(vae.tile_length + 1);
    // The latents, as values, and scaled.
    heap.take(2 * vae.latent * job.kept_latent_frames * h * w * 4);
    let (side_h, side_w) = (h.min(vae.tile_side), w.min(vae.tile_side));
    let frames = 4 * length - 3;
    let picture = 3 * frames * 64 * h * w;
    if h > vae.tile_side || w > vae.tile_side {
        // Pieces and seams of the run so far, then the rows, and last the whole.
        let seams = picture / 4;
        let held = heap.take_tensor(picture + seams);
        tile_out(heap, vae, [length, side_h, side_w]);
        let joined = heap.take_tensor(picture);
        heap.give(held + joined);
    } else {
        tile_out(heap, vae, [length, side_h, side_w]);
    }
    // The run's frames, the seam to the next one, their values, and the bytes that leave.
    let run = heap.take_tensor(picture);
    let seam = if job.kept_latent_frames > vae.tile_length { heap.take_tensor(picture / 4) } else { 0 };
    heap.pass(picture * 4 + 2 * picture);
    heap.give(run + seam);
}

/// The decoder over one tile `[latent frames, rows, columns]`.
fn tile_out(heap: &mut Heap, vae: &Vae, tile: [u64; 3]) {
    let deep = vae.channels.last().copied().unwrap_or(1);
    let latent = Shape { channels: vae.latent, at: tile };
    let quantised = heap.convolution((vae.latent, latent.positions()), vae.latent, tile, false, 1);
    let mut x = Shape { channels: deep, at: tile };
    let mut held = heap.convolution((vae.latent, latent.positions()), deep, tile, false, 3);
    heap.give(quantised);
    held = middle(heap, vae, x, held);
    for (i, &channels) in vae.channels.iter().rev().enumerate() {
        for _ in 0..=vae.resnets {
            held = resnet(heap, &mut x, channels, held);
        }
        let [time, space] = vae.grows.get(i).copied().unwrap_or([1, 1]);
        if [time, space] != [1, 1] {
            let before = x;
            x.at = [1 + (x.at[0] - 1) * time, x.at[1] * space, x.at[2] * space];
            let out = heap.convolution((x.channels, before.positions()), x.channels, x.at, false, 3);
            heap.give(held);
            held = out;
        }
    }
    let normed = heap.map(x.values());
    heap.give(held);
    let out = heap.convolution((x.channels, x.positions()), 3, x.at, false, 3);
    heap.give(normed + out);
}

/// All that decoding does: every tile of every run, and what joins them.
pub(super) fn show(heap: &mut Heap, vae: &Vae, job: &Job) {
    let (h, w) = job.latent();
    let (rows, columns) = (work::tiles(h, vae.tile_side), work::tiles(w, vae.tile_side));
    for (length, runs) in alike(&work::runs(vae, job.kept_latent_frames)) {
        for (row, down) in alike(&rows) {
            for (column, across) in alike(&columns) {
                let count = runs * down * across;
                heap.counted(count, |heap| tile_out(heap, vae, [length, row, column]));
                // Seams, pieces, and bytes in place of values.
                let values = 3 * (4 * length - 3) * 64 * row * column;
                heap.counted(3 * count, |heap| heap.map(values));
            }
        }
    }
}

/// All that encoding a picture does.
pub(super) fn look(heap: &mut Heap, vae: &Vae, job: &Job) {
    let (h, w) = job.latent();
    heap.looked((64 * h * w).min(DETECTED));
    for (row, down) in alike(&work::tiles(h, vae.tile_side)) {
        for (column, across) in alike(&work::tiles(w, vae.tile_side)) {
            heap.counted(down * across, |heap| tile_in(heap, vae, [row, column]));
        }
    }
}

/// Different lengths, and how many of each there are.
fn alike(lengths: &[u64]) -> Vec<(u64, u64)> {
    let mut counted: Vec<(u64, u64)> = Vec::new();
    for length in lengths {
        match counted.iter_mut().find(|(known, _)| known == length) {
            Some((_, count)) => *count += 1,
            None => counted.push((*length, 1)),
        }
    }
    counted
}

/// Bytes of the built-in face detector, and most pixels that it sees.
const DETECTOR: u64 = 1_300_000;
const DETECTED: u64 = 640 * 640;

/// `ImageEncoder`: one frame, tile by tile.
pub(super) fn encode(heap: &mut Heap, vae: &Vae, job: &Job) {
    let (h, w) = job.latent();
    let pixels = 64 * h * w;
    // The resized picture, what the detector sees of it, and its values.
    heap.take(3 * pixels);
    heap.pass(DETECTOR + 16 * pixels.min(DETECTED));
    heap.take(3 * pixels * 4);
    let side = vae.tile_side;
    let tile = [1, 8 * h.min(side), 8 * w.min(side)];
    let input = if h > side || w > side { heap.take(3 * tile.iter().product::<u64>() * 4) } else { 0 };
    tile_in(heap, vae, [h.min(side), w.min(side)]);
    heap.give(input);
}

/// The encoder over one tile of so many rows and columns of latents.
fn tile_in(heap: &mut Heap, vae: &Vae, [rows, columns]: [u64; 2]) {
    let tile = [1, 8 * rows, 8 * columns];
    let first = vae.channels.first().copied().unwrap_or(1);
    let mut x = Shape { channels: first, at: tile };
    let rounded = heap.rounded(3 * x.positions());
    let mut held = heap.convolution((3, x.positions()), first, tile, false, 3);
    heap.give(rounded);
    for (i, &channels) in vae.channels.iter().enumerate() {
        for _ in 0..vae.resnets {
            held = resnet(heap, &mut x, channels, held);
        }
        let [_, space] = vae.shrinks.get(i).copied().unwrap_or([1, 1]);
        if space != 1 {
            let before = x;
            x.at = [1, x.at[1].div_ceil(space), x.at[2].div_ceil(space)];
            let out = heap.convolution((x.channels, before.positions()), x.channels, x.at, false, 3);
            heap.give(held);
            held = out;
        }
    }
    held = middle(heap, vae, x, held);
    let normed = heap.map(x.values());
    heap.convolution((x.channels, x.positions()), 2 * vae.latent, x.at, false, 3);
    heap.give(normed + held);
}

/// A residual block: takes its input, gives its output.
fn resnet(heap: &mut Heap, x: &mut Shape, out: u64, held: u64) -> u64 {
    let inp = (x.channels, x.positions());
    let changes = x.channels != out;
    let normed = heap.map(x.values());
    let hidden = heap.convolution(inp, out, x.at, false, 3);
    heap.give(normed);
    x.channels = out;
    let normed = heap.map(x.values());
    heap.give(hidden);
    let shortcut = if changes { heap.convolution(inp, out, x.at, false, 1) } else { 0 };
    let y = heap.convolution((out, x.positions()), out, x.at, true, 3);
    heap.give(normed + shortcut + held);
    y
}

/// Residual block, attention over all positions, residual block.
fn middle(heap: &mut Heap, vae: &Vae, mut x: Shape, held: u64) -> u64 {
    let (deep, rows) = (x.channels, x.positions());
    let mut held = resnet(heap, &mut x, deep, held);
    if vae.attention {
        let normed = heap.map(x.values());
        let tokens = heap.take_tensor(x.values());
        heap.give(normed);
        let qkv: u64 = (0..3).map(|_| heap.linear(rows, &[deep], deep, false)).sum();
        heap.give(tokens);
        // A frame sees itself and those before it.
        let frames = x.at[0].max(1) as f64;
        let part = Times((frames + 1.0) / (2.0 * frames));
        let seen = heap.counted(part, |heap| heap.attention(1, (rows, rows), [deep; 2], false));
        let joined = heap.take_tensor(x.values());
        heap.give(seen);
        let out = heap.linear(rows, &[deep], deep, false);
        let sum = heap.take_tensor(x.values());
        heap.give(out + joined + qkv);
        let laid = heap.take_tensor(x.values());
        heap.give(held + sum);
        held = laid;
    }
    resnet(heap, &mut x, deep, held)
}
