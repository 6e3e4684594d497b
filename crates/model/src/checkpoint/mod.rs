//! Where the weights of a stage are: in the native layout, or in the tree of the official download as it is.
//!
//! Native is one folder a stage, `<models>/<stage>`, with `config.json` and files of tensors in any form; the text
//! encoder's has two subfolders, `llava` and `clip`. The official tree is given by the folder `ckpts`, or by one that
//! holds `ckpts` or `weights/ckpts`. Each stage is looked for by itself, natively first.

mod choose;
mod names;
pub(crate) mod official;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    str::FromStr,
};

use candle_core::Device;

pub use self::names::network_name;
use crate::{
    Error, Precision, Result, blueprint,
    weights::{Encoding, Weights},
};

/// A part of the system with weights of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Whisper's encoder.
    AudioEncoder,
    /// LLaVA and CLIP.
    TextEncoder,
    /// The VAE's encoder.
    ImageEncoder,
    /// The transformer.
    Diffusion,
    /// The VAE's decoder.
    VaeDecode,
}

impl Stage {
    /// All of them, in the order in which a generation needs them.
    pub const ALL: [Self; 5] =
        [Self::AudioEncoder, Self::TextEncoder, Self::ImageEncoder, Self::Diffusion, Self::VaeDecode];

    /// The name of its folder, its binary and its log lines.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::AudioEncoder => "audio-encoder",
            Self::TextEncoder => "text-encoder",
            Self::ImageEncoder => "image-encoder",
            Self::Diffusion => "diffusion",
            Self::VaeDecode => "vae-decode",
        }
    }

    /// Its networks.
    #[must_use]
    pub fn networks(self) -> &'static [Network] {
        match self {
            Self::AudioEncoder => &[Network::Whisper],
            Self::TextEncoder => &[Network::Llava, Network::Clip],
            Self::ImageEncoder | Self::VaeDecode => &[Network::Vae],
            Self::Diffusion => &[Network::Transformer],
        }
    }
}

/// A network, as checkpoints are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Network {
    /// Whisper, or its encoder alone.
    Whisper,
    /// LLaVA-Llama-3.
    Llava,
    /// CLIP, or its text half alone.
    Clip,
    /// The video VAE, or one half of it.
    Vae,
    /// The video transformer.
    Transformer,
}

impl Network {
    /// Its folder in the official tree.
    #[must_use]
    pub fn official_folder(self) -> &'static str {
        match self {
            Self::Whisper => "whisper-tiny",
            Self::Llava => "llava_llama_image",
            Self::Clip => "text_encoder_2",
            Self::Vae => "hunyuan-video-t2v-720p/vae",
            Self::Transformer => "hunyuan-video-t2v-720p/transformers",
        }
    }

    /// Its folder within its stage's native one.
    fn native_folder(self, stage: &Path) -> PathBuf {
        match self {
            Self::Llava => stage.join("llava"),
            Self::Clip => stage.join("clip"),
            _ => stage.to_owned(),
        }
    }
}

/// How files are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One folder a stage.
    Native,
    /// The official download.
    Official,
}

/// In which form the transformer's weights are taken, where the official tree has several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// The most exact that is there: bf16, else fp8, else int8.
    #[default]
    Auto,
    /// bf16 and nothing else.
    Bf16,
    /// fp8 with its map of scales and nothing else.
    Fp8,
    /// int8 with scales by row and nothing else.
    Int8,
}

impl Choice {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Auto, Self::Bf16, Self::Fp8, Self::Int8];

    /// The name that the command line takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
        }
    }

    /// Whether the transformer's large layers, stored in these encodings, are in the form that was chosen. Files in
    /// 8 bits keep some of them in 16.
    fn is(self, stored: &BTreeSet<&str>) -> bool {
        let has = |encoding: Encoding| stored.contains(encoding.name());
        match self {
            Self::Auto => true,
            Self::Bf16 => stored.len() == 1 && has(Encoding::Bf16),
            Self::Fp8 => has(Encoding::F8E4M3),
            Self::Int8 => has(Encoding::I8),
        }
    }
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let names = || Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|choice| choice.name() == text).ok_or_else(|| format!("not one of {}", names()))
    }
}

/// How a stage is opened.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Where its networks run.
    pub device: Device,
    /// The type in which they compute.
    pub precision: Precision,
    /// The form of the transformer's weights.
    pub choice: Choice,
}

impl Default for Setup {
    /// The CPU, f32, and whatever is there.
    fn default() -> Self {
        Self { device: Device::Cpu, precision: Precision::F32, choice: Choice::Auto }
    }
}

/// The files of one network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Which network it is.
    pub network: Network,
    /// The folder of its files, also of its tokenizer.
    pub folder: PathBuf,
    /// The files that hold its tensors.
    pub files: Vec<PathBuf>,
}

impl Source {
    /// Opens the tensors under the network's own names.
    ///
    /// Errors: as [`Weights::open_files`]; the transformer's weights are in another form than the one chosen.
    pub fn open(&self, setup: &Setup) -> Result<Weights> {
        let rename = |name: &str| network_name(self.network, name);
        let weights = Weights::open_files(&self.folder, &self.files, &rename, setup.precision.dtype(), &setup.device)?;
        if self.network == Network::Transformer && setup.choice != Choice::Auto {
            let listed = weights.list();
            let large = listed.iter().filter(|t| blueprint::Network::Transformer.quantises(&t.name, &t.shape));
            let stored: BTreeSet<&str> = large.map(|tensor| tensor.encoding.name()).collect();
            if !setup.choice.is(&stored) {
                let found = stored.into_iter().collect::<Vec<_>>().join(", ");
                let reason = format!("its large layers are in {found}; {} was chosen", setup.choice.name());
                return Err(Error::file(&self.folder, reason));
            }
        }
        Ok(weights)
    }
}

/// A stage's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// How they are laid out.
    pub layout: Layout,
    /// `<models>/<stage>`, or the official tree's `ckpts`.
    pub folder: PathBuf,
    /// One for each of the stage's networks.
    pub sources: Vec<Source>,
}

impl Located {
    /// The files of one of the stage's networks.
    ///
    /// Errors: the stage has no such network.
    pub fn source(&self, network: Network) -> Result<&Source> {
        let found = self.sources.iter().find(|source| source.network == network);
        found.ok_or_else(|| Error::file(&self.folder, format!("no files of {network:?}")))
    }

    /// The file that says what tensor shapes cannot, of the stage or of one of its networks.
    pub(crate) fn config(&self, network: Network) -> Result<PathBuf> {
        Ok(match self.layout {
            Layout::Native => self.folder.join("config.json"),
            Layout::Official => self.source(network)?.folder.join("config.json"),
        })
    }

    /// Everything that decides what the stage computes: tensors, configs and tokenizers.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = self.sources.iter().flat_map(|source| source.files.clone()).collect();
        let mut folders: Vec<&PathBuf> = self.sources.iter().map(|source| &source.folder).collect();
        if self.layout == Layout::Native {
            folders.push(&self.folder);
        }
        for folder in folders {
            let listed = std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
            files.extend(listed.filter(|path| path.extension().is_some_and(|e| e == "json" || e == "txt")));
        }
        files.sort();
        files.dedup();
        files
    }
}

/// The files that decide what a stage computes; none where they cannot be found.
#[must_use]
pub fn files(models: &Path, stage: Stage, choice: Choice) -> Vec<PathBuf> {
    locate(models, stage, choice).map(|located| located.files()).unwrap_or_default()
}

/// Finds a stage's files below `models`.
///
/// Errors: there are none (the message lists where they were looked for), or some are missing.
pub fn locate(models: &Path, stage: Stage, choice: Choice) -> Result<Located> {
    let native = models.join(stage.name());
    if native.is_dir() {
        let source = |network: &Network| {
            let folder = network.native_folder(&native);
            Ok(Source { network: *network, files: Weights::files_of(&folder)?, folder })
        };
        let sources = stage.networks().iter().map(source).collect::<Result<_>>()?;
        return Ok(Located { layout: Layout::Native, folder: native, sources });
    }
    let mut looked = vec![native];
    for root in [models.to_owned(), models.join("ckpts"), models.join("weights/ckpts")] {
        let folders: Vec<PathBuf> = stage.networks().iter().map(|n| root.join(n.official_folder())).collect();
        if folders.iter().any(|folder| folder.is_dir()) {
            let source = |(network, folder): (&Network, PathBuf)| {
                let files = match network {
                    Network::Transformer => choose::transformer(&folder, choice)?,
                    _ => choose::one_form(&folder)?,
                };
                Ok(Source { network: *network, folder, files })
            };
            let sources = stage.networks().iter().zip(folders).map(source).collect::<Result<_>>()?;
            return Ok(Located { layout: Layout::Official, folder: root, sources });
        }
        looked.extend(folders);
    }
    let looked: Vec<String> = looked.iter().map(|path| path.display().to_string()).collect();
    let reason = format!(
        "no weights of {}: looked for {}; `avatar weights fetch` downloads the official ones, `avatar weights convert` \
         writes the native layout, `avatar weights synth` makes a small random checkpoint",
        stage.name(),
        looked.join(", ")
    );
    Err(Error::file(models, reason))
}
