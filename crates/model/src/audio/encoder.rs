//! Whisper's encoder, with the outputs of every layer.

use candle_core::{DType, Tensor};

use crate::{
    Result,
    attention::{attention, join_heads, split_heads},
    nn::{LayerNorm, Linear},
    ops::{Activation, linear},
    weights::{Matrix, Weights},
};

const EPS: f32 = 1e-5;

/// Whisper's encoder.
#[derive(Debug)]
pub struct WhisperEncoder {
    conv1: Conv,
    conv2: Conv,
    positions: Tensor,
    layers: Vec<Layer>,
    norm: LayerNorm,
    mels: usize,
}

/// Convolution of three rows and its GELU, in f32: there are two, before all else.
#[derive(Debug)]
struct Conv {
    /// `(out, 3·inp)`, the first row's inputs first.
    weight: Matrix,
    bias: Tensor,
    stride: usize,
}

#[derive(Debug)]
struct Layer {
    heads: usize,
    attention_norm: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    mlp_norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl WhisperEncoder {
    /// Reads the encoder, whose names may begin with `encoder.`, `model.encoder.` or nothing.
    ///
    /// Widths come from the tensors, the number of attention heads from `heads`.
    pub fn load(weights: &Weights, heads: usize) -> Result<Self> {
        let weights = ["model.encoder", "encoder"]
            .iter()
            .map(|prefix| weights.pp(prefix))
            .find(|weights| weights.contains("conv1.weight"))
            .unwrap_or_else(|| weights.clone());
        let [width, mels, _] = weights.dims("conv1.weight")?;
        let [positions, _] = weights.dims("embed_positions.weight")?;
        let layers = weights.count("layers", "self_attn.q_proj.weight");
        if layers == 0 {
            return Err(weights.fault("layers.0.self_attn.q_proj.weight", "it is missing"));
        }
        if heads == 0 || !width.is_multiple_of(heads) {
            return Err(weights.fault("conv1.weight", format!("{heads} heads do not divide its width {width}")));
        }
        Ok(Self {
            conv1: Conv::load(&weights.pp("conv1"), (mels, width), 1)?,
            conv2: Conv::load(&weights.pp("conv2"), (width, width), 2)?,
            positions: weights.get(&[positions, width], "embed_positions.weight")?,
            layers: (0..layers)
                .map(|i| Layer::load(&weights.pp("layers").pp(i), width, heads))
                .collect::<Result<_>>()?,
            norm: LayerNorm::load(&weights.pp("layer_norm"), width, EPS)?,
            mels,
        })
    }

    /// Layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Mel bands that the encoder takes.
    #[must_use]
    pub fn mels(&self) -> usize {
        self.mels
    }

    /// Positions that the encoder gives; it takes two columns of the spectrum for each.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.positions.dims()[0]
    }

    /// The embedding and the output of every layer, the last after the final normalisation.
    ///
    /// - `mel`: `(mels, 2·positions)`
    /// - returns: `(positions, layers + 1, width)`, in the weights' type and on their device
    ///
    /// Errors: the spectrum has another shape.
    pub fn hidden_states(&self, mel: &Tensor) -> Result<Tensor> {
        let expected = [self.mels, 2 * self.positions()];
        if mel.dims() != expected {
            let reason = format!("shape {:?}, expected {expected:?}", mel.dims());
            return Err(crate::Error::input("mel", reason));
        }
        let mel = mel.to_device(self.positions.device())?.to_dtype(DType::F32)?;
        let heard = {
            let first = self.conv1.forward(&mel.t()?.contiguous()?)?; // (2·positions, width)
            self.conv2.forward(&first)? //                               (positions, width)
        };
        let x = (heard + self.positions.to_dtype(DType::F32)?)?.to_dtype(self.positions.dtype())?;
        let mut x = x.unsqueeze(0)?;
        let mut states = vec![x.squeeze(0)?];
        for layer in &self.layers {
            x = layer.forward(&x)?;
            states.push(x.squeeze(0)?);
        }
        if let Some(last) = states.last_mut() {
            *last = self.norm.forward(last)?;
        }
        Ok(Tensor::stack(&states, 1)?)
    }
}

impl Conv {
    fn load(weights: &Weights, (inp, out): (usize, usize), stride: usize) -> Result<Self> {
        let weight = weights.get_as(&[out, inp, 3], "weight", DType::F32)?.transpose(1, 2)?.reshape((out, 3 * inp))?;
        Ok(Self { weight: Matrix::new(&weight)?, bias: weights.get_as(&[out], "bias", DType::F32)?, stride })
    }

    /// - `x`: `(L, inp)`, `L` a multiple of the stride
    /// - returns: `(L / stride, out)`
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (length, inp) = x.dims2()?;
        let rows = length / self.stride;
        // A row of zeros before the first and after the last; a line then holds the rows that one step passes.
        let x = x.pad_with_zeros(0, 1, 1)?.reshape(((length + 2) / self.stride, self.stride * inp))?;
        let taps: Vec<Tensor> = (0..3)
            .map(|tap| x.narrow(0, tap / self.stride, rows)?.narrow(1, tap % self.stride * inp, inp))
            .collect::<candle_core::Result<_>>()?;
        linear(&[&taps[0], &taps[1], &taps[2]], &self.weight, Some(&self.bias), Activation::GeluErf, None)
    }
}

impl Layer {
    fn load(weights: &Weights, width: usize, heads: usize) -> Result<Self> {
        let attention = weights.pp("self_attn");
        let square = |name: &str| Linear::load_sized(&attention.pp(name), width, width);
        let fc1 = Linear::load(&weights.pp("fc1"), width)?;
        Ok(Self {
            heads,
            attention_norm: LayerNorm::load(&weights.pp("self_attn_layer_norm"), width, EPS)?,
            q: square("q_proj")?,
            k: Linear::load_no_bias(&attention.pp("k_proj"), width, width)?,
            v: square("v_proj")?,
            out: square("out_proj")?,
            mlp_norm: LayerNorm::load(&weights.pp("final_layer_norm"), width, EPS)?,
            fc2: Linear::load_sized(&weights.pp("fc2"), fc1.out(), width)?,
            fc1,
        })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let heads = |x: &Tensor, linear: &Linear| split_heads(&linear.forward(x)?, self.heads);
        let y = self.attention_norm.forward(x)?;
        let (q, k, v) = (heads(&y, &self.q)?, heads(&y, &self.k)?, heads(&y, &self.v)?); // (1, heads, L, d)
        let scale = (q.dim(3)? as f64).powf(-0.5);
        let x = (x + self.out.forward(&join_heads(&attention(&q, &k, &v, scale, None)?)?)?)?;
        let y = self.fc1.forward_then(&self.mlp_norm.forward(&x)?, Activation::GeluErf)?;
        x + self.fc2.forward(&y)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::Golden;

    #[test]
    fn refuses_a_spectrum_of_another_shape() -> Result<()> {
        let case = Golden::open("whisper_encoder");
        let encoder = WhisperEncoder::load(&case.weights(), case.number("heads"))?;
        let error = encoder.hidden_states(&case.input("mel").narrow(1, 0, 2998)?).unwrap_err();
        assert_eq!(error.to_string(), "mel: shape [20, 2998], expected [20, 3000]");
        Ok(())
    }
}
