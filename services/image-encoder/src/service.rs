//! `ImageEncoderService`.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use model::{
    Precision,
    checkpoint::{self, Choice, Setup},
    image::{Detector, ImageEncoder, Rgb8, face},
};
use proto::{
    tensor::HostTensor,
    v1::{
        DataType, EncodeReferenceHeader, EncodeReferenceRequest, EncodeReferenceResponse, EncodeReferenceSummary,
        FaceBox, Stage, TensorPart, encode_reference_request, encode_reference_response,
        image_encoder_service_server::ImageEncoderService,
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
pub(crate) struct Model(ImageEncoder);

impl StageModel for Model {
    const STAGE: Stage = Stage::ImageEncoder;
    const NAME: &'static str = "image-encoder";
    type Options = Detector;

    fn open(models: &Path, compute: Compute, _: &Detector) -> Result<Self, ServiceError> {
        ImageEncoder::open(models, &setup(compute))
            .map(Self)
            .map_err(|e| ServiceError::failed_precondition(e.to_string()))
    }

    fn watched<R>(watch: Watch, work: impl FnOnce() -> R) -> R {
        model::memory::watched(move |bytes| watch.allows(bytes), work)
    }

    fn files(models: &Path, detector: &Detector) -> Vec<PathBuf> {
        let mut files = checkpoint::files(models, checkpoint::Stage::ImageEncoder, Choice::Auto);
        // Another detector finds other faces, so it is told apart as another checkpoint is.
        if !files.is_empty() {
            files.extend(detector.file().map(Path::to_owned));
        }
        files
    }
}

/// Answers `ImageEncoderService`.
pub(crate) struct Service {
    host: Arc<StageHost<Model>>,
    limits: Limits,
    detector: Detector,
}

impl Service {
    pub(crate) fn new(host: Arc<StageHost<Model>>, max_tensor_bytes: u64, detector: Detector) -> Self {
        Self { host, limits: Limits::new(max_tensor_bytes, 1), detector }
    }
}

#[tonic::async_trait]
impl ImageEncoderService for Service {
    type EncodeReferenceStream = ReplyStream<EncodeReferenceResponse>;

    async fn encode_reference(
        &self,
        request: Request<Streaming<EncodeReferenceRequest>>,
    ) -> Result<Response<Self::EncodeReferenceStream>, Status> {
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
        let given =
            header.face.map(|f| face::FaceBox { x: f.x, y: f.y, width: f.width, height: f.height, score: None });
        let detector = self.detector.clone();
        let work = move |model: &mut Model, _: &_| {
            let size = (header.width, header.height);
            let reference = model.0.encode_with(&picture, size, given, &detector).map_err(fault)?;
            let host = |name, tensor| HostTensor::from_candle(name, tensor).map_err(ServiceError::internal);
            let tensors =
                vec![host("reference_latents", &reference.latents)?, host("face_mask", &reference.face_mask)?];
            Ok((tensors, reference.faces, reference.face))
        };
        let ((tensors, faces, face), took) = self.host.submit_new(work)?.timed().await?;
        // A face that the caller gave counts as found.
        let faces = if faces.is_empty() { face.iter().map(boxed).collect() } else { faces.iter().map(boxed).collect() };
        let (memory, device_use) = (Some(self.host.memory()), Some(self.host.used(took)));
        let summary = EncodeReferenceSummary { faces, face: face.as_ref().map(boxed), memory, device_use };
        let summary = EncodeReferenceResponse { body: Some(encode_reference_response::Body::Summary(summary)) };
        Ok(Response::new(reply(tensors, wrap, summary)))
    }
}

fn boxed(face: &face::FaceBox) -> FaceBox {
    FaceBox { x: face.x, y: face.y, width: face.width, height: face.height, score: face.score }
}

fn split(message: EncodeReferenceRequest) -> Item<EncodeReferenceHeader> {
    match message.body {
        Some(encode_reference_request::Body::Header(header)) => Item::Other(header),
        Some(encode_reference_request::Body::Part(part)) => Item::Part(part),
        None => Item::Empty,
    }
}

fn wrap(part: TensorPart) -> EncodeReferenceResponse {
    EncodeReferenceResponse { body: Some(encode_reference_response::Body::Part(part)) }
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
