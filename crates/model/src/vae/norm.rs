use candle_core::{DType, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{
    Error, Result, memory,
    ops::{Activation, host},
    weights::Weights,
};

/// What every group normalisation of the VAE adds to the variance.
pub const EPS: f64 = 1e-6;

/// Group normalisation over all positions (time, rows, columns) of each group of channels.
#[derive(Debug, Clone)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    channels: usize,
}

impl GroupNorm {
    /// Reads `weight` and `bias`, both `(channels)`; the width is the tensor's own.
    ///
    /// Errors: a width that the groups do not divide.
    pub fn load(weights: &Weights, groups: usize) -> Result<Self> {
        let [channels] = weights.dims("weight")?;
        if groups == 0 || channels % groups != 0 {
            let reason = format!("{channels} channels do not form {groups} groups");
            return Err(Error::input("norm_num_groups", reason));
        }
        Ok(Self {
            weight: weights.get(&[channels], "weight")?,
            bias: weights.get(&[channels], "bias")?,
            groups,
            channels,
        })
    }

    /// - `x`: `(B, channels, ..)`, at least one position
    /// - returns: the same shape; statistics in f32
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, false)
    }

    /// As [`forward`](Self::forward), followed by `x·σ(x)`.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, true)
    }

    /// Width that the layer takes.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.channels
    }

    fn run(&self, x: &Tensor, silu: bool) -> Result<Tensor> {
        let dims = x.dims();
        if dims.len() < 2 || dims[1] != self.channels || x.elem_count() == 0 {
            let reason = format!("shape {dims:?}, expected (B, {}, ..), no side 0", self.channels);
            return Err(Error::input("vae tensor", reason));
        }
        if !host::here(x) {
            #[cfg(feature = "cuda")]
            if cuda::here(x) {
                return Ok(cuda::group_norm(x, self.groups, (&self.weight, &self.bias), EPS, silu)?);
            }
            return self.run_portable(x, silu);
        }
        let activation = if silu { Activation::Silu } else { Activation::None };
        let positions: usize = dims[2..].iter().product();
        let per_group = self.channels / self.groups;
        let weight = host::with_values(&self.weight, <[f32]>::to_vec)?;
        let bias = host::with_values(&self.bias, <[f32]>::to_vec)?;
        memory::room_for(x.dtype(), x.elem_count(), x.elem_count())?;
        let mut y = vec![0f32; x.elem_count()];
        host::with_values(x, |x| {
            let statistics: Vec<(f32, f32)> = x.par_chunks(per_group * positions).map(mean_and_scale).collect();
            y.par_chunks_mut(positions).zip(x.par_chunks(positions)).enumerate().for_each(|(i, (y, x))| {
                let (mean, scale) = statistics[i / per_group];
                let channel = i % self.channels;
                let (scale, shift) = (scale * weight[channel], bias[channel]);
                y.iter_mut().zip(x).for_each(|(y, x)| *y = (x - mean) * scale + shift);
                activation.apply(y);
            });
        })?;
        Ok(host::tensor(y, x.dims(), x.dtype())?)
    }

    /// The same with candle's operations only, on any device and in any type.
    fn run_portable(&self, x: &Tensor, silu: bool) -> Result<Tensor> {
        let batch = x.dim(0)?;
        let wide = x.to_dtype(DType::F32)?.reshape((batch, self.groups, ()))?;
        let centred = wide.broadcast_sub(&wide.mean_keepdim(2)?)?;
        let variance = centred.sqr()?.mean_keepdim(2)?;
        let normed = centred.broadcast_div(&(variance + EPS)?.sqrt()?)?.reshape((batch, self.channels, ()))?;
        let row = (1, self.channels, 1);
        let y = normed
            .broadcast_mul(&self.weight.to_dtype(DType::F32)?.reshape(row)?)?
            .broadcast_add(&self.bias.to_dtype(DType::F32)?.reshape(row)?)?;
        let y = if silu { y.silu()? } else { y };
        Ok(y.reshape(x.dims())?.to_dtype(x.dtype())?)
    }
}

/// Mean and `1 / sqrt(variance + eps)`, in two passes so that a large mean costs no digits.
fn mean_and_scale(x: &[f32]) -> (f32, f32) {
    let count = x.len() as f64;
    let mean = sum_of(x, |x| x) / count;
    let centre = mean as f32;
    let variance = sum_of(x, |x| (x - centre) * (x - centre)) / count;
    (centre, (1.0 / (variance + EPS).sqrt()) as f32)
}

/// Sums in f32 over short blocks, between them in f64.
fn sum_of(x: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    const LANES: usize = 16;
    let mut sum = 0f64;
    for block in x.chunks(64 * LANES) {
        let (wide, rest) = block.as_chunks::<LANES>();
        let mut lanes = [0f32; LANES];
        for values in wide {
            lanes.iter_mut().zip(values).for_each(|(lane, x)| *lane += f(*x));
        }
        sum += lanes.iter().map(|x| f64::from(*x)).sum::<f64>() + rest.iter().map(|x| f64::from(f(*x))).sum::<f64>();
    }
    sum
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;
    use crate::vae::tests::{noise, worst};

    fn layer(channels: usize, groups: usize) -> GroupNorm {
        let tensors =
            HashMap::from([("weight".to_owned(), noise(&[channels], 1)), ("bias".to_owned(), noise(&[channels], 2))]);
        GroupNorm::load(&Weights::from_tensors(tensors, DType::F32, &Device::Cpu), groups).unwrap()
    }

    proptest! {
        #[test]
        fn the_fast_norm_equals_the_portable_one(
            sizes in (1usize..3, 1usize..4, 1usize..4, 1usize..5, 1usize..40),
            silu: bool,
            offset in -20f64..20.0,
        ) {
            let (batch, groups, per_group, t, length) = sizes;
            let norm = layer(groups * per_group, groups);
            let x = (noise(&[batch, groups * per_group, t, length], 3) + offset).unwrap();
            let (fast, clear) = (norm.run(&x, silu).unwrap(), norm.run_portable(&x, silu).unwrap());
            // A group of few values around a large mean has lost digits before it gets here.
            prop_assert!(worst(&fast, &clear) < 1e-4, "differs by {}", worst(&fast, &clear));
        }
    }
}
