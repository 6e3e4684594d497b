//! Layers that the networks share.

use candle_core::{D, DType, Tensor};

use crate::{Result, weights::Weights};

/// `x·Wᵀ + b` over the last dimension.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// Reads `weight` `(out, in)` and `bias` `(out)`; the output width is the tensor's own.
    pub fn load(weights: &Weights, inp: usize) -> Result<Self> {
        let [out, _] = weights.dims("weight")?;
        Self::load_sized(weights, inp, out)
    }

    /// Reads `weight` `(out, in)` and `bias` `(out)`.
    pub fn load_sized(weights: &Weights, inp: usize, out: usize) -> Result<Self> {
        Ok(Self { weight: weights.get(&[out, inp], "weight")?, bias: Some(weights.get(&[out], "bias")?) })
    }

    /// Reads `weight` `(out, in)` of a layer without bias.
    pub fn load_no_bias(weights: &Weights, inp: usize, out: usize) -> Result<Self> {
        Ok(Self { weight: weights.get(&[out, inp], "weight")?, bias: None })
    }

    /// Makes a layer of tensors `(out, in)` and `(out)`.
    #[must_use]
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// Output width.
    #[must_use]
    pub fn out(&self) -> usize {
        self.weight.dims()[0]
    }

    /// - `x`: `(.., in)`
    /// - returns: `(.., out)`
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut dims = x.dims().to_vec();
        let inp = dims.pop().unwrap_or(0);
        let y = x.reshape(((), inp))?.matmul(&self.weight.t()?)?;
        let y = match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        };
        dims.push(self.out());
        y.reshape(dims)
    }
}

/// Layer normalisation over the last dimension.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f32,
}

impl LayerNorm {
    /// Reads `weight` and `bias`, both `(width)`.
    pub fn load(weights: &Weights, width: usize, eps: f32) -> Result<Self> {
        Ok(Self { weight: weights.get(&[width], "weight")?, bias: weights.get(&[width], "bias")?, eps })
    }

    /// - `x`: `(.., width)`, any strides
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        candle_nn::ops::layer_norm(&x.contiguous()?, &self.weight, &self.bias, self.eps)
    }
}

/// Layer normalisation over the last dimension without weight and bias.
pub fn layer_norm_plain(x: &Tensor, eps: f64) -> candle_core::Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(variance + eps)?.sqrt()?)?.to_dtype(x.dtype())
}

/// Root-mean-square normalisation over the last dimension.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    /// Reads `weight` `(width)`.
    pub fn load(weights: &Weights, width: usize, eps: f32) -> Result<Self> {
        Ok(Self { weight: weights.get(&[width], "weight")?, eps })
    }

    /// - `x`: `(.., width)`, any strides
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        candle_nn::ops::rms_norm(&x.contiguous()?, &self.weight, self.eps)
    }
}

/// `x·σ(1.702·x)`, the approximation of GELU that both CLIPs use.
pub fn quick_gelu(x: &Tensor) -> candle_core::Result<Tensor> {
    x * candle_nn::ops::sigmoid(&(x * 1.702)?)?
}

/// `x·(1 + scale) + shift`, with shift and scale broadcast over the tokens.
///
/// - `x`: `(B, L, H)`; `shift`, `scale`: `(B, H)`
pub fn modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> candle_core::Result<Tensor> {
    x.broadcast_mul(&(scale.unsqueeze(1)? + 1.0)?)?.broadcast_add(&shift.unsqueeze(1)?)
}
