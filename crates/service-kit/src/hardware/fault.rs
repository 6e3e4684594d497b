//! What a card's driver means by an error, told from the error's text.
//!
//! Errors of a card come through several libraries, each with a type of its own; all of them carry the name that NVIDIA
//! gives the fault.

use crate::ServiceError;

/// What has to follow an error of a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CardFault {
    /// Less would have fitted; the card works on.
    OutOfMemory,
    /// Nothing that this process asks of the card will work again.
    Lost,
}

/// Faults after which memory was only too small.
const OUT_OF_MEMORY: [&str; 3] =
    ["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED", "CURAND_STATUS_ALLOCATION_FAILED"];

/// Faults that stay until the process has ended: the context is broken, or the card is gone.
const LOST: [&str; 18] = [
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    "CUDA_ERROR_CONTAINED",
    "CUDA_ERROR_DEVICE_UNAVAILABLE",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "CUDA_ERROR_DEINITIALIZED",
    "CUDA_ERROR_EXTERNAL_DEVICE",
    "CUDA_ERROR_SYSTEM_NOT_READY",
    // A card that fell off the bus is told so.
    "CUDA_ERROR_UNKNOWN",
];

impl CardFault {
    /// The fault in an error of ours, or of weights that could not be loaded; nothing where it is none of a card's.
    pub(crate) fn of(error: &ServiceError) -> Option<Self> {
        let (ServiceError::Internal { message, .. } | ServiceError::FailedPrecondition { message }) = error else {
            return None;
        };
        let names = |faults: &[&str]| faults.iter().any(|fault| message.contains(fault));
        match () {
            () if names(&LOST) => Some(Self::Lost),
            () if names(&OUT_OF_MEMORY) => Some(Self::OutOfMemory),
            () => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_was_too_small_is_told_from_a_card_that_is_gone() {
        let of = |text: &str| CardFault::of(&ServiceError::internal(text));
        assert_eq!(of("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")"), Some(CardFault::OutOfMemory));
        assert_eq!(of("CublasError(CUBLAS_STATUS_ALLOC_FAILED)"), Some(CardFault::OutOfMemory));
        assert_eq!(of("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal address\")"), Some(CardFault::Lost));
        assert_eq!(of("out of memory; before it: CUDA_ERROR_OUT_OF_MEMORY, CUDA_ERROR_UNKNOWN"), Some(CardFault::Lost));
        assert_eq!(of("a task panicked"), None);
        let loading = ServiceError::failed_precondition("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")");
        assert_eq!(CardFault::of(&loading), Some(CardFault::OutOfMemory));
        assert_eq!(CardFault::of(&ServiceError::cancelled("CUDA_ERROR_UNKNOWN")), None);
    }
}
