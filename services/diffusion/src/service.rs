//! `DiffusionService`.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use candle_core::Device;
use model::{
    Precision,
    blueprint::transformer_table,
    checkpoint::{self, Choice, Setup},
    diffusion::{DiffusionStage, Part},
    ops,
    weights::Swapped,
};
use planner::{
    Precision as Stored,
    cost::{
        cpu::{self, Cpu, pass_bytes, resident_beside},
        cuda,
        spread::divide,
    },
    table::Transformer,
};
use proto::{
    tensor::HostTensor,
    v1::{
        Branch, CloseSessionRequest, CloseSessionResponse, DataType, GenerationDefaults, OpenSessionHeader,
        OpenSessionRequest, OpenSessionResponse, PassMode, PredictHeader, PredictItem, PredictRequest, PredictResponse,
        PredictSummary, PromptKind, Stage, TensorPart, diffusion_service_server::DiffusionService,
        open_session_request, predict_request, predict_response,
    },
};
use service_kit::{
    ServiceError,
    config::Compute,
    device::CancelToken,
    hardware::{DeviceConfig, DeviceName},
    memory::{Watch, WeightsReport},
    stage::{StageHost, StageModel, clock},
    tensors::{Item, Limits, Outbox, ReplyStream, RequestReader, streamed_reply},
};
use tonic::{Request, Response, Status, Streaming};

use crate::session::{Session, TENSORS, clip_frames};

/// Most sessions at once.
const MAX_SESSIONS: usize = 32;
/// Most items of one request.
const MAX_ITEMS: usize = 64;
/// Most latent frames of one window.
const MAX_WINDOW: usize = 1024;

/// The network and the sessions on the device.
pub(crate) struct Model {
    stage: DiffusionStage,
    sizes: Transformer,
    stored: Stored,
    cpu: Cpu,
    device: Device,
    /// Blocks of each of its devices.
    blocks: Vec<u64>,
    sessions: HashMap<String, Session>,
}

impl StageModel for Model {
    const STAGE: Stage = Stage::Diffusion;
    const NAME: &'static str = "diffusion";
    type Options = Options;

    fn open(models: &Path, on: (DeviceName, Compute), options: &Options) -> Result<Self, ServiceError> {
        let fault = |e: model::Error| ServiceError::failed_precondition(e.to_string());
        let setup = setup(on, options.weights)?;
        let parts = options.parts(models, &setup)?;
        let stage = DiffusionStage::open_over(models, &setup, &parts).map_err(fault)?;
        let (sizes, stored) = transformer_table(models, options.weights).map_err(fault)?;
        let blocks = stage.transformer.swaps().map(|swap| swap.sizes().len() as u64).collect();
        let value_bytes = if on.1 == Compute::F32 { 4 } else { 2 };
        let cpu = Cpu { threads: ops::threads() as u64, packs: ops::has_kernel(), value_bytes };
        Ok(Self { stage, sizes, stored, cpu, device: setup.device, blocks, sessions: HashMap::new() })
    }

    fn weights(&self) -> Vec<WeightsReport> {
        let report = |told: Swapped| WeightsReport::new([told.blocks, told.resident], [told.waited, told.hidden]);
        self.stage.transformer.swaps().map(|swap| report(swap.told())).collect()
    }

    fn watched<R>(watch: Watch, work: impl FnOnce() -> R) -> R {
        let told = watch.clone();
        let moves = move |part, bytes| told.moves(part, bytes);
        model::memory::watched_over(move |bytes| watch.allows(bytes), moves, work)
    }

    fn files(models: &Path, options: &Options) -> Vec<PathBuf> {
        checkpoint::files(models, checkpoint::Stage::Diffusion, options.weights)
    }

    fn defaults(models: &Path) -> Option<GenerationDefaults> {
        let wanted = DiffusionStage::config(models).ok()?.defaults?;
        Some(GenerationDefaults {
            size: Some(wanted.size),
            steps: Some(wanted.steps),
            guidance_scale: Some(wanted.guidance_scale),
            flow_shift: Some(wanted.flow_shift),
        })
    }

    fn tidy(&mut self) {
        self.sessions.retain(|_, session| !session.is_idle());
    }

    fn trim(&mut self) {
        self.tidy();
        self.sessions.values_mut().for_each(Session::forget_features);
    }

    fn kept_bytes(&self) -> u64 {
        self.sessions.values().map(Session::bytes).sum()
    }
}

/// Answers `DiffusionService`.
pub(crate) struct Service {
    host: Arc<StageHost<Model>>,
    session_limits: Limits,
    predict_limits: Limits,
}

impl Service {
    pub(crate) fn new(host: Arc<StageHost<Model>>, max_tensor_bytes: u64) -> Self {
        let session_limits = Limits::new(max_tensor_bytes, 4);
        Self { host, session_limits, predict_limits: Limits::new(max_tensor_bytes, 4) }
    }
}

#[tonic::async_trait]
impl DiffusionService for Service {
    async fn open_session(
        &self,
        request: Request<Streaming<OpenSessionRequest>>,
    ) -> Result<Response<OpenSessionResponse>, Status> {
        let mut reader = RequestReader::new(request.into_inner(), self.session_limits, split_session);
        let header = reader.header().await?;
        check_session_id(&header.session_id)?;
        if !(header.fps > 0.0 && header.fps <= 1000.0) {
            return Err(ServiceError::invalid("fps", format!("{}, allowed are over 0 to 1000", header.fps)).into());
        }
        let tensors = reader.all(TENSORS).await?;
        let opening = self.host.submit_new(move |model, _| model.open_session(header, &tensors))?;
        let ((), took) = opening.timed().await?;
        let (memory, device_use) = (Some(self.host.memory()), Some(self.host.used(took)));
        Ok(Response::new(OpenSessionResponse { memory, device_use }))
    }

    type PredictStream = ReplyStream<PredictResponse>;

    async fn predict(
        &self,
        request: Request<Streaming<PredictRequest>>,
    ) -> Result<Response<Self::PredictStream>, Status> {
        let mut reader = RequestReader::new(request.into_inner(), self.predict_limits, split_predict);
        let header = reader.header().await?;
        check_predict(&header)?;
        let mut latents = Vec::with_capacity(header.items.len());
        while let Some(tensor) = reader.next().await? {
            let expected = format!("latents.{}", latents.len());
            if latents.len() == header.items.len() || tensor.name() != expected {
                let reason = format!("expected latents.0 to latents.{}, in order", header.items.len() - 1);
                return Err(ServiceError::invalid(tensor.name(), reason).into());
            }
            latents.push(tensor);
        }
        if latents.len() < header.items.len() {
            return Err(ServiceError::invalid(format!("latents.{}", latents.len()), "the tensor is missing").into());
        }
        let (host, settled) = (self.host.clone(), self.host.clone());
        // Room for every result, so that a slow reader never holds the device.
        let messages = streamed_reply(header.items.len(), wrap, |outbox| {
            let work = move |model: &mut Model, cancel: &CancelToken| {
                model.settle(&header, |part, wanted| settled.free_for(part, wanted));
                model.predict(&header, latents, (&outbox, cancel))
            };
            let pending = self.host.submit(work)?;
            Ok(async move {
                let (device_seconds, took) = pending.timed().await?;
                let (memory, device_use) = (Some(host.memory()), Some(host.used(took)));
                let summary = PredictSummary { device_seconds, memory, device_use };
                Ok(PredictResponse { body: Some(predict_response::Body::Summary(summary)) })
            })
        })?;
        Ok(Response::new(messages))
    }

    async fn close_session(
        &self,
        request: Request<CloseSessionRequest>,
    ) -> Result<Response<CloseSessionResponse>, Status> {
        let id = request.into_inner().session_id;
        check_session_id(&id)?;
        self.host.submit_if_loaded(move |model| drop(model.sessions.remove(&id)))?.await?;
        Ok(Response::new(CloseSessionResponse {}))
    }
}

impl Model {
    fn open_session(&mut self, header: OpenSessionHeader, tensors: &[HostTensor; 9]) -> Result<(), ServiceError> {
        self.tidy();
        if self.sessions.len() >= MAX_SESSIONS && !self.sessions.contains_key(&header.session_id) {
            return Err(ServiceError::ResourceExhausted {
                message: format!("{MAX_SESSIONS} sessions are open, which is the most"),
                retry_after: Some(Duration::from_secs(10)),
            });
        }
        let session = Session::new(&header, tensors, self.stage.transformer.widths())?;
        self.sessions.insert(header.session_id, session);
        Ok(())
    }

    /// Lets as many blocks of weights stay on each device as the largest item leaves room for in what is free there now.
    ///
    /// - `free_for`: bytes that are free on a device, after others made room where there are fewer than so many
    fn settle(&self, header: &PredictHeader, free_for: impl Fn(usize, u64) -> u64) {
        let Some(session) = self.sessions.get(&header.session_id) else { return };
        let on_card = !matches!(self.device, Device::Cpu);
        let works = |item| {
            let pass = session.pass(item, header.keep_features);
            match on_card {
                true => vec![cuda::pass_bytes(&self.sizes, &pass, self.cpu.value_bytes); self.blocks.len()],
                false => pass_bytes(&self.sizes, &pass, (&self.blocks, self.cpu)),
            }
        };
        let works: Vec<Vec<u64>> = header.items.iter().map(works).collect();
        let transformer = &self.stage.transformer;
        let ahead = if on_card { cuda::AHEAD } else { cpu::AHEAD };
        for (part, (swap, &others)) in transformer.swaps().zip(transformer.unswapped_bytes()).enumerate() {
            let most = works.iter().filter_map(|work| work.get(part)).copied().max().unwrap_or(0);
            let sizes = swap.sizes();
            let all: u64 = sizes.iter().sum();
            let (taken, free) = if on_card {
                // Weights that are on the card already are not free there, but free for weights.
                let (taken, here) = (most + cuda::transformer_widened(&self.sizes, self.stored), swap.held_bytes());
                let free = free_for(part, all.saturating_add(taken).saturating_sub(here));
                (taken, cuda::usable(free.saturating_add(here)))
            } else {
                let taken = most.saturating_add(others);
                (taken, free_for(part, all.saturating_add(taken)))
            };
            swap.look_ahead(usize::try_from(ahead).unwrap_or(usize::MAX));
            swap.keep(resident_beside(&sizes, free.saturating_sub(taken), ahead), clock);
        }
    }

    /// Runs the items in order; gives the seconds it took.
    fn predict(
        &mut self,
        header: &PredictHeader,
        latents: Vec<HostTensor>,
        (outbox, cancel): (&Outbox<PredictResponse>, &CancelToken),
    ) -> Result<f64, ServiceError> {
        let begin = Instant::now();
        let Self { stage, sessions, device, .. } = self;
        let session = sessions
            .get_mut(&header.session_id)
            .ok_or_else(|| ServiceError::not_found(format!("no session {:?} is open here", header.session_id)))?;
        session.touch();
        for (item, latents) in header.items.iter().zip(&latents) {
            let shape = session.latents_shape(item);
            if latents.dtype() != DataType::F32 || latents.shape() != shape {
                return Err(latents.mismatch(format!("F32 {shape:?}")).into());
            }
            if header.mode() == PassMode::Cached && !session.cache(item).holds(&clip_frames(item)) {
                let reason = format!("no features of latent frames {:?} are kept; run them FULL", item.latent_frames);
                return Err(ServiceError::failed_precondition(reason));
            }
        }
        for (i, (item, latents)) in header.items.iter().zip(latents).enumerate() {
            cancel.check()?;
            let given = session.conditioning(item)?;
            let latents = latents.to_candle(&Device::Cpu).map_err(ServiceError::internal)?;
            let transformer = &stage.transformer;
            let velocity = if header.mode() == PassMode::Cached {
                let features = session.cache(item).get(&clip_frames(item));
                let features = features.ok_or_else(|| {
                    ServiceError::failed_precondition("the kept features are of different sizes; run the item FULL")
                })?;
                let features = features.to_device(device).map_err(fault)?;
                transformer.predict_cached(&features, header.timestep, &given).map_err(fault)?
            } else {
                let pass =
                    transformer.predict(&latents, header.timestep, &given, header.keep_features).map_err(fault)?;
                if let Some(features) = pass.features {
                    // They are many and seldom used: a card's memory is for the passes.
                    session.keep(item, features.to_device(&Device::Cpu).map_err(fault)?)?;
                }
                pass.velocity
            };
            let velocity =
                HostTensor::from_candle(format!("velocity.{i}"), &velocity).map_err(ServiceError::internal)?;
            outbox.send(velocity, cancel)?;
        }
        session.touch();
        Ok(begin.elapsed().as_secs_f64())
    }
}

fn check_session_id(id: &str) -> Result<(), ServiceError> {
    match id.chars().count() {
        1..=128 => Ok(()),
        n => Err(ServiceError::invalid("session_id", format!("{n} characters, allowed are 1 to 128"))),
    }
}

fn check_predict(header: &PredictHeader) -> Result<(), ServiceError> {
    check_session_id(&header.session_id)?;
    if !(0.0..=1000.0).contains(&header.timestep) {
        return Err(ServiceError::invalid("timestep", format!("{}, allowed are 0 to 1000", header.timestep)));
    }
    if header.mode() == PassMode::Unspecified {
        return Err(ServiceError::invalid("mode", "neither FULL nor CACHED"));
    }
    if !(1..=MAX_ITEMS).contains(&header.items.len()) {
        return Err(ServiceError::invalid("items", format!("{}, allowed are 1 to {MAX_ITEMS}", header.items.len())));
    }
    header.items.iter().enumerate().try_for_each(|(i, item)| check_item(i, item))
}

fn check_item(i: usize, item: &PredictItem) -> Result<(), ServiceError> {
    let wrong = |field: &str, reason: String| Err(ServiceError::invalid(format!("items[{i}].{field}"), reason));
    if item.branch() == Branch::Unspecified {
        return wrong("branch", "neither CONDITIONAL nor UNCONDITIONAL".to_owned());
    }
    if item.prompt() == PromptKind::Unspecified {
        return wrong("prompt", "neither POSITIVE nor NEGATIVE".to_owned());
    }
    if !(0.0..=1.0).contains(&item.face_mask_scale) {
        return wrong("face_mask_scale", format!("{}, allowed are 0 to 1", item.face_mask_scale));
    }
    let window = item.latent_frames.len();
    if !(1..=MAX_WINDOW).contains(&window) {
        return wrong("latent_frames", format!("{window}, allowed are 1 to {MAX_WINDOW}"));
    }
    if item.audio_frames.len() != 4 * window - 3 {
        let (found, expected) = (item.audio_frames.len(), 4 * window - 3);
        return wrong("audio_frames", format!("{found} for {window} latent frames, expected {expected}"));
    }
    Ok(())
}

fn split_session(message: OpenSessionRequest) -> Item<OpenSessionHeader> {
    match message.body {
        Some(open_session_request::Body::Header(header)) => Item::Other(header),
        Some(open_session_request::Body::Part(part)) => Item::Part(part),
        None => Item::Empty,
    }
}

fn split_predict(message: PredictRequest) -> Item<PredictHeader> {
    match message.body {
        Some(predict_request::Body::Header(header)) => Item::Other(header),
        Some(predict_request::Body::Part(part)) => Item::Part(part),
        None => Item::Empty,
    }
}

fn wrap(part: TensorPart) -> PredictResponse {
    PredictResponse { body: Some(predict_response::Body::Part(part)) }
}

/// What the stage is told besides the settings that every stage has.
pub(crate) struct Options {
    /// The form of the weights.
    pub(crate) weights: Choice,
    /// Its devices, the first included.
    pub(crate) devices: Vec<DeviceConfig>,
    /// Blocks of each device; where there are none, they are divided by what the devices may hold.
    pub(crate) blocks: Vec<u64>,
}

impl Options {
    /// The parts of a network that is spread; none where it is on one device.
    fn parts(&self, models: &Path, setup: &Setup) -> Result<Vec<Part>, ServiceError> {
        if self.devices.len() < 2 {
            return Ok(Vec::new());
        }
        let blocks = match self.blocks.is_empty() {
            false => self.blocks.clone(),
            true => {
                let (blocks, others) = DiffusionStage::block_bytes(models, setup).map_err(fault)?;
                let room = |device: usize, _| {
                    let bytes = self.devices.get(device)?.budget_bytes;
                    Some(if device == 0 { bytes.saturating_sub(others) } else { bytes })
                };
                let parts = divide(&blocks, self.devices.len(), room);
                parts.into_iter().map(|part| part.blocks.len() as u64).collect()
            }
        };
        let part = |(device, blocks): (&DeviceConfig, &u64)| {
            let device = model::device(device.name.card()).map_err(ServiceError::internal)?;
            Ok(Part { device, blocks: usize::try_from(*blocks).unwrap_or(usize::MAX) })
        };
        self.devices.iter().zip(&blocks).map(part).collect()
    }
}

fn setup((device, compute): (DeviceName, Compute), choice: Choice) -> Result<Setup, ServiceError> {
    let precision = match compute {
        Compute::F32 => Precision::F32,
        Compute::Bf16 => Precision::Bf16,
        Compute::F16 => Precision::F16,
    };
    let device = model::device(device.card()).map_err(ServiceError::internal)?;
    Ok(Setup { device, precision, choice })
}

fn fault(error: model::Error) -> ServiceError {
    match error {
        model::Error::Tensor { .. } | model::Error::File { .. } => ServiceError::failed_precondition(error.to_string()),
        model::Error::Input { field, reason } => ServiceError::invalid(field, reason),
        model::Error::Compute(error) => ServiceError::internal(error),
    }
}
