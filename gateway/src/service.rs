//! The public gRPC service.

use std::{pin::Pin, time::Duration};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use proto::v1::{
    self, CreateGenerationRequest, GenerateRequest, GenerateResponse, GenerationSpec, GenerationState,
    avatar_service_server::{AvatarService, AvatarServiceServer},
};
use tonic::{Code, Request, Response, Status, Streaming, metadata::MetadataMap};
use uuid::Uuid;

use crate::{
    fault::{Fault, Kind},
    intake::{File, Intake, Order, Upload},
    planning,
    scheduler::{Gateway, Place},
    store::{
        Listing, Store,
        artifacts::{Artifact, Content},
    },
};

/// Most bytes of one message that comes in: more than any allowed one, so that the refusal can name the field.
const MESSAGE_BYTES: usize = 16 << 20;
/// How long a watcher hears nothing at most.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Generations of a page, unless the caller says how many.
pub(crate) const PAGE: usize = 20;
/// Most generations of a page.
pub(crate) const MOST_PAGE: usize = 100;
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

/// Takes a place in the queue and reads a whole upload, within the limits.
async fn receive<M: Into<Piece> + Keyed>(
    gateway: &Gateway,
    request: Request<Streaming<M>>,
) -> Result<(Upload, Place), Fault> {
    let (metadata, _, mut messages) = request.into_parts();
    let mut intake = Intake::default();
    let mut message = next(&mut messages).await?;
    let key = message.as_mut().map(Keyed::take_key).unwrap_or_default();
    let text = |name: &str, field: &str| match metadata.get(name).map(|value| value.to_str()) {
        None => Ok(""),
        Some(Ok(text)) => Ok(text),
        Some(Err(_)) => Err(Fault::invalid(field, format!("{name} is no visible ASCII text"))),
    };
    let order = Order::read(text("avatar-caller", "caller")?, text("avatar-priority", "priority")?, &key)?
        .labelled(text("avatar-label", "label")?)?
        .calling(text("avatar-webhook", "webhook")?)
        .within(text("avatar-deadline", "deadline")?)?;
    let place = gateway.admit(&order).await?;
    loop {
        match message.map(Into::into) {
            Some(Piece::Spec(spec)) => intake.spec(spec)?,
            Some(Piece::Bytes(file, bytes)) => intake.bytes(file, &bytes)?,
            Some(Piece::Empty) => return Err(Fault::new(Kind::Invalid, "a message of the request is empty")),
            None => return Ok((intake.finish(order)?, place)),
        }
        message = next(&mut messages).await?;
    }
}

/// The next message of an upload.
async fn next<M>(messages: &mut Streaming<M>) -> Result<Option<M>, Fault> {
    let message = tokio::time::timeout(UPLOAD_SILENCE, messages.message()).await.map_err(|_| {
        let message = format!("nothing came for {} s in the middle of the request", UPLOAD_SILENCE.as_secs());
        Fault::new(Kind::Deadline, message)
    })?;
    message.map_err(|status| unreadable(&status))
}

/// A message that may bear the caller's key for the request.
trait Keyed {
    fn take_key(&mut self) -> String;
}

impl Keyed for CreateGenerationRequest {
    fn take_key(&mut self) -> String {
        std::mem::take(&mut self.idempotency_key)
    }
}

impl Keyed for GenerateRequest {
    /// The generation of this call ends with it, so there is nothing to be found again.
    fn take_key(&mut self) -> String {
        String::new()
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
    id: Uuid,
}

impl Drop for Owned {
    fn drop(&mut self) {
        let (gateway, id) = (self.gateway.clone(), self.id.to_string());
        // A stream can be dropped outside the runtime only when the process ends; the next one removes what belonged
        // to its calls.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(fault) = gateway.store().remove(&id).await {
                    tracing::warn!(generation_id = id, %fault, "a generation whose call has ended stays behind");
                }
            });
        }
    }
}

/// The events of a call's generation, then its video.
fn answers(owned: Owned, until: Option<tokio::time::Instant>) -> Answers<GenerateResponse> {
    use v1::generate_response::Body;
    let (store, id) = (owned.gateway.store().clone(), owned.id);
    let events = store.events(id, 1).map(|event| match event {
        Ok(event) => Ok(GenerateResponse { body: Some(Body::Event(event)) }),
        Err(fault) => Err(fault.to_status()),
    });
    // In a task of its own, as the looks for events: a reader may take nothing in the middle of it.
    let video = stream::once(async move {
        let found = tokio::spawn(async move { ended_video(&store, id).await }).await;
        found.unwrap_or_else(|error| Err(Fault::internal("the video cannot be read", &error).to_status()))
    })
    .map_ok(|video| video_chunks(video, 0))
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

/// The video of a generation that has ended, or why there is none.
async fn ended_video(store: &Store, id: Uuid) -> Result<Content, Status> {
    let generation = store.get(&id.to_string()).await.map_err(|fault| fault.to_status())?;
    match (generation.state(), &generation.failure) {
        (GenerationState::Completed, _) => open_video(store, &generation.generation_id, 0).await,
        (GenerationState::Failed, Some(failure)) => Err(Fault::from_failure(failure).to_status()),
        _ => Err(Fault::new(Kind::Cancelled, "the generation was cancelled").to_status()),
    }
}

/// A completed generation's video, of which an offset is no more than the end.
async fn open_video(store: &Store, id: &str, offset: u64) -> Result<Content, Status> {
    let video = store.video(id).await.map_err(|fault| fault.to_status())?;
    if offset > video.artifact.bytes {
        let message = format!("offset {offset} is past the end; the video has {} bytes", video.artifact.bytes);
        return Err(Fault::new(Kind::OutOfRange, message).to_status());
    }
    Ok(video)
}

fn video_chunks(video: Content, offset: u64) -> impl Stream<Item = Result<Bytes, Status>> + Send {
    video.stream(offset..u64::MAX).map_err(|error| Fault::from(error).to_status())
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
            let (upload, place) = receive(&self.gateway, request).await?;
            self.gateway.accept(upload, place, false).await
        };
        let generation = made.await.map_err(|fault: Fault| fault.to_status())?;
        Ok(Response::new(v1::CreateGenerationResponse { generation: Some(generation) }))
    }

    async fn generate(
        &self,
        request: Request<Streaming<GenerateRequest>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let until = deadline(request.metadata()).map(|patience| tokio::time::Instant::now() + patience);
        let made = async {
            let (upload, place) = receive(&self.gateway, request).await?;
            let gateway = self.gateway.clone();
            // A task of its own: a caller who goes while the generation is being kept leaves it to `Owned` to remove.
            let accepted = tokio::spawn(async move {
                let generation = gateway.accept(upload, place, true).await?;
                let id = Uuid::try_parse(&generation.generation_id);
                let id = id.map_err(|error| Fault::internal("a generation has no id", &error))?;
                Ok(Owned { gateway, id })
            });
            accepted.await.map_err(|error| Fault::internal("the generation could not be accepted", &error))?
        };
        let owned = made.await.map_err(|fault: Fault| fault.to_status())?;
        Ok(Response::new(answers(owned, until)))
    }

    async fn get_generation(
        &self,
        request: Request<v1::GetGenerationRequest>,
    ) -> Result<Response<v1::GetGenerationResponse>, Status> {
        let generation = self.gateway.get(&request.get_ref().generation_id).await;
        let generation = Some(generation.map_err(|fault| fault.to_status())?);
        Ok(Response::new(v1::GetGenerationResponse { generation }))
    }

    async fn watch_generation(
        &self,
        request: Request<v1::WatchGenerationRequest>,
    ) -> Result<Response<Self::WatchGenerationStream>, Status> {
        let request = request.into_inner();
        let id = self.gateway.store().id(&request.generation_id).await.map_err(|fault| fault.to_status())?;
        let events = Box::pin(self.gateway.store().events(id, request.from_number));
        let answers = stream::unfold(events, |mut events| async move {
            let answer = match tokio::time::timeout(HEARTBEAT, events.next()).await {
                Ok(Some(Ok(event))) => Ok(v1::WatchGenerationResponse { event: Some(event) }),
                Ok(Some(Err(fault))) => Err(fault.to_status()),
                Ok(None) => return None,
                Err(_) => Ok(v1::WatchGenerationResponse { event: None }),
            };
            Some((answer, events))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn list_generations(
        &self,
        request: Request<v1::ListGenerationsRequest>,
    ) -> Result<Response<v1::ListGenerationsResponse>, Status> {
        let request = request.into_inner();
        let listed = async {
            let wrong = |field: &str, message: String| Fault::invalid(field, message);
            let limit = match request.page_size {
                0 => PAGE,
                size if size as usize <= MOST_PAGE => size as usize,
                size => return Err(wrong("page_size", format!("{size}; allowed are 0 to {MOST_PAGE}"))),
            };
            let token = |_| wrong("page_token", "it is none that a page gave".into());
            let after = Some(&request.page_token).filter(|token| !token.is_empty());
            let states = request.states.iter().map(|&state| GenerationState::try_from(state));
            let listing = Listing {
                states: states.collect::<Result<_, _>>().map_err(|error| wrong("states", error.to_string()))?,
                created_from_ms: request.created_from_unix_ms,
                created_before_ms: request.created_before_unix_ms,
                oldest_first: request.oldest_first,
                caller: request.caller,
                label: request.label,
                after: after.map(|token| Uuid::try_parse(token)).transpose().map_err(token)?,
                limit,
            };
            self.gateway.list(&listing).await
        };
        let (generations, next) = listed.await.map_err(|fault| fault.to_status())?;
        let next_page_token = next.map(|id| id.to_string()).unwrap_or_default();
        Ok(Response::new(v1::ListGenerationsResponse { generations, next_page_token }))
    }

    async fn cancel_generation(
        &self,
        request: Request<v1::CancelGenerationRequest>,
    ) -> Result<Response<v1::CancelGenerationResponse>, Status> {
        let generation = self.gateway.store().cancel(&request.get_ref().generation_id).await;
        let generation = Some(generation.map_err(|fault| fault.to_status())?);
        Ok(Response::new(v1::CancelGenerationResponse { generation }))
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

    async fn get_preview(
        &self,
        request: Request<v1::GetPreviewRequest>,
    ) -> Result<Response<v1::GetPreviewResponse>, Status> {
        let v1::GetPreviewRequest { generation_id, step } = request.into_inner();
        let preview = self.gateway.store().preview(&generation_id, step).await;
        let (Artifact { hash: sha256, .. }, data) = preview.map_err(|fault| fault.to_status())?;
        Ok(Response::new(v1::GetPreviewResponse { data, sha256 }))
    }

    async fn list_tiers(&self, _: Request<v1::ListTiersRequest>) -> Result<Response<v1::ListTiersResponse>, Status> {
        Ok(Response::new(planning::list(self.gateway.tiers())))
    }

    async fn download_video(
        &self,
        request: Request<v1::DownloadVideoRequest>,
    ) -> Result<Response<Self::DownloadVideoStream>, Status> {
        let request = request.into_inner();
        let video = open_video(self.gateway.store(), &request.generation_id, request.offset).await?;
        let Artifact { hash, bytes } = video.artifact.clone();
        let first = v1::DownloadVideoResponse { data: Vec::new(), total_bytes: bytes, sha256: hash };
        let rest = video_chunks(video, request.offset)
            .map_ok(|data| v1::DownloadVideoResponse { data: data.to_vec(), ..v1::DownloadVideoResponse::default() });
        Ok(Response::new(Box::pin(stream::once(async { Ok(first) }).chain(rest))))
    }
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
