//! LLaVA: a picture and a text to the states that the transformer reads.

use candle_core::{DType, Tensor};

use super::{clip::rows_of, config::LlavaConfig, llama::Llama, vision::VisionTower};
use crate::{
    Error, Result,
    attention::causal_mask,
    nn::Linear,
    ops::Activation,
    weights::{Swap, Weights},
};

const VISION: &str = "vision_tower.vision_model";
const PROJECTOR: &str = "multi_modal_projector";
const LLAMA: &str = "language_model.model";

/// Vision tower, projector and Llama.
pub struct Llava {
    vision: VisionTower,
    linear1: Linear,
    linear2: Linear,
    llama: Llama,
    image_token: i64,
}

/// What LLaVA gives for one text.
#[derive(Debug, Clone)]
pub struct PromptEmbeds {
    /// `(L, width)`.
    pub states: Tensor,
    /// L values, 1 or 0. Their sum is the number of valid rows; their positions are the reference's, which puts the
    /// picture's ones at the end, behind the zeros of the filling.
    pub mask: Vec<i64>,
}

impl Llava {
    /// Reads the network. On a CPU its matrices stay in their file, so that it is never in memory as a whole.
    pub fn load(weights: &Weights, config: &LlavaConfig) -> Result<Self> {
        let projector = weights.pp(PROJECTOR);
        let vision = VisionTower::load(&weights.pp(VISION), config)?;
        let llama = Llama::load(&weights.pp(LLAMA), config)?;
        let [inner, inp] = projector.dims("linear_1.weight")?;
        Ok(Self {
            vision,
            linear1: Linear::load_sized(&projector.pp("linear_1"), inp, inner)?,
            linear2: Linear::load_sized(&projector.pp("linear_2"), inner, llama.width())?,
            llama,
            image_token: i64::from(config.image_token),
        })
    }

    /// Whether a tensor of the checkpoint is one that the network has no use for: what comes after the hidden
    /// states that are taken, the table of tokens (read row by row), and tables that older files carry.
    #[must_use]
    pub fn may_skip(&self, name: &str) -> bool {
        let layer_from = |prefix: &str, first: usize| {
            let number = name.strip_prefix(prefix).and_then(|rest| rest.split('.').next());
            number.and_then(|n| n.parse::<usize>().ok()).is_some_and(|n| n >= first)
        };
        name.starts_with("language_model.lm_head.")
            || name.starts_with("language_model.model.norm.")
            || name.starts_with("vision_tower.vision_model.post_layernorm.")
            || name.ends_with(".position_ids")
            || name.ends_with(".rotary_emb.inv_freq")
            || name == "language_model.model.embed_tokens.weight"
            || layer_from("language_model.model.layers.", self.llama.layers())
            || layer_from("vision_tower.vision_model.encoder.layers.", self.vision.layers())
    }

    /// The vision tower.
    #[must_use]
    pub fn vision(&self) -> &VisionTower {
        &self.vision
    }

    /// Bytes in their files of all weights that are in no layer of the Llama, without its table of tokens.
    pub(super) fn unswapped_bytes(weights: &Weights) -> u64 {
        [VISION, PROJECTOR].map(|part| weights.pp(part).extent().bytes()).into_iter().sum()
    }

    /// The weights of the Llama's layers, which may stay in memory or come and go.
    #[must_use]
    pub fn swap(&self) -> &Swap {
        self.llama.swap()
    }

    /// Number of tokens that have an embedding.
    pub fn vocabulary(&self) -> Result<usize> {
        self.llama.vocabulary()
    }

    /// A picture's features, which take the place of the image token.
    ///
    /// - `pixels`: `(3, side, side)`, normalised
    /// - returns: `(patches, width)`
    pub fn image_features(&self, pixels: &Tensor) -> Result<Tensor> {
        self.project(&self.vision.forward(pixels)?)
    }

    /// The projector, over the vision tower's output without its class token.
    ///
    /// - `hidden`: `(patches + 1, vision width)`
    /// - returns: `(patches, width)`
    pub fn project(&self, hidden: &Tensor) -> Result<Tensor> {
        let patches = hidden.narrow(0, 1, hidden.dim(0)? - 1)?;
        Ok(self.linear2.forward(&self.linear1.forward_then(&patches, Activation::GeluErf)?)?)
    }

    /// Encodes one text with a picture.
    ///
    /// - `ids`: L tokens, one of them the image token, padded on the right
    /// - `attention_mask`: L values, 1 for tokens, then 0 for filling
    /// - `pixels`: `(3, side, side)`, normalised
    /// - `crop`: rows that are dropped from the front, the template's part before the prompt
    /// - returns: `L + patches - 1 - crop` rows
    ///
    /// Errors: lengths that differ, a mask with a 1 after a 0, not exactly one image token, a crop past the end.
    pub fn encode_ids(
        &self,
        ids: &[i64],
        attention_mask: &[i64],
        pixels: &Tensor,
        crop: usize,
    ) -> Result<PromptEmbeds> {
        self.encode_with(ids, attention_mask, &self.image_features(pixels)?, crop)
    }

    /// As [`encode_ids`](Self::encode_ids), with the picture's features `(patches, width)`.
    pub fn encode_with(
        &self,
        ids: &[i64],
        attention_mask: &[i64],
        features: &Tensor,
        crop: usize,
    ) -> Result<PromptEmbeds> {
        let tokens = attention_mask.iter().take_while(|m| **m == 1).count();
        if attention_mask.len() != ids.len() || attention_mask[tokens..].iter().any(|m| *m != 0) {
            return Err(Error::input("attention_mask", format!("expected {} values, ones and then zeros", ids.len())));
        }
        let text = &ids[..tokens];
        let images: Vec<usize> = (0..tokens).filter(|i| text[*i] == self.image_token).collect();
        let [image] = images[..] else {
            return Err(Error::input("input_ids", format!("{} image tokens, expected 1", images.len())));
        };
        let patches = features.dim(0)?;
        let valid = tokens + patches - 1;
        let padding = ids.len() - tokens;
        let rows = valid + padding;
        if crop > rows {
            return Err(Error::input("crop", format!("{crop} rows of {rows}")));
        }
        let mut parts = Vec::with_capacity(4);
        for (text, after) in [(&text[..image], Some(features)), (&text[image + 1..], None)] {
            if !text.is_empty() {
                parts.push(self.llama.embed(&rows_of(text.iter())?)?);
            }
            parts.extend(after.cloned());
        }
        let mut positions: Vec<usize> = (0..valid).collect();
        // All padding rows are alike: a zero embedding at position 1 that sees every valid row, and that no other
        // row sees. So one stands for all.
        if padding > 0 {
            parts.push(Tensor::zeros((1, self.llama.width()), features.dtype(), features.device())?);
            positions.push(1);
        }
        let x = Tensor::cat(&parts, 0)?.unsqueeze(0)?; // (1, valid + 1, width)
        let x = self.llama.forward(&x, &positions, &text_mask(valid, padding > 0, x.device())?)?.squeeze(0)?;
        let mut states = vec![x.narrow(0, 0, valid)?];
        if padding > 0 {
            states.push(x.narrow(0, valid, 1)?.broadcast_as((padding, self.llama.width()))?.contiguous()?);
        }
        let states = Tensor::cat(&states, 0)?.narrow(0, crop, rows - crop)?.contiguous()?;
        let mut mask = attention_mask.to_vec();
        mask.resize(rows, 1);
        Ok(PromptEmbeds { states, mask: mask.split_off(crop) })
    }
}

/// Every valid row sees itself and those before it; the row that stands for padding sees them all, but not itself.
fn text_mask(valid: usize, padded: bool, device: &candle_core::Device) -> candle_core::Result<Tensor> {
    let causal = causal_mask(valid, device)?; // (1, valid, valid)
    if !padded {
        return Ok(causal);
    }
    let sees_all = Tensor::zeros((1, 1, valid), DType::F32, device)?;
    let hidden = Tensor::full(f32::NEG_INFINITY, (1, valid + 1, 1), device)?;
    Tensor::cat(&[Tensor::cat(&[causal, sees_all], 1)?, hidden], 2) // (1, valid + 1, valid + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::Golden;

    fn config(case: &Golden) -> LlavaConfig {
        LlavaConfig {
            heads: case.number("heads"),
            kv_heads: case.number("kv"),
            layers: Some(case.number("layers")),
            hidden_state_index: case.config["hidden_state_index"].as_i64().unwrap(),
            rope_theta: case.config["rope_theta"].as_f64().unwrap(),
            rms_eps: case.config["rms_eps"].as_f64().unwrap(),
            vision_heads: case.number("vheads"),
            vision_layers: Some(case.number("vlayers")),
            image_token: case.number("image_token") as u32,
            pad_token: case.number("pad_token") as u32,
            ..LlavaConfig::default()
        }
    }

    fn list(case: &Golden, name: &str) -> Vec<i64> {
        case.item(name, 0).to_vec1().unwrap()
    }

    #[test]
    fn unneeded_layers_are_never_read() -> Result<()> {
        let case = Golden::open("llava_text");
        let weights = case.weights();
        Llava::load(&weights, &config(&case))?;
        let unused = weights.unused();
        for name in ["model.layers.3.mlp.up_proj.weight", "model.layers.4.input_layernorm.weight", "model.norm.weight"]
        {
            assert!(unused.contains(&format!("language_model.{name}")), "{name} was read");
        }
        assert!(unused.iter().any(|name| name.contains("vision_model.encoder.layers.3.mlp.fc1")));
        Ok(())
    }

    /// What is not needed may hold anything at all.
    #[test]
    fn garbage_in_what_is_not_needed_changes_no_bit() -> Result<()> {
        let case = Golden::open("llava_text");
        let (ids, mask) = (list(&case, "input_ids"), list(&case, "attention_mask"));
        let pixels = case.input("pixel_values").squeeze(0)?;
        let run = |weights: &Weights| -> Result<Vec<f32>> {
            let llava = Llava::load(weights, &config(&case))?;
            weights.refuse_unused(|name| llava.may_skip(name))?;
            Ok(llava.encode_ids(&ids, &mask, &pixels, 0)?.states.flatten_all()?.to_vec1()?)
        };
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        let mut tensors = case.tensors();
        let unneeded = ["model.layers.3.", "model.layers.4.", "model.norm.", "lm_head."];
        let mut spoilt = 0;
        for (name, tensor) in &mut tensors {
            if unneeded.iter().any(|part| name.starts_with(&format!("language_model.{part}"))) {
                *tensor = Tensor::full(f32::NAN, tensor.shape(), tensor.device())?;
                spoilt += 1;
            }
        }
        assert!(spoilt > 2 * 9, "{spoilt} tensors of two layers, the norm and the head");
        candle_core::safetensors::save(&tensors, &file)?;
        let weights = Weights::open(folder.path(), DType::F32, &candle_core::Device::Cpu)?;
        assert_eq!(run(&weights)?, run(&case.weights())?);
        Ok(())
    }

    #[test]
    fn refuses_texts_without_one_image_token_or_with_padding_in_front() -> Result<()> {
        let case = Golden::open("llava_text");
        let llava = Llava::load(&case.weights(), &config(&case))?;
        let features = llava.image_features(&case.input("pixel_values").squeeze(0)?)?;
        let error =
            |ids: &[i64], mask: &[i64], crop| llava.encode_with(ids, mask, &features, crop).unwrap_err().to_string();
        assert_eq!(error(&[1, 2], &[1, 1], 0), "input_ids: 0 image tokens, expected 1");
        assert_eq!(error(&[61, 61], &[1, 1], 0), "input_ids: 2 image tokens, expected 1");
        assert_eq!(error(&[62, 61], &[0, 1], 0), "attention_mask: expected 2 values, ones and then zeros");
        assert_eq!(error(&[61, 62], &[1, 0], 11), "crop: 11 rows of 10");
        Ok(())
    }
}
