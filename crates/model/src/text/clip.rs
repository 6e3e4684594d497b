//! CLIP's text network.

use candle_core::Tensor;

use super::{
    block::{ClipBlock, EPS},
    config::ClipConfig,
};
use crate::{
    Error, Result,
    attention::{causal_mask, key_mask},
    nn::LayerNorm,
    weights::Weights,
};

/// CLIP's text network; its table of tokens stays in the file.
pub struct ClipText {
    weights: Weights,
    positions: Tensor,
    blocks: Vec<ClipBlock>,
    norm: LayerNorm,
    eot_token: i64,
}

impl ClipText {
    /// Reads the `text_model.*` part of a CLIP.
    pub fn load(weights: &Weights, config: &ClipConfig) -> Result<Self> {
        let weights = weights.pp("text_model");
        let table = "embeddings.position_embedding.weight";
        let [positions, width] = weights.dims(table)?;
        let layers = weights.pp("encoder.layers");
        let count = weights.count("encoder.layers", "self_attn.q_proj.weight");
        if count == 0 || config.layers.is_some_and(|layers| layers > count) {
            return Err(layers.fault(format!("{count}.self_attn.q_proj.weight"), "it is missing"));
        }
        if let Some(said) = config.layers.filter(|layers| *layers < count) {
            return Err(
                layers.fault(format!("{said}.self_attn.q_proj.weight"), format!("the config says {said} layers"))
            );
        }
        let [words, found] = weights.dims(WORDS)?;
        if found != width {
            return Err(weights.fault(WORDS, format!("shape [{words}, {found}], expected [{words}, {width}]")));
        }
        Ok(Self {
            positions: weights.get(&[positions, width], table)?,
            blocks: (0..count).map(|i| ClipBlock::load(&layers.pp(i), width, config.heads)).collect::<Result<_>>()?,
            norm: LayerNorm::load(&weights.pp("final_layer_norm"), width, EPS)?,
            eot_token: i64::from(config.eot_token),
            weights,
        })
    }

    /// Whether a tensor of CLIP's text half is not read when the network is opened.
    #[must_use]
    pub fn may_skip(name: &str) -> bool {
        // The table of tokens is read row by row, when there are tokens; older files carry a table of positions.
        name == "text_model.embeddings.token_embedding.weight" || name == "text_model.embeddings.position_ids"
    }

    /// Tokens of the longest text.
    #[must_use]
    pub fn length(&self) -> usize {
        self.positions.dims()[0]
    }

    /// Number of tokens that have an embedding.
    pub fn vocabulary(&self) -> Result<usize> {
        Ok(self.weights.dims::<2>(WORDS)?[0])
    }

    /// Runs the network over texts of tokens.
    ///
    /// A token sees itself and those before it that the mask shows. A text is pooled at its first end token; where
    /// it has none, at its largest id, which is how the reference finds the end.
    ///
    /// - `ids`, `mask`: `(B, L)`, i64; the mask is 1 for tokens (the first end token is one) and 0 for filling
    /// - returns: `(B, L, width)` after the final normalisation, and `(B, width)` pooled
    ///
    /// Errors: shapes that differ, a text that is empty, too long or begins masked, an unknown token.
    pub fn forward(&self, ids: &Tensor, mask: &Tensor) -> Result<(Tensor, Tensor)> {
        let (batch, length) = ids.dims2()?;
        if mask.dims() != ids.dims() {
            let reason = format!("shape {:?}, expected {:?}", mask.dims(), ids.dims());
            return Err(Error::input("attention_mask", reason));
        }
        if !(1..=self.length()).contains(&length) {
            let reason = format!("{length} tokens, expected 1 to {}", self.length());
            return Err(Error::input("input_ids", reason));
        }
        if mask.to_vec2::<i64>()?.iter().any(|row| row[0] == 0) {
            return Err(Error::input("attention_mask", "0 for the first token, expected 1"));
        }
        let texts = ids.to_vec2::<i64>()?;
        let rows = rows_of(texts.iter().flatten())?;
        let width = self.positions.dim(1)?;
        let x = self.weights.rows(WORDS, &rows)?.reshape((batch, length, width))?;
        let mut x = x.broadcast_add(&self.positions.narrow(0, 0, length)?)?;
        let mask = key_mask(&mask.to_device(x.device())?)?; // (B, 1, L)
        let mask = mask.broadcast_add(&causal_mask(length, x.device())?)?; // (B, L, L)
        for block in &self.blocks {
            x = block.forward(&x, Some(&mask))?;
        }
        let x = self.norm.forward(&x)?;
        let pooled: Vec<Tensor> =
            texts.iter().enumerate().map(|(b, text)| x.get(b)?.get(self.end(text))).collect::<Result<_, _>>()?;
        let pooled = Tensor::stack(&pooled, 0)?;
        Ok((x, pooled))
    }

    fn end(&self, text: &[i64]) -> usize {
        let first = |id: i64| text.iter().position(|t| *t == id);
        first(self.eot_token).or_else(|| text.iter().max().and_then(|id| first(*id))).unwrap_or(0)
    }
}

const WORDS: &str = "embeddings.token_embedding.weight";

/// Number of tokens that have an embedding, of a whole checkpoint.
pub(crate) fn vocabulary(weights: &Weights) -> Result<usize> {
    Ok(weights.pp("text_model").dims::<2>(WORDS)?[0])
}

/// Rows of a token table for ids.
///
/// Errors: a negative id.
pub(super) fn rows_of<'a>(ids: impl Iterator<Item = &'a i64>) -> Result<Vec<usize>> {
    ids.map(|id| usize::try_from(*id).map_err(|_| Error::input("input_ids", format!("token {id} is negative"))))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::Golden;

    fn network(case: &Golden, eot_token: u32) -> Result<ClipText> {
        ClipText::load(&case.weights(), &ClipConfig { heads: case.number("heads"), eot_token, layers: None })
    }

    /// The case's largest id is 98.
    #[test]
    fn a_text_without_its_end_token_is_pooled_at_the_largest_id() -> Result<()> {
        let case = Golden::open("clip_text");
        let pooled = |eot_token| -> Result<Vec<Vec<f32>>> {
            let (_, pooled) =
                network(&case, eot_token)?.forward(&case.input("input_ids"), &case.input("attention_mask"))?;
            Ok(pooled.to_vec2()?)
        };
        let absent = ClipConfig::default().eot_token;
        assert_eq!(pooled(absent)?, pooled(98)?);
        let first = case.input("input_ids").to_vec2::<i64>()?[0][0];
        assert_ne!(pooled(first as u32)?, pooled(98)?);
        Ok(())
    }

    #[test]
    fn refuses_tokens_that_it_does_not_have() -> Result<()> {
        let case = Golden::open("clip_text");
        let clip = network(&case, 98)?;
        let mask = Tensor::new(&[[1i64, 1]], &candle_core::Device::Cpu)?;
        let error = |ids: [i64; 2]| {
            let ids = Tensor::new(&[ids], &candle_core::Device::Cpu).unwrap();
            clip.forward(&ids, &mask).unwrap_err().to_string()
        };
        assert!(error([1, 99]).contains("token_embedding.weight"), "{}", error([1, 99]));
        assert_eq!(error([1, -1]), "input_ids: token -1 is negative");
        Ok(())
    }
}
