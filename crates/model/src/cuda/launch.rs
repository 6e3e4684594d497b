//! Launching kernels on tensors.

use candle_core::{DType, Result, Tensor};

use crate::memory;

/// A file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum File {
    Attention,
    Conv,
    Decode,
    Group,
    Heads,
    Layer,
    Norm,
}

/// A number that a kernel takes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Number {
    /// `int`
    Int(i32),
    /// `long long`
    Long(i64),
    /// `float`
    Float(f32),
    /// `double`
    Double(f64),
}

/// A count or side as a kernel's `int`.
pub(super) fn int(value: usize) -> Result<Number> {
    match i32::try_from(value) {
        Ok(value) => Ok(Number::Int(value)),
        Err(_) => candle_core::bail!("a side of {value}, kernels take up to {}", i32::MAX),
    }
}

/// A count as a kernel's `long long`.
pub(super) fn long(value: usize) -> Number {
    // No memory has more values.
    Number::Long(i64::try_from(value).unwrap_or(i64::MAX))
}

/// The tensor row-major and on an address that packs of 16 bytes can be read from.
pub(super) fn ready(x: &Tensor) -> Result<Tensor> {
    let aligned = (x.layout().start_offset() * x.dtype().size_in_bytes()).is_multiple_of(16);
    if x.is_contiguous() && aligned { Ok(x.clone()) } else { x.force_contiguous() }
}

/// The tensor in f32, as kernels take small ones, ready.
pub(super) fn wide(x: &Tensor) -> Result<Tensor> {
    ready(&x.to_dtype(DType::F32)?)
}

/// What a kernel's name ends in.
pub(super) fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::BF16 => Ok("bf16"),
        DType::F16 => Ok("f16"),
        other => candle_core::bail!("no kernel for values of type {other:?}"),
    }
}

/// One launch. A kernel takes its inputs, then what it writes, then numbers.
pub(super) struct Launch<'a> {
    pub(super) file: File,
    pub(super) kernel: String,
    /// Tensors that are [`ready`]; nothing becomes a null pointer.
    pub(super) inputs: &'a [Option<&'a Tensor>],
    pub(super) numbers: &'a [Number],
    /// Blocks along x, y and z.
    pub(super) grid: [usize; 3],
    pub(super) threads: u32,
    /// Bytes of shared memory besides what the kernel itself declares.
    pub(super) shared: u32,
}

impl Launch<'_> {
    /// Runs the kernel, which writes every value of a new tensor beside its first input.
    pub(super) fn run(self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let Some(Some(first)) = self.inputs.first() else { candle_core::bail!("{} without an input", self.kernel) };
        let count: usize = shape.iter().product();
        memory::room(count.saturating_mul(dtype.size_in_bytes()))?;
        match count {
            0 => Tensor::zeros(shape, dtype, first.device()),
            _ => self.run_on(first.device(), shape, dtype),
        }
    }
}
