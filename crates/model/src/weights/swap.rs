//! Blocks of weights that come from their files ahead of their use and go after it.
//!
//! On a CPU weights stay mapped, so what comes and goes are pages of the mapping: a network reads the same bytes whether
//! its blocks stay or not. A thread of its own touches the next block's pages while one computes, so that the network
//! itself does not wait for the disk; a block that does not stay is dropped behind, from the system's cache too, so that
//! going round does not push out those that stay.
//!
//! On a card the same blocks are copied there from their files, through pinned memory and on a stream of the thread's
//! own. What is dropped behind is given back when the work that was begun with it is done, and the next copy waits for
//! that on its stream; so besides those that stay no more blocks are there than the one that computes and those that are
//! read ahead.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Duration,
};

use super::files::{Extent, Reading};

/// What tells the time: from some start on, and never back.
pub type Clock = fn() -> Duration;

/// How a network's blocks came and went, since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swapped {
    /// Blocks of the network.
    pub blocks: usize,
    /// Of these the last ones, which stay once they are there.
    pub resident: usize,
    /// How long passes waited for weights.
    pub waited: Duration,
    /// How much of the reading went by while another block computed.
    pub hidden: Duration,
    /// The most bytes of blocks that were there or on their way at once, since it was last said how many stay.
    pub held_bytes: u64,
}

/// A network's blocks, in the order in which a pass needs them.
pub struct Swap(Mutex<Inside>);

struct Inside {
    blocks: Arc<[Extent]>,
    places: Vec<Place>,
    reader: Option<Reader>,
    clock: Clock,
    /// Blocks that are read while another computes.
    ahead: usize,
    /// Bytes that are there or on their way.
    held: u64,
    reading: Duration,
    told: Swapped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Away,
    Coming,
    Here,
}

/// The thread that reads; it ends when this is gone.
struct Reader {
    orders: Sender<usize>,
    arrivals: Receiver<(usize, Duration)>,
}

impl Reader {
    /// Nothing where the system gives no thread: pages then come when they are touched.
    fn start(blocks: Arc<[Extent]>, clock: Clock) -> Option<Self> {
        let (orders, queue) = channel::<usize>();
        let (tell, arrivals) = channel();
        let read = move || {
            let mut reading = Reading::default();
            for block in queue {
                let began = clock();
                if let Some(extent) = blocks.get(block) {
                    extent.read(&mut reading);
                }
                if tell.send((block, clock().saturating_sub(began))).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("weights-ahead".to_owned()).spawn(read).ok()?;
        Some(Self { orders, arrivals })
    }
}

impl fmt::Debug for Swap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Swap({:?})", self.told())
    }
}

impl Swap {
    /// All blocks stay once they were read.
    pub(crate) fn new(blocks: Vec<Extent>) -> Self {
        let count = blocks.len();
        Self(Mutex::new(Inside {
            blocks: blocks.into(),
            places: vec![Place::Away; count],
            reader: None,
            clock: || Duration::ZERO,
            ahead: 1,
            held: 0,
            reading: Duration::ZERO,
            told: Swapped { blocks: count, resident: count, ..Swapped::default() },
        }))
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of each block.
    #[must_use]
    pub fn sizes(&self) -> Vec<u64> {
        self.inside().blocks.iter().map(Extent::bytes).collect()
    }

    /// Lets the last `resident` blocks stay and the others come and go, with a thread that reads ahead.
    pub fn keep(&self, resident: usize, clock: Clock) {
        let mut inside = self.inside();
        let resident = resident.min(inside.told.blocks);
        if inside.reader.is_none() {
            inside.clock = clock;
            inside.reader = Reader::start(inside.blocks.clone(), clock);
        } else if resident == inside.told.resident {
            return;
        }
        inside.told.resident = resident;
        for block in 0..inside.first_resident() {
            // What is on its way goes after its use.
            if inside.places.get(block) != Some(&Place::Coming) {
                inside.drop_behind(block);
            }
        }
        inside.told.held_bytes = inside.held;
    }

    /// Has the next `blocks` blocks read while one computes, of those that do not stay; one unless told otherwise. What
    /// more are on their way then still come.
    pub fn look_ahead(&self, blocks: usize) {
        self.inside().ahead = blocks;
    }

    /// Bytes of blocks that are there now or on their way.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.inside().held
    }

    /// What happened so far.
    #[must_use]
    pub fn told(&self) -> Swapped {
        self.inside().told
    }

    /// One pass through the blocks.
    pub(crate) fn pass(&self) -> Pass<'_> {
        Pass(self.inside())
    }
}

impl Inside {
    fn first_resident(&self) -> usize {
        self.told.blocks - self.told.resident
    }

    fn size(&self, block: usize) -> u64 {
        self.blocks.get(block).map_or(0, Extent::bytes)
    }

    fn drop_behind(&mut self, block: usize) {
        if let Some(extent) = self.blocks.get(block) {
            extent.forget();
        }
        if self.places.get(block) != Some(&Place::Away) {
            self.held = self.held.saturating_sub(self.size(block));
        }
        self.place(block, Place::Away);
    }

    fn place(&mut self, block: usize, place: Place) {
        if let Some(at) = self.places.get_mut(block) {
            *at = place;
        }
    }

    fn order(&mut self, block: usize) {
        if self.places.get(block) != Some(&Place::Away) {
            return;
        }
        self.held += self.size(block);
        self.told.held_bytes = self.told.held_bytes.max(self.held);
        let ordered = self.reader.as_ref().is_some_and(|reader| reader.orders.send(block).is_ok());
        self.place(block, if ordered { Place::Coming } else { Place::Here });
    }

    fn wait_for(&mut self, block: usize) {
        while self.places.get(block) == Some(&Place::Coming) {
            match self.reader.as_ref().map(|reader| reader.arrivals.recv()) {
                Some(Ok((arrived, took))) => {
                    self.place(arrived, Place::Here);
                    self.reading += took;
                }
                // The thread is gone; the pages come when they are touched.
                _ => self.place(block, Place::Here),
            }
        }
    }
}

/// A pass; nobody else uses the blocks meanwhile.
pub(crate) struct Pass<'a>(MutexGuard<'a, Inside>);

impl Pass<'_> {
    /// Waits until a block's weights are there, and has the next ones that are not read meanwhile. After the last block
    /// comes the first, for the next pass.
    pub(crate) fn enter(&mut self, block: usize) {
        let inside = &mut *self.0;
        inside.order(block);
        let began = (inside.clock)();
        inside.wait_for(block);
        inside.told.waited += (inside.clock)().saturating_sub(began);
        inside.told.hidden = inside.reading.saturating_sub(inside.told.waited);
        let count = inside.told.blocks;
        let mut coming = 0;
        for next in (1..count).map(|step| (block + step) % count) {
            if coming == inside.ahead {
                break;
            }
            // What stays and is there takes no room of those that come; what came ahead for a later pass does.
            if next < inside.first_resident() || inside.places.get(next) != Some(&Place::Here) {
                inside.order(next);
                coming += 1;
            }
        }
    }

    /// Drops a block that does not stay.
    pub(crate) fn leave(&mut self, block: usize) {
        if block < self.0.first_resident() {
            self.0.drop_behind(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::weights::Weights;

    fn blocks(folder: &std::path::Path, count: usize) -> Vec<Extent> {
        let value = |i: usize| Tensor::full(i as f32, (64, 1024), &Device::Cpu).unwrap();
        let tensors = (0..count).map(|i| (format!("blocks.{i}.weight"), value(i))).collect();
        candle_core::safetensors::save(&tensors, folder.join("w.safetensors")).unwrap();
        let weights = Weights::open(folder, DType::F32, &Device::Cpu).unwrap();
        (0..count).map(|i| weights.pp(format!("blocks.{i}")).extent()).collect()
    }

    fn run(swap: &Swap, passes: usize) -> Swapped {
        for _ in 0..passes {
            let mut pass = swap.pass();
            for block in 0..swap_blocks(&pass) {
                pass.enter(block);
                assert_eq!(pass.0.places[block], Place::Here);
                pass.leave(block);
            }
        }
        swap.told()
    }

    fn swap_blocks(pass: &Pass<'_>) -> usize {
        pass.0.told.blocks
    }

    #[test]
    fn blocks_that_do_not_stay_are_held_two_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let each = 64 * 1024 * 4;
        for (resident, held) in [(0, 2), (1, 3), (3, 5), (6, 6), (99, 6)] {
            let swap = Swap::new(blocks(folder.path(), 6));
            assert_eq!(swap.sizes(), [each; 6]);
            swap.keep(resident, || Duration::ZERO);
            let told = run(&swap, 3);
            assert_eq!((told.resident, told.held_bytes), (resident.min(6), held * each), "{resident}");
        }
    }

    #[test]
    fn as_many_blocks_come_ahead_as_are_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let each = 64 * 1024 * 4;
        for (resident, ahead, held) in [(0, 0, 1), (0, 2, 3), (2, 3, 6), (1, 0, 2), (0, 99, 6), (4, 2, 6)] {
            let swap = Swap::new(blocks(folder.path(), 6));
            swap.look_ahead(ahead);
            swap.keep(resident, || Duration::ZERO);
            assert_eq!(run(&swap, 3).held_bytes, held * each, "{resident} stay, {ahead} come ahead");
        }
    }

    /// A pass with kept features needs the last block alone, and what was read for the next full one waits meanwhile.
    #[test]
    fn passes_through_the_last_block_alone_do_not_gather_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let each = 64 * 1024 * 4;
        for (resident, ahead, held) in [(0, 1, 2), (0, 2, 3), (2, 1, 4)] {
            let swap = Swap::new(blocks(folder.path(), 6));
            swap.look_ahead(ahead);
            swap.keep(resident, || Duration::ZERO);
            run(&swap, 1);
            for _ in 0..9 {
                let mut pass = swap.pass();
                pass.enter(5);
                pass.leave(5);
            }
            assert_eq!(run(&swap, 1).held_bytes, held * each, "{resident} stay, {ahead} come ahead");
        }
    }

    #[test]
    fn fewer_blocks_can_come_ahead_from_the_next_pass_on() {
        let folder = tempfile::tempdir().unwrap();
        let swap = Swap::new(blocks(folder.path(), 6));
        swap.look_ahead(3);
        swap.keep(1, || Duration::ZERO);
        run(&swap, 2);
        swap.look_ahead(1);
        run(&swap, 2);
        assert_eq!(swap.pass().0.places.iter().filter(|p| **p != Place::Away).count(), 2);
    }

    #[test]
    fn what_stays_can_change_between_passes_and_one_block_needs_no_next() {
        let folder = tempfile::tempdir().unwrap();
        let swap = Swap::new(blocks(folder.path(), 4));
        run(&swap, 1);
        swap.keep(1, || Duration::ZERO);
        run(&swap, 2);
        assert_eq!(swap.pass().0.places.iter().filter(|p| **p != Place::Away).count(), 2);
        swap.keep(4, || Duration::ZERO);
        run(&swap, 1);
        assert_eq!(swap.held_bytes(), 4 * 64 * 1024 * 4);
        assert!(swap.pass().0.places.iter().all(|p| *p == Place::Here));
        let single = Swap::new(blocks(folder.path(), 1));
        single.keep(0, || Duration::ZERO);
        assert_eq!(run(&single, 2).resident, 0);
        assert_eq!(run(&Swap::new(Vec::new()), 1), Swapped::default());
    }
}
