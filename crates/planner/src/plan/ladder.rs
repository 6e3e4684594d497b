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

/// Side in pixels and length in frames of the VAE's tiles, the published ones first.
const TILES: [[u64; 2]; 5] = [[256, 64], [256, 32], [256, 16], [192, 16], [128, 16]];
/// Parts in which the MLP takes its tokens where it does not take them all.
const CHUNKS: u64 = 6;

/// The fits of a stage, the best first.
pub(super) fn fits(table: &ModelTable, stage: Stage, job: &Job, precisions: &[Precision]) -> Vec<Fit> {
    let blocks = cuda::block_count(table, stage);
    let plain = Fit {
        precision: Precision::Bf16,
        resident_blocks: blocks,
        blocks,
        prefetch: 0,
        token_chunks: 1,
        query_chunk: cuda::query_chunk(table, job),
        tile: TILES[0],
        branches_together: false,
    };
    match stage {
        Stage::AudioEncoder => vec![plain],
        Stage::ImageEncoder => [TILES[0], TILES[4]].into_iter().map(|tile| Fit { tile, ..plain }).collect(),
        Stage::VaeDecode => TILES.into_iter().map(|tile| Fit { tile, ..plain }).collect(),
        Stage::TextEncoder => {
            let mut fits: Vec<Fit> = precisions.iter().map(|&precision| Fit { precision, ..plain }).collect();
            fits.extend(swapped(precisions, plain));
            fits
        }
        Stage::Diffusion => {
            let mut fits = Vec::new();
            for &precision in precisions {
                let fit = Fit { precision, ..plain };
                fits.push(fit);
                fits.push(Fit { token_chunks: CHUNKS, ..fit });
            }
            fits.extend(swapped(precisions, Fit { token_chunks: CHUNKS, ..plain }));
            fits
        }
    }
}

/// Blocks that are swapped, fewer and fewer of them on the card, in the smallest precision that is allowed: it moves
/// the fewest bytes. Last, none is brought ahead, and the tokens come in more parts.
fn swapped(precisions: &[Precision], plain: Fit) -> Vec<Fit> {
    let Some(&precision) = precisions.last() else { return Vec::new() };
    let mut fits: Vec<Fit> = (0..plain.blocks)
        .rev()
        .map(|resident_blocks| Fit { precision, resident_blocks, prefetch: cuda::AHEAD, ..plain })
        .collect();
    fits.extend(fits.last().map(|fit| Fit { prefetch: 0, ..*fit }));
    if plain.token_chunks > 1 {
        fits.extend(fits.last().map(|fit| Fit { token_chunks: 8 * CHUNKS, ..*fit }));
    }
    fits
}
