//! How a network asks whether it may go on.
//!
//! Whoever runs a network may watch it: every layer asks before it allocates its result, with the bytes that it is
//! about to hold, and ends with an error after a no. So a network stops within one layer, and passes a limit of
//! memory by no more than what stands between two layers.

use std::{cell::RefCell, rc::Rc};

use candle_core::{DType, Result};

#[derive(Clone)]
struct Watch {
    allows: Rc<dyn Fn(u64) -> bool>,
    moves: Rc<dyn Fn(usize, u64)>,
}

thread_local! {
    /// A network is run by one thread, which the layers' own threads only help; so the watch is that thread's.
    static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) };
}

/// Runs `work`; its layers ask `allows`, on this thread, before they hold so many bytes more.
///
/// Within `work`, another watch takes this one's place.
pub fn watched<R>(allows: impl Fn(u64) -> bool + 'static, work: impl FnOnce() -> R) -> R {
    watched_over(allows, |_, _| (), work)
}

/// As [`watched`], of a network that is spread over several devices. `moves` is told which part works from now on, and
/// of how many bytes the tensors are that go to its device; at first it is part 0.
pub fn watched_over<R>(
    allows: impl Fn(u64) -> bool + 'static,
    moves: impl Fn(usize, u64) + 'static,
    work: impl FnOnce() -> R,
) -> R {
    /// Puts the earlier watch back, also after a panic.
    struct Before(Option<Watch>);

    impl Drop for Before {
        fn drop(&mut self) {
            WATCH.set(self.0.take());
        }
    }

    let watch = Watch { allows: Rc::new(allows), moves: Rc::new(moves) };
    let _before = Before(WATCH.replace(Some(watch)));
    work()
}

/// Says that the network goes on in another of its parts, with tensors of so many bytes.
pub(crate) fn moved(part: usize, bytes: usize) {
    if let Some(watch) = WATCH.with_borrow(Option::clone) {
        (watch.moves)(part, bytes as u64);
    }
}

/// Asks whether `bytes` more may be held.
///
/// Errors: they may not, or the work is not wanted any more.
pub(crate) fn room(bytes: usize) -> Result<()> {
    let watch = WATCH.with_borrow(Option::clone);
    match watch {
        Some(watch) if !(watch.allows)(bytes as u64) => {
            Err(candle_core::Error::Msg(format!("stopped before {bytes} more bytes were held")))
        }
        _ => Ok(()),
    }
}

/// Asks for an operation with an output of `values` values of type `dtype`, and inputs of `inputs` values that it
/// widens where they are of 16 bits.
pub(crate) fn room_for(dtype: DType, inputs: usize, values: usize) -> Result<()> {
    // The result exists in both types for a moment.
    let both = if dtype == DType::F32 { values } else { values.saturating_add(values / 2).saturating_add(inputs) };
    room(both.saturating_mul(size_of::<f32>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_watch_everything_is_allowed() {
        assert!(room(usize::MAX).is_ok());
    }

    #[test]
    fn a_watch_holds_for_its_work_and_gives_way_to_one_within() {
        watched(
            |bytes| bytes <= 10,
            || {
                assert!(room(10).is_ok() && room(11).is_err());
                watched(|_| false, || assert!(room(0).is_err()));
                assert!(room(10).is_ok());
            },
        );
        let panicked = std::panic::catch_unwind(|| watched(|_| false, || panic!("boom")));
        assert!(panicked.is_err() && room(1).is_ok());
    }
}
