//! The pickle machine: runs the opcodes that `torch.save` writes, and no more.
//!
//! Every value costs the pickle at least a byte, nothing is copied, and no call is ever made.

use std::collections::HashMap;

use super::{
    Fault, shown,
    value::{Global, Heap, Object, Value},
};

/// Values that a pickle may push. A checkpoint takes about 30 per tensor.
const MOST_VALUES: usize = 1 << 20;
/// Values that it may remember, about 10 per tensor.
const MOST_REMEMBERED: usize = 1 << 19;

/// Runs a pickle: its value, and the objects that it is made of.
///
/// Errors: it names a global that no checkpoint needs, is malformed or truncated, or makes too many values.
pub fn run(pickle: &[u8]) -> Result<(Value<'_>, Heap<'_>), Fault> {
    let mut machine = Machine { pickle, ..Machine::default() };
    loop {
        let at = machine.at;
        match machine.step() {
            Ok(None) => {}
            Ok(Some(value)) => return Ok((value, machine.heap)),
            Err(reason) => return Err(format!("data.pkl, byte {at}: {reason}")),
        }
    }
}

#[derive(Default)]
struct Machine<'a> {
    pickle: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    /// Heights of the stack at which the open marks stand.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    heap: Heap<'a>,
    pushed: usize,
}

impl<'a> Machine<'a> {
    /// Runs one opcode; gives the pickle's value when it was the last.
    fn step(&mut self) -> Result<Option<Value<'a>>, Fault> {
        match self.byte()? {
            // PROTO and FRAME say nothing that matters to a pickle that lies in memory.
            0x80 => match self.byte()? {
                0..=5 => {}
                version => return Err(format!("pickle protocol {version}, the limit is 5")),
            },
            0x95 => drop(self.array::<8>()?),
            b'.' => return self.pop().map(Some),

            b'(' => {
                self.count()?;
                self.marks.push(self.stack.len());
            }
            b'0' => match self.marks.last() {
                Some(mark) if *mark == self.stack.len() => drop(self.marks.pop()),
                _ => drop(self.pop()?),
            },
            b'1' => drop(self.pop_mark()?),
            b'2' => self.push(self.top()?)?,

            b'q' => {
                let index = self.byte()?;
                self.remember(index.into())?;
            }
            b'r' => {
                let index = u32::from_le_bytes(self.array()?);
                self.remember(index)?;
            }
            0x94 => self.remember(self.memo.len() as u32)?,
            b'h' => {
                let index = self.byte()?;
                self.recall(index.into())?;
            }
            b'j' => {
                let index = u32::from_le_bytes(self.array()?);
                self.recall(index)?;
            }

            b'N' | 0x88 | 0x89 => self.push(Value::Plain)?,
            b'J' => {
                let number = i32::from_le_bytes(self.array()?);
                self.push(Value::Int(number.into()))?;
            }
            b'K' => {
                let number = self.byte()?;
                self.push(Value::Int(number.into()))?;
            }
            b'M' => {
                let number = u16::from_le_bytes(self.array()?);
                self.push(Value::Int(number.into()))?;
            }
            0x8a => {
                let length = self.byte()?;
                self.long(length.into())?;
            }
            0x8b => {
                let length = self.length::<4>()?;
                self.long(length)?;
            }
            b'G' => {
                let number = f64::from_be_bytes(self.array()?);
                self.push(Value::Float(number))?;
            }
            0x8c => self.text::<1>()?,
            b'X' => self.text::<4>()?,
            0x8d => self.text::<8>()?,
            b'C' => self.bytes::<1>()?,
            b'B' => self.bytes::<4>()?,
            0x8e => self.bytes::<8>()?,

            b')' => self.make(Object::Tuple(Vec::new()))?,
            0x85 => self.tuple(1)?,
            0x86 => self.tuple(2)?,
            0x87 => self.tuple(3)?,
            b't' | 0x91 => {
                let items = self.pop_mark()?;
                self.make(Object::Tuple(items))?;
            }
            b']' | 0x8f => self.make(Object::List(Vec::new()))?,
            b'l' => {
                let items = self.pop_mark()?;
                self.make(Object::List(items))?;
            }
            b'}' => self.make(Object::Dict(Vec::new()))?,
            b'd' => {
                let items = self.pop_mark()?;
                self.make(Object::Dict(pairs(&items)?))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' | 0x90 => {
                let items = self.pop_mark()?;
                self.append(items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.insert(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.insert(&items)?;
            }

            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Text(module), Value::Text(name)) = (module, name) else {
                    return Err("a global's name is not text".into());
                };
                self.global(module, name)?;
            }
            b'Q' => {
                let id = self.pop()?;
                self.make(Object::Storage(id))?;
            }
            b'R' | 0x81 => self.call()?,
            b'b' => {
                // Attributes of a dict: PyTorch keeps versions of layers there, which say nothing about tensors.
                self.pop()?;
                let target = self.top()?;
                if !matches!(self.object(target), Some(Object::Dict(_))) {
                    return Err("sets attributes of something else than a dict".into());
                }
            }
            opcode => return Err(format!("opcode {opcode:#04x}, which no checkpoint needs")),
        }
        Ok(None)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Fault> {
        let end = self.at.checked_add(length);
        let bytes = end.and_then(|end| self.pickle.get(self.at..end)).ok_or("the pickle is truncated")?;
        self.at += length;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn byte(&mut self) -> Result<u8, Fault> {
        self.array().map(|[byte]| byte)
    }

    /// A length of `N` bytes. [`take`](Self::take) checks it against what is there.
    fn length<const N: usize>(&mut self) -> Result<usize, Fault> {
        let mut wide = [0; 8];
        wide[..N].copy_from_slice(&self.array::<N>()?);
        usize::try_from(u64::from_le_bytes(wide)).map_err(|e| e.to_string())
    }

    fn line(&mut self) -> Result<&'a str, Fault> {
        let rest = &self.pickle[self.at..];
        let length = rest.iter().position(|byte| *byte == b'\n').ok_or("the pickle is truncated")?;
        self.at += length + 1;
        std::str::from_utf8(&rest[..length]).map_err(|_| "a global's name is not UTF-8".into())
    }

    fn count(&mut self) -> Result<(), Fault> {
        self.pushed += 1;
        if self.pushed > MOST_VALUES {
            return Err(format!("the pickle makes more than {MOST_VALUES} values"));
        }
        Ok(())
    }

    fn push(&mut self, value: Value<'a>) -> Result<(), Fault> {
        self.count()?;
        self.stack.push(value);
        Ok(())
    }

    fn make(&mut self, object: Object<'a>) -> Result<(), Fault> {
        self.push(Value::Object(self.heap.len()))?;
        self.heap.push(object);
        Ok(())
    }

    /// The value on top; one below an open mark is out of reach.
    fn top(&self) -> Result<Value<'a>, Fault> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack.get(floor..).and_then(<[_]>::last).copied().ok_or_else(|| "a value is missing on the stack".into())
    }

    fn pop(&mut self) -> Result<Value<'a>, Fault> {
        let value = self.top()?;
        self.stack.pop();
        Ok(value)
    }

    /// The values above the last mark.
    fn pop_mark(&mut self) -> Result<Vec<Value<'a>>, Fault> {
        let mark = self.marks.pop().ok_or("a mark is missing on the stack")?;
        Ok(self.stack.drain(mark..).collect())
    }

    fn remember(&mut self, index: u32) -> Result<(), Fault> {
        self.memo.insert(index, self.top()?);
        if self.memo.len() > MOST_REMEMBERED {
            return Err(format!("the pickle remembers more than {MOST_REMEMBERED} values"));
        }
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Result<(), Fault> {
        let value = *self.memo.get(&index).ok_or_else(|| format!("value {index} was never remembered"))?;
        self.push(value)
    }

    fn long(&mut self, length: usize) -> Result<(), Fault> {
        let bytes = self.take(length)?;
        let mut wide = [if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 }; 8];
        let Some(low) = wide.get_mut(..length) else {
            return self.push(Value::Plain);
        };
        low.copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)))
    }

    fn text<const N: usize>(&mut self) -> Result<(), Fault> {
        let length = self.length::<N>()?;
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| "a text is not UTF-8")?;
        self.push(Value::Text(text))
    }

    fn bytes<const N: usize>(&mut self) -> Result<(), Fault> {
        let length = self.length::<N>()?;
        self.take(length)?;
        self.push(Value::Plain)
    }

    fn tuple(&mut self, length: usize) -> Result<(), Fault> {
        let mut items = Vec::with_capacity(length);
        for _ in 0..length {
            items.push(self.pop()?);
        }
        items.reverse();
        self.make(Object::Tuple(items))
    }

    fn object(&self, value: Value<'a>) -> Option<&Object<'a>> {
        match value {
            Value::Object(index) => self.heap.get(index),
            _ => None,
        }
    }

    /// The object on top of the stack.
    fn top_object(&mut self) -> Result<&mut Object<'a>, Fault> {
        match self.top()? {
            Value::Object(index) => self.heap.get_mut(index).ok_or_else(|| "an object is missing".into()),
            _ => Err("a value is put into something that holds none".into()),
        }
    }

    fn append(&mut self, items: Vec<Value<'a>>) -> Result<(), Fault> {
        match self.top_object()? {
            Object::List(list) => list.extend(items),
            _ => return Err("a value is appended to something else than a list".into()),
        }
        Ok(())
    }

    fn insert(&mut self, items: &[Value<'a>]) -> Result<(), Fault> {
        let pairs = pairs(items)?;
        match self.top_object()? {
            Object::Dict(dict) => dict.extend(pairs),
            _ => return Err("a key is set in something else than a dict".into()),
        }
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), Fault> {
        let global = Global::named(module, name).ok_or_else(|| {
            format!("refuses global `{}`: a checkpoint may hold tensors only", shown(&format!("{module}.{name}")))
        })?;
        self.push(Value::Global(global))
    }

    /// REDUCE and NEWOBJ: what a call of the global would give, by its arguments.
    fn call(&mut self) -> Result<(), Fault> {
        let (arguments, callee) = (self.pop()?, self.pop()?);
        let Some(Object::Tuple(items)) = self.object(arguments) else {
            return Err("a call has no tuple of arguments".into());
        };
        match (callee, items.as_slice()) {
            (Value::Global(Global::OrderedDict), []) => self.make(Object::Dict(Vec::new())),
            (Value::Global(Global::Size), &[sides]) if matches!(self.object(sides), Some(Object::Tuple(_))) => {
                self.push(sides)
            }
            (Value::Global(Global::RebuildTensor(typed)), _) => self.make(Object::Tensor { arguments, typed }),
            (Value::Global(Global::RebuildParameter), &[tensor, ..])
                if matches!(self.object(tensor), Some(Object::Tensor { .. })) =>
            {
                self.push(tensor)
            }
            (Value::Global(global), _) => Err(format!("{global:?} is called with other arguments than torch.save's")),
            _ => Err("something else than a global is called".into()),
        }
    }
}

fn pairs<'a>(items: &[Value<'a>]) -> Result<Vec<(Value<'a>, Value<'a>)>, Fault> {
    let (pairs, rest) = items.as_chunks::<2>();
    if !rest.is_empty() {
        return Err("a dict's key has no value".into());
    }
    Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
}
