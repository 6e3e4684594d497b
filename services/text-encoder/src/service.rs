//! `TextEncoderService`.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use model::{
    Precision,
    checkpoint::{self, Choice, Setup},
    image::Rgb8,
    text::{Branch, TextEncoder},
};
use proto::{
    tensor::HostTensor,
    v1::{
        DataType, EncodePromptHeader, EncodePromptRequest, EncodePromptResponse, EncodePromptSummary, Stage,
        TensorPart, encode_prompt_request, encode_prompt_response, text_encoder_service_server::TextEncoderService,
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

/// Most pixels of a generated side.
const MAX_SIDE: u32 = 8192;

/// The networks on the device.
pub(crate) struct Model(TextEncoder);

impl StageModel for Model {
    const STAGE: Stage = Stage::TextEncoder;
    const NAME: &'static str = "text-encoder";
    type Options = ();

    fn open(models: &Path, compute: Compute, (): &()) -> Result<Self, ServiceError> {
        TextEncoder::open(models, &setup(compute))
            .map(Self)
            .map_err(|e| ServiceError::failed_precondition(e.to_string()))
    }

    fn watched<R>(watch: Watch, work: impl FnOnce() -> R) -> R {
        model::memory::watched(move |bytes| watch.allows(bytes), work)
    }

    fn files(models: &Path, (): &()) -> Vec<PathBuf> {
        checkpoint::files(models, checkpoint::Stage::TextEncoder, Choice::Auto)
    }
}

/// Answers `TextEncoderService`.
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
impl TextEncoderService for Service {
    type EncodePromptStream = ReplyStream<EncodePromptResponse>;

    async fn encode_prompt(
        &self,
        request: Request<Streaming<EncodePromptRequest>>,
    ) -> Result<Response<Self::EncodePromptStream>, Status> {
        let mut reader = RequestReader::new(request.into_inner(), self.limits, split);
        let header = reader.header().await?;
        for (field, side) in [("width", header.width), ("height", header.height)] {
            if side == 0 || side % 16 != 0 || side > MAX_SIDE {
                let reason = format!("{side} pixels, expected a multiple of 16 up to {MAX_SIDE}");
                return Err(ServiceError::invalid(field, reason).into());
            }
        }
        let [picture] = reader.all(["picture"]).await?;
        let picture = picture_of(picture)?;
        let work = move |model: &mut Model, _: &_| {
            let (prompt, width, height) = (header.prompt.as_str(), header.width, header.height);
            let states = if header.truncate_prompt {
                model.0.encode_cut(prompt, &picture, width, height)
            } else {
                model.0.encode(prompt, &picture, width, height)
            };
            let states = states.map_err(fault)?;
            let mut tensors = branch("positive", &states.positive)?;
            tensors.extend(branch("negative", &states.negative)?);
            let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
            let summary = EncodePromptSummary {
                prompt_tokens: number(states.prompt_tokens),
                prompt_tokens_kept: number(states.prompt_tokens_kept),
                prompt_token_limit: number(states.prompt_token_limit),
                clip_tokens: number(states.clip_tokens),
                clip_tokens_kept: number(states.clip_tokens_kept),
                ..EncodePromptSummary::default()
            };
            Ok((tensors, summary))
        };
        let ((tensors, summary), took) = self.host.submit_new(work)?.timed().await?;
        let (memory, device_use) = (Some(self.host.memory()), Some(self.host.used(took)));
        let summary = EncodePromptSummary { memory, device_use, ..summary };
        let summary = EncodePromptResponse { body: Some(encode_prompt_response::Body::Summary(summary)) };
        Ok(Response::new(reply(tensors, wrap, summary)))
    }
}

fn branch(name: &str, branch: &Branch) -> Result<Vec<HostTensor>, ServiceError> {
    let host =
        |part: &str, tensor| HostTensor::from_candle(format!("{name}.{part}"), tensor).map_err(ServiceError::internal);
    let mask = HostTensor::from_i64(format!("{name}.mask"), &[branch.mask.len()], &branch.mask);
    Ok(vec![host("states", &branch.states)?, mask.map_err(ServiceError::internal)?, host("pooled", &branch.pooled)?])
}

fn split(message: EncodePromptRequest) -> Item<EncodePromptHeader> {
    match message.body {
        Some(encode_prompt_request::Body::Header(header)) => Item::Other(header),
        Some(encode_prompt_request::Body::Part(part)) => Item::Part(part),
        None => Item::Empty,
    }
}

fn wrap(part: TensorPart) -> EncodePromptResponse {
    EncodePromptResponse { body: Some(encode_prompt_response::Body::Part(part)) }
}

/// Takes a picture out of its tensor, U8 `(H, W, 3)`.
fn picture_of(tensor: HostTensor) -> Result<Rgb8, ServiceError> {
    match *tensor.shape() {
        [height, width, 3] if tensor.dtype() == DataType::U8 => {
            Rgb8::new(width, height, tensor.into_data()).map_err(fault)
        }
        _ => Err(tensor.mismatch("U8 (H, W, 3)").into()),
    }
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
