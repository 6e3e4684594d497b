//! Speech to features: log-mel spectrum, Whisper's encoder, one window of features per frame.

mod encoder;
mod mel;
mod transform;

use std::path::Path;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

pub use encoder::WhisperEncoder;
pub use mel::{CHUNK_SAMPLES, COLUMNS, MELS, SAMPLE_RATE, log_mel, mel_filters};

use crate::{
    Error, Result,
    checkpoint::{Layout, Network, Setup, Stage, locate, official},
    weights::read_json,
};

/// Samples for one position of the features: 20 ms.
const SAMPLES_PER_POSITION: usize = 320;
/// Positions of one frame's window, and how many of them lie before the frame.
const WINDOW: i64 = 10;
const PAST: i64 = 4;

/// Cuts features into one window per frame.
///
/// Frame `f` happens at position `2·f·stride` (50 positions a second; stride 1 is 25 frames a second, 2 is
/// 12.5). Its window is positions `2·f·stride - 4 .. 2·f·stride + 6`. Positions outside the features are zero.
///
/// - `features`: `(S, states, C)`, one row per 20 ms
/// - returns: `(frames.len(), 10, states, C)`, same type and device
pub fn windows_per_frame(features: &Tensor, frames: &[usize], stride: usize) -> Result<Tensor> {
    let (positions, states, width) = features.dims3()?;
    let zero = Tensor::zeros((1, states, width), features.dtype(), features.device())?;
    let rows = Tensor::cat(&[features, &zero], 0)?;
    let index: Vec<u32> = frames
        .iter()
        .flat_map(|frame| {
            let at = i64::try_from(frame.saturating_mul(2).saturating_mul(stride)).unwrap_or(i64::MAX / 2);
            (at - PAST..at - PAST + WINDOW).map(move |position| {
                usize::try_from(position).ok().filter(|p| *p < positions).unwrap_or(positions) as u32
            })
        })
        .collect();
    let index = Tensor::new(index, features.device())?;
    Ok(rows.index_select(&index, 0)?.reshape((frames.len(), WINDOW as usize, states, width))?)
}

/// `config.json` of the audio encoder's folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AudioConfig {
    /// Attention heads.
    pub heads: usize,
    /// Layers of the encoder; absent: those that the file has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
}

impl Default for AudioConfig {
    fn default() -> Self {
        Self { heads: 6, layers: None }
    }
}

/// The audio stage: speech of any length to features.
#[derive(Debug)]
pub struct AudioEncoder {
    encoder: WhisperEncoder,
}

impl AudioEncoder {
    /// Opens the stage below a folder of models, in the native layout (its config is [`AudioConfig`]) or in the
    /// official one.
    ///
    /// The decoder of a whole Whisper is left in its file. Errors: as [`locate`] and [`read_json`], a tensor that
    /// is missing, mis-shaped or none of the encoder's, or an encoder that does not take 80 bands and 30 s.
    pub fn open(models: &Path, setup: &Setup) -> Result<Self> {
        let located = locate(models, Stage::AudioEncoder, setup.choice)?;
        let source = located.source(Network::Whisper)?;
        let path = located.config(Network::Whisper)?;
        let config = match located.layout {
            Layout::Native => read_json(&path)?,
            Layout::Official => official::audio(&path)?,
        };
        let weights = source.open(setup)?;
        let encoder = WhisperEncoder::load(&weights, config.heads)?;
        weights.refuse_unused(|name| name.starts_with("decoder.") || name == "proj_out.weight")?;
        let (bands, columns) = (encoder.mels(), 2 * encoder.positions());
        if (bands, columns) != (MELS, COLUMNS) {
            let reason = format!("the encoder takes a spectrum of {bands} x {columns}, expected {MELS} x {COLUMNS}");
            return Err(Error::file(&source.folder, reason));
        }
        if let Some(layers) = config.layers.filter(|layers| *layers != encoder.layers()) {
            let reason = format!("{layers} layers, the tensors make up {}", encoder.layers());
            return Err(Error::file(&path, reason));
        }
        Ok(Self { encoder })
    }

    /// Turns speech into features.
    ///
    /// Every 30 s are encoded by themselves, so that long speech is heard to its end.
    ///
    /// - `samples`: mono, 16 kHz
    /// - returns: `(S, states, C)`, f32, `S = ceil(samples / 320)`: one row per 20 ms
    ///
    /// Errors: no samples, or one that is not finite or past 65536.
    pub fn encode(&self, samples: &[f32]) -> Result<Tensor> {
        mel::check_samples(samples)?;
        let chunks = samples
            .chunks(CHUNK_SAMPLES)
            .map(|chunk| {
                let states = self.encoder.hidden_states(&log_mel(chunk)?)?;
                Ok(states.narrow(0, 0, chunk.len().div_ceil(SAMPLES_PER_POSITION))?.to_dtype(DType::F32)?)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&chunks, 0)?.contiguous()?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::Device;

    use super::*;

    #[test]
    fn windows_are_zero_outside_the_features() -> Result<()> {
        let features = Tensor::arange(1f32, 7.0, &Device::Cpu)?.reshape((6, 1, 1))?;
        let windows = windows_per_frame(&features, &[0, 2, usize::MAX], 1)?.reshape((3, 10))?.to_vec2::<f32>()?;
        assert_eq!(windows[0], [0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(windows[1], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(windows[2], [0.0; 10]);
        Ok(())
    }

    /// A folder of models with an encoder of width 8, one layer, 80 bands and 30 s.
    fn small_models() -> tempfile::TempDir {
        let models = tempfile::tempdir().unwrap();
        let folder = models.path().join("audio-encoder");
        std::fs::create_dir(&folder).unwrap();
        let mut tensors = HashMap::new();
        let mut add = |name: &str, shape: &[usize]| {
            let values = (crate::golden::noise(shape, tensors.len() as u64) * 0.5).unwrap();
            tensors.insert(format!("encoder.{name}"), values);
        };
        add("conv1.weight", &[8, 80, 3]);
        add("conv2.weight", &[8, 8, 3]);
        add("embed_positions.weight", &[1500, 8]);
        for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            add(&format!("layers.0.self_attn.{name}.weight"), &[8, 8]);
        }
        for name in ["fc1", "fc2"] {
            add(&format!("layers.0.{name}.weight"), &[8, 8]);
        }
        for name in ["self_attn_layer_norm", "final_layer_norm"] {
            add(&format!("layers.0.{name}.weight"), &[8]);
        }
        add("layer_norm.weight", &[8]);
        for name in ["conv1", "conv2", "layer_norm"] {
            add(&format!("{name}.bias"), &[8]);
        }
        let biased = ["self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj"];
        for name in biased.iter().chain(&["self_attn_layer_norm", "final_layer_norm", "fc1", "fc2"]) {
            add(&format!("layers.0.{name}.bias"), &[8]);
        }
        candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
        std::fs::write(folder.join("config.json"), r#"{"heads": 2}"#).unwrap();
        models
    }

    #[test]
    fn long_speech_is_encoded_chunk_by_chunk() -> Result<()> {
        let models = small_models();
        let encoder = AudioEncoder::open(models.path(), &Setup::default())?;
        let speech: Vec<f32> = (0..CHUNK_SAMPLES + 1000).map(|i| (i as f32 * 0.01).sin() * 0.3).collect();
        let features = encoder.encode(&speech)?;
        assert_eq!(features.dims(), [1500 + 4, 2, 8]);
        let second = encoder.encode(&speech[CHUNK_SAMPLES..])?;
        let (tail, second) = (features.narrow(0, 1500, 4)?.flatten_all()?, second.flatten_all()?);
        assert_eq!(tail.to_vec1::<f32>()?, second.to_vec1::<f32>()?);
        Ok(())
    }

    #[test]
    fn a_config_of_more_layers_than_there_are_is_refused() {
        let models = small_models();
        let file = models.path().join("audio-encoder/config.json");
        std::fs::write(&file, r#"{"heads": 2, "layers": 2}"#).unwrap();
        let error = AudioEncoder::open(models.path(), &Setup::default()).unwrap_err().to_string();
        assert!(error.ends_with("config.json: 2 layers, the tensors make up 1"), "{error}");
    }

    #[test]
    fn a_config_with_an_unknown_field_is_refused() {
        let models = small_models();
        std::fs::write(models.path().join("audio-encoder/config.json"), r#"{"heads": 2, "head": 3}"#).unwrap();
        let error = AudioEncoder::open(models.path(), &Setup::default()).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("unknown field `head`"), "{error}");
    }
}
