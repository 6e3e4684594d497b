//! Counts the process's heap, byte by byte, and what each stage takes of it.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
};

use proto::v1::MemoryReport;

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

/// What one stage holds of the heap.
///
/// Work is measured around one operation at a time, by the growth of the whole heap meanwhile; so only the thread
/// that owns the device measures, and small allocations of other threads at that moment are counted with it.
#[derive(Debug, Default)]
pub struct StageMeter {
    resident: AtomicU64,
    kept: AtomicU64,
    peak: AtomicU64,
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
    }

    /// Says how much the stage keeps between requests besides its weights.
    pub fn keep(&self, bytes: u64) {
        self.kept.store(bytes, Relaxed);
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

    /// The numbers as they go over the wire.
    #[must_use]
    pub fn report(&self) -> MemoryReport {
        MemoryReport {
            resident_bytes: self.resident.load(Relaxed),
            peak_bytes: self.peak.load(Relaxed),
            process_bytes: current_bytes(),
        }
    }
}
