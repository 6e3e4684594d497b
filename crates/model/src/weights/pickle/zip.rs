//! Where the records of a zip archive lie, for archives that store them as they are.

use std::{collections::HashMap, ops::Range};

use super::{Fault, shown};

/// A local header without its name, as APPNOTE.TXT 4.3.7 has it.
const LOCAL: usize = 30;
/// An entry of the central directory without its name (4.3.12).
const ENTRY: usize = 46;
/// The end of the central directory without the archive's comment (4.3.16).
const END: usize = 22;
/// The zip64 locator (4.3.15), right before the end, and what it points at (4.3.14).
const LOCATOR: usize = 20;
const END64: usize = 56;
/// Archives of checkpoints have one record per tensor and a handful beside them.
const MOST_ENTRIES: u64 = 1 << 16;
const LONGEST_DIRECTORY: usize = 16 << 20;
const LONGEST_NAME: usize = 1024;

/// Whether the file begins as a zip archive does.
#[must_use]
pub fn is_zip(file: &[u8]) -> bool {
    file.starts_with(b"PK\x03\x04") || file.starts_with(b"PK\x05\x06")
}

/// The records of an archive: names, and byte ranges that lie within the file and nowhere overlap.
pub struct Zip<'a> {
    records: HashMap<&'a str, Range<usize>>,
}

/// One entry of the central directory.
struct Entry<'a> {
    name: &'a str,
    /// Where its local header begins.
    header: usize,
    length: usize,
}

impl<'a> Zip<'a> {
    /// Reads the central directory.
    ///
    /// Errors: it is missing, lies about what is in the file, or has an entry that is compressed or encrypted.
    pub fn open(file: &'a [u8]) -> Result<Self, Fault> {
        let directory = Directory::find(file)?;
        let mut bytes = Cursor { file: &file[..directory.range.end], at: directory.range.start };
        let mut entries = Vec::new();
        for _ in 0..directory.entries {
            entries.push(Entry::read(&mut bytes)?);
        }
        if bytes.at != directory.range.end {
            return Err(format!("the central directory has more than the {} records it claims", directory.entries));
        }
        entries.sort_by_key(|entry| entry.header);
        let mut records = HashMap::with_capacity(entries.len());
        let mut free = 0;
        for entry in entries {
            if entry.header < free {
                return Err(format!("record {} overlaps another", shown(entry.name)));
            }
            let range = entry.locate(&file[..directory.range.start])?;
            free = range.end;
            if records.insert(entry.name, range).is_some() {
                return Err(format!("record {} is there twice", shown(entry.name)));
            }
        }
        Ok(Self { records })
    }

    /// Where a record's bytes are in the file.
    pub fn record(&self, name: &str) -> Option<Range<usize>> {
        self.records.get(name).cloned()
    }

    /// Names of the records, in no order.
    pub fn names(&self) -> impl Iterator<Item = &'a str> {
        self.records.keys().copied()
    }
}

/// Where the central directory is, and how many entries it claims.
struct Directory {
    range: Range<usize>,
    entries: u64,
}

impl Directory {
    fn find(file: &[u8]) -> Result<Self, Fault> {
        // The archive's comment comes last and has up to 65535 bytes.
        let last = file.len().checked_sub(END);
        let first = file.len().saturating_sub(END + usize::from(u16::MAX));
        let end = last
            .and_then(|last| (first..=last).rev().find(|at| is_end(&file[*at..])))
            .ok_or("the zip archive is truncated: it has no end of a central directory")?;
        let mut field = Cursor { file, at: end + 10 };
        let (entries, length, start) = (u64::from(field.u16()?), u64::from(field.u32()?), u64::from(field.u32()?));
        let locator = end.checked_sub(LOCATOR).filter(|at| file[*at..].starts_with(b"PK\x06\x07"));
        let (entries, length, start, limit) = match locator {
            None => (entries, length, start, end),
            Some(locator) => {
                let at = to_usize(Cursor { file, at: locator + 8 }.u64()?)?;
                let fits = at.checked_add(END64).is_some_and(|past| past <= locator);
                if !fits || !file[at..].starts_with(b"PK\x06\x06") {
                    return Err(format!("the zip archive has no zip64 end at byte {at}, where its locator points"));
                }
                let mut field = Cursor { file, at: at + 32 };
                (field.u64()?, field.u64()?, field.u64()?, at)
            }
        };
        let (length, start) = (to_usize(length)?, to_usize(start)?);
        let past = start.checked_add(length).filter(|past| *past <= limit).ok_or_else(|| {
            format!("the central directory has {length} bytes at byte {start}, past its end at {limit}")
        })?;
        if length > LONGEST_DIRECTORY {
            return Err(format!("the central directory has {length} bytes, the limit is {LONGEST_DIRECTORY}"));
        }
        if entries > MOST_ENTRIES {
            return Err(format!("the zip archive claims {entries} records, the limit is {MOST_ENTRIES}"));
        }
        Ok(Self { range: start..past, entries })
    }
}

/// Whether an end of the central directory begins here, with a comment that ends with the file.
fn is_end(rest: &[u8]) -> bool {
    let comment = rest.get(20..END).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])));
    rest.starts_with(b"PK\x05\x06") && comment.is_some_and(|length| length == rest.len() - END)
}

impl<'a> Entry<'a> {
    fn read(bytes: &mut Cursor<'a>) -> Result<Self, Fault> {
        let fixed = bytes.take(ENTRY)?;
        let mut field = Cursor { file: fixed, at: 0 };
        if field.take(4)? != b"PK\x01\x02" {
            return Err("the central directory has fewer records than it claims".into());
        }
        field.at = 8;
        let (flags, method) = (field.u16()?, field.u16()?);
        field.at = 20;
        let mut sizes = [u64::from(field.u32()?), u64::from(field.u32()?), 0];
        let (name, extra, comment) = (field.u16()?, field.u16()?, field.u16()?);
        field.at = 42;
        sizes[2] = u64::from(field.u32()?);
        let name = std::str::from_utf8(bytes.take(name.into())?).map_err(|_| "a record's name is not UTF-8")?;
        let extra = bytes.take(extra.into())?;
        bytes.take(comment.into())?;

        let fault = |reason: &str| format!("record {} {reason}", shown(name));
        if name.len() > LONGEST_NAME {
            return Err(fault(&format!("has a name of {} bytes, the limit is {LONGEST_NAME}", name.len())));
        }
        if flags & 1 != 0 {
            return Err(fault("is encrypted"));
        }
        let [packed, length, header] = zip64(sizes, extra).ok_or_else(|| fault("lacks its zip64 sizes"))?;
        if method != 0 || packed != length {
            return Err(fault("is compressed, which torch.save never does and a mapped file cannot be"));
        }
        Ok(Self { name, header: to_usize(header)?, length: to_usize(length)? })
    }

    /// The record's bytes: they follow the local header, whose extra field pads them to an alignment.
    ///
    /// - `records`: the file up to its central directory
    fn locate(&self, records: &[u8]) -> Result<Range<usize>, Fault> {
        let fault = |reason: &str| format!("record {} {reason}", shown(self.name));
        let mut field = Cursor { file: records, at: self.header };
        let fixed = field.take(LOCAL).map_err(|_| fault("has its header past the end of the records"))?;
        if !fixed.starts_with(b"PK\x03\x04") {
            return Err(fault("has no header where the central directory points"));
        }
        let mut lengths = Cursor { file: fixed, at: 26 };
        let (name, extra) = (usize::from(lengths.u16()?), usize::from(lengths.u16()?));
        if field.take(name).ok() != Some(self.name.as_bytes()) {
            return Err(fault("has another name in its header"));
        }
        let past = || fault(&format!("has {} bytes, past the end of the records", self.length));
        field.take(extra).map_err(|_| past())?;
        let start = field.at;
        field.take(self.length).map_err(|_| past())?;
        Ok(start..field.at)
    }
}

/// Replaces the 32-bit fields that are saturated by those of the zip64 extra field (4.5.3), in its order.
///
/// - `sizes`: packed size, size and offset of the local header
fn zip64(sizes: [u64; 3], extra: &[u8]) -> Option<[u64; 3]> {
    const SATURATED: u64 = u32::MAX as u64;
    let [packed, length, header] = sizes;
    if !sizes.contains(&SATURATED) {
        return Some(sizes);
    }
    let mut fields = Cursor { file: extra, at: 0 };
    loop {
        let (tag, size) = (fields.u16().ok()?, fields.u16().ok()?);
        let content = fields.take(size.into()).ok()?;
        if tag == 1 {
            let mut content = Cursor { file: content, at: 0 };
            let mut wide = |narrow| if narrow == SATURATED { content.u64().ok() } else { Some(narrow) };
            let length = wide(length)?;
            return Some([wide(packed)?, length, wide(header)?]);
        }
    }
}

fn to_usize(number: u64) -> Result<usize, Fault> {
    usize::try_from(number).map_err(|_| format!("{number} bytes cannot be addressed"))
}

/// Little-endian numbers, one after another.
struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Fault> {
        let end = self.at.checked_add(length);
        let bytes =
            end.and_then(|end| self.file.get(self.at..end)).ok_or("the zip archive's directory is truncated")?;
        self.at += length;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u16(&mut self) -> Result<u16, Fault> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Fault> {
        self.array().map(u64::from_le_bytes)
    }
}
