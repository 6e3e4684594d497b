//! Tensors as their files have them, for what rewrites files.

use std::{ops::Range, path::Path};

use super::{
    Weights,
    files::Entry,
    stored::Encoding,
    values::{self, Scale},
};
use crate::{Error, Result};

/// A tensor in its file, as rows: the first side counts them, the others make their length. A vector is one row.
#[derive(Clone, Copy)]
pub struct Raw<'a> {
    entry: &'a Entry,
    rows: usize,
    columns: usize,
}

/// What stored numbers are multiplied by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scales<'a> {
    /// Nothing, or factors among the bytes.
    None,
    /// One number.
    Tensor(f32),
    /// One number for each row.
    Rows(&'a [f32]),
}

impl Weights {
    /// The tensor as its file has it; nothing of tensors in memory.
    ///
    /// Errors: it is missing, or has a type that no network takes. Its values are not looked at.
    pub fn raw(&self, name: &str) -> Result<Raw<'_>> {
        let full = self.full(name);
        let super::Store::Files { entries, .. } = &self.shared.store else {
            return Err(self.error(&full, "it is in no file"));
        };
        let entry = entries.get(&full).ok_or_else(|| self.error(&full, "it is missing"))?;
        let fault = |reason: String| self.error(&full, reason);
        if let Encoding::Other(name) = entry.encoding {
            return Err(fault(format!("type {name}, expected F32, F16, BF16, F8_E4M3, I8 or GGUF's blocks")));
        }
        let values: usize = entry.shape.iter().product();
        let rows = if entry.shape.len() < 2 { 1 } else { entry.shape[0] };
        let columns = values.checked_div(rows).unwrap_or(0);
        if values == 0 {
            return Err(fault(format!("shape {:?}, which holds nothing", entry.shape)));
        }
        if entry.encoding.bytes(columns).is_none() {
            return Err(fault(format!("rows of {columns} values, which are no whole blocks")));
        }
        Ok(Raw { entry, rows, columns })
    }
}

impl<'a> Raw<'a> {
    /// How its values are stored.
    #[must_use]
    pub fn encoding(&self) -> Encoding {
        self.entry.encoding
    }

    /// Row-major.
    #[must_use]
    pub fn shape(&self) -> &'a [usize] {
        &self.entry.shape
    }

    /// Number of rows, and their length.
    #[must_use]
    pub fn sides(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// The file that it is in.
    #[must_use]
    pub fn file(&self) -> &'a Path {
        &self.entry.file.path
    }

    /// Scales beside the tensor.
    #[must_use]
    pub fn scales(&self) -> Scales<'a> {
        match &self.entry.scale {
            Scale::None => Scales::None,
            Scale::Tensor(scale) => Scales::Tensor(*scale),
            Scale::Rows(scales) => Scales::Rows(scales),
        }
    }

    /// The bytes of some rows.
    ///
    /// Panics: rows past the end.
    #[must_use]
    pub fn bytes(&self, rows: Range<usize>) -> &'a [u8] {
        &self.entry.file.bytes()[self.range(rows)]
    }

    fn range(&self, rows: Range<usize>) -> Range<usize> {
        let stride = self.entry.bytes.len() / self.rows;
        let start = self.entry.bytes.start;
        start + rows.start * stride..start + rows.end * stride
    }

    /// Values of some rows, none of them rounded.
    ///
    /// Panics: rows past the end; room for another number of values.
    pub fn decode(&self, rows: Range<usize>, out: &mut [f32]) {
        let entry = self.entry;
        values::decode(entry.encoding, &entry.scale, self.bytes(rows.clone()), rows.start, self.columns, out);
    }

    /// Whether all stored values of some rows are numbers.
    ///
    /// Panics: rows past the end.
    #[must_use]
    pub fn is_finite(&self, rows: Range<usize>) -> bool {
        values::finite(self.entry.encoding, &self.entry.scale, self.bytes(rows))
    }

    /// Lets go of the memory that some rows' bytes take; they are read from the file again when they are needed.
    pub fn release(&self, rows: Range<usize>) {
        self.entry.file.release(self.range(rows));
    }

    /// A fault of this tensor.
    #[must_use]
    pub fn fault(&self, name: &str, reason: impl Into<String>) -> Error {
        Error::Tensor { tensor: name.to_owned(), file: self.file().display().to_string(), reason: reason.into() }
    }
}
