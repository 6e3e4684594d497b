//! Tensors to a file, some rows at a time: computed on all threads, written by one.

use std::{ops::Range, path::Path, sync::mpsc};

use half::slice::HalfFloatSliceExt as _;
use rayon::prelude::*;
use serde_json::{Map, json};

use super::{
    safetensors::{Entry, Writer},
    storage::Form,
};
use crate::{
    Error, Result,
    weights::{Encoding, Raw, Scales, fp8, ggml, gguf, int8},
};

/// Values that one thread converts at a time.
const PANEL: usize = 1 << 18;
/// Panels of a batch, at most.
const MOST_PANELS: usize = 64;
/// Longest row: one is converted as a whole.
const LONGEST_ROW: usize = 1 << 25;

/// Where a tensor's values come from, by rows.
pub(crate) trait Rows: Sync {
    /// Number of rows, and their length.
    fn sides(&self) -> (usize, usize);
    /// Values of some rows.
    fn fill(&self, rows: Range<usize>, out: &mut [f32]);
    /// The tensor as a file has it, if one has.
    fn stored(&self) -> Option<&Raw<'_>> {
        None
    }
}

impl Rows for Raw<'_> {
    fn sides(&self) -> (usize, usize) {
        self.sides()
    }

    fn fill(&self, rows: Range<usize>, out: &mut [f32]) {
        self.decode(rows, out);
    }

    fn stored(&self) -> Option<&Raw<'_>> {
        Some(self)
    }
}

/// A tensor to write.
pub(crate) struct Job<R> {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) encoding: Encoding,
    pub(crate) rows: R,
}

/// Where a tensor's parts are in the file.
struct Places {
    data: usize,
    scales: Option<usize>,
}

/// A piece on its way to the file: which entry, from which byte on, and the bytes.
type Piece = (usize, u64, Vec<u8>);

/// Writes a file; `done` is told of each piece: the tensor's name and its bytes in the new file.
///
/// Errors: a value that is not finite, or not in the new type; a row too long to convert; the file cannot be
/// written.
pub(crate) fn write<R: Rows>(form: Form, path: &Path, jobs: &[Job<R>], done: &mut dyn FnMut(&str, u64)) -> Result<()> {
    let (entries, places) = layout(path, jobs)?;
    let mut sink = Sink::create(form, path, &entries, jobs)?;
    std::thread::scope(|scope| {
        let (send, pieces) = mpsc::sync_channel::<Vec<Piece>>(1);
        let writer = scope.spawn(move || -> Result<()> {
            for (entry, offset, bytes) in pieces.iter().flatten() {
                sink.write(entry, offset, &bytes)?;
            }
            sink.finish()
        });
        let made = jobs.iter().zip(&places).try_for_each(|(job, places)| {
            convert(path, job, places, &mut |pieces| {
                let bytes = pieces.iter().map(|(_, _, bytes)| bytes.len() as u64).sum();
                // A writer that has gone has said why; its word is taken below.
                let alive = send.send(pieces).is_ok();
                if alive {
                    done(&job.name, bytes);
                }
                alive
            })
        });
        drop(send);
        let written = writer.join().unwrap_or_else(|_| Err(Error::file(path, "the writing thread failed")));
        made.and(written)
    })
}

/// What the file's header says, and where each tensor is among it.
fn layout<R: Rows>(path: &Path, jobs: &[Job<R>]) -> Result<(Vec<Entry>, Vec<Places>)> {
    let mut entries = Vec::new();
    let mut put = |name: String, encoding: Encoding, shape: &[usize]| {
        let bytes = encoding.bytes(shape.iter().product()).unwrap_or(0) as u64;
        entries.push(Entry { name, encoding, shape: shape.to_vec(), bytes });
        entries.len() - 1
    };
    let places = jobs
        .iter()
        .map(|Job { name, shape, encoding, rows }| {
            let (height, width) = rows.sides();
            if width > LONGEST_ROW || encoding.bytes(width).is_none() {
                let reason = format!("rows of {width} values, the limit is {LONGEST_ROW}, in whole blocks");
                return Err(Error::Tensor { tensor: name.clone(), file: path.display().to_string(), reason });
            }
            Ok(match encoding {
                Encoding::F8E4M3 => Places {
                    data: put(name.clone(), *encoding, shape),
                    scales: Some(put(format!("{name}_scale"), Encoding::F32, &[])),
                },
                Encoding::I8 => Places {
                    data: put(format!("{name}._data"), *encoding, shape),
                    scales: Some(put(format!("{name}._scale"), Encoding::F32, &[height, 1])),
                },
                _ => Places { data: put(name.clone(), *encoding, shape), scales: None },
            })
        })
        .collect::<Result<_>>()?;
    Ok((entries, places))
}

enum Sink {
    Safetensors(Writer),
    Gguf(gguf::Writer),
}

impl Sink {
    fn create<R>(form: Form, path: &Path, entries: &[Entry], jobs: &[Job<R>]) -> Result<Self> {
        let int8: Map<_, _> = jobs
            .iter()
            .filter(|job| job.encoding == Encoding::I8)
            .map(|job| {
                (job.name.trim_end_matches(".weight").to_owned(), json!({"weights": "qint8", "activations": "none"}))
            })
            .collect();
        let metadata = match int8.is_empty() {
            true => Vec::new(),
            false => {
                let map = serde_json::Value::Object(int8).to_string();
                vec![("quantization_format", "quanto".to_owned()), ("quantization_map", map)]
            }
        };
        Ok(match form {
            Form::Safetensors => Self::Safetensors(Writer::create(path, entries, &metadata)?),
            Form::Gguf => {
                let tensors: Vec<_> = entries.iter().map(|e| (e.name.clone(), e.shape.clone(), e.encoding)).collect();
                Self::Gguf(gguf::Writer::create(path, &[("general.architecture", "hyvid")], &tensors)?)
            }
        })
    }

    fn write(&mut self, entry: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Safetensors(writer) => writer.write(entry, offset, bytes),
            // Its tensors have no scales beside them, so the pieces come in the order of the file.
            Self::Gguf(writer) => writer.append(bytes),
        }
    }

    fn finish(self) -> Result<()> {
        match self {
            Self::Safetensors(writer) => writer.finish(),
            Self::Gguf(writer) => writer.finish(),
        }
    }
}

/// Converts one tensor; `send` says whether there is still someone who takes the pieces.
fn convert<R: Rows>(
    path: &Path,
    job: &Job<R>,
    places: &Places,
    send: &mut dyn FnMut(Vec<Piece>) -> bool,
) -> Result<()> {
    let fault = |reason: &str| Error::Tensor {
        tensor: job.name.clone(),
        file: job.rows.stored().map_or(path, |raw| raw.file()).display().to_string(),
        reason: reason.to_owned(),
    };
    let (height, width) = job.rows.sides();
    let step = (PANEL / width).max(1);
    let panels: Vec<Range<usize>> = (0..height).step_by(step).map(|at| at..(at + step).min(height)).collect();
    let same = job.rows.stored().filter(|raw| raw.encoding() == job.encoding && can_be_copied(raw));
    let layer_scale = match (job.encoding, same.map(|raw| raw.scales())) {
        (_, Some(Scales::Tensor(scale))) => scale,
        (Encoding::F8E4M3, _) => fp8::scale_of(largest(&job.rows, &panels).ok_or_else(|| fault(NOT_FINITE))?),
        _ => 1.0,
    };
    let mut row_scales: Vec<f32> = Vec::new();
    let stride = job.encoding.bytes(width).unwrap_or(0) as u64;
    // Enough for every thread, twice, so that none waits for the slowest of a batch for long; but three batches are
    // in memory at once: one is made, one waits and one is written.
    for batch in panels.chunks((2 * rayon::current_num_threads()).min(MOST_PANELS)) {
        let made: Vec<Result<(Vec<u8>, Vec<f32>)>> = batch
            .par_iter()
            .map(|rows| {
                if let Some(raw) = same {
                    if !raw.is_finite(rows.clone()) {
                        return Err(fault(NOT_FINITE));
                    }
                    return Ok((raw.bytes(rows.clone()).to_vec(), Vec::new()));
                }
                let mut values = vec![0f32; rows.len() * width];
                job.rows.fill(rows.clone(), &mut values);
                if !all_finite(&values) {
                    return Err(fault(NOT_FINITE));
                }
                encode(job.encoding, layer_scale, width, &values)
                    .ok_or_else(|| fault(&format!("it holds a value that {} cannot", job.encoding.name())))
            })
            .collect();
        let mut pieces = Vec::with_capacity(batch.len());
        for (made, rows) in made.into_iter().zip(batch) {
            let (bytes, scales) = made?;
            pieces.push((places.data, rows.start as u64 * stride, bytes));
            row_scales.extend(scales);
        }
        if let (Some(raw), Some(first), Some(last)) = (job.rows.stored(), batch.first(), batch.last()) {
            raw.release(first.start..last.end);
        }
        if !send(pieces) {
            return Ok(());
        }
    }
    if let Some(entry) = places.scales {
        let scales = match (job.encoding, same.map(|raw| raw.scales())) {
            (Encoding::F8E4M3, _) => vec![layer_scale],
            (_, Some(Scales::Rows(scales))) => scales.to_vec(),
            _ => row_scales,
        };
        send(vec![(entry, 0, scales.iter().flat_map(|s| s.to_le_bytes()).collect())]);
    }
    Ok(())
}

const NOT_FINITE: &str = "it holds a value that is not finite";

/// Whether the bytes of a file can be taken as they are: their scales are of the kind that is written.
fn can_be_copied(raw: &Raw<'_>) -> bool {
    match raw.encoding() {
        Encoding::F8E4M3 => matches!(raw.scales(), Scales::Tensor(_)),
        Encoding::I8 => matches!(raw.scales(), Scales::Rows(_)),
        _ => true,
    }
}

/// The largest magnitude; nothing where a value is not finite.
fn largest<R: Rows>(rows: &R, panels: &[Range<usize>]) -> Option<f32> {
    let (_, width) = rows.sides();
    let of_panel = |panel: &Range<usize>| {
        let mut values = vec![0f32; panel.len() * width];
        rows.fill(panel.clone(), &mut values);
        if let Some(raw) = rows.stored() {
            raw.release(panel.clone());
        }
        all_finite(&values).then(|| fp8::largest(&values))
    };
    panels.par_iter().map(of_panel).try_reduce(|| 0.0, |a, b| Some(a.max(b)))
}

fn all_finite(values: &[f32]) -> bool {
    !values.iter().fold(false, |found, v| found | !v.is_finite())
}

/// Bytes of finite values in whole rows, and the rows' scales where the encoding has such; nothing where a value
/// is past the encoding's largest.
fn encode(encoding: Encoding, scale: f32, width: usize, values: &[f32]) -> Option<(Vec<u8>, Vec<f32>)> {
    let plain = |bytes: Vec<u8>| Some((bytes, Vec::new()));
    match encoding {
        Encoding::F32 => plain(values.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Encoding::Bf16 => {
            let mut halves = vec![half::bf16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            let finite = !halves.iter().fold(false, |found, h| found | !h.is_finite());
            if finite { plain(halves.iter().flat_map(|h| h.to_le_bytes()).collect()) } else { None }
        }
        Encoding::F16 => {
            let mut halves = vec![half::f16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            let finite = !halves.iter().fold(false, |found, h| found | !h.is_finite());
            if finite { plain(halves.iter().flat_map(|h| h.to_le_bytes()).collect()) } else { None }
        }
        Encoding::F8E4M3 => {
            let mut bytes = vec![0; values.len()];
            fp8::quantise_into(values, scale, &mut bytes);
            plain(bytes)
        }
        Encoding::I8 => {
            let (bytes, scales) = int8::quantise_rows(values, width);
            Some((bytes.iter().map(|b| b.cast_unsigned()).collect(), scales))
        }
        blocks => {
            let mut bytes = Vec::with_capacity(blocks.bytes(values.len()).unwrap_or(0));
            ggml::quantise(blocks, values, &mut bytes);
            plain(bytes)
        }
    }
}
