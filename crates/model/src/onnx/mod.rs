//! Small networks from ONNX files, run on the CPU: what face detectors are made of, and no more.
//!
//! The file is a stranger's. Every operator says the shape that it will make before it makes it, and a [`limits`] budget
//! of memory and work is asked first; whatever does not fit is refused with a reason.

mod file;
mod limits;
mod ops;
mod value;
mod wire;

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

pub(crate) use file::Declared;
pub(crate) use value::{Array, Value};

use file::{File, short};
use limits::Budget;
use ops::Call;

/// A network of one f32 input.
#[derive(Debug)]
pub(crate) struct Network {
    file: File,
    input: Declared,
    /// How many operators read each value; outputs count once more.
    readers: HashMap<String, usize>,
}

impl Network {
    /// Reads a file's bytes.
    ///
    /// Errors: no ONNX file; several inputs; an operator that is not run, or that reads what nothing before it makes.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self, String> {
        let mut file = file::read(bytes)?;
        if file.inputs.len() != 1 || file.outputs.is_empty() {
            return Err(format!(
                "it has the inputs {} and the outputs {}; one input, the picture, and at least one output are needed",
                Declared::list(&file.inputs),
                Declared::list(&file.outputs)
            ));
        }
        let input = file.inputs.swap_remove(0);
        let mut unknown: Vec<&str> =
            file.nodes.iter().map(|node| node.kind.as_str()).filter(|kind| !ops::KINDS.contains(kind)).collect();
        unknown.sort_unstable();
        unknown.dedup();
        if !unknown.is_empty() {
            let names: Vec<String> = unknown.iter().take(8).map(|kind| short(kind)).collect();
            return Err(format!("it has operators that are not run: {}", names.join(", ")));
        }
        let mut readers: HashMap<String, usize> = HashMap::new();
        let mut made: HashMap<&str, ()> = HashMap::from([(input.name.as_str(), ())]);
        made.extend(file.constants.keys().map(|name| (name.as_str(), ())));
        let missing = |name: &str, by: &str| {
            format!("{:?}, which {by} reads, is made by nothing before it (is it a loop?)", short(name))
        };
        for node in &file.nodes {
            for name in node.inputs.iter().filter(|name| !name.is_empty()) {
                if !made.contains_key(name.as_str()) {
                    return Err(missing(name, &node.kind));
                }
                *readers.entry(name.clone()).or_default() += 1;
            }
            for name in node.outputs.iter().filter(|name| !name.is_empty()) {
                if made.insert(name, ()).is_some() {
                    return Err(format!("{:?} is made twice", short(name)));
                }
            }
        }
        for output in &file.outputs {
            if !made.contains_key(output.name.as_str()) {
                return Err(missing(&output.name, "the caller"));
            }
            *readers.entry(output.name.clone()).or_default() += 1;
        }
        Ok(Self { file, input, readers })
    }

    /// What is declared of the input.
    pub(crate) fn input(&self) -> &Declared {
        &self.input
    }

    /// Computes the outputs, with their names, in the file's order.
    ///
    /// Errors: an operator's inputs do not go together, or it would take more memory or work than the limit.
    pub(crate) fn run(&self, input: Array<f32>) -> Result<Vec<(String, Value)>, String> {
        // No input is known to make it panic; should one, then the file is at fault and not the service.
        catch_unwind(AssertUnwindSafe(|| self.compute(input)))
            .unwrap_or_else(|_| Err("one of its operators failed within".to_owned()))
    }

    fn compute(&self, input: Array<f32>) -> Result<Vec<(String, Value)>, String> {
        let mut budget = Budget::default();
        let mut left = self.readers.clone();
        let mut values: HashMap<&str, Arc<Value>> =
            self.file.constants.iter().map(|(name, value)| (name.as_str(), Arc::clone(value))).collect();
        values.insert(&self.input.name, Arc::new(Value::Floats(input)));
        for node in &self.file.nodes {
            let inputs: Vec<Option<Arc<Value>>> =
                node.inputs.iter().map(|name| values.get(name.as_str()).cloned()).collect();
            let call = Call { node, inputs: &inputs, opset: self.file.opset };
            let at = || format!("{} {:?}", node.kind, node.outputs.first().map(|name| short(name)).unwrap_or_default());
            let made = ops::run(&call, &mut budget).map_err(|reason| format!("the operator {}: {reason}", at()))?;
            drop(inputs);
            for (name, value) in node.outputs.iter().zip(made) {
                if left.contains_key(name.as_str()) {
                    budget.hold(value.len());
                    values.insert(name, Arc::new(value));
                }
            }
            for name in &node.inputs {
                let Some(count) = left.get_mut(name.as_str()) else { continue };
                *count -= 1;
                if *count == 0
                    && let Some(value) = values.remove(name.as_str())
                    && !self.file.constants.contains_key(name)
                {
                    budget.release(value.len());
                }
            }
        }
        let outputs = self.file.outputs.iter().map(|output| {
            let value = values.get(output.name.as_str()).ok_or("an output is not made")?;
            Ok((output.name.clone(), Value::clone(value)))
        });
        outputs.collect()
    }
}

impl Declared {
    /// Names and shapes for a message; `?` is a side that is left open.
    pub(crate) fn list(all: &[Self]) -> String {
        let one = |declared: &Self| {
            let sides: Vec<String> =
                declared.shape.iter().map(|side| side.map_or("?".to_owned(), |side| side.to_string())).collect();
            format!("{:?} [{}]", short(&declared.name), sides.join(", "))
        };
        let mut shown: Vec<String> = all.iter().take(16).map(one).collect();
        if all.len() > shown.len() {
            shown.push(format!("{} more", all.len() - shown.len()));
        }
        if shown.is_empty() { "none".to_owned() } else { shown.join(", ") }
    }
}
