//! Where a stage's networks are read from.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde_json::{Value, json};

use crate::{
    Error, Result,
    blueprint::{Config, Network, STAGES, Shapes},
    diffusion::TransformerConfig,
    text::TextConfig,
    vae::VaeConfig,
    weights::{Weights, read_json},
};

/// One network of a stage.
pub struct Part {
    /// What its config says.
    pub config: Config,
    /// Its tensors, under the network's names.
    pub weights: Weights,
    /// Its folder below the stage's, in the native layout; empty for the stage's own.
    pub folder: PathBuf,
    /// What messages call the whole of its files.
    pub place: PathBuf,
}

/// A stage: its networks, its `config.json` in the native layout, and the files that go with it.
pub struct Source {
    /// The networks.
    pub parts: Vec<Part>,
    /// The native `config.json`.
    pub config: Value,
    /// Files to copy: from where, and to where below the stage's folder.
    pub copies: Vec<(PathBuf, PathBuf)>,
}

impl Source {
    /// Opens a stage's folder in the native layout; only headers are read.
    ///
    /// Errors: a stage that is not one; `config.json` missing or wrong; as [`Weights::open`].
    pub fn native(models: &Path, stage: &str) -> Result<Self> {
        let folder = models.join(stage);
        let Some((_, networks)) = STAGES.iter().find(|(name, _)| *name == stage) else {
            return Err(Error::input("stages", format!("{stage:?}, which is none of {}", names().join(", "))));
        };
        let path = folder.join("config.json");
        let mut parts = Vec::new();
        let mut copies = Vec::new();
        for (network, below) in *networks {
            let place = folder.join(below);
            let config = config(*network, &path)?;
            let weights = Weights::open(&place, DType::F32, &Device::Cpu)?;
            parts.push(Part { config, weights, folder: below.into(), place: place.clone() });
            let tokenizer = place.join("tokenizer.json");
            if tokenizer.is_file() {
                copies.push((tokenizer, Path::new(below).join("tokenizer.json")));
            }
        }
        let config = read_json(&path)?;
        Ok(Self { parts, config, copies })
    }

    /// Writes what goes with the weights: `config.json`, and the files to copy.
    pub(super) fn write_rest(&self, folder: &Path) -> Result<()> {
        for (from, below) in &self.copies {
            let to = folder.join(below);
            if let Some(parent) = to.parent() {
                std::fs::create_dir_all(parent).map_err(|e| Error::file(parent, e))?;
            }
            std::fs::copy(from, &to).map_err(|e| Error::file(from, e))?;
        }
        let mut config = self.config.clone();
        for part in &self.parts {
            if let (Config::Llava(llava), Some(said)) =
                (&part.config, config.get_mut("llava").and_then(Value::as_object_mut))
            {
                // Hidden states count from the end, so a file without its last layers must say how many there were.
                let shapes: Shapes = part.weights.list().into_iter().map(|t| (t.name, t.shape)).collect();
                let (vision, layers) = crate::blueprint::LlavaSizes::depths(&shapes);
                said.insert("layers".to_owned(), json!(llava.layers.unwrap_or(layers)));
                said.insert("vision_layers".to_owned(), json!(llava.vision_layers.unwrap_or(vision)));
            }
        }
        let path = folder.join("config.json");
        let mut text = serde_json::to_vec_pretty(&config).map_err(|e| Error::file(&path, e))?;
        text.push(b'\n');
        std::fs::write(&path, text).map_err(|e| Error::file(&path, e))
    }
}

/// The names of all stages.
pub(crate) fn names() -> Vec<&'static str> {
    STAGES.iter().map(|(name, _)| *name).collect()
}

fn config(network: Network, path: &Path) -> Result<Config> {
    let vae = || -> Result<VaeConfig> {
        let config: VaeConfig = read_json(path)?;
        config.validate().map_err(|e| Error::file(path, e))?;
        Ok(config)
    };
    Ok(match network {
        Network::Whisper => Config::Whisper(read_json(path)?),
        Network::Llava => Config::Llava(Box::new(read_json::<TextConfig>(path)?.llava)),
        Network::Clip => Config::Clip(read_json::<TextConfig>(path)?.clip),
        Network::VaeEncoder => Config::VaeEncoder(vae()?),
        Network::VaeDecoder => Config::VaeDecoder(vae()?),
        Network::Transformer => Config::Transformer(TransformerConfig::open(path)?),
    })
}
