//! A checkpoint's tensors, by name.
//!
//! Files stay mapped: vectors and small tables are copied when a network asks for them, matrices stay where they
//! are ([`Matrix`]). Every error names the tensor, the file and what was expected.

mod files;
pub mod fp8;
pub mod ggml;
pub mod gguf;
pub mod int8;
mod matrix;
pub mod pickle;
mod raw;
#[cfg(feature = "cuda")]
mod slot;
pub mod stored;
pub(crate) mod swap;
mod values;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Display,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{DType, Device, Tensor};
use serde::de::DeserializeOwned;

use self::files::Entry;
pub(crate) use self::files::Extent;
#[cfg(feature = "cuda")]
use self::values::Scale;
pub use self::{
    matrix::Matrix,
    raw::{Raw, Scales},
    stored::{Encoding, Found},
    swap::{Clock, Swap, Swapped},
};
use crate::{Error, Result, memory};

enum Store {
    Files { place: PathBuf, entries: BTreeMap<String, Entry> },
    Memory(HashMap<String, Tensor>),
}

struct Shared {
    store: Store,
    dtype: DType,
    used: Mutex<BTreeSet<String>>,
    /// Matrices on a card, by name.
    #[cfg(feature = "cuda")]
    slots: Mutex<BTreeMap<String, Arc<slot::Slot>>>,
}

/// A checkpoint, or the part of it under a name prefix. Cloning is cheap.
#[derive(Clone)]
pub struct Weights {
    shared: Arc<Shared>,
    device: Device,
    prefix: String,
    /// Whether matrices for a card go there when they are first needed.
    later: bool,
}

/// What one tensor of a checkpoint is, as its file's header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The network's name for it.
    pub name: String,
    /// How its values are stored.
    pub encoding: Encoding,
    /// Row-major.
    pub shape: Vec<usize>,
    /// Bytes in the file, without scales.
    pub bytes: usize,
    /// The file.
    pub file: PathBuf,
}

impl Weights {
    /// Opens the files of tensors of a folder (not of its subfolders), in any accepted form: safetensors, also in
    /// shards with an index, PyTorch's zip archives, GGUF; weights in f32, f16, bf16, fp8, int8 or GGUF's blocks.
    ///
    /// Tensors are given in `dtype` on `device`, whatever the file holds.
    /// Errors: no file, an unreadable or malformed one, or a name that two files hold.
    pub fn open(folder: &Path, dtype: DType, device: &Device) -> Result<Self> {
        Self::open_files(folder, &files::of_folder(folder)?, &|name| Some(name.to_owned()), dtype, device)
    }

    /// As [`open`](Self::open), of the files that are given.
    ///
    /// - `place`: what error texts call the checkpoint as a whole
    /// - `rename`: a tensor's name in the network, by its name in the file; nothing for one that is not read
    pub fn open_files(
        place: &Path,
        files: &[PathBuf],
        rename: &dyn Fn(&str) -> Option<String>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let entries = files::open(files, rename)?;
        Ok(Self::new(Store::Files { place: place.to_owned(), entries }, dtype, device))
    }

    /// The files of tensors of a folder, as [`open`](Self::open) takes them.
    pub fn files_of(folder: &Path) -> Result<Vec<PathBuf>> {
        files::of_folder(folder)
    }

    /// The files that an index of shards names.
    ///
    /// Errors: one of them is missing, or is not beside the index.
    pub fn files_of_index(index: &Path) -> Result<Vec<PathBuf>> {
        files::of_index(index)
    }

    /// Wraps tensors that are in memory already, of this machine or of a device.
    #[must_use]
    pub fn from_tensors(tensors: HashMap<String, Tensor>, dtype: DType, device: &Device) -> Self {
        Self::new(Store::Memory(tensors), dtype, device)
    }

    fn new(store: Store, dtype: DType, device: &Device) -> Self {
        let shared = Shared {
            store,
            dtype,
            used: Mutex::default(),
            #[cfg(feature = "cuda")]
            slots: Mutex::default(),
        };
        Self { shared: Arc::new(shared), device: device.clone(), prefix: String::new(), later: false }
    }

    /// The part of the checkpoint under `prefix.name.`.
    #[must_use]
    pub fn pp(&self, name: impl Display) -> Self {
        Self { shared: self.shared.clone(), device: self.device.clone(), prefix: self.full(name), later: self.later }
    }

    /// The same, given on another device.
    pub(crate) fn on(&self, device: &Device) -> Self {
        Self { device: device.clone(), ..self.clone() }
    }

    /// The same, for a network whose blocks come and go: what a card needs of them goes there when it is needed.
    pub(crate) fn later(&self) -> Self {
        Self { later: true, ..self.clone() }
    }

    /// The bytes of all tensors under this prefix; none of tensors that are not in files. To be asked when their network
    /// has been loaded.
    pub(crate) fn extent(&self) -> Extent {
        let under = if self.prefix.is_empty() { String::new() } else { format!("{}.", self.prefix) };
        match &self.shared.store {
            Store::Memory(_) => Extent::default(),
            Store::Files { entries, .. } => {
                let all = entries.range(under.clone()..).take_while(|(name, _)| name.starts_with(&under));
                let extent = Extent::of(all.map(|(_, entry)| entry));
                #[cfg(feature = "cuda")]
                let extent = {
                    let slots = self.shared.slots.lock().unwrap_or_else(PoisonError::into_inner);
                    let own = slots.range(under.clone()..).take_while(|(name, _)| name.starts_with(&under));
                    extent.on_card(own.map(|(_, slot)| slot.clone()).collect())
                };
                extent
            }
        }
    }

    fn full(&self, name: impl Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }

    /// Device that tensors are given on.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Type that tensors are given in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.shared.dtype
    }

    /// Everything that the checkpoint's files hold, by name, as their headers say; nothing of tensors in memory.
    #[must_use]
    pub fn list(&self) -> Vec<Listed> {
        match &self.shared.store {
            Store::Memory(_) => Vec::new(),
            Store::Files { entries, .. } => entries
                .iter()
                .map(|(name, entry)| Listed {
                    name: name.clone(),
                    encoding: entry.encoding,
                    shape: entry.shape.clone(),
                    bytes: entry.bytes.len(),
                    file: entry.file.path.clone(),
                })
                .collect(),
        }
    }

    /// Whether the checkpoint holds the tensor.
    #[must_use]
    pub fn contains(&self, name: impl Display) -> bool {
        self.lookup_shape(&self.full(name)).is_some()
    }

    fn lookup_shape(&self, full: &str) -> Option<Vec<usize>> {
        match &self.shared.store {
            Store::Files { entries, .. } => entries.get(full).map(|e| e.shape.clone()),
            Store::Memory(tensors) => tensors.get(full).map(|t| t.dims().to_vec()),
        }
    }

    fn location(&self, full: &str) -> String {
        match &self.shared.store {
            Store::Files { place, entries } => {
                entries.get(full).map_or(place, |entry| &entry.file.path).display().to_string()
            }
            Store::Memory(_) => "memory".to_owned(),
        }
    }

    fn error(&self, full: &str, reason: impl Into<String>) -> Error {
        Error::Tensor { tensor: full.to_owned(), file: self.location(full), reason: reason.into() }
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
        self.check_shape(&full, shape)?;
        let tensor = match &self.shared.store {
            Store::Memory(tensors) => tensors[&full].to_device(&self.device)?,
            Store::Files { entries, .. } => {
                let entry = &entries[&full];
                let bytes = self.checked(&full, entry)?;
                memory::room_for(dtype, 0, shape.iter().product())?;
                let mut values = vec![0f32; shape.iter().product()];
                let columns = values.len().checked_div(shape.first().copied().unwrap_or(1)).unwrap_or(1);
                values::decode(entry.encoding, &entry.scale, bytes, 0, columns.max(1), &mut values);
                Tensor::from_vec(values, shape, &self.device)?
            }
        };
        self.use_up(full);
        Ok(tensor.to_dtype(dtype)?)
    }

    /// The weight `(rows, columns)`; on a CPU it stays in its file, on a card it stays in the form that the file has. Its values are
    /// those of the compute type.
    ///
    /// Errors: as [`get`](Self::get).
    pub fn matrix(&self, rows: usize, columns: usize, name: impl Display) -> Result<Matrix> {
        let full = self.full(&name);
        match &self.shared.store {
            Store::Files { entries, .. } if self.stays_packed() && entries.contains_key(&full) => {
                self.check_shape(&full, &[rows, columns])?;
                let entry = &entries[&full];
                self.checked(&full, entry)?;
                let (each, _) = entry.encoding.block();
                if !columns.is_multiple_of(each) {
                    let reason = format!("rows of {columns} values are no whole blocks of {each}");
                    return Err(self.error(&full, reason));
                }
                #[cfg(feature = "cuda")]
                if !matches!(self.device, Device::Cpu) {
                    let device = &self.device;
                    let slot = Arc::new(slot::Slot {
                        file: entry.file.clone(),
                        bytes: entry.bytes.clone(),
                        encoding: entry.encoding,
                        sides: [rows, columns],
                        device: device.clone(),
                        there: Mutex::default(),
                    });
                    if !self.later {
                        slot.tensor()?;
                    }
                    self.shared.slots.lock().unwrap_or_else(PoisonError::into_inner).insert(full.clone(), slot.clone());
                    let packed = matrix::Packed {
                        slot,
                        scales: match &entry.scale {
                            Scale::None => Tensor::new(&[1f32], device)?,
                            Scale::Tensor(scale) => Tensor::new(&[*scale], device)?,
                            Scale::Rows(scales) => Tensor::new(&**scales, device)?,
                        },
                    };
                    self.use_up(full);
                    return Ok(Matrix::packed(packed, rows, columns, self.shared.dtype));
                }
                let stored = matrix::Stored {
                    file: entry.file.clone(),
                    bytes: entry.bytes.clone(),
                    encoding: entry.encoding,
                    scale: entry.scale.clone(),
                };
                self.use_up(full);
                Ok(Matrix::stored(stored, rows, columns, self.shared.dtype))
            }
            _ => Ok(Matrix::new(&self.get(&[rows, columns], name)?)?),
        }
    }

    /// Whether matrices are kept as their files have them.
    fn stays_packed(&self) -> bool {
        cfg!(feature = "cuda") || matches!(self.device, Device::Cpu)
    }

    fn check_shape(&self, full: &str, shape: &[usize]) -> Result<()> {
        let found = self
            .lookup_shape(full)
            .ok_or_else(|| self.error(full, format!("it is missing, expected shape {shape:?}")))?;
        match found == shape {
            true => Ok(()),
            false => Err(self.error(full, format!("shape {found:?}, expected {shape:?}"))),
        }
    }

    /// The tensor's bytes, once its type and values are known to be good.
    fn checked<'a>(&self, full: &str, entry: &'a Entry) -> Result<&'a [u8]> {
        if let Encoding::Other(name) = entry.encoding {
            return Err(self.error(full, format!("type {name}, expected F32, F16, BF16, F8_E4M3, I8 or GGUF's blocks")));
        }
        let bytes = &entry.file.bytes()[entry.bytes.clone()];
        match values::finite(entry.encoding, &entry.scale, bytes) {
            true => Ok(bytes),
            false => Err(self.error(full, "it holds a value that is not finite")),
        }
    }

    fn use_up(&self, full: String) {
        self.shared.used.lock().unwrap_or_else(PoisonError::into_inner).insert(full);
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
                let table = &tensors[&full];
                table.index_select(&Tensor::new(index, table.device())?, 0)?.to_device(&self.device)?
            }
            Store::Files { entries, .. } => {
                let entry = &entries[&full];
                let stride = entry.encoding.bytes(width).filter(|_| !matches!(entry.encoding, Encoding::Other(_)));
                let Some(stride) = stride else {
                    let reason = format!("type {}, which has no rows of {width} values", entry.encoding.name());
                    return Err(self.error(&full, reason));
                };
                let table = &entry.file.bytes()[entry.bytes.clone()];
                let mut values = vec![0f32; rows.len() * width];
                for (&row, values) in rows.iter().zip(values.chunks_mut(width.max(1))) {
                    let bytes = &table[row * stride..(row + 1) * stride];
                    if !values::finite(entry.encoding, &entry.scale, bytes) {
                        return Err(self.error(&full, "it holds a value that is not finite"));
                    }
                    values::decode(entry.encoding, &entry.scale, bytes, row, width, values);
                }
                Tensor::from_vec(values, (rows.len(), width), &self.device)?
            }
        };
        self.use_up(full);
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
            Store::Files { entries, .. } => entries.keys().collect(),
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
