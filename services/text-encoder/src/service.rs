//! `TextEncoderService`.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::Device;
use model::{
    Precision,
    blueprint::text_tables,
    checkpoint::{self, Choice, Setup},
    image::Rgb8,
    ops,
    text::{Branch, TextEncoder},
};
use planner::{
    Precision as Stored,
    cost::{
        cpu::{Cpu, prompt_bytes, resident_blocks},
        cuda,
    },
    size::PictureSize,
    table::{Clip, Llava},
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
    hardware::DeviceName,
    memory::{Watch, WeightsReport},
    stage::{StageHost, StageModel, clock},
    tensors::{Item, Limits, ReplyStream, RequestReader, reply},
};
use tonic::{Request, Response, Status, Streaming};

/// Most pixels of a generated side.
const MAX_SIDE: u32 = 8192;

/// The networks on the device.
pub(crate) struct Model {
    encoder: TextEncoder,
    sizes: (Llava, Clip),
    stored: Stored,
    cpu: Cpu,
    device: Device,
}

impl StageModel for Model {
    const STAGE: Stage = Stage::TextEncoder;
    const NAME: &'static str = "text-encoder";
    type Options = ();

    fn open(models: &Path, on: (DeviceName, Compute), (): &()) -> Result<Self, ServiceError> {
        let fault = |e: model::Error| ServiceError::failed_precondition(e.to_string());
        let setup = setup(on)?;
        let encoder = TextEncoder::open(models, &setup).map_err(fault)?;
        let (llava, clip, stored) = text_tables(models).map_err(fault)?;
        let value_bytes = if on.1 == Compute::F32 { 4 } else { 2 };
        let cpu = Cpu { threads: ops::threads() as u64, packs: ops::has_kernel(), value_bytes };
        Ok(Self { encoder, sizes: (llava, clip), stored, cpu, device: setup.device })
    }

    fn weights(&self) -> WeightsReport {
        let told = self.encoder.swap().told();
        WeightsReport::new([told.blocks, told.resident], [told.waited, told.hidden])
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
        let settled = self.host.clone();
        let work = move |model: &mut Model, _: &_| {
            let (prompt, width, height) = (header.prompt.as_str(), header.width, header.height);
            model.settle(prompt, PictureSize { width, height }, |wanted| settled.free_for(wanted))?;
            let states = if header.truncate_prompt {
                model.encoder.encode_cut(prompt, &picture, width, height)
            } else {
                model.encoder.encode(prompt, &picture, width, height)
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

impl Model {
    /// Lets as many layers of the Llama stay in memory as the prompt leaves room for in what is free now.
    ///
    /// - `free_for`: bytes that are free, after others made room where there are fewer than so many
    fn settle(&self, prompt: &str, size: PictureSize, free_for: impl Fn(u64) -> u64) -> Result<(), ServiceError> {
        let (llava, clip) = &self.sizes;
        let swap = self.encoder.swap();
        let sizes = swap.sizes();
        let all: u64 = sizes.iter().sum();
        let (taken, free) = if matches!(self.device, Device::Cpu) {
            let tokens = self.encoder.prompt_tokens(prompt).map_err(fault)? as u64;
            let taken = prompt_bytes((llava, clip), size, tokens, self.cpu) + self.encoder.unswapped_bytes();
            (taken, free_for(all.saturating_add(taken)))
        } else {
            // Weights that are on the card already are not free there, but free for weights.
            let work = cuda::prompt_bytes(llava, llava.tokens, self.cpu.value_bytes);
            let (taken, here) = (work + cuda::llama_widened(llava, self.stored), swap.held_bytes());
            let free = free_for(all.saturating_add(taken).saturating_sub(here));
            (taken, cuda::usable(free.saturating_add(here)))
        };
        swap.keep(resident_blocks(&sizes, free.saturating_sub(taken)), clock);
        Ok(())
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

fn setup((device, compute): (DeviceName, Compute)) -> Result<Setup, ServiceError> {
    let precision = match compute {
        Compute::F32 => Precision::F32,
        Compute::Bf16 => Precision::Bf16,
        Compute::F16 => Precision::F16,
    };
    let device = model::device(device.card()).map_err(ServiceError::internal)?;
    Ok(Setup { device, precision, choice: Choice::Auto })
}

fn fault(error: model::Error) -> ServiceError {
    match error {
        model::Error::Tensor { .. } | model::Error::File { .. } => ServiceError::failed_precondition(error.to_string()),
        model::Error::Input { field, reason } => ServiceError::invalid(field, reason),
        model::Error::Compute(error) => ServiceError::internal(error),
    }
}
