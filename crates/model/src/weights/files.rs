//! Files of a checkpoint: which there are, what is in them, and under which names.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::{
    gguf, pickle, read_json,
    stored::{Encoding, Found},
    values::{self, Scale},
};
use crate::{Error, Result};

/// Endings of the files that may hold tensors.
const ENDINGS: [&str; 5] = ["safetensors", "gguf", "pt", "pth", "bin"];

/// A file whose pages are read when they are touched.
#[derive(Debug)]
pub(super) struct MappedFile {
    pub(super) path: PathBuf,
    map: Mmap,
    #[cfg(target_os = "linux")]
    file: File,
}

impl MappedFile {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::file(path, e))?;
        if file.metadata().map_err(|e| Error::file(path, e))?.len() == 0 {
            return Err(Error::file(path, "the file is empty"));
        }
        // SAFETY: the mapping is read-only; a file that another process truncates while it is mapped
        // is outside what this process can defend against.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::file(path, e))?;
        Ok(Self {
            path: path.to_owned(),
            map,
            #[cfg(target_os = "linux")]
            file,
        })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Lets go of the pages of some bytes, which stay in the file.
    pub(super) fn release(&self, bytes: Range<usize>) {
        // SAFETY: the mapping is read-only and of a file, so pages that are dropped come back with the same bytes.
        #[cfg(unix)]
        let _ =
            unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, bytes.start, bytes.len()) };
        #[cfg(not(unix))]
        let _ = bytes;
    }

    /// Brings the pages of some bytes into memory.
    fn read(&self, bytes: Range<usize>) {
        /// The smallest page that there is.
        const PAGE: usize = 4096;
        #[cfg(unix)]
        let _ = self.map.advise_range(memmap2::Advice::WillNeed, bytes.start, bytes.len());
        // Advice may be passed over; a touched page is there.
        let touched = self.map.get(bytes).unwrap_or_default().iter().step_by(PAGE).fold(0, |sum, byte| sum ^ byte);
        std::hint::black_box(touched);
    }

    /// As [`release`](Self::release), and lets the system's cache drop them too.
    fn forget(&self, bytes: Range<usize>) {
        self.release(bytes.clone());
        #[cfg(target_os = "linux")]
        {
            let length = std::num::NonZeroU64::new(bytes.len() as u64);
            // Where it is not done, the bytes only stay longer.
            let _ = rustix::fs::fadvise(&self.file, bytes.start as u64, length, rustix::fs::Advice::DontNeed);
        }
    }
}

/// Bytes of tensors that are used together, in their mapped files.
#[derive(Debug, Clone, Default)]
pub(crate) struct Extent {
    parts: Vec<(Arc<MappedFile>, Range<usize>)>,
    /// Of these, the matrices that are used on a card; then it is there that they come and go.
    #[cfg(feature = "cuda")]
    slots: Vec<Arc<super::slot::Slot>>,
}

/// What reads extents needs besides them: nothing, or a way to a card, which is made at the first need.
#[derive(Default)]
pub(super) struct Reading {
    #[cfg(feature = "cuda")]
    way: Option<super::slot::Way>,
}

impl Extent {
    /// Of some tensors.
    pub(super) fn of<'a>(entries: impl Iterator<Item = &'a Entry>) -> Self {
        Self {
            parts: entries.map(|entry| (entry.file.clone(), entry.bytes.clone())).collect(),
            #[cfg(feature = "cuda")]
            slots: Vec::new(),
        }
    }

    /// With the matrices of it that are used on a card.
    #[cfg(feature = "cuda")]
    pub(super) fn on_card(self, slots: Vec<Arc<super::slot::Slot>>) -> Self {
        Self { slots, ..self }
    }

    /// How many they are.
    pub(crate) fn bytes(&self) -> u64 {
        self.parts.iter().map(|(_, bytes)| bytes.len() as u64).sum()
    }

    /// Brings them into memory, or to the card.
    pub(super) fn read(&self, reading: &mut Reading) {
        #[cfg(feature = "cuda")]
        if let Some(first) = self.slots.first() {
            if reading.way.is_none() {
                // Without a way they come when they are used.
                reading.way = super::slot::Way::aside(&first.device)
                    .inspect_err(|reason| tracing::warn!("weights come when they are used: {reason}"))
                    .ok();
            }
            if let Some(way) = &mut reading.way {
                self.slots.iter().for_each(|slot| slot.bring(way));
                way.arrive();
            }
            return;
        }
        let Reading { .. } = reading;
        self.parts.iter().for_each(|(file, bytes)| file.read(bytes.clone()));
    }

    /// Lets go of them; they come back from the file when they are used.
    pub(super) fn forget(&self) {
        #[cfg(feature = "cuda")]
        if !self.slots.is_empty() {
            // The files' pages stay: from there the way back is short.
            self.slots.iter().for_each(|slot| slot.leave());
            return;
        }
        self.parts.iter().for_each(|(file, bytes)| file.forget(bytes.clone()));
    }
}

/// One tensor of a checkpoint.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) file: Arc<MappedFile>,
    pub(super) encoding: Encoding,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Range<usize>,
    pub(super) scale: Scale,
}

/// The files that hold a folder's tensors.
///
/// Where there is an index of shards (`*.index.json`), its files; otherwise every file that may hold tensors, but
/// not those of subfolders.
///
/// Errors: there is none, or a shard of the index is missing.
pub(super) fn of_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    let listing = std::fs::read_dir(folder).map_err(|e| Error::file(folder, e))?;
    let mut paths: Vec<PathBuf> = listing.filter_map(|entry| entry.ok().map(|e| e.path())).collect();
    paths.sort();
    let name = |path: &Path| path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let indexes: Vec<&PathBuf> = paths
        .iter()
        .filter(|p| name(p).ends_with(".safetensors.index.json") || name(p).ends_with(".bin.index.json"))
        .collect();
    match indexes[..] {
        [] => {}
        [index] => return of_index(index),
        _ => return Err(Error::file(folder, format!("{} indexes of shards, expected one", indexes.len()))),
    }
    paths.retain(|path| path.is_file() && path.extension().is_some_and(|e| ENDINGS.iter().any(|ending| e == *ending)));
    if paths.is_empty() {
        return Err(Error::file(folder, "no file of tensors (*.safetensors, *.gguf, *.pt, *.pth or *.bin)"));
    }
    Ok(paths)
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The files that an index of shards names.
pub(super) fn of_index(path: &Path) -> Result<Vec<PathBuf>> {
    let index: Index = read_json(path)?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    let folder = path.parent().unwrap_or(Path::new("."));
    if names.is_empty() {
        return Err(Error::file(path, "the index names no file"));
    }
    names
        .into_iter()
        .map(|name| {
            if name.contains(['/', '\\']) || name == ".." {
                return Err(Error::file(path, format!("{name:?} is not the name of a file beside it")));
            }
            let file = folder.join(&name);
            if file.is_file() { Ok(file) } else { Err(Error::file(&file, "the index names it, and it is missing")) }
        })
        .collect()
}

/// Opens files of any form and gives their tensors under the networks' names.
///
/// `rename` gives a tensor's name in the network, or nothing for one that is not the network's.
///
/// Errors: an unreadable or malformed file; a name that stands twice; a scale without its tensor.
pub(super) fn open(paths: &[PathBuf], rename: &dyn Fn(&str) -> Option<String>) -> Result<BTreeMap<String, Entry>> {
    let mut all = Sheet::default();
    for path in paths {
        let file = Arc::new(MappedFile::open(path)?);
        all.add(&file)?;
    }
    all.join(rename)
}

/// Everything that the files hold, before scales are joined to their tensors.
#[derive(Default)]
struct Sheet {
    tensors: BTreeMap<String, Entry>,
    /// Scales of a map file, by module.
    scales: BTreeMap<String, (f32, PathBuf)>,
}

impl Sheet {
    fn add(&mut self, file: &Arc<MappedFile>) -> Result<()> {
        let (path, bytes) = (&file.path, file.bytes());
        let found = if pickle::is_zip(bytes) {
            let archive = pickle::read(path, bytes)?;
            if is_map(path) {
                return self.add_scales(file, archive);
            }
            archive.tensors
        } else if gguf::is_gguf(bytes) {
            gguf::read(path, bytes)?
        } else if path.extension().is_some_and(|e| e == "safetensors") {
            read_safetensors(path, bytes)?
        } else {
            let reason = "neither a PyTorch zip archive, nor GGUF, nor *.safetensors; a pickle of old PyTorch must be saved again";
            return Err(Error::file(path, reason));
        };
        for Found { name, encoding, shape, bytes } in found {
            if self.tensors.contains_key(&name) {
                return Err(Error::file(path, format!("tensor {name:?} is in another file too")));
            }
            self.tensors.insert(name, Entry { file: file.clone(), encoding, shape, bytes, scale: Scale::None });
        }
        Ok(())
    }

    /// A map of scales: a number, or a tensor of one element, for each module.
    fn add_scales(&mut self, file: &Arc<MappedFile>, archive: pickle::Archive) -> Result<()> {
        for (name, number) in archive.numbers {
            self.scales.insert(name, (number as f32, file.path.clone()));
        }
        for found in archive.tensors {
            let entry = Entry {
                file: file.clone(),
                encoding: found.encoding,
                shape: found.shape,
                bytes: found.bytes,
                scale: Scale::None,
            };
            let scale = one_value(&found.name, &entry)?;
            self.scales.insert(found.name, (scale, file.path.clone()));
        }
        Ok(())
    }

    fn join(mut self, rename: &dyn Fn(&str) -> Option<String>) -> Result<BTreeMap<String, Entry>> {
        self.join_quanto()?;
        for (module, (scale, path)) in std::mem::take(&mut self.scales) {
            let name = format!("{module}.weight");
            match self.tensors.get_mut(&name).filter(|entry| entry.encoding == Encoding::F8E4M3) {
                Some(entry) => entry.scale = Scale::Tensor(scale),
                None => return Err(Error::file(&path, format!("a scale for {name:?}, which is no fp8 tensor here"))),
            }
        }
        let scaled: Vec<String> = self.tensors.keys().filter(|n| n.ends_with(".weight_scale")).cloned().collect();
        for name in scaled {
            let weight = name.trim_end_matches("_scale");
            if self.tensors.get(weight).is_none_or(|entry| entry.encoding != Encoding::F8E4M3) {
                continue; // It stays, and the network says that it has no such tensor.
            }
            let Some(scale) = self.tensors.remove(&name) else { continue };
            let scale = one_value(&name, &scale)?;
            if let Some(entry) = self.tensors.get_mut(weight) {
                entry.scale = Scale::Tensor(scale);
            }
        }
        let mut named = BTreeMap::new();
        for (name, entry) in self.tensors {
            let Some(new) = rename(&name) else { continue };
            let path = entry.file.path.clone();
            if entry.encoding == Encoding::F8E4M3 && matches!(entry.scale, Scale::None) {
                return Err(fault(&format!("{name}_scale"), &path, "it is missing, and the weight is fp8".to_owned()));
            }
            if entry.encoding == Encoding::I8 && matches!(entry.scale, Scale::None) {
                return Err(fault(&name, &path, "type I8 without scales beside it".to_owned()));
            }
            if named.insert(new.clone(), entry).is_some() {
                return Err(Error::file(&path, format!("two tensors stand for {new:?}, one of them is {name:?}")));
            }
        }
        Ok(named)
    }

    /// `X.weight._data` and `X.weight._scale` become `X.weight`; scales of activations, which are not quantised,
    /// are left out.
    fn join_quanto(&mut self) -> Result<()> {
        let data: Vec<String> = self.tensors.keys().filter(|name| name.ends_with("._data")).cloned().collect();
        for name in data {
            let Some(mut entry) = self.tensors.remove(&name) else { continue };
            let weight = name.trim_end_matches("._data").to_owned();
            let path = entry.file.path.clone();
            let beside = format!("{weight}._scale");
            let Some(scale) = self.tensors.remove(&beside) else {
                return Err(fault(&beside, &path, format!("it is missing beside {name:?}")));
            };
            let rows = entry.shape.first().copied().unwrap_or(0);
            if scale.shape.iter().product::<usize>() != rows {
                let reason = format!("shape {:?}, expected [{rows}, 1]", scale.shape);
                return Err(fault(&beside, &scale.file.path, reason));
            }
            let scales = plain_values(&beside, &scale)?;
            if !matches!(entry.encoding, Encoding::I8 | Encoding::F8E4M3) {
                let reason = format!("type {}, expected I8 or F8_E4M3", entry.encoding.name());
                return Err(fault(&name, &path, reason));
            }
            entry.scale = Scale::Rows(scales.into());
            let module = weight.trim_end_matches(".weight");
            for activation in ["input_scale", "output_scale"] {
                self.tensors.remove(&format!("{module}.{activation}"));
            }
            if self.tensors.insert(weight.clone(), entry).is_some() {
                return Err(Error::file(&path, format!("both {weight:?} and {name:?} are there")));
            }
        }
        Ok(())
    }
}

/// Whether the file is the side file of an fp8 checkpoint, which has scales and no weights.
fn is_map(path: &Path) -> bool {
    path.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("_map"))
}

fn fault(tensor: &str, path: &Path, reason: String) -> Error {
    Error::Tensor { tensor: tensor.to_owned(), file: path.display().to_string(), reason }
}

/// Values of a small tensor in a plain type.
fn plain_values(name: &str, entry: &Entry) -> Result<Vec<f32>> {
    let path = &entry.file.path;
    if !matches!(entry.encoding, Encoding::F32 | Encoding::F16 | Encoding::Bf16) {
        return Err(fault(name, path, format!("type {}, expected F32, F16 or BF16", entry.encoding.name())));
    }
    let bytes = &entry.file.bytes()[entry.bytes.clone()];
    let mut values = vec![0f32; entry.shape.iter().product()];
    values::decode(entry.encoding, &Scale::None, bytes, 0, values.len().max(1), &mut values);
    match values.iter().all(|v| v.is_finite()) {
        true => Ok(values),
        false => Err(fault(name, path, "it holds a value that is not finite".to_owned())),
    }
}

fn one_value(name: &str, entry: &Entry) -> Result<f32> {
    if entry.shape.iter().product::<usize>() != 1 {
        return Err(fault(name, &entry.file.path, format!("shape {:?}, expected one element", entry.shape)));
    }
    Ok(plain_values(name, entry)?[0])
}

fn read_safetensors(path: &Path, file: &[u8]) -> Result<Vec<Found>> {
    let (header, metadata) = SafeTensors::read_metadata(file).map_err(|e| Error::file(path, e))?;
    metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let bytes = header + 8 + info.data_offsets.0..header + 8 + info.data_offsets.1;
            if bytes.end > file.len() {
                let reason = format!("the file is truncated: {} of {} bytes are there", file.len(), bytes.end);
                return Err(fault(&name, path, reason));
            }
            Ok(Found { name, encoding: encoding_of(info.dtype), shape: info.shape.clone(), bytes })
        })
        .collect()
}

fn encoding_of(dtype: Dtype) -> Encoding {
    match dtype {
        Dtype::F32 => Encoding::F32,
        Dtype::F16 => Encoding::F16,
        Dtype::BF16 => Encoding::Bf16,
        Dtype::F8_E4M3 => Encoding::F8E4M3,
        Dtype::I8 => Encoding::I8,
        Dtype::F64 => Encoding::Other("F64"),
        Dtype::I64 => Encoding::Other("I64"),
        Dtype::I32 => Encoding::Other("I32"),
        Dtype::I16 => Encoding::Other("I16"),
        Dtype::U8 => Encoding::Other("U8"),
        Dtype::BOOL => Encoding::Other("BOOL"),
        Dtype::F8_E5M2 => Encoding::Other("F8_E5M2"),
        _ => Encoding::Other("of another type"),
    }
}
