//! Kernels held against their clear twins, on shapes that are no multiples of anything.
//!
//! The twin computes in f32 on the processor, from the values that the kernel gets. In this crate's tests kernels run on
//! the emulation; the GPU suite runs the same checks on a card.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};

use super::{attention, decode, group_norm, heads, layer_norm, linear, rms_norm, turn};
use crate::{
    ops::{self, Activation, Gate},
    vae::{CausalConv3d, EPS, GroupNorm, Step},
    weights::{Encoding, Matrix, Weights, fp8, ggml, int8},
};

/// One kernel in one type.
pub struct Check {
    /// What is checked.
    pub name: String,
    /// The largest difference that may be, relative to the largest value.
    pub tolerance: f32,
    run: Box<dyn Fn(&Device) -> Result<f32>>,
}

impl Check {
    /// Runs the kernel on `device` and gives the largest difference, relative to the largest value.
    ///
    /// Errors: the device's.
    pub fn run(&self, device: &Device) -> Result<f32> {
        (self.run)(device)
    }
}

const TYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// All checks.
#[must_use]
pub fn all() -> Vec<Check> {
    let mut checks = Vec::new();
    norms(&mut checks);
    lines(&mut checks);
    layers(&mut checks);
    attentions(&mut checks);
    convolutions(&mut checks);
    packed(&mut checks);
    checks
}

/// Deterministic values in -1..1: the same for the same seed.
pub(crate) fn noise(shape: &[usize], seed: u64) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let value = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// A tensor for a kernel, and the same values in f32 for its twin.
struct Both {
    kernel: Tensor,
    clear: Tensor,
}

fn both(shape: &[usize], seed: u64, dtype: DType, device: &Device) -> Result<Both> {
    let narrow = noise(shape, seed)?.to_dtype(dtype)?;
    Ok(Both { kernel: narrow.to_device(device)?, clear: narrow.to_dtype(DType::F32)? })
}

/// The largest difference, relative to the largest value of the twin.
fn off(kernel: &Tensor, clear: &Tensor) -> Result<f32> {
    if kernel.dims() != clear.dims() {
        candle_core::bail!("a result of {:?}, expected {:?}", kernel.dims(), clear.dims());
    }
    let values = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let (kernel, clear) = (values(kernel)?, values(clear)?);
    let most = clear.iter().fold(f32::MIN_POSITIVE, |most, v| most.max(v.abs()));
    // Not `max`, which would pass over a NaN.
    Ok(kernel.iter().zip(&clear).map(|(k, c)| (k - c).abs() / most).fold(0.0, |m, d| if d <= m { m } else { d }))
}

/// Half a unit of the last place of a result, and in f32 what another order of additions does.
fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => 4e-3,
        DType::F16 => 5e-4,
        _ => 5e-6,
    }
}

fn add(checks: &mut Vec<Check>, what: impl Into<String>, dtype: DType, run: impl Fn(&Device) -> Result<f32> + 'static) {
    let name = format!("{}, {}", what.into(), dtype.as_str());
    checks.push(Check { name, tolerance: tolerance(dtype), run: Box::new(run) });
}

fn norms(checks: &mut Vec<Check>) {
    for dtype in TYPES {
        for width in [37, 3072] {
            add(checks, format!("modulated norm of {width}"), dtype, move |device| {
                let x = both(&[3, width], 1, dtype, device)?;
                let (w, b) = (both(&[width], 2, DType::F32, device)?, both(&[width], 3, DType::F32, device)?);
                let clear = ops::layer_norm_clear(&x.clear, &w.clear, &b.clear, 1e-6)?;
                off(&layer_norm(&x.kernel, &w.kernel, &b.kernel, 1e-6)?, &clear)
            });
            add(checks, format!("root mean square norm of {width}"), dtype, move |device| {
                let (x, w) = (both(&[2, 3, width], 1, dtype, device)?, both(&[width], 2, dtype, device)?);
                off(&rms_norm(&x.kernel, &w.kernel, 1e-6)?, &ops::rms_norm_clear(&x.clear, &w.clear, 1e-6)?)
            });
        }
        for silu in [false, true] {
            let name = if silu { "group norm and SiLU" } else { "group norm" };
            add(checks, name, dtype, move |device| {
                // More than one slice for each group.
                let shape = [2, 6, 3, 67, 101];
                let x = both(&shape, 1, dtype, device)?;
                let (w, b) = (both(&[6], 2, dtype, device)?, both(&[6], 3, dtype, device)?);
                let tensors = HashMap::from([("weight".to_owned(), w.clear), ("bias".to_owned(), b.clear)]);
                let clear = GroupNorm::load(&Weights::from_tensors(tensors, DType::F32, &Device::Cpu), 3);
                let clear =
                    clear.and_then(|norm| if silu { norm.forward_silu(&x.clear) } else { norm.forward(&x.clear) });
                off(&group_norm(&x.kernel, 3, (&w.kernel, &b.kernel), EPS, silu)?, &clear.map_err(told)?)
            });
        }
    }
}

fn lines(checks: &mut Vec<Check>) {
    for dtype in TYPES {
        for (d, turned) in [(16, true), (70, true), (128, true), (128, false)] {
            let name = format!("heads of {d}{}", if turned { ", turned" } else { "" });
            add(checks, name, dtype, move |device| {
                let (length, count) = (11, 3);
                let x = both(&[length, 3 * count * d], 1, dtype, device)?;
                let (q, k) = (both(&[d], 2, dtype, device)?, both(&[d], 3, dtype, device)?);
                let (cos, sin) = tables(length + 2, d, device)?;
                let turn =
                    |t: bool| turned.then_some(if t { (&cos.kernel, &sin.kernel) } else { (&cos.clear, &sin.clear) });
                let got = heads(&x.kernel, [&q.kernel, &k.kernel], 1e-6, turn(true))?;
                let clear = ops::heads_clear(&x.clear, [&q.clear, &k.clear], 1e-6, turn(false))?;
                let apart = [off(&got.q, &clear.q)?, off(&got.k, &clear.k)?, off(&got.v, &clear.v)?];
                Ok(apart.into_iter().fold(0.0, f32::max))
            });
        }
        add(checks, "rotary embedding", dtype, move |device| {
            let x = both(&[3, 7, 18], 1, dtype, device)?;
            let (cos, sin) = tables(9, 18, device)?;
            off(&turn(&x.kernel, &cos.kernel, &sin.kernel)?, &ops::turn_clear(&x.clear, &cos.clear, &sin.clear)?)
        });
    }
}

fn tables(length: usize, d: usize, device: &Device) -> Result<(Both, Both)> {
    let angles = (noise(&[length, d / 2], 9)? * 3.0)?;
    let of = |clear: Tensor| Ok::<_, candle_core::Error>(Both { kernel: clear.to_device(device)?, clear });
    Ok((of(angles.cos()?)?, of(angles.sin()?)?))
}

fn layers(checks: &mut Vec<Check>) {
    const ACTIVATIONS: [Activation; 6] = [
        Activation::None,
        Activation::GeluTanh,
        Activation::GeluErf,
        Activation::QuickGelu,
        Activation::Silu,
        Activation::Relu,
    ];
    // The processor has no product in bf16, so the emulation leaves that to the card.
    let types: &[DType] = if cfg!(feature = "cuda") { &TYPES } else { &[DType::F32, DType::F16] };
    for &dtype in types {
        for (i, activation) in ACTIVATIONS.into_iter().enumerate() {
            for gated in [false, true] {
                let name = format!("layer, {activation:?}{}", if gated { ", gate and residual" } else { "" });
                add(checks, name, dtype, move |device| {
                    // One width of whole packs, and one that is none.
                    let (rows, inp, out) = (5, 24, if i % 2 == 0 { 37 } else { 64 });
                    let (x0, x1) = (both(&[rows, inp], 1, dtype, device)?, both(&[rows, 8], 2, dtype, device)?);
                    let (w, b) = (both(&[out, inp + 8], 3, dtype, device)?, both(&[out], 4, dtype, device)?);
                    let (r, g) = (both(&[rows, out], 5, dtype, device)?, both(&[out], 6, DType::F32, device)?);
                    let (kernel, clear) = (Matrix::new(&w.kernel)?, Matrix::new(&w.clear)?);
                    let gate = Gate { residual: &r.kernel, gate: Some(&g.kernel) };
                    let gate_clear = Gate { residual: &r.clear, gate: Some(&g.clear) };
                    let xs = [&x0.kernel, &x1.kernel];
                    let got = linear(&xs, &kernel, Some(&b.kernel), activation, gated.then_some(gate))?;
                    let xs = [&x0.clear, &x1.clear];
                    let wanted =
                        ops::linear_clear(&xs, &clear, Some(&b.clear), activation, gated.then_some(gate_clear))?;
                    // The product is rounded before the rest is done to it, as cuBLAS gives it.
                    Ok(off(&got, &wanted)? / 2.0)
                });
            }
        }
    }
    for dtype in [DType::BF16, DType::F16] {
        checks.push(Check {
            name: format!("layer of few lines in f32, weight {}", dtype.as_str()),
            tolerance: tolerance(DType::F32),
            run: Box::new(move |device| {
                let mut most = 0f32;
                for inp in [37, 256] {
                    let (x, w) = (both(&[2, inp], 1, DType::F32, device)?, both(&[19, inp], 2, dtype, device)?);
                    let b = both(&[19], 3, dtype, device)?;
                    let (activation, clear) = (Activation::Silu, Matrix::new(&w.clear)?);
                    let wanted = ops::linear_clear(&[&x.clear], &clear, Some(&b.clear), activation, None)?;
                    let weight = Matrix::new(&w.kernel)?;
                    most = most.max(off(&linear(&[&x.kernel], &weight, Some(&b.kernel), activation, None)?, &wanted)?);
                }
                Ok(most)
            }),
        });
    }
}

fn attentions(checks: &mut Vec<Check>) {
    // Batch, heads, queries, keys.
    let sizes = [[1, 2, 130, 100], [2, 2, 33, 65], [1, 1, 5, 1], [1, 1, 128, 64]];
    for dtype in TYPES {
        for d in [32, 64, 128, 512, 1024] {
            for ([b, h, q, k], mask) in sizes.into_iter().zip([0, 2, 0, 1]) {
                if d > 128 && q > 100 {
                    continue;
                }
                let masked = ["", ", keys masked", ", masked"][mask];
                add(checks, format!("attention {b}x{h}x{q}x{k} of {d}{masked}"), dtype, move |device| {
                    let part = |length: usize, seed: u64| both(&[b, h, length, d], seed, dtype, device);
                    let (query, key, value) = (part(q, 1)?, part(k, 2)?, part(k, 3)?);
                    let mask = match mask {
                        0 => None,
                        1 => Some(hidden(&[1, 1, k])?),
                        _ => Some(hidden(&[b, q, k])?),
                    };
                    let scale = 2.0 / (d as f64).sqrt();
                    let own = mask.as_ref().map(|m| m.to_device(device)).transpose()?;
                    let got = attention(&query.kernel, &key.kernel, &value.kernel, scale, own.as_ref())?;
                    let wanted = ops::attention_clear(&query.clear, &key.clear, &value.clear, scale, mask.as_ref())?;
                    // On tensor cores the weights of the values are rounded too.
                    Ok(off(&got, &wanted)? / 2.0)
                });
            }
        }
    }
}

/// A mask that hides about half of the keys, never the first.
fn hidden(shape: &[usize]) -> Result<Tensor> {
    let keys = shape[2];
    let values = noise(shape, 17)?.flatten_all()?.to_vec1::<f32>()?;
    let hide = |(i, v): (usize, &f32)| if i % keys > 0 && *v > 0.0 { f32::NEG_INFINITY } else { 0.0 };
    Tensor::from_vec(values.iter().enumerate().map(hide).collect::<Vec<f32>>(), shape, &Device::Cpu)
}

fn convolutions(checks: &mut Vec<Check>) {
    // Channels in and out, kernel, stride, upsampling, residual.
    let layers = [
        (5, 7, 3, [1, 1, 1], [1, 1, 1], true),
        (33, 9, 3, [1, 1, 1], [2, 2, 2], false),
        (32, 130, 3, [2, 2, 2], [1, 1, 1], false),
        (16, 3, 1, [1, 1, 1], [1, 1, 1], true),
        (8, 4, 5, [1, 2, 2], [1, 2, 2], false),
    ];
    for dtype in TYPES {
        for (inp, out, kernel, stride, upsample, residual) in layers {
            let name =
                format!("convolution {inp} to {out}, kernel {kernel}, stride {stride:?}, upsampled {upsample:?}");
            add(checks, name, dtype, move |device| {
                let w = both(&[out, inp, kernel, kernel, kernel], 1, dtype, device)?;
                let (b, x) = (both(&[out], 2, dtype, device)?, both(&[2, inp, 2, 5, 7], 3, dtype, device)?);
                let layer = |weight: &Tensor, bias: &Tensor, device: &Device| {
                    let tensors = [("weight".to_owned(), weight.clone()), ("bias".to_owned(), bias.clone())];
                    let weights = Weights::from_tensors(tensors.into(), weight.dtype(), device);
                    CausalConv3d::load(&weights, inp, stride).map_err(told)
                };
                let clear = layer(&w.clear, &b.clear, &Device::Cpu)?;
                let plain = clear.forward_portable(&x.clear, Step { upsample, residual: None }).map_err(told)?;
                let r = both(plain.dims(), 4, dtype, device)?;
                let step = Step { upsample, residual: residual.then_some(&r.clear) };
                let wanted = clear.forward_portable(&x.clear, step).map_err(told)?;
                let step = Step { upsample, residual: residual.then_some(&r.kernel) };
                off(&layer(&w.kernel, &b.kernel, device)?.forward_on_card(&x.kernel, step).map_err(told)?, &wanted)
            });
        }
    }
}

fn packed(checks: &mut Vec<Check>) {
    let encodings =
        [Encoding::F8E4M3, Encoding::I8, Encoding::Q8_0, Encoding::Q6K, Encoding::Q5K, Encoding::Q4K, Encoding::Q4_0];
    for dtype in TYPES {
        for encoding in encodings {
            for by_row in [false, true] {
                let scaled = matches!(encoding, Encoding::F8E4M3 | Encoding::I8);
                if by_row && !scaled {
                    continue;
                }
                let name = format!("weights in {}{}", encoding.name(), if by_row { ", a scale a row" } else { "" });
                checks.push(Check {
                    name: format!("{name}, {}", dtype.as_str()),
                    // The same operations in the same order, then one rounding.
                    tolerance: 0.0,
                    run: Box::new(move |device| {
                        let [rows, columns] = if scaled { [7, 37] } else { [3, 512] };
                        let values = noise(&[rows, columns], 5)?.flatten_all()?.to_vec1::<f32>()?;
                        let (bytes, scales) = pack(encoding, &values, columns, by_row);
                        let mut clear = vec![0f32; values.len()];
                        let stride = bytes.len() / rows;
                        for (i, (row, out)) in bytes.chunks(stride).zip(clear.chunks_mut(columns)).enumerate() {
                            let scale = scales[if by_row { i } else { 0 }];
                            match encoding {
                                Encoding::F8E4M3 => fp8::dequantise_into(row, scale, out),
                                Encoding::I8 => int8::dequantise(row, scale, out),
                                _ => ggml::dequantise(encoding, row, out),
                            }
                        }
                        let wanted = Tensor::from_vec(clear, (rows, columns), &Device::Cpu)?.to_dtype(dtype)?;
                        let (bytes, scales) = (Tensor::new(bytes, device)?, Tensor::new(scales, device)?);
                        off(&decode(encoding, &bytes, &scales, [rows, columns], dtype)?, &wanted)
                    }),
                });
            }
        }
    }
}

/// Packed values, and their scales: one, or one for each row.
fn pack(encoding: Encoding, values: &[f32], columns: usize, by_row: bool) -> (Vec<u8>, Vec<f32>) {
    match encoding {
        Encoding::F8E4M3 => {
            let (bytes, scale) = fp8::quantise(values);
            let rows = values.len() / columns;
            (bytes, (0..if by_row { rows } else { 1 }).map(|i| scale * (1.0 + i as f32)).collect())
        }
        Encoding::I8 => {
            let (bytes, mut scales) = int8::quantise_rows(values, columns);
            scales.truncate(if by_row { scales.len() } else { 1 });
            (bytes.into_iter().map(|byte| byte as u8).collect(), scales)
        }
        _ => {
            let mut bytes = Vec::new();
            ggml::quantise(encoding, values, &mut bytes);
            (bytes, vec![1.0])
        }
    }
}

fn told(error: crate::Error) -> candle_core::Error {
    candle_core::Error::Msg(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On the emulation, which runs what a card would run.
    #[cfg(not(feature = "cuda"))]
    #[test]
    fn every_kernel_equals_its_clear_twin() {
        let mut wrong = Vec::new();
        for check in all() {
            match check.run(&Device::Cpu) {
                Ok(off) if off <= check.tolerance => {}
                Ok(off) => wrong.push(format!("{}: {off:.1e}, allowed {:.1e}", check.name, check.tolerance)),
                Err(error) => wrong.push(format!("{}: {error}", check.name)),
            }
        }
        assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), all().len(), wrong.join("\n"));
    }
}
