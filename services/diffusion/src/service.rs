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
    diffusion::DiffusionStage,
    ops,
};
use planner::{
    Precision as Stored,
    cost::{
        cpu::{Cpu, pass_bytes, resident_blocks},
        cuda,
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
    hardware::DeviceName,
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
    sessions: HashMap<String, Session>,
}

impl StageModel for Model {
    const STAGE: Stage = Stage::Diffusion;
    const NAME: &'static str = "diffusion";
    /// The form of the weights.
    type Options = Choice;

    fn open(models: &Path, on: (DeviceName, Compute), choice: &Choice) -> Result<Self, ServiceError> {
        let fault = |e: model::Error| ServiceError::failed_precondition(e.to_string());
        let setup = setup(on, *choice)?;
        let stage = DiffusionStage::open(models, &setup).map_err(fault)?;
        let (sizes, stored) = transformer_table(models, *choice).map_err(fault)?;
        let value_bytes = if on.1 == Compute::F32 { 4 } else { 2 };
        let cpu = Cpu { threads: ops::threads() as u64, packs: ops::has_kernel(), value_bytes };
        Ok(Self { stage, sizes, stored, cpu, device: setup.device, sessions: HashMap::new() })
    }

    fn weights(&self) -> WeightsReport {
        let told = self.stage.transformer.swap().told();
        WeightsReport::new([told.blocks, told.resident], [told.waited, told.hidden])
    }

    fn watched<R>(watch: Watch, work: impl FnOnce() -> R) -> R {
        model::memory::watched(move |bytes| watch.allows(bytes), work)
    }

    fn files(models: &Path, choice: &Choice) -> Vec<PathBuf> {
        checkpoint::files(models, checkpoint::Stage::Diffusion, *choice)
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
                model.settle(&header, |wanted| settled.free_for(wanted));
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

    /// Lets as many blocks of weights stay in memory as the largest item leaves room for in what is free now.
    ///
    /// - `free_for`: bytes that are free, after others made room where there are fewer than so many
    fn settle(&self, header: &PredictHeader, free_for: impl Fn(u64) -> u64) {
        let Some(session) = self.sessions.get(&header.session_id) else { return };
        let on_card = !matches!(self.device, Device::Cpu);
        let work = |item| {
            let pass = session.pass(item, header.keep_features);
            match on_card {
                true => cuda::pass_bytes(&self.sizes, &pass, self.cpu.value_bytes),
                false => pass_bytes(&self.sizes, &pass, self.cpu),
            }
        };
        let most = header.items.iter().map(work).max().unwrap_or(0);
        let (transformer, swap) = (&self.stage.transformer, self.stage.transformer.swap());
        let sizes = swap.sizes();
        let all: u64 = sizes.iter().sum();
        let (taken, free) = if on_card {
            // Weights that are on the card already are not free there, but free for weights.
            let (taken, here) = (most + cuda::transformer_widened(&self.sizes, self.stored), swap.held_bytes());
            let free = free_for(all.saturating_add(taken).saturating_sub(here));
            (taken, cuda::usable(free.saturating_add(here)))
        } else {
            let taken = most.saturating_add(transformer.unswapped_bytes());
            (taken, free_for(all.saturating_add(taken)))
        };
        swap.keep(resident_blocks(&sizes, free.saturating_sub(taken)), clock);
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
