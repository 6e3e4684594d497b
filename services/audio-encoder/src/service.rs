//! `AudioEncoderService`.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use model::{
    Precision,
    audio::AudioEncoder,
    checkpoint::{self, Choice, Setup},
};
use proto::{
    tensor::HostTensor,
    v1::{
        DataType, EncodeAudioHeader, EncodeAudioRequest, EncodeAudioResponse, EncodeAudioSummary, Stage, TensorPart,
        audio_encoder_service_server::AudioEncoderService, encode_audio_request, encode_audio_response,
    },
};
use service_kit::{
    ServiceError,
    config::Compute,
    memory::Watch,
    stage::{StageHost, StageModel},
    tensors::{Item, Limits, ReplyStream, RequestReader, reply},
};
use tonic::{Request, Response, Status, Streaming};

/// The networks on the device.
pub(crate) struct Model(AudioEncoder);

impl StageModel for Model {
    const STAGE: Stage = Stage::AudioEncoder;
    const NAME: &'static str = "audio-encoder";
    type Options = ();

    fn open(models: &Path, compute: Compute, (): &()) -> Result<Self, ServiceError> {
        AudioEncoder::open(models, &setup(compute))
            .map(Self)
            .map_err(|e| ServiceError::failed_precondition(e.to_string()))
    }

    fn watched<R>(watch: Watch, work: impl FnOnce() -> R) -> R {
        model::memory::watched(move |bytes| watch.allows(bytes), work)
    }

    fn files(models: &Path, (): &()) -> Vec<PathBuf> {
        checkpoint::files(models, checkpoint::Stage::AudioEncoder, Choice::Auto)
    }
}

/// Answers `AudioEncoderService`.
pub(crate) struct Service {
    host: Arc<StageHost<Model>>,
    limits: Limits,
}

impl Service {
    pub(crate) fn new(host: Arc<StageHost<Model>>, max_tensor_bytes: u64) -> Self {
        Self { host, limits: Limits::new(max_tensor_bytes, 1) }
    }
}

#[tonic::async_trait]
impl AudioEncoderService for Service {
    type EncodeAudioStream = ReplyStream<EncodeAudioResponse>;

    async fn encode_audio(
        &self,
        request: Request<Streaming<EncodeAudioRequest>>,
    ) -> Result<Response<Self::EncodeAudioStream>, Status> {
        let mut reader = RequestReader::new(request.into_inner(), self.limits, split);
        reader.header().await?;
        let [samples] = reader.all(["samples"]).await?;
        if samples.dtype() != DataType::F32 || samples.shape().len() != 1 {
            return Err(ServiceError::from(samples.mismatch("F32 (N)")).into());
        }
        let work = move |model: &mut Model, _: &_| {
            let samples = samples.to_f32()?;
            let features = model.0.encode(&samples).map_err(fault)?;
            HostTensor::from_candle("features", &features).map_err(ServiceError::internal)
        };
        let (features, took) = self.host.submit_new(work)?.timed().await?;
        let summary = EncodeAudioSummary { memory: Some(self.host.memory()), device_use: Some(self.host.used(took)) };
        let summary = EncodeAudioResponse { body: Some(encode_audio_response::Body::Summary(summary)) };
        Ok(Response::new(reply(vec![features], wrap, summary)))
    }
}

fn split(message: EncodeAudioRequest) -> Item<EncodeAudioHeader> {
    match message.body {
        Some(encode_audio_request::Body::Header(header)) => Item::Other(header),
        Some(encode_audio_request::Body::Part(part)) => Item::Part(part),
        None => Item::Empty,
    }
}

fn wrap(part: TensorPart) -> EncodeAudioResponse {
    EncodeAudioResponse { body: Some(encode_audio_response::Body::Part(part)) }
}

fn setup(compute: Compute) -> Setup {
    let precision = match compute {
        Compute::F32 => Precision::F32,
        Compute::Bf16 => Precision::Bf16,
        Compute::F16 => Precision::F16,
    };
    Setup { precision, ..Setup::default() }
}

fn fault(error: model::Error) -> ServiceError {
    match error {
        model::Error::Tensor { .. } | model::Error::File { .. } => ServiceError::failed_precondition(error.to_string()),
        model::Error::Input { field, reason } => ServiceError::invalid(field, reason),
        model::Error::Compute(error) => ServiceError::internal(error),
    }
}
