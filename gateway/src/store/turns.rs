//! Whose turn it is.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use uuid::Uuid;

/// A generation that nobody drives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Waiting {
    /// The generation; ids grow with the time of creation.
    pub(crate) id: Uuid,
    /// Who asked for it.
    pub(crate) caller: String,
    /// Higher ones come first.
    pub(crate) priority: i64,
    /// It ran before, in a process that has ended.
    pub(crate) begun: bool,
}

/// A generation that somebody drives.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Running {
    /// Who asked for it.
    pub(crate) caller: String,
    /// Seconds that are left of it by its own pace, where that is known.
    pub(crate) left_seconds: Option<f64>,
}

/// All that has not ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Queue {
    /// What waits, in the order in which it is begun.
    pub(crate) waiting: Vec<Waiting>,
    /// What runs.
    pub(crate) running: Vec<Running>,
}

impl Queue {
    /// Seconds until one of the generations ends, of `caller` alone if one is given: by the pace of those that run, and
    /// of those that wait by what each of the last ones took, of which `workers` run at once. Nothing where neither is
    /// known.
    pub(crate) fn seconds_until_room(&self, caller: Option<&str>, workers: usize, each: Option<f64>) -> Option<f64> {
        let own = |one: &str| caller.is_none_or(|caller| caller == one);
        // Of several that all take as long, one ends in a part of that time.
        let unknown = each.map(|each| if caller.is_some() { each } else { each / workers.max(1) as f64 });
        let running = self.running.iter().filter(|one| own(&one.caller));
        let soonest = running.filter_map(|one| one.left_seconds.or(unknown)).min_by(f64::total_cmp);
        if soonest.is_some() {
            return soonest;
        }
        let (place, each) = (self.waiting.iter().position(|one| own(&one.caller))? + 1, each?);
        let left: Vec<f64> = self.running.iter().map(|one| one.left_seconds.unwrap_or(each)).collect();
        Some(seconds_until(place, &left, workers, each) + each)
    }
}

/// How long something waits until it counts as of the next higher priority, so that whoever asks for higher ones again
/// and again keeps nobody waiting for ever.
const RISE_MS: u64 = 600_000;

impl Waiting {
    /// The priority that it has come to by now.
    fn level(&self, now_ms: u64) -> i64 {
        // An id begins with the milliseconds of its time.
        let since_ms = (self.id.as_u128() >> 80) as u64;
        self.priority + (now_ms.saturating_sub(since_ms) / RISE_MS) as i64
    }
}

/// Puts what waits into the order in which it is begun.
///
/// First comes what ran before. Then higher priorities come before lower ones, each raised by one for every ten minutes
/// of waiting; within one, callers take turns, beginning with the one who had the last turn longest ago; of a caller, the
/// oldest comes first. `served` has the number of each caller's last turn, counted over all callers; who is not in it had
/// none.
pub(crate) fn in_turn(mut waiting: Vec<Waiting>, served: &HashMap<String, i64>, now_ms: u64) -> Vec<Waiting> {
    waiting.sort_by_key(|one| one.id);
    let (mut order, fresh): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|one| one.begun);
    let mut by_priority: BTreeMap<i64, HashMap<String, VecDeque<Waiting>>> = BTreeMap::new();
    for one in fresh {
        by_priority.entry(one.level(now_ms)).or_default().entry(one.caller.clone()).or_default().push_back(one);
    }
    let mut served = served.clone();
    let mut turn = served.values().copied().max().unwrap_or(0);
    for (_, mut callers) in by_priority.into_iter().rev() {
        let place = |caller: &String, queue: &VecDeque<Waiting>, served: &HashMap<String, i64>| {
            let first = queue.front()?.id;
            Some((served.get(caller).copied().unwrap_or(0), first, caller.clone()))
        };
        let mut next: BTreeSet<_> =
            callers.iter().filter_map(|(caller, queue)| place(caller, queue, &served)).collect();
        while let Some((_, _, caller)) = next.pop_first() {
            let Some(queue) = callers.get_mut(&caller) else { continue };
            order.extend(queue.pop_front());
            turn += 1;
            served.insert(caller.clone(), turn);
            next.extend(place(&caller, queue, &served));
        }
    }
    order
}

/// Seconds until the one at `position` (1 is the next) begins, where each takes `each_seconds`, and what runs has
/// these seconds left; no more than `workers` run at once.
pub(crate) fn seconds_until(position: usize, running: &[f64], workers: usize, each_seconds: f64) -> f64 {
    let mut free: Vec<f64> = running.iter().copied().chain(std::iter::repeat(0.0)).take(workers.max(1)).collect();
    let mut begins = 0.0;
    for _ in 0..position {
        free.sort_by(f64::total_cmp);
        let Some(first) = free.first_mut() else { break };
        begins = *first;
        *first += each_seconds;
    }
    begins
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(number: u128, caller: &str, priority: i64) -> Waiting {
        Waiting { id: Uuid::from_u128(number), caller: caller.into(), priority, begun: false }
    }

    fn numbers(order: &[Waiting]) -> Vec<u128> {
        order.iter().map(|one| one.id.as_u128()).collect()
    }

    #[test]
    fn callers_take_turns_and_the_oldest_of_each_comes_first() {
        let waiting = vec![of(1, "a", 0), of(2, "a", 0), of(3, "a", 0), of(4, "b", 0), of(5, "c", 0), of(6, "b", 0)];
        assert_eq!(numbers(&in_turn(waiting.clone(), &HashMap::new(), 0)), [1, 4, 5, 2, 6, 3]);
        let served = HashMap::from([("a".to_owned(), 9), ("b".to_owned(), 3)]);
        assert_eq!(numbers(&in_turn(waiting, &served, 0)), [5, 4, 1, 6, 2, 3]);
    }

    #[test]
    fn what_ran_before_comes_first_and_then_the_higher_priority() {
        let begun = Waiting { begun: true, ..of(9, "a", -5) };
        let waiting = vec![of(1, "a", 0), of(2, "b", 3), of(3, "a", 3), begun];
        assert_eq!(numbers(&in_turn(waiting, &HashMap::new(), 0)), [9, 2, 3, 1]);
    }

    /// One caller hands in something of the highest priority each minute, and there is room for one a minute.
    #[test]
    fn whoever_asks_for_the_highest_priority_without_end_keeps_nobody_waiting_for_ever() {
        let created = |minute: u64, caller: &str, priority| Waiting {
            id: Uuid::from_u128(u128::from(minute * 60_000) << 80),
            caller: caller.into(),
            priority,
            begun: false,
        };
        let (mut waiting, mut served) = (vec![created(0, "patient", -9)], HashMap::new());
        let began = (1..).find(|&minute| {
            waiting.push(created(minute, "greedy", 9));
            let order = in_turn(waiting.clone(), &served, minute * 60_000);
            waiting = order[1..].to_vec();
            served.insert(order[0].caller.clone(), minute as i64);
            order[0].caller == "patient"
        });
        assert_eq!(began, Some(180), "18 levels");
    }

    #[test]
    fn the_time_until_the_start_is_that_of_the_worker_that_is_free_first() {
        assert_eq!(seconds_until(1, &[], 2, 60.0), 0.0);
        assert_eq!(seconds_until(1, &[30.0, 10.0], 2, 60.0), 10.0);
        assert_eq!(seconds_until(2, &[30.0, 10.0], 2, 60.0), 30.0);
        assert_eq!(seconds_until(3, &[30.0, 10.0], 2, 60.0), 70.0);
        assert_eq!(seconds_until(2, &[], 1, 60.0), 60.0);
    }

    #[test]
    fn room_comes_with_the_end_that_is_foreseen_first() {
        let running = |caller: &str, left_seconds| Running { caller: caller.into(), left_seconds };
        let queue = Queue {
            waiting: vec![of(1, "c", 0), of(2, "d", 0)],
            running: vec![running("a", Some(3000.0)), running("b", None)],
        };
        assert_eq!(queue.seconds_until_room(None, 2, None), Some(3000.0));
        assert_eq!(queue.seconds_until_room(None, 2, Some(60.0)), Some(30.0), "b is like those before it");
        assert_eq!(queue.seconds_until_room(Some("a"), 2, Some(60.0)), Some(3000.0));
        assert_eq!(queue.seconds_until_room(Some("b"), 2, Some(60.0)), Some(60.0));
        assert_eq!(queue.seconds_until_room(Some("d"), 2, Some(60.0)), Some(60.0 + 60.0 + 60.0), "after b and c");
        assert_eq!(queue.seconds_until_room(Some("d"), 2, None), None);
        let empty = Queue { waiting: Vec::new(), running: Vec::new() };
        assert_eq!(empty.seconds_until_room(None, 2, Some(60.0)), None);
    }

    proptest! {
        /// No caller waits for more than one generation of each other one, however many those have asked for.
        #[test]
        fn nobody_is_starved(callers in prop::collection::vec(0_u8..5, 1..60)) {
            let waiting: Vec<_> = callers.iter().zip(1..).map(|(who, n)| of(n, &who.to_string(), 0)).collect();
            let order = in_turn(waiting.clone(), &HashMap::new(), 0);
            let mut sorted = numbers(&order);
            sorted.sort_unstable();
            prop_assert_eq!(sorted, numbers(&waiting));
            for who in 0_u8..5 {
                let places: Vec<_> =
                    order.iter().enumerate().filter(|(_, one)| one.caller == who.to_string()).map(|(i, _)| i).collect();
                prop_assert!(places.first().is_none_or(|first| *first < 5));
                prop_assert!(places.windows(2).all(|pair| pair[1] - pair[0] <= 5));
            }
        }
    }
}
