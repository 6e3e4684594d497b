//! Watching generations.

use futures::{Stream, stream};
use proto::v1::{Generation, GenerationEvent};
use tokio::sync::watch;
use uuid::Uuid;

use super::{Store, life, lock};
use crate::fault::Fault;

/// Events that a watcher reads at a time.
const EVENTS_AT_ONCE: i64 = 64;

impl Store {
    /// A generation's events from number `from` (0 and 1 mean all) to the terminal one, as they happen.
    ///
    /// Errors: no generation has the id, or it is removed meanwhile.
    pub fn events(
        &self,
        id: Uuid,
        from: u64,
    ) -> impl Stream<Item = Result<GenerationEvent, Fault>> + Send + 'static + use<> {
        let bell = self.subscribe(id);
        let state = (self.clone(), bell, from.max(1), std::collections::VecDeque::new(), false);
        stream::unfold(state, move |(store, mut bell, mut next, mut ready, mut over)| async move {
            loop {
                if let Some(event) = ready.pop_front() {
                    return Some((event, (store, bell, next, ready, over)));
                }
                if over {
                    return None;
                }
                // Before looking: what happens in between makes `changed` return at once.
                bell.borrow_and_update();
                match store.look_apart(id, next).await {
                    Err(fault) => {
                        over = true;
                        ready.push_back(Err(fault));
                    }
                    Ok((events, ended)) => {
                        over = ended;
                        next += events.len() as u64;
                        ready.extend(events.into_iter().map(Ok));
                        if ready.is_empty() && !over {
                            let _ = tokio::time::timeout(store.look_pace(), bell.changed()).await;
                        }
                    }
                }
            }
        })
    }

    /// As [`look`](Self::look), in a task of its own. A stream whose reader takes nothing is not gone on with, wherever it
    /// stands; in the middle of a look it would keep a connection to the records from everybody.
    async fn look_apart(&self, id: Uuid, from: u64) -> Result<(Vec<GenerationEvent>, bool), Fault> {
        let store = self.clone();
        let looked = tokio::spawn(async move { store.look(id, from).await }).await;
        looked.unwrap_or_else(|error| Err(Fault::internal("the events cannot be read", &error)))
    }

    /// Events of a generation from a number on, and whether no more can come.
    pub(super) async fn look(&self, id: Uuid, from: u64) -> Result<(Vec<GenerationEvent>, bool), Fault> {
        let row = self.row(&id.to_string()).await?;
        let events = self.inner.ledger.events(id, from, EVENTS_AT_ONCE).await?;
        let read = from + events.len() as u64;
        Ok((events, life::is_terminal(row.generation.state()) && read > row.last_event))
    }

    fn subscribe(&self, id: Uuid) -> watch::Receiver<()> {
        lock(&self.inner.bells).entry(id).or_insert_with(|| watch::Sender::new(())).subscribe()
    }

    /// Tells those who watch that something has happened.
    pub(super) fn ring(&self, id: Uuid) {
        let mut bells = lock(&self.inner.bells);
        bells.retain(|_, bell| bell.receiver_count() > 0);
        if let Some(bell) = bells.get(&id) {
            bell.send_replace(());
        }
    }

    /// Waits until a generation has ended, and gives it.
    pub async fn wait_end(&self, id: Uuid) -> Result<Generation, Fault> {
        let mut bell = self.subscribe(id);
        loop {
            bell.borrow_and_update();
            let generation = self.row(&id.to_string()).await?.generation;
            if life::is_terminal(generation.state()) {
                return Ok(generation);
            }
            let _ = tokio::time::timeout(self.look_pace(), bell.changed()).await;
        }
    }
}
