//! What the planner knows of a checkpoint: sizes and numbers of values, from headers alone.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use planner::table::{self, ModelTable};

use super::{ClipSizes, Config, LlavaSizes, Network, Shapes, Spec, TransformerSizes, VaeHalf, VaeSizes, WhisperSizes};
use crate::{
    Error, Result,
    audio::AudioConfig,
    checkpoint::{Choice, Stage},
    convert::Source,
    text::{LlavaConfig, NEGATIVE_PROMPT, tokens::PromptTokenizer},
    vae::VaeConfig,
    weights::{Encoding, Listed},
};

/// Bytes on the heap for each tensor of an opened checkpoint: its name, its place, its shape.
const ENTRY_BYTES: u64 = 320;
/// Bytes on the heap for a tokenizer, and for each byte of its file.
const TOKENIZER_BYTES: u64 = 120_000;
const TOKENIZER_FACTOR: u64 = 6;

/// The table of a folder of models, in the native layout or in the official one; only headers are read.
///
/// Errors: a stage's files are missing or malformed, or its tensors are not those of its network.
pub fn model_table(models: &Path, choice: Choice) -> Result<ModelTable> {
    let mut found = Found::default();
    let mut tables = Vec::new();
    for stage in Stage::ALL {
        let source = Source::open(models, stage, choice)?;
        let mut bytes = 0;
        for part in &source.parts {
            let listed = part.weights.list();
            bytes += listed.len() as u64 * ENTRY_BYTES;
            let shapes: Shapes = listed.iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
            let tokenizer = part.place.join("tokenizer.json");
            if let Ok(file) = std::fs::metadata(&tokenizer) {
                bytes += TOKENIZER_BYTES + file.len().saturating_mul(TOKENIZER_FACTOR);
            }
            found.take(&part.config, &shapes, &part.place).map_err(|fault| fault.at(&part.place))?;
            let specs = part.config.expected(&shapes).map_err(|missing| Fault::from(missing).at(&part.place))?;
            let network = part.config.network();
            found.parts.extend(parts(network, &specs));
            found.stored.extend(stored(network, &listed).map(|precision| (stage.into(), precision)));
            let widest = listed.iter().filter(|t| t.shape.len() > 1).max_by_key(|t| t.bytes);
            if widest.is_some_and(|t| t.encoding == Encoding::F32) {
                found.in_f32.push(network.into());
            }
        }
        tables.push((stage.into(), bytes));
    }
    found.table(models, tables)
}

/// The sizes of the transformer below a folder of models, and the precision of its large layers; only headers are read.
///
/// Errors: as [`model_table`], of its stage alone.
pub fn transformer_table(models: &Path, choice: Choice) -> Result<(table::Transformer, planner::Precision)> {
    let (found, place) = found(models, Stage::Diffusion, choice)?;
    let precision = found.precision();
    let sizes = found.transformer.ok_or_else(|| Error::file(&place, "a network is missing"))?;
    Ok((sizes, precision))
}

/// The sizes of LLaVA and CLIP below a folder of models, and the precision of the Llama's large layers.
///
/// Errors: as [`model_table`], of their stage alone.
pub fn text_tables(models: &Path) -> Result<(table::Llava, table::Clip, planner::Precision)> {
    let (found, place) = found(models, Stage::TextEncoder, Choice::Auto)?;
    let precision = found.precision();
    match (found.llava, found.clip) {
        (Some(llava), Some(clip)) => Ok((llava, clip, precision)),
        _ => Err(Error::file(&place, "a network is missing")),
    }
}

/// What one stage has, and where.
fn found(models: &Path, stage: Stage, choice: Choice) -> Result<(Found, PathBuf)> {
    let source = Source::open(models, stage, choice)?;
    let mut found = Found::default();
    for part in &source.parts {
        let listed = part.weights.list();
        let shapes: Shapes = listed.iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
        found.take(&part.config, &shapes, &part.place).map_err(|fault| fault.at(&part.place))?;
        found.stored.extend(stored(part.config.network(), &listed).map(|precision| (stage.into(), precision)));
    }
    Ok((found, models.to_owned()))
}

impl From<Stage> for planner::Stage {
    fn from(stage: Stage) -> Self {
        match stage {
            Stage::AudioEncoder => Self::AudioEncoder,
            Stage::TextEncoder => Self::TextEncoder,
            Stage::ImageEncoder => Self::ImageEncoder,
            Stage::Diffusion => Self::Diffusion,
            Stage::VaeDecode => Self::VaeDecode,
        }
    }
}

enum Fault {
    Missing(super::Missing),
    Error(Error),
}

impl Fault {
    fn at(self, place: &Path) -> Error {
        match self {
            Self::Missing(missing) => Error::file(place, format!("{}: {}", missing.name, missing.reason)),
            Self::Error(error) => error,
        }
    }
}

impl From<super::Missing> for Fault {
    fn from(missing: super::Missing) -> Self {
        Self::Missing(missing)
    }
}

/// Sizes as they are found, network by network.
#[derive(Default)]
struct Found {
    whisper: Option<table::Whisper>,
    llava: Option<table::Llava>,
    clip: Option<table::Clip>,
    vae: Option<table::Vae>,
    transformer: Option<table::Transformer>,
    parts: Vec<table::Part>,
    stored: Vec<(planner::Stage, planner::Precision)>,
    in_f32: Vec<table::Network>,
}

impl Found {
    /// Of the large layers; 16 bits where the files have none that is less.
    fn precision(&self) -> planner::Precision {
        self.stored.first().map_or(planner::Precision::Bf16, |(_, precision)| *precision)
    }

    fn take(&mut self, config: &Config, shapes: &Shapes, place: &Path) -> Result<(), Fault> {
        match config {
            Config::Whisper(config) => self.whisper = Some(whisper(&WhisperSizes::of(shapes, config)?, config)),
            Config::Llava(config) => {
                let sizes = LlavaSizes::of(shapes, config)?;
                let tokenizer = PromptTokenizer::open(place, config, sizes.words).map_err(Fault::Error)?;
                let negative = tokenizer.encode(NEGATIVE_PROMPT).map_err(Fault::Error)?.prompt;
                self.llava = Some(llava(&sizes, config, [tokenizer.crop(), tokenizer.limit(), negative]));
            }
            Config::Clip(config) => self.clip = Some(clip(&ClipSizes::of(shapes, config)?)),
            Config::VaeEncoder(config) => {
                VaeSizes::of(shapes, config, VaeHalf::Encoder)?;
            }
            Config::VaeDecoder(config) => {
                let sizes = VaeSizes::of(shapes, config, VaeHalf::Decoder)?;
                self.vae = Some(vae(&sizes, config));
            }
            Config::Transformer(config) => {
                self.transformer = Some(transformer(&TransformerSizes::of(shapes, config)?));
            }
        }
        Ok(())
    }

    fn table(self, models: &Path, tables: Vec<(planner::Stage, u64)>) -> Result<ModelTable> {
        let (Some(whisper), Some(llava), Some(clip), Some(vae), Some(transformer)) =
            (self.whisper, self.llava, self.clip, self.vae, self.transformer)
        else {
            return Err(Error::file(models, "a network is missing"));
        };
        let name = models.display().to_string();
        let Self { parts, stored, in_f32, .. } = self;
        let table = ModelTable { name, whisper, llava, clip, vae, transformer, parts, tables, stored, in_f32 };
        table.check().map_err(|e| Error::file(models, e))?;
        Ok(table)
    }
}

fn whisper(sizes: &WhisperSizes, config: &AudioConfig) -> table::Whisper {
    let &WhisperSizes { width, inner, layers, bands, positions } = sizes;
    table::Whisper {
        width: width as u64,
        inner: inner as u64,
        layers: layers as u64,
        bands: bands as u64,
        positions: positions as u64,
        heads: config.heads as u64,
    }
}

/// With the tokens before the prompt, of the longest prompt, and of the negative one.
fn llava(sizes: &LlavaSizes, config: &LlavaConfig, [crop, limit, negative]: [usize; 3]) -> table::Llava {
    table::Llava {
        vision: sizes.vision as u64,
        vision_inner: sizes.vision_inner as u64,
        vision_layers: sizes.vision_layers as u64,
        vision_heads: config.vision_heads as u64,
        vision_positions: sizes.vision_positions as u64,
        patch: sizes.patch as u64,
        projector: sizes.projector as u64,
        width: sizes.width as u64,
        keys: sizes.keys as u64,
        inner: sizes.inner as u64,
        layers: sizes.layers as u64,
        heads: config.heads as u64,
        tokens: (crop + config.prompt_tokens) as u64,
        crop: crop as u64,
        tail: config.prompt_tokens.saturating_sub(limit) as u64,
        negative: negative as u64,
    }
}

fn clip(sizes: &ClipSizes) -> table::Clip {
    let &ClipSizes { width, inner, layers, positions, .. } = sizes;
    table::Clip { width: width as u64, inner: inner as u64, layers: layers as u64, positions: positions as u64 }
}

fn vae(sizes: &VaeSizes, config: &VaeConfig) -> table::Vae {
    let scales: Vec<[u64; 2]> = (0..sizes.channels.len())
        .map(|i| {
            let [time, space, _] = config.scale_of_block(i);
            [time as u64, space as u64]
        })
        .collect();
    table::Vae {
        channels: sizes.channels.iter().map(|c| *c as u64).collect(),
        shrinks: scales.clone(),
        grows: scales,
        resnets: sizes.resnets as u64,
        latent: sizes.latent as u64,
        attention: sizes.attention,
        tile_side: config.tile_latent_side() as u64,
        tile_length: config.tile_latent_length() as u64,
    }
}

fn transformer(sizes: &TransformerSizes) -> table::Transformer {
    table::Transformer {
        hidden: sizes.hidden as u64,
        head: sizes.head as u64,
        inner: sizes.inner as u64,
        double: sizes.double as u64,
        single: sizes.single as u64,
        refiner: sizes.refiner as u64,
        refiner_inner: sizes.refiner_inner as u64,
        latent: sizes.latent as u64,
        text: sizes.text as u64,
        pooled: sizes.pooled as u64,
        audio: sizes.audio as u64,
        audio_inner: sizes.audio_inner as u64,
        audio_tokens: sizes.audio_tokens as u64,
        adapters: sizes.adapters as u64,
        adapter: sizes.adapter as u64,
    }
}

/// The prefixes of blocks that stand one after the other.
const BLOCKS: [&str; 6] = [
    "double_blocks",
    "single_blocks",
    "language_model.model.layers",
    "vision_tower.vision_model.encoder.layers",
    "text_model.encoder.layers",
    "encoder.layers",
];

/// A network's tensors by block, those of alike blocks together; what is in no block comes last.
fn parts(network: Network, specs: &[Spec]) -> Vec<table::Part> {
    let mut blocks: BTreeMap<(usize, usize), table::Part> = BTreeMap::new();
    for spec in specs {
        let place = BLOCKS.iter().enumerate().find_map(|(kind, prefix)| {
            let number = spec.name.strip_prefix(prefix)?.strip_prefix('.')?.split('.').next()?;
            Some((kind, number.parse().ok()?))
        });
        let (kind, number) = place.unwrap_or((BLOCKS.len(), 0));
        let part = blocks.entry((kind, number)).or_insert_with(|| table::Part {
            network: network.into(),
            name: BLOCKS.get(kind).map(|name| (*name).to_owned()).unwrap_or_default(),
            count: 1,
            large: 0,
            rows: 0,
            other: 0,
            heap: 0,
            on_disk: 0,
        });
        let values = spec.parameters() as u64;
        if network.quantises(&spec.name, &spec.shape) {
            part.large += values;
            part.rows += spec.shape.first().map_or(0, |rows| *rows as u64);
        } else if spec.name.ends_with("embed_tokens.weight") || spec.name.ends_with("token_embedding.weight") {
            part.on_disk += values;
        } else {
            part.other += values;
            if is_copied(spec) {
                part.heap += values;
            }
        }
    }
    let mut parts: Vec<table::Part> = Vec::new();
    for part in blocks.into_values() {
        match parts.last_mut() {
            Some(last) if *last == (table::Part { count: last.count, ..part.clone() }) => last.count += 1,
            _ => parts.push(part),
        }
    }
    parts
}

/// Whether a CPU copies a tensor when its stage is opened: everything but matrices, and tables of positions.
fn is_copied(spec: &Spec) -> bool {
    spec.shape.len() != 2
        || spec.name.ends_with("position_embedding.weight")
        || spec.name.ends_with("embed_positions.weight")
}

impl From<Network> for table::Network {
    fn from(network: Network) -> Self {
        match network {
            Network::Whisper => Self::Whisper,
            Network::Llava => Self::Llava,
            Network::Clip => Self::Clip,
            Network::VaeEncoder => Self::VaeEncoder,
            Network::Transformer => Self::Transformer,
            Network::VaeDecoder => Self::VaeDecoder,
        }
    }
}

/// The precision of a network's large layers: that of the largest of them, whatever it is nearest to.
fn stored(network: Network, listed: &[Listed]) -> Option<planner::Precision> {
    use planner::Precision;
    let large = listed.iter().filter(|t| network.quantises(&t.name, &t.shape)).max_by_key(|t| t.bytes)?;
    Some(match large.encoding {
        Encoding::F8E4M3 => Precision::Fp8,
        Encoding::I8 => Precision::Int8,
        Encoding::Q8_0 | Encoding::Q6K => Precision::Q8_0,
        Encoding::Q5K | Encoding::Q4K | Encoding::Q4_0 => Precision::Q4K,
        Encoding::F32 | Encoding::F16 | Encoding::Bf16 | Encoding::Other(_) => Precision::Bf16,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The planner's embedded table, held against the blueprints of the published networks.
    #[test]
    fn the_planners_table_of_the_published_model_is_that_of_the_networks() {
        let published = ModelTable::published().unwrap();
        let vae_config = VaeConfig {
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            latent_channels: 16,
            norm_num_groups: 32,
            sample_size: 256,
            sample_tsize: 64,
            scaling_factor: 0.476_986,
            shift_factor: None,
            time_compression_ratio: 4,
            spatial_compression_ratio: 8,
            mid_block_add_attention: true,
            mid_block_causal_attn: true,
            tile_latent: None,
            tile_latent_t: None,
        };
        assert_eq!(published.whisper, whisper(&WhisperSizes::PUBLISHED, &AudioConfig::default()));
        assert_eq!(published.llava, llava(&LlavaSizes::NEEDED, &LlavaConfig::default(), [95, 249, 41]));
        assert_eq!(published.clip, clip(&ClipSizes::PUBLISHED));
        assert_eq!(published.vae, vae(&VaeSizes::published(), &vae_config));
        assert_eq!(published.transformer, transformer(&TransformerSizes::PUBLISHED));
        let vae = VaeSizes::published();
        let all: Vec<table::Part> = [
            (Network::Transformer, TransformerSizes::PUBLISHED.tensors()),
            (Network::Llava, LlavaSizes::NEEDED.tensors()),
            (Network::Clip, ClipSizes::PUBLISHED.tensors()),
            (Network::Whisper, WhisperSizes::PUBLISHED.tensors()),
            (Network::VaeEncoder, vae.tensors(VaeHalf::Encoder)),
            (Network::VaeDecoder, vae.tensors(VaeHalf::Decoder)),
        ]
        .into_iter()
        .flat_map(|(network, specs)| parts(network, &specs))
        .collect();
        assert_eq!(published.parts, all);
    }
}
