//! What the gateway keeps: a record for each generation with its events, and files by their content.
//!
//! All of it outlives the process. A change is on the disk before anyone is told of it. Several processes may share the
//! records and the files; a generation is driven by the one that holds its lease.

pub mod artifacts;
mod engine;
mod lease;
mod ledger;
pub mod life;
mod postgres;
mod retention;
mod schema;
mod sqlite;
#[cfg(test)]
mod tests;
mod turns;
mod webhooks;

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures::{Stream, stream};
use proto::v1::{Generation, GenerationEvent, GenerationState};
use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::{
    artifacts::{Artifact, ArtifactError, Artifacts, Bucket, Content, Folder, make_folders, place::Place, sha256},
    engine::{Engine, Hold, SqlError},
    ledger::{Inserted, Ledger, NewRow, Page, Row},
    postgres::Postgres,
    sqlite::Sqlite,
};
use crate::{
    fault::{Fault, Kind},
    intake::Order,
};

use lease::patiently;
pub(crate) use lease::{Change, Lease, Resume};
pub use postgres::Database;
pub use retention::{ByEnd, Retention};
pub(crate) use turns::seconds_until;
pub(crate) use webhooks::Due;

/// Files of a generation.
pub(crate) mod role {
    /// The picture as it came.
    pub(crate) const PICTURE: &str = "picture";
    /// The recording as it came.
    pub(crate) const AUDIO: &str = "audio";
    /// The latents before the step that it can be gone on with.
    pub(crate) const LATENTS: &str = "latents";
    /// The finished video.
    pub(crate) const VIDEO: &str = "video";
    /// The preview after a step.
    pub(crate) fn preview(step: u32) -> String {
        format!("preview-{step}")
    }
    /// What the encoders gave.
    pub(crate) const FEATURES: &str = "features";
    /// What the encoders gave.
    pub(crate) const TEXT_STATES: &str = "text-states";
    /// What the encoders gave.
    pub(crate) const REFERENCE: &str = "reference";
    /// All that a generation works with, without what came out.
    pub(crate) const MATERIAL: [&str; 6] = [PICTURE, AUDIO, LATENTS, FEATURES, TEXT_STATES, REFERENCE];
}

/// Signs of life that the holder of a lease gives while it lasts.
const BEATS: u32 = 3;
/// How often a watcher looks for itself, besides being told; by other processes it is not told.
const LOOK: Duration = Duration::from_secs(5);
const LOOK_SHARED: Duration = Duration::from_secs(1);
/// Events that a watcher reads at a time.
const EVENTS_AT_ONCE: i64 = 64;
/// How long the removal of a file may take: less than others are kept from naming one with the same content.
const REMOVAL: Duration = Duration::from_secs(30);
/// How long a caller who cancels is kept waiting for the end.
const CANCEL_TIME: Duration = Duration::from_secs(10);

/// The data folder or the database cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {reason}")]
pub struct StoreError {
    place: String,
    reason: String,
}

impl StoreError {
    fn of_folder(dir: &Path, reason: impl ToString) -> Self {
        Self { place: format!("the data folder {}", dir.display()), reason: reason.to_string() }
    }
}

/// A request whose files are read and whose values are settled.
#[derive(Debug)]
pub(crate) struct Accepted {
    /// What is made; id, state and times are set by the store.
    pub(crate) generation: Generation,
    /// The picture's file.
    pub(crate) picture: Vec<u8>,
    /// The recording's file.
    pub(crate) audio: Vec<u8>,
    /// How it is to be served.
    pub(crate) order: Order,
    /// Hash of what was asked for, as it was asked.
    pub(crate) request_hash: String,
    /// It belongs to a call: it does not outlive this process.
    pub(crate) attached: bool,
}

/// Which generations a caller wants to see.
#[derive(Debug, Clone, Default)]
pub(crate) struct Listing {
    /// Only those in one of these states; empty for all.
    pub(crate) states: Vec<GenerationState>,
    /// Only those of this caller; empty for all.
    pub(crate) caller: String,
    /// Only those with this label; empty for all.
    pub(crate) label: String,
    /// Only those created from this time on.
    pub(crate) created_from_ms: u64,
    /// Only those created before this time; 0 for no limit.
    pub(crate) created_before_ms: u64,
    /// The oldest first.
    pub(crate) oldest_first: bool,
    /// Only those behind this one.
    pub(crate) after: Option<Uuid>,
    /// How many at most.
    pub(crate) limit: usize,
}

/// Where records and files are, and who may go on with what another process had begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Records {
    /// The database; without it a file in the data folder, which no other process uses.
    pub database: Option<Database>,
    /// The bucket of the files; without it a folder in the data folder.
    pub artifacts: Option<Place>,
    /// How long after its last sign of life a process is taken for ended.
    pub lease: Duration,
}

impl Default for Records {
    fn default() -> Self {
        Self { database: None, artifacts: None, lease: Duration::from_secs(15) }
    }
}

/// All generations. Clones are the same store.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    ledger: Ledger,
    artifacts: Artifacts,
    /// Where files are made that are not whole yet; goes with the process.
    work: TempDir,
    /// This process's name among those that use the records.
    replica: String,
    /// How long a lease lasts after its holder's last sign of life.
    lease: Duration,
    /// Rings when there may be something to run.
    arrivals: Notify,
    /// Rings when a generation has ended.
    ends: Notify,
    /// Generations that run in this process, and how to stop them.
    running: Mutex<HashMap<Uuid, CancellationToken>>,
    /// Hashes of files that nobody needs and that an object store did not remove when it should have.
    leftovers: Mutex<HashSet<String>>,
    /// Rings for those who watch a generation.
    bells: Mutex<HashMap<Uuid, watch::Sender<()>>>,
    /// Locked as long as this process uses the folder, and its folder for work.
    _locks: [fs::File; 2],
}

impl Store {
    /// Opens the store on a folder, made if missing.
    ///
    /// Generations that belonged to a call of an ended process are removed; all others that had not ended can be
    /// taken again.
    ///
    /// Errors: the folder cannot be written, another process uses it that does not share the records, the database or
    /// the object store does not answer, or a newer program made its records.
    pub async fn open(dir: &Path, records: &Records) -> Result<Self, StoreError> {
        make_folders(dir).map_err(|error| StoreError::of_folder(dir, error))?;
        let lock = lock_folder(dir, records.database.is_some()).map_err(|error| StoreError::of_folder(dir, error))?;
        let (place, opened) = match &records.database {
            None => {
                let file = dir.join("avatar.db");
                let opened = Sqlite::open(&file).await.map(|engine| Arc::new(engine) as Arc<dyn Engine>);
                (format!("the records {}", file.display()), opened)
            }
            Some(database) => {
                let opened = Postgres::open(database).await.map(|engine| Arc::new(engine) as Arc<dyn Engine>);
                (format!("the database {database}"), opened)
            }
        };
        let refused = |reason: String| StoreError { place: place.clone(), reason };
        let engine = opened.map_err(|error| refused(error.to_string()))?;
        schema::migrate(&*engine).await.map_err(|error| refused(error.to_string()))?;
        let bucket = records.artifacts.as_ref().map(|place| {
            let refused = |reason| StoreError { place: format!("the files {place}"), reason };
            place.open().map_err(refused)
        });
        Self::with(dir, lock, engine, bucket.transpose()?, records.lease).await
    }

    /// A store of migrated records, a locked folder, and a bucket if the files are not in the folder.
    async fn with(
        dir: &Path,
        lock: fs::File,
        engine: Arc<dyn Engine>,
        bucket: Option<Bucket>,
        lease: Duration,
    ) -> Result<Self, StoreError> {
        let refused = |error: io::Error| StoreError::of_folder(dir, error);
        let (work, work_lock) = own_folder(&dir.join("work")).map_err(refused)?;
        let ledger = Ledger::new(engine);
        let (artifacts, place) = match bucket {
            None => {
                let folder = dir.join("artifacts");
                let place = format!("the files in {}", folder.display());
                (Artifacts::Folder(Folder::open(&folder, work.path()).map_err(refused)?), place)
            }
            Some(bucket) => {
                let place = format!("the files {}", bucket.name());
                let named = ledger.name(&Uuid::now_v7().to_string()).await;
                let named = named.map_err(|error| StoreError::of_folder(dir, error))?;
                let owned = bucket.belong_to(&named).await;
                owned.map_err(|error| StoreError { place: place.clone(), reason: error.to_string() })?;
                (Artifacts::Bucket(bucket), place)
            }
        };
        let hashes = artifacts.hashes().await.map_err(|error| StoreError { place, reason: error.to_string() })?;
        let inner = Inner {
            ledger,
            artifacts,
            work,
            replica: Uuid::now_v7().to_string(),
            lease,
            arrivals: Notify::new(),
            ends: Notify::new(),
            running: Mutex::default(),
            leftovers: Mutex::default(),
            bells: Mutex::default(),
            _locks: [lock, work_lock],
        };
        let store = Self { inner: Arc::new(inner) };
        store.recover(hashes).await.map_err(|fault| StoreError::of_folder(dir, fault))?;
        Ok(store)
    }

    /// Tidies up after processes that have ended, with the hashes of all files as they were a moment ago.
    async fn recover(&self, files: Vec<String>) -> Result<(), Fault> {
        let ledger = &self.inner.ledger;
        if ledger.is_shared() {
            self.show_presence().await?;
            tokio::spawn(stay_present(Arc::downgrade(&self.inner)));
        } else {
            ledger.release_all().await?;
            ledger.forget_replicas().await?;
            ledger.present(&self.inner.replica, u64::MAX).await?;
        }
        self.remove_abandoned().await?;
        let (files, used): (HashSet<String>, _) = (files.into_iter().collect(), ledger.used_files().await?);
        for hash in used.difference(&files) {
            // Another process may have kept it meanwhile.
            if !self.inner.artifacts.has(hash).await? {
                let encoded = ledger.forget_file(hash).await?;
                tracing::error!(hash, encoded, "a file that the records name is gone");
            }
        }
        // Most are used; each of the others is looked at again while nobody can name it.
        self.remove_unused(files.difference(&used).cloned().collect()).await
    }

    async fn show_presence(&self) -> Result<(), Fault> {
        let Inner { ledger, replica, .. } = &*self.inner;
        let until = ledger.now_ms().await?.saturating_add(self.lease_ms());
        Ok(ledger.present(replica, until).await?)
    }

    /// Removes the generations of calls whose process has ended.
    async fn remove_abandoned(&self) -> Result<(), Fault> {
        let ledger = &self.inner.ledger;
        for id in ledger.abandoned(ledger.now_ms().await?).await? {
            tracing::info!(generation_id = %id, "removed: the process of the call that asked for it has ended");
            self.delete(id).await?;
        }
        Ok(())
    }

    fn lease_ms(&self) -> u64 {
        u64::try_from(self.inner.lease.as_millis()).unwrap_or(u64::MAX)
    }

    /// How often watchers look for themselves.
    fn look_pace(&self) -> Duration {
        if self.inner.ledger.is_shared() { LOOK_SHARED } else { LOOK }
    }

    /// Keeps files; they are not removed before a record names them, as long as the hold is not released.
    async fn keep<const N: usize>(&self, files: [Vec<u8>; N]) -> Result<([Artifact; N], Box<dyn Hold>), Fault> {
        let files = files.map(Bytes::from);
        let weigh = move || {
            let kept = files.each_ref().map(|bytes| Artifact::of(bytes));
            Ok((files, kept))
        };
        let (files, kept) = blocking(weigh).await?;
        let hashes = kept.each_ref().map(|file| file.hash.as_str());
        let naming = patiently(|| self.inner.ledger.name_files(&hashes)).await?;
        for (bytes, file) in files.into_iter().zip(&kept) {
            self.inner.artifacts.put(bytes, file).await?;
        }
        Ok((kept, naming))
    }

    /// Keeps a new generation; once this has returned, it will be run, whatever happens to the process.
    ///
    /// Errors: its key is that of another request, or there is no room.
    pub(crate) async fn create(&self, accepted: Accepted) -> Result<Generation, Fault> {
        let Accepted { generation, picture, audio, order, request_hash, attached } = accepted;
        let now = unix_ms();
        let generation = Generation {
            generation_id: Uuid::now_v7().to_string(),
            state: GenerationState::Queued.into(),
            created_unix_ms: now,
            ended_unix_ms: 0,
            caller: order.caller.clone(),
            label: order.label.clone(),
            deadline_unix_ms: order.deadline_seconds.map(|seconds| now + 1000 * seconds),
            ..generation
        };
        let event = GenerationEvent {
            generation_id: generation.generation_id.clone(),
            number: 1,
            unix_ms: now,
            state: generation.state,
            progress: generation.progress,
            ..GenerationEvent::default()
        };
        let ([picture, audio], naming) = self.keep([picture, audio]).await?;
        let files = [(role::PICTURE, picture), (role::AUDIO, audio)];
        let new = NewRow {
            generation: &generation,
            event: &event,
            order: &order,
            request_hash: &request_hash,
            replica: &self.inner.replica,
            attached,
            artifacts: &files,
        };
        let inserted = match self.inner.ledger.insert(new).await {
            // Somebody else was quicker with the same key; now it is known.
            Err(SqlError::Unique) => self.inner.ledger.insert(new).await,
            other => other,
        };
        naming.release().await;
        match inserted {
            Ok(Inserted::New) => {
                self.inner.arrivals.notify_waiters();
                Ok(generation)
            }
            refused => {
                self.remove_unused(files.into_iter().map(|(_, file)| file.hash).collect()).await?;
                match refused? {
                    Inserted::Known(known, hash) if hash == request_hash => Ok(*known),
                    Inserted::Known(known, _) => Err(Fault::new(
                        Kind::Conflict,
                        format!(
                            "the idempotency key {:?} is that of the generation {}, which was asked for with other values \
                             or files",
                            order.idempotency_key, known.generation_id
                        ),
                    )),
                    Inserted::New => Ok(generation),
                }
            }
        }
    }

    /// Generations in the order of their creation, page by page; gives the token of the next page, if there is one.
    ///
    /// Errors: the token is none that a page gave.
    pub(crate) async fn list(&self, wanted: &Listing) -> Result<(Vec<Generation>, Option<Uuid>), Fault> {
        let mut page = Page {
            // An id begins with the milliseconds of its time, so the first of a time is above the last one before it.
            after_id: first_of(wanted.created_from_ms),
            before_id: if wanted.created_before_ms == 0 { Uuid::max() } else { first_of(wanted.created_before_ms) },
            states: wanted.states.clone(),
            caller: wanted.caller.clone(),
            label: wanted.label.clone(),
            oldest_first: wanted.oldest_first,
            limit: wanted.limit + 1,
        };
        if let Some(last) = wanted.after {
            if wanted.oldest_first {
                page.after_id = page.after_id.max(last);
            } else {
                page.before_id = page.before_id.min(last);
            }
        }
        let mut generations = self.inner.ledger.list(&page).await?;
        let more = generations.len() > wanted.limit;
        generations.truncate(wanted.limit);
        let next = generations.last().filter(|_| more).map(identity);
        Ok((generations, next))
    }

    /// Removes what is kept longer or is more than wanted, and what nobody waits for.
    pub(crate) async fn tidy(&self, keep: &Retention) -> Result<(), Fault> {
        self.remove_abandoned().await?;
        self.remove_leftovers().await?;
        let forgotten = self.inner.ledger.forget_stage_outputs(keep.stage_output_bytes).await?;
        self.remove_unused(forgotten).await?;
        for (state, age) in keep.age.limits() {
            let before = unix_ms().saturating_sub(u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
            while self.remove_ended(state..=state, before, 64).await? {}
        }
        for (state, bytes) in keep.bytes_by_end.limits() {
            while self.inner.ledger.artifact_bytes_of(state).await? > bytes
                && self.remove_ended(state..=state, u64::MAX, 1).await?
            {}
        }
        if let Some(bytes) = keep.bytes {
            let any = GenerationState::Completed..=GenerationState::Cancelled;
            while self.inner.ledger.artifact_bytes().await? > bytes
                && self.remove_ended(any.clone(), u64::MAX, 1).await?
            {}
        }
        Ok(())
    }

    /// Removes up to `limit` generations that ended in one of these states before a time; false when there are none.
    async fn remove_ended(
        &self,
        states: RangeInclusive<GenerationState>,
        before_ms: u64,
        limit: i64,
    ) -> Result<bool, Fault> {
        let ended = self.inner.ledger.ended_before(states, before_ms, limit).await?;
        for id in &ended {
            tracing::info!(generation_id = %id, "removed: it was kept as long as was wanted");
            self.delete(*id).await?;
        }
        Ok(!ended.is_empty())
    }

    /// Removes files that an object store did not remove when it should have.
    async fn remove_leftovers(&self) -> Result<(), Fault> {
        if lock(&self.inner.leftovers).is_empty() {
            return Ok(());
        }
        self.check_files().await?;
        let left = std::mem::take(&mut *lock(&self.inner.leftovers));
        self.remove_unused(left.into_iter().collect()).await
    }

    /// Whether files can be kept, if they are in an object store and there is reason to doubt it.
    pub(crate) async fn check_files(&self) -> Result<(), Fault> {
        match &self.inner.artifacts {
            Artifacts::Folder(_) => Ok(()),
            Artifacts::Bucket(bucket) => Ok(bucket.check().await?),
        }
    }

    /// Bytes that are free where the data folder is.
    pub(crate) async fn free_bytes(&self) -> Result<u64, Fault> {
        let dir = self.work_dir();
        blocking(move || {
            let disk = rustix::fs::statvfs(&dir)?;
            Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
        })
        .await
    }

    /// Whether a caller's generation has this key.
    pub(crate) async fn has_key(&self, caller: &str, key: &str) -> Result<bool, Fault> {
        Ok(self.inner.ledger.has_key(caller, key).await?)
    }

    /// How many generations wait or run, and how many of these are a caller's.
    pub(crate) async fn unfinished(&self, caller: &str) -> Result<(u64, u64), Fault> {
        Ok(self.inner.ledger.unfinished(caller).await?)
    }

    /// Ids of what waits, in the order in which it is begun, and the seconds that are left of each that runs, where
    /// they are known.
    pub(crate) async fn queue(&self) -> Result<(Vec<Uuid>, Vec<Option<f64>>), Fault> {
        let now = self.inner.ledger.now_ms().await?;
        let waiting = self.inner.ledger.waiting(now).await?.into_iter().map(|one| one.id).collect();
        let driven = self.inner.ledger.driven(now).await?.into_iter();
        let left = driven.map(|one| one.progress.and_then(|progress| progress.remaining_seconds)).collect();
        Ok((waiting, left))
    }

    /// The generation with an id as it came over the wire.
    pub async fn get(&self, id: &str) -> Result<Generation, Fault> {
        Ok(self.row(id).await?.generation)
    }

    /// The id of a generation that there is.
    pub(crate) async fn id(&self, id: &str) -> Result<Uuid, Fault> {
        Ok(identity(&self.get(id).await?))
    }

    async fn row(&self, id: &str) -> Result<Row, Fault> {
        let known = match Uuid::try_parse(id) {
            Ok(id) => self.inner.ledger.get(id).await?,
            Err(_) => None,
        };
        known.ok_or_else(|| {
            let shown: String = id.chars().take(64).collect();
            Fault::new(Kind::NotFound, format!("no generation has the id {shown:?}"))
        })
    }

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
                match store.look(id, next).await {
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

    /// Events of a generation from a number on, and whether no more can come.
    async fn look(&self, id: Uuid, from: u64) -> Result<(Vec<GenerationEvent>, bool), Fault> {
        let row = self.row(&id.to_string()).await?;
        let events = self.inner.ledger.events(id, from, EVENTS_AT_ONCE).await?;
        let read = from + events.len() as u64;
        Ok((events, life::is_terminal(row.generation.state()) && read > row.last_event))
    }

    fn subscribe(&self, id: Uuid) -> watch::Receiver<()> {
        lock(&self.inner.bells).entry(id).or_insert_with(|| watch::Sender::new(())).subscribe()
    }

    /// Tells those who watch that something has happened.
    fn ring(&self, id: Uuid) {
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

    /// Stops a generation, and gives it as it is then. Once this has returned it will not go on, whatever happens to
    /// the process.
    pub async fn cancel(&self, id: &str) -> Result<Generation, Fault> {
        let row = self.row(id).await?;
        if life::is_terminal(row.generation.state()) {
            return Ok(row.generation);
        }
        let id = identity(&row.generation);
        self.inner.ledger.request_cancel(id).await?;
        if let Some(running) = lock(&self.inner.running).get(&id) {
            running.cancel();
        }
        if let Some(lease) = self.claim(id).await? {
            lease.publish(Change::cancelled("cancelled before its turn came")).await;
        }
        // The run notices at its next await; a moment is plenty, and the answer is true either way.
        match tokio::time::timeout(CANCEL_TIME, self.wait_end(id)).await {
            Ok(ended) => ended,
            Err(_) => self.get(&id.to_string()).await,
        }
    }

    /// Cancels a generation if it still runs, and removes its record and its files.
    pub async fn remove(&self, id: &str) -> Result<(), Fault> {
        let row = self.row(id).await?;
        if !life::is_terminal(row.generation.state()) {
            self.cancel(id).await?;
        }
        if self.delete(identity(&row.generation)).await? {
            return Ok(());
        }
        Err(Fault::new(Kind::NotFound, format!("no generation has the id {id:?}")))
    }

    async fn delete(&self, id: Uuid) -> Result<bool, Fault> {
        let Some(hashes) = self.inner.ledger.delete(id).await? else { return Ok(false) };
        self.ring(id);
        self.remove_unused(hashes).await?;
        Ok(true)
    }

    /// Removes those files that belong to no generation and are no stage's output; later where an object store does not
    /// do it now.
    async fn remove_unused(&self, hashes: Vec<String>) -> Result<(), Fault> {
        for hash in hashes {
            let Some(alone) = self.inner.ledger.remove_file(&hash).await? else { continue };
            match tokio::time::timeout(REMOVAL, self.inner.artifacts.remove(&hash)).await {
                Ok(Err(ArtifactError::Away(reason))) => {
                    tracing::warn!(hash, reason, "a file that nobody needs is removed later");
                    lock(&self.inner.leftovers).insert(hash);
                }
                Ok(removed) => removed?,
                Err(_) => {
                    tracing::warn!(hash, "a file that nobody needs was not removed in time; it is tried again");
                    lock(&self.inner.leftovers).insert(hash);
                    continue;
                }
            }
            alone.release().await;
        }
        Ok(())
    }

    /// A completed generation's video.
    ///
    /// Errors: there is none, the file is damaged, or the object store does not answer.
    pub async fn video(&self, id: &str) -> Result<Content, Fault> {
        let generation = self.get(id).await?;
        if generation.state() != GenerationState::Completed {
            let state = crate::api::video::status_name(generation.state());
            let message = format!("the generation is {state}; a video is there once it is completed");
            return Err(Fault::new(Kind::Precondition, message));
        }
        let video = self.inner.ledger.artifact(identity(&generation), role::VIDEO).await?;
        let gone = || Fault::new(Kind::NotFound, "the generation's video is gone");
        match self.inner.artifacts.open(&video.ok_or_else(gone)?).await {
            Err(ArtifactError::Gone(hash)) => {
                tracing::error!(hash, "a file that the records name is gone");
                Err(gone())
            }
            opened => Ok(opened?),
        }
    }

    /// A generation's preview after a step, and its JPEG file.
    ///
    /// Errors: there is none, or the file is damaged.
    pub async fn preview(&self, id: &str, step: u32) -> Result<(Artifact, Vec<u8>), Fault> {
        let id = self.id(id).await?;
        let kept = self.inner.ledger.artifact(id, &role::preview(step)).await?;
        let kept = kept.ok_or_else(|| {
            let message = format!("the generation has no preview of step {step}; its events tell which there are");
            Fault::new(Kind::NotFound, message)
        })?;
        let file = self.inner.artifacts.read(&kept).await?;
        Ok((kept, file))
    }

    /// The next generation to run, once there is one.
    pub(crate) async fn next(&self) -> Arc<Lease> {
        loop {
            let arrival = self.inner.arrivals.notified();
            match self.claim_next().await {
                Ok(Some(lease)) => return lease,
                Ok(None) => {}
                Err(fault) => tracing::error!(%fault, "the next generation cannot be read"),
            }
            let _ = tokio::time::timeout(self.look_pace(), arrival).await;
        }
    }

    async fn claim_next(&self) -> Result<Option<Arc<Lease>>, Fault> {
        let now = self.inner.ledger.now_ms().await?;
        let skip = |id| lock(&self.inner.running).contains_key(&id);
        let row = self.inner.ledger.claim_next(now, now.saturating_add(self.lease_ms()), &skip).await?;
        Ok(row.map(|row| Lease::new(self.clone(), row)))
    }

    async fn claim(&self, id: Uuid) -> Result<Option<Arc<Lease>>, Fault> {
        if lock(&self.inner.running).contains_key(&id) {
            return Ok(None);
        }
        let now = self.inner.ledger.now_ms().await?;
        let row = self.inner.ledger.claim(id, now, now.saturating_add(self.lease_ms())).await?;
        Ok(row.map(|row| Lease::new(self.clone(), row)))
    }

    /// Ends what waits and has a deadline that has passed.
    pub(crate) async fn end_late(&self) -> Result<(), Fault> {
        for id in self.inner.ledger.late(self.inner.ledger.now_ms().await?).await? {
            if let Some(lease) = self.claim(id).await? {
                lease.publish(Change::late()).await;
            }
        }
        Ok(())
    }

    /// A folder for files that are not whole yet; they can be kept without being copied.
    pub(crate) fn work_dir(&self) -> PathBuf {
        self.inner.work.path().to_owned()
    }
}

/// Locks a data folder for this process alone, or together with others that share the records.
fn lock_folder(dir: &Path, shared: bool) -> Result<fs::File, String> {
    let lock = fs::File::create(dir.join("lock")).map_err(|error| error.to_string())?;
    let (how, advice) = if shared {
        (FlockOperation::NonBlockingLockShared, "whose records are in a file of it")
    } else {
        (FlockOperation::NonBlockingLockExclusive, "give each gateway a folder of its own, or --database to all")
    };
    flock(&lock, how).map_err(|_| format!("another process uses it; {advice}"))?;
    Ok(lock)
}

/// Makes this process's folder for work, locked as long as the process lives, and removes those of processes that have
/// ended.
fn own_folder(work: &Path) -> io::Result<(TempDir, fs::File)> {
    const MARK: &str = "lock";
    fs::create_dir_all(work)?;
    // One process at a time looks: a folder that is not locked is nobody's then.
    let door = fs::File::create(work.join(MARK))?;
    flock(&door, FlockOperation::LockExclusive)?;
    for folder in fs::read_dir(work)? {
        let folder = folder?.path();
        let free = match fs::File::open(folder.join(MARK)) {
            Ok(mark) => flock(&mark, FlockOperation::NonBlockingLockExclusive).is_ok(),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        if free
            && folder.is_dir()
            && let Err(error) = fs::remove_dir_all(&folder)
        {
            // An encoder of the ended process may still be ending in there.
            tracing::warn!(%error, "unfinished files stay behind in {}", folder.display());
        }
    }
    let own = tempfile::Builder::new().prefix("run-").tempdir_in(work)?;
    let mark = fs::File::create(own.path().join(MARK))?;
    flock(&mark, FlockOperation::LockExclusive)?;
    Ok((own, mark))
}

/// Gives signs of life as long as the store is used.
async fn stay_present(inner: Weak<Inner>) {
    loop {
        let Some(pace) = inner.upgrade().map(|inner| inner.lease / BEATS) else { return };
        tokio::time::sleep(pace).await;
        let Some(inner) = inner.upgrade() else { return };
        if let Err(fault) = (Store { inner }).show_presence().await {
            tracing::error!(%fault, "the others cannot see that this process is there");
        }
    }
}

/// The first id of a millisecond; below all that are made from then on.
fn first_of(unix_ms: u64) -> Uuid {
    Uuid::from_u128(u128::from(unix_ms.min((1 << 48) - 1)) << 80)
}

/// The id of a generation of this store; it was made here.
fn identity(generation: &Generation) -> Uuid {
    Uuid::try_parse(&generation.generation_id).unwrap_or_default()
}

/// The holders only put in and take out whole values, so they are sound even after a panic of one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does what waits for the disk where that holds nobody up.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T, Fault> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) if error.kind() == io::ErrorKind::StorageFull => Err(full(&error.to_string())),
        Ok(Err(error)) => Err(Fault::internal("a file of the data folder cannot be used", &error)),
        Err(error) => Err(Fault::internal("a file of the data folder cannot be used", &error)),
    }
}

impl From<ArtifactError> for Fault {
    fn from(error: ArtifactError) -> Self {
        match error {
            ArtifactError::Full(detail) => full(&detail),
            ArtifactError::Away(detail) => {
                tracing::error!(detail, "the object store does not do it");
                Self::new(Kind::Unavailable, "the object store of the files cannot be used now; try again")
            }
            _ => Self::internal("a file cannot be used", &error),
        }
    }
}

fn full(detail: &str) -> Fault {
    Fault::new(Kind::Exhausted, format!("no space is left in the data folder: {detail}"))
}

impl From<SqlError> for Fault {
    fn from(error: SqlError) -> Self {
        match error {
            SqlError::Full(detail) => full(&detail),
            SqlError::Away(detail) => {
                tracing::error!(detail, "the database does not answer");
                Self::new(Kind::Unavailable, "the records cannot be reached now; try again")
            }
            SqlError::Unique | SqlError::Other(_) => Fault::internal("the records cannot be used", &error),
        }
    }
}

/// Hash of a request: of its values as they came, and of both files.
pub(crate) fn request_hash(spec: &proto::v1::GenerationSpec, picture: &[u8], audio: &[u8]) -> String {
    use prost::Message as _;
    let parts = [sha256(&spec.encode_to_vec()), sha256(picture), sha256(audio)];
    sha256(parts.concat().as_bytes())
}

/// Milliseconds since 1970.
#[must_use]
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
