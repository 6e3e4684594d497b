//! What the five stages have in common: weights that load at the first need, and `StageService`.

use std::{
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc, LazyLock, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt as _};
use proto::v1::{
    DescribeRequest, DescribeResponse, DeviceUse, GenerationDefaults, LoadRequest, LoadResponse, MemoryReport,
    SetPressureRequest, SetPressureResponse, Stage, StagePart, UnloadRequest, UnloadResponse, WatchMemoryRequest,
    WatchMemoryResponse,
    stage_service_server::{StageService, StageServiceServer},
};
use tokio_stream::wrappers::IntervalStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::{
    ServiceError,
    config::{Compute, StageConfig},
    device::{CancelToken, DeviceWorker, Pending, Relieved, Tenant},
    hardware::{CardFault, DeviceName, PRESSURE_PERCENTS},
    memory::{Watch, WeightsReport},
    places::{Place, Work},
};

/// The time since the first call.
#[must_use]
pub fn clock() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed()
}

/// What a stage puts on its device: the networks, and all that lives and dies with them.
pub trait StageModel: Send + Sized + 'static {
    /// Which stage it is.
    const STAGE: Stage;
    /// The stage's name: of its binary and its log lines.
    const NAME: &'static str;
    /// What the stage is told besides the settings that every stage has.
    type Options: Send + Sync + 'static;

    /// Reads the stage's weights out of the folder of the models, to compute with them on that device in that type.
    ///
    /// Errors: [`ServiceError::FailedPrecondition`] that names the file and the tensor.
    fn open(models: &Path, on: (DeviceName, Compute), options: &Self::Options) -> Result<Self, ServiceError>;

    /// The files below `models` that decide what the stage computes; none where they cannot be found.
    fn files(models: &Path, options: &Self::Options) -> Vec<PathBuf>;

    /// Settings that the stage's checkpoint asks for. One that cannot be read asks for none.
    fn defaults(_models: &Path) -> Option<GenerationDefaults> {
        None
    }

    /// Bytes kept between requests besides the weights.
    fn kept_bytes(&self) -> u64 {
        0
    }

    /// How its blocks of weights came from their files, where they come one by one: by device, in their order.
    fn weights(&self) -> Vec<WeightsReport> {
        Vec::new()
    }

    /// Drops what is kept between requests and can be computed again.
    fn trim(&mut self) {}

    /// Drops what is kept between requests and nobody has asked for in a long time.
    fn tidy(&mut self) {}

    /// Runs `work`, which asks the watch between its layers and before each large allocation, and ends with an error
    /// after a no.
    fn watched<R>(watch: Watch, work: impl FnOnce() -> R) -> R;
}

/// One stage on its device, or spread over several. All work on the model happens on the first one's thread, where it
/// loads at the first need, and holds all of them meanwhile.
pub struct StageHost<M: StageModel> {
    models: PathBuf,
    compute: Compute,
    options: M::Options,
    device: DeviceWorker,
    others: Vec<DeviceWorker>,
    /// What the stage has of each of its devices.
    places: Arc<[Place]>,
    loaded: AtomicBool,
    model: Mutex<Option<M>>,
    shutdown: CancellationToken,
}

impl<M: StageModel> StageHost<M> {
    /// A stage that has not loaded yet. Streams without an end of their own stop at `shutdown`.
    #[must_use]
    pub fn new(
        config: &StageConfig,
        options: M::Options,
        device: DeviceWorker,
        shutdown: CancellationToken,
    ) -> Arc<Self> {
        Self::over(config, options, (device, Vec::new()), shutdown)
    }

    /// As [`new`](Self::new), of a stage whose network is spread over a device and others, which follow it in the order
    /// of the network's parts.
    #[must_use]
    pub fn over(
        config: &StageConfig,
        options: M::Options,
        (device, others): (DeviceWorker, Vec<DeviceWorker>),
        shutdown: CancellationToken,
    ) -> Arc<Self> {
        let all = std::iter::once(&device).chain(&others);
        let host = Arc::new(Self {
            models: config.models.clone(),
            compute: config.compute,
            options,
            places: all.map(|device| Place::on(device.budget())).collect(),
            device,
            others,
            loaded: AtomicBool::new(false),
            model: Mutex::new(None),
            shutdown,
        });
        for device in host.devices() {
            let tenant: Weak<dyn Tenant> = Arc::<Self>::downgrade(&host);
            device.settle(tenant);
        }
        host
    }

    /// The stage's devices, in the order of its network's parts.
    fn devices(&self) -> impl Iterator<Item = &DeviceWorker> {
        std::iter::once(&self.device).chain(&self.others)
    }

    /// Runs `work` on the device's thread, with the model loaded, where a generation already has something on the
    /// device. See [`DeviceWorker::try_submit`].
    ///
    /// Errors, besides those: [`ServiceError::DeviceMemory`] when the work passes the device's budget.
    pub fn submit<R, F>(self: &Arc<Self>, work: F) -> Result<Pending<R>, ServiceError>
    where
        R: Send + 'static,
        F: FnOnce(&mut M, &CancelToken) -> Result<R, ServiceError> + Send + 'static,
    {
        let host = self.clone();
        self.device
            .try_submit_over(&self.others, move |cancel| host.with_model(cancel, false, |model| work(model, cancel)))
    }

    /// As [`submit`](Self::submit), for work with which a generation begins.
    ///
    /// Errors, besides those: [`ServiceError::ResourceExhausted`] while the device is nearly full and others need it.
    pub fn submit_new<R, F>(self: &Arc<Self>, work: F) -> Result<Pending<R>, ServiceError>
    where
        R: Send + 'static,
        F: FnOnce(&mut M, &CancelToken) -> Result<R, ServiceError> + Send + 'static,
    {
        let host = self.clone();
        self.device
            .try_submit_over(&self.others, move |cancel| host.with_model(cancel, true, |model| work(model, cancel)))
    }

    /// Runs `work` on the device's thread if the model is loaded, and does nothing otherwise.
    pub fn submit_if_loaded<F>(self: &Arc<Self>, work: F) -> Result<Pending<()>, ServiceError>
    where
        F: FnOnce(&mut M) + Send + 'static,
    {
        let host = self.clone();
        self.device.try_submit_over(&self.others, move |_| {
            if let Some(model) = host.model.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                work(model);
                host.keeps(model);
            }
            Ok(())
        })
    }

    fn with_model<R>(
        &self,
        cancel: &CancelToken,
        new_work: bool,
        work: impl FnOnce(&mut M) -> Result<R, ServiceError>,
    ) -> Result<R, ServiceError> {
        self.devices().try_for_each(|device| device.make_room(M::NAME, new_work))?;
        let running = Work::new(&self.places);
        let watch = Watch::new(M::NAME, cancel.clone(), running.clone());
        let result = M::watched(watch.clone(), || self.run(&running, work));
        match (watch.reason(), result) {
            // What the networks make of a stop is not worth telling; why they were stopped is.
            (Some(reason), Err(_)) => {
                tracing::warn!(stage = M::NAME, "stopped: {reason}");
                Err(reason)
            }
            (_, result) => result.map_err(|error| self.settle_fault(error, running.place())),
        }
    }

    /// What an error of a card means here. Memory that was too small is the caller's to do with less; a card that
    /// nothing works on any more ends the process, as only another one can use it.
    ///
    /// - `place`: the number of the device that worked
    fn settle_fault(&self, error: ServiceError, place: usize) -> ServiceError {
        let device = self.devices().nth(place).unwrap_or(&self.device);
        match CardFault::of(&error) {
            None => error,
            Some(CardFault::OutOfMemory) => {
                tracing::warn!(stage = M::NAME, "{error}");
                let budget = device.budget();
                let (free_bytes, budget_bytes) = (budget.free_bytes(), budget.device().budget_bytes);
                // How much was asked for is in no error of the driver; it was more than there was.
                let (needed_bytes, device) = (free_bytes.saturating_add(1), budget.device().label());
                ServiceError::DeviceMemory { stage: M::NAME.to_owned(), device, needed_bytes, free_bytes, budget_bytes }
            }
            Some(CardFault::Lost) => {
                device.lose(&error.to_string());
                self.shutdown.cancel();
                device.works().err().unwrap_or(error)
            }
        }
    }

    /// What a server of this stage ends with.
    ///
    /// Errors: as [`DeviceWorker::works`], of any of its devices.
    pub fn ended(&self) -> Result<(), ServiceError> {
        self.devices().try_for_each(DeviceWorker::works)
    }

    fn run<R>(&self, running: &Work, work: impl FnOnce(&mut M) -> Result<R, ServiceError>) -> Result<R, ServiceError> {
        // A panic in earlier work leaves the model itself whole: work only reads the weights.
        let mut slot = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            tracing::info!(stage = M::NAME, models = %self.models.display(), "loading");
            let (opened, left) = running.run(|| self.open());
            *slot = Some(opened?);
            self.places.iter().zip(left).for_each(|(place, bytes)| place.meter.settles(bytes));
            self.tell();
            self.loaded.store(true, Relaxed);
            let resident_bytes: u64 = self.places.iter().map(|place| place.meter.held_bytes()).sum();
            tracing::info!(stage = M::NAME, resident_bytes, "loaded");
        }
        match slot.as_mut() {
            Some(model) => {
                let (result, _) = running.run(|| work(model));
                self.keeps(model);
                self.places.iter().zip(model.weights()).for_each(|(place, weights)| place.meter.brought(weights));
                result
            }
            None => Err(ServiceError::internal("the model is gone")),
        }
    }

    fn open(&self) -> Result<M, ServiceError> {
        M::open(&self.models, (self.device.budget().device().name, self.compute), &self.options)
    }

    fn unload(&self) {
        let dropped = self.model.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(dropped);
        self.loaded.store(false, Relaxed);
        self.places.iter().for_each(|place| place.meter.unloaded());
        self.tell();
    }

    /// Notes what the model keeps between requests, which is on the first device.
    fn keeps(&self, model: &M) {
        if let Some(first) = self.places.first() {
            first.meter.keep(model.kept_bytes());
        }
        self.tell();
    }

    /// Tells the devices what the stage holds now.
    fn tell(&self) {
        self.places.iter().for_each(|place| place.budget.holds(M::NAME, place.meter.held_bytes()));
    }

    /// The stage's memory now: of its first device, and where it is spread, of each.
    #[must_use]
    pub fn memory(&self) -> MemoryReport {
        let budget = self.device.budget();
        let parts = if self.others.is_empty() { Vec::new() } else { self.parts() };
        let of_first = self.places.first().map(|place| place.meter.report()).unwrap_or_default();
        let all =
            |count: fn(&WeightsReport) -> u32| self.places.iter().map(|place| count(&place.meter.weights())).sum();
        let spent = |ms: fn(&WeightsReport) -> u64| self.places.iter().map(|place| ms(&place.meter.weights())).sum();
        MemoryReport {
            budget_bytes: budget.device().budget_bytes,
            // Each of them is asked, as a change is noted when it is.
            pressure: self.places.iter().filter(|place| place.budget.pressed()).count() > 0,
            free_bytes: budget.free_bytes(),
            pressure_percent: budget.pressure_percent().into(),
            pressure_count: self.places.iter().map(|place| place.budget.pressures()).sum(),
            pressure_refusals: self.places.iter().map(|place| place.budget.refusals()).sum(),
            unloaded_stages: self.devices().map(DeviceWorker::unloaded).sum(),
            emptied_caches: self.devices().map(DeviceWorker::emptied).sum(),
            device_bytes: budget.held_bytes(),
            device_peak_bytes: budget.peak_bytes(),
            weight_blocks: all(|weights| weights.blocks),
            resident_weight_blocks: all(|weights| weights.resident_blocks),
            weights_waited_ms: spent(|weights| weights.waited_ms),
            weights_hidden_ms: spent(|weights| weights.hidden_ms),
            parts,
            ..of_first
        }
    }

    /// Bytes that work of this stage may hold now on one of its devices, by number. On a card, where they are fewer than
    /// `wanted`, stages that no generation needs are unloaded for it first; on a processor weights stay in their files, so that
    /// others hold little. To be called by work of this stage.
    #[must_use]
    pub fn free_for(&self, part: usize, wanted: u64) -> u64 {
        let Some(device) = self.devices().nth(part) else { return 0 };
        match device.budget().device().name.card() {
            Some(_) => device.free_for(M::NAME, wanted),
            None => device.budget().free_bytes(),
        }
    }

    /// What each device of a spread stage has of it.
    fn parts(&self) -> Vec<StagePart> {
        let mut first_block = 0;
        let part = |(place, device): (&Place, &DeviceWorker)| {
            let (report, weights) = (place.meter.report(), place.meter.weights());
            let begin = first_block;
            first_block += weights.blocks;
            StagePart {
                device: place.budget.device().label(),
                device_id: device.id().to_owned(),
                first_block: begin,
                blocks: weights.blocks,
                resident_blocks: weights.resident_blocks,
                resident_bytes: report.resident_bytes,
                peak_bytes: report.peak_bytes,
                budget_bytes: place.budget.device().budget_bytes,
                free_bytes: place.budget.free_bytes(),
                device_bytes: place.budget.held_bytes(),
                device_peak_bytes: place.budget.peak_bytes(),
            }
        };
        self.places.iter().zip(self.devices()).map(part).collect()
    }

    /// What a call took of the stage's first device; it has the others for as long.
    #[must_use]
    pub fn used(&self, took: Duration) -> DeviceUse {
        DeviceUse {
            device: self.device.budget().device().name.to_string(),
            device_id: self.device.id().to_owned(),
            seconds: took.as_secs_f64(),
        }
    }

    /// The stage's `StageService`.
    #[must_use]
    pub fn stage_service(self: &Arc<Self>) -> StageServiceServer<StageServer<M>> {
        StageServiceServer::new(StageServer(self.clone()))
    }
}

impl<M: StageModel> Tenant for StageHost<M> {
    fn name(&self) -> &'static str {
        M::NAME
    }

    fn serves(&self) -> bool {
        self.places.first().is_some_and(|first| first.meter.kept_bytes() > 0)
    }

    fn tidy(&self) {
        if let Some(model) = self.model.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            model.tidy();
            self.keeps(model);
        }
    }

    fn relieve(&self) -> Relieved {
        let mut slot = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(model) = slot.as_mut() else { return Relieved::default() };
        let before = model.kept_bytes();
        model.trim();
        self.keeps(model);
        let (cache_bytes, unloaded) = (before.saturating_sub(model.kept_bytes()), !self.serves());
        drop(slot);
        if unloaded {
            self.unload();
        }
        Relieved { cache_bytes, unloaded }
    }
}

/// Answers `StageService` for one stage.
pub struct StageServer<M: StageModel>(Arc<StageHost<M>>);

#[tonic::async_trait]
impl<M: StageModel> StageService for StageServer<M> {
    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let host = self.0.clone();
        let read = tokio::task::spawn_blocking(move || {
            let files = M::files(&host.models, &host.options);
            (checkpoint_digest(&host.models, &files).unwrap_or_default(), M::defaults(&host.models))
        });
        let (checkpoint_digest, defaults) = read.await.map_err(ServiceError::internal)?;
        let host = &self.0;
        Ok(Response::new(DescribeResponse {
            stage: M::STAGE.into(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            device: host.device.budget().device().label(),
            device_id: host.device.id().to_owned(),
            loaded: host.loaded.load(Relaxed),
            checkpoint_digest,
            queued: u32::try_from(host.device.waiting()).unwrap_or(u32::MAX),
            queue_capacity: u32::try_from(host.device.capacity()).unwrap_or(u32::MAX),
            memory: Some(host.memory()),
            defaults,
            compute: format!("{:?}", host.compute).to_lowercase(),
            advances: host.device.budget().advances(),
        }))
    }

    async fn load(&self, _: Request<LoadRequest>) -> Result<Response<LoadResponse>, Status> {
        self.0.submit(|_, _| Ok(()))?.await?;
        Ok(Response::new(LoadResponse { memory: Some(self.0.memory()) }))
    }

    async fn unload(&self, request: Request<UnloadRequest>) -> Result<Response<UnloadResponse>, Status> {
        let (host, idle_only) = (self.0.clone(), request.into_inner().idle_only);
        let unload = move |_: &_| {
            let busy = idle_only && host.serves();
            if !busy {
                host.unload();
            }
            Ok(busy)
        };
        let busy = self.0.device.try_submit_over(&self.0.others, unload)?.await?;
        Ok(Response::new(UnloadResponse { memory: Some(self.0.memory()), busy }))
    }

    async fn set_pressure(
        &self,
        request: Request<SetPressureRequest>,
    ) -> Result<Response<SetPressureResponse>, Status> {
        let percent = request.into_inner().percent;
        let (least, most) = (PRESSURE_PERCENTS.start(), PRESSURE_PERCENTS.end());
        let checked = u8::try_from(percent).ok().filter(|percent| PRESSURE_PERCENTS.contains(percent));
        let percent = checked
            .ok_or_else(|| ServiceError::invalid("percent", format!("{percent}, allowed are {least} to {most}")))?;
        self.0.places.iter().for_each(|place| place.budget.set_pressure_percent(percent));
        Ok(Response::new(SetPressureResponse { memory: Some(self.0.memory()) }))
    }

    type WatchMemoryStream = Pin<Box<dyn Stream<Item = Result<WatchMemoryResponse, Status>> + Send>>;

    async fn watch_memory(
        &self,
        request: Request<WatchMemoryRequest>,
    ) -> Result<Response<Self::WatchMemoryStream>, Status> {
        let interval = match request.into_inner().interval_ms {
            0 => 1000,
            ms @ 100..=60_000 => ms,
            ms => return Err(ServiceError::invalid("interval_ms", format!("{ms}, allowed are 100 to 60000")).into()),
        };
        let host = self.0.clone();
        let end = host.shutdown.clone().cancelled_owned();
        let reports = IntervalStream::new(tokio::time::interval(Duration::from_millis(interval.into())))
            .map(move |_| Ok(WatchMemoryResponse { memory: Some(host.memory()) }))
            .take_until(end);
        Ok(Response::new(Box::pin(reports)))
    }
}

/// Bytes at a file's end that its checkpoint's hash knows: values of its last tensors, which training changes.
const TAIL: u64 = 64 << 10;

/// Hash of the names, sizes and last bytes of files below `models`, in hexadecimal; nothing where there is no file.
///
/// Errors: a file cannot be read.
pub fn checkpoint_digest(models: &Path, files: &[PathBuf]) -> std::io::Result<String> {
    if files.is_empty() {
        return Ok(String::new());
    }
    let named = files.iter().map(|file| {
        let name = file.strip_prefix(models).unwrap_or(file).to_string_lossy().into_owned();
        let mut opened = std::fs::File::open(file)?;
        let size = opened.metadata()?.len();
        opened.seek(SeekFrom::Start(size.saturating_sub(TAIL)))?;
        let mut tail = Vec::new();
        opened.take(TAIL).read_to_end(&mut tail)?;
        Ok((name, size, tail))
    });
    let mut named = named.collect::<std::io::Result<Vec<_>>>()?;
    named.sort();
    // FNV-1a: it tells checkpoints apart, and guards nothing.
    let one = |(name, size, tail): (String, u64, Vec<u8>)| {
        name.into_bytes().into_iter().chain([0]).chain(size.to_le_bytes()).chain(tail)
    };
    let bytes = named.into_iter().flat_map(one);
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    Ok(format!("{hash:016x}"))
}

#[cfg(test)]
mod tests {
    use proto::v1::stage_service_client::StageServiceClient;
    use tonic::{Code, service::Routes, transport::Channel};

    use super::*;
    use crate::{
        client,
        server::{Lifetime, serve},
    };

    /// A model whose weights are the file `vae-decode/w.safetensors`.
    struct Weights(Vec<u8>);

    impl StageModel for Weights {
        const STAGE: Stage = Stage::VaeDecode;
        const NAME: &'static str = "vae-decode";
        type Options = ();

        fn open(models: &Path, _: (DeviceName, Compute), (): &()) -> Result<Self, ServiceError> {
            let file = models.join("vae-decode/w.safetensors");
            std::fs::read(&file)
                .map(Self)
                .map_err(|e| ServiceError::failed_precondition(format!("{}: {e}", file.display())))
        }

        fn watched<R>(_: Watch, work: impl FnOnce() -> R) -> R {
            work()
        }

        fn files(models: &Path, (): &()) -> Vec<PathBuf> {
            Some(models.join("vae-decode/w.safetensors")).filter(|file| file.exists()).into_iter().collect()
        }
    }

    fn start(models: &Path) -> (StageServiceClient<Channel>, Arc<StageHost<Weights>>) {
        let shutdown = CancellationToken::new();
        let device = DeviceWorker::spawn(&StageConfig::local(models).device, 2).unwrap();
        let host = StageHost::new(&StageConfig::local(models), (), device, shutdown.clone());
        let (channel, incoming) = client::in_memory();
        let life = Lifetime { shutdown, drain: Duration::from_secs(1) };
        let routes = Routes::new(host.stage_service());
        tokio::spawn(async move { serve(routes, &[], incoming, life).await });
        (StageServiceClient::new(channel), host)
    }

    #[tokio::test]
    async fn weights_load_when_they_are_there_and_not_before() {
        let models = tempfile::tempdir().unwrap();
        let (mut client, host) = start(models.path());
        let described = client.describe(DescribeRequest {}).await.unwrap().into_inner();
        assert_eq!((described.loaded, described.checkpoint_digest.as_str()), (false, ""));

        let error = client.load(LoadRequest {}).await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition);
        assert!(error.message().contains("w.safetensors"), "{error}");

        let folder = models.path().join("vae-decode");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("w.safetensors"), vec![3; 32 << 20]).unwrap();
        let memory = client.load(LoadRequest {}).await.unwrap().into_inner().memory.unwrap();
        assert!(memory.resident_bytes >= 30 << 20, "{memory:?}");
        assert_eq!(host.submit(|model, _| Ok(model.0.len())).unwrap().await, Ok(32 << 20));
        let described = client.describe(DescribeRequest {}).await.unwrap().into_inner();
        assert!(described.loaded && described.stage() == Stage::VaeDecode);
        assert_eq!((described.checkpoint_digest.len(), described.queue_capacity), (16, 2));

        let memory = client.unload(UnloadRequest::default()).await.unwrap().into_inner().memory.unwrap();
        assert!(memory.resident_bytes == 0 && memory.peak_bytes >= 30 << 20, "{memory:?}");
        assert!(!client.describe(DescribeRequest {}).await.unwrap().into_inner().loaded);
    }

    #[tokio::test]
    async fn a_panic_in_a_request_leaves_the_stage_working() {
        let models = tempfile::tempdir().unwrap();
        std::fs::create_dir(models.path().join("vae-decode")).unwrap();
        std::fs::write(models.path().join("vae-decode/w.safetensors"), [1, 2]).unwrap();
        let (_, host) = start(models.path());
        let error = host.submit(|_, _| -> Result<(), _> { panic!("boom") }).unwrap().await.unwrap_err();
        assert_eq!(error.code_name(), "INTERNAL");
        assert_eq!(host.submit(|model, _| Ok(model.0.len())).unwrap().await, Ok(2));
    }

    #[tokio::test]
    async fn memory_is_streamed_and_the_interval_checked() {
        let models = tempfile::tempdir().unwrap();
        let (mut client, host) = start(models.path());
        let error = client.watch_memory(WatchMemoryRequest { interval_ms: 99 }).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        let mut reports = client.watch_memory(WatchMemoryRequest { interval_ms: 100 }).await.unwrap().into_inner();
        for _ in 0..3 {
            assert!(reports.message().await.unwrap().unwrap().memory.unwrap().process_bytes > 0);
        }
        host.shutdown.cancel();
        while reports.message().await.unwrap().is_some() {}
    }

    #[tokio::test]
    async fn the_mark_of_a_nearly_full_device_is_changed_while_it_works_and_checked() {
        let models = tempfile::tempdir().unwrap();
        let (mut client, host) = start(models.path());
        for percent in [0, 19, 101, u32::MAX] {
            let error = client.set_pressure(SetPressureRequest { percent }).await.unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{percent}");
            assert!(error.message().contains(&format!("{percent}, allowed are 20 to 100")), "{error}");
        }
        assert_eq!(host.memory().pressure_percent, 85);
        let set = client.set_pressure(SetPressureRequest { percent: 60 }).await.unwrap().into_inner();
        assert_eq!((set.memory.unwrap().pressure_percent, host.memory().pressure_percent), (60, 60));
    }

    #[test]
    fn the_digest_tells_names_and_sizes_apart() {
        let digest = |files: &[(&str, usize)]| {
            let folder = tempfile::tempdir().unwrap();
            std::fs::create_dir(folder.path().join("clip")).unwrap();
            let paths: Vec<PathBuf> = files.iter().map(|(name, _)| folder.path().join(name)).collect();
            for (path, (_, size)) in paths.iter().zip(files) {
                std::fs::write(path, vec![0; *size]).unwrap();
            }
            checkpoint_digest(folder.path(), &paths).unwrap()
        };
        let base = digest(&[("config.json", 3), ("clip/a.safetensors", 9)]);
        assert_eq!(base, digest(&[("clip/a.safetensors", 9), ("config.json", 3)]));
        assert_ne!(base, digest(&[("config.json", 3), ("clip/a.safetensors", 10)]));
        assert_ne!(base, digest(&[("config.json", 3), ("clip/b.safetensors", 9)]));
        assert_eq!(digest(&[]), "");
    }

    #[test]
    fn the_digest_tells_values_apart_that_training_changed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("w.safetensors");
        let digest = |last: u8| {
            let mut bytes = vec![0; 200_000];
            bytes[199_000] = last;
            std::fs::write(&file, bytes).unwrap();
            checkpoint_digest(folder.path(), std::slice::from_ref(&file)).unwrap()
        };
        assert_ne!(digest(1), digest(2));
        assert_eq!(digest(1), digest(1));
    }
}
