//! Tensors on the wire: a header, then chunks with offset and CRC32C.
//!
//! [`HostTensor`] is a tensor outside any device. [`HostTensor::parts`] cuts it up for a stream;
//! [`TensorReader`] puts it together again and trusts nothing: shape, type and length are checked
//! against each other and against the limits before a byte is allocated.

use std::fmt;

use bytes::Bytes;

use crate::v1::{DataType, TensorChunk, TensorHeader, TensorPart, tensor_part::Part};

/// Most bytes of data in one chunk.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Most dimensions of a tensor.
pub const MAX_DIMENSIONS: usize = 8;

/// What is wrong with a tensor or a tensor stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// The header is not one this reader takes.
    #[error("tensor {name:?}: {reason}")]
    Header {
        /// The tensor's name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// More bytes than the receiver takes.
    #[error("tensor {name:?}: {bytes} bytes, the limit is {limit}")]
    TooLarge {
        /// The tensor's name.
        name: String,
        /// Announced bytes (of this tensor, or of the stream so far).
        bytes: u64,
        /// The most the receiver takes.
        limit: u64,
    },
    /// A chunk came at the wrong place, was empty or too large.
    #[error("tensor {name:?}: {reason}")]
    Chunk {
        /// The tensor's name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A chunk's bytes are not those that were sent.
    #[error("tensor {name:?}: chunk at offset {offset} has CRC32C {actual:08x}, its sender said {expected:08x}")]
    Corrupt {
        /// The tensor's name.
        name: String,
        /// The chunk's offset.
        offset: u64,
        /// The sum in the message.
        expected: u32,
        /// The sum of the bytes that arrived.
        actual: u32,
    },
    /// The stream ended in the middle of a tensor.
    #[error("tensor {name:?}: the stream ended after {received} of {total} bytes")]
    Incomplete {
        /// The tensor's name.
        name: String,
        /// Bytes that arrived.
        received: u64,
        /// Bytes announced.
        total: u64,
    },
    /// A tensor has another type or shape than the receiver needs.
    #[error("tensor {name:?}: {found}, expected {expected}")]
    Mismatch {
        /// The tensor's name.
        name: String,
        /// What was sent.
        found: String,
        /// What is needed.
        expected: String,
    },
    /// A tensor that the request needs did not come.
    #[error("tensor {name:?} is missing")]
    Missing {
        /// The tensor's name.
        name: String,
    },
}

impl TensorError {
    /// Name of the tensor at fault.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Header { name, .. }
            | Self::TooLarge { name, .. }
            | Self::Chunk { name, .. }
            | Self::Corrupt { name, .. }
            | Self::Incomplete { name, .. }
            | Self::Mismatch { name, .. }
            | Self::Missing { name } => name,
        }
    }
}

/// Bytes of one element; `None` for an unspecified type.
#[must_use]
pub fn element_bytes(dtype: DataType) -> Option<usize> {
    match dtype {
        DataType::Unspecified => None,
        DataType::F32 => Some(4),
        DataType::F16 | DataType::Bf16 => Some(2),
        DataType::U8 => Some(1),
        DataType::I64 => Some(8),
    }
}

/// A tensor in host memory: row-major, little-endian.
#[derive(Clone, PartialEq)]
pub struct HostTensor {
    name: String,
    dtype: DataType,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostTensor({:?} {:?} {:?})", self.name, self.dtype, self.shape)
    }
}

fn checked_bytes(dtype: DataType, shape: &[usize]) -> Result<usize, String> {
    let size = element_bytes(dtype).ok_or("the element type is unspecified or unknown")?;
    if shape.len() > MAX_DIMENSIONS {
        return Err(format!("{} dimensions, the limit is {MAX_DIMENSIONS}", shape.len()));
    }
    if shape.contains(&0) {
        return Err(format!("shape {shape:?} has a dimension of 0"));
    }
    shape.iter().try_fold(size, |n, &d| n.checked_mul(d)).ok_or_else(|| format!("shape {shape:?} overflows"))
}

impl HostTensor {
    /// Makes a tensor of raw bytes.
    ///
    /// Errors: the shape has a zero or more than 8 dimensions, or shape x type is not the bytes' length.
    pub fn new(name: impl Into<String>, dtype: DataType, shape: &[usize], data: Vec<u8>) -> Result<Self, TensorError> {
        let name = name.into();
        match checked_bytes(dtype, shape) {
            Ok(bytes) if bytes == data.len() => Ok(Self { name, dtype, shape: shape.to_vec(), data }),
            Ok(bytes) => Err(TensorError::Header {
                reason: format!("{:?} of shape {shape:?} is {bytes} bytes, not {}", dtype, data.len()),
                name,
            }),
            Err(reason) => Err(TensorError::Header { name, reason }),
        }
    }

    /// Makes an F32 tensor. Errors as [`HostTensor::new`].
    pub fn from_f32(name: impl Into<String>, shape: &[usize], values: &[f32]) -> Result<Self, TensorError> {
        Self::new(name, DataType::F32, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    /// Makes an I64 tensor. Errors as [`HostTensor::new`].
    pub fn from_i64(name: impl Into<String>, shape: &[usize], values: &[i64]) -> Result<Self, TensorError> {
        Self::new(name, DataType::I64, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    /// Makes a U8 tensor. Errors as [`HostTensor::new`].
    pub fn from_u8(name: impl Into<String>, shape: &[usize], values: Vec<u8>) -> Result<Self, TensorError> {
        Self::new(name, DataType::U8, shape, values)
    }

    /// The same tensor under another name.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// What the tensor is.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> DataType {
        self.dtype
    }

    /// Dimensions, slowest first.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The raw bytes.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The raw bytes, taken out.
    #[must_use]
    pub fn into_data(self) -> Vec<u8> {
        self.data
    }

    /// The values as f32; F32, F16 and BF16 convert, other types are refused.
    pub fn to_f32(&self) -> Result<Vec<f32>, TensorError> {
        match self.dtype {
            DataType::F32 => Ok(self.data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
            DataType::F16 => {
                Ok(self.data.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect())
            }
            DataType::Bf16 => {
                Ok(self.data.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect())
            }
            DataType::U8 | DataType::I64 | DataType::Unspecified => Err(self.mismatch("F32, F16 or BF16")),
        }
    }

    /// The values as i64; other types are refused.
    pub fn to_i64(&self) -> Result<Vec<i64>, TensorError> {
        if self.dtype != DataType::I64 {
            return Err(self.mismatch("I64"));
        }
        Ok(self.data.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect())
    }

    /// An error that says what this tensor is and what it should be.
    #[must_use]
    pub fn mismatch(&self, expected: impl Into<String>) -> TensorError {
        TensorError::Mismatch {
            name: self.name.clone(),
            found: format!("{:?} {:?}", self.dtype, self.shape),
            expected: expected.into(),
        }
    }

    /// The messages that carry this tensor: its header, then chunks of at most [`CHUNK_BYTES`].
    pub fn parts(self) -> impl Iterator<Item = TensorPart> + Send + 'static {
        let header = TensorHeader {
            name: self.name,
            dtype: self.dtype.into(),
            shape: self.shape.iter().map(|&d| d as u64).collect(),
            total_bytes: self.data.len() as u64,
        };
        let data = Bytes::from(self.data);
        let chunks = (0..data.len()).step_by(CHUNK_BYTES).map(move |offset| {
            let data = data.slice(offset..(offset + CHUNK_BYTES).min(data.len()));
            let crc32c = crc32c::crc32c(&data);
            TensorPart { part: Some(Part::Chunk(TensorChunk { offset: offset as u64, data: data.to_vec(), crc32c })) }
        });
        std::iter::once(TensorPart { part: Some(Part::Header(header)) }).chain(chunks)
    }
}

#[cfg(feature = "candle")]
mod candle {
    use candle_core::{DType, Device, Tensor};

    use super::{DataType, HostTensor, TensorError};

    impl HostTensor {
        /// Copies to a device, same type and shape.
        pub fn to_candle(&self, device: &Device) -> candle_core::Result<Tensor> {
            let dtype = match self.dtype() {
                DataType::F32 => DType::F32,
                DataType::F16 => DType::F16,
                DataType::Bf16 => DType::BF16,
                DataType::U8 => DType::U8,
                DataType::I64 => DType::I64,
                DataType::Unspecified => candle_core::bail!("tensor {:?} has no element type", self.name()),
            };
            Tensor::from_raw_buffer(self.data(), dtype, self.shape(), device)
        }

        /// Copies from a device; F32, U8 and I64 stay, other floats become F32.
        pub fn from_candle(name: impl Into<String>, tensor: &Tensor) -> candle_core::Result<Self> {
            let shape = tensor.dims();
            let flat = tensor.flatten_all()?;
            let host = match tensor.dtype() {
                DType::U8 => Self::from_u8(name, shape, flat.to_vec1::<u8>()?),
                DType::I64 => Self::from_i64(name, shape, &flat.to_vec1::<i64>()?),
                _ => Self::from_f32(name, shape, &flat.to_dtype(DType::F32)?.to_vec1::<f32>()?),
            };
            host.map_err(|e: TensorError| candle_core::Error::Msg(e.to_string()))
        }
    }
}

/// Puts tensors of a stream together.
///
/// Feed it every part with [`push`](Self::push); call [`finish`](Self::finish) at the end of the stream.
#[derive(Debug)]
pub struct TensorReader {
    tensor_limit: u64,
    stream_left: u64,
    stream_limit: u64,
    open: Option<(TensorHeader, DataType, Vec<usize>, Vec<u8>)>,
}

impl TensorReader {
    /// A reader that takes tensors of at most `tensor_limit` bytes, `stream_limit` bytes in all.
    #[must_use]
    pub fn new(tensor_limit: u64, stream_limit: u64) -> Self {
        Self { tensor_limit, stream_left: stream_limit, stream_limit, open: None }
    }

    /// Takes the next message; gives a tensor when one is complete.
    ///
    /// Errors: see [`TensorError`]. After an error the stream is of no further use.
    pub fn push(&mut self, part: TensorPart) -> Result<Option<HostTensor>, TensorError> {
        match part.part {
            None => {
                Err(TensorError::Chunk { name: self.open_name(), reason: "a part is neither header nor chunk".into() })
            }
            Some(Part::Header(header)) => self.header(header).map(|()| None),
            Some(Part::Chunk(chunk)) => self.chunk(&chunk),
        }
    }

    /// Says whether the stream may end here.
    pub fn finish(&self) -> Result<(), TensorError> {
        match &self.open {
            None => Ok(()),
            Some((header, _, _, data)) => Err(TensorError::Incomplete {
                name: header.name.clone(),
                received: data.len() as u64,
                total: header.total_bytes,
            }),
        }
    }

    fn open_name(&self) -> String {
        self.open.as_ref().map(|o| o.0.name.clone()).unwrap_or_default()
    }

    fn header(&mut self, header: TensorHeader) -> Result<(), TensorError> {
        self.finish()?;
        let name = header.name.chars().take(128).collect::<String>();
        let dtype = DataType::try_from(header.dtype).unwrap_or(DataType::Unspecified);
        let shape: Vec<usize> = header.shape.iter().map(|&d| usize::try_from(d).unwrap_or(usize::MAX)).collect();
        let bytes =
            checked_bytes(dtype, &shape).map_err(|reason| TensorError::Header { name: name.clone(), reason })? as u64;
        if bytes != header.total_bytes {
            return Err(TensorError::Header {
                name,
                reason: format!(
                    "{dtype:?} of shape {shape:?} is {bytes} bytes, the header says {}",
                    header.total_bytes
                ),
            });
        }
        if bytes > self.tensor_limit {
            return Err(TensorError::TooLarge { name, bytes, limit: self.tensor_limit });
        }
        if bytes > self.stream_left {
            let bytes = self.stream_limit - self.stream_left + bytes;
            return Err(TensorError::TooLarge { name, bytes, limit: self.stream_limit });
        }
        self.stream_left -= bytes;
        // Memory grows with what arrives, not with what a header promises.
        let data = Vec::with_capacity((bytes as usize).min(4 * CHUNK_BYTES));
        self.open = Some((TensorHeader { name, ..header }, dtype, shape, data));
        Ok(())
    }

    fn chunk(&mut self, chunk: &TensorChunk) -> Result<Option<HostTensor>, TensorError> {
        let Some((header, dtype, shape, mut data)) = self.open.take() else {
            return Err(TensorError::Chunk { name: String::new(), reason: "a chunk came before any header".into() });
        };
        let bad = |reason: String| Err(TensorError::Chunk { name: header.name.clone(), reason });
        if chunk.offset != data.len() as u64 {
            return bad(format!("a chunk starts at offset {}, expected {}", chunk.offset, data.len()));
        }
        if chunk.data.is_empty() || chunk.data.len() > CHUNK_BYTES {
            return bad(format!("a chunk has {} bytes, allowed are 1 to {CHUNK_BYTES}", chunk.data.len()));
        }
        if (data.len() + chunk.data.len()) as u64 > header.total_bytes {
            return bad(format!("chunks pass the announced {} bytes", header.total_bytes));
        }
        let actual = crc32c::crc32c(&chunk.data);
        if actual != chunk.crc32c {
            return Err(TensorError::Corrupt {
                name: header.name,
                offset: chunk.offset,
                expected: chunk.crc32c,
                actual,
            });
        }
        data.extend_from_slice(&chunk.data);
        if data.len() as u64 == header.total_bytes {
            return Ok(Some(HostTensor { name: header.name, dtype, shape, data }));
        }
        self.open = Some((header, dtype, shape, data));
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(n: usize) -> HostTensor {
        let values: Vec<f32> = (0..n).map(|i| i as f32 * 0.5).collect();
        HostTensor::from_f32("x", &[1, n], &values).unwrap()
    }

    fn reader() -> TensorReader {
        TensorReader::new(8 << 20, 16 << 20)
    }

    #[test]
    fn a_tensor_larger_than_one_chunk_arrives_as_it_was() {
        let sent = tensor(700_000);
        let mut reader = reader();
        let mut got = None;
        let parts: Vec<_> = sent.clone().parts().collect();
        assert_eq!(parts.len(), 1 + 3);
        for part in parts {
            assert!(got.is_none());
            got = reader.push(part).unwrap();
        }
        reader.finish().unwrap();
        assert_eq!(got.unwrap(), sent);
    }

    #[test]
    fn a_header_that_lies_is_refused_before_allocation() {
        for (shape, dtype, bytes) in [
            (vec![2, 3], DataType::F32, 23),
            (vec![u64::MAX, u64::MAX], DataType::F32, 8),
            (vec![1 << 40], DataType::U8, 1 << 40),
            (vec![0, 4], DataType::F32, 0),
            (vec![1; 9], DataType::U8, 1),
            (vec![4], DataType::Unspecified, 4),
        ] {
            let header = TensorHeader { name: "x".into(), dtype: dtype.into(), shape, total_bytes: bytes };
            assert!(reader().push(TensorPart { part: Some(Part::Header(header.clone())) }).is_err(), "{header:?}");
        }
    }

    #[test]
    fn a_corrupt_chunk_is_refused() {
        let mut reader = reader();
        let mut parts = tensor(10).parts();
        reader.push(parts.next().unwrap()).unwrap();
        let Some(Part::Chunk(mut chunk)) = parts.next().unwrap().part else { panic!() };
        chunk.data[3] ^= 1;
        let error = reader.push(TensorPart { part: Some(Part::Chunk(chunk)) }).unwrap_err();
        assert!(matches!(error, TensorError::Corrupt { .. }), "{error}");
    }

    #[test]
    fn a_stream_that_stops_in_the_middle_is_incomplete() {
        let mut reader = reader();
        for part in tensor(700_000).parts().take(2) {
            assert!(reader.push(part).unwrap().is_none());
        }
        assert_eq!(
            reader.finish(),
            Err(TensorError::Incomplete { name: "x".into(), received: 1 << 20, total: 2_800_000 })
        );
    }

    #[test]
    fn chunks_out_of_order_before_a_header_or_past_the_end_are_refused() {
        let parts: Vec<_> = tensor(700_000).parts().collect();
        assert!(reader().push(parts[1].clone()).is_err());
        let mut r = reader();
        r.push(parts[0].clone()).unwrap();
        assert!(r.push(parts[2].clone()).is_err());
        let mut r = reader();
        r.push(parts[0].clone()).unwrap();
        assert!(r.push(parts[0].clone()).is_err(), "a header in the middle of a tensor");
    }

    #[test]
    fn the_stream_limit_counts_all_tensors() {
        let mut r = TensorReader::new(100, 150);
        for part in tensor(25).parts() {
            r.push(part).unwrap();
        }
        let error = r.push(tensor(25).parts().next().unwrap()).unwrap_err();
        assert_eq!(error, TensorError::TooLarge { name: "x".into(), bytes: 200, limit: 150 });
    }
}
