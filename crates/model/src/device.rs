//! Where networks run.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use candle_core::{Device, Result};

/// The CPU, or the card of that number.
///
/// All networks of a process share what a card needs besides tensors: one stream, on which everything runs in order, and
/// one room of cuBLAS.
///
/// Errors: the build has no CUDA; there is no such card, or no room on it.
pub fn device(card: Option<u32>) -> Result<Device> {
    static OPENED: Mutex<BTreeMap<u32, Device>> = Mutex::new(BTreeMap::new());
    let Some(number) = card else { return Ok(Device::Cpu) };
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = opened.get(&number) {
        return Ok(device.clone());
    }
    let device = Device::new_cuda_with_stream(number as usize)?;
    opened.insert(number, device.clone());
    Ok(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_card_is_the_cpu_and_one_that_is_not_there_an_error() {
        assert!(matches!(device(None), Ok(Device::Cpu)));
        assert!(device(Some(1 << 20)).is_err());
    }
}
