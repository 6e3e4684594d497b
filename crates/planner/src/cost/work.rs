//! Arithmetic and seconds of a stage.

use serde::{Deserialize, Serialize};

use super::{Job, cpu::Pace};
use crate::{
    precision::Precision,
    stage::Stage,
    table::{ModelTable, Vae},
};

/// How fast a device is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rates {
    /// Whether they were measured on the device itself.
    pub measured: bool,
    /// FLOP/s of large matrix products.
    pub products: f64,
    /// FLOP/s of attention.
    pub attention: f64,
    /// FLOP/s of the VAE's convolutions.
    pub convolutions: f64,
    /// Bytes/s of weights on their way to where they are used: to a card, or on a CPU through being decoded.
    pub weights: f64,
    /// Bytes/s of weights that are read from files.
    pub files: f64,
    /// Of a CPU, how fast it is at everything else.
    pub pace: Option<Pace>,
}

impl Rates {
    /// A card of the middle: what predictions rest on where none was measured.
    pub const CUDA: Self = Self {
        measured: false,
        products: 60e12,
        attention: 40e12,
        convolutions: 25e12,
        weights: 12e9,
        files: 1.5e9,
        pace: None,
    };
    /// Each core of a CPU of today without AVX-512.
    const CORE: Self = Self {
        measured: false,
        products: 40e9,
        attention: 25e9,
        convolutions: 25e9,
        weights: 1e9,
        files: 1.5e9,
        pace: None,
    };

    /// A CPU that nobody measured.
    #[must_use]
    pub fn of_cores(cores: u64) -> Self {
        let cores = cores.max(1) as f64;
        let one = Self::CORE;
        Self {
            products: one.products * cores,
            attention: one.attention * cores,
            convolutions: one.convolutions * cores,
            weights: one.weights * cores,
            pace: Some(Pace::of_cores(cores)),
            ..one
        }
    }

    /// Whether every rate is a number that can be divided by.
    #[must_use]
    pub fn usable(&self) -> bool {
        [self.products, self.attention, self.convolutions, self.weights, self.files]
            .iter()
            .all(|rate| rate.is_finite() && *rate >= 1.0)
            && self.pace.is_none_or(|pace| pace.usable())
    }
}

/// Arithmetic in FLOP, a multiplication and an addition being two.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Work {
    /// Matrix products.
    pub products: f64,
    /// Attention.
    pub attention: f64,
    /// Convolutions.
    pub convolutions: f64,
}

impl Work {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.products + self.attention + self.convolutions
    }

    /// Seconds at these rates.
    #[must_use]
    pub fn seconds(&self, rates: &Rates) -> f64 {
        self.products / rates.products + self.attention / rates.attention + self.convolutions / rates.convolutions
    }

    fn times(self, count: u64) -> Self {
        let count = count as f64;
        Self {
            products: self.products * count,
            attention: self.attention * count,
            convolutions: self.convolutions * count,
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            products: self.products + other.products,
            attention: self.attention + other.attention,
            convolutions: self.convolutions + other.convolutions,
        }
    }
}

/// A layer over `rows` rows.
fn layer(rows: u64, inp: u64, out: u64) -> f64 {
    2.0 * rows as f64 * inp as f64 * out as f64
}

/// Attention between `queries` and `keys` over `width` values of all heads.
fn seen(queries: u64, keys: u64, width: u64) -> f64 {
    4.0 * queries as f64 * keys as f64 * width as f64
}

/// One full pass of the transformer.
#[must_use]
pub fn full_pass(table: &ModelTable, job: &Job) -> Work {
    let t = &table.transformer;
    let (image, text) = (job.image_tokens(), job.text_tokens(&table.llava));
    let rows = image + text;
    let h = t.hidden;
    let double = layer(rows, h, 4 * h) + layer(rows, h, 2 * t.inner) + layer(2, h, 6 * h);
    let single = layer(rows, h, 4 * h) + layer(rows, h, 2 * t.inner) + layer(1, h, 3 * h);
    let states = (table.llava.tokens + table.llava.vision_positions).saturating_sub(1 + table.llava.crop);
    let refiner =
        layer(states, t.text, h) + t.refiner as f64 * (layer(states, h, 4 * h) + layer(states, h, 2 * t.refiner_inner));
    let frames = job.window_frames();
    let audio =
        layer(frames, t.audio, t.audio_inner) + layer(frames, t.audio_inner, t.audio_inner + t.audio_tokens * h);
    let adapter = layer(image, h, 2 * t.adapter) + layer(4 * t.audio_tokens * job.window, h, 2 * t.adapter);
    let ends = layer(image, 4 * t.latent, 2 * h) + layer(job.frame_tokens(), h, h);
    let blocks = (t.double + t.single) as f64;
    Work {
        products: t.double as f64 * double
            + t.single as f64 * single
            + refiner
            + audio
            + t.adapters as f64 * adapter
            + ends,
        attention: blocks * seen(rows, rows, h)
            + t.refiner as f64 * seen(states, states, h)
            + t.adapters as f64 * seen(image, 4 * t.audio_tokens, t.adapter),
        convolutions: 0.0,
    }
}

/// One cached pass: the last single block and the final layer.
#[must_use]
pub fn cached_pass(table: &ModelTable, job: &Job) -> Work {
    let t = &table.transformer;
    let rows = job.image_tokens() + job.text_tokens(&table.llava);
    Work {
        products: layer(rows, t.hidden, 4 * t.hidden + 2 * t.inner) + layer(rows, t.hidden, 4 * t.latent),
        attention: seen(rows, rows, t.hidden),
        convolutions: 0.0,
    }
}

/// Arithmetic of a whole stage.
#[must_use]
pub fn stage(table: &ModelTable, stage: Stage, job: &Job) -> Work {
    match stage {
        Stage::AudioEncoder => {
            let w = &table.whisper;
            let pieces = (job.seconds / 30.0).ceil().max(1.0);
            let layers = layer(w.positions, w.width, 4 * w.width + 2 * w.inner) * w.layers as f64;
            let convolutions = layer(2 * w.positions, 3 * w.bands, w.width) + layer(w.positions, 3 * w.width, w.width);
            Work {
                products: pieces * layers,
                attention: pieces * w.layers as f64 * seen(w.positions, w.positions, w.width),
                convolutions: pieces * convolutions,
            }
        }
        Stage::TextEncoder => text(table, job),
        Stage::Diffusion => {
            let (full, cached) = job.passes();
            full_pass(table, job).times(full).plus(cached_pass(table, job).times(cached))
        }
        Stage::ImageEncoder => encode(&table.vae, job),
        Stage::VaeDecode => decode(&table.vae, job),
    }
}

/// The picture once, both prompts.
fn text(table: &ModelTable, job: &Job) -> Work {
    let l = &table.llava;
    let rows = job.text_tokens(l) + l.crop + 1;
    let llama = l.layers as f64 * layer(rows, l.width, 2 * l.width + 2 * l.keys + 3 * l.inner);
    let patches = l.vision_positions;
    let vision = l.vision_layers as f64 * layer(patches, l.vision, 4 * l.vision + 2 * l.vision_inner)
        + layer(patches, l.projector, l.vision + l.width);
    let c = &table.clip;
    let clip = c.layers as f64 * layer(c.positions, c.width, 4 * c.width + 2 * c.inner);
    Work {
        products: 2.0 * (llama + clip) + vision,
        attention: 2.0 * l.layers as f64 * seen(rows, rows, l.width)
            + l.vision_layers as f64 * seen(patches, patches, l.vision),
        convolutions: 0.0,
    }
}

/// A convolution of 3x3x3 at so many positions.
fn convolution(positions: u64, inp: u64, out: u64, kernel: u64) -> f64 {
    2.0 * positions as f64 * inp as f64 * out as f64 * kernel.pow(3) as f64
}

/// Residual blocks that go from `inp` to `out` channels.
fn resnets(positions: u64, inp: u64, out: u64, count: u64) -> f64 {
    let shortcut = if inp == out { 0.0 } else { convolution(positions, inp, out, 1) };
    let first = convolution(positions, inp, out, 3) + convolution(positions, out, out, 3) + shortcut;
    first + count.saturating_sub(1) as f64 * 2.0 * convolution(positions, out, out, 3)
}

/// The middle block at `frames` frames of `area` positions.
fn middle(vae: &Vae, frames: u64, area: u64) -> Work {
    let deep = vae.channels.last().copied().unwrap_or(1);
    let rows = frames * area;
    let attention = if vae.attention { seen(rows, rows, deep) } else { 0.0 };
    let products = if vae.attention { layer(rows, deep, 4 * deep) } else { 0.0 };
    Work { products, attention, convolutions: resnets(rows, deep, deep, 2) }
}

/// Lengths of the tiles of a side: a quarter of each overlaps the next.
pub(super) fn tiles(length: u64, tile: u64) -> Vec<u64> {
    if length <= tile {
        return vec![length];
    }
    let stride = (tile * 3 / 4).max(1);
    (0..length).step_by(stride as usize).map(|start| tile.min(length - start)).collect()
}

/// Lengths of the decoder's runs over so many latent frames.
pub(super) fn runs(vae: &Vae, length: u64) -> Vec<u64> {
    let mut runs = tiles(length, vae.tile_length);
    if runs.len() > 1 {
        // A run is one frame longer than its nominal length, and a run of that frame alone is left out.
        let stride = (vae.tile_length * 3 / 4).max(1);
        let starts = (0..runs.len() as u64).map(|i| i * stride);
        runs = starts.map(|start| (vae.tile_length + 1).min(length - start)).collect();
        if runs.last() == Some(&1) {
            runs.pop();
        }
    }
    runs
}

fn decode(vae: &Vae, job: &Job) -> Work {
    let (h, w) = job.latent();
    let runs = runs(vae, job.kept_latent_frames);
    let (rows, columns) = (tiles(h, vae.tile_side), tiles(w, vae.tile_side));
    let area: u64 = rows.iter().sum::<u64>() * columns.iter().sum::<u64>();
    let mut all = Work::default();
    for frames in runs {
        let mut run = Work { convolutions: decode_tile(vae, frames, area), ..Work::default() };
        for row in &rows {
            for column in &columns {
                let here = middle(vae, frames, row * column);
                run = run.plus(Work { convolutions: 0.0, ..here });
            }
        }
        run.convolutions += middle(vae, frames, area).convolutions;
        all = all.plus(run);
    }
    all
}

/// Convolutions of the decoder without its middle, over latents of `frames` frames and `area` positions.
fn decode_tile(vae: &Vae, frames: u64, area: u64) -> f64 {
    let deep = vae.channels.last().copied().unwrap_or(1);
    let (mut frames, mut area, mut inp) = (frames, area, deep);
    let mut flops =
        convolution(frames * area, vae.latent, vae.latent, 1) + convolution(frames * area, vae.latent, deep, 3);
    for (i, &out) in vae.channels.iter().rev().enumerate() {
        flops += resnets(frames * area, inp, out, vae.resnets + 1);
        inp = out;
        let [time, space] = vae.grows.get(i).copied().unwrap_or([1, 1]);
        if [time, space] != [1, 1] {
            frames = 1 + (frames - 1) * time;
            area *= space * space;
            flops += convolution(frames * area, out, out, 3);
        }
    }
    flops + convolution(frames * area, inp, 3, 3)
}

/// One frame.
fn encode(vae: &Vae, job: &Job) -> Work {
    let (h, w) = job.latent();
    let (rows, columns) = (tiles(h, vae.tile_side), tiles(w, vae.tile_side));
    let latent_area: u64 = rows.iter().sum::<u64>() * columns.iter().sum::<u64>();
    let mut area = 64 * latent_area;
    let mut inp = vae.channels.first().copied().unwrap_or(1);
    let mut flops = convolution(area, 3, inp, 3);
    for (i, &out) in vae.channels.iter().enumerate() {
        flops += resnets(area, inp, out, vae.resnets);
        inp = out;
        let [_, space] = vae.shrinks.get(i).copied().unwrap_or([1, 1]);
        if space != 1 {
            area /= space * space;
            flops += convolution(area, out, out, 3);
        }
    }
    let centre = middle(vae, 1, latent_area);
    Work { convolutions: flops + centre.convolutions + convolution(area, inp, 2 * vae.latent, 3), ..centre }
}

/// Bytes of weights that a stage reads on a CPU over its whole work, from wherever the system keeps their pages.
#[must_use]
pub fn weights_read(table: &ModelTable, of: Stage, job: &Job, precision: Precision) -> f64 {
    let once = table.weights(of, precision) as f64;
    match of {
        Stage::Diffusion => {
            let (full, cached) = job.passes();
            let blocks = (table.transformer.double + table.transformer.single).max(1) as f64;
            once * (full as f64 + cached as f64 / blocks)
        }
        Stage::TextEncoder => 2.0 * once,
        _ => once,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{clip::ClipPlan, size::PictureSize};

    /// Section 4 of the specification, in TFLOP: one pass, the share of attention, the decoder, the encoder of one frame.
    #[test]
    fn the_work_is_that_of_the_specification() {
        let table = ModelTable::published().unwrap();
        for (width, height, frames, pass, share, decoder, encoder) in [
            (96, 96, 4, 10.45, 0.04, 0.9, 0.11),
            (256, 256, 16, 33.06, 0.10, 19.5, 0.81),
            (512, 512, 64, 529.0, 0.51, 577.8, 5.03),
            (704, 704, 128, 4166.54, 0.78, 2244.1, 9.87),
            (704, 768, 129, 4861.31, 0.80, 2404.8, 10.57),
        ] {
            let clip = ClipPlan::new(frames, 1, 33);
            let job = Job::new(PictureSize { width, height }, &clip, 50, 2).unwrap();
            let near = |found: f64, expected: f64, within: f64, what: &str| {
                assert!(
                    (found / expected - 1.0).abs() < within,
                    "{what} of {width}x{height}: {found}, expected {expected}"
                );
            };
            let work = full_pass(&table, &job);
            near(work.total() / 1e12, pass, 0.03, "pass");
            assert!((work.attention / work.total() - share).abs() < 0.02);
            near(stage(&table, Stage::VaeDecode, &job).total() / 1e12, decoder, 0.05, "decoder");
            near(stage(&table, Stage::ImageEncoder, &job).total() / 1e12, encoder, 0.05, "encoder");
        }
        let job = Job::new(PictureSize { width: 704, height: 768 }, &ClipPlan::new(129, 1, 33), 50, 2).unwrap();
        near_text(&table, &job);
        let cached = stage(&table, Stage::Diffusion, &job).total() / 1e15;
        assert!((cached / 294.91 - 1.0).abs() < 0.01, "{cached} PFLOP");
        let job = Job { no_feature_cache: true, ..job };
        let full = stage(&table, Stage::Diffusion, &job).total();
        assert!(!job.caches() && (full / full_pass(&table, &job).times(100).total() - 1.0).abs() < 1e-9);
    }

    /// The Llama's 9.3 TFLOP for each of two prompts, 0.37 for the picture, 0.013 for each prompt of CLIP.
    fn near_text(table: &ModelTable, job: &Job) {
        let found = stage(table, Stage::TextEncoder, job).total() / 1e12;
        assert!((found / 19.0 - 1.0).abs() < 0.05, "{found} TFLOP");
        let heard = stage(table, Stage::AudioEncoder, job).total() / 1e12;
        assert!((heard / 0.037 - 1.0).abs() < 0.15, "{heard} TFLOP");
    }

    #[test]
    fn a_rate_of_nothing_is_not_divided_by() {
        assert!(Rates::CUDA.usable() && Rates::of_cores(0).usable());
        assert!(!Rates { files: 0.0, ..Rates::CUDA }.usable() && !Rates { products: f64::NAN, ..Rates::CUDA }.usable());
        let rates = Rates::of_cores(2);
        let still = rates.pace.map(|pace| Pace { moved: 0.0, ..pace });
        assert!(!Rates { pace: still, ..rates }.usable());
    }
}
