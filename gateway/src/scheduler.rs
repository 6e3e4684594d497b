//! Who may come in, and whose turn it is.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use proto::v1::{Generation, GenerationDefaults, GenerationState, Parity, PlanGenerationRequest};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use crate::{
    config::{Options, TierOptions},
    fault::{Fault, Kind},
    intake::{Order, Upload},
    planning::{self, FleetSource},
    runner::{self, Allowance, Pace, Previews, Workshop, prepare::Prepared},
    stages::Stages,
    store::{Accepted, Listing, SPACE_RETRY, Store, StoreError, request_hash, seconds_until, unix_ms},
    validate, webhook,
};

/// When to try again after the queue was full, while nobody knows how long a generation takes.
const FULL_RETRY: Duration = Duration::from_secs(5);
/// The shortest and the longest time after which to try again.
const LEAST_RETRY: Duration = Duration::from_secs(1);
const MOST_RETRY: Duration = Duration::from_secs(600);
/// Completed generations whose time is the pace.
const PACE: usize = 16;
/// Callbacks that are made at the same time, so that a slow receiver does not keep the others waiting.
const SENDERS: usize = 4;
/// How often deadlines of what waits are looked at.
const DEADLINES: Duration = Duration::from_secs(1);
/// How often the data folder is tidied.
const TIDY: Duration = Duration::from_secs(60);
/// How often files are held against the records, besides at the start.
const SWEEP: Duration = Duration::from_secs(3600);
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
    /// Requests whose bytes are being read, by caller.
    uploads: Mutex<HashMap<String, u64>>,
    /// Seconds that the last completed generations took.
    pace: Mutex<VecDeque<f64>>,
    tasks: TaskTracker,
    /// Nothing is accepted or begun any more.
    closing: CancellationToken,
    /// What runs is let go as it is.
    stopping: CancellationToken,
    /// How denoises are shown while they last.
    previews: Previews,
    /// What the diffusion stage said last, for when it does not answer.
    defaults: Mutex<Option<GenerationDefaults>>,
    /// Who knows the checkpoint and the devices, if anybody does.
    fleet: OnceLock<FleetSource>,
}

/// A place in the queue, held until the generation is kept.
#[derive(Debug)]
pub struct Place {
    inner: Arc<Inner>,
    caller: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut uploads = lock(&self.inner.uploads);
        if let Some(count) = uploads.get_mut(&self.caller) {
            *count -= 1;
            if *count == 0 {
                uploads.remove(&self.caller);
            }
        }
    }
}

impl Gateway {
    /// A gateway on the given stages; it goes on with what an earlier process left unfinished in the data folder. Call
    /// it inside a tokio runtime.
    ///
    /// Errors: the data folder or the database cannot be used.
    pub async fn new(options: &Options, stages: Stages) -> Result<Self, StoreError> {
        let inner = Inner {
            store: Store::open(&options.data_dir, &options.records).await?,
            stages,
            options: options.clone(),
            uploads: Mutex::default(),
            pace: Mutex::default(),
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            stopping: CancellationToken::new(),
            previews: Previews::new(options.previews),
            defaults: Mutex::new(None),
            fleet: OnceLock::new(),
        };
        let gateway = Self { inner: Arc::new(inner) };
        for _ in 0..options.concurrent {
            gateway.inner.tasks.spawn(gateway.clone().work());
        }
        gateway.inner.tasks.spawn(gateway.clone().tidy());
        gateway.inner.tasks.spawn(gateway.clone().watch_deadlines());
        for _ in 0..SENDERS {
            let (store, closing) = (gateway.inner.store.clone(), gateway.inner.closing.clone());
            gateway.inner.tasks.spawn(webhook::deliver(store, options.webhooks.clone(), closing));
        }
        Ok(gateway)
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

    /// Takes a place in the queue. Ask for it before a request's bytes are read: the places bound the memory. A request
    /// that was accepted before, which its key tells, needs none.
    ///
    /// Errors: the queue or the disk is full, the object store fails, or the gateway is shutting down.
    pub async fn admit(&self, order: &Order) -> Result<Place, Fault> {
        if self.inner.closing.is_cancelled() {
            return Err(shutting_down());
        }
        webhook::check(&self.inner.options.webhooks, &order.webhook)?;
        self.check_space().await?;
        let Order { caller, idempotency_key, .. } = order;
        let (uploads, own_uploads) = {
            let mut uploads = lock(&self.inner.uploads);
            *uploads.entry(caller.clone()).or_default() += 1;
            (uploads.values().sum::<u64>(), uploads.get(caller).copied().unwrap_or(0))
        };
        let place = Place { inner: Arc::clone(&self.inner), caller: caller.clone() };
        let (all, own) = self.inner.store.unfinished(caller).await?;
        let Options { concurrent, queue, queue_per_caller, .. } = self.inner.options;
        let (message, whose) = if all + uploads > (concurrent + queue) as u64 {
            (format!("the queue is full: {concurrent} may run and {queue} may wait"), None)
        } else if queue_per_caller.is_some_and(|limit| own + own_uploads > limit as u64) {
            let limit = queue_per_caller.unwrap_or_default();
            (format!("this caller has {own} generations that wait or run; {limit} are allowed"), Some(caller.as_str()))
        } else {
            return Ok(place);
        };
        if !idempotency_key.is_empty() && self.inner.store.has_key(caller, idempotency_key).await? {
            return Ok(place);
        }
        Err(Fault::new(Kind::Busy { retry_after: self.until_room(whose).await? }, message))
    }

    /// How long it takes until a generation ends and makes room, one of `caller` where those are too many.
    async fn until_room(&self, caller: Option<&str>) -> Result<Duration, Fault> {
        let queue = self.inner.store.queue().await?;
        let seconds = queue.seconds_until_room(caller, self.inner.options.concurrent, self.seconds_each());
        let Some(seconds) = seconds else { return Ok(FULL_RETRY) };
        Ok(Duration::try_from_secs_f64(seconds).unwrap_or(MOST_RETRY).clamp(LEAST_RETRY, MOST_RETRY))
    }

    /// Seconds that a generation took of late; nothing before the first is completed.
    fn seconds_each(&self) -> Option<f64> {
        let pace = lock(&self.inner.pace);
        (!pace.is_empty()).then(|| pace.iter().sum::<f64>() / pace.len() as f64)
    }

    /// A generation as it stands, with its place in the queue.
    pub async fn get(&self, id: &str) -> Result<Generation, Fault> {
        let mut generation = self.inner.store.get(id).await?;
        self.place(std::slice::from_mut(&mut generation)).await?;
        Ok(generation)
    }

    /// One page of generations, each with its place in the queue, and the token of the next page.
    pub(crate) async fn list(&self, wanted: &Listing) -> Result<(Vec<Generation>, Option<Uuid>), Fault> {
        let (mut generations, next) = self.inner.store.list(wanted).await?;
        self.place(&mut generations).await?;
        Ok((generations, next))
    }

    /// Tells those that are queued their place and when they will begin.
    async fn place(&self, generations: &mut [Generation]) -> Result<(), Fault> {
        if generations.iter().all(|one| one.state() != GenerationState::Queued) {
            return Ok(());
        }
        let (queue, each) = (self.inner.store.queue().await?, self.seconds_each());
        let left = queue.running.iter().map(|one| one.left_seconds.or(each).unwrap_or(0.0));
        let left: Vec<f64> = left.collect();
        let places: HashMap<String, usize> = queue.waiting.iter().map(|one| one.id.to_string()).zip(1..).collect();
        for one in generations.iter_mut().filter(|one| one.state() == GenerationState::Queued) {
            let Some(&position) = places.get(&one.generation_id) else { continue };
            one.queue_position = position as u32;
            one.estimated_start_unix_ms = each.map(|each| {
                unix_ms() + (1000.0 * seconds_until(position, &left, self.inner.options.concurrent, each)) as u64
            });
        }
        Ok(())
    }

    /// Accepts a generation: checks all of it and keeps it. Its turn comes by itself; once this has returned, also in
    /// a later process, unless it is `attached` to the call that made it.
    pub async fn accept(&self, upload: Upload, place: Place, attached: bool) -> Result<Generation, Fault> {
        validate::check(&upload.spec)?;
        let defaults =
            if validate::needs_defaults(&upload.spec) { self.defaults().await? } else { GenerationDefaults::default() };
        let settings = validate::resolve(upload.spec.clone(), &defaults)?;
        let limit = self.inner.options.max_audio_seconds;
        let tier = self.inner.options.tier.clone();
        let inner = Arc::clone(&self.inner);
        let read = move || {
            let mut prepared = Prepared::read(&upload, settings, limit, &tier)?;
            // The reference's rules leave nothing to lower.
            let may_lower = tier.allow_degrade && prepared.settings.parity == Parity::Unspecified;
            if let Some(fleet) = inner.fleet.get()
                && let Some(lowered) = planning::admit(&prepared.request(), (&tier, may_lower), fleet)?
            {
                prepared = prepared.lowered(lowered);
            }
            let request_hash = request_hash(&upload.spec, &upload.picture, &upload.audio);
            let Upload { picture, audio, order, .. } = upload;
            let generation = prepared.generation();
            Ok::<_, Fault>(Accepted { generation, picture, audio, order, request_hash, attached })
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

    /// Removes now and then what is kept longer or is more than wanted, and what no record names.
    async fn tidy(self) {
        let closing = self.inner.closing.clone();
        let tidying = async {
            let (mut pace, mut swept) = (tokio::time::interval(TIDY), Instant::now());
            loop {
                pace.tick().await;
                if let Err(fault) = self.inner.store.tidy(&self.inner.options.retention).await {
                    tracing::error!(%fault, "the data folder was not tidied");
                }
                if swept.elapsed() < SWEEP {
                    continue;
                }
                swept = Instant::now();
                if let Err(fault) = self.inner.store.sweep().await {
                    tracing::error!(%fault, "the files were not held against the records");
                }
            }
        };
        closing.run_until_cancelled(tidying).await;
    }

    /// Ends now and then what waits and is too late.
    async fn watch_deadlines(self) {
        let closing = self.inner.closing.clone();
        let watching = async {
            let mut pace = tokio::time::interval(DEADLINES);
            loop {
                pace.tick().await;
                if let Err(fault) = self.inner.store.end_late().await {
                    tracing::error!(%fault, "the deadlines were not looked at");
                }
            }
        };
        closing.run_until_cancelled(watching).await;
    }

    /// Refuses while the disk is nearly full or the object store fails, so that what runs can end.
    async fn check_space(&self) -> Result<(), Fault> {
        self.inner.store.check_files().await?;
        let (free, wanted) = (self.inner.store.free_bytes().await?, self.inner.options.min_free_bytes);
        if free >= wanted {
            return Ok(());
        }
        let message = format!("the disk of the data folder is full: {free} bytes are free, {wanted} must stay so");
        Err(Fault::new(Kind::Busy { retry_after: SPACE_RETRY }, message))
    }

    /// Runs one generation after the other.
    async fn work(self) {
        let workshop = Workshop {
            stages: self.inner.stages.clone(),
            ffmpeg: self.inner.options.ffmpeg.clone(),
            directory: self.inner.store.work_dir(),
            patience: self.inner.options.stage_patience,
            pace: Pace::new(self.inner.options.concurrent, self.inner.options.stuck_after),
            tier: self.inner.options.tier.clone(),
            fleet: None,
            allowance: Allowance::new(self.inner.options.default_deadline, self.inner.options.concurrent),
            previews: self.inner.previews.clone(),
            stopping: self.inner.stopping.clone(),
        };
        let closing = self.inner.closing.clone();
        while let Some(lease) = closing.run_until_cancelled(self.inner.store.next()).await {
            let began = Instant::now();
            let fleet = self.inner.fleet.get().cloned();
            runner::run(Arc::clone(&lease), Workshop { fleet, ..workshop.clone() }).await;
            if lease.generation().await.state() == GenerationState::Completed {
                let mut pace = lock(&self.inner.pace);
                pace.truncate(PACE - 1);
                pace.push_front(began.elapsed().as_secs_f64());
            }
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
        let mut known = lock(&self.inner.defaults);
        match asked {
            Ok(defaults) => Ok(*known.insert(defaults)),
            Err(fault) => known.ok_or(fault),
        }
    }
}

fn shutting_down() -> Fault {
    Fault::new(Kind::Unavailable, "the gateway is shutting down")
}

/// The holders only put in and take out whole values, so they are sound even after a panic of one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
