//! Who may come in, and whose turn it is.

use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use proto::v1::{GenerationDefaults, PlanGenerationRequest};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::{Options, TierOptions},
    fault::{Fault, Kind},
    intake::Upload,
    planning::FleetSource,
    runner::{self, Workshop, prepare::Prepared},
    stages::Stages,
    store::{Change, Record, Store, StoreError},
    validate,
};

/// When to try again after the queue was full. Generations take minutes.
const FULL_RETRY: Duration = Duration::from_secs(5);
/// How long cancelled generations may take to end.
const CANCEL_TIME: Duration = Duration::from_secs(10);

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
    /// One permit for each generation that waits or runs, from its first byte on.
    places: Arc<Semaphore>,
    /// One permit for each that runs; handed out in the order of coming.
    turns: Arc<Semaphore>,
    tasks: TaskTracker,
    closing: CancellationToken,
    /// What the diffusion stage said last, for when it does not answer.
    defaults: Mutex<Option<GenerationDefaults>>,
    /// Who knows the checkpoint and the devices, if anybody does.
    fleet: OnceLock<FleetSource>,
}

/// A place in the queue, held until the generation has ended.
#[derive(Debug)]
pub struct Place {
    /// Given back when the place goes.
    _permit: OwnedSemaphorePermit,
}

impl Gateway {
    /// A gateway on the given stages. Call it inside a tokio runtime.
    ///
    /// Errors: the folder for the videos cannot be used.
    pub fn new(options: &Options, stages: Stages) -> Result<Self, StoreError> {
        let inner = Inner {
            store: Store::open(options.data_dir.as_deref())?,
            stages,
            places: Arc::new(Semaphore::new(options.queue + options.concurrent)),
            turns: Arc::new(Semaphore::new(options.concurrent)),
            options: options.clone(),
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            defaults: Mutex::new(None),
            fleet: OnceLock::new(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The same gateway, which plans for the checkpoint and the devices that `source` tells of. The first source stays.
    #[must_use]
    pub fn planning_for(self, source: FleetSource) -> Self {
        self.inner.fleet.get_or_init(|| source);
        self
    }

    /// The tiers, and which one's limits hold.
    #[must_use]
    pub fn tiers(&self) -> &TierOptions {
        &self.inner.options.tier
    }

    /// Makes a plan.
    ///
    /// Errors: as [`crate::planning::plan`].
    pub async fn plan(&self, request: PlanGenerationRequest) -> Result<planner::Plan, Fault> {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || crate::planning::plan(&request, &inner.options.tier, inner.fleet.get()))
            .await
            .map_err(|error| Fault::internal("the plan could not be made", &error))?
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

    /// Takes a place in the queue. Ask for it before a request's bytes are read: the places bound the memory.
    ///
    /// Errors: the queue is full, or the gateway is shutting down.
    pub fn admit(&self) -> Result<Place, Fault> {
        if self.inner.closing.is_cancelled() {
            return Err(Fault::new(Kind::Unavailable, "the gateway is shutting down"));
        }
        Arc::clone(&self.inner.places).try_acquire_owned().map(|permit| Place { _permit: permit }).map_err(|_| {
            let (running, waiting) = (self.inner.options.concurrent, self.inner.options.queue);
            let message = format!("the queue is full: {running} may run and {waiting} may wait");
            Fault::new(Kind::Busy { retry_after: FULL_RETRY }, message)
        })
    }

    /// Accepts a generation: checks all of it, keeps it, and starts it when its turn comes.
    pub async fn accept(&self, upload: Upload, place: Place) -> Result<Arc<Record>, Fault> {
        validate::check(&upload.spec)?;
        let defaults =
            if validate::needs_defaults(&upload.spec) { self.defaults().await? } else { GenerationDefaults::default() };
        let settings = validate::resolve(upload.spec.clone(), &defaults)?;
        let limit = self.inner.options.max_audio_seconds;
        let tier = self.inner.options.tier.clone();
        let prepared = tokio::task::spawn_blocking(move || Prepared::read(upload, settings, limit, &tier))
            .await
            .map_err(|error| Fault::internal("the files could not be read", &error))??;
        if self.inner.closing.is_cancelled() {
            return Err(Fault::new(Kind::Unavailable, "the gateway is shutting down"));
        }
        let record = Arc::new(Record::new(prepared.generation()));
        self.inner.store.insert(Arc::clone(&record));
        tracing::info!(
            generation_id = %record.id(),
            frames = prepared.plan.frames,
            size = %prepared.size,
            steps = prepared.settings.steps,
            "accepted"
        );
        self.inner.tasks.spawn(self.clone().work(Arc::clone(&record), prepared, place));
        Ok(record)
    }

    /// Waits for the turn and runs the generation.
    async fn work(self, record: Arc<Record>, prepared: Prepared, place: Place) {
        let turns = Arc::clone(&self.inner.turns);
        let turn = tokio::select! {
            biased;
            () = record.cancel_token().cancelled() => None,
            turn = turns.acquire_owned() => turn.ok(),
        };
        match turn {
            Some(turn) => {
                let workshop = Workshop {
                    stages: self.inner.stages.clone(),
                    ffmpeg: self.inner.options.ffmpeg.clone(),
                    directory: self.inner.store.dir().to_path_buf(),
                    file: self.inner.store.video_path(record.id()),
                };
                runner::run(Arc::clone(&record), prepared, workshop).await;
                drop(turn);
            }
            None => record.publish(Change::cancelled("cancelled before its turn came")),
        }
        if record.is_removed() || !record.completed() {
            // Nobody can ask for it any more.
            if let Err(fault) = self.inner.store.remove_video(record.id()).await {
                tracing::warn!(generation_id = %record.id(), %fault, "the video stays behind");
            }
        }
        drop(place);
    }

    /// Accepts nothing more, waits for what was accepted, cancels at the deadline what is left.
    pub async fn drain(&self, deadline: Duration) {
        self.inner.closing.cancel();
        self.inner.tasks.close();
        if tokio::time::timeout(deadline, self.inner.tasks.wait()).await.is_ok() {
            return;
        }
        for record in self.inner.store.running() {
            tracing::warn!(generation_id = %record.id(), "cancelled: the gateway shuts down");
            record.cancel_token().cancel();
        }
        if tokio::time::timeout(CANCEL_TIME, self.inner.tasks.wait()).await.is_err() {
            tracing::error!("some generations did not end");
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
