//! The operators.

mod combine;
mod element;
mod picture;
mod shape;

use std::sync::Arc;

use super::{
    file::{Attribute, Node},
    limits::Budget,
    value::{Array, Value},
};

/// One operator with its inputs; `None` for one that is left out.
pub(super) struct Call<'a> {
    pub(super) node: &'a Node,
    pub(super) inputs: &'a [Option<Arc<Value>>],
    pub(super) opset: i64,
}

/// Result of an operator.
type Made = Result<Value, String>;

/// The operators that are run.
pub(super) const KINDS: [&str; 52] = [
    "Add",
    "AveragePool",
    "BatchNormalization",
    "Cast",
    "Ceil",
    "Clip",
    "Concat",
    "Constant",
    "ConstantOfShape",
    "Conv",
    "Div",
    "Dropout",
    "Elu",
    "Exp",
    "Expand",
    "Flatten",
    "Floor",
    "Gather",
    "Gemm",
    "GlobalAveragePool",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "Log",
    "MatMul",
    "Max",
    "MaxPool",
    "Min",
    "Mul",
    "Neg",
    "PRelu",
    "Pad",
    "Pow",
    "Range",
    "ReduceMean",
    "Relu",
    "Reshape",
    "Resize",
    "Shape",
    "Sigmoid",
    "Slice",
    "Softmax",
    "Softplus",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Tanh",
    "Transpose",
    "Unsqueeze",
    "Upsample",
];

/// Runs one operator; the outputs in their order.
pub(super) fn run(call: &Call<'_>, budget: &mut Budget) -> Result<Vec<Value>, String> {
    let made = match call.node.kind.as_str() {
        "Split" => return shape::split(call, budget),
        "Conv" => picture::conv(call, budget),
        "MaxPool" | "AveragePool" => picture::pool(call, budget),
        "GlobalAveragePool" => picture::global_average(call, budget),
        "Resize" | "Upsample" => picture::resize(call, budget),
        "BatchNormalization" => picture::batch_norm(call, budget),
        "MatMul" | "Gemm" => combine::product(call, budget),
        "Concat" => combine::concat(call, budget),
        "Softmax" => combine::softmax(call, budget),
        "ReduceMean" => combine::mean(call, budget),
        "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Min" | "Max" | "PRelu" => element::pairs(call, budget),
        "Cast" => element::cast(call, budget),
        "Constant" => shape::constant(call),
        "ConstantOfShape" => shape::filled(call, budget),
        "Expand" => shape::expand(call, budget),
        "Flatten" | "Reshape" | "Squeeze" | "Unsqueeze" => shape::reshape(call, budget),
        "Gather" => shape::gather(call, budget),
        "Identity" | "Dropout" => call.input(0).and_then(|x| budget.ask(x.shape(), 1).map(|()| x.clone())),
        "Pad" => shape::pad(call, budget),
        "Range" => shape::range(call, budget),
        "Shape" => shape::shape(call),
        "Slice" => shape::slice(call, budget),
        "Transpose" => shape::transpose(call, budget),
        _ => element::each(call, budget),
    };
    made.map(|value| vec![value])
}

impl Call<'_> {
    fn optional(&self, i: usize) -> Option<&Value> {
        self.inputs.get(i)?.as_deref()
    }

    fn input(&self, i: usize) -> Result<&Value, String> {
        self.optional(i).ok_or_else(|| format!("input {i} is missing"))
    }

    fn floats(&self, i: usize) -> Result<&Array<f32>, String> {
        self.input(i)?.floats().map_err(|reason| format!("input {i}: {reason}"))
    }

    fn int(&self, name: &str) -> Option<i64> {
        match self.node.attributes.get(name)? {
            Attribute::Int(value) => Some(*value),
            _ => None,
        }
    }

    fn float(&self, name: &str) -> Option<f32> {
        match self.node.attributes.get(name)? {
            Attribute::Float(value) => Some(*value),
            _ => None,
        }
    }

    fn text(&self, name: &str) -> Option<&str> {
        match self.node.attributes.get(name)? {
            Attribute::Text(value) => Some(value),
            _ => None,
        }
    }

    /// Whole numbers from an attribute, or, as newer files have it, from an input.
    fn ints(&self, name: &str, input: usize) -> Result<Option<&[i64]>, String> {
        match self.node.attributes.get(name) {
            Some(Attribute::Ints(values)) => Ok(Some(values)),
            _ => self.optional(input).map(Value::ints).transpose(),
        }
    }

    /// A number from an attribute, or, as newer files have it, from an input.
    fn number(&self, name: &str, input: usize) -> Result<Option<f32>, String> {
        match (self.float(name), self.optional(input)) {
            (Some(value), _) => Ok(Some(value)),
            (None, Some(Value::Floats(array))) => Ok(array.values.first().copied()),
            (None, Some(Value::Ints(array))) => Ok(array.values.first().map(|value| *value as f32)),
            (None, None) => Ok(None),
        }
    }
}

/// Counts a side from the end where it is negative.
fn axis(axis: i64, rank: usize) -> Result<usize, String> {
    let at = if axis < 0 { axis.checked_add(rank as i64) } else { Some(axis) };
    at.and_then(|at| usize::try_from(at).ok()).filter(|at| *at < rank).ok_or_else(|| format!("side {axis} of {rank}"))
}
