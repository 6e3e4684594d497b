//! Where a stage's networks are read from.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::{
    Error, Result,
    audio::AudioConfig,
    blueprint::{Config, LlavaSizes, Network},
    checkpoint::{self, Choice, Layout, Located, Setup, Stage, locate, official},
    diffusion::TransformerConfig,
    text::{self, ClipConfig, TextConfig},
    vae::VaeConfig,
    weights::{Weights, read_json},
};

/// One network of a stage.
pub struct Part {
    /// What its config says.
    pub config: Config,
    /// Its tensors, under the network's names.
    pub weights: Weights,
    /// What messages call the whole of its files.
    pub place: PathBuf,
    /// The files that hold its tensors.
    pub files: Vec<PathBuf>,
}

/// A stage: its networks, its `config.json` in the native layout, and the files that go with it.
pub struct Source {
    /// Which stage.
    pub stage: Stage,
    /// The networks.
    pub parts: Vec<Part>,
    /// The native `config.json`.
    config: Value,
    /// Files to copy: from where, and to where below the stage's folder.
    copies: Vec<(PathBuf, PathBuf)>,
}

impl Source {
    /// Opens a stage's files, in the native layout or in the official one; only headers are read.
    ///
    /// Errors: as [`locate`], [`read_json`] and [`Weights::open`].
    pub fn open(models: &Path, stage: Stage, choice: Choice) -> Result<Self> {
        let located = locate(models, stage, choice)?;
        let setup = Setup { choice, ..Setup::default() };
        let mut source = Self { stage, parts: Vec::new(), config: json!({}), copies: Vec::new() };
        for found in &located.sources {
            let weights = found.open(&setup)?;
            let network = Network::of(stage, found.network);
            let (config, text) = config(&located, network, found.network, &weights)?;
            match located.layout {
                Layout::Native => source.config = read_json(&located.config(found.network)?)?,
                Layout::Official => source.say(network, text),
            }
            let tokenizer = found.folder.join("tokenizer.json");
            if tokenizer.is_file() {
                source.copies.push((tokenizer, Path::new(network.folder()).join("tokenizer.json")));
            }
            let (place, files) = (found.folder.clone(), found.files.clone());
            source.parts.push(Part { config, weights, place, files });
        }
        source.say_depths();
        Ok(source)
    }

    /// Puts a network's config into the stage's: the text encoder's has one for each of its networks.
    fn say(&mut self, network: Network, text: Value) {
        match (network.folder(), self.config.as_object_mut()) {
            ("", _) | (_, None) => self.config = text,
            (key, Some(all)) => drop(all.insert(key.to_owned(), text)),
        }
    }

    /// Says how many layers LLaVA's whole networks have: hidden states count from the end, and the last layers are
    /// left out.
    fn say_depths(&mut self) {
        for part in &self.parts {
            let Config::Llava(llava) = &part.config else { continue };
            let shapes = part.weights.list().into_iter().map(|t| (t.name, t.shape)).collect();
            let (vision, layers) = LlavaSizes::depths(&shapes);
            let Some(all) = self.config.as_object_mut() else { continue };
            let said = all.entry("llava").or_insert_with(|| json!({}));
            if let Some(said) = said.as_object_mut() {
                said.insert("layers".to_owned(), json!(llava.layers.unwrap_or(layers)));
                said.insert("vision_layers".to_owned(), json!(llava.vision_layers.unwrap_or(vision)));
            }
        }
    }

    /// Writes what goes with the weights: `config.json`, and the files to copy.
    pub(super) fn write_rest(&self, folder: &Path) -> Result<()> {
        for (from, below) in &self.copies {
            std::fs::copy(from, folder.join(below)).map_err(|e| Error::file(from, e))?;
        }
        let path = folder.join("config.json");
        let mut text = serde_json::to_vec_pretty(&self.config).map_err(|e| Error::file(&path, e))?;
        text.push(b'\n');
        std::fs::write(&path, text).map_err(|e| Error::file(&path, e))
    }
}

/// A network's config, and how the native layout writes it.
fn config(
    located: &Located,
    network: Network,
    published: checkpoint::Network,
    weights: &Weights,
) -> Result<(Config, Value)> {
    let path = located.config(published)?;
    let native = located.layout == Layout::Native;
    let text = |value: serde_json::Result<Value>| value.map_err(|e| Error::file(&path, e));
    Ok(match network {
        Network::Whisper => {
            let config: AudioConfig = if native { read_json(&path)? } else { official::audio(&path)? };
            let value = text(serde_json::to_value(&config))?;
            (Config::Whisper(config), value)
        }
        Network::Llava => {
            let config = if native { read_json::<TextConfig>(&path)?.llava } else { official::llava(&path)? };
            let value = text(serde_json::to_value(&config))?;
            (Config::Llava(Box::new(config)), value)
        }
        Network::Clip => {
            let config: ClipConfig = match native {
                true => read_json::<TextConfig>(&path)?.clip,
                false => official::clip(&path, text::clip::vocabulary(weights)?)?,
            };
            let value = text(serde_json::to_value(&config))?;
            (Config::Clip(config), value)
        }
        Network::VaeEncoder | Network::VaeDecoder => {
            let config = VaeConfig::of(located)?;
            let value = text(serde_json::to_value(&config))?;
            let half = if network == Network::VaeEncoder { Config::VaeEncoder } else { Config::VaeDecoder };
            (half(config), value)
        }
        Network::Transformer => {
            let config = if native { TransformerConfig::open(&path)? } else { official::transformer(&path)? };
            let value = text(serde_json::to_value(&config))?;
            (Config::Transformer(config), value)
        }
    })
}
