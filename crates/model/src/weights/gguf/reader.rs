use std::{collections::HashSet, path::Path};

use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_NAME, MAX_SIDES, OTHERS, TAKEN};
use crate::{
    Error, Result,
    weights::stored::{Encoding, Found},
};

const MAX_ALIGNMENT: usize = 64 << 10;
const MAX_DEPTH: usize = 4;
/// Numbers of the types of metadata.
const U32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
/// Bytes of the shortest entry (no key, one byte), of the shortest tensor (no name, no sides), of an empty string and
/// of an empty array: what a count promises must fit into the rest of the file.
const LEAST_ENTRY: usize = 8 + 4 + 1;
const LEAST_TENSOR: usize = 8 + 4 + 4 + 8;
const LEAST_STRING: usize = 8;
const LEAST_ARRAY: usize = 4 + 8;

/// Whether a file starts as GGUF files do.
#[must_use]
pub fn is_gguf(file: &[u8]) -> bool {
    file.starts_with(MAGIC)
}

/// The tensors of a file, in its order.
///
/// - `path`: for messages only
/// - `file`: all of it
///
/// Takes time and memory in proportion to the header. Errors: another version, a malformed header, a type of unknown
/// size, a name that stands twice, and tensors that are out of line, past the end or over one another.
pub fn read(path: &Path, file: &[u8]) -> Result<Vec<Found>> {
    let mut header = Header { file, at: 0 };
    let (tensors, alignment) = preamble(&mut header).map_err(|reason| Error::file(path, reason))?;
    let fault = |tensor: &str, reason: String| Error::Tensor {
        tensor: tensor.to_owned(),
        file: path.display().to_string(),
        reason,
    };

    let mut infos = Vec::new();
    let mut names = HashSet::new();
    for index in 0..tensors {
        let name = header.name().map_err(|reason| Error::file(path, format!("name of tensor {index}: {reason}")))?;
        if !names.insert(name) {
            return Err(fault(name, "the file has two of that name".to_owned()));
        }
        infos.push((name, header.info(alignment).map_err(|reason| fault(name, reason))?));
    }
    // Offsets count from here. Without tensors the padding may be missing.
    let start = header.at.next_multiple_of(alignment);

    let mut found = Vec::new();
    for (name, info) in infos {
        let range = start.checked_add(info.offset).and_then(|begin| Some(begin..begin.checked_add(info.bytes)?));
        let bytes = range.filter(|range| range.end <= file.len()).ok_or_else(|| {
            let (bytes, offset, length) = (info.bytes, info.offset, file.len());
            fault(name, format!("{bytes} bytes from {start} + {offset}, the file ends at {length}"))
        })?;
        found.push(Found { name: name.to_owned(), encoding: info.encoding, shape: info.shape, bytes });
    }
    let mut order: Vec<&Found> = found.iter().filter(|tensor| !tensor.bytes.is_empty()).collect();
    order.sort_by_key(|tensor| tensor.bytes.start);
    match order.windows(2).find(|pair| pair[1].bytes.start < pair[0].bytes.end) {
        None => Ok(found),
        Some(pair) => Err(fault(&pair[1].name, format!("its bytes overlap those of {:?}", pair[0].name))),
    }
}

/// The number of tensors and the alignment; leaves the header at the first tensor.
fn preamble(header: &mut Header) -> Result<(usize, usize), String> {
    if header.take(4)? != MAGIC {
        return Err("it is no GGUF file".to_owned());
    }
    match header.u32()? {
        2 | 3 => {}
        version if matches!(version.swap_bytes(), 2 | 3) => {
            return Err("it is big endian, expected little endian".to_owned());
        }
        version => return Err(format!("version {version} of GGUF, expected 2 or 3")),
    }
    let (tensors, entries) = (header.u64()?, header.u64()?);
    let entries = header.fitting(entries, LEAST_ENTRY, "entries")?;
    let mut alignment = None;
    for index in 0..entries {
        let key = header.string().map_err(|reason| format!("key of entry {index}: {reason}"))?;
        let fault = |reason| format!("entry {:?}: {reason}", key.chars().take(MAX_NAME).collect::<String>());
        let kind = header.u32().map_err(fault)?;
        if key != ALIGNMENT_KEY {
            header.skip(kind, MAX_DEPTH).map_err(fault)?;
            continue;
        }
        if kind != U32 || alignment.is_some() {
            return Err(fault(format!("type {kind}, expected one entry of type {U32}, an unsigned number of 32 bits")));
        }
        let value = header.u32().map_err(fault)?;
        alignment = usize::try_from(value).ok().filter(|a| a.is_power_of_two() && *a <= MAX_ALIGNMENT);
        if alignment.is_none() {
            return Err(fault(format!("{value}, expected a power of two up to {MAX_ALIGNMENT}")));
        }
    }
    let tensors = header.fitting(tensors, LEAST_TENSOR, "tensors")?;
    Ok((tensors, alignment.unwrap_or(DEFAULT_ALIGNMENT)))
}

struct Info {
    shape: Vec<usize>,
    encoding: Encoding,
    offset: usize,
    bytes: usize,
}

/// The file, and how far it is read.
struct Header<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Header<'a> {
    fn left(&self) -> usize {
        self.file.len() - self.at
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.file.len());
        let end = end.ok_or_else(|| format!("{count} bytes from {}, the file ends at {}", self.at, self.file.len()))?;
        let taken = &self.file[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things of at least `least` bytes each, which the rest of the file must have room for.
    fn fitting(&self, count: u64, least: usize, what: &str) -> Result<usize, String> {
        let limit = self.left() / least;
        let fitting = usize::try_from(count).ok().filter(|count| *count <= limit);
        fitting.ok_or_else(|| format!("{count} {what}, the file has room for {limit} at most"))
    }

    fn string(&mut self) -> Result<&'a str, String> {
        let length = self.u64()?;
        let length = self.fitting(length, 1, "bytes")?;
        std::str::from_utf8(self.take(length)?).map_err(|e| e.to_string())
    }

    fn name(&mut self) -> Result<&'a str, String> {
        let name = self.string()?;
        if name.len() > MAX_NAME {
            return Err(format!("{} bytes, the limit is {MAX_NAME}", name.len()));
        }
        Ok(name)
    }

    /// Passes over a value; arrays may lie in arrays to `depth`.
    fn skip(&mut self, kind: u32, depth: usize) -> Result<(), String> {
        match kind {
            STRING => self.string().map(drop),
            ARRAY => {
                let depth = depth.checked_sub(1).ok_or_else(|| format!("arrays in arrays past depth {MAX_DEPTH}"))?;
                let (kind, count) = (self.u32()?, self.u64()?);
                let least = match kind {
                    STRING => LEAST_STRING,
                    ARRAY => LEAST_ARRAY,
                    _ => number_size(kind)?,
                };
                let count = self.fitting(count, least, "values")?;
                if matches!(kind, STRING | ARRAY) {
                    (0..count).try_for_each(|_| self.skip(kind, depth))
                } else {
                    // It fits into the rest of the file, so the product does not overflow.
                    self.take(count * least).map(drop)
                }
            }
            _ => self.take(number_size(kind)?).map(drop),
        }
    }

    /// A tensor's entry, from after its name.
    fn info(&mut self, alignment: usize) -> Result<Info, String> {
        let sides = self.u32()? as usize;
        if sides > MAX_SIDES {
            return Err(format!("{sides} sides, the limit is {MAX_SIDES}"));
        }
        let mut shape = Vec::with_capacity(sides);
        for _ in 0..sides {
            let side = self.u64()?;
            shape.push(usize::try_from(side).map_err(|_| format!("a side of {side}"))?);
        }
        shape.reverse();
        let number = self.u32()?;
        let (encoding, each, size) = encoding(number).ok_or_else(|| format!("type {number}, whose size is unknown"))?;
        let last = shape.last().copied().unwrap_or(1);
        if !last.is_multiple_of(each) {
            return Err(format!("shape {shape:?}: rows of {last} values are no whole blocks of {each}"));
        }
        let values = shape.iter().try_fold(1usize, |product, side| product.checked_mul(*side));
        let bytes = values.and_then(|values| (values / each).checked_mul(size));
        let bytes = bytes.ok_or_else(|| format!("shape {shape:?} overflows"))?;
        let offset = self.u64()?;
        let aligned = usize::try_from(offset).ok().filter(|offset| offset.is_multiple_of(alignment));
        let offset = aligned.ok_or_else(|| format!("offset {offset}, expected a multiple of {alignment}"))?;
        Ok(Info { shape, encoding, offset, bytes })
    }
}

/// What a type's number means, with values and bytes of a block.
fn encoding(number: u32) -> Option<(Encoding, usize, usize)> {
    let taken = TAKEN.iter().find(|(n, _)| *n == number).map(|(_, encoding)| {
        let (each, size) = encoding.block();
        (*encoding, each, size)
    });
    let other = || {
        OTHERS.iter().find(|(n, ..)| *n == number).map(|(_, name, each, size)| (Encoding::Other(name), *each, *size))
    };
    taken.or_else(other)
}

/// Bytes of a number or truth value of the metadata.
fn number_size(kind: u32) -> Result<usize, String> {
    match kind {
        0 | 1 | 7 => Ok(1),
        2 | 3 => Ok(2),
        4..=6 => Ok(4),
        10..=12 => Ok(8),
        _ => Err(format!("type {kind} of a value, expected 0 to 12")),
    }
}
