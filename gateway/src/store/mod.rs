//! What the gateway keeps: a record for each generation with its events, and files by their content.
//!
//! All of it outlives the process. A change is on the disk before anyone is told of it. Several processes may share the
//! records and the files; a generation is driven by the one that holds its lease.

pub mod artifacts;
mod create;
mod engine;
mod faults;
mod folders;
mod lease;
mod ledger;
pub mod life;
mod list;
mod postgres;
mod retention;
mod schema;
mod sqlite;
#[cfg(test)]
mod tests;
mod tidy;
mod turns;
mod watch;
mod webhooks;

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use proto::v1::{Generation, GenerationState, Progress};
use tempfile::TempDir;
use tokio::sync::{Notify, watch as bell};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::{
    artifacts::{Artifact, ArtifactError, Artifacts, Bucket, Content, Disk, Folder, Real, make_folders, place::Place},
    engine::Engine,
    faults::blocking,
    folders::{lock_folder, own_folder},
    ledger::{Ledger, Row},
    postgres::Postgres,
    sqlite::Sqlite,
};
use crate::fault::{Fault, Kind};

pub(crate) use create::{Accepted, request_hash};
pub(crate) use faults::SPACE_RETRY;
pub(crate) use lease::{Change, Lease, Resume};
pub(crate) use list::Listing;
pub use postgres::Database;
pub use retention::{ByEnd, Retention};
pub(crate) use turns::{Queue, Running, seconds_until};
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

/// Where the files are to be.
#[derive(Debug)]
enum Files {
    /// In the data folder, on a disk.
    Folder(Arc<dyn Disk>),
    Bucket(Bucket),
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
    bells: Mutex<HashMap<Uuid, bell::Sender<()>>>,
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
        let files = match &records.artifacts {
            None => Files::Folder(Arc::new(Real)),
            Some(place) => {
                let refused = |reason| StoreError { place: format!("the files {place}"), reason };
                Files::Bucket(place.open().map_err(refused)?)
            }
        };
        Self::with(dir, lock, engine, files, records.lease).await
    }

    /// A store of migrated records, a locked folder, and files.
    async fn with(
        dir: &Path,
        lock: fs::File,
        engine: Arc<dyn Engine>,
        files: Files,
        lease: Duration,
    ) -> Result<Self, StoreError> {
        let refused = |error: io::Error| StoreError::of_folder(dir, error);
        let (work, work_lock) = own_folder(&dir.join("work")).map_err(refused)?;
        let ledger = Ledger::new(engine);
        let (artifacts, place) = match files {
            Files::Folder(disk) => {
                let folder = dir.join("artifacts");
                let place = format!("the files in {}", folder.display());
                (Artifacts::Folder(Folder::open(disk, &folder, work.path()).map_err(refused)?), place)
            }
            Files::Bucket(bucket) => {
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

    async fn show_presence(&self) -> Result<(), Fault> {
        let Inner { ledger, replica, .. } = &*self.inner;
        let until = ledger.now_ms().await?.saturating_add(self.lease_ms());
        Ok(ledger.present(replica, until).await?)
    }

    fn lease_ms(&self) -> u64 {
        u64::try_from(self.inner.lease.as_millis()).unwrap_or(u64::MAX)
    }

    /// How often watchers look for themselves.
    fn look_pace(&self) -> Duration {
        if self.inner.ledger.is_shared() { LOOK_SHARED } else { LOOK }
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

    /// What waits, in the order in which it is begun, and what runs.
    pub(crate) async fn queue(&self) -> Result<Queue, Fault> {
        let now = self.inner.ledger.now_ms().await?;
        let waiting = self.inner.ledger.waiting(now).await?;
        let driven = self.inner.ledger.driven(now).await?.into_iter();
        let left = |progress: Option<Progress>| progress.and_then(|progress| progress.remaining_seconds);
        let running = driven.map(|one| Running { caller: one.caller, left_seconds: left(one.progress) }).collect();
        Ok(Queue { waiting, running })
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

/// The id of a generation of this store; it was made here.
fn identity(generation: &Generation) -> Uuid {
    Uuid::try_parse(&generation.generation_id).unwrap_or_default()
}

/// The holders only put in and take out whole values, so they are sound even after a panic of one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Milliseconds since 1970.
#[must_use]
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
