//! Waiting for a stage that does not answer, or has no room.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    fault::{Fault, Kind, stage_name},
    store::{Change, Lease},
};

/// Waits between attempts while a stage cannot be reached; the last one is repeated.
const BACKOFF_MS: [u64; 6] = [100, 250, 500, 1000, 2000, 4000];
/// Longest wait that a full stage can ask for.
const BUSY_WAIT: Duration = Duration::from_secs(30);
/// After how long it is said that a stage has no room.
const BUSY_SAID: Duration = Duration::from_secs(10);

/// How a generation's calls to its stages are repeated.
#[derive(Debug, Clone)]
pub(crate) struct Patience {
    lease: Arc<Lease>,
    /// How long a stage may stay away.
    limit: Duration,
    /// Milliseconds that were waited before calls were made again.
    waited_ms: Arc<AtomicU64>,
}

impl Patience {
    /// Waits up to `limit` for a stage, and says so in the generation's events.
    pub(crate) fn new(lease: Arc<Lease>, limit: Duration) -> Self {
        Self { lease, limit, waited_ms: Arc::default() }
    }

    /// How long was waited before calls were made again, the wait that goes on now in full.
    pub(crate) fn waited(&self) -> Duration {
        Duration::from_millis(self.waited_ms.load(Relaxed))
    }

    /// Repeats a call while its stage cannot be reached, up to the limit, or while it has no room.
    ///
    /// Room comes when another generation ends or goes on, however long that takes; a caller who does not want to wait
    /// cancels.
    pub(crate) async fn call<T, F>(&self, mut call: impl FnMut() -> F) -> Result<T, Fault>
    where
        F: Future<Output = Result<T, Fault>>,
    {
        let (mut lost, mut since, mut full_since, mut said) = (0, None, None, false);
        loop {
            let fault = match call().await {
                Ok(value) => return Ok(value),
                Err(fault) => fault,
            };
            let wait = match fault.kind {
                Kind::Unavailable => {
                    let away = since.get_or_insert_with(Instant::now).elapsed();
                    let wait = Duration::from_millis(BACKOFF_MS[lost.min(BACKOFF_MS.len() - 1)]);
                    if away + wait > self.limit {
                        return Err(self.given_up(fault));
                    }
                    if lost == 0 {
                        self.say(&fault, format!("does not answer; it is waited for up to {} s", self.limit.as_secs()))
                            .await;
                    }
                    lost += 1;
                    wait
                }
                Kind::Busy { retry_after } => {
                    // It answers, so the time that it may stay away begins anew.
                    (lost, since) = (0, None);
                    if !said && full_since.get_or_insert_with(Instant::now).elapsed() > BUSY_SAID {
                        said = true;
                        self.say(&fault, "has no room yet; it is waited for".into()).await;
                    }
                    retry_after.clamp(Duration::from_millis(10), BUSY_WAIT)
                }
                _ => return Err(fault),
            };
            tracing::warn!(%fault, wait_ms = wait.as_millis() as u64, "a stage did not take a call; it is tried again");
            self.waited_ms.fetch_add(wait.as_millis() as u64, Relaxed);
            tokio::time::sleep(wait).await;
        }
    }

    /// Says something of the stage that a fault came from.
    pub(crate) async fn say(&self, fault: &Fault, what: String) {
        let message = format!("{} {what}", stage_name(fault.stage));
        self.lease.publish(Change { stage: fault.stage, message, ..Change::default() }).await;
    }

    fn given_up(&self, fault: Fault) -> Fault {
        let message = format!("{}; the stage was waited for {} s", fault.message, self.limit.as_secs());
        Fault { message, ..fault }
    }
}
