//! A preview's bytes.

use axum::{
    body::Body,
    extract::{Path, State},
    response::Response,
};
use http::{
    HeaderMap, HeaderValue, StatusCode,
    header::{CONTENT_TYPE, ETAG},
};

use super::{
    content::{header, is_known},
    video::ErrorBody,
};
use crate::{
    fault::{Fault, Kind},
    scheduler::Gateway,
};

/// Gives the JPEG of a preview that an event told of.
#[utoipa::path(
    get, path = "/v1/videos/{id}/previews/{step}", tag = "videos",
    params(
        ("id" = String, Path, description = "The generation."),
        ("step" = u32, Path, description = "`preview.step` of the event."),
        ("If-None-Match" = Option<String>, Header, description = "The ETag of what is there already."),
    ),
    responses(
        (status = 200, description = "The picture; `ETag` is its SHA-256.", body = Vec<u8>, content_type = "image/jpeg"),
        (status = 304, description = "The caller has the picture already."),
        (status = 404, description = "No generation has this id, or it has no preview of this step.", body = ErrorBody),
    )
)]
pub(crate) async fn preview(
    State(gateway): State<Gateway>,
    Path((id, step)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, Fault> {
    let step = step.parse().map_err(|_| Fault::new(Kind::NotFound, "the step of a preview is a number"))?;
    let (kept, file) = gateway.store().preview(&id, step).await?;
    let tag = format!("\"{}\"", kept.hash);
    let mut answer = Response::new(Body::empty());
    answer.headers_mut().insert(ETAG, header(&tag)?);
    if is_known(&headers, &tag) {
        *answer.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok(answer);
    }
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("image/jpeg"));
    *answer.body_mut() = Body::from(file);
    Ok(answer)
}
