//! A file of safetensors whose tensors are written piece by piece.

use std::{
    fs::File,
    io::{Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use crate::{Error, Result, weights::Encoding};

/// One tensor as the header says it.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) encoding: Encoding,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: u64,
}

/// A file that is being written. Its header is there from the start; each tensor's bytes may come in any order.
pub(super) struct Writer {
    file: File,
    path: PathBuf,
    starts: Vec<u64>,
    at: u64,
}

impl Writer {
    /// Writes the header. The widest types come first, so that every tensor is aligned to its type.
    pub(super) fn create(path: &Path, entries: &[Entry], metadata: &[(&str, String)]) -> Result<Self> {
        let mut order: Vec<usize> = (0..entries.len()).collect();
        let width = |entry: &Entry| entry.encoding.block().1;
        order.sort_by(|&a, &b| {
            let (a, b) = (&entries[a], &entries[b]);
            width(b).cmp(&width(a)).then_with(|| a.name.cmp(&b.name))
        });
        let mut starts = vec![0; entries.len()];
        let mut text = String::from("{");
        if !metadata.is_empty() {
            let map: Map<String, Value> = metadata.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect();
            text += &format!("\"__metadata__\":{},", Value::Object(map));
        }
        let mut end = 0u64;
        for (place, index) in order.into_iter().enumerate() {
            let entry = &entries[index];
            starts[index] = end;
            end += entry.bytes;
            let comma = if place == 0 { "" } else { "," };
            text += &format!(
                "{comma}{}:{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{},{end}]}}",
                json!(entry.name),
                dtype(entry.encoding),
                json!(entry.shape),
                starts[index],
            );
        }
        text.push('}');
        while !text.len().is_multiple_of(8) {
            text.push(' ');
        }
        let mut file = File::create(path).map_err(|e| Error::file(path, e))?;
        let header = 8 + text.len() as u64;
        starts.iter_mut().for_each(|start| *start += header);
        let written = file
            .write_all(&(text.len() as u64).to_le_bytes())
            .and_then(|()| file.write_all(text.as_bytes()))
            .and_then(|()| file.set_len(header + end));
        written.map_err(|e| Error::file(path, e))?;
        Ok(Self { file, path: path.to_owned(), starts, at: header })
    }

    /// Writes bytes of tensor `index` (as given to [`create`](Self::create)) from its byte `offset` on.
    pub(super) fn write(&mut self, index: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        let to = self.starts[index] + offset;
        let seek = if to == self.at { Ok(to) } else { self.file.seek(SeekFrom::Start(to)) };
        seek.and_then(|_| self.file.write_all(bytes)).map_err(|e| Error::file(&self.path, e))?;
        self.at = to + bytes.len() as u64;
        Ok(())
    }

    /// Waits until the file is on the disk.
    pub(super) fn finish(self) -> Result<()> {
        self.file.sync_all().map_err(|e| Error::file(&self.path, e))
    }
}

fn dtype(encoding: Encoding) -> &'static str {
    match encoding {
        Encoding::F32 => "F32",
        Encoding::F16 => "F16",
        Encoding::Bf16 => "BF16",
        Encoding::F8E4M3 => "F8_E4M3",
        Encoding::I8 => "I8",
        other => unreachable!("{} is written to GGUF", other.name()),
    }
}
