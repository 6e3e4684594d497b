//! A checkpoint's tensors, by name.
//!
//! Files stay mapped; a tensor is copied, checked and converted when a network asks for it. Every error
//! names the tensor, the file and what was expected.

pub mod fp8;
pub mod pickle;
pub mod stored;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Display,
    fs::File,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;

use crate::{Error, Result};

pub use stored::{Encoding, Found};

struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: std::ops::Range<usize>,
}

enum Store {
    Mapped { folder: PathBuf, files: Vec<(PathBuf, Mmap)>, entries: BTreeMap<String, Entry> },
    Memory(HashMap<String, Tensor>),
}

struct Shared {
    store: Store,
    dtype: DType,
    device: Device,
    used: Mutex<BTreeSet<String>>,
}

/// A checkpoint, or the part of it under a name prefix. Cloning is cheap.
#[derive(Clone)]
pub struct Weights {
    shared: Arc<Shared>,
    prefix: String,
}

impl Weights {
    /// Opens every `*.safetensors` file of a folder (not of its subfolders).
    ///
    /// Tensors are given in `dtype` on `device`, whatever the file holds (f32, f16, bf16).
    /// Errors: no file, an unreadable or malformed one, or a name that two files hold.
    pub fn open(folder: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let listing = std::fs::read_dir(folder).map_err(|e| Error::file(folder, e))?;
        let mut paths: Vec<PathBuf> = listing
            .filter_map(|entry| entry.ok().map(|e| e.path()))
            .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
            .collect();
        paths.sort();
        if paths.is_empty() {
            return Err(Error::file(folder, "no *.safetensors file"));
        }
        let (mut files, mut entries) = (Vec::new(), BTreeMap::new());
        for path in paths {
            let file = File::open(&path).map_err(|e| Error::file(&path, e))?;
            // SAFETY: the mapping is read-only; a file that another process truncates while it is mapped
            // is outside what this process can defend against.
            let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::file(&path, e))?;
            let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| Error::file(&path, e))?;
            for (name, info) in metadata.tensors() {
                let bytes = header + 8 + info.data_offsets.0..header + 8 + info.data_offsets.1;
                if bytes.end > map.len() {
                    return Err(Error::Tensor {
                        tensor: name,
                        file: path.display().to_string(),
                        reason: format!("the file is truncated: {} of {} bytes are there", map.len(), bytes.end),
                    });
                }
                let entry = Entry { file: files.len(), dtype: info.dtype, shape: info.shape.clone(), bytes };
                if entries.insert(name.clone(), entry).is_some() {
                    return Err(Error::file(&path, format!("tensor {name:?} is in another file too")));
                }
            }
            files.push((path, map));
        }
        Ok(Self::new(Store::Mapped { folder: folder.to_owned(), files, entries }, dtype, device))
    }

    /// Wraps tensors that are in memory already.
    #[must_use]
    pub fn from_tensors(tensors: HashMap<String, Tensor>, dtype: DType, device: &Device) -> Self {
        Self::new(Store::Memory(tensors), dtype, device)
    }

    fn new(store: Store, dtype: DType, device: &Device) -> Self {
        let shared = Shared { store, dtype, device: device.clone(), used: Mutex::default() };
        Self { shared: Arc::new(shared), prefix: String::new() }
    }

    /// The part of the checkpoint under `prefix.name.`.
    #[must_use]
    pub fn pp(&self, name: impl Display) -> Self {
        Self { shared: self.shared.clone(), prefix: self.full(name) }
    }

    fn full(&self, name: impl Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }

    /// Device that tensors are given on.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.shared.device
    }

    /// Type that tensors are given in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.shared.dtype
    }

    /// Whether the checkpoint holds the tensor.
    #[must_use]
    pub fn contains(&self, name: impl Display) -> bool {
        self.lookup_shape(&self.full(name)).is_some()
    }

    fn lookup_shape(&self, full: &str) -> Option<Vec<usize>> {
        match &self.shared.store {
            Store::Mapped { entries, .. } => entries.get(full).map(|e| e.shape.clone()),
            Store::Memory(tensors) => tensors.get(full).map(|t| t.dims().to_vec()),
        }
    }

    fn place(&self, full: &str) -> String {
        match &self.shared.store {
            Store::Mapped { folder, files, entries } => match entries.get(full) {
                Some(entry) => files[entry.file].0.display().to_string(),
                None => folder.display().to_string(),
            },
            Store::Memory(_) => "memory".to_owned(),
        }
    }

    fn error(&self, full: &str, reason: impl Into<String>) -> Error {
        Error::Tensor { tensor: full.to_owned(), file: self.place(full), reason: reason.into() }
    }

    /// The tensor's shape, to read widths from.
    ///
    /// Errors: it is missing.
    pub fn shape(&self, name: impl Display) -> Result<Vec<usize>> {
        let full = self.full(name);
        self.lookup_shape(&full).ok_or_else(|| self.error(&full, "it is missing"))
    }

    /// The tensor's shape, with the number of dimensions checked.
    pub fn dims<const N: usize>(&self, name: impl Display) -> Result<[usize; N]> {
        let full = self.full(&name);
        let shape = self.shape(name)?;
        <[usize; N]>::try_from(shape.as_slice())
            .map_err(|_| self.error(&full, format!("shape {shape:?}, expected {N} dimensions")))
    }

    /// How many consecutive blocks `prefix.0`, `prefix.1`, ... the checkpoint has, judged by one of their tensors.
    #[must_use]
    pub fn count(&self, prefix: &str, tensor: &str) -> usize {
        (0..).take_while(|i| self.contains(format!("{prefix}.{i}.{tensor}"))).count()
    }

    /// The tensor, in the checkpoint's compute type and on its device.
    ///
    /// Errors: it is missing, has another shape, a type that no network takes, or a value that is not finite.
    pub fn get(&self, shape: &[usize], name: impl Display) -> Result<Tensor> {
        self.get_as(shape, name, self.shared.dtype)
    }

    /// As [`get`](Self::get), in another type.
    pub fn get_as(&self, shape: &[usize], name: impl Display, dtype: DType) -> Result<Tensor> {
        let full = self.full(name);
        let found = self
            .lookup_shape(&full)
            .ok_or_else(|| self.error(&full, format!("it is missing, expected shape {shape:?}")))?;
        if found != shape {
            return Err(self.error(&full, format!("shape {found:?}, expected {shape:?}")));
        }
        let tensor = match &self.shared.store {
            Store::Memory(tensors) => tensors[&full].clone(),
            Store::Mapped { files, entries, .. } => {
                let entry = &entries[&full];
                let bytes = &files[entry.file].1[entry.bytes.clone()];
                let stored = self.stored_type(&full, entry)?;
                if !finite(bytes, stored) {
                    return Err(self.error(&full, "it holds a value that is not finite"));
                }
                if entry.dtype == Dtype::F8_E4M3 {
                    let weights = fp8::dequantise(bytes, self.fp8_scale(&full)?);
                    Tensor::from_vec(weights, shape, &self.shared.device)?
                } else {
                    Tensor::from_raw_buffer(bytes, stored, shape, &self.shared.device)?
                }
            }
        };
        self.shared.used.lock().unwrap_or_else(PoisonError::into_inner).insert(full);
        Ok(tensor.to_dtype(dtype)?)
    }

    fn stored_type(&self, full: &str, entry: &Entry) -> Result<DType> {
        match entry.dtype {
            Dtype::F32 => Ok(DType::F32),
            Dtype::F16 => Ok(DType::F16),
            Dtype::BF16 => Ok(DType::BF16),
            Dtype::F8_E4M3 => Ok(DType::F8E4M3),
            other => Err(self.error(full, format!("type {other:?}, expected F32, F16, BF16 or F8_E4M3"))),
        }
    }

    /// The scale that goes with a float8 weight `X.weight`: the one element of `X.weight_scale`.
    fn fp8_scale(&self, full: &str) -> Result<f32> {
        let name = format!("{full}_scale");
        let root = Self { shared: self.shared.clone(), prefix: String::new() };
        let shape = root.shape(&name)?;
        if shape.iter().product::<usize>() != 1 {
            return Err(self.error(&name, format!("shape {shape:?}, expected one element")));
        }
        Ok(root.get_as(&shape, &name, DType::F32)?.flatten_all()?.to_vec1::<f32>()?[0])
    }

    /// Rows of a table `(rows, width)`, in the checkpoint's compute type; the rest of it stays in its file.
    ///
    /// - returns: `(rows.len(), width)`
    ///
    /// Errors: as [`get`](Self::get), and a row past the table's end.
    pub fn rows(&self, name: impl Display, rows: &[usize]) -> Result<Tensor> {
        let full = self.full(&name);
        let [height, width] = self.dims(&name)?;
        if let Some(row) = rows.iter().find(|row| **row >= height) {
            return Err(self.error(&full, format!("row {row} is asked for, it has {height}")));
        }
        let tensor = match &self.shared.store {
            Store::Memory(tensors) => {
                let index: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
                tensors[&full].index_select(&Tensor::new(index, tensors[&full].device())?, 0)?
            }
            Store::Mapped { files, entries, .. } => {
                let entry = &entries[&full];
                let stored = self.stored_type(&full, entry)?;
                if stored == DType::F8E4M3 {
                    return Err(self.error(&full, "type F8_E4M3, a table is F32, F16 or BF16"));
                }
                let table = &files[entry.file].1[entry.bytes.clone()];
                let stride = width * stored.size_in_bytes();
                let bytes: Vec<u8> =
                    rows.iter().flat_map(|row| &table[row * stride..(row + 1) * stride]).copied().collect();
                if !finite(&bytes, stored) {
                    return Err(self.error(&full, "it holds a value that is not finite"));
                }
                Tensor::from_raw_buffer(&bytes, stored, &[rows.len(), width], &self.shared.device)?
            }
        };
        self.shared.used.lock().unwrap_or_else(PoisonError::into_inner).insert(full);
        Ok(tensor.to_dtype(self.shared.dtype)?)
    }

    /// A fault of the named tensor that only its network can see.
    #[must_use]
    pub fn fault(&self, name: impl Display, reason: impl Into<String>) -> Error {
        self.error(&self.full(name), reason)
    }

    /// Names that no network has asked for so far.
    #[must_use]
    pub fn unused(&self) -> Vec<String> {
        let used = self.shared.used.lock().unwrap_or_else(PoisonError::into_inner);
        let names: Vec<&String> = match &self.shared.store {
            Store::Mapped { entries, .. } => entries.keys().collect(),
            Store::Memory(tensors) => tensors.keys().collect(),
        };
        let mut unused: Vec<String> = names.into_iter().filter(|n| !used.contains(*n)).cloned().collect();
        unused.sort();
        unused
    }

    /// Refuses tensors that no network has asked for, except those that `droppable` names.
    pub fn refuse_unused(&self, droppable: impl Fn(&str) -> bool) -> Result<()> {
        match self.unused().into_iter().find(|name| !droppable(name)) {
            None => Ok(()),
            Some(name) => Err(self.error(&name, "the network has no such tensor")),
        }
    }
}

fn finite(bytes: &[u8], dtype: DType) -> bool {
    // All exponent bits set means infinite or NaN.
    match dtype {
        DType::F32 => bytes.as_chunks::<4>().0.iter().all(|b| u32::from_le_bytes(*b) & 0x7f80_0000 != 0x7f80_0000),
        DType::F16 => bytes.as_chunks::<2>().0.iter().all(|b| u16::from_le_bytes(*b) & 0x7c00 != 0x7c00),
        DType::F8E4M3 => fp8::finite(bytes),
        _ => bytes.as_chunks::<2>().0.iter().all(|b| u16::from_le_bytes(*b) & 0x7f80 != 0x7f80),
    }
}

/// Reads a checkpoint's JSON file into `T`.
///
/// Errors: it is missing, larger than 64 MiB, or not what `T` says; the message has line and column.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    const LIMIT: u64 = 64 << 20;
    let length = std::fs::metadata(path).map_err(|e| Error::file(path, e))?.len();
    if length > LIMIT {
        return Err(Error::file(path, format!("{length} bytes, the limit is {LIMIT}")));
    }
    let text = std::fs::read(path).map_err(|e| Error::file(path, e))?;
    serde_json::from_slice(&text).map_err(|e| Error::file(path, e))
}
