//! Operators that move values, or compute with shapes.

use super::{
    super::{
        file::Attribute,
        limits::{Budget, elements},
        value::{Array, Value, broadcast, steps},
    },
    Call, Made, axis,
};

/// A side that the file computes.
fn side(value: i64) -> Result<usize, String> {
    usize::try_from(value).map_err(|_| format!("a side of {value}"))
}

fn sides(values: &[i64]) -> Result<Vec<usize>, String> {
    values.iter().map(|value| side(*value)).collect()
}

pub(super) fn constant(call: &Call<'_>) -> Made {
    let attributes = &call.node.attributes;
    let list = |values: &[i64], shape| Ok(Value::Ints(Array { shape, values: values.to_vec() }));
    let floats = |values: &[f32], shape| Ok(Value::Floats(Array { shape, values: values.to_vec() }));
    if let Some(Attribute::Tensor(value)) = attributes.get("value") {
        return Ok(Value::clone(value));
    }
    if let Some(Attribute::Ints(values)) = attributes.get("value_ints") {
        return list(values, vec![values.len()]);
    }
    if let Some(Attribute::Floats(values)) = attributes.get("value_floats") {
        return floats(values, vec![values.len()]);
    }
    match (call.int("value_int"), call.float("value_float")) {
        (Some(value), _) => list(&[value], vec![]),
        (None, Some(value)) => floats(&[value], vec![]),
        (None, None) => Err("no value of f32 or whole numbers".to_owned()),
    }
}

/// One value everywhere.
pub(super) fn filled(call: &Call<'_>, budget: &mut Budget) -> Made {
    let shape = sides(call.input(0)?.ints()?)?;
    budget.ask(&shape, 1)?;
    let count = elements(&shape)?;
    match call.node.attributes.get("value") {
        Some(Attribute::Tensor(value)) => match value.as_ref() {
            Value::Ints(array) => {
                let value = *array.values.first().ok_or("an empty value")?;
                Ok(Value::Ints(Array { shape, values: vec![value; count] }))
            }
            Value::Floats(array) => {
                let value = *array.values.first().ok_or("an empty value")?;
                Ok(Value::Floats(Array { shape, values: vec![value; count] }))
            }
        },
        _ => Ok(Value::Floats(Array { shape, values: vec![0.0; count] })),
    }
}

pub(super) fn expand(call: &Call<'_>, budget: &mut Budget) -> Made {
    let x = call.input(0)?;
    let shape = broadcast(x.shape(), &sides(call.input(1)?.ints()?)?)?;
    budget.ask(&shape, 1)?;
    Ok(match x {
        Value::Floats(array) => Value::Floats(array.expanded(&shape)?),
        Value::Ints(array) => Value::Ints(array.expanded(&shape)?),
    })
}

/// The same values in another shape.
pub(super) fn reshape(call: &Call<'_>, budget: &mut Budget) -> Made {
    let x = call.input(0)?;
    budget.ask(x.shape(), 1)?;
    let old = x.shape();
    let shape = match call.node.kind.as_str() {
        "Flatten" => {
            let at = call.int("axis").unwrap_or(1);
            let at = if at == old.len() as i64 { old.len() } else { axis(at, old.len())? };
            vec![old[..at].iter().product(), old[at..].iter().product()]
        }
        "Squeeze" => {
            let axes = call.ints("axes", 1)?.map(|axes| axes.iter().map(|a| axis(*a, old.len())).collect());
            let axes: Option<Vec<usize>> = axes.transpose()?;
            let gone = |i: &usize| axes.as_ref().map_or(old[*i] == 1, |axes| axes.contains(i));
            (0..old.len()).filter(|i| !gone(i)).map(|i| old[i]).collect()
        }
        "Unsqueeze" => {
            let axes = call.ints("axes", 1)?.ok_or("no axes")?;
            let rank = old.len() + axes.len();
            // A tensor has few sides, whatever the list says.
            elements(&vec![1; rank.min(64)])?;
            let axes = axes.iter().map(|a| axis(*a, rank)).collect::<Result<Vec<_>, _>>()?;
            let mut rest = old.iter();
            (0..rank)
                .map(|i| if axes.contains(&i) { Some(1) } else { rest.next().copied() })
                .map(|s| s.unwrap_or(1))
                .collect()
        }
        _ => asked(old, call.ints("shape", 1)?.ok_or("no shape")?, call.int("allowzero").unwrap_or(0) != 0)?,
    };
    x.reshaped(shape)
}

/// A shape where 0 stands for the old side, and one -1 for what is left.
fn asked(old: &[usize], new: &[i64], zero: bool) -> Result<Vec<usize>, String> {
    let mut open = None;
    let mut shape = Vec::new();
    for (i, value) in new.iter().enumerate() {
        shape.push(match value {
            0 if !zero => *old.get(i).ok_or("a 0 for a side that is not there")?,
            -1 if open.replace(i).is_none() => 1,
            _ => side(*value)?,
        });
    }
    if let Some(i) = open {
        let known = elements(&shape)?;
        shape[i] = elements(old)?.checked_div(known).ok_or("a -1 beside a 0")?;
    }
    Ok(shape)
}

pub(super) fn transpose(call: &Call<'_>, budget: &mut Budget) -> Made {
    let x = call.input(0)?;
    budget.ask(x.shape(), 2)?;
    let rank = x.shape().len();
    let order: Vec<usize> = match call.ints("perm", usize::MAX)? {
        Some(order) => order.iter().map(|i| axis(*i, rank)).collect::<Result<_, _>>()?,
        None => (0..rank).rev().collect(),
    };
    if (0..rank).any(|i| !order.contains(&i)) || order.len() != rank {
        return Err(format!("perm {order:?} of {rank} sides"));
    }
    let own = steps(x.shape());
    let shape: Vec<usize> = order.iter().map(|i| x.shape()[*i]).collect();
    x.view(0, &shape, &order.iter().map(|i| own[*i]).collect::<Vec<_>>())
}

pub(super) fn shape(call: &Call<'_>) -> Made {
    let shape: Vec<i64> = call.input(0)?.shape().iter().map(|side| *side as i64).collect();
    let rank = shape.len() as i64;
    let bound = |at: i64| (if at < 0 { at.saturating_add(rank) } else { at }).clamp(0, rank) as usize;
    let (start, end) = (bound(call.int("start").unwrap_or(0)), bound(call.int("end").unwrap_or(rank)));
    let values = shape.get(start..end).unwrap_or_default().to_vec();
    Ok(Value::Ints(Array { shape: vec![values.len()], values }))
}

/// Parts along a side, by index.
pub(super) fn gather(call: &Call<'_>, budget: &mut Budget) -> Made {
    let (x, indices) = (call.input(0)?, call.input(1)?);
    let at = axis(call.int("axis").unwrap_or(0), x.shape().len())?;
    let side = x.shape()[at];
    let places = indices.ints()?.iter().map(|i| axis(*i, side)).collect::<Result<Vec<_>, _>>()?;
    let (before, after) = (&x.shape()[..at], &x.shape()[at + 1..]);
    let shape = [before, indices.shape(), after].concat();
    budget.ask(&shape, 1)?;
    fn pick<T: Copy>(values: &[T], places: &[usize], [outer, side, inner]: [usize; 3]) -> Vec<T> {
        let block = |i: usize, place: &usize| &values[(i * side + place) * inner..][..inner];
        (0..outer).flat_map(|i| places.iter().flat_map(move |place| block(i, place))).copied().collect()
    }
    let sizes = [before.iter().product(), side, after.iter().product()];
    Ok(match x {
        Value::Floats(array) => Value::Floats(Array { shape, values: pick(&array.values, &places, sizes) }),
        Value::Ints(array) => Value::Ints(Array { shape, values: pick(&array.values, &places, sizes) }),
    })
}

/// A box of values, with steps.
pub(super) fn slice(call: &Call<'_>, budget: &mut Budget) -> Made {
    let x = call.input(0)?;
    let rank = x.shape().len();
    let starts = call.ints("starts", 1)?.ok_or("no starts")?;
    let ends = call.ints("ends", 2)?.ok_or("no ends")?;
    let axes = match call.ints("axes", 3)? {
        Some(axes) => axes.iter().map(|a| axis(*a, rank)).collect::<Result<Vec<_>, _>>()?,
        None => (0..starts.len().min(rank)).collect(),
    };
    let by = call.ints("steps", 4)?;
    if starts.len() != axes.len() || ends.len() != axes.len() || by.is_some_and(|by| by.len() != axes.len()) {
        return Err("lists of different lengths".to_owned());
    }
    let (mut shape, mut step, mut start) = (x.shape().to_vec(), steps(x.shape()), 0usize);
    let mut cut: Vec<usize> = Vec::new();
    for (i, at) in axes.iter().enumerate() {
        let by = by.map_or(1, |by| by[i]);
        if by == 0 || cut.contains(at) {
            return Err(format!("step {by}, or side {at} twice"));
        }
        cut.push(*at);
        let side = shape[*at] as i64;
        let (low, high) = if by > 0 { (0, side) } else { (-1, side - 1) };
        let clamped = |value: i64| (if value < 0 { value.saturating_add(side) } else { value }).clamp(low, high);
        let (first, end) = (clamped(starts[i]), clamped(ends[i]));
        let count = if by > 0 { end - first } else { first - end }.max(0) as u64;
        let count = count.div_ceil(by.unsigned_abs()) as usize;
        shape[*at] = count;
        if count > 0 {
            start += first as usize * step[*at] as usize;
            // A side of one value is not stepped along.
            step[*at] = if count == 1 { 0 } else { step[*at] * by as isize };
        }
    }
    budget.ask(&shape, 1)?;
    x.view(start, &shape, &step)
}

/// Neighbouring parts along a side.
pub(super) fn split(call: &Call<'_>, budget: &mut Budget) -> Result<Vec<Value>, String> {
    let x = call.input(0)?;
    let at = axis(call.int("axis").unwrap_or(0), x.shape().len())?;
    let (side, count) = (x.shape()[at], call.node.outputs.len());
    let parts = match call.ints("split", 1)? {
        Some(parts) => sides(parts)?,
        None => {
            let each = side.div_ceil(count.max(1));
            (0..count).map(|i| each.min(side.saturating_sub(i * each))).collect()
        }
    };
    if parts.len() != count || parts.iter().try_fold(0usize, |n, part| n.checked_add(*part)) != Some(side) {
        return Err(format!("{side} into {} parts", parts.len()));
    }
    budget.ask(x.shape(), 1)?;
    let step = steps(x.shape());
    let mut start = 0;
    let mut made = Vec::new();
    for part in parts {
        let mut shape = x.shape().to_vec();
        shape[at] = part;
        made.push(x.view(start * step[at] as usize, &shape, &step)?);
        start += part;
    }
    Ok(made)
}

/// Adds values around; negative numbers of them are refused.
pub(super) fn pad(call: &Call<'_>, budget: &mut Budget) -> Made {
    let x = call.floats(0)?;
    if call.text("mode").unwrap_or("constant") != "constant" {
        return Err("only the mode constant is run".to_owned());
    }
    let rank = x.shape.len();
    let pads = sides(call.ints("pads", 1)?.ok_or("no pads")?)?;
    if pads.len() != 2 * rank {
        return Err(format!("{} pads of {rank} sides", pads.len()));
    }
    let sum = |i: usize| x.shape[i].checked_add(pads[i])?.checked_add(pads[rank + i]);
    let shape: Vec<usize> = (0..rank).map(sum).collect::<Option<_>>().ok_or("too large")?;
    budget.ask(&shape, 1)?;
    let mut values = vec![call.number("value", 2)?.unwrap_or(0.0); elements(&shape)?];
    let row = x.shape.last().copied().unwrap_or(1);
    if row > 0 {
        let (own, step) = (steps(&x.shape), steps(&shape));
        for (i, line) in x.values.chunks(row).enumerate() {
            let at = |side: usize| (i * row / own[side] as usize % x.shape[side] + pads[side]) * step[side] as usize;
            let start: usize = (0..rank).map(at).sum();
            values[start..start + row].copy_from_slice(line);
        }
    }
    Ok(Value::Floats(Array { shape, values }))
}

/// Numbers in equal steps.
pub(super) fn range(call: &Call<'_>, budget: &mut Budget) -> Made {
    let [start, end, step] = [call.input(0)?, call.input(1)?, call.input(2)?];
    let number = |value: &Value| match value {
        Value::Floats(array) => array.values.first().map(|v| f64::from(*v)),
        Value::Ints(array) => array.values.first().map(|v| *v as f64),
    };
    let (Some(first), Some(last), Some(by)) = (number(start), number(end), number(step)) else {
        return Err("three numbers are needed".to_owned());
    };
    // A cast makes 0 of what is no number, and keeps what is too large at the largest.
    let count = ((last - first) / by).ceil().max(0.0) as usize;
    budget.ask(&[count], 1)?;
    Ok(match (start, step) {
        (Value::Ints(start), Value::Ints(step)) => {
            let (start, step) = (start.values[0], step.values[0]);
            let values = (0..count as i64).map(|i| start.wrapping_add(i.wrapping_mul(step))).collect();
            Value::Ints(Array { shape: vec![count], values })
        }
        _ => {
            let values = (0..count).map(|i| (first + i as f64 * by) as f32).collect();
            Value::Floats(Array { shape: vec![count], values })
        }
    })
}
