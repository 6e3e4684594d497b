//! What the planner says of the passes that the suite asks for.

use anyhow::{Context as _, Result};
use model::diffusion::TOKENS_AT_ONCE;
use planner::{
    ModelTable, Planner, Precision, Request, Stage, Tiers,
    clip::ClipPlan,
    cost::{
        Job,
        cuda::{self, Fit},
        work::{self, Rates},
    },
    plan::{self, Choice},
    size::PictureSize,
};

use super::{Asked, Outcome, Row, goals};

/// A size that is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub(super) name: &'static str,
    /// Rows and columns of the latents.
    pub(super) sides: [usize; 2],
}

/// Latent frames of a window of 129 frames.
pub(super) const FRAMES: usize = 33;
pub(super) const SMALL: Size = Size { name: "256x256x129", sides: [32, 32] };
pub(super) const LARGE: Size = Size { name: goals::LARGE, sides: [88, 96] };
/// The card that blocks come and go on: the goal's.
const NARROW_BYTES: u64 = 8_000_000_000;
pub(super) fn table() -> Result<ModelTable> {
    ModelTable::published().map_err(anyhow::Error::msg)
}

/// One full pass as the planner counts it.
pub(super) fn job(size: Size) -> Result<Job> {
    let side = |latents: usize| u32::try_from(8 * latents).unwrap_or(u32::MAX);
    let picture = PictureSize { width: side(size.sides[1]), height: side(size.sides[0]) };
    Ok(Job::new(picture, &ClipPlan::new(4 * FRAMES - 3, 1, FRAMES), 1, 1)?)
}

/// How the network is run here: the planner's words for what the code does.
pub(super) fn fit(size: Size, precision: Precision) -> Result<Fit> {
    let (table, job) = (table()?, job(size)?);
    let blocks = cuda::block_count(&table, Stage::Diffusion);
    let tokens = job.image_tokens() + job.text_tokens(&table.llava);
    Ok(Fit {
        precision,
        resident_blocks: blocks,
        blocks,
        prefetch: 0,
        token_chunks: tokens.div_ceil(TOKENS_AT_ONCE as u64),
        query_chunk: cuda::query_chunk(&table, &job),
        tile: [256, 64],
        branches_together: false,
    })
}

/// Bytes and seconds of one pass; seconds where the card's rates are known.
pub(super) fn predicted(size: Size, fit: &Fit, rates: Option<Rates>) -> Result<(u64, Option<f64>)> {
    let (table, job) = (table()?, job(size)?);
    let (here, moved) = cuda::weights(&table, Stage::Diffusion, fit);
    let seconds = |rates: Rates| {
        let computing = work::full_pass(&table, &job).seconds(&rates);
        let moving = moved as f64 / rates.weights;
        if fit.prefetch > 0 { computing.max(moving) } else { computing + moving }
    };
    Ok((here + cuda::activations(&table, Stage::Diffusion, &job, fit), rates.map(seconds)))
}

/// How many blocks stay on a card of [`NARROW_BYTES`] at the largest size, with so many ahead.
pub(super) fn planned(ahead: u64) -> Result<u64> {
    let planner = Planner {
        table: table()?,
        tiers: Tiers::default(),
        devices: vec![planner::Device::card(0, planner::Bytes(NARROW_BYTES))],
        placement: None,
        tier: Choice::Unlimited,
        precisions: vec![Precision::Int8],
        allow_degrade: false,
    };
    let size = Some(PictureSize { width: 768, height: 704 });
    let plan = planner.plan(&Request { size, frames: Some(129), steps: Some(50), ..Request::default() })?;
    let stage = plan.stages.iter().find(|stage| stage.stage == Stage::Diffusion).context("a plan without diffusion")?;
    let plan::Fit::Cuda(fit) = stage.fit else { anyhow::bail!("a plan for a card without one") };
    // Each more takes the place of double blocks, which are 2.4 times as large as the single ones that would stay.
    Ok(fit.resident_blocks.saturating_sub(3 * ahead.saturating_sub(fit.prefetch)))
}

/// Says that the card is too small where it is.
pub(super) fn too_small(size: Size, fit: &Fit, asked: &Asked<'_>) -> Result<Option<Row>> {
    let (bytes, total) = (predicted(size, fit, None)?.0 + cuda::CONTEXT_BYTES, asked.shared.total_bytes);
    let told = || format!("it takes {:.1} GB, the card has {:.1}", bytes as f64 / 1e9, total as f64 / 1e9);
    Ok((bytes > total / 100 * 95).then(|| Row { outcome: Outcome::Skipped, reason: Some(told()), ..asked.row.clone() }))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use candle_core::Device;

    use super::{super::Shared, *};
    use crate::gpu::full::MORE_AHEAD;

    #[test]
    fn on_8_gigabytes_the_whole_network_is_planned_with_blocks_that_come_and_go() {
        let resident = planned(cuda::AHEAD).unwrap();
        assert!((1..60).contains(&resident), "{resident} of 60 stay");
        assert!(planned(4).unwrap() < resident);
        for size in [SMALL, LARGE] {
            let fit = Fit { resident_blocks: resident, prefetch: cuda::AHEAD, ..fit(size, Precision::Int8).unwrap() };
            let (bytes, seconds) = predicted(size, &fit, Some(Rates::CUDA)).unwrap();
            assert!(bytes < NARROW_BYTES && seconds.unwrap() > 0.0, "{bytes} bytes at {}", size.name);
            assert_eq!(predicted(size, &fit, None).unwrap(), (bytes, None));
        }
    }

    #[test]
    fn more_ahead_with_fewer_that_stay_takes_no_more_bytes() {
        let bytes = |ahead: u64| {
            let fit = Fit {
                resident_blocks: planned(ahead).unwrap(),
                prefetch: ahead,
                ..fit(SMALL, Precision::Int8).unwrap()
            };
            predicted(SMALL, &fit, None).unwrap().0
        };
        assert!(MORE_AHEAD.iter().all(|ahead| bytes(*ahead) <= bytes(cuda::AHEAD)), "{}", bytes(cuda::AHEAD));
    }

    #[test]
    fn a_pass_in_16_bits_is_predicted_with_all_weights_on_the_card() {
        let fit = fit(LARGE, Precision::Bf16).unwrap();
        let (bytes, _) = predicted(LARGE, &fit, None).unwrap();
        assert!(fit.resident() && fit.token_chunks == 9, "{fit:?}");
        // 26 GB of weights, and less than 6 GB while it works.
        assert!((26_000_000_000..32_000_000_000).contains(&bytes), "{bytes}");
    }

    #[test]
    fn what_does_not_fit_on_the_card_is_not_asked() {
        let fit = fit(LARGE, Precision::Bf16).unwrap();
        let shown = |total_bytes: u64| {
            let shared = Shared { total_bytes, ..Shared::default() };
            let row = Row::new("full", "all", Outcome::Holds);
            let asked = Asked { device: &Device::Cpu, row, shared: &shared, until: Instant::now() };
            too_small(LARGE, &fit, &asked).unwrap().map(|row| (row.outcome, row.reason.unwrap()))
        };
        assert_eq!(shown(80_000_000_000), None);
        let (outcome, reason) = shown(24_000_000_000).unwrap();
        assert!(outcome == Outcome::Skipped && reason.ends_with("the card has 24.0"), "{reason}");
    }
}
