//! One generation: its state and its events.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use futures::{Stream, stream};
use proto::v1::{FaceBox, Generation, GenerationEvent, GenerationState, Outcome, Progress, Stage};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::fault::Fault;

/// Something that happened; what is left `None` stays as it was.
#[derive(Debug, Clone, Default)]
pub struct Change {
    /// The new state.
    pub state: Option<GenerationState>,
    /// How far it is now.
    pub progress: Option<Progress>,
    /// The stage that began or ended.
    pub stage: Stage,
    /// A sentence for people.
    pub message: String,
    /// The sentence is a warning.
    pub warning: bool,
    /// Faces that were found, or the one that was given.
    pub faces: Vec<FaceBox>,
    /// The face that is animated.
    pub face: Option<FaceBox>,
    /// Why it failed.
    pub fault: Option<Fault>,
    /// What came out.
    pub outcome: Option<Outcome>,
}

impl Change {
    /// The end of a generation that its caller stopped.
    #[must_use]
    pub fn cancelled(message: &str) -> Self {
        Self { state: Some(GenerationState::Cancelled), message: message.into(), ..Self::default() }
    }
}

#[derive(Debug)]
struct Inside {
    generation: Generation,
    events: Vec<GenerationEvent>,
    fault: Option<Fault>,
}

/// One generation, shared by the one that drives it and those that look on.
#[derive(Debug)]
pub struct Record {
    id: Uuid,
    inside: Mutex<Inside>,
    /// Number of the last event.
    last: watch::Sender<u64>,
    cancel: CancellationToken,
    removed: AtomicBool,
}

impl Record {
    /// A new queued generation; `generation` says what is made. Its id, state and times are set here.
    #[must_use]
    pub fn new(generation: Generation) -> Self {
        let id = Uuid::now_v7();
        let generation = Generation {
            generation_id: id.to_string(),
            state: GenerationState::Queued.into(),
            created_unix_ms: unix_ms(),
            ended_unix_ms: 0,
            ..generation
        };
        let record = Self {
            id,
            inside: Mutex::new(Inside { generation, events: Vec::new(), fault: None }),
            last: watch::Sender::new(0),
            cancel: CancellationToken::new(),
            removed: AtomicBool::new(false),
        };
        record.publish(Change { state: Some(GenerationState::Queued), ..Change::default() });
        record
    }

    /// The id.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Stops the generation when cancelled.
    #[must_use]
    pub fn cancel_token(&self) -> &CancellationToken {
        &self.cancel
    }

    /// Says that the generation is no longer kept, so that its video is not either.
    pub fn mark_removed(&self) {
        self.removed.store(true, Ordering::SeqCst);
    }

    /// Whether it is no longer kept.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::SeqCst)
    }

    /// The generation as it stands.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.lock().generation.clone()
    }

    /// Whether it is completed, failed or cancelled.
    #[must_use]
    pub fn ended(&self) -> bool {
        is_terminal(self.lock().generation.state())
    }

    /// Why it failed, with all violations; none unless it failed.
    #[must_use]
    pub fn fault(&self) -> Option<Fault> {
        self.lock().fault.clone()
    }

    /// Whether its video is there.
    #[must_use]
    pub fn completed(&self) -> bool {
        self.lock().generation.state() == GenerationState::Completed
    }

    /// Records a change and tells those who watch. After the end nothing changes any more.
    pub fn publish(&self, change: Change) {
        let number = {
            let mut inside = self.lock();
            if is_terminal(inside.generation.state()) {
                return;
            }
            let unix_ms = unix_ms();
            let generation = &mut inside.generation;
            if let Some(state) = change.state {
                generation.state = state.into();
                if is_terminal(state) {
                    generation.ended_unix_ms = unix_ms;
                }
            }
            if change.progress.is_some() {
                generation.progress = change.progress;
            }
            let failure = change.fault.as_ref().map(Fault::to_failure);
            generation.failure.clone_from(&failure);
            generation.outcome.clone_from(&change.outcome);
            let number = inside.events.len() as u64 + 1;
            let event = GenerationEvent {
                generation_id: self.id.to_string(),
                number,
                unix_ms,
                state: inside.generation.state,
                progress: inside.generation.progress,
                stage: change.stage.into(),
                message: change.message,
                failure,
                outcome: change.outcome,
                warning: change.warning,
                faces: change.faces,
                face: change.face,
            };
            inside.events.push(event);
            inside.fault = change.fault;
            number
        };
        self.last.send_replace(number);
    }

    /// Waits until the generation has ended.
    pub async fn wait_end(&self) {
        let mut last = self.last.subscribe();
        while !self.ended() {
            if last.changed().await.is_err() {
                return;
            }
        }
    }

    /// Events from number `from` (0 and 1 mean all) to the terminal one, as they happen.
    pub fn events(self: Arc<Self>, from: u64) -> impl Stream<Item = GenerationEvent> + Send + 'static {
        let last = self.last.subscribe();
        stream::unfold((self, last, from.max(1)), |(record, mut last, number)| async move {
            loop {
                // Read before looking: an event that comes in between makes `changed` return at once.
                last.borrow_and_update();
                let (event, ended) = record.event(number);
                if let Some(event) = event {
                    return Some((event, (record, last, number + 1)));
                }
                if ended || last.changed().await.is_err() {
                    return None;
                }
            }
        })
    }

    /// The event with a number, and whether the generation has ended.
    fn event(&self, number: u64) -> (Option<GenerationEvent>, bool) {
        let inside = self.lock();
        let index = usize::try_from(number.saturating_sub(1)).unwrap_or(usize::MAX);
        (inside.events.get(index).cloned(), is_terminal(inside.generation.state()))
    }

    /// A holder never leaves the record half changed, so it is sound even after a panic of one.
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a generation in this state has ended.
#[must_use]
pub fn is_terminal(state: GenerationState) -> bool {
    match state {
        GenerationState::Completed | GenerationState::Failed | GenerationState::Cancelled => true,
        GenerationState::Unspecified
        | GenerationState::Queued
        | GenerationState::Encoding
        | GenerationState::Denoising
        | GenerationState::Decoding => false,
    }
}

/// Milliseconds since 1970.
#[must_use]
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;

    use super::*;

    fn change(state: GenerationState) -> Change {
        Change { state: Some(state), ..Change::default() }
    }

    #[tokio::test]
    async fn events_are_numbered_from_one_without_gaps_and_end_with_the_terminal_one() {
        let record = Arc::new(Record::new(Generation::default()));
        let watcher = tokio::spawn(Arc::clone(&record).events(0).collect::<Vec<_>>());
        for state in [GenerationState::Encoding, GenerationState::Denoising, GenerationState::Completed] {
            tokio::task::yield_now().await;
            record.publish(change(state));
        }
        record.publish(change(GenerationState::Failed));
        let events = watcher.await.unwrap();
        assert_eq!(events.iter().map(|e| e.number).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert_eq!(events.last().unwrap().state(), GenerationState::Completed);
        assert_eq!(record.generation().state(), GenerationState::Completed);
        assert!(record.generation().ended_unix_ms > 0);
    }

    #[tokio::test]
    async fn a_watcher_that_comes_back_gets_the_rest_only() {
        let record = Arc::new(Record::new(Generation::default()));
        record.publish(change(GenerationState::Encoding));
        record.publish(change(GenerationState::Cancelled));
        let numbers = |from| Arc::clone(&record).events(from).map(|e| e.number).collect::<Vec<_>>();
        assert_eq!(numbers(1).await, [1, 2, 3]);
        assert_eq!(numbers(3).await, [3]);
        assert!(numbers(4).await.is_empty());
        assert!(numbers(u64::MAX).await.is_empty());
    }
}
