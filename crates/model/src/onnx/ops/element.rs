//! Operators on each element, or on pairs of them.

use super::{
    super::{
        limits::Budget,
        value::{Array, Value, broadcast},
    },
    Call, Made,
};

/// One number in, one out.
pub(super) fn each(call: &Call<'_>, budget: &mut Budget) -> Made {
    let kind = call.node.kind.as_str();
    let x = call.input(0)?;
    budget.ask(x.shape(), 8)?;
    if let (Value::Ints(array), "Neg" | "Clip" | "Relu") = (x, kind) {
        let (least, most) = (int_bound(call, 1)?.unwrap_or(i64::MIN), int_bound(call, 2)?.unwrap_or(i64::MAX));
        let value = |v: &i64| match kind {
            "Neg" => v.wrapping_neg(),
            "Relu" => (*v).max(0),
            _ => (*v).max(least).min(most),
        };
        let values = array.values.iter().map(value).collect();
        return Ok(Value::Ints(Array { shape: array.shape.clone(), values }));
    }
    let alpha = |otherwise: f32| call.float("alpha").unwrap_or(otherwise);
    let sigmoid = |v: f32| 1.0 / (1.0 + (-v).exp());
    let x = x.floats()?;
    Ok(match kind {
        "Relu" => map(x, |v| v.max(0.0)),
        "LeakyRelu" => {
            let slope = alpha(0.01);
            map(x, |v| if v < 0.0 { slope * v } else { v })
        }
        "Elu" => {
            let alpha = alpha(1.0);
            map(x, |v| if v < 0.0 { alpha * v.exp_m1() } else { v })
        }
        "Sigmoid" => map(x, sigmoid),
        "HardSigmoid" => {
            let (alpha, beta) = (alpha(0.2), call.float("beta").unwrap_or(0.5));
            map(x, |v| (alpha * v + beta).clamp(0.0, 1.0))
        }
        "HardSwish" => map(x, |v| v * (v / 6.0 + 0.5).clamp(0.0, 1.0)),
        "Softplus" => map(x, |v| v.max(0.0) + (-v.abs()).exp().ln_1p()),
        "Tanh" => map(x, f32::tanh),
        "Exp" => map(x, f32::exp),
        "Log" => map(x, f32::ln),
        "Sqrt" => map(x, f32::sqrt),
        "Neg" => map(x, |v| -v),
        "Floor" => map(x, f32::floor),
        "Ceil" => map(x, f32::ceil),
        "Clip" => {
            let least = call.number("min", 1)?.unwrap_or(f32::NEG_INFINITY);
            let most = call.number("max", 2)?.unwrap_or(f32::INFINITY);
            map(x, |v| v.max(least).min(most))
        }
        _ => return Err("it is not run".to_owned()),
    })
}

fn map(x: &Array<f32>, f: impl Fn(f32) -> f32) -> Value {
    Value::Floats(Array { shape: x.shape.clone(), values: x.values.iter().map(|v| f(*v)).collect() })
}

fn int_bound(call: &Call<'_>, input: usize) -> Result<Option<i64>, String> {
    Ok(call.optional(input).map(Value::ints).transpose()?.and_then(|values| values.first().copied()))
}

/// Two numbers in, one out; sides of 1 are repeated.
pub(super) fn pairs(call: &Call<'_>, budget: &mut Budget) -> Made {
    let kind = call.node.kind.as_str();
    let mut inputs = call.inputs.iter().flatten().map(AsRef::as_ref);
    let mut made: Value = inputs.next().ok_or("input 0 is missing")?.clone();
    let mut count = 1;
    for other in inputs {
        count += 1;
        let shape = broadcast(made.shape(), other.shape())?;
        // Both may be repeated, beside what comes out.
        budget.ask(&shape, 8)?;
        made = match (&made, other) {
            (Value::Floats(a), Value::Floats(b)) => {
                Value::Floats(zip(a, b, &shape, float_rule(kind).ok_or("it is not run")?)?)
            }
            (Value::Ints(a), Value::Ints(b)) => {
                let rule = int_rule(kind).ok_or("not of whole numbers")?;
                let made = zip(a, b, &shape, rule)?;
                let values = made.values.into_iter().collect::<Option<Vec<i64>>>();
                Value::Ints(Array { shape, values: values.ok_or("whole numbers too large, or a division by 0")? })
            }
            (Value::Floats(a), Value::Ints(b)) if kind == "Pow" => {
                let b = Array { shape: b.shape.clone(), values: b.values.iter().map(|v| *v as f32).collect() };
                Value::Floats(zip(a, &b, &shape, f32::powf)?)
            }
            _ => return Err("f32 and whole numbers mixed".to_owned()),
        };
    }
    let least = if matches!(kind, "Min" | "Max") { 1 } else { 2 };
    if count < least {
        return Err("input 1 is missing".to_owned());
    }
    Ok(made)
}

fn zip<A: Copy, B>(a: &Array<A>, b: &Array<A>, shape: &[usize], rule: fn(A, A) -> B) -> Result<Array<B>, String> {
    let values = if a.shape == b.shape {
        a.values.iter().zip(&b.values).map(|(a, b)| rule(*a, *b)).collect()
    } else if let ([one], true) = (b.values.as_slice(), a.shape == shape) {
        a.values.iter().map(|a| rule(*a, *one)).collect()
    } else {
        let (a, b) = (a.expanded(shape)?, b.expanded(shape)?);
        a.values.iter().zip(&b.values).map(|(a, b)| rule(*a, *b)).collect()
    };
    Ok(Array { shape: shape.to_vec(), values })
}

fn float_rule(kind: &str) -> Option<fn(f32, f32) -> f32> {
    Some(match kind {
        "Add" => |a, b| a + b,
        "Sub" => |a, b| a - b,
        "Mul" => |a, b| a * b,
        "Div" => |a, b| a / b,
        "Pow" => f32::powf,
        "Min" => f32::min,
        "Max" => f32::max,
        "PRelu" => |a, slope| if a < 0.0 { slope * a } else { a },
        _ => return None,
    })
}

fn int_rule(kind: &str) -> Option<fn(i64, i64) -> Option<i64>> {
    Some(match kind {
        "Add" => i64::checked_add,
        "Sub" => i64::checked_sub,
        "Mul" => i64::checked_mul,
        "Div" => i64::checked_div,
        "Min" => |a, b| Some(a.min(b)),
        "Max" => |a, b| Some(a.max(b)),
        _ => return None,
    })
}

/// Between f32 (also for half and double) and whole numbers, cut towards 0.
pub(super) fn cast(call: &Call<'_>, budget: &mut Budget) -> Made {
    let x = call.input(0)?;
    budget.ask(x.shape(), 1)?;
    let shape = x.shape().to_vec();
    match (x, call.int("to").unwrap_or(0)) {
        (Value::Floats(_), 1 | 10 | 11) | (Value::Ints(_), 6 | 7) => Ok(x.clone()),
        (Value::Ints(array), 1 | 10 | 11) => {
            Ok(Value::Floats(Array { shape, values: array.values.iter().map(|v| *v as f32).collect() }))
        }
        (Value::Floats(array), 6 | 7) => {
            Ok(Value::Ints(Array { shape, values: array.values.iter().map(|v| *v as i64).collect() }))
        }
        (_, to) => Err(format!("to type number {to}; float, half, double, int32 or int64 is needed")),
    }
}
