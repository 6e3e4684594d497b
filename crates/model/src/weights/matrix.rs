//! Weight matrices that stay as they are stored.

use std::{fmt, ops::Range, sync::Arc};

use candle_core::{DType, Device, Tensor};

#[cfg(feature = "cuda")]
use super::slot::Slot;
use super::{
    files::MappedFile,
    stored::Encoding,
    values::{self, Scale},
};

/// A weight `(rows, columns)`, one row for each output.
///
/// On a CPU it stays in its mapped file, in whatever form that has; a product decodes some rows at a time, so that
/// no network is ever in memory in a wider form than the file's. On another device it is a tensor there.
#[derive(Clone)]
pub struct Matrix {
    form: Form,
    rows: Range<usize>,
    columns: usize,
    dtype: DType,
}

#[derive(Clone)]
enum Form {
    Owned(Arc<Vec<f32>>),
    Stored(Arc<Stored>),
    Device(Tensor),
    #[cfg(feature = "cuda")]
    Packed(Packed),
}

/// A matrix on a card as its file has it; it is decoded or widened there whenever it is needed.
#[cfg(feature = "cuda")]
#[derive(Clone)]
pub(super) struct Packed {
    /// Its values or bytes, which may come and go.
    pub(super) slot: Arc<Slot>,
    /// One, or one for each row; f32.
    pub(super) scales: Tensor,
}

pub(super) struct Stored {
    pub(super) file: Arc<MappedFile>,
    pub(super) bytes: Range<usize>,
    pub(super) encoding: Encoding,
    pub(super) scale: Scale,
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Matrix({} x {}, {})", self.rows.len(), self.columns, self.encoding().name())
    }
}

impl Matrix {
    /// Makes a matrix of a tensor `(rows, columns)`; its values are those of its own type.
    pub fn new(tensor: &Tensor) -> candle_core::Result<Self> {
        let (rows, columns) = tensor.dims2()?;
        let form = match tensor.device() {
            Device::Cpu => {
                Form::Owned(Arc::new(tensor.to_dtype(DType::F32)?.contiguous()?.flatten_all()?.to_vec1::<f32>()?))
            }
            _ => Form::Device(tensor.contiguous()?),
        };
        Ok(Self { form, rows: 0..rows, columns, dtype: tensor.dtype() })
    }

    /// A matrix in its file. `dtype` is the type of the network's arithmetic: values are those it can hold.
    pub(super) fn stored(stored: Stored, rows: usize, columns: usize, dtype: DType) -> Self {
        Self { form: Form::Stored(Arc::new(stored)), rows: 0..rows, columns, dtype }
    }

    /// A matrix whose bytes are for a card.
    #[cfg(feature = "cuda")]
    pub(super) fn packed(packed: Packed, rows: usize, columns: usize, dtype: DType) -> Self {
        Self { form: Form::Packed(packed), rows: 0..rows, columns, dtype }
    }

    /// Outputs.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Inputs.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The form that its values are kept in.
    #[must_use]
    pub fn encoding(&self) -> Encoding {
        match &self.form {
            Form::Owned(_) => Encoding::F32,
            Form::Stored(stored) => stored.encoding,
            Form::Device(tensor) => match tensor.dtype() {
                DType::BF16 => Encoding::Bf16,
                DType::F16 => Encoding::F16,
                _ => Encoding::F32,
            },
            #[cfg(feature = "cuda")]
            Form::Packed(packed) => packed.slot.encoding,
        }
    }

    /// Some of the rows, as a matrix of its own; nothing is copied.
    ///
    /// Panics: rows past the end.
    #[must_use]
    pub fn narrow(&self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows.len(), "rows of the matrix");
        let rows = self.rows.start + rows.start..self.rows.start + rows.end;
        Self { rows, ..self.clone() }
    }

    /// Whether its values are to be had in this machine's memory.
    #[must_use]
    pub fn is_here(&self) -> bool {
        matches!(self.form, Form::Owned(_) | Form::Stored(_))
    }

    /// The tensor, where the matrix is on a device other than the CPU.
    fn on_device(&self) -> Option<candle_core::Result<Tensor>> {
        match &self.form {
            Form::Device(tensor) => Some(tensor.narrow(0, self.rows.start, self.rows.len())),
            #[cfg(feature = "cuda")]
            Form::Packed(packed) => Some(packed.decode(self.rows.clone(), self.columns, self.dtype)),
            Form::Owned(_) | Form::Stored(_) => None,
        }
    }

    /// Values of some rows, decoded into `room` where they are not in memory as they are needed.
    ///
    /// - returns: `rows.len() · columns` values, row-major
    ///
    /// Panics: rows past the end; a matrix on another device.
    pub fn panel<'a>(&'a self, rows: Range<usize>, room: &'a mut Vec<f32>) -> &'a [f32] {
        assert!(rows.end <= self.rows.len(), "rows of the matrix");
        let rows = self.rows.start + rows.start..self.rows.start + rows.end;
        let values = rows.start * self.columns..rows.end * self.columns;
        match &self.form {
            Form::Owned(all) => &all[values],
            Form::Stored(stored) => stored.panel(rows.start, values, self.columns, self.dtype, room),
            Form::Device(_) => unreachable!("products on another device take its tensor"),
            #[cfg(feature = "cuda")]
            Form::Packed(_) => unreachable!("products on another device take its tensor"),
        }
    }

    /// All values as a tensor in the network's type.
    pub fn to_tensor(&self) -> candle_core::Result<Tensor> {
        if let Some(tensor) = self.on_device() {
            return tensor;
        }
        let mut room = Vec::new();
        let values = self.panel(0..self.rows.len(), &mut room).to_vec();
        Tensor::from_vec(values, (self.rows.len(), self.columns), &Device::Cpu)?.to_dtype(self.dtype)
    }
}

#[cfg(feature = "cuda")]
impl Packed {
    fn decode(&self, rows: Range<usize>, columns: usize, dtype: DType) -> candle_core::Result<Tensor> {
        let (all, encoding) = (self.slot.tensor()?, self.slot.encoding);
        if matches!(encoding, Encoding::F32 | Encoding::F16 | Encoding::Bf16) {
            return all.narrow(0, rows.start, rows.len())?.to_dtype(dtype);
        }
        let (each, bytes) = encoding.block();
        let stride = columns / each * bytes;
        let own = all.narrow(0, rows.start * stride, rows.len() * stride)?;
        let scales = match self.scales.elem_count() {
            1 => self.scales.clone(),
            _ => self.scales.narrow(0, rows.start, rows.len())?,
        };
        crate::cuda::decode(encoding, &own, &scales, [rows.len(), columns], dtype)
    }
}

impl Stored {
    fn panel<'a>(
        &'a self,
        row: usize,
        values: Range<usize>,
        columns: usize,
        dtype: DType,
        room: &'a mut Vec<f32>,
    ) -> &'a [f32] {
        let (each, bytes) = self.encoding.block();
        let range = self.bytes.start + values.start / each * bytes..self.bytes.start + values.end / each * bytes;
        let bytes = &self.file.bytes()[range];
        let rounded = dtype != DType::F32 && self.encoding != dtype_encoding(dtype);
        if self.encoding == Encoding::F32 && !rounded {
            // SAFETY: every four bytes are a valid f32; the alignment is looked at.
            let (before, aligned, after) = unsafe { bytes.align_to::<f32>() };
            if cfg!(target_endian = "little") && before.is_empty() && after.is_empty() {
                return aligned;
            }
        }
        if room.len() != values.len() {
            room.resize(values.len(), 0.0);
        }
        values::decode(self.encoding, &self.scale, bytes, row, columns, room);
        if rounded {
            values::round(room, dtype);
        }
        room
    }
}

fn dtype_encoding(dtype: DType) -> Encoding {
    match dtype {
        DType::BF16 => Encoding::Bf16,
        DType::F16 => Encoding::F16,
        _ => Encoding::F32,
    }
}
