//! The REST calls.

use std::time::Duration;

use axum::{
    Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, FromRequest as _, Multipart, Path, Request, State},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use http::{
    HeaderValue, StatusCode,
    header::{CONTENT_LENGTH, CONTENT_TYPE},
};
use tokio_util::io::ReaderStream;
use tower_http::catch_panic::CatchPanicLayer;

use super::{
    form, openapi, plan,
    video::{Deleted, ErrorBody, Video},
};
use crate::{
    fault::{Fault, Kind},
    scheduler::Gateway,
    service,
    validate::{AUDIO_BYTES, PICTURE_BYTES},
};

/// Most bytes of a request: both files, the recording as base64, and room for the other fields.
const BODY_BYTES: usize = PICTURE_BYTES + AUDIO_BYTES / 3 * 4 + (1 << 20);
/// How long a form may take to arrive: 128 MiB on a slow line.
const UPLOAD_TIME: Duration = Duration::from_secs(15 * 60);
/// Bytes of video read at a time.
const VIDEO_CHUNK: usize = 256 << 10;

/// All paths. A handler that panics answers 500; the process goes on.
pub(crate) fn router(gateway: Gateway) -> Router {
    Router::new()
        .route("/v1/videos", post(create).layer(DefaultBodyLimit::max(BODY_BYTES)))
        .route("/v1/videos/{id}", get(show).delete(remove))
        .route("/v1/videos/{id}/content", get(content))
        .route("/v1/videos/{id}/cancel", post(cancel))
        .route("/v1/plans", post(plan::create))
        .route("/v1/tiers", get(plan::tiers))
        .route("/openapi.json", get(openapi::document))
        .route("/healthz", get(healthz))
        .fallback(unknown)
        .method_not_allowed_fallback(not_allowed)
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(gateway)
}

/// Accepts a generation.
#[utoipa::path(
    post, path = "/v1/videos", tag = "videos",
    request_body(content = openapi::CreateVideo, content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "Accepted; it runs on without the caller.", body = Video),
        (status = 400, description = "A field is wrong; `param` names it.", body = ErrorBody),
        (status = 413, description = "A file or the request is too large.", body = ErrorBody),
        (status = 415, description = "Not multipart/form-data, or a file of a kind that is not decoded.", body = ErrorBody),
        (status = 422, description = "A file that cannot be used.", body = ErrorBody),
        (status = 429, description = "The queue is full; `Retry-After` says when to try again.", body = ErrorBody),
        (status = 503, description = "A stage cannot be reached, or the gateway shuts down.", body = ErrorBody),
    )
)]
pub(crate) async fn create(State(gateway): State<Gateway>, request: Request) -> Result<Json<Video>, Fault> {
    let parts = Multipart::from_request(request, &())
        .await
        .map_err(|_| Fault::new(Kind::UnsupportedMedia, "the request must be multipart/form-data with a boundary"))?;
    let place = gateway.admit()?;
    let upload = tokio::time::timeout(UPLOAD_TIME, form::read(parts))
        .await
        .map_err(|_| Fault::new(Kind::Deadline, "the form took more than 15 minutes to arrive"))??;
    let record = gateway.accept(upload, place).await?;
    Ok(Json(Video::from(&record.generation())))
}

/// Shows a generation as it stands.
#[utoipa::path(
    get, path = "/v1/videos/{id}", tag = "videos", params(("id" = String, Path, description = "The generation.")),
    responses((status = 200, body = Video), (status = 404, description = "No generation has this id.", body = ErrorBody))
)]
pub(crate) async fn show(State(gateway): State<Gateway>, Path(id): Path<String>) -> Result<Json<Video>, Fault> {
    Ok(Json(Video::from(&gateway.store().get(&id)?.generation())))
}

/// Gives the MP4.
#[utoipa::path(
    get, path = "/v1/videos/{id}/content", tag = "videos",
    params(("id" = String, Path, description = "The generation.")),
    responses(
        (status = 200, description = "The whole file.", body = Vec<u8>, content_type = "video/mp4"),
        (status = 404, description = "No generation has this id.", body = ErrorBody),
        (status = 409, description = "It is not completed.", body = ErrorBody),
    )
)]
pub(crate) async fn content(State(gateway): State<Gateway>, Path(id): Path<String>) -> Result<Response, Fault> {
    let path = service::completed_video(&gateway, &id)?;
    let unreadable = |error: std::io::Error| Fault::internal("the video cannot be read", &error);
    let file = tokio::fs::File::open(path).await.map_err(unreadable)?;
    let bytes = file.metadata().await.map_err(unreadable)?.len();
    let mut response = Response::new(Body::from_stream(ReaderStream::with_capacity(file, VIDEO_CHUNK)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("video/mp4"));
    response.headers_mut().insert(CONTENT_LENGTH, bytes.into());
    Ok(response)
}

/// Cancels if need be, and removes the record and the video.
#[utoipa::path(
    delete, path = "/v1/videos/{id}", tag = "videos", params(("id" = String, Path, description = "The generation.")),
    responses((status = 200, body = Deleted), (status = 404, description = "No generation has this id.", body = ErrorBody))
)]
pub(crate) async fn remove(State(gateway): State<Gateway>, Path(id): Path<String>) -> Result<Json<Deleted>, Fault> {
    gateway.store().remove(&id).await?;
    Ok(Json(Deleted { id, object: "video.deleted", deleted: true }))
}

/// Stops a generation: at once while queued, else within a step. One that has ended is given as it is.
#[utoipa::path(
    post, path = "/v1/videos/{id}/cancel", tag = "videos",
    params(("id" = String, Path, description = "The generation.")),
    responses((status = 200, body = Video), (status = 404, description = "No generation has this id.", body = ErrorBody))
)]
pub(crate) async fn cancel(State(gateway): State<Gateway>, Path(id): Path<String>) -> Result<Json<Video>, Fault> {
    let record = gateway.store().get(&id)?;
    Ok(Json(Video::from(&service::cancel(&record).await)))
}

/// Says that the gateway answers.
#[utoipa::path(get, path = "/healthz", tag = "gateway", responses((status = 200, description = "`ok`", body = String)))]
pub(crate) async fn healthz() -> &'static str {
    "ok"
}

async fn unknown() -> Fault {
    Fault::new(Kind::NotFound, "no such path; /openapi.json lists them")
}

async fn not_allowed() -> Response {
    let fault = Fault::new(Kind::Invalid, "this path does not take this method; /openapi.json lists them");
    let mut response = fault.into_response();
    *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    response
}

fn panicked(_: Box<dyn std::any::Any + Send + 'static>) -> Response {
    Fault::internal("the request failed", &"a panic").into_response()
}
