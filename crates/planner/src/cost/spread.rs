//! The transformer's blocks over several devices: which are on which, so that as many as possible stay.

use std::ops::Range;

use super::cpu::resident_blocks;
use crate::table::Transformer;

/// Consecutive blocks on one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Which of the blocks, in the order in which a pass needs them.
    pub blocks: Range<usize>,
    /// Of these the last ones, which stay.
    pub resident: usize,
}

/// How good a division is so far: blocks that do not stay, and how full the fullest device is, in millionths.
type Cost = (usize, u64);

/// Divides blocks among devices, at least one for each as far as there are so many: as many as possible stay, and the
/// fullest device is as empty as possible. Nothing where a device has no room for any of its divisions.
///
/// - `blocks`: bytes of each, in the order in which a pass needs them
/// - `room`: bytes that a device has for some of the blocks, by its number; nothing where it cannot take them at all
#[must_use]
pub fn divide(blocks: &[u64], devices: usize, room: impl Fn(usize, Range<usize>) -> Option<u64>) -> Vec<Part> {
    let (count, devices) = (blocks.len(), devices.min(blocks.len()));
    let part = |device: usize, range: Range<usize>| -> Option<(Cost, usize)> {
        let here = blocks.get(range.clone())?;
        let room = room(device, range)?;
        let resident = resident_blocks(here, room);
        let bytes = here.iter().map(|bytes| u128::from(*bytes)).sum::<u128>();
        let full = u64::try_from(bytes * 1_000_000 / u128::from(room.max(1))).unwrap_or(u64::MAX);
        Some(((here.len() - resident, full), resident))
    };
    // Of the first blocks, up to each number, over the first devices: the best cost, and where the last part begins.
    let mut best: Vec<Vec<Option<(Cost, usize)>>> = Vec::new();
    for device in 0..devices {
        let row = (0..=count).map(|end| {
            let before = |begin: usize| match device.checked_sub(1).and_then(|device| best.get(device)) {
                None => (begin == 0).then_some((0, 0)),
                Some(row) => row.get(begin).copied().flatten().map(|(cost, _)| cost),
            };
            let whole = |begin: usize| {
                let ((away, full), (cost, _)) = (before(begin)?, part(device, begin..end)?);
                Some(((away + cost.0, full.max(cost.1)), begin))
            };
            // Of the last device all blocks' end alone counts.
            let counts = device + 1 < devices || end == count;
            (device..end).filter(|_| counts).filter_map(whole).min()
        });
        let row = row.collect();
        best.push(row);
    }
    let mut parts = Vec::new();
    let mut end = count;
    for device in (0..devices).rev() {
        let found = best.get(device).and_then(|row| row.get(end).copied().flatten());
        let Some((begin, resident)) = found.and_then(|(_, begin)| Some((begin, part(device, begin..end)?.1))) else {
            return Vec::new();
        };
        parts.push(Part { blocks: begin..end, resident });
        end = begin;
    }
    parts.reverse();
    parts
}

/// How many audio adapters follow the double blocks among some blocks: every second one has one, from the second on, or
/// where a checkpoint has them elsewhere, at most so many.
#[must_use]
pub fn adapters(t: &Transformer, blocks: &Range<usize>) -> u64 {
    let [begin, end] = [blocks.start, blocks.end].map(|block| (block as u64).min(t.double));
    // Where they are elsewhere, each of the blocks may have one.
    let most = if t.adapters == t.double / 2 { end / 2 - begin / 2 } else { end - begin };
    most.min(t.adapters)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn counts(parts: &[Part]) -> Vec<(usize, usize)> {
        parts.iter().map(|part| (part.blocks.len(), part.resident)).collect()
    }

    #[test]
    fn blocks_go_where_there_is_room_and_all_stay_if_they_can() {
        let rooms = |rooms: &'static [u64]| move |device: usize, _: Range<usize>| rooms.get(device).copied();
        assert_eq!(counts(&divide(&[10; 6], 2, rooms(&[30, 30]))), [(3, 3), (3, 3)]);
        assert_eq!(counts(&divide(&[10; 6], 2, rooms(&[20, 40]))), [(2, 2), (4, 4)]);
        assert_eq!(counts(&divide(&[10; 6], 3, rooms(&[10, 40, 10]))), [(1, 1), (4, 4), (1, 1)]);
        // The emptier, the better.
        assert_eq!(counts(&divide(&[10; 6], 2, rooms(&[100, 200]))), [(2, 2), (4, 4)]);
        // Two are on their way where not all stay.
        assert_eq!(counts(&divide(&[10; 6], 2, rooms(&[20, 30]))), [(2, 2), (4, 1)]);
        assert_eq!(counts(&divide(&[10; 2], 3, rooms(&[20, 30, 40]))), [(1, 1), (1, 1)]);
        assert!(divide(&[10; 6], 2, |device, _| (device == 0).then_some(100)).is_empty());
    }

    #[test]
    fn adapters_follow_every_second_double_block() {
        let t = Transformer { double: 5, adapters: 2, ..crate::ModelTable::published().unwrap().transformer };
        assert_eq!([0..1, 1..2, 0..2, 2..9, 4..9, 0..9].map(|blocks| adapters(&t, &blocks)), [0, 1, 1, 1, 0, 2]);
        let t = Transformer { adapters: 1, ..t };
        assert_eq!([0..1, 0..5, 5..9].map(|blocks| adapters(&t, &blocks)), [1, 1, 0]);
    }

    proptest! {
        #[test]
        fn more_room_never_keeps_fewer_blocks(
            blocks in prop::collection::vec(1u64..50, 2..12),
            rooms in prop::collection::vec(0u64..300, 1..4),
            (which, more) in (0usize..3, 0u64..200),
        ) {
            let staying = |rooms: &[u64]| -> usize {
                let parts = divide(&blocks, rooms.len(), |device, _| rooms.get(device).copied());
                assert_eq!(parts.iter().map(|part| part.blocks.len()).sum::<usize>(), blocks.len());
                parts.iter().map(|part| part.resident).sum()
            };
            let mut larger = rooms.clone();
            if let Some(room) = larger.get_mut(which) {
                *room += more;
            }
            prop_assert!(staying(&larger) >= staying(&rooms));
        }
    }
}
