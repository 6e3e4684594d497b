//! Matrix products and what stands around them; heads of queries, keys and values.

use candle_core::{DType, Result, Tensor};

use super::launch::{File, Launch, Number, int, long, ready, suffix, wide};
use crate::{
    ops::{Activation, Gate, QkvHeads},
    weights::Matrix,
};

const THREADS: u32 = 256;
const WARPS: usize = THREADS as usize / 32;

/// Lines in f32 for which a weight of 16 bits is read as it is instead of being widened first.
const THIN: usize = 16;

pub(crate) fn linear(
    xs: &[&Tensor],
    weight: &Matrix,
    bias: Option<&Tensor>,
    activation: Activation,
    gate: Option<Gate<'_>>,
) -> Result<Tensor> {
    let x = if let [x] = xs { (*x).clone() } else { Tensor::cat(xs, 1)? };
    let (rows, inp) = x.dims2()?;
    let out = weight.rows();
    if inp != weight.columns() {
        candle_core::bail!("an input of width {inp} for a weight of {out} x {}", weight.columns());
    }
    let scale = gate.and_then(|g| g.gate);
    if [bias, scale].into_iter().flatten().any(|v| v.dims() != [out])
        || gate.is_some_and(|g| g.residual.dims() != [rows, out])
    {
        candle_core::bail!("a bias, gate or residual that does not fit {rows} x {out}");
    }
    let weight = weight.to_tensor()?;
    if x.dtype() == DType::F32 && weight.dtype() != DType::F32 && rows <= THIN && gate.is_none() {
        return thin(&x, &weight, bias, activation);
    }
    let y = x.contiguous()?.matmul(&weight.to_dtype(x.dtype())?.t()?)?;
    if bias.is_none() && activation == Activation::None && gate.is_none() {
        return Ok(y);
    }
    let (y, bias, scale) = (ready(&y)?, bias.map(wide).transpose()?, scale.map(wide).transpose()?);
    let residual = gate.map(|g| ready(&g.residual.to_dtype(y.dtype())?)).transpose()?;
    Launch {
        file: File::Layer,
        kernel: format!("finish_{}", suffix(y.dtype())?),
        inputs: &[Some(&y), bias.as_ref(), residual.as_ref(), scale.as_ref()],
        numbers: &[int(out)?, number(activation)],
        grid: [rows, 1, 1],
        threads: THREADS,
        shared: 0,
    }
    .run(&[rows, out], y.dtype())
}

fn thin(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    let ((rows, inp), out) = (x.dims2()?, weight.dim(0)?);
    let (x, weight, bias) = (ready(x)?, ready(weight)?, bias.map(wide).transpose()?);
    Launch {
        file: File::Layer,
        kernel: format!("thin_{}", suffix(weight.dtype())?),
        inputs: &[Some(&x), Some(&weight), bias.as_ref()],
        numbers: &[int(inp)?, int(out)?, number(activation)],
        grid: [out.div_ceil(WARPS), rows, 1],
        threads: THREADS,
        shared: 0,
    }
    .run(&[rows, out], DType::F32)
}

/// As the kernels number them.
fn number(activation: Activation) -> Number {
    Number::Int(match activation {
        Activation::None => 0,
        Activation::GeluTanh => 1,
        Activation::GeluErf => 2,
        Activation::QuickGelu => 3,
        Activation::Silu => 4,
        Activation::Relu => 5,
    })
}

pub(crate) fn heads(qkv: &Tensor, norms: [&Tensor; 2], eps: f32, turn: Option<(&Tensor, &Tensor)>) -> Result<QkvHeads> {
    let (length, width) = qkv.dims2()?;
    let d = norms[0].dim(0)?;
    let hidden = width / 3;
    if d == 0 || d % 2 != 0 || hidden * 3 != width || !hidden.is_multiple_of(d) || norms[1].dims() != [d] {
        candle_core::bail!("{width} values a token do not make heads of {d}");
    }
    let count = hidden / d;
    let (qkv, norms) = (ready(qkv)?, ready(&Tensor::cat(&norms.map(Tensor::clone), 0)?.to_dtype(DType::F32)?)?);
    let (cos, sin) = tables(turn, length, d)?;
    let all = Launch {
        file: File::Heads,
        kernel: format!("heads_{}", suffix(qkv.dtype())?),
        inputs: &[Some(&qkv), Some(&norms), cos.as_ref(), sin.as_ref()],
        numbers: &[int(length)?, int(count)?, int(d)?, Number::Float(eps)],
        grid: [length, (3 * count).div_ceil(WARPS), 1],
        threads: THREADS,
        shared: 0,
    }
    .run(&[3, count, length, d], qkv.dtype())?;
    Ok(QkvHeads { q: all.get(0)?, k: all.get(1)?, v: all.get(2)? })
}

pub(crate) fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (heads, length, d) = x.dims3()?;
    let x = ready(x)?;
    let (cos, sin) = tables(Some((cos, sin)), length, d)?;
    Launch {
        file: File::Heads,
        kernel: format!("turn_{}", suffix(x.dtype())?),
        inputs: &[Some(&x), cos.as_ref(), sin.as_ref()],
        numbers: &[long(heads * length), int(length)?, int(d)?],
        grid: [(heads * length).div_ceil(WARPS), 1, 1],
        threads: THREADS,
        shared: 0,
    }
    .run(x.dims(), x.dtype())
}

/// Tables of angles that fit `length` tokens of heads of `d`, ready.
fn tables(turn: Option<(&Tensor, &Tensor)>, length: usize, d: usize) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let Some((cos, sin)) = turn else { return Ok((None, None)) };
    if cos.dims() != sin.dims() || cos.dim(0)? < length || cos.dim(1)? * 2 != d {
        candle_core::bail!("a table of angles {:?} for {length} tokens of heads of {d}", cos.dims());
    }
    Ok((Some(wide(cos)?), Some(wide(sin)?)))
}
