use std::{
    collections::{HashSet, VecDeque},
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use super::{DEFAULT_ALIGNMENT, MAGIC, MAX_NAME, MAX_SIDES, TAKEN};
use crate::{Error, Result, weights::stored::Encoding};

const VERSION: u32 = 3;
/// Number of the metadata's type.
const STRING: u32 = 8;

/// Writes a file in pieces: what it will hold is said first, the tensors' bytes follow in the same order.
///
/// No more than a piece is in memory. A file that was not [finished](Self::finish) is of no use.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
    /// Tensors that lack bytes, the one that is being written first: name, bytes in all, bytes it lacks.
    open: VecDeque<(String, usize, usize)>,
}

impl Writer {
    /// Creates the file, over one that may be there, and writes its header.
    ///
    /// - `metadata`: keys and values; readers expect `general.architecture` among them
    /// - `tensors`: name, shape (the last side varies fastest) and encoding of each
    ///
    /// Errors: a name that stands twice or is over 1024 bytes, more than 8 sides, an encoding that the format has no
    /// number for, rows that are no whole blocks, and what the file system says.
    pub fn create(path: &Path, metadata: &[(&str, &str)], tensors: &[(String, Vec<usize>, Encoding)]) -> Result<Self> {
        let mut header = Vec::new();
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&(tensors.len() as u64).to_le_bytes());
        header.extend_from_slice(&(metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata {
            put_string(&mut header, key);
            header.extend_from_slice(&STRING.to_le_bytes());
            put_string(&mut header, value);
        }
        let mut names = HashSet::new();
        let mut open = VecDeque::new();
        let mut offset = 0usize;
        for (name, shape, encoding) in tensors {
            let fault =
                |reason: String| Error::Tensor { tensor: name.clone(), file: path.display().to_string(), reason };
            if !names.insert(name) {
                return Err(fault("the file would have two of that name".to_owned()));
            }
            let (number, bytes) = checked(name, shape, *encoding).map_err(fault)?;
            put_string(&mut header, name);
            header.extend_from_slice(&(shape.len() as u32).to_le_bytes());
            for side in shape.iter().rev() {
                header.extend_from_slice(&(*side as u64).to_le_bytes());
            }
            header.extend_from_slice(&number.to_le_bytes());
            header.extend_from_slice(&(offset as u64).to_le_bytes());
            let end = offset.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(DEFAULT_ALIGNMENT));
            offset = end.ok_or_else(|| fault(format!("shape {shape:?} overflows")))?;
            if bytes > 0 {
                open.push_back((name.clone(), bytes, bytes));
            }
        }
        header.resize(header.len().next_multiple_of(DEFAULT_ALIGNMENT), 0);
        let mut file = BufWriter::new(File::create(path).map_err(|e| Error::file(path, e))?);
        file.write_all(&header).map_err(|e| Error::file(path, e))?;
        Ok(Self { path: path.to_owned(), file, open })
    }

    /// Writes the next piece, which ends where its tensor ends or before.
    ///
    /// Errors: it has more bytes than the tensor lacks, and what the file system says.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let Some((name, all, lacking)) = self.open.front_mut() else {
            return Err(Error::file(&self.path, format!("{} bytes past the last tensor", bytes.len())));
        };
        if bytes.len() > *lacking {
            let reason = format!("a piece of {} bytes, it lacks {lacking} of {all}", bytes.len());
            let (tensor, file) = (name.clone(), self.path.display().to_string());
            return Err(Error::Tensor { tensor, file, reason });
        }
        self.file.write_all(bytes).map_err(|e| Error::file(&self.path, e))?;
        *lacking -= bytes.len();
        if *lacking == 0 {
            let padding = all.next_multiple_of(DEFAULT_ALIGNMENT) - *all;
            self.file.write_all(&[0; DEFAULT_ALIGNMENT][..padding]).map_err(|e| Error::file(&self.path, e))?;
            self.open.pop_front();
        }
        Ok(())
    }

    /// Waits until all of it is on the disk.
    ///
    /// Errors: a tensor lacks bytes, and what the file system says.
    pub fn finish(mut self) -> Result<()> {
        if let Some((name, all, lacking)) = self.open.pop_front() {
            let reason = format!("it lacks {lacking} of {all} bytes");
            return Err(Error::Tensor { tensor: name, file: self.path.display().to_string(), reason });
        }
        self.file.flush().and_then(|()| self.file.get_ref().sync_all()).map_err(|e| Error::file(&self.path, e))
    }
}

/// The number of a tensor's type, and its bytes.
fn checked(name: &str, shape: &[usize], encoding: Encoding) -> Result<(u32, usize), String> {
    if name.len() > MAX_NAME {
        return Err(format!("a name of {} bytes, the limit is {MAX_NAME}", name.len()));
    }
    if shape.len() > MAX_SIDES {
        return Err(format!("{} sides, the limit is {MAX_SIDES}", shape.len()));
    }
    let number = TAKEN.iter().find(|(_, taken)| *taken == encoding).map(|(number, _)| *number);
    let number = number.ok_or_else(|| format!("GGUF has no type for {}", encoding.name()))?;
    let (each, last) = (encoding.block().0, shape.last().copied().unwrap_or(1));
    if !last.is_multiple_of(each) {
        return Err(format!("shape {shape:?}: rows of {last} values are no whole blocks of {each}"));
    }
    let values = shape.iter().try_fold(1usize, |product, side| product.checked_mul(*side));
    let bytes = values.and_then(|values| encoding.bytes(values)).ok_or_else(|| format!("shape {shape:?} overflows"))?;
    Ok((number, bytes))
}

fn put_string(header: &mut Vec<u8>, text: &str) {
    header.extend_from_slice(&(text.len() as u64).to_le_bytes());
    header.extend_from_slice(text.as_bytes());
}
