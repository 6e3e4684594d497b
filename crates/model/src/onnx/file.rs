//! The file: its graph, constants and declared inputs and outputs.

use std::{collections::HashMap, sync::Arc};

use super::{
    limits::{CONSTANTS, NAMES, NODES, SIDES, elements},
    value::{Array, Value},
    wire::{Field, Fields},
};

/// An attribute of an operator.
#[derive(Debug, Clone)]
pub(super) enum Attribute {
    Int(i64),
    Float(f32),
    Text(String),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    Tensor(Arc<Value>),
}

/// One operator.
#[derive(Debug, Default)]
pub(super) struct Node {
    pub(super) kind: String,
    pub(super) inputs: Vec<String>,
    pub(super) outputs: Vec<String>,
    pub(super) attributes: HashMap<String, Attribute>,
    domain: String,
}

/// What is declared of an input or output: `None` for a side that is left open.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Declared {
    pub(crate) name: String,
    pub(crate) float: bool,
    pub(crate) shape: Vec<Option<usize>>,
}

/// A file's contents.
#[derive(Debug, Default)]
pub(super) struct File {
    pub(super) opset: i64,
    pub(super) nodes: Vec<Node>,
    pub(super) constants: HashMap<String, Arc<Value>>,
    pub(super) inputs: Vec<Declared>,
    pub(super) outputs: Vec<Declared>,
}

/// Reads a whole file.
pub(super) fn read(bytes: &[u8]) -> Result<File, String> {
    let (mut graph, mut opset) = (None, None);
    for field in Fields(bytes) {
        match field? {
            (7, part) => graph = Some(part.bytes()?),
            (8, part) => {
                let (mut domain, mut version) = (String::new(), 0);
                for field in Fields(part.bytes()?) {
                    match field? {
                        (1, name) => domain = name.text()?,
                        (2, number) => version = number.int()?,
                        _ => {}
                    }
                }
                if is_onnx(&domain) {
                    opset = Some(version);
                }
            }
            _ => {}
        }
    }
    let (Some(graph), Some(opset)) = (graph, opset) else {
        return Err("it is no ONNX file: it has no graph of ONNX operators".to_owned());
    };
    let mut file = File { opset, ..File::default() };
    for field in Fields(graph) {
        match field? {
            (1, part) if file.nodes.len() < NODES => file.nodes.push(node(part.bytes()?)?),
            (1, _) => return Err(format!("more than {NODES} operators, the limit")),
            (5, part) if file.constants.len() < CONSTANTS => {
                let (name, value) = tensor(part.bytes()?)?;
                file.constants.insert(name, Arc::new(value));
            }
            (5, _) => return Err(format!("more than {CONSTANTS} constants, the limit")),
            (15, _) => return Err("it has sparse constants, which are not read".to_owned()),
            (11, part) if file.inputs.len() < CONSTANTS => file.inputs.push(declared(part.bytes()?)?),
            (12, part) if file.outputs.len() < CONSTANTS => file.outputs.push(declared(part.bytes()?)?),
            (11 | 12, _) => return Err(format!("more than {CONSTANTS} inputs or outputs, the limit")),
            _ => {}
        }
    }
    // Old files list their constants as inputs too.
    file.inputs.retain(|input| !file.constants.contains_key(&input.name));
    Ok(file)
}

fn is_onnx(domain: &str) -> bool {
    matches!(domain, "" | "ai.onnx")
}

fn node(bytes: &[u8]) -> Result<Node, String> {
    let mut node = Node::default();
    for field in Fields(bytes) {
        match field? {
            (1 | 2, _) if node.inputs.len() + node.outputs.len() >= NAMES => {
                return Err(format!("an operator of more than {NAMES} inputs and outputs, the limit"));
            }
            (1, name) => node.inputs.push(name.text()?),
            (2, name) => node.outputs.push(name.text()?),
            (4, kind) => node.kind = kind.text()?,
            (5, part) => {
                if let Some((name, value)) = attribute(part.bytes()?)? {
                    node.attributes.insert(name, value);
                }
            }
            (7, domain) => node.domain = domain.text()?,
            _ => {}
        }
    }
    if !is_onnx(&node.domain) {
        return Err(format!("the operator {:?} is of {:?}, not of ONNX", node.kind, node.domain));
    }
    Ok(node)
}

/// `None` for kinds that no operator that is run takes.
fn attribute(bytes: &[u8]) -> Result<Option<(String, Attribute)>, String> {
    let (mut name, mut kind, mut single) = (String::new(), None, None);
    let (mut ints, mut floats) = (Vec::new(), Vec::new());
    for field in Fields(bytes) {
        match field? {
            (1, text) => name = text.text()?,
            (2, Field::Fixed32(bytes)) => single = Some(Attribute::Float(f32::from_le_bytes(bytes))),
            (3, number) => single = Some(Attribute::Int(number.int()?)),
            (4, text) => single = Some(Attribute::Text(String::from_utf8_lossy(text.bytes()?).into_owned())),
            (5, part) => single = Some(Attribute::Tensor(Arc::new(tensor(part.bytes()?)?.1))),
            (7, part) => part.floats(&mut floats)?,
            (8, part) => part.ints(&mut ints)?,
            (20, number) => kind = Some(number.int()?),
            _ => {}
        }
    }
    // A number of 0 and an empty list need not be written.
    let value = match kind {
        Some(1) => Some(single.unwrap_or(Attribute::Float(0.0))),
        Some(2) => Some(single.unwrap_or(Attribute::Int(0))),
        Some(6) => Some(Attribute::Floats(floats)),
        Some(7) => Some(Attribute::Ints(ints)),
        None if !ints.is_empty() => Some(Attribute::Ints(ints)),
        None if !floats.is_empty() => Some(Attribute::Floats(floats)),
        _ => single,
    };
    Ok(value.map(|value| (name, value)))
}

/// A constant with its name: f32 of any float type, whole numbers of 32 or 64 bits.
fn tensor(bytes: &[u8]) -> Result<(String, Value), String> {
    let (mut name, mut kind, mut dims, mut raw) = (String::new(), 0, Vec::new(), None);
    let (mut floats, mut ints) = (Vec::new(), Vec::new());
    let mut external = false;
    for field in Fields(bytes) {
        match field? {
            (1, part) => part.ints(&mut dims)?,
            (2, number) => kind = number.int()?,
            (4, part) => part.floats(&mut floats)?,
            (5 | 7, part) => part.ints(&mut ints)?,
            (8, text) => name = text.text()?,
            (9, part) => raw = Some(part.bytes()?),
            (10, part) => part.doubles(&mut floats)?,
            (13, _) => external = true,
            (14, number) => external |= number.int()? == 1,
            _ => {}
        }
    }
    let fault = |reason: String| format!("the constant {:?}: {reason}", short(&name));
    if external {
        return Err(fault(
            "its values are in another file, which is not read; save the network as one file".to_owned(),
        ));
    }
    if dims.len() > SIDES {
        return Err(fault(format!("{} sides, the limit is {SIDES}", dims.len())));
    }
    let shape: Vec<usize> = dims.iter().map(|side| usize::try_from(*side).unwrap_or(usize::MAX)).collect();
    let count = elements(&shape).map_err(fault)?;
    if let Some(raw) = raw {
        match kind {
            1 => Field::Bytes(raw).floats(&mut floats)?,
            6 => ints.extend(raw.as_chunks::<4>().0.iter().map(|value| i64::from(i32::from_le_bytes(*value)))),
            7 => ints.extend(raw.as_chunks::<8>().0.iter().map(|value| i64::from_le_bytes(*value))),
            10 => floats.extend(raw.as_chunks::<2>().0.iter().map(|v| half::f16::from_le_bytes(*v).to_f32())),
            11 => Field::Bytes(raw).doubles(&mut floats)?,
            _ => {}
        }
    } else if kind == 10 {
        // Half floats without raw bytes stand as whole numbers.
        floats.extend(ints.iter().map(|bits| half::f16::from_bits(*bits as u16).to_f32()));
    }
    let found = match kind {
        1 | 10 | 11 => floats.len(),
        6 | 7 => ints.len(),
        _ => return Err(fault(format!("its type is number {kind}; float, half, double, int32 or int64 is needed"))),
    };
    if found != count {
        return Err(fault(format!("{found} values for the shape {shape:?}")));
    }
    let value = match kind {
        6 | 7 => Value::Ints(Array { shape, values: ints }),
        _ => Value::Floats(Array { shape, values: floats }),
    };
    Ok((name, value))
}

fn declared(bytes: &[u8]) -> Result<Declared, String> {
    let mut declared = Declared::default();
    let mut kind: &[u8] = &[];
    for field in Fields(bytes) {
        match field? {
            (1, name) => declared.name = name.text()?,
            (2, part) => kind = part.bytes()?,
            _ => {}
        }
    }
    for field in Fields(kind) {
        let (1, part) = field? else { continue };
        for field in Fields(part.bytes()?) {
            match field? {
                (1, number) => declared.float = number.int()? == 1,
                (2, shape) => {
                    for side in Fields(shape.bytes()?) {
                        if declared.shape.len() >= SIDES {
                            return Err(format!("{:?} has more than {SIDES} sides", short(&declared.name)));
                        }
                        declared.shape.push(open_side(side?.1.bytes()?)?);
                    }
                }
                _ => {}
            }
        }
    }
    Ok(declared)
}

fn open_side(bytes: &[u8]) -> Result<Option<usize>, String> {
    let mut side = None;
    for field in Fields(bytes) {
        if let (1, number) = field? {
            // Exporters write 0 or -1 for a side that is left open.
            side = usize::try_from(number.int()?).ok().filter(|side| *side > 0);
        }
    }
    Ok(side)
}

/// A name of the file, cut for a message.
pub(super) fn short(name: &str) -> String {
    name.chars().take(60).collect()
}
