//! The REST calls.

use std::time::Duration;

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, FromRequest as _, Multipart, Path, Request, State},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use http::{HeaderMap, HeaderValue, StatusCode};
use tower_http::catch_panic::CatchPanicLayer;

use super::{
    content, events, form, list, openapi, plan, preview,
    video::{Deleted, ErrorBody, Video},
};
use crate::{
    fault::{Fault, Kind},
    intake::Order,
    scheduler::Gateway,
    validate::{AUDIO_BYTES, PICTURE_BYTES},
};

/// Most bytes of a request: both files, the recording as base64, and room for the other fields.
const BODY_BYTES: usize = PICTURE_BYTES + AUDIO_BYTES / 3 * 4 + (1 << 20);
/// How long a form may take to arrive: 128 MiB on a slow line.
const UPLOAD_TIME: Duration = Duration::from_secs(15 * 60);

/// All paths. A handler that panics answers 500; the process goes on.
pub(crate) fn router(gateway: Gateway) -> Router {
    Router::new()
        .route("/v1/videos", post(create).layer(DefaultBodyLimit::max(BODY_BYTES)).get(list::list))
        .route("/v1/videos/{id}", get(show).delete(remove))
        .route("/v1/videos/{id}/content", get(content::content))
        .route("/v1/videos/{id}/events", get(events::events))
        .route("/v1/videos/{id}/previews/{step}", get(preview::preview))
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
    params(
        ("Idempotency-Key" = Option<String>, Header,
            description = "1 to 255 visible ASCII characters. The same request with the same key is accepted once."),
        ("Avatar-Caller" = Option<String>, Header,
            description = "Who asks: at most 64 visible ASCII characters. Callers of one priority take turns."),
        ("Avatar-Priority" = Option<i64>, Header, description = "-9 to 9, the higher the earlier; 0 if absent."),
        ("Avatar-Label" = Option<String>, Header,
            description = "A word of the caller's own, to list by: at most 64 visible ASCII characters."),
        ("Avatar-Deadline" = Option<u64>, Header,
            description = "Seconds, 1 to 2592000, in which it must have ended; else it fails. \
                Absent: when it takes much longer than predicted."),
        ("Avatar-Webhook" = Option<String>, Header,
            description = "Whom to call back once the video is completed, failed or cancelled: an https URL of at most \
                2048 bytes. Signed as the Standard Webhooks specification says, tried for 24 hours, at least once."),
    ),
    request_body(content = openapi::CreateVideo, content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "Accepted; it runs on without the caller.", body = Video),
        (status = 400, description = "A field is wrong; `param` names it.", body = ErrorBody),
        (status = 409, description = "The key is that of another request.", body = ErrorBody),
        (status = 413, description = "A file or the request is too large.", body = ErrorBody),
        (status = 415, description = "Not multipart/form-data, or a file of a kind that is not decoded.", body = ErrorBody),
        (status = 422, description = "A file that cannot be used.", body = ErrorBody),
        (status = 429, description = "The queue or the disk is full; `Retry-After` says when to try again.", body = ErrorBody),
        (status = 503, description = "A stage cannot be reached, or the gateway shuts down.", body = ErrorBody),
        (status = 507, description = "The devices do not hold it; the message says what they would.", body = ErrorBody),
    )
)]
pub(crate) async fn create(State(gateway): State<Gateway>, request: Request) -> Result<Json<Video>, Fault> {
    let order = order(request.headers())?;
    let parts = Multipart::from_request(request, &())
        .await
        .map_err(|_| Fault::new(Kind::UnsupportedMedia, "the request must be multipart/form-data with a boundary"))?;
    let place = gateway.admit(&order).await?;
    let upload = tokio::time::timeout(UPLOAD_TIME, form::read(parts, order))
        .await
        .map_err(|_| Fault::new(Kind::Deadline, "the form took more than 15 minutes to arrive"))??;
    Ok(Json(Video::from(&gateway.accept(upload, place, false).await?)))
}

/// How a request is to be served, from its headers.
fn order(headers: &HeaderMap) -> Result<Order, Fault> {
    let text = |name: &str, field: &str| match headers.get(name).map(HeaderValue::to_str) {
        None => Ok(""),
        Some(Ok(text)) => Ok(text),
        Some(Err(_)) => Err(Fault::invalid(field, format!("{name} is no visible ASCII text"))),
    };
    let (caller, priority) = (text("avatar-caller", "caller")?, text("avatar-priority", "priority")?);
    let order = Order::read(caller, priority, text("idempotency-key", "idempotency_key")?)?;
    let order = order.labelled(text("avatar-label", "label")?)?;
    order.calling(text("avatar-webhook", "webhook")?).within(text("avatar-deadline", "deadline")?)
}

/// Shows a generation as it stands.
#[utoipa::path(
    get, path = "/v1/videos/{id}", tag = "videos", params(("id" = String, Path, description = "The generation.")),
    responses((status = 200, body = Video), (status = 404, description = "No generation has this id.", body = ErrorBody))
)]
pub(crate) async fn show(State(gateway): State<Gateway>, Path(id): Path<String>) -> Result<Json<Video>, Fault> {
    Ok(Json(Video::from(&gateway.get(&id).await?)))
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
    Ok(Json(Video::from(&gateway.store().cancel(&id).await?)))
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
