//! Counts the process's heap, byte by byte, and what each stage takes of it.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

use proto::v1::MemoryReport;

use crate::{ServiceError, device::CancelToken, hardware::DeviceConfig};

static CURRENT: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator with two counters in front.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn add(bytes: usize) {
    let now = CURRENT.fetch_add(bytes, Relaxed) + bytes;
    // Most allocations do not make a new peak; reading first keeps the line shared between cores.
    if now > PEAK.load(Relaxed) {
        PEAK.fetch_max(now, Relaxed);
    }
}

// SAFETY: every call goes unchanged to the system's allocator; the counters touch no memory of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc`.
        let pointer = unsafe { System.alloc(layout) };
        if !pointer.is_null() {
            add(layout.size());
        }
        pointer
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        let pointer = unsafe { System.alloc_zeroed(layout) };
        if !pointer.is_null() {
            add(layout.size());
        }
        pointer
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) };
        CURRENT.fetch_sub(layout.size(), Relaxed);
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `realloc`.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        if !moved.is_null() {
            if size >= layout.size() {
                add(size - layout.size());
            } else {
                CURRENT.fetch_sub(layout.size() - size, Relaxed);
            }
        }
        moved
    }
}

/// Bytes on the process's heap now.
#[must_use]
pub fn current_bytes() -> u64 {
    CURRENT.load(Relaxed) as u64
}

/// The most bytes on the process's heap since [`reset_peak`], or since the start.
#[must_use]
pub fn peak_bytes() -> u64 {
    PEAK.load(Relaxed) as u64
}

/// Lets the peak begin again at what is there now.
pub fn reset_peak() {
    PEAK.store(CURRENT.load(Relaxed), Relaxed);
}

/// A device's budget. On the processor it bounds the process's whole heap; weights that are mapped from their files
/// are not on the heap.
#[derive(Debug)]
pub struct Budget {
    config: DeviceConfig,
    pressed: AtomicBool,
}

impl Budget {
    /// A budget of which nothing is used yet.
    #[must_use]
    pub fn new(config: DeviceConfig) -> Self {
        Self { config, pressed: AtomicBool::new(false) }
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &DeviceConfig {
        &self.config
    }

    /// Bytes of it that are not held now.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.config.budget_bytes.saturating_sub(current_bytes())
    }

    /// Whether the device is nearly full: from above the configured share until ten percent below it. A change is
    /// logged.
    pub fn pressed(&self) -> bool {
        let (used, budget_bytes) = (current_bytes(), self.config.budget_bytes);
        let before = self.pressed.load(Relaxed);
        let now = nearly_full(before, used, &self.config);
        if now != before && self.pressed.swap(now, Relaxed) == before {
            let (device, percent) = (self.config.name, self.config.pressure_percent);
            if now {
                tracing::warn!(%device, used_bytes = used, budget_bytes, "above {percent} % of the device's memory");
            } else {
                tracing::info!(%device, used_bytes = used, budget_bytes, "the device has room again");
            }
        }
        now
    }
}

fn nearly_full(before: bool, used: u64, config: &DeviceConfig) -> bool {
    let share = if before { config.pressure_percent.saturating_sub(10) } else { config.pressure_percent };
    u128::from(used) * 100 > u128::from(config.budget_bytes) * u128::from(share)
}

/// Says whether a stage's work may go on: its caller still waits, and the device has room for what comes next.
#[derive(Debug, Clone)]
pub struct Watch(Arc<Watched>);

#[derive(Debug)]
struct Watched {
    stage: &'static str,
    cancel: CancelToken,
    budget: Arc<Budget>,
    reason: Mutex<Option<ServiceError>>,
}

impl Watch {
    pub(crate) fn new(stage: &'static str, cancel: CancelToken, budget: Arc<Budget>) -> Self {
        Self(Arc::new(Watched { stage, cancel, budget, reason: Mutex::default() }))
    }

    /// Whether `bytes` more may be held now. After a no the work has to end; the first no is its reason.
    #[must_use]
    pub fn allows(&self, bytes: u64) -> bool {
        let Watched { stage, cancel, budget, reason } = &*self.0;
        let no = if let Err(gone) = cancel.check() {
            gone
        } else {
            let (used, budget_bytes) = (current_bytes(), budget.device().budget_bytes);
            let Some(missing) = used.saturating_add(bytes).checked_sub(budget_bytes).filter(|&missing| missing > 0)
            else {
                return true;
            };
            ServiceError::DeviceMemory {
                stage: (*stage).to_owned(),
                needed_bytes: bytes.max(missing),
                free_bytes: budget.free_bytes(),
                budget_bytes,
            }
        };
        reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(no);
        false
    }

    /// Why the work had to end, if it had to.
    pub(crate) fn reason(&self) -> Option<ServiceError> {
        self.0.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What one stage holds of the heap.
///
/// Work is measured around one operation at a time, by the growth of the whole heap meanwhile; so only the thread
/// that owns the device measures, and small allocations of other threads at that moment are counted with it.
#[derive(Debug, Default)]
pub struct StageMeter {
    resident: AtomicU64,
    kept: AtomicU64,
    peak: AtomicU64,
    weights: Mutex<WeightsReport>,
}

/// How a stage's blocks of weights came from their files, since it was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WeightsReport {
    /// Blocks that come one by one.
    pub blocks: u32,
    /// Of these, the ones that stay in memory.
    pub resident_blocks: u32,
    /// Milliseconds that work waited for weights.
    pub waited_ms: u64,
    /// Milliseconds of reading for which it did not wait.
    pub hidden_ms: u64,
}

impl StageMeter {
    /// Runs `load` and takes what it leaves behind as the stage's resident bytes.
    pub fn load<R, E>(&self, load: impl FnOnce() -> Result<R, E>) -> Result<R, E> {
        let before = current_bytes();
        reset_peak();
        let result = load();
        if result.is_ok() {
            self.resident.store(current_bytes().saturating_sub(before), Relaxed);
        }
        self.peak.fetch_max(peak_bytes().saturating_sub(before), Relaxed);
        result
    }

    /// Says that the stage holds nothing any more.
    pub fn unloaded(&self) {
        self.resident.store(0, Relaxed);
        self.kept.store(0, Relaxed);
        self.brought(WeightsReport::default());
    }

    /// Bytes that the stage keeps between requests besides its weights.
    #[must_use]
    pub fn kept_bytes(&self) -> u64 {
        self.kept.load(Relaxed)
    }

    /// Says how much the stage keeps between requests besides its weights.
    pub fn keep(&self, bytes: u64) {
        self.kept.store(bytes, Relaxed);
    }

    /// Says how the stage's blocks of weights came.
    pub fn brought(&self, weights: WeightsReport) {
        *self.weights.lock().unwrap_or_else(PoisonError::into_inner) = weights;
    }

    /// Runs one operation; its peak is what it needs on top of what the stage held at its start.
    pub fn measure<R>(&self, work: impl FnOnce() -> R) -> R {
        let before = current_bytes();
        reset_peak();
        let result = work();
        let held = self.resident.load(Relaxed) + self.kept.load(Relaxed);
        self.peak.fetch_max(held + peak_bytes().saturating_sub(before), Relaxed);
        result
    }

    /// The numbers as they go over the wire; the device's own are the caller's to add.
    #[must_use]
    pub fn report(&self) -> MemoryReport {
        let weights = *self.weights.lock().unwrap_or_else(PoisonError::into_inner);
        MemoryReport {
            resident_bytes: self.resident.load(Relaxed),
            peak_bytes: self.peak.load(Relaxed),
            process_bytes: current_bytes(),
            weight_blocks: weights.blocks,
            resident_weight_blocks: weights.resident_blocks,
            weights_waited_ms: weights.waited_ms,
            weights_hidden_ms: weights.hidden_ms,
            ..MemoryReport::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_nearly_full_from_85_percent_until_75() {
        let config = DeviceConfig { budget_bytes: 1000, ..DeviceConfig::cpu() };
        let mut full = false;
        for (used, expected) in [(850, false), (851, true), (800, true), (751, true), (750, false), (850, false)] {
            full = nearly_full(full, used, &config);
            assert_eq!(full, expected, "{used}");
        }
    }

    #[test]
    fn without_pressure_a_device_may_be_full() {
        let config = DeviceConfig { budget_bytes: 1000, pressure_percent: 100, ..DeviceConfig::cpu() };
        assert!(!nearly_full(false, 1000, &config));
    }
}
