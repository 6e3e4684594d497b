//! Bytes on a GPU: weights in the precision of the plan, activations in 16 bits.
//!
//! What stages on a card settle by: they ask [`pass_bytes`] and [`prompt_bytes`] before they say how many blocks stay. Weights and the decoder's three copies of its largest activation are the specification's section 4; the
//! transformer takes less there than that section's `14·H` values a token, since the engine takes the wide layers some
//! tokens at a time and never holds scores.

use serde::Serialize;

use super::{
    Job,
    cpu::{Pass, TOKENS_AT_ONCE},
};
use crate::{
    precision::Precision,
    stage::Stage,
    table::{Llava, ModelTable, Part, Transformer, Vae},
};

/// Bytes of one value.
const HALF: u64 = 2;
/// What a process has on a card before its first tensor: the driver's context and the libraries' handles.
pub const CONTEXT_BYTES: u64 = 256 << 20;
/// Part of a card's free memory that no plan and no stage uses: fragments, and what others take meanwhile.
const SPARE_PERCENT: u64 = 5;
/// Blocks that are brought while another computes, as `model::weights` does it.
pub const AHEAD: u64 = 1;
/// Queries that a block of the kernel for attention takes, as `model::cuda` has them.
const QUERIES: u64 = 128;
/// Scores of some queries against all keys, f32, their exponentials and their sums: only where values are f32, which the
/// kernel does not take.
const SCORES_BYTES: u64 = 3 * (64 << 20);
/// Widths a token takes before attention: itself, normed, and queries, keys and values before and after their bias.
const BEFORE: u64 = 8;
/// The same after attention, besides the piece of the tokens that is in the wide layers: itself, what it saw, what comes of both,
/// and the pieces that are done.
const AFTER: u64 = 4;

/// Of a card's free bytes, those that may be used.
#[must_use]
pub fn usable(free: u64) -> u64 {
    free / 100 * (100 - SPARE_PERCENT)
}

/// How one stage lives on one card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Fit {
    /// Of the large layers.
    pub precision: Precision,
    /// Blocks that stay on the card; the others are brought for their turn.
    pub resident_blocks: u64,
    /// Blocks that there are.
    pub blocks: u64,
    /// Blocks that are brought while another computes.
    pub prefetch: u64,
    /// Parts in which the MLP takes its tokens.
    pub token_chunks: u64,
    /// Queries that attention takes at once.
    pub query_chunk: u64,
    /// Side of a tile of the VAE in pixels, and its length in frames.
    pub tile: [u64; 2],
    /// Whether both guidance branches go through together.
    pub branches_together: bool,
}

impl Fit {
    /// Whether all blocks stay on the card.
    #[must_use]
    pub fn resident(&self) -> bool {
        self.resident_blocks == self.blocks
    }
}

/// Blocks of a stage that can be swapped, the largest first in memory: bytes of each, and how many there are.
fn blocks(table: &ModelTable, stage: Stage, precision: Precision) -> Vec<(u64, u64)> {
    table.of(stage).filter(|part| part.swaps()).map(|part: &Part| (part.bytes(precision), part.count)).collect()
}

/// Number of a stage's blocks that can be swapped.
#[must_use]
pub fn block_count(table: &ModelTable, stage: Stage) -> u64 {
    table.of(stage).filter(|part| part.swaps()).map(|part| part.count).sum()
}

/// Bytes of a stage's weights that are on the card while it runs, and bytes that one pass brings there.
///
/// The resident blocks are the last ones, which of the transformer are the smaller ones.
#[must_use]
pub fn weights(table: &ModelTable, stage: Stage, fit: &Fit) -> (u64, u64) {
    let all = table.weights(stage, fit.precision);
    if fit.resident() {
        return (all, 0);
    }
    let mut away = fit.blocks - fit.resident_blocks;
    let (mut moved, mut largest) = (0u64, 0u64);
    for (bytes, count) in blocks(table, stage, fit.precision) {
        let here = count.min(away);
        away -= here;
        moved = moved.saturating_add(bytes.saturating_mul(here));
        if here > 0 {
            largest = largest.max(bytes);
        }
    }
    // The block that computes, and those on their way.
    let room = largest.saturating_mul(1 + AHEAD);
    (all.saturating_sub(moved).saturating_add(room), moved)
}

/// Bytes of a stage's activations.
#[must_use]
pub fn activations(table: &ModelTable, stage: Stage, job: &Job, fit: &Fit) -> u64 {
    match stage {
        Stage::AudioEncoder => {
            let w = &table.whisper;
            // States of all layers, the widest layer, and the spectrum of 30 s.
            w.positions * (w.width * (w.layers + 8) + 2 * w.inner + 2 * w.bands) * 4
        }
        Stage::TextEncoder => {
            prompt_bytes(&table.llava, table.llava.tokens, HALF) + llama_widened(&table.llava, fit.precision)
        }
        Stage::Diffusion => {
            let t = &table.transformer;
            pass_bytes(t, &Pass::of(table, job), HALF) + transformer_widened(t, fit.precision)
        }
        Stage::ImageEncoder => encode(&table.vae, job, fit),
        Stage::VaeDecode => decode(&table.vae, job, fit.tile),
    }
}

/// The transformer's largest weight in 16 bits, beside which it stands while it multiplies if it has fewer.
#[must_use]
pub fn transformer_widened(t: &Transformer, precision: Precision) -> u64 {
    widened(t.hidden * (t.hidden + t.inner), precision)
}

/// The Llama's, likewise.
#[must_use]
pub fn llama_widened(l: &Llava, precision: Precision) -> u64 {
    widened(l.width * l.inner, precision)
}

fn widened(values: u64, precision: Precision) -> u64 {
    if precision == Precision::Bf16 { 0 } else { values * HALF }
}

/// Bytes that the encoding of a prompt of so many tokens takes on a card, besides weights.
#[must_use]
pub fn prompt_bytes(l: &Llava, tokens: u64, value_bytes: u64) -> u64 {
    let rows = tokens + l.vision_positions;
    // Gate before and after its activation, up, and their product; states, queries, keys, values and what attention gives.
    let llama = rows * (4 * l.inner + 10 * l.width) * value_bytes + rows * rows * 4;
    let vision = l.vision_positions * (2 * l.vision_inner + 8 * l.vision) * value_bytes;
    llama.max(vision)
}

/// Bytes that one pass of the transformer takes on a card besides its weights.
#[must_use]
pub fn pass_bytes(t: &Transformer, pass: &Pass, value_bytes: u64) -> u64 {
    let Pass { window, latent: [h, w], text: [_, text], heard: _, keeps: _ } = *pass;
    let tokens = (window + 1) * (h / 2) * (w / 2) + text;
    // A piece normed, its inner values before and after the activation, both inputs of the last layer beside each other, and what
    // comes of them.
    let piece = tokens.min(TOKENS_AT_ONCE) * (5 * t.hidden + 2 * t.inner);
    let block = (BEFORE * tokens * t.hidden).max(AFTER * tokens * t.hidden + piece);
    let scores =
        if value_bytes == HALF { 0 } else { SCORES_BYTES.min(tokens.saturating_mul(tokens).saturating_mul(12)) };
    // Rotary tables, latents and velocity in f32, windows of the speech.
    let frames = (4 * window).saturating_sub(3);
    let rest = tokens * t.head * 4 + 3 * window * t.latent * h * w * 4 + frames * t.audio * value_bytes;
    block * value_bytes + rest + scores
}

/// Queries that attention takes at once.
#[must_use]
pub fn query_chunk(table: &ModelTable, job: &Job) -> u64 {
    QUERIES.min(job.tokens(&table.llava)).max(1)
}

/// Three copies of the largest activation: input, padded copy and output of the widest upsampling convolution.
fn decode(vae: &Vae, job: &Job, [side, length]: [u64; 2]) -> u64 {
    let (h, w) = (u64::from(job.size.height), u64::from(job.size.width));
    let frames = (4 * job.kept_latent_frames).saturating_sub(3).min(length + 1);
    let tile = frames * side.min(h) * side.min(w);
    // The block before the last grows the picture to its full size, at the width of the block before that.
    let wide = vae.channels.get(1).or(vae.channels.first()).copied().unwrap_or(1);
    // Finished frames of one run of tiles, their seam, and the bytes that leave.
    let picture = 3 * frames * h * w * (HALF + HALF / 2 + 1);
    3 * wide * tile * HALF + picture
}

/// One frame in tiles: input, normalised copy and output of the first block.
fn encode(vae: &Vae, job: &Job, fit: &Fit) -> u64 {
    let [side, _] = fit.tile;
    let (h, w) = (u64::from(job.size.height), u64::from(job.size.width));
    let wide = vae.channels.first().copied().unwrap_or(1);
    4 * wide * side.min(h) * side.min(w) * HALF + 3 * h * w * 4
}

/// Kept features of full passes, which lie in host memory.
#[must_use]
pub fn features(table: &ModelTable, job: &Job) -> u64 {
    if !job.caches() {
        return 0;
    }
    let tokens = (job.latent_frames + job.windows) * job.frame_tokens() + job.windows * job.text_tokens(&table.llava);
    job.branches * tokens * table.transformer.hidden * HALF
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{clip::ClipPlan, size::PictureSize};

    fn job(width: u32, height: u32, frames: usize) -> Job {
        Job::new(PictureSize { width, height }, &ClipPlan::new(frames, 1, 33), 50, 2).unwrap()
    }

    fn plain(table: &ModelTable) -> Fit {
        Fit {
            precision: Precision::Bf16,
            resident_blocks: block_count(table, Stage::Diffusion),
            blocks: block_count(table, Stage::Diffusion),
            prefetch: 0,
            token_chunks: 1,
            query_chunk: 1,
            tile: [256, 64],
            branches_together: false,
        }
    }

    /// Section 4 of the specification, in GiB: activations of the transformer, and the decoder's peak. Ours of the transformer are
    /// less where there are many tokens.
    #[test]
    fn activations_are_no_more_than_those_of_the_specification() {
        /// Values a token at the widest point of a block, in widths.
        const WIDEST: u64 = 14;
        let table = ModelTable::published().unwrap();
        let fit = plain(&table);
        for (width, height, frames, dit, decoder) in [
            (96, 96, 4, 0.06, 0.07),
            (128, 128, 8, 0.07, 0.21),
            (256, 256, 16, 0.17, 1.59),
            (384, 384, 32, 0.51, 3.09),
            (512, 512, 64, 1.53, 6.09),
            (704, 704, 128, 5.32, 6.09),
            (704, 768, 129, 5.80, 6.09),
            (1024, 1024, 129, 11.21, 6.09),
        ] {
            let job = job(width, height, frames);
            let tokens = job.image_tokens() + TEXT_ROWS_OF_TEST;
            let block = (tokens * WIDEST * 3072 * HALF) as f64 / (1u64 << 30) as f64;
            assert!((block - dit).abs() < 0.006, "{width}x{height}x{frames}: {block} GiB, expected {dit}");
            // A block's input and what comes of it stand beside a piece that takes all tokens; on top come tables and latents.
            let all = activations(&table, Stage::Diffusion, &job, &fit) as f64 / (1u64 << 30) as f64;
            let most = if tokens > TOKENS_AT_ONCE { 0.85 } else { 1.3 };
            assert!(all >= 8.0 / 14.0 * block && all < most * block + 0.02, "{all} for {block}");
            let decode = activations(&table, Stage::VaeDecode, &job, &fit) as f64 / (1u64 << 30) as f64;
            let picture = 3.0 * 65.0 * f64::from(width * height) * 4.0 / (1u64 << 30) as f64;
            assert!(decode >= decoder - 0.006 && decode <= decoder + picture + 0.006, "{decode} for {decoder}");
        }
    }
    const TEXT_ROWS_OF_TEST: u64 = 610;

    #[test]
    fn kept_features_are_those_of_the_specification() {
        let table = ModelTable::published().unwrap();
        let bytes = features(&table, &job(704, 768, 129)) as f64 / 1e9;
        assert!((bytes - 0.89).abs() < 0.01, "{bytes} GB");
        assert_eq!(features(&table, &Job { steps: 29, ..job(704, 768, 129) }), 0);
    }

    #[test]
    fn blocks_that_are_away_leave_room_for_one_and_those_on_their_way() {
        let table = ModelTable::published().unwrap();
        let fit = plain(&table);
        assert_eq!(weights(&table, Stage::Diffusion, &fit), (table.weights(Stage::Diffusion, Precision::Bf16), 0));
        let away = Fit { resident_blocks: 0, prefetch: 1, ..fit };
        let (here, moved) = weights(&table, Stage::Diffusion, &away);
        // 20 double and 40 single blocks leave; two double ones fit in.
        assert_eq!(moved, 2 * (20 * 339_831_296 + 40 * 141_591_808));
        assert_eq!(here, 2 * (12_991_493_184 - 6_796_625_920 - 5_663_672_320) + 2 * 2 * 339_831_296);
    }
}
