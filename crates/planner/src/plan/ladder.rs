//! How a stage can live on a card: every way, the best first.

use crate::{
    cost::{
        Job,
        cuda::{self, Fit},
    },
    precision::Precision,
    stage::Stage,
    table::ModelTable,
};

/// What the decoder's tiles are shrunk by, as the gateway does it when memory ends.
pub(super) const TILE_DIVISORS: [u64; 3] = [1, 2, 4];

/// The fits of a stage, the best first.
pub(super) fn fits(table: &ModelTable, stage: Stage, job: &Job, precisions: &[Precision]) -> Vec<Fit> {
    let blocks = cuda::block_count(table, stage);
    let plain = Fit {
        precision: Precision::Bf16,
        resident_blocks: blocks,
        blocks,
        prefetch: 0,
        token_chunks: if stage == Stage::Diffusion { job.token_chunks(&table.llava) } else { 1 },
        query_chunk: cuda::query_chunk(table, job),
        tile: table.vae.tile(),
        branches_together: false,
    };
    match stage {
        Stage::AudioEncoder | Stage::ImageEncoder => vec![plain],
        Stage::VaeDecode => TILE_DIVISORS
            .into_iter()
            .map(|divisor| Fit { tile: table.vae.with_smaller_tiles(divisor).tile(), ..plain })
            .collect(),
        Stage::TextEncoder | Stage::Diffusion => {
            let mut fits: Vec<Fit> = precisions.iter().map(|&precision| Fit { precision, ..plain }).collect();
            fits.extend(swapped(precisions, plain));
            fits
        }
    }
}

/// Blocks that are swapped, fewer and fewer of them on the card, in the smallest precision that is allowed: it moves
/// the fewest bytes.
fn swapped(precisions: &[Precision], plain: Fit) -> Vec<Fit> {
    let Some(&precision) = precisions.last() else { return Vec::new() };
    let fit = |resident_blocks| Fit { precision, resident_blocks, prefetch: cuda::AHEAD, ..plain };
    (0..plain.blocks).rev().map(fit).collect()
}
