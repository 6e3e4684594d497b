//! The devices of one stage, and what its work takes of each while it goes from one to the next.
//!
//! Most stages have one. Where a network is spread over several, one of them works at a time: what the heap grows
//! meanwhile is charged to that one, and what goes on to the next device is charged there from then on. Cards count for
//! themselves.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::memory::{Budget, StageMeter};

/// What a stage has of one device.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) budget: Arc<Budget>,
    pub(crate) meter: StageMeter,
}

impl Place {
    pub(crate) fn on(budget: &Arc<Budget>) -> Self {
        Self { meter: StageMeter::on(budget.device().name), budget: budget.clone() }
    }

    fn on_heap(&self) -> bool {
        self.budget.device().name.card().is_none()
    }
}

/// One operation of a stage, which begins on its first device.
#[derive(Debug)]
pub(crate) struct Work {
    places: Arc<[Place]>,
    at: Mutex<At>,
}

#[derive(Debug, Default)]
struct At {
    /// The device that works.
    place: usize,
    /// What is counted of the memory of the device that works, without what the operation has there.
    base: u64,
    of: Vec<Share>,
}

/// What an operation has of one device.
#[derive(Debug, Clone, Copy, Default)]
struct Share {
    /// What was counted of its memory when the operation began.
    counted: u64,
    /// What the process held of it when the operation began.
    held: u64,
    /// What the operation has there while another device works.
    left: u64,
}

impl Work {
    pub(crate) fn new(places: &Arc<[Place]>) -> Arc<Self> {
        Arc::new(Self { places: places.clone(), at: Mutex::default() })
    }

    fn at(&self) -> MutexGuard<'_, At> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of the device that works, or worked last.
    pub(crate) fn place(&self) -> usize {
        self.at().place
    }

    /// The budget of the device that works.
    pub(crate) fn budget(&self) -> Option<&Arc<Budget>> {
        self.places.get(self.place()).map(|place| &place.budget)
    }

    /// Notes that the operation got on; whoever waits for any of its devices waits for it.
    pub(crate) fn advance(&self) {
        self.places.iter().for_each(|place| place.budget.advance());
    }

    /// Runs the operation; says what it left on each device.
    pub(crate) fn run<R>(&self, work: impl FnOnce() -> R) -> (R, Vec<u64>) {
        /// Ends the operation, also after a panic.
        struct End<'a>(&'a Work);

        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.places.iter().for_each(|place| place.budget.rest());
            }
        }

        let begun = |place: &Place| Share {
            counted: place.budget.counted().current(),
            held: place.budget.held_bytes(),
            left: 0,
        };
        let _end = End(self);
        {
            let mut at = self.at();
            at.of = self.places.iter().map(begun).collect();
            self.begin(&mut at, 0, 0);
        }
        let result = work();
        let mut at = self.at();
        self.leave(&mut at, 0);
        (result, at.of.iter().map(|share| share.left).collect())
    }

    /// Another device works from now on, and so many bytes go there.
    pub(crate) fn moves(&self, to: usize, bytes: u64) {
        let mut at = self.at();
        let Some(from) = self.places.get(at.place).filter(|_| to != at.place && to < self.places.len()) else { return };
        // What goes to a card is gone from the heap; what comes from one is counted when it is there.
        let comes = if from.on_heap() { bytes } else { 0 };
        self.leave(&mut at, bytes);
        self.begin(&mut at, to, comes);
    }

    /// Ends a stretch on the device that works, from which so many bytes go.
    fn leave(&self, at: &mut At, bytes: u64) {
        let (Some(place), Some(share)) = (self.places.get(at.place), at.of.get_mut(at.place)) else { return };
        let counted = place.budget.counted();
        let grown = counted.peak().saturating_sub(at.base);
        place.meter.reached(grown);
        place.budget.reached(share.held.saturating_add(grown));
        let goes = if place.on_heap() { bytes } else { 0 };
        share.left = counted.current().saturating_sub(at.base).saturating_sub(goes);
        place.budget.left_with(share.left);
    }

    /// Begins a stretch on a device, to which so many bytes come.
    fn begin(&self, at: &mut At, to: usize, bytes: u64) {
        let (Some(place), Some(share)) = (self.places.get(to), at.of.get(to)) else { return };
        let counted = place.budget.counted();
        at.place = to;
        at.base = match place.on_heap() {
            true => counted.current().saturating_sub(share.left.saturating_add(bytes)),
            // Nobody else computes there meanwhile, so the card's own count says what the operation has.
            false => share.counted,
        };
        place.budget.works_from(at.base);
        counted.reset_peak();
    }
}
