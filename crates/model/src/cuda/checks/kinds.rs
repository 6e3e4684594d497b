//! The checks, each for a shape.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};

use super::{
    super::{attention, decode, group_norm, heads, layer_norm, linear, rms_norm, turn},
    Both, Check, add, both, noise, off, tolerance,
};
use crate::{
    ops::{self, Activation, Gate},
    vae::{CausalConv3d, EPS, GroupNorm, Step},
    weights::{Encoding, Matrix, Weights, fp8, ggml, int8},
};

/// Norms of lines of a width: modulated, and of the root mean square.
pub(super) fn norms(checks: &mut Vec<Check>, dtype: DType, rows: usize, width: usize) {
    add(checks, format!("modulated norm of {rows} x {width}"), dtype, move |device| {
        let x = both(&[rows, width], 1, dtype, device)?;
        let (w, b) = (both(&[width], 2, DType::F32, device)?, both(&[width], 3, DType::F32, device)?);
        let clear = ops::layer_norm_clear(&x.clear, &w.clear, &b.clear, 1e-6)?;
        off(&layer_norm(&x.kernel, &w.kernel, &b.kernel, 1e-6)?, &clear)
    });
    add(checks, format!("root mean square norm of 2 x {rows} x {width}"), dtype, move |device| {
        let (x, w) = (both(&[2, rows, width], 1, dtype, device)?, both(&[width], 2, dtype, device)?);
        off(&rms_norm(&x.kernel, &w.kernel, 1e-6)?, &ops::rms_norm_clear(&x.clear, &w.clear, 1e-6)?)
    });
}

/// The VAE's norm over three groups, without and with the activation behind it.
pub(super) fn group_norms(checks: &mut Vec<Check>, dtype: DType, [batch, each, t, h, w]: [usize; 5]) {
    for silu in [false, true] {
        let shape = [batch, 3 * each, t, h, w];
        let name = format!("group norm{} of {shape:?}", if silu { " and SiLU" } else { "" });
        add(checks, name, dtype, move |device| {
            let x = both(&shape, 1, dtype, device)?;
            let (w, b) = (both(&shape[1..2], 2, dtype, device)?, both(&shape[1..2], 3, dtype, device)?);
            let tensors = HashMap::from([("weight".to_owned(), w.clear), ("bias".to_owned(), b.clear)]);
            let clear = GroupNorm::load(&Weights::from_tensors(tensors, DType::F32, &Device::Cpu), 3);
            let clear = clear.and_then(|norm| if silu { norm.forward_silu(&x.clear) } else { norm.forward(&x.clear) });
            off(&group_norm(&x.kernel, 3, (&w.kernel, &b.kernel), EPS, silu)?, &clear.map_err(told)?)
        });
    }
}

/// Heads of queries, keys and values: norms and, where they turn, the rotary embedding.
pub(super) fn heads_of(checks: &mut Vec<Check>, dtype: DType, [length, count, d]: [usize; 3], turned: bool) {
    let name = format!("{length} x {count} heads of {d}{}", if turned { ", turned" } else { "" });
    add(checks, name, dtype, move |device| {
        let x = both(&[length, 3 * count * d], 1, dtype, device)?;
        let (q, k) = (both(&[d], 2, dtype, device)?, both(&[d], 3, dtype, device)?);
        let (cos, sin) = tables(length + 2, d, device)?;
        let turn = |t: bool| turned.then_some(if t { (&cos.kernel, &sin.kernel) } else { (&cos.clear, &sin.clear) });
        let got = heads(&x.kernel, [&q.kernel, &k.kernel], 1e-6, turn(true))?;
        let clear = ops::heads_clear(&x.clear, [&q.clear, &k.clear], 1e-6, turn(false))?;
        let apart = [off(&got.q, &clear.q)?, off(&got.k, &clear.k)?, off(&got.v, &clear.v)?];
        Ok(apart.into_iter().fold(0.0, f32::max))
    });
}

/// The rotary embedding alone.
pub(super) fn turns(checks: &mut Vec<Check>, dtype: DType, [heads, length, d]: [usize; 3]) {
    add(checks, format!("rotary embedding of {heads} x {length} x {d}"), dtype, move |device| {
        let x = both(&[heads, length, d], 1, dtype, device)?;
        let (cos, sin) = tables(length + 2, d, device)?;
        off(&turn(&x.kernel, &cos.kernel, &sin.kernel)?, &ops::turn_clear(&x.clear, &cos.clear, &sin.clear)?)
    });
}

fn tables(length: usize, d: usize, device: &Device) -> Result<(Both, Both)> {
    let angles = (noise(&[length, d / 2], 9)? * 3.0)?;
    let of = |clear: Tensor| Ok::<_, candle_core::Error>(Both { kernel: clear.to_device(device)?, clear });
    Ok((of(angles.cos()?)?, of(angles.sin()?)?))
}

/// A layer of two inputs with its bias, its activation and, where it is gated, gate and residual.
pub(super) fn layer(
    checks: &mut Vec<Check>,
    dtype: DType,
    [rows, inp, out]: [usize; 3],
    activation: Activation,
    gated: bool,
) {
    let name = format!("layer of {rows} x {inp} + 8 to {out}, {activation:?}");
    add(checks, format!("{name}{}", if gated { ", gate and residual" } else { "" }), dtype, move |device| {
        let (x0, x1) = (both(&[rows, inp], 1, dtype, device)?, both(&[rows, 8], 2, dtype, device)?);
        let (w, b) = (both(&[out, inp + 8], 3, dtype, device)?, both(&[out], 4, dtype, device)?);
        let (r, g) = (both(&[rows, out], 5, dtype, device)?, both(&[out], 6, DType::F32, device)?);
        let (kernel, clear) = (Matrix::new(&w.kernel)?, Matrix::new(&w.clear)?);
        let gate = Gate { residual: &r.kernel, gate: Some(&g.kernel) };
        let gate_clear = Gate { residual: &r.clear, gate: Some(&g.clear) };
        let xs = [&x0.kernel, &x1.kernel];
        let got = linear(&xs, &kernel, Some(&b.kernel), activation, gated.then_some(gate))?;
        let xs = [&x0.clear, &x1.clear];
        let wanted = ops::linear_clear(&xs, &clear, Some(&b.clear), activation, gated.then_some(gate_clear))?;
        // The product is rounded before the rest is done to it, as cuBLAS gives it.
        Ok(off(&got, &wanted)? / 2.0)
    });
}

/// A layer of few lines in f32 whose weight has 16 bits.
pub(super) fn thin(checks: &mut Vec<Check>, dtype: DType, [rows, inp, out]: [usize; 3]) {
    checks.push(Check {
        name: format!("layer of {rows} x {inp} to {out} in f32, weight {}", dtype.as_str()),
        tolerance: tolerance(DType::F32),
        run: Box::new(move |device| {
            let (x, w) = (both(&[rows, inp], 1, DType::F32, device)?, both(&[out, inp], 2, dtype, device)?);
            let b = both(&[out], 3, dtype, device)?;
            let (activation, clear) = (Activation::Silu, Matrix::new(&w.clear)?);
            let wanted = ops::linear_clear(&[&x.clear], &clear, Some(&b.clear), activation, None)?;
            off(&linear(&[&x.kernel], &Matrix::new(&w.kernel)?, Some(&b.kernel), activation, None)?, &wanted)
        }),
    });
}

/// Which keys a query does not see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hidden {
    Nothing,
    /// The same keys from all queries.
    Keys,
    /// From each query others.
    Each,
}

/// Attention of `[batch, heads, queries, keys, width]`.
pub(super) fn attends(checks: &mut Vec<Check>, dtype: DType, [b, h, q, k, d]: [usize; 5], hide: Hidden) {
    let masked = match hide {
        Hidden::Nothing => "",
        Hidden::Keys => ", keys masked",
        Hidden::Each => ", masked",
    };
    add(checks, format!("attention {b}x{h}x{q}x{k} of {d}{masked}"), dtype, move |device| {
        let part = |length: usize, seed: u64| both(&[b, h, length, d], seed, dtype, device);
        let (query, key, value) = (part(q, 1)?, part(k, 2)?, part(k, 3)?);
        let mask = match hide {
            Hidden::Nothing => None,
            Hidden::Keys => Some(hidden(&[1, 1, k])?),
            Hidden::Each => Some(hidden(&[b, q, k])?),
        };
        let scale = 2.0 / (d as f64).sqrt();
        let own = mask.as_ref().map(|m| m.to_device(device)).transpose()?;
        let got = attention(&query.kernel, &key.kernel, &value.kernel, scale, own.as_ref())?;
        let wanted = ops::attention_clear(&query.clear, &key.clear, &value.clear, scale, mask.as_ref())?;
        // On tensor cores the weights of the values are rounded too.
        Ok(off(&got, &wanted)? / 2.0)
    });
}

/// A mask that hides about half of the keys, never the first.
fn hidden(shape: &[usize]) -> Result<Tensor> {
    let keys = shape[2];
    let values = noise(shape, 17)?.flatten_all()?.to_vec1::<f32>()?;
    let hide = |(i, v): (usize, &f32)| if i % keys > 0 && *v > 0.0 { f32::NEG_INFINITY } else { 0.0 };
    Tensor::from_vec(values.iter().enumerate().map(hide).collect::<Vec<f32>>(), shape, &Device::Cpu)
}

/// A convolution.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// Channels in and out.
    pub(super) channels: [usize; 2],
    pub(super) kernel: usize,
    pub(super) stride: [usize; 3],
    pub(super) upsample: [usize; 3],
    pub(super) residual: bool,
    /// Frames, rows and columns.
    pub(super) sides: [usize; 3],
}

/// A causal convolution, which pads nothing that it reads.
pub(super) fn convolution(checks: &mut Vec<Check>, dtype: DType, shape: Shape) {
    let Shape { channels: [inp, out], kernel, stride, upsample, residual, sides: [t, h, w] } = shape;
    let name = format!(
        "convolution {inp} to {out} of {t}x{h}x{w}, kernel {kernel}, stride {stride:?}, upsampled {upsample:?}"
    );
    add(checks, name, dtype, move |device| {
        let weight = both(&[out, inp, kernel, kernel, kernel], 1, dtype, device)?;
        let (b, x) = (both(&[out], 2, dtype, device)?, both(&[2, inp, t, h, w], 3, dtype, device)?);
        let layer = |weight: &Tensor, bias: &Tensor, device: &Device| {
            let tensors = [("weight".to_owned(), weight.clone()), ("bias".to_owned(), bias.clone())];
            let weights = Weights::from_tensors(tensors.into(), weight.dtype(), device);
            CausalConv3d::load(&weights, inp, stride).map_err(told)
        };
        let clear = layer(&weight.clear, &b.clear, &Device::Cpu)?;
        let plain = clear.forward_portable(&x.clear, Step { upsample, residual: None }).map_err(told)?;
        let r = both(plain.dims(), 4, dtype, device)?;
        let step = Step { upsample, residual: residual.then_some(&r.clear) };
        let wanted = clear.forward_portable(&x.clear, step).map_err(told)?;
        let step = Step { upsample, residual: residual.then_some(&r.kernel) };
        off(&layer(&weight.kernel, &b.kernel, device)?.forward_on_card(&x.kernel, step).map_err(told)?, &wanted)
    });
}

/// Weights that are stored packed; those with scales have one, or with `by_row` one for each row.
pub(super) fn packed(
    checks: &mut Vec<Check>,
    dtype: DType,
    encoding: Encoding,
    [rows, columns]: [usize; 2],
    by_row: bool,
) {
    let name = format!("{rows} x {columns} weights in {}", encoding.name());
    checks.push(Check {
        name: format!("{name}{}, {}", if by_row { ", a scale a row" } else { "" }, dtype.as_str()),
        // The same operations in the same order, then one rounding.
        tolerance: 0.0,
        run: Box::new(move |device| {
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
