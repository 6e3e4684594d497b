//! Norms of lines.

use candle_core::{D, Result, Tensor};

use super::launch::{File, Launch, Number, int, ready, suffix, wide};

const THREADS: u32 = 256;

pub(crate) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    by_line("layer_norm", x, &[weight, bias], eps)
}

pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    by_line("rms_norm", x, &[weight], eps)
}

fn by_line(kernel: &str, x: &Tensor, affine: &[&Tensor], eps: f32) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    if let Some(wrong) = affine.iter().find(|t| t.dims() != [width]) {
        candle_core::bail!("a norm over {:?} values of lines of {width}", wrong.dims());
    }
    let (x, affine) = (ready(x)?, affine.iter().map(|t| wide(t)).collect::<Result<Vec<_>>>()?);
    let inputs: Vec<_> = std::iter::once(Some(&x)).chain(affine.iter().map(Some)).collect();
    Launch {
        file: File::Norm,
        kernel: format!("{kernel}_{}", suffix(x.dtype())?),
        inputs: &inputs,
        numbers: &[int(width)?, Number::Float(eps)],
        grid: [x.elem_count().checked_div(width).unwrap_or(0), 1, 1],
        threads: THREADS,
        shared: 0,
    }
    .run(x.dims(), x.dtype())
}
