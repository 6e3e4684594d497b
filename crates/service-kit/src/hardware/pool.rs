//! What this process holds of a card's memory, as the card's allocator counts it.
//!
//! Tensors on a card come out of its default pool, so the pool's own counters are exact, and they are the process's:
//! nobody else draws on it. Machine code, cuBLAS's work space and the context are not in it.

use candle_core::cuda_backend::cudarc::driver::{
    result::{DriverError, device, init, mem_pool},
    sys::{CUmemPool_attribute, CUmemPool_attribute_enum::*, CUmemoryPool},
};

/// Bytes held now.
pub(crate) fn current_bytes(card: u32) -> u64 {
    get(card, CU_MEMPOOL_ATTR_USED_MEM_CURRENT).unwrap_or(0)
}

/// The most bytes held since [`reset_peak`], or since the start.
pub(crate) fn peak_bytes(card: u32) -> u64 {
    get(card, CU_MEMPOOL_ATTR_USED_MEM_HIGH).unwrap_or(0)
}

/// Bytes that the allocator keeps from the driver though nobody holds them; it gives them out again, or back.
pub(crate) fn spare_bytes(card: u32) -> u64 {
    get(card, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT).unwrap_or(0).saturating_sub(current_bytes(card))
}

/// Lets the peak begin again at what is held now.
pub(crate) fn reset_peak(card: u32) {
    // The driver takes 0 and nothing else. A card that does not answer is noticed by the work itself.
    let reset = pool(card).and_then(|pool| {
        let mut zero = 0u64;
        // SAFETY: the pool is the driver's own, and this attribute is of 64 bits.
        unsafe { mem_pool::set_attribute(pool, CU_MEMPOOL_ATTR_USED_MEM_HIGH, (&raw mut zero).cast()) }
    });
    if let Err(reason) = reset {
        tracing::debug!("cuda:{card}: the peak was not reset: {reason}");
    }
}

fn get(card: u32, attribute: CUmemPool_attribute) -> Result<u64, DriverError> {
    let pool = pool(card)?;
    let mut value = 0u64;
    // SAFETY: the pool is the driver's own, and these attributes are of 64 bits.
    unsafe { mem_pool::get_attribute(pool, attribute, (&raw mut value).cast())? };
    Ok(value)
}

fn pool(card: u32) -> Result<CUmemoryPool, DriverError> {
    init()?;
    let device = device::get(i32::try_from(card).unwrap_or(i32::MAX))?;
    // SAFETY: the device is one that the driver just named.
    unsafe { device::get_default_mem_pool(device) }
}
