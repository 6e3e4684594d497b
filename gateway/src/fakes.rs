//! Stages without networks, for tests: right shapes, constant values, faults on demand.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt as _, stream};
use proto::{
    tensor::{HostTensor, TensorReader},
    v1::{self, TensorPart},
};
use service_kit::{
    ServiceError, client,
    server::{self, Lifetime},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::Stages;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the fake stages do wrong, and what they saw.
#[derive(Debug, Default)]
pub(crate) struct Script {
    /// Predict calls that answered.
    pub(crate) predicted: AtomicUsize,
    /// Predict calls at which the session is lost.
    pub(crate) lose_session_at: Vec<usize>,
    /// Predict call at which a value is not finite.
    pub(crate) not_finite_at: Option<usize>,
    /// Predict calls of this step and of later ones wait while it is set.
    pub(crate) hold: Mutex<Option<u32>>,
    /// How long a Predict takes.
    pub(crate) predict_time: Duration,
    /// Sessions that are open.
    pub(crate) sessions: Mutex<HashMap<String, usize>>,
    /// How often a session was opened.
    pub(crate) opened: AtomicUsize,
    /// Calls of the encoders that were answered.
    pub(crate) encoded: AtomicUsize,
    /// Predict call from which on the stage cannot be reached, and how many calls that lasts.
    pub(crate) away_at: Option<(usize, usize)>,
    /// Decode calls that the stage cannot be reached for.
    pub(crate) decoder_away: AtomicUsize,
    /// Decode calls that find no room.
    pub(crate) decoder_full: AtomicUsize,
    /// The devices that the stages are spread over, where that is not the one device.
    pub(crate) devices: Vec<&'static str>,
    /// Stages never answer that they are unloaded.
    pub(crate) unload_hangs: bool,
    /// What the stages say that they are.
    pub(crate) identity: Mutex<String>,
    /// The device that the stages say that they are on.
    pub(crate) device: Mutex<String>,
    /// The text encoder refuses the prompt.
    pub(crate) refuse_prompt: bool,
    /// Faces that the image encoder finds, the largest first.
    pub(crate) faces: Vec<v1::FaceBox>,
    /// Samples that the audio encoder was sent.
    pub(crate) samples: AtomicUsize,
    /// Frames of speech of the last session.
    pub(crate) heard: AtomicUsize,
    /// Latents of every Decode call.
    pub(crate) decoded: Mutex<Vec<Vec<f32>>>,
    /// Calls that find their device out of memory: stage, and call of that stage, from 0.
    pub(crate) out_of_memory: Vec<(v1::Stage, usize)>,
    /// The decoder has memory only for tiles that are so many times shorter.
    pub(crate) tiles_that_fit: u32,
    /// Calls by stage so far.
    pub(crate) calls: Mutex<HashMap<v1::Stage, usize>>,
    /// Stages that were unloaded.
    pub(crate) unloads: AtomicUsize,
    /// Generations have sessions on all stages.
    pub(crate) busy: bool,
    /// Stages that the audio encoder's call has unloaded, and those whose caches it has freed.
    pub(crate) relieved: [u64; 2],
    /// Predict calls after which the device is nearly full.
    pub(crate) pressed: Vec<usize>,
    /// Decode calls that run out of memory when frames have left already.
    pub(crate) out_of_memory_late: AtomicUsize,
    /// Headers of every call of the decoder.
    pub(crate) decodes: Mutex<Vec<v1::DecodeLatentsHeader>>,
    /// Calls that never answer: stage, and call of that stage, from 0.
    pub(crate) stalls: Vec<(v1::Stage, usize)>,
    /// Decode calls that never go on after their first frames.
    pub(crate) stalls_late: AtomicUsize,
    /// How long calls of all stages but the transformer take.
    pub(crate) beside_time: Duration,
    /// The devices get through layers all the time.
    pub(crate) gets_on: bool,
    /// Layers that were told of.
    pub(crate) advances: AtomicU64,
    /// Every value of every frame, where the decoder should make no picture.
    pub(crate) flat_frames: Option<u8>,
    /// What a velocity is multiplied by.
    pub(crate) loudness: Option<f32>,
    /// Every Predict call with the latents of its items.
    pub(crate) passes: Mutex<Vec<(v1::PredictHeader, Vec<Vec<f32>>)>>,
}

#[derive(Clone)]
struct Fake(Arc<Script>);

impl Fake {
    /// Counts a call, which fails where the script says so.
    async fn count(&self, stage: v1::Stage) -> Result<(), ServiceError> {
        let call = {
            let mut calls = self.0.calls.lock().unwrap();
            let calls = calls.entry(stage).or_default();
            *calls += 1;
            *calls - 1
        };
        if self.0.stalls.contains(&(stage, call)) {
            std::future::pending::<()>().await;
        }
        if stage != v1::Stage::Diffusion {
            tokio::time::sleep(self.0.beside_time).await;
        }
        if self.0.out_of_memory.contains(&(stage, call)) { Err(out_of_memory(stage)) } else { Ok(()) }
    }
}

/// What a call takes of the one device.
fn used(seconds: f64) -> Option<v1::DeviceUse> {
    Some(v1::DeviceUse { device: "cpu".to_owned(), device_id: "one device".to_owned(), seconds })
}

fn out_of_memory(stage: v1::Stage) -> ServiceError {
    let stage = crate::fault::stage_name(stage).to_owned();
    ServiceError::DeviceMemory { stage, device: "cpu".into(), needed_bytes: 900, free_bytes: 100, budget_bytes: 1000 }
}

#[tonic::async_trait]
impl v1::stage_service_server::StageService for Fake {
    type WatchMemoryStream = Answers<v1::WatchMemoryResponse>;

    async fn describe(&self, _: Request<v1::DescribeRequest>) -> Result<Response<v1::DescribeResponse>, Status> {
        let checkpoint_digest = self.0.identity.lock().unwrap().clone();
        let device_id = self.0.devices.first().copied().unwrap_or("one device").to_owned();
        let part = |id: &&str| v1::StagePart { device_id: (*id).to_owned(), ..Default::default() };
        let parts = self.0.devices.iter().filter(|_| self.0.devices.len() > 1).map(part).collect();
        let memory = Some(v1::MemoryReport { parts, ..Default::default() });
        // Four of them share the device with whoever asks.
        let loaded = self.0.unloads.load(Ordering::SeqCst) < 4;
        let device = self.0.device.lock().unwrap().clone();
        let advances = self.0.advances.fetch_add(u64::from(self.0.gets_on), Ordering::SeqCst);
        let said = v1::DescribeResponse {
            checkpoint_digest,
            device,
            device_id,
            loaded,
            memory,
            advances,
            ..Default::default()
        };
        Ok(Response::new(said))
    }

    async fn load(&self, _: Request<v1::LoadRequest>) -> Result<Response<v1::LoadResponse>, Status> {
        Ok(Response::new(v1::LoadResponse::default()))
    }

    async fn unload(&self, request: Request<v1::UnloadRequest>) -> Result<Response<v1::UnloadResponse>, Status> {
        if self.0.unload_hangs {
            return std::future::pending().await;
        }
        let busy = self.0.busy && request.into_inner().idle_only;
        self.0.unloads.fetch_add(usize::from(!busy), Ordering::SeqCst);
        Ok(Response::new(v1::UnloadResponse { busy, ..Default::default() }))
    }

    async fn set_pressure(
        &self,
        _: Request<v1::SetPressureRequest>,
    ) -> Result<Response<v1::SetPressureResponse>, Status> {
        Ok(Response::new(v1::SetPressureResponse::default()))
    }

    async fn watch_memory(
        &self,
        _: Request<v1::WatchMemoryRequest>,
    ) -> Result<Response<Self::WatchMemoryStream>, Status> {
        Ok(Response::new(Box::pin(stream::empty())))
    }
}

/// Starts the five stages in memory.
pub(crate) fn start(script: &Arc<Script>) -> Stages {
    let (channel, incoming) = client::in_memory();
    let fake = Fake(Arc::clone(script));
    let routes =
        tonic::service::Routes::new(v1::audio_encoder_service_server::AudioEncoderServiceServer::new(fake.clone()))
            .add_service(v1::text_encoder_service_server::TextEncoderServiceServer::new(fake.clone()))
            .add_service(v1::image_encoder_service_server::ImageEncoderServiceServer::new(fake.clone()))
            .add_service(v1::diffusion_service_server::DiffusionServiceServer::new(fake.clone()))
            .add_service(v1::vae_decode_service_server::VaeDecodeServiceServer::new(fake.clone()))
            .add_service(v1::stage_service_server::StageServiceServer::new(fake));
    let lifetime = Lifetime { shutdown: CancellationToken::new(), drain: Duration::ZERO };
    tokio::spawn(async move { server::serve(routes, &[], incoming, lifetime).await });
    Stages {
        audio_encoder: channel.clone(),
        text_encoder: channel.clone(),
        image_encoder: channel.clone(),
        diffusion: channel.clone(),
        vae_decode: channel,
        spare_decoders: Vec::new(),
    }
}

fn constant(name: &str, shape: &[usize]) -> HostTensor {
    HostTensor::from_f32(name, shape, &vec![0.5; shape.iter().product()]).unwrap()
}

fn answer<M: Send + 'static>(
    tensors: Vec<HostTensor>,
    part: impl Fn(TensorPart) -> M + Send + 'static,
    summary: M,
) -> Response<Answers<M>> {
    let parts = tensors.into_iter().flat_map(HostTensor::parts).map(part);
    let all = parts.chain(std::iter::once(summary)).map(Ok).collect::<Vec<_>>();
    Response::new(Box::pin(stream::iter(all)))
}

/// Reads a request: its header and its tensors.
macro_rules! read {
    ($request:expr, $body:path) => {{
        use $body as Body;
        let mut messages = $request.into_inner();
        let (mut header, mut tensors, mut reader) = (None, Vec::new(), TensorReader::new(1 << 30, 1 << 32));
        while let Some(message) = messages.message().await? {
            match message.body {
                Some(Body::Header(h)) => header = Some(h),
                Some(Body::Part(part)) => {
                    tensors.extend(reader.push(part).map_err(|error| Status::from(ServiceError::from(error)))?)
                }
                None => {}
            }
        }
        (header.unwrap(), tensors)
    }};
}

#[tonic::async_trait]
impl v1::audio_encoder_service_server::AudioEncoderService for Fake {
    type EncodeAudioStream = Answers<v1::EncodeAudioResponse>;

    async fn encode_audio(
        &self,
        request: Request<Streaming<v1::EncodeAudioRequest>>,
    ) -> Result<Response<Self::EncodeAudioStream>, Status> {
        use v1::encode_audio_response::Body as Out;
        let (_, tensors) = read!(request, v1::encode_audio_request::Body);
        self.count(v1::Stage::AudioEncoder).await?;
        self.0.encoded.fetch_add(1, Ordering::SeqCst);
        self.0.samples.store(tensors[0].shape()[0], Ordering::SeqCst);
        let features = constant("features", &[tensors[0].shape()[0].div_ceil(320), 5, 8]);
        let message = |body| v1::EncodeAudioResponse { body: Some(body) };
        let [unloaded_stages, emptied_caches] = self.0.relieved;
        let memory = v1::MemoryReport { peak_bytes: 7, unloaded_stages, emptied_caches, ..Default::default() };
        let memory = Some(memory);
        let summary = message(Out::Summary(v1::EncodeAudioSummary { memory, device_use: used(1.0) }));
        Ok(answer(vec![features], move |part| message(Out::Part(part)), summary))
    }
}

#[tonic::async_trait]
impl v1::text_encoder_service_server::TextEncoderService for Fake {
    type EncodePromptStream = Answers<v1::EncodePromptResponse>;

    async fn encode_prompt(
        &self,
        request: Request<Streaming<v1::EncodePromptRequest>>,
    ) -> Result<Response<Self::EncodePromptStream>, Status> {
        use v1::encode_prompt_response::Body as Out;
        let _ = read!(request, v1::encode_prompt_request::Body);
        self.count(v1::Stage::TextEncoder).await?;
        if self.0.refuse_prompt {
            return Err(ServiceError::invalid("prompt", "300 tokens; the limit is 249").into());
        }
        self.0.encoded.fetch_add(1, Ordering::SeqCst);
        let mut tensors = Vec::new();
        for side in ["positive", "negative"] {
            tensors.push(constant(&format!("{side}.states"), &[4, 8]));
            tensors.push(HostTensor::from_i64(format!("{side}.mask"), &[4], &[1; 4]).unwrap());
            tensors.push(constant(&format!("{side}.pooled"), &[8]));
        }
        let message = |body| v1::EncodePromptResponse { body: Some(body) };
        let summary = message(Out::Summary(v1::EncodePromptSummary { device_use: used(1.0), ..Default::default() }));
        Ok(answer(tensors, move |part| message(Out::Part(part)), summary))
    }
}

#[tonic::async_trait]
impl v1::image_encoder_service_server::ImageEncoderService for Fake {
    type EncodeReferenceStream = Answers<v1::EncodeReferenceResponse>;

    async fn encode_reference(
        &self,
        request: Request<Streaming<v1::EncodeReferenceRequest>>,
    ) -> Result<Response<Self::EncodeReferenceStream>, Status> {
        use v1::encode_reference_response::Body as Out;
        let (header, _) = read!(request, v1::encode_reference_request::Body);
        self.count(v1::Stage::ImageEncoder).await?;
        self.0.encoded.fetch_add(1, Ordering::SeqCst);
        let (h, w) = (header.height as usize / 8, header.width as usize / 8);
        let tensors = vec![constant("reference_latents", &[2, 1, h, w]), constant("face_mask", &[1, 1, h, w])];
        let message = |body| v1::EncodeReferenceResponse { body: Some(body) };
        let (faces, face) = (self.0.faces.clone(), self.0.faces.first().copied());
        let summary =
            message(Out::Summary(v1::EncodeReferenceSummary { faces, face, memory: None, device_use: used(1.0) }));
        Ok(answer(tensors, move |part| message(Out::Part(part)), summary))
    }
}

#[tonic::async_trait]
impl v1::diffusion_service_server::DiffusionService for Fake {
    type PredictStream = Answers<v1::PredictResponse>;

    async fn open_session(
        &self,
        request: Request<Streaming<v1::OpenSessionRequest>>,
    ) -> Result<Response<v1::OpenSessionResponse>, Status> {
        let (header, tensors) = read!(request, v1::open_session_request::Body);
        self.count(v1::Stage::Diffusion).await?;
        self.0.opened.fetch_add(1, Ordering::SeqCst);
        self.0.heard.store(header.audio_frames as usize, Ordering::SeqCst);
        self.0.sessions.lock().unwrap().insert(header.session_id, tensors.len());
        Ok(Response::new(v1::OpenSessionResponse { memory: None, device_use: used(0.25) }))
    }

    async fn predict(
        &self,
        request: Request<Streaming<v1::PredictRequest>>,
    ) -> Result<Response<Self::PredictStream>, Status> {
        use v1::predict_response::Body as Out;
        let (header, tensors) = read!(request, v1::predict_request::Body);
        self.count(v1::Stage::Diffusion).await?;
        tokio::time::sleep(self.0.predict_time).await;
        while self.0.hold.lock().unwrap().is_some_and(|step| header.step >= step) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let call = self.0.predicted.fetch_add(1, Ordering::SeqCst);
        if self.0.away_at.is_some_and(|(first, calls)| (first..first.saturating_add(calls)).contains(&call)) {
            return Err(ServiceError::unavailable("nobody is there").into());
        }
        let mut sessions = self.0.sessions.lock().unwrap();
        if self.0.lose_session_at.contains(&call) {
            sessions.clear();
        }
        if sessions.get(&header.session_id) != Some(&9) {
            return Err(ServiceError::not_found("no such session").into());
        }
        let latents = tensors.iter().map(|tensor| tensor.to_f32().unwrap()).collect();
        self.0.passes.lock().unwrap().push((header, latents));
        let bad = self.0.not_finite_at == Some(call);
        let velocity = |(i, latents): (usize, &HostTensor)| {
            // Of the latents themselves, so that a step that is left out or taken twice shows.
            let value = |x: f32| if bad { f32::NAN } else { x.sin() * self.0.loudness.unwrap_or(1.0) };
            let values: Vec<f32> = latents.to_f32().unwrap().into_iter().map(value).collect();
            HostTensor::from_f32(format!("velocity.{i}"), latents.shape(), &values).unwrap()
        };
        let velocities = tensors.iter().enumerate().map(velocity).collect();
        let message = |body| v1::PredictResponse { body: Some(body) };
        let pressure = self.0.pressed.contains(&call);
        let memory = Some(v1::MemoryReport { pressure, ..Default::default() });
        let summary = message(Out::Summary(v1::PredictSummary { memory, device_use: used(0.5), ..Default::default() }));
        Ok(answer(velocities, move |part| message(Out::Part(part)), summary))
    }

    async fn close_session(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionResponse>, Status> {
        self.0.sessions.lock().unwrap().remove(&request.get_ref().session_id);
        Ok(Response::new(v1::CloseSessionResponse {}))
    }
}

#[tonic::async_trait]
impl v1::vae_decode_service_server::VaeDecodeService for Fake {
    type DecodeLatentsStream = Answers<v1::DecodeLatentsResponse>;

    async fn decode_latents(
        &self,
        request: Request<Streaming<v1::DecodeLatentsRequest>>,
    ) -> Result<Response<Self::DecodeLatentsStream>, Status> {
        use v1::decode_latents_response::Body as Out;
        let (header, tensors) = read!(request, v1::decode_latents_request::Body);
        let away = |calls: usize| calls.checked_sub(1);
        if self.0.decoder_away.fetch_update(Ordering::SeqCst, Ordering::SeqCst, away).is_ok() {
            return Err(ServiceError::unavailable("nobody is there").into());
        }
        if self.0.decoder_full.fetch_update(Ordering::SeqCst, Ordering::SeqCst, away).is_ok() {
            let (message, retry_after) = ("no room".to_owned(), Some(Duration::from_millis(1)));
            return Err(ServiceError::ResourceExhausted { message, retry_after }.into());
        }
        self.0.decodes.lock().unwrap().push(header.clone());
        self.count(v1::Stage::VaeDecode).await?;
        if header.tile_divisor < self.0.tiles_that_fit {
            return Err(out_of_memory(v1::Stage::VaeDecode).into());
        }
        self.0.decoded.lock().unwrap().push(tensors[0].to_f32().unwrap());
        let (n, h, w) = (header.frame_limit as usize, 8 * tensors[0].shape()[2], 8 * tensors[0].shape()[3]);
        // A moving stripe, so that it is a video.
        let stripe = |i: usize| if (i / (h * w * 3) + i).is_multiple_of(16) { 200 } else { 100 };
        let values = (0..n * h * w * 3).map(|i| self.0.flat_frames.unwrap_or_else(|| stripe(i))).collect();
        let frames = HostTensor::from_u8("frames", &[n, h, w, 3], values).unwrap();
        let message = |body| v1::DecodeLatentsResponse { body: Some(body) };
        if self.0.out_of_memory_late.fetch_update(Ordering::SeqCst, Ordering::SeqCst, away).is_ok() {
            let full = out_of_memory(v1::Stage::VaeDecode);
            let parts: Vec<Result<_, Status>> = frames.parts().map(|part| Ok(message(Out::Part(part)))).collect();
            return Ok(Response::new(Box::pin(stream::iter(parts.into_iter().chain([Err(full.into())])))));
        }
        if self.0.stalls_late.fetch_update(Ordering::SeqCst, Ordering::SeqCst, away).is_ok() {
            let parts: Vec<Result<_, Status>> = frames.parts().map(|part| Ok(message(Out::Part(part)))).collect();
            return Ok(Response::new(Box::pin(stream::iter(parts).chain(stream::pending()))));
        }
        let summary =
            message(Out::Summary(v1::DecodeLatentsSummary { frames: n as u32, memory: None, device_use: used(2.0) }));
        Ok(answer(vec![frames], move |part| message(Out::Part(part)), summary))
    }
}
