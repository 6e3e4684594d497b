//! Layers that the networks share.

use std::ops::Range;

use candle_core::Tensor;

use crate::{
    Result,
    ops::{Activation, Gate, layer_norm, linear, rms_norm},
    weights::{Matrix, Weights},
};

/// `x·Wᵀ + b` over the last dimension.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Matrix,
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
        Ok(Self { weight: weights.matrix(out, inp, "weight")?, bias: Some(weights.get(&[out], "bias")?) })
    }

    /// Reads `weight` `(out, in)` of a layer without bias.
    pub fn load_no_bias(weights: &Weights, inp: usize, out: usize) -> Result<Self> {
        Ok(Self { weight: weights.matrix(out, inp, "weight")?, bias: None })
    }

    /// Makes a layer of a matrix `(out, in)` and a bias `(out)`.
    #[must_use]
    pub fn new(weight: Matrix, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// Output width.
    #[must_use]
    pub fn out(&self) -> usize {
        self.weight.rows()
    }

    /// The layer that gives some of this one's outputs; nothing is copied.
    pub fn narrow(&self, outputs: Range<usize>) -> candle_core::Result<Self> {
        let bias = self.bias.as_ref().map(|b| b.narrow(0, outputs.start, outputs.len())).transpose()?;
        Ok(Self { weight: self.weight.narrow(outputs), bias })
    }

    /// - `x`: `(.., in)`
    /// - returns: `(.., out)`
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.forward_then(x, Activation::None)
    }

    /// As [`forward`](Self::forward), followed by an activation.
    pub fn forward_then(&self, x: &Tensor, activation: Activation) -> candle_core::Result<Tensor> {
        let mut dims = x.dims().to_vec();
        let inp = dims.pop().unwrap_or(0);
        let y = linear(&[&x.reshape(((), inp))?], &self.weight, self.bias.as_ref(), activation, None)?;
        dims.push(self.out());
        y.reshape(dims)
    }

    /// `residual + gate·(x·Wᵀ + b)`, where `x` may be several inputs side by side.
    ///
    /// - `xs`: `(L, inᵢ)`; `residual`: `(L, out)`; `gate`: `(out)`, or nothing for 1
    /// - returns: `(L, out)`
    pub fn forward_onto(
        &self,
        residual: &Tensor,
        xs: &[&Tensor],
        gate: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        linear(xs, &self.weight, self.bias.as_ref(), Activation::None, Some(Gate { residual, gate }))
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
        layer_norm(x, &self.weight, &self.bias, self.eps)
    }
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

    /// The weight `(width)`.
    #[must_use]
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// What is added to the mean square.
    #[must_use]
    pub fn eps(&self) -> f32 {
        self.eps
    }

    /// - `x`: `(.., width)`, any strides
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        rms_norm(x, &self.weight, self.eps)
    }
}
