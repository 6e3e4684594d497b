//! Values of tensors in host memory.

use std::borrow::Cow;

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor};
use half::{bf16, f16, slice::HalfFloatSliceExt as _};
use rayon::prelude::*;

/// Values that one thread converts at a time.
const PIECE: usize = 64 << 10;

/// Whether this module's operations apply.
pub(crate) fn here(x: &Tensor) -> bool {
    matches!(x.device(), Device::Cpu) && matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16)
}

/// Runs `f` on a tensor's values in row-major order, widened to f32 where it has another type.
pub(crate) fn with_values<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("a tensor that was made contiguous is not");
    };
    let values: Cow<'_, [f32]> = match &*storage {
        Storage::Cpu(CpuStorage::F32(v)) => Cow::Borrowed(&v[start..end]),
        Storage::Cpu(CpuStorage::BF16(v)) => Cow::Owned(widen(&v[start..end], |h, o| h.convert_to_f32_slice(o))),
        Storage::Cpu(CpuStorage::F16(v)) => Cow::Owned(widen(&v[start..end], |h, o| h.convert_to_f32_slice(o))),
        _ => candle_core::bail!("a tensor of type {:?} on {:?}", x.dtype(), x.device()),
    };
    Ok(f(&values))
}

fn widen<T: Sync>(values: &[T], convert: impl Fn(&[T], &mut [f32]) + Sync) -> Vec<f32> {
    let mut out = vec![0f32; values.len()];
    out.par_chunks_mut(PIECE).zip(values.par_chunks(PIECE)).for_each(|(o, v)| convert(v, o));
    out
}

/// A tensor of values, rounded to `dtype`.
pub(crate) fn tensor(values: Vec<f32>, shape: &[usize], dtype: DType) -> Result<Tensor> {
    match dtype {
        DType::BF16 => {
            let mut out = vec![bf16::ZERO; values.len()];
            out.par_chunks_mut(PIECE).zip(values.par_chunks(PIECE)).for_each(|(o, v)| o.convert_from_f32_slice(v));
            Tensor::from_vec(out, shape, &Device::Cpu)
        }
        DType::F16 => {
            let mut out = vec![f16::ZERO; values.len()];
            out.par_chunks_mut(PIECE).zip(values.par_chunks(PIECE)).for_each(|(o, v)| o.convert_from_f32_slice(v));
            Tensor::from_vec(out, shape, &Device::Cpu)
        }
        _ => Tensor::from_vec(values, shape, &Device::Cpu),
    }
}

/// Output that several threads write, each its own part.
#[derive(Clone, Copy)]
pub(super) struct Shared(*mut f32, usize);

// SAFETY: whoever writes through it keeps to elements that no other thread touches.
unsafe impl Sync for Shared {}
unsafe impl Send for Shared {}

impl Shared {
    pub(super) fn new(out: &mut [f32]) -> Self {
        Self(out.as_mut_ptr(), out.len())
    }

    /// # Safety
    /// No other thread reads or writes `start .. start + length` while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn slice(&self, start: usize, length: usize) -> &mut [f32] {
        assert!(start.checked_add(length).is_some_and(|end| end <= self.1), "a part of the output");
        // SAFETY: the part lies within the output; the caller answers for its being one thread's.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), length) }
    }

    /// # Safety
    /// As [`slice`](Self::slice), for whatever is written through the pointer.
    pub(super) unsafe fn pointer(&self, start: usize) -> *mut f32 {
        assert!(start <= self.1, "a part of the output");
        // SAFETY: within the output, or one past its end.
        unsafe { self.0.add(start) }
    }
}
