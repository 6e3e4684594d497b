//! Weights that come to a card and go again.

use std::{
    fmt,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use candle_core::{
    CudaDevice, CudaStorage, Device, Result, Shape, Storage, Tensor,
    cuda_backend::{
        CudaDType, WrapErr as _,
        cudarc::driver::{
            CudaEvent, CudaStream, DevicePtrMut as _, DeviceRepr, PinnedHostSlice, result::memcpy_htod_async,
        },
    },
    op::BackpropOp,
};
use half::{bf16, f16};

use super::{files::MappedFile, stored::Encoding};
use crate::memory;

/// A matrix of a file, and its place on a card.
pub(super) struct Slot {
    pub(super) file: Arc<MappedFile>,
    pub(super) bytes: Range<usize>,
    pub(super) encoding: Encoding,
    pub(super) sides: [usize; 2],
    pub(super) device: Device,
    pub(super) there: Mutex<Option<Tensor>>,
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot({:?}, {})", self.sides, self.encoding.name())
    }
}

impl Slot {
    fn there(&self) -> MutexGuard<'_, Option<Tensor>> {
        self.there.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stored(&self) -> &[u8] {
        &self.file.bytes()[self.bytes.clone()]
    }

    /// Its values as they are stored, `(rows, columns)` of a plain type or bytes in U8; read here and now where nobody
    /// brought them.
    pub(super) fn tensor(&self) -> Result<Tensor> {
        let mut there = self.there();
        if let Some(tensor) = &*there {
            return Ok(tensor.clone());
        }
        memory::room(self.bytes.len())?;
        let tensor = Way::plain(&self.device)?.copy(self)?;
        *there = Some(tensor.clone());
        Ok(tensor)
    }

    /// Brings it; where that fails, whoever uses it first learns why.
    pub(super) fn bring(&self, way: &mut Way) {
        let mut there = self.there();
        if there.is_none() {
            *there = way.copy(self).inspect_err(|e| tracing::debug!("weights were not brought: {e}")).ok();
        }
    }

    /// Lets it go when the work that was begun with it is done.
    pub(super) fn leave(&self) {
        *self.there() = None;
    }
}

/// Bytes of one piece of pinned memory.
const PIECE: usize = 16 << 20;

/// The way to a card: a stream, and two pieces of pinned memory in turn, one of which is filled while the card reads the
/// other. Without them the driver copies through its own.
pub(super) struct Way {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    pieces: Vec<(PinnedHostSlice<u8>, Option<CudaEvent>)>,
    next: usize,
}

impl Way {
    /// On the stream of all work, without pinned memory.
    fn plain(device: &Device) -> Result<Self> {
        let Device::Cuda(device) = device else { candle_core::bail!("weights for {device:?}, expected a card") };
        Ok(Self { device: device.clone(), stream: device.cuda_stream(), pieces: Vec::new(), next: 0 })
    }

    /// On a stream of its own.
    pub(super) fn aside(device: &Device) -> Result<Self> {
        let mut way = Self::plain(device)?;
        let context = way.stream.context().clone();
        way.stream = context.new_stream().w()?;
        for _ in 0..2 {
            // SAFETY: it is written before it is read.
            match unsafe { context.alloc_pinned::<u8>(PIECE) } {
                Ok(piece) => way.pieces.push((piece, None)),
                Err(reason) => {
                    tracing::info!("weights come through plain memory, as none could be pinned: {reason}");
                    way.pieces.clear();
                    break;
                }
            }
        }
        Ok(way)
    }

    /// Waits until everything has arrived.
    pub(super) fn arrive(&self) {
        if let Err(reason) = self.stream.synchronize() {
            tracing::warn!("weights did not arrive: {reason}");
        }
    }

    fn copy(&mut self, slot: &Slot) -> Result<Tensor> {
        match slot.encoding {
            Encoding::F32 => self.copy_as::<f32>(slot.stored(), (&slot.sides).into()),
            Encoding::F16 => self.copy_as::<f16>(slot.stored(), (&slot.sides).into()),
            Encoding::Bf16 => self.copy_as::<bf16>(slot.stored(), (&slot.sides).into()),
            _ => self.copy_as::<u8>(slot.stored(), slot.bytes.len().into()),
        }
    }

    fn copy_as<T: DeviceRepr + CudaDType>(&mut self, stored: &[u8], shape: Shape) -> Result<Tensor> {
        // SAFETY: every value is written below before the stream's later work, or another stream's, reads it.
        let mut values = unsafe { self.stream.alloc::<T>(stored.len() / size_of::<T>()) }.w()?;
        {
            let (mut at, _written) = values.device_ptr_mut(&self.stream);
            for part in stored.chunks(PIECE) {
                if self.pieces.is_empty() {
                    // SAFETY: `values` has room for all parts; the driver has read a part of plain memory on return.
                    unsafe { memcpy_htod_async(at, part, self.stream.cu_stream()) }.w()?;
                } else {
                    let which = self.next % self.pieces.len();
                    self.next = self.next.wrapping_add(1);
                    let (piece, read) = &mut self.pieces[which];
                    if let Some(read) = read.take() {
                        read.synchronize().w()?;
                    }
                    let piece = &mut piece.as_mut_slice().w()?[..part.len()];
                    piece.copy_from_slice(part);
                    // SAFETY: as above; the piece is not written again before the event says that the card has read it.
                    unsafe { memcpy_htod_async(at, piece, self.stream.cu_stream()) }.w()?;
                    *read = Some(self.stream.record_event(None).w()?);
                }
                at += part.len() as u64;
            }
        }
        let storage = CudaStorage::wrap_cuda_slice(values, self.device.clone());
        Ok(Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false))
    }
}

impl Drop for Way {
    /// Pinned memory goes after the card has read it.
    fn drop(&mut self) {
        if !self.pieces.is_empty() {
            self.arrive();
        }
    }
}
