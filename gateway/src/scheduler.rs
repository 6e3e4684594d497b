//! Who may come in, and whose turn it is.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use proto::v1::{Generation, GenerationDefaults};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::Options,
    fault::{Fault, Kind},
    intake::{Upload, check_key},
    runner::{self, Workshop, prepare::Prepared},
    stages::Stages,
    store::{Accepted, Store, StoreError, request_hash},
    validate,
};

/// When to try again after the queue was full. Generations take minutes.
const FULL_RETRY: Duration = Duration::from_secs(5);
/// How long generations may take to be let go.
const STOP_TIME: Duration = Duration::from_secs(10);

/// The gateway. Clones are the same gateway.
#[derive(Debug, Clone)]
pub struct Gateway {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
    stages: Stages,
    options: Options,
    /// Requests whose bytes are being read.
    uploads: AtomicU64,
    tasks: TaskTracker,
    /// Nothing is accepted or begun any more.
    closing: CancellationToken,
    /// What runs is let go as it is.
    stopping: CancellationToken,
    /// What the diffusion stage said last, for when it does not answer.
    defaults: Mutex<Option<GenerationDefaults>>,
}

/// A place in the queue, held until the generation is kept.
#[derive(Debug)]
pub struct Place {
    inner: Arc<Inner>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.inner.uploads.fetch_sub(1, SeqCst);
    }
}

impl Gateway {
    /// A gateway on the given stages; it goes on with what an earlier process left unfinished in the data folder. Call
    /// it inside a tokio runtime.
    ///
    /// Errors: the data folder cannot be used.
    pub async fn new(options: &Options, stages: Stages) -> Result<Self, StoreError> {
        let inner = Inner {
            store: Store::open(&options.data_dir).await?,
            stages,
            options: options.clone(),
            uploads: AtomicU64::new(0),
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            stopping: CancellationToken::new(),
            defaults: Mutex::new(None),
        };
        let gateway = Self { inner: Arc::new(inner) };
        for _ in 0..options.concurrent {
            gateway.inner.tasks.spawn(gateway.clone().work());
        }
        Ok(gateway)
    }

    /// The public gRPC service, without health and reflection.
    #[must_use]
    pub fn grpc_routes(&self) -> tonic::service::Routes {
        crate::service::routes(self.clone())
    }

    /// The REST interface.
    pub fn http_router(&self) -> axum::Router {
        crate::api::rest::router(self.clone())
    }

    /// The generations.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// Takes a place in the queue. Ask for it before a request's bytes are read: the places bound the memory. A request
    /// that was accepted before, which its key tells, needs none.
    ///
    /// Errors: the queue is full, or the gateway is shutting down.
    pub async fn admit(&self, idempotency_key: &str) -> Result<Place, Fault> {
        check_key(idempotency_key)?;
        if self.inner.closing.is_cancelled() {
            return Err(shutting_down());
        }
        let place = Place { inner: Arc::clone(&self.inner) };
        let uploads = self.inner.uploads.fetch_add(1, SeqCst) + 1;
        let (running, waiting) = (self.inner.options.concurrent, self.inner.options.queue);
        if self.inner.store.unfinished().await? + uploads > (running + waiting) as u64 {
            let known = !idempotency_key.is_empty() && self.inner.store.has_key(idempotency_key).await?;
            if !known {
                let message = format!("the queue is full: {running} may run and {waiting} may wait");
                return Err(Fault::new(Kind::Busy { retry_after: FULL_RETRY }, message));
            }
        }
        Ok(place)
    }

    /// Accepts a generation: checks all of it and keeps it. Its turn comes by itself; once this has returned, also in
    /// a later process, unless it is `attached` to the call that made it.
    pub async fn accept(&self, upload: Upload, place: Place, attached: bool) -> Result<Generation, Fault> {
        validate::check(&upload.spec)?;
        let defaults =
            if validate::needs_defaults(&upload.spec) { self.defaults().await? } else { GenerationDefaults::default() };
        let settings = validate::resolve(upload.spec.clone(), &defaults)?;
        let limit = self.inner.options.max_audio_seconds;
        let read = move || {
            let prepared = Prepared::read(&upload, settings, limit)?;
            let request_hash = request_hash(&upload.spec, &upload.picture, &upload.audio);
            let Upload { picture, audio, idempotency_key, .. } = upload;
            let generation = prepared.generation();
            Ok::<_, Fault>(Accepted { generation, picture, audio, idempotency_key, request_hash, attached })
        };
        let accepted = tokio::task::spawn_blocking(read)
            .await
            .map_err(|error| Fault::internal("the files could not be read", &error))??;
        if self.inner.closing.is_cancelled() {
            return Err(shutting_down());
        }
        let generation = self.inner.store.create(accepted).await?;
        drop(place);
        tracing::info!(
            generation_id = generation.generation_id,
            frames = generation.frames,
            width = generation.width,
            height = generation.height,
            "accepted"
        );
        Ok(generation)
    }

    /// Runs one generation after the other.
    async fn work(self) {
        let workshop = Workshop {
            stages: self.inner.stages.clone(),
            ffmpeg: self.inner.options.ffmpeg.clone(),
            directory: self.inner.store.work_dir(),
            patience: self.inner.options.stage_patience,
            stopping: self.inner.stopping.clone(),
        };
        let closing = self.inner.closing.clone();
        while let Some(lease) = closing.run_until_cancelled(self.inner.store.next()).await {
            runner::run(lease, workshop.clone()).await;
        }
    }

    /// Accepts and begins nothing more, waits for what runs, and lets go at the deadline of what is left: a later
    /// process goes on with it.
    pub async fn drain(&self, deadline: Duration) {
        self.inner.closing.cancel();
        self.inner.tasks.close();
        if tokio::time::timeout(deadline, self.inner.tasks.wait()).await.is_ok() {
            return;
        }
        self.inner.stopping.cancel();
        if tokio::time::timeout(STOP_TIME, self.inner.tasks.wait()).await.is_err() {
            tracing::error!("some generations were not let go in time");
        }
    }

    /// The checkpoint's defaults; what it said last while it does not answer.
    async fn defaults(&self) -> Result<GenerationDefaults, Fault> {
        let asked = self.inner.stages.defaults().await;
        let mut known = self.inner.defaults.lock().unwrap_or_else(PoisonError::into_inner);
        match asked {
            Ok(defaults) => Ok(*known.insert(defaults)),
            Err(fault) => known.ok_or(fault),
        }
    }
}

fn shutting_down() -> Fault {
    Fault::new(Kind::Unavailable, "the gateway is shutting down")
}
