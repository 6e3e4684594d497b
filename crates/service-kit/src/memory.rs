//! Counts what the process holds of its device, and what each stage takes of it: the heap, byte by byte, or a card's
//! memory, as the card's own allocator counts it.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use proto::v1::MemoryReport;

use crate::{
    ServiceError,
    device::CancelToken,
    hardware::{DeviceConfig, DeviceName, host_memory},
    places::Work,
};

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

/// Which memory is counted.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) enum Counted {
    #[default]
    Heap,
    #[cfg(feature = "cuda")]
    Card(u32),
}

impl Counted {
    fn of(name: DeviceName) -> Self {
        match name {
            #[cfg(feature = "cuda")]
            DeviceName::Cuda { index } => Self::Card(index),
            _ => Self::Heap,
        }
    }

    pub(crate) fn current(self) -> u64 {
        match self {
            Self::Heap => current_bytes(),
            #[cfg(feature = "cuda")]
            Self::Card(index) => crate::hardware::pool::current_bytes(index),
        }
    }

    pub(crate) fn peak(self) -> u64 {
        match self {
            Self::Heap => peak_bytes(),
            #[cfg(feature = "cuda")]
            Self::Card(index) => crate::hardware::pool::peak_bytes(index),
        }
    }

    pub(crate) fn reset_peak(self) {
        match self {
            Self::Heap => reset_peak(),
            #[cfg(feature = "cuda")]
            Self::Card(index) => crate::hardware::pool::reset_peak(index),
        }
    }
}

/// What the stages of one device hold of the process's heap.
#[derive(Debug, Default)]
struct Share {
    /// Between their operations, by stage.
    held: Mutex<BTreeMap<&'static str, u64>>,
    /// One more than the heap's bytes without what the running operation has here; 0 where none works here now.
    base: AtomicU64,
    /// What the running operation has here while it works elsewhere.
    left: AtomicU64,
}

impl Share {
    fn bytes(&self) -> u64 {
        let held: u64 = self.held.lock().unwrap_or_else(PoisonError::into_inner).values().sum();
        held.saturating_add(match self.base.load(Relaxed) {
            0 => self.left.load(Relaxed),
            base => current_bytes().saturating_sub(base - 1),
        })
    }
}

/// What says how many bytes of a device's memory no process holds now.
fn unheld(name: DeviceName) -> Box<dyn Fn() -> u64 + Send + Sync> {
    match name {
        #[cfg(feature = "cuda")]
        DeviceName::Cuda { index } => {
            let driver = crate::hardware::Nvml::load();
            let all = crate::hardware::cards(driver.as_ref().map(|driver| driver as &dyn crate::hardware::Driver));
            let uuid = all.into_iter().find(|card| card.index == index).map(|card| card.uuid);
            Box::new(move || {
                let free = driver.as_ref().zip(uuid.as_deref()).and_then(|(driver, uuid)| driver.free_bytes(uuid));
                // A driver that does not answer leaves the process's own count to decide.
                free.map_or(u64::MAX, |free| free.saturating_add(crate::hardware::pool::spare_bytes(index)))
            })
        }
        _ => Box::new(|| host_memory().free_bytes),
    }
}

/// A device's budget. On the processor it bounds the process's whole heap; weights that are mapped from their files
/// are not on the heap. Where other processes leave less than the budget, that is what there is.
///
/// Where the processor is several devices, each has what its stages hold and what the one that works takes meanwhile;
/// the first has all the rest of the heap too. So together they are the process's heap.
#[derive(Debug)]
pub struct Budget {
    config: DeviceConfig,
    percent: AtomicU8,
    pressed: AtomicBool,
    pressures: AtomicU64,
    refusals: AtomicU64,
    unheld: Unheld,
    own: Arc<Share>,
    /// Of the first device: the shares of the others.
    others: Option<Vec<Arc<Share>>>,
    /// The most bytes that were held on it while a stage worked.
    peak: AtomicU64,
    /// How often work got on there.
    advances: Arc<AtomicU64>,
}

/// How long what was said of the machine's free memory holds: long enough that asking costs nothing beside a layer.
const HOLDS: Duration = Duration::from_millis(250);

/// Bytes of a memory that no process holds, asked now and then.
struct Unheld {
    ask: Box<dyn Fn() -> u64 + Send + Sync>,
    holds: Duration,
    said: Mutex<Option<(Instant, u64)>>,
}

impl std::fmt::Debug for Unheld {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unheld")
    }
}

impl Unheld {
    /// Lets the next answer be a new one.
    fn forget(&self) {
        *self.said.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn bytes(&self) -> u64 {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        match *said {
            Some((when, bytes)) if when.elapsed() < self.holds => bytes,
            _ => {
                let bytes = (self.ask)();
                *said = Some((Instant::now(), bytes));
                bytes
            }
        }
    }
}

impl Budget {
    /// The budget of a process with one device, of which nothing is used yet, in this machine's memory or a card's.
    #[must_use]
    pub fn new(config: DeviceConfig) -> Self {
        let unheld = unheld(config.name);
        Self::within(config, HOLDS, unheld)
    }

    /// A budget in a memory of which `unheld` says how many bytes no process holds; it is asked again when its answer is
    /// older than `holds`.
    #[must_use]
    pub fn within(config: DeviceConfig, holds: Duration, unheld: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self {
            percent: AtomicU8::new(config.pressure_percent),
            config,
            pressed: AtomicBool::new(false),
            pressures: AtomicU64::new(0),
            refusals: AtomicU64::new(0),
            unheld: Unheld { ask: Box::new(unheld), holds, said: Mutex::default() },
            own: Arc::default(),
            others: Some(Vec::new()),
            peak: AtomicU64::new(0),
            advances: Arc::default(),
        }
    }

    /// The budgets of the devices of one process.
    #[must_use]
    pub fn several(configs: &[DeviceConfig]) -> Vec<Self> {
        let mut budgets: Vec<Self> =
            configs.iter().map(|config| Self { others: None, ..Self::new(config.clone()) }).collect();
        let on_heap = |budget: &&Self| budget.config.name.card().is_none();
        // Parts of the processor work in turns, so what waits for one may wait for another.
        let of_processor: Arc<AtomicU64> = Arc::default();
        for budget in budgets.iter_mut().filter(|budget| budget.config.name.card().is_none()) {
            budget.advances = of_processor.clone();
        }
        let others = budgets.iter().skip(1).filter(on_heap).map(|budget| budget.own.clone()).collect();
        if let Some(first) = budgets.first_mut() {
            first.others = Some(others);
        }
        budgets
    }

    /// Notes that work got on there: a task began or ended, or a layer did.
    pub(crate) fn advance(&self) {
        self.advances.fetch_add(1, Relaxed);
    }

    /// How often work got on there.
    #[must_use]
    pub fn advances(&self) -> u64 {
        self.advances.load(Relaxed)
    }

    /// Bytes of it that this process holds now.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        match (Counted::of(self.config.name), &self.others) {
            (Counted::Heap, Some(others)) => {
                current_bytes().saturating_sub(others.iter().map(|share| share.bytes()).sum())
            }
            (Counted::Heap, None) => self.own.bytes(),
            #[cfg(feature = "cuda")]
            (card, _) => card.current(),
        }
    }

    /// The most bytes that this process held of it while a stage worked on it.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        self.peak.load(Relaxed)
    }

    /// The memory that is counted.
    pub(crate) fn counted(&self) -> Counted {
        Counted::of(self.config.name)
    }

    /// An operation works on the device; `base` is what is counted of its memory without what the operation has there.
    pub(crate) fn works_from(&self, base: u64) {
        self.own.base.store(base.saturating_add(1), Relaxed);
    }

    /// The operation works elsewhere, and has so much here meanwhile.
    pub(crate) fn left_with(&self, bytes: u64) {
        self.own.left.store(bytes, Relaxed);
        self.own.base.store(0, Relaxed);
    }

    /// No operation has anything here besides what its stage [`holds`](Self::holds).
    pub(crate) fn rest(&self) {
        self.left_with(0);
    }

    /// Notes that so much was held on the device while a stage worked.
    pub(crate) fn reached(&self, bytes: u64) {
        self.peak.fetch_max(bytes, Relaxed);
    }

    /// Says what a stage holds between its operations.
    pub(crate) fn holds(&self, stage: &'static str, bytes: u64) {
        self.own.held.lock().unwrap_or_else(PoisonError::into_inner).insert(stage, bytes);
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &DeviceConfig {
        &self.config
    }

    /// Bytes of it that may still be held now.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.config.budget_bytes.saturating_sub(self.used_bytes())
    }

    /// As [`free_bytes`](Self::free_bytes), with what other processes hold asked anew.
    pub(crate) fn free_now(&self) -> u64 {
        self.unheld.forget();
        self.free_bytes()
    }

    /// Bytes of it that are held: by this process, or by others where these leave less than is left of the budget.
    fn used_bytes(&self) -> u64 {
        self.held_bytes().max(self.config.budget_bytes.saturating_sub(self.unheld.bytes()))
    }

    /// Percent of it above which the device is nearly full.
    #[must_use]
    pub fn pressure_percent(&self) -> u8 {
        self.percent.load(Relaxed)
    }

    /// Changes that percentage; to be checked by the caller.
    pub(crate) fn set_pressure_percent(&self, percent: u8) {
        let before = self.percent.swap(percent, Relaxed);
        let device = self.config.label();
        tracing::info!(%device, before, percent, "the device counts as nearly full from there on");
    }

    /// How often the device became nearly full.
    #[must_use]
    pub fn pressures(&self) -> u64 {
        self.pressures.load(Relaxed)
    }

    /// Notes that work had to wait for memory.
    pub(crate) fn refuse(&self) {
        self.refusals.fetch_add(1, Relaxed);
    }

    /// How often work had to wait for memory.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.refusals.load(Relaxed)
    }

    /// Whether the device is nearly full: from above the configured share until ten percent below it. A change is
    /// logged.
    pub fn pressed(&self) -> bool {
        let (used, budget_bytes) = (self.used_bytes(), self.config.budget_bytes);
        let (before, percent) = (self.pressed.load(Relaxed), self.pressure_percent());
        let now = nearly_full(before, used, (budget_bytes, percent));
        if now != before && self.pressed.swap(now, Relaxed) == before {
            let device = self.config.label();
            if now {
                self.pressures.fetch_add(1, Relaxed);
                tracing::warn!(%device, used_bytes = used, budget_bytes, "above {percent} % of the device's memory");
            } else {
                tracing::info!(%device, used_bytes = used, budget_bytes, "the device has room again");
            }
        }
        now
    }
}

fn nearly_full(before: bool, used: u64, (budget_bytes, percent): (u64, u8)) -> bool {
    // Where 100 is never, it also ends what began under another percentage.
    let share = if before && percent < 100 { percent.saturating_sub(10) } else { percent };
    u128::from(used) * 100 > u128::from(budget_bytes) * u128::from(share)
}

/// Says whether a stage's work may go on: its caller still waits, and the device has room for what comes next.
#[derive(Debug, Clone)]
pub struct Watch(Arc<Watched>);

#[derive(Debug)]
struct Watched {
    stage: &'static str,
    cancel: CancelToken,
    work: Arc<Work>,
    reason: Mutex<Option<ServiceError>>,
}

impl Watch {
    pub(crate) fn new(stage: &'static str, cancel: CancelToken, work: Arc<Work>) -> Self {
        Self(Arc::new(Watched { stage, cancel, work, reason: Mutex::default() }))
    }

    /// Another of the stage's devices works from now on, and tensors of so many bytes go there.
    pub fn moves(&self, device: usize, bytes: u64) {
        self.0.work.moves(device, bytes);
    }

    /// Whether `bytes` more may be held now, on the device that works. After a no the work has to end; the first no is
    /// its reason.
    #[must_use]
    pub fn allows(&self, bytes: u64) -> bool {
        let Watched { stage, cancel, work, reason } = &*self.0;
        work.advance();
        let no = if let Err(gone) = cancel.check() {
            gone
        } else {
            let Some(budget) = work.budget() else { return true };
            let (used, budget_bytes) = (budget.used_bytes(), budget.device().budget_bytes);
            let Some(missing) = used.saturating_add(bytes).checked_sub(budget_bytes).filter(|&missing| missing > 0)
            else {
                return true;
            };
            ServiceError::DeviceMemory {
                stage: (*stage).to_owned(),
                device: budget.device().label(),
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

/// What one stage holds of the heap, or of a card's memory.
///
/// Work is measured around one operation at a time, by the growth of the whole memory meanwhile; so only the thread
/// that owns the device measures, and small allocations of other threads at that moment are counted with it.
#[derive(Debug, Default)]
pub struct StageMeter {
    counted: Counted,
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

impl WeightsReport {
    /// Of so many blocks so many stay; work waited so long, and so long was read without.
    #[must_use]
    pub fn new([blocks, resident]: [usize; 2], [waited, hidden]: [Duration; 2]) -> Self {
        let count = |blocks: usize| u32::try_from(blocks).unwrap_or(u32::MAX);
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Self { blocks: count(blocks), resident_blocks: count(resident), waited_ms: ms(waited), hidden_ms: ms(hidden) }
    }
}

impl StageMeter {
    /// A meter of the memory of that device; without a name it is the heap's.
    #[must_use]
    pub fn on(name: DeviceName) -> Self {
        Self { counted: Counted::of(name), ..Self::default() }
    }

    /// Runs `load` and takes what it leaves behind as the stage's resident bytes.
    pub fn load<R, E>(&self, load: impl FnOnce() -> Result<R, E>) -> Result<R, E> {
        let before = self.counted.current();
        self.counted.reset_peak();
        let result = load();
        if result.is_ok() {
            self.resident.store(self.counted.current().saturating_sub(before), Relaxed);
        }
        self.peak.fetch_max(self.counted.peak().saturating_sub(before), Relaxed);
        result
    }

    /// Notes that the stage had so much on top of what it holds between its operations.
    pub(crate) fn reached(&self, bytes: u64) {
        self.peak.fetch_max(self.held_bytes().saturating_add(bytes), Relaxed);
    }

    /// Says what the stage holds of it from its loading on.
    pub(crate) fn settles(&self, bytes: u64) {
        self.resident.store(bytes, Relaxed);
    }

    /// Says that the stage holds nothing any more.
    pub fn unloaded(&self) {
        self.resident.store(0, Relaxed);
        self.kept.store(0, Relaxed);
        self.brought(WeightsReport::default());
    }

    /// Bytes that the stage holds between its operations.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.resident.load(Relaxed) + self.kept.load(Relaxed)
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
        let before = self.counted.current();
        self.counted.reset_peak();
        let result = work();
        let held = self.held_bytes();
        self.peak.fetch_max(held + self.counted.peak().saturating_sub(before), Relaxed);
        result
    }

    /// How the stage's blocks of weights came.
    pub(crate) fn weights(&self) -> WeightsReport {
        *self.weights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The numbers as they go over the wire; the device's own are the caller's to add.
    #[must_use]
    pub fn report(&self) -> MemoryReport {
        let weights = self.weights();
        MemoryReport {
            resident_bytes: self.resident.load(Relaxed),
            peak_bytes: self.peak.load(Relaxed),
            process_bytes: self.counted.current(),
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
        let mut full = false;
        for (used, expected) in [(850, false), (851, true), (800, true), (751, true), (750, false), (850, false)] {
            full = nearly_full(full, used, (1000, 85));
            assert_eq!(full, expected, "{used}");
        }
    }

    #[test]
    fn without_pressure_a_device_may_be_full() {
        assert!(!nearly_full(false, 1000, (1000, 100)) && !nearly_full(true, 1000, (1000, 100)));
    }

    /// A memory of 1 TiB, so that this process's own heap does not count.
    #[test]
    fn what_other_processes_take_is_not_free_and_presses() {
        const TIB: u64 = 1 << 40;
        let left = Arc::new(AtomicU64::new(TIB));
        let asked = Arc::clone(&left);
        let config = DeviceConfig { budget_bytes: TIB, ..DeviceConfig::cpu() };
        let budget = Budget::within(config, Duration::ZERO, move || asked.load(Relaxed));
        assert!(!budget.pressed());
        left.store(TIB / 100 * 14, Relaxed);
        assert_eq!((budget.pressed(), budget.free_bytes(), budget.pressures()), (true, TIB / 100 * 14, 1));
        left.store(TIB / 100 * 20, Relaxed);
        assert!(budget.pressed(), "it takes ten percent more to be well again");
        budget.set_pressure_percent(95);
        assert!(!budget.pressed() && budget.pressures() == 1);
        budget.set_pressure_percent(20);
        assert!(budget.pressed() && budget.pressures() == 2);
    }

    #[test]
    fn what_is_free_is_not_asked_for_every_layer() {
        let asked = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&asked);
        let ask = move || count.fetch_add(1, Relaxed);
        let budget = Budget::within(DeviceConfig::cpu(), Duration::from_secs(3600), ask);
        for _ in 0..10 {
            std::hint::black_box(budget.free_bytes());
        }
        assert_eq!(asked.load(Relaxed), 1);
    }
}
