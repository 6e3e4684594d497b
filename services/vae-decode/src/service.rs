//! `VaeDecodeService`.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::Device;
use model::{
    Precision,
    checkpoint::{self, Choice, Setup},
    vae::VaeStage,
};
use proto::{
    tensor::HostTensor,
    v1::{
        DataType, DecodeLatentsHeader, DecodeLatentsRequest, DecodeLatentsResponse, DecodeLatentsSummary, Stage,
        TensorPart, decode_latents_request, decode_latents_response, vae_decode_service_server::VaeDecodeService,
    },
};
use service_kit::{
    ServiceError,
    config::Compute,
    device::CancelToken,
    memory::Watch,
    stage::{StageHost, StageModel},
    tensors::{Item, Limits, Outbox, ReplyStream, RequestReader, streamed_reply},
};
use tonic::{Request, Response, Status, Streaming};

/// Runs of frames that a slow reader may leave lying before the device waits for it.
const WAITING_TILES: usize = 4;

/// Most that tiles can be shrunk by.
const MAX_TILE_DIVISOR: u32 = 8;

/// The networks on the device.
pub(crate) struct Model(VaeStage);

impl StageModel for Model {
    const STAGE: Stage = Stage::VaeDecode;
    const NAME: &'static str = "vae-decode";
    type Options = ();

    fn open(models: &Path, compute: Compute, (): &()) -> Result<Self, ServiceError> {
        VaeStage::open(models, &setup(compute)).map(Self).map_err(|e| ServiceError::failed_precondition(e.to_string()))
    }

    fn watched<R>(watch: Watch, work: impl FnOnce() -> R) -> R {
        model::memory::watched(move |bytes| watch.allows(bytes), work)
    }

    fn files(models: &Path, (): &()) -> Vec<PathBuf> {
        checkpoint::files(models, checkpoint::Stage::VaeDecode, Choice::Auto)
    }
}

/// Answers `VaeDecodeService`.
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
impl VaeDecodeService for Service {
    type DecodeLatentsStream = ReplyStream<DecodeLatentsResponse>;

    async fn decode_latents(
        &self,
        request: Request<Streaming<DecodeLatentsRequest>>,
    ) -> Result<Response<Self::DecodeLatentsStream>, Status> {
        let mut reader = RequestReader::new(request.into_inner(), self.limits, split);
        let header = reader.header().await?;
        let [latents] = reader.all(["latents"]).await?;
        if latents.dtype() != DataType::F32 || latents.shape().len() != 4 {
            return Err(ServiceError::from(latents.mismatch("F32 (C, T, h, w)")).into());
        }
        if header.tile_divisor > MAX_TILE_DIVISOR {
            let reason = format!("{}, allowed are 0 to {MAX_TILE_DIVISOR}", header.tile_divisor);
            return Err(ServiceError::invalid("tile_divisor", reason).into());
        }
        let host = self.host.clone();
        let messages = streamed_reply(WAITING_TILES, wrap, |outbox| {
            let pending = self.host.submit(move |model, cancel| decode(model, &latents, &header, (&outbox, cancel)))?;
            Ok(async move {
                let (frames, took) = pending.timed().await?;
                let (memory, device_use) = (Some(host.memory()), Some(host.used(took)));
                let summary = DecodeLatentsSummary { frames, memory, device_use };
                Ok(DecodeLatentsResponse { body: Some(decode_latents_response::Body::Summary(summary)) })
            })
        })?;
        Ok(Response::new(messages))
    }
}

/// Decodes and sends; gives the number of frames.
fn decode(
    model: &mut Model,
    latents: &HostTensor,
    header: &DecodeLatentsHeader,
    (outbox, cancel): (&Outbox<DecodeLatentsResponse>, &CancelToken),
) -> Result<u32, ServiceError> {
    let limit = (header.frame_limit > 0).then_some(header.frame_limit as usize);
    let smaller = (header.tile_divisor > 1).then(|| model.0.with_smaller_tiles(header.tile_divisor as usize));
    let stage = smaller.as_ref().unwrap_or(&model.0);
    let ratio = stage.config.spatial_compression_ratio;
    let (height, width) = (latents.shape()[2].saturating_mul(ratio), latents.shape()[3].saturating_mul(ratio));
    let latents = latents.to_candle(&Device::Cpu).map_err(ServiceError::internal)?;
    let (mut frames, mut stopped) = (0u32, None);
    let outcome = stage.decode_frames(&latents, limit, &mut |n, rgb| {
        let sent = HostTensor::from_u8("frames", &[n, height, width, 3], rgb)
            .map_err(ServiceError::internal)
            .and_then(|tensor| outbox.send(tensor, cancel));
        sent.map_err(|error| {
            stopped = Some(error);
            model::Error::input("caller", "it takes no more frames")
        })?;
        frames = frames.saturating_add(u32::try_from(n).unwrap_or(u32::MAX));
        Ok(())
    });
    match (stopped, outcome) {
        (Some(error), _) => Err(error),
        (None, outcome) => outcome.map(|()| frames).map_err(fault),
    }
}

fn split(message: DecodeLatentsRequest) -> Item<DecodeLatentsHeader> {
    match message.body {
        Some(decode_latents_request::Body::Header(header)) => Item::Other(header),
        Some(decode_latents_request::Body::Part(part)) => Item::Part(part),
        None => Item::Empty,
    }
}

fn wrap(part: TensorPart) -> DecodeLatentsResponse {
    DecodeLatentsResponse { body: Some(decode_latents_response::Body::Part(part)) }
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
