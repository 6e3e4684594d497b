//! Matrix products with weights as they are stored.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{
    Activation,
    host::{self, Shared},
    product::{self, Left, View},
    simd::vectorised,
};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{memory, weights::Matrix};

/// Most values of a weight that one thread decodes at once (f32: 4 MiB).
const PANEL: usize = 1 << 20;

/// Most values of the input that are laid out anew at once (f32: 64 MiB). Each of these pieces meets the whole weight,
/// which is then decoded again.
const PIECE: usize = 16 << 20;

/// The residual connection around a layer: `residual + gate·y`.
#[derive(Debug, Clone, Copy)]
pub struct Gate<'a> {
    /// `(.., out)`, as many rows as the input.
    pub residual: &'a Tensor,
    /// `(out)` for all rows; nothing is 1.
    pub gate: Option<&'a Tensor>,
}

/// `f(x·Wᵀ + b)`, then the residual connection where there is one.
///
/// Several inputs stand side by side: `[x₀ ⊕ x₁]·Wᵀ` without the concatenation being made.
///
/// - `xs`: `(L, inᵢ)`, of one type; their widths add up to the weight's
/// - `bias`: `(out)`
/// - returns: `(L, out)`, type of the inputs
pub fn linear(
    xs: &[&Tensor],
    weight: &Matrix,
    bias: Option<&Tensor>,
    activation: Activation,
    gate: Option<Gate<'_>>,
) -> Result<Tensor> {
    let [first, ..] = xs else { candle_core::bail!("a layer without an input") };
    if !host::here(first) || !weight.is_here() {
        #[cfg(feature = "cuda")]
        if cuda::here(first) {
            return cuda::linear(xs, weight, bias, activation, gate);
        }
        return linear_clear(xs, weight, bias, activation, gate);
    }
    let rows = first.dim(0)?;
    let (out, dtype) = (weight.rows(), first.dtype());
    let widths: Vec<usize> = xs.iter().map(|x| x.dim(1)).collect::<Result<_>>()?;
    if widths.iter().sum::<usize>() != weight.columns() || xs.iter().any(|x| x.dims() != [rows, x.dims()[1]]) {
        candle_core::bail!("inputs of width {widths:?} for a weight of {} x {}", out, weight.columns());
    }
    let bias = bias.map(|b| host::with_values(b, <[f32]>::to_vec)).transpose()?;
    let scale = gate.and_then(|g| g.gate).map(|g| host::with_values(g, <[f32]>::to_vec)).transpose()?;
    if [&bias, &scale].into_iter().flatten().any(|v| v.len() != out)
        || gate.is_some_and(|g| g.residual.dims() != [rows, out])
    {
        candle_core::bail!("a bias, gate or residual that does not fit {rows} x {out}");
    }
    // Beside the result, a piece of the widest input is laid out anew for the product.
    let widest = widths.iter().copied().max().unwrap_or(0);
    memory::room_for(dtype, rows * widest, rows.min(piece(widest)) * widest + rows * out)?;
    let mut y = vec![0f32; rows * out];
    if y.is_empty() {
        return host::tensor(y, &[rows, out], dtype);
    }
    let product = Product { weight, rows, activation, bias, scale };
    for (i, x) in xs.iter().enumerate() {
        let column = widths[..i].iter().sum();
        let last = i + 1 == xs.len();
        host::with_values(x, |x| match gate.filter(|_| last) {
            Some(gate) => host::with_values(gate.residual, |r| product.run(x, column, last, Some(r), &mut y)),
            None => {
                product.run(x, column, last, None, &mut y);
                Ok(())
            }
        })??;
    }
    host::tensor(y, &[rows, out], dtype)
}

/// The same with candle's operations, on any device and in any type.
pub fn linear_clear(
    xs: &[&Tensor],
    weight: &Matrix,
    bias: Option<&Tensor>,
    activation: Activation,
    gate: Option<Gate<'_>>,
) -> Result<Tensor> {
    let x = if let [x] = xs { (*x).clone() } else { Tensor::cat(xs, 1)? };
    let mut y = x.contiguous()?.matmul(&weight.to_tensor()?.to_dtype(x.dtype())?.t()?)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(&bias.to_dtype(y.dtype())?)?;
    }
    let y = activation.clear(&y)?;
    match gate {
        None => Ok(y),
        Some(Gate { residual, gate: None }) => residual + y,
        Some(Gate { residual, gate: Some(gate) }) => residual + y.broadcast_mul(&gate.to_dtype(y.dtype())?)?,
    }
}

/// Rows of an input of some width that are laid out at once.
fn piece(width: usize) -> usize {
    const FEWEST: usize = 256;
    (PIECE / width.max(1)).max(FEWEST)
}

struct Product<'a> {
    weight: &'a Matrix,
    rows: usize,
    activation: Activation,
    bias: Option<Vec<f32>>,
    scale: Option<Vec<f32>>,
}

impl Product<'_> {
    /// Adds the product of one input `(rows, width)`, which meets the weight's columns from `column` on.
    fn run(&self, x: &[f32], column: usize, last: bool, residual: Option<&[f32]>, y: &mut [f32]) {
        let (width, out) = (x.len().checked_div(self.rows).unwrap_or(0), self.weight.rows());
        let piece = piece(width);
        for (part, y) in y.chunks_mut(piece * out).enumerate() {
            let rows = y.len() / out;
            let x = &x[part * piece * width..][..rows * width];
            let residual = residual.map(|r| &r[part * piece * out..][..rows * out]);
            self.part((x, width), column, residual, last, y);
        }
    }

    /// The same for some of the rows.
    fn part(&self, (x, width): (&[f32], usize), column: usize, residual: Option<&[f32]>, last: bool, y: &mut [f32]) {
        let (out, columns) = (self.weight.rows(), self.weight.columns());
        let rows = y.len() / out;
        let most = (PANEL / columns.max(1)).next_multiple_of(32).clamp(32, product::COLUMNS);
        // A narrow layer is shared out among all threads all the same.
        let panel = out.div_ceil(rayon::current_num_threads()).next_multiple_of(32).clamp(32, most);
        let left = Left::new_threaded(View::rows(x, width), rows, width);
        let y = Shared::new(y);
        let panels: Vec<usize> = (0..out).step_by(panel).collect();
        panels.into_par_iter().for_each_init(Default::default, |(room, packed): &mut (Vec<f32>, Vec<f32>), at| {
            let outs = panel.min(out - at);
            let weight = self.weight.panel(at..at + outs, room);
            assert!(weight.len() == outs * columns && column + width <= columns, "rows of the weight");
            let right = View { values: weight.get(column..).unwrap_or_default(), row: 1, column: columns };
            // SAFETY: `outs` columns of all lines of `y`, which no other task has.
            unsafe { left.times(right, outs, (y.pointer(at), out), (1.0, column > 0), packed) };
            if !last {
                return;
            }
            for r in 0..rows {
                // SAFETY: these columns of this line are this task's alone.
                let line = unsafe { y.slice(r * out + at, outs) };
                if let Some(bias) = &self.bias {
                    line.iter_mut().zip(&bias[at..]).for_each(|(y, b)| *y += b);
                }
                self.activation.apply(line);
                match (residual, &self.scale) {
                    (Some(residual), Some(scale)) => gated(line, &residual[r * out + at..], &scale[at..]),
                    (Some(residual), None) => line.iter_mut().zip(&residual[r * out + at..]).for_each(|(y, r)| *y += r),
                    (None, _) => {}
                }
            }
        });
    }
}

vectorised! {
    fn gated(line: &mut [f32], residual: &[f32], gate: &[f32]) {
        for ((y, r), g) in line.iter_mut().zip(residual).zip(gate) {
            *y = super::simd::fma::<FMA>(*y, *g, *r);
        }
    }
}
