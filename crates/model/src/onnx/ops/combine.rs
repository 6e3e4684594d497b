//! Operators that put values together along a side.

use candle_core::{Device, Tensor};

use super::{
    super::{
        limits::Budget,
        value::{Array, Value, broadcast},
    },
    Call, Made, axis,
};

/// Along one side of the inputs.
pub(super) fn concat(call: &Call<'_>, budget: &mut Budget) -> Made {
    let inputs: Vec<&Value> = call.inputs.iter().flatten().map(AsRef::as_ref).collect();
    let first = *inputs.first().ok_or("input 0 is missing")?;
    let at = axis(call.int("axis").ok_or("no axis")?, first.shape().len())?;
    let mut shape = first.shape().to_vec();
    shape[at] = 0;
    for input in &inputs {
        let other = input.shape();
        let same = other.len() == shape.len() && (0..shape.len()).all(|i| i == at || other[i] == shape[i]);
        if !same {
            return Err(format!("{:?} and {other:?} along side {at}", first.shape()));
        }
        shape[at] = shape[at].checked_add(other[at]).ok_or("too large")?;
    }
    budget.ask(&shape, 1)?;
    Ok(match first {
        Value::Floats(_) => {
            let arrays = inputs.iter().map(|input| input.floats().map(|a| (a.shape[at], a.values.as_slice())));
            Value::Floats(join(&arrays.collect::<Result<Vec<_>, _>>()?, shape, at))
        }
        Value::Ints(_) => {
            let arrays = inputs.iter().map(|input| input.ints().map(|a| (input.shape()[at], a)));
            Value::Ints(join(&arrays.collect::<Result<Vec<_>, _>>()?, shape, at))
        }
    })
}

fn join<T: Copy>(parts: &[(usize, &[T])], shape: Vec<usize>, at: usize) -> Array<T> {
    let outer: usize = shape[..at].iter().product();
    let inner: usize = shape[at + 1..].iter().product();
    let mut values = Vec::with_capacity(outer * shape[at] * inner);
    for i in 0..outer {
        for (side, part) in parts {
            let row = side * inner;
            values.extend_from_slice(&part[i * row..(i + 1) * row]);
        }
    }
    Array { shape, values }
}

/// Shares of 1 along a side; before version 13 along all sides from it on.
pub(super) fn softmax(call: &Call<'_>, budget: &mut Budget) -> Made {
    let x = call.floats(0)?;
    budget.ask(&x.shape, 16)?;
    let (otherwise, whole) = if call.opset < 13 { (1, true) } else { (-1, false) };
    let at = axis(call.int("axis").unwrap_or(otherwise), x.shape.len())?;
    let (side, step) = if whole {
        (x.shape[at..].iter().product::<usize>(), 1)
    } else {
        (x.shape[at], x.shape[at + 1..].iter().product::<usize>())
    };
    let mut values = x.values.clone();
    for block in values.chunks_exact_mut((side * step).max(1)) {
        for i in 0..step {
            let places = || (0..side).map(move |k| i + k * step);
            let most = places().map(|at| block[at]).fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0.0;
            for at in places() {
                block[at] = (block[at] - most).exp();
                sum += block[at];
            }
            for at in places() {
                block[at] /= sum;
            }
        }
    }
    Ok(Value::Floats(Array { shape: x.shape.clone(), values }))
}

/// Means along the given sides, or all.
pub(super) fn mean(call: &Call<'_>, budget: &mut Budget) -> Made {
    let x = call.floats(0)?;
    budget.ask(&x.shape, 2)?;
    let rank = x.shape.len();
    let axes: Vec<usize> = match call.ints("axes", 1)? {
        Some(axes) => axes.iter().map(|a| axis(*a, rank)).collect::<Result<_, _>>()?,
        None => (0..rank).collect(),
    };
    let tensor = of(x)?.mean_keepdim(axes.as_slice()).map_err(told)?;
    let kept = call.int("keepdims").unwrap_or(1) != 0;
    let shape = (0..rank).filter(|i| kept || !axes.contains(i));
    let shape = shape.map(|i| if axes.contains(&i) { 1 } else { x.shape[i] }).collect();
    floats(&tensor, shape)
}

/// Products of matrices.
pub(super) fn product(call: &Call<'_>, budget: &mut Budget) -> Made {
    let (a, b) = (call.floats(0)?, call.floats(1)?);
    let turned = |array: &Array<f32>, name: &str| {
        let tensor = of(array)?;
        if call.int(name).unwrap_or(0) != 0 { tensor.t().map_err(told) } else { Ok(tensor) }
    };
    if a.shape.len() < 2 || b.shape.len() < 2 {
        return Err(format!("{:?} times {:?}; matrices are needed", a.shape, b.shape));
    }
    let (left, right) = (turned(a, "transA")?, turned(b, "transB")?);
    let (x, y) = (left.dims(), right.dims());
    let ([xs @ .., rows, depth], [ys @ .., other, columns]) = (x, y) else {
        return Err("matrices are needed".to_owned());
    };
    if depth != other {
        return Err(format!("{x:?} times {y:?}"));
    }
    let mut shape = broadcast(xs, ys)?;
    shape.extend([*rows, *columns]);
    budget.ask(&shape, (*depth).max(1))?;
    if shape.contains(&0) || *depth == 0 {
        return Ok(Value::Floats(Array { values: vec![0.0; shape.iter().product()], shape }));
    }
    // Repeated matrices are copied.
    let count = shape[..shape.len() - 2].iter().product::<usize>();
    budget.ask(&[count, depth * (rows + columns)], 1)?;
    let mut made = left.contiguous().and_then(|l| l.broadcast_matmul(&right.contiguous()?)).map_err(told)?;
    if call.node.kind == "Gemm" {
        made = (made * f64::from(call.float("alpha").unwrap_or(1.0))).map_err(told)?;
        if let Some(bias) = call.optional(2) {
            let bias = bias.floats()?.expanded(&shape)?;
            let bias = (of(&bias)? * f64::from(call.float("beta").unwrap_or(1.0))).map_err(told)?;
            made = (made + bias).map_err(told)?;
        }
    }
    floats(&made, shape)
}

/// A tensor of the library for matrices.
fn of(array: &Array<f32>) -> Result<Tensor, String> {
    Tensor::from_slice(&array.values, array.shape.as_slice(), &Device::Cpu).map_err(told)
}

fn floats(tensor: &Tensor, shape: Vec<usize>) -> Made {
    let values = tensor.flatten_all().and_then(|t| t.to_vec1::<f32>()).map_err(told)?;
    Ok(Value::Floats(Array { shape, values }))
}

/// The product `(rows, depth)` times `(depth, columns)`.
pub(super) fn matrices(a: &[f32], b: &[f32], [rows, depth, columns]: [usize; 3]) -> Result<Vec<f32>, String> {
    let left = Tensor::from_slice(a, (rows, depth), &Device::Cpu).map_err(told)?;
    let right = Tensor::from_slice(b, (depth, columns), &Device::Cpu).map_err(told)?;
    left.matmul(&right).and_then(|t| t.flatten_all()?.to_vec1::<f32>()).map_err(told)
}

fn told(error: candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
