//! The public gRPC service.

use std::{pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use proto::v1::{
    self, CreateGenerationRequest, GenerateRequest, GenerateResponse, GenerationSpec, GenerationState,
    avatar_service_server::{AvatarService, AvatarServiceServer},
};
use tokio::io::AsyncSeekExt as _;
use tokio_util::io::ReaderStream;
use tonic::{Code, Request, Response, Status, Streaming, metadata::MetadataMap};

use crate::{
    fault::{Fault, Kind},
    intake::{File, Intake, Upload},
    planning,
    scheduler::Gateway,
    store::Record,
};

/// Most bytes of one message that comes in: more than any allowed one, so that the refusal can name the field.
const MESSAGE_BYTES: usize = 16 << 20;
/// Bytes of video in one message.
const VIDEO_CHUNK: usize = 256 << 10;
/// How long a caller may be silent in the middle of an upload.
const UPLOAD_SILENCE: Duration = Duration::from_secs(60);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The routes of the service.
pub(crate) fn routes(gateway: Gateway) -> tonic::service::Routes {
    let service = AvatarServiceServer::new(Service { gateway }).max_decoding_message_size(MESSAGE_BYTES);
    tonic::service::Routes::new(service)
}

#[derive(Debug)]
struct Service {
    gateway: Gateway,
}

/// One message of an upload.
enum Piece {
    Spec(GenerationSpec),
    Bytes(File, Vec<u8>),
    Empty,
}

impl From<CreateGenerationRequest> for Piece {
    fn from(message: CreateGenerationRequest) -> Self {
        use v1::create_generation_request::Body;
        match message.body {
            Some(Body::Spec(spec)) => Self::Spec(spec),
            Some(Body::PictureChunk(bytes)) => Self::Bytes(File::Picture, bytes),
            Some(Body::AudioChunk(bytes)) => Self::Bytes(File::Audio, bytes),
            None => Self::Empty,
        }
    }
}

impl From<GenerateRequest> for Piece {
    fn from(message: GenerateRequest) -> Self {
        use v1::generate_request::Body;
        match message.body {
            Some(Body::Spec(spec)) => Self::Spec(spec),
            Some(Body::PictureChunk(bytes)) => Self::Bytes(File::Picture, bytes),
            Some(Body::AudioChunk(bytes)) => Self::Bytes(File::Audio, bytes),
            None => Self::Empty,
        }
    }
}

/// Reads a whole upload, within the limits.
async fn receive<M: Into<Piece>>(mut messages: Streaming<M>) -> Result<Upload, Fault> {
    let mut intake = Intake::default();
    loop {
        let message = tokio::time::timeout(UPLOAD_SILENCE, messages.message()).await.map_err(|_| {
            let message = format!("nothing came for {} s in the middle of the request", UPLOAD_SILENCE.as_secs());
            Fault::new(Kind::Deadline, message)
        })?;
        match message.map_err(|status| unreadable(&status))?.map(Into::into) {
            Some(Piece::Spec(spec)) => intake.spec(spec)?,
            Some(Piece::Bytes(file, bytes)) => intake.bytes(file, &bytes)?,
            Some(Piece::Empty) => return Err(Fault::new(Kind::Invalid, "a message of the request is empty")),
            None => return intake.finish(),
        }
    }
}

/// What the caller did when its message could not be read.
fn unreadable(status: &Status) -> Fault {
    let text = status.message();
    match status.code() {
        Code::Internal if text.contains("Protobuf") && text.contains("prompt") => {
            Fault::invalid("prompt", "is not valid UTF-8")
        }
        Code::Internal if text.contains("Protobuf") => Fault::new(Kind::Invalid, text),
        Code::OutOfRange => {
            let message = format!("{text}; a prompt has at most 10000 bytes, a chunk of a file at most 1 MiB");
            Fault::new(Kind::Invalid, message)
        }
        _ => Fault::new(Kind::Cancelled, format!("the request ended in the middle: {text}")),
    }
}

/// When the caller's patience ends, from `grpc-timeout`.
fn deadline(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let amount: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

/// Cancels and removes the generation of a `Generate` call when the call ends, however it ends.
#[derive(Debug)]
struct Owned {
    gateway: Gateway,
    record: Arc<Record>,
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.gateway.store().forget(&self.record);
        let (gateway, id) = (self.gateway.clone(), self.record.id());
        // A stream can be dropped outside the runtime only when the process ends, and the folder with it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { gateway.store().remove_video(id).await });
        }
    }
}

/// The events of a call's generation, then its video.
fn answers(owned: Owned, until: Option<tokio::time::Instant>) -> Answers<GenerateResponse> {
    use v1::generate_response::Body;
    let record = Arc::clone(&owned.record);
    let events = Arc::clone(&record).events(1).map(|event| Ok(GenerateResponse { body: Some(Body::Event(event)) }));
    let path = owned.gateway.store().video_path(record.id());
    let video = stream::once(async move {
        let generation = record.generation();
        match generation.state() {
            GenerationState::Completed => open_video(&path, 0).await.map(|(file, _)| video_chunks(file)),
            GenerationState::Failed => Err(failed(&record)),
            _ => Err(Fault::new(Kind::Cancelled, "the generation was cancelled").to_status()),
        }
    })
    .try_flatten()
    .map_ok(|data| GenerateResponse { body: Some(Body::VideoChunk(data.to_vec())) });
    let all = Box::pin(events.chain(video));
    // `owned` lives as long as the stream: its end, or its being dropped, ends the generation.
    Box::pin(stream::unfold((all, owned, false), move |(mut all, owned, over)| async move {
        if over {
            return None;
        }
        let next = match until {
            Some(until) => tokio::time::timeout_at(until, all.next()).await,
            None => Ok(all.next().await),
        };
        match next {
            Ok(Some(item)) => {
                let over = item.is_err();
                Some((item, (all, owned, over)))
            }
            Ok(None) => None,
            Err(_) => {
                let fault = Fault::new(Kind::Deadline, "the caller's deadline passed; the generation is cancelled");
                Some((Err(fault.to_status()), (all, owned, true)))
            }
        }
    }))
}

/// The status of a failed generation's call: its own fault if the record kept enough of it.
fn failed(record: &Record) -> Status {
    match record.fault() {
        Some(fault) => fault.to_status(),
        None => Fault::new(Kind::Internal, "the generation failed").to_status(),
    }
}

async fn open_video(path: &std::path::Path, offset: u64) -> Result<(tokio::fs::File, u64), Status> {
    let missing = |error: std::io::Error| Fault::internal("the video cannot be read", &error).to_status();
    let mut file = tokio::fs::File::open(path).await.map_err(missing)?;
    let total = file.metadata().await.map_err(missing)?.len();
    if offset > total {
        let message = format!("offset {offset} is past the end; the video has {total} bytes");
        return Err(Fault::new(Kind::OutOfRange, message).to_status());
    }
    file.seek(std::io::SeekFrom::Start(offset)).await.map_err(missing)?;
    Ok((file, total))
}

fn video_chunks(file: tokio::fs::File) -> impl Stream<Item = Result<Bytes, Status>> + Send {
    ReaderStream::with_capacity(file, VIDEO_CHUNK)
        .map_err(|error| Fault::internal("the video cannot be read", &error).to_status())
}

#[tonic::async_trait]
impl AvatarService for Service {
    type GenerateStream = Answers<GenerateResponse>;
    type WatchGenerationStream = Answers<v1::WatchGenerationResponse>;
    type DownloadVideoStream = Answers<v1::DownloadVideoResponse>;

    async fn create_generation(
        &self,
        request: Request<Streaming<CreateGenerationRequest>>,
    ) -> Result<Response<v1::CreateGenerationResponse>, Status> {
        let made = async {
            let place = self.gateway.admit()?;
            let upload = receive(request.into_inner()).await?;
            self.gateway.accept(upload, place).await
        };
        let record = made.await.map_err(|fault: Fault| fault.to_status())?;
        Ok(Response::new(v1::CreateGenerationResponse { generation: Some(record.generation()) }))
    }

    async fn generate(
        &self,
        request: Request<Streaming<GenerateRequest>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let until = deadline(request.metadata()).map(|patience| tokio::time::Instant::now() + patience);
        let made = async {
            let place = self.gateway.admit()?;
            let upload = receive(request.into_inner()).await?;
            let record = self.gateway.accept(upload, place).await?;
            Ok(Owned { gateway: self.gateway.clone(), record })
        };
        let owned = made.await.map_err(|fault: Fault| fault.to_status())?;
        Ok(Response::new(answers(owned, until)))
    }

    async fn get_generation(
        &self,
        request: Request<v1::GetGenerationRequest>,
    ) -> Result<Response<v1::GetGenerationResponse>, Status> {
        let record = self.gateway.store().get(&request.get_ref().generation_id).map_err(|fault| fault.to_status())?;
        Ok(Response::new(v1::GetGenerationResponse { generation: Some(record.generation()) }))
    }

    async fn watch_generation(
        &self,
        request: Request<v1::WatchGenerationRequest>,
    ) -> Result<Response<Self::WatchGenerationStream>, Status> {
        let request = request.into_inner();
        let record = self.gateway.store().get(&request.generation_id).map_err(|fault| fault.to_status())?;
        let events = record.events(request.from_number);
        let answers = events.map(|event| Ok(v1::WatchGenerationResponse { event: Some(event) }));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn cancel_generation(
        &self,
        request: Request<v1::CancelGenerationRequest>,
    ) -> Result<Response<v1::CancelGenerationResponse>, Status> {
        let record = self.gateway.store().get(&request.get_ref().generation_id).map_err(|fault| fault.to_status())?;
        let generation = cancel(&record).await;
        Ok(Response::new(v1::CancelGenerationResponse { generation: Some(generation) }))
    }

    async fn delete_generation(
        &self,
        request: Request<v1::DeleteGenerationRequest>,
    ) -> Result<Response<v1::DeleteGenerationResponse>, Status> {
        let id = &request.get_ref().generation_id;
        self.gateway.store().remove(id).await.map_err(|fault| fault.to_status())?;
        Ok(Response::new(v1::DeleteGenerationResponse {}))
    }

    async fn plan_generation(
        &self,
        request: Request<v1::PlanGenerationRequest>,
    ) -> Result<Response<v1::PlanGenerationResponse>, Status> {
        let plan = self.gateway.plan(request.into_inner()).await.map_err(|fault| fault.to_status())?;
        Ok(Response::new(v1::PlanGenerationResponse { plan: Some(planning::message(&plan)) }))
    }

    async fn list_tiers(&self, _: Request<v1::ListTiersRequest>) -> Result<Response<v1::ListTiersResponse>, Status> {
        Ok(Response::new(planning::list(self.gateway.tiers())))
    }

    async fn download_video(
        &self,
        request: Request<v1::DownloadVideoRequest>,
    ) -> Result<Response<Self::DownloadVideoStream>, Status> {
        let request = request.into_inner();
        let path = completed_video(&self.gateway, &request.generation_id).map_err(|fault| fault.to_status())?;
        let (file, total) = open_video(&path, request.offset).await?;
        let first = v1::DownloadVideoResponse { data: Vec::new(), total_bytes: total };
        let rest = video_chunks(file).map_ok(|data| v1::DownloadVideoResponse { data: data.to_vec(), total_bytes: 0 });
        Ok(Response::new(Box::pin(stream::once(async { Ok(first) }).chain(rest))))
    }
}

/// Cancels a generation and gives it as it is then.
pub(crate) async fn cancel(record: &Record) -> v1::Generation {
    record.cancel_token().cancel();
    // The run notices at its next await; a moment is plenty, and the answer is true either way.
    let _ = tokio::time::timeout(Duration::from_secs(10), record.wait_end()).await;
    record.generation()
}

/// The video's file of a generation that is completed.
pub(crate) fn completed_video(gateway: &Gateway, id: &str) -> Result<std::path::PathBuf, Fault> {
    let record = gateway.store().get(id)?;
    if record.completed() {
        return Ok(gateway.store().video_path(record.id()));
    }
    let state = crate::api::video::status_name(record.generation().state());
    Err(Fault::new(Kind::Precondition, format!("the generation is {state}; a video is there once it is completed")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_read_in_every_unit_and_nonsense_is_none() {
        let read = |text: &'static str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            deadline(&metadata)
        };
        assert_eq!(read("2S"), Some(Duration::from_secs(2)));
        assert_eq!(read("1500m"), Some(Duration::from_millis(1500)));
        assert_eq!(read("1H"), Some(Duration::from_secs(3600)));
        for nonsense in ["", "S", "-1S", "123456789S", "5x", "1.5S"] {
            assert_eq!(read(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn a_prompt_that_is_no_text_is_the_callers_fault() {
        let status = Status::internal("failed to decode Protobuf message: GenerationSpec.prompt: invalid string value");
        assert_eq!(unreadable(&status).field(), Some("prompt"));
    }
}
