//! From the arguments that a tensor is rebuilt from to its bytes in the file.

use std::ops::Range;

use super::{
    Fault, shown,
    value::{Element, Global, Heap, Object, Typed, Value},
    zip::Zip,
};
use crate::weights::stored::Encoding;

const MOST_SIDES: usize = 16;

/// How a tensor lies in the file.
pub struct Placed {
    pub encoding: Encoding,
    pub shape: Vec<usize>,
    pub bytes: Range<usize>,
}

/// An archive's records, and the objects of its pickle.
pub struct Records<'a> {
    pub zip: Zip<'a>,
    pub heap: Heap<'a>,
    /// What the names of the archive's records begin with, without the slash.
    pub prefix: &'a str,
}

impl<'a> Records<'a> {
    /// What the value holds, if it holds something.
    pub fn object(&self, value: Value<'a>) -> Option<&Object<'a>> {
        match value {
            Value::Object(index) => self.heap.get(index),
            _ => None,
        }
    }

    /// Finds the tensor's bytes.
    ///
    /// - `arguments`: storage, offset, shape, strides, requires_grad, hooks, the dtype where the storage does not
    ///   say it, and then nothing or an empty dict of flags
    ///
    /// Errors: they are something else, the values are not row-major and without gaps, or not all there.
    pub fn place(&self, arguments: Value<'a>, typed: Typed) -> Result<Placed, Fault> {
        let [storage, offset, shape, strides, _grad, _hooks, rest @ ..] = self.tuple(arguments)? else {
            return Err("it is rebuilt from too few arguments".into());
        };
        let (bytes, stored) = self.storage(*storage)?;
        let (element, flags) = match (typed, stored, rest) {
            (Typed::ByStorage, Some(element), flags) => (element, flags),
            (Typed::ByArgument, _, [Value::Global(Global::Dtype(element)), flags @ ..]) => (*element, flags),
            _ => return Err("its type is not given".into()),
        };
        let flagged = |flag: &Value<'a>| match self.object(*flag) {
            Some(Object::Dict(dict)) => !dict.is_empty(),
            _ => !matches!(flag, Value::Plain),
        };
        if flags.iter().any(flagged) {
            return Err("it has flags that change its values (a conjugate or negative view)".into());
        }

        let offset = size(*offset)?;
        let (shape, strides) = (self.sizes(*shape)?, self.sizes(*strides)?);
        if !contiguous(&shape, &strides) {
            return Err(format!(
                "shape {shape:?} has strides {strides:?}, expected row-major ones; save it again after .contiguous()"
            ));
        }
        let range = range(element, offset, &shape).filter(|range| range.end <= bytes.len()).ok_or_else(|| {
            format!("shape {shape:?} from element {offset} on is past its storage of {} bytes", bytes.len())
        })?;
        let range = bytes.start + range.start..bytes.start + range.end;
        Ok(Placed { encoding: element.encoding, shape, bytes: range })
    }

    /// A storage's bytes in the file, and their type unless it is a storage of plain bytes.
    ///
    /// The id of a storage is `("storage", class, key, device, elements)`; its record is `data/key`.
    fn storage(&self, storage: Value<'a>) -> Result<(Range<usize>, Option<Element>), Fault> {
        let Some(Object::Storage(id)) = self.object(storage) else {
            return Err("it has no storage".into());
        };
        let [Value::Text("storage"), Value::Global(Global::Storage(element)), Value::Text(key), _, Value::Int(count)] =
            self.tuple(*id)?
        else {
            return Err("its storage's id is not one that torch.save writes".into());
        };
        let record = format!("{}/data/{key}", self.prefix);
        let bytes =
            self.zip.record(&record).ok_or_else(|| format!("its record {} is not in the archive", shown(&record)))?;
        let expected = usize::try_from(*count).ok().and_then(|n| n.checked_mul(element.map_or(1, |e| e.size)));
        if expected != Some(bytes.len()) {
            return Err(format!(
                "its record {} has {} bytes, which are not {count} elements",
                shown(&record),
                bytes.len()
            ));
        }
        Ok((bytes, *element))
    }

    fn tuple(&self, value: Value<'a>) -> Result<&[Value<'a>], Fault> {
        match self.object(value) {
            Some(Object::Tuple(items)) => Ok(items),
            _ => Err("it is rebuilt from something else than a tuple".into()),
        }
    }

    fn sizes(&self, value: Value<'a>) -> Result<Vec<usize>, Fault> {
        let items = self.tuple(value)?;
        if items.len() > MOST_SIDES {
            return Err(format!("it has {} sides, the limit is {MOST_SIDES}", items.len()));
        }
        items.iter().map(|item| size(*item)).collect()
    }
}

fn size(value: Value<'_>) -> Result<usize, Fault> {
    match value {
        Value::Int(number) => usize::try_from(number).map_err(|_| format!("a size or an offset is {number}")),
        _ => Err("a size or an offset is not a whole number".into()),
    }
}

/// Whether the values are row-major and without gaps. Strides of sides that are 1 say nothing.
fn contiguous(shape: &[usize], strides: &[usize]) -> bool {
    if shape.len() != strides.len() {
        return false;
    }
    if shape.contains(&0) {
        return true;
    }
    let mut expected = Some(1usize);
    shape.iter().zip(strides).rev().all(|(&side, &stride)| {
        let fits = side == 1 || Some(stride) == expected;
        expected = expected.and_then(|n| n.checked_mul(side));
        fits
    })
}

/// The tensor's bytes within its storage.
fn range(element: Element, offset: usize, shape: &[usize]) -> Option<Range<usize>> {
    let values = if shape.contains(&0) { 0 } else { shape.iter().try_fold(1usize, |n, side| n.checked_mul(*side))? };
    let start = offset.checked_mul(element.size)?;
    Some(start..start.checked_add(values.checked_mul(element.size)?)?)
}
