//! What stands between two layers.

use candle_core::{Result, Tensor};

use super::simd::{erf, exp, vectorised};

/// A function of each value by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activation {
    /// The value.
    #[default]
    None,
    /// GELU in its tanh form, as the transformer's blocks use it.
    GeluTanh,
    /// GELU with the error function, as Whisper and LLaVA's projector use it.
    GeluErf,
    /// `x·σ(1.702·x)`, as both CLIPs use it.
    QuickGelu,
    /// `x·σ(x)`.
    Silu,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// Applies it in place.
    pub(crate) fn apply(self, values: &mut [f32]) {
        match self {
            Self::None => {}
            Self::GeluTanh => gelu_tanh(values),
            Self::GeluErf => gelu_erf(values),
            Self::QuickGelu => sigmoid_times(values, 1.702),
            Self::Silu => sigmoid_times(values, 1.0),
            // Not `max`, which would make a zero of a NaN.
            Self::Relu => values.iter_mut().for_each(|v| *v = if *v < 0.0 { 0.0 } else { *v }),
        }
    }

    /// The same with candle's operations, on any device and in any type.
    pub fn clear(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::None => Ok(x.clone()),
            Self::GeluTanh => x.gelu(),
            Self::GeluErf => x.gelu_erf(),
            Self::QuickGelu => x * candle_nn::ops::sigmoid(&(x * 1.702)?)?,
            Self::Silu => x.silu(),
            Self::Relu => x.relu(),
        }
    }
}

vectorised! {
    fn gelu_tanh(values: &mut [f32]) {
        const ROOT: f32 = 0.797_884_6; // sqrt(2/π)
        for v in values {
            let x = *v;
            let u = ROOT * (x + 0.044_715 * x * x * x);
            // (1 + tanh u)/2 is the logistic function of 2u.
            *v = x / (1.0 + exp::<FMA>(-2.0 * u));
        }
    }
}

vectorised! {
    fn gelu_erf(values: &mut [f32]) {
        for v in values {
            let x = *v;
            *v = 0.5 * x * (1.0 + erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2));
        }
    }
}

vectorised! {
    fn sigmoid_times(values: &mut [f32], factor: f32) {
        for v in values {
            let x = *v;
            *v = x / (1.0 + exp::<FMA>(-factor * x));
        }
    }
}
